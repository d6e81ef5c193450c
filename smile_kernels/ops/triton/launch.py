"""Launches with little host time: compiled kernels are cached and started in the same way as by Triton.

For each launch Triton binds, specializes and looks up all arguments again, which takes it many times as long as the
launch itself. A `Plan` is made once for given shapes and dtypes, and compiled once for each alignment of the tensors.
"""

import functools
import inspect
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import INTERPRETED, cdiv

# How the versions of Triton that this was written for start what they compiled.
_STATEMENT = (
    "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, launch_metadata, "
    "knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *bound_args.values())"
)


@functools.cache
def _known() -> bool:
    """Whether Triton starts kernels here as this module does; where not, each launch goes through Triton."""
    source = " ".join(inspect.getsource(JITFunction.run).split())
    return not INTERPRETED.value and _STATEMENT in source and driver.active.get_current_target().backend == "cuda"


class Launch:
    """kernel[grid](*tensors, *numbers, **constants), for any tensors of the same shapes.

    Args:
        kernel: its parameters are pointers, then numbers, then meta-parameters.
        grid: one to three numbers of programs.
        numbers: sizes and strides.
        without: pointers that are None.
        blocks: pointer -> block that the tensor memory accelerator reads, through a descriptor of the tensor.
        constants: the meta-parameters and the options of the launch by their names.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        numbers: tuple[int, ...],
        without: Sequence[str] = (),
        blocks: Mapping[Any, list[int]] | None = None,
        /,
        **constants: Any,
    ):
        self.kernel, self.grid, self.numbers, self.constants = kernel, grid, numbers, constants
        self.blocks = blocks or {}
        rest = [name for name in kernel.arg_names if name in constants]
        pointers = kernel.arg_names[: len(kernel.arg_names) - len(numbers) - len(rest)]
        self.pointers = [None if name in without else name for name in pointers]
        # What a compiled kernel takes before and after its pointers.
        self.sizes = (*grid, 1, 1)[:3]
        self.arguments = (*numbers, *(constants[name] for name in rest))

    def by_triton(self, tensors: Sequence[Tensor | None]) -> Any:
        """Compile, unless Triton has done so, and start; the compiled kernel."""
        given = [
            TensorDescriptor.from_tensor(tensor, self.blocks[name]) if name in self.blocks else tensor
            for name, tensor in zip(self.pointers, tensors)
        ]
        return self.kernel[self.grid](*given, *self.numbers, **self.constants)


class Plan:
    """Launches one after another, each on those of the tensors that its kernel's pointers are named after.

    Made for tensors of given shapes and dtypes.

    Args:
        launches: the launches.
        names: of the tensors that `run` takes.
        workspace: name -> shape and dtype of what the launches hand on to each other, in one allocation.
    """

    def __init__(
        self,
        launches: Sequence[Launch],
        names: Sequence[str | None],
        workspace: Mapping[str, tuple[tuple[int, ...], torch.dtype]] | None = None,
    ):
        workspace = workspace or {}
        self.launches = launches
        self.kept = not any(launch.blocks for launch in launches)  # descriptors are made by Triton
        # Where each part of the workspace begins, in bytes, and what it is.
        self.parts: list[tuple[int, tuple[int, ...], torch.dtype]] = []
        self.bytes = 0
        for shape, dtype in workspace.values():
            self.parts.append((self.bytes, shape, dtype))
            self.bytes += cdiv(math.prod(shape) * dtype.itemsize, 256) * 256
        # A pointer without a tensor is None, which is last.
        index = {name: i for i, name in enumerate((*names, *workspace))}
        picked = ([index.get(name, len(index)) for name in launch.pointers] for launch in launches)
        self.picks = [operator.itemgetter(*indices) for indices in picked]
        # Device, and the alignment that Triton specializes on -> how to start what it compiled.
        self.compiled: dict[Any, list[tuple]] = {}

    def run(self, *tensors: Any) -> None:
        """Launch on these tensors; the first is not None if there is a workspace."""
        memory = tensors[0].new_empty(self.bytes // tensors[0].itemsize) if self.bytes else None
        hook = triton.knobs.runtime.launch_enter_hook
        if not self.kept or getattr(hook, "calls", hook) or not _known():
            self._by_triton(tensors, memory)
            return
        pointers = [None if t is None else t.data_ptr() for t in tensors]
        device = driver.active.get_current_device()
        key = device, sum([p % 16 for p in pointers if p]) and tuple([not p or p % 16 == 0 for p in pointers])
        compiled = self.compiled.get(key)
        if compiled is None:
            kernels = self._by_triton(tensors, memory)
            self.compiled[key] = [
                (kernel.run, *launch.sizes, (kernel.function, kernel.packed_metadata), pick, launch.arguments)
                for kernel, launch, pick in zip(kernels, self.launches, self.picks)
            ]
            return
        if memory is not None:
            start = memory.data_ptr()
            pointers += [start + first for first, _, _ in self.parts]
        pointers.append(None)
        stream = driver.active.get_current_stream(device)
        for run, x, y, z, function, pick, arguments in compiled:
            # No metadata and no hooks: nothing uses them.
            run(x, y, z, stream, *function, None, None, None, *pick(pointers), *arguments)

    def _by_triton(self, tensors: Sequence[Any], memory: Any) -> list[Any]:
        given = list(tensors)
        for first, shape, dtype in self.parts:
            part = memory.view(torch.uint8)[first : first + math.prod(shape) * dtype.itemsize]
            given.append(part.view(dtype).view(shape))
        given.append(None)
        return [launch.by_triton(pick(given)) for launch, pick in zip(self.launches, self.picks)]


def launch(
    kernel: Any, grid: tuple[int, ...], tensors: Sequence[Any], numbers: tuple[int, ...], **constants: Any
) -> None:
    """Launch one kernel on the tensors of its pointers."""
    dtypes = tuple([None if t is None else t.dtype for t in tensors])
    _launch(kernel, grid, dtypes, numbers, tuple(constants.items())).run(*tensors)


@functools.lru_cache(maxsize=4096)
def _launch(
    kernel: Any, grid: tuple[int, ...], dtypes: tuple[Any, ...], numbers: tuple[int, ...], constants: tuple
) -> Plan:
    one = Launch(kernel, grid, numbers, **dict(constants))
    return Plan([one], one.pointers)
