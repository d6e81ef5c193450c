"""Compares a fused model with the fine-tuned models: one expert at a time, module by module, in float32.

With folders, one model is in memory at a time: each fine-tuned model is run and freed, then the fused model is loaded;
a fine-tuned weight is read from disk if a layer is not exact.
"""

import copy
import functools
import gc
import math
import reprlib
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..checkpoint import REPORT, load_pretrained, load_transformers, transformers_class, unwrapped
from ..config import read_config, read_smile_config
from ..errors import SmileError, check_seed, reason
from ..integrations.conversion import ModelNames
from ..integrations.peft import ModuleDelta, is_adapter, wide
from ..nn import SmileLinear, is_conv1d, routed_layers, smile_layers, whole_layers
from ..routing import RoutingPolicy
from ..routing.state import LayerPolicy
from ..routing.tokens import is_cache
from ..schema import check_arguments, check_inputs
from ..storage import read_tensors
from ..svd import without_autocast
from .files import listing
from .inputs import example_inputs
from .layers import Layer, layers_of_checkpoint, layers_of_model, model_of_checkpoint
from .report import UpscaleReport
from .sources import (
    AdapterSource,
    ExpertSource,
    StoredTensors,
    check_unquantised,
    local_folder,
    open_source,
    read_plain,
)

__all__ = ["ExpertVerdict", "verify"]

# float32 sums of D products differ by a few eps times the norms; another order of summation does not exceed this.
ROUNDING = 1e-5

_Model = nn.Module | str | Path


@dataclass(frozen=True)
class ExpertVerdict:
    """Comparison of the fused model, with one expert forced, and that fine-tuned model.

    Attributes:
        expert: number of the expert.
        verdict: "exact" (to rounding), "truncated" (within the error of its ranks) or "off".
        module: the first module that is off, in the order of the forward pass; "" if none is.
        error: ||y - y_i||_F / ||y_i||_F of the model's output y and the fine-tuned model's y_i.
        base_error: the same for the base's output; None if no base is given.
        errors: the same for each module by itself, on the fine-tuned model's input; where a SMILE layer has the
            fine-tuned weight to rounding, relative to the base's product if that is larger than the output.
        name: the expert's name, or "".
        not_run: the SMILE layers that the inputs do not reach, such as those of a tower without images: not compared.
    """

    expert: int
    verdict: str
    module: str
    error: float
    base_error: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    name: str = ""
    not_run: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        where = f", first at {self.module}" if self.module else ""
        name = f" ({self.name})" if self.name else ""
        base = "" if self.base_error is None else f", of the base's {self.base_error:.2g}"
        left = f"; not compared, since the inputs do not reach them: {len(self.not_run)} layers" if self.not_run else ""
        left += f" such as {self.not_run[0]}" if self.not_run else ""
        output = f"relative error of the output {self.error:.2g}{base}{left}"
        return f"expert {self.expert}{name}: {self.verdict}{where}; {output}"


