"""Calibration: each expert's mean share of the router's energy on inputs without a task, layer by layer.

    log Pbar_i(l) = log of the mean of p_i(t, l) over all tokens t, processed by the base model without experts

A router's shares differ between experts and layers independent of the task; calibrated policies subtract this constant
from the evidence (`policy.py`). An expert that did not change a layer has no share there, and its entry is 0.
"""

import copy
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SmileError, check_seed, reason
from ..nn import RoutedExperts, routed_layers
from ..schema import check_arguments, check_inputs
from .cache import cache_in
from .control import get_routing, refuse_override, set_routing, watch_tokens
from .policy import Routing, RoutingPolicy, energy_shares, router_energies

__all__ = ["CalibrationReport", "LayerBias", "calibrate", "check_calibration"]


@dataclass(frozen=True)
class LayerBias:
    """Result of calibration for one layer.

    Args:
        name: the layer.
        prior: log Pbar_i for each expert i; 0 where the expert did not change the layer.
        bias: root mean square of these logarithms minus their mean, over the experts that changed the layer.
        tokens: number of processed tokens; 0: the layer did not run and stays uncalibrated (its prior is 0).
    """

    name: str
    prior: list[float]
    bias: float
    tokens: int


@dataclass(frozen=True)
class CalibrationReport:
    """The inputs of `calibrate` and the bias of each layer.

    Args:
        source: "written" by the model itself, "random" or "given".
        layers: one entry for each SMILE layer.
    """

    source: str
    layers: list[LayerBias]

    def __str__(self) -> str:
        ran = sorted((layer for layer in self.layers if layer.tokens), key=lambda layer: layer.bias)
        lines = [
            f"{len(ran)} of {len(self.layers)} SMILE layers calibrated on {ran[-1].tokens} tokens ({self.source})",
            f"bias of the router (rms of log shares): median {ran[len(ran) // 2].bias:.3f}, "
            f"largest {ran[-1].bias:.3f} at {ran[-1].name}",
        ]
        return "\n".join(lines)


@check_arguments
@torch.no_grad()
def calibrate(
    model: nn.Module,
    inputs: Iterable[Mapping[str, Any]] | None = None,
    *,
    seed: int = 0,
    sequences: int = 32,
    length: int = 40,
) -> CalibrationReport:
    """Set `router_prior` of every SMILE layer, for policies with `calibrated=True`; no data, no training.

    The base model, without experts, processes inputs without a task: text that a causal language model generates at
    temperature 1 from its first special token; random ids, pixels or waves for other models; or `inputs`. The same seed
    gives the same numbers. The routing policy of the model does not change.

    Args:
        model: a model with SMILE layers; its weights do not change.
        inputs: unlabelled inputs to use instead: batches, each a mapping of forward's arguments. The arguments below
            then have no effect, and others than their defaults are refused.
        seed: seed of the generated inputs.
        sequences: number of generated inputs.
        length: length of each, in tokens; at most the positions that the model has.

    Returns:
        The report, with each layer's bias.

    Raises:
        ValueError: no SMILE layers; inputs without a batch, or that reach no SMILE layer; or unknown inputs of the
            model without `inputs`. Nothing is changed then.
    """
    layers = routed_layers(model)
    if not layers:
        raise SmileError(f"model: {type(model).__name__} has no SmileLinear; expected a model with SMILE layers")
    check_seed(seed)
    for name, value in (("sequences", sequences), ("length", length)):
        if value < 1:
            raise SmileError(f"{name}: is {value}; expected 1 or more")
    for name, value in {"seed": seed, "sequences": sequences, "length": length}.items() if inputs is not None else ():
        if value != inspect.signature(calibrate).parameters[name].default:
            raise SmileError(f"{name}: is {value}, of generated inputs, and inputs is given; expected one of the two")
    config = _text_config(model)
    names = "max_position_embeddings", "max_target_positions"
    positions = next((n for name in names if (n := getattr(config, name, None))), 0)
    length = min(length, positions) if positions > 0 else length
    generator = torch.Generator().manual_seed(seed)

    with _experts_off(model, layers) as shares:
        if inputs is not None:
            source = "given"
            for batch in inputs:
                if not isinstance(batch, Mapping):
                    raise SmileError(
                        f"inputs: contains a {type(batch).__name__}; expected mappings of forward's arguments"
                    )
                check_inputs(model, batch)
                with _naming_inputs("those given"):
                    model(**batch)
        elif _writes(model):
            source = "written"
            with _naming_inputs("text that it writes"), _naming_sizes(sequences, length):
                _write(model, sequences, length, generator)
        else:
            source = "random"
            with _naming_inputs("random ones"), _naming_sizes(sequences, length):
                model(**_random_inputs(model, sequences, length, generator))
    if not any(count for _, count in shares.values()):
        raise SmileError("inputs: reach no SMILE layer; expected batches on which the model runs its SMILE layers")

    report, priors = [], {}
    for name, layer in layers.items():
        total, count = shares[name]
        mean = total / max(count, 1)
        present = mean > 0
        prior = torch.where(present, mean.clamp_min(torch.finfo(torch.float32).tiny).log(), 0)
        spread = (prior - prior[present].mean())[present] if bool(present.any()) else prior
        report.append(LayerBias(name, prior.tolist(), float(spread.square().mean().sqrt()), count))
        priors[name] = prior.to("cpu" if layer.s.is_meta else layer.s.device, layer.s.dtype)  # meta: offloaded
    for name, layer in layers.items():
        layer.router_prior = priors[name]
    return CalibrationReport(source, report)


