"""A quantised shared weight: SMILE experts beside any linear module.

    model = split_base(model)
    torchao.quantization.quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda m, name: name.endswith(".base"))

Whatever turns `nn.Linear` into something smaller (torchao, bitsandbytes) then does so to the shared weights alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import SmileError
from ..functional import router_scores, select_experts
from ..nn import SmileLinear, smile_layers
from ..versions import warn_if_newer

__all__ = ["SmileBesideLinear", "split_base"]


class SmileBesideLinear(nn.Module):
    """The experts of a SmileLinear beside `base`, the linear module of its shared weight.

        y = base(x) + sum over the m selected i of w_i (U_i (s_i * V_i[:, :r]^T x) + expert_bias_i)

    The expert half is two products over all N experts, with those not selected set to zero in between: as quick as
    one dense layer of width N r. Parameters are the layer's own, in its dtype; shapes as in `SmileLinear`.

    Args:
        layer: the layer; its tensors are shared, not copied.
    """

    expert_bias: nn.Parameter | None
    router: nn.Parameter | None

    def __init__(self, layer: SmileLinear):
        super().__init__()
        self.base = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.base.weight = layer.weight
        self.base.register_parameter("bias", layer.bias)
        self.vh, self.s, self.u = layer.vh, layer.s, layer.u
        self.register_parameter("expert_bias", layer.expert_bias)
        self.register_parameter("router", layer.router)
        self.rank_of_router, self.num_experts_per_tok = layer.rank_of_router, layer.num_experts_per_tok

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> y [..., O]."""
        n, r = self.s.shape
        rows = self.vh if self.router is None else self.router
        scores = router_scores(x, rows, rank_of_router=self.rank_of_router)
        weights, ids = select_experts(scores, self.num_experts_per_tok)
        routing = torch.zeros_like(scores).scatter(-1, ids.long(), weights)
        h = F.linear(x, self.vh[:, :r].flatten(0, 1)).unflatten(-1, (n, r))
        z = (h * self.s * routing[..., None]).to(x.dtype)
        y = self.base(x) + F.linear(z.flatten(-2), self.u.transpose(0, 1).flatten(1))
        return y if self.expert_bias is None else y + routing.to(x.dtype) @ self.expert_bias


def split_base(model: nn.Module) -> nn.Module:
    """Swaps every SmileLinear of `model` for a SmileBesideLinear, in place; returns the model, or the swapped layer.

    Raises:
        ValueError: the model holds no SmileLinear, or one that follows a routing policy, which a SmileBesideLinear
            cannot. Nothing is changed then.
    """
    warn_if_newer("torchao")
    layers = smile_layers(model)
    if not layers:
        raise SmileError(f"model: {type(model).__name__} holds no SmileLinear; expected a model with SMILE layers")
    for name, layer in layers.items():
        if layer.router_policy is not None:
            raise SmileError(
                f"model: {name or 'it'} follows a routing policy, which a split layer cannot; expected published "
                "routing (set_routing(model, RoutingPolicy()))"
            )
    for name, layer in layers.items():
        split = SmileBesideLinear(layer).train(layer.training)
        if not name:
            return split
        model.set_submodule(name, split)
    return model
