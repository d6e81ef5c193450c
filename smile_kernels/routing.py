"""Routing that remembers: experts chosen by the evidence of a whole sequence and of the layers below.

In the published method each token at each layer chooses alone, from one noisy score. A `RoutingPolicy` pools the very
same score over tokens and adds up its logarithm over layers; nothing is trained. With S_t the tokens that token t may
listen to (scope "token": t itself; "sequence": all of its sequence; "causal": those up to t), for the SMILE layers
l = 0, 1, ... in the order they run:

    E_i(t, l) = ||V_i,l[:, :g]^T x_t||^2          p_i = E_i / sum_j E_j          P_i(t, l) = mean of p_i over S_t
    L_i(t, l) = log P_i(t, l)  (+ L_i(t, l - 1) where the policy accumulates)
    experts(t, l) = the m largest L_i(t, l), ties to the lower index, weighted by their softmax

Padding neither votes nor counts. A token whose scores are all 0 has no vote. An expert without any evidence at a layer
(its router rows are 0: it did not change that layer) keeps its standing there: in the sum it gets the mean logarithm of
the others. The choice is a constant to autograd: gradients reach the experts through it, not the router.

State lives for one forward pass of the root module, and beside the KV cache where there is one.
"""

import functools
import inspect
import itertools
import threading
import types
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import route, router_scores, select_experts
from .nn import SmileLinear

__all__ = ["RoutingPolicy", "get_routing", "set_routing", "watch_routing"]

Routing = tuple[Tensor, Tensor]  # (weights [..., m], ids [..., m] int32)

SCOPES = ("token", "sequence", "causal")


