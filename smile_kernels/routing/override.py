"""Experts selected by the caller instead of the routing policy: for all tokens, or for each row of a batch."""

import inspect
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ContextDecorator, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SmileError
from ..functional import route
from ..nn import RoutedExperts, routed_layers
from .control import attached_roots, release_idle
from .policy import Routing
from .tokens import Tokens

__all__ = ["Override", "expert_weights", "routing_override"]

Expert = str | int | Mapping[Any, float] | Tensor

_attaching = threading.Lock()


def routing_override(model: nn.Module, expert: Expert | Sequence[Expert | None] | None) -> AbstractContextManager[None]:
    """Inside the context, forward passes of this thread use the given experts, under any routing policy.

        with routing_override(model, expert="math"):
            model.generate(**batch)
        with routing_override(model, expert=["math", None, {"code": 0.7, "chat": 0.3}]):
            model(**batch_of_three)

    The context may be opened several times. A pass keeps its override, also in a recomputation under gradient
    checkpointing. The innermost override applies; other threads, and copies of the model, have their own. A policy
    continues to store evidence for KV caches. The choice is a constant to autograd.

    Args:
        model: the model, or the part of it, as for `set_routing`.
        expert: name or index of an expert, with weight 1; or weights w_i over experts, used without normalisation: a
            mapping from names or indices, or a tensor [N]. All 0, or {}: the base model. None: the policy's choice. A
            list has one entry for each row of the batch.

    Raises:
        ValueError: no SMILE layers, layers that differ in the number or names of their experts, an unknown expert, a
            weight that is not finite, or a part of a model with a policy on the whole. In a forward pass: a batch
            of another size than the list.
    """
    if not isinstance(model, nn.Module):
        raise SmileError(f"model: is {model!r}; expected a model with SMILE layers")
    layers = routed_layers(model)
    if not layers:
        raise SmileError(f"model: {type(model).__name__} has no SmileLinear; expected a model with SMILE layers")
    kinds = {(layer.num_local_experts, layer.expert_names) for layer in layers.values()}
    if len(kinds) > 1:
        raise SmileError(f"model: its layers have different experts, {sorted(map(str, kinds))}; expected the same")
    ((n, names),) = kinds
    override = None
    if isinstance(expert, (list, tuple)):
        if not expert:
            raise SmileError(f"expert: is {expert!r}; expected one entry for each row of the batch")
        rows = [None if e is None else expert_weights(e, n, names, f"expert[{i}]") for i, e in enumerate(expert)]
        override = Override(rows, {layer.vh.device for layer in layers.values()})
    elif expert is not None:
        override = Override(expert_weights(expert, n, names), {layer.vh.device for layer in layers.values()})
    return _Override(model, list(layers.values()), override)


class _Override(ContextDecorator, AbstractContextManager[None]):
    """The context of an override, which may be opened several times."""

    def __init__(self, *arguments: Any):
        self.arguments, self.thread = arguments, threading.local()

    def __call__(self, func: Any) -> Any:
        if inspect.isgeneratorfunction(func) or inspect.iscoroutinefunction(func) or inspect.isasyncgenfunction(func):
            raise SmileError(
                f"routing_override: decorates {func.__name__}, whose body runs after the call; expected a with "
                "statement inside it, or another kind of function"
            )
        return super().__call__(func)

    def __enter__(self) -> None:
        opened = _opened(*self.arguments)
        opened.__enter__()
        vars(self.thread).setdefault("opened", []).append(opened)

    def __exit__(self, *error: Any) -> bool | None:
        return self.thread.opened.pop().__exit__(*error)


@contextmanager
def _opened(model: nn.Module, layers: Iterable[RoutedExperts], override: "Override | None") -> Iterator[None]:
    with _attaching:
        roots = attached_roots(model, override is not None and override.rows is not None)
        for root in roots:
            root.overriding += 1
    mine = [override]
    for root in roots:
        vars(root.current).setdefault("opened", []).append(mine)
        root.override = override
    try:
        yield
    finally:
        for root in roots:  # contexts may close in any order, as those of coroutines do
            opened = root.current.opened = [one for one in vars(root.current).get("opened", ()) if one is not mine]
            root.override = opened[-1][0] if opened else None
        with _attaching:
            for root in roots:
                root.overriding -= 1
            release_idle(layers)


