"""SMILE checkpoints: the base checkpoint plus `vh`, `s`, `u`, `expert_bias` and `router` for each converted weight.

`quantization_config` in `config.json`, which transformers and vLLM read, lists the converted layers. A checkpoint is
complete, or contains only the experts and the path of its base.
"""

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import (
    FACTORS,
    SmileConfig,
    config_of_checkpoint,
    read_config,
    read_smile_config,
    settings_of,
    write_config,
)
from .errors import SmileError, check_seed, naming, reason
from .guard import guard_weights
from .integrations import describe_as_smile
from .integrations.conversion import ModelNames
from .integrations.fusion_bench import convert_state_dict, holds_fusion_bench_layers
from .nn import (
    SmileLinear,
    all_or_nothing,
    is_conv1d,
    replace_linears,
    routed_layers,
    smile_layers,
    whole_layers,
    why_not_linear,
)
from .publishing import MANIFEST, check_folder, is_utf8, missing_files, output_folder, paths, restore, write_text
from .routing import (
    CalibrationReport,
    RoutingPolicy,
    calibrate,
    check_kept,
    check_routing,
    get_routing,
    set_routing,
    user_turn_ids,
)
from .schema import check_arguments
from .storage import (
    NO_WEIGHTS,
    StoredTensor,
    add_tensors,
    check_sizes,
    errors_of_system,
    parse_size,
    read_tensors,
    weights_fingerprint,
    write_tensors,
)

__all__ = ["calibrate_checkpoint", "load_pretrained", "save_pretrained"]

REPORT = "smile_report.json"  # the result for each layer of an upscaled checkpoint


@check_arguments
def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    base: str | Path | None = None,
    max_shard_size: int | str = "5GB",
    force: bool = False,
) -> None:
    """Save a model with SmileLinear layers: safetensors, config.json and a model card.

    A transformers model is saved by its own save_pretrained; its config gets the SMILE settings.

    Args:
        model: any module with SmileLinear layers, for example from `upscale`.
        folder: new or empty; it is created atomically.
        base: folder of the base checkpoint; if given, only the experts and this path are stored. The model's other
            tensors are compared with it.
        max_shard_size: maximum size of a file.
        force: replace a folder that smile-kernels wrote.

    Raises:
        ValueError: no SmileLinear in the model, a layer under a name that no model has when it is loaded, as with
            adapters of PEFT, a tensor without data, a factor with NaN or inf, a folder that is, contains or is
            inside `base`, or a `base` with other tensors or settings than the model's.
        FileNotFoundError: `base` does not exist, or has no weights.
        FileExistsError: the folder contains files that may not be replaced, or another process is writing it.
        OSError: the disk is full.
    """
    routing = get_routing(model)
    model = _savable(model)
    config = replace(SmileConfig.from_layers(whole_layers(model)), routing=routing)
    if base is not None:
        if not str(base).strip() or "\0" in str(base) or not is_utf8(base):
            raise SmileError(f"base: is {str(base)!r}; expected the path of the base checkpoint, in UTF-8")
        if os.path.exists(base) and not os.path.isdir(base):
            raise SmileError(f"base: {base} is not a folder; expected the base checkpoint")
        _check_base(model, Path(base))
        _check_settings(f"base: {base}", config_of_checkpoint(base, model), getattr(model, "config", None))
        config = config.of_experts(base)
    target = check_folder(folder, inputs={"base": base} if base is not None else None)
    parse_size(max_shard_size)
    with output_folder(target, {}, force=force) as output:
        try:
            _write_checkpoint(model, output.output, config, max_shard_size)
        except BaseException:
            output.discard()
            raise
        output.publish()


