"""The flags of build_shards.py and what may go together."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any, NoReturn

from posmask.prep import shards, wordpiece

SOURCES = (
    "scenes", "coco", "karpathy", "albef", "table", "tsv", "folder", "webdataset", "parquet", "vqa", "scene-questions"
)  # fmt: skip
# Flags that only some sources take, and whether those need them.
SOURCE_FLAGS = {
    "num_scenes": {"scenes": False, "scene-questions": False},
    "questions": {"vqa": True},
    "annotations": {"coco": True, "karpathy": True, "albef": True, "vqa": True},
    "split": {"karpathy": False},
    "restval": {"karpathy": False},
    "images": dict.fromkeys(("coco", "karpathy", "albef", "folder", "vqa"), True) | {"table": False, "tsv": False},
    "table": {"table": True, "tsv": True},
    "columns": {"tsv": False},
    "image_column": {"table": True, "parquet": False},
    "caption_column": {"table": True, "parquet": False, "folder": False},
    "files": {"webdataset": True, "parquet": True},
}
PATH_FLAGS = {"questions", "annotations", "images", "table", "files"}
NUM_SCENES = 20_000
# Decide where and how fast the shards are written, not what is in them.
NOT_IN_COMMAND = ("source", "out", "workers", "engine", "part", "max_dropped")
TASKS = {
    "verify": "check every hash, image, token and bit of finished shards; exit code 1 names what is wrong",
    "merge": "make one data set of the parts that jobs with --part have written",
    "inspect": "show what is in finished shards, as a table and as a page of HTML",
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see --help")


def make_parser(description: str = "") -> Parser:
    """The flags of a build."""
    parser = Parser(
        prog="build_shards.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", nargs="?", default="scenes", choices=SOURCES, help="of images and captions")
    parser.add_argument("--out", metavar="DIR", help="default data/SOURCE")
    add = parser.add_argument_group("the source").add_argument
    add("--questions", nargs="+", metavar="F", help="vqa: the questions, one file or several")
    add("--annotations", nargs="+", metavar="F", help="coco, karpathy, albef, vqa: the JSON, one file or several")
    add("--split", metavar="S", help="karpathy: train (default), val or test")
    add("--restval", action="store_true", default=None, help="karpathy: add COCO's images marked restval")
    add("--images", metavar="DIR", help="where the images are; table, tsv: default the table's folder")
    add("--table", metavar="F", help="table: a .csv, .tsv, .jsonl or .parquet file; tsv: a file without a header")
    add("--columns", metavar="C,C", help="tsv: what the columns hold, - for others; default caption,image")
    add("--image-column", metavar="C", help="table: the column with the image's path; parquet: with its bytes (image)")
    add("--caption-column", metavar="C", help="table, parquet (caption), folder with metadata: the column of captions")
    add("--files", nargs="+", metavar="F", help="webdataset, parquet: the .tar or .parquet files that hold the images")
    add("--num-scenes", type=_positive, metavar="N", help=f"scenes, scene-questions: training images ({NUM_SCENES})")
    add("--seed", type=int, default=0, help="of the scenes")
    add("--limit", type=_positive, metavar="N", help="take the first N records only")
    add("--exclude", metavar="FILE", help="image keys, file names or COCO ids to leave out, one a line")
    add = parser.add_argument_group("text").add_argument
    add("--tokenizer", default="train:8192", metavar="T", help="train:N, a vocab.txt, a tokenizer's folder or hub name")
    add("--tagger", default="auto", metavar="T", help="auto, the name or the path of a spaCy model")
    add("--max-tokens", type=int, default=48, help="per caption, [CLS] and [SEP] included; longer ones are cut")
    add = parser.add_argument_group("what masks need beyond parts of speech").add_argument
    add("--entities", action="store_true", help="named entities are phrases, too; halves the speed of tagging")
    add("--units", metavar="DIR", help="take collocations, word lists and scores from DIR, the training shards")
    add("--collocations", type=_positive, metavar="N", help="collocations to keep; default: half the words are in one")
    add("--objects", metavar="F", help="object nouns as captions spell them, one a line; default: heads of noun chunks")
    add("--attributes", metavar="F", help="words that are attributes beside the adjectives, one a line")
    add("--relations", metavar="F", help="verbs and adpositions that are relations, one a line; default: all of them")
    add("--concreteness", metavar="F", help="ratings of 1 to 5: a table with Word and Conc.M, or word, tab, number")
    add("--frequencies", metavar="F", help="word counts of general text, for --mask difference: word, tab, count")
    add("--embeddings", metavar="F", help="word vectors for --frequencies, GloVe or word2vec text; default: tagger's")
    add = parser.add_argument_group("images").add_argument
    add("--image-size", type=_positive, default=256, help="images with a longer short side are shrunk to it, pixels")
    add("--quality", type=int, default=90, help="of JPEGs that have to be encoded again, 1 to 95")
    add = parser.add_argument_group("the run").add_argument
    add("--records-per-part", type=_positive, default=4096, help="a part is written and resumed as a whole")
    add("--workers", type=_positive, default=None, help="processes, all cores by default; never changes the result")
    add("--engine", default="processes", choices=("processes", "ray"), help="ray: on a Ray cluster, by absolute paths")
    add("--part", type=_share, metavar="I/N", help="write only the I-th of N shares of the parts, I from 1; then merge")
    add("--max-dropped", type=float, default=0.01, help="share of broken records above which the build fails")
    return parser


def make_task_parser(task: str) -> Parser:
    """The flags of a task on a folder of shards."""
    parser = Parser(prog=f"build_shards.py {task}", description=TASKS[task], allow_abbrev=False)
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder with manifest.json or build.json")
    if task == "verify":
        parser.add_argument("--workers", type=_positive, default=None, help="processes, all cores by default")
    elif task == "merge":
        parser.add_argument("--max-dropped", type=float, default=0.01, help="share of broken records that is too much")
    else:
        parser.add_argument("--html", type=Path, metavar="F", help="the page to write, DIR/inspect.html by default")
    return parser


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for flags out of range, and for flags that the source lacks or doesn't know."""
    for name, takers in SOURCE_FLAGS.items():
        flag, value = _flag(name), getattr(args, name)
        if value is not None and args.source not in takers:
            given, belongs = " ".join([flag, *_shown(value)]), ", ".join(takers)
            raise ValueError(f"{given} contradicts the source {args.source}; it belongs to {belongs}")
        if value is None and takers.get(args.source):
            raise ValueError(f"the source {args.source} needs {flag}; see --help")
    for name, low, high in (("quality", 1, 95), ("max_tokens", 8, shards.MAX_TOKENS), ("max_dropped", 0, 1)):
        if not low <= getattr(args, name) <= high:
            raise ValueError(f"{_flag(name)} {getattr(args, name)} is not within {low} to {high}")
    wordpiece.check_spec(args.tokenizer)


def command_line(args: argparse.Namespace) -> str:
    """The command that made a build, as typed but for flags at their default and flags that leave no trace."""
    defaults = make_parser()
    words = ["python", "prep/build_shards.py", args.source]
    for name, value in vars(args).items():
        if name not in NOT_IN_COMMAND and value != defaults.get_default(name):
            words += [_flag(name), *_shown(value)]
    return shlex.join(words)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _shown(value: Any) -> list[str]:
    """A flag's value as it was typed; none for a switch."""
    if value is True:
        return []
    return [str(each) for each in value] if isinstance(value, list) else [str(value)]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def _share(text: str) -> tuple[int, int]:
    numbers = text.split("/")
    if len(numbers) != 2 or not all(map(str.isdecimal, numbers)) or not 1 <= int(numbers[0]) <= int(numbers[1]):
        raise argparse.ArgumentTypeError(f"{text} is not I/N with I from 1 to N, such as 3/8")
    return int(numbers[0]), int(numbers[1])
