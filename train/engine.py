"""Processes, device and DeepSpeed: everything between the training loop and the libraries that run it."""

from __future__ import annotations

import ctypes
import json
import logging
import math
import os
import shutil
import signal
import socket
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from posmask.train.config import RunConfig
from posmask.train.decode import num_cores
from posmask.train.model import PosMaskModel

# Read when deepspeed is imported; without it, it warns that it found no GPU.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

KEPT_KERNELS = 100_000  # of oneDNN; 60 steps of the laptop preset make some thousands, in less than 100 MB
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sums `values` over all ranks, in place and on the device."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def start_processes() -> World:
    """Joins the process group of `deepspeed`, `torchrun` or plain `python`, and picks device and threads."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    # The deepspeed launcher says LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE.
    os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])

    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    else:
        # The shared-memory all-reduce is compiled on first use (and fails where there is no compiler); gloo is ready.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        tune_cpu()
        device = torch.device("cpu")
    if not dist.is_initialized():
        deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
    return World(dist.get_rank(), local_rank, dist.get_world_size(), device)


def tune_cpu() -> None:
    """Threads, memory and compiled kernels of a process that trains on a CPU; before its first convolution.

    Launchers set one OpenMP thread a rank; the ranks share the cores instead. And glibc is to keep what a step frees
    for the next one. Else it hands large blocks back to the kernel, which gives them out again page by page and zeroed:
    26,000 page faults and a tenth of each step of the laptop preset. Other C libraries have no `mallopt`. oneDNN
    compiles each operation anew for each number of tokens, which differs from batch to batch, and by default keeps
    1,024 of them: fewer than an epoch has, so that a step compiled 3 to 5 % of its time.
    """
    torch.set_num_threads(num_cores())
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KEPT_KERNELS))
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        for parameter, limit_bytes in (M_MMAP_THRESHOLD, 2**30), (M_TRIM_THRESHOLD, 2**31 - 1):
            mallopt(parameter, limit_bytes)


# What --batch-size, --micro-batch-size, --dtype and --zero-stage (the key "stage" of "zero_optimization") stand for.
DECIDED_BY_FLAGS = (
    "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "optimizer", "bf16", "fp16",
    "stage",
)  # fmt: skip


def deepspeed_settings(config: RunConfig, micro_batch_size: int, accumulation: int) -> dict:
    """The DeepSpeed configuration of a run, with --deepspeed_config merged over it.

    Defaults that differ between DeepSpeed releases (clipping, overflow checks) are written out.
    """
    settings = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.grad_clip,
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    if config.dtype == "bf16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": False}
        if config.zero_stage in (1, 2):  # accumulates micro-batches in fp32; also the faster optimizer path of ZeRO-1
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
    if config.deepspeed_config:
        path = Path(config.deepspeed_config)
        if not path.is_file():
            raise ValueError(f"--deepspeed_config {path}: no such file")
        try:
            overrides = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"--deepspeed_config {path}: not JSON ({error})") from None
        if not isinstance(overrides, dict):
            raise ValueError(f"--deepspeed_config {path}: must hold a JSON object")
        for key in DECIDED_BY_FLAGS:
            value = overrides.get("zero_optimization") if key == "stage" else overrides
            if isinstance(value, dict) and key in value:
                raise ValueError(f"--deepspeed_config {path} sets {key!r}, which posmask's own flags decide: remove it")
        settings = _merge(settings, overrides)
    return settings


def _merge(base: dict, over: dict) -> dict:
    merged = dict(base)
    for key, value in over.items():
        merged[key] = _merge(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return merged


def make_engine(model: PosMaskModel, config: RunConfig, settings: dict, device: torch.device):
    """Wraps `model` in a DeepSpeed engine with AdamW; no decay on biases, norms and one-dimensional parameters."""
    import deepspeed

    if config.compile:
        # What gains from it: norms and ReLUs between convolutions. Text has another number of tokens in every step.
        if device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            raise ValueError("--compile: there is no C++ compiler, without which torch compiles nothing for a CPU")
        model.image.compile()
    head = set() if model.vqa is None else set(model.vqa.parameters())
    groups = [
        {"params": params, "weight_decay": weight_decay, "lr_scale": lr_scale}
        for in_head, lr_scale in ((False, 1.0), (True, config.head_lr_scale))
        for is_decayed, weight_decay in ((True, config.weight_decay), (False, 0.0))
        if (params := [p for p in model.parameters() if (p in head) == in_head and (p.ndim > 1) == is_decayed])
    ]
    # The loop sets the learning rate. A client optimizer: an "optimizer" section would compile FusedAdam.
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-6, fused=True)
    if "bf16" not in settings and settings["zero_optimization"]["stage"] == 0:
        # Here alone DeepSpeed steps our optimizer itself, and drops the gradient norm; it reads this attribute.
        settings = settings | {"gradient_clipping": 0.0}
        optimizer.register_step_pre_hook(lambda *_: _clip(optimizer, config.grad_clip))
    engine, *_ = deepspeed.initialize(model=model.to(device), optimizer=optimizer, config=settings)
    # ZeRO 0 in bf16 makes the optimizer's state with a step of its own, which would count in the bias correction.
    for entry in getattr(engine.optimizer, "optimizer", engine.optimizer).state.values():
        entry["step"].zero_()
    return engine


def _clip(optimizer: torch.optim.Optimizer, grad_clip: float) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    optimizer._global_grad_norm = torch.nn.utils.clip_grad_norm_(params, grad_clip or math.inf)


def set_learning_rate(engine, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def average_batch_norm(model: torch.nn.Module, world: World) -> None:
    """Running statistics are kept per rank; evaluation and checkpoints use their mean over the ranks."""
    if world.size > 1:
        for _name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                world.sum(buffer).div_(world.size)


def gradient_norm(engine) -> float | None:
    """Global norm of the last step's gradient before clipping; None where DeepSpeed does not compute it."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


class StopSignal:
    """SIGTERM asks for a checkpoint and a clean exit; the loop reads `requested` where it synchronises anyway."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopSignal:
        self.previous = signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(self, *exception) -> None:
        signal.signal(signal.SIGTERM, self.previous)

    def _request(self, *_) -> None:
        self.requested = True
