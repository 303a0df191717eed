"""Where images and captions come from: one function per source, each returning a sequence of records.

A source is any Sequence of Record with `.name` and `.licence`; `posmask.prep.scenes.Scenes` is one. Indexing it is
cheap: images are read in `Record.load`, by whichever process needs them. A path may be one on a disk or at a URL, see
posmask.prep.locations. All functions raise ValueError, with a remedy, for what a user can mend.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from posmask.prep import locations, readers
from posmask.prep.answers import Answers
from posmask.prep.readers import load_json

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"}
NOT_STATED = "not stated"
METADATA_FILES = ("metadata.csv", "metadata.jsonl")  # of an image folder, as Hugging Face datasets lays it out
METADATA_CAPTIONS = ("text", "caption", "captions")
# The stamps of Tux Paint keep translations below the English sentence: "de.utf8=Ein Apfel."
TRANSLATION = re.compile(r"[a-z]{2,3}(_[A-Za-z]{2,4})?(@\w+)?(\.utf8)?=")
MAX_ASKED = 50  # names looked for at a URL, where each costs a request, before its folder is taken for the wrong one
NO_SUCH_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


@dataclass(frozen=True, slots=True)
class Record:
    """One image with all its captions, as the source has them."""

    key: str  # stable name inside the source
    captions: tuple[str, ...]
    load: Callable[[], bytes]  # the encoded image; raises OSError or ValueError when unreadable
    answers: tuple[Answers, ...] = ()  # one a caption where captions are questions


class OutsideFolder(ValueError):
    """A path that leaves the folder of the images."""


class Source(Sequence[Record]):
    """Records in memory under a name and a licence."""

    def __init__(self, name: str, licence: str, records: Sequence[Record]) -> None:
        self.name, self.licence, self.records = name, licence, records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]


def coco(annotations: Sequence[Path], images: Path) -> Source:
    """COCO captions JSON, one file or several; key = file_name, looked up in `images` and its direct sub-folders."""
    _check_folder(images, "--images")
    captions: dict[str, list[str]] = {}
    licences: set[str] = set()
    for path in annotations:
        content = load_json(path)
        with _layout(path, "COCO captions", "images[].id and .file_name, annotations[].image_id and .caption"):
            licence_names = {licence["id"]: licence["name"] for licence in content.get("licenses", ())}
            names = {image["id"]: image["file_name"] for image in content["images"]}
            licences |= {licence_names.get(image.get("license"), NOT_STATED) for image in content["images"]}
            for name in names.values():
                captions.setdefault(_text(name, path), [])
            for annotation in content["annotations"]:
                captions[names[annotation["image_id"]]].append(_text(annotation["caption"], path))
    return _on_disk("coco", captions, _with_sub_folders(images), "; ".join(sorted(licences)))


def karpathy(annotations: Sequence[Path], images: Path, split: str = "train", restval: bool = False) -> Source:
    """The JSON of Karpathy's splits of COCO and Flickr; key = filepath/filename, or the file name alone.

    The images marked "restval" belong to COCO's validation images; they join `train` only if `restval` is true.
    """
    _check_folder(images, "--images")
    captions: dict[str, list[str]] = {}
    splits: set[str] = set()
    for path in annotations:
        content = load_json(path)
        with _layout(path, "Karpathy splits", "images[].filename, .split and .sentences[].raw"):
            for image in content["images"]:
                splits.add(image["split"])
                if image["split"] == split or (restval and image["split"] == "restval"):
                    name = "/".join(filter(None, (image.get("filepath"), _text(image["filename"], path))))
                    captions.setdefault(name, []).extend(_text(s["raw"], path) for s in image["sentences"])
    if not captions:
        raise ValueError(f"no image of the split {split!r} in {annotations[0]}; it has {', '.join(sorted(splits))}")
    return _on_disk("karpathy", captions, _with_sub_folders(images))


def albef(annotations: Sequence[Path], images: Path) -> Source:
    """ALBEF's JSON: a list of {"image": path in `images`, "caption": text or list of texts}; key = image."""
    _check_folder(images, "--images")
    captions: dict[str, list[str]] = {}
    for path in annotations:
        with _layout(path, "list of pairs", 'objects with "image" and "caption"'):
            for pair in load_json(path):
                captions.setdefault(_text(pair["image"], path), []).extend(_texts(pair["caption"], path))
    return _on_disk("albef", captions, [images])


