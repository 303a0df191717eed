"""Reading and decoding: ours against StreamingDataset's iterator and open_clip's transform, on the same files.

    python benchmarks/bench_loader.py                      # on scenes drawn for it
    python benchmarks/bench_loader.py --photos FOLDER      # and on a folder of JPEG photos, as they are and prepared
    python benchmarks/bench_loader.py --device cuda --photos FOLDER    # our decoders alone, 512 photos a batch

Everything runs in one process, and on one core where there is no GPU. Samples must be equal, and pixels within a few
grey levels, or no speed is printed.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from open_clip.transform import image_transform
from PIL import Image
from streaming import StreamingDataset
from timing import interleave, quantiles, ratio, write_result

from posmask.prep.images import normalise
from posmask.train.config import IMAGE_MEAN, IMAGE_STD
from posmask.train.decode import num_cores
from posmask.train.loader import Collator, Shards, View

CPU = torch.device("cpu")
GPU_BATCH = 512
FULL_SIZE = 480
LARGEST_DIFFERENCE = 3.0  # mean grey levels; other libraries round, and place the borders of a crop, otherwise


def bench_reader(folder: str, repeats: int) -> dict:
    shards = Shards((folder,))
    dataset = StreamingDataset(local=folder, shuffle=True, batch_size=128, num_canonical_nodes=1)
    order = shards.order(seed=9176, epoch=0)
    theirs = {int(sample["id"]): sample for sample in dataset}
    for i in order:
        ours = shards[i]
        sample = theirs.pop(int(ours["id"]))
        if ours.keys() != sample.keys() or not all(np.array_equal(ours[key], sample[key]) for key in ours):
            raise SystemExit(f"sample {i} differs from StreamingDataset's; no speed is measured")
    assert not theirs

    calls = {"ours": lambda: sum(1 for i in order if shards[i]), "StreamingDataset": lambda: sum(1 for _ in dataset)}
    samples = interleave(calls, repeats)
    return {
        "row": "reader", "samples": len(order),
        "samples_per_s": {name: round(1e3 * len(order) / np.median(times)) for name, times in samples.items()},
        "times": {name: quantiles(times) for name, times in samples.items()},
        "ratio": ratio(samples["StreamingDataset"], samples["ours"]),
    }  # fmt: skip


def bench_decode(
    name: str, encoded: list[bytes], image_size: int, repeats: int, originals: list[bytes] | None = None
) -> dict:
    """Encoded images to normalised batches; `originals`: what the peers decode in a second comparison."""
    samples = [{"id": i, "key": str(i), "image": data} for i, data in enumerate(encoded)]
    views = {"whole": View(0, image_size, IMAGE_MEAN, IMAGE_STD),
             "crop": View(0, image_size, IMAGE_MEAN, IMAGE_STD, crop_scale=(0.9, 1.0))}  # fmt: skip
    squash = {"resize_mode": "squash", "interpolation": "bilinear"}
    peers = {
        "open_clip, training": image_transform(image_size, is_train=True),
        "open_clip, evaluation": image_transform(image_size, is_train=False),
        "open_clip, evaluation, squash bilinear": image_transform(image_size, is_train=False, **squash),
    }

    def transformed(peer: str, images: list[bytes]) -> torch.Tensor:
        return torch.stack([peers[peer](Image.open(io.BytesIO(data))) for data in images])

    truth = transformed("open_clip, evaluation, squash bilinear", encoded)
    std = torch.tensor(IMAGE_STD).view(1, 3, 1, 1) * 255
    differences, calls = {}, {}
    for decode in ("cpu", "dali"):
        whole, crop = (Collator(view, 0, len(samples), decode, CPU) for view in views.values())
        ours = whole.decode_images(samples, 0)[1]
        differences[decode] = float(((ours - truth) * std).abs().mean())
        if not differences[decode] < LARGEST_DIFFERENCE:
            raise SystemExit(f"{name}: --decode {decode} is {differences[decode]:.1f} grey levels off; not measured")
        calls[f"--decode {decode}"] = lambda crop=crop: crop.decode_images(samples, 0)
    for peer in peers:
        calls[peer] = lambda peer=peer: transformed(peer, encoded)
        if originals:
            calls[f"{peer}, originals"] = lambda peer=peer: transformed(peer, originals)
    times = interleave(calls, repeats)
    result = {
        "row": "decode", "images": name, "count": len(encoded), "image_size": image_size,
        "mean_bytes": round(np.mean([len(data) for data in encoded])),
        "images_per_s": {call: round(1e3 * len(encoded) / np.median(values)) for call, values in times.items()},
        "times": {call: quantiles(values) for call, values in times.items()},
        "mean_grey_level_difference": {decode: round(value, 2) for decode, value in differences.items()},
        "ratio_same_files": ratio(min((times[peer] for peer in peers), key=np.median), times["--decode cpu"]),
        "ratio_dali": ratio(times["--decode dali"], times["--decode cpu"]),
    }  # fmt: skip
    if originals:
        best = min((times[f"{peer}, originals"] for peer in peers), key=np.median)
        result["ratio_originals"] = ratio(best, times["--decode cpu"])
    return result


def at_full_size(path: Path) -> bytes:
    """A photo as JPEG bytes, enlarged to a short side of FULL_SIZE where it is smaller: COCO's are 640 x 480."""
    data = path.read_bytes()
    image = Image.open(io.BytesIO(data))
    if min(image.size) >= FULL_SIZE:
        return data
    scale = FULL_SIZE / min(image.size)
    enlarged = image.convert("RGB").resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
    file = io.BytesIO()
    enlarged.save(file, "JPEG", quality=90)
    return file.getvalue()


