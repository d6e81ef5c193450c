"""Launches with little host time: compiled kernels are cached and started in the same way as by Triton.

For each launch Triton binds, specializes and looks up all arguments again, which takes it many times as long as the
launch itself. A `Launch` is made once for given shapes, and compiled once for given dtypes and alignments.
"""

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import triton
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# How the versions of Triton that this was written for start what they compiled.
_STATEMENT = (
    "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, launch_metadata, "
    "knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *bound_args.values())"
)


@functools.cache
def _known() -> bool:
    """Whether Triton starts kernels here as this module does; where not, each launch goes through Triton."""
    source = " ".join(inspect.getsource(JITFunction.run).split())
    return _STATEMENT in source and driver.active.get_current_target().backend == "cuda"


class Launch:
    """kernel[grid](*tensors, *numbers, **constants), for any tensors of the same shapes.

    Args:
        kernel: its parameters are pointers, then numbers, then meta-parameters.
        grid: one to three numbers of programs.
        numbers: sizes and strides.
        constants: the meta-parameters and the options of the launch by their names.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], numbers: tuple[int, ...], **constants: Any):
        self.kernel, self.grid, self.numbers, self.constants = kernel, grid, numbers, constants
        self.sizes = (*grid, 1, 1)[:3]
        rest = [name for name in kernel.arg_names if name in constants]
        self.arguments = (*numbers, *(constants[name] for name in rest))
        # What Triton specializes on besides the numbers -> what it compiled.
        self.compiled: dict[Any, Any] = {}


def run(launches: Sequence[Launch], *tensors: Any) -> None:
    """Launch kernels one after another on the same tensors: one for each pointer, None where there is none."""
    if not isinstance(launches[0].kernel, JITFunction) or not isinstance(tensors[0], Tensor) or not _known():
        for launch in launches:
            launch.kernel[launch.grid](*tensors, *launch.numbers, **launch.constants)
        return
    pointers = [None if t is None else t.data_ptr() for t in tensors]
    dtypes = [None if t is None else t.dtype for t in tensors]
    device = driver.active.get_current_device()
    stream = driver.active.get_current_stream(device)
    key = (device, sum([p % 16 for p in pointers if p]) and tuple([not p or p % 16 == 0 for p in pointers]), *dtypes)
    hook = triton.knobs.runtime.launch_enter_hook
    listened = getattr(hook, "calls", hook)
    for launch in launches:
        kernel = launch.compiled.get(key)
        if kernel is None or listened:
            kernel = launch.kernel[launch.grid](*tensors, *launch.numbers, **launch.constants)
            launch.compiled[key] = kernel
        else:
            # No metadata and no hooks: nothing uses them.
            started = stream, kernel.function, kernel.packed_metadata, None, None, None
            kernel.run(*launch.sizes, *started, *pointers, *launch.arguments)


def launch(
    kernel: Any, grid: tuple[int, ...], tensors: Sequence[Any], numbers: tuple[int, ...], **constants: Any
) -> None:
    """Launch one kernel as `Launch` and `run` do, its `Launch` found by all its values."""
    run((_launch(kernel, grid, numbers, tuple(constants.items())),), *tensors)


@functools.lru_cache(maxsize=4096)
def _launch(kernel: Any, grid: tuple[int, ...], numbers: tuple[int, ...], constants: tuple) -> Launch:
    return Launch(kernel, grid, numbers, **dict(constants))
