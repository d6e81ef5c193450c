"""Reads PEFT's LoRA adapters from disk as experts; PEFT itself is not needed.

An adapter directory contains `adapter_config.json` and `adapter_model.safetensors` with, for each adapted module,

    base_model.model.<module>.lora_A.weight [q, D]      base_model.model.<module>.lora_B.weight [O, q]

and represents W + scale * B A with scale = alpha / q, or alpha / sqrt(q) if `use_rslora` is set.
"""

import fnmatch
import functools
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import regex
import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from ..errors import SmileError
from ..nn import is_conv1d, why_quantised
from ..schema import check_arguments, parse
from ..storage import StoredTensor, read_json, read_pickled, read_safetensors
from ..svd import without_autocast
from .conversion import ModelNames

__all__ = ["LowRankDelta", "ModuleDelta", "adapter_deltas", "is_adapter"]

_CONFIG = "adapter_config.json"

# Initialisations that change the base weights: the adapter then belongs to another base than the given one.
_CHANGE_THE_BASE = ("pissa*", "olora", "corda", "loftq", "lora_ga")

# Keys of variants whose adapted layer is not W + scale * B A. New ones are called use_... and ..._config; of these
# the second list leaves it that.
_NOT_LORA = ("alora_invocation_tokens", "layer_replication", "target_parameters")
_STILL_LORA = (
    "corda_config", "eva_config", "loftq_config", "lora_ga_config", "megatron_config", "runtime_config", "use_dora",
    "use_rslora", "velora_config",
)  # fmt: skip

_Positive = Annotated[float, Gt(0), Lt(1e9)]
_Index = Annotated[int, Ge(0)]


@dataclass(frozen=True)
class _Config:
    """The keys of adapter_config.json that determine a change."""

    lora_alpha: _Positive
    r: _Positive | None = None
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    alpha_pattern: dict[str, _Positive] | None = None
    rank_pattern: dict[str, _Positive] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    init_lora_weights: bool | str | None = True
    trainable_token_indices: list[_Index] | dict[str, list[_Index]] | None = None
    ensure_weight_tying: bool = False


@dataclass(frozen=True)
class LowRankDelta:
    """The change scale * b @ a of a weight W [O, D]: b [O, q], a [q, D].

    With DoRA's `magnitude` m [O] the weight is m * V / ||V|| row by row, V = W + scale * b @ a.
    """

    b: Tensor
    a: Tensor
    scale: float
    magnitude: Tensor | None = None

    def check(self, what: str) -> None:
        """Raise ValueError, whose message begins with `what`, unless the factors and the magnitude fit each other."""
        b, a = list(self.b.shape), list(self.a.shape)
        if len(b) != 2 or len(a) != 2 or b[1] != a[0]:
            raise SmileError(f"{what}: lora_B {b} does not fit lora_A {a}; expected [O, r] and [r, D]")
        if self.magnitude is not None and self.magnitude.numel() != b[0]:
            raise SmileError(f"{what}: magnitude has {self.magnitude.numel()} numbers; expected {b[0]}")

    @without_autocast
    def dense(self, weight: Tensor) -> Tensor:
        """The change of `weight` [O, D] in float32 (float64 where a factor or the weight is)."""
        change = self.scale * (wide(self.b) @ wide(self.a))
        if self.magnitude is None:
            return change
        before = wide(weight)
        v = before + change
        return wide(self.magnitude).view(-1, 1) * v / torch.linalg.vector_norm(v, dim=1, keepdim=True) - before


@dataclass(frozen=True)
class ModuleDelta:
    """The change of one module by an adapter.

    Attributes:
        weight: the change of the weight, as factors or dense; None for no change. Factors are those of a weight
            [O, D]; a dense change has the orientation of the base's tensor.
        bias: the change of the bias [O]; None for no change. The base may have no bias.
        whole: tensors by name that are not changes of base tensors, because the base has none or one of another shape.
    """

    weight: LowRankDelta | Tensor | None = None
    bias: Tensor | None = None
    whole: Mapping[str, Tensor] = field(default_factory=dict)


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or float64 where it is: differences are taken there."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@check_arguments
def is_adapter(directory: str | Path) -> bool:
    """Whether `directory` contains a PEFT adapter."""
    return (Path(directory) / _CONFIG).exists()


