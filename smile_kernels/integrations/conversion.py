"""Maps the tensors of a checkpoint to the parameters of its model, as transformers' `from_pretrained` does.

A checkpoint may have other names than the model, one tensor for several parameters (a fused query, key and value),
several tensors for one parameter (the experts of a mixture), and no tensor for a tied parameter. `ModelNames` is the
mapping of one model; base, experts and adapters are all read through it.
"""

import copy
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import FACTORS
from ..errors import SmileError
from ..storage import StoredTensor

__all__ = ["ModelNames", "without_wrappers"]


def without_wrappers(where: str, names: Iterable[str]) -> dict[str, str]:
    """Names without the prefixes of torch.compile ("_orig_mod.") and DistributedDataParallel ("module.").

    Raises:
        ValueError: two names that differ only in a prefix; the message begins with `where`.
    """
    plain = {name: name.replace("_orig_mod.", "") for name in names}
    while plain and all(name.startswith("module.") for name in plain.values()):
        plain = {name: short.removeprefix("module.") for name, short in plain.items()}
    first: dict[str, str] = {}
    for name, short in plain.items():
        if short in first:
            raise SmileError(f"{where}: tensors {first[short]!r} and {name!r} are both {short!r}; expected one of them")
        first[short] = name
    return plain


class ModelNames:
    """The mapping from the tensors of a checkpoint to the parameters of `model`.

    Args:
        model: on any device, including meta; None for an unknown architecture: names do not change.
    """

    def __init__(self, model: nn.Module | None):
        self.model: Any = model
        self.state: dict[str, Any] = {} if model is None else dict(model.state_dict(keep_vars=True))
        self._names_of: dict[int, list[str]] = {}
        for name, tensor in self.state.items():
            self._names_of.setdefault(id(tensor), []).append(name)
        # The tensors that SMILE adds to a weight follow the weight.
        stems = [name.removesuffix(".weight") for name in self.state if name.endswith(".weight")]
        self._known = {**self.state, **{f"{stem}.{factor}": True for stem in stems for factor in FACTORS}}

    def aliases(self, name: str) -> list[str]:
        """The names of one parameter: several if it is tied."""
        return self._names_of[id(self.state[name])] if name in self.state else [name]

    def parameter(self, stored: str) -> str | None:
        """The parameter that a tensor of this name is loaded into; None if it is split, fused or unknown."""
        name, converter = self._rename(stored, *self._transforms)
        return name if converter is None and name in self._known else None

    def stored_name(self, layer: str, origins: Mapping[str, Sequence[str]]) -> str | None:
        """The prefix of a layer's tensors in a checkpoint; None if its experts have no name there.

        It is that of the weight, or the layer's own if the weight is tied or part of a larger tensor.
        """
        keys = origins.get(f"{layer}.weight", ())
        stems = [keys[0].removesuffix(".weight")] if len(keys) == 1 and keys[0].endswith(".weight") else []
        return next(
            (
                stem
                for stem in (*stems, layer)
                if all(self.parameter(f"{stem}.{part}") == f"{layer}.{part}" for part in ("weight", *FACTORS))
            ),
            None,
        )

    def map(self, stored: Mapping[str, StoredTensor]) -> tuple[dict[str, StoredTensor], dict[str, tuple[str, ...]]]:
        """A checkpoint's tensors by the model's names; nothing is read.

        Returns:
            Parameter name -> the tensor, which is converted when it is read; and, for parameters that are not tied to
            another, parameter name -> names of its tensors in the checkpoint. Tensors unknown to the model keep their
            names.
        """
        tensors: dict[str, StoredTensor] = {}
        origins: dict[str, tuple[str, ...]] = {}
        groups: dict[str, tuple[Any, dict[str, list[str]]]] = {}
        transforms = self._new_transforms()
        by_pattern = {pattern: one for one in transforms[1] for pattern in one.source_patterns}
        for key in self._in_order(stored):
            name, pattern = self._rename(key, *transforms)
            name = name if pattern is None or name in self.state else key  # of a block that the model lacks
            if pattern is not None and name in self.state:
                groups.setdefault(name, (by_pattern[pattern], {}))[1].setdefault(pattern, []).append(key)
            elif name in tensors and not torch.equal(tensors[name].load(), stored[key].load()):
                raise SmileError(
                    f"{stored[key].file}: tensors {origins[name][0]!r} and {key!r} are both {name!r} in "
                    f"{type(self.model).__name__}; expected one of them"
                )
            else:
                tensors[name], origins[name] = replace(stored[key], name=name), (key,)
        for first, (converter, sources) in groups.items():
            for name, tensor in self._converted(first, converter, sources, stored).items():
                tensors[name], origins[name] = tensor, tuple(key for keys in sources.values() for key in keys)
        for name in self.state:
            if name not in tensors and (alias := next((a for a in self.aliases(name) if a in tensors), None)):
                tensors[name] = tensors[alias]
        return tensors, origins

    def check_complete(
        self, folder: str | Path, tensors: Mapping[str, StoredTensor], described_by: str | None = None
    ) -> None:
        """Raise ValueError unless `tensors`, by the model's names, are those of the model in `folder`.

        `described_by`: the name of the model's config where it is not the folder's; shapes may then differ.

        A parameter or buffer may be missing if from_pretrained initialises it without a warning. Additional tensors
        are allowed, unless they belong to a block beyond the number in config.json.
        """
        if self.model is None:
            return
        config = described_by or Path(folder) / "config.json"
        optional = getattr(self.model, "_keys_to_ignore_on_load_missing", None) or ()
        for name, tensor in self.state.items():
            stem, _, part = name.rpartition(".")
            if part in FACTORS and f"{stem}.weight" in self.state:
                continue
            counts = not isinstance(tensor, nn.Parameter) and not tensor.is_floating_point()  # such as batches seen
            known = counts or any(alias in tensors for alias in self.aliases(name))
            if not known and not any(re.search(pattern, name) for pattern in optional):
                raise SmileError(f"{folder}: tensor {name!r} is missing; expected all of {type(self.model).__name__}")
        kinds = {re.sub(r"\d+", "#", name) for name in self.state}
        modules = self.model.named_modules()
        without = tuple(f"{name}." for name, module in modules if isinstance(module, nn.ModuleList) and not len(module))
        for name, tensor in tensors.items():
            stem, _, part = name.rpartition(".")
            if part == "bias" and name not in self.state and f"{stem}.weight" in self.state:
                raise SmileError(
                    f"{tensor.file}: has a tensor {name!r}, and that layer of {type(self.model).__name__} has no bias; "
                    f"expected the parameters of the model that {config} describes"
                )
            other = name in self.state and tuple(tensor.shape) != tuple(self.state[name].shape)
            if other and described_by is None:
                raise SmileError(
                    f"{tensor.file}: tensor {name!r} has shape {list(tensor.shape)}; expected "
                    f"{list(self.state[name].shape)}, as {config} describes it"
                )
            if name not in self.state and (re.sub(r"\d+", "#", name) in kinds or name.startswith(without)):
                raise SmileError(
                    f"{tensor.file}: tensor {name!r} belongs to no block of the {type(self.model).__name__} that "
                    f"{config} describes; expected the config of these weights"
                )

    def _in_order(self, stored: Iterable[str]) -> list[str]:
        """The order of from_pretrained: entries of a mixture by number."""
        if not any(self._transforms):
            return list(stored)
        from transformers.core_model_loading import dot_natural_key

        return sorted(stored, key=dot_natural_key)

    def _converted(
        self, first: str, converter: Any, sources: dict[str, list[str]], stored: Mapping[str, StoredTensor]
    ) -> dict[str, StoredTensor]:
        """The parameters that a group of tensors is converted into."""

        def convert(load: Callable[[str], Tensor]) -> dict[str, Tensor]:
            ours = copy.deepcopy(converter)
            for pattern, keys in sources.items():
                for key in keys:
                    ours.add_tensor(first, key, pattern, functools.partial(load, key))
            made = ours.convert(first, model=self.model, config=self.model.config)  # type: ignore[union-attr]
            return {name: one[0] if isinstance(one, list) else one for name, one in made.items()}

        def read(name: str) -> Tensor:
            return convert(lambda key: stored[key].load())[name].clone()

        keys = [key for some in sources.values() for key in some]
        try:
            shapes = convert(lambda key: torch.empty(stored[key].shape, dtype=stored[key].dtype, device="meta"))
        except Exception:  # tensors that transformers cannot convert stay as stored
            return {key: stored[key] for key in keys}
        return {
            name: StoredTensor(name, one.dtype, tuple(one.shape), functools.partial(read, name), stored[keys[0]].file)
            for name, one in shapes.items()
        }

    @functools.cached_property
    def _transforms(self) -> tuple[list[Any], list[Any]]:
        return self._new_transforms()

    def _new_transforms(self) -> tuple[list[Any], list[Any]]:
        """Renamings and converters; new for each checkpoint, since some have state."""
        if self.model is None or not hasattr(self.model, "base_model_prefix"):
            return [], []
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        transforms = get_model_conversion_mapping(self.model)
        return (
            [one for one in transforms if isinstance(one, WeightRenaming)],
            [one for one in transforms if isinstance(one, WeightConverter)],
        )

    def _rename(self, key: str, renamings: list[Any], converters: list[Any]) -> tuple[str, str | None]:
        """The name in the model and the pattern of the converter that applies, as in from_pretrained."""
        if self.model is None or not hasattr(self.model, "base_model_prefix"):
            return key, None
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        name, pattern = rename_source_key(key, renamings, converters, prefix, self._known)
        if name not in self._known and key in self._known:
            name, pattern = rename_source_key(key, [], [], prefix, self._known)
        return name, pattern
