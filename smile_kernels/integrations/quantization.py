"""A quantised shared weight: SMILE experts added to any linear module.

    model = split_base(model)
    torchao.quantization.quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda m, name: name.endswith(".base"))

A tool that quantises `nn.Linear` (torchao, bitsandbytes) then applies only to the shared weights.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SmileError
from ..functional import smile_delta
from ..nn import KeepsSingularValues, SmileLinear, all_or_nothing, smile_layers
from ..schema import check_arguments
from ..versions import warn_if_newer

__all__ = ["SmileBesideLinear", "split_base"]


class SmileBesideLinear(KeepsSingularValues):
    """The experts of a SmileLinear, added to `base`, the linear module of its shared weight.

        y = base(x) + sum over the m selected i of w_i (U_i (s_i * V_i[:, :r]^T x) + expert_bias_i)

    Parameters are those of the layer, in its dtype; shapes as in `SmileLinear`. Routing is that of the layer, including
    a routing policy of its model.

    Args:
        layer: the layer; its tensors are shared, not copied.
    """

    expert_bias: nn.Parameter | None
    router: nn.Parameter | None
    router_prior: Tensor | None
    router_policy: Callable[[Any, Tensor], tuple[Tensor, Tensor] | None] | None

    def __init__(self, layer: SmileLinear):
        super().__init__()
        self.base = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.base.weight = layer.weight
        self.base.register_parameter("bias", layer.bias)
        self.vh, self.s, self.u = layer.vh, layer.s, layer.u
        self.register_parameter("expert_bias", layer.expert_bias)
        self.register_parameter("router", layer.router)
        self.register_buffer("router_prior", layer.router_prior)
        self.num_local_experts, self.rank_of_router = layer.num_local_experts, layer.rank_of_router
        self.num_experts_per_tok, self._own = layer.num_experts_per_tok, layer.own_num_experts_per_tok()
        self.router_policy, self.expert_names = layer.router_policy, layer.expert_names

    def own_num_experts_per_tok(self) -> int:
        """The number given to the layer's constructor, independent of routing policies."""
        return self._own

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> y [..., O]."""
        routing = None if self.router_policy is None else self.router_policy(self, x)
        y = self.base(x)
        # The base's output may be held by a hook and is not changed.
        apart = torch.is_grad_enabled() or bool(self.base._forward_hooks) or not y.is_contiguous()
        return smile_delta(
            y if y.dtype == x.dtype else y.to(x.dtype),
            x,
            self.vh,
            self.s,
            self.u,
            self.expert_bias,
            self.router,
            num_experts_per_tok=self.num_experts_per_tok,
            rank_of_router=self.rank_of_router,
            routing=routing,
            inplace=not apart,
        )


@check_arguments
def split_base(model: nn.Module) -> nn.Module:
    """Replace every SmileLinear of `model` by a SmileBesideLinear, in place; return the model, or the new layer.

    A routing policy of the model stays in effect. Call `set_routing` before: it only finds SmileLinear.

    Raises:
        ValueError: the model contains no SmileLinear. Nothing is changed then.
    """
    warn_if_newer("torchao")
    layers = smile_layers(model)
    if not layers:
        raise SmileError(f"model: {type(model).__name__} contains no SmileLinear; expected a model with SMILE layers")
    with all_or_nothing(model):
        for name, layer in layers.items():
            split = SmileBesideLinear(layer).train(layer.training)
            if not name:
                return split
            model.set_submodule(name, split)
    return model
