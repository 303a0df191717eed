"""Pre-train a vision-language model while masking one part of speech.

    deepspeed train/pretrain.py --mask noun
    deepspeed --num_accelerators 2 train/pretrain.py --mask random --preset base --zero-stage 2
    torchrun --nproc-per-node 2 train/pretrain.py --mask matched:noun
    python train/pretrain.py --mask verb --steps 100
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from posmask.train import checkpoint, metrics
from posmask.train.card import git_commit, write_card
from posmask.train.config import PRESETS, ModelConfig, RunConfig, learning_rate, parse_args, snapshot_steps
from posmask.train.decode import BadSample
from posmask.train.engine import (
    StopSignal,
    World,
    average_batch_norm,
    deepspeed_settings,
    gradient_norm,
    make_engine,
    set_learning_rate,
    start_processes,
)
from posmask.train.loader import Batch, Collator, Loader, Shards, View, evaluation_batches
from posmask.train.masking import Masking, parse_mask
from posmask.train.model import PosMaskModel
from posmask.train.objectives import MicroBatch, all_losses, counts, mask_batch, prepare
from posmask.train.policy import POLICIES, Policy
from posmask.train.remote import Unavailable
from posmask.train.weights import load_image_weights, load_text_weights

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass(frozen=True)
class Start:
    """What a run begins with."""

    data: tuple[Shards, ...]  # questions, if there are any, then what is masked; one where both are the same
    model_config: ModelConfig
    load_weights: Callable[[PosMaskModel], None]  # puts the first weights into a new model


@dataclass(frozen=True)
class Run:
    """The parts of a run, as the loop and its warm-up use them."""

    config: RunConfig
    world: World
    folder: Path
    data: tuple[Shards, ...]
    collates: tuple[Collator, ...]  # one for each of data
    masking: Masking
    engine: DeepSpeedEngine
    policy: Policy
    validate: Callable | None

    def prepare(self, batches: Sequence[Batch], progress: float) -> MicroBatch:
        """Moves batches, one of each of data, to the device and masks them."""
        moved = [batch.to(self.world.device, self.config.torch_dtype) for batch in batches]
        plan, vocab_size = self.masking.at(progress), self.engine.module.config.vocab_size
        return prepare(moved, plan, self.config, vocab_size, self.policy.bit_weights)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line `argv`; 0 when done, 2 on wrong usage or input."""
    return run_command("pretrain", partial(parse_args, argv), from_preset)


def run_command(name: str, parse: Callable[[bool], RunConfig], begin: Callable[[RunConfig], Start]) -> int:
    """A training command: parses its flags, joins the other ranks and trains."""
    try:
        config = parse(torch.cuda.is_available())
        world = start_processes()
        with StopSignal() as stop:
            return train(config, world, stop, begin)
    except ValueError as error:
        # What is wrong with the settings is wrong on every rank: one of them says it.
        if os.environ.get("RANK", "0") == "0" or isinstance(error, (BadSample, Unavailable)):
            print(f"{name}: {error}", file=sys.stderr)
        return 2


def from_preset(config: RunConfig) -> Start:
    """A new model of --preset, with weights of BERT or of open_clip where files are given."""
    shards = Shards(config.data, config.cache)

    def load_weights(model: PosMaskModel) -> None:
        if config.text_weights:
            load_text_weights(model, config.text_weights)
        if config.image_weights:
            load_image_weights(model, config.image_weights)

    return Start((shards,), make_model_config(config, shards), load_weights)


