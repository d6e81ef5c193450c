"""A SMILE layer for any number of tokens: h = x V^T, routed and scaled, then y = x W^T + b + the chosen experts."""

import functools

import torch
from torch import Tensor

from . import configs
from .common import cdiv
from .expand import describable, expand_choices, expand_launch
from .launch import Plan
from .route import route_launch
from .shrink import shrink_choices, shrink_launch

NAMES = ["x", "weight", "bias", "rows", "s", "u", "expert_bias", "weights", "ids", "h", "y"]


def prefill(
    device: configs.Device,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    vh: Tensor,
    s: Tensor,
    u: Tensor,
    expert_bias: Tensor | None,
    weights: Tensor,
    ids: Tensor,
    path: configs.ApplyPath,
    *,
    rank_of_router: int | None = None,
    save: bool,
    overlaps: bool = False,
    onto: Tensor | None = None,
    ends: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor]:
    """y [T, O] = x W^T + b + sum over slots of w (U (s * V^T x) + expert_bias); h [T, m, r] = V^T x if `save`.

    x [T, D], weight [O, D], bias [O], vh [N, k, D] and u [N, O, r] of any strides, s [N, r], expert_bias [N, O] of any
    rows, weights and ids [T, m]. With rank_of_router, weights and ids are outputs: the choice made from the first
    rank_of_router of each expert's products. `overlaps`: ids come from the kernel ahead, one of ours. `onto` [T, O] of
    any rows is added to in place, instead of x W^T + b.

    `ends`: where each of P parts ends in O, up to four. Then vh [P, N, k, D] and s [P, N, r] are contiguous, weights
    and ids [T, P, m], and h [T, P, m, r].

    `path` is how the base product is made: "fused" in the same accumulator; "tma" likewise, with x and weight read by
    the tensor memory accelerator unless their alignment forbids it; "delta" by cuBLAS on top of the rest.
    """
    (tokens, d), (n, o, r), experts = x.shape, u.shape, s.numel() // s.shape[-1]
    k = r if rank_of_router is None else vh.shape[-2]
    bias_stride = 0 if expert_bias is None else expert_bias.stride(0)
    y = x.new_empty(tokens, o) if onto is None else onto
    h = s.new_empty((*ids.shape, r) if save else 0)
    tma = path == "tma" and weight is not None and describable(x) and describable(weight)
    prepared = _plan(
        configs.settings(device, x.dtype), device, x.dtype, path, tma, tokens, d, o, experts, n, k, r, ids.shape,
        rank_of_router, (x.stride(0), *vh.stride()[-3:]), (*u.stride(), bias_stride, y.stride(0)), bias is not None,
        expert_bias is not None, save, overlaps=overlaps, add=onto is not None, ends=ends,
    )  # fmt: skip
    prepared.run(x, weight, bias, vh, s, u, expert_bias, weights, ids, h if save else None, y)
    return y.addmm_(x, weight.T) if path == "delta" and weight is not None else y, h


@functools.lru_cache(maxsize=1024)
def _plan(_settings, *arguments, **options) -> Plan:
    return plan(*arguments, **options)


def plan(
    device, dtype, path, tma, tokens, d, o, experts, n, k, r, slots, rank_of_router, of_first, of_last, bias,
    expert_bias, save, *, overlaps=False, add=False, ends=(),
) -> Plan:  # fmt: skip
    """The launches of `prefill`, on the tensors called `NAMES`.

    `experts`: of all parts, k rows of vh each; n: of one part. `slots`: the shape of ids. `of_first`: strides of x and
    vh. `of_last`: strides of u, expert_bias and y.
    """
    shrink_choice = shrink_choices(device, dtype, tokens, experts * k, d)
    expand_choice = expand_choices(device, dtype, tokens, o, n * r if path == "delta" else d, r)
    routes, m, parts = rank_of_router is not None, slots[-1], len(ends) or 1
    # Of many tokens some choose every expert.
    selected = m if not routes and not ends and tokens <= 64 else None
    splits, shrink = shrink_launch(device, *shrink_choice, tokens, d, experts, k, selected, of_first, overlaps=overlaps)
    route = route_launch(
        device, tokens, splits, experts // parts, k, rank_of_router or 0, r, m, parts,
        routes=routes, scales=True, gates=expert_bias, save=save,
    )  # fmt: skip
    seen, strides = route.constants["BLOCK_T"], (of_first[0], *of_last)
    expand = expand_launch(
        device, *expand_choice, tokens, d, o, n, r, seen, strides,
        base=path != "delta", add=add, ends=ends, tma=tma, bias=bias, expert_bias=expert_bias,
    )  # fmt: skip
    workspace = {
        "partial": ((splits, tokens, experts, k), torch.float32),
        "scaled": ((tokens, experts, r), dtype),
        "present": ((cdiv(tokens, seen), experts), torch.int8),
    }
    if expert_bias:
        workspace["gates"] = (tokens, experts), dtype
    return Plan([shrink, route, expand], NAMES, workspace)
