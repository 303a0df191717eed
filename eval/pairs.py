"""Caption or foil? What every benchmark of pairs shares: scoring them, the metrics, the report.

acc_r is the share of pairs whose caption scores above its foil, a tie being wrong. Where the score has a threshold
between match and mismatch: p_c and p_f are the shares of captions and of foils on their side of it, acc their mean
(VALSE, Parcalabescu et al., arXiv 2112.07566). auroc takes all 2N scores together.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from posmask.eval import photos, scoring
from posmask.eval.photos import PhotoEncoder, PhotoFolders
from posmask.eval.results import Outcome, draw_bars, percent, percent_interval, render
from posmask.eval.scoring import Encoder, Score
from posmask.eval.stats import bootstrap_means, interval, mean_interval
from posmask.train.model import PosMaskModel

MEASURE = "acc_r"
METRICS = ("acc_r", "p_c", "p_f", "acc", "min_p", "auroc")


@dataclass(frozen=True)
class Pair:
    """A photo, what is true of it and what is not; `group` is the piece or category it belongs to."""

    id: str
    group: str
    photo: str
    caption: str
    foil: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of a task of pairs."""
    photos.add_arguments(parser)
    scoring.add_arguments(parser)


def item_value(prediction: dict) -> tuple[str, str, float | None]:
    """(group, item, acc_r) of a line of predictions.jsonl, for comparisons."""
    return prediction["group"], prediction["id"], prediction["right"]


def take(pairs: Sequence[Pair], limit: int | None) -> list[Pair]:
    """The first `limit` pairs of each group. Raises ValueError for a limit below 1."""
    photos.check_limit(limit)
    seen: dict[str, int] = {}
    taken = []
    for pair in pairs:
        seen[pair.group] = seen.get(pair.group, 0) + 1
        if limit is None or seen[pair.group] <= limit:
            taken.append(pair)
    return taken


@dataclass(frozen=True)
class Scored:
    """Scores of N pairs, NaN where the score is not defined."""

    pairs: list[Pair]
    scores: dict[str, np.ndarray]  # condition: (N, 2), of the caption and of the foil
    missing: list[str]  # photos
    num_missing: int  # pairs left out for their photo
    num_cut: int  # texts
    num_unknown: int  # texts with a word that the vocabulary cannot spell


def find_photos(pairs: Sequence[Pair], args: argparse.Namespace) -> tuple[PhotoFolders, list[Pair], list[str]]:
    """(--images, the pairs whose photo is there, the photos that are not). Raises ValueError if any must be there."""
    folders = PhotoFolders(args.images)
    missing = folders.missing((pair.photo for pair in pairs), args.allow_missing)
    absent = set(missing)
    return folders, [pair for pair in pairs if pair.photo not in absent], missing


def score_pairs(
    model: PosMaskModel, run: Path, config: dict, args: argparse.Namespace, pairs: list[Pair], score: Score,
    also: Callable[[list[tuple[int, int]], dict[str, Tensor]], None] | None = None,
) -> Scored:  # fmt: skip
    """Scores each pair with its image and the --controls. Raises ValueError for what the user can mend.

    `also` is called for each window of photos, while they are encoded, with couples (photo of the window, pair) and the
    image tokens (B, N, D) of each condition.
    """
    score.check(model, run)
    controls = scoring.parse_controls(args.controls)
    folders, kept, missing = find_photos(pairs, args)
    encoder = Encoder(run, model, args.max_tokens)
    captions, foils = encoder([pair.caption for pair in kept]), encoder([pair.foil for pair in kept])

    names = list(dict.fromkeys(pair.photo for pair in kept))
    by_photo: dict[str, list[int]] = {name: [] for name in names}
    for i, pair in enumerate(kept):
        by_photo[pair.photo].append(i)
    raw = {name: np.full((len(kept), 2), np.nan) for name in ("image", *controls)}
    for window, features in PhotoEncoder(model, folders, config["decode"]).windows(names):
        shown = scoring.conditions(model, features, controls, seed=window.start)
        couples = [(image, i) for image, name in enumerate(names[window]) for i in by_photo[name]]
        queries, scored = [], []
        if score.base in scoring.HEADS:
            scored = [i for _, i in couples]
            texts = [text for i in scored for text in (captions[i], foils[i])]
            found = scoring.head_scores(model, texts, np.repeat([image for image, _ in couples], 2), shown, score.base)
        else:
            for image, i in couples:
                asked = scoring.pair_queries(captions[i], foils[i], image, 2 * len(scored), score.base, encoder.mask_id)
                if asked is not None:
                    queries += asked
                    scored.append(i)
            found = scoring.log_probs(model, queries, shown, 2 * len(scored))
        for name, values in found.items():
            raw[name][scored] = values.reshape(-1, 2)
        if also:
            also(couples, shown)
    if score.is_gain:  # the blank image's own gain is nothing; its row stays the score that text alone reaches
        raw = {name: values if name == "blank" else values - raw["blank"] for name, values in raw.items()}
    texts = (*captions, *foils)
    num_cut, num_unknown = sum(text.is_cut for text in texts), sum(text.has_unknown for text in texts)
    return Scored(kept, raw, missing, len(pairs) - len(kept), num_cut, num_unknown)


