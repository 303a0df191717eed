"""Turn captions and images into shards that training reads.

    python prep/build_shards.py                       # the built-in scenes: data/scenes/train, val and eval
    python prep/build_shards.py coco --annotations captions_train2017.json --images train2017
    python prep/build_shards.py table --table pairs.csv --image-column filepath --caption-column caption
    python prep/build_shards.py folder --images pictures            # a.png beside a.txt, or a metadata.csv
    python prep/build_shards.py karpathy --annotations dataset_coco.json --images coco --split train --restval
    python prep/build_shards.py albef --annotations coco.json --images coco
    python prep/build_shards.py webdataset --files laion/*.tar      # as img2dataset writes them
    python prep/build_shards.py parquet --files train-*.parquet     # images inside, as on the Hugging Face hub
    python prep/build_shards.py tsv --table cc3m.tsv --columns caption,image --images cc3m
    python prep/build_shards.py vqa --questions Q.json --annotations A.json --images train2014   # for fine-tuning
    python prep/build_shards.py scene-questions --tokenizer data/scenes/train/tokenizer          # the same of scenes

Files and folders may be URLs, --files with wildcards: --files 's3://bucket/laion/*.tar' (pip install 'posmask[s3]').

Run again, it continues a build that was stopped, and says so when there is nothing left to do.

    python prep/build_shards.py coco ... --part 3/8 --out DIR       # one of eight jobs, which may share the folder
    python prep/build_shards.py merge DIR                           # when all eight are done
    python prep/build_shards.py verify DIR                          # every byte, image and bit; names what is wrong
    python prep/build_shards.py inspect DIR                         # what is in it: a table, and DIR/inspect.html

Exit codes: 0 done, 1 too many records dropped or a check failed, 2 wrong usage or input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from functools import partial
from hashlib import sha256
from itertools import groupby
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from posmask.prep import arguments, inspection, shards, sources, tagging, units, wordpiece
from posmask.prep.locations import expand, parse, reaching
from posmask.prep.ray_engine import prepare as prepare_on_ray
from posmask.prep.samples import CHUNK_RECORDS, Prepared, Recipe, is_unicode
from posmask.prep.samples import prepare as prepare_in_processes
from posmask.prep.scene_tasks import write_eval_sets
from posmask.prep.scenes import SceneQuestions, Scenes
from posmask.prep.sources import Record
from posmask.prep.verification import verify

SCENES = {source.name: source for source in (Scenes, SceneQuestions)}
MIN_EVAL_SCENES = 50  # fewer hold too few pairs that mirror each other
MAX_PROBLEMS = 50  # printed by verify
MAX_NAMED = 3  # broken records named in the error line; dropped.jsonl has all


class TooManyDropped(Exception):
    """More records were dropped than --max-dropped allows."""


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv and argv[0] in arguments.TASKS:
            return run_task(arguments.make_task_parser(argv[0]).parse_args(argv[1:]), argv[0])
        args = arguments.make_parser(__doc__).parse_args(argv)
        arguments.check(args)
        out = Path(args.out or f"data/{args.source}")
        if args.source in SCENES:
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


def run_task(args: argparse.Namespace, task: str) -> int:
    """What can be done with a folder of shards."""
    if task == "merge":
        merge(args.folder, args.max_dropped)
    elif task == "verify":
        problems = list(verify(args.folder, args.workers or os.cpu_count() or 1))
        for problem in problems[:MAX_PROBLEMS]:
            print(problem)
        print(f"{args.folder}: {f'problems: {len(problems)}' if problems else 'all good'}")
        return 1 if problems else 0
    else:
        found = inspection.inspect(args.folder)
        for table in inspection.tables(found):
            Console().print(table)
        path = args.html or args.folder / "inspect.html"
        shards.write_atomically(path, inspection.page(found))
        print(f"{path}: plots and samples")
    return 0


def open_source(args: argparse.Namespace) -> Sequence[Record]:
    """The source that the flags name; a flag that was not given leaves the function's own default."""
    given = {name: value for name in arguments.SOURCE_FLAGS if (value := getattr(args, name)) is not None}
    for name in given.keys() & arguments.PATH_FLAGS:
        several = isinstance(given[name], list)
        given[name] = [path for text in given[name] for path in expand(text)] if several else parse(given[name])
    if "table" in given:
        given["path"] = given.pop("table")
    with reaching(given.get("images", given.get("path", Path()))):
        return getattr(sources, args.source)(**given)


