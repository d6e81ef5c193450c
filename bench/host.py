"""Host time of a call of the Triton backend: no GPU is needed, since launches are recorded instead of run.

    python -m bench.host                                # a line of JSON

Triton's own just-in-time compiler runs with a driver that records. CPU time of this process, which excludes other
processes, in microseconds; F.linear, the layer, and the layer with every launch by Triton itself are interleaved. The
time of Triton's launcher in C and of the CUDA driver is not included.
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
    return driver


def layer(tokens: int, linear: str, apply: str) -> tuple[Callable, Callable]:
    """The backend's call for a small layer on one path, and F.linear's."""
    p = Problem.random(tokens, 64, 64, 8, 16, 16, 1, dtype=torch.bfloat16)
    call = functools.partial(backend.linear, *p.arguments(), 1, 16, False)

    def on_path() -> Any:
        with taking(linear, apply):
            return call()

    return on_path, functools.partial(F.linear, p.x, p.weight, p.bias)


def microseconds(call: Callable, calls: int) -> float:
    start = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - start) / calls * 1e6


def measure(calls: int = 500, rounds: int = 7) -> dict[str, dict[str, float]]:
    """Path -> microseconds of a call: "F.linear", "kept" launches, and "ordinary" ones."""
    found = {}
    known = launch._known
    for name, tokens, linear, apply in (
        ("decode", 1, "decode", "fused"),
        ("prefill", 65, "one_product", "delta"),
        ("route first", 65, "route_first", "fused"),
    ):
        ours, dense = layer(tokens, linear, apply)
        times: dict[str, list[float]] = {"F.linear": [], "kept": [], "ordinary": []}
        for _ in range(rounds + 1):
            times["F.linear"].append(microseconds(dense, calls))
            times["kept"].append(microseconds(ours, calls))
            launch._known = lambda: False
            times["ordinary"].append(microseconds(ours, calls))
            launch._known = known
        found[name] = {kind: round(statistics.median(us[1:]), 2) for kind, us in times.items()}
    return found


if __name__ == "__main__":
    record()
    torch.set_num_threads(1)
    print(json.dumps(measure()))
