"""Rules of the operators for PyTorch: fake kernels, vmap and autocast; and operators derived from a backend's others.

Derived are the backward of `linear` from those of its halves, and layers of several parts from layers of one.

The operators of `library` and the compiled ones of `extension` have the same arguments and share these rules.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SmileError
from .reference import accumulate_dtype, router_rows


def fake_route(x, router, num_experts_per_tok):
    shape = (x.shape[0], num_experts_per_tok)
    return x.new_empty(shape, dtype=accumulate_dtype(x)), x.new_empty(shape, dtype=torch.int32)


def fake_evidence(x, router, prior, real, factors, before, below, m, rank_of_router, sequences, scope, accumulates):
    rows, n = 1 if scope == 2 else x.shape[:-1].numel() // sequences, router.shape[0]
    shapes = (sequences, rows, m), (sequences, rows, n)
    weights, logs = (x.new_empty(shape, dtype=accumulate_dtype(x)) for shape in shapes)
    return weights, torch.empty_like(weights, dtype=torch.int32), logs, torch.empty_like(logs)


def fake_evidence_linear(
    x,
    weight,
    bias,
    vh,
    s,
    u,
    expert_bias,
    router,
    prior,
    real,
    factors,
    sums,
    past,
    below,
    m,
    rank_of_router,
    sequences,
    scope,
    accumulates,
):
    options = m, rank_of_router, sequences, scope, accumulates
    step = fake_evidence(x, vh, prior, real, factors, None, below, *options)
    return x.new_empty((*x.shape[:-1], weight.shape[0])), *step[:3]


def fake_apply(x, weight, bias, vh, s, u, expert_bias, weights, ids, save, parts=(), rank_of_parts=()):
    h = (*ids.shape, s.shape[-1]) if save else (0,)
    return x.new_empty((*x.shape[:-1], weight.shape[0])), x.new_empty(h, dtype=accumulate_dtype(x))


def fake_linear(
    x,
    weight,
    bias,
    vh,
    s,
    u,
    expert_bias,
    router,
    num_experts_per_tok,
    rank_of_router,
    save,
    parts=(),
    rank_of_parts=(),
):
    shape = (*x.shape[:-1], *([len(parts)] if parts else []), num_experts_per_tok)
    weights, ids = x.new_empty(shape, dtype=accumulate_dtype(x)), x.new_empty(shape, dtype=torch.int32)
    y, h = fake_apply(x, weight, bias, vh, s, u, expert_bias, weights, ids, save)
    return y, weights, ids, h


def fake_delta_(
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
    of_parts = (len(parts),) if parts else ()
    chosen = (x.shape[0], *of_parts, num_experts_per_tok) if ids is None else (0,)
    slots = num_experts_per_tok if ids is None else ids.shape[-1]
    h = (x.shape[0], *of_parts, slots, s.shape[-1]) if save else (0,)
    acc = accumulate_dtype(x)
    return x.new_empty(chosen, dtype=acc), x.new_empty(chosen, dtype=torch.int32), x.new_empty(h, dtype=acc)


def fake_delta(y, *args):
    return torch.empty_like(y, memory_format=torch.contiguous_format), *fake_delta_(y, *args)


def register(library: torch.library.Library, name: str, fake: Callable) -> Callable:
    """Register the rules of an operator of `library`; return its overload, which is the fastest to call."""
    op = getattr(getattr(torch.ops, library.ns), name).default
    torch.library.register_fake(op, functools.partial(_fake, op, fake), lib=library)
    torch.library.register_vmap(op, functools.partial(_vmap, op), lib=library)
    for device_type in ("cpu", "cuda"):
        library.impl(name, functools.partial(_without_autocast, op, device_type), f"Autocast{device_type.upper()}")
    return op


def _fake(op: Any, fake: Callable, *args):
    """Outputs without values. PyTorch also calls this where some arguments are on meta and others have values."""
    values = [a.device for a in args if type(a) in (Tensor, nn.Parameter) and a.device.type != "meta"]
    for argument, given in zip(op._schema.arguments, args if values else ()):
        if isinstance(given, Tensor) and given.device.type == "meta":
            raise SmileError(f"{argument.name}: is on meta; expected {values[0]}, where others are")
    return fake(*args)


def _vmap(op: Any, info, in_dims: Sequence[int | None], *args) -> tuple:
    """One call per batch entry, for any combination of batched arguments."""
    for argument, given, dim in zip(op._schema.arguments, args, in_dims):
        if argument.is_write and given is not None and dim is None:
            raise SmileError(
                f"{argument.name}: is not mapped by vmap, and what is written to it is; expected both or none"
            )
    calls = [
        op(*(a.select(d, i) if isinstance(a, Tensor) and d is not None else a for a, d in zip(args, in_dims)))
        for i in range(info.batch_size)
    ]
    return tuple(torch.stack(column) for column in zip(*calls)), (0,) * len(calls[0])


def _without_autocast(op: Callable, device_type: str, *args):
    """Autocast casts an operator's inputs; the arithmetic inside does not change (routing stays in float32)."""
    with torch.autocast(device_type, enabled=False):
        return op(*args)


