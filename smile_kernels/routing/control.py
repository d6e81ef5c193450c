"""Sets and gets the routing policy of a model, and counts its choices."""

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SmileError
from ..functional import route
from ..nn import RoutedExperts, routed_layers
from ..schema import check_arguments
from .parts import holds, parts_of, text_part
from .policy import RoutingPolicy, block_numbers
from .state import LayerPolicy, RootRouting
from .tokens import Tokens

__all__ = [
    "attached_roots",
    "check_order",
    "check_routing",
    "followed_policies",
    "forget_caches",
    "get_routing",
    "refuse_override",
    "release_idle",
    "set_routing",
    "watch_routing",
    "watch_tokens",
]


def check_routing(
    model: nn.Module, policy: RoutingPolicy, layers: Mapping[str, int] | None = None, *, calibrating: bool = False
) -> None:
    """Raise the errors of `set_routing` without changing anything.

    Args:
        model: the model.
        policy: the policy.
        layers: names of the layers of `model` that are to become SMILE layers, with their number of experts; by default
            those that are SMILE layers.
        calibrating: whether `calibrate` comes before the policy.

    Raises:
        ValueError: as `set_routing`.
    """
    found = routed_layers(model) if layers is None else {}
    layers = {name: layer.num_local_experts for name, layer in found.items()} if layers is None else layers
    if not layers:
        raise SmileError(f"model: {type(model).__name__} has no SmileLinear; expected a model with SMILE layers")
    m = policy.num_experts_per_tok
    for name, experts in layers.items():
        if m is not None and m > experts:
            raise SmileError(f"num_experts_per_tok: is {m}; expected at most {experts}, as {name} has")
    if policy.calibrated and not calibrating:
        bare = [name for name in layers if name not in found or found[name].router_prior is None]
        if bare:
            raise SmileError(f"calibrated: is True and {bare[0]} has no router_prior; expected calibrate(model) before")
    check_order(model, policy, layers)
    if not policy.is_alone:
        parts, text = parts_of(model, layers), text_part(model, layers)
        _check_parts(model, parts if text is None else {text: parts[text]}, layers)


def check_order(model: nn.Module, policy: RoutingPolicy, layers: Iterable[str]) -> None:
    """Raise ValueError for a policy over the order of tokens, or their ids, on a model that does not have these."""
    if policy.restart_at is not None and getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise SmileError(
            f"restart_at: is {policy.restart_at}, and {type(model).__name__} reads {model.main_input_name}; expected "
            "None, or a model with input_ids"
        )
    ordered = policy.scope in ("causal", "prompt") or policy.half_life is not None or policy.restart_at is not None
    if not ordered or not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return
    for root in parts_of(model, layers):
        part = model.get_submodule(root)
        crosses = "encoder_hidden_states" in inspect.signature(part.forward).parameters
        if crosses and getattr(part, "is_decoder", True):
            raise SmileError(
                f"scope: is {policy.scope!r}, half_life {policy.half_life}, restart_at {policy.restart_at}, and the "
                f"decoder of {type(model).__name__} reads the encoder's output, whose tokens have no causal order; "
                "expected scope 'sequence' or 'token', without half_life and restart_at"
            )


def check_kept(policy: RoutingPolicy, num_experts_per_tok: int) -> None:
    """Raise ValueError if a policy's top_p has no effect, since the layers have one expert per token."""
    if policy.top_p != 1 and (policy.num_experts_per_tok or num_experts_per_tok) == 1:
        raise SmileError(f"top_p: is {policy.top_p} with num_experts_per_tok 1; expected 1, since one expert is kept")


def _check_parts(model: nn.Module, parts: Mapping[str, list[str]], layers: Mapping[str, int]) -> None:
    """Raise ValueError unless every layer belongs to a part in which all layers have the same number of experts."""
    for root, part in parts.items():
        inner = [type(model.get_submodule(other)).__name__ for other in parts if other != root and holds(root, other)]
        if inner:
            raise SmileError(
                f"model: {part[0]} belongs to none of its parts ({', '.join(inner)}), each of which routes its own "
                "tokens; expected SMILE layers inside the parts alone, or set_routing on one part"
            )
    for root, part in parts.items():
        counts = {layers[name] for name in part}
        if len(counts) > 1:
            raise SmileError(
                f"model: the SMILE layers of {type(model.get_submodule(root)).__name__} have {sorted(counts)} experts; "
                "expected one number, since they share their evidence"
            )


