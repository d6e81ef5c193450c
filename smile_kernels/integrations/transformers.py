"""SMILE checkpoints in transformers: `AutoModel*.from_pretrained(directory)` for any model with linear layers.

A checkpoint can name a "quantizer" that replaces modules before transformers loads the weights. Ours inserts a
SmileLinear for each linear layer in `quantization_config.modules`; over a base that is stored quantised, it is the
base's own quantizer with experts added to its layers. `import smile_kernels` registers it.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.quantizers import auto
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    AutoQuantizationConfig,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..config import FACTORS, QUANT_METHOD, SmileConfig, SmileModuleConfig
from ..errors import SmileError
from ..guard import guard_weights
from ..nn import (
    SmileLinear,
    is_conv1d,
    replace_linears,
    replace_modules,
    smile_layers,
    whole_layers,
    why_not_linear,
)
from ..routing import get_routing, set_routing
from ..storage import NO_WEIGHTS, read_pickled, read_safetensors
from ..versions import expect, warn_if_newer
from .quantization import SmileBesideLinear

BASES = ("compressed-tensors", "torchao")  # bases stored quantised that transformers loads below experts


def _expect_parameters(function: Callable, *names: str) -> None:
    where = f"{function.__module__}.{function.__name__}"
    expect("transformers", {*names} <= inspect.signature(function).parameters.keys(), f"{where}({', '.join(names)})")


def _expect_call(caller: Callable, hook: str) -> None:
    """Raise if transformers no longer calls a hook of HfQuantizer, which would have no effect."""
    called = hook in inspect.unwrap(caller).__code__.co_names
    expect("transformers", called, f"{caller.__qualname__} to call HfQuantizer.{hook}")


_expect_parameters(rename_source_key, "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict")
_expect_parameters(revert_weight_conversion, "model", "state_dict")
_expect_call(auto.get_hf_quantizer, "update_attn_implementation")
_expect_call(HfQuantizer.preprocess_model, "_process_model_before_weight_loading")
_expect_call(HfQuantizer.postprocess_model, "_process_model_after_weight_loading")
warn_if_newer("transformers")


def checkpoint_renaming(model: nn.Module) -> Callable[[str], tuple[str, str | None]]:
    """The mapping from a checkpoint's names to those of `model` in transformers.

    Returns:
        A function of a tensor's name in the checkpoint that returns its name in the model, and the pattern of the
        conversion that builds it from several tensors, or None.
    """
    transforms = get_model_conversion_mapping(model)
    options = {
        "weight_renamings": [t for t in transforms if isinstance(t, WeightRenaming)],
        "weight_converters": [t for t in transforms if isinstance(t, WeightConverter)],
        "base_model_prefix": model.base_model_prefix,
        "meta_state_dict": model.state_dict(),
    }
    return lambda name: rename_source_key(name, **options)


@register_quantization_config(QUANT_METHOD)
class SmileQuantizationConfig(QuantizationConfigMixin):
    """`quantization_config` of a SMILE checkpoint in transformers; the fields are those of `SmileConfig`."""

    def __init__(self, **config):
        self.__dict__.update(SmileConfig.from_dict(config).to_dict())


@register_quantizer(QUANT_METHOD)
class SmileQuantizer(HfQuantizer):
    """Builds the SmileLinear layers of a checkpoint before transformers loads its tensors, and checks them after."""

    is_trainable = True
    is_qat_trainable = True
    is_compileable = True
    smile: SmileQuantizationConfig
    _layers: dict[str, tuple[SmileLinear, SmileModuleConfig]]
    _fan_in_fan_out: list[SmileLinear]
    _dtypes: dict[str, torch.dtype]
    _stored: set[str]

    def __new__(cls, quantization_config: Any = None, **kwargs: Any) -> "SmileQuantizer":
        base = getattr(quantization_config, "base", None)
        return super().__new__(cls if base is None else _over_quantizer_of(base["quant_method"]))

    def __init__(self, quantization_config: Any, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.smile = quantization_config

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: nn.Module):
        # Called by save_pretrained: the layers and the policy may have changed since the model was loaded.
        config: dict[str, Any] = self.quantization_config.__dict__
        requested = {key: config[key] for key in ("rank_of_expert", "rank_of_router")}
        config.clear()
        config.update(vars(_described(model)) | requested)
        return super().get_state_dict_and_metadata(model)

    def update_attn_implementation(self, config):
        # The only hook with the config before the weight files are searched.
        if getattr(config, "transformers_weights", None) == NO_WEIGHTS:
            del config.transformers_weights
        return config

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        from transformers import PreTrainedModel  # which imports this module

        _expect_call(PreTrainedModel.save_pretrained, "get_state_dict_and_metadata")
        if getattr(model.config, "distributed_config", None) is not None:
            raise SmileError(
                "distributed_config: transformers' own tensor parallelism does not know SMILE layers; "
                "load the model whole and use smile_kernels.integrations.distributed"
            )
        config = SmileConfig.from_dict(self.smile.to_dict())
        renamed, tensors = checkpoint_renaming(model), model.state_dict()
        self._layers, self._fan_in_fan_out = {}, []
        for name, entry in config.modules.items():
            # A layer's name in the checkpoint may differ from the model's: another head, a renamed submodule.
            key, _ = renamed(f"{name}.weight")
            if key not in tensors:
                if type(model).__name__ in (getattr(model.config, "architectures", None) or ()):
                    raise SmileError(
                        f"modules[{name!r}]: {type(model).__name__} has no such layer; expected its layers"
                    )
                continue  # a head that this model class does not have
            target = key.removesuffix(".weight")
            linear = model.get_submodule(target)
            entry.check_kind(name, linear)
            if unfit := why_not_linear(linear):
                raise SmileError(f"modules[{name!r}]: cannot have experts here, since {unfit}; expected a linear layer")
            rows, columns = tensors[key].shape
            layer = entry.build(
                *((rows, columns) if is_conv1d(linear) else (columns, rows)),
                config.num_local_experts,
                config.num_experts_per_tok,
                bias=linear.bias is not None,
                expert_names=config.expert_names,
                device="meta",
                dtype=linear.weight.dtype,
            )
            self._layers[target] = layer.train(linear.training), entry
        super()._process_model_before_weight_loading(model, **kwargs)
        self._place(model)
        self._dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        known = {renamed(f"{name}.weight")[0] for name in config.modules}
        self._stored = set()
        for file in kwargs.get("checkpoint_files") or ():
            for tensor in (read_safetensors if str(file).endswith(".safetensors") else read_pickled)(Path(file)):
                self._stored.add(renamed(tensor.name)[0])
                name, _, part = tensor.name.rpartition(".")
                key = renamed(f"{name}.weight")[0]
                if part == "vh" and key not in known:
                    raise SmileError(
                        f"{file}: contains experts of {name!r}, which quantization_config.modules lacks; expected both"
                    )
                if part in FACTORS and (target := key.removesuffix(".weight")) in self._layers:
                    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
                        raise SmileError(
                            f"{file}: tensor {tensor.name!r} is {tensor.dtype}; expected floating point of 16 bits or "
                            "more"
                        )
                    expected = getattr(self._layers[target][0], part)
                    if expected is None or tensor.shape != expected.shape:
                        described = "none" if expected is None else str(list(expected.shape))
                        raise SmileError(
                            f"{file}: tensor {tensor.name!r} has shape {list(tensor.shape)}; expected {described}, as "
                            "quantization_config describes it"
                        )
        if not self._layers:
            raise SmileError(f"modules: none of the {len(config.modules)} layers exists in {type(model).__name__}")

    def _place(self, model: Any) -> None:
        """Put the layers into the model, whose tensors have the names of the checkpoint's."""
        for target, (layer, entry) in self._layers.items():
            if entry.fan_in_fan_out:
                layer.weight = nn.Parameter(layer.weight.T)
                self._fan_in_fan_out.append(layer)
            self._layers[target] = layer, replace(entry, fan_in_fan_out=False)
        replace_linears(model, {target: layer for target, (layer, _) in self._layers.items()})

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        super()._process_model_after_weight_loading(model, **kwargs)
        loaded = {name: model.get_submodule(name) for name in self._layers}
        missing = [
            f"{name}.{parameter}"
            for name, layer in loaded.items()
            for parameter, value in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))
            if not self._has_loaded(model, f"{name}.{parameter}", value)
        ]
        if missing:
            listed = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise SmileError(f"checkpoint: {len(missing)} tensors of SMILE layers are missing or misshapen: {listed}")
        self._check_others(model)
        self._cast_renamed(model)
        for name, layer in loaded.items():
            for factor in FACTORS:
                tensor = getattr(layer, factor, None)
                if tensor is not None and not tensor.is_meta and not tensor.isfinite().all():
                    raise SmileError(f"checkpoint: tensor {name}.{factor} contains NaN or inf; expected finite numbers")
        self._complete(model)
        set_routing(model, SmileConfig.from_dict(self.smile.to_dict()).routing)
        del self._layers, self._fan_in_fan_out, self._dtypes, self._stored

    def _check_others(self, model: Any) -> None:
        """Raise ValueError if the checkpoint's own class lacks a tensor; that of another head is random there."""
        if not self._stored or type(model).__name__ not in (getattr(model.config, "architectures", None) or ()):
            return
        optional = model._keys_to_ignore_on_load_missing or ()
        missing = [
            name
            for name, value in model.state_dict(keep_vars=True).items()
            if name not in self._stored and value.is_floating_point() and not self._has_loaded(model, name, value)
            if not any(re.search(pattern, name) for pattern in optional)
        ]
        if missing:
            raise SmileError(
                f"{model.config.name_or_path or 'checkpoint'}: has no tensor {missing[0]!r} of the "
                f"{type(model).__name__} in its config.json ({len(missing)} are missing); expected all"
            )

    def _has_loaded(self, model: Any, name: str, tensor: torch.Tensor) -> bool:
        """Whether transformers has loaded a tensor, or offloads it, or the one that it is tied to, to disk."""
        offloads = tensor.is_meta and not self._stored.isdisjoint((name, model.all_tied_weights_keys.get(name)))
        return offloads or getattr(tensor, "_is_hf_initialized", False)

    def _complete(self, model: Any) -> None:
        """What remains once the tensors are loaded."""
        for layer in self._fan_in_fan_out:
            layer.weight = nn.Parameter(layer.weight.T.contiguous(), requires_grad=layer.weight.requires_grad)
        guard_weights(model)
        _keep_layers_apart(model)
        self.quantization_config.modules = _as_stored(model, {name: entry for name, (_, entry) in self._layers.items()})
        self.quantization_config.__dict__.pop("base_model_name_or_path", None)
        # Nothing is quantised: half(), float() and training work as for any model.
        model.is_quantized = False

    def _cast_renamed(self, model: Any) -> None:
        """Gives tensors their model's dtype where transformers before 5.21 kept that of the file: where it renames."""
        if Version(transformers.__version__) >= Version("5.21"):
            return
        kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and not tensor.is_meta and not kept & {*name.split(".")}:
                tensor.data = tensor.data.to(self._dtypes.get(name, tensor.dtype))


