"""Everything that is not upscaled: layers that cannot have experts, and other tensors; which changes are lost."""

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..config import settings_of
from ..errors import SmileError
from ..storage import StoredTensor
from .layers import Layer
from .report import NEW, LayerReport, LostChange, LostSetting
from .sources import AdapterSource, ExpertSource


def check_fit(
    where: str, layers: Collection[Layer], base: Mapping[str, Tensor], sources: Sequence[ExpertSource], *, strict: bool
) -> None:
    """With `strict`, raise ValueError if an expert changes a layer that cannot have experts."""
    for layer in layers if strict else ():
        if layer.unfit and any(source.changes(layer, base) for source in sources):
            raise SmileError(
                f"{where}: {layer.name} cannot have experts, since {layer.unfit}; expected it in exclude "
                f"(exclude=[{layer.name!r}] keeps the base's)"
            )


def layers_to_take(
    unfit: Collection[Layer],
    base: Mapping[str, Tensor],
    shapes: Mapping[str, Tensor] | Mapping[str, StoredTensor],
    sources: Sequence[ExpertSource],
) -> list[Layer]:
    """The layers that cannot have experts and get the weight of the only expert.

    A weight that is tied in the base but not in the expert stays the base's.
    """
    if len(sources) > 1:
        return []
    source, taken = sources[0], []
    for layer in unfit:
        ties = [name for name in shapes if name != layer.weight and shapes[name] is shapes[layer.weight]]
        weight, others = source.tensor(layer.weight), [source.tensor(name) for name in ties]
        alike = all(weight is not None and other is not None and torch.equal(other, weight) for other in others)
        if source.changes(layer, base) and alike:
            taken.append(layer)
    return taken


def tied_to(names: Collection[str], tensors: Mapping[str, Tensor] | Mapping[str, StoredTensor]) -> set[str]:
    """The names of the same tensors, including the given ones."""
    ids = {id(tensors[name]) for name in names}
    return {name for name in tensors if id(tensors[name]) in ids}


def unfit_layers(unfit: Collection[Layer], taken: Collection[Layer]) -> list[LayerReport]:
    """The report of the layers that cannot have experts."""
    ending = {layer.name: "; it gets the weight of the only expert" for layer in taken}
    return [LayerReport(layer.name, 0, [], [], 0.0, f"{layer.unfit}{ending.get(layer.name, '')}") for layer in unfit]


def reasons_left_alone(
    every: Mapping[str, Layer], chosen: Mapping[str, Layer], reports: Collection[LayerReport]
) -> dict[str, str]:
    """Tensor name -> why it is not upscaled, for skipped layers and the fused experts of a mixture."""
    reasons: dict[str, str] = {}
    for name in every.keys() - chosen.keys():
        reasons |= {f"{name}.weight": "excluded", f"{name}.bias": "excluded"}
    for report in reports:
        if report.skipped:
            reasons |= dict.fromkeys((report.name, f"{report.name}.weight", f"{report.name}.bias"), report.skipped)
    return reasons


def check_changed(argument: str, reports: Collection[LayerReport], taken: Collection[Layer]) -> None:
    """Raise ValueError if no layer is upscaled and none gets an expert's weight."""
    if not taken and all(report.skipped for report in reports):
        reasons = ", ".join(sorted({report.skipped or "" for report in reports}))
        raise SmileError(f"{argument}: change no layer that can have experts ({reasons}); expected one change or more")


def average(name: str, base: Mapping[str, Tensor], sources: Sequence[ExpertSource]) -> Tensor:
    """The mean of a tensor over the experts, summed in float32 (float64 for float64).

    A tensor that is missing in an expert counts as 0. If no expert may change it, the result is the base's tensor.
    """
    plain = base[name]
    if not any(name in source.may_change for source in sources):
        return plain
    zero = torch.zeros_like(plain)
    total: Tensor | None = None
    dtype = plain.dtype
    # Adapters come last, whatever their position: the order determines the last bit.
    for source in sorted(sources, key=lambda source: isinstance(source, AdapterSource)):
        tensor = source.tensor(name)
        tensor = zero if tensor is None else tensor
        wide = tensor.to(plain.device, torch.promote_types(tensor.dtype, torch.float32))
        total = wide.clone() if total is None else total.add_(wide)
        dtype = torch.promote_types(dtype, tensor.dtype)
    assert total is not None
    return (total / len(sources)).to(dtype)