def table(path: Path, image_column: str, caption_column: str, images: Path | None = None) -> Source:
    """CSV, TSV, JSONL or parquet; key = the image column. Rows with the same image become one record.

    Images are looked up in `images` (default: the table's folder). A caption may be a list of strings in JSONL and
    parquet.
    """
    captions: dict[str, list[str]] = {}
    for image, caption in readers.read_rows(path, (image_column, caption_column)):
        captions.setdefault(_text(image, path), []).extend(_texts(caption, path))
    _check_folder(images or path.parent, "--images")
    return _on_disk("table", captions, [images or path.parent])


def tsv(path: Path, columns: str = "caption,image", images: Path | None = None) -> Source:
    """Tab-separated rows without a header, as CC3M and CC12M come; key = the image column, a path in `images`.

    columns: what each column holds, "caption", "image" or "-"; quotation marks are text.
    """
    names = columns.split(",")
    if sorted(name for name in names if name != "-") != ["caption", "image"]:
        raise ValueError(f"--columns {columns}: name caption and image once each and others -, such as caption,image")
    captions: dict[str, list[str]] = {}
    for row in readers.read_plain_rows(path, len(names)):
        captions.setdefault(row[names.index("image")], []).append(row[names.index("caption")])
    _check_folder(images or path.parent, "--images")
    return _on_disk("tsv", captions, [images or path.parent])


