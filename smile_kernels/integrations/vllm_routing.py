"""Routing that remembers, in vLLM: sums over the tokens in pages of the KV cache, evidence of the layers beside it.

The equations are those of `smile_kernels.routing`. With scope "causal", token t needs at every router that scores the
sum of p over the tokens of its request up to t: [routers x N] float32 for a token. These sums are a layer of the KV
cache, so whatever is true of a token's keys is true of its sums, under chunked prefill, prefix caching, preemption and
speculative decoding alike. A pass reads them once for each request, of the token before its first, and writes each.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config, get_layers_from_vllm_config
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec

from ..functional import select_experts
from ..routing import RoutingPolicy, energy_shares, log_evidence


class RememberedRouting:
    """A model's policy: numbers its routers in the order their layers are built, and chooses as they run.

    Raises:
        NotImplementedError: a policy, or (from `add`) an engine, that vLLM cannot carry; the message names it.
    """

    def __init__(self, policy: RoutingPolicy, num_local_experts: int, num_experts_per_tok: int):
        if policy.scope == "sequence":
            raise NotImplementedError(
                "routing: has scope 'sequence', where the last token of a prompt changes the choice of its first; vLLM "
                "computes prompts in chunks and shares what is cached of a prefix, so expected scope 'causal' or "
                "'token' in the checkpoint's quantization_config"
            )
        self.policy, self.n, self.m = policy, num_local_experts, num_experts_per_tok
        self.routers = 0
        self.due = 0  # the router that runs next

    def add(self, routers: int) -> int:
        """Makes room for the routers of one more layer -> the number of its first."""
        if self.routers == 0:
            self._start(get_current_vllm_config())
        self.routers += routers
        return self.routers - routers

    def _start(self, config: VllmConfig) -> None:
        model, parallel = config.model_config, config.parallel_config
        refused = {
            "pipeline_parallel_size": (parallel.pipeline_parallel_size > 1, "a stage sees no other's evidence"),
            "decode_context_parallel_size": (parallel.decode_context_parallel_size > 1, "a rank sees some tokens only"),
            "prefill_context_parallel_size": (
                parallel.prefill_context_parallel_size > 1,
                "a rank sees some tokens only",
            ),
            "enable_dbo": (parallel.use_ubatching, "two batches would share one evidence"),
            "kv_transfer_config": (config.kv_transfer_config is not None, "the sums are not transferred with the keys"),
            "model": (model.is_multimodal_model or model.is_encoder_decoder, "its parts route their tokens apart"),
        }
        for name, (given, reason) in refused.items():
            if given:
                raise NotImplementedError(
                    f"{name}: does not go with the checkpoint's routing, {self.policy}: {reason}; expected one without "
                    "it, or no routing in the quantization_config, which means the published routing"
                )
        tokens = config.scheduler_config.max_num_batched_tokens
        self.evidence = torch.zeros(tokens, self.n)  # L of the router that ran last
        self.weights = torch.zeros(tokens, self.m)  # the choice of the last router that scored
        self.ids = torch.zeros(tokens, self.m, dtype=torch.int32)
        if self.policy.scope == "causal":
            # vLLM reads a layer's number from its name.
            self.cache_name = f"smile_routing.{model.get_total_num_hidden_layers()}"
            compilation = config.compilation_config
            compilation.static_forward_context[self.cache_name] = SumsCache(self)
            # The op needs each pass's metadata: it runs between CUDA graphs, as attention does.
            compilation.splitting_ops = [*(compilation.splitting_ops or ()), "vllm::smile_running_sums"]

    def count(self, first: int, routers: int) -> int:
        """How many of the routers from number `first` on compute scores; those after `lock_after` do not."""
        lock = self.policy.lock_after
        return routers if lock is None else min(max(lock - first, 0), routers)

    def choose(self, scores: Tensor, first: int, routers: int) -> tuple[Tensor, Tensor]:
        """The choices of the layer whose first router has number `first`.

        Args:
            scores: [T, count(first, routers), N] float32.

        Returns:
            weights [T, routers, m] float32 and ids [T, routers, m] int32.

        Raises:
            RuntimeError: layers run in another order than they were built in.
        """
        if first not in (0, self.due):
            raise RuntimeError(
                f"routing: router {first} runs where router {self.due} is due; expected layers that run once each, in "
                "the order in which the model builds them, since each builds on the evidence below it"
            )
        self.due = first + routers
        tokens, scored = scores.shape[:2]
        if scored:
            sums = energy_shares(scores)
            if self.policy.scope == "causal":
                sums = torch.ops.vllm.smile_running_sums(sums, first, self.cache_name)
            logs = log_evidence(sums, self.policy.accumulate)
            if self.policy.accumulate:
                logs = logs.cumsum(1)
                if first > 0:
                    logs = logs + self.evidence[:tokens, None]
                logs = logs - logs.amax(-1, keepdim=True)
                self.evidence[:tokens] = logs[:, -1]
            weights, ids = select_experts(logs, self.m)
            if self.policy.lock_after is not None:
                self.weights[:tokens], self.ids[:tokens] = weights[:, -1], ids[:, -1]
        else:
            weights, ids = self.weights[:tokens, None], self.ids[:tokens, None]
        locked = routers - max(scored, 1)
        return tuple(torch.cat([t, t[:, -1:].expand(-1, locked, -1)], 1) for t in (weights, ids))


class SumsCache(AttentionLayerBase):
    """The layer of the KV cache that holds the sums, [blocks, 1, block_size, routers x N] float32."""

    def __init__(self, routing: RememberedRouting):
        self.routing = routing
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
            "head_size": self.routing.count(0, self.routing.routers) * self.routing.n,
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


def smile_running_sums(shares: Tensor, first: int, cache_name: str) -> Tensor:
    """shares [T, P, N] of the routers from `first` on -> their sums over each token's request up to it, kept."""
    metadata, _, pages, slots = get_attention_context(cache_name)
    tokens, routers, n = shares.shape
    # Differences of prefix sums over all requests, in float64: they must not lose a short one behind long ones.
    sums = shares.flatten(1).double().cumsum(0)
    if metadata is None:  # vLLM measures its memory
        return sums.to(shares.dtype).view_as(shares)
    if len(slots) != tokens:
        raise RuntimeError(f"routing: a SMILE layer has {tokens} tokens in a pass of {len(slots)}; expected as many")
    size, columns = pages.shape[2], slice(first * n, (first + routers) * n)
    page = pages[:, 0, :, columns]
    before = torch.where(metadata.known, page[metadata.before // size, metadata.before % size], 0)
    sums = (sums - F.pad(sums, (0, 0, 1, 0))[metadata.start] + before).to(shares.dtype)
    slots = slots.clamp_min(0)  # padding, -1, goes where vLLM keeps no token: block 0
    page[slots // size, slots % size] = sums
    return sums.view_as(shares)


def _running_sums_like(shares: Tensor, first: int, cache_name: str) -> Tensor:
    return torch.empty_like(shares)


direct_register_custom_op("smile_running_sums", smile_running_sums, fake_impl=_running_sums_like)
