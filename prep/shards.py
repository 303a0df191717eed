"""The shard format: its columns, ids, parts and manifest. Writing goes through here, and so does opening for training.

A folder of shards holds
    part-00017.00000.mds   one shard group for each part of `records_per_part` records
    part-00017.json        written last, so a part with this file is finished; its index entries and counts
    build.json             what is being built; decides whether a killed build may go on
    tokenizer/             loads with transformers.AutoTokenizer
    units.json             collocations, word lists and word scores
    index.json, manifest.json, dropped.jsonl   written by `merge` when all parts are there
Imports neither spaCy nor PIL, so that training can import it.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from hashlib import blake2b, sha256
from itertools import pairwise
from pathlib import Path
from secrets import token_hex
from typing import Any
from zlib import crc32

import numpy as np

from posmask.prep import pos

FORMAT_VERSION = 1
COLUMNS = {
    "key": "str",
    "id": "uint64",
    "image": "bytes",
    "tokens": "ndarray:uint16",
    "tags": "ndarray:uint32",
    "scores": "ndarray:uint8",  # left out where a build has none
    "caption_lengths": "ndarray:uint8",
    "captions": "json",
    "question_ids": "json",  # this and the next where captions are questions: one number each,
    "answers": "json",  # and {answer: VQA accuracy}
}
MAX_VOCAB = 1 << 16  # tokens are uint16
MAX_TOKENS = 255  # caption lengths are uint8
MAX_NAMED = 3
BUILD_AGAIN = "build it with prep/build_shards.py"


@dataclass(frozen=True)
class Sample:
    """One image with its C captions of T tokens in all, as stored; what is no column only feeds the counts."""

    key: str
    id: int
    image: bytes
    tokens: np.ndarray  # (T,) uint16
    tags: np.ndarray  # (T,) uint32
    scores: np.ndarray  # (T, S) uint8
    caption_lengths: np.ndarray  # (C,) uint8
    captions: list[str]
    width: int  # pixels
    height: int
    num_cut: int  # captions cut to the token limit
    num_empty: int  # captions left out
    question_ids: list[int] = field(default_factory=list)  # C of them, and of the next two, or none
    answers: list[dict[str, float]] = field(default_factory=list)
    most_common_answers: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TokenizerInfo:
    """What training must know of the tokenizer without loading it. Equal ones encode alike, whatever their names."""

    name: str = field(compare=False)  # as --tokenizer had it
    sha256: str  # of vocab.txt
    vocab_size: int
    pad_id: int
    unk_id: int
    cls_id: int
    sep_id: int
    mask_id: int
    reserved_ranges: tuple[tuple[int, int], ...]  # [first, past the end) of special and [unusedN] entries
    files: tuple[str, ...] = field(compare=False)

    @property
    def reserved_ids(self) -> tuple[int, ...]:
        """The ids that a random replacement may not yield, ascending."""
        return tuple(i for first, end in self.reserved_ranges for i in range(first, end))

    @classmethod
    def read(cls, folder: Path, name: str) -> TokenizerInfo:
        """Describe the tokenizer in `folder` (one entry a line in vocab.txt, the line number is the id)."""
        vocab_bytes = (folder / "vocab.txt").read_bytes()
        # Not splitlines(): vocabularies contain U+2028 and other characters that it takes for line ends.
        vocab = vocab_bytes.decode("utf-8").removesuffix("\n").split("\n")
        special = {key: vocab.index(f"[{key.removesuffix('_id').upper()}]") for key in _SPECIAL_IDS}
        unused = {i for i, entry in enumerate(vocab) if entry.startswith("[unused") and entry.endswith("]")}
        ranges: list[list[int]] = []
        for i in sorted(unused | set(special.values())):
            if ranges and ranges[-1][1] == i:
                ranges[-1][1] += 1
            else:
                ranges.append([i, i + 1])
        return cls(
            name=name,
            sha256=sha256(vocab_bytes).hexdigest(),
            vocab_size=len(vocab),
            **special,
            reserved_ranges=tuple((first, end) for first, end in ranges),
            files=tuple(sorted(path.name for path in folder.iterdir())),
        )


_SPECIAL_IDS = ("pad_id", "unk_id", "cls_id", "sep_id", "mask_id")


@dataclass(frozen=True)
class Manifest:
    """manifest.json: what a finished build holds and how it was made."""

    format_version: int
    bits_computed: tuple[str, ...]  # names in pos.BITS
    scores: tuple[str, ...]
    tokenizer: TokenizerInfo
    tagger: dict[str, Any]  # name, version, sha256, spacy, parser
    max_tokens: int  # the limit asked for
    longest_caption: int  # tokens, [CLS] and [SEP] included
    image: dict[str, Any]  # size (limit of the short side), quality, mean_width, mean_height
    sources: tuple[dict[str, Any], ...]  # name, licence, command, records, records_sha256, excluded
    # records, images, captions, tokens, maskable, cut_captions, empty_captions, per_upos {tag: pieces that carry it},
    # and where captions are questions: answers {answer: questions of which it is the most common one}
    counts: dict[str, Any]
    dropped: dict[str, int]  # records by reason
    records_per_part: int
    parts: tuple[dict[str, Any], ...]  # name, records, samples, tokens

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Read the manifest of `folder`. Raises ValueError when these are not complete shards of this version."""
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"no such folder of shards: {folder}; {BUILD_AGAIN}")
        path = folder / "manifest.json"
        if not path.is_file():
            if (folder / "build.json").is_file():
                raise ValueError(f"{folder} holds an unfinished build; run the same build command again")
            raise ValueError(f"{folder} has no manifest.json, so it holds no posmask shards; {BUILD_AGAIN}")
        values = read_json(path)
        if not isinstance(values, dict) or "format_version" not in values:
            raise ValueError(f"{path} is not a manifest of posmask shards; {BUILD_AGAIN}")
        check_version(values["format_version"], folder)
        if not (folder / "index.json").is_file():
            raise ValueError(f"{folder} has a manifest.json but no index.json; delete manifest.json and build again")
        names = {known.name for known in fields(cls)}
        if set(values) != names:
            raise ValueError(f"{path} is damaged: wrong or missing keys {sorted(set(values) ^ names)}; {BUILD_AGAIN}")
        tokenizer = values["tokenizer"]
        tokenizer["reserved_ranges"] = tuple((first, end) for first, end in tokenizer["reserved_ranges"])
        tokenizer["files"] = tuple(tokenizer["files"])
        values["tokenizer"] = TokenizerInfo(**tokenizer)
        for name in ("bits_computed", "scores", "sources", "parts"):
            values[name] = tuple(values[name])
        return cls(**values)

    def save(self, folder: Path) -> None:
        """Write manifest.json atomically."""
        _write_json(folder / "manifest.json", asdict(self))


