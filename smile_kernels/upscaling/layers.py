"""Which layers of a model are upscaled: the linear layers, by their names."""

import fnmatch
from collections.abc import Iterable, Sequence

from torch import nn

from .report import LayerReport


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every nn.Linear, and transformers' Conv1D, by its first name in the model.

    Left out are those whose weight is not floating point, or is computed (weight norm, parametrizations).
    """
    return {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or is_conv1d(module))
        and isinstance(module.weight, nn.Parameter)
        and module.weight.is_floating_point()
    }


def fused_experts(model: nn.Module) -> list[LayerReport]:
    """The tensors [experts, ..., ...] that hold all experts of a mixture, reported as left alone."""
    return [
        LayerReport(name, 0, [], [], 0.0, "fused experts of a mixture, left alone")
        for name, p in model.named_parameters()
        if p.dim() == 3 and "expert" in name
    ]


def select_layers(names: Iterable[str], include: Sequence[str] | None, exclude: Sequence[str] | None) -> list[str]:
    """The names that match a pattern of `include` (all, where there is none) and none of `exclude`, in their order.

    A pattern is a shell's: `*.q_proj`, `model.layers.[0-3].*`.
    """
    return [
        name
        for name in names
        if (not include or any(fnmatch.fnmatchcase(name, pattern) for pattern in include))
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude or ())
    ]


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D: a linear layer whose weight is stored [in_features, out_features]."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"
