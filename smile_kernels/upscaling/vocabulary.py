"""Additional tokens of one fine-tuned model: their rows of the embedding and the head."""

import copy
import math
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SmileError, check_integer
from ..integrations.peft import LowRankDelta, ModuleDelta, StoredDeltas, wide
from ..storage import StoredTensor
from .layers import Layer
from .sources import AdapterSource, ExpertSource, WholeSource

__all__ = ["AddedTokens", "find_added_tokens", "grow_source", "resize", "which_expert", "with_tokens"]


@dataclass(frozen=True)
class AddedTokens:
    """The additional tokens of an expert.

    Attributes:
        source: the expert.
        before, after: the number of tokens of the base and of the expert.
        dims: name of each tensor with an entry per token -> the dimension of these entries.
    """

    source: ExpertSource
    before: int
    after: int
    dims: Mapping[str, int]

    def lacks(self, name: str, shape: Sequence[int]) -> bool:
        """Whether a tensor of this name and shape has only the base's tokens."""
        return name in self.dims and len(shape) > self.dims[name] and shape[self.dims[name]] == self.before

    def grown(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor with the expert's entries of the added tokens."""
        new, dim = self.source.tensor(name), self.dims[name]
        if new is None or self.lacks(name, new.shape):  # a bias, to which transformers adds zeros
            new = torch.zeros_like(tensor).narrow(dim, 0, 1).repeat_interleave(self.after, dim)
        new = new.detach().narrow(dim, self.before, self.after - self.before)
        return torch.cat([tensor.detach(), new.to(tensor)], dim)

    def grown_stored(self, name: str, stored: StoredTensor) -> StoredTensor:
        """`grown` of a tensor on disk, when it is read."""
        shape = list(stored.shape)
        shape[self.dims[name]] = self.after
        return replace(stored, shape=tuple(shape), read=lambda: self.grown(name, stored.load()))

    def grow(self, tensors: MutableMapping[str, Any]) -> None:
        """Replace the tensors, in memory or on disk, without the added tokens; tied tensors stay tied."""
        done: dict[int, Any] = {}
        for name in self.dims:
            if name in tensors and self.lacks(name, tensors[name].shape):
                tensor, make = (
                    tensors[name],
                    self.grown_stored if isinstance(tensors[name], StoredTensor) else self.grown,
                )
                if id(tensor) not in done:
                    done[id(tensor)] = make(name, tensor)
                tensors[name] = done[id(tensor)]


def which_expert(given: int | str, names: Sequence[str], argument: str = "embeddings_from") -> int:
    """The number of the expert that an argument names.

    Raises:
        ValueError: no such expert.
    """
    if not isinstance(given, str):
        return check_integer(argument, given, 0, len(names) - 1, "the number of an expert")
    if given not in names:
        raise SmileError(f"{argument}: is {given!r}; expected one of the experts {', '.join(map(repr, names))}")
    return list(names).index(given)


def find_added_tokens(
    model: Any, shapes: Mapping[str, Tensor] | Mapping[str, StoredTensor], source: ExpertSource
) -> AddedTokens:
    """The additional tokens of an expert, given the base's model and tensors.

    Raises:
        ValueError: `model` is not a transformers model, or the expert has no additional tokens, or not all their rows.
    """
    embedding = model.get_input_embeddings() if hasattr(model, "resize_token_embeddings") else None
    name = next((f"{n}.weight" for n, m in model.named_modules() if m is embedding), "") if model else ""
    if embedding is None or name not in shapes:
        kind = "its architecture is not known" if model is None else f"{type(model).__name__} has no tokens"
        raise SmileError(f"embeddings_from: {kind}; expected a transformers model of tokens")
    before, theirs = shapes[name].shape[0], source.shape(name)
    after = theirs[0] if theirs else 0
    if after <= before:
        raise SmileError(
            f"embeddings_from: {source.where} has {after} tokens and the base {before}; expected an expert with more"
        )
    dims, of_tokens = {}, _resized(model, after)
    for one in shapes:
        if one not in of_tokens:  # such as positions, as many as tokens
            continue
        mine, theirs = tuple(shapes[one].shape), source.shape(one)
        changed = [d for d, (a, b) in enumerate(zip(mine, theirs or ())) if a != b]
        sizes = [(mine[d], theirs[d]) for d in changed] if theirs and len(mine) == len(theirs) else []
        if sizes == [(before, after)]:
            dims[one] = changed[0]
    dim_of = {id(shapes[one]): dim for one, dim in dims.items()}
    tied = {one: dim_of[id(shapes[one])] for one in shapes if id(shapes[one]) in dim_of}
    dims |= {one: dim for one, dim in tied.items() if one not in dims}  # also where the expert's are not tied any more
    for one in sorted(of_tokens.intersection(shapes) - dims.keys()):
        mine, theirs = tuple(shapes[one].shape), source.shape(one)
        rows = [after if size == before else size for size in mine]
        if one not in source.may_change and math.prod(mine) == before:
            dims[one] = mine.index(before)
        else:
            found = f"has {one} of shape {list(theirs)}" if theirs else f"lacks {one}"
            raise SmileError(
                f"embeddings_from: {source.where} {found}, and {after} tokens in {name}; expected {rows}, with the "
                "rows of the added tokens"
            )
    return AddedTokens(source, before, after, dims)


def _resized(model: Any, tokens: int) -> set[str]:
    """The tensors that transformers resizes for another number of tokens."""
    on_meta = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    resized = copy.deepcopy(model, on_meta)  # type: ignore[arg-type]
    shapes = {name: tensor.shape for name, tensor in resized.state_dict().items()}
    resized.resize_token_embeddings(tokens, mean_resizing=False)
    return {name for name, tensor in resized.state_dict().items() if tensor.shape != shapes.get(name)}


def grow_source(
    source: ExpertSource, added: AddedTokens, base: Mapping[str, Tensor], layers: Mapping[str, Layer]
) -> ExpertSource:
    """The expert with entries for the added tokens: its own, or those of the expert with these tokens.

    Args:
        base, layers: the base's tensors, grown, and its linear layers.
    """
    if isinstance(source, AdapterSource):
        before = source.deltas
        grown = StoredDeltas({one: one for one in before}, lambda one: _grown_delta(one, before[one], added, base))
        deltas = grown if isinstance(before, StoredDeltas) else dict(grown)  # a base in memory may change meanwhile
        return AdapterSource(source.where, deltas, base, layers)
    if isinstance(source, WholeSource) and source is not added.source:
        added.grow(source.shapes)
    return source


@torch.no_grad()
def _grown_delta(module: str, delta: ModuleDelta, added: AddedTokens, base: Mapping[str, Tensor]) -> ModuleDelta:
    """A change of the base's entries as one of the base with the added tokens, which keep what they are given there."""
    whole, weight, bias = dict(delta.whole), delta.weight, delta.bias
    name = f"{module}.weight"
    if name in added.dims:
        plain = base[name].detach()
        extra = added.after - added.before
        own = whole.pop("weight") if "weight" in whole and whole["weight"].shape == plain.shape else None
        if own is not None and not isinstance(weight, LowRankDelta):
            weight = wide(own) - wide(plain)
        elif own is not None and isinstance(weight, LowRankDelta) and not torch.equal(own.to(plain), plain):
            weight = wide(own) + weight.dense(own) - wide(plain)  # LoRA of a weight that is also saved whole
        elif isinstance(weight, LowRankDelta) and len(weight.b) == added.before:
            zeros, magnitude = weight.b.new_zeros(extra, weight.b.shape[1]), weight.magnitude
            if magnitude is not None:
                new = torch.linalg.vector_norm(wide(plain[added.before :]), dim=1)
                magnitude = torch.cat([magnitude.flatten(), new.to(magnitude)])
            weight = replace(weight, b=torch.cat([weight.b, zeros]), magnitude=magnitude)
        elif isinstance(weight, Tensor) and added.lacks(name, weight.shape):
            weight = torch.cat([weight, weight.new_zeros(extra, *weight.shape[1:])])
    if f"{module}.bias" in added.dims:
        if "bias" in whole and whole["bias"].shape == base[f"{module}.bias"].shape:
            bias = wide(whole.pop("bias")) - wide(base[f"{module}.bias"].detach())
        elif bias is not None and len(bias) == added.before:
            bias = torch.cat([bias, bias.new_zeros(added.after - added.before)])
    return ModuleDelta(weight, bias, whole)


@torch.no_grad()
def resize(model: Any, added: AddedTokens | None, base: Mapping[str, Tensor]) -> None:
    """Add the additional tokens, if any, to a transformers model; `base` has its enlarged tensors."""
    if added is None:
        return
    model.resize_token_embeddings(added.after, mean_resizing=False)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in added.dims:
            tensor.data = base[name].detach().clone()


def with_tokens(config: Mapping[str, Any], added: AddedTokens) -> dict[str, Any]:
    """A config.json with the new number of tokens, in the section that has the base's number."""
    parts = {
        name: with_tokens(part, added)
        for name, part in config.items()
        if isinstance(part, Mapping) and part.get("vocab_size") == added.before
    }
    counts = not parts or config.get("vocab_size") == added.before
    return {**config, **parts, **({"vocab_size": added.after} if counts else {})}
