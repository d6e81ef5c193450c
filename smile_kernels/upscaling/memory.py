"""A model and its fine-tuned versions -> the model with SMILE layers in place of its linear layers, and a report."""

import copy
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import SmileLinear, replace_linear
from ..routing import RoutingPolicy, set_routing
from ..svd import check_ranks, decompose_linear
from .decompose import average_tensors, in_threads
from .layers import fused_experts, is_conv1d, linear_layers, select_layers
from .report import LayerReport, UpscaleReport

__all__ = ["upscale"]


@torch.no_grad()
def upscale(
    model: nn.Module,
    finetuned: Sequence[nn.Module | Mapping[str, Any]],
    *,
    rank_of_expert: int | float,
    rank_of_router: int,
    num_experts_per_tok: int = 1,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    remaining: str = "base",
    routing: RoutingPolicy | None = None,
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
        routing: how the layers choose their experts, as `set_routing` takes it; by default each token for itself.
        inplace: change `model` itself, rather than a copy.
        progress: show a progress bar.

    Returns:
        The upscaled model and the report.

    Raises:
        ValueError: no experts, another architecture, a shape or dtype that differs, NaN or inf, a rank out of range,
            num_experts_per_tok > N, patterns that leave no layer, or a layer whose weight PyTorch reads past its
            forward. Nothing is changed then.
    """
    if not finetuned:
        raise ValueError("finetuned: is empty; expected one fine-tuned model or more")
    if not 1 <= num_experts_per_tok <= len(finetuned):
        raise ValueError(f"num_experts_per_tok: is {num_experts_per_tok}; expected 1 to {len(finetuned)}")
    if remaining not in ("base", "average"):
        raise ValueError(f"remaining: is {remaining!r}; expected 'base' or 'average'")
    if isinstance(model, nn.Linear):
        raise ValueError(
            "model: is a linear layer itself; expected a model of them (SmileLinear.from_linears fuses one)"
        )
    linears = linear_layers(model)
    names = select_layers(linears, include, exclude)
    if not names:
        raise ValueError(
            f"include, exclude: {include} without {exclude} leaves none of the {len(linears)} linear layers; "
            "expected patterns such as '*.q_proj'"
        )
    for i, expert in enumerate(finetuned):
        _check_same(model, expert, names, f"finetuned[{i}]")
    for name in names:
        try:
            check_ranks(rank_of_expert, rank_of_router, linears[name].weight.shape)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        parent = model.get_submodule(name.rpartition(".")[0])
        weights = (_expert(expert, name, linears[name])[0] for expert in finetuned)
        if isinstance(parent, nn.MultiheadAttention) and any(
            isinstance(weight, tuple) or not torch.equal(weight, linears[name].weight) for weight in weights
        ):
            raise ValueError(
                f"model: {name} cannot hold experts, since nn.MultiheadAttention reads its weight and never calls it; "
                f"expected it in exclude (exclude=[{name!r}] keeps the base's)"
            )
    _check_finite(model.named_parameters(), "model")
    for i, expert in enumerate(finetuned):
        _check_finite(_tensors(expert), f"finetuned[{i}]")

    @torch.no_grad()
    def decompose(name: str) -> tuple[dict[str, Tensor | None], LayerReport]:
        start = time.perf_counter()
        conv1d = is_conv1d(linears[name])
        weight, bias = linears[name].weight, linears[name].bias
        experts = [_expert(expert, name, linears[name]) for expert in finetuned]
        try:
            factors, certificates = decompose_linear(
                weight.T.contiguous() if conv1d else weight,
                bias,
                [w.T.contiguous() if conv1d and isinstance(w, Tensor) else w for w, _ in experts],
                [b for _, b in experts],
                rank_of_expert=rank_of_expert,
                rank_of_router=rank_of_router,
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        return factors, LayerReport.of(name, factors, certificates, time.perf_counter() - start)

    workers = 1 if linears[names[0]].weight.is_cuda else None
    decomposed = list(_track(in_threads(decompose, names, workers), len(names), progress))
    reports = [report for _, report in decomposed] + fused_experts(model)
    layers = {report.name: factors for factors, report in decomposed if not report.skipped}

    model = model if inplace else copy.deepcopy(model)
    linears = linear_layers(model)
    places = dict(model.named_modules(remove_duplicate=False))
    shared = {id(p) for name in layers for p in linears[name].parameters()}
    if remaining == "average":
        whole = [expert.state_dict() for expert in finetuned if isinstance(expert, nn.Module)]
        stored = model.state_dict().keys()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name in stored and id(tensor) not in shared and whole and tensor.is_floating_point():
                # A bias that an expert lacks counts as 0; an adapter has the base's own tensors.
                none = torch.zeros_like(tensor)
                same = [tensor.clone()] * (len(finetuned) - len(whole))
                tensor.copy_(average_tensors([*(e.get(name, none).to(tensor.device) for e in whole), *same]))
    for name, factors in layers.items():
        linear = linears[name]
        weight = linear.weight.T.contiguous() if is_conv1d(linear) else linear.weight
        options = {"rank_of_router": rank_of_router, "num_experts_per_tok": num_experts_per_tok}
        layer = SmileLinear.from_factors(weight, linear.bias, factors, **options).train(linear.training)
        # The very parameters of the linear layer: what was tied to them stays tied.
        layer.bias = linear.bias
        if not is_conv1d(linear):
            layer.weight = linear.weight
        for place in [place for place, module in places.items() if module is linear]:
            replace_linear(model, place, layer)
    if routing is not None:
        set_routing(model, routing)
    return model, UpscaleReport(reports)


def _expert(expert: nn.Module | Mapping[str, Any], name: str, linear: nn.Module) -> tuple[Any, Tensor | None]:
    """One expert's version of a layer: its weight, or LoRA factors (b, a, scale), and its bias."""
    if isinstance(expert, nn.Module):
        module = expert.get_submodule(name)
        return module.weight, module.bias
    delta = expert.get(name)
    if delta is None:
        return linear.weight, linear.bias
    if delta.weight is None or isinstance(delta.weight, Tensor):
        weight = linear.weight if delta.weight is None else (linear.weight + delta.weight).to(linear.weight.dtype)
    else:
        weight = delta.weight.b, delta.weight.a, delta.weight.scale
    if delta.bias is None:
        return weight, linear.bias
    return weight, delta.bias if linear.bias is None else (linear.bias + delta.bias).to(linear.bias.dtype)


def _check_same(model: nn.Module, expert: nn.Module | Mapping[str, Any], names: Sequence[str], where: str) -> None:
    """The same parameters, save biases of linear layers, which either side may lack; the layers `names` alike."""
    linears = linear_layers(model)
    if not isinstance(expert, nn.Module):
        unknown = [name for name in expert if name not in linears]
        if unknown:
            raise ValueError(f"{where}: changes {unknown[0]}, which is no linear layer of the model")
        return
    own, theirs = dict(model.named_parameters()), dict(expert.named_parameters())
    known = linear_layers(expert)
    optional = {f"{name}.bias" for name in (*linears, *known)}
    missing = [name for name in own if name not in theirs and name not in optional]
    extra = [name for name in theirs if name not in own and name not in optional]
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has {extra[0]} more"
        raise ValueError(f"{where}: is another architecture: it {what}; expected the parameters of the base model")
    for name, parameter in own.items():
        other = theirs.get(name)
        if other is not None and (other.shape != parameter.shape or other.dtype != parameter.dtype):
            raise ValueError(
                f"{where}: {name} is {other.dtype} {list(other.shape)}; expected {parameter.dtype} "
                f"{list(parameter.shape)} as in the base model"
            )
    for name in names:
        if name not in known or is_conv1d(known[name]) != is_conv1d(linears[name]):
            kinds = (type(expert.get_submodule(name)).__name__, type(linears[name]).__name__)
            raise ValueError(f"{where}: {name} is a {kinds[0]}; expected a {kinds[1]} as in the base model")


def _check_finite(tensors: Iterable[tuple[str, Tensor]], where: str) -> None:
    for name, tensor in tensors:
        # The least and the largest entry are NaN where any is.
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise ValueError(f"{where}: {name} holds NaN or inf; expected finite numbers")


def _tensors(expert: nn.Module | Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that make an expert, by name."""
    if isinstance(expert, nn.Module):
        yield from expert.named_parameters()
        return
    for name, delta in expert.items():
        if isinstance(delta.weight, Tensor):
            yield f"{name}.weight", delta.weight
        elif delta.weight is not None:
            yield f"{name}.lora_B", delta.weight.b
            yield f"{name}.lora_A", delta.weight.a
        if delta.bias is not None:
            yield f"{name}.bias", delta.bias


def _track(layers: Iterator[Any], total: int, progress: bool) -> Iterator[Any]:
    if not progress:
        return layers
    from rich.console import Console
    from rich.progress import track

    return track(layers, "upscaling", total=total, console=Console(stderr=True))