def lost_changes(
    base: Mapping[str, Tensor],
    shapes: Mapping[str, Tensor] | Mapping[str, StoredTensor],
    sources: Sequence[ExpertSource],
    result: Callable[[str], Tensor],
    held: Collection[str],
    reasons: Mapping[str, str],
    embeddings: Collection[str],
) -> list[LostChange]:
    """Changes by fine-tuning that are not in the result, the largest first.

    Args:
        base, shapes: the base's tensors and their headers.
        sources: the experts.
        result: returns the result's tensor by name.
        held: the tensors in upscaled layers.
        reasons: tensor name -> why it is not in the result.
        embeddings: the weights used as lookup tables, where experts of a tied layer have no effect.
    """
    seen = {id(shapes[name]): name for name in held if name in shapes}
    lost = []
    for name in dict.fromkeys((*shapes, *(name for source in sources for name in source.may_change))):
        known = name in shapes
        looked_up = name in embeddings and name not in held
        # An adapter may save the weight of a layer whole in another shape, whose change its expert does not hold.
        resized = [known and source.shape(name) not in (None, tuple(shapes[name].shape)) for source in sources]
        tied = seen.get(id(shapes[name])) if known and not looked_up and name not in held else None
        if (name in held and not any(resized)) or (tied and (tied in held or _alike(name, tied, sources))):
            continue
        if known:
            seen.setdefault(id(shapes[name]), name)
            if name.endswith("num_batches_tracked"):  # a counter, which no pass in evaluation mode reads
                continue
        if not any(one in source.may_change for source in sources for one in (name, tied)):
            continue
        sizes, reason = [], "an embedding" if looked_up else reasons.get(name, "not a linear layer")
        reason = f"tied to {tied} in the base" if tied else reason
        if not known:
            sizes, reason = [float(name in source.may_change) for source in sources], NEW
        else:
            plain, kept = base[name], result(tied or name)
            unit = _norm(plain)
            for source, other in zip(sources, resized):
                if name in held and not other:
                    sizes.append(0.0)
                    continue
                tensor = source.tensor(name) if name in source.may_change else plain
                if tensor is None or tensor.shape != kept.shape:
                    shape = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
                    sizes, reason = [*sizes, 1.0], f"{shape} in {source.where}, {list(kept.shape)} in the result"
                    continue
                change = _norm(_wide(tensor.to(kept.device)) - _wide(kept))
                sizes.append(change / unit if unit else float(change > 0))
        if any(sizes):
            lost.append(LostChange(name, sizes, reason))
    return sorted(lost, key=lambda one: -max(one.sizes))


def _alike(name: str, tied: str, sources: Sequence[ExpertSource]) -> bool:
    """Whether two tensors that are tied in the base are equal in every expert that has both."""
    pairs = ((source.tensor(name), source.tensor(tied)) for source in sources)
    return all(a is None or b is None or torch.equal(a, b) for a, b in pairs)


def lost_settings(base: Any, sources: Sequence[ExpertSource]) -> list[LostSetting]:
    """Settings in which the experts' configs differ from that of the base, which is the config of the result."""
    if base is None or all(source.config is None for source in sources):
        return []
    ours = settings_of(base)
    # Of a file whose kind of config is not known, what it leaves out is not known either.
    whole = not isinstance(base, Mapping)
    theirs = [ours if source.config is None else settings_of(source.config) for source in sources]

    def shown(settings: Mapping[str, Any], name: str) -> str:
        text = str(settings[name]) if settings.get(name) is not None else ""
        return text if len(text) <= 200 else f"{text[:200]}..."  # of the labels of a thousand classes

    return [
        LostSetting(name, shown(ours, name), [shown(settings, name) for settings in theirs])
        for name in sorted(dict.fromkeys(itertools.chain(ours, *theirs)))
        if any(settings.get(name) != ours.get(name) for settings in theirs if whole or {name} <= settings.keys() & ours)
    ]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _norm(tensor: Tensor) -> float:
    return torch.linalg.vector_norm(_wide(tensor)).item()
