"""The state of a routing policy for later forward passes over the same KV cache."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .policy import Routing
from .tokens import Tokens, is_cache

__all__ = ["Memory", "cache_in"]


Key = tuple[int, int]  # a layer's number, and how often it has run in a pass before

IDS: Key = (-1, 0)  # where token ids are kept
PROMPT: Key = (-1, 1)  # where the choice of scope "prompt" is kept


class Memory:
    """State for later passes over the same KV cache: sums by position (causal), or the prompt's choice (sequence).

    Positions are those of the cache, so a cropped cache has the sums of its tokens; batch rows follow the cache's.
    """

    def __init__(self, serial: int, capacity: int):
        self.serial, self.capacity = serial, capacity
        self.clear()

    def clear(self) -> None:
        self.choices: dict[Key, Routing] = {}
        self.sums: dict[Key, Tensor] = {}  # [B, positions, N]; under IDS the tokens' ids [B, positions]
        self.last: Key | None = None  # the layer that chose last
        self.length = 0  # positions filled, where the cache counts on the host
        self.established = False  # whether later passes build on this one's

    @classmethod
    def beside(cls, tokens: Tokens, serial: int, root_name: str) -> "Memory":
        """The memory of the pass's KV cache; a new one if the cache is empty or not created yet.

        Raises:
            RuntimeError: the cache contains tokens that this policy has not seen.
        """
        memory: Memory | None = getattr(tokens.cache, "routing_memory", None)
        past = tokens.past
        if memory is not None and memory.serial == serial and len(memory.choices) + len(memory.sums) > 0:
            counted = isinstance(past, int)
            if not counted or (past > 0 and (memory.choices or memory.length >= past)):
                memory.established = True
                return memory
        if int(past) != 0:
            raise RuntimeError(
                f"{tokens.cache_name}: holds {int(past)} tokens that {root_name} has not seen under its "
                "present routing policy (or that were packed); expected an empty cache, or one filled since set_routing"
            )
        return cls(serial, _capacity(tokens.cache))

    def attach(self, cache) -> None:
        """Store this with `cache`, and follow changes of its batch rows."""
        if getattr(cache, "routing_memory", None) is None:
            gone = [name for name in _FOLLOWERS if not callable(getattr(type(cache), name, None))]
            if gone:
                raise NotImplementedError(
                    f"cache: {type(cache).__name__} has no method {gone[0]}, by which its rows would be followed; "
                    "expected a Cache as transformers 5.18 to 5.24 have it"
                )
            for name in _FOLLOWERS:
                setattr(cache, name, _Followed(cache, name))
        if getattr(cache, "routing_memory", None) is not self:
            cache.routing_memory = self

    def choice(self, key: Key, locked: bool) -> Routing:
        """The choice made in an earlier pass at a layer; locked layers, and all of scope "prompt", share one."""
        last = self.last
        shared = self.choices[last] if last is not None and (locked or last == PROMPT) else None
        found = self.choices.get(key, shared)
        if found is None:
            raise RuntimeError(
                "routing: a SMILE layer that did not run on the prompt runs now; expected the same layers"
            )
        weights, ids = found
        return found if _lasts(weights) else (weights.clone(), ids.clone())

    def before(self, key: Key, batch: int, past: int | Tensor) -> Tensor | None:
        """The running sums [B, N] at the last token in the cache; None if there is none."""
        buffer = self._found(key, batch)
        if buffer is None:
            return None
        if isinstance(past, int):
            return buffer[:, past - 1] if past > 0 else None
        return torch.where(past > 0, buffer.index_select(1, (past.reshape(1) - 1).clamp_min(0))[:, 0], 0)

    def _found(self, key: Key, batch: int) -> Tensor | None:
        """The buffer of `key`; None if this is the first pass, which has none yet."""
        buffer = self.sums.get(key)
        if buffer is None and self.established:
            raise RuntimeError(
                "routing: a SMILE layer that did not run on the prompt runs now; expected the same layers"
            )
        if buffer is not None and buffer.shape[0] != batch:
            raise RuntimeError(f"cache: has {buffer.shape[0]} sequences; expected {batch}, as in the input")
        return buffer

    def running(self, key: Key, shape: tuple[int, int, int], past: int, like: Tensor) -> Tensor:
        """The buffer of sums of a layer, for an operator that continues them: those before this pass are at `past` - 1.

        shape: B, S and N of this pass, whose sums it writes from `past` on; like: a tensor with their dtype and device.
        """
        buffer, self.length = self.sums.get(key), past + shape[1]
        if buffer is not None and buffer.shape[0] == shape[0] and buffer.shape[1] >= self.length and _lasts(buffer):
            return buffer
        self._found(key, shape[0])
        return self._buffer(key, shape, past, like)

    def write(self, key: Key, values: Tensor, past: int | Tensor) -> None:
        """Store values [B, S, ...] of this pass's tokens at their positions in the cache."""
        buffer, length = self._buffer(key, values.shape, past, values), values.shape[1]
        if isinstance(past, int):
            buffer[:, past : past + length] = values
            self.length = past + length
        else:
            buffer.index_copy_(1, torch.arange(length, device=values.device) + past, values)

    def _buffer(self, key: Key, shape: Sequence[int], past: int | Tensor, like: Tensor) -> Tensor:
        """The buffer of `key`, with space for values of this shape [B, S, ...] after `past` tokens."""
        batch, length, *rest = shape
        buffer = self.sums.get(key)
        if buffer is None:
            buffer = self.sums[key] = like.new_zeros(batch, max(self.capacity, length), *rest)
            if self.capacity > 0 and not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(buffer)  # so that CUDA graphs may write to it
        elif buffer.shape[0] != batch:
            raise RuntimeError(f"cache: has {buffer.shape[0]} sequences; expected {batch}, as in the input")
        elif isinstance(past, int) and past + length > buffer.shape[1]:
            more = max(past + length, 2 * buffer.shape[1]) - buffer.shape[1]
            buffer = self.sums[key] = torch.cat([buffer, buffer.new_zeros(batch, more, *buffer.shape[2:])], dim=1)
        if not _lasts(buffer):
            buffer = self.sums[key] = buffer.clone()
        return buffer

    def history(self, ids: Tensor, count: int, past: int | Tensor) -> Tensor:
        """The `count` token ids before this pass, [B, count], -1 where there are none; keeps ids [B, S] of the pass."""
        buffer = self._buffer(IDS, ids.shape, past, ids)
        positions = torch.arange(-count, 0, device=ids.device) + past
        history = torch.where(positions >= 0, buffer.index_select(1, positions.clamp_min(0)), -1)
        self.write(IDS, ids, past)
        return history

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to the batch dimension of all buffers."""
        self.choices = {key: (change(w), change(i)) for key, (w, i) in self.choices.items()}
        self.sums = {key: change(sums) for key, sums in self.sums.items()}


def _lasts(tensor: Tensor) -> bool:
    """Whether a tensor can be written, and saved for a gradient: outside of inference_mode, those made in it cannot."""
    return torch.compiler.is_compiling() or not tensor.is_inference() or torch.is_inference_mode_enabled()


class _Followed:
    """A method of a cache that also updates its routing memory; it is pickled with the cache."""

    def __init__(self, cache, name: str):
        self.cache, self.name = cache, name

    def __call__(self, *args, **kwargs) -> None:
        getattr(type(self.cache), self.name)(self.cache, *args, **kwargs)
        _FOLLOWERS[self.name](self.cache.routing_memory, *args, **kwargs)


_FOLLOWERS: dict[str, Callable[..., None]] = {
    "reorder_cache": lambda memory, beam_idx: memory.map_rows(lambda t: t.index_select(0, beam_idx.to(t.device))),
    "batch_repeat_interleave": lambda memory, repeats: memory.map_rows(lambda t: t.repeat_interleave(repeats, dim=0)),
    "batch_select_indices": lambda memory, indices: memory.map_rows(lambda t: t[indices]),
    "reset": lambda memory: memory.clear(),
}


def _capacity(cache) -> int:
    """The capacity of a cache in tokens; -1 if it grows."""
    if not getattr(getattr(cache, "self_attention_cache", cache), "layers", True):
        return -1  # a DynamicCache creates its layers when they run
    for name in ("get_max_length", "get_max_cache_shape"):  # the name has changed between releases
        if hasattr(cache, name):
            return getattr(cache, name)() or -1
    return -1


def cache_in(output):
    """The KV cache that a root created and returned, if any."""
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ()
    return next((value for value in values if is_cache(value)), None)
