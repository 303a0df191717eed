"""Text and fusion encoders, forward and backward: packed captions against Hugging Face's BERT layers on padded ones.

    python benchmarks/bench_packing.py

150 captions of COCO's lengths (13.5 tokens on average) and as many images (on a GPU 512, and all recorded into CUDA
graphs); a quarter of the tokens is masked, and the gradient comes from these. The peers pad to 30 tokens and to the
longest caption, with both attentions of transformers.
All share their weights, and no speed is printed unless outputs and gradients agree.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch
from peer_model import PeerModel, pad
from timing import graphed, interleave, largest_error, quantiles, ratio, write_result

from posmask.train.config import PRESETS, ModelConfig
from posmask.train.engine import tune_cpu
from posmask.train.model import Packing, PosMaskModel

PADDED_TOKENS = 30
LARGEST_ERROR = 1e-4  # in fp32: gradients are sums of thousands of products in another order
LARGEST_SHARE = 1.2  # in bf16: the error of ours against fp32, as a share of the peers' smallest


def make_text(config: ModelConfig, num_captions: int, device: torch.device) -> SimpleNamespace:
    rng = np.random.default_rng(0)
    lengths = rng.normal(13.5, 3, num_captions).round().clip(7, PADDED_TOKENS).astype(int)
    num_tokens = int(lengths.sum())
    masked = np.sort(rng.choice(num_tokens, num_tokens // 4, replace=False))
    arrays = {
        "tokens": rng.integers(5, config.vocab_size, num_tokens).astype(np.int32),
        "starts": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        "index": masked.astype(np.int32),
        "caption_image": np.arange(num_captions, dtype=np.int32),
    }
    text = SimpleNamespace(**{name: torch.from_numpy(array).to(device) for name, array in arrays.items()})
    text.longest = int(lengths.max())
    text.images = torch.randn(num_captions, config.num_image_tokens, config.width, device=device)
    text.gradient = torch.randn(len(masked), config.width, device=device)
    return text


def ours(model: PosMaskModel, text: SimpleNamespace, sparse: bool) -> torch.Tensor:
    packing = Packing.of(text.starts, text.tokens.numel(), text.longest)
    hidden = model.encode_text(text.tokens, packing)
    args = hidden, packing, text.images, text.caption_image
    bounds = {"max_image_tokens": text.longest, "in_order": True}
    if sparse:
        return model.fuse(*args, text.index, **bounds)
    return model.fuse(*args, **bounds).index_select(0, text.index)


def theirs(text: SimpleNamespace, length: int) -> Callable[[PeerModel], torch.Tensor]:
    """The forward of a peer; padding is its collator's work, so it is done here, beforehand."""
    tokens = pad(text.tokens, text.starts, length)
    valid = pad(torch.ones_like(text.tokens), text.starts, length).bool()
    rows = valid.flatten().nonzero().squeeze(1)[text.index]
    return lambda peer: peer.hidden(tokens, valid, text.images, text.caption_image).flatten(0, 1).index_select(0, rows)


def measure(config: ModelConfig, num_captions: int, repeats: int, device: torch.device, dtype: torch.dtype) -> dict:
    torch.manual_seed(0)
    model = PosMaskModel(config)
    peers = {attention: PeerModel(model, attention).to(device) for attention in ("sdpa", "eager")}
    model.to(device)
    text = make_text(config, num_captions, device)
    calls = {
        "packed": (model, lambda: ours(model, text, sparse=False)),
        "packed, last layer on masked rows": (model, lambda: ours(model, text, sparse=True)),
    }
    for length, name in ((PADDED_TOKENS, f"padded to {PADDED_TOKENS}"), (0, "padded to the longest")):
        for attention, peer in peers.items():
            calls[f"{name}, {attention}"] = peer, partial(theirs(text, length), peer)

    def run(module: torch.nn.Module, forward) -> torch.Tensor:
        module.zero_grad()
        hidden = forward()
        hidden.backward(text.gradient)
        return hidden

    def errors(truth: torch.Tensor, true_grads: dict[str, torch.Tensor]) -> dict[str, float]:
        """The largest relative error of output and gradients of each call."""
        found = {}
        for name, (module, forward) in calls.items():
            hidden = run(module, forward).detach()
            grads = {n: p.grad for n, p in module.named_parameters()}
            # The key's bias has no gradient but rounding: softmax does not see it.
            pairs = [(grads[n], grad) for n, grad in true_grads.items() if "key.bias" not in n]
            found[name] = largest_error([(hidden, truth), *pairs])
            print(f"{config.preset}: {name}: largest relative error {found[name]:.1e}", file=sys.stderr)
        return found

    truth = run(*calls["packed"]).detach()
    true_grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    checked = {"float32": errors(truth, true_grads)}
    if not max(checked["float32"].values()) < LARGEST_ERROR:
        raise SystemExit(f"{config.preset}: not equal in fp32; no speed is measured")
    if dtype != torch.float32:
        for module in (model, *peers.values()):
            module.to(dtype)
        text.images, text.gradient = text.images.to(dtype), text.gradient.to(dtype)
        checked[str(dtype)] = low = errors(truth, true_grads)
        if not max(low[n] for n in list(calls)[:2]) <= LARGEST_SHARE * min(low[n] for n in list(calls)[2:]):
            raise SystemExit(f"{config.preset}: ours rounds worse than its peers; no speed is measured")
    steps = {name: partial(run, *call) for name, call in calls.items()}
    if device.type == "cuda":
        # In a training step the host runs ahead while the image encoder is busy; here it would be waited for.
        steps = {name: graphed(step) for name, step in steps.items()}
    samples = interleave(steps, repeats)
    best = min((name for name in calls if name.startswith("padded to 30")), key=lambda n: np.median(samples[n]))
    longest = min((name for name in calls if name.startswith("padded to the")), key=lambda n: np.median(samples[n]))
    return {
        "preset": config.preset, "width": config.width, "dtype": str(dtype).removeprefix("torch."),
        "layers": [config.num_text_layers, config.num_fusion_layers], "image_tokens": config.num_image_tokens,
        "captions": num_captions, "tokens": text.tokens.numel(), "longest": text.longest,
        "largest_relative_errors": checked,
        "times": {name: quantiles(values) for name, values in samples.items()},
        "ratio_padded_to_30": ratio(samples[best], samples["packed"]),
        "ratio_padded_to_longest": ratio(samples[longest], samples["packed"]),
        "ratio_padded_to_30_last_layer_sparse": ratio(samples[best], samples["packed, last layer on masked rows"]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--presets", nargs="+", choices=tuple(PRESETS), default=["laptop", "base"])
    args = parser.parse_args()
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    if not on_gpu:
        tune_cpu()  # as a run does; all sides gain
    rows = []
    for preset in args.presets:
        # The image tower is not run; on a CPU one layer of each kind stands for base's six.
        config = dataclasses.replace(PRESETS[preset], vocab_size=1000)
        if preset == "base" and not on_gpu:
            config = dataclasses.replace(config, num_text_layers=1, num_fusion_layers=1)
        dtype = torch.bfloat16 if on_gpu else torch.float32
        rows.append(measure(config, 512 if on_gpu else 150, args.repeats, device, dtype))
    write_result(f"packing_{device.type}", rows, "transformers")


if __name__ == "__main__":
    main()
