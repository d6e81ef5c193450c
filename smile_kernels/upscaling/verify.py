"""Holds a fused model against the fine-tuned models: each expert in turn, layer by layer, in float32."""

import functools
import gc
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import REPORT, load_pretrained, transformers_class
from ..config import read_config
from ..errors import SmileError
from ..integrations.peft import is_adapter
from ..nn import SmileLinear, smile_layers
from ..schema import check_arguments, check_inputs
from .report import UpscaleReport
from .sources import local_folder

__all__ = ["ExpertVerdict", "example_inputs", "verify"]

# float32 sums of D products differ by a few eps times the norms; another order of summation gives no more than this.
ROUNDING = 1e-5


@dataclass(frozen=True)
class ExpertVerdict:
    """How the fused model with one expert forced compares with that fine-tuned model.

    Attributes:
        expert: its number.
        verdict: "exact" (to rounding), "truncated" (within what the ranks of its experts leave out) or "off".
        module: the first module, in the order of the forward pass, that is off; "" where none is.
        error: ||y - y_i||_F / ||y_i||_F of the model's output y and the fine-tuned model's y_i.
        errors: the same for each module by itself, given the fine-tuned model's own input.
        name: the expert's name, "" where it has none.
    """

    expert: int
    verdict: str
    module: str
    error: float
    errors: dict[str, float] = field(default_factory=dict)
    name: str = ""

    def __str__(self) -> str:
        where = f", first at {self.module}" if self.module else ""
        name = f" ({self.name})" if self.name else ""
        return f"expert {self.expert}{name}: {self.verdict}{where}; relative error of the output {self.error:.2g}"