def train(config: RunConfig, world: World, stop: StopSignal, begin: Callable[[RunConfig], Start]) -> int:
    """One run: prepare, train, export. Raises ValueError for what the user can mend, before anything is written."""
    folder = Path(config.out)
    if config.wandb and find_spec("wandb") is None:
        raise ValueError("--wandb: the package is not installed; pip install 'posmask[wandb]'")
    source = find_resume(config, folder)
    if source == "complete":
        say(world, f"{folder} is already complete ({config.steps} steps); choose another --out to train it again")
        return 0
    micro_batch_size, accumulation = config.micro_batches(world.size)
    deepspeed = deepspeed_settings(config, micro_batch_size, accumulation)
    start = begin(config)
    for shards in start.data:
        if len(shards) < config.batch_size:
            where = f"--data {' '.join(shards.folders)}" if len(start.data) > 1 else "--data"
            raise ValueError(f"{where} has {len(shards)} images, fewer than --batch-size {config.batch_size}")
    masking = make_masking(config, start.data[-1])
    model_config = start.model_config
    torch.manual_seed(config.seed)  # the initial weights; everything else is drawn from counters
    model = PosMaskModel(model_config)
    start.load_weights(model)
    if source is not None:
        check_same_model(source, model_config)
    view = View(
        config.seed, model_config.image_size, model_config.image_mean, model_config.image_std,
        config.captions_per_image, config.blank_rate, config.crop_scale, config.maskings_per_caption,
    )  # fmt: skip
    # Questions come first; what is masked beside them is not answered.
    vocabularies = (model_config.answers, *[()] * (len(start.data) - 1))
    make_collate = partial(make_collator, config, world, micro_batch_size)
    validate = make_validation(config, world, view, start, make_collate, micro_batch_size)
    collates = tuple(make_collate(view, *pair) for pair in zip(start.data, vocabularies, strict=True))
    prepare_run_folder(folder, config, start, world)

    engine = make_engine(model, config, deepspeed, world.device)
    policy = POLICIES[masking.policy](world.device)
    run = Run(config, world, folder, start.data, collates, masking, engine, policy, validate)
    state = {"step": 0, "counters": {}, "policy": policy.state()}
    if source is not None:
        state = checkpoint.restore(engine, source, partial(warm_up, run))
        policy.restore(state.get("policy", {}))  # checkpoints from before there were policies had none to keep
    say(world, describe_start(config, world, start.data, model, state["step"]))
    loaders = [
        Loader(
            shards, collate, seed=config.seed, batch_size=config.batch_size, micro_batch_size=micro_batch_size,
            rank=world.rank, world_size=world.size, start_step=state["step"], num_steps=config.steps,
        )
        for shards, collate in zip(start.data, collates, strict=True)
    ]  # fmt: skip
    log = metrics.MetricsLog(folder, world, state["counters"], state["step"], config.wandb)
    try:
        finished = loop(run, zip(*loaders, strict=True), log, state["step"], stop)
    finally:
        for loader in loaders:
            loader.close()
        log.close()
    if not finished:
        say(world, f"stopped by SIGTERM; the same command continues {folder}")
        return 0
    checkpoint.export(engine, world, folder)
    if world.is_main:
        write_card(folder, config, start.data)
    following = "vqa" if config.learns_answers else "probe"
    say(world, f"{folder}: done. Next: python eval/run.py {following} --checkpoint {folder}")
    return 0


def loop(
    run: Run, batches: Iterator[tuple[Batch, ...]], log: metrics.MetricsLog, start_step: int, stop: StopSignal
) -> bool:
    """Steps start_step + 1 … config.steps; false if SIGTERM ended it early."""
    config, world, engine, policy = run.config, run.world, run.engine, run.policy
    _, accumulation = config.micro_batches(world.size)
    weights = torch.tensor(config.objective_weights, device=world.device)
    window = metrics.Window(world)
    snapshots = set(snapshot_steps(config.steps, config.snapshots))
    stopping = False
    with metrics.progress_bar(world.is_main and sys.stderr.isatty()) as bar:
        task = bar.add_task(config.title, total=config.steps, completed=start_step, line="")
        for step in range(start_step + 1, config.steps + 1):
            progress = (step - 1) / config.steps
            with window.waiting():
                taken = [next(batches) for _ in range(accumulation)]

            # All micro-batches are masked first, so that each is scaled by the count of the whole step.
            micro = [run.prepare(several, progress) for several in taken]
            divisors = world.sum(counts(micro)).clamp_(min=1) / weights
            set_learning_rate(engine, learning_rate(config, step - 1))
            of_step = []
            for one in micro:
                losses = all_losses(engine, one, policy.wants_reward)
                # DeepSpeed averages over ranks and accumulation steps; ours are sums over the whole step.
                engine.backward(losses.scaled_sum(divisors, world.size * accumulation))
                engine.step()
                window.add(one, losses)
                of_step.append(losses)
            policy.update(of_step, world)

            last = step == config.steps
            checkpoint_due = last or (config.checkpoint_every and step % config.checkpoint_every == 0)
            if checkpoint_due or step % config.log_every == 0:  # the only places where the host waits for the device
                values, totals, stopping = window.close(stop.requested)
                log.count(totals)
                values |= {"lr": learning_rate(config, step - 1), "grad_norm": gradient_norm(engine)}
                log.write(step, values)
                bar.update(task, completed=step, line=metrics.describe(values))
                if world.is_main and bar.disable and (last or step % (10 * config.log_every) == 0):
                    print(f"step {step}/{config.steps} {metrics.describe(values)}", flush=True)
            if step in snapshots:
                with window.paused():
                    checkpoint.save_snapshot(engine, world, run.folder, step)
            if run.validate and (last or (config.eval_every and step % config.eval_every == 0)):
                with window.paused():
                    log.write(step, {"val": run.validate(engine, run.masking.at(progress), policy.bit_weights)})
            # The checkpoint comes last: what a step leaves behind is there before a resume would skip that step.
            if checkpoint_due or stopping:
                with window.paused():
                    state = {"counters": log.state(), "policy": policy.state(), "world_size": world.size}
                    checkpoint.save_checkpoint(engine, world, run.folder, step, state, config.keep_checkpoints)
            if stopping and not last:
                return False
    return True