def pair_metrics(scores: np.ndarray, match: np.ndarray | None) -> dict[str, float | None]:
    """Metrics of scores (N, 2), of captions and foils; match (N, 2) has its threshold at .5 (None: there is none).

    None where there is nothing to measure.
    """
    defined = ~np.isnan(scores).any(1)
    scores = scores[defined]
    if not len(scores):
        return dict.fromkeys(METRICS)
    metrics = dict.fromkeys(METRICS) | {"acc_r": float(right_of(scores).mean()), "auroc": auroc(scores)}
    if match is not None:
        p_c, p_f = float((match[defined, 0] > 0.5).mean()), float((match[defined, 1] <= 0.5).mean())
        metrics |= {"p_c": p_c, "p_f": p_f, "acc": (p_c + p_f) / 2, "min_p": min(p_c, p_f)}
    return metrics


def auroc(scores: np.ndarray) -> float:
    """Chance that a caption's score (column 0) exceeds a foil's (column 1) over all N² couples, ties counting half."""
    captions, foils = scores[:, 0], np.sort(scores[:, 1])
    below = np.searchsorted(foils, captions, "left") + np.searchsorted(foils, captions, "right")
    return float(below.mean() / (2 * len(foils)))


def summarise(scored: Scored, score: Score) -> dict:
    """Metrics by group and condition, their macro mean over the groups, and the micro metrics over all pairs."""
    group_of = np.array([pair.group for pair in scored.pairs])
    groups = {}
    for group in dict.fromkeys(group_of.tolist()):
        rows = group_of == group
        groups[group] = {"num_items": int(rows.sum())} | conditions_metrics(scored, score, rows)
    micro = {"num_items": len(group_of)} | conditions_metrics(scored, score, np.ones(len(group_of), bool))
    macro = {}
    for name, scores in scored.scores.items():
        columns = {key: [entry[name][key] for entry in groups.values()] for key in METRICS}
        macro[name] = {key: None if None in column else float(np.mean(column)) for key, column in columns.items()}
        if macro[name]["acc_r"] is not None:
            right = (right_of(scores[group_of == group]) for group in groups)
            draws = [bootstrap_means(values[None], item_stream=i) for i, values in enumerate(right)]
            macro[name]["acc_r_interval"] = interval(np.mean(draws, axis=0))
    return {"groups": groups, "macro": macro, "micro": micro}


def right_of(scores: np.ndarray) -> np.ndarray:
    """(N, 2) scores -> 1 where the caption's is above the foil's, 0 where not; undefined pairs left out."""
    defined = ~np.isnan(scores).any(1)
    return (scores[:, 0] > scores[:, 1])[defined].astype(float)


def conditions_metrics(scored: Scored, score: Score, rows: np.ndarray) -> dict[str, dict]:
    out = {}
    for name, scores in scored.scores.items():
        of = Score(score.base, False) if name == "blank" else score
        right = right_of(scores[rows])
        out[name] = pair_metrics(scores[rows], of.match(scores[rows])) | {
            "acc_r_interval": mean_interval(right), "num_undefined": int(rows.sum()) - len(right),
        }  # fmt: skip
    return out


