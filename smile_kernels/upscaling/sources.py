"""The fine-tuned versions of a base model: modules, adapters and checkpoints, read through one interface.

A layer's weight and bias are asked for when its turn comes, so that a few layers are in memory at a time.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import check_integer
from ..integrations.peft import LowRankDelta, ModuleDelta, adapter_deltas, is_adapter
from ..storage import StoredTensor, read_tensors
from .layers import Layer, layers_of_model

LowRank = tuple[Tensor, Tensor, float]  # b [O, q], a [q, D], scale: W + scale * b @ a


class StoredTensors(Mapping[str, Tensor]):
    """Stored tensors as a mapping that reads, and checks, each one when it is asked for."""

    def __init__(self, stored: Mapping[str, StoredTensor]):
        self.stored = stored

    def __getitem__(self, name: str) -> Tensor:
        return self.stored[name].load()

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


class ExpertSource(ABC):
    """One fine-tuned version of the base.

    Args:
        where: what messages call it.
        tensors: its tensors by their names in the base.
    """

    def __init__(self, where: str, tensors: Mapping[str, Tensor]):
        self.where, self.tensors = where, tensors

    @abstractmethod
    def weight(self, layer: Layer) -> Tensor | LowRank:
        """The layer's weight as the base stores it, or the factors of its change."""

    @abstractmethod
    def bias(self, layer: Layer) -> Tensor | None:
        """The layer's bias [O]."""

    def changes(self, layer: Layer, base: Mapping[str, Tensor]) -> bool:
        """Whether the layer's weight differs from the base's."""
        weight, plain = self.weight(layer), base[layer.weight]
        return not isinstance(weight, Tensor) or not torch.equal(weight.to(plain), plain)


class WholeSource(ExpertSource):
    """A fine-tuned model with all its tensors."""

    def weight(self, layer: Layer) -> Tensor:
        own = f"{layer.name}.weight"  # which may be tied in the base and not here
        return self.tensors[own if own in self.tensors else layer.weight]

    def bias(self, layer: Layer) -> Tensor | None:
        return self.tensors.get(layer.bias)

    def _check_like(
        self,
        mine: Mapping[str, Tensor] | Mapping[str, StoredTensor],
        base: Mapping[str, Tensor] | Mapping[str, StoredTensor],
        names: Iterable[str],
        optional: Collection[str],
        *,
        cast: bool = False,
    ) -> None:
        """Raises ValueError unless the tensors `names` are like the base's; those `optional` may be missing."""
        for name in names:
            if name not in mine and name in optional:
                continue
            if name not in mine:
                raise ValueError(f"{self.where}: has no tensor {name!r}; expected the base's, {list(base[name].shape)}")
            if mine[name].shape != base[name].shape:
                raise ValueError(
                    f"{self.where}: tensor {name!r} has shape {list(mine[name].shape)}; expected the base's, "
                    f"{list(base[name].shape)}"
                )
            if mine[name].dtype != base[name].dtype and not cast:
                raise ValueError(
                    f"{self.where}: tensor {name!r} is {mine[name].dtype}; expected the base's {base[name].dtype}"
                )


class ModuleSource(WholeSource):
    """A fine-tuned model in memory."""

    def __init__(self, where: str, module: nn.Module):
        super().__init__(where, module.state_dict(keep_vars=True))
        self.module = module

    def check(self, base: nn.Module, layers: Mapping[str, Layer], chosen: Collection[str]) -> None:
        """Raises ValueError unless it has the base's parameters, biases of linear layers aside, and its layers."""
        mine, theirs = dict(self.module.named_parameters()), dict(base.named_parameters())
        known = layers_of_model(self.module)
        optional = {layer.bias for layer in (*layers.values(), *known.values())}
        self._check_like(mine, theirs, theirs, optional)
        if more := [name for name in mine if name not in theirs and name not in optional]:
            raise ValueError(f"{self.where}: has a tensor {more[0]!r}; expected the parameters of the base model")
        for name in chosen:
            if known.get(name) != layers[name]:
                kinds = (type(model.get_submodule(name)).__name__ for model in (self.module, base))
                raise ValueError("{}: {} is a {}; expected a {} as in the base".format(self.where, name, *kinds))
        check_finite(self.where, mine)


class CheckpointSource(WholeSource):
    """A fine-tuned checkpoint on disk."""

    def __init__(self, where: str, folder: str | Path):
        self.stored = read_tensors(folder)
        super().__init__(f"{where}: {folder}", StoredTensors(self.stored))

    def check(self, base: Mapping[str, StoredTensor], chosen: Collection[Layer], *, average: bool, cast: bool) -> None:
        """Raises ValueError unless it has the weights of the chosen layers, and with `average` all, like the base's."""
        weights, biases = {layer.weight for layer in chosen}, {layer.bias for layer in chosen}
        needed = [
            name
            for name, tensor in base.items()
            if name in weights or name in biases or (average and tensor.dtype.is_floating_point)
        ]
        self._check_like(self.stored, base, needed, biases, cast=cast)


