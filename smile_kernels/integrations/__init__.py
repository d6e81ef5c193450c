"""SMILE layers in the stacks people already use; each module here is imported only together with its stack."""

import importlib.abc
import importlib.util
import sys
import warnings

_QUANTIZERS = "transformers.quantizers.auto"


class _RegisterWithTransformers(importlib.abc.MetaPathFinder):
    """Registers the `smile` quantizer once transformers has imported its own: neither import waits for the other."""

    def find_spec(self, name, path=None, target=None):
        if name != _QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
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
        warnings.warn(f"SMILE checkpoints cannot be loaded with this version of transformers: {error}", stacklevel=2)


def register_with_transformers() -> None:
    """Let `AutoModel*.from_pretrained` load SMILE checkpoints: at once, or as soon as transformers is imported."""
    if _QUANTIZERS in sys.modules:
        _register_with_transformers()
    elif not any(isinstance(finder, _RegisterWithTransformers) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterWithTransformers())
