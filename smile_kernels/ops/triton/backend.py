"""The Triton backend: NVIDIA GPUs from compute capability 8.0, AMD gfx942; CPU tensors under Triton's interpreter.

T tokens, D in_features, O out_features, N experts, m experts per token, r rank of an expert, g rank of the router.
"""

import functools
import itertools
from typing import Any, NamedTuple

import numpy
import torch
import triton
from packaging.version import Version
from torch import Tensor

from ...versions import warn_if_newer
from .. import registration
from ..reference import router_rows
from . import backward, configs, decode, grouped, prefill
from .common import INTERPRETED
from .evidence import evidence as _evidence
from .launch import Plan
from .route import empty_routing
from .route import route as _route

warn_if_newer("triton")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(device_type: str, dtype: torch.dtype, num_experts: int, training: bool) -> str | None:
    """Why this backend cannot run such a layer on `device_type`; None if it can."""
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if version < (3, 6):
        return f"it needs Triton 3.6 or newer, not {triton.__version__}"
    if INTERPRETED.value and version < (3, 7) and Version(numpy.__version__) >= Version("2.4"):
        return f"Triton {triton.__version__}'s interpreter needs NumPy before 2.4, not {numpy.__version__}"
    if INTERPRETED.value and device_type != "cpu":
        return f"Triton's interpreter supports cpu tensors, not {device_type} tensors"
    if not INTERPRETED.value and device_type != "cuda":
        return f"it supports cuda tensors, not {device_type} tensors; TRITON_INTERPRET=1 interprets it on a CPU, slowly"
    if dtype not in _DTYPES:
        return f"it takes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if device_type == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU here"
    if device_type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "it needs a GPU of compute capability 8.0 or newer"
    return None


def prepare() -> None:
    """Allocate the kernels' state on the current GPU."""
    decode.prepare(torch.device("cuda", torch.cuda.current_device()))