def check_version(version: object, folder: Path) -> None:
    """Raise ValueError unless `version` is the one this code reads and writes."""
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has shards of format_version {version}, this posmask reads {FORMAT_VERSION}; "
            "build them again, or use the posmask that wrote them"
        )


def sample_id(source: str, key: str) -> int:
    """The first 8 bytes of blake2b("source/key") as a little-endian unsigned integer."""
    return int.from_bytes(blake2b(f"{source}/{key}".encode()).digest()[:8], "little")


def part_name(part: int) -> str:
    return f"part-{part:05d}"


def build_state(out: Path, config: dict[str, Any]) -> str:
    """What is in `out`, seen from a build of `config`: "new", "unfinished" or "complete".

    Raises ValueError when the folder belongs to something else or to a build of another configuration.
    """
    # Another job of the same build may be about to write build.json, so unfinished files don't count.
    if not out.exists() or (out.is_dir() and all(path.name.endswith(".tmp") for path in out.iterdir())):
        return "new"
    if not (out / "build.json").is_file():
        raise ValueError(f"{out} exists and is not a build of posmask shards; choose another --out")
    there = read_json(out / "build.json")
    check_version(there.get("format_version"), out)
    different = [key for key in {**there, **config} if there.get(key) != config.get(key)]
    if different:
        key, *others = different
        also = f" (also different: {', '.join(others)})" if others else ""
        raise ValueError(
            f"{out} was built with another {key}: {there.get(key)!r} there, {config.get(key)!r} now{also}; "
            "choose another --out or delete that folder"
        )
    return "complete" if (out / "manifest.json").is_file() and (out / "index.json").is_file() else "unfinished"


def start_build(out: Path, config: dict[str, Any]) -> None:
    """Claim `out` for a build of `config` (keys as `merge` reads them)."""
    out.mkdir(parents=True, exist_ok=True)
    _write_json(out / "build.json", config)


