"""The files every task leaves behind: results.json, predictions.jsonl, table.txt and plot.png."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Outcome:
    """What a task found. `results` must hold data, num_items and num_missing beside the task's own keys."""

    results: dict
    predictions: list[dict]  # one JSON object an item
    table: str
    draw: Callable[[Figure], None]
    files: dict[str, object] = field(default_factory=dict)  # JSON files of the task's own, by name


def save(out: Path, results: dict, outcome: Outcome) -> None:
    """Writes the four files and the task's own; results.json last and whole, so that a folder with one is complete."""
    assert {"data", "num_items", "num_missing"} <= results.keys()
    out.mkdir(parents=True, exist_ok=True)
    with (out / "predictions.jsonl").open("w") as file:
        file.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in outcome.predictions)
    (out / "table.txt").write_text(outcome.table + "\n")
    for name, content in outcome.files.items():
        (out / name).write_text(json.dumps(content, ensure_ascii=False) + "\n")
    figure = Figure(figsize=(9, 4.5), dpi=120, layout="constrained")
    outcome.draw(figure)
    figure.savefig(out / "plot.png")
    partial = out / "results.json.tmp"
    partial.write_text(json.dumps(results, indent=2) + "\n")
    partial.replace(out / "results.json")


def draw_bars(figure: Figure, title: str, rows: list[tuple[str, dict[str, dict]]], ylabel: str, chance: list) -> None:
    """A group of bars for each (label, {condition: rate}), with intervals; chance levels (shares or None) dashed.

    A rate is {"accuracy": share or None, "interval": [low, high] or None}.
    """
    figure.suptitle(title.split("\n")[0], fontsize=8)
    axis = figure.subplots()
    names = list(dict.fromkeys(name for _, by_name in rows for name in by_name))
    width = 0.8 / len(names)
    nothing = {"accuracy": None, "interval": None}
    for i, name in enumerate(names):
        rates = [by_name.get(name, nothing) for _, by_name in rows]
        heights = np.array([np.nan if rate["accuracy"] is None else 100 * rate["accuracy"] for rate in rates])
        ends = np.array([rate["interval"] or [np.nan, np.nan] for rate in rates]).T * 100
        x = np.arange(len(rows)) + width * (i - (len(names) - 1) / 2)
        label = "its own image" if name == "image" else f"{name} image"
        axis.bar(x, heights, width, label=label)
        axis.vlines(x, *ends, color="k", linewidth=0.8)
    for i, level in enumerate(chance):
        if level is not None:
            axis.hlines(100 * level, i - 0.45, i + 0.45, color="0.3", linestyle="--", linewidth=0.8)
    axis.set_xticks(np.arange(len(rows)), [label for label, _ in rows], rotation=35, ha="right")
    axis.set_ylabel(ylabel)
    axis.set_ylim(0, 100)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def percent(share: float | None) -> str:
    """A share in percent with one decimal; a dash for None."""
    return "-" if share is None else f"{100 * share:.1f}"


def percent_interval(ends: list[float] | None) -> str:
    """[0.4, 0.6] as "40.0-60.0"; a dash for None."""
    return "-" if ends is None else f"{100 * ends[0]:.1f}-{100 * ends[1]:.1f}"


def render(title: str, header: list[str], rows: list[list[str]]) -> str:
    """The title above a plain-text table; the first column is text, the others numbers."""
    table = Table()
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(width=200, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return title + "\n" + capture.get().rstrip("\n")