@check_arguments
@torch.no_grad()
@without_autocast
def adapter_deltas(
    directory: str | Path, base: Mapping[str, Tensor] | nn.Module, names: ModelNames | None = None
) -> dict[str, ModuleDelta]:
    """The changes of a LoRA adapter in each module of its base.

    Rank and alpha patterns, rsLoRA, biases, transformers' Conv1D and modules that are saved whole (`modules_to_save`)
    are exact. DoRA rescales whole rows, which is not low rank and gives a warning. Changes of modules that are not
    linear layers, such as norms and embeddings, are part of the result; `upscale` reports what happens to them.

    Args:
        directory: directory of the adapter.
        base: the base model, or its tensors by name, `<module>.weight` and `<module>.bias`. Only biases and modules
            saved whole are read, to compute their changes.
        names: the mapping from the adapter's names to those of the base, if `base` is not a module.

    Returns:
        Module name -> its change, for the modules the adapter changes.

    Raises:
        FileNotFoundError: `directory` contains no adapter.
        ValueError: an adapter that is not LoRA, that changed its base, or that does not fit `base`.
    """
    return dict(stored_deltas(directory, base, names))


class StoredDeltas(Mapping[str, ModuleDelta]):
    """The changes of an adapter by module of the base, each read when it is asked for; a few are kept.

    Args:
        places: module of the base -> module of the adapter.
        read: returns the change by a module of the adapter.
    """

    def __init__(self, places: Mapping[str, str], read: Callable[[str], ModuleDelta]):
        self.places, self.read = places, functools.lru_cache(maxsize=4)(read)  # one for each thread

    def __getitem__(self, module: str) -> ModuleDelta:
        return self.read(self.places[module])

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


@torch.no_grad()
@without_autocast
def stored_deltas(
    directory: str | Path, base: Mapping[str, Tensor] | nn.Module, names: ModelNames | None = None
) -> StoredDeltas:
    """`adapter_deltas`, read from disk at every access; the base may not change meanwhile."""
    directory = Path(directory)
    if not isinstance(base, nn.Module) and (odd := next((name for name in base if not isinstance(name, str)), None)):
        raise SmileError(f"base: has {odd!r}; expected tensors by name")
    config = _config(directory)
    names = names or ModelNames(base if isinstance(base, nn.Module) else None)
    if isinstance(base, nn.Module):
        base = base.state_dict(keep_vars=True)
    modules = _by_module(directory, _tensors(directory))
    if not modules:
        raise SmileError(f"{directory}: contains no tensors; expected the factors of a LoRA adapter")
    located = _in_base(directory, modules, base, names)
    places: dict[str, str] = {}
    for module in modules:
        if located[module] in places:
            raise SmileError(f"{directory}: changes {located[module]!r} twice; expected one change of a module")
        places[located[module]] = module
    for module in [located[module] for module, tensors in modules.items() if "trainable_tokens_delta" in tensors]:
        for other in _tied_by_peft(module, names):
            places.setdefault(other, places[module])

    def read(module: str) -> ModuleDelta:
        tensors = {part: tensor.load() for part, tensor in modules[module].items()}
        return _module_delta(directory, located[module], tensors, config, base)

    deltas, dora = StoredDeltas(places, read), 0
    for name, delta in deltas.items():
        if isinstance(delta.weight, LowRankDelta) and delta.weight.magnitude is not None:
            _check_rows(f"{directory}: {name}", delta.weight, base[f"{name}.weight"])
            dora += 1
    _warn_of_missing(directory, config, places, base, names.model)
    _warn_of_others(directory, config, modules, names.model)
    _warn_of_whole(directory, config, located, modules, names)
    if dora:
        warnings.warn(
            f"{directory}: DoRA rescales rows, so the changes of {dora} layers are not of low rank; they are "
            "truncated as those of a full fine-tune are",
            stacklevel=2,
        )
    adapted = [located[module] for module, tensors in modules.items() if "lora_A" in tensors and "bias" not in tensors]
    unsaved = [module for module in adapted if f"{module}.bias" in base]
    if unsaved and config.bias in ("all", "lora_only"):
        warnings.warn(
            f"{directory}: trained bias={config.bias!r}, but it is not saved for {len(unsaved)} layers such as "
            f"{unsaved[0]}, which keep the base's bias, as in PEFT; PEFT before 0.21 did not save it",
            stacklevel=2,
        )
    return deltas