@torch.no_grad()
def check_calibration(model: nn.Module) -> None:
    """Raises what `calibrate` would raise on a model of this kind without `inputs`; runs it if it is on meta."""
    if _writes(model):
        _first_token(model)
        if getattr(model.config, "return_dict", True) is False:
            raise SmileError(
                "return_dict: is False in the model's config; expected True, with which transformers runs it"
            )
        if next(model.parameters()).is_meta:
            model = copy.deepcopy(model).eval()
            try:
                output = model(**_beginning(model, 1))
            except Exception:  # an operation that has no meta implementation, or that reads numbers
                return
            _cache_of(model, output)
    else:
        with _naming_inputs("random ones"):
            _random_inputs(model, 1, 1, torch.Generator())


@contextmanager
def _naming_inputs(kind: str) -> Iterator[None]:
    """Raise SmileError for whatever a model raises on inputs, or with a config, that do not fit it."""
    try:
        yield
    except SmileError as error:  # of a SMILE layer, whose argument is x
        raise error if str(error).startswith(("inputs:", "sequences")) else SmileError(f"inputs: {error}") from None
    except Exception as error:
        raise SmileError(
            f"inputs: the model fails on {kind} ({reason(error)}); expected a model and inputs that fit"
        ) from error


@contextmanager
def _naming_sizes(sequences: int, length: int) -> Iterator[None]:
    """Raise SmileError if memory does not hold generated inputs of these sizes, or their number is beyond 64 bits."""
    try:
        yield
    except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
        if not isinstance(error, MemoryError) and not re.search("memory|overflow", str(error), re.IGNORECASE):
            raise
        raise SmileError(
            f"sequences, length: are {sequences}, {length}; expected sizes that memory holds ({reason(error)})"
        ) from error


@contextmanager
def _experts_off(model: nn.Module, layers: Mapping[str, RoutedExperts]) -> Iterator[dict[str, tuple[Tensor, int]]]:
    """While it is open SMILE layers run without experts; fills the sum of p [N] float64 and the tokens of each."""
    shares = {name: (torch.zeros(layer.num_local_experts, dtype=torch.float64), 0) for name, layer in layers.items()}
    training = {module: module.training for module in model.modules()}

    def reader(name: str) -> Callable[[RoutedExperts, Tensor], Routing]:
        def read(layer: RoutedExperts, x: Tensor) -> Routing:
            rows = layer.vh if layer.router is None else layer.router
            p = energy_shares(router_energies(x.to(rows.dtype), rows[:, : layer.rank_of_router]))
            voting = p.sum(-1) > 0
            if (real := tokens(x)) is not None:
                voting = voting & real.to(voting.device)
            total, count = shares[name]
            shares[name] = total + p[voting].double().sum(0).cpu(), count + int(voting.sum())
            off = p.new_zeros(*x.shape[:-1], 1)
            return off, off.int()

        return read

    policy = get_routing(model)
    refuse_override(model)
    set_routing(model, RoutingPolicy())
    asked = {name: layer.router_policy for name, layer in layers.items()}
    try:
        model.eval()
        with watch_tokens(model) as tokens:
            for name, layer in layers.items():
                layer.router_policy = reader(name)
            yield shares
    finally:
        for name, layer in layers.items():
            layer.router_policy = asked[name]
        for module, mode in training.items():
            module.training = mode
        set_routing(model, policy)


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _writes(model: nn.Module) -> bool:
    """Whether `model` is a causal language model: it generates, and has no encoder."""
    can = getattr(model, "can_generate", None)
    return can is not None and bool(can()) and not getattr(model.config, "is_encoder_decoder", False)


