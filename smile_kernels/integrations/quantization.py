"""A quantised shared weight: SMILE experts beside any linear module.

    model = split_base(model)
    torchao.quantization.quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda m, name: name.endswith(".base"))

Whatever turns `nn.Linear` into something smaller (torchao, bitsandbytes) then does so to the shared weights alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SmileError
from ..functional import smile_delta
from ..nn import KeepsSingularValues, SmileLinear, all_or_nothing, smile_layers
from ..versions import warn_if_newer

__all__ = ["SmileBesideLinear", "split_base"]


class SmileBesideLinear(KeepsSingularValues):
    """The experts of a SmileLinear beside `base`, the linear module of its shared weight.

        y = base(x) + sum over the m selected i of w_i (U_i (s_i * V_i[:, :r]^T x) + expert_bias_i)

    Parameters are the layer's own, in its dtype; shapes as in `SmileLinear`. It is routed as the layer was, by the
    routing policy of its model where that has one.

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
        """The number that the layer was made with, whatever a routing policy has set."""
        return self._own

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> y [..., O]."""
        routing = None if self.router_policy is None else self.router_policy(self, x)
        y = self.base(x)
        # What a hook has seen of the base's output stays as it was.
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


def split_base(model: nn.Module) -> nn.Module:
    """Swaps every SmileLinear of `model` for a SmileBesideLinear, in place; returns the model, or the swapped layer.

    A routing policy of the model goes on. `set_routing` comes before this: it finds SmileLinear alone.

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
