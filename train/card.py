"""The README.md of a finished run: what it was trained on, how, and how to load it."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from posmask.train.config import RunConfig
from posmask.train.loader import Shards


def git_commit() -> str:
    """The commit of the checkout this module runs from, with "+" if it has changes; "unknown" outside one."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_card(run: Path, config: RunConfig, data: Sequence[Shards]) -> None:
    """Writes RUN/README.md."""
    folders = [(folder, m) for shards in data for folder, m in zip(shards.folders, shards.manifests, strict=True)]
    sources = {source["name"]: source.get("licence", "unknown") for _, m in folders for source in m.sources}
    lines = [
        f"# {run.name}",
        "",
        f"A posmask model of preset `{config.preset}`, trained for {config.steps:,} steps of {config.batch_size} "
        f"images with `{config.title}` (seed {config.seed}, blank images {config.blank_rate:.0%}).",
        "",
        "| data | images | captions | tokens | licence |",
        "|---|---|---|---|---|",
    ]
    for folder, manifest in folders:
        counts = manifest.counts
        licences = ", ".join(f"{name}: {licence}" for name, licence in sources.items())
        numbers = " | ".join(f"{counts[key]:,}" for key in ("images", "captions", "tokens"))
        lines.append(f"| {folder} | {numbers} | {licences} |")
    lines += [
        "",
        f"Code: commit {(run / 'commit.txt').read_text().strip()}. All settings: `config.json`.",
        "",
        "```python",
        "import torch",
        "from posmask.train.checkpoint import load_model",
        "",
        f'model, step = load_model("{run}", torch.device("cpu"))',
        "```",
        "",
    ]
    (run / "README.md").write_text("\n".join(lines))
