"""Turn captions and images into shards that training reads.

    python prep/build_shards.py                       # the built-in scenes: data/scenes/train, val and eval
    python prep/build_shards.py coco --annotations captions_train2017.json --images train2017
    python prep/build_shards.py table --table pairs.csv --image-column filepath --caption-column caption
    python prep/build_shards.py folder --images pictures

Run again, it continues a build that was stopped, and says so when there is nothing left to do.
Exit codes: 0 done, 1 too many records dropped, 2 wrong usage or input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from posmask.prep import shards, sources, tagging, wordpiece
from posmask.prep.samples import BITS_COMPUTED, CHUNK_RECORDS, Prepared, Recipe, is_unicode, prepare
from posmask.prep.scene_tasks import write_eval_sets
from posmask.prep.scenes import Scenes
from posmask.prep.sources import Record

SOURCES = ("scenes", "coco", "table", "folder")
# Flags that only some sources take, and whether those need them.
SOURCE_FLAGS = {
    "num_scenes": {"scenes": False},
    "annotations": {"coco": True},
    "images": {"coco": True, "folder": True, "table": False},
    "table": {"table": True},
    "image_column": {"table": True},
    "caption_column": {"table": True},
}
NUM_SCENES = 20_000
MIN_EVAL_SCENES = 50  # fewer hold too few pairs that mirror each other
# Decide where and how fast the shards are written, not what is in them.
NOT_IN_COMMAND = ("source", "out", "workers", "max_dropped")
MAX_NAMED = 3  # broken records named in the error line; dropped.jsonl has all


class TooManyDropped(Exception):
    """More records were dropped than --max-dropped allows."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see --help")