def unwrapped(model: Any) -> nn.Module:
    """A model without torch.compile's and DistributedDataParallel's wrappers."""
    model = getattr(model, "_orig_mod", model)
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _savable(model: nn.Module) -> nn.Module:
    """The model without wrappers; raises if one inside it changes the names of the tensors, or what is saved."""
    model = unwrapped(model)
    for name, module in model.named_modules():
        kind = type(module)
        if any(cls.__module__.startswith("peft.") for cls in kind.__mro__):
            raise SmileError(
                f"model: {name or 'it'} is a {kind.__name__} of PEFT, with tensors under other names; expected the "
                "result of its merge_and_unload()"
            )
        if "_orig_mod" in module._modules:
            raise SmileError(f"model: {name or 'it'} is compiled; expected it before torch.compile")
    state = model.state_dict()
    for name, layer in smile_layers(model).items():
        expected = {part for part in ("weight", "bias", *FACTORS) if getattr(layer, part) is not None}
        names = {f"{name}.{part}".removeprefix("."): part for part in expected | set(layer.state_dict())}
        for place, part in names.items():
            if part not in expected or place not in state:
                raise SmileError(
                    f"model: {place} is {'not in' if part in expected else 'in'} its state dict; expected the tensors "
                    f"of a SmileLinear, {', '.join(sorted(expected))}"
                )
    return model


