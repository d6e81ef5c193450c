"""The fine-tuned versions of a base model: one interface for modules, adapters and checkpoints.

Weights and biases are read layer by layer, so that only a few layers are in memory at a time.
"""

import contextlib
import os
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import FACTORS, config_of_checkpoint, read_config
from ..errors import SmileError, check_integer, reason
from ..integrations.conversion import ModelNames, without_wrappers
from ..integrations.peft import LowRankDelta, ModuleDelta, is_adapter, stored_deltas
from ..nn import why_quantised
from ..publishing import is_utf8
from ..routing import RoutingPolicy, check_kept
from ..storage import StoredTensor, read_tensors
from .layers import Layer, model_of_checkpoint

LowRank = tuple[Tensor, Tensor, float]  # b [O, q], a [q, D], scale: W + scale * b @ a

# Files of a Hub repository that are not fetched to complete a cached snapshot: weights, of which it has what it needs.
_WEIGHTS = (
    *("model*.safetensors", "consolidated*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt"),
    *("original/*", "onnx/*", "openvino/*"),
)
_PROCESSING = ("tokenizer", "vocab", "preprocessor", "processor")


class StoredTensors(Mapping[str, Tensor]):
    """A mapping of stored tensors, each read and checked on access."""

    def __init__(self, stored: Mapping[str, StoredTensor]):
        self.stored = stored

    def __getitem__(self, name: str) -> Tensor:
        return self.stored[name].load()

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


class ExpertSource(ABC):
    """One fine-tuned version of the base; tensors have the names of the base model's parameters.

    Args:
        where: its name in messages.
        may_change: the names of all tensors that may differ from the base's.
        config: its transformers config, or the content of its config.json; None if it has no config.
    """

    def __init__(self, where: str, may_change: Collection[str], config: Any = None):
        self.where, self.may_change, self.config = where, may_change, config

    @abstractmethod
    def weight(self, layer: Layer) -> Tensor | LowRank:
        """The layer's weight as the base stores it, or the factors of its change."""

    @abstractmethod
    def bias(self, layer: Layer) -> Tensor | None:
        """The layer's bias [O]."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor | None:
        """A tensor by name; None if there is none."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor, without reading its data."""

    def changes(self, layer: Layer, base: Mapping[str, Tensor]) -> bool:
        """Whether the layer differs from the base's."""
        weight, bias, plain = self.weight(layer), self.bias(layer), base[layer.weight]
        if not isinstance(weight, Tensor) or not torch.equal(weight.to(plain), plain):
            return True
        before = base.get(layer.bias)
        if bias is None or before is None:
            return bias is not before
        return not torch.equal(bias.to(before), before)


class WholeSource(ExpertSource):
    """A fine-tuned model with all tensors."""

    def __init__(
        self,
        where: str,
        tensors: Mapping[str, Tensor],
        shapes: dict[str, Tensor] | dict[str, StoredTensor],
        config: Any = None,
    ):
        super().__init__(where, shapes.keys(), config)
        self.tensors, self.shapes = tensors, shapes

    def weight(self, layer: Layer) -> Tensor:
        return self.tensors[layer.weight]

    def bias(self, layer: Layer) -> Tensor | None:
        return self.tensors.get(layer.bias)

    def tensor(self, name: str) -> Tensor | None:
        return self.tensors.get(name)

    def shape(self, name: str) -> tuple[int, ...] | None:
        return tuple(self.shapes[name].shape) if name in self.shapes else None

    def check(
        self,
        base: Mapping[str, Tensor] | Mapping[str, StoredTensor],
        layers: Collection[Layer],
        *,
        average: bool,
        cast: bool = False,
    ) -> None:
        """Raise ValueError unless it has the layers' tensors (with `average`, all tensors) with the base's shapes.

        A bias may be missing on either side.
        """
        biases = {layer.bias for layer in layers}
        needed = [name for layer in layers for name in (layer.weight, layer.bias)]
        if average:
            needed += [name for name in base if base[name].dtype.is_floating_point]
        for name in dict.fromkeys(needed):
            if name in biases and (name not in self.shapes or name not in base):
                continue
            if name not in self.shapes:
                raise SmileError(f"{self.where}: has no tensor {name!r}; expected the base's, {list(base[name].shape)}")
            mine, theirs = self.shapes[name], base[name]
            if mine.shape != theirs.shape:
                raise SmileError(
                    f"{self.where}: tensor {name!r} has shape {list(mine.shape)}; expected the base's, "
                    f"{list(theirs.shape)}"
                )
            if mine.dtype != theirs.dtype and (not cast or not mine.dtype.is_floating_point or mine.dtype.itemsize < 2):
                raise SmileError(f"{self.where}: tensor {name!r} is {mine.dtype}; expected the base's {theirs.dtype}")


