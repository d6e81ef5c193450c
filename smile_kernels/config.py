"""SMILE settings of a checkpoint, stored in its config.json under `quantization_config`."""

import contextlib
import functools
import inspect
import json
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import SmileError, check_integer, reason
from .nn import SmileLinear, is_conv1d
from .publishing import write_text
from .routing import RoutingPolicy, check_kept
from .schema import KNOWN_KEYS_ONLY, parse
from .storage import NO_WEIGHTS, StoredTensor, read_json, weights_fingerprint

__all__ = ["SmileConfig", "SmileModuleConfig"]

QUANT_METHOD = "smile"
# The keys of config.json that are read here: what each holds, unless it is null.
_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model_type": (lambda value: isinstance(value, str), "a name"),
    "architectures": (
        lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
        "a list of names",
    ),
    "tie_word_embeddings": (lambda value: isinstance(value, bool), "true or false"),
}
# Numbers of a config of which transformers makes lists of that length: names of labels, types of layers.
_COUNT, _LONGEST = re.compile(r"num_labels|n_layers?|(.*_)?layers"), 1_000_000
FACTORS = ("vh", "s", "u", "expert_bias", "router", "router_prior")
# What a config says of files, losses, training, generation, and labels again; what changes a tensor shows in its shape.
_OF_NO_PASS = re.compile(
    r"(.*\.)?(_.*|architectures|auto_map|(torch_)?dtype|transformers_(version|weights)|quantization_config.*|label2id.*"
    r"|num_labels|vocab_size|tie_word_embeddings|use_cache|return_dict|output_.*|chunk_size_feed_forward"
    r"|pretraining_tp|initializer_.*|init_.*|.*(dropout|dropout_prob|dropout_rate|pdrop|layerdrop|drop_path_rate)"
    r"|problem_type|ctc_.*|.*_(loss_coef|loss_coefficient|cost)|mask_(time|feature)_.*|apply_spec_augment"
    r"|router_jitter_noise)"
)


