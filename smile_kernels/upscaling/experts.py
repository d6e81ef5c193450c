"""The experts of a loaded model, one at a time: added, replaced and removed, as if `upscale` had been given these."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..config import FACTORS, check_expert_names
from ..errors import SmileError
from ..integrations import describe_as_smile
from ..integrations.conversion import ModelNames
from ..integrations.peft import ModuleDelta, is_adapter
from ..nn import SmileLinear, all_or_nothing, is_conv1d, whole_layers
from ..routing.control import followed_policies, forget_caches, refuse_override
from ..schema import check_arguments
from ..svd import without_autocast
from .decompose import decompose, in_threads, norm_rows
from .layers import CONV1D_MODELS, Layer, embedding_weights, linear_layers
from .remainder import lost_changes, lost_settings
from .report import LayerReport, UpscaleReport
from .sources import (
    AdapterSource,
    CheckpointSource,
    ExpertSource,
    ModuleSource,
    check_finite,
    local_folder,
    open_source,
)
from .vocabulary import which_expert

__all__ = ["add_expert", "remove_expert", "replace_expert"]

Expert = nn.Module | Mapping[str, ModuleDelta] | str | Path
Factors = Mapping[str, Tensor | None]  # of one expert: vh [1, k, D], s [1, r], u [1, O, r], expert_bias [1, O] | None


@check_arguments
@torch.no_grad()
@without_autocast
def add_expert(model: nn.Module, expert: Expert, *, name: str | None = None) -> UpscaleReport:
    """Add an expert, the last one, to every SMILE layer of a loaded model.

        add_expert(upscale(base, [a, b])[0], c) equals upscale(base, [a, b, c])

    where each layer keeps its rank r and its router: a change of higher rank is truncated to its best r directions, one
    of lower rank is padded with zeros. Layers without experts are unchanged; the expert's changes there are in the
    report, with a warning. The layers get new parameters, so a new optimizer is needed. Saved and loaded as before.

    `router_prior` is dropped, since the mean shares of all experts change: `calibrate` measures it again. KV caches
    that were filled before are refused under policies that store evidence with them.

    Args:
        model: a model with SMILE layers, changed in place. No other thread may run it meanwhile.
        expert: a fine-tuned model of the same base; the folder of one or of a LoRA adapter; or an adapter's changes as
            `integrations.peft.adapter_deltas` reads them.
        name: the expert's; required if the others have names, except for a folder, which has its own name. None if they
            have none.

    Returns:
        The report: the energy and the error of this expert in each layer, and what the model does not hold.

    Raises:
        ValueError: no SMILE layers, or layers with different experts, split over ranks or offloaded; an expert that
            does not fit or changes none of the layers; a name that is missing or taken; rows of the router that no
            router of `upscale` makes; or a calibrated routing policy or an override at work. Nothing is changed then.
    """
    layers = _managed(model)
    first = next(iter(layers.values()))
    names = _named(first.expert_names, name, expert, first.num_local_experts)
    made, report = _made(model, layers, expert)
    order = [*range(first.num_local_experts), None]
    _put(model, layers, {name: _joined(layer, order, made[name]) for name, layer in layers.items()}, names)
    report = replace(report, expert_names=names[-1:] if names else ())
    report.warn("base", UPSCALE_ANEW)
    return report


@check_arguments
@torch.no_grad()
@without_autocast
def replace_expert(model: nn.Module, old: int | str, expert: Expert, *, name: str | None = None) -> UpscaleReport:
    """Another expert in the place of expert `old` of a loaded model; the rest is as in `add_expert`.

    Args:
        model, expert: as in `add_expert`.
        old: the number or the name of the expert to remove.
        name: of the new expert; None keeps the old one's.

    Returns, Raises: as `add_expert`; ValueError if there is no expert `old`.
    """
    layers = _managed(model)
    first = next(iter(layers.values()))
    n, names = first.num_local_experts, first.expert_names
    place = which_expert(old, names or [str(i) for i in range(n)], "old")
    if name is not None:
        if names is None:
            raise SmileError(f"name: is {name!r}, and the experts have no names; expected None")
        names = check_expert_names([*names[:place], name, *names[place + 1 :]], n)
    made, report = _made(model, layers, expert)
    order = [None if i == place else i for i in range(n)]
    _put(model, layers, {name: _joined(layer, order, made[name]) for name, layer in layers.items()}, names)
    report = replace(report, expert_names=names[place : place + 1] if names else ())
    report.warn("base", UPSCALE_ANEW)
    return report


@check_arguments
@torch.no_grad()
def remove_expert(model: nn.Module, old: int | str) -> None:
    """One expert less in every SMILE layer of a loaded model; the numbers of those behind it move down by one.

    A layer that only this expert changed keeps its place, with experts that change nothing. Ranks stay. What is said of
    parameters, `router_prior` and KV caches in `add_expert` holds here.

    Args:
        model: a model with SMILE layers, changed in place. No other thread may run it meanwhile.
        old: the number or the name of the expert.

    Raises:
        ValueError: no such expert, the only one, or as many per token as there are; or a model that `add_expert`
            refuses. Nothing is changed then.
    """
    layers = _managed(model)
    first = next(iter(layers.values()))
    n, names = first.num_local_experts, first.expert_names
    place = which_expert(old, names or [str(i) for i in range(n)], "old")
    if n == 1:
        raise SmileError(f"old: is {old!r}, the only expert; expected a model with two or more")
    most = max(max(layer.num_experts_per_tok, layer.own_num_experts_per_tok()) for layer in layers.values())
    if most == n:
        raise SmileError(f"old: is {old!r}, and a token has all {n} experts; expected num_experts_per_tok below {n}")
    order = [i for i in range(n) if i != place]
    kept = None if names is None else tuple(names[i] for i in order)
    _put(model, layers, {name: _joined(layer, order, None) for name, layer in layers.items()}, kept)


UPSCALE_ANEW = "a new model of all experts (upscale) takes them up"


@dataclass(frozen=True)
class _Tensors:
    """A layer's new experts, as its parameters hold them."""

    vh: Tensor
    s: Tensor
    u: Tensor
    expert_bias: Tensor | None
    router: Tensor | None