@dataclass(frozen=True)
class RoutingPolicy:
    """How the SMILE layers of a model choose their experts (the equations are at the top of this module).

    Args:
        scope: whose scores count for a token: "token" its own; "sequence" those of its whole sequence (in generation
            the prompt votes and its choice holds for the tokens that follow); "causal" those up to itself.
        accumulate: add up the evidence of the layers below.
        lock_after: keep the choice of the n-th SMILE layer from there on; those above compute no scores. None: never.
        num_experts_per_tok: m; None leaves each layer's own.

    The default is the published routing: softmax over the token's own scores, inside the layer's kernel.

    Raises:
        ValueError: a value out of range, or lock_after where nothing is remembered; the message names the field.
    """

    scope: str = "token"
    accumulate: bool = False
    lock_after: int | None = None
    num_experts_per_tok: int | None = None

    def __post_init__(self):
        if self.scope not in SCOPES:
            raise ValueError(f"scope: is {self.scope!r}; expected one of {', '.join(map(repr, SCOPES))}")
        if not isinstance(self.accumulate, bool):
            raise ValueError(f"accumulate: is {self.accumulate!r}; expected True or False")
        for name in ("lock_after", "num_experts_per_tok"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}: is {value!r}; expected None or an integer, 1 or more")
        if self.lock_after is not None and not self.remembers:
            raise ValueError(
                f"lock_after: is {self.lock_after} with scope 'token' and no accumulation; expected None, since there "
                "each layer chooses alone"
            )

    @property
    def remembers(self) -> bool:
        """Whether a layer's choice depends on anything but its own token's scores."""
        return self.scope != "token" or self.accumulate

    def to_dict(self) -> dict:
        """The fields by name, as a checkpoint's config stores them under "routing"."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "RoutingPolicy":
        """The inverse of `to_dict`; absent fields take their defaults, unknown ones raise ValueError."""
        if not isinstance(values, dict):
            raise ValueError(f"routing: is {values!r}; expected a mapping of {[f.name for f in fields(cls)]}")
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"routing: has unknown keys {unknown}; expected some of {[f.name for f in fields(cls)]}")
        return cls(**values)


def set_routing(model: nn.Module, policy: RoutingPolicy) -> None:
    """Make every SMILE layer of `model` choose its experts by `policy`, from the next forward pass on.

    The layers that share evidence are those of one root: `model`, or the transformers models inside it where these hold
    all the layers (the language model of a wrapper, the two towers of CLIP, encoder and decoder of T5: two roots).
    Padding is read from the root's `attention_mask` ([B, past + S] or [B, 1, S, keys]), packed sequences from
    `cu_seq_lens_q`, or from `position_ids` [B, S] when there is neither mask nor cache.

    Raises:
        ValueError: no SMILE layers; num_experts_per_tok above a layer's number of experts; layers that would share
            evidence but differ in their number of experts, or that belong to no single root. Nothing is changed then.
    """
    layers = _smile_layers(model)
    if not layers:
        raise ValueError(f"model: {type(model).__name__} has no SmileLinear; expected a model with SMILE layers")
    m = policy.num_experts_per_tok
    for name, layer in layers.items():
        if m is not None and m > layer.num_local_experts:
            raise ValueError(f"num_experts_per_tok: is {m}; expected at most {layer.num_local_experts}, as {name} has")
    parts = [(root, list(_smile_layers(root).values())) for root in _roots(model)] if policy.remembers else []
    held = {layer for _, members in parts for layer in members}
    outside = [name for name, layer in layers.items() if layer not in held]
    if parts and outside:
        names = ", ".join(type(root).__name__ for root, _ in parts)
        raise ValueError(
            f"model: {outside[0]} belongs to none of its parts ({names}), each of which routes its own tokens; "
            "expected SMILE layers inside the parts alone, or set_routing on one part"
        )
    for root, members in parts:
        counts = {layer.num_local_experts for layer in members}
        if len(counts) > 1:
            raise ValueError(
                f"model: the SMILE layers of {type(root).__name__} have {sorted(counts)} experts; expected one number, "
                "since they share their evidence"
            )

    for layer in layers.values():
        if layer.attached_routing is not None:
            layer.attached_routing[0].release(layer)
        if m is not None:
            layer.num_experts_per_tok = m
    for root, members in parts:
        attached = AttachedRouting(policy, root, len(members))
        for index, layer in enumerate(members):
            layer.attached_routing = (attached, index)


def get_routing(model: nn.Module) -> RoutingPolicy:
    """The policy the SMILE layers of `model` follow.

    Raises:
        ValueError: its parts follow different policies.
    """
    found = {
        layer.attached_routing[0].policy if layer.attached_routing else RoutingPolicy()
        for layer in _smile_layers(model).values()
    }
    if len(found) > 1:
        raise ValueError(f"model: its SMILE layers follow {len(found)} routing policies; expected one")
    return found.pop() if found else RoutingPolicy()


@contextmanager
def watch_routing(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Counts the tokens that each expert gets while it is open: {SMILE layer's name: [N] int64 on the CPU}.

    A token counts for its first choice, padding not at all, under any policy; `routing=` that a layer is given is its
    choice, calls with `routing_weights=` do not count. Outputs do not change. Recomputed layers count twice.

        with watch_routing(model) as counts:
            model(**batch)
        share = {name: count / count.sum() for name, count in counts.items()}
    """
    layers = _smile_layers(model)
    counts = {name: torch.zeros(layer.num_local_experts, dtype=torch.int64) for name, layer in layers.items()}
    tokens: _Tokens | None = None

    def enter(root: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal tokens
        names = inspect.signature(root.forward).parameters
        tokens = _Tokens(dict(zip(names, args)) | kwargs, "token", type(root).__name__)

    def count(name: str, layer: SmileLinear, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if kwargs.get("routing_weights") is not None:
            return None
        routing = kwargs.get("routing")
        if routing is None and layer.attached_routing is not None:
            attached, index = layer.attached_routing
            routing = attached.choose(index, layer, args[0])
        elif routing is None:
            rows = layer.vh if layer.router is None else layer.router
            m, g = layer.num_experts_per_tok, layer.rank_of_router
            routing = route(args[0].to(rows.dtype), rows, num_experts_per_tok=m, rank_of_router=g)
        first = routing[1][..., 0]
        if tokens is not None and tokens.real is not None and tokens.real.shape == first.shape:
            first = first[tokens.real.to(first.device)]
        counts[name] += first.flatten().bincount(minlength=layer.num_local_experts).cpu()
        return args, {**kwargs, "routing": routing}

    handles = [root.register_forward_pre_hook(enter, with_kwargs=True) for root in _roots(model)]
    for name, layer in layers.items():
        hook = functools.partial(count, name)
        handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def _smile_layers(model: nn.Module) -> dict[str, SmileLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SmileLinear)}


def _roots(model: nn.Module) -> list[nn.Module]:
    """The innermost modules whose forward pass runs over one set of tokens and through SMILE layers."""
    parts: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(part + ".") for part in parts)
        if name and not inside and _is_transformers_model(module) and _smile_layers(module):
            parts[name] = module
    outside = any(not name.startswith(tuple(part + "." for part in parts)) for name in _smile_layers(model))
    if not parts or (outside and len(parts) == 1):
        return [model]
    return [root for part in parts.values() for root in _roots(part)]