def find_resume(config: RunConfig, run: Path) -> Path | str | None:
    """The checkpoint to start from, None to start afresh, or "complete". ValueError if that would mix two runs."""
    if config.resume not in ("auto", "never"):
        folder, step = checkpoint.parse_run(config.resume)
        found = dict(checkpoint.checkpoints(folder))
        if not found or (step is not None and step not in found):
            raise ValueError(f"--resume {config.resume}: no such checkpoint; there are {sorted(found) or 'none'}")
        if run.resolve() != folder.resolve() and (run / "config.json").exists():
            raise ValueError(f"--out {run} already holds a run; choose another folder")
        step = max(found) if step is None else step
        if step >= config.steps:
            raise ValueError(f"--resume {config.resume}: step {step} leaves nothing of --steps {config.steps}")
        return found[step]
    if not (run / "config.json").is_file():
        if run.exists() and not (run.is_dir() and not any(run.iterdir())):
            raise ValueError(f"--out {run} exists and is not a run; choose another folder")
        return None
    if config.resume == "never":
        raise ValueError(f"--out {run} already holds a run and --resume is never; remove it or choose another folder")
    if differences := config.differences(json.loads((run / "config.json").read_text())):
        raise ValueError(f"--out {run} holds a run of other settings ({'; '.join(differences)}); choose another --out")
    if (run / "model.safetensors").is_file():
        return "complete"
    found = checkpoint.checkpoints(run)
    return found[-1][1] if found else None


def make_model_config(config: RunConfig, shards: Shards) -> ModelConfig:
    """The preset with the vocabulary of the shards."""
    model_config = dataclasses.replace(
        PRESETS[config.preset], vocab_size=shards.manifest.tokenizer.vocab_size, objectives=config.objectives
    )
    if shards.manifest.max_tokens > model_config.max_positions:
        raise ValueError(
            f"the shards hold captions of up to {shards.manifest.max_tokens} tokens, --preset {config.preset} has "
            f"{model_config.max_positions} positions; build them with a smaller --max-tokens"
        )
    return model_config


def make_masking(config: RunConfig, shards: Shards) -> Masking:
    """What the command line masks of these shards."""
    manifest, tokenizer = shards.manifest, shards.manifest.tokenizer
    vocabulary = {
        "mask_id": tokenizer.mask_id, "vocab_size": tokenizer.vocab_size, "never_drawn": tokenizer.reserved_ids
    }
    return parse_mask(
        config.mask, amount=config.mask_amount, rate=config.mask_rate, unit=config.mask_unit, replace=config.replace,
        when_empty=config.when_empty, tokenizer=vocabulary, bits_computed=manifest.bits_computed,
        scores=manifest.scores, max_tokens=manifest.max_tokens,
    )  # fmt: skip


def make_collator(
    config: RunConfig, world: World, max_images: int, view: View, shards: Shards, answers: tuple[str, ...]
) -> Collator:
    num_scores = len(shards.manifest.scores)
    return Collator(view, num_scores, max_images, config.decode, world.device, config.on_bad_sample, answers)


