"""Bits and scores of known sentences, and what a build makes of the files behind them."""

import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from posmask.prep import pos, shards, tagging, word_lists
from posmask.prep.build_shards import main
from posmask.prep.samples import caption_bits, caption_scores
from posmask.prep.tagging import WordLists
from posmask.prep.units import SCORES, Resources, Units, find_anchors
from posmask.prep.wordpiece import SPECIAL, CaptionEncoder, from_vocab, save
from posmask.train.loader import Collator, Shards, View
from posmask.train.masking import parse_mask
from posmask.train.objectives import mask_batch

LETTERS = "abcdefghijklmnopqrstuvwxyz'.,-0123456789"


@pytest.fixture(scope="module")
def encode(tmp_path_factory):
    """One piece a character, so that nearly all words have several."""
    folder = tmp_path_factory.mktemp("letters") / "tokenizer"
    save(from_vocab([*SPECIAL, *LETTERS, *("##" + c for c in LETTERS)], "test"), folder)
    return CaptionEncoder(folder, 255)


@pytest.fixture(scope="module")
def nlp():
    return tagging.load_tagger(tagging.find_tagger("auto"))


def shown(encode, caption, tokens, bit, known=()):
    """The caption with a bar before every piece that has `bit` (spaces gone)."""
    encoded = encode([caption])[0]
    empty = Units(tuple(known), None, (), None, (), {})
    bits = caption_bits(encoded, tokens, encode.unk_id, empty.starts(encoded.words(caption)))[1:-1]
    pieces = [caption[start:end] for start, end in encoded.pieces]
    return "".join(("|" if own & bit else "") + piece for own, piece in zip(bits, pieces, strict=True))


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        (
            "A small brown dog is chasing two red balls on the old bridge.",
            "|Asmallbrowndog|is|chasing|tworedballs|on|theoldbridge|.",
        ),
        ("A black-and-white cat can't sleep.", "|Ablack-and-whitecat|can|'|t|sleep|."),
        ("A man and his dog", "|Aman|and|hisdog"),
    ],
)
def test_phrases_are_noun_chunks_and_single_words(encode, nlp, caption, expected):
    tokens = next(tagging.tag(nlp, [caption]))
    assert shown(encode, caption, tokens, pos.PHRASE_START) == expected


def test_named_entities_are_phrases_on_demand(encode):
    nlp = tagging.load_tagger(tagging.find_tagger("auto"), entities=True)
    caption = "They met in New York on Monday."
    entities = [entity.text for entity in nlp(caption).ents]
    assert entities == ["New York", "Monday"]
    tokens = next(tagging.tag(nlp, [caption]))
    assert shown(encode, caption, tokens, pos.PHRASE_START) == "|They|met|in|NewYork|on|Monday|."


def test_of_overlapping_phrases_the_longer_one_counts():
    import spacy
    from spacy.tokens import Doc, Span

    doc = Doc(spacy.blank("en").vocab, words=["in", "the", "big", "New", "York", "sign"])
    doc.ents = [Span(doc, 3, 5, "GPE")]
    assert tagging._phrases(doc) == ([-1, -1, -1, 0, 0, -1], set())


def test_collocations_begin_at_words(encode):
    caption = "A hot dog stand, hot dogs"
    tokens = []
    known = ["hot dog", "a hot", "dog stand"]
    assert shown(encode, caption, tokens, pos.COLLOCATION_START, known) == "|Ahot|dogstand|,|hot|dogs"
    assert shown(encode, caption, tokens, pos.COLLOCATION_START) == "|A|hot|dog|stand|,|hot|dogs"


def words_with(nlp, caption, bit, lists=WordLists()):  # noqa: B008
    return [caption[t.start : t.end] for t in next(tagging.tag(nlp, [caption], lists)) if t.bits & bit]


CAPTION = "In this photo, two happy dogs run quickly behind the wooden dog house on the right side."