def _is_transformers_model(module: nn.Module) -> bool:
    return any(cls.__name__ == "PreTrainedModel" for cls in type(module).__mro__)


class AttachedRouting:
    """A policy at work on one root module: opens a state for each of its forward passes, and answers its layers."""

    _serials = itertools.count()

    def __init__(self, policy: RoutingPolicy, root: nn.Module, users: int):
        self.policy = policy
        self.serial = next(self._serials)
        self.users = users
        self.root_name = type(root).__name__
        self.argument_names = tuple(inspect.signature(root.forward).parameters)
        self.takes_cache = any("cache" in name or "past" in name for name in self.argument_names)
        self.handles = (
            root.register_forward_pre_hook(self._open, with_kwargs=True),
            root.register_forward_hook(self._close, with_kwargs=True, always_call=True),
        )
        self._forget()

    def _forget(self) -> None:
        self.current = threading.local()  # .state: the forward pass this thread is in
        self.live: weakref.WeakSet[_Pass] = weakref.WeakSet()  # passes whose graphs exist
        self.replayed: weakref.WeakValueDictionary[int, _Pass] = weakref.WeakValueDictionary()  # by backward pass

    def __getstate__(self):
        # Copies of the model start with no pass under way.
        return {k: v for k, v in self.__dict__.items() if k not in ("current", "live", "replayed")}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._forget()

    def release(self, layer: SmileLinear) -> None:
        """`layer` no longer asks; the last one takes the root's hooks with it."""
        layer.attached_routing = None
        self.users -= 1
        if self.users == 0:
            for handle in self.handles:
                handle.remove()

    def choose(self, index: int, layer: SmileLinear, x: Tensor) -> Routing:
        """(weights, ids) [..., m] for the input x [..., D] of the root's SMILE layer number `index`."""
        state = getattr(self.current, "state", None)
        with torch.no_grad():
            if state is not None:
                return state.choose(index, layer, x)
            return self._passed().replay(index, x)

    def _open(self, root: nn.Module, args: tuple, kwargs: dict) -> None:
        arguments = dict(zip(self.argument_names, args)) | kwargs
        self.current.state = _Pass(self, arguments)

    def _close(self, root: nn.Module, args: tuple, kwargs: dict, output) -> None:
        state, self.current.state = getattr(self.current, "state", None), None
        if state is None or output is None:  # the pass has failed
            return
        state.keep(output)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._expect_recomputation(state, output)

    def _expect_recomputation(self, state: "_Pass", output) -> None:
        """Gradient checkpointing calls layers again in the backward pass, after their forward pass has ended.

        The hooks on the root's outputs keep its state as long as the graph lives, and tell which pass a backward pass
        has reached: autograd finishes a later forward pass before it enters an earlier one.
        """

        def reached(_, state=state):
            task = _backward_pass()
            other = self.replayed.get(task)
            if other not in (None, state) and len(state.devices) > 1:
                raise RuntimeError(
                    f"routing: one backward pass runs through two forward passes of {self.root_name}, which spans "
                    "several devices; expected one forward pass, so that recomputed layers find their routing"
                )
            self.replayed[task] = state

        if not hasattr(torch._C, "_current_graph_task_id"):
            return
        for tensor in torch.utils._pytree.tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                tensor.register_hook(reached)
                self.live.add(state)

    def _passed(self) -> "_Pass":
        """The forward pass that a layer called outside of one is recomputed for."""
        task = _backward_pass()
        if task == -1:
            raise RuntimeError(
                f"routing: a SMILE layer was called outside of a forward pass of {self.root_name}, whose policy "
                f"{self.policy} needs the whole pass; call the {self.root_name}, or set_routing on the part you call"
            )
        state = self.replayed.get(task)
        if state is None and len(self.live) == 1:
            (state,) = self.live
        if state is None:
            raise RuntimeError(
                f"routing: a SMILE layer is recomputed for one of {len(self.live)} forward passes of {self.root_name}, "
                "and it cannot be told which; call backward before the next forward pass"
            )
        return state


