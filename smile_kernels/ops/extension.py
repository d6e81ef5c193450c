"""The compiled extension: C++ for CPU tensors, CUDA C++ for GPU tensors, as `torch.ops.smile_kernels_ext.*`.

`setup.py` builds its libraries in this folder; they are loaded on first use. An exported program that calls these
operators runs without Python.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import registration

_LIBRARY = torch.library.Library("smile_kernels_ext", "FRAGMENT")


def why_not(device_type: str, dtype: torch.dtype, num_experts: int, training: bool) -> str | None:
    """Why the extension cannot run such a layer on `device_type`, in one sentence; None if it can."""
    if device_type == "cuda" and dtype == torch.float64:
        return "its kernels take float32, bfloat16 and float16, not float64"
    if device_type == "cuda" and num_experts > 256:
        return f"its kernels take up to 256 experts, not {num_experts}"
    reason = unavailable(device_type)
    key = f"{_LIBRARY.ns}::delta_", device_type.upper()
    if reason is None and not torch._C._dispatch_has_kernel_for_dispatch_key(*key):
        return f"its {device_type} library was built from older sources, which had no operator delta_; build it again"
    return reason


@functools.cache
def unavailable(device_type: str) -> str | None:
    """Why the extension's library for `device_type` cannot be used; None if it can."""
    if device_type not in ("cpu", "cuda"):
        return f"the compiled extension has no kernels for {device_type} tensors"
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        return f"it needs PyTorch 2.10 or later, not {torch.__version__}"
    for kind in dict.fromkeys(["cpu", device_type]):  # the CPU library defines the operators
        path = Path(__file__).with_name(f"_extension_{kind}.so")
        if not path.exists():
            tools = "a C++ compiler" if kind == "cpu" else "a CUDA toolkit and a PyTorch built for CUDA"
            recorded = path.with_suffix(".txt")  # written by setup.py if the build reached this step
            reason = f" ({recorded.read_text().strip()})" if recorded.exists() else ""
            return (
                f"its {kind} library was not built when smile_kernels was installed{reason}: that takes PyTorch 2.10 "
                f"or later, ninja and {tools}, and `pip install --no-build-isolation` so that the build sees them"
            )
        try:
            _load(path)
        except OSError as error:
            return f"{path.name} does not load with PyTorch {torch.__version__}: {error}"
    if device_type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (7, 5):
        return f"its kernels need compute capability 7.5, and {torch.cuda.get_device_name()} is older"
    return None


@functools.cache
def _load(path: Path) -> None:
    torch.ops.load_library(path)
    if path.name == "_extension_cpu.so":
        for name in ("route", "apply", "linear", "delta", "delta_", "evidence", "evidence_linear"):
            if not hasattr(torch.ops.smile_kernels_ext, name):
                raise OSError(f"it was built from older sources, which had no operator {name}; build it again")
            registration.register(_LIBRARY, name, getattr(registration, f"fake_{name}"))


def _require(device_type: str) -> bool:
    if reason := unavailable(device_type):
        raise RuntimeError(f"the compiled extension cannot run: {reason}")
    return True


# What torch.compiler.assume_constant_result sets: loading a library must not be traced.
_require._dynamo_marked_constant = True  # type: ignore[attr-defined]


def route(x: Tensor, router: Tensor, num_experts_per_tok: int) -> tuple[Tensor, Tensor]:
    """x [T, D], router [N, g, D] -> weights [T, m] float32, ids [T, m] int32."""
    _require(x.device.type)
    return torch.ops.smile_kernels_ext.route.default(x, router, num_experts_per_tok)


def apply(x, weight, bias, vh, s, u, expert_bias, weights, ids, save) -> tuple[Tensor, Tensor]:
    """y = x W^T + b + sum over slots of w (U (s * V^T x) + expert_bias); h [T, m, r] = V^T x of each slot if `save`."""
    _require(x.device.type)
    return torch.ops.smile_kernels_ext.apply.default(x, weight, bias, vh, s, u, expert_bias, weights, ids, save)


def linear(x, weight, bias, vh, s, u, expert_bias, router, num_experts_per_tok, rank_of_router, save):
    """Route, then apply, in one pass -> y, weights, ids, h."""
    _require(x.device.type)
    return torch.ops.smile_kernels_ext.linear.default(
        x, weight, bias, vh, s, u, expert_bias, router, num_experts_per_tok, rank_of_router, save
    )


def delta_(
    y,
    x,
    vh,
    s,
    u,
    expert_bias,
    router,
    weights,
    ids,
    num_experts_per_tok,
    rank_of_router,
    save,
    parts=(),
    rank_of_parts=(),
):
    """Add the experts to y in place -> weights and ids where it chose them, and h."""
    _require(x.device.type)
    own = torch.ops.smile_kernels_ext.delta_.default
    experts = x, vh, s, u, expert_bias, router, weights, ids, num_experts_per_tok, rank_of_router, save
    if x.device.type == "cpu":
        return own(y, *experts, parts, rank_of_parts)
    return registration.by_part(own)(y, *experts, parts, rank_of_parts)


def route_backward(dweights, x, router, weights, ids, needs):
    """dq_i = w_i (dw_i - sum_j w_j dw_j) q_i / ||q_i|| on the selected experts -> dx [T, D], drouter [N, g, D]."""
    _require(x.device.type)
    wanted = _bits(needs)
    gradients = torch.ops.smile_kernels_ext.route_backward.default(dweights, x, router, weights, ids, wanted)
    return tuple(g if needed else None for g, needed in zip(gradients, needs))


def apply_backward(dy, x, weight, vh, s, u, expert_bias, weights, ids, h, needs):
    """Gradients of x, weight, bias, vh, s, u, expert_bias and weights; None where `needs` says so."""
    _require(x.device.type)
    gradients = torch.ops.smile_kernels_ext.apply_backward.default(
        dy, x, weight, vh, s, u, expert_bias, weights, ids, h, _bits(needs)
    )
    return tuple(g if needed else None for g, needed in zip(gradients, needs))


linear_backward = functools.partial(registration.linear_backward, apply_backward, route_backward)


def _bits(needs: Sequence[bool]) -> int:
    return sum(1 << i for i, needed in enumerate(needs) if needed)