def make_parser() -> Parser:
    parser = Parser(
        prog="build_shards.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", nargs="?", default="scenes", choices=SOURCES, help="where images and captions come from")
    add("--annotations", nargs="+", metavar="F", help="coco: captions JSON, one file or several")
    add("--images", metavar="DIR", help="coco, folder: where the images are; table: default the table's folder")
    add("--table", metavar="F", help="table: a .csv, .tsv, .jsonl or .parquet file")
    add("--image-column", metavar="C", help="table: the column with the image's path")
    add("--caption-column", metavar="C", help="table: the column with the caption")
    add("--num-scenes", type=_positive, metavar="N", help=f"scenes: training images, {NUM_SCENES} by default")
    add("--out", metavar="DIR", help="default data/SOURCE")
    add("--tokenizer", default="train:8192", metavar="T", help="train:N, a vocab.txt, a tokenizer's folder or hub name")
    add("--tagger", default="auto", metavar="T", help="auto, the name or the path of a spaCy model")
    add("--image-size", type=_positive, default=256, help="images with a longer short side are shrunk to it, pixels")
    add("--quality", type=int, default=90, help="of JPEGs that have to be encoded again, 1 to 95")
    add("--max-tokens", type=int, default=48, help="per caption, [CLS] and [SEP] included; longer ones are cut")
    add("--records-per-part", type=_positive, default=4096, help="a part is written and resumed as a whole")
    add("--workers", type=_positive, default=None, help="processes, all cores by default; never changes the result")
    add("--limit", type=_positive, metavar="N", help="take the first N records only")
    add("--exclude", metavar="FILE", help="image keys, file names or COCO ids to leave out, one a line")
    add("--max-dropped", type=float, default=0.01, help="share of broken records above which the build fails")
    add("--seed", type=int, default=0, help="of the scenes")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = make_parser().parse_args(argv)
        check(args)
        out = Path(args.out or f"data/{args.source}")
        if args.source == "scenes":
            build_scenes(args, out)
        else:
            build(args, open_source(args), out)
    except TooManyDropped as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenProcessPool:
        print("error: a worker process was killed; memory may be short, try fewer --workers", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished parts are kept, the same command continues", file=sys.stderr)
        return 130
    return 0


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for flags out of range, and for flags that the source lacks or doesn't know."""
    for name, takers in SOURCE_FLAGS.items():
        flag, value = _flag(name), getattr(args, name)
        if value is not None and args.source not in takers:
            belongs = ", ".join(takers)
            raise ValueError(f"{flag} {_shown(value)} contradicts the source {args.source}; it belongs to {belongs}")
        if value is None and takers.get(args.source):
            raise ValueError(f"the source {args.source} needs {flag}; see --help")
    for name, low, high in (("quality", 1, 95), ("max_tokens", 8, shards.MAX_TOKENS), ("max_dropped", 0, 1)):
        if not low <= getattr(args, name) <= high:
            raise ValueError(f"{_flag(name)} {getattr(args, name)} is not within {low} to {high}")
    wordpiece.check_spec(args.tokenizer)


def open_source(args: argparse.Namespace) -> Sequence[Record]:
    images = Path(args.images) if args.images else None
    if args.source == "coco":
        return sources.coco([Path(path) for path in args.annotations], images)
    if args.source == "table":
        return sources.table(Path(args.table), args.image_column, args.caption_column, images)
    return sources.folder(images)


def build_scenes(args: argparse.Namespace, out: Path) -> None:
    """The default: a training and a validation set with one vocabulary, and evaluation sets in public formats."""
    num_scenes = args.num_scenes or NUM_SCENES
    build(args, Scenes("train", num_scenes, args.seed), out / "train")
    build(args, Scenes("val", max(1, num_scenes // 10), args.seed), out / "val", tokenizer=out / "train" / "tokenizer")
    if (out / "eval").exists():
        return
    for leftover in out.glob("eval.*.tmp"):  # of killed processes
        shutil.rmtree(leftover)
    temporary = out / f"eval.{os.getpid()}.tmp"
    try:
        write_eval_sets(temporary, max(MIN_EVAL_SCENES, num_scenes // 40), args.seed)
        temporary.replace(out / "eval")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{out / 'eval'}: evaluation sets of held-out scenes")


def build(args: argparse.Namespace, source: Sequence[Record], out: Path, tokenizer: Path | None = None) -> None:
    """Build `source` into `out`, or finish what is there; `tokenizer` overrides --tokenizer by a folder of ours.

    Raises ValueError before anything is written when the input or `out` is not usable, TooManyDropped at the end.
    """
    source, num_excluded = sources.without(source, _read_excluded(args.exclude), args.limit)
    if not len(source):
        raise ValueError(f"no records: the source {source.name} is empty, or all of it is excluded")
    tagger = tagging.find_tagger(args.tagger)
    config = {
        "format_version": shards.FORMAT_VERSION,
        "tokenizer": args.tokenizer,
        "tagger": tagging.describe_tagger(tagger),
        "max_tokens": args.max_tokens,
        "image_size": args.image_size,
        "quality": args.quality,
        "records_per_part": args.records_per_part,
        "bits_computed": list(BITS_COMPUTED),
        "source": source.name,
        "licence": source.licence,
        "records": len(source),
        "excluded": num_excluded,
        "records_sha256": fingerprint(source),
        "command": command_line(args),
    }
    if shards.build_state(out, config) == "complete":
        print(f"{out}: already complete")
        return
    if not (out / "tokenizer").is_dir():
        captions = (caption for record in source for caption in record.captions if is_unicode(caption))
        made = wordpiece.make(str(tokenizer or args.tokenizer), captions)
        shards.start_build(out, config)
        wordpiece.save(made, out / "tokenizer")
    recipe = Recipe(source.name, out / "tokenizer", tagger, args.image_size, args.quality, args.max_tokens)
    write_parts(source, out, recipe, args.records_per_part, args.workers or os.cpu_count() or 1)
    check_dropped(out, len(source), args)
    manifest = shards.merge(out)
    print(f"{out}:")
    Console().print(summary(manifest))


def write_parts(source: Sequence[Record], out: Path, recipe: Recipe, records_per_part: int, num_workers: int) -> None:
    """Write the parts that are not finished yet."""
    starts = range(0, len(source), records_per_part)
    finished = shards.read_parts(out, len(starts))
    spans = [
        (part, range(start, min(start + CHUNK_RECORDS, end)))
        for part in range(len(starts))
        if part not in finished
        for end in [min(starts[part] + records_per_part, len(source))]
        for start in range(starts[part], end, CHUNK_RECORDS)
    ]
    if not spans:
        return
    chunks = ([source[i] for i in span] for _, span in spans)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        closing(prepare(chunks, recipe, min(num_workers, len(spans)))) as results,
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
    ):
        total = sum(len(span) for _, span in spans)
        task = progress.add_task(str(out), total=total)
        for part, group in groupby(zip(spans, results, strict=True), key=lambda pair: pair[0][0]):
            dropped: list[tuple[str, str]] = []
            num_records = min(records_per_part, len(source) - starts[part])
            shards.write_part(out, part, num_records, _stream(group, dropped, progress, task), dropped)
            if not console.is_terminal:
                print(f"{out}: part {part + 1} of {len(starts)}, {num_records} records", flush=True)


def _stream(
    group: Iterable[tuple[tuple[int, range], Prepared]],
    dropped: list[tuple[str, str]],
    progress: Progress,
    task: TaskID,
) -> Iterator[shards.Sample]:
    """The samples of a part; the records that became none are appended to `dropped` on the way."""
    for (_, span), prepared in group:
        yield from prepared.samples
        dropped += prepared.dropped
        progress.advance(task, len(span))


def check_dropped(out: Path, num_records: int, args: argparse.Namespace) -> None:
    """Raise TooManyDropped, with dropped.jsonl written, when --max-dropped is exceeded."""
    parts = shards.read_parts(out, -(-num_records // args.records_per_part))
    dropped = [(key, reason) for part in sorted(parts) for key, reason in parts[part]["dropped"]]
    if len(dropped) <= args.max_dropped * num_records:
        return
    shards.write_dropped(out, dropped)
    reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(reason for _, reason in dropped).most_common())
    raise TooManyDropped(
        f"{len(dropped)} of {num_records} records dropped ({reasons}), more than --max-dropped {args.max_dropped:g} "
        f"allows; first {', '.join(key for key, _ in dropped[:MAX_NAMED])}, all in {out / 'dropped.jsonl'}. "
        "Raise --max-dropped to go without them, or mend them and build into an empty folder"
    )


def summary(manifest: shards.Manifest) -> Table:
    """The closing table."""
    table = Table("", "count", "share")
    for column in table.columns[1:]:
        column.justify = "right"
    counts = manifest.counts
    for name in ("images", "captions", "tokens"):
        table.add_row(name, f"{counts[name]:,}", "")
    table.add_row("tokens in the longest caption", f"{manifest.longest_caption}", "")
    for name in ("cut_captions", "empty_captions"):
        if counts[name]:
            table.add_row(name.replace("_", " "), f"{counts[name]:,}", f"{counts[name] / counts['captions']:.1%}")
    if excluded := sum(source["excluded"] for source in manifest.sources):
        table.add_row("excluded", f"{excluded:,}", "")
    for reason, count in manifest.dropped.items():
        table.add_row(f"dropped: {reason}", f"{count:,}", f"{count / counts['records']:.1%}")
    table.add_section()
    num_pieces = counts["tokens"] - 2 * counts["captions"]
    for tag, count in sorted(counts["per_upos"].items(), key=lambda item: -item[1]):
        table.add_row(tag, f"{count:,}", f"{count / max(1, num_pieces):.1%}")
    return table


def command_line(args: argparse.Namespace) -> str:
    """The command that made a build, as typed but for flags at their default and flags that leave no trace."""
    words = ["python", "prep/build_shards.py", args.source]
    for name, value in vars(args).items():
        if name not in NOT_IN_COMMAND and value != make_parser().get_default(name):
            words += [_flag(name), *(map(str, value) if isinstance(value, list) else [str(value)])]
    return shlex.join(words)


def fingerprint(source: Sequence[Record]) -> str:
    """sha256 of all keys and captions. Raises ValueError for a key that comes twice or is not valid Unicode."""
    digest = sha256()
    seen: set[int] = set()
    for record in source:
        try:
            number = shards.sample_id(source.name, record.key)
        except UnicodeEncodeError:
            raise ValueError(f"the image name {record.key!r} is not valid Unicode; rename it") from None
        if number in seen:
            raise ValueError(f"the image {record.key} comes twice in the source {source.name}; names must be unique")
        seen.add(number)
        digest.update(json.dumps([record.key, *record.captions]).encode())
    return digest.hexdigest()


def _read_excluded(path: str | None) -> set[str]:
    if path is None:
        return set()
    try:
        return {line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()}
    except (OSError, UnicodeDecodeError):
        raise ValueError(f"--exclude {path}: no such file, or not UTF-8 text") from None


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