def _first_token(model: nn.Module) -> int:
    """The special token that a text begins with; 0 where the model has none."""
    config = _text_config(model)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    name, first = next(((name, i) for name in names if (i := getattr(config, name, None)) is not None), ("", 0))
    first = first[0] if isinstance(first, (list, tuple)) else first
    size = getattr(config, "vocab_size", None)
    if not isinstance(first, int) or first < 0 or (size is not None and first >= size):
        raise SmileError(f"{name}: is {first!r} in the model's config; expected one of its {size} tokens")
    return first


def _write(model: nn.Module, sequences: int, length: int, generator: torch.Generator) -> None:
    """Generate `sequences` texts of `length` tokens from the first special token, processing each token once."""
    arguments = _beginning(model, sequences)
    device = arguments["input_ids"].device
    for _ in range(length):
        output = model(**arguments)
        odds = output.logits[:, -1].float().softmax(-1).cpu()
        following = torch.multinomial(odds, 1, generator=generator).to(device)
        cache = _cache_of(model, output)
        name = next(name for name, value in output.items() if value is cache)
        arguments = {"input_ids": following, name: cache, "use_cache": True}


def _beginning(model: nn.Module, sequences: int) -> dict[str, Any]:
    """The arguments with which texts begin."""
    ids = torch.full((sequences, 1), _first_token(model), device=_device_of(model))
    return {"input_ids": ids, "use_cache": True}


def _cache_of(model: nn.Module, output: Any) -> Any:
    """The KV cache in an output; raises ValueError if there is none."""
    cache = cache_in(output)
    if cache is None:
        raise SmileError(
            f"inputs: {type(model).__name__} returns no KV cache, which the generation of texts for calibration needs; "
            "expected batches of unlabelled inputs, or no calibration"
        )
    return cache


def _device_of(model: nn.Module) -> torch.device:
    """The device of a model's inputs: that of its first parameter, or where accelerate runs offloaded modules."""
    first = next(model.parameters()).device
    if first.type != "meta":
        return first
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    each = (one for hook in hooks for one in getattr(hook, "hooks", (hook,)))
    found = (getattr(one, "execution_device", None) for one in each)
    return torch.device(next((device for device in found if device is not None), first))


def _random_inputs(model: nn.Module, sequences: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random ids, pixels or waves for the arguments of forward, with sizes from the model's config."""
    config: Any = getattr(model, "config", None)
    text = _text_config(model)
    main = getattr(model, "main_input_name", None)
    towers = hasattr(config, "text_config") and hasattr(config, "vision_config")
    weight = next(model.parameters())
    found: dict[str, Tensor] = {}
    if main == "input_ids":
        ids = torch.randint(0, text.vocab_size, (sequences, length), generator=generator)
        if (pad := getattr(text, "pad_token_id", None)) is not None:  # of which transformers warns without a mask
            ids = torch.where(ids == pad, (ids + 1) % text.vocab_size, ids)
        found["input_ids"] = ids
        if getattr(config, "is_encoder_decoder", False):
            found["decoder_input_ids"] = ids.roll(1, 0)
    if main == "pixel_values" or towers:
        vision = getattr(config, "vision_config", config)
        size = vision.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        found["pixel_values"] = torch.randn(sequences, vision.num_channels, height, width, generator=generator)
    if main == "input_values":
        found["input_values"] = torch.randn(sequences, 400 * length, generator=generator)
    if main == "input_features":
        frames = 2 * config.max_source_positions
        found["input_features"] = torch.randn(sequences, config.num_mel_bins, frames, generator=generator)
        found["decoder_input_ids"] = torch.randint(0, config.vocab_size, (sequences, length), generator=generator)
    if not found:
        raise SmileError(
            f"inputs: {type(model).__name__} has no input that can be generated (main_input_name is {main!r}); "
            "expected batches of unlabelled inputs"
        )
    device = _device_of(model)
    return {name: t.to(device, weight.dtype) if t.is_floating_point() else t.to(device) for name, t in found.items()}
