"""The operators `smile_kernels::*`: schemas, kernels, autograd, and the choice of a backend.

Ten operators, each with the backend's name as its last argument, so that a compiled graph records which one it runs:

    route           x, router -> weights, ids                           the routing half
    apply           x, parameters, weights, ids -> y, h                 the expert half
    linear          both in one pass -> y, weights, ids, h
    delta           y, x, experts -> y + experts, weights, ids, h       added to a given base product
    delta_          the same in place -> weights, ids, h
    evidence        x, router, a policy's state -> weights, ids, evidence, sums
    route_backward, apply_backward, linear_backward, delta_backward     their closed-form gradients

A backend is a module with these as functions over 2-D x. `delta` and its backward are derived from others, and
`evidence` is optional: the composition of routing/ replaces it. The compiled extension also has `evidence_linear`,
`evidence` and `apply` in one, for inference.
`h` [T, m, r] is V^T x of the selected experts, saved for the backward; it has no elements unless `save` is set. A
gradient that is not needed has no elements either. `delta` routes unless weights and ids are given, and supports layers
of several parts, with the shapes in `functional.smile_linear`; h is [T, P, m, r] then.
Forward-mode derivatives, and a backward pass that builds a graph (`create_graph`), use the reference with the experts
that an operator selected.
"""

import functools
import importlib
import inspect
import os
import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import SmileError
from ..versions import warn_if_newer
from . import reference, registration
from .excluded import why_excluded
from .reference import autocasts

warn_if_newer("torch")

# Backend name -> module of this package that implements it, best first.
_MODULES = {"triton": ".triton.backend", "cuda": ".extension", "cpu": ".extension", "torch": ".composed"}


# Looking up what is imported already takes a microsecond.
_import = functools.cache(importlib.import_module)


def _implementation(backend: str):
    return _import(_MODULES[backend], __package__)


def why_not(
    backend: str,
    device_type: str,
    dtype: torch.dtype = torch.float32,
    num_experts: int = 1,
    training: bool = False,
) -> str | None:
    """Why `backend` cannot run a layer of `num_experts` on tensors of `dtype` on `device_type`; None if it can.

    training: with gradients.
    """
    if backend in ("cuda", "cpu") and backend != device_type:
        return f"it supports {backend} tensors, not {device_type} tensors"
    try:
        return _implementation(backend).why_not(device_type, dtype, num_experts, training)
    except ImportError as error:
        return str(error)


def backends(device_type: str | torch.device | None = None) -> dict[str, str | None]:
    """Every backend, in order of preference, with the reason why it cannot run on `device_type`, or None if it can.

    device_type: "cuda", "cpu", ..., or a device of this type; by default "cuda" if torch sees a GPU, else "cpu".

    Raises:
        ValueError: `device_type` is not a device that torch knows.
    """
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device_type) if isinstance(device_type, (str, torch.device)) else None
    except (RuntimeError, ValueError):
        device = None
    if device is None:
        raise SmileError(f"device_type: is {device_type!r}; expected a torch.device, or a type such as 'cpu'")
    return {backend: why_not(backend, device.type) for backend in _MODULES}


@functools.lru_cache(maxsize=256)
def _choose(backend: str | None, device_type: str, dtype: torch.dtype, num_experts: int, training: bool) -> str:
    layer = device_type, dtype, num_experts, training
    if backend is not None:
        if backend not in _MODULES:
            raise SmileError(f"backend: {backend!r} is unknown; expected one of {', '.join(_MODULES)}")
        if device_type != "meta" and (reason := why_not(backend, *layer)):
            raise RuntimeError(f"backend: {backend!r} cannot run here: {reason}")
        if reason := why_excluded(backend, device_type, dtype, training):
            warnings.warn(f"backend: {backend!r} is used as requested, but failed verification: {reason}", stacklevel=3)
    else:
        # Triton's interpreter is for tests.
        names = [name for name in _MODULES if (name, device_type) != ("triton", "cpu") and not why_not(name, *layer)]
        # The composition is last, and runs independent of verification.
        allowed = [name for name in names if not why_excluded(name, device_type, dtype, training)]
        backend = (allowed or names[-1:])[0]
    if (backend, device_type) == ("triton", "cuda"):
        _implementation(backend).prepare()
    return backend