def _backward_pass() -> int:
    """The number of the backward pass this thread is in, -1 outside of one.

    Raises:
        NotImplementedError: this PyTorch does not tell.
    """
    current = getattr(torch._C, "_current_graph_task_id", None)
    if current is None:
        raise NotImplementedError(
            f"routing: a SMILE layer was called outside of a forward pass, and PyTorch {torch.__version__} does not "
            "tell which backward pass it is recomputed for; expected 2.10 to 2.13, or no gradient checkpointing"
        )
    return current()


class _Pass:
    """The state of one forward pass: evidence so far, the last choice, and what a KV cache remembers."""

    def __init__(self, attached: AttachedRouting, arguments: dict):
        self.policy, self.root_name = attached.policy, attached.root_name
        self.tokens = _Tokens(arguments, self.policy.scope, self.root_name)
        self.memory = None
        caches = attached.takes_cache or self.tokens.cache is not None
        if self.policy.scope != "token" and self.tokens.starts is None and caches:
            self.memory = _Memory.beside(self.tokens, attached)
        self.held = self.memory is not None and bool(self.memory.choices)  # the prompt has voted in an earlier pass
        self.calls: dict[int, int] = {}  # layer -> how often it has run
        self.layers_run = 0
        self.evidence: Tensor | None = None  # L, [B, N] or [B, S, N]
        self.choice: Routing | None = None  # of the last scored layer, [B, m] or [B, S, m]
        self.choices: dict[int, Routing] = {}
        self.devices: set[torch.device] = set()

    def choose(self, index: int, layer: SmileLinear, x: Tensor) -> Routing:
        """(weights, ids) [..., m] for the input x [..., D] of layer `index`, which runs now."""
        key = (index, self.calls.get(index, 0))
        self.calls[index] = key[1] + 1
        scored = self.policy.lock_after is None or self.layers_run < self.policy.lock_after
        self.layers_run += 1
        if self.held:
            self.choice = self.memory.choice(key, locked=self.policy.lock_after is not None)
        elif scored:
            self.choice = self._score(key, layer, x)
            if self.memory is not None and self.policy.scope == "sequence":
                self.memory.choices[key], self.memory.last = self.choice, key
        self.choices[index] = self.choice
        self.devices.add(x.device)
        return self._spread(self.choice, x)

    def replay(self, index: int, x: Tensor) -> Routing:
        """The choice of layer `index` once more, for a recomputation of its forward pass."""
        if self.calls.get(index) != 1:
            raise RuntimeError(
                f"routing: a layer that ran {self.calls.get(index, 0)} times in a forward pass of {self.root_name} is "
                "recomputed in the backward pass; expected one run, else its routing cannot be told"
            )
        return self._spread(self.choices[index], x)

    def keep(self, output) -> None:
        """Leave what later passes need beside the KV cache they will come with."""
        if self.memory is not None:
            cache = self.tokens.cache if self.tokens.cache is not None else _cache_in(output)
            if cache is not None:
                self.memory.attach(cache)

    def _score(self, key: tuple[int, int], layer: SmileLinear, x: Tensor) -> Routing:
        rows = layer.vh if layer.router is None else layer.router
        # Autocast leaves some inputs in another dtype than the parameters: the router works in the latter.
        scores = router_scores(x.detach().to(rows.dtype), rows, rank_of_router=layer.rank_of_router)
        batch, length = self.tokens.shape(x)
        shares = energy_shares(scores).view(batch, length, -1)
        real = self.tokens.real_of(x)
        if real is not None:
            shares = torch.where(real[..., None].to(shares.device), shares, 0)
        logs = log_evidence(self._pool(key, shares), self.policy.accumulate)
        if self.policy.accumulate and self.evidence is not None:
            if self.evidence.shape != logs.shape:
                raise RuntimeError(
                    f"routing: a SMILE layer of {self.root_name} has input {list(x.shape)} after layers with evidence "
                    f"{list(self.evidence.shape)}; expected the same tokens at every layer"
                )
            logs = logs + self.evidence.to(logs.device)
            logs = logs - logs.amax(-1, keepdim=True)  # the softmax does not see it; sums over many layers stay exact
        self.evidence = logs
        return select_experts(logs, layer.num_experts_per_tok)

    def _pool(self, key: tuple[int, int], shares: Tensor) -> Tensor:
        """Sum of shares [B, S, N] over each token's scope: [B, N] for whole sequences, else [B, S, N].

        Sums serve for means: their quotient, the number of tokens, is the same for all experts.
        """
        tokens, scope = self.tokens, self.policy.scope
        if scope == "token":
            return shares
        if tokens.starts is not None and shares.shape[1] == tokens.length:
            # Differences of prefix sums, in float64: they must not lose a short sequence behind long ones.
            starts, ends = tokens.starts.to(shares.device), tokens.ends.to(shares.device)
            prefix = F.pad(shares.double().cumsum(1), (0, 0, 1, 0))
            to = ends + 1 if scope == "sequence" else torch.arange(1, tokens.length + 1, device=starts.device)[None]
            from_, to = (t.expand(len(shares), -1)[..., None].expand_as(shares) for t in (starts, to))
            return (prefix.gather(1, to) - prefix.gather(1, from_)).to(shares.dtype)
        if scope == "sequence":
            return shares.sum(1)
        sums = shares.cumsum(1)
        return sums if self.memory is None else self.memory.extend(key, sums, tokens.past)

    def _spread(self, choice: Routing, x: Tensor) -> Routing:
        """One choice a sequence, or a token, as one for each row of x."""
        length = self.tokens.shape(x)[1]

        def spread(t: Tensor) -> Tensor:
            if t.dim() == 2:
                t = t[:, None].expand(-1, length, -1)
            elif t.shape[1] != length:
                raise RuntimeError(
                    f"routing: a SMILE layer of {self.root_name} has input {list(x.shape)} where each of "
                    f"{t.shape[1]} tokens has its own choice; expected as many tokens"
                )
            return t.reshape(*x.shape[:-1], t.shape[-1]).to(x.device)

        return spread(choice[0]), spread(choice[1])