def bench_on_gpu(name: str, encoded: list[bytes], repeats: int) -> dict:
    """Images per second of our decoders, normalised and on the GPU at the end, as far as they are installed."""
    device = torch.device("cuda", torch.cuda.current_device())
    samples = [{"id": i, "key": str(i), "image": encoded[i % len(encoded)]} for i in range(GPU_BATCH)]
    decoders = ["cpu"] + ["dali"] * (find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None)
    images, calls = {}, {}
    for decode in decoders:
        whole, crop = (
            Collator(View(0, 224, IMAGE_MEAN, IMAGE_STD, crop_scale=scale), 0, GPU_BATCH, decode, device)
            for scale in ((1.0, 1.0), (0.9, 1.0))
        )
        images[decode] = whole.decode_images(samples, 0)[1]
        calls[decode] = lambda crop=crop: crop.decode_images(samples, 0)
    std = torch.tensor(IMAGE_STD, device=device).view(1, 3, 1, 1) * 255
    differences = {decode: float(((x - images["cpu"]) * std).abs().mean()) for decode, x in images.items()}
    if not max(differences.values()) < LARGEST_DIFFERENCE:
        raise SystemExit(f"{name}: the decoders differ by {differences} grey levels; no speed is measured")
    times = interleave(calls, repeats)
    return {
        "row": "decode", "images": name, "count": GPU_BATCH, "image_size": 224, "cores": num_cores(),
        "mean_bytes": round(np.mean([len(data) for data in encoded])),
        "images_per_s": {call: round(1e3 * GPU_BATCH / np.median(values)) for call, values in times.items()},
        "times": {call: quantiles(values) for call, values in times.items()},
        "mean_grey_level_difference": differences,
        "missing": [] if "dali" in decoders else ["nvidia.dali"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=2000, help="scenes drawn for the reader")
    parser.add_argument("--photos", type=Path, help="folder of JPEG photos")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    if args.device == "cpu":  # what one core does, here and there: peers would get more of them by worker processes
        torch.set_num_threads(1)
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    packages = "torchvision", "pillow", "nvidia-dali-cuda130", "open_clip_torch", "mosaicml-streaming"
    if args.photos:
        photos = [at_full_size(path) for path in sorted(args.photos.glob("*.jpg"))[:64]]
        prepared = [normalise(data, 256, 90).data for data in photos]
    if args.device == "cuda":
        if not args.photos:
            parser.error("--device cuda needs --photos")
        rows = [bench_on_gpu(name, images, args.repeats) for name, images in
                (("photos, prepared", prepared), ("photos", photos))]  # fmt: skip
        write_result("loader_cuda", rows, *packages)
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        # A process of its own: StreamingDataset hangs in one that has had worker processes.
        command = [sys.executable, "-m", "posmask.prep.build_shards", "--num-scenes", str(args.scenes), "--out", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rows.append(bench_reader(f"{folder}/train", args.repeats))
        shards = Shards((f"{folder}/train",))
        scenes = [shards[i]["image"] for i in range(128)]
        rows.append(bench_decode("scenes", scenes, 64, args.repeats))
    if args.photos:
        rows.append(bench_decode("photos, prepared", prepared, 224, args.repeats, photos))
    write_result("loader_cpu", rows, *packages)


if __name__ == "__main__":
    main()