def _warn_of_others(
    directory: Path, config: _Config, modules: Mapping[str, Collection[str]], model: nn.Module | None
) -> None:
    """Warn of tensors that the adapter has and its config does not name, and of tokens for which it is the reverse."""

    def named(setting: str, module: str) -> bool:
        patterns = getattr(config, setting)
        if isinstance(patterns, str):
            return patterns == "all-linear" or _match(directory, setting, patterns, module) is not None
        return any(module == name or module.endswith(f".{name}") for name in patterns or ())

    adapted = [module for module, tensors in modules.items() if {"lora_A", "lora_embedding_A"}.intersection(tensors)]
    if config.ensure_weight_tying and model is not None:  # PEFT also adapts what is tied to a module that is named
        weights = {name: id(one.weight) for name, one in model.named_modules() if hasattr(one, "weight")}
        tied = [name for name, weight in weights.items() if list(weights.values()).count(weight) > 1]
        if any(named("target_modules", name) for name in tied):
            adapted = [module for module in adapted if module not in tied]
    left_out = [module for module in adapted if named("exclude_modules", module)]
    if config.target_modules:
        left_out += [module for module in adapted if not named("target_modules", module)]
    left_out += [module for module in adapted if not _in_layers(directory, module, config)]
    if left_out:
        warnings.warn(
            f"{directory}: has tensors for {len(left_out)} modules such as {left_out[0]}, which {_CONFIG} leaves out; "
            "they are applied, and PEFT ignores them",
            stacklevel=4,
        )
    if config.trainable_token_indices and not any("trainable_tokens_delta" in t for t in modules.values()):
        warnings.warn(
            f"{directory}: {_CONFIG} has trainable_token_indices, but the adapter has no tensors for these tokens, "
            "which keep the base's",
            stacklevel=4,
        )


def _warn_of_whole(
    directory: Path,
    config: _Config,
    located: Mapping[str, str],
    modules: Mapping[str, Mapping[str, StoredTensor]],
    names: ModelNames,
) -> None:
    """Warn of modules that are saved whole and that the config does not name, where PEFT does otherwise with them."""
    for module, tensors in modules.items():
        named = any(f".{module}".endswith(f".{name}") for name in config.modules_to_save or ())
        if named or "weight" not in tensors or tensors.keys() & {*_PARTS}:
            continue
        aliases = {name.removesuffix(".weight") for name in names.aliases(f"{located[module]}.weight")}
        tied, does = ", ".join(sorted(aliases - {located[module]})), None
        if ".modules_to_save." in tensors["weight"].name:
            does = "ignores it"
        elif not aliases <= {*located.values()}:
            does = f"also changes {tied}, which the base ties to it"
        if does:
            warnings.warn(
                f"{directory}: saves {module} whole, and {_CONFIG} does not name it: it is applied, and PEFT {does}",
                stacklevel=4,
            )


def _tied_by_peft(module: str, names: ModelNames) -> list[str]:
    """The modules whose rows PEFT trains together with those of the input embedding: those of the tied weight."""
    embedding = names.model.get_input_embeddings() if hasattr(names.model, "get_input_embeddings") else None
    if embedding is None or dict(names.model.named_modules()).get(module) is not embedding:
        return []
    return [name.removesuffix(".weight") for name in names.aliases(f"{module}.weight")]


def _in_layers(directory: Path, module: str, config: _Config) -> bool:
    """Whether `layers_to_transform` keeps a module: the first number after `layers_pattern` counts, as in PEFT."""
    layers, patterns = config.layers_to_transform, config.layers_pattern
    if layers in (None, []) or isinstance(config.target_modules, str) or module in (config.target_modules or ()):
        return True
    places = [rf"(?:.*?\.)?{p}" for p in ([patterns] if isinstance(patterns, str) else patterns or ())]
    for place in places or [r".*?\.[^.]*"]:
        found = _match(directory, "layers_pattern", place, module, rf"{place}\.(?P<number>\d+)\..*")
        if found:
            return int(found["number"]) in ([layers] if isinstance(layers, int) else layers)
    return False


