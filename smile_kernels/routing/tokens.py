"""Maps the rows of a layer's input to tokens and sequences: padding, packing, KV caches and restarts."""

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import SmileError, reason
from .policy import RoutingPolicy

__all__ = ["Tokens", "is_cache", "limited_template", "user_turn_ids"]


def user_turn_ids(tokenizer: Any) -> tuple[int, ...] | None:
    """The token ids that begin each user turn in a tokenizer's chat template, for `RoutingPolicy.restart_at`.

    They precede a user's text both at the start of a conversation and after an answer, from the last special token on:
    `<|im_start|>user` and a line break in ChatML. None if the tokenizer has no chat template, or if turns begin in
    different ways.

    Raises:
        ValueError: not a tokenizer of transformers, or a chat template that fails or does not end.
    """
    if not hasattr(tokenizer, "apply_chat_template"):
        raise SmileError(f"tokenizer: is a {type(tokenizer).__name__}; expected a tokenizer of transformers")
    if not getattr(tokenizer, "chat_template", None):
        return None
    first, answer, second = "first-text", "answer-text", "second-text"
    turns = [("user", first), ("assistant", answer), ("user", second)]
    conversation = [{"role": role, "content": text} for role, text in turns]
    try:
        with limited_template():
            text = tokenizer.apply_chat_template(conversation, tokenize=False)
    except SmileError:
        raise
    except Exception as error:  # of the program in the template
        raise SmileError(f"chat_template: fails ({reason(error)}); expected one that has user turns") from error
    before_first = text.partition(first)[0]
    before_second = text.partition(answer)[2].partition(second)[0]
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(reversed(before_first), reversed(before_second)))
    head = "".join(character for character, _ in alike)[::-1]
    ids = tokenizer.encode(head, add_special_tokens=False)
    special = [i for i, token in enumerate(ids) if token in tokenizer.all_special_ids]
    return tuple(ids[special[-1] :] if special else ids) or None


@contextmanager
def limited_template(most: int = 2_000_000) -> Iterator[None]:
    """Raise ValueError where a chat template runs more than `most` lines of its program, whose loops may be nested."""
    lines, before = 0, sys.gettrace()

    def trace(frame: Any, event: str, argument: object) -> Any:
        nonlocal lines
        if frame.f_code.co_filename != "<template>":  # Jinja's name of a program from a string
            return None
        lines += 1
        if lines > most:
            raise SmileError(f"chat_template: runs more than {most:,} lines; expected a program that ends")
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


