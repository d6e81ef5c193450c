"""Integrations with other libraries; each module is imported only together with its library."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from pathlib import Path

from torch import nn

from ..versions import expect, installed, tested

_QUANTIZERS = "transformers.quantizers.auto"


class _RegisterWithTransformers(importlib.abc.MetaPathFinder):
    """Registers the `smile` quantizer once transformers has imported its own, in either order of imports."""

    def find_spec(self, name, path=None, target=None):
        if name == "transformers":
            _check_quantizers(importlib.machinery.PathFinder.find_spec(name, path))
        if name != _QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None  # transformers was found
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_register(module):
            execute(module)
            _register_with_transformers()

        spec.loader.exec_module = execute_and_register
        return spec


def _register_with_transformers() -> None:
    try:
        importlib.import_module(".transformers", __name__)
    except ImportError as error:
        _warn(error)


def _check_quantizers(spec: importlib.machinery.ModuleSpec | None) -> None:
    """Raise if the awaited module does not exist: the quantizer would never be registered."""
    if spec is None or spec.origin is None:  # installed with a custom finder
        return
    try:
        module = Path(spec.origin).parents[1].joinpath(*_QUANTIZERS.split(".")).with_suffix(".py")
        expect("transformers", module.exists(), f"a module {_QUANTIZERS}")
    except ImportError as error:
        _warn(error)


def _warn(error: ImportError) -> None:
    warnings.warn(
        f"SMILE checkpoints cannot be loaded by transformers {installed('transformers')} (tested: "
        f"{tested('transformers')}): {error}",
        stacklevel=3,
    )


def register_with_transformers() -> None:
    """Let `AutoModel*.from_pretrained` load SMILE checkpoints, now or when transformers is imported."""
    if _QUANTIZERS in sys.modules:
        _register_with_transformers()
    elif not any(isinstance(finder, _RegisterWithTransformers) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterWithTransformers())


def describe_as_smile(model: nn.Module) -> None:
    """Mark a transformers model as SMILE, so that its own `save_pretrained` writes a SMILE checkpoint."""
    model = getattr(model, "_orig_mod", model)
    if "transformers.modeling_utils" in sys.modules:
        from transformers import PreTrainedModel

        if isinstance(model, PreTrainedModel):
            importlib.import_module(".transformers", __name__).describe_as_smile(model)
