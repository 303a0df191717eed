"""The masked-LM loss, forward and backward, against what one would otherwise run on the same hidden states.

    python benchmarks/bench_masked_lm_loss.py                 # every case of this machine's device
    python benchmarks/bench_masked_lm_loss.py --cases "base bf16" "base fp32"

Each side starts from the hidden states of all tokens and ends with the gradients in them, in the weight and in the
bias; ours with its spare rows and its sums per bin. Sides must first agree with the loss and gradients in fp32; what
does not is not timed. A peer runs in all its settings: once each, and those within twice of its fastest again and
again. `ratio` is against the fastest. Rows go to results/masked_lm_loss_<device>.json, and the last line is JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass

import timing
import torch
import torch.nn.functional as F
from torch import Tensor

from posmask.kernels.masked_lm_loss import MaskedLMLoss, masked_lm_loss, masked_lm_loss_reference
from posmask.train.engine import tune_cpu

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
GPU_CASES = [
    *(Case(f"base bf16, {n} rows", 4 * n, n - 24, 768, 30522, BF16, BF16) for n in (1024, 4096, 8192)),
    Case("base bf16, fp32 parameters, 4096 rows", 16384, 4072, 768, 30522, BF16, FP32),
]
COMPILED = ("base bf16, 4096 rows",)  # on a GPU a case takes half a minute to compile


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

    def ours(self, operation: Callable[..., MaskedLMLoss]) -> Callable[..., Tensor]:
        def loss(hidden, weight, bias):
            rows = hidden.index_select(0, self.index)
            return operation(rows, weight, bias, self.targets, self.num_masked, self.bins).loss_sum / self.num_masked

        return loss

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

    def products(self, dtype: torch.dtype, padding: int = 0) -> Callable[[], None]:
        """The three matrix products alone, on a vocabulary with `padding` more entries."""
        rows = self.hidden.detach().index_select(0, self.place).to(dtype)
        weight = F.pad(self.weight.detach().to(dtype), (0, 0, 0, padding))
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
        if self.case.dtype == self.case.parameters:
            found["our reference"] = {"as given": self.step(self.ours(masked_lm_loss_reference))}
        on_gpu = torch.cuda.is_available()
        if self.case.name in COMPILED if on_gpu else self.case.name.startswith("base") and shutil.which("g++"):
            if on_gpu:  # fp32 products cannot win here
                kinds = {name: kind for name, kind in kinds.items() if kind[1] == self.case.dtype}
            compiled = {name: self.step(torch.compile(self.gathered(*kind))) for name, kind in kinds.items()}
            found["gather, linear, cross entropy, compiled"] = compiled
        return found | self.liger() | self.cut_cross_entropy()

    def liger(self) -> dict[str, dict[str, Step]]:
        if not (torch.cuda.is_available() and importlib.util.find_spec("liger_kernel")):
            return {}
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger

        def loss(rows, labels, chunk, hidden, weight, bias):
            hidden = hidden if rows is None else hidden.index_select(0, rows)
            return liger(hidden, weight.to(hidden.dtype), labels, bias.to(hidden.dtype), chunk_mem_const=chunk)

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

    def truth(self, with_bias: bool = True) -> tuple[Tensor, ...]:
        """Loss and gradients by fp32 products of the same values."""
        leaves = [x.detach().float().requires_grad_() for x in (self.hidden, self.weight, self.bias)]
        if not with_bias:
            leaves[2] = torch.zeros_like(leaves[2], requires_grad=True)
        loss = self.gathered(FP32, FP32)(*leaves)
        return loss.detach(), *torch.autograd.grad(loss, leaves if with_bias else leaves[:2])


PRODUCTS = "three matrix products"
MISSING = {  # rows of the comparison that may have nothing to run
    "gather, linear, cross entropy, compiled": "needs a C++ compiler; base model only; on a GPU at 4096 rows only",
    "Liger fused linear cross entropy, all rows": "needs CUDA and liger-kernel",
    "Liger fused linear cross entropy, gathered": "needs CUDA and liger-kernel",
    "cut-cross-entropy, exact": "needs CUDA and cut-cross-entropy",
    "cut-cross-entropy, filtered": "needs CUDA and cut-cross-entropy",
}


def off(step: Step, truth: tuple[Tensor, ...], dtype: torch.dtype) -> str | None:
    """Why a step is not to be timed: its loss or a gradient is further from the truth than its dtype explains."""
    error = timing.largest_error(zip(step(), truth, strict=True))
    return None if error <= MAX_ERROR[dtype] else f"relative error {error:.2g} exceeds {MAX_ERROR[dtype]:.0e}"


def usable_settings(problem: Problem) -> tuple[dict[str, dict[str, Step]], list[dict]]:
    """{peer: {setting: step}} of those that compute the same, and a row for each that does not or is missing."""
    usable, rows = {}, []
    truths = {True: problem.truth(), False: problem.truth(with_bias=False)}
    peers = problem.peers()
    for peer, settings in peers.items():
        truth = truths[not peer.startswith("cut")]
        found = {name: off(step, truth, problem.case.dtype) for name, step in settings.items()}
        rows += [{"peer": peer, "setting": name, "not_timed": why} for name, why in found.items() if why]
        usable[peer] = {name: step for name, step in settings.items() if not found[name]}
    rows += [{"peer": peer, "not_timed": why} for peer, why in MISSING.items() if peer not in peers]
    dtypes = sorted({problem.case.dtype, FP32}, key=str)
    usable[PRODUCTS] = {str(dtype): problem.products(dtype) for dtype in dtypes}
    if padding := -problem.case.vocabulary % 128:  # rows that are not aligned are slow on a GPU
        padded = {f"{dtype}, vocabulary padded": problem.products(dtype, padding) for dtype in dtypes}
        usable[PRODUCTS] |= padded
    return {peer: settings for peer, settings in usable.items() if settings}, rows


def measure(case: Case, device: str, repeats: int) -> list[dict]:
    """Rows of one case: one for each peer, and one for the three products."""
    problem = Problem(case, device)
    shape = {name: value if isinstance(value, int | str) else str(value) for name, value in asdict(case).items()}
    shape["capacity"] = case.capacity
    ours = problem.step(problem.ours(masked_lm_loss))
    if why := off(ours, problem.truth(), case.dtype):
        return [shape | {"not_timed": f"ours: {why}"}]
    peers, rows = usable_settings(problem)
    eager = {"ours": ours, **peers}
    if torch.cuda.is_available():
        # Kernels alone, as in a training step, whose host runs ahead. The packages left out wait for the device.
        at_once = timing.interleave({"ours": ours}, repeats)["ours"]
        shape["ours_with_launches"] = timing.quantiles(at_once)
        ours = timing.graphed(ours)
        peers = {
            peer: settings if peer.startswith(("Liger", "cut")) else {n: timing.graphed(s) for n, s in settings.items()}
            for peer, settings in peers.items()
        }
    steps, once_ms = {"ours": ours}, {}
    for peer, settings in peers.items():
        once_ms[peer] = {name: timing.interleave({name: step}, 1, warmup=1)[name][0] for name, step in settings.items()}
        limit_ms = 2 * min(once_ms[peer].values())
        steps |= {(peer, name): step for name, step in settings.items() if once_ms[peer][name] <= limit_ms}
    samples = timing.interleave(steps, repeats, warmup=1)
    own = {"ours": timing.quantiles(samples["ours"]), "ours_peak_bytes": timing.peak_bytes(eager["ours"])}
    for peer, once in once_ms.items():
        settings = {name: {"once_ms": round(ms, 4)} for name, ms in once.items()}
        for key in steps:
            if key[0] == peer:
                ratio = timing.ratio(samples[key], samples["ours"])
                settings[key[1]] = timing.quantiles(samples[key]) | {"ratio": ratio}
        best = min(settings, key=lambda name: settings[name].get("p50_ms", float("inf")))
        row = own | {"peer": peer, "settings": settings, "best": best, "ratio": settings[best]["ratio"]}
        if peer == PRODUCTS:
            row["ours_over_products"] = timing.ratio(samples["ours"], samples[peer, best])
        else:
            row["peer_peak_bytes"] = timing.peak_bytes(eager[peer][best])
        rows.append(row)
        print(f"{case.name} | {peer} | {row['ratio']} x ours, best: {best}", flush=True)
    return [shape | row for row in rows]


def main(argv: list[str] | None = None) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cases = {case.name: case for case in (GPU_CASES if device == "cuda" else CPU_CASES)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=cases, default=list(cases), metavar="NAME", help="default: all")
    parser.add_argument("--repeats", type=int, default=20, help="rounds of the interleaved timing")
    args = parser.parse_args(argv)
    if device == "cpu":
        tune_cpu()  # as a run does; peers gain more
    rows = [row for name in args.cases for row in measure(cases[name], device, args.repeats)]
    timing.write_result(f"masked_lm_loss_{device}", rows, "liger-kernel", "cut-cross-entropy")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