def _warn_of_missing(
    directory: Path, config: _Config, changed: Collection[str], base: Mapping[str, Tensor], model: nn.Module | None
) -> None:
    """Warn where an adapter has no tensors for modules of the base that its config names."""
    modules = {name.removesuffix(".weight") for name in base if name.endswith(".weight")}
    targets = config.target_modules if isinstance(config.target_modules, list) else []
    if config.target_modules == "all-linear" and model is not None:  # in blocks: a head is not one of them
        linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear) or is_conv1d(module))
        targets = sorted({name.rpartition(".")[2] for name in linear if re.search(r"\.\d+\.", name)})
    if config.exclude_modules or config.layers_to_transform is not None:
        targets = []  # which leave some out
    kinds = {re.sub(r"\d+", "#", name) for name in changed}
    for names, saved in ((targets, False), (config.modules_to_save or [], True)):
        for name in names:
            inside = re.compile(rf"(.*\.)?{re.escape(name)}" + (r"(\..*)?" if saved else ""))
            held = [module for module in changed if inside.fullmatch(module)]
            lacking = sorted(module for module in modules - set(changed) if inside.fullmatch(module))
            if held:  # other layers of its name, such as those of a head, may be of another model class
                lacking = [module for module in lacking if not saved and re.sub(r"\d+", "#", module) in kinds]
            if lacking:
                warnings.warn(
                    f"{directory}: {_CONFIG} names {name!r}, but the adapter has no tensors for {len(lacking)} of its "
                    f"modules such as {lacking[0]}, which keep the base's",
                    stacklevel=4,
                )


# `<module>.lora_A.<adapter>.weight` and its other spellings: without the adapter's name, without ".weight".
_FACTOR = re.compile(
    r"(?P<module>.+?)(?:\.base_layer)?\.(?P<part>lora_A|lora_B|lora_down|lora_up|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector|trainable_tokens_delta)(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.(?P<kind>weight|bias))?"
)
_SAVED = re.compile(r"(?P<module>.+?)(?:\.base_layer|\.modules_to_save(?:\.(?P<adapter>[^.]+))?)?\.(?P<part>[^.]+)")
_SPELLINGS = {"lora_down": "lora_A", "lora_up": "lora_B"}


def _by_module(directory: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """The adapter's tensors by module and by PEFT's name."""
    modules: dict[str, dict[str, StoredTensor]] = {}
    adapters = set()
    for key, tensor in tensors.items():
        name = key.replace("_orig_mod.", "").removeprefix("module.").removeprefix("base_model.model.")
        name = name.replace(".token_adapter.", ".").replace("._fsdp_wrapped_module", "")
        match = _FACTOR.fullmatch(name) or _SAVED.fullmatch(name)
        if match is None:
            raise SmileError(f"{directory}: has a tensor {key!r}; expected <module>.lora_A.weight and the like")
        part = _SPELLINGS.get(match["part"], match["part"])
        if part == "lora_B" and match.groupdict().get("kind") == "bias":
            part = "lora_B.bias"
        if match["adapter"]:
            adapters.add(match["adapter"])
        if match["module"].endswith(".original_module"):
            continue
        held = modules.setdefault(match["module"], {}).setdefault(part, tensor)
        if held is tensor:
            continue
        if held.shape != tensor.shape or not torch.equal(held.load(), tensor.load()):  # some of PEFT store one twice
            raise SmileError(f"{directory}: has {part} of {match['module']!r} twice, in {key!r}, too; expected one")
    if len(adapters) > 1:
        raise SmileError(f"{directory}: contains the adapters {', '.join(sorted(adapters))}; expected one")
    return modules


def _in_base(
    directory: Path, modules: Mapping[str, Collection[str]], base: Mapping[str, Tensor], names: ModelNames
) -> dict[str, str]:
    """Each module's name in the base, which may have a common prefix.

    Raises:
        ValueError: factors of a module that the base lacks. A module saved whole keeps its name.
    """

    def translated(module: str) -> str:
        return (names.parameter(f"{module}.weight") or f"{module}.weight").removesuffix(".weight")

    adapted = [module for module, tensors in modules.items() if any(part in _PARTS for part in tensors)]
    firsts = {name.split(".")[0] for name in base} | {".".join(name.split(".")[:2]) for name in base}
    attempts: list[Callable[[str], str]] = [lambda module: module, translated]
    if names.model is None:  # else a prefix says which part of another model it is
        attempts += [lambda module, n=n: module.split(".", n)[-1] for n in (1, 2)]  # type: ignore[misc]
    prefixed = [lambda module, first=first: f"{first}.{module}" for first in sorted(firsts)]  # type: ignore[misc]

    def fits(rename: Callable[[str], str]) -> bool:
        return all(f"{rename(module)}.weight" in base for module in adapted or modules)

    fitting = [rename for rename in attempts if fits(rename)][:1] or [rename for rename in prefixed if fits(rename)]
    if len(fitting) > 1:
        module = next(iter(adapted or modules))
        places = " and as ".join(rename(module) for rename in fitting)
        raise SmileError(f"{directory}: changes {module!r}, which the base has as {places}; expected a name of one")
    if fitting:
        rename = fitting[0]
        return {
            module: rename(module) if any(f"{rename(module)}.{part}" in base for part in ("weight", "bias")) else module
            for module in modules
        }
    if not adapted:
        return {module: module for module in modules}
    unknown = next(module for module in adapted if f"{module}.weight" not in base)
    layers = {} if names.model is None else dict(names.model.named_modules())
    if isinstance(layers.get(unknown), nn.Linear) and (quantised := why_quantised(layers[unknown])):
        raise SmileError(f"base: {unknown}: {quantised}; expected a base of plain weights")
    raise SmileError(f"{directory}: changes {unknown!r}, which the base lacks; expected an adapter of this base")


# Approximate matches and named classes: `regex` has them, whose time limit serves here, and the re of PEFT has not.
_NOT_OF_RE = re.compile(r"(?<!\\N)(?<!\\)\{[^{}]*[^\d,{}][^{}]*\}|\[\[:")
_PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "trainable_tokens_delta")