def choose_backend(backend: str | None, device_type: str, dtype: torch.dtype, num_experts: int, training: bool) -> str:
    """An explicit name, else the environment variable SMILE_KERNELS_BACKEND, else the first that supports such a layer.

    A requested backend that cannot run raises RuntimeError with the reason; there is no fallback. Meta tensors, for
    which only shapes are computed, accept every name.
    """
    if backend is None:
        backend = os.environ.get("SMILE_KERNELS_BACKEND") or None
    return _choose(backend, device_type, dtype, num_experts, training)


# What torch.compiler.assume_constant_result sets; calling that would import all of torch.compile's machinery, a second.
choose_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


_LIBRARY = torch.library.Library("smile_kernels", "DEF")
_PARAMETERS = "Tensor weight, Tensor? bias, Tensor vh, Tensor s, Tensor u, Tensor? expert_bias"


def _define(name: str, arguments: str, returns: int, kernel: Callable, fake: Callable) -> Callable:
    """Register smile_kernels::name with its kernel and rules; return its overload."""
    schema = f"({arguments}, str backend) -> ({', '.join(['Tensor'] * returns)})"
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    return registration.register(_LIBRARY, name, fake)


def _defined(gradients: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """Operators must return tensors: a gradient that is not needed has no elements."""
    return tuple(like.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _any_backend(fake: Callable) -> Callable:
    """A fake kernel with the backend's name as its last argument."""
    return lambda *args: fake(*args[:-1])


def _fake_gradients(inputs, needs):
    return tuple(t.new_empty(t.shape if needed else 0) for t, needed in zip(inputs, needs))


def _fake_layer_gradients(x, weight, vh, s, u, expert_bias, last, needs):
    like = (x, weight, x.new_empty(weight.shape[0]), vh, s, u, expert_bias, last)
    return _fake_gradients([x if t is None else t for t in like], needs)


_route = _define(
    "route",
    "Tensor x, Tensor router, int num_experts_per_tok",
    2,
    lambda x, router, m, backend: _implementation(backend).route(x, router, m),
    _any_backend(registration.fake_route),
)
_evidence = _define(
    "evidence",
    "Tensor x, Tensor router, Tensor? prior, Tensor? real, Tensor? factors, Tensor? before, Tensor? below, "
    "int num_experts_per_tok, int rank_of_router, int sequences, int scope, bool accumulates",
    4,
    lambda *args: _implementation(args[-1]).evidence(*args[:-1]),
    _any_backend(registration.fake_evidence),
)
_route_backward = _define(
    "route_backward",
    "Tensor dweights, Tensor x, Tensor router, Tensor weights, Tensor ids, bool[] needs",
    2,
    lambda *args: _defined(_implementation(args[-1]).route_backward(*args[:-1]), args[0]),
    lambda dweights, x, router, weights, ids, needs, backend: _fake_gradients((x, router), needs),
)
_apply = _define(
    "apply",
    f"Tensor x, {_PARAMETERS}, Tensor weights, Tensor ids, bool save",
    2,
    lambda *args: _implementation(args[-1]).apply(*args[:-1]),
    _any_backend(registration.fake_apply),
)
_apply_backward = _define(
    "apply_backward",
    "Tensor dy, Tensor x, Tensor weight, Tensor vh, Tensor s, Tensor u, Tensor? expert_bias, Tensor weights, "
    "Tensor ids, Tensor h, bool[] needs",
    8,
    lambda *args: _defined(_implementation(args[-1]).apply_backward(*args[:-1]), args[0]),
    lambda dy, x, weight, vh, s, u, expert_bias, weights, ids, h, needs, backend: _fake_layer_gradients(
        x, weight, vh, s, u, expert_bias, weights, needs
    ),
)
_linear = _define(
    "linear",
    f"Tensor x, {_PARAMETERS}, Tensor? router, int num_experts_per_tok, int rank_of_router, bool save",
    4,
    lambda *args: _implementation(args[-1]).linear(*args[:-1]),
    _any_backend(registration.fake_linear),
)
_EXPERTS = (
    "Tensor x, Tensor vh, Tensor s, Tensor u, Tensor? expert_bias, Tensor? router, Tensor? weights, Tensor? ids, "
    "int num_experts_per_tok, int rank_of_router, bool save, int[] parts, int[] rank_of_parts"
)


def _add_experts_to_copy(y, *args):
    y = y.clone(memory_format=torch.contiguous_format)
    return y, *_implementation(args[-1]).delta_(y, *args[:-1])


_delta = _define("delta", f"Tensor y, {_EXPERTS}", 4, _add_experts_to_copy, _any_backend(registration.fake_delta))
_delta_in_place = _define(
    "delta_",
    f"Tensor(a!) y, {_EXPERTS}",
    3,
    lambda *args: _implementation(args[-1]).delta_(*args[:-1]),
    _any_backend(registration.fake_delta_),
)
_delta_backward = _define(
    "delta_backward",
    "Tensor dy, Tensor x, Tensor vh, Tensor s, Tensor u, Tensor? expert_bias, Tensor? router, Tensor weights, "
    "Tensor ids, Tensor h, int rank_of_router, bool routes, bool[] needs, int[] parts, int[] rank_of_parts",
    7,
    lambda *args: _defined(registration.delta_backward(_implementation(args[-1]), *args[:-1]), args[0]),
    lambda dy, x, vh, s, u, expert_bias, router, weights, ids, h, g, routes, needs, parts, ranks, backend: (
        _fake_gradients([x if t is None else t for t in (x, vh, s, u, expert_bias, router, weights)], needs)
    ),
)
_linear_backward = _define(
    "linear_backward",
    "Tensor dy, Tensor x, Tensor weight, Tensor vh, Tensor s, Tensor u, Tensor? expert_bias, Tensor? router, "
    "Tensor weights, Tensor ids, Tensor h, int rank_of_router, bool[] needs",
    8,
    lambda *args: _defined(_implementation(args[-1]).linear_backward(*args[:-1]), args[0]),
    lambda dy, x, weight, vh, s, u, expert_bias, router, weights, ids, h, g, needs, backend: _fake_layer_gradients(
        x, weight, vh, s, u, expert_bias, router, needs
    ),
)


def _reference_linear(x, weight, bias, vh, s, u, expert_bias, router, rank_of_router, ids) -> Tensor:
    weights = reference.weights_of(x, reference.router_rows(vh, router, rank_of_router), ids)
    return reference.apply(x, weight, bias, vh, s, u, expert_bias, weights, ids)


def _reference_delta(y, x, vh, s, u, expert_bias, router, weights, rank_of_router, ids, parts, rank_of_parts) -> Tensor:
    if weights is None:
        weights = reference.weights_of(x, reference.router_rows(vh, router, rank_of_router), ids)
    with_experts = list(registration.parts_with_experts(parts, rank_of_parts, s.shape[-1])) if parts else None
    return reference.delta(y, x, vh, s, u, expert_bias, weights, ids, with_experts)


def _reference_route_backward(dweights, x, router, weights, ids, needs):
    return reference.route_backward(dweights, x, router, reference.weights_of(x, router, ids), ids, needs)


def _reference_linear_backward(dy, x, weight, vh, s, u, expert_bias, router, weights, ids, h, rank_of_router, needs):
    weights = reference.weights_of(x, reference.router_rows(vh, router, rank_of_router), ids)
    layer = x, weight, vh, s, u, expert_bias, router
    return _REFERENCE.linear_backward(dy, *layer, weights, ids, h, rank_of_router, needs)


_REFERENCE = SimpleNamespace(
    apply_backward=reference.apply_backward,
    linear_backward=functools.partial(registration.linear_backward, reference.apply_backward, reference.route_backward),
)


def _reference_delta_backward(
    dy, x, vh, s, u, expert_bias, router, weights, ids, h, rank_of_router, routes, needs, parts, rank_of_parts
):
    if routes:
        weights = reference.weights_of(x, reference.router_rows(vh, router, rank_of_router), ids)
    experts, options = (x, vh, s, u, expert_bias, router), (rank_of_router, routes, needs, parts, rank_of_parts)
    return registration.delta_backward(_REFERENCE, dy, *experts, weights, ids, h, *options)


def _by_reference() -> bool:
    """Whether the reference computes the output: in forward mode, and where a transform of torch.func is compiled.

    A compiled Function is not told which gradients the transform needs.
    """
    return forward_ad._current_level >= 0 or (torch.compiler.is_compiling() and _is_transformed())


def _is_transformed() -> bool:
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(one.key() == torch._C._functorch.TransformType.Grad for one in stack)


_is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]  # the transforms are entered in tracing, too


def _plainly(call: Callable, x: Tensor, *args) -> Tensor:
    """call(x, *args), whose dtypes are set, without autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return call(x, *args)


class _Route(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, router, num_experts_per_tok, backend):
        return _route(x, router, num_experts_per_tok, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, router, _, ctx.backend = inputs
        ctx.save_for_backward(x, router, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, dweights, _):
        needs = list(ctx.needs_input_grad[:2])
        if torch.is_grad_enabled():
            gradients = _plainly(_reference_route_backward, dweights, *ctx.saved_tensors, needs)
        else:
            gradients = _route_backward(dweights, *ctx.saved_tensors, needs, ctx.backend)
        return (*(g if needed else None for g, needed in zip(gradients, needs)), None, None)


class _Apply(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, vh, s, u, expert_bias, weights, ids, backend):
        return _apply(x, weight, bias, vh, s, u, expert_bias, weights, ids, True, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, vh, s, u, expert_bias, weights, ids, ctx.backend = inputs
        ctx.save_for_backward(x, weight, vh, s, u, expert_bias, weights, ids, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, dy, _):
        needs = list(ctx.needs_input_grad[:8])
        if torch.is_grad_enabled():
            gradients = _plainly(reference.apply_backward, dy, *ctx.saved_tensors, needs)
        else:
            gradients = _apply_backward(dy, *ctx.saved_tensors, needs, ctx.backend)
        return (*(g if needed else None for g, needed in zip(gradients, needs)), None, None)


class _Linear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, vh, s, u, expert_bias, router, num_experts_per_tok, rank_of_router, backend):
        return _linear(
            x, weight, bias, vh, s, u, expert_bias, router, num_experts_per_tok, rank_of_router, True, backend
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, vh, s, u, expert_bias, router, _, ctx.rank_of_router, ctx.backend = inputs
        ctx.save_for_backward(x, weight, vh, s, u, expert_bias, router, *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx, dy, *_):
        needs = list(ctx.needs_input_grad[:8])
        if torch.is_grad_enabled():
            gradients = _plainly(_reference_linear_backward, dy, *ctx.saved_tensors, ctx.rank_of_router, needs)
        else:
            gradients = _linear_backward(dy, *ctx.saved_tensors, ctx.rank_of_router, needs, ctx.backend)
        return (*(g if needed else None for g, needed in zip(gradients, needs)), None, None, None)


class _Delta(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(y, x, vh, s, u, expert_bias, router, weights, ids, m, g, parts, rank_of_parts, backend):
        return _delta(y, x, vh, s, u, expert_bias, router, weights, ids, m, g, True, parts, rank_of_parts, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, x, vh, s, u, expert_bias, router, weights, ids, _, *ctx.options = inputs
        ctx.routes = ids is None
        routing = output[1:3] if ctx.routes else (weights, ids)
        ctx.save_for_backward(x, vh, s, u, expert_bias, router, *routing, output[3])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx, dy, *_):
        needs, (g, parts, rank_of_parts, backend) = list(ctx.needs_input_grad[1:8]), ctx.options
        gradients: Sequence[Tensor | None] = [None] * 7
        if any(needs) and torch.is_grad_enabled():
            options = g, ctx.routes, needs, parts, rank_of_parts
            gradients = _plainly(_reference_delta_backward, dy, *ctx.saved_tensors, *options)
        elif any(needs):
            gradients = _delta_backward(dy, *ctx.saved_tensors, g, ctx.routes, needs, parts, rank_of_parts, backend)
        return (dy, *(g if needed else None for g, needed in zip(gradients, needs)), *[None] * 6)


# `apply` asks for it in each call, and finding it takes longer than running an operator on few tokens.
for _function in (_Route, _Apply, _Linear, _Delta):
    _function.forward.__signature__ = inspect.signature(_function.forward)  # type: ignore[union-attr]


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _compiled(backend: str, x: Tensor) -> bool:
    """Inference calls the extension's own operators, which are C++, so that an exported program runs without Python.

    Choosing the backend has loaded them. DTensor has sharding rules for the operators here only.
    """
    return backend in ("cuda", "cpu") and not is_traceable_wrapper_subclass(x)


def route(x: Tensor, router: Tensor, num_experts_per_tok: int, backend: str | None) -> tuple[Tensor, Tensor]:
    """x [T, D], router [N, g, D] -> weights [T, m], ids [T, m], differentiable."""
    training = _needs_gradient(x, router)
    backend = choose_backend(backend, x.device.type, x.dtype, int(router.shape[0]), training)
    if _by_reference():
        ids = _route(x, router, num_experts_per_tok, backend)[1]
        return _plainly(reference.weights_of, x, router, ids), ids
    if training:
        return _Route.apply(x, router, num_experts_per_tok, backend)
    if _compiled(backend, x):
        return torch.ops.smile_kernels_ext.route.default(x, router, num_experts_per_tok)
    return _route(x, router, num_experts_per_tok, backend)


def apply(x, weight, bias, vh, s, u, expert_bias, weights, ids, backend) -> Tensor:
    """The expert half under a given routing -> y [T, O], differentiable."""
    arguments = (x, weight, bias, vh, s, u, expert_bias, weights)
    training = _needs_gradient(*arguments)
    if _by_reference():
        return _plainly(reference.apply, *arguments, ids)
    backend = choose_backend(backend, x.device.type, x.dtype, int(s.shape[0]), training)
    if training:
        return _Apply.apply(*arguments, ids, backend)[0]
    if _compiled(backend, x):
        return torch.ops.smile_kernels_ext.apply.default(*arguments, ids, False)[0]
    return _apply(*arguments, ids, False, backend)[0]


@functools.lru_cache(maxsize=64)
def _has_steps(backend: str, device_type: str, dtype: torch.dtype) -> bool:
    return backend != "torch" and why_excluded(backend, device_type, dtype, False, "evidence") is None


def _takes_steps(backend: str, device_type: str, dtype: torch.dtype) -> bool:
    """Whether a backend has the operator `evidence`, which verification on this machine has not excluded."""
    return _has_steps(backend, device_type, dtype)


_takes_steps._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as for choose_backend


def evidence(
    x, router, prior, real, factors, before, below, num_experts_per_tok, rank_of_router, sequences, scope, accumulates
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """One step of a routing policy by one operator of the backend; None where the backend has none.

    x [..., D] of B sequences of S tokens, router [N, rows, D], prior [N], real [B, S], factors [1 or B, 1 or S], before
    [B, N], below [B, R, N], scope 0 (token), 1 (causal), 2 (sequence: R = 1, else R = S) or 2 + w (w tokens to each
    side, on a CPU) -> weights, ids [B, R, m], evidence, sums [B, R, N]. Tensors are float32, or float64 where x is;
    routing/policy.py has the equations.
    """
    device = x.device
    if router.dim() != 3 or router.shape[2] != x.shape[-1]:
        raise SmileError(f"router: has shape {list(router.shape)}; expected [N, g, {x.shape[-1]}]")
    if autocasts(x) or is_traceable_wrapper_subclass(x):
        return None
    backend = choose_backend(None, device.type, x.dtype, router.shape[0], False)
    if not _takes_steps(backend, device.type, x.dtype) or (scope > 2 and backend != "cpu"):
        return None
    state = (t if t is None else t.to(device) for t in (prior, real, factors, before, below))
    options = num_experts_per_tok, rank_of_router, sequences, scope, accumulates
    arguments = x.reshape(-1, x.shape[-1]), router, *state, *options
    if backend == "triton":
        return _evidence(*arguments, backend)
    return torch.ops.smile_kernels_ext.evidence.default(*arguments)


def serve(x, layer, num_experts_per_tok, rank_of_router, routing, parts=None, rank_of_parts=None) -> Tensor | None:
    """`linear`, or `apply` under a given routing, in inference by the extension's operator; None if not supported.

    x [..., D], layer the tensors of `linear`, routing (weights, ids) [..., m] or None; of a layer of parts, those of
    `linear_of_parts`. The operator checks its arguments, since checks in Python are slow for a few tokens; one that it
    refuses, such as an id out of range, is not supported.
    """
    if not _is_served(x, layer, of_parts=parts is not None):
        return None
    ext, of_parts = torch.ops.smile_kernels_ext, () if parts is None else (parts, rank_of_parts)
    try:
        if routing is None:
            return ext.linear.default(x, *layer, num_experts_per_tok, rank_of_router, False, *of_parts)[0]
        return ext.apply.default(x, *layer[:-1], *routing, False, *of_parts)[0]
    except (RuntimeError, SmileError):  # of the operator, or of its rules for meta tensors and vmap
        return None


def serve_step(
    x, layer, prior, real, factors, sums, past, below, *options
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """`evidence`, then `apply` under its choice, in inference by one operator of the extension; None: not supported.

    The arguments are those of `serve` and `evidence`, with `sums` [B, positions, N] or None: the causal sums of the
    sequences, where the operator reads those at position past - 1 and writes those of this call from `past` on.
    options: num_experts_per_tok, rank_of_router, sequences, scope, accumulates -> y [..., O], weights, ids [B, R, m],
    evidence [B, R, N].
    """
    if not _is_served(x, layer, steps=True) or (options[3] > 2 and x.device.type != "cpu"):
        return None
    ext = torch.ops.smile_kernels_ext.evidence_linear
    try:
        return ext.default(x, *layer, prior, real, factors, sums, past, below, *options)
    except (RuntimeError, SmileError):
        return None


def _is_served(x, layer, steps=False, of_parts=False) -> bool:
    """Whether the extension's operators may take x [..., D] and a layer's tensors as they are; `steps`: of policies."""
    weight, s = layer[0], layer[3]
    if not isinstance(x, Tensor) or x.is_nested or x.dim() == 0 or s.dim() != 2 + of_parts or _by_reference():
        return False
    kind, dtype = x.device.type, x.dtype
    backend = choose_backend(None, kind, dtype, s.shape[-2], False)
    if not _compiled(backend, x) or (of_parts and backend != "cpu"):
        return False
    if steps and not _takes_steps(backend, kind, dtype):
        return False
    return dtype == weight.dtype and x.shape[-1] == weight.shape[1] and not torch.is_autocast_enabled(kind)


def linear(x, weight, bias, vh, s, u, expert_bias, router, num_experts_per_tok, rank_of_router, backend) -> Tensor:
    """Route and apply in one pass -> y [T, O], differentiable."""
    arguments = (x, weight, bias, vh, s, u, expert_bias, router)
    training = _needs_gradient(*arguments)
    backend = choose_backend(backend, x.device.type, x.dtype, int(s.shape[0]), training)
    if _by_reference():
        ids = _linear(*arguments, num_experts_per_tok, rank_of_router, False, backend)[2]
        return _plainly(_reference_linear, *arguments, rank_of_router, ids)
    if training:
        return _Linear.apply(*arguments, num_experts_per_tok, rank_of_router, backend)[0]
    if _compiled(backend, x):
        return torch.ops.smile_kernels_ext.linear.default(*arguments, num_experts_per_tok, rank_of_router, False)[0]
    return _linear(*arguments, num_experts_per_tok, rank_of_router, False, backend)[0]


def linear_of_parts(
    x, weight, bias, vh, s, u, expert_bias, router, weights, ids, m, g, parts, rank_of_parts, backend
) -> Tensor:
    """A layer of several parts -> y [T, O], differentiable; routed by weights and ids [T, P, m] if given."""
    experts = x, vh, s, u, expert_bias, router, weights
    training = _needs_gradient(weight, bias, *experts)
    backend = choose_backend(backend, x.device.type, x.dtype, int(s.shape[1]), training)
    if backend == "cpu" and not training and not _by_reference():
        layer, ext = (x, weight, bias, vh, s, u, expert_bias), torch.ops.smile_kernels_ext
        if ids is None:
            return ext.linear.default(*layer, router, m, g, False, parts, rank_of_parts)[0]
        return ext.apply.default(*layer, weights, ids, False, parts, rank_of_parts)[0]
    y = torch.nn.functional.linear(x, weight, bias)
    return delta(y, *experts, ids, m, g, parts, rank_of_parts, backend, inplace=not training)


def delta(
    y, x, vh, s, u, expert_bias, router, weights, ids, m, g, parts, rank_of_parts, backend, *, inplace=False
) -> Tensor:
    """y + the experts -> [T, O], differentiable; routed by weights and ids if given.

    inplace: add to y itself, without gradients.
    """
    experts = x, vh, s, u, expert_bias, router, weights
    training = _needs_gradient(y, *experts)
    backend = choose_backend(backend, x.device.type, x.dtype, int(s.shape[-2]), training)
    arguments = y, *experts, ids, m, g, False, parts, rank_of_parts
    if _by_reference():
        ids = _delta(*arguments, backend)[2] if ids is None else ids
        out = _plainly(_reference_delta, y, *experts, g, ids, parts, rank_of_parts)
        return y.copy_(out) if inplace else out
    if training:
        return _Delta.apply(y, *experts, ids, m, g, parts, rank_of_parts, backend)[0]
    compiled = backend == "cpu" and not is_traceable_wrapper_subclass(x)
    if inplace:
        if compiled:
            torch.ops.smile_kernels_ext.delta_.default(*arguments)
        else:
            _delta_in_place(*arguments, backend)
        return y
    if compiled:
        return torch.ops.smile_kernels_ext.delta.default(*arguments)[0]
    return _delta(*arguments, backend)[0]
