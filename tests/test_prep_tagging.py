"""Tags reach word pieces by character offsets, whatever the text holds."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posmask.prep import pos, tagging
from posmask.prep.samples import caption_bits
from posmask.prep.tagging import Token, align
from posmask.prep.wordpiece import SPECIAL, CaptionEncoder, from_vocab, save

# Caption and gold tokens with their tags, hand-made after the UD guidelines.
GOLD = [
    ("He can't see the dog.", "He/PRON ca/AUX n't/PART see/VERB the/DET dog/NOUN ./PUNCT"),
    ("They don’t gonna stay", "They/PRON do/AUX n’t/PART gon/VERB na/PART stay/VERB"),  # noqa: RUF001
    ("I cannot run", "I/PRON can/AUX not/PART run/VERB"),
    ("a black-and-white cat", "a/DET black/ADJ -/PUNCT and/CCONJ -/PUNCT white/ADJ cat/NOUN"),
    ("Café naïve  ÉLÈVE", "Café/NOUN naïve/ADJ ÉLÈVE/NOUN"),
    ("Cafe\u0301 au lait", "Cafe\u0301/NOUN au/X lait/NOUN"),
    ("two 😀 faces👍🏽!", "two/NUM 😀/SYM faces/NOUN 👍🏽/SYM !/PUNCT"),
    ("猫 and 子猫 sleep", "猫/NOUN and/CCONJ 子猫/NOUN sleep/VERB"),
    ("a re\u200bd ball", "a/DET re\u200bd/ADJ ball/NOUN"),
    ("the [MASK] and [SEP]", "the/DET [MASK]/PROPN and/CCONJ [SEP]/PROPN"),
    ("ﬁne ﬂowers", "ﬁne/ADJ ﬂowers/NOUN"),
    ("\tdogs\u00a0\n run ", "dogs/NOUN run/VERB"),
]
WORDS = ["he", "can", "don", "gonna", "cannot", "see", "the", "dog", "black", "and", "white", "cat", "cafe", "lait"]


def gold_tokens(caption, tagged):
    tokens, at = [], 0
    for word_and_tag in tagged.split(" "):
        word, tag = word_and_tag.rsplit("/", 1)
        start = caption.index(word, at)
        at = start + len(word)
        tokens.append(Token(start, at, pos.UPOS_BIT[tag]))
    return tokens


def bits_of(encode, caption, tokens):
    encoded = encode([caption])[0]
    return encoded, caption_bits(encoded, tokens, encode.unk_id, [True] * len(encoded.words(caption)))


def expected_upos(start, end, tokens):
    """The independent way: the union over the characters of the piece."""
    bits = 0
    for token in tokens:
        bits |= token.bits if set(range(start, end)) & set(range(token.start, token.end)) else 0
    return bits & pos.UPOS_MASK


@pytest.fixture(scope="module", params=["characters", "words"])
def encode(request, tmp_path_factory):
    characters = sorted({c for caption, _ in GOLD for c in caption.lower()} | set("abcdefghijklmnopqrstuvwxyz"))
    characters = [c for c in characters if c.strip()]
    words = WORDS if request.param == "words" else []
    folder = tmp_path_factory.mktemp(request.param) / "tokenizer"
    save(from_vocab([*SPECIAL, *characters, *("##" + c for c in characters), *words], "test"), folder)
    return CaptionEncoder(folder, 64)


@pytest.mark.parametrize(("caption", "tagged"), GOLD)
def test_every_piece_carries_the_gold_tag(encode, caption, tagged):
    tokens = gold_tokens(caption, tagged)
    encoded, bits = bits_of(encode, caption, tokens)
    assert len(bits) == len(encoded.ids)
    assert bits[0] == bits[-1] == 0
    for (start, end), tag in zip(encoded.pieces, bits[1:-1], strict=True):
        assert tag & pos.UPOS_MASK == expected_upos(start, end, tokens) != 0, caption[start:end]
    starts = [bool(tag & pos.TOKEN_START) for tag in bits[1:-1]]
    assert starts[0]
    assert sum(starts) <= len(tokens)


def test_a_piece_of_a_contraction_keeps_both_tags_and_belongs_to_the_larger(encode):
    caption = "He can't"
    aligned = align([(0, 2), (3, 6), (6, 7), (7, 8)], gold_tokens(caption, "He/PRON ca/AUX n't/PART"))
    bits = [own for own, _ in aligned]
    aux, part = pos.UPOS_BIT["AUX"], pos.UPOS_BIT["PART"]
    assert bits[1] == aux | part | pos.TOKEN_START
    assert bits[2] == part | pos.TOKEN_START
    assert bits[3] == part


def test_a_literal_special_token_is_ordinary_text(encode):
    encoded = encode(["the [MASK] and [SEP]"])[0]
    mask, cls, sep = (encode.tokenizer.token_to_id(t) for t in ("[MASK]", "[CLS]", "[SEP]"))
    assert encoded.ids[0] == cls
    assert encoded.ids[-1] == sep
    assert not {mask, cls, sep} & set(encoded.ids[1:-1])


def test_unknown_pieces_are_tagged_but_not_maskable(encode):
    caption = "a ☃ dog"
    encoded, bits = bits_of(encode, caption, gold_tokens(caption, "a/DET ☃/SYM dog/NOUN"))
    snowman = encoded.pieces.index((2, 3)) + 1
    assert encoded.ids[snowman] == encode.unk_id
    starts = pos.TOKEN_START | pos.WORD_START | pos.PHRASE_START | pos.COLLOCATION_START
    assert bits[snowman] == pos.UPOS_BIT["SYM"] | starts
    assert all(tag & pos.MASKABLE for i, tag in enumerate(bits[1:-1], 1) if i != snowman)


@st.composite
def spans(draw, length=30):
    """Ascending, non-overlapping, non-empty spans, with gaps or without."""
    cuts = sorted(draw(st.sets(st.integers(0, length), min_size=2)))
    pairs = list(pairwise(cuts))
    keep = draw(st.lists(st.booleans(), min_size=len(pairs), max_size=len(pairs)))
    return [pair for pair, kept in zip(pairs, keep, strict=True) if kept]


@given(spans(), spans(), st.data())
def test_align_equals_the_definition(pieces, token_spans, data):
    tags = st.sampled_from(list(pos.UPOS_BIT.values()))
    tokens = [Token(start, end, data.draw(tags)) for start, end in token_spans]
    aligned = [bits for bits, _ in align(pieces, tokens)]
    assert [bits & pos.UPOS_MASK for bits in aligned] == [expected_upos(*piece, tokens) for piece in pieces]
    owners = [max(tokens, key=lambda t: min(e, t.end) - max(s, t.start), default=None) for s, e in pieces]
    owners = [o if o and min(e, o.end) > max(s, o.start) else None for (s, e), o in zip(pieces, owners, strict=True)]
    owned = [owner for owner in owners if owner]
    assert sum(bool(bits & pos.TOKEN_START) for bits in aligned) == len(set(owned))


def test_the_tagger_gives_characters_tags_and_function_words():
    nlp = tagging.load_tagger(tagging.find_tagger("auto"))
    caption = "A cat is sleeping  on the red mat."
    tokens = next(tagging.tag(nlp, [caption]))
    assert [caption[t.start : t.end] for t in tokens] == ["A", "cat", "is", "sleeping", "on", "the", "red", "mat", "."]
    expected = ["DET", "NOUN", "AUX", "VERB", "ADP", "DET", "ADJ", "NOUN", "PUNCT"]
    assert [t.bits & pos.UPOS_MASK for t in tokens] == [pos.UPOS_BIT[tag] for tag in expected]
    is_function = [True, False, True, False, True, True, False, False, True]
    assert [bool(t.bits & pos.FUNCTION_WORD) for t in tokens] == is_function
    assert {"ner", "lemmatizer"}.isdisjoint(nlp.pipe_names)
    assert "parser" in nlp.pipe_names


def test_an_unknown_tagger_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match="no spaCy model xx_nowhere; pip install"):
        tagging.find_tagger("xx_nowhere")
