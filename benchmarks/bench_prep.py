"""How fast captions and images become shards, against a loop that takes one record at a time; and the memory it takes.

    python benchmarks/bench_prep.py --workers 2
    python benchmarks/bench_prep.py --memory 1000 10000 100000     # peak memory of builds of so many small records

The loop's pipeline is spaCy's own, all components; --loop-excludes ner lemmatizer trims it to what ours runs.
The pictures are scenes enlarged to 640 x 480, so that they have to be shrunk as photos have. The loop is one process:
spaCy on one caption, the tokenizer on one caption, PIL on one image, MDSWriter on one sample; its tokens, tags and
image sizes must equal ours. Loading spaCy and starting processes counts for both. Rates are medians of alternating
runs; rows go to results/prep.json, and the last line printed is JSON.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import operator
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from posmask.prep import pos
from posmask.prep.scenes import Scenes
from posmask.prep.wordpiece import load

RESULTS = Path(__file__).parent / "results" / "prep.json"
IMAGE_SIZE, QUALITY = 256, 90
POLL_S = 0.05  # between two looks at the memory


def write_pictures(
    folder: Path,
    num_records: int,
    size: tuple[int, int] = (640, 480),
    max_captions: int | None = None,
    num_images: int = 200,
) -> Path:
    """A table of `num_records` records over `num_images` different pictures, the others being links to them."""
    scenes = Scenes("train", num_records, 0)
    rows = []
    for i in range(num_records):
        path = folder / f"{i}.jpg"
        if i < num_images:
            picture = Image.open(io.BytesIO(scenes[i].load())).resize(size, Image.Resampling.BICUBIC)
            picture.save(path, quality=95)
        else:
            path.hardlink_to(folder / f"{i % num_images}.jpg")
        rows.append(json.dumps({"image": path.name, "caption": scenes[i].captions[:max_captions]}))
    table = folder / "pairs.jsonl"
    table.write_text("\n".join(rows) + "\n")
    return table


@dataclass
class Cost:
    """Of a build: how long it took, and the peaks of resident memory of its first process and of all together."""

    seconds: float
    parent_peak_mb: float
    tree_peak_mb: float  # pages that processes share count for each


def build(table: Path, out: Path, *flags: str) -> Cost:
    """Run the command."""
    columns = ["--table", str(table), "--image-column", "image", "--caption-column", "caption"]
    command = [sys.executable, "-m", "posmask.prep.build_shards", "table", *columns, "--out", str(out), *flags]
    command += ["--image-size", str(IMAGE_SIZE), "--quality", str(QUALITY)]
    cost, start = Cost(0.0, 0.0, 0.0), time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        parent = psutil.Process(process.pid)
        while process.poll() is None:
            resident_mb = [resident_memory_mb(each) for each in (parent, *parent.children(recursive=True))]
            cost.parent_peak_mb = max(cost.parent_peak_mb, resident_mb[0])
            cost.tree_peak_mb = max(cost.tree_peak_mb, sum(resident_mb))
            time.sleep(POLL_S)
    assert process.returncode == 0, command
    cost.seconds = time.perf_counter() - start
    return cost


def resident_memory_mb(process: psutil.Process) -> float:
    """0 for a process that has just ended."""
    try:
        return process.memory_info().rss / 1e6
    except psutil.NoSuchProcess:
        return 0.0


LOOP = """
import sys; sys.path.insert(0, {folder!r})
from bench_prep import loop
from pathlib import Path
loop(Path({table!r}), Path({out!r}), Path({tokenizer!r}), {num_records}, {exclude!r})
"""


def loop(table: Path, out: Path, tokenizer_folder: Path, num_records: int, exclude: list[str]) -> None:
    """The plain way: everything once for each caption and each image; the pipeline without `exclude`."""
    import spacy
    from streaming import MDSWriter

    from posmask.prep.tagging import find_tagger

    nlp = spacy.load(find_tagger("auto"), exclude=exclude)
    tokenizer = load(tokenizer_folder)
    columns = {"key": "str", "image": "bytes", "tokens": "ndarray:uint16", "upos": "ndarray:uint32"}
    writer = MDSWriter(columns=columns, out=str(out), hashes=["sha256"])
    for line in table.read_text().splitlines()[:num_records]:
        row = json.loads(line)
        image = Image.open(table.parent / row["image"]).convert("RGB")
        scale = min(1.0, IMAGE_SIZE / min(image.size))
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=QUALITY)
        tokens, upos = [], []
        for caption in row["caption"]:
            doc = nlp(caption)
            by_character = [0] * (len(caption) + 1)
            for token in doc:
                bit = pos.UPOS_BIT.get(token.pos_, 0)
                by_character[token.idx : token.idx + len(token)] = [bit] * len(token)
            encoded = tokenizer.encode(caption)
            tokens += encoded.ids
            upos += [functools.reduce(operator.or_, by_character[start:end], 0) for start, end in encoded.offsets]
        sample = {"tokens": np.array(tokens, np.uint16), "upos": np.array(upos, np.uint32)}
        writer.write({"key": row["image"], "image": buffer.getvalue(), **sample})
    writer.finish()


def samples(folder: Path) -> list[dict]:
    from streaming.base.format import reader_from_json

    shards = json.loads((folder / "index.json").read_text())["shards"]
    readers = [reader_from_json(str(folder), None, shard) for shard in shards]
    return [reader[i] for reader in readers for i in range(reader.samples)]


def check_equal(ours: Path, theirs: Path) -> None:
    """Same records, tokens, parts of speech and image sizes."""
    pairs = list(zip(samples(ours), samples(theirs), strict=False))
    assert pairs
    for a, b in pairs:
        assert a["key"] == b["key"]
        assert np.array_equal(a["tokens"], b["tokens"]), a["key"]
        assert np.array_equal(a["tags"] & pos.UPOS_MASK, b["upos"]), a["key"]
        assert Image.open(io.BytesIO(a["image"])).size == Image.open(io.BytesIO(b["image"])).size


def compare(folder: Path, num_records: int, num_workers: int, repeats: int, exclude: list[str]) -> dict:
    """Records per second of ours and of the loop, which gets a quarter of the records: it is slower, not fixed-cost."""
    table = write_pictures(folder, num_records)
    num_looped = num_records // 4
    ours_s, loop_s = [], []
    for repeat in range(repeats):
        out, looped = folder / f"ours-{repeat}", folder / f"loop-{repeat}"
        ours_s.append(build(table, out, "--workers", str(num_workers)).seconds)
        code = LOOP.format(folder=str(Path(__file__).parent), table=str(table), out=str(looped),
                           tokenizer=str(out / "tokenizer"), num_records=num_looped, exclude=exclude)  # fmt: skip
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        loop_s.append(time.perf_counter() - start)
        check_equal(out, looped)
    captions = sum(len(json.loads(line)["caption"]) for line in table.read_text().splitlines())
    ours, theirs = num_records / statistics.median(ours_s), num_looped / statistics.median(loop_s)
    return {
        "what": "speed",
        "records": num_records,
        "captions_per_record": round(captions / num_records, 2),
        "workers": num_workers,
        "loop_excludes": " ".join(exclude),
        "ours_records_per_s": round(ours, 1),
        "loop_records_per_s": round(theirs, 1),
        "ratio": round(ours / theirs, 2),
        "ours_s": [round(s, 1) for s in ours_s],
        "loop_s": [round(s, 1) for s in loop_s],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=4000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--loop-excludes", nargs="*", default=[], metavar="C", help="components that the loop lacks")
    parser.add_argument("--memory", type=int, nargs="+", metavar="N", help="peak memory at so many small records")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    new = []
    for num_records in args.memory or []:
        with tempfile.TemporaryDirectory() as folder:
            table = write_pictures(Path(folder), num_records, (64, 48), max_captions=1)
            cost = build(table, Path(folder) / "out", "--workers", str(args.workers))
        rounded = {name: round(value) for name, value in asdict(cost).items() if name != "seconds"}
        new.append({"what": "memory", "records": num_records, "workers": args.workers, **rounded})
    if not args.memory:
        with tempfile.TemporaryDirectory() as folder:
            new.append(compare(Path(folder), args.records, args.workers, args.repeats, args.loop_excludes))
    rows = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    for row in new:
        row |= {"device": f"{os.cpu_count()} cores {platform.machine()}", "python": platform.python_version()}
        same = ("what", "records", "loop_excludes")
        rows = [r for r in rows if [r.get(key) for key in same] != [row.get(key) for key in same]] + [row]
        print(json.dumps(row), flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