class Tokens:
    """The mapping from rows of a layer's input to tokens and sequences, from the root's arguments.

    batch B and length S (None: not known, every row counts); real [B, S] bool (None: all are); starts and ends
    [1 or B, S], each token's first and last neighbour where sequences are packed; past, the tokens in the KV cache;
    ids [B, S] where the root is given them.
    """

    def __init__(self, arguments: dict, policy: RoutingPolicy, root_name: str):
        self.policy, self.root_name = policy, root_name
        scope = policy.scope
        self.cache, self.cache_name = _cache_argument(arguments, root_name)
        if scope == "window" and self.cache is not None:
            raise NotImplementedError(
                f"routing: has scope 'window', which reads later tokens, and {root_name} is called with a KV cache; "
                "expected use_cache=False, or scope 'prompt' or 'causal'"
            )
        try:
            self.past = 0 if self.cache is None else self.cache.get_seq_length()
        except ValueError:  # without attention layers, as Mamba's
            self.past = self._counted(arguments, root_name)
        if isinstance(self.past, Tensor):
            self.past = self.past.clone()  # static caches count in place

        mask = arguments.get("attention_mask")
        if isinstance(mask, dict):  # one for each kind of attention layer
            mask = mask.get("full_attention", next(iter(mask.values())))
        if mask is None and arguments.get("patch_attention_mask") is not None:
            mask = arguments["patch_attention_mask"].flatten(1)  # [B, height, width] of images, in patches
        self.batch: Any = None  # sizes, where they are known; under compilation symbols
        self.length: Any = None
        for name in ("input_ids", "inputs_embeds"):
            if arguments.get(name) is not None:
                self.batch, self.length = arguments[name].shape[:2]
        if self.batch is None:
            given = next(
                (v for k, v in arguments.items() if isinstance(v, Tensor) and v.dim() and k not in _ASIDE), mask
            )
            self.batch = None if given is None else given.shape[0]
        if self.length is None and mask is not None and isinstance(self.past, int):
            self.length = mask.shape[-1] - self.past if mask.dim() == 2 else mask.shape[-2]
        self.real = None if mask is None else _real(mask, self.past, self.length)

        self.encoder_states = arguments.get("encoder_hidden_states")
        self.encoder_real = arguments.get("encoder_attention_mask")
        if self.encoder_states is not None:
            if scope in ("causal", "prompt") or policy.half_life is not None or policy.restart_at is not None:
                raise NotImplementedError(
                    f"routing: {root_name} attends to encoder_hidden_states, which have no causal order; expected "
                    "scope 'sequence' or 'token', without half_life and restart_at, for a decoder with cross-attention"
                )
            if self.encoder_real is not None:
                self.encoder_real = _real(self.encoder_real, 0, self.encoder_states.shape[1])

        # Reading a mask on the host is free on a CPU; under compilation and on a GPU the general form serves.
        real = self.real
        if real is not None and real.device.type == "cpu" and not torch.compiler.is_compiling() and bool(real.all()):
            self.real = None

        self.ids: Any = arguments.get("input_ids")  # a tensor wherever restart_at is set
        if policy.restart_at is not None and self.ids is None:
            raise NotImplementedError(
                f"restart_at: {root_name} is called without input_ids, in which the tokens {list(policy.restart_at)} "
                "would be found; expected input_ids, or a policy without restart_at"
            )
        self.factors: Tensor | None = None  # [B or 1, S or 1], how much of the sum before each token is left; None: all
        self._votes: Tensor | None = None
        self.starts: Tensor | None = None
        self.ends: Tensor | None = None
        if arguments.get("cu_seq_lens_q") is not None:
            if self.length is None:
                raise SmileError(
                    f"cu_seq_lens_q: is given to {root_name} without input_ids or inputs_embeds; expected one of them"
                )
            self._pack(_boundaries_from_lengths(arguments["cu_seq_lens_q"], self.length))
        elif mask is None and self.cache is None and arguments.get("position_ids") is not None:
            positions = arguments["position_ids"]
            if (
                positions.dim() == 3 and len(positions) == 4
            ):  # before those in time, height and width, those in the text
                positions = positions[0]
            if positions.dim() != 3 or len(positions) != 3:  # those of images say nothing about packing
                self._pack(_boundaries_from_positions(positions))

    def _counted(self, arguments: dict, root_name: str) -> int:
        """The tokens in a cache that does not count them: by the mask, or by the memory of a policy that has one."""
        if self.policy.scope == "token":
            mask: Any = arguments.get("attention_mask")
            embeds: Any = arguments.get("inputs_embeds")
            given = arguments.get("input_ids") if embeds is None else embeds
            if isinstance(mask, Tensor) and mask.dim() == 2 and isinstance(given, Tensor):
                return mask.shape[1] - given.shape[1]
            return 0  # not read
        memory = getattr(self.cache, "routing_memory", None)
        if memory is not None:
            return memory.length
        if self.cache.has_previous_state():
            raise NotImplementedError(
                f"{self.cache_name}: does not count its tokens, and was filled when {root_name} had no routing policy "
                "that stores them; expected an empty cache"
            )
        return 0

    def _pack(self, first: Tensor) -> None:
        """first [1 or B, S] bool: the tokens that begin a sequence."""
        if self.length != first.shape[1]:
            raise SmileError(f"position_ids: has {first.shape[1]} tokens; expected {self.length}")
        if not torch.compiler.is_compiling() and not bool(first[:, 1:].any()):
            return
        at = torch.arange(first.shape[1], device=first.device).expand_as(first)
        last = F.pad(first[:, 1:], (0, 1), value=True)
        self.starts = torch.where(first, at, 0).cummax(1).values
        self.ends = torch.where(last, at, first.shape[1]).flip(1).cummin(1).values.flip(1)

    def find_factors(self, history: Tensor | None) -> None:
        """Sets `factors`; history [B, k - 1], the ids before this pass (-1: none), where restart_at has k ids."""
        half_life, pattern = self.policy.half_life, self.policy.restart_at
        if half_life is None and pattern is None:
            return
        device = next((t.device for t in (self.ids, self.real) if t is not None), None)
        factors: Any = torch.full(
            (1, self.length or 1), 1.0 if half_life is None else 2.0 ** (-1 / half_life), device=device
        )
        if pattern is not None:
            ids = self.ids if history is None else torch.cat([history.to(self.ids), self.ids], dim=1)
            width = len(pattern)
            ids = F.pad(ids, (width - 1 - (ids.shape[1] - self.length), 0), value=-1)
            found = (ids.unfold(1, width, 1) == ids.new_tensor(pattern)).all(-1)
            factors = torch.where(found, 0.0, factors)
        if self.starts is not None:
            at = torch.arange(self.length, device=self.starts.device)
            factors = torch.where(self.starts == at, 0.0, factors.to(at.device))
        self.factors = factors if self.real is None else torch.where(self.real, factors.to(self.real.device), 1.0)

    def last_votes(self, length: int) -> Tensor | None:
        """[B or 1, S] float: how much each of a layer's S tokens counts in the causal sum at the last; None: all do."""
        if self.factors is None or length != (self.length or length):  # one row for a whole sequence has all its votes
            return None
        if self._votes is None or self._votes.shape[1] != length:
            left = F.pad(self.factors.expand(-1, length)[:, 1:], (0, 1), value=1.0)
            self._votes = left.flip(1).cumprod(1).flip(1)
        return self._votes

    def shape(self, x: Tensor) -> tuple[int, int]:
        """(sequences, rows of x in each) for a layer's input x [..., D]."""
        if x.dim() == 3 and x.shape[0] == self.batch and x.shape[1] == self.length:
            return self.batch, self.length
        leading = x.shape[:-1]
        batch = self.batch if self.batch is not None else (leading[0] if leading else 1)
        if self.is_encoders(x):
            return leading[0], leading[1]
        if x.dim() == 2 and leading[0] != batch and self.length is not None and leading[0] == batch * self.length:
            return batch, self.length
        if batch == 0:
            return 0, self.length if self.length is not None else leading[1] if len(leading) > 1 else 1
        length = leading.numel() // batch
        single = self.policy.scope in ("sequence", "window") and self.starts is None and length == 1
        first = leading[0] if leading else 1
        if first != batch or (self.length is not None and self.length != length and not single):
            tokens = "tokens" if self.length is None else f"{self.length} tokens"
            advice = "Route other inputs with scope 'token', or call set_routing on the part that has its own"
            if first == batch and length < (self.length or 0):
                advice = "A head that gets the last tokens alone needs logits_to_keep=0, or exclude=['lm_head']"
            raise RuntimeError(
                f"routing: a SMILE layer of {self.root_name} has input {list(x.shape)}, where a forward pass over "
                f"{batch} sequences of {tokens} is running; expected [{batch}, {self.length or 'S'}, D]. {advice}"
            )
        return batch, length

    def mean(self, values: Tensor) -> Tensor:
        """The mean of values [B, S, N] over the tokens of each sequence that are not padding, [B, 1, N]."""
        if self.real is None:
            return values.mean(1, keepdim=True)
        real = self.real[..., None].to(values.device)
        return torch.where(real, values, 0).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1)

    def real_of(self, x: Tensor) -> Tensor | None:
        """Which rows of x are not padding, [B, S] bool; None: all. One row for a whole sequence is never padding."""
        if self.is_encoders(x):
            return self.encoder_real
        return self.real if self.real is not None and self.shape(x)[1] == self.length else None

    def padding_of(self, x: Tensor) -> Tensor | None:
        """Which rows of any input [..., D] are not padding, [...] bool; None: all, or not known."""
        real = self.encoder_real if self.is_encoders(x) else self.real
        if real is None or x.shape[:-1] == real.shape:
            return real
        return real.flatten() if x.shape[:-1] == (real.numel(),) else None

    def is_encoders(self, x: Tensor) -> bool:
        """Whether x is the encoder's output, whose tokens are others than those of the pass."""
        return self.encoder_states is not None and x is self.encoder_states


