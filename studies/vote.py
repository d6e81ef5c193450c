"""MASS's rule in SMILE layers (arXiv 2504.05342): the base processes a text, and all layers use the choice of one.

At that layer r_i^2 is the mean over the text's tokens of ||x - V_i V_i^T x||^2, V_i being expert i's right singular
vectors, and w = softmax(-r). The experts with w_i above a threshold, at most `most` and at least the best one, are
weighted by w over their sum in every layer of a second pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from smile_kernels import SmileLinear, functional, routing_override
from smile_kernels.nn import smile_layers


@torch.no_grad()
def residuals(model: nn.Module, attention_mask: Tensor, *args: object, **kwargs: object) -> dict[str, Tensor]:
    """r [B, N] at each SMILE layer, when the base processes the texts, model(*args, attention_mask=..., **kwargs)."""
    found: dict[str, Tensor] = {}

    def read(name: str) -> Callable[[SmileLinear, tuple], None]:
        def hook(layer: SmileLinear, given: tuple) -> None:
            (x,) = given
            inside = functional.router_scores(x, layer.vh, rank_of_router=layer.vh.shape[1]).square()
            outside = (x.square().sum(-1, keepdim=True) - inside).clamp_min(0) * attention_mask[..., None]
            found[name] = (outside.sum(1) / attention_mask.sum(1, keepdim=True)).sqrt()

        return hook

    handles = [layer.register_forward_pre_hook(read(name)) for name, layer in smile_layers(model).items()]
    with routing_override(model, {}):
        model(*args, attention_mask=attention_mask, **kwargs)
    for handle in handles:
        handle.remove()
    return found


def weights(r: Tensor, threshold: float = 0.2, most: int = 3) -> list[Tensor]:
    """For each text of r [B, N], the weights [N] of the experts."""
    w = (-r).softmax(-1)
    best, ids = w.topk(min(most, w.shape[-1]))
    kept = best * ((best > threshold) | (best == best[:, :1]))
    return list(torch.zeros_like(w).scatter(-1, ids, kept / kept.sum(-1, keepdim=True)))


def best_layer(found: Iterable[tuple[int, dict[str, Tensor]]]) -> str:
    """The layer that selects the own expert of most texts: (their task, `residuals` of some of its texts)."""
    right: dict[str, int] = {}
    for task, of_layers in found:
        for name, r in of_layers.items():
            right[name] = right.get(name, 0) + int((r.argmin(-1) == task).sum())
    return max(right, key=right.__getitem__)
