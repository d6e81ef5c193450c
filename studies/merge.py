"""Merging fine-tuned copies of a module into one plain module: the methods SMILE is compared with.

All of them work on the task vectors tau_i = theta_i - theta of the parameters, theta being the base.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def task_vectors(base: nn.Module, finetuned: Sequence[nn.Module]) -> dict[str, Tensor]:
    """tau [N, ...] of every parameter in which any fine-tuned module differs from the base."""
    vectors = {}
    for name, theta in base.named_parameters():
        tau = torch.stack([module.get_parameter(name).detach() for module in finetuned]) - theta.detach()
        if tau.any():
            vectors[name] = tau
    return vectors


def add_to(base: nn.Module, change: dict[str, Tensor]) -> nn.Module:
    """A copy of `base` with theta + change[name] for every parameter named."""
    merged = copy.deepcopy(base)
    with torch.no_grad():
        for name, delta in change.items():
            merged.get_parameter(name).add_(delta)
    return merged


def task_arithmetic(vectors: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """scale * sum_i tau_i; scale = 1/N is simple averaging. Source: arXiv 2212.04089."""
    return {name: scale * tau.sum(0) for name, tau in vectors.items()}


def ties(vectors: dict[str, Tensor], density: float, scale: float) -> dict[str, Tensor]:
    """TIES-merging: trim, elect signs, average what agrees. Source: arXiv 2306.01708.

    Each tau_i keeps the `density` of its entries that are largest in magnitude, counted over all its parameters
    together. An entry's sign is that of the sum over i; the change is scale times the mean of entries of that sign.
    """
    keep = max(1, round(density * sum(tau[0].numel() for tau in vectors.values())))
    thresholds = []
    for i in range(len(next(iter(vectors.values())))):
        size = torch.cat([tau[i].flatten().abs() for tau in vectors.values()])  # of one model at a time: this is large
        thresholds.append(size.kthvalue(len(size) - keep + 1).values)
    change = {}
    for name, tau in vectors.items():
        kept = tau.where(tau.abs() >= torch.stack(thresholds).view(-1, *[1] * (tau.dim() - 1)), 0.0)
        agrees = kept.sign() == kept.sum(0).sign()
        change[name] = scale * (kept * agrees).sum(0) / (agrees & (kept != 0)).sum(0).clamp(min=1)
    return change