def _managed(model: nn.Module) -> dict[str, SmileLinear]:
    """The SMILE layers of a model whose experts may change."""
    layers = whole_layers(model)
    if "" in layers:
        raise SmileError(f"model: is a {type(model).__name__} itself; expected a model with SMILE layers")
    kinds = {(layer.num_local_experts, layer.expert_names) for layer in layers.values()}
    if len(kinds) > 1:
        raise SmileError(f"model: its layers have different experts, {sorted(map(str, kinds))}; expected the same")
    for name, layer in layers.items():
        if is_parametrized(layer):
            raise SmileError(
                f"model: {name} is parametrized; expected plain parameters (torch.nn.utils.parametrize."
                "remove_parametrizations)"
            )
        for part, p in layer.named_parameters(recurse=False):
            if type(p.data) is not Tensor or p.is_meta:
                kind = "on the meta device" if p.is_meta else f"a {type(p.data).__name__}"
                raise SmileError(f"model: {name}.{part} is {kind}; expected a model that is whole on its devices")
    refuse_override(model)
    if any(policy.calibrated for policy in followed_policies(model)):
        raise SmileError(
            "model: follows a calibrated routing policy, which other experts change; expected set_routing with one "
            "that is not, and calibrate after this"
        )
    return layers


def _named(names: tuple[str, ...] | None, name: str | None, expert: Expert, n: int) -> tuple[str, ...] | None:
    """The names of all experts with that of one more."""
    if names is None:
        if name is not None:
            raise SmileError(f"name: is {name!r}, and the other experts have no names; expected None")
        return None
    if name is None and isinstance(expert, (str, Path)):
        name = Path(str(expert).partition("@")[0] if not Path(expert).exists() else expert).absolute().name
    if name is None:
        raise SmileError(f"name: is not given; expected a name, as {names[0]!r} is another expert's")
    return check_expert_names([*names, name], n + 1)


