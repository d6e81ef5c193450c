"""Timing side by side, the machine's own limits, and the check a result has to pass before it counts."""

import functools
import math
import os
import platform
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import reference
from ..ops.excluded import device_name
from ..testing import Problem, assert_close, expectations
from ..versions import installed
from .peers import BASELINE, PEERS, CannotRunError
from .problems import Case

# Calls are repeated until a sample is this long, so that the time to read the clocks is negligible.
SAMPLE_SECONDS = 1e-3
MIN_ROUNDS, MAX_ROUNDS = 5, 30
# Tokens of a batch compared with the float64 reference, spread over the whole of it.
CHECKED_TOKENS = 48

Record = dict[str, Any]

# Read once, on the first profile: otherwise each of them prints its start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def interleave(
    calls: Mapping[str, Callable[[], Any]], device: str, seconds: float, seed: int = 0
) -> dict[str, dict[str, list[float]]]:
    """Time interleaved calls: name -> {"wall_us": [...], "process_us": [...]}, one number per round, per call.

    Every round runs every call once, in a new random order, so that drift of the machine and the contents of the caches
    affect all of them equally. A sample is as many consecutive calls as fill SAMPLE_SECONDS. On a GPU the wall time is
    that between two events on the stream, including launches; the process time is the host's, of all threads.

    Args:
        calls: name -> a call without arguments.
        device: "cpu" or "cuda".
        seconds: approximate duration, within MIN_ROUNDS and MAX_ROUNDS.
        seed: of the shuffle.
    """
    repeats, spent = {}, 0.0
    for name, call in calls.items():
        once = _sample(call, 1, device)[0]
        if once < 0.05:
            once = _sample(call, 1, device)[0]
        repeats[name] = max(1, min(1000, round(SAMPLE_SECONDS / once)))
        spent += once * repeats[name]
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, round(seconds / spent)))
    samples: dict[str, dict[str, list[float]]] = {name: {"wall_us": [], "process_us": []} for name in calls}
    order, shuffle = list(calls), random.Random(seed)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            wall, process = _sample(calls[name], repeats[name], device)
            samples[name]["wall_us"].append(round(wall * 1e6, 2))
            samples[name]["process_us"].append(round(process * 1e6, 2))
    return samples


def _sample(call: Callable[[], Any], repeats: int, device: str) -> tuple[float, float]:
    """(wall, process) seconds of one call, the mean of `repeats` in a row."""
    if device == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        torch.cuda.synchronize()
        process = time.process_time_ns()
        events[0].record()
        for _ in range(repeats):
            call()
        events[1].record()
        torch.cuda.synchronize()
        process = time.process_time_ns() - process
        return events[0].elapsed_time(events[1]) / 1e3 / repeats, process / 1e9 / repeats
    process, wall = time.process_time_ns(), time.perf_counter_ns()
    for _ in range(repeats):
        call()
    wall, process = time.perf_counter_ns() - wall, time.process_time_ns() - process
    return wall / 1e9 / repeats, process / 1e9 / repeats


