"""Fine-tune a pre-trained model: answer questions, with or without a masking arm beside it, or go on masking.

    deepspeed train/finetune.py --task vqa --init runs/noun --data data/vqa/train
    deepspeed train/finetune.py --task vqa --init runs/noun --data data/vqa/train --mask noun --mask-weight 0.5
    deepspeed train/finetune.py --task vqa --init runs/noun --data data/vqa/train --data data/coco/train --mask noun
    deepspeed train/finetune.py --task none --init runs/random --data data/coco/train --mask noun

The arm masks the questions or, where a second --data holds captions, those. The loop is that of pretrain.py.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

from posmask.train.checkpoint import load_initial_weights, parse_run
from posmask.train.config import PRESETS, ModelConfig, RunConfig, make_parser, require, settings
from posmask.train.loader import Shards
from posmask.train.masking import arm_slug
from posmask.train.pretrain import Start, from_preset, run_command

TASKS = {"vqa": "visual question answering", "none": "pre-training goes on"}
QUESTIONS_PER_IMAGE = 4  # of one step by default; the image is encoded once for all
SIZES = {
    "laptop": {"steps": 1600, "batch_size": 64, "lr": 5e-4, "head_lr": 5e-4},
    "base": {"steps": 20_000, "batch_size": 256, "lr": 2e-5, "head_lr": 2e-4},
}


@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """Settings of one fine-tuning run."""

    task: str
    init: str | None  # RUN or RUN@STEP whose weights it begins with; None: new ones of --preset
    head_lr: float
    mask_weight: float
    min_answers: int

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.head_lr > 0, "head_lr", self.head_lr, "above 0")
        require(self.mask_weight > 0, "mask_weight", self.mask_weight, "above 0; --mask none learns the task alone")
        require(self.min_answers >= 1, "min_answers", self.min_answers, "at least 1")

    @property
    def learns_answers(self) -> bool:
        return self.task == "vqa"

    @property
    def head_lr_scale(self) -> float:
        return self.head_lr / self.lr

    @property
    def objective_weights(self) -> tuple[float, float, float, float]:
        return self.mask_weight, 1.0, 1.0, 1.0

    @property
    def title(self) -> str:
        return f"--task {self.task} --init {self.init or 'none'} --mask {self.mask}"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line `argv`; 0 when done, 2 on wrong usage or input."""
    return run_command("finetune", partial(parse_args, argv), begin)


def parse_args(argv: list[str] | None, has_gpu: bool) -> FinetuneConfig:
    """The command line as a FinetuneConfig. Raises ValueError if --init is no run."""
    parser = make_parser("finetune.py", "Fine-tune a pre-trained model, with or without a masking arm.", SIZES)
    parser.add_argument("--task", required=True, choices=tuple(TASKS),
                        help="; ".join(f"{name}: {text}" for name, text in TASKS.items()))  # fmt: skip
    parser.add_argument("--init", metavar="RUN", help="run folder, or RUN@STEP, to begin with (new weights)")
    parser.add_argument("--mask", default="none", help="masking arm beside the task, e.g. noun, random")
    parser.add_argument("--mask-weight", type=float, default=1.0, help="of its loss; the task has 1")
    parser.add_argument("--head-lr", type=float, help="peak learning rate of the answer head")
    parser.add_argument("--min-answers", type=int, default=9,
                        help="how often a most common answer comes in training to be in the vocabulary")  # fmt: skip
    parser.set_defaults(objectives=None, captions_per_image=None)
    args = parser.parse_args(argv)
    if not args.data:
        parser.error("--data is required: shards of questions for --task vqa, of captions for --task none")
    saved = None
    if args.init:
        if given := args.preset or args.text_weights or args.image_weights:
            raise ValueError(f"{given} contradicts --init {args.init}, which says what the model is: leave it out")
        saved = model_config_of(args.init)
        args.preset = saved.preset
    args.preset = args.preset or ("base" if has_gpu else "laptop")
    if args.captions_per_image is None:
        args.captions_per_image = QUESTIONS_PER_IMAGE if args.task == "vqa" else 1
    if args.objectives is None:
        masked = ("mlm",) if args.mask != "none" else ()
        args.objectives = masked if args.task == "vqa" or saved is None else saved.objectives or ("mlm",)
    if args.out is None:
        start = parse_run(args.init)[0].name if args.init else args.preset
        names = [start] + ["vqa"] * (args.task == "vqa") + [arm_slug(args.mask)] * (args.mask != "none")
        args.out = f"runs/{'-'.join(names)}"
    return FinetuneConfig(**settings(args, SIZES, has_gpu))


