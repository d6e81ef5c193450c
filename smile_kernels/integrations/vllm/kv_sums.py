"""A layer of vLLM's KV cache that holds sums over the tokens of each request, for routing with scope "causal".

Token t needs, at every router that computes scores, the sum of p over the tokens of its request up to t: [routers x N]
float32 per token. These sums are a layer of the KV cache, so a token's sums are treated like its keys, with chunked
prefill, prefix caching, preemption and speculative decoding. A pass reads them once for each request, at the token
before its first, and writes those of every token. vLLM lets a request begin on blocks that another one fills in the
same pass: then they are read again after they are written.
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
        width: -> routers x N; called after every layer of the model is built.
        restart_at: token ids after which the sums restart (RoutingPolicy).
    """

    def __init__(self, name: str, width: Callable[[], int], restart_at: tuple[int, ...] | None):
        self.name, self.width, self.restart_at = name, width, restart_at
        self.kv_cache = torch.tensor([])
        self.rounds = 1  # how often this pass reads and writes sums
        self.restarts: Tensor | None = None  # [T] bool, the pass's tokens that complete restart_at; None: none

    def begin(self, runner: Any, scheduler_output: Any, counts: np.ndarray) -> None:
        """Begin a pass: `counts` are the tokens of each request of the model runner, in the order of the batch."""
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
        # Of the kind of the model's own layers, so that all share one set of blocks. A pass reads at most
        # one token back, which is inside every window.
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
    """The first token and the previous slot of the sums of each of a pass's T tokens (including padding)."""

    start: Tensor  # [T] the row of the first token of the same request
    known: Tensor  # [T, 1] bool: there are tokens before that one
    before: Tensor  # [T] the slot of the last of these
    rounds: int  # how often sums are read and written, until none is read that was written later in the pass


def longest_chain(table: np.ndarray, size: int, computed: np.ndarray, counts: np.ndarray) -> int:
    """The longest chain of requests of a pass that begin on blocks of one another, which the pass itself fills.

    Args:
        table: [requests, blocks] the blocks of each, of `size` tokens.
        computed, counts: [requests] how many tokens each had before the pass, and has in it.
    """
    first: np.ndarray = computed // size
    last: np.ndarray = (computed + counts - 1) // size
    writer = {int(block): row for row in range(len(counts)) for block in table[row, first[row] : last[row] + 1]}
    lengths: dict[int, int] = {}
    for row in np.argsort(computed, kind="stable").tolist():  # the request whose blocks are shared has fewer tokens
        if computed[row] > 0 and computed[row] % size == 0:  # a partly filled block belongs to one request
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
    """shares [T, P, N] of the routers from `first` on -> the sums over each token's request up to it, also stored.

    The sum before each token is multiplied by `gamma` (RoutingPolicy.half_life). Operators between CUDA graphs write
    into given memory, which the next graph reads.
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
    slots = slots.clamp_min(0)  # padding, -1, is written to block 0, which has no tokens
    upto = flat
    for _ in range(metadata.rounds):
        before = torch.where(metadata.known, page[metadata.before // size, metadata.before % size], 0)
        if gamma == 1:
            # Differences of prefix sums over all requests, in float64, so that a short one after long ones is accurate.
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
