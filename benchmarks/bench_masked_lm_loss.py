"""The masked-LM loss, forward and backward, against what one would otherwise run on the same hidden states.

    python benchmarks/bench_masked_lm_loss.py                 # every case of this machine's device
    python benchmarks/bench_masked_lm_loss.py --cases base    # those whose name contains "base"

Each side starts from the hidden states of all tokens and ends with the gradients in them, in the weight and in the
bias; ours with its spare rows and its sums per bin. Sides must first agree with the loss and gradients in fp32; what
does not is not timed. A peer is timed in all its settings, and `ratio` is against the fastest of them. Rows go to
results/masked_lm_loss_<device>.json, and the last line printed is JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import timing
import torch
import torch.nn.functional as F
from torch import Tensor

from posmask.kernels.masked_lm_loss import masked_lm_loss

BF16, FP32 = torch.bfloat16, torch.float32
MAX_ERROR = {BF16: 2e-2, FP32: 1e-4}  # ‖difference‖ / ‖truth‖ of loss and gradients
Step = Callable[[], tuple[Tensor, ...]]  # → loss, gradients in hidden, weight, bias


@dataclass(frozen=True)
class Case:
    """One shape. Target rows lie evenly among the tokens; capacity is the next multiple of 128 above them."""

    name: str
    num_tokens: int
    num_masked: int
    width: int
    vocabulary: int
    dtype: torch.dtype
    parameters: torch.dtype

    @property
    def capacity(self) -> int:
        return -(-(self.num_masked + 1) // 128) * 128


CPU_CASES = [
    Case("base bf16", 960, 209, 768, 30522, BF16, BF16),
    Case("base bf16, fp32 parameters", 960, 209, 768, 30522, BF16, FP32),
    Case("base fp32", 960, 209, 768, 30522, FP32, FP32),
    Case("laptop fp32, small vocabulary", 1600, 600, 192, 500, FP32, FP32),
    Case("laptop fp32", 1600, 600, 192, 8192, FP32, FP32),
]
GPU_CASES = [Case(f"base bf16, {n} rows", 4 * n, n - 24, 768, 30522, BF16, BF16) for n in (1024, 2048, 4096, 8192)] + [
    Case("base bf16, 16384 rows", 32768, 16360, 768, 30522, BF16, BF16),
    Case("base bf16, fp32 parameters, 4096 rows", 16384, 4072, 768, 30522, BF16, FP32),
]


class Problem:
    """Inputs of one case, and every side's step on them."""

    def __init__(self, case: Case, device: str):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.case = case
        self.hidden = normal(case.num_tokens, case.width).to(device, case.dtype).requires_grad_()
        weight = normal(case.vocabulary, case.width).mul_(2 * case.width**-0.5)  # logits as wide as a trained model's
        self.weight = weight.to(device, case.parameters).requires_grad_()
        self.bias = normal(case.vocabulary).to(device, case.parameters).requires_grad_()
        tokens = torch.randint(case.vocabulary, (case.num_tokens,), generator=generator)
        place = torch.arange(case.num_masked) * case.num_tokens // case.num_masked
        labels = torch.full_like(tokens, -100)
        labels[place] = tokens[place]
        self.labels, self.place = labels.to(device), place.to(device)
        spare = case.capacity - case.num_masked
        self.index = F.pad(place, (0, spare)).int().to(device)
        self.targets = F.pad(tokens[place], (0, spare), value=-100).int().to(device)
        self.bins = torch.randint(17, (case.capacity,), generator=generator, dtype=torch.int32).to(device)
        self.num_masked = torch.tensor(case.num_masked, dtype=torch.int32, device=device)

    def step(self, loss: Callable[..., Tensor]) -> Step:
        """`loss` of (hidden, weight, bias), forward and backward."""
        leaves = (self.hidden, self.weight, self.bias)

        def run():
            value = loss(*leaves)
            return value.detach(), *torch.autograd.grad(value, leaves)

        return run

    def ours(self, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = hidden.index_select(0, self.index)
        return masked_lm_loss(rows, weight, bias, self.targets, self.num_masked, self.bins).loss_sum / self.num_masked

    def all_rows(self, logits: torch.dtype, products: torch.dtype) -> Callable[..., Tensor]:
        def loss(hidden, weight, bias):
            scores = F.linear(hidden.to(products), weight.to(products), bias.to(products))
            return F.cross_entropy(scores.to(logits), self.labels)

        return loss

    def gathered(self, logits: torch.dtype, products: torch.dtype) -> Callable[..., Tensor]:
        def loss(hidden, weight, bias):
            rows = hidden.index_select(0, self.place).to(products)
            scores = F.linear(rows, weight.to(products), bias.to(products))
            return F.cross_entropy(scores.to(logits), self.labels.index_select(0, self.place))

        return loss

    def products(self, dtype: torch.dtype) -> Callable[[], None]:
        """The three matrix products alone, dW in the dtype of the parameters where it can be."""
        rows = self.hidden.detach().index_select(0, self.place).to(dtype)
        weight = self.weight.detach().to(dtype)
        gradient = torch.randn(len(rows), len(weight), dtype=dtype, device=rows.device)

        def run():
            return rows @ weight.T, gradient @ weight, gradient.T @ rows

        return run

    def peers(self) -> dict[str, dict[str, Step]]:
        """{peer: {setting: step}}"""
        kinds = {"products and cross entropy fp32": (FP32, FP32)}
        if self.case.dtype == BF16:
            kinds |= {"products bf16, cross entropy fp32": (FP32, BF16), "all bf16": (BF16, BF16)}
        # HF's BertForMaskedLM, its cross entropy in fp32; "all bf16" loses digits of the loss, which it keeps in bf16.
        full = {name: self.step(self.all_rows(*kind)) for name, kind in kinds.items() if name != "all bf16"}
        gather = {name: self.step(self.gathered(*kind)) for name, kind in kinds.items()}
        found = {"full logits, fp32 cross entropy": full, "gather, linear, cross entropy": gather}
        if self.case.name.startswith("base") and (torch.cuda.is_available() or shutil.which("g++")):
            found["gather, linear, cross entropy, compiled"] = {
                name: self.step(torch.compile(self.gathered(*kind))) for name, kind in kinds.items()
            }
        return found | self.liger() | self.cut_cross_entropy()

    def liger(self) -> dict[str, dict[str, Step]]:
        if not (torch.cuda.is_available() and importlib.util.find_spec("liger_kernel")):
            return {}
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger

        def loss(rows, labels, chunk, hidden, weight, bias):
            hidden = hidden if rows is None else hidden.index_select(0, rows)
            return liger(hidden, weight, labels, bias, chunk_mem_const=chunk)

        picked = {"all rows": (None, self.labels), "gathered": (self.place, self.labels[self.place])}
        return {
            f"Liger fused linear cross entropy, {name}": {
                f"chunk_mem_const {chunk}": self.step(
                    lambda *leaves, rows=rows, labels=labels, chunk=chunk: loss(rows, labels, chunk, *leaves)
                )
                for chunk in (1, 4, 16)
            }
            for name, (rows, labels) in picked.items()
        }

    def cut_cross_entropy(self) -> dict[str, dict[str, Step]]:
        """It knows no bias, so it computes less than the others and is compared with the loss without one."""
        if not (torch.cuda.is_available() and importlib.util.find_spec("cut_cross_entropy")):
            return {}
        from cut_cross_entropy import linear_cross_entropy

        def loss(filter_eps, hidden, weight, bias):
            rows, labels = hidden.index_select(0, self.place), self.labels[self.place]
            return linear_cross_entropy(rows, weight.to(rows.dtype), labels, filter_eps=filter_eps) + 0 * bias[0]

        return {
            f"cut-cross-entropy, {name}": {name: self.step(lambda *leaves, e=eps: loss(e, *leaves))}
            for name, eps in (("exact", None), ("filtered", "high"))
        }

    def error(self, step: Step, with_bias: bool = True) -> float:
        """Largest relative error of loss and gradients against fp32 products of the same values."""
        leaves = [x.detach().float().requires_grad_() for x in (self.hidden, self.weight, self.bias)]
        loss = self.gathered(FP32, FP32)(*leaves[:2], leaves[2] if with_bias else 0 * leaves[2])
        truth = (loss.detach(), *torch.autograd.grad(loss, leaves[: 3 if with_bias else 2]))
        return max(timing.relative_error(ours, true) for ours, true in zip(step(), truth, strict=False))


MISSING = {  # rows of the comparison that may have nothing to run
    "gather, linear, cross entropy, compiled": "no C++ compiler, or a case that has no need of it",
    "Liger fused linear cross entropy, all rows": "needs CUDA and liger-kernel",
    "Liger fused linear cross entropy, gathered": "needs CUDA and liger-kernel",
    "cut-cross-entropy, exact": "needs CUDA and cut-cross-entropy",
    "cut-cross-entropy, filtered": "needs CUDA and cut-cross-entropy",
}


def measure(case: Case, device: str, repeats: int) -> list[dict]:
    """Rows of one case: one for each peer, and one for the three products."""
    problem = Problem(case, device)
    shape = {
        "case": case.name, "tokens": case.num_tokens, "masked": case.num_masked, "capacity": case.capacity,
        "width": case.width, "vocabulary": case.vocabulary, "dtype": str(case.dtype),
        "parameters": str(case.parameters),
    }  # fmt: skip
    ours = problem.step(problem.ours)
    error = problem.error(ours)
    if not error <= MAX_ERROR[case.dtype]:
        return [shape | {"not_timed": f"ours is {error:.2g} off"}]
    steps, rows = {"ours": ours}, []
    peers = problem.peers()
    for peer, settings in peers.items():
        for setting, step in settings.items():
            peer_error = problem.error(step, with_bias=not peer.startswith("cut"))
            if peer_error <= MAX_ERROR[case.dtype]:
                steps[peer, setting] = step
            else:
                rows.append(shape | {"peer": peer, "setting": setting, "not_timed": f"{peer_error:.2g} off"})
    rows += [shape | {"peer": peer, "not_timed": why} for peer, why in MISSING.items() if peer not in peers]
    for dtype in {case.dtype, FP32}:
        steps["three matrix products", str(dtype)] = problem.products(dtype)
    samples = timing.interleave(steps, repeats)
    own = {"ours": timing.quantiles(samples["ours"]), "ours_error": error, "ours_peak_bytes": timing.peak_bytes(ours)}
    for peer in dict.fromkeys(key[0] for key in steps if key != "ours"):
        settings = {key[1]: timing.quantiles(samples[key]) for key in steps if key[0] == peer}
        best = min(settings, key=lambda name: settings[name]["p50_ms"])
        row = shape | own | {"peer": peer, "settings": settings, "best": best}
        if peer == "three matrix products":
            row["ours_over_products"] = {
                setting: timing.ratio(samples["ours"], samples[peer, setting]) for setting in settings
            }
        else:
            row["ratio"] = timing.ratio(samples[peer, best], samples["ours"])
            row["ratios"] = {setting: timing.ratio(samples[peer, setting], samples["ours"]) for setting in settings}
            row["peer_peak_bytes"] = timing.peak_bytes(steps[peer, best])
        rows.append(row)
        print(f"{case.name} | {peer} | {row.get('ratios') or row['ours_over_products']}", flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="", help="only those whose name contains this")
    parser.add_argument("--repeats", type=int, default=20, help="rounds of the interleaved timing")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = [case for case in (GPU_CASES if device == "cuda" else CPU_CASES) if args.cases in case.name]
    if not cases:
        parser.error(f"--cases {args.cases}: no case has such a name")
    rows = [row for case in cases for row in measure(case, device, args.repeats)]
    timing.write_result(f"masked_lm_loss_{device}", rows, "liger-kernel", "cut-cross-entropy")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