def linear_backward(
    apply_backward: Callable,
    route_backward: Callable,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
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
    # One selected expert has weight 1 for any score: the router gets no gradient.
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


# One part of a layer: (index, slice of outputs, rank of its experts).
Part = tuple[int, slice, int]


def parts_with_experts(parts: Sequence[int], rank_of_parts: Sequence[int], rank: int) -> Iterator[Part]:
    """The parts of a layer in order, without dense ones; with rank `rank` if rank_of_parts is empty."""
    end = 0
    for part, features in enumerate(parts):
        end += features
        own = rank_of_parts[part] if rank_of_parts else rank
        if own:
            yield part, slice(end - features, end), own


def by_part(add: Callable) -> Callable:
    """A backend's `delta_` from one for a single part: one part after another adds to its columns of y."""

    def delta_(y, x, vh, s, u, expert_bias, router, weights, ids, m, g, save, parts=(), rank_of_parts=()):
        if not parts:
            return add(y, x, vh, s, u, expert_bias, router, weights, ids, m, g, save)
        shape, r = (x.shape[0], len(parts), m if ids is None else ids.shape[-1]), s.shape[-1]
        chosen = s.new_zeros(shape if ids is None else 0)
        chosen_ids = torch.full(chosen.shape, -1, dtype=torch.int32, device=x.device)
        h = s.new_zeros((*shape, r) if save else 0)
        for part, o, own in parts_with_experts(parts, rank_of_parts, r):
            bias = None if expert_bias is None else expert_bias[:, o]
            routing = (None, None) if ids is None else (weights[:, part].contiguous(), ids[:, part].contiguous())
            rows = router if router is None else router[part]
            factors = vh[part], s[part, :, :own], u[:, o, :own], bias, rows
            w, i, own_h = add(y[:, o], x, *factors, *routing, m, g, save)
            if ids is None:
                chosen[:, part], chosen_ids[:, part] = w, i
            if save:
                h[:, part, :, :own] = own_h
        return chosen, chosen_ids, h

    return delta_


def delta_backward(
    backend,
    dy: Tensor,
    x: Tensor,
    vh: Tensor,
    s: Tensor,
    u: Tensor,
    expert_bias: Tensor | None,
    router: Tensor | None,
    weights: Tensor,
    ids: Tensor,
    h: Tensor,
    rank_of_router: int,
    routes: bool,
    needs: Sequence[bool],
    parts: Sequence[int] = (),
    rank_of_parts: Sequence[int] = (),
) -> tuple[Tensor | None, ...]:
    """Gradients of x, vh, s, u, expert_bias, router and weights; each part uses a backend's other backwards.

    routes: the layer chose the weights itself; their gradient flows to the router.
    """
    of_layer = [needs[0], False, False, *needs[1:5]]

    def one(dy, vh, s, u, expert_bias, router, weights, ids, h):
        factors = dy, x, None, vh, s, u, expert_bias
        if routes:
            gradients = backend.linear_backward(
                *factors, router, weights, ids, h, rank_of_router, [*of_layer, needs[5]]
            )
            return gradients[0], *gradients[3:], None
        gradients = backend.apply_backward(*factors, weights, ids, h, [*of_layer, needs[6]])
        return gradients[0], *gradients[3:7], None, gradients[7]

    if not parts:
        return one(dy, vh, s, u, expert_bias, router, weights, ids, h)
    like = x, vh, s, u, expert_bias, router, weights
    total = [
        dy.new_zeros(t.shape, dtype=t.dtype) if needed and t is not None else None for t, needed in zip(like, needs)
    ]
    dx, dvh, ds, du, dexpert_bias, drouter, dweights = total
    for part, o, own in parts_with_experts(parts, rank_of_parts, s.shape[-1]):
        bias, rows = None if expert_bias is None else expert_bias[:, o], None if router is None else router[part]
        factors = dy[:, o], vh[part], s[part, :, :own], u[:, o, :own], bias, rows
        routing = (t.contiguous() for t in (weights[:, part], ids[:, part], h[:, part, :, :own]))
        gradients = one(*factors, *routing)
        into = (
            dx,
            dvh if dvh is None else dvh[part],
            ds if ds is None else ds[part, :, :own],
            du if du is None else du[:, o, :own],
            dexpert_bias if dexpert_bias is None else dexpert_bias[:, o],
            drouter if drouter is None else drouter[part],
            dweights if dweights is None else dweights[:, part],
        )
        for gradient, to in zip(gradients, into):
            if gradient is not None and to is not None:
                to += gradient
    return tuple(total)