@check_arguments
def set_routing(model: nn.Module, policy: RoutingPolicy) -> None:
    """Set the routing policy of every SMILE layer of `model`, from the next forward pass on.

    Layers share evidence within a root: `model`, or the transformers models inside it if these contain all layers (the
    language model of a wrapper; two roots for the towers of CLIP, or encoder and decoder of T5). In a model that
    generates text from images or sounds, the policy is its language model's, and the layers of the towers, of the
    connectors and of the head route each token alone, by the published rule.
    Padding is read from the root's `attention_mask` ([B, past + S] or [B, 1, S, keys]), packed sequences from
    `cu_seq_lens_q`, or from `position_ids` [B, S] when there is neither mask nor cache.

    Running forward passes of other threads keep their policy.

    Raises:
        ValueError: no SMILE layers; num_experts_per_tok above a layer's number of experts; a calibrated policy and a
            layer without `router_prior`; layers that would share evidence but differ in their number of experts, or
            that belong to no single root; or a `routing_override` open on another part. Nothing is changed then.
    """
    check_routing(model, policy)
    layers = routed_layers(model)
    parts, text = _members(model, layers), text_part(model, layers)
    _warn_of_early_lock(policy, layers if text is None else parts[text])
    for root, members in parts.items():
        held = {routing for layer in members.values() if (routing := _root_routing(layer)) is not None}
        for attached in held - {_routing_of(model, root, members)}:
            _refuse_override(attached)
            if attached.is_running():
                raise SmileError(
                    f"model: a forward pass of {attached.root_name} is running, with its own policy; expected "
                    f"set_routing on that {attached.root_name}, or no running pass"
                )
    roots = [_routing_of(model, root, members) or _attach(model, root, members) for root, members in parts.items()]
    # In this order: a pass with the new policy finds the new numbers, and a running one can distinguish them.
    for layer in layers.values():
        layer.set_num_experts_per_tok(policy.num_experts_per_tok)
    for root, routing in zip(parts, roots):
        routing.follow(policy if text in (None, root) else policy.alone)
    for routing, members in zip(roots, parts.values()):
        if routing.policy.is_published and not routing.overriding and not routing.is_running():
            for layer in members.values():
                routing.release(layer)


def _members(model: nn.Module, layers: Mapping[str, RoutedExperts]) -> dict[str, dict[str, RoutedExperts]]:
    """The layers of each part of the model."""
    return {root: {name: layers[name] for name in names} for root, names in parts_of(model, layers).items()}


def _routing_of(model: nn.Module, root: str, members: Mapping[str, RoutedExperts]) -> RootRouting | None:
    """The routing of this root if it covers all its layers, else None."""
    held = {_root_routing(layer) for layer in members.values()}
    routing = held.pop() if len(held) == 1 else None
    return routing if routing is not None and routing.is_on(model.get_submodule(root), len(members)) else None


def _attach(model: nn.Module, root: str, members: Mapping[str, RoutedExperts]) -> RootRouting:
    """Attach the layers of a root to its forward passes, with their present routing."""
    for layer in members.values():
        if (attached := _root_routing(layer)) is not None:
            attached.release(layer)
    before = _published_policy(next(iter(members.values())))
    inside = [(name.removeprefix(root).removeprefix("."), layer) for name, layer in members.items()]
    config: Any = getattr(model, "config", None)
    embeds = root and root == text_part(model, members) and config.get_text_config() is not config
    return RootRouting(before, model.get_submodule(root), inside, model if embeds else None)


def _published_policy(layer: RoutedExperts) -> RoutingPolicy:
    """The policy of a layer that routes itself."""
    own = layer.own_num_experts_per_tok() == layer.num_experts_per_tok
    return RoutingPolicy(num_experts_per_tok=None if own else layer.num_experts_per_tok)


def _warn_of_early_lock(policy: RoutingPolicy, names: Iterable[str]) -> None:
    blocks = max(block_numbers(names).values()) + 1
    if policy.lock_after is not None and policy.lock_after < blocks // 4:
        warnings.warn(
            f"lock_after: is {policy.lock_after} of {blocks} blocks, too early to distinguish the experts on every "
            f"kind of input; expected {-(-blocks // 4)} or more",
            stacklevel=4,
        )


def _root_routing(layer: RoutedExperts) -> RootRouting | None:
    return layer.router_policy.root if isinstance(layer.router_policy, LayerPolicy) else None


@check_arguments
def get_routing(model: nn.Module) -> RoutingPolicy:
    """The routing policy of the SMILE layers of `model`.

    Raises:
        ValueError: its parts have different policies.
    """
    layers = routed_layers(model)
    attached = ((layer, _root_routing(layer)) for layer in layers.values())
    found = {_published_policy(layer) if root is None else root.policy for layer, root in attached}
    pooled = [policy for policy in found if not policy.is_alone]
    if len(found) == 2 and len(pooled) == 1 and pooled[0].alone in found and text_part(model, layers) is not None:
        return pooled[0]  # of the language model, whose towers route each token alone
    if len(found) > 1:
        raise SmileError(f"model: its SMILE layers follow {len(found)} routing policies; expected one")
    return found.pop() if found else RoutingPolicy()