class _Tokens:
    """Which rows of a layer's input are tokens of which sequence, as far as the root's arguments tell.

    batch B and length S (None: not known, every row counts); real [B, S] bool (None: all are); starts and ends
    [1 or B, S], each token's first and last neighbour where sequences are packed; past, the tokens in the KV cache.
    """

    def __init__(self, arguments: dict, scope: str, root_name: str):
        self.scope, self.root_name = scope, root_name
        self.cache, self.cache_name = _cache_argument(arguments, root_name)
        self.past = 0 if self.cache is None else self.cache.get_seq_length()
        if isinstance(self.past, Tensor):
            self.past = self.past.clone()  # static caches count in place

        mask = arguments.get("attention_mask")
        if isinstance(mask, dict):  # one for each kind of attention layer
            mask = mask.get("full_attention", next(iter(mask.values())))
        self.batch, self.length = None, None
        for name in ("input_ids", "inputs_embeds"):
            if arguments.get(name) is not None:
                self.batch, self.length = arguments[name].shape[:2]
        if self.batch is None:
            given = next(
                (v for k, v in arguments.items() if isinstance(v, Tensor) and v.dim() and k not in _ASIDE), mask
            )
            self.batch = None if given is None else given.shape[0]
        if self.length is None and mask is not None and isinstance(self.past, int):
            self.length = mask.shape[-1] - self.past if mask.dim() == 2 else mask.shape[-2]
        self.real = None if mask is None else _real(mask, self.past, self.length)

        self.encoder_states = arguments.get("encoder_hidden_states")
        self.encoder_real = arguments.get("encoder_attention_mask")
        if self.encoder_states is not None:
            if scope == "causal":
                raise NotImplementedError(
                    f"routing: {root_name} attends to encoder_hidden_states, which have no causal order; expected "
                    "scope 'sequence' or 'token' for a decoder with cross-attention"
                )
            if self.encoder_real is not None:
                self.encoder_real = _real(self.encoder_real, 0, self.encoder_states.shape[1])

        self.starts = self.ends = None
        if arguments.get("cu_seq_lens_q") is not None:
            self._pack(_boundaries_from_lengths(arguments["cu_seq_lens_q"], self.length))
        elif mask is None and self.cache is None and arguments.get("position_ids") is not None:
            self._pack(_boundaries_from_positions(arguments["position_ids"]))

    def _pack(self, first: Tensor) -> None:
        """first [1 or B, S] bool: the tokens that begin a sequence."""
        if self.length != first.shape[1]:
            raise ValueError(f"position_ids: has {first.shape[1]} tokens; expected {self.length}")
        # Reading this on the host is free on a CPU; under compilation the general form serves.
        if not torch.compiler.is_compiling() and not bool(first[:, 1:].any()):
            return
        at = torch.arange(first.shape[1], device=first.device).expand_as(first)
        last = F.pad(first[:, 1:], (0, 1), value=True)
        self.starts = torch.where(first, at, 0).cummax(1).values
        self.ends = torch.where(last, at, first.shape[1]).flip(1).cummin(1).values.flip(1)

    def shape(self, x: Tensor) -> tuple[int, int]:
        """(sequences, rows of x in each) for a layer's input x [..., D]."""
        leading = x.shape[:-1]
        batch = self.batch if self.batch is not None else (leading[0] if leading else 1)
        if self._is_encoders(x):
            return leading[0], leading[1]
        if x.dim() == 2 and leading[0] != batch and self.length is not None and leading[0] == batch * self.length:
            return batch, self.length
        length = leading.numel() // max(batch, 1)
        single = self.scope == "sequence" and self.starts is None and length == 1
        first = leading[0] if leading else 1
        if first != batch or (self.length is not None and self.length != length and not single):
            tokens = "tokens" if self.length is None else f"{self.length} tokens"
            raise RuntimeError(
                f"routing: a SMILE layer of {self.root_name} has input {list(x.shape)}, where a forward pass over "
                f"{batch} sequences of {tokens} is under way; expected [{batch}, {self.length or 'S'}, D]. "
                "Route other inputs with scope 'token', or call set_routing on the part of the model that has its own"
            )
        return batch, length

    def real_of(self, x: Tensor) -> Tensor | None:
        """Which rows of x are no padding, [B, S] bool; None: all. One row for a whole sequence is never padding."""
        if self._is_encoders(x):
            return self.encoder_real
        return self.real if self.shape(x)[1] == self.length else None

    def _is_encoders(self, x: Tensor) -> bool:
        return self.encoder_states is not None and x is self.encoder_states


