"""Selects the layers to upscale: linear layers by name, in a module or in a checkpoint."""

import fnmatch
import re
import threading
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..config import read_config
from ..errors import SmileError, reason
from ..integrations.conversion import ModelNames
from ..nn import is_conv1d, why_not_linear
from ..storage import StoredTensor, read_tensors
from ..svd import check_ranks
from .reads import weight_readers
from .report import LayerReport

# Without the architecture, a matrix with such a name is treated as a lookup table.
_LOOKED_UP = re.compile(r".*embed[^.]*|(.*\.)?([^.]*_emb|emb|emb_[^.]*|embs?|wte|wpe|shared|relative_attention_bias)")
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


@dataclass(frozen=True)
class Layer:
    """A linear layer of the base.

    Args:
        name: name of the layer in the model.
        fan_in_fan_out: whether its weight is stored as [in_features, out_features], as transformers' Conv1D does.
        stored: prefix of its tensors in a checkpoint.
        unfit: why it cannot have experts, or None.
    """

    name: str
    fan_in_fan_out: bool = False
    stored: str = ""
    unfit: str | None = None

    @property
    def weight(self) -> str:
        """Name of its weight."""
        return f"{self.name}.weight"

    @property
    def bias(self) -> str:
        """Name of its bias, if it has one."""
        return f"{self.name}.bias"


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every nn.Linear and transformers' Conv1D, by its first name in the model.

    Layers with a weight that is not floating point or is computed (weight norm, parametrizations) are not included.
    """
    return {
        name: cast(nn.Linear, module)  # Conv1D has the same attributes
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or is_conv1d(module))
        and isinstance(getattr(module, "weight", None), nn.Parameter)
        and module.weight.is_floating_point()
    }


def embedding_weights(model: nn.Module) -> set[str]:
    """Names of weights used as lookup tables: those of embeddings, including tied ones."""
    linear = linear_layers(model).values()
    layers, weights = {id(layer) for layer in linear}, {id(layer.weight) for layer in linear}
    return {
        f"{name}.{parameter}".removeprefix(".")
        for name, module in model.named_modules(remove_duplicate=False)
        if id(module) not in layers
        for parameter, p in module._parameters.items()
        if p is not None and (id(p) in weights or (isinstance(module, nn.Embedding) and parameter == "weight"))
    }


def layers_of_model(model: nn.Module) -> dict[str, Layer]:
    """The linear layers of a model by name, with the reason if one cannot have experts.

    Layers cannot have experts if their forward is not W x + b, or if other code reads their weight.
    """
    linears = linear_layers(model)
    readers = weight_readers(model, linears)
    layers = {}
    for name, module in linears.items():
        unfit = why_not_linear(module)
        if type(module.weight.data) is not Tensor:
            unfit = f"its weight is a {type(module.weight.data).__name__}"
        elif unfit is None and name in readers:
            unfit = f"its weight is read by {readers[name]}, outside its own forward"
        layers[name] = Layer(name, is_conv1d(module), name, unfit)
    return layers


def layers_of_checkpoint(
    folder: Path, tensors: Mapping[str, StoredTensor], origins: Mapping[str, Sequence[str]], names: ModelNames
) -> dict[str, Layer]:
    """The linear layers of a checkpoint, by name in the model.

    If the architecture is known, the result is that of `layers_of_model`. Otherwise each two-dimensional
    `<layer>.weight` is a linear layer, unless its name is that of a lookup table.

    Args:
        folder: the checkpoint, for messages.
        tensors, origins, names: the result of `ModelNames.map`, with tied tensors filled in.
    """
    if names.model is not None:
        layers = {}
        for name, layer in layers_of_model(names.model).items():
            if layer.weight in tensors:
                stored = names.stored_name(name, origins)
                unfit = layer.unfit or (None if stored else "transformers has no name for its experts in a checkpoint")
                layers[name] = replace(layer, stored=stored or name, unfit=unfit)
        return layers
    model_type = read_config(folder).get("model_type")
    if model_type in CONV1D_MODELS:
        raise SmileError(
            f"base: {folder} is a {model_type}, which stores layers transposed; expected transformers to be installed"
        )
    plain = [
        name.removesuffix(".weight") for name, t in tensors.items() if name.endswith(".weight") and len(t.shape) == 2
    ]
    plain.sort(key=lambda name: [part.rjust(9, "0") if part.isdigit() else part for part in name.split(".")])
    return {name: Layer(name, stored=name) for name in plain if not _LOOKED_UP.fullmatch(name)}


def model_of_checkpoint(folder: Path) -> nn.Module | None:
    """The model of config.json on the meta device; None if transformers is missing or does not support it."""
    architectures = read_config(folder).get("architectures")
    if not architectures:
        return None
    try:
        import transformers
    except ImportError:
        return None
    cls: Any = getattr(transformers, architectures[0], None)
    known = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    if not known:
        return None
    # Few modules have no tensors; a config that has layers by the million is found before all of them are built.
    limit = 10_000 + 20 * len(read_tensors(folder))
    try:
        with torch.device("meta"), _limited_modules(limit):
            model = cls(cls.config_class.from_pretrained(folder))
        model.tie_weights()
    except Exception as error:  # an architecture may raise anything on a config that does not fit
        raise SmileError(
            f"{folder / 'config.json'}: transformers cannot build a {architectures[0]} from it "
            f"({reason(error)}); expected the config of the weights in that folder"
        ) from error
    dtype = getattr(model.config, "dtype", None)
    if not (isinstance(dtype, (dict, type(None))) or getattr(dtype, "is_floating_point", False)):
        raise SmileError(
            f"{folder / 'config.json'}: dtype is {dtype!r}, with which transformers loads no model; expected a "
            "floating-point dtype"
        )
    return model


@contextmanager
def _limited_modules(limit: int) -> Iterator[None]:
    """Stop a config that requests a billion layers before they are built."""
    count, here = 0, threading.get_ident()

    def made(*_: object) -> None:
        nonlocal count
        count += threading.get_ident() == here  # other threads may build other models
        if count > limit:
            raise SmileError(f"it has more than {limit:,} modules, too many for the tensors")

    handle = register_module_module_registration_hook(made)
    try:
        yield
    finally:
        handle.remove()


def select_layers(
    layers: Mapping[str, Layer], include: Sequence[str] | None, exclude: Sequence[str] | None
) -> dict[str, Layer]:
    """The layers that match a pattern of `include` (default: all) and none of `exclude`, in order.

    Patterns are shell patterns: `*.q_proj`, `model.layers.[0-3].*`. One that matches no layer gives a warning.

    Raises:
        ValueError: no layer is left.
    """
    chosen = {
        name: layer
        for name, layer in layers.items()
        if (include is None or any(fnmatch.fnmatchcase(name, pattern) for pattern in include))
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude or ())
    }
    if not layers:
        raise SmileError(
            "base: has no linear layer that can have experts; expected an nn.Linear, or transformers' Conv1D, whose "
            "weight is a parameter of its own, neither computed nor pruned"
        )
    if not chosen:
        included = "all" if include is None else include
        raise SmileError(
            f"include, exclude: {included} without {exclude or []} leaves none of the {len(layers)} linear layers; "
            "expected patterns such as '*.q_proj'"
        )
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns or ():
            if not fnmatch.filter(layers, pattern):
                warnings.warn(f"{argument}: {pattern!r} matches none of the {len(layers)} linear layers", stacklevel=2)
    return chosen


def check_layers(
    layers: Collection[Layer],
    base: Mapping[str, Tensor] | Mapping[str, StoredTensor],
    rank_of_expert: int | float,
    rank_of_router: int,
) -> None:
    """Raise ValueError, naming the layer, unless its dtype is supported and both ranks fit its shape."""
    for layer in layers:
        if layer.unfit:
            continue
        dtype = base[layer.weight].dtype
        if not dtype.is_floating_point or dtype.itemsize < 2:  # meaningless without a scale
            raise SmileError(
                f"base: tensor {layer.weight!r} is {dtype}; expected float16, bfloat16, float32 or float64 "
                f"(exclude=[{layer.name!r}] skips the layer)"
            )
        try:
            check_ranks(rank_of_expert, rank_of_router, base[layer.weight].shape)
        except ValueError as error:
            raise SmileError(f"{layer.name}: {error}") from None


def fused_experts(model: nn.Module) -> list[LayerReport]:
    """Tensors [experts, ..., ...] with all experts of a mixture, which are reported as skipped."""
    return [
        LayerReport(name, 0, [], [], 0.0, "fused experts of a mixture, skipped")
        for name, p in model.named_parameters()
        if p.dim() == 3 and "expert" in name
    ]
