"""FOIL-it (Shekhar et al., arXiv 1705.01359): detect a wrong noun in a caption, point at it, correct it.

    python eval/run.py foil --checkpoint runs/noun --annotations foilv1.0_test_2017.json --images val2014

T1: is the caption right (by the score's threshold), and does the right caption beat the foiled one (pairwise)? T2:
which word of a foiled caption is wrong, among its nouns and among all its words: the least likely one given the rest.
T3: what should stand in its place, among all the target words of the file. T2 and T3 read the MLM head.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
from torch import Tensor

from posmask.eval import pairs, photos, scoring
from posmask.eval.annotations import read_entries
from posmask.eval.pairs import Pair, Scored
from posmask.eval.results import Outcome, draw_bars, percent, percent_interval, render
from posmask.eval.scoring import Encoder, Query, Score, Text, has_head, hide, pll_holes
from posmask.eval.stats import rate
from posmask.prep.pos import UPOS_BIT
from posmask.train.model import PosMaskModel

MEASURE = "pairwise accuracy (T1)"
NOUNS = UPOS_BIT["NOUN"] | UPOS_BIT["PROPN"]
CORRECT = "ORIG"  # the foil_word of a caption that is right
GROUP = "foil"


@dataclass(frozen=True)
class Foil:
    """A right caption and a foiled one: `wrong` stands where `right` stood."""

    pair: Pair
    right: str
    wrong: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The task's own flags."""
    pairs.add_arguments(parser)
    parser.add_argument("--tagger", default="auto", help="spaCy model that says which words are nouns (%(default)s)")


def item_value(prediction: dict) -> tuple[str, str, float | None]:
    """(group, item, pairwise accuracy) of a line of predictions.jsonl, for comparisons."""
    return pairs.item_value(prediction)


def read(annotations: str) -> list[Foil]:
    """Every foiled caption with the right one of the same (image_id, id). Raises ValueError for another format."""
    path = Path(annotations)
    content, entries = read_entries(path, "foil")
    photo_of = {image["id"]: image["file_name"] for image in content.get("images", ())}
    right, wrong = {}, []
    for entry in entries.values():
        key = entry["image_id"], entry["id"]
        if entry["foil"]:
            wrong.append((key, entry))
        else:
            right[key] = entry["caption"]
    found = []
    for (image_id, caption_id), entry in wrong:
        if (image_id, caption_id) not in right:
            raise ValueError(f"--annotations {path}: foil {entry['foil_id']} has no right caption of id {caption_id}")
        photo = photo_of.get(image_id, f"{image_id:012d}.jpg")
        pair = Pair(str(entry["foil_id"]), GROUP, photo, right[image_id, caption_id], entry["caption"])
        found.append(Foil(pair, entry["target_word"], entry["foil_word"]))
    return found