def test_objects_attributes_and_relations_of_a_sentence(nlp):
    assert words_with(nlp, CAPTION, pos.OBJECT) == ["dogs", "house"]  # heads; photo and side are never objects
    assert words_with(nlp, CAPTION, pos.ATTRIBUTE) == ["happy", "wooden", "right"]
    assert words_with(nlp, CAPTION, pos.RELATION) == ["In", "run", "behind", "on"]


def test_lists_replace_the_parse_and_narrow_the_tags(nlp):
    lists = WordLists(frozenset({"dog", "photo", "run"}), frozenset({"quickly"}), frozenset({"behind", "the"}))
    assert words_with(nlp, CAPTION, pos.OBJECT, lists) == ["dog"]  # run is a verb here
    assert words_with(nlp, CAPTION, pos.ATTRIBUTE, lists) == ["happy", "quickly", "wooden", "right"]
    assert words_with(nlp, CAPTION, pos.RELATION, lists) == ["behind"]


def test_every_piece_of_a_word_carries_its_scores(encode):
    caption = "A Cat naps."
    units = Units((), None, (), None, (), {"concreteness": {"cat": 250, "a": 3}, "difference": {"naps": 9}})
    encoded = encode([caption])[0]
    scores = caption_scores(encoded, units.score_rows(encoded.words(caption)))
    assert scores.dtype == np.uint8
    assert scores.tolist() == [[0, 0], [3, 0], *[[250, 0]] * 3, *[[0, 9]] * 4, [0, 0], [0, 0]]


def test_ratings_are_scaled_and_other_formats_read(tmp_path):
    path = tmp_path / "ratings"
    rows = ["Word Bigram Conc.M Conc.SD", "Apple 0 5.0 0.1", "baking_soda 1 4.9 0", "idea 0 1.0 1", "as 0 3 1"]
    path.write_text("".join(row.replace(" ", "\t").replace("_", " ") + "\n" for row in rows))
    expected = {"apple": 255, "idea": 1, "as": 128}
    assert word_lists.read_concreteness(path, "--x") == expected
    path.write_text('"Word","Conc.M"\n"apple",5\n"idea",1\n"as",3\n')
    assert word_lists.read_concreteness(path, "--x") == expected
    path.write_text("apple\t5\nidea\t1\n\nas\t3\n")
    assert word_lists.read_concreteness(path, "--x") == expected


def test_vectors_of_both_formats(tmp_path):
    (tmp_path / "glove").write_text("Cat 1 2\ncat 0.6 0.8\n. . 1 1\ndog -1 0\n")
    (tmp_path / "word2vec").write_text("3 2\nCat 1 2\ncat 0.6 0.8\ndog -1 0\n")
    for name in ("glove", "word2vec"):
        vectors = word_lists.read_vectors(tmp_path / name, "--x", {"cat", "dog"})
        assert {word: vector.tolist() for word, vector in vectors.items()} == {"cat": [0.6, 0.8], "dog": [-1, 0]}
    vectors["sun"] = np.array([0.0, 3.0])
    scores = word_lists.similarity_scores(vectors, ["sun"])
    assert scores == {"cat": 1 + round(0.9 * 254), "dog": 1 + round(0.5 * 254), "sun": 255}
    assert word_lists.similarity_scores(vectors, ["sun", "dog"])["dog"] == 255


def test_anchors_are_frequent_here_and_rare_elsewhere():
    counts = {"zebra": 30, "dog": 30, "man": 100, "odd": 1, "quokka": 30}
    general = {"dog": 1e4, "man": 5e5, "zebra": 100, "odd": 10, "the": 5e5}
    found = find_anchors(counts, general)
    # 30·log(1010110/1) > 30·log(1010110/100) > 30·log(1010110/10⁴) > 100·log(1010110/5·10⁵) > 1·log(1010110/10)
    assert found == ["quokka", "zebra", "dog", "man", "odd"]
    assert math.isclose(math.log(1010110 / 5e5), 0.7032, abs_tol=1e-3)
    with pytest.raises(ValueError, match="name other --embeddings"):
        find_anchors({}, general)


