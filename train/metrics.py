"""What a run writes down: metrics.jsonl, TensorBoard events, and one progress line on the main rank.

Sums stay on the device between log steps; a log step is where the host waits for it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from posmask.kernels.masked_lm_loss import NUM_BINS, MaskedLMLoss
from posmask.prep.pos import UPOS
from posmask.train.engine import World
from posmask.train.objectives import Losses, MicroBatch

COUNTERS = ("images", "captions", "tokens", "masked_tokens", "bad_samples")


class LossSums:
    """Loss, hits and counts of masked tokens per part of speech, summed on the device over steps, ranks and batches."""

    def __init__(self, device: torch.device):
        # Rows: loss, top-1 hits, masked tokens. Columns: UPOS, then all masked tokens whatever their tag.
        self.sums = torch.zeros(3, NUM_BINS + 1, dtype=torch.float64, device=device)

    def add(self, losses: MaskedLMLoss) -> None:
        self.sums[:, :NUM_BINS] += torch.stack([losses.bin_loss, losses.bin_hits, losses.bin_count]).double()
        self.sums[0, NUM_BINS] += losses.loss_sum.detach()
        self.sums[2, NUM_BINS] += losses.num_masked

    def reduce(self, world: World) -> dict:
        """{"loss", "masked", "pos": {noun: {loss, top1, tokens}}} over all ranks, then starts again from zero."""
        loss, hits, count = world.sum(self.sums).cpu().tolist()
        self.sums.zero_()
        masked = int(count[NUM_BINS])
        pos = {
            tag.lower(): {"loss": loss[i] / count[i], "top1": hits[i] / count[i], "tokens": int(count[i])}
            for i, tag in enumerate(UPOS)
            if count[i]
        }
        return {"loss": loss[NUM_BINS] / masked if masked else None, "masked": masked, "pos": pos}


class MatchSums:
    """Loss, hits and counts of itm, itc and vqa, summed on the device over steps, ranks and batches."""

    NAMES = ("itm", "itc", "vqa")

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(len(self.NAMES), 3, dtype=torch.float64, device=device)

    def add(self, losses: Losses) -> None:
        for row, name in zip(self.sums, self.NAMES, strict=True):
            if (of_one := getattr(losses, name)) is not None:
                row += torch.stack([value.detach() for value in of_one]).double()

    def reduce(self, world: World) -> dict:
        """{"itm": {"loss", "accuracy"}} of those that were added, over all ranks, then starts again from zero."""
        sums = world.sum(self.sums).cpu().tolist()
        self.sums.zero_()
        parts = zip(self.NAMES, sums, strict=True)
        return {name: {"loss": loss / count, "accuracy": hits / count} for name, (loss, hits, count) in parts if count}


class Window:
    """The steps since the last log line: what they did, how long they took and how long they waited for data."""

    def __init__(self, world: World):
        self.world = world
        self.losses = LossSums(world.device)
        self.matches = MatchSums(world.device)
        self.overflow = torch.zeros((), dtype=torch.float64, device=world.device)
        self.done = dict.fromkeys((name for name in COUNTERS if name != "masked_tokens"), 0)
        self.total_s = self.wait_s = 0.0
        self.since_s = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not part of a step: checkpoints, snapshots, validations."""
        self._stop_clock()
        yield
        self.since_s = time.monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        since_s = time.monotonic()
        yield
        self.wait_s += time.monotonic() - since_s

    def add(self, micro: MicroBatch, losses: Losses) -> None:
        self.losses.add(losses.mlm)
        self.matches.add(losses)
        self.overflow += micro.masked.overflow
        for batch in micro.batches:
            self.done["images"] += len(batch.sample_ids)
            self.done["captions"] += batch.caption_image.numel()
            self.done["tokens"] += batch.tokens.numel()
            self.done["bad_samples"] += batch.num_bad_samples

    def _stop_clock(self) -> None:
        now_s = time.monotonic()
        self.total_s, self.since_s = self.total_s + now_s - self.since_s, now_s

    def close(self, stop_requested: bool) -> tuple[dict, dict, bool]:
        """(values of the log line, counts to add to the totals, whether any rank was asked to stop); starts afresh."""
        values = self.losses.reduce(self.world) | self.matches.reduce(self.world)
        sums = torch.tensor([*self.done.values(), stop_requested], dtype=torch.float64, device=self.world.device)
        *counts, stopping, dropped = self.world.sum(torch.cat([sums, self.overflow[None]])).tolist()
        assert dropped == 0, f"{dropped:.0f} masked tokens did not fit their static capacity"
        totals = dict(zip(self.done, map(int, counts), strict=True)) | {"masked_tokens": values.pop("masked")}
        self._stop_clock()
        rates = (item for item in totals.items() if item[0] != "bad_samples")
        values |= {f"{name}_per_s": round(count / self.total_s, 1) for name, count in rates}
        values["data_wait_share"] = round(self.wait_s / self.total_s, 4)
        self.done = dict.fromkeys(self.done, 0)
        self.total_s = self.wait_s = 0.0
        return values, totals, stopping > 0