def _check_base(model: Any, folder: Path) -> None:
    """Raise ValueError unless a checkpoint has the tensors of `model`, up to the dtype, except for its experts'."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"base: {folder}: no such folder; expected the base checkpoint")
    where, expected = f"base: {folder}", "the checkpoint that the model was upscaled from (None stores it, too)"
    config = read_config(folder)
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise SmileError(f"{where} is stored as {method!r}; expected a checkpoint of plain weights")
    ours, theirs = getattr(getattr(model, "config", None), "model_type", None), config.get("model_type")
    if ours and theirs and ours != theirs:
        raise SmileError(f"{where} is a {theirs} and the model a {ours}; expected {expected}")
    names = ModelNames(model)
    stored, _ = names.map(read_tensors(folder))
    layers = smile_layers(model)
    factors = {f"{name}.{part}".removeprefix(".") for name in layers for part in FACTORS}
    weights = {f"{name}.weight".removeprefix(".") for name in layers}
    own = {name: tensor for name, tensor in names.state.items() if name not in factors and isinstance(tensor, Tensor)}
    optional = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    for name, tensor in own.items():
        if name not in stored:
            if isinstance(tensor, nn.Parameter) and not any(re.search(pattern, name) for pattern in optional):
                raise SmileError(f"{where} has no tensor {name!r}, and the model has; expected {expected}")
        elif stored[name].shape not in (tensor.shape, tensor.shape[::-1] if name in weights else tensor.shape):
            shapes = f"{list(stored[name].shape)}, and {list(tensor.shape)} in the model"
            raise SmileError(f"{where}: tensor {name!r} has shape {shapes}; expected {expected}")
    compared = set()
    for name, tensor in own.items():
        pair = id(tensor), id(stored.get(name))
        if name not in stored or pair in compared:
            continue
        compared.add(pair)
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
            found = "on the meta device" if tensor.is_meta else f"a {type(tensor).__name__}"
            raise SmileError(f"model: {name} is {found}; expected its numbers, to compare them with the base's")
        value = stored[name].load().to(tensor.device, tensor.dtype)
        versions = [value, value.T] if name in weights else [value]  # the layer was a Conv1D
        if not any(torch.equal(one, tensor.detach()) for one in versions):
            raise SmileError(f"{where}: tensor {name!r} differs from the model's; expected {expected}")


def _check_settings(where: str, base: Any, own: Any) -> None:
    """Raise ValueError if a pass of the base depends on another setting than the config of the experts has.

    Generation alone reads most ids of tokens; positions may depend on that of padding, and a decoder begins with its
    own.
    """
    if not (hasattr(base, "to_dict") and hasattr(own, "to_dict")):
        return
    theirs, ours = settings_of(base), settings_of(own)
    for name in sorted(ours.keys() | theirs):
        last = name.rpartition(".")[2]
        free = last == "id2label" or last.endswith("_token_id")
        if last in ("pad_token_id", "decoder_start_token_id"):
            free = None in (ours.get(name), theirs.get(name))
        if ours.get(name) != theirs.get(name) and not free:
            raise SmileError(
                f"{where}: its config has {name} {theirs.get(name)!r}, and that of the experts {ours.get(name)!r}; "
                "expected the same"
            )


def _write_checkpoint(model: Any, folder: Path, config: SmileConfig, max_shard_size: int | str) -> None:
    whole = config.base_model_name_or_path is None
    if whole and hasattr(model, "save_pretrained"):
        _check_loadable(model, config)
        try:
            with errors_of_system(folder):
                model.save_pretrained(folder, max_shard_size=max_shard_size)
        except SmileError:
            raise
        except ValueError as error:  # such as a generation config of which it would only warn elsewhere
            raise SmileError(f"model: transformers cannot save it ({reason(error)}); expected what it can") from error
        if sum(name.endswith(".vh") for name in read_tensors(folder)) < len(config.modules):
            raise SmileError(f"model: the save_pretrained of {type(model).__name__} writes no experts; expected all")
        write_config(folder, read_config(folder), config)
    else:
        names = _untied(model) if whole else _factor_names(config)
        state = model.state_dict()
        tensors = [StoredTensor.of(name, state[name]) for name in names if name in state]
        write_tensors(folder, tensors, stem="model" if whole else "experts", max_shard_size=max_shard_size)
        model_config = model.config.to_dict() if hasattr(model, "save_pretrained") else {}
        if model_config and not model_config.get("architectures"):  # never saved by transformers
            model_config["architectures"] = [type(model).__name__]
        write_config(folder, model_config, config)
    write_text(folder / "README.md", model_card(config))


def _check_loadable(model: Any, config: SmileConfig) -> None:
    """Raise ValueError if transformers has no data to save, or would save factors that it refuses to load."""
    offloaded = {"cpu", "disk"} & set(map(str, getattr(model, "hf_device_map", {}).values()))  # it reads them back
    factors = set(_factor_names(config))
    for name, tensor in model.state_dict().items():
        if type(tensor) is Tensor and tensor.is_meta and not offloaded:
            raise SmileError(f"model: {name} is on the meta device; expected its data")
        if type(tensor) is Tensor and name in factors and not tensor.is_meta and not tensor.isfinite().all():
            raise SmileError(f"model: {name} contains NaN or inf; expected finite numbers")


@check_arguments
def load_pretrained(folder: str | Path, model: nn.Module | None = None, **from_pretrained: Any) -> nn.Module:
    """Load a SMILE checkpoint written by `save_pretrained`, `smile-kernels upscale` or fusion_bench.

    Args:
        folder: the checkpoint.
        model: a module with the base model's architecture. Its linear layers are replaced in place and its parameters
            are overwritten, keeping their dtype; for a checkpoint with only the experts it must contain the base's
            parameters. It is unchanged after an error, but an interruption while values are copied leaves some of them
            overwritten, as in PyTorch's load_state_dict. By default the transformers architecture named in config.json.
        **from_pretrained: arguments of transformers' from_pretrained if `model` is not given: dtype, device_map, ...

    Returns:
        The model; in evaluation mode if it was built by transformers.

    Raises:
        ValueError: not a SMILE checkpoint; missing tensors, wrong shapes, or NaN in the tensors of the experts; with
            `model` also unexpected tensors, and NaN in any tensor; a base whose weights or settings have changed.
        FileNotFoundError: the folder, its weights or the base of an experts-only checkpoint does not exist.
    """
    stored, config = read_tensors(folder), read_config(folder)
    if "quantization_config" in config:
        smile = read_smile_config(folder)
        if model is not None and smile.base is not None:
            raise SmileError(
                f"{folder}: its base is stored as {smile.base.get('quant_method')!r}, which no given model can hold; "
                "expected None as `model`, to build it with transformers"
            )
        if model is None and smile.base_model_name_or_path is None:
            return load_transformers(transformers_class(config), folder, from_pretrained)
        tensors = {name: tensor.load() for name, tensor in stored.items()}
    else:
        if not holds_fusion_bench_layers(stored):
            raise SmileError(f"{folder}: is not a SMILE checkpoint; expected quantization_config in its config.json")
        tensors, smile = convert_state_dict(
            {name: tensor.load() for name, tensor in stored.items()},
            num_experts_per_tok=config.get("num_experts_per_tok", 1),
        )
    if model is None:
        model = _base_model(Path(folder), smile, from_pretrained)
    if smile.base_model_name_or_path is not None:
        stored_as = _names_of_layers(model, smile)
        places = {f"{name}.{part}": f"{own}.{part}" for name, own in stored_as.items() for part in FACTORS}
        tensors = {places.get(name, name): tensor for name, tensor in tensors.items()}
        smile = replace(smile, modules={stored_as[name]: entry for name, entry in smile.modules.items()})
    _attach(model, smile, tensors)
    return model


@check_arguments
def calibrate_checkpoint(
    folder: str | Path, *, routing: RoutingPolicy | None = None, seed: int = 0, **from_pretrained: Any
) -> CalibrationReport:
    """Calibrate a SMILE checkpoint on disk (see `calibrate`) and store the `router_prior` of each layer in it.

    The folder is replaced atomically; its other tensors and files do not change.

    Args:
        folder: a checkpoint written by smile-kernels.
        routing: the policy to store; by default `RoutingPolicy.recommended`, with evidence from the last user turn on
            if the tokenizer in the folder has a chat template.
        seed: as in `calibrate`.
        **from_pretrained: arguments of transformers' from_pretrained, such as device_map.

    Raises:
        ValueError: not a SMILE checkpoint, or a model that does not support `calibrate` or the policy.
        FileExistsError: the folder contains a file not written by smile-kernels, or another process is writing it.
    """
    source = Path(folder)
    check_seed(seed)
    target = check_folder(source)
    restore(target)
    if missing := missing_files(target):
        raise FileNotFoundError(
            f"{source / missing[0]}: no such file; expected it, since the folder's manifest lists it"
        )
    config = read_smile_config(source)
    if routing is not None:
        check_kept(routing, config.num_experts_per_tok)
    with output_folder(target, {}, force=True) as output:
        try:
            for file in paths(source):
                if file.is_file() and file.name != MANIFEST:
                    target = output.output / file.relative_to(source)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with naming(target):
                        shutil.copyfile(file, target)
            report = add_calibration(output.output, routing, seed, source, **from_pretrained)
        except BaseException:
            output.discard()
            raise
        output.publish()
    return report


def add_calibration(
    folder: Path, routing: RoutingPolicy | None, seed: int, source: Path | None = None, **from_pretrained: Any
) -> CalibrationReport:
    """Add `router_prior` and the policy to a checkpoint folder that is still being written.

    The model is that of `source`, which errors name, if the folder is a copy of it.
    """
    source = source or folder
    config = read_smile_config(source)
    model = load_pretrained(source, **from_pretrained)
    report = calibrate(model, seed=seed)
    if routing is None:
        routing = RoutingPolicy.recommended(model)
        if routing.scope == "prompt":
            routing = replace(routing, restart_at=turn_ids_of_checkpoint(source))
    set_routing(model, routing)
    layers, stored = routed_layers(model), _names_of_layers(model, config)
    if missing := [name for name, own in stored.items() if own not in layers]:
        raise SmileError(
            f"{source}: {missing[0]} is not the name of a SMILE layer of {type(model).__name__}; expected one"
        )
    priors = [
        StoredTensor.of(f"{name}.router_prior", prior)
        for name, own in stored.items()
        if (prior := layers[own].router_prior) is not None
    ]
    add_tensors(folder, priors, file="router_prior.safetensors")
    modules = {name: replace(module, router_prior=True) for name, module in config.modules.items()}
    write_config(folder, read_config(folder), replace(config, modules=modules, routing=get_routing(model)))
    return report


def _names_of_layers(model: nn.Module, config: SmileConfig) -> dict[str, str]:
    """The names of SMILE layers as they are stored -> those in the model, which versions of transformers rename."""
    names = ModelNames(model)
    return {
        name: (names.parameter(f"{name}.weight") or f"{name}.weight").removesuffix(".weight") for name in config.modules
    }


def turn_ids_of_checkpoint(folder: Path) -> tuple[int, ...] | None:
    """Token ids that begin a user turn; None if the checkpoint has no tokenizer with a chat template.

    Raises:
        ValueError: its files or its chat template fail, or the model does not have these tokens.
    """
    if not (folder / "tokenizer_config.json").exists():
        return None
    tokenizer = load_tokenizer(folder)
    with errors_of_tokenizer(folder, "chat template fails"):
        ids = user_turn_ids(tokenizer)
    config = read_config(folder)
    size = {**config, **(config.get("text_config") or {})}.get("vocab_size")
    if ids is not None and isinstance(size, int) and max(ids) >= size:
        raise SmileError(
            f"{folder}: the tokenizer begins a user's turn with the token {max(ids)}; expected ids below {size}, the "
            "model's vocab_size"
        )
    return ids


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint; raises ValueError, naming the folder, if transformers cannot load it."""
    from transformers import AutoTokenizer

    check_sizes(folder)
    with errors_of_tokenizer(folder, "files cannot be loaded by transformers"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # else it asks on standard input


@contextmanager
def errors_of_tokenizer(folder: Path, what: str) -> Iterator[None]:
    """Raise SmileError for anything that a tokenizer, or the program in its chat template, raises."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ if isinstance(error, SmileError) and error.__cause__ else error
        raise SmileError(
            f"{folder}: the tokenizer's {what} ({reason(cause)}); expected a whole tokenizer and its config.json"
        ) from error


def model_card(config: SmileConfig, base: str | None = None, experts: Iterable[str] = ()) -> str:
    """README.md of a checkpoint: its contents and how to load it."""
    whole = config.base_model_name_or_path is None
    names = config.expert_names or range(config.num_local_experts)
    load = (
        'model = AutoModel.from_pretrained("this folder")  # or AutoModelForCausalLM, ...'
        if whole
        else 'model = smile_kernels.load_pretrained("this folder")'
    )
    lines = [
        "---",
        "library_name: smile-kernels",
        "tags: [smile, merge]",
        "---",
        "# A SMILE model",
        "",
        f"One base model and {config.num_local_experts} fine-tuned versions of it, fused without data or training into "
        f"a sparse mixture of low-rank experts (SMILE, arXiv 2408.10174): {len(config.modules)} linear layers, "
        f"{config.num_experts_per_tok} of {config.num_local_experts} experts per token, experts of rank "
        f"{config.rank_of_expert}, routers of rank {config.rank_of_router}.",
        "",
        *([f"- base: `{base}`"] if base else []),
        *(f"- expert {name}: `{expert}`" for name, expert in zip(names, experts)),
        "",
        "## Loading it",
        "",
        "```python",
        *(["from transformers import AutoModel", ""] if whole else []),
        "import smile_kernels",
        "",
        load,
        "```",
        "",
    ]
    if whole:
        lines += [
            f"Without `import smile_kernels`, transformers finds no weights and names `{NO_WEIGHTS}`.",
        ]
    else:
        lines += [f"This folder contains only the experts; the base is read from `{config.base_model_name_or_path}`."]
    return "\n".join(lines) + "\n"


def _factor_names(config: SmileConfig) -> list[str]:
    return [f"{name}.{factor}" for name in config.modules for factor in FACTORS]


def _untied(model: nn.Module) -> list[str]:
    """Names in the state dict without duplicates: tied weights are stored under their first name."""
    seen, names = set(), []
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            names.append(name)
    return names


def transformers_class(config: Mapping[str, Any]) -> Any:
    """The class of the architecture named in a config.json."""
    architectures = config.get("architectures")
    if not architectures:
        raise SmileError("model: config.json names no architecture; expected the base model's module as `model`")
    import transformers

    name = architectures[0]
    cls = getattr(transformers, name, None) or getattr(transformers, name.removeprefix("Smile"), None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):  # it has other names, too
        raise SmileError(f"model: transformers has no architecture {name}; expected the base model's module as `model`")
    return cls


def load_transformers(cls: Any, folder: str | Path, options: Mapping[str, Any]) -> nn.Module:
    """A model of the class `cls` of transformers.

    Raises:
        ValueError, OSError: the folder or an option does not fit, or tensors are missing, which transformers would set
            to random numbers.
    """
    check_sizes(folder)
    config = options.get("config")
    if isinstance(config, (str, os.PathLike)):
        if not os.path.exists(config):  # which transformers looks for on the Hub
            raise SmileError(f"config: is {config!r}; expected a config of transformers, or the path of one here")
        config = read_config(Path(config).parent if os.path.isfile(config) else Path(config))
    settings = config if isinstance(config, (dict, type(None))) else getattr(config, "__dict__", {})
    if (
        settings is not None
        and not settings.get("quantization_config")
        and read_config(folder).get("quantization_config")
    ):
        raise SmileError(
            f"config: has no quantization_config, which describes the experts in {folder}; expected its own"
        )
    try:
        model, found = cls.from_pretrained(folder, **{**options, "output_loading_info": True})
    except OSError:
        raise
    except SmileError as error:
        raise error if str(folder) in str(error) else SmileError(f"{folder}: {error}") from None
    except Exception as error:  # an architecture may raise anything on a config or an option that does not fit
        raise SmileError(
            f"{folder}: transformers cannot load it as {cls.__name__} ({reason(error)}); expected what fits that class"
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise SmileError(
            f"{folder}: has no tensor {missing[0]!r} of the {cls.__name__} in its config.json ({len(missing)} are "
            "missing); expected all"
        )
    return model


def _base_model(folder: Path, smile: SmileConfig, from_pretrained: dict[str, Any]) -> nn.Module:
    """The transformers model before the layers of the checkpoint in a folder are replaced."""
    config = read_config(folder)
    cls = transformers_class(config)
    if smile.base_model_name_or_path is not None:
        if not os.path.isdir(smile.base_model_name_or_path):
            raise FileNotFoundError(
                f"base_model_name_or_path: is {smile.base_model_name_or_path!r}, which is not a folder here; "
                "expected the base checkpoint, or the base model as `model`"
            )
        if not os.path.isfile(os.path.join(smile.base_model_name_or_path, "config.json")):
            raise FileNotFoundError(
                f"base_model_name_or_path: {smile.base_model_name_or_path} has no config.json; expected the base "
                "checkpoint, or the base model as `model`"
            )
        if smile.base_fingerprint not in (None, weights_fingerprint(smile.base_model_name_or_path)):
            raise SmileError(
                f"base_model_name_or_path: {smile.base_model_name_or_path} has other weights than when the experts "
                "were written; expected the same, or the base model as `model`"
            )
        model: Any = load_transformers(cls, smile.base_model_name_or_path, from_pretrained)
        if "config" not in from_pretrained:
            where = f"base_model_name_or_path: {smile.base_model_name_or_path}"
            _check_settings(where, *(config_of_checkpoint(f, model) for f in (smile.base_model_name_or_path, folder)))
        return model
    # fusion_bench derives its configs from the plain ones: smile_mistral from mistral.
    plain = {key: value for key, value in config.items() if key not in ("model_type", "architectures", "torch_dtype")}
    try:
        return cls._from_config(cls.config_class(**plain), **from_pretrained).eval()
    except Exception as error:  # as in load_transformers
        raise SmileError(
            f"config.json: transformers cannot build a {cls.__name__} from it ({reason(error)}); "
            "expected the config of that model"
        ) from error


@torch.no_grad()
def _attach(model: nn.Module, config: SmileConfig, tensors: Mapping[str, Tensor]) -> None:
    """Replace the layers listed in the config and load the tensors."""
    if any(p.is_meta for p in model.parameters()):
        raise SmileError("model: has parameters on the meta device; expected parameters with data")
    layers: dict[str, SmileLinear] = {}
    for name, entry in config.modules.items():
        try:
            linear: Any = model.get_submodule(name)
        except AttributeError:
            raise SmileError(
                f"model: {type(model).__name__} has no layer {name!r}; expected the layers in the checkpoint's config"
            ) from None
        if unfit := why_not_linear(linear):
            raise SmileError(
                f"model: {name!r} cannot have the experts that the checkpoint has for it, since {unfit}; expected a "
                f"linear layer (or upscale with exclude={[name]!r})"
            )
        entry.check_kind(name, linear)
        transposed = is_conv1d(linear)
        weight, bias = linear.weight.T if transposed else linear.weight, getattr(linear, "bias", None)
        layers[name] = entry.build(
            weight.shape[1],
            weight.shape[0],
            config.num_local_experts,
            config.num_experts_per_tok,
            bias=bias is not None,
            expert_names=config.expert_names,
            device="meta",
            dtype=weight.dtype,
        ).train(linear.training)
        if entry.fan_in_fan_out and (key := f"{name}.weight") in tensors:
            tensors = {**tensors, key: tensors[key].T}
    _check_tensors(model, layers, tensors, config)
    priors = all(entry.router_prior for entry in config.modules.values())
    check_routing(model, config.routing, dict.fromkeys(layers, config.num_local_experts), calibrating=priors)
    with all_or_nothing(model):
        for name, layer in layers.items():
            linear = model.get_submodule(name)
            layer = layer.to_empty(device=linear.weight.device)
            # The parameters of the linear layer themselves, so that tied weights stay tied.
            transposed = is_conv1d(linear)
            layer.weight = nn.Parameter(linear.weight.T.contiguous()) if transposed else linear.weight
            layer.bias = getattr(linear, "bias", None)
        replace_linears(model, layers)
        set_routing(model, config.routing)
        guard_weights(model)
        describe_as_smile(model)
        model.load_state_dict(tensors, strict=False)  # last, since values are not restored


def _check_tensors(
    model: nn.Module, layers: Mapping[str, SmileLinear], tensors: Mapping[str, Tensor], config: SmileConfig
) -> None:
    """Raise ValueError unless the names and shapes of the tensors are those of the model with these layers."""
    state = model.state_dict(keep_vars=True)
    places = tuple(f"{name}." for name in layers)
    expected = {name: tensor for name, tensor in state.items() if not name.startswith(places)}
    expected |= {
        f"{name}.{key}": tensor for name, layer in layers.items() for key, tensor in layer.state_dict().items()
    }
    loaded = {id(state[name]) for name in tensors if name in state}
    factors = set(_factor_names(config))
    needed = expected if config.base_model_name_or_path is None else _factor_names(config)
    for name in needed:
        tied = name in state and id(state[name]) in loaded
        if name in expected and name not in tensors and not tied:
            raise SmileError(f"checkpoint: tensor {name!r} is missing for {type(model).__name__}")
    for name, tensor in tensors.items():
        if name not in expected:
            raise SmileError(f"checkpoint: tensor {name!r} is unexpected for {type(model).__name__}")
        narrow = name in factors and tensor.dtype.itemsize < 2
        if name.startswith(places) and (narrow or not tensor.is_floating_point()):
            raise SmileError(
                f"checkpoint: tensor {name!r} is {tensor.dtype}; expected floating point of 16 bits or more"
            )
        if tensor.shape != expected[name].shape:
            raise SmileError(
                f"checkpoint: tensor {name!r} has shape {list(tensor.shape)}; expected {list(expected[name].shape)}"
            )
