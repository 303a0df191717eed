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
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

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
from posmask.train.objectives import Pairs, all_losses, counts, mask_batch, masked_lm, pair_batch
from posmask.train.policy import POLICIES
from posmask.train.remote import Unavailable
from posmask.train.weights import load_image_weights, load_text_weights


def main(argv: list[str] | None = None) -> int:
    """Runs the command line `argv`; 0 when done, 2 on wrong usage or input."""
    try:
        config = parse_args(argv, torch.cuda.is_available())
        world = start_processes()
        with StopSignal() as stop:
            return pretrain(config, world, stop)
    except ValueError as error:
        # What is wrong with the settings is wrong on every rank: one of them says it.
        if os.environ.get("RANK", "0") == "0" or isinstance(error, (BadSample, Unavailable)):
            print(f"pretrain: {error}", file=sys.stderr)
        return 2


def pretrain(config: RunConfig, world: World, stop: StopSignal) -> int:
    """One run: prepare, train, export. Raises ValueError for what the user can mend, before anything is written."""
    run = Path(config.out)
    if config.wandb and find_spec("wandb") is None:
        raise ValueError("--wandb: the package is not installed; pip install 'posmask[wandb]'")
    source = find_resume(config, run)
    if source == "complete":
        say(world, f"{run} is already complete ({config.steps} steps); choose another --out to train it again")
        return 0
    micro_batch_size, accumulation = config.micro_batches(world.size)
    settings = deepspeed_settings(config, micro_batch_size, accumulation)
    shards = Shards(config.data, config.cache)
    if len(shards) < config.batch_size:
        raise ValueError(f"--data has {len(shards)} images, fewer than --batch-size {config.batch_size}")
    masking = make_masking(config, shards)
    model_config = make_model_config(config, shards)
    torch.manual_seed(config.seed)  # the initial weights; everything else is drawn from counters
    model = PosMaskModel(model_config)
    if config.text_weights:
        load_text_weights(model, config.text_weights)
    if config.image_weights:
        load_image_weights(model, config.image_weights)
    if source is not None:
        check_same_model(source, model_config)
    view = View(
        config.seed, model_config.image_size, model_config.image_mean, model_config.image_std,
        config.captions_per_image, config.blank_rate, config.crop_scale, config.maskings_per_caption,
    )  # fmt: skip
    validate = make_validation(config, world, view, shards, micro_batch_size)
    num_scores = len(shards.manifest.scores)
    collate = Collator(view, num_scores, micro_batch_size, config.decode, world.device, config.on_bad_sample)
    prepare_run_folder(run, config, model_config, shards, world)

    engine = make_engine(model, config, settings, world.device)
    policy = POLICIES[masking.policy](world.device)
    state = {"step": 0, "counters": {}, "policy": policy.state()}
    if source is not None:
        warm = partial(warm_up, engine, config, shards, collate, masking.at(0.0), policy.bit_weights)
        state = checkpoint.restore(engine, source, warm)
        policy.restore(state.get("policy", {}))  # checkpoints from before there were policies had none to keep
    say(world, describe_start(config, world, shards, model, state["step"]))
    loader = Loader(
        shards, collate, seed=config.seed, batch_size=config.batch_size, micro_batch_size=micro_batch_size,
        rank=world.rank, world_size=world.size, start_step=state["step"], num_steps=config.steps,
    )  # fmt: skip
    log = metrics.MetricsLog(run, world, state["counters"], state["step"], config.wandb)
    try:
        finished = train(
            config, world, engine, loader, masking, policy, accumulation, log, validate, run, state["step"], stop
        )
    finally:
        loader.close()
        log.close()
    if not finished:
        say(world, f"stopped by SIGTERM; the same command continues {run}")
        return 0
    checkpoint.export(engine, world, run)
    if world.is_main:
        write_card(run, config, shards)
    say(world, f"{run}: done. Next: python eval/run.py probe --checkpoint {run}")
    return 0


def train(
    config, world, engine, loader, masking, policy, accumulation, log, validate, run, start_step, stop
) -> bool:
    """The loop over steps start_step + 1 … config.steps; false if SIGTERM ended it early."""
    batches = iter(loader)
    dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
    window = metrics.Window(world)
    snapshots = set(snapshot_steps(config.steps, config.snapshots))
    stopping = False
    with metrics.progress_bar(world.is_main and sys.stderr.isatty()) as bar:
        task = bar.add_task(config.mask, total=config.steps, completed=start_step, line="")
        for step in range(start_step + 1, config.steps + 1):
            with window.waiting():
                micro = [next(batches).to(world.device, dtype) for _ in range(accumulation)]

            # All micro-batches are masked first, so that each is scaled by the count of the whole step.
            plan = masking.at((step - 1) / config.steps)
            masked = [mask_batch(batch, plan, config.seed, policy.bit_weights) for batch in micro]
            paired = [make_pairs(batch, config, engine) for batch in micro]
            divisors = world.sum(counts(masked, paired)).clamp_(min=1)
            set_learning_rate(engine, learning_rate(config, step - 1))
            of_step = []
            for batch, mask, pairs in zip(micro, masked, paired, strict=True):
                losses = all_losses(engine, batch, mask, pairs, policy.wants_reward)
                # DeepSpeed averages over ranks and accumulation steps; ours are sums over the whole step.
                engine.backward(losses.scaled_sum(divisors, world.size * accumulation))
                engine.step()
                window.add(batch, mask, losses)
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
                    checkpoint.save_snapshot(engine, world, run, step)
            if validate and (last or (config.eval_every and step % config.eval_every == 0)):
                with window.paused():
                    log.write(step, {"val": validate(engine, plan, policy.bit_weights)})
            # The checkpoint comes last: what a step leaves behind is there before a resume would skip that step.
            if checkpoint_due or stopping:
                with window.paused():
                    state = {"counters": log.state(), "policy": policy.state(), "world_size": world.size}
                    checkpoint.save_checkpoint(engine, world, run, step, state, config.keep_checkpoints)
            if stopping and not last:
                return False
    return True


