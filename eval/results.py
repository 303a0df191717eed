"""The files every task leaves behind: results.json, predictions.jsonl, table.txt and plot.png."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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


def save(out: Path, results: dict, outcome: Outcome) -> None:
    """Writes the four files; results.json last and atomically, so that a folder with one is complete."""
    assert {"data", "num_items", "num_missing"} <= results.keys()
    out.mkdir(parents=True, exist_ok=True)
    with (out / "predictions.jsonl").open("w") as file:
        file.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in outcome.predictions)
    (out / "table.txt").write_text(outcome.table + "\n")
    figure = Figure(figsize=(9, 4.5), dpi=120, layout="constrained")
    outcome.draw(figure)
    figure.savefig(out / "plot.png")
    partial = out / "results.json.tmp"
    partial.write_text(json.dumps(results, indent=2) + "\n")
    partial.replace(out / "results.json")


def percent(share: float | None) -> str:
    """A share in percent with one decimal; a dash for None."""
    return "-" if share is None else f"{100 * share:.1f}"


def percent_interval(ends: list[float] | None) -> str:
    """[0.4, 0.6] as "40.0-60.0"; a dash for None."""
    return "-" if ends is None else f"{100 * ends[0]:.1f}-{100 * ends[1]:.1f}"


def render(title: str, header: list[str], rows: list[list[str]]) -> str:
    """A plain-text table; the first column is text, the others numbers."""
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(width=130, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip("\n")
