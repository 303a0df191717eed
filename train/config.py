"""What a pre-training run is: model presets, the run's settings, and the command line that makes them.

Settings are frozen and checked when they are made; what `config.json` holds is exactly `RunConfig`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from posmask.kernels.backend import has_bf16_instructions
from posmask.kernels.mask_plan import AMOUNTS
from posmask.train.masking import UNITS, WHEN_EMPTY, arm_slug
from posmask.train.remote import beside

# open_clip's RN50 was trained with these; they are also what "blank" is measured against (zeros after normalisation).
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ModelConfig:
    """Shapes of the model; saved as `model_config.json` beside the weights.

    image_layers: bottleneck blocks per stage of open_clip's ModifiedResNet; with S stages the stride is 2^(S+1).
    """

    preset: str
    image_size: int
    image_layers: tuple[int, ...]
    image_width: int
    width: int
    num_heads: int
    num_text_layers: int
    num_fusion_layers: int
    max_positions: int
    vocab_size: int = 0
    objectives: tuple[str, ...] = ("mlm",)  # decides which heads there are beside the MLM head
    answers: tuple[str, ...] = ()  # the vocabulary of the answer head; without one there is no such head
    image_mean: tuple[float, ...] = IMAGE_MEAN
    image_std: tuple[float, ...] = IMAGE_STD

    @property
    def image_stride(self) -> int:
        return 2 ** (len(self.image_layers) + 1)

    @property
    def num_image_tokens(self) -> int:
        return (self.image_size // self.image_stride) ** 2

    @property
    def image_channels(self) -> int:
        return self.image_width * 4 * 2 ** (len(self.image_layers) - 1)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @staticmethod
    def load(path: Path) -> ModelConfig:
        values = json.loads(path.read_text())
        known = {field.name for field in dataclasses.fields(ModelConfig)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"{path}: unknown keys {unknown}; this model was saved by another version of posmask")
        return ModelConfig(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})


OBJECTIVES = {
    "mlm": "masked language modelling",
    "itm": "image-text matching against a hard negative of the batch",
    "itc": "image-text contrast within the batch",
}
PRESETS = {
    # RN50 and BERT-base: layers 0-5 of bert-base-uncased are the text encoder, 6-11 the fusion encoder.
    "base": ModelConfig("base", 224, (3, 4, 6, 3), 64, 768, 12, 6, 6, max_positions=512),
    # Minutes on two CPU cores; three stages, so that 64 px still give a 4x4 grid.
    "laptop": ModelConfig("laptop", 64, (1, 1, 1), 24, 192, 3, 2, 2, max_positions=256),
}

# What is not given on the command line: on two CPU cores, and on GPUs.
SIZES = {
    "laptop": {"steps": 800, "batch_size": 128, "lr": 1e-3},
    "base": {"steps": 100_000, "batch_size": 512, "lr": 1e-4},
}

# Settings that may differ when a run is continued: where and how it runs, not what it computes.
NOT_COMPARED = (
    "out", "cache", "resume", "micro_batch_size", "checkpoint_every", "keep_checkpoints", "log_every", "wandb",
)  # fmt: skip


@dataclass(frozen=True)
class RunConfig:
    """Settings of one run, as in `config.json`; those that fine-tuning adds are in its subclass.

    Counts are global over all ranks.
    """

    mask: str
    objectives: tuple[str, ...]
    data: tuple[str, ...]
    val: str | None
    cache: str | None
    out: str
    preset: str
    steps: int
    batch_size: int  # images a step, over all ranks
    micro_batch_size: int | None  # images a forward on one rank; None: the whole share of a rank
    captions_per_image: int
    maskings_per_caption: int
    lr: float
    warmup_steps: int
    weight_decay: float
    grad_clip: float
    seed: int
    dtype: str
    zero_stage: int
    compile: bool
    mask_amount: str | None
    mask_rate: float | None
    mask_unit: str | None
    replace: tuple[float, float, float] | None
    when_empty: str
    blank_rate: float
    crop_scale: tuple[float, float]
    checkpoint_every: int
    keep_checkpoints: int
    eval_every: int
    eval_images: int
    snapshots: int
    log_every: int
    resume: str
    decode: str
    on_bad_sample: str
    text_weights: str | None
    image_weights: str | None
    deepspeed_config: str | None
    wandb: bool

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "captions_per_image", "maskings_per_caption", "log_every", "keep_checkpoints")
        for flag in counts:
            require(getattr(self, flag) >= 1, flag, getattr(self, flag), "at least 1")
        for flag in ("warmup_steps", "checkpoint_every", "eval_every", "snapshots", "weight_decay", "grad_clip"):
            require(getattr(self, flag) >= 0, flag, getattr(self, flag), "0 (off) or more")
        check_objectives(self.objectives, self.mask, self.learns_answers)
        require(self.eval_images >= 1, "eval_images", self.eval_images, "at least 1")
        require(self.lr > 0, "lr", self.lr, "above 0")
        require(0 <= self.blank_rate <= 1, "blank_rate", self.blank_rate, "within 0..1")
        low, high = self.crop_scale
        require(0 < low <= high <= 1, "crop_scale", f"{low},{high}", "two shares of the area, 0 < low <= high <= 1")
        require(0 <= self.seed < 2**32, "seed", self.seed, "within 0..2^32-1")
        if self.compile and self.zero_stage == 3:
            raise ValueError("--compile with --zero-stage 3: its parameters come and go; use 0, 1 or 2")
        if self.micro_batch_size is not None:
            require(self.micro_batch_size >= 1, "micro_batch_size", self.micro_batch_size, "at least 1")
            if self.batch_size % self.micro_batch_size:
                raise ValueError(
                    f"--batch-size {self.batch_size} is not a multiple of --micro-batch-size {self.micro_batch_size}"
                )

    @property
    def learns_answers(self) -> bool:
        """Whether questions are answered."""
        return False

    @property
    def head_lr_scale(self) -> float:
        """Learning rate of the answer head, relative to --lr."""
        return 1.0

    @property
    def objective_weights(self) -> tuple[float, float, float, float]:
        """Of mlm, itm, itc and vqa in the loss."""
        return 1.0, 1.0, 1.0, 1.0

    @property
    def title(self) -> str:
        return f"--mask {self.mask}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32

    def micro_batches(self, world_size: int) -> tuple[int, int]:
        """(images of one forward on one rank, forwards a step), or ValueError where they do not divide."""
        per_rank, rest = divmod(self.batch_size, world_size)
        if rest:
            raise ValueError(f"--batch-size {self.batch_size} does not divide over {world_size} ranks")
        micro = min(self.micro_batch_size or per_rank, per_rank)
        if per_rank % micro:
            raise ValueError(
                f"--batch-size {self.batch_size} over {world_size} ranks is {per_rank} images a rank, "
                f"not a multiple of --micro-batch-size {micro}"
            )
        return micro, per_rank // micro

    def save(self, path: Path) -> None:
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")
        temporary.replace(path)

    def differences(self, saved: dict) -> list[str]:
        """Lines "--key: saved, now" for every setting that decides the result and differs from a saved config."""
        now = json.loads(json.dumps(dataclasses.asdict(self)))
        return [
            f"--{key.replace('_', '-')}: {saved.get(key)!r} there, {value!r} now"
            for key, value in now.items()
            if key not in NOT_COMPARED and saved.get(key) != value
        ]


def check_objectives(objectives: tuple[str, ...], mask: str, learns_answers: bool) -> None:
    """Raises ValueError for objectives that are unknown, or that leave nothing to learn with this --mask."""
    given = f"--objectives {','.join(objectives)}"
    if unknown := [name for name in objectives if name not in OBJECTIVES]:
        raise ValueError(f"{given}: {unknown[0]!r} is unknown, choose from {', '.join(OBJECTIVES)}")
    if len(set(objectives)) < len(objectives):
        raise ValueError(f"{given}: names an objective twice")
    if mask == "none" and not objectives and not learns_answers:
        raise ValueError(
            "--mask none leaves nothing to learn while masked language modelling is the only objective; choose an arm, "
            "or add an objective: --objectives mlm,itm"
        )
    if mask != "none" and "mlm" not in objectives:
        raise ValueError(f"{given} masks nothing, which contradicts --mask {mask}: add mlm, or say --mask none")


def learning_rate(config: RunConfig, step: int) -> float:
    """Linear warm-up, then a cosine to a tenth of --lr at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * (0.55 + 0.45 * math.cos(math.pi * progress))