def attached_roots(model: nn.Module, by_rows: bool) -> list[RootRouting]:
    """The routing of each part of `model`; created with the layers' present routing if there is none.

    Args:
        model: the model.
        by_rows: whether the layers need the rows of the batch.

    Raises:
        ValueError: layers outside the parts, with `by_rows`; or a layer whose policy stands on another part or is none
            of `set_routing`'s. Nothing is changed then.
    """
    layers = routed_layers(model)
    parts = _members(model, layers)
    if by_rows:
        names = {root: list(members) for root, members in parts.items()}
        _check_parts(model, names, {name: layer.num_local_experts for name, layer in layers.items()})
    for root, members in parts.items():
        same = _routing_of(model, root, members)
        for name, layer in members.items():
            attached = _root_routing(layer)
            if layer.router_policy is not None and (attached is None or attached is not same):
                owner = type(layer.router_policy).__name__ if attached is None else attached.root_name
                raise SmileError(
                    f"model: {name or 'it'} follows a routing policy of {owner}; expected the model that set_routing "
                    "was called on"
                )
    return [_routing_of(model, root, members) or _attach(model, root, members) for root, members in parts.items()]


def release_idle(layers: Iterable[RoutedExperts]) -> None:
    """Detach layers that route themselves and that no override or forward pass needs."""
    attached = [(layer, root) for layer in layers if (root := _root_routing(layer)) is not None]
    idle = {root for root in {root for _, root in attached} if root.is_idle}  # once: another thread may begin a pass
    for layer, root in attached:
        if root in idle:
            root.release(layer)


def followed_policies(model: nn.Module) -> set[RoutingPolicy]:
    """The policies of the layers of `model`, without layers that route by themselves."""
    roots = (_root_routing(layer) for layer in routed_layers(model).values())
    return {root.policy for root in roots if root is not None}


def forget_caches(model: nn.Module) -> None:
    """Make policies that keep evidence for KV caches refuse caches that were filled before."""
    roots = {_root_routing(layer) for layer in routed_layers(model).values()}
    for root in roots:
        if root is not None:
            root.follow(root.policy)


def refuse_override(model: nn.Module) -> None:
    """Raise ValueError if a routing_override is open on layers of `model`."""
    for layer in routed_layers(model).values():
        if (attached := _root_routing(layer)) is not None:
            _refuse_override(attached)


def _refuse_override(attached: RootRouting) -> None:
    if attached.overriding:
        raise SmileError(f"model: a routing_override is open on {attached.root_name}; expected this call outside of it")


@check_arguments
@contextmanager
def watch_routing(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Count the tokens of each expert inside the context: {name of the SMILE layer: [N] int64 on the CPU}.

    Under any policy, a token counts for its first choice; padding does not, where a part's masks are of a kind that
    policies follow. A given `routing=` counts; calls with `routing_weights=` and the first pass of scope "prompt" do
    not. Recomputed layers count twice; copies of the model made inside the context count, too. Outputs do not change.

        with watch_routing(model) as counts:
            model(**batch)
        share = {name: count / count.sum() for name, count in counts.items()}
    """
    layers = routed_layers(model)
    counts = {name: torch.zeros(layer.num_local_experts, dtype=torch.int64) for name, layer in layers.items()}

    def count(name: str, layer: RoutedExperts, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if kwargs.get("routing_weights") is not None:
            return None
        if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
            raise SmileError("model: runs under a transform of torch.func; expected none inside watch_routing")
        x, routing = args[0] if args else kwargs["input"], kwargs.get("routing")
        rows = layer.vh if layer.router is None else layer.router
        if rows.is_meta and not x.is_meta:
            raise SmileError(
                f"model: {name} is offloaded, on the meta device until it runs; expected a model in memory"
            )
        if routing is None and layer.router_policy is not None:
            routing = layer.router_policy(layer, x)
        if routing is None:
            m, g = layer.num_experts_per_tok, layer.rank_of_router
            routing = route(x.to(rows.dtype), rows, num_experts_per_tok=m, rank_of_router=g)
        if not routing[1].shape[-1]:  # no experts while the base processes a prompt
            return args, {**kwargs, "routing": routing}
        first = routing[1][..., 0]  # -1: no expert
        if (real := real_tokens(x)) is not None:
            first = first[real.to(first.device)]
        if first.numel():
            counts[name] += first[first >= 0].bincount(minlength=layer.num_local_experts).cpu()
        return args, {**kwargs, "routing": routing}

    with watch_tokens(model) as real_tokens:
        handles = [
            layer.register_forward_pre_hook(functools.partial(count, name), with_kwargs=True)
            for name, layer in layers.items()
        ]
        try:
            yield counts
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def watch_tokens(model: nn.Module) -> Iterator[Callable[[Tensor], Tensor | None]]:
    """A function that returns, in a forward pass, which rows of a layer's input [..., D] are not padding, [...] bool.

    None: all, or not known.
    """
    tokens: Tokens | None = None

    def enter(root: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal tokens
        names, tokens = inspect.signature(root.forward).parameters, None
        with suppress(NotImplementedError):  # masks of a kind that no policy follows
            tokens = Tokens(dict(zip(names, args)) | kwargs, RoutingPolicy(), type(root).__name__)

    roots = [model.get_submodule(root) for root in parts_of(model, routed_layers(model))]
    handles = [root.register_forward_pre_hook(enter, with_kwargs=True) for root in roots]
    try:
        yield lambda x: None if tokens is None else tokens.padding_of(x)
    finally:
        for handle in handles:
            handle.remove()