def make_pairs(batch: Batch, config: RunConfig, engine) -> Pairs | None:
    """What itm and itc learn from in this batch; None without them."""
    if set(config.objectives) <= {"mlm"}:
        return None
    return pair_batch(batch, engine.module.config.vocab_size, config.seed)


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


def make_validation(config, world, view, shards, micro_batch_size) -> Callable | None:
    """A function of engine, plan and weights: loss and accuracy per part of speech on --val, with and without image."""
    if config.val is None:
        return None
    val = Shards((config.val,), config.cache)
    if val.manifest.tokenizer.sha256 != shards.manifest.tokenizer.sha256:
        raise ValueError(f"--val {config.val} has another tokenizer; build it with that of {config.data[0]}")
    if len(val) < world.size:
        raise ValueError(f"--val {config.val}: {len(val)} images are fewer than {world.size} ranks")
    whole = dataclasses.replace(
        view, captions_per_image=None, blank_rate=0.0, crop_scale=(1.0, 1.0), maskings_per_caption=1
    )
    num_scores = len(val.manifest.scores)
    collate = Collator(whole, num_scores, micro_batch_size, config.decode, world.device, config.on_bad_sample)

    @torch.no_grad()
    def validate(engine, plan, bit_weights) -> dict:
        average_batch_norm(engine.module, world)
        engine.eval()
        sums = {"image": metrics.LossSums(world.device), "blank": metrics.LossSums(world.device)}
        for batch in evaluation_batches(val, collate, micro_batch_size, config.eval_images, world.rank, world.size):
            batch = batch.to(world.device, config.torch_dtype)
            masked = mask_batch(batch, plan, 0, bit_weights)
            sums["image"].add(masked_lm(engine, batch, masked))
            sums["blank"].add(masked_lm(engine, batch.with_blank_images(), masked))
        engine.train()
        return {name: value.reduce(world) for name, value in sums.items()}

    return validate


def warm_up(engine, config: RunConfig, shards: Shards, collate: Collator, plan, bit_weights) -> None:
    """One step with a gradient of zero, so that DeepSpeed makes its optimizer state; see checkpoint.restore."""
    micro_batch_size, accumulation = config.micro_batches(engine.dp_world_size)
    batch = collate(shards.read(range(micro_batch_size)), epoch=0).to(engine.device, config.torch_dtype)
    set_learning_rate(engine, 0.0)
    for _ in range(accumulation):
        masked, pairs = mask_batch(batch, plan, config.seed, bit_weights), make_pairs(batch, config, engine)
        losses = all_losses(engine, batch, masked, pairs)
        engine.backward(losses.scaled_sum(torch.ones(3, device=engine.device), 0.0))
        engine.step()


def check_same_model(source: Path, model_config: ModelConfig) -> None:
    saved = ModelConfig.load(source.parent.parent / "model_config.json")
    for key, value in dataclasses.asdict(model_config).items():
        if (there := getattr(saved, key)) != value:
            raise ValueError(f"{source} holds a model of preset {saved.preset}: {key} {there} there, {value} here")


def prepare_run_folder(run: Path, config: RunConfig, model_config: ModelConfig, shards: Shards, world: World) -> None:
    """What makes a folder a run, config.json last; everything that could refuse the run has been checked."""
    world.barrier()  # a rank that is late may not take what is written here for a run of someone else
    if world.is_main:
        run.mkdir(parents=True, exist_ok=True)
        (run / "model.safetensors").unlink(missing_ok=True)  # of a finished run that now goes on
        model_config.save(run / "model_config.json")
        shutil.copytree(shards.local_folders[0] / "tokenizer", run / "tokenizer", dirs_exist_ok=True)
        (run / "commit.txt").write_text(git_commit() + "\n")
        config.save(run / "config.json")
    world.barrier()


def describe_start(config: RunConfig, world: World, shards: Shards, model: PosMaskModel, start_step: int) -> str:
    num_parameters = sum(checkpoint.num_elements(p) for p in model.parameters())
    return (
        f"--mask {config.mask}: preset {config.preset} ({num_parameters / 1e6:.1f} M parameters), {config.dtype}, "
        f"ZeRO {config.zero_stage}, {world.size} rank{'s' if world.size > 1 else ''} on {world.device.type}, "
        f"{len(shards):,} images, steps {start_step + 1} to {config.steps} of {config.batch_size} -> {config.out}"
    )


def say(world: World, text: str) -> None:
    if world.is_main:
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