def make_validation(
    config: RunConfig, world: World, view: View, start: Start, make_collate: Callable, micro_batch_size: int
) -> Callable | None:
    """A function of engine, plan and weights: losses and accuracies on --val, with the image and with a blank one."""
    if config.val is None:
        return None
    val = Shards((config.val,), config.cache)
    if val.manifest.tokenizer.sha256 != start.data[0].manifest.tokenizer.sha256:
        raise ValueError(f"--val {config.val} has another tokenizer; build it with that of {config.data[0]}")
    if config.learns_answers and "answers" not in val.manifest.counts:
        raise ValueError(f"--val {config.val} holds captions, not questions as {config.data[0]} does")
    if len(val) < world.size:
        raise ValueError(f"--val {config.val}: {len(val)} images are fewer than {world.size} ranks")
    whole = dataclasses.replace(
        view, captions_per_image=None, blank_rate=0.0, crop_scale=(1.0, 1.0), maskings_per_caption=1
    )
    collate = make_collate(whole, val, start.model_config.answers)

    @torch.no_grad()
    def validate(engine, plan, bit_weights) -> dict:
        average_batch_norm(engine.module, world)
        engine.eval()
        sums = {name: (metrics.LossSums(world.device), metrics.MatchSums(world.device)) for name in ("image", "blank")}
        for batch in evaluation_batches(val, collate, micro_batch_size, config.eval_images, world.rank, world.size):
            batch = batch.to(world.device, config.torch_dtype)
            masked = mask_batch(batch, plan, 0, bit_weights)
            for shown, (masked_lm, matches) in zip((batch, batch.with_blank_images()), sums.values(), strict=True):
                losses = all_losses(engine, MicroBatch((shown,), masked, None))
                masked_lm.add(losses.mlm)
                matches.add(losses)
        engine.train()
        return {name: masked_lm.reduce(world) | matches.reduce(world) for name, (masked_lm, matches) in sums.items()}

    return validate


def warm_up(run: Run) -> None:
    """One step with a gradient of zero, so that DeepSpeed makes its optimizer state; see checkpoint.restore."""
    micro_batch_size, accumulation = run.config.micro_batches(run.world.size)
    pairs = zip(run.data, run.collates, strict=True)
    batches = [collate(shards.read(range(micro_batch_size)), epoch=0) for shards, collate in pairs]
    set_learning_rate(run.engine, 0.0)
    for _ in range(accumulation):
        losses = all_losses(run.engine, run.prepare(batches, 0.0))
        run.engine.backward(losses.scaled_sum(torch.ones(4, device=run.engine.device), 0.0))
        run.engine.step()


def check_same_model(source: Path, model_config: ModelConfig) -> None:
    saved = ModelConfig.load(source.parent.parent / "model_config.json")
    if saved.answers != model_config.answers:
        raise ValueError(f"{source} has the answers of other training data; fine-tune again, into another --out")
    for key, value in dataclasses.asdict(model_config).items():
        if (there := getattr(saved, key)) != value:
            raise ValueError(f"{source} holds a model of preset {saved.preset}: {key} {there} there, {value} here")


def prepare_run_folder(run: Path, config: RunConfig, start: Start, world: World) -> None:
    """What makes a folder a run, config.json last; everything that could refuse the run has been checked."""
    world.barrier()  # a rank that is late may not take what is written here for a run of someone else
    if world.is_main:
        run.mkdir(parents=True, exist_ok=True)
        (run / "model.safetensors").unlink(missing_ok=True)  # of a finished run that now goes on
        start.model_config.save(run / "model_config.json")
        shutil.copytree(start.data[0].local_folders[0] / "tokenizer", run / "tokenizer", dirs_exist_ok=True)
        (run / "commit.txt").write_text(git_commit() + "\n")
        config.save(run / "config.json")
    world.barrier()


def describe_start(
    config: RunConfig, world: World, data: tuple[Shards, ...], model: PosMaskModel, start_step: int
) -> str:
    num_parameters = sum(checkpoint.num_elements(p) for p in model.parameters())
    num_images = sum(map(len, data))
    text = (
        f"{config.title}: preset {config.preset} ({num_parameters / 1e6:.1f} M parameters), {config.dtype}, "
        f"ZeRO {config.zero_stage}, {world.size} rank{'s' if world.size > 1 else ''} on {world.device.type}, "
        f"{num_images:,} images, steps {start_step + 1} to {config.steps} of {config.batch_size} -> {config.out}"
    )
    # Decoding takes as long as the stored image is large: of 256 px for 64, half as long as the step of a CPU.
    stored = [manifest.image for shards in data for manifest in shards.manifests]
    short_side = max(min(x["size"], x["mean_width"], x["mean_height"]) for x in stored)
    seen = model.config.image_size
    if world.device.type == "cpu" and short_side > 2 * seen:
        text += f"\nimages are stored at {short_side:.0f} px and seen at {seen}: shards built with --image-size "
        text += f"{seen * 3 // 2} load in a fraction of the time"
    return text


def say(world: World, text: str) -> None:
    if world.is_main:
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
