"""Intervals and tests for comparisons of runs: bootstrap over items and seeds, paired differences, Holm's correction.

    posmask-eval compare runs/noun runs/matched-noun --task valse

Reads the predictions.jsonl that the task left in each run. Runs that differ in nothing but the seed are one arm: then
seeds are resampled along with items. Every arm is compared with the first; pairs are the items that all runs have.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from posmask.eval.results import render
from posmask.train.checkpoint import parse_run

NUM_RESAMPLES = 2000
CHUNK = 100  # resamples at a time, to bound memory
MACRO = "macro"
SEED = 20240229


def bootstrap_means(values: np.ndarray, item_stream: int = 0, seed_stream: int = 0) -> np.ndarray:
    """(S seeds, N items) -> (NUM_RESAMPLES,) means, seeds and items drawn with replacement (Efron 1979).

    With one seed only the items vary. Equal streams draw the same items, the same seeds: so two arms are paired, or
    groups of items share their seeds.
    """
    num_seeds, num_items = values.shape
    item_rng, seed_rng = np.random.default_rng([SEED, 0, item_stream]), np.random.default_rng([SEED, 1, seed_stream])
    means = []
    for start in range(0, NUM_RESAMPLES, CHUNK):
        size = min(CHUNK, NUM_RESAMPLES - start)
        items = item_rng.integers(num_items, size=(size, num_items))
        seeds = seed_rng.integers(num_seeds, size=(size, num_seeds))
        per_seed = np.stack([of_seed[items].mean(1) for of_seed in values], 1)  # (size, S)
        means.append(np.take_along_axis(per_seed, seeds, 1).mean(1))
    return np.concatenate(means)


def interval(resampled: np.ndarray, level: float = 0.95) -> list[float]:
    """[low, high] percentiles of resampled means."""
    tail = 50 * (1 - level)
    return [float(x) for x in np.percentile(resampled, [tail, 100 - tail])]


def mean_interval(values: np.ndarray) -> list[float] | None:
    """95 % interval of the mean of (N,) items, None without items."""
    return interval(bootstrap_means(np.asarray(values, float)[None])) if len(values) else None


def rate(values: Sequence[float] | np.ndarray) -> dict:
    """Mean of per-item accuracies with its interval, None without items."""
    values = np.asarray(values, float)
    mean = float(values.mean()) if len(values) else None
    return {"accuracy": mean, "interval": mean_interval(values), "num_items": len(values)}


def p_value(resampled_differences: np.ndarray) -> float:
    """Two-sided bootstrap p-value of a difference of zero; never below 1 / (number of resamples + 1)."""
    n = len(resampled_differences)
    below, above = (resampled_differences <= 0).sum(), (resampled_differences >= 0).sum()
    return float(min(1.0, 2 * (min(below, above) + 1) / (n + 1)))


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's step-down adjusted p-values (Scandinavian Journal of Statistics 6, 1979), in the given order."""
    p_values = np.asarray(p_values, float)
    order = np.argsort(p_values, kind="stable")
    factors = len(p_values) - np.arange(len(p_values))
    adjusted = np.minimum(1.0, np.maximum.accumulate(p_values[order] * factors))
    out = np.empty_like(adjusted)
    out[order] = adjusted
    return out


@dataclass(frozen=True)
class Arm:
    """Runs that differ in the seed alone."""

    name: str
    seeds: tuple[int, ...]
    items: list[dict[tuple[str, str], float]]  # one dict a seed: (group, item) -> value

    def values(self, group: str, keys: list[str]) -> np.ndarray:
        """(S, N)."""
        return np.array([[of_seed[group, key] for key in keys] for of_seed in self.items])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or RUN@STEP; the first is the baseline")
    parser.add_argument("--task", required=True, help="the task whose predictions are compared")


def compare(args: argparse.Namespace, tasks: dict) -> tuple[str, dict]:
    """Table and results of `posmask-eval compare`. Raises ValueError for what cannot be compared."""
    if args.task not in tasks or not hasattr(tasks[args.task], "item_value"):
        known = ", ".join(name for name, module in tasks.items() if hasattr(module, "item_value"))
        raise ValueError(f"--task {args.task}: must be one of {known}")
    module = tasks[args.task]
    arms = make_arms([read_run(run, args.task, module) for run in args.runs])
    common = set.intersection(*(set(of_seed) for arm in arms for of_seed in arm.items))
    if not common:
        raise ValueError(f"the runs have no item of {args.task} in common: evaluate them on the same annotations")
    groups: dict[str, list[str]] = {}
    for group, key in sorted(common):
        groups.setdefault(group, []).append(key)
    most = max(len(of_seed) for arm in arms for of_seed in arm.items)

    means = {arm.name: arm_means(arm, groups) for arm in arms}
    baseline, *others = arms
    contrasts = [(other.name, group) for other in others for group in means[other.name]]
    resampled = {}
    for other in others:
        paired = other.seeds == baseline.seeds
        draws = {
            group: resample(other, group, groups) - resample(baseline, group, groups, seed_stream=0 if paired else 1)
            for group in groups
        }
        if MACRO in means[other.name]:
            draws[MACRO] = np.mean(list(draws.values()), axis=0)
        resampled |= {(other.name, group): draw for group, draw in draws.items()}
    adjusted = holm(np.array([p_value(resampled[contrast]) for contrast in contrasts])) if contrasts else []
    differences: dict[str, dict] = {}
    for (name, group), p in zip(contrasts, adjusted, strict=True):
        difference = means[name][group]["mean"] - means[baseline.name][group]["mean"]
        differences.setdefault(name, {})[group] = {
            "difference": difference, "interval": interval(resampled[name, group]), "p_holm": float(p),
        }  # fmt: skip
    results = {
        "task": args.task, "measure": module.MEASURE, "runs": args.runs, "num_items": len(common),
        "num_not_common": most - len(common), "num_contrasts": len(contrasts),
        "arms": {arm.name: {"seeds": list(arm.seeds), "groups": means[arm.name]} for arm in arms},
        "baseline": baseline.name, "differences": differences,
    }  # fmt: skip
    return make_table(results), results


