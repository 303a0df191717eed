"""Check finished shards: every byte against its hash, every image, token and bit against the format.

    python prep/build_shards.py verify data/scenes/train
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from hashlib import sha256
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np

from posmask.prep import pos, shards
from posmask.prep.images import BrokenImage, check_jpeg
from posmask.prep.shards import Manifest

COUNTED = ("images", "captions", "tokens", "maskable")
KEY_BYTES = 200  # of a damaged key that are shown


class ShardReport(NamedTuple):
    """What is wrong with a shard, its counts, and the ids of its samples; no counts where it is damaged."""

    problems: list[str]
    counts: dict[str, int]
    ids: np.ndarray  # (N,) uint64


NO_IDS = np.zeros(0, np.uint64)


def verify(folder: Path, num_workers: int = 1) -> Iterator[str]:
    """Everything that is wrong with the shards in `folder`, one line each, naming shard and sample.

    Raises ValueError when there are no finished shards, or their manifest cannot be read.
    """
    manifest = Manifest.load(folder)
    index = shards.read_json(folder / "index.json")
    parts = shards.read_parts(folder, len(manifest.parts))
    for number, part in enumerate(manifest.parts):
        if number not in parts:
            yield f"{shards.part_name(number)}.json is missing"
        elif (parts[number]["records"], parts[number]["counts"]["images"]) != (part["records"], part["samples"]):
            yield f"{shards.part_name(number)}.json and manifest.json differ in the number of records or samples"
    if index["shards"] != [shard for number in sorted(parts) for shard in parts[number]["shards"]]:
        yield "index.json differs from what the parts list"
    if not (folder / "tokenizer" / "vocab.txt").is_file():
        yield "tokenizer/vocab.txt is missing"
    elif shards.TokenizerInfo.read(folder / "tokenizer", manifest.tokenizer.name) != manifest.tokenizer:
        yield "tokenizer/vocab.txt is not the vocabulary that manifest.json describes"

    jobs = []
    for part in parts.values():
        checksums = iter(part["sample_crc32"])
        for entry in part["shards"]:
            jobs.append((folder, entry, [next(checksums) for _ in range(entry["samples"])], manifest))
    counts: Counter[str] = Counter()
    ids: list[np.ndarray] = []
    whole = True  # no shard is lost or damaged, so that the counts can be compared
    for problems, tally, shard_ids in _run(jobs, num_workers):
        yield from problems
        whole = whole and not problems
        counts.update(tally)
        ids.append(shard_ids)
    numbers, repeats = np.unique(np.concatenate([NO_IDS, *ids]), return_counts=True)
    yield from (f"the id {number} comes several times" for number in numbers[repeats > 1])
    if whole:
        expected = {**{name: manifest.counts[name] for name in COUNTED}, **manifest.counts["per_upos"]}
        for name, number in expected.items():
            if counts[name] != number:
                yield f"manifest.json counts {number} {name}, the shards hold {counts[name]}"


def _run(jobs: list[tuple[Any, ...]], num_workers: int) -> Iterator[ShardReport]:
    if min(num_workers, len(jobs)) <= 1:
        yield from (verify_shard(*job) for job in jobs)
        return
    with ProcessPoolExecutor(min(num_workers, len(jobs)), get_context("spawn")) as pool:
        yield from pool.map(verify_shard, *zip(*jobs, strict=True))


def verify_shard(
    folder: Path, entry: dict[str, Any], checksums: list[int], manifest: Manifest
) -> ShardReport:
    """Check one shard; `entry` is its place in the index, `checksums` the CRC-32 of its samples."""
    from streaming.base.format import reader_from_json

    name, size = entry["raw_data"]["basename"], entry["raw_data"]["bytes"]
    path = folder / name
    if not path.is_file():
        return ShardReport([f"{name} is missing"], {}, NO_IDS)
    data = path.read_bytes()
    if len(data) != size:
        return ShardReport([f"{name} has {len(data)} bytes instead of {size}"], {}, NO_IDS)
    reader = reader_from_json(str(folder), None, entry)
    if sha256(data).hexdigest() != entry["raw_data"]["hashes"]["sha256"]:
        return ShardReport(_damaged(name, data, checksums, reader), {}, NO_IDS)
    problems: list[str] = []
    counts: Counter[str] = Counter()
    ids = []
    for i in range(entry["samples"]):
        sample = reader[i]
        wrong = sample_problem(sample, manifest)
        if wrong:
            problems.append(f"{name}, sample {i} ({sample['key']}): {wrong}")
        tags = sample["tags"]
        counts.update(images=1, captions=len(sample["captions"]), tokens=len(sample["tokens"]))
        counts.update(maskable=int(np.count_nonzero(tags & np.uint32(pos.MASKABLE))))
        counts.update({tag: int(np.count_nonzero(tags & np.uint32(bit))) for tag, bit in pos.UPOS_BIT.items()})
        ids.append(int(sample["id"]))
    return ShardReport(problems, dict(counts), np.array(ids, np.uint64))


def _damaged(name: str, data: bytes, checksums: list[int], reader: Any) -> list[str]:
    """The samples of a shard with a wrong hash that changed; a change outside them is one of its header."""
    header = f"{name} is damaged: its sha256 differs from the index"
    if int.from_bytes(data[:4], "little") != len(checksums):
        return [f"{header}; its header, the number of samples"]
    spans = shards.sample_spans(data).tolist()
    found = []
    for i, ((begin, end), checksum) in enumerate(zip(pairwise(spans), checksums, strict=True)):
        if crc32(data[begin:end]) != checksum:
            found.append(f"{header}; sample {i}{_key(data[begin:end], reader)}")
    return found or [f"{header}; its header, no sample"]


def _key(sample: bytes, reader: Any) -> str:
    """The key of a damaged sample, as far as it can be read."""
    names, sizes = reader.column_names, reader.column_sizes
    num_sizes = sum(not size for size in sizes)
    stored = iter(np.frombuffer(sample[: 4 * num_sizes].ljust(4 * num_sizes, b"\0"), np.uint32).tolist())
    at = 4 * num_sizes
    for column, size in zip(names, sizes, strict=True):
        num_bytes = size or next(stored)
        if column == "key":
            return f" ({sample[at : at + min(num_bytes, KEY_BYTES)].decode('utf-8', 'replace')})"
        at += num_bytes
    return ""


def sample_problem(sample: dict[str, Any], manifest: Manifest) -> str | None:
    """What is wrong with a sample, if anything; see shards.Sample for what is right."""
    info = manifest.tokenizer
    tokens, tags, lengths = sample["tokens"], sample["tags"], sample["caption_lengths"].astype(np.int64)
    if not len(lengths) or len(lengths) != len(sample["captions"]):
        return f"{len(lengths)} caption lengths for {len(sample['captions'])} captions"
    if not len(tokens) == len(tags) == lengths.sum():
        return f"{len(tokens)} tokens, {len(tags)} tags, but the lengths of its captions sum to {lengths.sum()}"
    if lengths.min() < 3 or lengths.max() > manifest.max_tokens:
        return f"a caption of {lengths.min()} or {lengths.max()} tokens; allowed are 3 to {manifest.max_tokens}"
    if tokens.max() >= info.vocab_size:
        return f"the token {tokens.max()} is not in the vocabulary of {info.vocab_size}"
    ends = np.cumsum(lengths)
    special = np.zeros(len(tokens), bool)
    special[np.concatenate([ends - lengths, ends - 1])] = True
    if not (tokens[ends - lengths] == info.cls_id).all() or not (tokens[ends - 1] == info.sep_id).all():
        return "a caption does not stand between [CLS] and [SEP]"
    if np.isin(tokens[~special], (info.cls_id, info.sep_id, info.pad_id, info.mask_id)).any():
        return "a special token stands inside a caption"
    known = sum(pos.BITS[name] for name in manifest.bits_computed)
    if (tags & ~np.uint32(known)).any():
        return "a tag has a bit that the manifest does not list"
    if tags[special].any():
        return "[CLS] or [SEP] has a tag"
    if ((tags[~special] & pos.MASKABLE != 0) != (tokens[~special] != info.unk_id)).any():
        return "a piece is maskable but [UNK], or neither"
    if ("scores" in sample) != bool(manifest.scores):
        return "it has scores and the manifest none, or the other way round"
    if manifest.scores and sample["scores"].shape != (len(tokens), len(manifest.scores)):
        return f"scores of shape {sample['scores'].shape}"
    if ("answers" in sample) != ("answers" in manifest.counts):
        return "it has answers and the manifest counts none, or the other way round"
    if "answers" in sample and not len(sample["question_ids"]) == len(sample["answers"]) == len(lengths):
        return f"{len(lengths)} questions, {len(sample['question_ids'])} ids and {len(sample['answers'])} answers"
    source = manifest.sources[0]["name"]
    if int(sample["id"]) != shards.sample_id(source, sample["key"]):
        return f"the id is not that of {source}/{sample['key']}"
    try:
        check_jpeg(sample["image"])
    except BrokenImage as error:
        return f"image: {error}"
    return None
