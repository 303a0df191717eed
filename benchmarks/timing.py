"""What the benchmarks share: interleaved timing, peak memory, and the JSON file and line they end in."""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from posmask.kernels.backend import cpu_capabilities
from posmask.train.card import git_commit

RESULTS = Path(__file__).resolve().parent / "results"
Fns = dict[str, Callable[[], object]]


def interleave(fns: Fns, repeats: int = 20, warmup: int = 2, untimed: int = 0) -> dict[str, list[float]]:
    """Milliseconds of each function in each of `repeats` rounds A B C A B C …, so that drift meets all alike.

    untimed: calls of a function before each one that is timed. A loader works ahead, in the turns of the others too;
    these use that up, and it is at work again as it is in a run. On a GPU: device time by events, the L2 cache flushed
    before each call.
    """
    samples = {name: [] for name in fns}
    clock = _clock_cuda if torch.cuda.is_available() else _clock_cpu
    for round_ in range(warmup + repeats):
        for name, fn in fns.items():
            for _ in range(untimed):
                fn()
            elapsed_ms = clock(fn)
            if round_ >= warmup:
                samples[name].append(elapsed_ms)
    return samples


def _clock_cpu(fn: Callable[[], object]) -> float:
    start = time.perf_counter()
    fn()
    return 1e3 * (time.perf_counter() - start)


def _clock_cuda(fn: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.empty(1 << 28, dtype=torch.int8, device="cuda").zero_()  # larger than any L2 cache
    start.record()
    fn()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def graphed(fn: Callable[[], object]) -> Callable[[], object]:
    """`fn` recorded into a CUDA graph: what is left is the time of its kernels, without the host's launches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        fn()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = fn()

    def replay() -> object:
        graph.replay()
        return result

    return replay


def quantiles(samples_ms: list[float]) -> dict[str, float]:
    """{"p20_ms", "p50_ms", "p80_ms"}"""
    cuts = statistics.quantiles(samples_ms, n=10, method="inclusive")
    return {f"p{q}_ms": round(cuts[q // 10 - 1], 4) for q in (20, 50, 80)}


def ratio(theirs_ms: list[float], ours_ms: list[float]) -> float:
    """How many times faster ours is: the median of the ratios of each round."""
    return round(statistics.median(a / b for a, b in zip(theirs_ms, ours_ms, strict=True)), 3)


def peak_bytes(fn: Callable[[], object]) -> int:
    """The most that torch's allocator held during a call above what it held before. Buffers that a library (MKL)
    allocates by itself are not seen."""
    fn()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        fn()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def environment(*packages: str) -> dict:
    """Commit, hardware and versions; `packages` by the names they are installed under, None where one is missing."""

    def version_of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        device = f"{names[0].partition(':')[2].strip()}, {torch.get_num_threads()} threads, {_instructions()}"
    return {
        "commit": git_commit(),
        "device": device,
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {package: version_of(package) for package in ("torch", "triton", *packages)},
    }


def _instructions() -> str:
    """What decides how fast a CPU is in bf16; a name such as "AMD EPYC" does not say it."""
    has = cpu_capabilities()
    names = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 with bf16", "avx512_f": "AVX-512", "avx2": "AVX2"}
    return next((name for key, name in names.items() if has.get(key)), "of unknown instructions")


def write_result(name: str, rows: list[dict], *packages: str) -> Path:
    """Writes results/NAME.json, {"environment", "rows"}, and prints it as the last line."""
    result = {"environment": environment(*packages), "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result), flush=True)
    return path


def largest_error(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The largest ‖ours - truth‖ / ‖truth‖ of the pairs (ours, truth), in fp64; NaN where one of them has one, which
    the max of Python would pass over."""
    errors = [(ours.double() - truth.double()).norm() / truth.double().norm() for ours, truth in pairs]
    return float(torch.stack(errors).max())
