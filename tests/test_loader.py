"""Samples, crops, captions and blanks: drawn from counters, the same on any number of ranks."""

import io
import json
import shutil
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from posmask.kernels.philox import U32
from posmask.train.decode import BadSample, CpuDecoder, DaliDecoder, UndecodableImage
from posmask.train.loader import Collator, Loader, Shards, View, evaluation_batches
from posmask.train.masking import parse_mask
from posmask.train.objectives import mask_batch

CPU = torch.device("cpu")
VIEW = View(3, 32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def view(**changes):
    return View(**(VIEW.__dict__ | changes))


@pytest.fixture(scope="module")
def shards(scenes):
    return Shards((f"{scenes}/train",))


def collect(shards, seen, ranks, steps, micro_batch_size, start_step=0):
    """Per step, the micro-batches of all ranks in rank order."""
    loaders = [
        Loader(shards, Collator(seen, 0, micro_batch_size, "cpu", CPU), seed=seen.seed, batch_size=32,
               micro_batch_size=micro_batch_size, rank=rank, world_size=ranks, start_step=start_step, num_steps=steps)
        for rank in range(ranks)
    ]  # fmt: skip
    batches = [list(loader) for loader in loaders]
    for loader in loaders:
        loader.close()
    per_step = 32 // ranks // micro_batch_size
    spans = [slice(i * per_step, (i + 1) * per_step) for i in range(steps - start_step)]
    return [[batch for rank in batches for batch in rank[span]] for span in spans]


@pytest.mark.parametrize("spec", ["noun", "random", "whole-word", "matched:noun"])
def test_one_rank_and_two_see_the_same(shards, spec):
    seen = view(captions_per_image=2, blank_rate=0.3, crop_scale=(0.6, 1.0))
    tokenizer = shards.manifest.tokenizer
    vocabulary = {"mask_id": tokenizer.mask_id, "vocab_size": 500, "never_drawn": tokenizer.reserved_ids}
    plan = parse_mask(spec, tokenizer=vocabulary, bits_computed=shards.manifest.bits_computed, max_tokens=48).at(0.0)
    # 11 steps of 32 cross the end of the first epoch of 300 images.
    one, two = collect(shards, seen, 1, 11, 32), collect(shards, seen, 2, 11, 8)
    resumed = collect(shards, seen, 2, 11, 16, start_step=7)
    for step, batches in enumerate(one):
        for others in [two[step]] + ([resumed[step - 7]] if step >= 7 else []):
            results = []
            for group in (batches, others):
                masked = [mask_batch(batch, plan, seed=3) for batch in group]
                results.append((
                    torch.cat([torch.from_numpy(b.sample_ids.view(np.int64)) for b in group]),
                    torch.cat([m.tokens for m in masked]),
                    torch.cat([m.targets[: int(m.num_masked)] for m in masked]),
                    torch.cat([b.images for b in group]),
                ))  # fmt: skip
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
            assert len(results[0][2]) > 0


@pytest.mark.parametrize("prefetch", [None, 2])
def test_batches_are_prepared_ahead_or_when_asked_for(shards, prefetch):
    """The same ones either way; on a CPU the default is that nothing works beside the step."""
    prepared, threads = [], set()

    class Watched(Collator):
        def __call__(self, *args):
            prepared.append(len(prepared))
            threads.add(threading.current_thread().name)
            return super().__call__(*args)

    def load(**changes):
        return Loader(shards, Watched(VIEW, 0, 32, "cpu", CPU), seed=3, batch_size=32, micro_batch_size=32, rank=0,
                      world_size=1, num_steps=9, **changes)  # fmt: skip

    truth = list(load())
    prepared.clear(), threads.clear()
    loader = load(prefetch=prefetch)
    for i, batch in enumerate(loader):
        assert torch.equal(batch.images, truth[i].images) and torch.equal(batch.tokens, truth[i].tokens)
        assert prefetch or len(prepared) == i + 1
    loader.close()
    assert i == 8 and threads == {"loader" if prefetch else threading.current_thread().name}


def test_an_error_of_the_loaders_thread_reaches_the_consumer(shards):
    class Broken(Collator):
        def __call__(self, *args):
            raise BadSample("sample 7 is broken")

    loader = Loader(shards, Broken(VIEW, 0, 32, "cpu", CPU), seed=3, batch_size=32, micro_batch_size=32, rank=0,
                    world_size=1, num_steps=9, prefetch=2)  # fmt: skip
    with pytest.raises(BadSample, match="sample 7"):
        next(iter(loader))
    loader.close()


def test_an_epoch_is_a_permutation(shards):
    orders = [shards.order(3, epoch) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(300))
    assert (orders[0] != orders[1]).mean() > 0.9
    assert np.array_equal(orders[0], shards.order(3, 0))


def test_captions_are_drawn_without_replacement(shards):
    samples = [shards[i] for i in range(64)]
    drawn = {}
    for epoch in (0, 1):
        batch = Collator(view(captions_per_image=2), 0, 64, "cpu", CPU)(samples, epoch)
        per_image = [[] for _ in samples]
        for image, key in zip(batch.caption_image.tolist(), batch.caption_key.tolist(), strict=True):
            per_image[image].append(key[0])
        for sample, captions in zip(samples, per_image, strict=True):
            assert len(captions) == min(2, len(sample["caption_lengths"])) == len(set(captions))
        drawn[epoch] = per_image
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize("spec", ["noun", "random", "matched:noun"])
def test_a_caption_masked_again_has_other_masks_beside_the_first(shards, spec):
    """The first masking is that of a batch without repeats; an image is there once."""
    samples = [shards[i] for i in range(64)]
    tokenizer = shards.manifest.tokenizer
    vocabulary = {"mask_id": tokenizer.mask_id, "vocab_size": 500, "never_drawn": tokenizer.reserved_ids}
    plan = parse_mask(spec, tokenizer=vocabulary, bits_computed=shards.manifest.bits_computed, max_tokens=48).at(0.0)
    views = [view(captions_per_image=2, maskings_per_caption=r) for r in (1, 3)]
    once, thrice = (Collator(seen, 0, 64, "cpu", CPU)(samples, 0) for seen in views)
    masked_once, masked = (mask_batch(batch, plan, seed=3) for batch in (once, thrice))
    assert torch.equal(once.images, thrice.images)
    assert len(thrice.caption_key) == 3 * len(once.caption_key)
    masking = thrice.caption_key[:, 0] >> 16
    assert masking.tolist() == [0, 1, 2] * len(once.caption_key)
    first, second = (torch.repeat_interleave(masking == r, thrice.caption_starts.diff()) for r in (0, 1))
    assert torch.equal(thrice.tokens[first], once.tokens)
    assert torch.equal(masked.tokens[first], masked_once.tokens)
    same = torch.equal(masked.tokens[second], masked_once.tokens)
    assert same == (spec == "noun"), "an arm that masks all leaves nothing to draw"
    assert thrice.max_image_tokens == 3 * once.max_image_tokens


def test_batch_layout(shards):
    samples = [shards[i] for i in range(16)]
    batch = Collator(VIEW, 0, 16, "cpu", CPU)(samples, 0)
    assert np.array_equal(batch.tokens.numpy(), np.concatenate([s["tokens"] for s in samples]).astype(np.int32))
    lengths = np.concatenate([s["caption_lengths"] for s in samples])
    assert np.array_equal(np.diff(batch.host_caption_starts), lengths) and batch.max_caption_tokens == lengths.max()
    ids = [int(s["id"]) for s in samples]
    words = batch.caption_key.numpy().view(np.uint32).astype(np.uint64)
    rebuilt = (words[:, 2] << np.uint64(32)) | (words[:, 1] & np.uint64(U32))
    assert [int(i) for i in rebuilt] == [ids[i] for i in batch.caption_image.tolist()]
    assert batch.images.shape == (16, 3, 32, 32) and batch.images.is_contiguous(memory_format=torch.channels_last)


def test_blank_images_follow_the_sample(shards):
    samples = [shards[i] for i in range(300)]
    blanks = {}
    for size in (300, 50):
        collate = Collator(view(blank_rate=0.3), 0, size, "cpu", CPU)
        images = torch.cat([collate(samples[i : i + size], 0).images for i in range(0, 300, size)])
        blanks[size] = (images == 0).flatten(1).all(1)
    assert torch.equal(blanks[300], blanks[50])
    assert abs(blanks[300].float().mean() - 0.3) < 4 * (0.3 * 0.7 / 300) ** 0.5


def test_crops_stay_inside_and_mild(shards):
    collate = Collator(view(crop_scale=(0.5, 0.9)), 0, 4, "cpu", CPU)
    anchors, shapes = collate._crops(np.arange(4000, dtype=np.uint64), 0)
    area = shapes.prod(1)
    assert (anchors >= 0).all() and (anchors + shapes <= 1 + 1e-6).all() and (shapes <= 1 + 1e-6).all()
    assert 0.5 - 1e-5 <= area.min() < 0.52 and 0.88 < area.max() <= 0.9 + 1e-5
    assert abs(np.log(shapes[:, 0] / shapes[:, 1]).mean()) < 0.05, "as often wide as tall"


def test_dali_and_cpu_decoder_agree(shards):
    encoded = [np.frombuffer(shards[i]["image"], np.uint8) for i in range(16)]
    anchors, shapes = np.full((16, 2), 0.1, np.float32), np.full((16, 2), 0.8, np.float32)
    keys = [str(i) for i in range(16)]
    dali = DaliDecoder(32, 16, CPU)(encoded, anchors, shapes, keys).float()
    cpu, by_three = (CpuDecoder(32, CPU, n)(encoded, anchors, shapes, keys).float() for n in (1, 3))
    with torch.inference_mode():  # in which runs are evaluated
        evaluated = CpuDecoder(32, CPU, 3)(encoded, anchors, shapes, keys).float()
    assert torch.equal(cpu, by_three) and torch.equal(cpu, evaluated)
    assert dali.shape == cpu.shape == (16, 32, 32, 3)
    assert (dali - cpu).abs().mean() < 6
    assert (dali - cpu.roll(1, 0)).abs().mean() > 15, "and other images differ"


@pytest.mark.parametrize("make", [lambda: CpuDecoder(32, CPU, 2), lambda: DaliDecoder(32, 2, CPU)], ids=["cpu", "dali"])
def test_an_undecodable_image_is_named(make):
    good = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(good, "JPEG")
    encoded = [np.frombuffer(good.getvalue(), np.uint8), np.frombuffer(b"not a JPEG at all", np.uint8)]
    whole = np.zeros((2, 2), np.float32), np.ones((2, 2), np.float32)
    decoder = make()
    for _ in range(2):  # and the decoder goes on afterwards
        with pytest.raises(UndecodableImage, match="'broken'") as raised:
            decoder(encoded, *whole, ["fine", "broken"])
        assert raised.value.index == 1
        (red,) = decoder(encoded[:1], whole[0][:1], whole[1][:1], ["fine"])
        assert (red.float() - torch.tensor([254.0, 0, 0])).abs().max() <= 2


@pytest.mark.parametrize("decode", ["cpu", "dali"])
def test_a_bad_sample_costs_itself_alone(shards, decode, caplog):
    """With --on-bad-sample skip the others are what they are without it; it is named once and counted each time."""
    seen = view(captions_per_image=2, blank_rate=0.3, crop_scale=(0.6, 1.0))
    samples = [shards[i] for i in range(8)]
    bad = {i: samples[i] | {"image": samples[i]["image"][: 100 * i]} for i in (2, 5)}
    broken = [bad.get(i, sample) for i, sample in enumerate(samples)]
    collate = Collator(seen, 0, 8, decode, CPU, "skip")
    truth = collate([sample for i, sample in enumerate(samples) if i not in bad], 0)
    for _ in range(2):
        batch = collate(broken, 0)
        assert batch.num_bad_samples == 2 and truth.num_bad_samples == 0
        for name in ("tokens", "tags", "caption_starts", "caption_image", "caption_key", "images"):
            assert torch.equal(getattr(batch, name), getattr(truth, name)), name
    named = [record.getMessage() for record in caplog.records if "--on-bad-sample" in record.getMessage()]
    assert [repr(samples[i]["key"]) in line for i, line in zip((2, 5), named, strict=True)] == [True, True]
    with pytest.raises(UndecodableImage, match="--on-bad-sample skip"):
        Collator(seen, 0, 8, decode, CPU)(broken, 0)
    with pytest.raises(UndecodableImage):  # nothing would be left
        collate([bad[2]], 0)


def test_one_flipped_bit_anywhere_in_a_shard(shards, scenes, tmp_path, caplog):
    """It stops with the shard's name, or costs the samples that it is in; under skip the others are what they were."""
    shutil.copytree(scenes / "train", tmp_path / "train")
    path = tmp_path / "train" / "part-00000.00000.mds"
    whole = path.read_bytes()
    start_of_samples = int.from_bytes(whole[4:8], "little")
    rng = np.random.default_rng(0)
    places = [1, 5, 8 + 4 * 150, start_of_samples - 150, start_of_samples - 1]  # count, offsets, columns
    places += [
        *rng.integers(0, start_of_samples, 10).tolist(),
        *rng.integers(start_of_samples, len(whole), 20).tolist(),
    ]
    skip, stop = (Collator(VIEW, 0, 300, "cpu", CPU, policy) for policy in ("skip", "stop"))
    truth = [shards[i] for i in range(300)]
    costs = set()
    for place in places:
        data = bytearray(whole)
        data[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        samples = Shards((f"{tmp_path}/train",)).read(range(300))
        with pytest.raises(BadSample, match=r"part-00000\.00000\.mds.* is damaged"):
            stop(samples, 0)
        num_bad = sum(isinstance(sample, BadSample) for sample in samples)
        costs.add(num_bad)
        if num_bad == 300:
            assert place < start_of_samples, "the number of samples or the columns"
            with pytest.raises(BadSample, match="its header"):
                skip(samples, 0)
            continue
        batch = skip(samples, 0)
        assert 1 <= num_bad <= 2 and batch.num_bad_samples == num_bad
        good = [t for t, s in zip(truth, samples, strict=True) if not isinstance(s, BadSample)]
        assert batch.sample_ids.tolist() == [int(sample["id"]) for sample in good]
        assert np.array_equal(batch.host_tags, np.concatenate([sample["tags"] for sample in good]))
        same = [
            s["image"] == t["image"] for s, t in zip((s for s in samples if isinstance(s, dict)), good, strict=True)
        ]
        assert all(same)
    assert costs == {1, 2, 300}
    lines = [record.getMessage() for record in caplog.records if "--on-bad-sample skip" in record.getMessage()]
    assert lines and all("part-00000.00000.mds, sample " in line for line in lines)


def test_shards_without_checksums_are_read_and_that_is_said(scenes, tmp_path, caplog):
    shutil.copytree(scenes / "train", tmp_path / "train")
    (tmp_path / "train" / "part-00000.json").unlink()
    assert len(Shards((f"{tmp_path}/train",)).read(range(300))) == 300
    assert sum("a damaged sample of it may not be noticed" in r.getMessage() for r in caplog.records) == 1


def test_folders_that_differ_name_the_remedy(scenes, tmp_path):
    for key, change, remedy in (
        ("tokenizer", lambda value: value | {"vocab_size": 7}, "--tokenizer"),
        ("bits_computed", lambda value: value[1:], "--units"),
        ("scores", lambda value: ["concreteness"], "--units"),
    ):
        other = tmp_path / key
        shutil.copytree(scenes / "val", other)
        manifest = json.loads((other / "manifest.json").read_text())
        (other / "manifest.json").write_text(json.dumps(manifest | {key: change(manifest[key])}))
        with pytest.raises(ValueError, match=f"differ in {key}: .* {remedy} {scenes}/train"):
            Shards((f"{scenes}/train", str(other)))


def test_ranks_share_an_evaluation_evenly(shards):
    collate = Collator(VIEW, 0, 16, "cpu", CPU)
    runs = [[b.sample_ids for b in evaluation_batches(shards, collate, 16, 101, rank, 2)] for rank in (0, 1)]
    assert [len(ids) for ids in runs[0]] == [len(ids) for ids in runs[1]] == [16, 16, 16, 2]
    assert len({int(i) for run in runs for ids in run for i in ids}) == 100