class MetricsLog:
    """Appends lines to metrics.jsonl and TensorBoard (and Weights & Biases); does nothing off the main rank.

    Each line carries the cumulative counters and `time_s`, so that any of them can be the axis of a plot. On a resume,
    lines of steps that will be run again are dropped, so that every step stands there once.
    """

    def __init__(self, run: Path, world: World, counters: dict[str, float], start_step: int, wandb: bool):
        self.run, self.is_main = run, world.is_main
        self.counters = dict.fromkeys(COUNTERS, 0) | counters
        self.time_before_s = counters.get("time_s", 0.0)
        self.started_s = time.monotonic()
        self.events = self.wandb = None
        if not self.is_main:
            return
        path = run / "metrics.jsonl"
        kept = [line for line in _complete_lines(path) if json.loads(line)["step"] <= start_step]
        path.write_text("".join(kept))
        self.file = path.open("a")
        from torch.utils.tensorboard import SummaryWriter

        self.events = SummaryWriter(str(run), purge_step=start_step + 1 if start_step else None)
        if wandb:
            import wandb as library

            self.wandb = library.init(project="posmask", name=run.name, dir=str(run), resume="allow")

    @property
    def time_s(self) -> float:
        """Seconds of training so far, the part before a resume included."""
        return self.time_before_s + time.monotonic() - self.started_s

    def count(self, totals: dict[str, int]) -> None:
        for key, value in totals.items():
            self.counters[key] += value

    def state(self) -> dict[str, float]:
        return {**self.counters, "time_s": self.time_s}

    def write(self, step: int, values: dict) -> None:
        if not self.is_main:
            return
        line = {"step": step, **values, **self.counters, "time_s": round(self.time_s, 3)}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        flat = dict(_flatten(values))
        for key, value in flat.items():
            self.events.add_scalar(key, value, step)
        if self.wandb:
            self.wandb.log(flat | self.counters, step=step)

    def close(self) -> None:
        if self.is_main:
            self.file.close()
            self.events.close()
            if self.wandb:
                self.wandb.finish()


def progress_bar(enabled: bool) -> Progress:
    """step, loss, per-POS loss, rates, share of time spent waiting for data, time left."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[line]}"),
        TimeRemainingColumn(), disable=not enabled, refresh_per_second=2,
    )  # fmt: skip


def describe(values: dict) -> str:
    """The text of the progress line, with the three parts of speech that have the most masked tokens."""
    top = sorted(values["pos"].items(), key=lambda item: -item[1]["tokens"])[:3]
    parts = " ".join(f"{name} {value['loss']:.2f}" for name, value in top)
    loss = "none" if values["loss"] is None else f"{values['loss']:.3f}"
    for name in MatchSums.NAMES:
        if name in values:
            parts += f" {name} {values[name]['loss']:.3f} {values[name]['accuracy']:.0%}"
    rates = f"{values['images_per_s']:.0f} images/s {values['tokens_per_s']:.0f} tokens/s"
    return f"loss {loss} ({parts}) {rates} waiting {values['data_wait_share']:.0%}"


def _complete_lines(path: Path) -> list[str]:
    """Lines of a file whose writer may have been killed in the middle of one."""
    if not path.is_file():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _flatten(values: dict, prefix: str = "") -> list[tuple[str, float]]:
    flat = []
    for key, value in values.items():
        if isinstance(value, dict):
            flat += _flatten(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            flat.append((f"{prefix}{key}", value))
    return flat