def evaluate(model: PosMaskModel, run: Path, config: dict, args: argparse.Namespace) -> Outcome:
    """T1, T2 and T3 on every foil of --annotations."""
    score = Score.parse(args.score, has_head(model, "itm"))
    photos.check_limit(args.limit)
    every = read(args.annotations)
    vocabulary = sorted({foil.right for foil in every})
    limited = every[: args.limit]
    _, present, missing = pairs.find_photos([foil.pair for foil in limited], args)
    ids = {id(pair) for pair in present}
    kept = [foil for foil in limited if id(foil.pair) in ids]
    encoder = Encoder(run, model, args.max_tokens)
    rights, foiled, wrongs = (
        encoder(texts)
        for texts in ([f.pair.caption for f in kept], [f.pair.foil for f in kept], [f.wrong for f in kept])
    )
    slots = [find_slot(*texts) for texts in zip(rights, foiled, wrongs, strict=True)]
    num_not_located = slots.count(None)
    reads_words = "mlm" in model.config.objectives
    located = [i for i, slot in enumerate(slots) if slot is not None and reads_words]
    nouns = noun_words([foil.pair.foil for foil in kept], foiled, args.tagger)
    names = ("image", *scoring.parse_controls(args.controls))
    words = {name: {} for name in names}  # log-probability of each word of a foiled caption
    choices = {name: {} for name in names}  # and of each word of the vocabulary in its slot
    candidates = encoder(vocabulary)

    def read_words(couples: list[tuple[int, int]], shown: dict[str, Tensor]) -> None:
        queries, owners = [], []  # owners: (foil, word), or (foil, None) for a candidate
        for image, i in couples:
            if slots[i] is not None and reads_words:
                for word in readable_words(kept[i].pair.foil, foiled[i]):
                    queries += word_queries(foiled[i], word, image, len(owners), encoder.mask_id)
                    owners.append((i, word))
                for candidate in candidates:
                    queries += slot_queries(foiled[i], slots[i], candidate, image, len(owners), encoder.mask_id)
                    owners.append((i, None))
        for name, sums in scoring.log_probs(model, queries, shown, len(owners)).items():
            for (i, word), value in zip(owners, sums.tolist(), strict=True):
                if word is None:
                    choices[name].setdefault(i, []).append(value)
                else:
                    words[name].setdefault(i, {})[word] = value

    scored = pairs.score_pairs(model, run, config, args, present, score, also=read_words)
    scored = replace(scored, missing=missing, num_missing=len(limited) - len(kept))
    predictions = pairs.predictions(scored)
    hits = {task: {name: [] for name in names} for task in ("t2_nouns", "t2_all", "t3")}
    for i in located:
        of_nouns = sorted(nouns[i] & set(words["image"][i]))
        found = {}
        for name in names:
            least = {key: min(among, key=words[name][i].get, default=None)
                     for key, among in (("t2_nouns", of_nouns), ("t2_all", list(words[name][i])))}  # fmt: skip
            best = vocabulary[int(np.argmax(choices[name][i]))]
            hits["t2_nouns"][name].append(least["t2_nouns"] in slots[i])
            hits["t2_all"][name].append(least["t2_all"] in slots[i])
            hits["t3"][name].append(best == kept[i].right)
            found[name] = {key: None if word is None else word_string(kept[i].pair.foil, foiled[i], word)
                           for key, word in least.items()} | {"t3": best}  # fmt: skip
        predictions[i] |= {"target_word": kept[i].right, "foil_word": kept[i].wrong, "found": found}
    tasks = {task: {name: rate(values) for name, values in by_name.items()} for task, by_name in hits.items()}
    tasks |= classify(scored, score)
    among = {"t2_nouns": [nouns[i] for i in located], "t2_all": [words["image"][i] for i in located]}
    chance = {key: float(np.mean([1 / max(1, len(of)) for of in sets])) for key, sets in among.items() if sets}
    chance["t3"] = 1 / len(vocabulary)

    results = {
        "data": args.annotations, "num_items": len(kept), "num_missing": scored.num_missing,
        "missing_photos": scored.missing, "num_cut": scored.num_cut, "num_unknown": scored.num_unknown,
        "score": score.name, "is_default_score": args.score is None, "num_not_located": num_not_located,
        "num_targets": len(vocabulary), "num_slots_tagged_noun": sum(bool(slots[i] & nouns[i]) for i in located),
        "tasks": tasks, "chance": chance,
    }  # fmt: skip
    title = f"foil of {run}, score {score.name}{pairs.default_note(score, args.score is None)}, "
    title += f"{len(kept):,} pairs of {args.annotations}; 95 % intervals over items"
    title += f"\nT3 chooses among {len(vocabulary)} words; {num_not_located} foils not found in their caption"
    title += pairs.notes(scored)
    if not reads_words:
        title += "\nthe run has not learned to fill in words: no T2, no T3"
    if score.match(np.zeros(1)) is None:
        title += "\na likelihood has no threshold between right and foiled, so no T1 classification"
    rows = rows_of(tasks, chance)
    table = make_table(title, rows, names)
    bars, levels = [row[:2] for row in rows], [row[2] for row in rows]
    return Outcome(results, predictions, table, lambda figure: draw_bars(figure, title, bars, "accuracy [%]", levels))


def find_slot(right: Text, foiled: Text, wrong: Text) -> set[int] | None:
    """The words (numbers) of the foiled caption that are wrong; None if that is not to be told.

    The one place where `wrong` stands and the captions differ; failing that, the one place where they differ at all.
    """
    a, b, sought = words_of(right), words_of(foiled), words_of(wrong)
    edits = SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    changed = [set(range(start, end)) for kind, _, _, start, end in edits if kind != "equal"]
    stands = [set(range(i, i + len(sought))) for i in range(len(b)) if b[i : i + len(sought)] == sought]
    for places in ([place for place in stands if any(place & edit for edit in changed)], changed):
        if len(places) == 1 and places[0]:
            return places[0]
    return None


def words_of(text: Text) -> list[tuple[int, ...]]:
    """The pieces of each word."""
    inner = text.word_of[1:-1]
    cuts = np.flatnonzero(np.diff(inner)) + 1
    return [tuple(word.tolist()) for word in np.split(text.ids[1:-1], cuts)] if len(inner) else []