def begin(config: FinetuneConfig) -> Start:
    """The model of --init, for the task; questions and captions apart."""
    data = split(config) if config.learns_answers else (Shards(config.data, config.cache),)
    answers = vocabulary(data[0], config.min_answers) if config.learns_answers else ()
    if config.init is None:
        new = from_preset(dataclasses.replace(config, data=data[0].folders))
        return Start(data, dataclasses.replace(new.model_config, answers=answers), new.load_weights)
    saved = model_config_of(config.init)
    folder, _ = parse_run(config.init)
    tokenizer_sha256 = sha256((folder / "tokenizer" / "vocab.txt").read_bytes()).hexdigest()
    for shards in data:
        if shards.manifest.tokenizer.sha256 != tokenizer_sha256:
            raise ValueError(
                f"--data {shards.folders[0]} has another tokenizer than --init {folder}: build it with --tokenizer "
                f"{folder}/tokenizer"
            )
        if shards.manifest.longest_caption > saved.max_positions:
            raise ValueError(
                f"--data {shards.folders[0]} has captions of {shards.manifest.longest_caption} tokens, --init {folder} "
                f"has {saved.max_positions} positions; build it with a smaller --max-tokens"
            )
    model_config = dataclasses.replace(saved, objectives=config.objectives, answers=answers)
    return Start(data, model_config, partial(load_initial_weights, run=config.init))


def split(config: FinetuneConfig) -> tuple[Shards, ...]:
    """The shards of --data: questions, then captions, if there are any, for the arm to mask."""
    has_answers = {folder: "answers" in Shards((folder,), config.cache).manifest.counts for folder in config.data}
    questions = tuple(folder for folder in config.data if has_answers[folder])
    captions = tuple(folder for folder in config.data if not has_answers[folder])
    if not has_answers[config.data[0]]:
        raise ValueError(
            f"--data {config.data[0]} holds captions, --task vqa needs questions first: build them with "
            "prep/build_shards.py vqa"
        )
    if captions and config.mask == "none":
        raise ValueError(f"--data {captions[0]} holds captions, which --mask none leaves unused: choose an arm")
    parts = tuple(Shards(folders, config.cache) for folders in (questions, captions) if folders)
    if len({shards.manifest.tokenizer.sha256 for shards in parts}) > 1:
        raise ValueError(f"--data {captions[0]} has another tokenizer than {questions[0]}: build both with one")
    return parts


def vocabulary(shards: Shards, min_answers: int) -> tuple[str, ...]:
    """The answers that are the most common one of at least `min_answers` questions, the most frequent first."""
    counts = sum((Counter(manifest.counts["answers"]) for manifest in shards.manifests), Counter())
    if not (answers := [answer for answer, count in counts.items() if count >= min_answers]):
        raise ValueError(f"--min-answers {min_answers}: no answer comes that often in {shards.folders[0]}, take fewer")
    return tuple(sorted(answers, key=lambda answer: (-counts[answer], answer)))


def model_config_of(run: str) -> ModelConfig:
    """The model of RUN or RUN@STEP. Raises ValueError if it is no run."""
    folder, _ = parse_run(run)
    path = Path(folder) / "model_config.json"
    if not path.is_file():
        raise ValueError(f"--init {run}: not a run folder (it has no model_config.json)")
    config = ModelConfig.load(path)
    assert config.preset in PRESETS, config.preset
    return config


if __name__ == "__main__":
    sys.exit(main())
