"""A model and its fine-tuned versions -> the model with SMILE layers in place of its linear layers, and a report."""

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..integrations.peft import ModuleDelta
from ..nn import SmileLinear, replace_linear
from ..routing import RoutingPolicy, check_calibration, check_routing, set_routing
from ..routing import calibrate as calibrate_model
from .decompose import decompose, in_threads
from .layers import check_layer_ranks, fused_experts, is_conv1d, layers_of_model, linear_layers, select_layers
from .report import UpscaleReport
from .sources import AdapterSource, ExpertSource, ModuleSource, average, check_called, check_finite, check_request

__all__ = ["upscale"]


@torch.no_grad()
def upscale(
    model: nn.Module,
    finetuned: Sequence[nn.Module | Mapping[str, ModuleDelta]],
    *,
    rank_of_expert: int | float,
    rank_of_router: int,
    num_experts_per_tok: int = 1,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    remaining: str = "base",
    routing: RoutingPolicy | None = None,
    calibrate: bool = False,
    inplace: bool = False,
    progress: bool = True,
) -> tuple[nn.Module, UpscaleReport]:
    """One pre-trained model and N fine-tuned versions of it, as one model of SMILE layers; no data, no training.

    Each nn.Linear (and transformers' Conv1D) becomes a `SmileLinear` whose experts are the truncated SVDs of the
    differences. Layers whose experts all equal the base are left alone, as are the fused experts of a mixture. Tied
    weights stay tied.

    Args:
        model: the pre-trained model.
        finetuned: N models of the same architecture, or LoRA adapters as `integrations.peft.adapter_deltas` reads them.
        rank_of_expert: r; -1 for full rank (exact); or a fraction in (0, 1): per layer, the smallest rank that holds
            this share of the energy.
        rank_of_router: g.
        num_experts_per_tok: m.
        include, exclude: shell patterns of layer names, as "*.q_proj"; by default every linear layer.
        remaining: "base" keeps every other parameter and buffer as the base has it; "average" takes the mean of the
            fine-tuned models'.
        routing: how the layers choose their experts, as `set_routing` takes it; by default each token for itself,
            or `RoutingPolicy.recommended` of a model that is calibrated.
        calibrate: also `smile_kernels.calibrate` the model.
        inplace: change `model` itself, rather than a copy.
        progress: show a progress bar.

    Returns:
        The upscaled model and the report.

    Raises:
        ValueError: no experts, another architecture, a shape or dtype that differs, NaN or inf, a rank out of range,
            num_experts_per_tok > N, patterns that leave no layer, or a layer whose weight PyTorch reads past its
            forward. Nothing is changed then.
    """
    check_request("finetuned", finetuned, num_experts_per_tok, remaining)
    if isinstance(model, nn.Linear):
        raise ValueError(
            "model: is a linear layer itself; expected a model of them (SmileLinear.from_linears fuses one)"
        )
    base, every = model.state_dict(keep_vars=True), layers_of_model(model)
    layers = select_layers(every, include, exclude)
    sources: list[ExpertSource] = []
    for i, expert in enumerate(finetuned):
        if isinstance(expert, nn.Module):
            module = ModuleSource(f"finetuned[{i}]", expert)
            module.check(model, every, layers)
            sources.append(module)
        elif not isinstance(expert, Mapping):
            raise ValueError(f"finetuned[{i}]: is {expert!r}; expected a model, or the changes of an adapter")
        else:
            adapter = AdapterSource(f"finetuned[{i}]", expert, base)
            adapter.check(every)
            sources.append(adapter)
    check_layer_ranks(layers.values(), base, rank_of_expert, rank_of_router)
    check_called("model", model, layers, base, sources)
    check_finite("model", dict(model.named_parameters()))

    decomposed = list(
        _track(
            in_threads(
                lambda layer: decompose(
                    layer, base, sources, rank_of_expert=rank_of_expert, rank_of_router=rank_of_router
                ),
                list(layers.values()),
                1 if any(base[layer.weight].is_cuda for layer in layers.values()) else None,
            ),
            len(layers),
            progress,
        )
    )
    report = UpscaleReport([*(report for _, report in decomposed), *fused_experts(model)])
    factors = {report.name: factors for factors, report in decomposed if not report.skipped}
    if calibrate:
        check_calibration(model)
    if routing is not None:
        check_routing(model, routing, dict.fromkeys(factors, len(finetuned)), calibrating=calibrate)
    model = model if inplace else copy.deepcopy(model)
    linears = {name: linear for name, linear in linear_layers(model).items() if name in factors}
    if remaining == "average":
        _average_remaining(model, {id(p) for linear in linears.values() for p in linear.parameters()}, base, sources)
    for name, linear in linears.items():
        _replace(model, linear, factors[name], rank_of_router=rank_of_router, num_experts_per_tok=num_experts_per_tok)
    if calibrate:
        report = replace(report, calibration=calibrate_model(model))
        routing = routing or RoutingPolicy.recommended(model)
    if routing is not None:
        set_routing(model, routing)
    return model, report


def _average_remaining(
    model: nn.Module, upscaled: Collection[int], base: Mapping[str, Tensor], sources: Sequence[ExpertSource]
) -> None:
    """Sets every stored tensor but those `upscaled`, by their ids, to the mean of the experts'."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in base and id(tensor) not in upscaled and tensor.is_floating_point():
            tensor.copy_(average(name, base, sources))


def _replace(model: nn.Module, linear: nn.Linear, factors: Mapping[str, Tensor | None], **options: int) -> None:
    """Puts a SmileLinear wherever the model holds `linear`."""
    weight = linear.weight.T.contiguous() if is_conv1d(linear) else linear.weight
    layer = SmileLinear.from_factors(weight, linear.bias, factors, **options).train(linear.training)
    # The very parameters of the linear layer: what was tied to them stays tied.
    layer.bias = linear.bias
    if not is_conv1d(linear):
        layer.weight = cast(nn.Parameter, linear.weight)
    for place in [name for name, module in model.named_modules(remove_duplicate=False) if module is linear]:
        replace_linear(model, place, layer)


def _track(layers: Iterator[Any], total: int, progress: bool) -> Iterable[Any]:
    if not progress:
        return layers
    from rich.console import Console
    from rich.progress import track

    return track(layers, "upscaling", total=total, console=Console(stderr=True))