@pytest.fixture
def pictures(tmp_path):
    """Fifteen pictures, three captions each, all alike but for two words."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    buffer = io.BytesIO()
    Image.new("RGB", (40, 32), (9, 90, 120)).save(buffer, "JPEG")
    for i in range(15):
        (folder / f"{i}.jpg").write_bytes(buffer.getvalue())
        animal, colour = ("dog", "cat", "bear")[i % 3], ("red", "blue")[i % 2]
        (folder / f"{i}.txt").write_text(
            f"A {colour} teddy bear sits near a hot dog stand.\nThe {animal} sleeps.\nA {animal} on a mat.\n"
        )
    return folder


def arguments(pictures, out, *more):
    return ["folder", "--images", str(pictures), "--out", str(out), "--workers", "1", "--tokenizer", "train:64", *more]


def built_files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def resources(tmp_path):
    (tmp_path / "conc.tsv").write_text("Word\tConc.M\nbear\t4.9\nstand\t3.2\ndog\t5\n")
    (tmp_path / "freq.txt").write_text("bear 50\ndog 900\nmat 5\n")
    (tmp_path / "vectors.txt").write_text("bear 1 0\ndog 0.8 0.6\nmat 0 1\nteddy 0.9 0.1\n")
    flags = {"concreteness": "conc.tsv", "frequencies": "freq.txt", "embeddings": "vectors.txt"}
    return [word for name, file in flags.items() for word in (f"--{name}", str(tmp_path / file))]


def test_a_build_fills_all_bits_by_default_and_scores_where_there_are_files(pictures, tmp_path, resources):
    assert main(arguments(pictures, tmp_path / "plain", "--collocations", "8")) == 0
    manifest = shards.Manifest.load(tmp_path / "plain")
    assert (manifest.bits_computed, manifest.scores) == (tuple(pos.BITS), ())
    units = Units.load(tmp_path / "plain" / "units.json")
    # Two words: the first 4 of 8; every n-gram of "teddy bear sits near a hot dog stand" counts 15.
    assert [len(c.split()) for c in units.collocations] == [2] * 4 + [3] * 2 + [4, 5]

    assert main(arguments(pictures, tmp_path / "scored", *resources)) == 0
    assert shards.Manifest.load(tmp_path / "scored").scores == SCORES
    batch = Collator(View(0, 32, (0.5,) * 3, (0.5,) * 3), 2, 15, "cpu", torch.device("cpu"))(
        [sample for source in [Shards((str(tmp_path / "scored"),))] for sample in map(source.__getitem__, range(15))], 0
    )
    units = Units.load(tmp_path / "scored" / "units.json")
    assert set(units.anchors) == {"bear", "dog", "mat", "teddy"}
    assert batch.scores.shape == (len(batch.tags), 2)
    assert batch.scores.dtype == torch.uint8
    starts = batch.tags & pos.WORD_START != 0
    inside = (batch.tags & pos.MASKABLE != 0) & ~starts
    before = torch.cat([batch.scores[:1], batch.scores[:-1]])
    assert inside.any()
    assert torch.equal(batch.scores[inside], before[inside])
    # "bear" 4.9, "stand" 3.2, "dog" 5: 15 + 5, 15, 15 + 5 words, twice for the animals' two captions.
    rated = batch.scores[:, 0][starts].tolist()
    assert {value: rated.count(value) for value in set(rated)} == {
        0: rated.count(0), 1 + round(3.9 / 4 * 254): 25, 1 + round(2.2 / 4 * 254): 15, 255: 25,
    }  # fmt: skip


def test_the_masks_that_need_these_bits_and_scores_run_on_a_build(pictures, tmp_path, resources):
    """The unit of every mask is whole, and concrete words are the rated ones."""
    assert main(arguments(pictures, tmp_path / "out", *resources)) == 0
    source = Shards((str(tmp_path / "out"),))
    manifest = source.manifest
    info = manifest.tokenizer
    vocabulary = {"mask_id": info.mask_id, "vocab_size": info.vocab_size, "never_drawn": info.reserved_ids}
    collate = Collator(View(0, 32, (0.5,) * 3, (0.5,) * 3), len(manifest.scores), 15, "cpu", torch.device("cpu"))
    batch = collate([source[i] for i in range(len(source))], 0)
    word, phrase, collocation = pos.WORD_START, pos.PHRASE_START, pos.COLLOCATION_START
    units = {"entity": phrase, "pmi": collocation, "object": word, "content-high": word, "concrete": word}
    for spec, start in {**units, "difference": 0}.items():
        masking = parse_mask(
            spec, tokenizer=vocabulary, bits_computed=manifest.bits_computed, scores=manifest.scores, max_tokens=48
        )
        masked = mask_batch(batch, masking.at(0.0), seed=0)
        chosen = torch.zeros(len(batch.tags), dtype=torch.bool)
        chosen[masked.index[: masked.num_masked].long()] = True
        assert chosen.any(), spec
        maskable = batch.tags & pos.MASKABLE != 0
        assert not (chosen & ~maskable).any()
        if start:
            unit = torch.cumsum((batch.tags & start != 0) | ~maskable, 0)
            assert not set(unit[chosen].tolist()) & set(unit[maskable & ~chosen].tolist()), spec
        if spec == "object":
            assert (batch.tags[chosen] & pos.OBJECT != 0).all()
        if spec == "concrete":
            assert (batch.scores[chosen, 0] > 0).all()


def test_units_never_split_words_and_partition_the_caption(pictures, tmp_path):
    assert main(arguments(pictures, tmp_path / "out")) == 0
    source = Shards((str(tmp_path / "out"),))
    tags = np.concatenate([source[i]["tags"] for i in range(len(source))])
    for bit in (pos.PHRASE_START, pos.COLLOCATION_START):
        assert not (tags[(tags & bit) != 0] & pos.WORD_START == 0).any()
        assert (tags & bit != 0).sum() < (tags & pos.WORD_START != 0).sum()
        first = np.flatnonzero(tags == 0)[:-1:2] + 1  # behind each [CLS]
        assert (tags[first] & bit).all()


def test_bytes_depend_on_neither_workers_nor_interruption(pictures, tmp_path, resources):
    more = [*resources, "--records-per-part", "6"]
    assert main(arguments(pictures, tmp_path / "one", *more)) == 0
    assert main(arguments(pictures, tmp_path / "two", *more, "--workers", "2")) == 0
    built = built_files(tmp_path / "one")
    assert built_files(tmp_path / "two") == built
    for name in ("units.json", "manifest.json", "index.json", "part-00001.json", "part-00000.json"):
        (tmp_path / "two" / name).unlink()
    assert main(arguments(pictures, tmp_path / "two", *more)) == 0
    assert built_files(tmp_path / "two") == built


def test_validation_shards_take_the_units_of_training(pictures, tmp_path, resources, capsys):
    train, val = tmp_path / "train", tmp_path / "val"
    assert main(arguments(pictures, train, *resources)) == 0
    like = ["--limit", "3", "--tokenizer", str(train / "tokenizer"), "--units", str(train)]
    assert main(arguments(pictures, val, *like)) == 0
    assert (val / "units.json").read_bytes() == (train / "units.json").read_bytes()
    Shards((str(train), str(val)))  # refuses folders that differ
    assert Shards((str(val),))[0]["scores"].tolist() == Shards((str(train),))[0]["scores"].tolist()
    capsys.readouterr()
    assert main(arguments(pictures, val, *like, "--collocations", "3")) == 2
    assert "brings its own lists and scores; leave out --collocations" in capsys.readouterr().err


def test_a_changed_file_needs_another_folder(pictures, tmp_path, resources, capsys):
    assert main(arguments(pictures, tmp_path / "out", *resources)) == 0
    (tmp_path / "conc.tsv").write_text("dog\t4\n")
    assert main(arguments(pictures, tmp_path / "out", *resources)) == 2
    assert "was built with another concreteness" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "content", "message"),
    [
        (["--objects"], "dog\nhot dog\n", "line 2: 'hot dog' is not a single word; give one a line"),
        (["--attributes"], "\n \n", "holds no word; leave the flag out"),
        (["--relations"], None, "No such file or directory; name a readable file"),
        (["--objects"], b"caf\xe9", "is not UTF-8 text"),
        (["--concreteness"], "Word\tRating\tN\ndog\t5\t1\n", "expected a header with the columns Word and Conc.M"),
        (["--concreteness"], "dog\t7\n", "line 1: 7 is not within 1 to 5"),
        (["--concreteness"], "dog\tvery\n", "line 1: 'very' is not a number"),
        (["--concreteness"], "Word\tConc.M\ndog\n", "line 2: 1 columns, expected 2"),
        (["--frequencies"], "dog 5\n", "needs word vectors, and the tagger"),
        (["--frequencies"], "dog five times\n", "line 1: expected a word and its count"),
        (["--embeddings"], "dog 1 2\n", "needs --frequencies"),
        (["--units"], "{}", "is missing or no units.json of a build; name a folder of shards"),
        (["--frequencies", "good", "--embeddings"], "dog 1 2\ncat 1\n", "line 2: expected a word and 2 numbers"),
        (["--frequencies", "good", "--embeddings"], "2 2\n", "holds no vector"),
    ],
)
def test_a_bad_file_is_one_line_and_writes_nothing(pictures, tmp_path, capsys, flags, content, message):
    (tmp_path / "good").write_text("dog 5\n")
    bad = tmp_path / "bad"
    if content is not None:
        bad.write_bytes(content if isinstance(content, bytes) else content.encode())
    flags = [str(tmp_path / flag) if flag == "good" else flag for flag in flags]
    assert main(arguments(pictures, tmp_path / "out", *flags, str(bad))) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(bad) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_a_tagger_cannot_give_is_not_declared(tmp_path):
    import spacy

    spacy.blank("en").to_disk(tmp_path / "bare")
    without = {"phrase_start", "object"}
    bits, scores = Resources().contents(tmp_path / "bare", entities=False)
    assert (set(bits), scores) == (set(pos.BITS) - without, [])
    (tmp_path / "objects").write_text("dog\n")
    bits, _ = Resources(objects=tmp_path / "objects").contents(tmp_path / "bare", entities=False)
    assert set(bits) == set(pos.BITS) - {"phrase_start"}
    with pytest.raises(ValueError, match="--entities: the tagger bare recognises none"):
        Resources().contents(tmp_path / "bare", entities=True)


def test_vectors_of_the_tagger(tmp_path, encode):
    import spacy

    nlp = spacy.blank("en")
    for word, vector in {"dog": (1, 0), "cat": (0.6, 0.8), "the": (0, 1), "fox": (0, 0)}.items():
        nlp.vocab.set_vector(word, np.array(vector, np.float32))
    nlp.to_disk(tmp_path / "vectors")
    (tmp_path / "freq").write_text("the 1000\ncat 1\ndog 5\n")
    resources = Resources(frequencies=tmp_path / "freq")
    resources.check(tmp_path / "vectors")
    units = resources.make(["the dog and the cat", "the dog fox"], encode, tmp_path / "vectors")
    assert units.anchors == ("dog", "cat")
    assert units.scores == {"difference": {"the": 1 + round(0.9 * 254), "dog": 255, "cat": 255}}
    assert json.loads(json.dumps(units.scores)) == units.scores