def peak_memory(call: Callable[[], Any], device: str) -> int:
    """Bytes a call allocates beyond what it was given, at their peak, its output included."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def graphed(call: Callable[[], Any]) -> Callable[[], None]:
    """The call as a captured CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure(
    case: Case, peers: Sequence[str], *, device: str, backward: bool = False, graph: bool = False, seconds: float = 1.0
) -> Record:
    """One case on every peer, interleaved: a record of plain values, ready for JSON.

    A peer whose output (and with `backward` dx) is further from the float64 reference than twice plain PyTorch's
    distance is refused and not timed; one that cannot run is listed. Both have the reason under "refused" or
    "cannot_run".

    Args:
        case: the layer, setting, tokens and dtype.
        peers: names in PEERS; BASELINE is always among those measured.
        device: "cpu" or "cuda".
        backward: forward + backward into x and every parameter, instead of the forward alone.
        graph: replay captured CUDA graphs instead of launching eagerly.
        seconds: about how long to measure; see `interleave`.

    Returns:
        The case's fields, "bytes" and "flops" of the least work, and "peers": name -> "wall_us" and "process_us" (a
        number per round), "memory" in bytes; or the reason.
    """
    problem = case.problem(device)
    weights, ids = reference.route(problem.x, problem.rows(), problem.num_experts_per_tok)
    dy = torch.randn(case.tokens, problem.weight.shape[0], dtype=case.dtype, device=device) if backward else None
    rows = torch.linspace(0, case.tokens - 1, min(case.tokens, CHECKED_TOKENS), device=device).long()
    compared = replace(problem, x=problem.x[rows])
    want = expectations(compared, ids[rows], dy=None if dy is None else dy[rows])
    record: Record = {
        "layer": case.layer,
        **asdict(case.setting),
        "tokens": case.tokens,
        "dtype": str(case.dtype).removeprefix("torch."),
        "pass": "forward+backward" if backward else "forward",
        "mode": "graph" if graph else "eager",
        "device": device,
        "threads": torch.get_num_threads(),
        **asdict(case.work(len(ids.unique()), backward)),
        "peers": {},
    }
    calls = {}
    for name in [BASELINE, *(p for p in peers if p != BASELINE)]:
        try:
            calls[name] = _prepare(name, problem, weights, ids, want, rows, dy, graph)
        except CannotRunError as reason:
            record["peers"][name] = {"cannot_run": str(reason)}
        except AssertionError as reason:
            record["peers"][name] = {"refused": str(reason)}
        except Exception as error:  # The exception is the reason; the other peers run.
            record["peers"][name] = {"cannot_run": f"{type(error).__name__}: {error}".splitlines()[0]}
    samples = interleave(calls, device, seconds)
    for name, call in calls.items():
        record["peers"][name] = samples[name] | {"memory": peak_memory(call, device)}
    return record


def _prepare(
    name: str,
    problem: Problem,
    weights: Tensor,
    ids: Tensor,
    want: Mapping[str, tuple[Tensor, float]],
    rows: Tensor,
    dy: Tensor | None,
    graph: bool,
) -> Callable[[], Any]:
    """Build a peer, check it, and return the call to time."""
    peer = PEERS[name]
    if graph and peer.waits_for_host:
        raise CannotRunError("it waits for the host, which a CUDA graph cannot capture")
    x = problem.x
    if dy is None:
        layer, _ = peer.build(problem, weights, ids)
        call: Callable[[], Any] = functools.partial(torch.no_grad()(layer), x)
        got = {"y": call()}
    else:
        leaves: dict[str, Any] = {name: t.detach().requires_grad_() for name, t in problem.tensors().items()}
        layer, parameters = peer.build(replace(problem, **leaves), weights, ids)
        x = leaves["x"]
        if not parameters:
            raise CannotRunError("it has no backward")
        wanted = [x, *(p for p in parameters if p.requires_grad)]

        def gradients() -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(layer(x), wanted, dy, allow_unused=True)

        call = gradients
        got = {"y": layer(x).detach(), "x": gradients()[0]}
    if name != BASELINE:
        for tensor, value in got.items():
            assert_close(tensor, value[rows], *want[tensor])
    return graphed(call) if graph else call