class _OverQuantizedBase(SmileQuantizer):
    """A mixin before the quantizer of a base that is stored quantised, which loads the base as it does without experts.

    The factors are loaded as tensors of the base's linear modules, and then become `SmileBesideLinear`.
    """

    def __init__(self, quantization_config: SmileQuantizationConfig, **kwargs: Any):
        base = quantization_config.base  # type: ignore[attr-defined]
        warn_if_newer(base["quant_method"])
        super(SmileQuantizer, self).__init__(AutoQuantizationConfig.from_dict(dict(base)), **kwargs)
        self.smile = quantization_config

    def is_serializable(self) -> bool:
        raise SmileError(
            "model: its base is stored quantised, and is not saved again; expected a base of plain weights "
            "(copy the checkpoint's folder instead)"
        )

    def _check_others(self, model: Any) -> None:
        pass  # the base's quantizer has replaced tensors

    def _place(self, model: Any) -> None:
        for target, (layer, _) in self._layers.items():
            linear = model.get_submodule(target)
            for factor in FACTORS:
                tensor = getattr(layer, factor)
                if isinstance(tensor, nn.Parameter):
                    linear.register_parameter(factor, tensor)
                elif tensor is not None:
                    linear.register_buffer(factor, tensor)

    def _complete(self, model: Any) -> None:
        pairs = []
        for target, (layer, _) in self._layers.items():
            linear = model.get_submodule(target)
            for tensors, own in ((linear._parameters, layer._parameters), (linear._buffers, layer._buffers)):
                for factor in [name for name in tensors if name in FACTORS]:
                    tensor = tensors.pop(factor)
                    own[factor] = tensor
                    if tensor is not None and tensor.is_meta:
                        raise SmileError(
                            f"device_map: offloads {target}, whose base is stored quantised; expected devices that "
                            "hold all layers"
                        )
            pairs.append((linear, SmileBesideLinear(layer, linear).train(linear.training)))
        replace_modules(model, pairs)
        model.config.quantization_config = self.smile


