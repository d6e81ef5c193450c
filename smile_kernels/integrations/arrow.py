"""PEFT's Arrow models on SMILE layers: adapters routed per token by their leading directions.

Arrow's score of adapter i is abs(v_i^T x) / temperature, with the first right singular vector v_i of its change. The
changes of the top_k best are summed with softmax weights. This is a SMILE layer with the router row v_i^T / temperature
for each expert.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import SmileError
from ..nn import SmileLinear, is_conv1d, replace_linears, replace_modules
from ..schema import check_arguments
from ..svd import lora_svd
from . import describe_as_smile

__all__ = ["from_peft_arrow"]


@check_arguments
@torch.no_grad()
def from_peft_arrow(model: nn.Module) -> nn.Module:
    """Convert a model of PEFT's `create_arrow_model`: a SmileLinear replaces each layer that Arrow routes.

    The outputs equal PEFT's in evaluation mode, including prototypes and general adapters. Adapters may differ in rank
    and in target modules: an adapter without a change in a layer has score 0 there. Experts get the adapters' names.
    Factors are cast to the layer's dtype.

    Args:
        model: the PeftModel with its Arrow adapter active; it is modified.

    Returns:
        The base model, changed in place, without PEFT's wrappers.

    Raises:
        ValueError: no layer that Arrow routes, other active or merged adapters, modules saved whole, or a layer that is
            not linear. Nothing is changed then, except that PEFT's preparation for the first forward pass is done.

    Source: Arrow, arXiv 2405.11157; PEFT's peft.tuners.lora.arrow.
    """
    get_base = getattr(model, "get_base_model", None)
    base: Any = model if get_base is None else get_base()
    wrapped = {name: module for name, module in base.named_modules() if hasattr(module, "base_layer")}
    arrows = {name: module for name, module in wrapped.items() if len(getattr(module, "lora_arrow", ()))}
    if not arrows:
        raise SmileError(f"model: {type(model).__name__} has no layer that Arrow routes; expected create_arrow_model's")
    if saved := next((n for n, m in base.named_modules() if hasattr(m, "modules_to_save")), None):
        raise SmileError(f"model: {saved} is saved whole by an adapter; expected adapters of linear layers only")
    names = list(dict.fromkeys(name for module in arrows.values() for name in _arrow(module).task_adapter_names))
    # PEFT's router may be on layers that no adapter changes.
    layers = {
        name: _layer(name, module, names)
        for name, module in arrows.items()
        if not module.lora_A.keys().isdisjoint(names)
    }
    replace_linears(base, {name: layer.train(wrapped[name].training) for name, layer in layers.items()})
    replace_modules(base, ((module, module.base_layer) for name, module in wrapped.items() if name not in layers))
    vars(base).pop("peft_config", None)
    describe_as_smile(base)
    return base


def _arrow(module: Any) -> Any:
    """The router of a layer with only the Arrow adapter active."""
    active = list(module.active_adapters)
    if len(active) != 1 or active[0] not in module.lora_arrow or module.merged or module.disable_adapters:
        raise SmileError(f"model: its active adapters are {active}; expected only the Arrow router, not merged")
    return module.lora_arrow[active[0]]


def _layer(name: str, module: Any, adapters: list[str]) -> SmileLinear:
    """The SMILE layer of one layer that Arrow routes."""
    arrow, linear = _arrow(module), module.base_layer
    transposed = is_conv1d(linear)
    if not (isinstance(linear, nn.Linear) or transposed) or not linear.weight.is_floating_point():
        raise SmileError(f"model: {name} is a {type(linear).__name__}; expected a linear layer in floating point")
    weight: Tensor = linear.weight.T.contiguous() if transposed else linear.weight
    present = [adapter for adapter in adapters if adapter in module.lora_A]
    arrow.gen_know_sub(module.lora_A, module.lora_B)
    if present == list(arrow.task_adapter_names):
        arrow.build_prototypes(module.lora_A, module.lora_B)
        rows = dict(zip(present, arrow.prototypes))
    else:  # as in PEFT, which requires adapters of one shape
        find = arrow.top_right_singular_vec_from_BA
        rows = {a: find(module.lora_A[a].weight, module.lora_B[a].weight) for a in present}
    r = min(max(module.lora_A[adapter].weight.shape[0] for adapter in present), *weight.shape)
    n, (o, d) = len(adapters), weight.shape
    factors: dict[str, Tensor | None] = {
        "vh": weight.new_zeros(n, r, d),
        "s": weight.new_zeros(n, r, dtype=torch.promote_types(weight.dtype, torch.float32)),
        "u": weight.new_zeros(n, o, r),
        "router": weight.new_zeros(n, 1, d),
    }
    for i, adapter in enumerate(adapters):
        if adapter in present:
            b, a = module.lora_B[adapter].weight, module.lora_A[adapter].weight
            part = lora_svd(b, a, float(module.scaling[adapter]), min(a.shape[0], r))
            k = len(part.s)
            factors["vh"][i, :k], factors["s"][i, :k], factors["u"][i, :, :k] = part.vh[:k], part.s, part.u  # type: ignore[index]
            factors["router"][i, 0] = rows[adapter] / arrow.temperature  # type: ignore[index]
    layer = SmileLinear.from_factors(
        weight, linear.bias, factors, rank_of_router=1, num_experts_per_tok=int(arrow.top_k)
    )
    if not transposed:
        layer.weight = cast(nn.Parameter, linear.weight)  # tied weights stay tied
    layer.bias, layer.expert_names = linear.bias, tuple(adapters)
    return layer
