"""Checks the first forward pass of a SMILE model: code that reads a weight outside its layer misses the experts."""

import inspect
import sys
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .nn import SmileLinear

__all__ = ["guard_weights"]


def guard_weights(model: nn.Module) -> None:
    """In the first forward pass of a SMILE model, in training and in evaluation mode, refuse reads of a layer's weight.

    The guard removes itself after both passes, and does nothing while a model is compiled or exported.

    Raises (that pass):
        RuntimeError: code outside a SMILE layer computes with its weight, on which its experts have no effect.
    """
    layers = {id(module): name for name, module in model.named_modules() if isinstance(module, SmileLinear)}
    if layers and not any(isinstance(hook, _Guard) for hook in model._forward_pre_hooks.values()):
        guard = _Guard()
        guard.handles = [
            model.register_forward_pre_hook(guard),
            model.register_forward_hook(guard.finish, always_call=True),
        ]


class _Guard:
    """The hooks of `guard_weights`."""

    def __init__(self) -> None:
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        self.watched: set[bool] = set()
        self.watch: _Watch | None = None

    def __call__(self, model: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or self.watch is not None or model.training in self.watched:
            return
        self.watch = _Watch(model)
        self.watch.__enter__()

    def finish(self, model: nn.Module, args: Any, output: Any) -> None:
        if self.watch is None:
            return
        self.watch.__exit__(None, None, None)
        if not self.watch.found:
            self.watched.add(model.training)
        self.watch = None
        if len(self.watched) == 2:
            for handle in self.handles:
                handle.remove()


class _Watch(TorchFunctionMode):
    """Raises if a tensor is computed from a SMILE layer's weight outside that layer's own forward."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.found = False
        self.layers = {
            id(module._parameters["weight"]): (name, module)
            for name, module in model.named_modules()
            if isinstance(module, SmileLinear) and module._parameters.get("weight") is not None
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        results = result if isinstance(result, (list, tuple)) else (result,)
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")  # that func gets, as Tensor.T.__get__ does
        if any(isinstance(one, torch.Tensor) for one in results) and attribute != "grad":
            for value in (*args, *kwargs.values()):
                for operand in value if isinstance(value, (list, tuple)) else (value,):
                    name, layer = self.layers.get(id(operand), ("", None))
                    if layer is not None and operand is layer._parameters.get("weight"):  # ids of freed tensors recur
                        self._check(name, layer)
        return result

    def _check(self, name: str, layer: SmileLinear) -> None:
        weight = layer._parameters["weight"]
        frame: FrameType | None = sys._getframe(2)
        reader = ""
        while frame is not None:
            first = frame.f_code.co_varnames[0] if frame.f_code.co_argcount else ""
            owner = frame.f_locals.get(first)
            if isinstance(owner, nn.Module) and any(p is weight for p in owner._parameters.values()):
                method = inspect.unwrap(getattr(type(owner), frame.f_code.co_name, _Watch))
                if getattr(method, "__code__", None) is frame.f_code:
                    return  # a method of the layer itself, or of the embedding that its weight is tied to
            if isinstance(owner, nn.Module) and owner is not layer and not reader:
                reader = f"{type(owner).__name__}.{frame.f_code.co_name}"
            frame = frame.f_back
        self.found = True
        raise RuntimeError(
            f"{name}: its weight is read by {reader or 'code outside any module'}, on which its experts have no "
            f"effect; expected exclude=[{name!r}] when the model is upscaled"
        )
