"""A layer of vLLM's KV cache that holds sums over the tokens of each request, for routing with scope "causal".

Token t needs, at every router that scores, the sum of p over the tokens of its request up to t: [routers x N] float32
for a token. These sums are a layer of the KV cache, so whatever is true of a token's keys is true of its sums, under
chunked prefill, prefix caching, preemption and speculative decoding alike. A pass reads them once for each request, of
the token before its first, and writes each. vLLM lets a request begin on blocks that another one fills in the same
pass: then it reads them again, once they are written.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec

from ...routing.policy import running_sums


class SumsCache(AttentionLayerBase):
    """The layer of the KV cache that holds the sums, [blocks, 1, block_size, width] float32.

    Args:
        name: of the layer, in vLLM's table of layers.
        width: -> routers x N; asked for once every layer of the model is built.
        restart_at: token ids after which the sums restart (RoutingPolicy).
    """

    def __init__(self, name: str, width: Callable[[], int], restart_at: tuple[int, ...] | None):
        self.name, self.width, self.restart_at = name, width, restart_at
        self.kv_cache = torch.tensor([])
        self.rounds = 1  # how often this pass reads and writes sums
        self.restarts: Tensor | None = None  # [T] bool, the pass's tokens that complete restart_at; None: none does

    def begin(self, runner: Any, scheduler_output: Any, counts: np.ndarray) -> None:
        """A pass begins in which the model runner's requests have so many tokens each, in the batch's order."""
        batch = runner.input_batch
        computed = batch.num_computed_tokens_cpu[: len(counts)]
        self.rounds, self.restarts = 1, None
        if scheduler_output.scheduled_new_reqs or scheduler_output.scheduled_cached_reqs.resumed_req_ids:
            groups = runner.kv_cache_config.kv_cache_groups
            table = batch.block_table[next(i for i, group in enumerate(groups) if self.name in group.layer_names)]
            self.rounds += longest_chain(table.get_numpy_array(), table.block_size, computed, counts)
        if self.restart_at is not None:
            found = complete(self.restart_at, batch.token_ids_cpu, computed, counts)
            self.restarts = torch.from_numpy(found).to(runner.device) if found.any() else None

    def get_attn_backend(self) -> type[AttentionBackend]:
        return SumsBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        # Of the kind of the model's own layers, so that all share one set of blocks. A pass reads no further back than
        # one token, which any window holds.
        layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
        specs = [layer.get_kv_cache_spec(vllm_config) for layer in layers.values() if layer is not self]
        if not any(specs):
            raise NotImplementedError(
                "routing: has scope 'causal', and this model keeps no KV cache; expected a model that generates"
            )
        windows = {spec.sliding_window if isinstance(spec, SlidingWindowSpec) else None for spec in specs if spec}
        shape = {
            "block_size": vllm_config.cache_config.block_size,
            "num_kv_heads": 1,
            "head_size": self.width(),
            "head_size_v": 0,
            "dtype": torch.float32,
        }
        if len(windows) == 1 and None not in windows:
            return SlidingWindowSpec(sliding_window=windows.pop(), **shape)
        return FullAttentionSpec(**shape)


@dataclass
class SumsMetadata:
    """Where the sums of each of a pass's T tokens (padding included) begin."""

    start: Tensor  # [T] the row of the first token of the same request
    known: Tensor  # [T, 1] bool: there are tokens before that one
    before: Tensor  # [T] the slot of the last of these
    rounds: int  # how often sums are read and written, until none is read that was written later in the pass


def longest_chain(table: np.ndarray, size: int, computed: np.ndarray, counts: np.ndarray) -> int:
    """How many requests of a pass at most begin one on the blocks of another, which the pass itself fills.

    Args:
        table: [requests, blocks] the blocks of each, of `size` tokens.
        computed, counts: [requests] how many tokens each had before the pass, and has in it.
    """
    first: np.ndarray = computed // size
    last: np.ndarray = (computed + counts - 1) // size
    writer = {int(block): row for row in range(len(counts)) for block in table[row, first[row] : last[row] + 1]}
    lengths: dict[int, int] = {}
    for row in np.argsort(computed, kind="stable").tolist():  # whose blocks a request begins on has fewer tokens
        if computed[row] > 0 and computed[row] % size == 0:  # a block that is partly filled is the request's own
            before = writer.get(int(table[row, first[row] - 1]))
            lengths[row] = 0 if before is None else 1 + lengths.get(before, 0)
    return max(lengths.values(), default=0)