def _made(
    model: nn.Module, layers: Mapping[str, SmileLinear], expert: Expert
) -> tuple[dict[str, Factors], UpscaleReport]:
    """The factors of one expert in each layer, and the report."""
    for name, layer in layers.items():
        if layer.router is not None and not _is_norm(layer):
            raise SmileError(
                f"model: the router of {name} has rows of its own, as of another method or training; expected those "
                "that upscale makes"
            )
    base = {name: t for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    for name in layers:
        for factor in FACTORS:
            base.pop(f"{name}.{factor}", None)
    source, places = _source(model, layers, expert, base)

    def one(name: str) -> tuple[Factors, LayerReport]:
        layer = layers[name]
        g = layer.rank_of_router if layer.router is None else 1
        r = layer.rank_of_expert
        return decompose(places[name], base, [source], rank_of_expert=r, rank_of_router=g, router="smile")

    workers = 1 if any(layer.weight.is_cuda for layer in layers.values()) else None
    done = dict(zip(layers, in_threads(one, list(layers), workers)))
    reports = [report for _, report in done.values()]
    if all(report.skipped for report in reports):
        raise SmileError("expert: changes none of the SMILE layers; expected one change or more")
    reports = [replace(report, skipped=None, rank=layers[report.name].rank_of_expert) for report in reports]
    held = {name for place in places.values() for name in (place.weight, place.bias)}
    reasons = {
        f"{name}.{part}": "a layer without experts" for name in linear_layers(model) for part in ("weight", "bias")
    }
    lost = lost_changes(base, base, [source], base.__getitem__, held, reasons, embedding_weights(model))
    return {name: factors for name, (factors, _) in done.items()}, UpscaleReport(
        reports, lost, settings=lost_settings(getattr(model, "config", None), [source])
    )


def _source(
    model: nn.Module, layers: Mapping[str, SmileLinear], expert: Expert, base: dict[str, Tensor]
) -> tuple[ExpertSource, dict[str, Layer]]:
    """The expert, checked, and the layers as it stores them; `base` gets their orientation."""
    places = {name: Layer(name, stored=name) for name in layers}
    if isinstance(expert, nn.Module):
        tuned = ModuleSource("expert", expert, base)
        for name in layers:
            module = tuned.modules.get(f"{name}.weight")
            if not isinstance(module, nn.Linear) and not (module is not None and is_conv1d(module)):
                raise SmileError(f"expert: {name} is a {type(module).__name__}; expected a linear layer as in the base")
            if isinstance(module, SmileLinear):
                raise SmileError(f"expert: {name} is a SmileLinear; expected a fine-tuned model of plain layers")
            if is_conv1d(module):
                places[name] = Layer(name, True, name)
                base[f"{name}.weight"] = base[f"{name}.weight"].T
        tuned.check(base, places.values(), average=False)
        check_finite("expert", tuned.tensors)
        return tuned, places
    if isinstance(expert, Mapping):
        source: ExpertSource = AdapterSource("expert", expert, base, places)
    else:
        folder = local_folder("expert", expert)
        if not folder.is_dir():
            raise FileNotFoundError(f"expert: {expert}: no such folder; expected a checkpoint or an adapter")
        if not is_adapter(folder) and _may_be_transposed(model):
            raise SmileError(
                f"expert: {folder} stores layers transposed, which are not here; expected the model that "
                "from_pretrained loads from it"
            )
        source = open_source("expert", folder, base, places, ModelNames(model))
    if isinstance(source, CheckpointSource):
        source.check(base, places.values(), average=False)
    elif isinstance(source, AdapterSource):
        source.check(base)
        whole = [name for name in layers if name in source.deltas and isinstance(source.deltas[name].weight, Tensor)]
        if whole and _may_be_transposed(model):
            raise SmileError(f"expert: saves {whole[0]} whole, which may be transposed; expected a fine-tuned model")
    return source, places


def _may_be_transposed(model: nn.Module) -> bool:
    """Whether checkpoints of this architecture store layers as Conv1D; the layers here may be of another class."""
    return getattr(getattr(model, "config", None), "model_type", None) in CONV1D_MODELS


def _is_norm(layer: SmileLinear) -> bool:
    """Whether the router's rows are those of router "norm", to the rounding of their dtype."""
    assert layer.router is not None
    if layer.router.shape[1] != layer.rank_of_expert:
        return False
    rows = norm_rows(layer.vh, layer.s)
    return torch.allclose(layer.router, rows, rtol=4 * torch.finfo(rows.dtype).eps, atol=0)


def _joined(layer: SmileLinear, order: Sequence[int | None], made: Factors | None) -> _Tensors:
    """The experts of a layer in a new order; None is the new one."""

    def join(old: Tensor, new: Tensor | None) -> Tensor:
        pieces = [old[i] if i is not None else old.new_zeros(old.shape[1:]) if new is None else new[0] for i in order]
        return torch.stack([piece.to(old.device, old.dtype) for piece in pieces])

    def of(name: str) -> Tensor | None:
        return None if made is None else made.get(name)

    before = layer.u.new_zeros(layer.u.shape[:2]) if layer.expert_bias is None else layer.expert_bias
    expert_bias = join(before, of("expert_bias"))
    router = None
    if layer.router is not None:
        vh, s = of("vh"), of("s")
        router = join(layer.router, None if vh is None or s is None else norm_rows(vh, s))
    return _Tensors(
        join(layer.vh, of("vh")),
        join(layer.s, of("s")),
        join(layer.u, of("u")),
        expert_bias if expert_bias.any() else None,
        router,
    )


def _put(
    model: nn.Module,
    layers: Mapping[str, SmileLinear],
    tensors: Mapping[str, _Tensors],
    names: tuple[str, ...] | None,
) -> None:
    """Gives the layers their new experts, all or none."""
    with all_or_nothing(model):
        for name, layer in layers.items():
            for part, tensor in vars(tensors[name]).items():
                old = getattr(layer, part)
                trained = layer.u.requires_grad if old is None else old.requires_grad
                setattr(layer, part, None if tensor is None else nn.Parameter(tensor, requires_grad=trained))
            layer.router_prior = None
            layer.num_local_experts, layer.expert_names = len(tensors[name].s), names
        describe_as_smile(model)
        forget_caches(model)