class ModuleSource(WholeSource):
    """A fine-tuned model in memory, without the wrappers of torch.compile and DistributedDataParallel."""

    def __init__(self, where: str, module: nn.Module, base: Mapping[str, Tensor]):
        check_modules(where, module)
        state = module.state_dict(keep_vars=True)
        spelled = {plain: name for name, plain in without_wrappers("model", base).items()}
        names = {name: spelled.get(plain, plain) for name, plain in without_wrappers(where, state).items()}
        tensors = {names[name]: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
        config = getattr(module, "config", None)
        super().__init__(where, tensors, tensors, config if hasattr(config, "to_dict") else None)
        self.modules = {names.get(f"{name}.weight"): one for name, one in module.named_modules()}

    def check_kinds(self, base: nn.Module, layers: Collection[Layer]) -> None:
        """Raise ValueError unless it has the layers of the base model, with finite numbers."""
        for layer in layers:
            mine, theirs = self.modules.get(layer.weight), base.get_submodule(layer.name)
            if mine is None or not isinstance(mine, type(theirs)):
                kinds = (type(module).__name__ for module in (mine, theirs))
                raise SmileError("{}: {} is a {}; expected a {} as in the base".format(self.where, layer.name, *kinds))
        check_finite(self.where, self.tensors)


class CheckpointSource(WholeSource):
    """A fine-tuned checkpoint on disk."""

    def __init__(self, where: str, folder: str | Path, names: ModelNames):
        self.stored = read_plain(where, folder)
        own = ModelNames(model_of_checkpoint(Path(folder)))
        own.check_complete(f"{where}: {folder}", own.map(self.stored)[0])
        self.by_name, _ = names.map(self.stored)
        if read_config(folder).get("tie_word_embeddings") and names.model is not None:
            _fill_in_head(self.by_name, names.model)
        if own.model is None:  # no config.json, or of an architecture that is not known: then that of the base
            names.check_complete(f"{where}: {folder}", self.by_name, "the base's config")
        config = config_of_checkpoint(folder, names.model)
        super().__init__(f"{where}: {folder}", StoredTensors(self.by_name), self.by_name, config)


class AdapterSource(ExpertSource):
    """Changes of some modules of the base, which has the tensors `base` and the linear layers `layers`."""

    def __init__(
        self, where: str, deltas: Mapping[str, ModuleDelta], base: Mapping[str, Tensor], layers: Mapping[str, Layer]
    ):
        for module, delta in deltas.items():
            if not isinstance(module, str) or not isinstance(delta, ModuleDelta):
                raise SmileError(
                    f"{where}[{module!r}]: is a {type(delta).__name__}; expected the names of modules and their "
                    "ModuleDelta, as adapter_deltas returns them"
                )
        changed = {
            f"{module}.{part}"
            for module, delta in deltas.items()
            for part, change in {"weight": delta.weight, "bias": delta.bias, **delta.whole}.items()
            if change is not None
        }
        super().__init__(where, changed)
        self.deltas, self.base = deltas, base
        self.transposed = {name for name, layer in layers.items() if layer.fan_in_fan_out}

    def check(self, shapes: Mapping[str, Tensor] | Mapping[str, StoredTensor], *, average: bool = False) -> None:
        """Raise ValueError unless every change fits the base and is finite, with `average` also what is saved whole."""
        for name, delta in self.deltas.items():
            for part, tensor in delta.whole.items() if average else ():
                base = shapes.get(f"{name}.{part}")
                if base is not None and base.shape != tensor.shape:
                    raise SmileError(
                        f"{self.where}: tensor '{name}.{part}' has shape {list(tensor.shape)}; expected the base's, "
                        f"{list(base.shape)}"
                    )
            expected = {part: shapes[key].shape for part in ("weight", "bias") if (key := f"{name}.{part}") in shapes}
            if "weight" in expected:
                expected.setdefault(
                    "bias", expected["weight"][-1:] if name in self.transposed else expected["weight"][:1]
                )
            if not (expected or delta.whole) or (delta.weight is not None and "weight" not in expected):
                raise SmileError(f"{self.where}: changes {name}, which the base lacks; expected an adapter of the base")
            _check_dense(f"{self.where}: the change of {name}", delta)
            parts: dict[str, Any] = {"weight": delta.weight, "bias": delta.bias}
            given = {part: tuple(change.shape) for part, change in parts.items() if isinstance(change, Tensor)}
            if isinstance(delta.weight, LowRankDelta):
                b, a = delta.weight.b, delta.weight.a
                parts |= {"weight": None, "lora_B": b, "lora_A": a, "magnitude": delta.weight.magnitude}
                given["weight"] = (a.shape[-1], b.shape[0]) if name in self.transposed else (b.shape[0], a.shape[-1])
            for part, shape in given.items():
                if shape != tuple(expected[part]):
                    of = name if part == "weight" else f"{name}.{part}"
                    raise SmileError(
                        f"{self.where}: the change of {of} has shape {list(shape)}; expected the base's, "
                        f"{list(expected[part])}"
                    )
            parts |= delta.whole
            check_finite(self.where, {f"{name}.{part}": t for part, t in parts.items() if t is not None})
            if isinstance(delta.weight, LowRankDelta):
                sizes = [torch.linalg.vector_norm(part.double()).item() for part in (b, a)]
                largest = abs(delta.weight.scale) * sizes[0] * sizes[1]
                if not largest <= torch.finfo(torch.float32).max:  # also where it is NaN
                    raise SmileError(
                        f"{self.where}: the change of {name} is {largest:.1e}; expected what float32 holds"
                    )

    def weight(self, layer: Layer) -> Tensor | LowRank:
        delta = self.deltas.get(layer.name)
        if delta is not None and isinstance(delta.weight, LowRankDelta) and delta.weight.magnitude is None:
            return delta.weight.b, delta.weight.a, delta.weight.scale
        return self._changed(layer.name, delta)

    def _changed(self, module: str, delta: ModuleDelta | None) -> Tensor:
        weight, fan_in_fan_out = self.base[f"{module}.weight"], module in self.transposed
        if delta is None or delta.weight is None:
            return weight
        change = delta.weight
        if isinstance(change, LowRankDelta):
            change = change.dense(weight.T if fan_in_fan_out else weight)
            change = change.T if fan_in_fan_out else change
        return (weight + change.to(weight.device)).to(weight.dtype)

    def bias(self, layer: Layer) -> Tensor | None:
        bias, delta = self.base.get(layer.bias), self.deltas.get(layer.name)
        if delta is None or delta.bias is None:
            return bias
        return delta.bias if bias is None else (bias + delta.bias.to(bias.device)).to(bias.dtype)

    def tensor(self, name: str) -> Tensor | None:
        module, _, part = name.rpartition(".")
        delta = self.deltas.get(module)
        if delta is not None and part in delta.whole:
            return delta.whole[part]
        if delta is not None and part == "bias" and delta.bias is not None:
            return self.bias(Layer(module))
        if delta is not None and part == "weight" and delta.weight is not None:
            return self._changed(module, delta)
        return self.base.get(name)

    def shape(self, name: str) -> tuple[int, ...] | None:
        module, _, part = name.rpartition(".")
        delta = self.deltas.get(module)
        whole = None if delta is None else delta.whole.get(part)
        one = self.base.get(name) if whole is None else whole
        return None if one is None else tuple(one.shape)


def _check_dense(what: str, delta: ModuleDelta) -> None:
    """Raise ValueError unless a change consists of dense tensors of real numbers, whose factors fit each other."""
    parts = {"weight": delta.weight, "bias": delta.bias, **delta.whole}
    if isinstance(delta.weight, LowRankDelta):
        low = delta.weight
        parts |= {"weight": None, "lora_B": low.b, "lora_A": low.a, "magnitude": low.magnitude}
    for part, tensor in parts.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or not tensor.is_floating_point():
            found = f"{tensor.dtype} of layout {tensor.layout}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise SmileError(f"{what}: {part} is {found}; expected a dense tensor of floating-point numbers")
    if isinstance(delta.weight, LowRankDelta):
        delta.weight.check(what)


def read_plain(where: str, folder: str | Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint of plain weights by name, without the prefixes of wrappers.

    Raises:
        ValueError: the checkpoint is quantised or has SMILE layers.
    """
    if quantized := read_config(folder).get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else quantized
        raise SmileError(f"{where}: {folder} is stored as {method!r}; expected a checkpoint of plain weights")
    stored = read_tensors(folder)
    for name in stored:
        stem, _, part = name.rpartition(".")
        # A router of a mixture may have a weight and an expert_bias of its own.
        if part in FACTORS and (f"{stem}.u" in stored or (part in ("vh", "s", "u") and f"{stem}.weight" in stored)):
            raise SmileError(
                f"{where}: {folder} contains {name!r}, as a SMILE model does; expected a checkpoint of plain weights"
            )
    names = without_wrappers(f"{where}: {folder}", stored)
    return {plain: replace(stored[name], name=plain) for name, plain in names.items()}


def local_folder(argument: str, place: str | Path) -> Path:
    """The folder of a checkpoint: `place` itself, or the snapshot of a Hub repository, "org/name[@revision]".

    The local cache is used first, so that cached repositories work without a network. Other files than weights that a
    cached snapshot lacks are fetched, if there is a network.

    Raises:
        FileNotFoundError: neither a local folder nor a repository that can be downloaded.
    """
    if not str(place).strip() or "\0" in str(place):
        raise SmileError(f"{argument}: is {str(place)!r}; expected a folder, or the id of a Hub repository")
    if not is_utf8(place):
        raise SmileError(f"{argument}: is {str(place)!r}; expected a path in UTF-8")
    hub = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", str(place))
    if os.path.isdir(place):
        return Path(place)
    if os.path.lexists(place):
        raise SmileError(f"{argument}: {place}: is a file; expected the folder of a checkpoint")
    if hub is None:
        raise FileNotFoundError(f"{argument}: {place}: no such folder; expected one, or the id of a Hub repository")
    import huggingface_hub

    options: dict[str, Any] = {"revision": hub[2], "ignore_patterns": ["*.h5", "*.msgpack", "*.onnx", "*.gguf"]}
    try:
        try:
            folder = Path(huggingface_hub.snapshot_download(hub[1], local_files_only=True, **options))
        except huggingface_hub.errors.LocalEntryNotFoundError:
            return Path(huggingface_hub.snapshot_download(hub[1], **options))
    except Exception as error:  # of the network, of the Hub, or of the name
        raise FileNotFoundError(
            f"{argument}: {place}: no such folder, and not found on the Hub ({reason(error)}); expected either"
        ) from None
    options |= {"revision": folder.name, "ignore_patterns": [*options["ignore_patterns"], *_WEIGHTS]}
    with contextlib.suppress(Exception):  # no network
        huggingface_hub.snapshot_download(hub[1], **options)
    if argument == "base" and not any(file.name.startswith(_PROCESSING) for file in folder.iterdir()):
        warnings.warn(
            f"base: {place}: its snapshot in the local cache, {folder}, has no tokenizer and no preprocessor; if the "
            "repository has one, fetch the whole repository",
            stacklevel=2,
        )
    return folder


def _fill_in_head(tensors: dict[str, StoredTensor], model: nn.Module) -> None:
    """Add the head to a checkpoint with a tied head, for a model without that tie."""
    names = {}
    for kind in ("input", "output"):
        try:
            module = getattr(model, f"get_{kind}_embeddings")()
        except (AttributeError, NotImplementedError):  # a model without any
            return
        names[kind] = next((name for name, one in model.named_modules() if one is module and module is not None), None)
    if None not in names.values() and f"{names['input']}.weight" in tensors:
        tensors.setdefault(f"{names['output']}.weight", tensors[f"{names['input']}.weight"])


def open_source(
    where: str,
    folder: str | Path,
    base: Mapping[str, Tensor],
    layers: Mapping[str, Layer],
    names: ModelNames,
) -> CheckpointSource | AdapterSource:
    """The fine-tuned checkpoint or PEFT adapter of `base` in a folder."""
    if is_adapter(folder):
        return AdapterSource(where, stored_deltas(folder, base, names), base, layers)
    return CheckpointSource(where, folder, names)


def check_request(
    argument: str, experts: Sequence[object], num_experts_per_tok: int, remaining: str, routing: RoutingPolicy | None
) -> None:
    """Raise ValueError unless there are experts, enough for each token and for `routing`, and `remaining` is known."""
    if not experts:
        raise SmileError(f"{argument}: is empty; expected one fine-tuned model or more")
    check_integer("num_experts_per_tok", num_experts_per_tok, 1, len(experts), "the number of experts")
    if remaining not in ("base", "average"):
        raise SmileError(f"remaining: is {remaining!r}; expected 'base' or 'average'")
    if routing is not None:
        check_kept(routing, num_experts_per_tok)


def check_modules(where: str, model: nn.Module) -> None:
    """Raise ValueError, naming the module, if one is compiled by torch.jit, quantised, or without shapes yet."""
    check_unquantised(where, model)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise SmileError(f"{where}: {name or 'it'} is a {type(module).__name__}; expected a module of Python code")
        for parameter, p in module._parameters.items():
            if isinstance(p, nn.UninitializedParameter):
                raise SmileError(f"{where}: {name}.{parameter} has no shape yet; expected a model that has run once")


def check_unquantised(where: str, model: nn.Module) -> None:
    """Raise ValueError, naming the layer, if a linear layer of a model is quantised."""
    layers = ((name, one) for name, one in model.named_modules() if isinstance(one, nn.Linear))
    found = next((f"{name or 'it'}: {how}" for name, one in layers if (how := why_quantised(one))), None)
    if found is None and any(getattr(module, "is_quantized", False) is True for module in model.modules()):
        found = f"is a {type(model).__name__} that transformers loaded quantised"
    if found is not None:
        raise SmileError(
            f"{where}: {found}; expected plain weights (upscale_checkpoints takes LoRA adapters and a base that is "
            "stored quantised)"
        )


def check_finite(where: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming the tensor, if one contains NaN or inf, or no data."""
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise SmileError(f"{where}: {name} is on the meta device, as offloaded parameters are; expected its data")
        if type(tensor) not in (Tensor, nn.Parameter):
            continue  # a quantised tensor
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        # The least and the largest entry are NaN where any is; PyTorch compares no numbers of eight bits.
        comparable = tensor if tensor.dtype.itemsize > 1 else tensor.float()
        if not torch.stack(torch.aminmax(comparable)).isfinite().all():
            raise SmileError(f"{where}: {name} contains NaN or inf; expected finite numbers")
