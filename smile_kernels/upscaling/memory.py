"""Fuses a model and its fine-tuned versions in memory: SMILE layers instead of linear layers, and a report."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..config import check_expert_names
from ..errors import SmileError
from ..guard import guard_weights
from ..integrations import describe_as_smile
from ..integrations.peft import ModuleDelta
from ..nn import SmileLinear, all_or_nothing, is_conv1d, replace_linears
from ..routing import RoutingPolicy, check_calibration, check_routing, set_routing
from ..routing import calibrate as calibrate_model
from ..schema import check_arguments
from ..svd import without_autocast
from .decompose import check_router, decompose, in_threads
from .layers import (
    Layer,
    check_layers,
    embedding_weights,
    fused_experts,
    layers_of_model,
    linear_layers,
    select_layers,
)
from .remainder import (
    average,
    check_changed,
    check_fit,
    layers_to_take,
    lost_changes,
    lost_settings,
    reasons_left_alone,
    tied_to,
    unfit_layers,
)
from .report import LayerReport, UpscaleReport
from .sources import AdapterSource, ExpertSource, ModuleSource, check_finite, check_modules, check_request
from .vocabulary import AddedTokens, find_added_tokens, grow_source, resize, which_expert

__all__ = ["upscale"]


@check_arguments
@torch.no_grad()
@without_autocast
def upscale(
    model: nn.Module,
    finetuned: Sequence[nn.Module | Mapping[str, ModuleDelta]],
    *,
    rank_of_expert: int | float,
    rank_of_router: int | None = None,
    router: str = "smile",
    num_experts_per_tok: int = 1,
    expert_names: Sequence[str] | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    remaining: str = "base",
    embeddings_from: int | str | None = None,
    routing: RoutingPolicy | None = None,
    calibrate: bool = False,
    strict: bool = False,
    inplace: bool = False,
    progress: bool = True,
) -> tuple[nn.Module, UpscaleReport]:
    """Fuse a pre-trained model and N fine-tuned versions of it into one model of SMILE layers; no data, no training.

    Each nn.Linear (and transformers' Conv1D) becomes a `SmileLinear` with truncated SVDs of the weight differences as
    experts. Layers that no expert changes are skipped, as are the fused experts of a mixture. Tied weights stay tied.
    A layer cannot have experts if its forward is not W x + b or if other code reads its weight: it is skipped, or gets
    the weight of the expert if there is only one. The report and a warning list changes that are not in the result.

    Args:
        model: the pre-trained model.
        finetuned: N models of the same architecture, or LoRA adapters read by `integrations.peft.adapter_deltas`.
        rank_of_expert: r; -1 for full rank (exact); or a fraction in (0, 1): per layer, the smallest rank that holds
            this share of the energy.
        rank_of_router: g, for router "smile"; None for the others.
        router: the rows R_i of score_i = ||R_i x||_2. "smile": V_i[:, :g]^T. "arrow": v_1^T of V_i, so g = 1 (Arrow,
            arXiv 2405.11157). "norm": s_i * V_i^T, so g = r and the score is the size of the change, ||U_i (s_i *
            V_i^T x)||_2; its rows are stored and computed in addition to those of the experts.
        num_experts_per_tok: m.
        expert_names: N names of the experts, for `routing_override` and reports.
        include, exclude: shell patterns of layer names, such as "*.q_proj"; by default every linear layer.
        remaining: source of every other parameter and buffer: "base", or "average" for the mean of the fine-tuned
            models.
        embeddings_from: number or name of the expert with additional tokens: their rows of the embedding and the head
            are added to the base, and to experts without these tokens.
        routing: the routing policy; by default the published routing, or with `calibrate` `RoutingPolicy.recommended`.
        calibrate: also run `smile_kernels.calibrate`.
        strict: raise if an expert changes a layer that cannot have experts.
        inplace: change `model` itself instead of a copy.
        progress: show a progress bar.

    Returns:
        The upscaled model and the report.

    Raises:
        ValueError: no experts, another architecture, a shape or dtype that differs, NaN or inf, an unknown router, a
            rank out of range or that does not go with the router, num_experts_per_tok > N, patterns that leave no
            layer, or no layer that an expert changes. Nothing is changed then.
    """
    check_request("finetuned", finetuned, num_experts_per_tok, remaining, routing)
    g = check_router(router, rank_of_router)
    names = check_expert_names(expert_names, len(finetuned))
    _check_model(model)
    base, every = model.state_dict(keep_vars=True), layers_of_model(model)
    base = {name: tensor for name, tensor in base.items() if isinstance(tensor, Tensor)}
    chosen = select_layers(every, include, exclude)
    layers = {name: layer for name, layer in chosen.items() if not layer.unfit}
    unfit = [layer for layer in chosen.values() if layer.unfit]
    sources, added = _sources(finetuned, embeddings_from, names, model, base, every)
    _check_sources(sources, model, base, chosen, average=remaining == "average")
    check_layers(layers.values(), base, rank_of_expert, g)
    check_fit("model", unfit, base, sources, strict=strict)
    check_finite("model", base)

    ranks = {"rank_of_expert": rank_of_expert, "rank_of_router": g, "router": router}
    decomposed = list(_track(_decomposed(list(layers.values()), base, sources, **ranks), len(layers), progress))
    factors = {report.name: factors for factors, report in decomposed if not report.skipped}
    taken = layers_to_take(unfit, base, base, sources)
    reports = [*(report for _, report in decomposed), *unfit_layers(unfit, taken), *fused_experts(model)]
    check_changed("finetuned", reports, taken)
    held = {name for layer in (*(layers[name] for name in factors), *taken) for name in (layer.weight, layer.bias)}

    def result(name: str) -> Tensor:
        return average(name, base, sources) if remaining == "average" else base[name]

    reasons = reasons_left_alone(every, chosen, reports)
    embeddings = embedding_weights(model) - tied_to({layer.weight for layer in taken}, base)
    lost = lost_changes(base, base, sources, result, held, reasons, embeddings)
    settings = lost_settings(getattr(model, "config", None), sources)
    if calibrate:
        check_calibration(model)
    if routing is not None:
        check_routing(model, routing, dict.fromkeys(factors, len(finetuned)), calibrating=calibrate)
    model = model if inplace else copy.deepcopy(model)
    values = [base[layer.weight] for layer in taken] + [base[layer.bias] for layer in taken if layer.bias in base]
    if remaining == "average":
        values += [tensor for name, tensor in base.items() if name not in held]
    with all_or_nothing(model, values if inplace else ()):
        resize(model, added, base)
        if remaining == "average":
            _average_remaining(model, {id(base[name]) for name in held if name in base}, base, sources)
        for layer in taken:
            _take(cast(nn.Linear, model.get_submodule(layer.name)), layer, sources[0])
        linears = linear_layers(model)
        replace_linears(model, {n: _layer(linears[n], factors[n], names, g, num_experts_per_tok) for n in factors})
        report = UpscaleReport(reports, lost, expert_names=names or (), router=router, settings=settings)
        if calibrate:
            report = replace(report, calibration=calibrate_model(model))
            routing = routing or RoutingPolicy.recommended(model)
        if routing is not None:
            set_routing(model, routing)
        guard_weights(model)
        describe_as_smile(model)
    report.warn(remaining)
    return model, report


def _average_remaining(
    model: nn.Module, held: set[int], base: Mapping[str, Tensor], sources: Sequence[ExpertSource]
) -> None:
    """Set every stored tensor except those with ids `held` to the mean of the experts; tied tensors once."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in base and id(base[name]) not in held and tensor.is_floating_point():
            held.add(id(base[name]))
            tensor.copy_(average(name, base, sources))


def _decomposed(
    layers: Sequence[Layer], base: Mapping[str, Tensor], sources: Sequence[ExpertSource], **ranks: Any
) -> Iterator[tuple[dict[str, Tensor | None], LayerReport]]:
    """The factors and the report of each layer; one at a time on a GPU."""
    workers = 1 if any(base[layer.weight].is_cuda for layer in layers) else None
    return in_threads(lambda layer: decompose(layer, base, sources, **ranks), layers, workers)


def _check_model(model: nn.Module) -> None:
    """Raise ValueError unless this is a plain model, of several layers."""
    if isinstance(model, nn.Linear):
        raise SmileError(
            "model: is a linear layer; expected a model with linear layers (SmileLinear.from_linears fuses one)"
        )
    check_modules("model", model)
    if compiled := [name or "it" for name, module in model.named_modules() if "_orig_mod" in module._modules]:
        raise SmileError(f"model: {compiled[0]} is compiled; expected it before torch.compile")


def _sources(
    finetuned: Sequence[nn.Module | Mapping[str, ModuleDelta]],
    embeddings_from: int | str | None,
    names: tuple[str, ...] | None,
    model: nn.Module,
    base: dict[str, Tensor],
    every: Mapping[str, Layer],
) -> tuple[list[ExpertSource], AddedTokens | None]:
    """The experts; with `embeddings_from` they and `base` (in place) get the tokens of that expert."""
    sources: list[ExpertSource] = []
    for i, expert in enumerate(finetuned):
        if isinstance(expert, nn.Module):
            if hasattr(expert, "peft_config") and hasattr(expert, "merge_and_unload"):
                raise SmileError(
                    f"finetuned[{i}]: is a {type(expert).__name__}; expected its merge_and_unload(), or its "
                    "folder read by integrations.peft.adapter_deltas"
                )
            sources.append(ModuleSource(f"finetuned[{i}]", expert, base))
        elif isinstance(expert, Mapping):
            sources.append(AdapterSource(f"finetuned[{i}]", expert, base, every))
        else:
            raise SmileError(f"finetuned[{i}]: is {expert!r}; expected a model, or the changes of an adapter")
    if embeddings_from is None:
        return sources, None
    donor = sources[which_expert(embeddings_from, names or [str(i) for i in range(len(sources))])]
    added = find_added_tokens(model, base, donor)
    added.grow(base)
    return [grow_source(source, added, base, every) for source in sources], added


def _check_sources(
    sources: Sequence[ExpertSource],
    model: nn.Module,
    base: Mapping[str, Tensor],
    chosen: Mapping[str, Layer],
    *,
    average: bool,
) -> None:
    """Raise ValueError unless every expert fits the base."""
    for source in sources:
        if isinstance(source, AdapterSource):
            source.check(base, average=average)
        elif isinstance(source, ModuleSource):
            source.check(base, chosen.values(), average=average)
            source.check_kinds(model, chosen.values())


def _take(linear: nn.Linear, layer: Layer, source: ExpertSource) -> None:
    """Copy the weight and bias of the only expert to a linear layer that cannot have experts."""
    weight = source.tensor(layer.weight)
    assert weight is not None
    linear.weight.copy_(weight)
    bias = source.bias(layer)
    if bias is not None and linear.bias is None:
        linear.bias = nn.Parameter(bias.detach().clone())
    elif linear.bias is not None:
        linear.bias.copy_(torch.zeros_like(linear.bias) if bias is None else bias)


def _layer(
    linear: nn.Linear,
    factors: Mapping[str, Tensor | None],
    expert_names: tuple[str, ...] | None,
    rank_of_router: int,
    num_experts_per_tok: int,
) -> SmileLinear:
    """The SmileLinear that replaces `linear`."""
    weight = linear.weight.T.contiguous() if is_conv1d(linear) else linear.weight
    own = factors.get("router")
    g = rank_of_router if own is None else own.shape[1]
    options = {"rank_of_router": g, "num_experts_per_tok": num_experts_per_tok}
    layer = SmileLinear.from_factors(weight, linear.bias, factors, **options).train(linear.training)
    layer.expert_names = expert_names
    # The parameters of the linear layer themselves, so that tied weights stay tied.
    layer.bias = linear.bias
    if not is_conv1d(linear):
        layer.weight = cast(nn.Parameter, linear.weight)
    return layer


def _track(layers: Iterator[Any], total: int, progress: bool) -> Iterable[Any]:
    if not progress:
        return layers
    from rich.console import Console
    from rich.progress import track

    return track(layers, "upscaling", total=total, console=Console(stderr=True))
