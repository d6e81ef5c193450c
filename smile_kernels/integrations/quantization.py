"""A quantised shared weight: SMILE experts added to any linear module.

    model = split_base(model)
    torchao.quantization.quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda m, name: name.endswith(".base"))

A tool that quantises `nn.Linear` (torchao, bitsandbytes) then applies only to the shared weights.
"""

import torch
from torch import Tensor, nn

from ..functional import smile_delta
from ..nn import RoutedExperts, SmileLinear, all_or_nothing, replace_modules, smile_layers, whole_layers
from ..schema import check_arguments
from ..versions import warn_if_newer

__all__ = ["SmileBesideLinear", "split_base"]


class SmileBesideLinear(RoutedExperts):
    """The experts of a SmileLinear, added to `base`, the linear module of its shared weight.

        y = base(x) + sum over the m selected i of w_i (U_i (s_i * V_i[:, :r]^T x) + expert_bias_i)

    Parameters are those of the layer, in its dtype; shapes as in `SmileLinear`. Routing is that of the layer, including
    a routing policy of its model.

    Args:
        layer: the layer; its tensors are shared, not copied.
        base: the module to use as `base`, x [..., D] -> [..., O]; None: an nn.Linear of the layer's weight and bias.
    """

    def __init__(self, layer: SmileLinear, base: nn.Module | None = None):
        super().__init__()
        if base is None:
            base = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
            base.weight = layer.weight
            base.register_parameter("bias", layer.bias)
        self.base = base
        self.vh, self.s, self.u = layer.vh, layer.s, layer.u
        self.register_parameter("expert_bias", layer.expert_bias)
        self.register_parameter("router", layer.router)
        self.register_buffer("router_prior", layer.router_prior)
        self.num_local_experts, self.rank_of_router = layer.num_local_experts, layer.rank_of_router
        self.num_experts_per_tok = layer.own_num_experts_per_tok()
        if layer.num_experts_per_tok != self.num_experts_per_tok:
            self.set_num_experts_per_tok(layer.num_experts_per_tok)
        self.router_policy, self.expert_names = layer.router_policy, layer.expert_names

    def forward(self, input: Tensor, routing: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x [..., D], named `input` as in nn.Linear -> y [..., O]; routing as in `functional.smile_linear`."""
        m = self.num_experts_per_tok  # read before the policy runs, which may return None for this number
        if self.router_policy is not None and routing is None:
            routing = self.router_policy(self, input)
        y = self.base(input)
        # The base's output may be held by a hook and is not changed.
        apart = torch.is_grad_enabled() or bool(self.base._forward_hooks) or not y.is_contiguous()
        return smile_delta(
            y if y.dtype == input.dtype else y.to(input.dtype),
            input,
            self.vh,
            self.s,
            self.u,
            self.expert_bias,
            self.router,
            num_experts_per_tok=m,
            rank_of_router=self.rank_of_router,
            routing=routing,
            inplace=not apart,
        )


@check_arguments
def split_base(model: nn.Module) -> nn.Module:
    """Replace every SmileLinear of `model` by a SmileBesideLinear, in place; return the model, or the new layer.

    A routing policy of the model stays in effect, and may be set before or after.

    Raises:
        ValueError: the model contains no SmileLinear. Nothing is changed then.
    """
    warn_if_newer("torchao")
    layers = smile_layers(model) or whole_layers(model)  # which raises
    with all_or_nothing(model):
        split = {name: SmileBesideLinear(layer).train(layer.training) for name, layer in layers.items()}
        replace_modules(model, ((layer, split[name]) for name, layer in layers.items()))
    return split.get("", model)
