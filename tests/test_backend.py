"""The choice of a backend: what the device decides, what is refused, what falls back aloud."""

import importlib.util
import warnings

import pytest
import torch

from posmask.kernels import backend
from posmask.kernels.backend import padded_rows, resolve

CPU = torch.empty(1)


class OnGPU:
    device = torch.device("cuda", 0)


@pytest.fixture
def without_triton(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    backend._say_fallback.cache_clear()


@pytest.mark.parametrize("interprets", [False, True])
def test_auto_follows_the_device(monkeypatch, interprets):
    monkeypatch.setattr(backend, "_interprets", lambda: interprets)
    assert resolve("auto", CPU, "op") == "torch"
    assert resolve("auto", torch.empty(1, device="meta"), "op") == "torch"
    assert resolve("auto", OnGPU, "op") == "triton"


def test_an_explicit_choice_is_kept_or_refused(monkeypatch):
    assert resolve("torch", OnGPU, "op") == resolve("torch", CPU, "op") == "torch"
    assert resolve("triton", OnGPU, "op") == "triton"
    monkeypatch.setattr(backend, "_interprets", lambda: True)
    assert resolve("triton", CPU, "op") == "triton"
    monkeypatch.setattr(backend, "_interprets", lambda: False)
    with pytest.raises(ValueError, match=r"op: backend 'triton' needs GPU tensors, not cpu; use"):
        resolve("triton", CPU, "op")
    with pytest.raises(ValueError, match=r"op has no backend 'cuda'; choose one of auto, triton, torch"):
        resolve("cuda", CPU, "op")


def test_without_triton(without_triton):
    with pytest.raises(ValueError, match=r"op: backend 'triton' needs the package triton; pip install"):
        resolve("triton", OnGPU, "op")
    with pytest.warns(RuntimeWarning, match="op runs on torch, slower: the package triton is not installed"):
        assert resolve("auto", OnGPU, "op") == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve("auto", OnGPU, "op") == "torch", "said once"


@pytest.mark.parametrize(("num_rows", "in_bf16"), [(0, 0), (1, 8), (209, 216), (512, 512), (513, 544)])
def test_rows_are_padded_in_bf16_on_a_cpu_alone(num_rows, in_bf16):
    assert padded_rows(num_rows, CPU.bfloat16()) == in_bf16
    for like in (CPU, CPU.half(), torch.empty(1, dtype=torch.bfloat16, device="meta")):
        assert padded_rows(num_rows, like) == num_rows