class AdapterSource(ExpertSource):
    """Changes of some layers of the base, `tensors`."""

    def __init__(self, where: str, deltas: Mapping[str, ModuleDelta], tensors: Mapping[str, Tensor]):
        super().__init__(where, tensors)
        self.deltas = deltas

    def check(self, layers: Mapping[str, Layer]) -> None:
        """Raises ValueError unless every change is that of a linear layer, in finite numbers."""
        known = {layer.name for layer in layers.values()}
        if unknown := [name for name in self.deltas if name not in known]:
            raise ValueError(f"{self.where}: changes {unknown[0]}, which is no linear layer of the model")
        for name, delta in self.deltas.items():
            parts: dict[str, Tensor | None] = {"bias": delta.bias}
            if isinstance(delta.weight, LowRankDelta):
                parts |= {"lora_B": delta.weight.b, "lora_A": delta.weight.a}
            else:
                parts |= {"weight": delta.weight}
            check_finite(self.where, {f"{name}.{part}": t for part, t in parts.items() if t is not None})

    def weight(self, layer: Layer) -> Tensor | LowRank:
        delta = self.deltas.get(layer.name)
        change = None if delta is None else delta.weight
        if isinstance(change, LowRankDelta):
            return change.b, change.a, change.scale
        weight = self.tensors[layer.weight]
        return weight if change is None else (weight + change).to(weight.dtype)

    def bias(self, layer: Layer) -> Tensor | None:
        bias, delta = self.tensors.get(layer.bias), self.deltas.get(layer.name)
        if delta is None or delta.bias is None:
            return bias
        return delta.bias if bias is None else (bias + delta.bias).to(bias.dtype)


def open_source(where: str, folder: str | Path, base: Mapping[str, Tensor]) -> CheckpointSource | AdapterSource:
    """The fine-tuned checkpoint, or the PEFT adapter of `base`, in a folder."""
    if is_adapter(folder):
        return AdapterSource(where, adapter_deltas(folder, base), base)
    return CheckpointSource(where, folder)


def check_request(argument: str, experts: Sequence[object], num_experts_per_tok: int, remaining: str) -> None:
    """Raises ValueError unless there are experts, as many as a token shall have, and `remaining` is known."""
    if not experts:
        raise ValueError(f"{argument}: is empty; expected one fine-tuned model or more")
    check_integer("num_experts_per_tok", num_experts_per_tok, 1, len(experts), "the number of experts")
    if remaining not in ("base", "average"):
        raise ValueError(f"remaining: is {remaining!r}; expected 'base' or 'average'")


def check_finite(where: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError, naming the tensor, if one holds NaN or inf."""
    for name, tensor in tensors.items():
        # The least and the largest entry are NaN where any is.
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise ValueError(f"{where}: {name} holds NaN or inf; expected finite numbers")


def check_called(
    where: str,
    model: nn.Module,
    layers: Mapping[str, Layer],
    base: Mapping[str, Tensor],
    sources: Sequence[ExpertSource],
) -> None:
    """Raises ValueError if an expert changes a layer whose weight PyTorch reads without calling the layer."""
    for name, layer in layers.items():
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention) and any(source.changes(layer, base) for source in sources):
            raise ValueError(
                f"{where}: {name} cannot hold experts, since nn.MultiheadAttention reads its weight and never calls "
                f"it; expected it in exclude (exclude=[{name!r}] keeps the base's)"
            )


def average(name: str, base: Mapping[str, Tensor], sources: Sequence[ExpertSource]) -> Tensor:
    """The mean of a tensor over the experts, summed in float32 (float64 for float64).

    A tensor that an expert lacks counts as 0; an adapter has the base's own.
    """
    whole = [source for source in sources if isinstance(source, WholeSource)]
    plain = base[name]
    if not whole:
        return plain
    zero = torch.zeros_like(plain)
    total: Tensor | None = None
    dtype = plain.dtype
    # Adapters come last wherever they stand: the order decides the last bit.
    for tensor in (*(source.tensors.get(name, zero) for source in whole), *[plain] * (len(sources) - len(whole))):
        wide = tensor.to(plain.device, torch.promote_types(tensor.dtype, torch.float32))
        total = wide.clone() if total is None else total.add_(wide)
        dtype = torch.promote_types(dtype, tensor.dtype)
    assert total is not None
    return (total / len(sources)).to(dtype)