def columns(num_scores: int, has_answers: bool = False) -> dict[str, str]:
    """The columns of shards with `num_scores` scores, of questions or of captions."""
    left_out = (() if num_scores else ("scores",)) + (() if has_answers else ("question_ids", "answers"))
    return {name: kind for name, kind in COLUMNS.items() if name not in left_out}


def write_part(
    out: Path,
    part: int,
    num_records: int,
    samples: Iterable[Sample],
    dropped: Sequence[tuple[str, str]],
    num_scores: int = 0,
    has_answers: bool = False,
) -> None:
    """Write one part of `num_records` records atomically: its `samples` and the `dropped` (key, reason) of the others.

    `dropped` is read after the last sample, so both may come from one stream.
    """
    from streaming import MDSWriter  # takes seconds and torch to import, and only writing needs it

    name = part_name(part)
    temporary = temporary_path(out / name)
    tally = _Tally()
    try:
        # As a context manager it would write a valid index even after an exception.
        kinds = columns(num_scores, has_answers)
        writer = MDSWriter(columns=kinds, out=str(temporary), hashes=["sha256"])
        for sample in samples:
            writer.write({column: getattr(sample, column) for column in kinds} | {"id": np.uint64(sample.id)})
            tally.add(sample)
        writer.finish()
        shards = read_json(temporary / "index.json")["shards"]
        written = sum(shard["samples"] for shard in shards)
        assert written == tally.counts["images"] == num_records - len(dropped), (written, num_records, len(dropped))
        checksums: list[int] = []
        for shard in shards:
            number = shard["raw_data"]["basename"].split(".")[1]
            final = f"{name}.{number}.mds"
            checksums += sample_checksums(temporary / shard["raw_data"]["basename"])
            (temporary / shard["raw_data"]["basename"]).replace(out / final)
            shard["raw_data"]["basename"] = final
        summary = {"name": name, "records": num_records, "shards": shards, "dropped": list(dropped), **tally.result()}
        _write_json(out / f"{name}.json", {**summary, "sample_crc32": checksums})
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sample_spans(shard_bytes: bytes) -> np.ndarray:
    """(N+1,) int64: where the samples of an MDS shard begin, and where the last one ends."""
    num_samples = int.from_bytes(shard_bytes[:4], "little")
    return np.frombuffer(shard_bytes, np.uint32, num_samples + 1, offset=4).astype(np.int64)


def sample_checksums(shard: Path) -> list[int]:
    """CRC-32 of each sample in a shard file; the hash in the index tells that a shard is damaged, these tell where."""
    data = shard.read_bytes()
    return [crc32(data[begin:end]) for begin, end in pairwise(sample_spans(data).tolist())]


def read_config(out: Path) -> dict[str, Any]:
    """What is being built in `out`. Raises ValueError when nothing is."""
    if not (out / "build.json").is_file():
        raise ValueError(f"{out} holds no build of posmask shards; {BUILD_AGAIN}")
    return read_json(out / "build.json")


def read_parts(out: Path, num_parts: int) -> dict[int, dict[str, Any]]:
    """The summaries of the finished parts by number."""
    paths = {part: out / f"{part_name(part)}.json" for part in range(num_parts)}
    return {part: read_json(path) for part, path in paths.items() if path.is_file()}


