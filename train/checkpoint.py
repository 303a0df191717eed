"""Checkpoints, snapshots and the exported model.

A checkpoint is free of the world it was written in: fp32 master weights and Adam moments by parameter name, gathered
from whatever ZeRO stage and number of ranks held them. It appears under its name only when it is complete.

    checkpoints/step-0001000/   weights.safetensors  optimizer.safetensors  state.json
    snapshots/step-0000100.safetensors               weights alone, for evaluation; never deleted
    model.safetensors  model_config.json  tokenizer/  README.md          the finished model
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from posmask.train.config import ModelConfig
from posmask.train.engine import World, average_batch_norm
from posmask.train.model import PosMaskModel

MOMENTS = ("exp_avg", "exp_avg_sq")


def full_weights(engine, world: World) -> dict[str, Tensor]:
    """fp32 parameters and BatchNorm statistics by name, on the CPU of the main rank; {} elsewhere. A collective."""
    average_batch_norm(engine.module, world)
    weights = {}
    for name, param in engine.module.named_parameters():
        value = _get(engine, param, None)
        if world.is_main:
            weights[name] = value.detach().to("cpu", torch.float32, copy=True).contiguous()
    if world.is_main:
        weights |= {name: buffer.detach().cpu().clone() for name, buffer in engine.module.named_buffers()}
    return weights


def save_checkpoint(engine, world: World, run: Path, step: int, state: dict, keep: int) -> None:
    """Writes checkpoints/step-…; `state` is JSON of the caller's. Then deletes all but the newest `keep`."""
    weights = full_weights(engine, world)
    moments = {}
    _link_moments(engine)
    for name, param in engine.module.named_parameters():
        for key in MOMENTS:
            value = _get(engine, param, key)
            if world.is_main:
                moments[f"{name}.{key}"] = value.detach().to("cpu", torch.float32, copy=True).contiguous()
    if world.is_main:
        final = run / "checkpoints" / f"step-{step:07d}"
        partial = final.with_name(final.name + ".tmp")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(weights, partial / "weights.safetensors")
        save_file(moments, partial / "optimizer.safetensors")
        (partial / "state.json").write_text(json.dumps({"step": step, **state}, indent=2) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for _, old in checkpoints(run)[:-keep]:
            shutil.rmtree(old)
    world.barrier()


def save_snapshot(engine, world: World, run: Path, step: int) -> None:
    """Weights alone, in snapshots/step-….safetensors."""
    weights = full_weights(engine, world)
    if world.is_main:
        path = run / "snapshots" / f"step-{step:07d}.safetensors"
        path.parent.mkdir(exist_ok=True)
        _save_atomically(weights, path)
    world.barrier()


def export(engine, world: World, run: Path) -> None:
    """model.safetensors: fp32 weights of the finished model."""
    weights = full_weights(engine, world)
    if world.is_main:
        _save_atomically(weights, run / "model.safetensors")
    world.barrier()


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints of a run as (step, folder), oldest first."""
    return sorted((int(path.name[5:]), path) for path in run.glob("checkpoints/step-*") if path.name[5:].isdigit())


def restore(engine, folder: Path, warm_up: Callable[[], None]) -> dict:
    """Loads a checkpoint into an engine of any ZeRO stage and world size; returns its state.json.

    `warm_up` must run one forward, backward and step: DeepSpeed makes and links the optimizer state at the first step,
    and only then can it be set. What that step changes is overwritten here.
    """
    state = json.loads((folder / "state.json").read_text())
    weights = load_file(folder / "weights.safetensors")
    moments = load_file(folder / "optimizer.safetensors")
    warm_up()
    _link_moments(engine)
    expected = dict(engine.module.named_parameters())
    check_names(folder, {name: param_shape(p) for name, p in expected.items()}, weights, engine.module)
    for name, param in expected.items():
        _set(engine, param, None, weights[name])
        for key in MOMENTS:
            _set(engine, param, key, moments[f"{name}.{key}"])
    if persistent := getattr(engine.optimizer, "persistent_parameters", None):
        # ZeRO-3 keeps small parameters whole between steps: gather them again from the shares.
        persistent[0].partition(persistent)
        persistent[0].all_gather(persistent)
    for entry in _adam(engine).state.values():
        entry["step"].fill_(state["step"])
    with torch.no_grad():
        for name, buffer in engine.module.named_buffers():
            buffer.copy_(weights[name])
    return state


def load_weights(folder: Path, step: int | None = None) -> tuple[ModelConfig, dict[str, Tensor], int]:
    """Config, weights and step of RUN or RUN@STEP: the exported model, a snapshot or a checkpoint, whichever there is.

    Raises ValueError naming what the run does hold.
    """
    if not (folder / "model_config.json").is_file():
        raise ValueError(f"{folder}: not a run folder (it has no model_config.json)")
    found = {at: path / "weights.safetensors" for at, path in checkpoints(folder)}
    found |= {int(re.sub(r"\D", "", path.stem)): path for path in folder.glob("snapshots/step-*.safetensors")}
    if (folder / "model.safetensors").is_file():
        last = json.loads((folder / "config.json").read_text())["steps"]
        found[last] = folder / "model.safetensors"
    if not found:
        raise ValueError(f"{folder}: no weights yet; train it first")
    step = max(found) if step is None else step
    if step not in found:
        raise ValueError(f"{folder}@{step}: no weights of that step; there are {', '.join(map(str, sorted(found)))}")
    return ModelConfig.load(folder / "model_config.json"), load_file(found[step]), step


def load_initial_weights(model: PosMaskModel, run: str) -> None:
    """Puts the weights of RUN or RUN@STEP into a new model; heads that the run lacks stay as they are.

    Such are those of other objectives, and an answer head with another vocabulary. Raises ValueError for a run whose
    model differs in more than its heads.
    """
    folder, at = parse_run(run)
    config, weights, _ = load_weights(folder, at)
    heads = [name for name in ("itm", "itc") if name not in set(config.objectives) & set(model.config.objectives)]
    heads += ["vqa"] if config.answers != model.config.answers else []

    def of_heads(values: dict[str, Tensor], kept: bool) -> dict[str, Tensor]:
        return {name: value for name, value in values.items() if (name.split(".")[0] in heads) == kept}

    weights = of_heads(weights, kept=False) | of_heads(model.state_dict(), kept=True)
    check_names(folder, {name: tuple(p.shape) for name, p in model.named_parameters()}, weights, model)
    model.load_state_dict(weights)


def load_model(run: str, device: torch.device) -> tuple[PosMaskModel, int]:
    """The model of RUN or RUN@STEP in evaluation mode and fp32, and its step."""
    folder, at = parse_run(run)
    config, weights, step = load_weights(folder, at)
    model = PosMaskModel(config)
    check_names(folder, {name: tuple(p.shape) for name, p in model.named_parameters()}, weights, model)
    model.load_state_dict(weights)
    return model.to(device).eval(), step


def parse_run(run: str) -> tuple[Path, int | None]:
    """"RUN" or "RUN@STEP" as folder and step. Raises ValueError if there is no such folder."""
    folder, step = (match.group(1), int(match.group(2))) if (match := re.fullmatch(r"(.+)@(\d+)", run)) else (run, None)
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such run folder")
    return Path(folder), step


def check_names(where: Path, shapes: dict[str, tuple], weights: dict[str, Tensor], model: nn.Module) -> None:
    """Raises ValueError if `weights` belong to another model."""
    wanted = shapes | {name: tuple(buffer.shape) for name, buffer in model.named_buffers()}
    saved = {name: tuple(value.shape) for name, value in weights.items()}
    if wanted != saved:
        first = sorted(name for name in wanted.keys() | saved.keys() if wanted.get(name) != saved.get(name))[0]
        raise ValueError(
            f"{where} holds another model: {first} is {saved.get(first, 'absent')} there and "
            f"{wanted.get(first, 'absent')} here; use the --preset and the tokenizer it was trained with"
        )


def param_shape(param: nn.Parameter) -> tuple[int, ...]:
    """The full shape; ZeRO-3 leaves an empty parameter behind."""
    return tuple(getattr(param, "ds_shape", param.shape))


def num_elements(param: nn.Parameter) -> int:
    return math.prod(param_shape(param))


def _get(engine, param: nn.Parameter, moment: str | None) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if engine.zero_optimization_stage() == 0:
        master = _masters(engine)[param]
        return master if moment is None else _adam(engine).state[master][moment]
    value = safe_get_full_fp32_param(param) if moment is None else safe_get_full_optimizer_state(param, moment)
    assert value is not None, "DeepSpeed has not linked the optimizer state yet"
    return value.view(param_shape(param))


def _set(engine, param: nn.Parameter, moment: str | None, value: Tensor) -> None:
    from deepspeed import utils

    value = value.to(engine.device)
    with torch.no_grad():
        if engine.zero_optimization_stage() == 0:
            master = _masters(engine)[param]
            (master if moment is None else _adam(engine).state[master][moment]).copy_(value)
            param.copy_(master)
        elif hasattr(param, "ds_id"):  # ZeRO-3: this rank's share of the flat parameter, padded to equal shares
            share = param.ds_tensor.numel()
            flat = torch.zeros(share * dist.get_world_size(), device=value.device)
            flat[: value.numel()] = value.flatten()
            mine = flat.narrow(0, share * dist.get_rank(), share)
            if moment is None:
                utils.safe_set_local_fp32_param(param, mine)
                param.ds_tensor.data.copy_(mine.view_as(param.ds_tensor))
            else:
                utils.safe_set_local_optimizer_state(param, mine, moment)
        elif moment is None:
            utils.safe_set_full_fp32_param(param, value)
            param.copy_(value)  # what the forward computes with; without it training diverges
        else:
            utils.safe_set_full_optimizer_state(param, value, moment)


def _link_moments(engine) -> None:
    """DeepSpeed 0.19.8 (ZeRO 1, 2) links the moments after the step of its first parameter group: link them all."""
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _adam(engine) -> torch.optim.Optimizer:
    """Our own optimizer, which DeepSpeed wraps in all cases but ZeRO 0 in fp32."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _masters(engine) -> dict[nn.Parameter, Tensor]:
    """ZeRO 0: the fp32 master of each parameter; in fp32, the parameter itself."""
    if not hasattr(engine.optimizer, "fp32_groups"):
        return {param: param for param in engine.module.parameters()}
    pairs = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
    return {low: high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}


def _save_atomically(weights: dict[str, Tensor], path: Path) -> None:
    partial = path.with_name(path.name + ".tmp")
    save_file(weights, partial)
    partial.replace(path)
