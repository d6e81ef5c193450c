"""Checks the first forward pass of a SMILE model: code that reads a weight outside its layer misses the experts."""

import bisect
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

    The guard removes itself after both passes, and does nothing while a model or a part of it is compiled or exported.

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
        if not self.watch.found and output is not None:  # None: the pass has failed, maybe before it read the weights
            self.watched.add(model.training)
        self.watch = None
        if len(self.watched) == 2:
            for handle in self.handles:
                handle.remove()


class _Watch(TorchFunctionMode):
    """Raises if a tensor is computed from a SMILE layer's weight or bias outside that layer's own forward."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.found = False
        # A bias that all experts share may be read anywhere.
        self.watched: list[_Watched] = [
            (name, module, part)
            for name, module in model.named_modules()
            if isinstance(module, SmileLinear)
            for part in ("weight", *(("bias",) if module.expert_bias is not None else ()))
            if module._parameters.get(part) is not None
        ]
        self.members = {id(module) for module in model.modules()}
        self.by_id = {id(module._parameters[part]): (name, module, part) for name, module, part in self.watched}
        # Other tensors on the same memory: what state_dict() gives, and views.
        spans = ((*_memory(watched[1]._parameters[watched[2]]), watched) for watched in self.watched)
        self.spans = sorted((span for span in spans if span[1] > span[0]), key=lambda span: span[0])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if torch.compiler.is_compiling():  # a compiled part, such as FlexAttention, whose tensors have no memory
            return result
        results = result if isinstance(result, (list, tuple)) else (result,)
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")  # that func gets, as Tensor.T.__get__ does
        if any(isinstance(one, torch.Tensor) for one in results) and attribute != "grad":
            for value in (*args, *kwargs.values()):
                for operand in value if isinstance(value, (list, tuple)) else (value,):
                    if (watched := self._of(operand)) is not None:
                        self._check(*watched)
        return result

    def _of(self, operand: Any) -> "_Watched | None":
        """The parameter that a tensor is, or is a part of; None if it is not of a watched one."""
        watched = self.by_id.get(id(operand))
        if watched is not None and operand is watched[1]._parameters.get(watched[2]):  # ids of freed tensors recur
            return watched
        start, end = _memory(operand)
        at = bisect.bisect_right(self.spans, start, key=lambda span: span[0]) - 1 if end > start else -1
        if at < 0 or self.spans[at][1] < end:
            return None
        first, _, (name, layer, part) = self.spans[at]
        moved = _memory(layer._parameters.get(part))[0] != first
        return None if moved else (name, layer, part)

    def _check(self, name: str, layer: SmileLinear, part: str) -> None:
        tensor = layer._parameters[part]
        frame: FrameType | None = sys._getframe(2)
        reader = ""
        while frame is not None:
            first = frame.f_code.co_varnames[0] if frame.f_code.co_argcount else ""
            owner = frame.f_locals.get(first)
            if isinstance(owner, nn.Module) and any(p is tensor for p in owner._parameters.values()):
                method = inspect.unwrap(getattr(type(owner), frame.f_code.co_name, _Watch))
                if getattr(method, "__code__", None) is frame.f_code and id(owner) in self.members:
                    return  # a method of the layer itself, or of the embedding that its weight is tied to
            if isinstance(owner, nn.Module) and owner is not layer and not reader:
                reader = f"{type(owner).__name__}.{frame.f_code.co_name}"
            frame = frame.f_back
        self.found = True
        raise RuntimeError(
            f"{name}: its {part} is read by {reader or 'code outside any module'}, on which its experts have no "
            f"effect; expected exclude=[{name!r}] when the model is upscaled"
        )


_Watched = tuple[str, SmileLinear, str]  # a layer's name, the layer, "weight" or "bias"


def _memory(tensor: Any) -> tuple[int, int]:
    """Where the data of a plain tensor begins and ends; (0, 0) of others."""
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.is_meta or tensor.layout != torch.strided:
        return 0, 0
    try:
        start = tensor.data_ptr()
    except RuntimeError:  # of a transform such as vmap: no data of its own
        return 0, 0
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return (start, start + (reach + 1) * tensor.element_size()) if start and tensor.numel() else (0, 0)