def all_parts(out: Path) -> list[dict[str, Any]]:
    """The summaries of all parts of the build in `out`. Raises ValueError when one is missing."""
    config = read_config(out)
    num_parts = -(-config["records"] // config["records_per_part"])
    parts = read_parts(out, num_parts)
    if missing := [part_name(part) for part in range(num_parts) if part not in parts]:
        more = f" and {len(missing) - MAX_NAMED} more" if len(missing) > MAX_NAMED else ""
        raise ValueError(f"{out} lacks {', '.join(missing[:MAX_NAMED])}{more}; run the same build command again")
    return [parts[part] for part in range(num_parts)]


def write_dropped(out: Path, dropped: Iterable[tuple[str, str]]) -> None:
    """dropped.jsonl: one line for each record that did not make it, with its reason."""
    lines = [json.dumps({"key": key, "reason": reason}, ensure_ascii=False) + "\n" for key, reason in dropped]
    write_atomically(out / "dropped.jsonl", "".join(lines))


def merge(out: Path) -> Manifest:
    """Make one data set of the finished parts: dropped.jsonl, index.json, then manifest.json, each atomically.

    Raises ValueError when a part is missing.
    """
    config, summaries = read_config(out), all_parts(out)
    dropped = [(key, reason) for part in summaries for key, reason in part["dropped"]]
    write_dropped(out, dropped)
    _write_json(out / "index.json", {"version": 2, "shards": [s for part in summaries for s in part["shards"]]})

    counts: Counter[str] = Counter()
    per_upos: Counter[str] = Counter()
    answers: Counter[str] = Counter()
    for part in summaries:
        counts.update(part["counts"])
        per_upos.update(part["per_upos"])
        answers.update(part.get("answers", {}))
    images = max(1, counts["images"])
    pixels = {f"mean_{side}": round(counts.pop(f"{side}_pixels", 0) / images, 1) for side in ("width", "height")}
    source = {key: config[key] for key in ("licence", "command", "records", "records_sha256", "excluded")}
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        bits_computed=tuple(config["bits_computed"]),
        scores=tuple(config["scores"]),
        tokenizer=TokenizerInfo.read(out / "tokenizer", config["tokenizer"]),
        tagger=config["tagger"],
        max_tokens=config["max_tokens"],
        longest_caption=max(part["longest_caption"] for part in summaries),
        image={"size": config["image_size"], "quality": config["quality"], **pixels},
        sources=({"name": config["source"], **source},),
        counts={
            "records": config["records"],
            **counts,
            "per_upos": {tag: per_upos[tag] for tag in pos.UPOS},
            **({"answers": dict(sorted(answers.items(), key=lambda item: (-item[1], item[0])))} if answers else {}),
        },
        dropped=dict(Counter(reason for _, reason in dropped).most_common()),
        records_per_part=config["records_per_part"],
        parts=tuple(
            {
                "name": part["name"],
                "records": part["records"],
                "samples": part["counts"]["images"],
                "tokens": part["counts"]["tokens"],
            }
            for part in summaries
        ),
    )
    manifest.save(out)
    for leftover in out.glob("*.tmp"):  # of killed processes
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
    return manifest


class _Tally:
    """Counts over the samples of a part."""

    def __init__(self) -> None:
        self.counts = Counter(dict.fromkeys(("images", "captions", "tokens", "cut_captions", "empty_captions"), 0))
        self.tags: list[np.ndarray] = []
        self.answers: Counter[str] = Counter()
        self.longest_caption = 0

    def add(self, sample: Sample) -> None:
        assert sample.caption_lengths.sum(dtype=np.int64) == len(sample.tokens) == len(sample.tags), sample.key
        assert len(sample.scores) == len(sample.tags), sample.key
        self.counts["images"] += 1
        self.counts["captions"] += len(sample.captions)
        self.counts["tokens"] += len(sample.tokens)
        self.counts["cut_captions"] += sample.num_cut
        self.counts["empty_captions"] += sample.num_empty
        self.counts["width_pixels"] += sample.width
        self.counts["height_pixels"] += sample.height
        self.tags.append(sample.tags)
        self.answers.update(sample.most_common_answers)
        self.longest_caption = max(self.longest_caption, int(sample.caption_lengths.max()))

    def result(self) -> dict[str, Any]:
        tags = np.concatenate(self.tags) if self.tags else np.zeros(0, np.uint32)
        self.counts["maskable"] = int(np.count_nonzero(tags & np.uint32(pos.MASKABLE)))
        per_upos = {tag: int(np.count_nonzero(tags & np.uint32(bit))) for tag, bit in pos.UPOS_BIT.items()}
        result = {"counts": dict(self.counts), "per_upos": per_upos, "longest_caption": self.longest_caption}
        return result | ({"answers": dict(sorted(self.answers.items()))} if self.answers else {})


def read_json(path: Path) -> Any:
    """The content of a JSON file of ours. Raises ValueError, naming it, where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete its folder and build again") from None


def _write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def temporary_path(path: Path) -> Path:
    """A name beside `path` that no other process takes, on this machine or another."""
    return path.with_name(f"{path.name}.{token_hex(6)}.tmp")


def write_atomically(path: Path, text: str) -> None:
    """Write a file such that it is there whole or not at all."""
    temporary = temporary_path(path)
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
