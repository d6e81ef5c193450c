"""A layer of vLLM's KV cache that holds sums over the tokens of each request, for routing with scope "causal".

Token t needs, at every router that scores, the sum of p over the tokens of its request up to t: [routers x N] float32
for a token. These sums are a layer of the KV cache, so whatever is true of a token's keys is true of its sums, under
chunked prefill, prefix caching, preemption and speculative decoding alike. A pass reads them once for each request, of
the token before its first, and writes each.
"""

from collections.abc import Callable
from dataclasses import dataclass

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
        width: -> routers x N; asked for once every layer of the model is built.
    """

    def __init__(self, width: Callable[[], int]):
        self.width = width
        self.kv_cache = torch.tensor([])

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


class SumsMetadataBuilder(AttentionMetadataBuilder[SumsMetadata]):
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False):
        common, size = common_attn_metadata, self.kv_cache_spec.block_size
        rows = torch.arange(len(common.slot_mapping), device=common.slot_mapping.device)
        request = torch.searchsorted(common.query_start_loc[1:], rows, right=True).clamp_max(common.num_reqs - 1)
        known = common.compute_num_computed_tokens()
        last = (known - 1).clamp_min(0)
        block = common.block_table_tensor.gather(1, (last // size)[:, None].long())[:, 0]
        before = block.long() * size + last % size
        start = common.query_start_loc[request].long()
        return SumsMetadata(start, (known > 0)[request, None], before[request])


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


def smile_running_sums(shares: Tensor, first: int, gamma: float, cache_name: str) -> Tensor:
    """shares [T, P, N] of the routers from `first` on -> their sums over each token's request up to it, kept.

    The sum before each token counts `gamma` times (RoutingPolicy.half_life).
    """
    metadata, _, pages, slots = get_attention_context(cache_name)
    tokens, routers, n = shares.shape
    flat = shares.flatten(1)
    if metadata is None:  # vLLM measures its memory
        return flat.cumsum(0).view_as(shares)
    if len(slots) != tokens:
        raise RuntimeError(f"routing: a SMILE layer has {tokens} tokens in a pass of {len(slots)}; expected as many")
    size, columns = pages.shape[2], slice(first * n, (first + routers) * n)
    page = pages[:, 0, :, columns]
    before = torch.where(metadata.known, page[metadata.before // size, metadata.before % size], 0)
    if gamma == 1:
        # Differences of prefix sums over all requests, in float64: they must not lose a short one behind long ones.
        sums = flat.double().cumsum(0)
        sums = (sums - F.pad(sums, (0, 0, 1, 0))[metadata.start] + before).to(shares.dtype)
    else:
        begins = metadata.start == torch.arange(tokens, device=flat.device)
        flat = flat + torch.where(begins[:, None], gamma * before, 0)
        sums = running_sums(flat[None], torch.where(begins, 0.0, gamma)[None])[0]
    slots = slots.clamp_min(0)  # padding, -1, goes where vLLM keeps no token: block 0
    page[slots // size, slots % size] = sums
    return sums.view_as(shares)


def _running_sums_like(shares: Tensor, first: int, gamma: float, cache_name: str) -> Tensor:
    return torch.empty_like(shares)


direct_register_custom_op("smile_running_sums", smile_running_sums, fake_impl=_running_sums_like)