def _over_quantizer_of(method: str) -> type[SmileQuantizer]:
    if method not in BASES:
        raise SmileError(
            f"checkpoint: its base is stored as {method!r}; expected one that transformers loads here, "
            f"{' or '.join(map(repr, BASES))}, or vLLM"
        )
    kind = AUTO_QUANTIZER_MAPPING[method]
    own = {name: getattr(kind, name) for name in ("is_trainable", "is_qat_trainable", "is_compileable")}
    return type(f"Smile{kind.__name__}", (_OverQuantizedBase, kind), own)


def describe_as_smile(model: Any) -> None:
    """Set the config and quantizer of a model with SMILE layers, as from_pretrained does."""
    if not smile_layers(model):
        return
    _keep_layers_apart(model)
    model.config.quantization_config = _described(model)
    model.hf_quantizer = SmileQuantizer(model.config.quantization_config, pre_quantized=True)
    model.is_quantized = False


def _described(model: Any) -> SmileQuantizationConfig:
    """The config of a model's layers, and its policy, under their names in `save_pretrained`."""
    config = SmileConfig.from_layers(whole_layers(model))
    policy = replace(get_routing(model), num_experts_per_tok=None)  # which the layers have
    described = SmileQuantizationConfig(**replace(config, routing=policy, modules={}).to_dict())
    described.modules = _as_stored(model, config.modules)
    return described


def _as_stored(model: Any, entries: Mapping[str, SmileModuleConfig]) -> dict[str, dict[str, Any]]:
    """The layers by their names in `save_pretrained`."""
    layers = smile_layers(model)
    return {
        next(iter(revert_weight_conversion(model, {f"{name}.s": layers[name].s}))).removesuffix(".s"): vars(entry)
        for name, entry in entries.items()
    }


def _keep_layers_apart(model: Any) -> None:
    """Make `save_pretrained` store SMILE layers unfused: conversions that fuse weights would drop the experts."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [one for one in conversions if not isinstance(one, PrefixChange)]
    weights = [f"{name}.weight" for name in smile_layers(model)]

    def fuses(conversion: Any) -> bool:
        if not isinstance(conversion, WeightConverter):
            return False
        back = conversion.reverse_transform()
        return any(back.rename_source_key(name)[1] is not None for name in weights)

    model._weight_conversions = [one for one in conversions if not fuses(one)]
