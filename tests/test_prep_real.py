"""Prep on real captions, real photos and gold tags."""

import collections
import json
from pathlib import Path

import numpy as np
import pytest
from streaming.base.format import reader_from_json

from posmask.prep import pos, shards, tagging
from posmask.prep.build_shards import main
from posmask.prep.tagging import Token, align
from posmask.prep.wordpiece import CaptionEncoder, from_vocab, save

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
VOCAB = DATA / "bert_uncased" / "vocab.txt"
pytestmark = [pytest.mark.real_data, pytest.mark.skipif(not DATA.is_dir(), reason=f"no {DATA}")]


def read_conllu(path):
    """Sentences as (text, gold tokens): words joined as SpaceAfter says, a multi-word token's parts laid end to end."""
    for block in path.read_text(encoding="utf-8").strip().split("\n\n"):
        text, tokens = "", []
        inside_until = 0  # the last word of the multi-word token being read
        for line in block.split("\n"):
            if line.startswith("#"):
                continue
            number, form, _, upos, *_, misc = line.split("\t")
            if "." in number:
                continue
            space = "" if "SpaceAfter=No" in misc else " "
            if "-" in number:
                inside_until, part_start, surface_end = int(number.split("-")[1]), len(text), len(text) + len(form)
                text += form + space
            elif int(number) <= inside_until:
                end = surface_end if int(number) == inside_until else part_start + len(form)
                assert text[part_start:end] == form, (form, text)
                tokens.append(Token(part_start, end, pos.UPOS_BIT[upos]))
                part_start = end
            else:
                tokens.append(Token(len(text), len(text) + len(form), pos.UPOS_BIT[upos]))
                text += form + space
        yield text, tokens


@pytest.fixture(scope="module")
def sentences():
    return list(read_conllu(DATA / "ud_ewt" / "en_ewt-ud-test.conllu"))


@pytest.fixture(scope="module")
def encoded(sentences, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert") / "tokenizer"
    save(from_vocab(VOCAB.read_text(encoding="utf-8").removesuffix("\n").split("\n"), "bert"), folder)
    return CaptionEncoder(folder, 10_000)([text for text, _ in sentences])


def gold_by_character(tokens, start, end):
    """UPOS bits of the characters [start, end), the independent way."""
    gold = collections.defaultdict(int, {at: t.bits for t in tokens for at in range(t.start, t.end)})
    bits = 0
    for at in range(start, end):
        bits |= gold[at]
    return bits


def test_with_gold_tags_every_piece_carries_the_gold_tag(sentences, encoded):
    num_pieces = 0
    for (_, tokens), sentence in zip(sentences, encoded, strict=True):
        for piece, (bits, _) in zip(sentence.pieces, align(sentence.pieces, tokens), strict=True):
            assert bits & pos.UPOS_MASK == gold_by_character(tokens, *piece) != 0
            num_pieces += 1
    assert (len(sentences), num_pieces) > (2000, 25_000)


def test_the_tagger_agrees_with_gold(sentences, encoded):
    nlp = tagging.load_tagger(tagging.find_tagger("auto"))
    tagged = tagging.tag(nlp, [text for text, _ in sentences])
    exact = merged = num_pieces = 0
    nouns = pos.upos_bits(("NOUN", "PROPN"))
    for (_, gold), sentence, tokens in zip(sentences, encoded, tagged, strict=True):
        both = zip(align(sentence.pieces, tokens), align(sentence.pieces, gold), strict=True)
        for (ours, _), (theirs, _) in both:
            ours, theirs = ours & pos.UPOS_MASK, theirs & pos.UPOS_MASK
            exact += ours == theirs
            merged += ours == theirs or bool(ours & nouns and theirs & nouns)
            num_pieces += 1
    print(f"\nUD EWT test, {num_pieces} pieces: {exact / num_pieces:.4f} exact, {merged / num_pieces:.4f} nouns merged")
    assert exact / num_pieces >= 0.86
    assert merged / num_pieces >= 0.90


def test_coco_photos_with_the_bert_vocabulary(tmp_path):
    coco = DATA / "coco_photos"
    command = ["coco", "--annotations", str(coco / "captions_val2017.json"), "--images", str(coco / "val2017")]
    assert main([*command, "--tokenizer", str(VOCAB), "--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    manifest = shards.Manifest.load(tmp_path / "out")
    counts = manifest.counts
    assert (counts["images"], counts["captions"], manifest.dropped) == (159, 751, {})
    assert manifest.tokenizer.vocab_size == 30522
    assert manifest.tokenizer.mask_id == 103
    assert len(manifest.tokenizer.reserved_ids) == 999  # [PAD], 994 [unusedN], [UNK] [CLS] [SEP] [MASK]
    pieces = counts["tokens"] - 2 * counts["captions"]
    assert 0.28 < counts["per_upos"]["NOUN"] / pieces < 0.38
    assert counts["maskable"] / pieces > 0.999
    assert counts["cut_captions"] <= 2
    assert manifest.image["mean_height"] < 384

    shares = shares_of_bits(tmp_path / "out")
    assert 0.55 < shares["phrase_start"] < 0.75
    assert 0.7 < shares["collocation_start"] < 0.9
    assert 0.22 < shares["object"] < 0.33
    assert 0.05 < shares["attribute"] < 0.09
    assert 0.2 < shares["relation"] < 0.28
    collocations = json.loads((tmp_path / "out" / "units.json").read_text())["collocations"]
    assert {"next to", "stop sign", "in front of", "on top of a"} <= set(collocations)


def shares_of_bits(out):
    """Of all pieces of shards, the share with each bit; no unit starts inside a word."""
    index = json.loads((out / "index.json").read_text())
    readers = [reader_from_json(str(out), None, shard) for shard in index["shards"]]
    tags = np.concatenate([reader[i]["tags"] for reader in readers for i in range(len(reader))])
    pieces = tags[tags != 0]
    inside_word = pieces[pieces & pos.WORD_START == 0]
    assert not (inside_word & (pos.PHRASE_START | pos.COLLOCATION_START)).any()
    return {name: np.count_nonzero(pieces & bit) / len(pieces) for name, bit in pos.BITS.items()}


def test_a_table_of_drawings(tmp_path):
    command = ["table", "--table", str(DATA / "nlvr" / "dev_true.csv"), "--image-column", "filepath"]
    more = ["--caption-column", "caption", "--limit", "40", "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main([*command, *more]) == 0
    manifest = shards.Manifest.load(tmp_path / "out")
    assert (manifest.counts["images"], manifest.dropped) == (40, {})
    assert (manifest.image["mean_width"], manifest.image["mean_height"]) == (400, 100)
    assert manifest.counts["per_upos"]["NUM"] > 0
    assert json.loads((tmp_path / "out" / "index.json").read_text())["shards"][0]["samples"] == 40