def _rows(x: Tensor) -> Tensor:
    """x with contiguous rows, as the kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [t if t is None else t.contiguous() for t in tensors]


def route(x: Tensor, router: Tensor, num_experts_per_tok: int) -> tuple[Tensor, Tensor]:
    """x [T, D], router [N, g, D] -> weights [T, m] float32, ids [T, m] int32."""
    if x.shape[0] == 0:
        return empty_routing(x, num_experts_per_tok)
    if router.stride()[1:] != (router.shape[2], 1):
        router = router.contiguous()
    with torch.cuda.device_of(x):
        return _route(configs.device_of(x.device), _rows(x), router, num_experts_per_tok)


def evidence(x, router, prior, real, factors, before, below, m, rank_of_router, sequences, scope, accumulates):
    """One step of a routing policy -> weights, ids [B, R, m], evidence, sums [B, R, N]."""
    with torch.cuda.device_of(x):
        return _evidence(
            configs.device_of(x.device), _rows(x), router[:, :rank_of_router], prior, real, factors, before, below,
            m, sequences, scope, accumulates,
        )  # fmt: skip


def linear(x, weight, bias, vh, s, u, expert_bias, router, num_experts_per_tok, rank_of_router, save):
    """Route and apply in one pass -> y [T, O], weights [T, m], ids [T, m], h [T, m, r]."""
    m, g, x, device = num_experts_per_tok, rank_of_router, _rows(x), configs.device_of(x.device)
    way = _way(
        configs.settings(device, x.dtype), device, x.dtype, x.shape, x.stride(), vh.shape, u.shape, bias is not None,
        expert_bias is not None, router is not None, m, g, save,
    )  # fmt: skip
    if way.path == "route_first":
        weights, ids = route(x, router_rows(vh, router, g), m)
        y, h = apply(x, weight, bias, vh, s, u, expert_bias, weights, ids, save, overlaps=True)
        return y, weights, ids, h
    if x.is_cuda and x.get_device() != torch.cuda.current_device():  # faster than always to set it
        with torch.cuda.device_of(x):
            return linear(x, weight, bias, vh, s, u, expert_bias, router, m, g, save)
    weight, bias, vh, s, u, expert_bias = _contiguous(weight, bias, vh, s, u, expert_bias)
    layer = x, weight, bias, vh, s, u, expert_bias
    weights = s.new_empty(x.shape[0], m)
    ids = torch.empty_like(weights, dtype=torch.int32)
    if way.plan is None:
        y, h = prefill.prefill(device, *layer, weights, ids, way.apply_path, rank_of_router=g, save=save)
        return y, weights, ids, h
    y = x.new_empty(x.shape[0], u.shape[1])
    h = s.new_empty((*ids.shape, s.shape[1]) if save else 0)
    if way.path == "one_product":
        way.plan.run(*layer, weights, ids, h if save else None, y)
        return y.addmm_(x, weight.T) if way.apply_path == "delta" else y, weights, ids, h
    way.plan.run(*layer, decode.arrivals(x.device), y, weights, ids)
    return y, weights, ids, h


class _Way(NamedTuple):
    """How a layer that chooses its experts is run."""

    path: configs.LinearPath
    apply_path: configs.ApplyPath = "fused"
    plan: Plan | None = None


@functools.lru_cache(maxsize=1024)
def _way(_settings, device, dtype, of_x, strides_of_x, of_vh, of_u, bias, expert_bias, router, m, g, save) -> _Way:
    (tokens, d), (_, k, _), (n, o, r) = of_x, of_vh, of_u
    path: configs.LinearPath = "route_first"
    if tokens and not router:
        path = configs.linear_path(device, dtype, tokens, d, o, n, k, g, r, m, save)
    if path == "route_first":
        return _Way(path)
    if path != "one_product":
        sizes = tokens, d, o, n, k, g, r, m, strides_of_x[0]
        one_launch = path == "decode_one_launch"
        return _Way(path, plan=decode.plan(device, dtype, *sizes, bias, expert_bias, one_launch))
    apply_path = configs.apply_path(device, dtype, tokens, d, o, n, r, m)
    if apply_path == "tma":  # depends on the alignment too
        return _Way(path, apply_path)
    if apply_path == "grouped":  # every product is already computed
        apply_path = "delta"
    of_first, of_last = (strides_of_x[0], k * d, d, 1), (o * r, r, 1, o if expert_bias else 0, o)
    layer = tokens, d, o, n, n, k, r, (tokens, m), g, of_first, of_last, bias, expert_bias, save
    return _Way(path, apply_path, prefill.plan(device, dtype, apply_path, False, *layer))


def apply(x, weight, bias, vh, s, u, expert_bias, weights, ids, save, *, overlaps=False):
    """y [T, O] = x W^T + b + sum over slots of w (U (s * V^T x) + expert_bias); h [T, m, r] = V^T x if `save`.

    `overlaps`: the routing was made by the kernel ahead, one of ours.
    """
    (tokens, d), (n, o, r), m = x.shape, u.shape, ids.shape[1]
    if tokens == 0:
        return x.new_empty(0, o), s.new_empty((0, m, r) if save else 0)
    x = _rows(x)
    weight, bias, vh, s, u, expert_bias = _contiguous(weight, bias, vh, s, u, expert_bias)
    weights, ids = _contiguous(weights, ids)
    device = configs.device_of(x.device)
    path = configs.apply_path(device, x.dtype, tokens, d, o, n, r, m)
    with torch.cuda.device_of(x):
        if path == "grouped":
            if not overlaps:  # a given routing may have ids without an expert
                weights, ids, _ = grouped.none_as_first(weights, ids, n)
            return grouped.apply(device, x, weight, bias, vh, s, u, expert_bias, weights, ids, save)
        layer = x, weight, bias, vh, s, u, expert_bias, weights, ids, path
        return prefill.prefill(device, *layer, save=save, overlaps=overlaps)


def delta_(y, x, vh, s, u, expert_bias, router, weights, ids, m, g, save, parts=(), rank_of_parts=()):
    """Add the experts to y [T, O], of any rows, in place -> weights and ids where it chose them, and h.

    Up to four parts of one rank are added together, others one at a time.
    """
    experts = vh, s, u, expert_bias, router, weights, ids, m, g, save
    uniform = all(rank == s.shape[-1] for rank in rank_of_parts)
    if 1 < len(parts) <= 4 and uniform and len(x):
        (tokens, d), (n, o, r) = x.shape, u.shape
        if configs.apply_path(configs.device_of(x.device), x.dtype, tokens, d, o, n, r, m) != "grouped":
            return _add_parts(y, x, *experts, tuple(itertools.accumulate(parts)))
    return _add_each_part(y, x, *experts, parts, rank_of_parts)


def _add_parts(y, x, vh, s, u, expert_bias, router, weights, ids, num_experts_per_tok, rank_of_router, save, ends):
    """All parts at once: one product of x with the rows of all parts, one choice, one pass over y."""
    routes, device, x = ids is None, configs.device_of(x.device), _rows(x)
    vh, s, router, weights, ids = _contiguous(vh, s, router, weights, ids)
    if expert_bias is not None:
        expert_bias = _rows(expert_bias)
    with torch.cuda.device_of(x):
        tied = routes and router is None
        if routes and router is not None:
            weights, ids = _route(device, x, router, num_experts_per_tok)
        elif routes:
            weights, ids = empty_routing(x, len(ends), num_experts_per_tok)
        experts = vh, s, u, expert_bias, weights, ids, "delta"
        options = {"rank_of_router": rank_of_router if tied else None, "onto": y, "ends": ends, "save": save}
        _, h = prefill.prefill(device, x, None, None, *experts, **options)
    return *((weights, ids) if routes else (s.new_empty(0), s.new_empty(0, dtype=torch.int32))), h


@registration.by_part
def _add_each_part(y, x, vh, s, u, expert_bias, router, weights, ids, num_experts_per_tok, rank_of_router, save):
    """As `delta_`, one part at a time."""
    (tokens, d), (n, o, r), m, g = x.shape, u.shape, num_experts_per_tok, rank_of_router
    routes, device = ids is None, configs.device_of(x.device)
    m = m if routes else ids.shape[1]
    none = s.new_empty(0), s.new_empty(0, dtype=torch.int32)
    if tokens == 0:
        return *(empty_routing(x, m) if routes else none), s.new_empty((0, m, r) if save else 0)
    x = _rows(x)
    s, weights, ids = _contiguous(s, weights, ids)
    if expert_bias is not None:
        expert_bias = _rows(expert_bias)
    linear_path = "route_first"
    if routes and router is None:
        linear_path = configs.linear_path(device, x.dtype, tokens, d, o, n, vh.shape[1], g, r, m, save)
    with torch.cuda.device_of(x):
        if linear_path != "route_first":
            weights, ids = empty_routing(x, m)
            experts = vh, s, u, expert_bias, weights, ids, "delta"
            _, h = prefill.prefill(device, x, None, None, *experts, rank_of_router=g, onto=y, save=save)
            return weights, ids, h
        if routes:
            weights, ids = route(x, router_rows(vh, router, g), m)
        if configs.apply_path(device, x.dtype, tokens, d, o, n, r, m) == "grouped":
            given = (weights, ids) if routes else grouped.none_as_first(weights, ids, n)[:2]
            _, h = grouped.apply(device, x, None, None, vh, s, u, expert_bias, *given, save, y)
        else:
            experts = vh, s, u, expert_bias, weights, ids, "delta"
            _, h = prefill.prefill(device, x, None, None, *experts, onto=y, save=save, overlaps=routes)
    return *((weights, ids) if routes else none), h


def apply_backward(dy, x, weight, vh, s, u, expert_bias, weights, ids, h, needs, rank_of_router=0):
    """Gradients of x, weight, bias, vh, s, u, expert_bias and weights; None where `needs` says so.

    With rank_of_router, the weights come from the first rank_of_router products in h, where their gradient continues.
    Without a weight dx is that of the experts alone.
    """
    if x.shape[0] == 0:
        like = (x, weight, dy[0:1].sum(0), vh, s, u, expert_bias, weights)
        return tuple(torch.zeros_like(t) if needed else None for t, needed in zip(like, needs))
    dy, x = _rows(dy), _rows(x)
    vh, s, u, expert_bias, weights, ids, h = _contiguous(vh, s, u, expert_bias, weights, ids, h)
    device, factors = configs.device_of(x.device), (vh, s, u, expert_bias)
    with torch.cuda.device_of(x):
        return backward.apply_backward(device, dy, x, weight, *factors, weights, ids, h, needs, rank_of_router)


def route_backward(dweights, x, router, weights, ids, needs):
    """Gradients of x and router from those of the weights; None where `needs` says so."""
    if x.shape[0] == 0:
        return tuple(torch.zeros_like(t) if needed else None for t, needed in zip((x, router), needs))
    dweights, weights, ids = _contiguous(dweights, weights, ids)
    with torch.cuda.device_of(x):
        return backward.route_backward(configs.device_of(x.device), dweights, _rows(x), router, weights, ids, needs)


def linear_backward(dy, x, weight, vh, s, u, expert_bias, router, weights, ids, h, rank_of_router, needs):
    """Gradients of x, weight, bias, vh, s, u, expert_bias and router; None where `needs` says so."""
    layer = dy, x, weight, vh, s, u, expert_bias
    if router is None and rank_of_router <= h.shape[-1] and ids.shape[1] > 1:
        # h holds the router's products: one pass serves both.
        return apply_backward(*layer, weights, ids, h, [*needs[:7], False], rank_of_router)
    rest = router, weights, ids, h, rank_of_router, needs
    return registration.linear_backward(apply_backward, route_backward, *layer, *rest)