def machine(device: str) -> Record:
    """Conditions of a result: the device, its current clock, versions, the commit, and its limits."""
    return {
        "device": device_name(device),
        "cores": os.cpu_count() if device == "cpu" else torch.cuda.get_device_properties(0).multi_processor_count,
        "clock_mhz": _clock_mhz(device),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda, **_versions()},
        "commit": _commit(),
        "measured": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def limits(device: str, dtypes: Sequence[torch.dtype], seconds: float = 1.0) -> Record:
    """The machine's own measured rates at the current number of threads.

    Args:
        device: "cpu" or "cuda".
        dtypes: whose matmul rate is wanted.
        seconds: about how long to measure.

    Returns:
        "bandwidth": [bytes, bytes per second] of reading buffers of growing size, from caches to memory;
        "matmul": dtype -> FLOP/s of square products, the best of two sizes; "clock_mhz": seen right after them.
    """
    sizes = [2**20, 2**22, 2**24, 2**26, 2**28] if device == "cpu" else [2**24, 2**26, 2**28, 2**31]
    bandwidth = []
    for size in sizes:
        a = torch.ones(size // 4096, 1024, device=device)
        v = torch.ones(1024, device=device)
        samples = interleave({"sum": a.sum, "mv": functools.partial(torch.mv, a, v)}, device, seconds / 16)
        best = min(min(s["wall_us"]) for s in samples.values())
        bandwidth.append([size, round(size / best * 1e6)])
    matmul = {}
    for dtype in dtypes:
        rates = []
        for side in (512, 2048) if device == "cpu" else (4096, 8192):
            a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            samples = interleave({"matmul": functools.partial(F.linear, a, b)}, device, seconds / 16)
            rates.append(2 * side**3 / min(samples["matmul"]["wall_us"]) * 1e6)
        matmul[str(dtype).removeprefix("torch.")] = round(max(rates))
    clock = _clock_mhz(device)
    return {"threads": torch.get_num_threads(), "bandwidth": bandwidth, "matmul": matmul, "clock_mhz": clock}


def floor_us(record: Record, limits: Record) -> float:
    """The minimum time of a record's work here: the larger of bytes over bandwidth and FLOPs over the matmul rate.

    The bandwidth is that of the largest measured buffer that is not larger than the work: in a loop, all peers read a
    small layer from the caches. Numbers of 16 bits can be multiplied as float32, where that is faster.
    """
    fitting = [rate for size, rate in limits["bandwidth"] if size <= record["bytes"]]
    bandwidth = fitting[-1] if fitting else limits["bandwidth"][0][1]
    rate = limits["matmul"][record["dtype"]]
    if record["dtype"] in ("bfloat16", "float16"):
        rate = max(rate, limits["matmul"].get("float32", 0))
    return max(record["bytes"] / bandwidth, record["flops"] / rate) * 1e6


def summary(record: Record, limits: Record) -> dict[str, dict[str, float]]:
    """The values of a table for every timed peer: medians, spread, and ratios.

    Returns:
        name -> "us" (median wall time), "spread" (half the interquartile range over the median), "over_linear" (median
        of the ratios of each round), "over_floor", "tflops" and "gbps" (the least work over the time), "memory",
        "waiting" (the share of wall time without a processor, seen on one thread of a CPU: the machine was busy).
    """
    floor, out = floor_us(record, limits), {}
    baseline = record["peers"][BASELINE]["wall_us"]
    for name, peer in record["peers"].items():
        if "wall_us" not in peer:
            continue
        wall = peer["wall_us"]
        us = statistics.median(wall)
        low, _, high = statistics.quantiles(wall, n=4)
        out[name] = {
            "us": us,
            "spread": (high - low) / 2 / us,
            "over_linear": statistics.median(a / b for a, b in zip(wall, baseline)),
            "over_floor": us / floor,
            "tflops": record["flops"] / us / 1e6,
            "gbps": record["bytes"] / us / 1e3,
            "memory": peer["memory"],
            "waiting": max(0.0, 1 - sum(peer["process_us"]) / sum(wall)) if record["device"] == "cpu" else 0.0,
        }
    return out


def geometric_mean(values: list[float]) -> float:
    """exp of the mean logarithm."""
    return math.exp(statistics.fmean(map(math.log, values)))


def _versions() -> dict[str, str]:
    names = ("smile-kernels", "torch", "triton", "fusion-bench", "peft", "transformers", "vllm")
    return {name: version for name in names if (version := installed(name)) is not None}


def _commit() -> str | None:
    """The commit of the source tree this package runs from, with "+changes" where the package differs from it."""
    folder = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", folder, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _clock_mhz(device: str) -> float | None:
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
        try:
            return float(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])
        except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
            return None
    try:
        clocks = re.findall(r"cpu MHz\s*: ([\d.]+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        return None
    return round(statistics.fmean(map(float, clocks))) if clocks else None