@check_arguments
@torch.no_grad()
def verify(
    model: nn.Module,
    finetuned: Sequence[nn.Module | Callable[[], nn.Module]],
    *,
    inputs: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[ExpertVerdict]:
    """Compares a SMILE model, each expert forced in turn, with the fine-tuned models it was made of.

    Each module without submodules is run on the input that it has in the fine-tuned model. A SMILE layer may be off by
    (W_i - W - U_i diag(s_i) V_i^T) x; every other module must agree to rounding, as must what lies between the modules,
    for which the whole model is run with the outputs of the fine-tuned model's modules in place of its own.

    Args:
        model: the SMILE model; it is run in evaluation mode, in its own dtype.
        finetuned: the N fine-tuned models in the order of the experts, or functions that load one: then a single one is
            in memory at a time.
        inputs: keyword arguments of the forward; random ones of the architecture by default.
        seed: of the random inputs.
        progress: told how many experts are done, and how many there are.

    Returns:
        One verdict an expert.

    Raises:
        ValueError: no SMILE layer in the model, another number of models than experts, or no inputs known.
    """
    layers = smile_layers(model)
    if not layers:
        raise SmileError("model: holds no SmileLinear; expected a model made by upscale()")
    first = next(iter(layers.values()))
    count, names = first.num_local_experts, first.expert_names
    if len(finetuned) != count:
        raise SmileError(f"finetuned: holds {len(finetuned)} models; expected {count}, one for each expert")
    verdicts = []
    for i, expert in enumerate(finetuned):
        if progress is not None:
            progress(i, count)
        tuned = expert if isinstance(expert, nn.Module) else expert()
        given = dict(inputs) if inputs is not None else example_inputs(tuned, seed)
        check_inputs(tuned, given)
        with _evaluating(tuned):
            calls, want = _record(tuned, given)
        weights = {name: _weight(tuned, name) for name in layers}
        del tuned
        gc.collect()
        with _evaluating(model), _forced(layers, i):
            verdict = _compare(model, i, calls, want, weights, given)
        verdicts.append(replace(verdict, name=names[i] if names else ""))
    if progress is not None:
        progress(count, count)
    return verdicts


_Call = tuple[str, tuple[Any, ...], dict[str, Any], Any]


def _record(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[list[_Call], Tensor]:
    """Every call of a module without submodules, in order, and the model's output."""
    calls: list[_Call] = []
    handles = [
        module.register_forward_hook(
            lambda _, args, kwargs, output, name=name: calls.append((name, args, kwargs, output)), with_kwargs=True
        )
        for name, module in _leaves(model).items()
    ]
    try:
        output = _first(model(**inputs))
    finally:
        for handle in handles:
            handle.remove()
    return calls, output


def _compare(
    model: nn.Module,
    expert: int,
    calls: Sequence[_Call],
    want: Tensor,
    weights: Mapping[str, Tensor],
    inputs: Mapping[str, Any],
) -> ExpertVerdict:
    leaves, errors = _leaves(model), dict[str, float]()
    first, truncated = "", False
    for name, args, kwargs, output in calls:
        if name not in leaves:
            first = first or name
            errors[name] = math.inf
            continue
        got = _first(leaves[name](*args, **kwargs))
        error = _relative(got, _first(output))
        errors[name] = max(errors.get(name, 0.0), error)
        if error > ROUNDING:
            module = leaves[name]
            if name in weights and _truncates(module, expert, weights[name], args[0], got, output):
                truncated = True
            else:
                first = first or name
    between = _relative(_with_outputs(model, calls, inputs), want)
    if not first and between > ROUNDING:
        first = f"{type(model).__name__}.forward, between its modules"
    error = _relative(_first(model(**inputs)), want)
    verdict = "off" if first else "truncated" if truncated else "exact"
    return ExpertVerdict(expert, verdict, first, error, errors)


def _truncates(layer: Any, i: int, weight: Tensor, x: Tensor, got: Tensor, output: Tensor) -> bool:
    """Whether what a layer is off by is what the rank of its experts, and the dtype of its factors, leave out."""
    wide = torch.promote_types(layer.weight.dtype, torch.float32)
    u, s, vh = (getattr(layer, name)[i].to(wide) for name in ("u", "s", "vh"))
    rest = weight.to(wide) - layer.weight.to(wide) - (u * s) @ vh[: layer.rank_of_expert]
    # What the output is off by must be what the weight is off by, and that the part which the factors' span leaves out.
    inside = torch.linalg.vector_norm(u.T @ rest @ vh[: layer.rank_of_expert].T)
    floor = ROUNDING + 4 * torch.finfo(layer.u.dtype).eps
    size = torch.linalg.vector_norm(s)
    predicted = x.to(wide) @ rest.T
    unexplained = torch.linalg.vector_norm(output.to(wide) - got.to(wide) - predicted)
    return bool(inside <= floor * size) and bool(unexplained <= floor * torch.linalg.vector_norm(output.to(wide)))


def _with_outputs(model: nn.Module, calls: Sequence[_Call], inputs: Mapping[str, Any]) -> Tensor:
    """The model's output where each module gives what it gave in the fine-tuned model."""
    left: dict[str, list[Any]] = {}
    for name, _, _, output in calls:
        left.setdefault(name, []).append(output)
    handles = [
        module.register_forward_hook(lambda _, args, output, name=name: left[name].pop(0) if left.get(name) else output)
        for name, module in _leaves(model).items()
    ]
    try:
        return _first(model(**inputs))
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _forced(layers: Mapping[str, SmileLinear], expert: int) -> Iterator[None]:
    """Every token of every layer goes to one expert, with weight 1."""

    def force(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        shape = (*args[0].shape[:-1], 1)
        ids = torch.full(shape, expert, dtype=torch.int32, device=args[0].device)
        return args[:1], {"routing": (torch.ones(shape, device=args[0].device), ids)}

    handles = [layer.register_forward_pre_hook(force, with_kwargs=True) for layer in layers.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was


def _leaves(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if name and not any(module.children())}


def _weight(model: nn.Module, name: str) -> Tensor:
    """A linear layer's weight [O, D]."""
    layer: Any = model.get_submodule(name)
    weight = layer.weight.detach()
    return weight.T if type(layer).__name__ == "Conv1D" else weight


def _first(output: Any) -> Tensor:
    """The first floating-point tensor of an output."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    for value in values if isinstance(output, (Mapping, list, tuple)) else ():
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim():
            return value
        if isinstance(value, (Mapping, list, tuple)):
            return _first(value)
    raise SmileError(f"model: returns a {type(output).__name__} with no floating-point tensor; expected one")


def _relative(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return math.inf
    if not want.is_floating_point():
        return float(not torch.equal(got, want))
    size = torch.linalg.vector_norm(want.double()).item()
    error = torch.linalg.vector_norm(got.double() - want.double()).item()
    return error / size if size else float(error > 0)


def example_inputs(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs of a transformers model: ids, pixels, waves or features, as its config describes them.

    Raises:
        ValueError: the model has no config, or it takes something else.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise SmileError(f"inputs: {type(model).__name__} has no config to make them from; expected inputs={{...}}")
    generator = torch.Generator().manual_seed(seed)
    dtype, device = next((p.dtype, p.device) for p in model.parameters())
    parts = [config, *(getattr(config, name) for name in ("text_config", "vision_config") if hasattr(config, name))]

    def setting(*names: str, default: int) -> int:
        found = (getattr(part, name, None) for part in parts for name in names)
        value = next((one for one in found if one), default)
        return value[0] if isinstance(value, (list, tuple)) else value

    def ids(length: int = 8) -> Tensor:
        return torch.randint(3, min(setting("vocab_size", default=96), 1000) - 2, (2, length), generator=generator)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    bins = setting("num_mel_bins", "input_feat_per_channel", default=80)
    side, channels = setting("image_size", default=32), setting("num_channels", default=3)
    makers: dict[str, Callable[[], Tensor]] = {
        "input_ids": ids,
        "pixel_values": lambda: random(2, channels, side, side),
        "input_values": lambda: random(2, 6000),
        "input_features": lambda: random(2, bins, 2 * setting("max_source_positions", default=50)),
        "decoder_input_ids": lambda: ids(4),
    }
    parameters = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    wanted = [main] + (["decoder_input_ids"] if getattr(config, "is_encoder_decoder", False) else [])
    if "pixel_values" in parameters and "input_ids" in parameters and not hasattr(config, "image_token_id"):
        wanted += ["pixel_values"]  # a model of images and texts
    unknown = [name for name in wanted if name not in makers or name not in parameters]
    if unknown:
        raise SmileError(f"inputs: {type(model).__name__} takes {unknown[0]!r}; expected it in inputs={{...}}")
    return {name: makers[name]().to(device) for name in dict.fromkeys(wanted)}


@check_arguments
def verify_checkpoint(
    folder: str | Path,
    base: str | Path | None = None,
    experts: Sequence[str | Path] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[ExpertVerdict]:
    """`verify` for a SMILE checkpoint and the folders it was made of, each loaded as transformers does, in float32.

    Args:
        folder: the SMILE checkpoint.
        base, experts: the folders of the base and of the fine-tuned models or adapters; by default those its report
            names.
        progress: as in `verify`.

    Raises:
        ValueError: the checkpoint has no report and the folders are not given, or names no transformers architecture.
        FileNotFoundError: a folder is not there.
    """
    folder = Path(folder)
    report = UpscaleReport.load(folder / REPORT) if (folder / REPORT).is_file() else UpscaleReport([])
    base, experts = base or report.base, list(experts or report.experts)
    if not base or not experts:
        raise SmileError(f"base, expert: are not given, and {folder} has no report that names them; expected both")

    base, experts = local_folder("base", base), [local_folder(f"experts[{i}]", e) for i, e in enumerate(experts)]

    def plain(one: str | Path) -> nn.Module:
        return transformers_class(read_config(one)).from_pretrained(one, dtype=torch.float32)

    def load(expert: str | Path) -> nn.Module:
        if not is_adapter(expert):
            return plain(expert)
        import peft

        return peft.PeftModel.from_pretrained(plain(base), str(expert)).merge_and_unload()

    model = load_pretrained(folder, dtype=torch.float32)
    return verify(model, [functools.partial(load, one) for one in experts], progress=progress)