def folder(images: Path, caption_column: str | None = None) -> Source:
    """Images with captions beside them; key = path in `images`.

    With a metadata.csv or metadata.jsonl in the folder: its column file_name names the images, and caption_column
    (default: text, caption or captions) holds their captions. Else every image in the folder, recursively, with the
    .txt of the same name, one caption a line.
    """
    _check_folder(images, "--images")
    for name in METADATA_FILES:
        if (path := images / name).is_file():
            there = readers.column_names(path)
            column = caption_column or next((column for column in METADATA_CAPTIONS if column in there), "text")
            return Source("folder", NOT_STATED, table(path, "file_name", column, images).records)
    if caption_column:
        raise ValueError(f"--caption-column {caption_column}: {images} has none of {', '.join(METADATA_FILES)}")
    found = sorted(path for path in images.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not found:
        raise ValueError(f"no image found under {images}; known kinds: {' '.join(sorted(IMAGE_SUFFIXES))}")
    captions = {path.relative_to(images).as_posix(): _read_captions(path.with_suffix(".txt")) for path in found}
    if not any(captions.values()):
        raise ValueError(f"no image under {images} has captions in a .txt file of the same name beside it")
    return _on_disk("folder", captions, [images])


def webdataset(files: Sequence[Path]) -> Source:
    """Uncompressed tar archives as img2dataset writes them: an image, and the caption in .txt or in .json "caption".

    Key = archive/name, such as 00000.tar/000000012.
    """
    records = []
    for path in files:
        for name, members in readers.read_tar(path):
            image = next((members[s] for s in members if f".{s}" in IMAGE_SUFFIXES), None)
            if image is None and "txt" not in members:
                continue  # of another kind, or one that could not be downloaded
            captions = _captions_in_tar(path, members)
            load = partial(readers.read_member, path, *image) if image else partial(_read_image, [path], name)
            records.append(Record(f"{path.name}/{name}", tuple(captions), load))
    if not records:
        raise ValueError(f"{files[0]} has no image with a caption: it needs .jpg, .png or .webp, and .txt or .json")
    return Source("webdataset", NOT_STATED, records)


def parquet(files: Sequence[Path], image_column: str = "image", caption_column: str = "caption") -> Source:
    """Parquet with the images inside, in Hugging Face's layout: a struct of bytes and path, or plain bytes.

    A caption may be a list. Key = the path where all paths differ, else file/row group-row.
    """
    rows = [(path, *row) for path in files for row in readers.read_parquet_pairs(path, image_column, caption_column)]
    names = {name for *_, name, _ in rows}
    by_path = len(names) == len(rows) and None not in names
    records = [
        Record(
            key=name if by_path else f"{path.name}/{group}-{row}",
            captions=tuple(_texts(caption, path)),
            load=partial(readers.read_parquet_image, path, group, row, image_column),
        )
        for path, group, row, name, caption in rows
    ]
    return Source("parquet", NOT_STATED, records)


def vqa(questions: Sequence[Path], annotations: Sequence[Path], images: Path) -> Source:
    """Questions and annotations of VQA v2, joined by question_id; key = the image's name in COCO 2017, its number.

    An image may also have the name of COCO 2014, which begins with the split. It is looked up in `images` and its
    direct sub-folders.
    """
    _check_folder(images, "--images")
    answers: dict[int, Answers] = {}
    licences: set[str] = set()
    for path in annotations:
        content = load_json(path)
        with _layout(
            path, "VQA annotations", "annotations[].question_id, .multiple_choice_answer and .answers[].answer"
        ):
            licences.add(content.get("license", {}).get("name", NOT_STATED))
            for entry in content["annotations"]:
                given = [_text(answer["answer"], path) for answer in entry["answers"]]
                number = entry["question_id"]
                answers[number] = Answers.of(number, _text(entry["multiple_choice_answer"], path), given)
    asked: dict[tuple[str, str], list[tuple[str, Answers]]] = {}
    for path in questions:
        content = load_json(path)
        with _layout(path, "VQA questions", "questions[].question_id, .image_id and .question"):
            for entry in content["questions"]:
                if (found := answers.pop(entry["question_id"], None)) is None:
                    raise ValueError(
                        f"{path}: question {entry['question_id']} comes twice, or its answers are not in "
                        f"{annotations[0]}; give --questions and --annotations of the same splits"
                    )
                name = f"{int(entry['image_id']):012d}.jpg"
                names = (name, f"COCO_{content.get('data_subtype')}_{name}")
                asked.setdefault(names, []).append((_text(entry["question"], path), found))
    if answers:
        raise ValueError(
            f"{annotations[0]} answers {len(answers)} questions that {questions[0]} does not ask, such as "
            f"{next(iter(answers))}; give --questions and --annotations of the same splits"
        )
    folders = _with_sub_folders(images)
    _check_any_found(list(asked), folders)
    records = [
        Record(names[0], tuple(q for q, _ in pairs), partial(_read_image, folders, *names), tuple(a for _, a in pairs))
        for names, pairs in asked.items()
    ]
    return Source("vqa", "; ".join(sorted(licences)), records)


def without(source: Sequence[Record], excluded: set[str], limit: int | None) -> tuple[Source, int]:
    """The first `limit` records of `source` that are not `excluded`, and how many were excluded on the way.

    An entry excludes a record by its key, its file name with or without suffix, or its COCO image id.
    """
    end = len(source) if limit is None else limit
    kept: list[int] = []
    num_excluded = 0
    for i in range(len(source)) if excluded else ():
        if len(kept) >= end:
            break
        if excluded.isdisjoint(_names(source[i].key)):
            kept.append(i)
        else:
            num_excluded += 1
    records = _View(source, kept if excluded else range(min(end, len(source))))
    return Source(source.name, source.licence, records), num_excluded


class _View(Sequence[Record]):
    """Some records of another sequence, fetched when asked for."""

    def __init__(self, records: Sequence[Record], indices: Sequence[int]) -> None:
        self.records, self.indices = records, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        return self.records[self.indices[index]]


def _names(key: str) -> Iterator[str]:
    yield key
    name = key.rsplit("/", 1)[-1]
    yield name
    stem = name.rsplit(".", 1)[0]
    yield stem
    if match := re.fullmatch(r"(?:COCO_[a-z]+\d+_)?0*(\d+)", stem):
        yield match[1]


def _on_disk(name: str, captions: Mapping[str, list[str]], folders: list[Path], licence: str = NOT_STATED) -> Source:
    """A source of images in `folders`, by path. Raises ValueError if none of them is there."""
    _check_any_found([(key,) for key in captions], folders)
    return Source(name, licence, _OnDisk(folders, captions))


class _OnDisk(Sequence[Record]):
    """Records made when asked for, so that millions of them take little more memory than their strings."""

    def __init__(self, folders: list[Path], captions: Mapping[str, Sequence[str]]) -> None:
        self.folders, self.keys = folders, list(captions)
        self.captions = [tuple(texts) for texts in captions.values()]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Record:
        key = self.keys[index]
        return Record(key, self.captions[index], partial(_read_image, self.folders, key))


def _check_any_found(images: Sequence[tuple[str, ...]], folders: list[Path]) -> None:
    """Images, each by the names it may have, that lack here and there are dropped and counted; not so if all do."""
    asked = images
    if images and not isinstance(folders[0], Path):
        asked = images[:: -(-len(images) // MAX_ASKED)]
    if images and not any(_exists(folders, name) for names in asked for name in names):
        such_as = f"none of {len(asked)} names, such as {' or '.join(images[0])}"
        raise ValueError(f"no image found: {such_as}, is in {folders[0]}; see --images")


def _read_image(folders: list[Path], *names: str) -> bytes:
    """The image that has one of these names, from the first of `folders` that has it."""
    for name in names:
        if leaves_folder(name, folders):
            raise OutsideFolder(name)
        for folder in folders:
            try:
                return locations.read_span(_inside(folder, name))
            except OSError as error:
                if error.errno not in NO_SUCH_FILE and not isinstance(error, FileNotFoundError):
                    raise
    raise FileNotFoundError(names[-1])


def _exists(folders: list[Path], name: str) -> bool:
    """Whether the image `name` is in one of `folders`."""
    if leaves_folder(name, folders):
        return False
    for folder in folders:
        try:
            if _inside(folder, name).is_file():
                return True
        except OSError:  # a name that is too long, say
            continue
    return False


def _inside(folder: Path, name: str) -> Path:
    """`name` in `folder`, also where it is a whole path (as Path has it) or a whole URL."""
    return folder / (name.removeprefix(f"{folder}/") if "://" in name else name)


def leaves_folder(name: str, folders: Sequence[Path]) -> bool:
    """Whether a path from a source's file points outside `folders`. Links that a user made on disk are the user's."""
    path = PurePosixPath(name)
    if ".." in path.parts:
        return True
    return (path.is_absolute() or "://" in name) and not any(path.is_relative_to(str(f.absolute())) for f in folders)


def _captions_in_tar(path: Path, members: Mapping[str, tuple[int, int]]) -> list[str]:
    """The captions of one sample: its .txt, else "caption" in its .json. What is not UTF-8 is dropped later."""
    if "txt" in members:
        return [readers.read_member(path, *members["txt"]).decode("utf-8", "surrogateescape").strip()]
    if "json" not in members:
        return []
    try:
        return _texts(json.loads(readers.read_member(path, *members["json"])).get("caption"), path)
    except (ValueError, AttributeError):
        return []


def _read_captions(path: Path) -> list[str]:
    try:
        lines = locations.read_span(path).decode("utf-8", "surrogateescape").splitlines()
    except FileNotFoundError:
        return []
    return [line for line in lines if line.strip() and not TRANSLATION.match(line)]


def _with_sub_folders(images: Path) -> list[Path]:
    return [images, *sorted(path for path in images.iterdir() if path.is_dir())]


def _check_folder(path: Path, flag: str) -> None:
    if not path.is_dir():
        raise ValueError(f"{flag} {path}: no such folder")


@contextmanager
def _layout(path: Path, kind: str, needs: str) -> Iterator[None]:
    """Turns what goes wrong on a file of another layout into a ValueError."""
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is no file of {kind} ({reason}); it needs {needs}") from None


def _texts(value: Any, path: Path) -> list[str]:
    """A caption, or several of them in a list; None is none."""
    entries = value if isinstance(value, list) else [value]
    return [_text(entry, path) for entry in entries if entry is not None]


def _text(value: Any, path: Path) -> str:
    if isinstance(value, str):
        return value
    raise ValueError(f"{path}: expected text, found {value!r}; image names and captions must be strings")
