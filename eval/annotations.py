"""Annotation files of the benchmarks: reading them, and saying so when one belongs to another task."""

from __future__ import annotations

import json
from pathlib import Path

# By task, the fields it needs of an entry, and the list that the entries stand in (None: they are the file itself).
# A file belongs to the first task whose fields its entries have.
FORMATS = {
    "sugarcrepe": ({"caption", "negative_caption"}, None),
    "valse": ({"caption", "foil", "image_file", "mturk"}, None),
    "foil": ({"caption", "foil", "foil_id", "foil_word", "id", "image_id", "target_word"}, "annotations"),
    "vqa": ({"answer_type", "answers", "multiple_choice_answer", "question_id", "question_type"}, "annotations"),
    "retrieval": ({"caption", "image_id"}, "annotations"),
}


def read_json(path: Path, flag: str = "--annotations") -> object:
    """The content of a JSON file. Raises ValueError naming the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{flag} {path}: {error.strerror or error}") from None
    except ValueError:
        raise ValueError(f"{flag} {path}: not a JSON file") from None


def read_entries(path: Path, task: str) -> tuple[dict, dict[str, dict]]:
    """(the file as it is, its entries by name) of an annotation file of `task`; entries of a list get their index.

    Raises ValueError where an entry lacks a field that the task reads, naming the task that the file looks like.
    """
    content = read_json(path)
    fields, within = FORMATS[task]
    entries = entries_of(content, within)
    found = next((other for other, form in FORMATS.items() if fits(content, *form)), None)
    if found not in (None, task):
        raise ValueError(f"--annotations {path} is a file of {found}, not of {task}: evaluate it with `{found}`")
    for name, entry in entries.items():
        if lacking := sorted(fields - entry.keys()):
            raise ValueError(f"--annotations {path} is no file of {task}: entry {name!r} lacks {', '.join(lacking)}")
    if not entries:
        raise ValueError(f"--annotations {path} is no file of {task}: it has no entries")
    return content if isinstance(content, dict) else {}, entries


def fits(content: object, fields: set[str], within: str | None) -> bool:
    """Whether the first entry has these fields."""
    return any(fields <= entry.keys() for entry in list(entries_of(content, within).values())[:1])


def entries_of(content: object, within: str | None) -> dict[str, dict]:
    """The objects of a dict of objects or a list of objects, {} if it is neither."""
    if within is not None:
        content = content.get(within) if isinstance(content, dict) else None
    if isinstance(content, list):
        content = {str(i): entry for i, entry in enumerate(content)}
    if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
        return {}
    return content


def json_files(annotations: str) -> list[Path]:
    """The file --annotations names, or the JSON files of the folder it names, sorted. Raises ValueError if none."""
    path = Path(annotations)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"--annotations {annotations}: no such file or folder")
    files = sorted(path.glob("*.json"))
    if not files:
        raise ValueError(f"--annotations {annotations}: no .json file in this folder")
    return files