def is_cache(value: object) -> bool:
    """Whether `value` is a KV cache of transformers; the name of the argument does not matter."""
    return all(callable(getattr(value, name, None)) for name in ("get_seq_length", "update", "get_mask_sizes"))


def _cache_argument(arguments: dict, root_name: str) -> tuple[Any, str]:
    """The KV cache among a forward pass's arguments (None without one), and the name it came under.

    Raises:
        NotImplementedError: two caches, or an argument about caches, masks or positions that no policy can follow.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    caches = {name: value for name, value in given.items() if is_cache(value)}
    if len({id(value) for value in caches.values()}) > 1:
        raise NotImplementedError(
            f"routing: {root_name} is given {len(caches)} KV caches, {sorted(caches)}; expected one"
        )
    for name, value in given.items():
        concerns = any(part in name for part in ("mask", "position", "cache", "past", "seq_idx", "seq_len"))
        concerns |= name == "state"  # of RWKV
        if not concerns or name in caches or name in _KNOWN or isinstance(value, (bool, int, float, str)):
            continue
        raise NotImplementedError(
            f"{name}: is a {type(value).__name__}, which routing policies do not follow; expected a KV cache with "
            f"get_seq_length (no paged cache), or masks and positions among {', '.join(sorted(_KNOWN))}"
        )
    return next(iter(caches.values()), None), next(iter(caches), "cache")


# Arguments about masks and positions that a policy follows, or that say nothing about whose token is whose.
_KNOWN = frozenset(
    (
        *("attention_mask", "encoder_attention_mask", "head_mask", "cross_attn_head_mask", "bool_masked_pos"),
        *("position_ids", "position_bias", "position_embeddings", "cache_position", "mask_time_indices"),
        *("cu_seq_lens_q", "cu_seq_lens_k", "patch_attention_mask", "visual_pos_masks"),
    )
)

# Arguments whose first dimension is not a batch of inputs.
_ASIDE = (
    "attention_mask",
    "position_ids",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "cache_position",
    "labels",
    "visual_pos_masks",
)


def _real(mask: Tensor, past: int | Tensor, length: int | None) -> Tensor:
    """[B, S] bool, True on tokens, of masks [B, past + S] or [B, heads, S, keys] (a token attends to itself)."""
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        what = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise SmileError(f"attention_mask: is {what}; expected a tensor [B, past + S] or [B, heads, S, keys]")
    keys, of_tokens = mask.shape[-1], mask.dim() == 2
    if of_tokens:
        mask = mask != 0
    else:
        mask = mask[:, 0] > -1 if mask.is_floating_point() else mask[:, 0] != 0
        mask = mask[:, 0] if mask.shape[1] == 1 else mask
    if length is None or keys < length or (isinstance(past, int) and of_tokens and keys < past + length):
        raise SmileError(f"attention_mask: has {keys} columns; expected one for each of {past} + {length} tokens")
    # Windowed caches hold fewer keys than there were tokens: the last ones are those of this pass.
    start = min(past, keys - length) if isinstance(past, int) else past.clamp(max=keys - length)
    columns = torch.arange(length, device=mask.device) + start
    if mask.dim() == 2:
        return mask.index_select(1, columns)
    return mask.gather(2, columns[None, :, None].expand(mask.shape[0], -1, 1))[..., 0]


def _boundaries_from_positions(position_ids: Tensor) -> Tensor:
    """position_ids [1 or B, S] -> [1 or B, S] bool, True where a sequence begins: where positions do not continue."""
    if position_ids.dim() != 2:
        raise SmileError(
            f"position_ids: has shape {list(position_ids.shape)} and comes without attention_mask; expected [B, S], "
            "otherwise packed sequences cannot be distinguished"
        )
    return F.pad(position_ids.diff(dim=1) != 1, (1, 0), value=True)


def _boundaries_from_lengths(cu_seq_lens: Tensor, length: int) -> Tensor:
    """Offsets [sequences + 1] into one row of `length` tokens -> [1, S] bool, True where a sequence begins."""
    at = torch.arange(length, device=cu_seq_lens.device)
    return (at[:, None] == cu_seq_lens[None]).any(1)[None]