def expert_weights(
    expert: Any, num_local_experts: int, names: Sequence[str] | None, where: str = "expert"
) -> dict[int, float]:
    """The nonzero weights of an override for one row, by expert index, in descending order.

    Raises:
        ValueError: as `routing_override`; the message begins with `where`.
    """
    n = num_local_experts
    known = f"one of {', '.join(map(repr, names))}, or " if names else ""
    expected = f"expected {known}an index from 0 to {n - 1}"
    if isinstance(expert, Tensor):
        if expert.is_nested:  # it has no shape
            raise SmileError(f"{where}: is a nested tensor; expected weights [{n}], one for each expert")
        if expert.shape != (n,):
            raise SmileError(f"{where}: has shape {list(expert.shape)}; expected weights [{n}], one for each expert")
        if expert.is_meta:
            raise SmileError(f"{where}: is on the meta device; expected weights with data")
        expert = dict(enumerate(expert.tolist()))
    elif not isinstance(expert, (str, int, Mapping)):
        raise SmileError(f"{where}: is {expert!r}; {expected}")
    given = expert if isinstance(expert, Mapping) else {expert: 1.0}
    weights: dict[int, float] = {}
    for key, weight in given.items():
        unnamed = "" if names or not isinstance(key, str) else ", and the experts have no names"
        if isinstance(key, str) and names and key in names:
            index = names.index(key)
        elif isinstance(key, int) and not isinstance(key, bool) and 0 <= key < n:
            index = key
        else:
            raise SmileError(f"{where}: is {key!r}{unnamed}; {expected}")
        most = torch.finfo(torch.float32).max
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not -most <= weight <= most:
            raise SmileError(f"{where}: the weight of {key!r} is {weight!r}; expected a finite number")
        if index in weights:
            raise SmileError(f"{where}: {key!r} is given by its name and its index; expected one of the two")
        weights[index] = float(weight)
    return {i: w for i, w in sorted(weights.items(), key=lambda pair: -abs(pair[1])) if w}


class Override:
    """The requested experts as tensors: one choice for all tokens, or one for each row of a batch.

    Args:
        asked: weights by expert, as `expert_weights` returns them; or a list of these, None where the policy chooses.
        devices: where the layers are.
    """

    def __init__(
        self, asked: Mapping[int, float] | Sequence[Mapping[int, float] | None], devices: Iterable[torch.device]
    ):
        self.rows = None if isinstance(asked, Mapping) else len(asked)
        rows = [asked] if isinstance(asked, Mapping) else asked
        self.keeps_some = any(row is None for row in rows)  # whether the policy's own choice is needed
        width = max(1, *(len(row or ()) for row in rows))
        weights = torch.zeros(len(rows), width)
        ids = torch.full((len(rows), width), -1, dtype=torch.int32)
        for i, row in enumerate(rows):
            for j, (expert, weight) in enumerate((row or {}).items()):
                weights[i, j], ids[i, j] = weight, expert
        own = torch.tensor([[row is None] for row in rows])
        self.of_host = weights, ids, own
        self.tensors = {device: self._on(device) for device in devices}

    def _on(self, device: torch.device) -> tuple[Tensor, ...]:
        return tuple(t.to(device) for t in self.of_host)

    def routing(self, layer: RoutedExperts, x: Tensor, own: Routing | None, tokens: Tokens | None) -> Routing:
        """(weights, ids) [..., k] for x [..., D].

        Args:
            layer: the layer, which chooses by itself where `own` is needed and not given.
            x: its input.
            own: what the policy chose; None: the layer chooses by itself.
            tokens: whose tokens the pass has; needed where rows differ.

        Raises:
            ValueError: the batch has another size.
        """
        asked = self.tensors.get(x.device) or self._on(x.device)  # others are those of offloaded layers
        weights, ids, kept = (self._spread(t, x, tokens) for t in asked)
        if not self.keeps_some:
            return weights, ids
        if own is None:
            rows, m, g = (
                layer.vh if layer.router is None else layer.router,
                layer.num_experts_per_tok,
                layer.rank_of_router,
            )
            own = route(x.detach().to(rows.dtype), rows.detach(), num_experts_per_tok=m, rank_of_router=g)
        width = max(own[1].shape[-1], ids.shape[-1])
        weights, own_weights = (F.pad(t.to(own[0].dtype), (0, width - t.shape[-1])) for t in (weights, own[0]))
        ids, own_ids = (F.pad(t, (0, width - t.shape[-1]), value=-1) for t in (ids, own[1]))
        return torch.where(kept, own_weights, weights), torch.where(kept, own_ids, ids)

    def _spread(self, t: Tensor, x: Tensor, tokens: Tokens | None) -> Tensor:
        """t [1 or rows, k] -> [..., k] for the rows of x [..., D]."""
        leading = x.shape[:-1]
        if self.rows is None or tokens is None:
            return t[0].expand(*leading, -1)
        if tokens.batch not in (None, self.rows):
            raise SmileError(f"expert: has {self.rows} entries; expected {tokens.batch}, one for each row of the batch")
        if leading and leading[0] == self.rows:
            return t.view(self.rows, *[1] * (len(leading) - 1), -1).expand(*leading, -1)
        if len(leading) == 1 and tokens.length is not None and leading[0] == self.rows * tokens.length:
            return t[:, None].expand(-1, tokens.length, -1).flatten(0, 1)
        raise SmileError(
            f"expert: has {self.rows} entries, and a SMILE layer has input {list(x.shape)}; expected inputs "
            "[rows, ..., D] and one entry for each row of the batch"
        )