def report(task: str, run: Path, data: str, scored: Scored, score: Score, is_default: bool, extra: dict) -> Outcome:
    """The outcome of a task whose groups are pieces or categories; `extra` results are the task's own."""
    summary = summarise(scored, score)
    undefined = int(np.isnan(scored.scores["image"]).any(1).sum())
    results = {
        "data": data, "num_items": len(scored.pairs), "num_missing": scored.num_missing,
        "missing_photos": scored.missing, "num_cut": scored.num_cut, "num_unknown": scored.num_unknown,
        "num_undefined": undefined,
        "score": score.name, "is_default_score": is_default, "has_threshold": score.match(np.zeros(1)) is not None,
        **extra, **summary,
    }  # fmt: skip
    title = f"{task} of {run}, score {score.name}" + default_note(score, is_default)
    title += f", {len(scored.pairs):,} pairs of {data}; 95 % intervals over items"
    if score.is_gain:
        title += f"\nthe row of the blank image is {score.base} itself: what text alone reaches"
    if score.match(np.zeros(1)) is None:
        title += "\na likelihood has no threshold between match and mismatch, so no p_c, p_f, acc"
    if undefined:
        title += f"\n{undefined:,} pairs whose difference is an insertion are left out: diff has nothing to score"
    title += notes(scored)
    table = make_table(title, summary)
    return Outcome(results, predictions(scored), table, lambda figure: draw(figure, summary, title))


def default_note(score: Score, is_default: bool) -> str:
    """What a title says of a score that nobody chose."""
    return "" if not is_default else " (the default)" if score.base == "itm" else " (the default without an itm head)"


def notes(scored: Scored) -> str:
    """Lines below a title: what was left out or cut."""
    lines = []
    if scored.num_missing:
        lines.append(f"{scored.num_missing:,} pairs left out, {len(scored.missing):,} photos missing")
    if scored.num_cut:
        lines.append(f"{scored.num_cut:,} texts were cut to --max-tokens")
    if scored.num_unknown:
        lines.append(f"{scored.num_unknown:,} texts hold a word that the vocabulary of the run cannot spell")
    return "".join("\n" + line for line in lines)


def predictions(scored: Scored) -> list[dict]:
    """One JSON object a pair, with the scores of (caption, foil) by condition; null where undefined."""
    lines = []
    for i, pair in enumerate(scored.pairs):
        scores = {name: [round(float(x), 5) for x in values[i]] for name, values in scored.scores.items()}
        defined = not np.isnan(scored.scores["image"][i]).any()
        own = scored.scores["image"][i]
        lines.append(vars(pair) | {
            "scores": scores if defined else None, "right": float(own[0] > own[1]) if defined else None,
        })  # fmt: skip
    return lines


def make_table(title: str, summary: dict) -> str:
    """Two rows a group, with the image and without it; the other controls below them."""
    header = ["group", "image", "pairs", "acc_r", "95 %", "auroc", "acc", "p_c", "p_f", "min"]
    rows = []
    parts = list(summary["groups"].items())
    if len(parts) > 1:
        parts += [("macro", summary["macro"]), ("micro", summary["micro"])]
    for group, entry in parts:
        for name in scoring.CONDITIONS:
            if name in entry:
                m = entry[name]
                number = f"{entry['num_items']:,}" if "num_items" in entry else ""
                row = [group, "its own", number] if name == "image" else ["", name, ""]
                row += [percent(m["acc_r"]), percent_interval(m.get("acc_r_interval"))]
                rows.append(row + [percent(m[key]) for key in ("auroc", "acc", "p_c", "p_f", "min_p")])
    return render(title, header, rows)


def draw(figure: Figure, summary: dict, title: str) -> None:
    """acc_r of each group with its image, beside the controls."""
    rows = [
        (group, {name: {"accuracy": entry[name]["acc_r"], "interval": entry[name]["acc_r_interval"]}
                 for name in scoring.CONDITIONS if name in entry})
        for group, entry in summary["groups"].items()
    ]  # fmt: skip
    draw_bars(figure, title, rows, "caption above foil [%]", [0.5] * len(rows))
