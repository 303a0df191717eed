"""Which implementation of an operation runs, decided at the call by the device of its tensors; what a CPU can do."""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch")


def resolve(backend: str, tensor: Tensor, op: str) -> str:
    """The backend, "triton" or "torch", that `op` runs on for arguments on the device of `tensor`.

    "auto" takes Triton on a GPU and torch elsewhere, torch also on a GPU without Triton, which it says once. "triton"
    and "torch" are kept or refused with a ValueError, never replaced. Triton's interpreter (TRITON_INTERPRET=1, for
    tests) takes tensors on the CPU.
    """
    if backend not in BACKENDS:
        raise ValueError(f"{op} has no backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    if backend == "torch" or (backend == "auto" and tensor.device.type != "cuda"):
        return "torch"
    if importlib.util.find_spec("triton") is None:
        if backend == "triton":
            raise ValueError(f"{op}: backend 'triton' needs the package triton; pip install triton, or use 'torch'")
        _say_fallback(op)
        return "torch"
    if tensor.device.type != "cuda" and not _interprets():
        raise ValueError(f"{op}: backend 'triton' needs GPU tensors, not {tensor.device}; use 'auto' or 'torch'")
    return "triton"


def _interprets() -> bool:
    from triton import knobs

    return knobs.runtime.interpret


@functools.cache
def _say_fallback(op: str) -> None:
    warnings.warn(f"{op} runs on torch, slower: the package triton is not installed", RuntimeWarning, stacklevel=4)


def cpu_capabilities() -> dict[str, object]:
    """What torch knows of this CPU, by name: whether it has instructions ("avx512_bf16"), and more.

    Empty on torch 2.11, which does not tell.
    """
    return getattr(torch.cpu, "get_capabilities", dict)()


def has_bf16_instructions() -> bool:
    """Whether this CPU multiplies bf16 itself (avx512_bf16, which AMX implies). Where it does not, libraries convert to
    fp32 and back."""
    return bool(cpu_capabilities().get("avx512_bf16"))


def padded_rows(num_rows: int, like: Tensor) -> int:
    """How many rows a matrix of such numbers is to have: `num_rows`, or in bf16 on a CPU a multiple of 8 or 32.

    oneDNN compiles each product anew for each number of rows, with AMX for 4 ms, and how many tokens there are, and how
    many of them masked, differs from batch to batch. Up to 512 rows 8 leave few enough numbers, and cost less than 32.
    """
    if like.device.type != "cpu" or like.dtype != torch.bfloat16:
        return num_rows
    multiple = 8 if num_rows <= 512 else 32
    return -(-num_rows // multiple) * multiple