@dataclass(frozen=True)
class SmileModuleConfig:
    """One converted layer of a checkpoint.

    Args:
        rank_of_expert: r; may differ between layers.
        rank_of_router: g.
        expert_bias: whether `<layer>.expert_bias` is stored.
        router: whether `<layer>.router` is stored; without it the router's rows are the first g of `vh`.
        router_prior: whether `<layer>.router_prior` is stored, which calibrated routing policies need.
        fan_in_fan_out: whether this checkpoint stores `<layer>.weight` as [in_features, out_features], as transformers'
            Conv1D does.

    Raises:
        ValueError: a rank below 1.
    """

    rank_of_expert: int
    rank_of_router: int
    expert_bias: bool = False
    router: bool = False
    router_prior: bool = False
    fan_in_fan_out: bool = False

    __pydantic_config__ = KNOWN_KEYS_ONLY

    def __post_init__(self):
        for name in ("rank_of_expert", "rank_of_router"):
            check_integer(name, getattr(self, name), 1)

    def check_kind(self, name: str, linear: nn.Module) -> None:
        """Raise ValueError if the weight of layer `name` is stored transposed, and `linear` does not store it so."""
        if self.fan_in_fan_out and not is_conv1d(linear):
            kind = type(linear).__name__
            raise SmileError(f"modules[{name!r}]: fan_in_fan_out is true for a {kind}; expected false")

    def build(
        self,
        in_features: int,
        out_features: int,
        num_local_experts: int,
        num_experts_per_tok: int,
        *,
        bias: bool,
        expert_names: tuple[str, ...] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> SmileLinear:
        """An uninitialised layer for this entry, into which its tensors can be loaded."""
        layer = SmileLinear(
            in_features,
            out_features,
            num_local_experts,
            self.rank_of_expert,
            self.rank_of_router,
            num_experts_per_tok,
            bias=bias,
            expert_bias=self.expert_bias,
            router=self.router,
            router_prior=self.router_prior,
            device=device,
            dtype=dtype,
        )
        layer.expert_names = expert_names
        return layer


@dataclass(frozen=True)
class SmileConfig:
    """SMILE settings of a checkpoint: `quantization_config` in its config.json.

    Args:
        num_local_experts: N, the same in every layer.
        num_experts_per_tok: m, 1 to N.
        rank_of_expert: as requested: r, -1 for full rank, or a fraction in (0, 1), the energy to keep in each layer.
        rank_of_router: g as requested.
        modules: name of each converted layer -> its ranks and tensors.
        base_model_name_or_path: path of the base for a checkpoint with only the experts, else None.
        routing: the policy that the loaded model uses. Its num_experts_per_tok, if it is set, becomes the one above.
        expert_names: N different names of the experts (see `routing_override`), or None.
        base: the base's own `quantization_config`, where its layers are stored quantised.
        base_fingerprint: hash of the base's weight files, for a checkpoint with only the experts.

    Raises:
        ValueError: a missing or unknown key, or a value out of range; the message names it.
    """

    num_local_experts: int
    num_experts_per_tok: int
    rank_of_expert: int | float
    rank_of_router: int
    modules: dict[str, SmileModuleConfig]
    base_model_name_or_path: str | None = None
    routing: RoutingPolicy = field(default=RoutingPolicy())
    expert_names: tuple[str, ...] | None = None
    base: dict[str, Any] | None = None
    base_fingerprint: str | None = None

    __pydantic_config__ = KNOWN_KEYS_ONLY

    def __post_init__(self):
        if not isinstance(self.routing, RoutingPolicy):
            raise SmileError(f"routing: is {reprlib.repr(self.routing)}; expected a RoutingPolicy")
        if not isinstance(self.modules, dict):
            raise SmileError(f"modules: is {reprlib.repr(self.modules)}; expected a dict of SmileModuleConfig by name")
        if self.routing.num_experts_per_tok is not None:  # stored with the layers, which need it without a policy
            object.__setattr__(self, "num_experts_per_tok", self.routing.num_experts_per_tok)
            object.__setattr__(self, "routing", replace(self.routing, num_experts_per_tok=None))
        check_integer("num_local_experts", self.num_local_experts, 1)
        check_integer("num_experts_per_tok", self.num_experts_per_tok, 1)
        if self.num_experts_per_tok > self.num_local_experts:
            raise SmileError(
                f"num_experts_per_tok: is {self.num_experts_per_tok}; expected 1 to {self.num_local_experts}, "
                "the number of experts"
            )
        check_kept(self.routing, self.num_experts_per_tok)
        check_integer("rank_of_router", self.rank_of_router, 1)
        check_rank_of_expert(self.rank_of_expert)
        object.__setattr__(self, "expert_names", check_expert_names(self.expert_names, self.num_local_experts))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "SmileConfig":
        """From the `quantization_config` of a config.json."""
        method = config.get("quant_method") if isinstance(config, Mapping) else config
        if method != QUANT_METHOD:
            raise SmileError(f"quant_method: is {reprlib.repr(method)}; expected {QUANT_METHOD!r}")
        if not isinstance(config, Mapping):
            raise SmileError(f"quantization_config: is {config!r}; expected an object with the settings of its layers")
        settings = {key: value for key, value in config.items() if key != "quant_method"}
        return parse(cls, settings, "quantization_config")

    def of_experts(self, base: str | Path) -> "SmileConfig":
        """The config of a checkpoint with only the experts, on the base in this folder."""
        path = os.path.abspath(base)
        return replace(self, base_model_name_or_path=path, base_fingerprint=weights_fingerprint(path))

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`; can be stored as JSON."""
        config = {"quant_method": QUANT_METHOD, **asdict(self)}
        if self.routing.is_published:
            del config["routing"]
        for name in ("base_model_name_or_path", "expert_names", "base", "base_fingerprint"):
            if config[name] is None:
                del config[name]
        return config

    @classmethod
    def from_layers(cls, layers: Mapping[str, SmileLinear]) -> "SmileConfig":
        """The config of layers, by name.

        Raises:
            ValueError: no layers, or layers that differ in num_local_experts, num_experts_per_tok or expert_names.
        """
        if not layers:
            raise SmileError("model: contains no SmileLinear; expected a model made by upscale()")
        shared = {}
        for key in ("num_local_experts", "num_experts_per_tok", "expert_names"):
            values = {getattr(layer, key) for layer in layers.values()}
            if len(values) > 1:
                listed = sorted(values, key=str)
                raise SmileError(f"{key}: differs between layers, {listed}; expected one value in a checkpoint")
            shared[key] = values.pop()
        modules = {
            name: SmileModuleConfig(
                layer.rank_of_expert,
                layer.rank_of_router,
                expert_bias=layer.expert_bias is not None,
                router=layer.router is not None,
                router_prior=layer.router_prior is not None,
            )
            for name, layer in layers.items()
        }
        return cls(
            **shared,
            rank_of_expert=max(module.rank_of_expert for module in modules.values()),
            rank_of_router=max(module.rank_of_router for module in modules.values()),
            modules=modules,
        )


def check_expert_names(names: Sequence[str] | None, num_local_experts: int) -> tuple[str, ...] | None:
    """The names as a tuple; raises ValueError unless they are None or `num_local_experts` different names."""
    if names is None:
        return None
    valid = not isinstance(names, str) and isinstance(names, Sequence)
    if not valid or not all(isinstance(name, str) and name.strip() and name.isprintable() for name in names):
        raise SmileError(f"expert_names: is {names!r}; expected a list of names in UTF-8, one for each expert")
    if len(names) != num_local_experts:
        raise SmileError(f"expert_names: has {len(names)} names; expected {num_local_experts}, one for each expert")
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise SmileError(f"expert_names: {twice[0]!r} is given twice; expected different names")
    return tuple(names)


def check_tensors(config: SmileConfig, stored: Iterable[StoredTensor]) -> None:
    """Raise ValueError, naming file and tensor, if a factor's experts or ranks differ from the config, or its dtype."""
    for tensor in stored:
        layer, _, factor = tensor.name.rpartition(".")
        entry = config.modules.get(layer)
        if entry is None or factor not in FACTORS:
            continue
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            raise SmileError(
                f"{tensor.file}: tensor {tensor.name!r} is {tensor.dtype}; expected floating point of 16 bits or more"
            )
        n, r, g = config.num_local_experts, entry.rank_of_expert, entry.rank_of_router
        expected: dict[str, tuple[int | str, ...]] = {
            "vh": (n, r if entry.router else max(r, g), "in_features"),
            "s": (n, r),
            "u": (n, "out_features", r),
            "expert_bias": (n, "out_features"),
            "router": (n, g, "in_features"),
            "router_prior": (n,),
        }
        want = expected[factor]
        fits = len(want) == len(tensor.shape) and all(
            isinstance(size, str) or size == own for size, own in zip(want, tensor.shape)
        )
        if not fits:
            raise SmileError(
                f"{tensor.file}: tensor {tensor.name!r} has shape {list(tensor.shape)}; expected "
                f"[{', '.join(map(str, want))}], as quantization_config says"
            )


def check_rank_of_expert(rank: int | float) -> None:
    """Raise ValueError unless `rank` is an integer of 1 or more, -1, or a fraction in (0, 1)."""
    integer = isinstance(rank, int) and not isinstance(rank, bool)
    if not (integer and (rank >= 1 or rank == -1)) and not (isinstance(rank, float) and 0 < rank < 1):
        raise SmileError(
            f"rank_of_expert: is {rank!r}; expected an integer of 1 or more, -1 for full rank, or a fraction in (0, 1)"
        )


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a checkpoint folder; {} if there is none."""
    file = Path(folder) / "config.json"
    config = read_json(file) if file.exists() else {}
    for path, number in _numbers_in(config):
        if number != number:
            raise SmileError(f"{file}: {path} is NaN; expected a number")
        if number > _LONGEST and _COUNT.fullmatch(path.rpartition(".")[2]):
            raise SmileError(f"{file}: {path} is {reprlib.repr(number)}; expected at most {_LONGEST:,}")
    for key, (is_valid, what) in _EXPECTED.items():
        if (value := config.get(key)) is not None and not is_valid(value):
            raise SmileError(f"{file}: {key} is {reprlib.repr(value)}; expected {what}")
    return config


def _numbers_in(content: Any) -> Iterator[tuple[str, int | float]]:
    """The numbers in the content of a JSON file, with their paths joined by dots."""
    waiting = [("", content)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, (int, float)):
            yield path, value
        parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        waiting += [(f"{path}.{name}".lstrip("."), part) for name, part in parts]


def read_smile_config(folder: str | Path) -> SmileConfig:
    """The SMILE settings of a checkpoint folder.

    Raises:
        ValueError: not a SMILE checkpoint, or invalid settings; the message names the file.
        FileNotFoundError: the folder does not exist.
    """
    if not Path(folder).exists():
        raise FileNotFoundError(f"{folder}: no such folder; expected a SMILE checkpoint")
    config = read_config(folder).get("quantization_config")
    if config is None:
        raise SmileError(f"{folder}: is not a SMILE checkpoint; expected quantization_config in its config.json")
    try:
        return SmileConfig.from_dict(config)
    except ValueError as error:
        raise SmileError(f"{Path(folder) / 'config.json'}: {error}") from None


def write_config(folder: Path, config: Mapping[str, Any], smile: SmileConfig) -> None:
    """config.json: the base's plus the SMILE settings."""
    if smile.base_model_name_or_path is None:
        config = _without_weights(config)
    write_text(folder / "config.json", json.dumps({**config, "quantization_config": smile.to_dict()}, indent=2) + "\n")


def _without_weights(config: Mapping[str, Any]) -> dict[str, Any]:
    """Set the name of the missing weight file in the config of a model and of the models inside it."""
    parts = {
        name: _without_weights(part)
        for name, part in config.items()
        if isinstance(part, Mapping) and "model_type" in part
    }
    return {**config, **parts, "transformers_weights": NO_WEIGHTS}


def settings_of(config: Any) -> dict[str, Any]:
    """The settings that a forward pass in evaluation mode may depend on, by their path.

    Args:
        config: a config of transformers, whose own settings count, or the content of a config.json.
    """
    values = config if isinstance(config, Mapping) else config.to_dict()
    if not isinstance(config, Mapping):
        with contextlib.suppress(Exception):  # a kind of config that has no defaults
            kind: Any = type(config)
            known, absent = kind().to_dict(), _defaults_in_models(kind)
            values = {
                name: value
                for name, value in values.items()
                if name in known or (name in absent and value != absent[name])
            }

    def flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
        if path.split(".")[-1] == "id2label" and isinstance(value, Mapping):
            yield path, {str(name): label for name, label in value.items()}
        elif isinstance(value, Mapping):
            for name, inner in value.items():
                yield from flat(inner, f"{path}.{name}" if path else str(name))
        elif not _OF_NO_PASS.fullmatch(path):
            yield path, list(value) if isinstance(value, tuple) else value

    return dict(flat(values, ""))


@functools.cache
def _defaults_in_models(kind: Any) -> dict[str, bool | None]:
    """Settings that models of a kind of config read where it has them, declared or not, and what they take if not."""
    from transformers import masking_utils

    files = [Path(masking_utils.__file__), *Path(inspect.getfile(kind)).parent.glob("modeling_*.py")]
    read = re.compile(r'getattr\(\s*(?:self\.)?(?:\w+_)?config,\s*"(\w+)",\s*(True|False|None)\s*\)')
    found = (match for file in files for match in read.findall(file.read_text(encoding="utf-8")))
    defaults = {name: {"True": True, "False": False, "None": None}[default] for name, default in found}
    defaults.pop("head_dim", None)  # an undeclared one is that of the weights' shapes
    return defaults


def config_of_checkpoint(folder: str | Path, model: nn.Module | None) -> Any:
    """A checkpoint's config, as that of `model` is, or as its file has it; None where it has none."""
    stored = read_config(folder)
    kind: Any = type(getattr(model, "config", None))
    if not stored or not hasattr(kind, "from_dict"):
        return stored or None
    try:
        return kind.from_pretrained(folder)  # which also reads the spelling of infinity
    except Exception as error:  # any exception of a config for wrong values
        raise SmileError(
            f"{Path(folder) / 'config.json'}: transformers cannot make a {kind.__name__} of it "
            f"({reason(error)}); expected a config as the base's"
        ) from None