def snapshot_steps(steps: int, count: int) -> list[int]:
    """About `count` log-spaced steps from 1 to `steps`, the last one included: early learning is where arms differ."""
    if count == 0:
        return []
    return sorted({round(steps ** (i / max(1, count - 1))) for i in range(count)} | {steps})


def parse_args(argv: list[str] | None, has_gpu: bool) -> RunConfig:
    """The command line of pretrain.py as a RunConfig. argparse exits with 2 on a malformed flag."""
    parser = make_parser("pretrain.py", "Pre-train a vision-language model while masking one part of speech.", SIZES)
    parser.add_argument("--mask", required=True, help="masking arm, e.g. noun, noun,propn, random, matched:noun")
    args = parser.parse_args(argv)
    args.data = args.data or ["data/scenes/train"]
    args.preset = args.preset or ("base" if has_gpu else "laptop")
    args.out = args.out or f"runs/{arm_slug(args.mask)}"
    return RunConfig(**settings(args, SIZES, has_gpu))


def make_parser(prog: str, description: str, sizes: dict[str, dict[str, float]]) -> argparse.ArgumentParser:
    """The flags that all training has; sizes: the defaults of a preset, for --help."""

    def both(flag: str) -> str:
        return "; ".join(f"{preset}: {values[flag]:g}" for preset, values in sizes.items())

    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--list-masks", action=_ListMasks, help="print the masking arms and exit")

    data = parser.add_argument_group("data")
    data.add_argument("--data", action="append", help="folder or URL of training shards; may be repeated")
    data.add_argument("--val", help="validation shards (the folder `val` beside the first --data)")
    data.add_argument("--cache", help="local disk where shards at URLs are kept, all that this machine reads of them "
                      "($XDG_CACHE_HOME/posmask or ~/.cache/posmask)")
    data.add_argument("--captions-per-image", type=int, default=1,
                      help="captions (or questions) drawn for each image of a step")
    data.add_argument("--maskings-per-caption", type=int, default=1, help="times that a step masks each caption anew")
    data.add_argument("--blank-rate", type=float, default=0.1, help="share of samples shown with a blank image")
    data.add_argument("--crop-scale", type=_floats(2), default=(0.9, 1.0), help="area of the random crop: LOW,HIGH")
    data.add_argument("--decode", choices=("auto", "dali", "cpu"), default="auto",
                      help="what decodes the images (auto: DALI on a GPU, torchvision on a CPU)")
    data.add_argument("--on-bad-sample", choices=("stop", "skip"), default="stop",
                      help="whether a sample that is damaged ends the run or is left out, named and counted")

    objectives = "; ".join(f"{name}: {text}" for name, text in OBJECTIVES.items())
    parser.add_argument("--objectives", type=_names, default=("mlm",), help=f"comma list; {objectives}")

    mask = parser.add_argument_group("masking (defaults: those of the arm)")
    mask.add_argument("--mask-amount", choices=AMOUNTS, help="how many candidates are masked")
    mask.add_argument("--mask-rate", type=float, help="share of candidates (rate) or of the caption (budget)")
    mask.add_argument("--mask-unit", choices=tuple(UNITS), help="what is masked as a whole")
    mask.add_argument("--when-empty", choices=WHEN_EMPTY, default="skip", help="captions without a candidate: "
                      "skip them, mask 15 %% of any pieces, or one content word")
    mask.add_argument("--replace", type=_floats(3), help="shares of [MASK], random word, kept: M,R,K")

    train = parser.add_argument_group("training")
    train.add_argument("--preset", choices=tuple(PRESETS), help="model size (base on a GPU, laptop on a CPU)")
    train.add_argument("--steps", type=int, help=f"optimizer steps ({both('steps')})")
    train.add_argument("--batch-size", type=int, help=f"images a step over all ranks ({both('batch_size')})")
    train.add_argument("--micro-batch-size", type=int, help="images of one forward on one rank (all of its share)")
    train.add_argument("--lr", type=float, help=f"peak learning rate ({both('lr')})")
    train.add_argument("--warmup-steps", type=int, help="steps of linear warm-up (5 %% of the steps)")
    train.add_argument("--weight-decay", type=float, default=0.01)
    train.add_argument("--grad-clip", type=float, default=1.0, help="largest gradient norm; 0 turns clipping off")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto",
                       help="auto: bf16 on a GPU and on a CPU that has instructions for it")
    train.add_argument("--zero-stage", type=int, choices=range(4), default=1)
    train.add_argument("--compile", action="store_true", help="compile the image encoder, which takes a minute")
    train.add_argument("--text-weights", help="BERT weights: a folder, a .safetensors file or a hub name")
    train.add_argument("--image-weights", help="open_clip RN50 checkpoint file")
    train.add_argument("--deepspeed_config", help="JSON merged over the DeepSpeed configuration built here")
    train.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it

    run = parser.add_argument_group("run")
    run.add_argument("--out", help="run folder (named after the arm, in runs)")
    run.add_argument("--resume", default="auto", help="auto: continue an unfinished run; never; or a RUN[@STEP]")
    run.add_argument("--checkpoint-every", type=int, default=200, help="steps between checkpoints; 0: only at the end")
    run.add_argument("--keep-checkpoints", type=int, default=2, help="newest checkpoints kept")
    run.add_argument("--eval-every", type=int, default=200, help="steps between validations; 0: only at the end")
    run.add_argument("--eval-images", type=int, default=512, help="images of a validation")
    run.add_argument("--snapshots", type=int, default=20, help="log-spaced steps whose weights are kept")
    run.add_argument("--log-every", type=int, default=10, help="steps between lines of metrics.jsonl")
    run.add_argument("--wandb", action="store_true", help="log to Weights & Biases too: pip install 'posmask[wandb]'")
    return parser


