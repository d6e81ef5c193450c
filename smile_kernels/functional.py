"""Functional interface: a SMILE layer, its router and its scores as functions of tensors."""

import math
import reprlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import SmileError, check_integer
from .ops import library, reference

__all__ = ["route", "router_projections", "router_scores", "select_experts", "smile_delta", "smile_linear"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ID_DTYPES = (torch.int32, torch.int64, torch.int16, torch.int8)
_INT32 = -(2**31), 2**31 - 1


def smile_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vh: Tensor,
    s: Tensor,
    u: Tensor,
    expert_bias: Tensor | None = None,
    router: Tensor | None = None,
    *,
    num_experts_per_tok: int,
    rank_of_router: int,
    routing: tuple[Tensor, Tensor] | None = None,
    routing_weights: Tensor | None = None,
    backend: str | None = None,
    parts: Sequence[int] | None = None,
    rank_of_parts: Sequence[int] | None = None,
) -> Tensor:
    """A linear layer plus a sparse mixture of low-rank experts, routed token by token.

        y = W x + b + sum over the m selected i of w_i (U_i (s_i * V_i[:, :r]^T x) + expert_bias_i)

    The m selected experts have the largest score_i = ||V_i[:, :g]^T x||_2; w is the softmax of their scores.

    Equivalent to (T tokens, one dtype)::

        score = torch.einsum("td,ngd->tng", x, vh[:, :rank_of_router]).norm(dim=-1)
        p, ids = score.softmax(-1).topk(num_experts_per_tok)
        w = p / p.sum(-1, keepdim=True)
        y = F.linear(x, weight, bias)
        for j in range(num_experts_per_tok):
            i = ids[:, j]
            z = s[i] * torch.einsum("td,trd->tr", x, vh[i, :r])
            y = y + w[:, j, None] * (torch.einsum("tr,tor->to", z, u[i]) + expert_bias[i])

    Args:
        x: [..., D] input; any leading shape, including (D,) and 0 tokens; any strides.
        weight: [O, D] shared weight W.
        bias: [O] shared bias, or None.
        vh: [N, max(r, g), D] right singular vectors as rows.
        s: [N, r] singular values, float32 (float64 where x is float64); applied in float32.
        u: [N, O, r] left singular vectors as columns.
        expert_bias: [N, O] each expert's bias minus the shared bias, or None.
        router: [N, g, D] router rows; by default the first g rows of `vh`.
        num_experts_per_tok: m, 1 <= m <= N.
        rank_of_router: g.
        routing: (weights [..., m], ids [..., m]) to use instead of the router's choice; ids are integers in [0, N), or
            -1 for no expert, with its weight ignored; m = 0: only the shared layer. Other ids raise on a CPU; on a GPU,
            where checking them would synchronise, they are treated as -1.
        routing_weights: [..., N] finite weights, 0 or more: the m largest are used, divided by their sum. A token whose
            weights are all 0 has no experts. Other values raise on a CPU; on a GPU, where checking them would
            synchronise, they count as 0.
        backend: "triton", "cuda", "cpu" or "torch"; by default the environment variable SMILE_KERNELS_BACKEND, then
            the first that runs on x's device (see `smile_kernels.backends`).
        parts: (O_1, ..., O_P) for P projections of the same x, such as query, key and value. Their rows are
            concatenated, O = O_1 + ... + O_P, and each part has its own router and experts: vh [P, N, max(r, g), D],
            s [P, N, r], u [N, O, r], expert_bias [N, O], router [P, N, g, D]. Routing is then [..., P, m], and
            routing_weights [..., P, N]. The output is the concatenation of the outputs of P layers.
        rank_of_parts: [P] integers from 0 to r: rank of the experts of each part, by default r. Entries of vh, s and u
            beyond that rank are not read. A part of rank 0 is dense: it has no experts and is not routed.

    Returns:
        y: [..., O] in x's dtype. Under autocast the inputs are cast as in F.linear.

    Routing is computed in float32 for every dtype of x (float64 for float64); ties go to the lower index; a NaN score
    ranks last. x, weight, bias, vh, u, expert_bias and router share one dtype: float32, bfloat16, float16 or float64.
    Derivatives exist for every floating-point argument, in reverse and in forward mode, the choice of experts being
    constant; with m = 1 the weight is exactly 1 and the router gets no gradient. The kernels compute first derivatives
    in reverse mode; others are computed by the reference, which is slower.

    Under torch.compile, second derivatives exist by transforms of torch.func inside the compiled function. Of a
    compiled call itself PyTorch refuses them where a backend uses AOTAutograd, as inductor does. With backend="eager"
    it runs the backward pass of a layer without recording it: a derivative of that pass lacks the layer's terms without
    an error.

    Raises:
        ValueError: shapes, dtypes or num_experts_per_tok do not fit; the message names the argument.
        RuntimeError: the requested backend cannot run here; the message says why.

    Source: SMILE, arXiv 2408.10174.
    """
    if isinstance(x, Tensor) and reference.autocasts(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, vh, u = (_cast(t, dtype) for t in (x, weight, vh, u))
        bias, expert_bias, router = (None if t is None else _cast(t, dtype) for t in (bias, expert_bias, router))
    _check_backend(backend)
    for name, tensor in (("x", x), ("weight", weight)):
        check_tensor(name, tensor)
    if weight.dim() != 2:
        raise shape_error("weight", weight, ("O", "D"))
    check_tensor("s", s)
    o, d = weight.shape
    if parts is not None or rank_of_parts is not None:
        parts, rank_of_parts = check_parts(parts, rank_of_parts, o, s.shape[-1] if s.dim() else 0)
    _check(x, weight, o, d, bias, vh, s, u, expert_bias, router, num_experts_per_tok, rank_of_router, len(parts or ()))
    leading = x.shape[:-1]
    is_flat = x.dim() == 2  # a view costs a microsecond, a small layer tens of them
    tokens = x if is_flat else x.reshape(-1, x.shape[-1])
    weights = ids = None
    if routing is not None or routing_weights is not None:
        weights, ids = _given_routing(x, s, routing, routing_weights, num_experts_per_tok)
        if ids.shape[-1] == 0:
            return F.linear(x, weight, bias)
    layer = tokens, weight, bias, vh, s, u, expert_bias
    try:
        if parts is not None:
            options = num_experts_per_tok, rank_of_router, parts, rank_of_parts
            y = library.linear_of_parts(*layer, router if ids is None else None, weights, ids, *options, backend)
        elif ids is None:
            y = library.linear(*layer, router, num_experts_per_tok, rank_of_router, backend)
        else:
            y = library.apply(*layer, weights, ids, backend)
    except (RuntimeError, SmileError) as error:
        _name_id(error, routing, s.shape[-2])
        raise
    return y if is_flat else y.view(*leading, weight.shape[0])


def smile_delta(
    y: Tensor,
    x: Tensor,
    vh: Tensor,
    s: Tensor,
    u: Tensor,
    expert_bias: Tensor | None = None,
    router: Tensor | None = None,
    *,
    num_experts_per_tok: int,
    rank_of_router: int,
    routing: tuple[Tensor, Tensor] | None = None,
    routing_weights: Tensor | None = None,
    backend: str | None = None,
    parts: Sequence[int] | None = None,
    rank_of_parts: Sequence[int] | None = None,
    inplace: bool = False,
) -> Tensor:
    """Add the experts of a SMILE layer to a given base product, such as that of a quantized weight.

        y + sum over the m selected i of w_i (U_i (s_i * V_i[:, :r]^T x) + expert_bias_i)

    With y = W x + b this equals `smile_linear`; the other arguments are the same.

    Args:
        y: [..., O] base product, of x's leading shape and dtype.
        inplace: add to y itself and return it. No argument may require a gradient then, and y must be contiguous, or
            [T, O] with contiguous rows of any stride.

    Returns:
        [..., O] in x's dtype. Derivatives are as in `smile_linear`, including those for y.

    Raises:
        ValueError: shapes, dtypes or num_experts_per_tok do not fit, or y cannot be added to in place; the message
            names the argument.
        RuntimeError: the requested backend cannot run here; the message says why.

    Source: SMILE, arXiv 2408.10174.
    """
    if isinstance(x, Tensor) and reference.autocasts(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, vh, u = (_cast(t, dtype) for t in (x, vh, u))
        expert_bias, router = (None if t is None else _cast(t, dtype) for t in (expert_bias, router))
        y = y if inplace else _cast(y, dtype)
    _check_backend(backend)
    for name, tensor in (("y", y), ("x", x), ("vh", vh), ("s", s), ("u", u)):
        check_tensor(name, tensor)
    if u.dim() != 3:
        raise shape_error("u", u, ("N", "O", "r"))
    of_parts = check_parts(parts, rank_of_parts, u.shape[1], s.shape[-1] if s.dim() else 0)
    if vh.dim() != 3 + bool(of_parts[0]):
        raise shape_error("vh", vh, (*["P"] * bool(of_parts[0]), "N", "max(r, g)", "D"))
    factors, d = (vh, s, u, expert_bias, router), vh.shape[-1]
    _check(x, x, u.shape[1], d, None, *factors, num_experts_per_tok, rank_of_router, len(of_parts[0]))
    if y.shape != (*x.shape[:-1], u.shape[1]):
        raise shape_error("y", y, (*x.shape[:-1], u.shape[1]))
    _check_device("y", y, x)
    if y.dtype != x.dtype:
        raise SmileError(f"y: is {y.dtype}; expected x's dtype, {x.dtype}")
    weights = ids = None
    if routing is not None or routing_weights is not None:
        weights, ids = _given_routing(x, s, routing, routing_weights, num_experts_per_tok)
        if ids.shape[-1] == 0:
            return y if inplace else y.clone()
    if inplace:
        given = (("y", y), ("x", x), ("vh", vh), ("s", s), ("u", u), ("expert_bias", expert_bias), ("router", router))
        _check_in_place(y, x, (*given, ("routing", weights)))
    tokens = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    rows = y if y.dim() == 2 else y.reshape(-1, y.shape[-1])
    experts = tokens, vh, s, u, expert_bias, router if ids is None else None, weights, ids
    try:
        out = library.delta(rows, *experts, num_experts_per_tok, rank_of_router, *of_parts, backend, inplace=inplace)
    except (RuntimeError, SmileError) as error:
        _name_id(error, routing, s.shape[-2])
        raise
    return y if inplace else out.view(y.shape)


def route(
    x: Tensor, vh: Tensor, *, num_experts_per_tok: int, rank_of_router: int, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Route: the m experts with the largest score_i = ||vh[i, :g] x||_2, and the softmax of their scores.

    Args:
        x: [..., D] input.
        vh: [N, >= g, D]; its first g rows are the router's.
        num_experts_per_tok: m, 1 <= m <= N.
        rank_of_router: g.
        backend: as in `smile_linear`.

    Returns:
        weights [..., m] float32 (float64 where x is float64), largest first, and ids [..., m] int32.

    Raises:
        ValueError: shapes, dtypes or num_experts_per_tok do not fit.
    """
    _check_backend(backend)
    _check_router(x, vh, rank_of_router)
    check_integer("num_experts_per_tok", num_experts_per_tok, 1, vh.shape[0], "the number of experts")
    weights, ids = library.route(x.reshape(-1, x.shape[-1]), vh[:, :rank_of_router], num_experts_per_tok, backend)
    shape = (*x.shape[:-1], num_experts_per_tok)
    return weights.view(shape), ids.view(shape)


def router_projections(x: Tensor, vh: Tensor, router: Tensor | None = None, *, rank_of_router: int) -> Tensor:
    """q_i(x) = vh[i, :g] x for every expert: x [..., D], vh [N, >= g, D] -> [..., N, g] float32.

    If x and vh are split along D (tensor parallelism), the projections of the shards can be summed; their norms, the
    scores, cannot. float64 if x is float64. Differentiable.

    router: [N, g, D] rows instead of those of `vh`.
    """
    _check_router(x, vh if router is None else router, rank_of_router)
    rows = reference.router_rows(vh, router, rank_of_router)
    if not reference.autocasts(x):
        return reference.projections(x, rows)
    with torch.autocast(x.device.type, enabled=False):
        return reference.projections(x, rows)


def router_scores(x: Tensor, vh: Tensor, *, rank_of_router: int) -> Tensor:
    """score_i(x) = ||vh[i, :g] x||_2 for every expert: x [..., D], vh [N, >= g, D] -> [..., N] float32.

    For custom routing policies: pass the modified scores to `select_experts`, and its result to
    `smile_linear(routing=...)`. float64 if x is float64. Differentiable.
    """
    return torch.linalg.vector_norm(router_projections(x, vh, rank_of_router=rank_of_router), dim=-1)


def select_experts(scores: Tensor, num_experts_per_tok: int, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """The m largest of scores [..., N], ties to the lower index -> their softmax [..., m] and ids [..., m] int32.

    Args:
        scores: [..., N], floating point.
        num_experts_per_tok: m, 1 <= m <= N.
        top_p: in (0, 1]: keep the smallest number of the m experts with weights that add up to top_p, and divide these
            weights by their sum; the others get weight 0 and id -1, and `smile_linear(routing=...)` skips them.

    Raises:
        ValueError: an argument out of range, or scores that are not a floating-point tensor.
    """
    check_tensor("scores", scores)
    if scores.dim() < 1:
        raise shape_error("scores", scores, ("...", "N"))
    if scores.dtype not in DTYPES or scores.layout != torch.strided:
        raise SmileError(f"scores: is {scores.layout} {scores.dtype}; expected a dense tensor of one of {DTYPES}")
    check_integer("num_experts_per_tok", num_experts_per_tok, 1, scores.shape[-1], "the number of experts")
    check_top_p(top_p)
    return keep_top_p(*reference.select(scores, num_experts_per_tok), top_p)


def check_top_p(top_p: float) -> None:
    """Raises ValueError unless it is a number in (0, 1]."""
    if isinstance(top_p, bool) or not isinstance(top_p, (int, float)) or not 0 < top_p <= 1:
        raise SmileError(f"top_p: is {top_p!r}; expected a number above 0, at most 1")


def keep_top_p(weights: Tensor, ids: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """A choice, weights [..., m] that add up to 1, the largest first, and ids, without what `top_p` does not need."""
    if top_p == 1:
        return weights, ids
    # One is kept where those before it do not reach top_p.
    before = weights.detach().cumsum(-1) - weights.detach()
    kept = before < top_p
    weights = torch.where(kept, weights, 0)
    return weights / weights.sum(-1, keepdim=True), torch.where(kept, ids, -1)


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == torch.float64 else t.to(dtype)


def shape_error(name: str, tensor: Tensor, expected: Sequence[int | str]) -> SmileError:
    return SmileError(f"{name}: has shape {list(tensor.shape)}; expected [{', '.join(map(str, expected))}]")


def _check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise SmileError(f"{name}: is on {tensor.device}; expected x's device, {x.device}")


def check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.is_nested or tensor.layout != torch.strided:
        kind = reprlib.repr(tensor)
        if isinstance(tensor, Tensor):
            kind = "a nested tensor" if tensor.is_nested else f"a {tensor.layout} tensor"
        raise SmileError(f"{name}: is {kind}; expected a dense tensor")


def check_input(x: Tensor, in_features: int) -> None:
    """Raise SmileError unless x is a dense tensor [..., in_features]."""
    check_tensor("x", x)
    if x.dim() < 1 or x.shape[-1] != in_features:
        raise shape_error("x", x, ("...", in_features))


def _check_backend(backend: str | None) -> None:
    if backend is not None and not isinstance(backend, str):
        raise SmileError(f"backend: is {reprlib.repr(backend)}; expected its name, or None")


def _check_router(x: Tensor, vh: Tensor, rank_of_router: int) -> None:
    check_tensor("vh", vh)
    if vh.dim() != 3:
        raise shape_error("vh", vh, ("N", "max(r, g)", "D"))
    check_input(x, vh.shape[2])
    _check_device("vh", vh, x)
    if x.dtype not in DTYPES or (x.dtype != vh.dtype and not reference.autocasts(x)):
        raise SmileError(f"x: is {x.dtype} and vh {vh.dtype}; expected one floating-point dtype of {DTYPES}")
    check_integer("rank_of_router", rank_of_router, 1, vh.shape[1], "the number of rows of each expert in vh")


def check_parts(
    parts: Sequence[int] | None, rank_of_parts: Sequence[int] | None, out_features: int, rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """parts and rank_of_parts of a layer of rank `rank` as tuples, empty for a layer of one part.

    Raises:
        SmileError: invalid parts or ranks.
    """
    if parts is None:
        if rank_of_parts is not None:
            raise SmileError(f"rank_of_parts: is {rank_of_parts}, and parts is None; expected parts of these ranks")
        return (), ()
    for name, numbers in (("parts", parts), ("rank_of_parts", rank_of_parts)):
        if numbers is not None and not isinstance(numbers, Sequence):
            raise SmileError(f"{name}: is {reprlib.repr(numbers)}; expected a sequence of integers")
    parts = tuple(check_integer("parts", part, 1) for part in parts)
    if not parts:
        raise SmileError("parts: is empty; expected the number of outputs of each part")
    if sum(parts) != out_features:
        raise SmileError(f"parts: is {parts}, {sum(parts)} together; expected the {out_features} outputs of the layer")
    if rank_of_parts is None:
        return parts, ()
    ranks = tuple(check_integer("rank_of_parts", own, 0, rank, "the ranks of s") for own in rank_of_parts)
    if len(ranks) != len(parts):
        raise SmileError(f"rank_of_parts: is {ranks}; expected {len(parts)} numbers, one for each part")
    return parts, ranks


def _given_routing(
    x: Tensor,
    s: Tensor,
    routing: tuple[Tensor, Tensor] | None,
    routing_weights: Tensor | None,
    num_experts_per_tok: int,
) -> tuple[Tensor, Tensor]:
    """`routing` or `routing_weights` in the form of the operators: weights and ids [T, m], or [T, P, m]."""
    of_parts = tuple(s.shape[:-2])
    leading = (*x.shape[:-1], *of_parts)
    if routing_weights is not None:
        if routing is not None:
            raise SmileError("routing_weights: given together with routing; expected one of the two")
        check_tensor("routing_weights", routing_weights)
        if routing_weights.shape != (*leading, s.shape[-2]):
            raise shape_error("routing_weights", routing_weights, (*leading, s.shape[-2]))
        _check_device("routing_weights", routing_weights, x)
        routing = _largest(routing_weights, s.dtype, num_experts_per_tok)
    if not isinstance(routing, (tuple, list)) or len(routing) != 2:
        raise SmileError(f"routing: is {reprlib.repr(routing)}; expected (weights, ids)")
    weights, ids = routing
    check_tensor("routing[0]", weights)
    check_tensor("routing[1]", ids)
    if not ids.dim() or ids.shape[:-1] != leading:
        raise shape_error("routing[1]", ids, (*leading, "m"))
    if weights.shape != ids.shape:
        raise shape_error("routing[0]", weights, ids.shape)
    if ids.dtype not in _ID_DTYPES:
        raise SmileError(f"routing[1]: is {ids.dtype}; expected one of {_ID_DTYPES}")
    if weights.is_complex():
        raise SmileError(f"routing[0]: is {weights.dtype}; expected real weights")
    for i, tensor in enumerate(routing):
        _check_device(f"routing[{i}]", tensor, x)
    if ids.dtype == torch.int64:  # so that none wraps around into the range
        ids = ids.clamp(*_INT32)
    if ids.shape[-1] == 0:
        return weights, ids
    shape = (-1, *of_parts, ids.shape[-1])
    # One choice for a whole sequence is an expanded view.
    return weights.reshape(shape).to(s.dtype).contiguous(), ids.reshape(shape).int().contiguous()


def _largest(routing_weights: Tensor, dtype: torch.dtype, num_experts_per_tok: int) -> tuple[Tensor, Tensor]:
    """The m largest weights, divided by their sum, and their ids; weight 0 and id -1 where all are 0."""
    if routing_weights.is_complex():
        raise SmileError(f"routing_weights: is {routing_weights.dtype}; expected real weights")
    given = routing_weights.to(dtype)
    if given.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_finite(given)
    given = given.nan_to_num(0, 0, 0).clamp_min(0)
    ids = select_experts(given.detach(), num_experts_per_tok)[1]
    weights = given.gather(-1, ids.long())
    largest = weights[..., :1].detach()
    some = largest > 0
    weights = weights / torch.where(some, largest, 1)  # whose sum is not beyond the dtype
    return weights / torch.where(some, weights.sum(-1, keepdim=True), 1), torch.where(some, ids, -1)


def _check_finite(routing_weights: Tensor) -> None:
    try:
        least, most = (extreme.item() for extreme in torch.aminmax(routing_weights.detach()))
        if least >= 0 and most < math.inf:
            return
    except RuntimeError:  # without tokens; or under vmap and in a fake tensor, which have no values
        return
    wrong = most if least >= 0 else least
    raise SmileError(f"routing_weights: contains {wrong}; expected finite numbers, 0 or more")


def _name_id(error: Exception, routing: tuple[Tensor, Tensor] | None, n: int) -> None:
    """Raise SmileError, with the id as the caller gave it, if a backend raised `error` for an id out of range.

    A check before the call would read all ids a second time.
    """
    if routing is None or "ids: contains" not in str(error):
        return
    try:
        least, most = (extreme.item() for extreme in torch.aminmax(routing[1]))
    except RuntimeError:  # under vmap a tensor has no single extreme
        return
    worst = least if least < -1 else most
    raise SmileError(f"ids: contains {worst}; expected 0 to {n - 1}, or -1 for no expert") from None


def _check_in_place(y: Tensor, x: Tensor, tensors: Sequence[tuple[str, Tensor | None]]) -> None:
    for name, tensor in tensors:
        if torch.is_grad_enabled() and tensor is not None and tensor.requires_grad:
            raise SmileError(f"inplace: is True, and {name} needs a gradient; expected False, or torch.no_grad()")
    if y is x:
        raise SmileError("y: is x itself; expected another tensor to add to in place")
    rows = y.dim() == 2 and y.stride(1) == 1 and y.stride(0) >= y.shape[1]
    if not (rows or y.is_contiguous()):
        raise SmileError(f"y: has strides {y.stride()}; expected contiguous rows, to add to them in place")


def _check(
    x: Tensor,
    like: Tensor,
    o: int,
    d: int,
    bias: Tensor | None,
    vh: Tensor,
    s: Tensor,
    u: Tensor,
    expert_bias: Tensor | None,
    router: Tensor | None,
    num_experts_per_tok: int,
    rank_of_router: int,
    parts: int,
) -> None:
    """Raise if the tensors of a layer do not fit; their dtype is that of `like`, its weight or x."""
    for name, tensor in (("vh", vh), ("s", s), ("u", u)):
        check_tensor(name, tensor)
    of_parts: tuple[int, ...] = (parts,) if parts else ()
    device, dtype = x.device, like.dtype  # each is read once: a call for few tokens takes microseconds
    _check_device("weight", like, x)
    _check_device("s", s, x)
    if s.dim() != len(of_parts) + 2 or (parts and s.shape[0] != parts) or not s.numel():
        raise shape_error("s", s, (*of_parts, "N", "r"))
    n, r = s.shape[-2:]
    check_integer("rank_of_router", rank_of_router, 1, d, "in_features")
    check_integer("num_experts_per_tok", num_experts_per_tok, 1, n, "the number of experts")
    rows = rank_of_router if router is None else 1
    expected: tuple[tuple[str, Tensor | None, tuple[int, ...]], ...] = (
        ("bias", bias, (o,)),
        ("vh", vh, (*of_parts, n, max(r, rows), d)),
        ("u", u, (n, o, r)),
        ("expert_bias", expert_bias, (n, o)),
        ("router", router, (*of_parts, n, rank_of_router, d)),
    )
    for name, given, shape in expected:
        if given is None:
            continue
        check_tensor(name, given)
        if given.device != device:
            _check_device(name, given, x)
        if given.shape != shape and not (name == "vh" and _longer(given.shape, shape)):
            raise shape_error(name, given, shape)
        if given.dtype != dtype:
            whose = "x" if like is x else "weight"
            raise SmileError(f"{name}: is {given.dtype}; expected {whose}'s dtype, {dtype}")
    if x.dim() < 1 or x.shape[-1] != d:
        raise shape_error("x", x, ("...", d))
    if x.dtype != dtype or dtype not in DTYPES:
        raise SmileError(f"x: is {x.dtype} and weight {dtype}; expected one floating-point dtype of {DTYPES}")
    if s.dtype != reference.accumulate_dtype(x):
        raise SmileError(f"s: is {s.dtype}; expected {reference.accumulate_dtype(x)} for {x.dtype} inputs")


def _longer(shape: Sequence[int], least: Sequence[int]) -> bool:
    """vh may have more rows than are used, for example with a separate router."""
    return len(shape) == len(least) and (*shape[:-2], shape[-1]) == (*least[:-2], least[-1]) and shape[-2] >= least[-2]