def complete(pattern: tuple[int, ...], ids: np.ndarray, computed: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[T] bool: which tokens of a pass are the last of `pattern`; ids [requests, L], the tokens of each request."""
    row: np.ndarray = np.repeat(np.arange(len(counts)), counts)
    at = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts - computed, counts)
    found = at >= len(pattern) - 1
    for back, token in enumerate(reversed(pattern)):
        found &= ids[row, np.maximum(at - back, 0)] == token
    return found


class SumsMetadataBuilder(AttentionMetadataBuilder[SumsMetadata]):
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.cache: SumsCache = vllm_config.compilation_config.static_forward_context[layer_names[0]]

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False):
        common, size = common_attn_metadata, self.kv_cache_spec.block_size
        rows = torch.arange(len(common.slot_mapping), device=common.slot_mapping.device)
        request = torch.searchsorted(common.query_start_loc[1:], rows, right=True).clamp_max(common.num_reqs - 1)
        known = common.compute_num_computed_tokens()
        last = (known - 1).clamp_min(0)
        block = common.block_table_tensor.gather(1, (last // size)[:, None].long())[:, 0]
        before = block.long() * size + last % size
        start, known = common.query_start_loc[request].long(), (known > 0)[request]
        if self.cache.restarts is not None:
            restarts = F.pad(self.cache.restarts, (0, len(rows) - len(self.cache.restarts)))
            begin, start = start, torch.maximum(start, torch.where(restarts, rows, 0).cummax(0).values)
            known = known & (start == begin) & ~restarts[begin]
        return SumsMetadata(start, known[:, None], before[request], self.cache.rounds)


class SumsBackend(AttentionBackend):
    @staticmethod
    def get_name() -> str:
        return "SMILE_SUMS"

    @staticmethod
    def get_impl_cls():
        raise NotImplementedError("SMILE_SUMS computes no attention")

    @staticmethod
    def get_builder_cls() -> type[SumsMetadataBuilder]:
        return SumsMetadataBuilder


def smile_running_sums(shares: Tensor, sums: Tensor, first: int, gamma: float, cache_name: str) -> None:
    """shares [T, P, N] of the routers from `first` on -> sums, those over each token's request up to it, kept.

    The sum before each token counts `gamma` times (RoutingPolicy.half_life). What runs between CUDA graphs writes into
    memory that it is given, where the next graph reads.
    """
    metadata, _, pages, slots = get_attention_context(cache_name)
    tokens, routers, n = shares.shape
    flat = shares.flatten(1)
    if metadata is None:  # vLLM measures its memory
        sums.copy_(shares.cumsum(0))
        return
    if len(slots) != tokens:
        raise RuntimeError(f"routing: a SMILE layer has {tokens} tokens in a pass of {len(slots)}; expected as many")
    size, columns = pages.shape[2], slice(first * n, (first + routers) * n)
    page = pages[:, 0, :, columns]
    slots = slots.clamp_min(0)  # padding, -1, goes where vLLM keeps no token: block 0
    for _ in range(metadata.rounds):
        before = torch.where(metadata.known, page[metadata.before // size, metadata.before % size], 0)
        if gamma == 1:
            # Differences of prefix sums over all requests, in float64: they must not lose a short one behind long ones.
            prefix = flat.double().cumsum(0)
            upto = (prefix - F.pad(prefix, (0, 0, 1, 0))[metadata.start] + before).to(shares.dtype)
        else:
            begins = metadata.start == torch.arange(tokens, device=flat.device)
            own = flat + torch.where(begins[:, None], gamma * before, 0)
            upto = running_sums(own[None], torch.where(begins, 0.0, gamma)[None])[0]
        page[slots // size, slots % size] = upto
    sums.copy_(upto.view_as(shares))


def _running_sums_fake(shares: Tensor, sums: Tensor, first: int, gamma: float, cache_name: str) -> None:
    pass


direct_register_custom_op("smile_running_sums", smile_running_sums, ["sums"], _running_sums_fake)