@check_arguments
@torch.no_grad()
@without_autocast
def verify(
    model: _Model,
    base: _Model | None = None,
    finetuned: Sequence[_Model | Mapping[str, ModuleDelta]] | None = None,
    *,
    report: UpscaleReport | None = None,
    inputs: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[ExpertVerdict]:
    """Compare a SMILE model, with one expert forced at a time, with the fine-tuned models.

    Each module without submodules is run on its input in the fine-tuned model. A SMILE layer may differ by
    (W_i - W - U_i diag(s_i) V_i^T) x if that matrix is within the certificate of its truncation. Every other module
    must agree to rounding. So must the code between modules: it is checked by running the whole model with the outputs
    of the fine-tuned model's modules. A larger vocabulary is compared on the fine-tuned model's tokens. Where the SMILE
    model is stored in a lower precision, the other models' tensors are rounded to it first.

    Args:
        model: the SMILE model or its checkpoint; it is run in evaluation mode and in float32 (float64 if it is).
        base: the base model or its folder; required if an expert is an adapter. By default the folder in the
            checkpoint's report.
        finetuned: the N fine-tuned models, adapters or folders, in the order of the experts; by default the folders in
            the checkpoint's report. Folders are loaded by transformers, one at a time.
        report: the report of `upscale`, with the certificates; by default the checkpoint's. Without a report,
            truncations are checked against the singular values of W_i - W.
        inputs: keyword arguments of forward; by default random inputs of the architecture.
        seed: seed of the random inputs and of random operations in forward.
        progress: called with the number of finished runs and the number of runs: one of each fine-tuned model, and one
            of the fused model per expert.

    Returns:
        One verdict per expert.

    Raises:
        ValueError: no SMILE layer in the model, a number of models other than N, unknown inputs, or a folder
            with an architecture that transformers does not support.
        FileNotFoundError: a folder does not exist.
    """
    check_seed(seed)
    _check_inputs(inputs)
    count = _count_experts(model)
    files = None if isinstance(model, nn.Module) else listing(Path(model))
    if not isinstance(model, nn.Module):
        stored = Path(model) / REPORT
        report = report or (UpscaleReport.load(stored) if stored.is_file() else None)
        base = ((report and report.base) or None) if base is None else base
        finetuned = ((report and report.experts) or None) if finetuned is None else finetuned
        if finetuned is None:
            raise SmileError(
                f"finetuned: is not given, and {model} has no report with its folder; expected the folders"
            )
    elif finetuned is None:
        raise SmileError("finetuned: is not given; expected the fine-tuned models of this model")
    if len(finetuned) != count:
        raise SmileError(f"finetuned: has {len(finetuned)} models; expected {count}, one for each expert")
    certified = {layer.name: layer.error for layer in report.layers if not layer.skipped} if report else {}
    if odd := next((name for name, errors in certified.items() if len(errors) != count), None):
        raise SmileError(f"report: has {len(certified[odd])} errors of {odd}; expected {count}, one for each expert")
    base, dtypes, kind = _local("base", base), _stored_dtypes(model), _kind(model)
    experts = [_Expert(_local(f"experts[{i}]", expert), base, dtypes) for i, expert in enumerate(finetuned)]
    for name, place in {"base": base, **{f"experts[{i}]": expert.given for i, expert in enumerate(experts)}}.items():
        if kind and (other := _kind(place)) and other != kind:
            raise SmileError(f"{name}: is a {other}; expected a {kind} as the model")
        _check_plain(name, place)
    records, plain, weights = [], None, {}
    if base is not None:
        start = _load(base, dtypes)
        with _naming(inputs):
            inputs = example_inputs(start, seed) if inputs is None else inputs
            plain = _run(start, inputs, seed)
        weights = {
            name: _digest(one) for name, one in start.named_modules() if isinstance(one, nn.Linear) or is_conv1d(one)
        }
        del start
    for i, expert in enumerate(experts):
        progress(i, 2 * count)
        with _naming(inputs if base is None else None):
            records.append(_record(expert.load(), inputs, seed))
        gc.collect()
    fused = _load(model, dtypes)
    if not isinstance(model, nn.Module) and listing(Path(model)) != files:
        raise SmileError(f"{model}: was changed while it was read; expected files that do not change")
    layers = smile_layers(fused)
    if odd := next((name for name in layers if name in weights and _digest(layers[name]) != weights[name]), None):
        warnings.warn(f"base: its {odd}.weight is not the fused model's; expected the model's own base", stacklevel=3)
    verdicts = []
    for i, (expert, record) in enumerate(zip(experts, records)):
        progress(count + i, 2 * count)
        with _evaluating(fused), _unrouted(layers.values()), _forced(layers, i):
            verdict, module, errors = _compare(fused, i, record, _Expected(expert.weight, certified, dtypes), seed)
            error = _relative(_run(fused, record.inputs, seed), record.output)
        far = None if plain is None else _relative(plain, record.output)
        names, not_run = next(iter(layers.values())).expert_names, [name for name in layers if name not in errors]
        verdicts.append(ExpertVerdict(i, verdict, module, error, far, errors, names[i] if names else "", not_run))
    progress(2 * count, 2 * count)
    return verdicts


_Dtypes = Mapping[str, torch.dtype]  # of the fused model's tensors, by their names in the model


class _Rounded(Mapping[str, Tensor]):
    """Tensors as the fused model stores them: rounded to its dtypes, and in float32 or float64 again."""

    def __init__(self, tensors: Mapping[str, Tensor], dtypes: _Dtypes):
        self.tensors, self.dtypes = tensors, dtypes

    def __getitem__(self, name: str) -> Tensor:
        return _rounded(self.tensors[name], self.dtypes.get(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def _rounded(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return wide(tensor.to(dtype) if dtype is not None and _is_rounded(tensor.dtype, dtype) else tensor)


def _is_rounded(given: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether a tensor that was given in one dtype is stored in another one, of less than 32 bits."""
    return dtype != given and dtype.is_floating_point and dtype.itemsize < 4


class _Expert:
    """One fine-tuned model, which is loaded once, and its weights, which are read one at a time."""

    def __init__(self, given: Any, base: Any, dtypes: _Dtypes):
        self.given, self.base, self.dtypes = given, base, dtypes
        self.whole = isinstance(given, nn.Module) or (isinstance(given, Path) and not is_adapter(given))
        if not self.whole and (base is None or not isinstance(given, (Path, Mapping))):
            shown = str(given) if isinstance(given, Path) else reprlib.repr(given)
            raise SmileError(f"base: is {base!r}; expected the base model of the adapter {shown}")
        if isinstance(given, Mapping) and not isinstance(base, nn.Module):
            raise SmileError(f"base: is {base!r}; expected the base as a module, for adapters in memory")

    def load(self) -> nn.Module:
        """The model; that of an adapter is a copy of the base with the adapter's changes."""
        if self.whole:
            return _load(self.given, self.dtypes)
        tuned = _load(self.base, self.dtypes)
        tuned = tuned if isinstance(self.base, Path) else copy.deepcopy(tuned)
        for name in self.source.may_change:
            module, _, part = name.rpartition(".")
            tensor = self.source.tensor(name)
            if tensor is not None:  # a separate parameter, even if it was tied
                owner: Any = tuned.get_submodule(module)
                old = owner.weight if getattr(owner, part) is None else getattr(owner, part)  # a bias it had not
                setattr(owner, part, nn.Parameter(tensor.detach().clone().to(old.dtype)))
        return tuned

    @functools.cached_property
    def opened(self) -> tuple[ExpertSource, Mapping[str, Layer], Mapping[str, Tensor]]:
        """Its tensors by the names of the model's, the linear layers, and the base's tensors."""
        if isinstance(self.base, nn.Module):
            tensors: Mapping[str, Tensor] = self.base.state_dict(keep_vars=True)
            layers, names = layers_of_model(self.base), ModelNames(self.base)
        else:
            folder = self.base or self.given
            names = ModelNames(model_of_checkpoint(folder))
            by_name, origins = names.map(read_plain("base", folder))
            tensors, layers = StoredTensors(by_name), layers_of_checkpoint(folder, by_name, origins, names)
        rounded = _Rounded(tensors, self.dtypes)
        if isinstance(self.given, Path):
            return open_source("experts", self.given, rounded, layers, names), layers, tensors
        return AdapterSource("experts", self.given, rounded, layers), layers, tensors

    @property
    def source(self) -> ExpertSource:
        return self.opened[0]

    def weight(self, name: str) -> tuple[Tensor, bool]:
        """A layer's weight [O, D], and whether the fused model has the base's rounded."""
        if isinstance(self.given, nn.Module):
            module: Any = unwrapped(self.given).get_submodule(name)
            weight, transposed, plain = module.weight, is_conv1d(module), module.weight
        else:
            source, layers, tensors = self.opened
            transposed, plain = layers[name].fan_in_fan_out, tensors[layers[name].weight]
            tensor = source.tensor(layers[name].weight)
            assert tensor is not None
            weight = tensor
        rounded = _is_rounded(plain.dtype, self.dtypes.get(f"{name}.weight", plain.dtype))
        return weight.detach().T if transposed else weight.detach(), rounded


def _count_experts(model: _Model) -> int:
    if not isinstance(model, nn.Module):
        config = read_smile_config(model)
        if config.base:
            raise SmileError(f"model: {model} has a base that is stored quantised; expected one of plain weights")
        return config.num_local_experts
    return next(iter(whole_layers(model).values())).num_local_experts


def _local(argument: str, place: Any) -> Any:
    """A given model, or the folder of a checkpoint."""
    if not isinstance(place, (str, Path)):
        return place
    folder = local_folder(argument, place)
    if not folder.is_dir():
        raise FileNotFoundError(f"{argument}: {place}: no such folder; expected a checkpoint")
    return folder


def _check_plain(argument: str, place: Any) -> None:
    """Raise ValueError if the base or a fine-tuned model has SMILE layers, or is stored quantised."""
    if isinstance(place, Path) and not is_adapter(place):
        read_plain(argument, place)
    elif isinstance(place, nn.Module):
        if layers := routed_layers(unwrapped(place)):
            raise SmileError(f"{argument}: has a SMILE layer, {next(iter(layers))}; expected a model of plain layers")
        check_unquantised(argument, place)


def _kind(place: Any) -> Any:
    """The model_type of a model or a checkpoint of transformers; None of others."""
    if isinstance(place, (str, Path)):
        return str(read_config(place).get("model_type") or "").removeprefix("smile_")
    return getattr(getattr(place, "config", None), "model_type", None)


def _stored_dtypes(model: _Model) -> _Dtypes:
    """The dtypes of a fused model's tensors as they are stored, by their names in the model."""
    if isinstance(model, nn.Module):
        return {
            name: tensor.dtype for name, tensor in unwrapped(model).state_dict().items() if isinstance(tensor, Tensor)
        }
    stored, base = read_tensors(model), read_smile_config(model).base_model_name_or_path
    factors = [t for name, t in stored.items() if name.endswith(".u") and f"{name[:-1]}vh" in stored]
    if odd := next((t for t in factors if not t.dtype.is_floating_point), None):
        raise SmileError(f"{model}: tensor {odd.name!r} is {odd.dtype}; expected floating point")
    names = ModelNames(model_of_checkpoint(Path(model)))
    whole = {} if base is None else read_plain("base_model_name_or_path", base)
    return {name: tensor.dtype for name, tensor in names.map({**whole, **stored})[0].items()}


def _load(place: _Model, dtypes: _Dtypes) -> nn.Module:
    """A model in float32, or float64 if it is, its tensors rounded to `dtypes`; folders as transformers loads them."""
    if isinstance(place, nn.Module):
        model = unwrapped(place)
        state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
        if name := next((name for name, tensor in state.items() if tensor.is_meta), None):
            raise SmileError(f"{type(model).__name__}: {name} is on the meta device; expected a model with its data")
        sizes = [p.dtype.itemsize for p in model.parameters() if p.is_floating_point()]
        if min(sizes, default=4) >= 4 and not any(
            _is_rounded(t.dtype, dtypes.get(name, t.dtype)) for name, t in state.items() if t.is_floating_point()
        ):
            return model
        model = copy.deepcopy(model)
        wanted = torch.float64 if max(sizes, default=4) > 4 else torch.float32
    else:
        config, wanted = read_config(place), torch.float32
        if config.get("quantization_config"):
            return load_pretrained(place, dtype=wanted)
        model = load_transformers(transformers_class(config), place, {"dtype": wanted})
    tensors = {id(t): (name, t) for name, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    for name, tensor in tensors.values():
        if tensor.is_floating_point():
            tensor.data = _rounded(tensor.data, dtypes.get(name))
    return model.to(wanted)


@dataclass
class _Call:
    """One call of a module without submodules."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None


@dataclass
class _Record:
    """A forward pass of a fine-tuned model.

    Attributes:
        inputs: arguments of forward.
        calls: calls of modules without submodules, in order.
        outputs: (name, output) of every other module, in the order in which they return.
        output: of the model.
    """

    inputs: Mapping[str, Tensor]
    calls: list[_Call]
    outputs: list[tuple[str, Tensor | None]]
    output: Tensor


def _record(model: nn.Module, inputs: Mapping[str, Tensor] | None, seed: int) -> _Record:
    """Record one forward pass. Inputs and outputs of modules are copied, since code may change them in place."""
    inputs = example_inputs(model, seed) if inputs is None else dict(inputs)
    calls: list[_Call] = []
    open_calls: list[_Call] = []
    outputs: list[tuple[str, Tensor | None]] = []
    computed: set[str] = set()  # modules with parameters of other modules

    def enter(name: str, args: Any, kwargs: Any) -> None:
        if any(isinstance(one, nn.Parameter) for one in tree_leaves((args, kwargs))):
            computed.add(name)
        open_calls.append(_Call(name, *_copied((args, kwargs))))

    def leave(output: Any) -> None:
        call = open_calls.pop()
        call.output = _copied(output)
        calls.append(call)

    leaves = _leaves(model)
    handles = []
    for name, module in model.named_modules():
        if name in leaves:
            handles += [
                module.register_forward_pre_hook(lambda _, a, k, name=name: enter(name, a, k), with_kwargs=True),
                module.register_forward_hook(lambda _, args, output: leave(output)),
            ]
        elif name and ".parametrizations" not in name:
            handles.append(
                module.register_forward_hook(
                    lambda _, args, output, name=name: outputs.append((name, _copied(_first_of(output))))
                )
            )
    with _removing(handles), _evaluating(model):
        output = _run(model, inputs, seed)
    return _Record(inputs, [call for call in calls if call.name not in computed], outputs, output)


@dataclass(frozen=True)
class _Expected:
    """The allowed difference of a SMILE layer from a fine-tuned layer.

    Attributes:
        weight_of: the fine-tuned weight of a layer [O, D], and whether the base's was rounded to its dtype.
        certified: per layer, the error of each expert's factors; empty if there is no report.
        dtypes: of the fused model's tensors.
    """

    weight_of: Callable[[str], tuple[Tensor, bool]]
    certified: Mapping[str, Sequence[float]]
    dtypes: _Dtypes

    def _eps(self, name: str) -> float:
        return torch.finfo(self.dtypes.get(name, torch.float32)).eps

    def rest(self, layer: SmileLinear, i: int, name: str) -> tuple[Tensor, str, float]:
        """W_i - W - U_i diag(s_i) V_i^T; whether it is rounding, or the error of the best factors of this rank.

        And the relative error by the rounding of the factors.
        """
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        u, s, vh = (getattr(layer, part)[i].to(dtype) for part in ("u", "s", "vh"))
        vh = vh[: layer.rank_of_expert]
        given, rounded = self.weight_of(name)
        weight = given.to(u)
        rows = min(len(weight), len(layer.weight))  # a larger vocabulary has more
        base = layer.weight[:rows].to(dtype)
        change = weight[:rows] - base
        rest = change - (u[:rows] * s) @ vh
        size, left = torch.linalg.vector_norm(change), torch.linalg.vector_norm(rest)
        # Then W was rounded after the factors were computed.
        coarse = self._eps(f"{name}.weight") if rounded else 0.0
        slack = coarse * max(torch.linalg.vector_norm(weight), torch.linalg.vector_norm(base))
        floor = ROUNDING + 4 * max(coarse, *(self._eps(f"{name}.{part}") for part in ("u", "s", "vh")))
        if left <= floor * size + slack:
            return rest, "exact", floor
        certified = self.certified.get(name)
        if certified is None:
            least = torch.linalg.vector_norm(torch.linalg.svdvals(change)[layer.rank_of_expert :])
        else:
            least = certified[i] * size
        inside = torch.linalg.vector_norm(u[:rows].T @ rest @ vh.T)
        best = left <= (1 + 1e-3) * least + floor * size + slack
        best = best and bool(inside <= floor * torch.linalg.vector_norm(s) + slack)
        return rest, "truncated" if best else "off", floor


def _unexplained(rest: Tensor, layer: SmileLinear, x: Tensor, got: Tensor, want: Tensor) -> float:
    """The error of an output that the error of the weight does not explain, relative to the output, or to W x.

    W x may be larger: W_i x is zero where W_i is, and the sum of W x and the expert's part is then rounding.
    """
    got, x, want = got[..., : want.shape[-1]].to(rest), x.to(rest), want.to(rest)
    base = x @ layer.weight.to(rest).T
    size = max(torch.linalg.vector_norm(want).item(), torch.linalg.vector_norm(base).item())
    error = torch.linalg.vector_norm(want - got - x @ rest.T).item()
    return error / size if size else float(error > 0)


def _compare(
    model: nn.Module,
    expert: int,
    record: _Record,
    expected: _Expected,
    seed: int,
) -> tuple[str, str, dict[str, float]]:
    """The verdict, the first module that is off, and the error of each module by itself."""
    leaves, errors = _leaves(model), dict[str, float]()
    first, truncated = "", False
    rests: dict[str, tuple[Tensor, str, float]] = {}
    for call in record.calls:
        module = leaves.get(call.name)
        if module is None:
            first = first or call.name
            errors[call.name] = math.inf
            continue
        torch.manual_seed(seed)
        got, want = _first_of(module(*call.args, **call.kwargs)), _first_of(call.output)
        if got is None or want is None:
            continue
        error = _relative(got, want)
        accepted = error <= ROUNDING
        if not accepted and isinstance(module, SmileLinear) and error < math.inf:
            rest, verdict, floor = rests.get(call.name) or expected.rest(module, expert, call.name)
            rests[call.name] = rest, verdict, floor
            left = _unexplained(rest, module, call.args[0], got, want)
            accepted = verdict != "off" and left <= floor
            truncated = truncated or (accepted and verdict == "truncated")
            error = left if accepted and verdict == "exact" else error
        errors[call.name] = max(errors.get(call.name, 0.0), error)
        first = first if accepted else first or call.name
    first = first or _first_difference(model, record, seed)
    return "off" if first else "truncated" if truncated else "exact", first, errors


def _first_difference(model: nn.Module, record: _Record, seed: int) -> str:
    """The first module that differs if modules without submodules return the fine-tuned model's outputs.

    Only the code between them can differ then: their inputs, and the outputs of other modules.
    """
    calls: dict[str, list[_Call]] = {}
    for call in record.calls:
        calls.setdefault(call.name, []).append(call)
    outputs: dict[str, list[Tensor | None]] = {}
    for name, output in record.outputs:
        outputs.setdefault(name, []).append(output)
    off: list[str] = []

    def compare(name: str, got: Sequence[Any], want: Sequence[Any]) -> None:
        pairs = [(a, b) for a, b in zip(got, want) if isinstance(a, Tensor) and isinstance(b, Tensor)]
        if any(_relative(a, b) > ROUNDING for a, b in pairs if b.is_floating_point()):
            off.append(name)

    def given(name: str, args: Any, output: Any) -> Any:
        if not calls.get(name):
            return output
        call = calls[name].pop(0)
        compare(f"{name} (its input)", args, call.args)
        return _copied(call.output)

    def seen(name: str, output: Any) -> None:
        want, outputs[name] = outputs[name][:1], outputs[name][1:]
        compare(name, [_first_of(output)], want)

    leaves, handles = _leaves(model), []
    for name, module in model.named_modules():
        if name in leaves:
            handles.append(module.register_forward_hook(lambda _, args, out, name=name: given(name, args, out)))
        elif name in outputs:
            handles.append(module.register_forward_hook(lambda _, args, out, name=name: seen(name, out)))
    with _removing(handles):
        compare(
            f"{type(model).__name__}.forward, behind its modules", [_run(model, record.inputs, seed)], [record.output]
        )
    return off[0] if off else ""


def _run(model: nn.Module, inputs: Mapping[str, Tensor], seed: int) -> Tensor:
    """The first floating-point tensor that the model gives in evaluation mode."""
    check_inputs(model, inputs)
    with _evaluating(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        output = model(**inputs)
    tensor = _first_of(output)
    if tensor is None:
        raise SmileError(f"model: returns a {type(output).__name__} with no floating-point tensor; expected one")
    return tensor


@contextmanager
def _naming(inputs: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Name the inputs, given or random ones, where a model fails on them first."""
    try:
        yield
    except SmileError:
        raise
    except Exception as error:
        if inputs is None:
            raise SmileError(
                f"inputs: random ones: the model fails on them ({reason(error)}); expected inputs"
            ) from error
        shapes = ", ".join(f"{name} {t.dtype} {list(t.shape)}" for name, t in inputs.items())
        raise SmileError(f"inputs: {shapes}: the model fails on them ({reason(error)})") from error


def _check_inputs(inputs: Mapping[str, Tensor] | None) -> None:
    for name, tensor in (inputs or {}).items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.is_meta:
            shown = f"{tensor.dtype} on meta" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
            raise SmileError(f"inputs[{name!r}]: is {shown}; expected tensors by the names of forward's arguments")


@contextmanager
def _removing(handles: Sequence[Any]) -> Iterator[None]:
    try:
        yield
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

    with _removing([layer.register_forward_pre_hook(force, with_kwargs=True) for layer in layers.values()]):
        yield


@contextmanager
def _unrouted(layers: Iterable[SmileLinear]) -> Iterator[None]:
    """No routing policy: forced experts need none, and scope "prompt" would run layers that are replaced here."""
    roots = {policy.root for layer in layers if isinstance(policy := layer.router_policy, LayerPolicy)}
    plans = [(root, root.plan) for root in roots]
    try:
        for root in roots:
            root.follow(RoutingPolicy())
        yield
    finally:
        for root, plan in plans:
            root.plan = plan


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
    """The modules without submodules; one whose weight is computed by submodules counts as such."""
    return {
        name: module
        for name, module in model.named_modules()
        if name
        and ".parametrizations" not in name
        and all(child == "parametrizations" for child, _ in module.named_children())
    }


def _copied(values: Any) -> Any:
    def copied(one: Any) -> Any:
        if isinstance(one, Tensor):
            return one.detach().clone()
        return copy.deepcopy(one) if is_cache(one) else one  # which later modules fill

    return tree_map(copied, values)


def _first_of(output: Any) -> Tensor | None:
    """The first floating-point tensor of an output; None where it has none."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    values = output.values() if isinstance(output, Mapping) else output
    for value in values if isinstance(output, (Mapping, list, tuple)) else ():
        if (found := _first_of(value)) is not None and found.dim():
            return found
    return None


def _digest(layer: Any) -> int:
    """Of a linear layer's weight [O, D]."""
    weight = layer.weight.detach().T if is_conv1d(layer) else layer.weight.detach()
    return zlib.crc32(weight.double().cpu().contiguous().numpy())


def _relative(got: Tensor, want: Tensor) -> float:
    """||got - want||_F / ||want||_F, over the tokens that both have where the last dimension is a vocabulary."""
    if got.shape[:-1] == want.shape[:-1] and got.shape[-1:] > want.shape[-1:]:
        got = got[..., : want.shape[-1]]
    if got.shape != want.shape:
        return math.inf
    size = torch.linalg.vector_norm(want.double()).item()
    error = torch.linalg.vector_norm(got.double() - want.double()).item()
    return error / size if size else float(error > 0)