def word_string(caption: str, text: Text, word: int) -> str:
    places = np.flatnonzero(text.word_of[1:-1] == word)
    return caption[text.spans[places[0]][0] : text.spans[places[-1]][1]]


def noun_words(captions: list[str], texts: list[Text], tagger: str) -> list[set[int]]:
    """The words (numbers) of each caption that the tagger calls nouns."""
    from posmask.prep.tagging import align, find_tagger, load_tagger, tag

    tokens = tag(load_tagger(find_tagger(tagger)), captions)
    nouns = []
    for text, found in zip(texts, tokens, strict=True):
        of_pieces = zip(text.word_of[1:-1].tolist(), align(text.spans, found), strict=True)
        nouns.append({word for word, (bits, _) in of_pieces if bits & NOUNS})
    return nouns


def word_queries(text: Text, word: int, image: int, owner: int, mask_id: int) -> list[Query]:
    """Queries for a word given the rest: its pieces from left to right, the later ones masked."""
    return [
        Query(hide(text.ids, masked, mask_id), image, [place], [int(text.ids[place])], owner)
        for masked, place in pll_holes(text, words_l2r=True)
        if text.word_of[place] == word
    ]


def readable_words(caption: str, text: Text) -> list[int]:
    """The words of a caption that are not punctuation."""
    every = sorted(set(text.word_of[1:-1].tolist()))
    return [word for word in every if any(c.isalnum() for c in word_string(caption, text, word))]


def slot_queries(text: Text, slot: set[int], candidate: Text, image: int, owner: int, mask_id: int) -> list[Query]:
    """Queries for the candidate's pieces in place of the slot's, from left to right, the later ones masked."""
    places = np.flatnonzero(np.isin(text.word_of, list(slot)))
    first, end = places[0], places[-1] + 1
    pieces = candidate.ids[1:-1]
    ids = np.concatenate([text.ids[:first], pieces, text.ids[end:]])
    return [
        Query(hide(ids, np.arange(first + k, first + len(pieces)), mask_id), image, [first + k], [int(piece)], owner)
        for k, piece in enumerate(pieces)
    ]


def classify(scored: Scored, score: Score) -> dict[str, dict]:
    """T1: pairwise, and by the threshold of the score overall, on right and on foiled captions.

    A right caption with several foils counts once.
    """
    seen: set[tuple[str, str]] = set()
    once = np.array([not ((key := (p.photo, p.caption)) in seen or seen.add(key)) for p in scored.pairs], bool)
    pairwise, by_threshold = {}, {}
    for name, scores in scored.scores.items():
        defined = ~np.isnan(scores).any(1)
        pairwise[name] = rate(pairs.right_of(scores))
        match = (Score(score.base, False) if name == "blank" else score).match(scores)
        if match is not None:
            right, foiled = match[defined & once, 0] > 0.5, match[defined, 1] <= 0.5
            parts = {"overall": np.concatenate([right, foiled]), "right": right, "foiled": foiled}
            by_threshold[name] = {part: rate(values) for part, values in parts.items()}
    return {"t1_pairwise": pairwise, "t1_classify": by_threshold}


def rows_of(tasks: dict, chance: dict) -> list[tuple[str, dict, float | None]]:
    """(label, {condition: rate}, chance) of every measure, in the order of the report."""
    rows = [("T1 pairwise", tasks["t1_pairwise"], 0.5)]
    for part in ("overall", "right", "foiled"):
        if tasks["t1_classify"]:
            rows.append((f"T1 {part}", {name: entry[part] for name, entry in tasks["t1_classify"].items()}, 0.5))
    named = {"t2_nouns": "T2 among nouns", "t2_all": "T2 among all", "t3": "T3"}
    return rows + [(label, tasks[key], chance.get(key)) for key, label in named.items()]


def make_table(title: str, measures: list, names: tuple[str, ...]) -> str:
    """One row a measure; accuracy and interval by condition."""
    header = ["task", "items", "chance"]
    for name in names:
        header += ["its own image" if name == "image" else name, "95 %"]
    rows = []
    for label, by_name, by_chance in measures:
        row = [label, f"{by_name['image']['num_items']:,}", percent(by_chance)]
        for name in names:
            entry = by_name.get(name)
            row += [percent(entry and entry["accuracy"]), percent_interval(entry and entry["interval"])]
        rows.append(row)
    return render(title, header, rows)