@torch.no_grad()
@without_autocast
def _module_delta(
    directory: Path, module: str, tensors: Mapping[str, Tensor], config: _Config, base: Mapping[str, Tensor]
) -> ModuleDelta:
    """The change of one module."""
    weight: LowRankDelta | Tensor | None = None
    bias, whole = None, {}
    for one, other in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
        if (one in tensors) != (other in tensors):
            lacks = other if one in tensors else one
            raise SmileError(f"{directory}: {module} has no {lacks}; expected both factors of its change")
    kinds = [part for part in ("lora_A", "lora_embedding_A", "trainable_tokens_delta") if part in tensors]
    if len(kinds) > 1:
        raise SmileError(f"{directory}: {module} has {kinds[0]} and {kinds[1]}; expected one kind of change")
    linear = kinds == ["lora_A"] and tensors["lora_A"].dim() == 2
    for part in () if linear else ("lora_magnitude_vector", "lora_B.bias", "alpha"):
        if part in tensors:
            raise SmileError(f"{directory}: {module} has {part}; expected it on a linear layer, with lora_A and lora_B")
    if "lora_A" in tensors and not linear:
        b, a = (wide(tensors[name]).reshape(*(tensors[name].shape[:1] or (1,)), -1) for name in ("lora_B", "lora_A"))
        if b.shape[-1] != a.shape[0] or b.shape[0] * a.shape[1] != base[f"{module}.weight"].numel():
            raise SmileError(f"{directory}: {module}: its factors are not those of a linear layer; expected matrices")
        full = b @ a
        scale = _scale(directory, module, tensors["lora_A"].shape[0], config)
        weight = scale * full.view(base[f"{module}.weight"].shape)
    elif "lora_A" in tensors:
        weight, bias = _low_rank(directory, module, tensors, config)
    elif "lora_embedding_A" in tensors:
        a, b = tensors["lora_embedding_A"], tensors["lora_embedding_B"]
        weight = LowRankDelta(a.T, b.T, _scale(directory, module, a.shape[0], config))
        weight.check(f"{directory}: {module}")
    elif "trainable_tokens_delta" in tensors:
        plain, own = base[f"{module}.weight"], tensors.get("weight")  # its own where the base was resized before
        start = plain if own is None else own
        weight = _new_rows(directory, module, tensors["trainable_tokens_delta"], config, start)
        if start.shape != plain.shape:
            tensors, weight = {**tensors, "weight": wide(start) + weight}, None
    for name, tensor in tensors.items():
        if name in _PARTS or name in ("lora_magnitude_vector", "lora_B.bias", "alpha"):
            continue
        before = base.get(f"{module}.{name}")
        if name in ("weight", "bias") and before is None and f"{module}.weight" in base:
            before = torch.zeros_like(tensor)  # a bias that the base lacks
        if before is None or before.shape != tensor.shape or name not in ("weight", "bias"):
            whole[name] = tensor
        elif name == "bias":
            change = wide(tensor) - wide(before)
            if config.bias == "none" and "lora_A" in tensors and change.any():
                raise SmileError(
                    f"{directory}: {module}: has a bias other than the base's, and {_CONFIG} says bias 'none'; "
                    "expected both"
                )
            bias = change if bias is None else bias + change
        elif weight is None:
            weight = wide(tensor) - wide(before)
        elif not torch.equal(before.to(tensor.dtype), tensor):  # factors may come with a copy of the base's
            raise SmileError(f"{directory}: has factors and another weight of {module}; expected one of them")
    return ModuleDelta(weight, bias, whole)


