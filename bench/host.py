"""Host time of a call of the Triton backend: no GPU is needed, since launches are recorded instead of run.

    python -m bench.host                                # a line of JSON

Triton's own just-in-time compiler runs with a driver that records. CPU time of this process, which excludes other
processes, in microseconds; F.linear, the layer, the backend's part of it, and that with every launch by Triton itself
are interleaved. A recording function in Python, which takes about as long, replaces Triton's launcher in C; the time of
the CUDA driver is not included. "prefill delta" and F.linear include a small product on the CPU.
"""

import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)

import torch
import torch.nn.functional as F
import triton
from triton.backends.compiler import GPUTarget

from smile_kernels.functional import smile_linear
from smile_kernels.ops.triton import backend, configs, launch
from smile_kernels.testing import Problem, taking

DEVICE = configs.Device("H200", "sm90", 132, pdl=True, tma=True)


class Launched(NamedTuple):
    """One launch as seen by the driver."""

    kernel: str
    grid: tuple[int, int, int]
    overlaps: bool
    hook: Any  # called by Triton before the launch
    arguments: tuple


class Driver:
    """A substitute for the driver of a GPU: kernels are compiled, but only recorded as loaded and launched."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.launched: list[Launched] = []
        self.utils = self

    def launcher_cls(self, source: Any, metadata: Any) -> Callable:
        def start(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments) -> None:
            self.launched.append(Launched(metadata.name, (x, y, z), metadata.launch_pdl, enter, arguments))

        return start

    def load_binary(self, name: str, *_: Any) -> tuple[int, ...]:
        self.loaded.append(name)
        return 0, 0, 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": DEVICE.multiprocessors}

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def record() -> Driver:
    """From now on, launches for tensors on the CPU are recorded, as if the tensors were on a GPU."""
    driver = Driver()
    triton.runtime.driver.set_active(driver)
    configs.device_of = lambda _: DEVICE
    backend.why_not = lambda *_: None
    return driver


def microseconds(call: Callable, calls: int) -> float:
    start = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - start) / calls * 1e6


def measure(calls: int = 500, rounds: int = 11) -> dict[str, dict[str, list[float]]]:
    """Path -> name of a call -> median, least and largest microseconds of the rounds.

    "F.linear"; "layer": `smile_linear`; "kept": the backend's function; "ordinary": the same with launches by Triton.
    """
    found = {}
    known = launch._known
    for name, tokens, linear, apply in (
        ("decode", 1, "decode", "fused"),
        ("prefill fused", 65, "one_product", "fused"),
        ("prefill delta", 65, "one_product", "delta"),
        ("route first", 65, "route_first", "fused"),
    ):
        p = Problem.random(tokens, 64, 64, 8, 16, 16, 1, dtype=torch.bfloat16)
        options = {"num_experts_per_tok": 1, "rank_of_router": 16, "backend": "triton"}
        kept = functools.partial(backend.linear, *p.arguments(), 1, 16, False)
        times: dict[str, list[float]] = {"F.linear": [], "layer": [], "kept": [], "ordinary": []}
        with taking(linear, apply):
            for _ in range(rounds + 1):
                times["F.linear"].append(microseconds(functools.partial(F.linear, p.x, p.weight, p.bias), calls))
                times["layer"].append(microseconds(functools.partial(smile_linear, *p.arguments(), **options), calls))
                times["kept"].append(microseconds(kept, calls))
                launch._known = lambda: False
                times["ordinary"].append(microseconds(kept, calls))
                launch._known = known
        rest = {kind: us[1:] for kind, us in times.items()}
        found[name] = {kind: [round(of(us), 2) for of in (statistics.median, min, max)] for kind, us in rest.items()}
    return found


if __name__ == "__main__":
    record()
    torch.set_num_threads(1)
    print(json.dumps(measure()))
