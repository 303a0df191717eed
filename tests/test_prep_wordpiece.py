"""Tokenizers: the same vocabulary every time, exact offsets, cuts at word ends, and nothing the shards cannot hold."""

import random

import pytest

from posmask.prep import wordpiece
from posmask.prep.shards import TokenizerInfo
from posmask.prep.wordpiece import SPECIAL, CaptionEncoder, from_vocab, make, save, train

ANIMALS = ["cat", "cats", "dog", "dogs", "horse", "giraffe", "elephants", "bird", "birds"]
PLACES = ["sun", "sea", "park", "snow"]
CAPTIONS = [f"{n} {a} rest in the {p}." for n in ("two", "the") for a in ANIMALS for p in PLACES]


def vocabulary(tokenizer):
    return sorted(tokenizer.get_vocab().items())


def test_training_is_deterministic_and_independent_of_order():
    first = vocabulary(train(CAPTIONS, 200))
    shuffled = random.Random(0).sample(CAPTIONS, len(CAPTIONS))
    assert all(vocabulary(train(shuffled, 200)) == first for _ in range(3))
    assert [piece for piece, _ in sorted(first, key=lambda item: item[1])][:5] == list(SPECIAL)


def test_training_merges_frequent_words_and_keeps_to_the_size():
    large = train(CAPTIONS, 8192)
    assert {"giraffe", "elephants", "the"} <= set(large.get_vocab())
    small = train(CAPTIONS, 80)
    assert small.get_vocab_size() <= 80
    assert "elephants" not in small.get_vocab()


def test_rare_characters_leave_the_alphabet_first():
    captions = ["ab ba"] * 50 + [f"a{chr(0x4E00 + i)}" for i in range(200)]
    vocab = train(captions, 64).get_vocab()
    assert len(vocab) <= 64
    assert {"a", "b", "##a", "##b"} <= set(vocab)
    assert vocabulary(train(captions, 64)) == sorted(vocab.items())


def test_saved_tokenizer_loads_with_transformers_and_agrees(tmp_path):
    from transformers import AutoTokenizer

    save(train(CAPTIONS, 200), tmp_path / "tokenizer")
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "tokenizer"), local_files_only=True)
    ours = CaptionEncoder(tmp_path / "tokenizer", 48)
    for text in ("Two CATS, unseen zebras!", "naïve café"):
        assert theirs(text)["input_ids"] == ours([text])[0].ids
    assert theirs.mask_token == "[MASK]"
    assert len(theirs) == len(ours.tokenizer.get_vocab())


def test_cuts_at_the_end_of_a_word(tmp_path):
    pieces = ["one", "two", "gi", "##raf", "##fe"]
    save(from_vocab([*SPECIAL, *pieces], "test"), tmp_path / "t")
    encode = CaptionEncoder(tmp_path / "t", 8)  # six pieces
    lengths = [len(e.pieces) for e in encode(["one " * 6, "one " * 7, "one two one two giraffe", "giraffe giraffe"])]
    assert lengths == [6, 6, 4, 6]
    assert [e.is_cut for e in encode(["one " * 6, "one " * 7, "one two one two giraffe"])] == [False, True, True]
    assert encode(["giraffe one"])[0].word_starts == [True, False, False, True]
    tight = CaptionEncoder(tmp_path / "t", 4)  # shorter than the word: cut inside, never to nothing
    assert [(len(e.pieces), e.is_cut) for e in tight(["giraffe"])] == [(2, True)]


def test_info_lists_what_a_random_replacement_may_not_yield(tmp_path):
    entries = ["[PAD]", "[unused0]", "[unused1]", *SPECIAL[1:], "a", "[unused2]", "[odd", "\u2028"]
    save(from_vocab(entries, "test"), tmp_path / "t")
    info = TokenizerInfo.read(tmp_path / "t", "mine")
    assert info.vocab_size == len(entries)
    assert (info.pad_id, info.unk_id, info.cls_id, info.sep_id, info.mask_id) == (0, 3, 4, 5, 6)
    assert info.reserved_ids == (0, 1, 2, 3, 4, 5, 6, 8)


def test_a_cased_vocabulary_is_not_lower_cased(tmp_path):
    save(from_vocab([*SPECIAL, "The", "the"], "test"), tmp_path / "t")
    assert CaptionEncoder(tmp_path / "t", 8)(["The the"])[0].ids == [2, 5, 6, 3]


def test_vocabulary_file_and_folder_give_the_same(tmp_path):
    made = train(CAPTIONS, 200)
    save(made, tmp_path / "t")
    for spec in (tmp_path / "t", tmp_path / "t" / "vocab.txt"):
        assert vocabulary(make(str(spec), ())) == vocabulary(made)


@pytest.mark.parametrize(
    ("spec", "content", "message"),
    [
        ("train:many", None, "must be 64 to 65536"),
        ("train:70000", None, "must be 64 to 65536"),
        ("nowhere/vocab.txt", None, "no such file or folder"),
        ("vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n", r"lacks \[MASK\]"),
        ("vocab.txt", "\n".join([*SPECIAL, "a", "a"]), "an entry twice"),
        ("vocab.txt", "\n".join([*SPECIAL, *map(str, range(65536))]), "65541 entries, the shards hold at most 65536"),
        (".", "", "neither tokenizer.json nor vocab.txt"),
    ],
)
def test_unusable_tokenizers_are_refused(tmp_path, monkeypatch, spec, content, message):
    monkeypatch.chdir(tmp_path)
    if content and spec == "vocab.txt":
        (tmp_path / spec).write_text(content)
    with pytest.raises(ValueError, match=message):
        wordpiece.make(spec, CAPTIONS)