def _config(directory: Path) -> _Config:
    if not is_adapter(directory):
        raise FileNotFoundError(f"directory: {directory} has no {_CONFIG}; expected a PEFT adapter")
    for stem in ("model.safetensors", "pytorch_model.bin"):
        for model in (directory / stem, directory / f"{stem}.index.json"):
            if model.exists():
                raise SmileError(
                    f"directory: {directory} has {_CONFIG} and {model.name}; expected an adapter or a model"
                )
    config = read_json(directory / _CONFIG)
    if config.get("peft_type") != "LORA":
        raise SmileError(
            f"peft_type: {directory} is {config.get('peft_type')}; expected LORA (DoRA and rsLoRA included)"
        )
    parsed = parse(_Config, config, str(directory / _CONFIG))
    initial = parsed.init_lora_weights
    if isinstance(initial, str) and any(fnmatch.fnmatch(initial.lower(), name) for name in _CHANGE_THE_BASE):
        raise SmileError(
            f"init_lora_weights: {directory} is {initial!r}, which changes the base weights; expected a plain LoRA "
            "(PEFT converts: save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )
    for key, value in config.items():
        if value and _is_variant(key):
            raise SmileError(f"{key}: is set in {directory}; expected a plain LoRA adapter")
    for name in ("alpha_pattern", "rank_pattern", "target_modules", "exclude_modules", "layers_pattern"):
        patterns = getattr(parsed, name)
        listed = isinstance(patterns, list) and name != "layers_pattern"  # names of modules
        for pattern in [patterns] if isinstance(patterns, str) else () if listed else patterns or ():
            found = _NOT_OF_RE.search(pattern)
            problem = f"{found[0]} is not syntax of Python's re" if found else ""
            try:
                re.compile(_inside(pattern) if isinstance(patterns, dict) else pattern)
            except (re.error, RecursionError, OverflowError) as error:
                problem = str(error)
            if problem:
                raise SmileError(
                    f"{directory / _CONFIG}: {name}: {pattern!r} is not a regular expression ({problem}); expected one"
                )
    return parsed


def _is_variant(key: str) -> bool:
    """Whether a key of adapter_config.json, if it is set, says that the adapted layer is not W + scale * B A."""
    return key in _NOT_LORA or (re.fullmatch("use_.*|.*_config", key) is not None and key not in _STILL_LORA)


def _inside(pattern: str) -> str:
    """The regular expression into which PEFT converts a pattern of ranks and alphas."""
    return rf"(.*\.)?({pattern})$"


def _set_for(directory: Path, name: str, patterns: Mapping[str, float] | None, module: str) -> float | None:
    """The value of the first pattern of alpha_pattern or rank_pattern that matches a module, as in PEFT."""
    found = (v for p, v in (patterns or {}).items() if _match(directory, name, p, module, _inside(p)))
    return next(found, None)


def _match(directory: Path, name: str, pattern: str, module: str, whole: str | None = None) -> regex.Match | None:
    """The match of a module with a setting's pattern, as the regular expression `whole` where one is given."""
    try:
        return regex.fullmatch(whole or pattern, module, timeout=1.0)
    except TimeoutError:
        raise SmileError(
            f"{directory}: {name}: {pattern!r} takes more than a second on {module!r}; expected less"
        ) from None


def _tensors(directory: Path) -> dict[str, StoredTensor]:
    for name, read in (("adapter_model.safetensors", read_safetensors), ("adapter_model.bin", read_pickled)):
        if (directory / name).exists():
            stored = read(directory / name)
            for tensor in stored:
                if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2 or 0 in tensor.shape:
                    raise SmileError(
                        f"{directory / name}: tensor {tensor.name!r} is {tensor.dtype} {list(tensor.shape)}; expected "
                        "floating-point numbers, of 16 bits or more"
                    )
            return {tensor.name: tensor for tensor in stored}
    raise FileNotFoundError(f"directory: {directory} has no adapter_model.safetensors and no adapter_model.bin")


def _scale(directory: Path, module: str, q: int, config: _Config, alpha: float | None = None) -> float:
    r = _set_for(directory, "rank_pattern", config.rank_pattern, module) or config.r
    if r not in (None, q):
        raise SmileError(
            f"{directory}: {module}: its factors have rank {q}, and {_CONFIG} says {r:g}; expected one rank"
        )
    stated = _set_for(directory, "alpha_pattern", config.alpha_pattern, module) or config.lora_alpha
    if alpha not in (None, stated):
        raise SmileError(
            f"{directory}: {module}: its alpha is {alpha:g}, and {_CONFIG} says {stated:g}; expected one alpha"
        )
    return stated / (math.sqrt(q) if config.use_rslora else q)


def _low_rank(
    directory: Path, module: str, tensors: Mapping[str, Tensor], config: _Config
) -> tuple[LowRankDelta, Tensor | None]:
    a, b = tensors["lora_A"], tensors["lora_B"]
    LowRankDelta(b, a, 1.0, tensors.get("lora_magnitude_vector")).check(f"{directory}: {module}")
    for name, numel in (("alpha", 1), ("lora_B.bias", len(b))):
        if name in tensors and tensors[name].numel() != numel:
            raise SmileError(
                f"{directory}: {module}: {name} has shape {list(tensors[name].shape)}; expected {numel} numbers"
            )
    for option, part in (("use_dora", "lora_magnitude_vector"), ("lora_bias", "lora_B.bias")):
        if getattr(config, option) != (part in tensors):
            raise SmileError(
                f"{directory}: {module}: has {'a' if part in tensors else 'no'} {part}, and {_CONFIG} says {option} "
                f"{getattr(config, option)}; expected both"
            )
    scale = _scale(directory, module, a.shape[0], config, tensors["alpha"].item() if "alpha" in tensors else None)
    bias = tensors.get("lora_B.bias")
    delta = LowRankDelta(b, a, scale, tensors.get("lora_magnitude_vector"))
    return delta, None if bias is None else wide(bias) * scale


def _check_rows(what: str, change: LowRankDelta, weight: Tensor) -> None:
    """Raise ValueError if a row that DoRA normalises is 0: that of the base, where the factors do not change it."""
    weight = weight if weight.shape[0] == len(change.b) else weight.T  # of a Conv1D
    empty = (wide(weight).abs().amax(1) == 0).nonzero()[:, 0].tolist()
    if zero := [row for row in empty if not (wide(change.b[row]) @ wide(change.a)).any()]:
        raise SmileError(
            f"{what}: row {zero[0]} of its weight is 0, which DoRA divides by; expected other rows, or no DoRA"
        )


def _new_rows(directory: Path, module: str, rows: Tensor, config: _Config, weight: Tensor) -> Tensor:
    """The change of an embedding from some of its rows (`trainable_token_indices`)."""
    indices = config.trainable_token_indices
    if isinstance(indices, dict):
        ends = [key for key in indices if f".{module}".endswith(f".{key}")]
        indices = indices[max(ends, key=len)] if ends else None
    indices = indices if isinstance(indices, list) else []
    differ = len(set(indices)) == len(indices) == len(rows)
    if not differ or rows.shape[1:] != weight.shape[1:] or max(indices, default=0) >= len(weight):
        raise SmileError(
            f"trainable_token_indices: does not fit {module} in {directory}; expected {len(rows)} of {len(weight)} rows"
        )
    new = wide(rows) - wide(weight[indices])
    change = torch.zeros(weight.shape, dtype=new.dtype)
    change[indices] = new
    return change
