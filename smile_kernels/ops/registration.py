"""What PyTorch must know of an operator besides its kernels: the tensors it returns, its vmap and autocast rules.

And how the backward of `linear` follows from those of its halves.

The operators of `library` and the compiled ones of `extension`, whose arguments are the same, share them.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .reference import accumulate_dtype, router_rows


def fake_route(x, router, num_experts_per_tok):
    shape = (x.shape[0], num_experts_per_tok)
    return x.new_empty(shape, dtype=accumulate_dtype(x)), x.new_empty(shape, dtype=torch.int32)


def fake_apply(x, weight, bias, vh, s, u, expert_bias, weights, ids, save):
    h = (*ids.shape, s.shape[1]) if save else (0,)
    return x.new_empty((x.shape[0], weight.shape[0])), x.new_empty(h, dtype=accumulate_dtype(x))


def fake_linear(x, weight, bias, vh, s, u, expert_bias, router, num_experts_per_tok, rank_of_router, save):
    weights, ids = fake_route(x, vh, num_experts_per_tok)
    y, h = fake_apply(x, weight, bias, vh, s, u, expert_bias, weights, ids, save)
    return y, weights, ids, h


def register(library: torch.library.Library, name: str, fake: Callable) -> Callable:
    """Give an operator of `library` its rules; return its overload, the cheapest to call."""
    op = getattr(getattr(torch.ops, library.ns), name).default
    torch.library.register_fake(op, fake, lib=library)
    torch.library.register_vmap(op, functools.partial(_vmap, op), lib=library)
    for device_type in ("cpu", "cuda"):
        library.impl(name, functools.partial(_without_autocast, op, device_type), f"Autocast{device_type.upper()}")
    return op


def _vmap(op: Callable, info, in_dims: Sequence[int | None], *args) -> tuple:
    """One call per batch entry: right for any mix of batched arguments."""
    calls = [
        op(*(a.select(d, i) if isinstance(a, Tensor) and d is not None else a for a, d in zip(args, in_dims)))
        for i in range(info.batch_size)
    ]
    return tuple(torch.stack(column) for column in zip(*calls)), (0,) * len(calls[0])


def _without_autocast(op: Callable, device_type: str, *args):
    """Autocast chooses the dtype of an operator's inputs, not of the arithmetic inside (routing stays in float32)."""
    with torch.autocast(device_type, enabled=False):
        return op(*args)


def linear_backward(
    apply_backward: Callable,
    route_backward: Callable,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    vh: Tensor,
    s: Tensor,
    u: Tensor,
    expert_bias: Tensor | None,
    router: Tensor | None,
    weights: Tensor,
    ids: Tensor,
    h: Tensor,
    rank_of_router: int,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias, vh, s, u, expert_bias and router from a backend's two halves."""
    rows, needs_rows = router_rows(vh, router, rank_of_router), needs[3 if router is None else 7]
    # One selected expert has weight 1 whatever its score: the router gets no gradient.
    routed = ids.shape[1] > 1 and (needs[0] or needs_rows)
    wanted = [*needs[:7], routed]
    *gradients, dweights = apply_backward(dy, x, weight, vh, s, u, expert_bias, weights, ids, h, wanted)
    drouter = torch.zeros_like(router) if router is not None and needs[7] else None
    if routed:
        dx, drows = route_backward(dweights, x, rows, weights, ids, [needs[0], needs_rows])
        if needs[0]:
            gradients[0] += dx
        if needs[7]:
            drouter = drows
        elif needs_rows:
            gradients[3][:, :rank_of_router] += drows
    return (*gradients, drouter)
