"""Routing policies in vLLM: evidence of previous layers next to the model, sums over tokens in the KV cache.

The equations are those of `smile_kernels.routing`.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config

from ...functional import select_experts
from ...routing.policy import RoutingPolicy, block_numbers, energy_shares, log_evidence
from ...versions import expect
from .kv_sums import SumsCache
from .passes import follow_passes


class RememberedRouting:
    """A model's policy: numbers its routers in the order in which their layers are built, and chooses when they run.

    Raises:
        NotImplementedError: a policy, or (from `add`) an engine, that is not supported; the message names it.
    """

    def __init__(self, policy: RoutingPolicy, num_local_experts: int, num_experts_per_tok: int):
        if policy.scope in ("sequence", "window"):
            raise NotImplementedError(
                f"scope: is {policy.scope!r}, where later tokens of a prompt change the choice of earlier ones: vLLM "
                "computes prompts in chunks and shares what is cached of a prefix, so expected scope 'prompt', "
                "'causal' or 'token' in the checkpoint's quantization_config"
            )
        self.policy, self.n, self.m = policy, num_local_experts, num_experts_per_tok
        self.gamma = 1.0 if policy.half_life is None else 2 ** (-1 / policy.half_life)
        self.names: list[str] = []  # of the routers' layers, in the order in which they are built
        self.due = 0  # the router that runs next
        self.cache: SumsCache | None = None  # of scopes that sum over tokens

    @property
    def routers(self) -> int:
        return len(self.names)

    def add(self, names: list[str]) -> int:
        """Add the routers of a layer, with the names of their linear layers -> the number of the first."""
        if not self.names:
            self._start(get_current_vllm_config())
        self.names += names
        return self.routers - len(names)

    def _refused(self, config: VllmConfig) -> dict[str, tuple[bool, str]]:
        """Unsupported features of engines by name: whether the engine has it, and the reason."""
        model, parallel = config.model_config, config.parallel_config
        scheduler = config.scheduler_config
        return {
            "pipeline_parallel_size": (parallel.pipeline_parallel_size > 1, "a stage sees no other's evidence"),
            "decode_context_parallel_size": (parallel.decode_context_parallel_size > 1, "a rank sees some tokens only"),
            "prefill_context_parallel_size": (
                parallel.prefill_context_parallel_size > 1,
                "a rank sees some tokens only",
            ),
            "enable_dbo": (parallel.use_ubatching, "two batches would share one evidence"),
            "kv_transfer_config": (config.kv_transfer_config is not None, "the sums are not transferred with the keys"),
            "async_scheduling": (
                self.policy.scope == "causal" and self.policy.restart_at is not None and scheduler.async_scheduling,
                "the tokens that may complete restart_at are not known in time",
            ),
            "model": (model.is_multimodal_model or model.is_encoder_decoder, "its parts route their tokens apart"),
        }

    def _most(self, config: VllmConfig) -> int:
        """The maximum number of experts of a token."""
        return self.m

    def _start(self, config: VllmConfig) -> None:
        for name, (given, reason) in self._refused(config).items():
            if given:
                raise NotImplementedError(
                    f"{name}: does not go with the checkpoint's routing, {self.policy}: {reason}; expected one without "
                    "it, or no routing in the quantization_config, which means the published routing"
                )
        tokens, width = config.scheduler_config.max_num_batched_tokens, self._most(config)
        # float32, also where vLLM makes the model in half precision.
        self.evidence = torch.zeros(tokens, self.n, dtype=torch.float32)  # L of the router that ran last
        self.weights = torch.zeros(tokens, width, dtype=torch.float32)  # the choice of the last router with scores
        self.ids = torch.zeros(tokens, width, dtype=torch.int32)
        if self.policy.scope in ("causal", "prompt"):
            # vLLM reads a layer's number from its name.
            self.cache_name = f"smile_routing.{config.model_config.get_total_num_hidden_layers()}"
            compilation = config.compilation_config
            _check_compilation(compilation)
            self.cache = SumsCache(
                self.cache_name, lambda: self.count(0, self.routers) * self.n, self.policy.restart_at
            )
            compilation.static_forward_context[self.cache_name] = self.cache
            # The ops need each pass's metadata: they run between CUDA graphs, like attention.
            ops = ("vllm::smile_running_sums", "vllm::smile_vote")
            compilation.splitting_ops = [*(compilation.splitting_ops or ()), *ops]
            follow_passes()

    def begin_pass(self, runner: Any, scheduler_output: Any, counts: np.ndarray) -> None:
        """Begin a pass: the number of tokens of each request, in the order of the model runner's batch."""
        if self.cache is not None:
            self.cache.begin(runner, scheduler_output, counts)

    def count(self, first: int, routers: int) -> int:
        """The number of routers from number `first` on that compute scores; those after `lock_after` do not."""
        lock = self.policy.lock_after
        if lock is None:
            return routers
        blocks = block_numbers(self.names)
        return sum(blocks[name] < lock for name in self.names[first : first + routers])

    def width(self) -> int:
        """Sums of one token: N for each router that computes scores."""
        return self.count(0, self.routers) * self.n

    def choose(self, scores: Tensor, first: int, routers: int, prior: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The choices of the layer whose first router has number `first`.

        Args:
            scores: [T, count(first, routers), N] float32.
            first, routers: the number of the layer's first router, and the count of its routers.
            prior: [routers, N] float32, router_prior of each; used by calibrated policies.

        Returns:
            weights [T, routers, m] float32 and ids [T, routers, m] int32.

        Raises:
            RuntimeError: layers run in another order than that in which they were built.
        """
        scored = scores.shape[1]
        if scored:
            logs = self.add_evidence(scores, first, routers, prior)
            weights, ids = select_experts(logs, self.m, self.policy.top_p)
            if self.policy.lock_after is not None:
                tokens = len(scores)
                self.weights[:tokens], self.ids[:tokens] = weights[:, -1], ids[:, -1]
        else:
            self._follow(first, routers)
            weights, ids = self.weights[: len(scores), None], self.ids[: len(scores), None]
        locked = routers - max(scored, 1)
        weights, ids = (torch.cat([t, t[:, -1:].expand(-1, locked, -1)], 1) for t in (weights, ids))
        return weights, ids

    def add_evidence(self, scores: Tensor, first: int, routers: int, prior: Tensor | None = None) -> Tensor:
        """L of the routers in `choose`, [T, count(first, routers), N]; the last is stored."""
        self._follow(first, routers)
        tokens, scored = scores.shape[:2]
        sums = shares = energy_shares(scores.square())
        if self.cache is not None:
            sums = torch.empty_like(shares)
            torch.ops.vllm.smile_running_sums(shares, sums, first, self.gamma, self.cache_name)
        prior = prior[:scored] if self.policy.calibrated and prior is not None else None
        logs = log_evidence(sums, self.policy.accumulate, prior)
        if self.policy.accumulate:
            logs = logs.cumsum(1)
            if first > 0:
                logs = logs + self.evidence[:tokens, None]
            logs = logs - logs.amax(-1, keepdim=True)
            self.evidence[:tokens] = logs[:, -1]
        return logs

    def _follow(self, first: int, routers: int) -> None:
        if first not in (0, self.due):
            raise RuntimeError(
                f"routing: router {first} runs where router {self.due} is due; expected layers that run once each, in "
                "the order in which the model builds them, since each builds on the evidence below it"
            )
        self.due = first + routers


def _check_compilation(compilation: object) -> None:
    """Raise ImportError if vLLM has changed so that the sums would be lost silently."""
    forward = getattr(compilation, "static_forward_context", None)
    expect("vllm", isinstance(forward, dict), "CompilationConfig.static_forward_context, a dict of layers by name")
    ops = getattr(compilation, "splitting_ops", 0)
    named = ops is None or (isinstance(ops, list) and all(isinstance(op, str) and "::" in op for op in ops))
    expect("vllm", named, "CompilationConfig.splitting_ops, a list of names such as 'vllm::unified_attention'")
