"""The compiled extension: C++ for CPU tensors, CUDA C++ for GPU tensors, as `torch.ops.smile_kernels_ext.*`.

Its libraries lie beside this file where `setup.py` could build them, and are loaded on first use. An exported program
that calls these operators runs without Python. On a CPU there is no backward: the composition trains.
"""

import functools
from pathlib import Path

import torch
from torch import Tensor

from .reference import accumulate_dtype


@functools.cache
def why_not(device_type: str) -> str | None:
    """Why the extension cannot serve tensors on `device_type`, in one sentence; None where it can."""
    if device_type not in ("cpu", "cuda"):
        return f"the compiled extension has no kernels for {device_type} tensors"
    for kind in dict.fromkeys(["cpu", device_type]):  # the CPU library defines the operators
        path = Path(__file__).with_name(f"_extension_{kind}.so")
        if not path.exists():
            tools = "a C++ compiler" if kind == "cpu" else "a CUDA toolkit and a PyTorch built for CUDA"
            return (
                f"its {kind} library was not built when smile_kernels was installed: that takes PyTorch 2.10 or later, "
                f"ninja and {tools}, and `pip install --no-build-isolation` so that the build sees them"
            )
        try:
            _load(path)
        except OSError as error:
            return f"{path.name} does not load with PyTorch {torch.__version__}: {error}"
    return None


@functools.cache
def _load(path: Path) -> None:
    torch.ops.load_library(path)
    if path.name == "_extension_cpu.so":
        for fake in (_fake_route, _fake_apply, _fake_linear):
            torch.library.register_fake(f"smile_kernels_ext::{fake.__name__.removeprefix('_fake_')}", fake)


def _op(name: str, device_type: str):
    if reason := why_not(device_type):
        raise RuntimeError(f"the compiled extension cannot run: {reason}")
    return getattr(torch.ops.smile_kernels_ext, name).default


def _fake_route(x, router, num_experts_per_tok):
    shape = (x.shape[0], num_experts_per_tok)
    return x.new_empty(shape, dtype=accumulate_dtype(x)), x.new_empty(shape, dtype=torch.int32)


def _fake_apply(x, weight, bias, vh, s, u, expert_bias, weights, ids, save):
    h = (*ids.shape, s.shape[1]) if save else (0,)
    return x.new_empty((x.shape[0], weight.shape[0])), x.new_empty(h, dtype=accumulate_dtype(x))


def _fake_linear(x, weight, bias, vh, s, u, expert_bias, router, num_experts_per_tok, rank_of_router, save):
    weights, ids = _fake_route(x, vh, num_experts_per_tok)
    y, h = _fake_apply(x, weight, bias, vh, s, u, expert_bias, weights, ids, save)
    return y, weights, ids, h


def route(x: Tensor, router: Tensor, num_experts_per_tok: int) -> tuple[Tensor, Tensor]:
    """x [T, D], router [N, g, D] -> weights [T, m] float32, ids [T, m] int32."""
    return _op("route", x.device.type)(x, router, num_experts_per_tok)


def apply(x, weight, bias, vh, s, u, expert_bias, weights, ids, save) -> tuple[Tensor, Tensor]:
    """y = x W^T + b + sum over slots of w (U (s * V^T x) + expert_bias); h [T, m, r] = V^T x of each slot if `save`."""
    return _op("apply", x.device.type)(x, weight, bias, vh, s, u, expert_bias, weights, ids, save)


def linear(x, weight, bias, vh, s, u, expert_bias, router, num_experts_per_tok, rank_of_router, save):
    """Route, then apply, in one pass -> y, weights, ids, h."""
    op = _op("linear", x.device.type)
    return op(x, weight, bias, vh, s, u, expert_bias, router, num_experts_per_tok, rank_of_router, save)
