"""Whatever is changed in finished shards, verify names it."""

import io
import json
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from streaming.base.format import reader_from_json

from posmask.prep import pos, shards
from posmask.prep.build_shards import main
from posmask.prep.verification import sample_problem, verify, verify_shard


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Ten pictures in three parts."""
    folder = tmp_path_factory.mktemp("verify")
    pictures = folder / "pictures"
    pictures.mkdir()
    for i in range(10):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG")
        (pictures / f"{i}.jpg").write_bytes(buffer.getvalue())
        (pictures / f"{i}.txt").write_text("A red cat sleeps.\nTwo dogs can't see the bird!\n")
    command = ["folder", "--images", str(pictures), "--out", str(folder / "out"), "--records-per-part", "4"]
    assert main([*command, "--workers", "1", "--tokenizer", "train:64"]) == 0
    return folder / "out"


@pytest.fixture
def out(built, tmp_path):
    return shutil.copytree(built, tmp_path / "out")


def test_good_shards_are_good(built, capsys):
    assert list(verify(built)) == []
    assert main(["verify", str(built), "--workers", "1"]) == 0
    assert capsys.readouterr().out == f"{built}: all good\n"


def test_two_processes_find_the_same(out):
    path = out / "part-00001.00000.mds"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    [problem] = verify(out)
    assert list(verify(out, 2)) == [problem]


def test_every_flipped_bit_is_found_and_its_sample_named(out):
    manifest = shards.Manifest.load(out)
    part = shards.read_parts(out, 3)[1]
    [entry] = part["shards"]
    path = out / entry["raw_data"]["basename"]
    good = path.read_bytes()
    spans = shards.sample_spans(good)
    rng = random.Random(0)
    for at in [*range(12), *range(spans[0] - 3, spans[0] + 40), *rng.sample(range(len(good)), 200)]:
        changed = bytearray(good)
        changed[at] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        problems = verify_shard(out, entry, part["sample_crc32"], manifest).problems
        assert problems
        assert all(problem.startswith("part-00001.00000.mds is damaged: its sha256 differs") for problem in problems)
        owner = np.searchsorted(spans, at, side="right") - 1
        if at >= spans[0]:
            assert len(problems) == 1
            assert f"; sample {owner} (" in problems[0]
        elif 4 <= at < 4 * (len(spans) + 1):
            assert all("sample" in problem for problem in problems)  # where a sample begins or ends
        else:
            assert "its header" in problems[0]


def test_a_flipped_bit_ends_with_exit_code_1_and_names(out, capsys):
    path = out / "part-00002.00000.mds"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert main(["verify", str(out), "--workers", "1"]) == 1
    printed = capsys.readouterr().out
    assert "part-00002.00000.mds is damaged: its sha256 differs from the index; sample " in printed
    assert "(8.jpg)" in printed or "(9.jpg)" in printed
    assert "problems: 1" in printed


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def manifest_with(change):
    return lambda out: edit(out / "manifest.json", change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: (out / "part-00000.00000.mds").unlink(), "part-00000.00000.mds is missing"),
        (lambda out: (out / "part-00000.json").unlink(), "part-00000.json is missing"),
        (lambda out: (out / "part-00001.00000.mds").write_bytes(b"x"), "part-00001.00000.mds has 1 bytes instead of"),
        (lambda out: edit(out / "index.json", lambda v: v["shards"].pop()), "index.json differs from what the parts"),
        (lambda out: (out / "tokenizer" / "vocab.txt").open("a").write("dragon\n"), "is not the vocabulary"),
        (lambda out: (out / "tokenizer" / "vocab.txt").unlink(), "tokenizer/vocab.txt is missing"),
        (manifest_with(lambda v: v["counts"].update(captions=7)), "counts 7 captions, the shards hold 20"),
        (manifest_with(lambda v: v["counts"]["per_upos"].update(NOUN=0)), "counts 0 NOUN, the shards hold"),
        (manifest_with(lambda v: v["parts"][0].update(samples=3)), "differ in the number of records or samples"),
        (manifest_with(lambda v: v["sources"][0].update(name="x")), "the id is not that of x/0.jpg"),
    ],
)
def test_what_does_not_fit_together_is_named(out, change, message):
    change(out)
    assert any(message in problem for problem in verify(out)), list(verify(out))


def test_a_sample_twice_is_named(out):
    index = json.loads((out / "index.json").read_text())
    index["shards"].append(index["shards"][0])
    (out / "index.json").write_text(json.dumps(index))
    edit(out / "part-00002.json", lambda v: v["shards"].append(index["shards"][0]))
    crc = shards.read_parts(out, 3)[0]["sample_crc32"]
    edit(out / "part-00002.json", lambda v: v["sample_crc32"].extend(crc))
    assert sum("comes several times" in problem for problem in verify(out)) == 4


def test_every_rule_of_a_sample(built):
    manifest = shards.Manifest.load(built)
    entry = json.loads((built / "index.json").read_text())["shards"][0]
    good = reader_from_json(str(built), None, entry)[0]
    assert sample_problem(good, manifest) is None
    tokens, tags, lengths = good["tokens"], good["tags"], good["caption_lengths"]

    def changed(array, at, value):
        copy = array.copy()
        copy[at] = value
        return copy

    info = manifest.tokenizer
    wrong = {
        "1 captions": {"captions": good["captions"][:1]},
        "lengths of its captions sum to": {"caption_lengths": changed(lengths, 0, lengths[0] + 1)},
        "allowed are 3 to 48": {"caption_lengths": changed(changed(lengths, 0, 2), 1, lengths.sum() - 2)},
        f"token {info.vocab_size} is not in the vocabulary": {"tokens": changed(tokens, 2, info.vocab_size)},
        "between [CLS] and [SEP]": {"tokens": changed(tokens, 0, 7)},
        "a special token stands inside": {"tokens": changed(tokens, 2, info.mask_id)},
        "a bit that the manifest does not list": {"tags": changed(tags, 2, tags[2] | 1 << 31)},
        "[CLS] or [SEP] has a tag": {"tags": changed(tags, 0, pos.WORD_START)},
        "maskable but [UNK]": {"tags": changed(tags, 2, tags[2] ^ pos.MASKABLE)},
        "it has scores and the manifest none": {"scores": np.zeros((len(tokens), 1), np.uint8)},
        "the id is not that of": {"id": np.uint64(3)},
        "image: no baseline RGB JPEG": {"image": b"GIF89a"},
        "image: damaged or truncated image": {"image": good["image"][:200] + b"\xff\xd9"},
    }
    for message, change in wrong.items():
        assert message in sample_problem({**good, **change}, manifest)
    scored = replace(manifest, scores=("concreteness",))
    assert "scores of shape" in sample_problem({**good, "scores": np.zeros((3, 1), np.uint8)}, scored)


def test_folders_that_hold_nothing_finished(out, tmp_path, capsys):
    assert main(["verify", str(tmp_path / "nowhere")]) == 2
    assert "no such folder of shards" in capsys.readouterr().err
    assert main(["merge", str(tmp_path)]) == 2
    assert "holds no build of posmask shards" in capsys.readouterr().err
    (out / "index.json").write_text("{")
    assert main(["verify", str(out)]) == 2
    assert "index.json is damaged" in capsys.readouterr().err
    assert main(["verify"]) == 2
    assert "the following arguments are required: DIR" in capsys.readouterr().err