def _is_cache(value: object) -> bool:
    """Whether `value` is a KV cache of transformers, under whatever name a model takes it."""
    return all(callable(getattr(value, name, None)) for name in ("get_seq_length", "update", "get_mask_sizes"))


def _cache_argument(arguments: dict, root_name: str) -> tuple[Any, str]:
    """The KV cache among a forward pass's arguments (None without one), and the name it came under.

    Raises:
        NotImplementedError: two caches, or an argument about caches, masks or positions that no policy can follow.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    caches = {name: value for name, value in given.items() if _is_cache(value)}
    if len({id(value) for value in caches.values()}) > 1:
        raise NotImplementedError(
            f"routing: {root_name} is given {len(caches)} KV caches, {sorted(caches)}; expected one"
        )
    for name, value in given.items():
        concerns = any(part in name for part in ("mask", "position", "cache", "past", "seq_idx", "seq_len"))
        if not concerns or name in caches or name in _KNOWN or isinstance(value, (bool, int, float, str)):
            continue
        raise NotImplementedError(
            f"{name}: is a {type(value).__name__}, which routing policies do not follow; expected a KV cache with "
            f"get_seq_length (no paged cache), or masks and positions among {', '.join(sorted(_KNOWN))}"
        )
    return next(iter(caches.values()), None), next(iter(caches), "cache")


# Arguments about masks and positions that a policy follows, or that say nothing about whose token is whose.
_KNOWN = frozenset(
    (
        *("attention_mask", "encoder_attention_mask", "head_mask", "cross_attn_head_mask", "bool_masked_pos"),
        *("position_ids", "position_bias", "position_embeddings", "cache_position", "mask_time_indices"),
        *("cu_seq_lens_q", "cu_seq_lens_k"),
    )
)

# Arguments whose first dimension is no batch of inputs.
_ASIDE = ("attention_mask", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "cache_position", "labels")


def _real(mask: Tensor, past: int | Tensor, length: int | None) -> Tensor:
    """[B, S] bool, True on tokens, of masks [B, past + S] or [B, heads, S, keys] (a token attends to itself)."""
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        what = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask: is {what}; expected a tensor [B, past + S] or [B, heads, S, keys]")
    if mask.dim() == 4:
        mask = mask[:, 0] > -1 if mask.is_floating_point() else mask[:, 0] != 0
        mask = mask[:, 0] if mask.shape[1] == 1 else mask
    else:
        mask = mask != 0
    keys = mask.shape[-1]
    if length is None or keys < length or (isinstance(past, int) and mask.dim() == 2 and keys < past + length):
        raise ValueError(f"attention_mask: has {keys} columns; expected one for each of {past} + {length} tokens")
    # Windowed caches hold fewer keys than there were tokens: the last ones are those of this pass.
    start = min(past, keys - length) if isinstance(past, int) else past.clamp(max=keys - length)
    columns = torch.arange(length, device=mask.device) + start
    if mask.dim() == 2:
        return mask.index_select(1, columns)
    return mask.gather(2, columns[None, :, None].expand(mask.shape[0], -1, 1))[..., 0]


def _boundaries_from_positions(position_ids: Tensor) -> Tensor:
    """position_ids [1 or B, S] -> [1 or B, S] bool, True where a sequence begins: where positions do not go on."""
    if position_ids.dim() != 2:
        raise ValueError(
            f"position_ids: has shape {list(position_ids.shape)} and comes without attention_mask; expected [B, S], "
            "else sequences that are packed cannot be told apart"
        )
    return F.pad(position_ids.diff(dim=1) != 1, (1, 0), value=True)


def _boundaries_from_lengths(cu_seq_lens: Tensor, length: int) -> Tensor:
    """Offsets [sequences + 1] into one row of `length` tokens -> [1, S] bool, True where a sequence begins."""
    at = torch.arange(length, device=cu_seq_lens.device)
    return (at[:, None] == cu_seq_lens[None]).any(1)[None]


def energy_shares(scores: Tensor) -> Tensor:
    """p_i = score_i^2 / sum_j score_j^2 over the last dimension; all 0 where the scores are. NaN counts as 0."""
    scores = scores.nan_to_num(nan=0.0)
    ratio = scores / scores.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    energy = ratio.square()
    # A share that vanishes in rounding is still evidence; only a score of 0 is none.
    share = (energy / energy.sum(-1, keepdim=True).clamp_min(1)).clamp_min(_LEAST)
    return torch.where(scores > 0, share, 0)


_LEAST = 1e-30


def log_evidence(sums: Tensor, accumulate: bool) -> Tensor:
    """log P up to a constant, [..., N]: finite, with the stand-in for experts that have no evidence at this layer."""
    logs = sums.clamp_min(_LEAST).log()
    if accumulate:
        present = sums > 0
        mean = torch.where(present, logs, 0).sum(-1, keepdim=True) / present.sum(-1, keepdim=True).clamp_min(1)
        logs = torch.where(present, logs, mean)
    return logs


class _Memory:
    """What later passes over the same KV cache need: sums by position (causal), or the prompt's choice (sequence).

    Positions are those of the cache, so a cropped cache finds the sums of what is left; batch rows follow the cache's.
    """

    def __init__(self, serial: int, capacity: int):
        self.serial, self.capacity = serial, capacity
        self.clear()

    def clear(self) -> None:
        self.choices: dict[tuple[int, int], Routing] = {}
        self.sums: dict[tuple[int, int], Tensor] = {}  # [B, positions, N]
        self.last: tuple[int, int] | None = None  # the layer that chose last
        self.length = 0  # positions filled, where the cache counts on the host
        self.established = False  # whether later passes build on this one's

    @classmethod
    def beside(cls, tokens: _Tokens, attached: AttachedRouting) -> "_Memory":
        """The memory of the pass's KV cache; a new one where the cache is empty or yet to come.

        Raises:
            RuntimeError: the cache holds tokens that this policy has not seen.
        """
        memory, past = getattr(tokens.cache, "routing_memory", None), tokens.past
        known = memory is not None and memory.serial == attached.serial and bool(memory.choices or memory.sums)
        if isinstance(past, int) and past == 0:
            known = False
        elif isinstance(past, int) and known:
            known = bool(memory.choices) or memory.length >= past
        if known:
            memory.established = True
            return memory
        if int(past) != 0:
            raise RuntimeError(
                f"{tokens.cache_name}: holds {int(past)} tokens that {attached.root_name} has not seen under its "
                "present routing policy (or that were packed); expected an empty cache, or one filled since set_routing"
            )
        return cls(attached.serial, _capacity(tokens.cache))

    def attach(self, cache) -> None:
        """Keep this beside `cache`, and follow what is done to its batch rows."""
        if getattr(cache, "routing_memory", None) is None:
            gone = [name for name in _FOLLOWERS if not callable(getattr(type(cache), name, None))]
            if gone:
                raise NotImplementedError(
                    f"cache: {type(cache).__name__} has no method {gone[0]}, by which its rows would be followed; "
                    "expected a Cache as transformers 5.18 to 5.24 have it"
                )
            for name, follow in _FOLLOWERS.items():
                setattr(cache, name, types.MethodType(functools.partial(_then, name, follow), cache))
        if getattr(cache, "routing_memory", None) is not self:
            cache.routing_memory = self

    def choice(self, key: tuple[int, int], locked: bool) -> Routing:
        """The prompt's choice at a layer; layers that were locked share the last one."""
        found = self.choices.get(key, self.choices[self.last] if locked else None)
        if found is None:
            raise RuntimeError(
                "routing: a SMILE layer that did not run on the prompt runs now; expected the same layers"
            )
        return found

    def extend(self, key: tuple[int, int], sums: Tensor, past: int | Tensor) -> Tensor:
        """Sums [B, S, N] of this pass's tokens -> sums with all tokens before them, which are kept."""
        batch, length, experts = sums.shape
        buffer = self.sums.get(key)
        if buffer is None and self.established:
            raise RuntimeError(
                "routing: a SMILE layer that did not run on the prompt runs now; expected the same layers"
            )
        if buffer is None:
            buffer = self.sums[key] = sums.new_zeros(batch, max(self.capacity, length), experts)
            if self.capacity > 0 and not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(buffer)  # so that CUDA graphs may write to it
        elif buffer.shape[0] != batch:
            raise RuntimeError(f"cache: holds {buffer.shape[0]} sequences; expected {batch}, as in the input")
        elif isinstance(past, int) and past + length > buffer.shape[1]:
            buffer = self.sums[key] = F.pad(buffer, (0, 0, 0, max(past + length, 2 * buffer.shape[1])))
        positions = torch.arange(length, device=sums.device) + past
        before = buffer.index_select(1, (positions[:1] - 1).clamp_min(0))
        sums = sums + torch.where(positions[:1, None] > 0, before, 0)
        buffer.index_copy_(1, positions, sums)
        if isinstance(past, int):
            self.length = past + length
        return sums

    def map_rows(self, change) -> None:
        """Apply `change` to the batch dimension of all that is kept."""
        self.choices = {key: (change(w), change(i)) for key, (w, i) in self.choices.items()}
        self.sums = {key: change(sums) for key, sums in self.sums.items()}


def _then(name: str, follow, cache, *args, **kwargs):
    """A cache's method, after which its routing memory follows."""
    getattr(type(cache), name)(cache, *args, **kwargs)
    follow(cache.routing_memory, *args, **kwargs)


_FOLLOWERS = {
    "reorder_cache": lambda memory, beam_idx: memory.map_rows(lambda t: t.index_select(0, beam_idx.to(t.device))),
    "batch_repeat_interleave": lambda memory, repeats: memory.map_rows(lambda t: t.repeat_interleave(repeats, dim=0)),
    "batch_select_indices": lambda memory, indices: memory.map_rows(lambda t: t[indices]),
    "reset": lambda memory: memory.clear(),
}


def _capacity(cache) -> int:
    """The most tokens a cache can hold; -1 where it grows."""
    for name in ("get_max_length", "get_max_cache_shape"):  # the name has changed between releases
        if hasattr(cache, name):
            return getattr(cache, name)() or -1
    return -1


def _cache_in(output):
    """The KV cache a root has made and returned, if any."""
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ()
    return next((value for value in values if _is_cache(value)), None)
