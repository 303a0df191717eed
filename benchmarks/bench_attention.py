"""Attention of packed captions, forward and backward: ours against flash attention over lengths and padded rectangles.

    python benchmarks/bench_attention.py

512 captions of COCO's lengths (64 on a CPU), each over itself and over the 49 tokens of its image, with the heads of
`base`. The peers are torch's varlen_attn (on a GPU) and scaled_dot_product_attention with a mask, whose padding to the
longest caption is done beforehand. No speed is printed unless outputs and gradients agree.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from bench_packing import make_text
from timing import graphed, interleave, largest_error, quantiles, ratio, write_result
from torch import Tensor

from posmask.train.attention import Ragged
from posmask.train.config import PRESETS
from posmask.train.engine import tune_cpu

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10: its row is left out
    varlen_attn = None

LARGEST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 0.02}


def padded(query: Tensor, key: Tensor, value: Tensor, num_heads: int, is_key: Tensor) -> Tensor:
    """(C, L, D) x (C, K, D) x (C, K, D) → (C, L, D); is_key (C, K)."""
    heads = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (query, key, value))
    context = F.scaled_dot_product_attention(*heads, attn_mask=is_key[:, None, None, :])
    return context.transpose(1, 2).flatten(2)


def measure(what: str, num_captions: int, repeats: int, device: torch.device, dtype: torch.dtype) -> dict:
    config = dataclasses.replace(PRESETS["base"], vocab_size=1000)
    text = make_text(config, num_captions, device)
    lengths, generator = text.starts.diff().long(), torch.Generator(device).manual_seed(0)
    caption = torch.repeat_interleave(torch.arange(num_captions, device=device), lengths)
    valid = torch.arange(text.longest, device=device) < lengths[:, None]
    if what == "itself":
        key_starts, most, is_key = text.starts, text.longest, valid
    else:
        most = config.num_image_tokens
        key_starts = torch.arange(num_captions + 1, dtype=torch.int32, device=device) * most
        is_key = torch.ones(num_captions, most, dtype=torch.bool, device=device)
    sizes = len(caption), int(key_starts[-1]), int(key_starts[-1])
    truth = [torch.randn(n, config.width, device=device, generator=generator) for n in sizes]
    weight = torch.randn(sizes[0], config.width, device=device, generator=generator)
    ragged = Ragged(caption, key_starts, text.longest, most, is_sorted=True)

    def pad(x: Tensor, mask: Tensor) -> Tensor:
        out = x.new_zeros(*mask.shape, x.shape[1])
        out[mask] = x
        return out

    def leaves(kind: torch.dtype, masks=(None, None, None)) -> list[Tensor]:
        given = (x.to(kind) for x in truth)
        return [(x if m is None else pad(x, m)).requires_grad_() for x, m in zip(given, masks, strict=True)]

    def varlen(*inputs: Tensor) -> Tensor:
        heads = (x.unflatten(-1, (config.num_heads, -1)) for x in inputs)
        return varlen_attn(*heads, text.starts, key_starts, text.longest, most).flatten(1)

    def step(forward: Callable[..., Tensor], inputs: list[Tensor], weight: Tensor) -> tuple[Tensor, ...]:
        context = forward(*inputs)
        return context, *torch.autograd.grad(context, inputs, weight)

    def ours(kind: torch.dtype, backend: str = "auto") -> Callable[[], tuple[Tensor, ...]]:
        forward = partial(ragged, num_heads=config.num_heads, backend=backend)
        return partial(step, forward, leaves(kind), weight.to(kind))

    peer = partial(padded, num_heads=config.num_heads, is_key=is_key)
    calls = {
        "ours": ours(dtype),
        "padded, sdpa": partial(step, peer, leaves(dtype, (valid, is_key, is_key)), pad(weight, valid).to(dtype)),
    }
    if device.type == "cuda" and varlen_attn is not None:
        calls["varlen_attn"] = partial(step, varlen, leaves(dtype), weight.to(dtype))
    true = [x.detach() for x in ours(torch.float32, "torch")()]
    errors = {}
    for name, call in calls.items():
        found = [x.detach() for x in call()]
        if name.startswith("padded"):
            found = [x[mask] for x, mask in zip(found, (valid, valid, is_key, is_key), strict=True)]
        errors[name] = largest_error(zip(found, true, strict=True))
        print(f"{what}: {name}: largest relative error {errors[name]:.1e}", file=sys.stderr)
    if not max(errors.values()) < LARGEST_ERROR[dtype]:
        raise SystemExit(f"{what}: not equal; no speed is measured")
    samples = interleave(
        {name: graphed(call) if device.type == "cuda" else call for name, call in calls.items()}, repeats
    )
    return {
        "what": what, "dtype": str(dtype).removeprefix("torch."), "captions": num_captions, "queries": sizes[0],
        "keys": sizes[1], "longest": text.longest, "heads": config.num_heads, "largest_relative_errors": errors,
        "times": {name: quantiles(values) for name, values in samples.items()},
        **{f"ratio_{name}": ratio(samples[name], samples["ours"]) for name in list(calls)[1:]},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cpu":
        tune_cpu()  # as a run does; both sides gain
    size, dtype = (512, torch.bfloat16) if device.type == "cuda" else (64, torch.float32)
    rows = [measure(what, size, args.repeats, device, dtype) for what in ("itself", "its image")]
    write_result(f"attention_{device.type}", rows)


if __name__ == "__main__":
    main()