def settings(args: argparse.Namespace, sizes: dict[str, dict[str, float]], has_gpu: bool) -> dict:
    """The fields of a RunConfig; what was not given is as large as the preset."""
    values = vars(args) | {"data": tuple(args.data)}
    values |= {flag: default for flag, default in sizes[args.preset].items() if values[flag] is None}
    if values["mask"] == "none":  # nothing is hidden, so there is nothing to predict
        values["objectives"] = tuple(name for name in values["objectives"] if name != "mlm")
    if values["warmup_steps"] is None:
        values["warmup_steps"] = values["steps"] // 20
    if values["dtype"] == "auto":
        # On a CPU with bf16 instructions a step of base takes half the time of one in fp32.
        values["dtype"] = "bf16" if has_gpu or has_bf16_instructions() else "fp32"
    if values["val"] is None:
        values["val"] = beside(values["data"][0], "val")
    del values["local_rank"], values["list_masks"]
    return values


class _ListMasks(argparse.Action):
    """`--list-masks`: like --help, it prints and exits."""

    def __init__(self, option_strings, dest, **kwargs):
        super().__init__(option_strings, dest, nargs=0, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        from posmask.train.masking import list_masks

        for name, source, line in list_masks():
            print(f"{name:<16} {line}" + (f"  ({source})" if source else ""))
        parser.exit(0)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _floats(count: int):
    def parse(text: str) -> tuple[float, ...]:
        parts = text.split(",")
        if len(parts) != count:
            raise argparse.ArgumentTypeError(f"{text!r} is not {count} numbers separated by commas")
        try:
            return tuple(float(part) for part in parts)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {count} numbers separated by commas") from None

    return parse


def require(condition: bool, flag: str, value, rule: str) -> None:
    """Raises ValueError, naming the flag, where `condition` is false."""
    if not condition:
        raise ValueError(f"--{flag.replace('_', '-')} {value}: must be {rule}")