def read_run(run: str, task: str, module) -> tuple[dict, str, dict[tuple[str, str], float]]:
    """(config.json, run, values by (group, item))."""
    folder, step = parse_run(run)
    path = folder / "eval" / (task if step is None else f"{task}@{step}") / "predictions.jsonl"
    if not path.is_file():
        raise ValueError(f"{path}: not there; run `posmask-eval {task} --checkpoint {run}` first")
    values = {}
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            group, item, value = module.item_value(json.loads(line))
            if value is not None:
                values[group, item] = value
    return json.loads((folder / "config.json").read_text()), run, values


def make_arms(runs: list[tuple[dict, str, dict]]) -> list[Arm]:
    """Joins runs whose settings differ in the seed (and where they were written) alone, ordered by seed."""
    grouped: dict[str, list] = {}
    for config, run, values in runs:
        settings = {key: value for key, value in config.items() if key not in ("seed", "out", "resume")}
        step = run.rpartition("@")[2] if "@" in run else ""
        grouped.setdefault(json.dumps([settings, step], sort_keys=True), []).append((config["seed"], run, values))
    arms = []
    for members in grouped.values():
        members.sort(key=lambda member: member[:2])
        seeds, names, values = zip(*members, strict=True)
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{' and '.join(names)} are the same run (seed {seeds[0]}): name it once")
        arms.append(Arm(names[0] + (f" (+{len(names) - 1})" if len(names) > 1 else ""), seeds, list(values)))
    return arms


def resample(arm: Arm, group: str, groups: dict[str, list[str]], seed_stream: int = 0) -> np.ndarray:
    """(NUM_RESAMPLES,) means of a group; all arms draw the same items of it, all groups the same seeds."""
    return bootstrap_means(arm.values(group, groups[group]), list(groups).index(group), seed_stream)


def arm_means(arm: Arm, groups: dict[str, list[str]]) -> dict[str, dict]:
    """Mean and interval of each group, and of the mean over groups where there are several."""
    draws = {group: resample(arm, group, groups) for group in groups}
    means = {group: float(arm.values(group, keys).mean()) for group, keys in groups.items()}
    out = {
        group: {"mean": means[group], "interval": interval(draws[group]), "num_items": len(groups[group])}
        for group in groups
    }
    if len(groups) > 1:
        num_items = sum(len(keys) for keys in groups.values())
        macro = np.mean(list(draws.values()), axis=0)
        out[MACRO] = {"mean": float(np.mean(list(means.values()))), "interval": interval(macro), "num_items": num_items}
    return out


def make_table(results: dict) -> str:
    """One row a group: each arm's mean and interval, then its difference to the first."""
    arms, differences = results["arms"], results["differences"]
    first, *others = arms
    header = ["group", "items", first]
    for name in others:
        header += [name, "difference", "p (Holm)"]
    rows = []
    for group in arms[first]["groups"]:
        row = [group, f"{arms[first]['groups'][group]['num_items']:,}", with_interval(arms[first]["groups"][group])]
        for name in others:
            entry = differences[name][group]
            row += [with_interval(arms[name]["groups"][group]), with_interval(entry, "difference", "+")]
            row += [f"{entry['p_holm']:.3f}"]
        rows.append(row)
    notes = list(describe_seeds(arms))
    if results["num_not_common"]:
        notes.append(f"{results['num_not_common']:,} items are not in all runs and are left out")
    title = f"{results['measure']} of {results['task']}, 95 % intervals by bootstrap; Holm over all "
    title += f"{results['num_contrasts']} differences"
    return render("\n".join([title, *notes]), header, rows)


def describe_seeds(arms: dict) -> Iterator[str]:
    for name, arm in arms.items():
        count = len(arm["seeds"])
        yield f"{name}: " + (f"{count} seeds" if count > 1 else "one seed, so intervals do not cover the seed")


def with_interval(entry: dict, key: str = "mean", sign: str = "") -> str:
    """"0.512 [0.480, 0.544]", or a dash."""
    if entry.get(key) is None:
        return "-"
    low, high = entry["interval"]
    return f"{entry[key]:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"