def build_scenes(args: argparse.Namespace, out: Path) -> None:
    """A training and a validation set with one vocabulary; with captions, also evaluation sets in public formats."""
    num_scenes = args.num_scenes or arguments.NUM_SCENES
    source = SCENES[args.source]
    build(args, source("train", num_scenes, args.seed), out / "train")
    build(args, source("val", max(1, num_scenes // 10), args.seed), out / "val", like=out / "train")
    if source is not Scenes or (out / "eval").exists() or (args.part and args.part[0] > 1):
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


def build(args: argparse.Namespace, source: Sequence[Record], out: Path, like: Path | None = None) -> None:
    """Build `source` into `out`, or finish what is there, with the tokenizer and the units of the shards `like`.

    Raises ValueError before anything is written when the input or `out` is not usable, TooManyDropped at the end.
    """
    source, num_excluded = sources.without(source, _read_excluded(args.exclude), args.limit)
    if not len(source):
        raise ValueError(f"no records: the source {source.name} is empty, or all of it is excluded")
    tagger = tagging.find_tagger(args.tagger)
    resources = units.Resources.named(vars(args))
    bits_computed, scores = resources.contents(tagger, args.entities)
    config = {
        "format_version": shards.FORMAT_VERSION,
        "tokenizer": args.tokenizer,
        "tagger": tagging.describe_tagger(tagger),
        "max_tokens": args.max_tokens,
        "image_size": args.image_size,
        "quality": args.quality,
        "records_per_part": args.records_per_part,
        "bits_computed": bits_computed,
        "scores": scores,
        "entities": args.entities,
        **resources.describe(),
        "source": source.name,
        "licence": source.licence,
        "records": len(source),
        "excluded": num_excluded,
        "records_sha256": fingerprint(source),
        "command": arguments.command_line(args),
    }
    if shards.build_state(out, config) == "complete":
        print(f"{out}: already complete")
        return
    if not (out / units.FILE).is_file():
        # Read once, since scenes are worded anew at each reading; the strings of other sources are in memory anyway.
        captions = [caption for record in source for caption in record.captions if is_unicode(caption)]
        if not (out / "tokenizer").is_dir():
            resources.check(tagger)
            made = wordpiece.make(str(like / "tokenizer") if like else args.tokenizer, captions)
            shards.start_build(out, config)
            wordpiece.save(made, out / "tokenizer")
        encode = wordpiece.CaptionEncoder(out / "tokenizer", args.max_tokens)
        resources = units.Resources(units=like) if like else resources
        resources.make(captions, encode, tagger).save(out / units.FILE)
        del captions
    recipe = Recipe(
        source=source.name,
        tokenizer=out / "tokenizer",
        tagger=tagger,
        units=out / units.FILE,
        entities=args.entities,
        num_scores=len(scores),
        has_answers=bool(source[0].answers),
        image_size=args.image_size,
        quality=args.quality,
        max_tokens=args.max_tokens,
    )
    share, num_shares = args.part or (1, 1)
    starts = range(0, len(source), args.records_per_part)
    mine = range(share - 1, len(starts), num_shares)
    prepare = prepare_on_ray if args.engine == "ray" else prepare_in_processes
    write_parts(source, out, recipe, starts, mine, partial(prepare, num_workers=args.workers))
    if args.part:
        print(f"{out}: share {share} of {num_shares} is written; when all are, run build_shards.py merge {out}")
    else:
        merge(out, args.max_dropped)


def merge(out: Path, max_dropped: float) -> None:
    """Make one data set of the finished parts. May be run again."""
    check_dropped(out, max_dropped)
    manifest = shards.merge(out)
    print(f"{out}:")
    Console().print(summary(manifest))


def write_parts(
    source: Sequence[Record],
    out: Path,
    recipe: Recipe,
    starts: range,
    mine: Iterable[int],
    prepare: Callable[..., Generator[Prepared]],
) -> None:
    """Write those of the parts `mine` that are not finished yet; part i begins at record starts[i]."""
    records_per_part = starts.step
    finished = shards.read_parts(out, len(starts))
    spans = [
        (part, range(start, min(start + CHUNK_RECORDS, end)))
        for part in mine
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
        closing(prepare(chunks, recipe)) as results,
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
    ):
        total = sum(len(span) for _, span in spans)
        task = progress.add_task(str(out), total=total)
        for part, group in groupby(zip(spans, results, strict=True), key=lambda pair: pair[0][0]):
            dropped: list[tuple[str, str]] = []
            num_records = min(records_per_part, len(source) - starts[part])
            samples = _stream(group, dropped, progress, task)
            shards.write_part(out, part, num_records, samples, dropped, recipe.num_scores, recipe.has_answers)
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


def check_dropped(out: Path, max_dropped: float) -> None:
    """Raise TooManyDropped, with dropped.jsonl written, when --max-dropped is exceeded."""
    parts = shards.all_parts(out)
    num_records = sum(part["records"] for part in parts)
    dropped = [(key, reason) for part in parts for key, reason in part["dropped"]]
    if len(dropped) <= max_dropped * num_records:
        return
    shards.write_dropped(out, dropped)
    reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(reason for _, reason in dropped).most_common())
    raise TooManyDropped(
        f"{len(dropped)} of {num_records} records dropped ({reasons}), more than --max-dropped {max_dropped:g} "
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
    if "answers" in counts:
        table.add_row("different answers", f"{len(counts['answers']):,}", "")
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


def fingerprint(source: Sequence[Record]) -> str:
    """sha256 of keys, captions and answers. Raises ValueError for a key that comes twice or is not valid Unicode."""
    digest = sha256()
    ids = array("Q")  # numbers in a set would take ten times the memory
    for record in source:
        try:
            ids.append(shards.sample_id(source.name, record.key))
        except UnicodeEncodeError:
            raise ValueError(f"the image name {record.key!r} is not valid Unicode; rename it") from None
        digest.update(json.dumps([record.key, *record.captions, *record.answers]).encode())
    numbers, first = np.unique(np.array(ids, np.uint64), return_index=True)
    if len(numbers) < len(ids):
        repeated = min(set(range(len(ids))).difference(first.tolist()))
        key = source[repeated].key
        raise ValueError(f"the image {key} comes twice in the source {source.name}; names must be unique")
    return digest.hexdigest()


def _read_excluded(path: str | None) -> set[str]:
    if path is None:
        return set()
    try:
        return {line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()}
    except (OSError, UnicodeDecodeError):
        raise ValueError(f"--exclude {path}: no such file, or not UTF-8 text") from None


if __name__ == "__main__":
    sys.exit(main())
