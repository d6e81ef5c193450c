"""Scope "prompt" in vLLM: a request is computed as two, of which the first processes the prompt and votes.

The scheduler adds another request before each: the same prompt on the base model, whose only token is the number of
the winning expert. In its passes, the routers of the first `lock_after` blocks sum their evidence, over tokens in the
KV cache and over layers next to the model; the sampler gets the choice instead of logits, so that it is returned like
any token. Then the request itself runs with that expert, like one that asks for it (`requests`). Each has its own
prefix cache. Layers compute no scores in passes without votes.
"""

import functools
import itertools
from math import exp
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.sampling_params import SamplingParams
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.request import Request

from ...errors import SmileError
from ...functional import select_experts
from ...routing.policy import RoutingPolicy
from ...versions import expect
from .passes import smile_of
from .requests import KEY, Asked, asked_rows, extra_args, give, may_choose
from .routing import RememberedRouting

VOTE = "vote"  # the selection of a request that votes


class HasVoted(Exception):
    """Ends a pass in which all requests vote: the blocks that vote have run."""


class PromptRouting(RememberedRouting):
    """The policy in a worker: which rows of a pass vote, and the experts of the others.

    `weights` [tokens, width] and `ids` are the latter, which layers also read in compiled code and CUDA graphs.
    """

    votes: tuple[Tensor, Tensor] | None = None  # rows of a pass's votes: of their last tokens, of their logits
    only_votes = False  # whether the pass ends with the voting blocks

    def __init__(self, policy: RoutingPolicy, num_local_experts: int, num_experts_per_tok: int):
        super().__init__(policy, num_local_experts, num_experts_per_tok)
        self.taken: tuple[list, list] | None = None  # the arguments of the last pass
        vote_first()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        vote_first()  # in another process

    def _most(self, config: VllmConfig) -> int:
        """The maximum number of experts of a request."""
        return self.n if may_choose(config) else self.m

    def _refused(self, config: VllmConfig) -> dict[str, tuple[bool, str]]:
        from vllm.v1.core.sched.scheduler import Scheduler

        parallel, scheduler = config.parallel_config, config.scheduler_config.get_scheduler_cls()
        return super()._refused(config) | {
            "runner": (config.model_config.runner_type != "generate", "prompts that get no answer need no vote"),
            "scheduler_cls": (not issubclass(scheduler, Scheduler), "votes are put before requests in vLLM's own"),
            "kv_sharing_fast_prefill": (config.cache_config.kv_sharing_fast_prefill, "its layers see some tokens only"),
            "enable_expert_parallel": (parallel.use_sequence_parallel_moe, "a rank sees some tokens only"),
        }

    def _start(self, config: VllmConfig) -> None:
        super()._start(config)
        # Ranks of data parallelism run the same number of layers.
        self.may_end = config.speculative_config is None and config.parallel_config.data_parallel_size == 1
        follow_votes()

    def attach(self, layer: nn.Module, name: str) -> None:
        """Register a layer under construction by its name, for passes."""
        get_current_vllm_config().compilation_config.static_forward_context[name] = layer

    def admit(self, request: Any, asked: Asked | None, config: VllmConfig) -> None:
        """Raise ValueError if a request cannot vote, or selects too many experts."""
        if asked is not None and len(asked) > self._most(config):
            raise SmileError(
                f"{KEY}: has {len(asked)} experts; expected at most {self._most(config)}, as many as the checkpoint's "
                "num_experts_per_tok (any number with --additional-config '{\"smile_expert_per_request\": true}')"
            )
        if asked is None and request.resumable:
            raise SmileError(f"{KEY}: is not given for a prompt in parts, which cannot vote; expected one")
        if asked is None and request.prompt_embeds is not None and self.policy.restart_at is not None:
            raise SmileError(
                f"{KEY}: is not given for prompt_embeds, in which restart_at {list(self.policy.restart_at)} cannot be "
                "found; expected one, or token ids"
            )

    def begin_pass(self, runner: Any, scheduler_output: Any, counts: np.ndarray) -> None:
        super().begin_pass(runner, scheduler_output, counts)
        names = runner.input_batch.req_ids
        asked: list = [extra_args(runner.requests[name].sampling_params).get(KEY) for name in names]
        if None in asked:
            raise RuntimeError(f"{KEY}: request {names[asked.index(None)]} has none; expected its prompt to have voted")
        told = asked, counts.tolist()
        if told != self.taken:
            experts = [() if each == VOTE else each for each in asked]
            rows = asked_rows(experts, counts, self.weights.shape[1])
            for buffer, values in zip((self.weights, self.ids), rows):
                buffer[: len(values)].copy_(torch.from_numpy(values))
            self.taken = told
        voting = [row for row, each in enumerate(asked) if each == VOTE]
        self.votes, self.only_votes = None, self.may_end and len(voting) == len(asked)
        if voting:
            drafts = scheduler_output.scheduled_spec_decode_tokens
            sampled = np.cumsum([1 + len(drafts.get(name, ())) for name in names]) - 1
            last, at = (torch.from_numpy(rows[voting]) for rows in (np.cumsum(counts) - 1, sampled))
            self.votes = last.to(runner.device), at.to(runner.device)

    def served(self, tokens: int) -> tuple[Tensor, Tensor]:
        """The experts of a pass's first `tokens` tokens: weights and ids [T, width]."""
        return self.weights[:tokens], self.ids[:tokens]

    @property
    def voting(self) -> bool:
        """Whether layers sum evidence: a request votes, or vLLM measures its memory."""
        return self.votes is not None or get_forward_context().attn_metadata is None

    def cast(self, logits: Tensor) -> Tensor:
        """logits [rows, vocabulary]; the row of a vote has the logarithms of its experts' weights, otherwise -inf."""
        if self.votes is None:
            return logits
        last, at = self.votes
        weights, ids = select_experts(self.evidence[last], self.m, self.policy.top_p)
        votes = logits.new_full((len(at), logits.shape[1]), -torch.inf, dtype=torch.float32)
        votes.scatter_reduce_(1, ids.clamp_min(0).long(), weights.log(), "amax")  # -1 if top_p excludes it
        return logits.float().index_copy_(0, at, votes)


def follow_votes() -> None:
    """Make vLLM's model runner, in this process, end passes after their votes, and sample their choices."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    for name in ("_model_forward", "_sample"):
        expect("vllm", callable(getattr(GPUModelRunner, name, None)), f"GPUModelRunner.{name}")
    forward, sample = GPUModelRunner._model_forward, GPUModelRunner._sample
    if getattr(sample, "follows_votes", False):
        return

    @functools.wraps(forward)
    def model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return forward(self, *args, **kwargs)
        except HasVoted:
            config, tokens = self.model_config, len(kwargs["positions"])
            return torch.zeros(tokens, config.get_hidden_size(), dtype=config.dtype, device=self.device)
        finally:
            if (routing := votes_of(self.vllm_config)) is not None:
                routing.only_votes = False  # vLLM's own trial passes run all blocks

    @functools.wraps(sample)
    def sample_votes(self: Any, logits: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        if (routing := votes_of(self.vllm_config)) is not None and logits is not None:
            logits = routing.cast(logits)
        return sample(self, logits, *args, **kwargs)

    sample_votes.follows_votes = True  # type: ignore[attr-defined]
    GPUModelRunner._model_forward = model_forward  # type: ignore[method-assign]
    GPUModelRunner._sample = sample_votes  # type: ignore[method-assign]


def votes_of(config: VllmConfig) -> PromptRouting | None:
    """The policy of an engine whose prompts vote; None for others."""
    routing = getattr(smile_of(config), "routing", None)
    return routing if isinstance(routing, PromptRouting) else None


class Pending:
    """Requests of one scheduler that wait for the votes on their prompts."""

    def __init__(self, num_experts_per_tok: int):
        self.m = num_experts_per_tok
        self.numbers = itertools.count()
        self.prompts: dict[str, tuple] = {}  # of the pending votes, by their ids
        self.waiting: dict[tuple, list[Request]] = {}  # for the vote on a prompt

    def begin(self, request: Request) -> Request | None:
        """The vote that `request` is to wait for; None: one on the same prompt is pending."""
        own = None if request.prompt_embeds is None else request.request_id
        prompt = tuple(request.prompt_token_ids or ()), request.cache_salt, request.lora_request, own
        self.waiting.setdefault(prompt, []).append(request)
        if len(self.waiting[prompt]) > 1:
            return None
        vote = Request(
            request_id=f"smile-{VOTE}-{next(self.numbers)}",
            prompt_token_ids=request.prompt_token_ids,
            prompt_embeds=request.prompt_embeds,
            prompt_is_token_ids=request.prompt_is_token_ids,
            sampling_params=SamplingParams(
                temperature=0,
                max_tokens=1,
                ignore_eos=True,
                detokenize=False,
                logprobs=self.m if self.m > 1 else None,
                extra_args={KEY: VOTE},
            ),
            pooling_params=None,
            client_index=request.client_index,
            arrival_time=request.arrival_time,
            lora_request=request.lora_request,
            cache_salt=f"{request.cache_salt or ''}|{KEY}={VOTE}",
            priority=request.priority,
            block_hasher=request._block_hasher,
        )
        self.prompts[vote.request_id] = prompt
        return vote

    def end(self, output: Any) -> list[Request] | None:
        """The requests that waited for what `output` says, with its experts; None if it is not that of a vote."""
        if output.request_id not in self.prompts:
            return None
        requests = self.waiting.pop(self.prompts.pop(output.request_id))
        if not output.new_token_ids:
            raise RuntimeError(f"{KEY}: {output.request_id} ended as {output.finish_reason}; expected an expert")
        asked = [(output.new_token_ids[0], 1.0)]
        if self.m > 1:
            logprobs = output.new_logprobs
            weights = dict(zip(logprobs.logprob_token_ids[0].tolist(), logprobs.logprobs[0].tolist()))
            asked = sorted((i, exp(w)) for i, w in weights.items() if exp(w) > 0)
        for request in requests:
            give(request, asked)
            request.block_hashes.clear()
            request.update_block_hashes()
        return requests

    def withdraw(self, names: set[str] | None) -> tuple[list[Request], set[str]]:
        """Remove waiting requests of these names (None: all); return them, and the votes without waiting requests."""
        gone, idle = [], set()
        for vote, prompt in list(self.prompts.items()):
            requests = self.waiting[prompt]
            left = [request for request in requests if names is not None and request.request_id not in names]
            gone += [request for request in requests if request not in left]
            self.waiting[prompt] = left
            if not left:
                idle.add(vote)
                del self.prompts[vote], self.waiting[prompt]
        return gone, idle


def vote_first() -> None:
    """Make vLLM's scheduler, in this process, add a vote before each request that selects no experts."""
    from vllm.v1.core.sched.scheduler import Scheduler

    for name in ("add_request", "finish_requests", "update_from_output"):
        expect("vllm", callable(getattr(Scheduler, name, None)), f"Scheduler.{name}")
    expect("vllm", callable(getattr(Request, "update_block_hashes", None)), "Request.update_block_hashes")
    add, finish, update = Scheduler.add_request, Scheduler.finish_requests, Scheduler.update_from_output
    if getattr(add, "votes_first", False):
        return

    def pending(scheduler: Scheduler) -> Pending | None:
        routing = votes_of(scheduler.vllm_config)
        if routing is None:
            return None
        return scheduler.__dict__.setdefault("smile_pending", Pending(routing.m))

    @functools.wraps(add)
    def add_request(self: Scheduler, request: Request) -> None:
        waiting = pending(self)
        if waiting is None or request.sampling_params is None or KEY in extra_args(request.sampling_params):
            return add(self, request)
        vote = waiting.begin(request)
        if vote is not None:
            add(self, vote)

    @functools.wraps(finish)
    def finish_requests(self: Scheduler, request_ids: Any, finished_status: Any) -> list[Request]:
        waiting = pending(self)
        if waiting is None:
            return finish(self, request_ids, finished_status)
        names = None if request_ids is None else {request_ids} if isinstance(request_ids, str) else set(request_ids)
        gone, idle = waiting.withdraw(names)
        for request in gone:  # vLLM ends it by its rules
            add(self, request)
        finished = finish(self, None if names is None else names | idle, finished_status)
        return [request for request in finished if extra_args(request.sampling_params).get(KEY) != VOTE]

    @functools.wraps(update)
    def update_from_output(self: Scheduler, *args: Any, **kwargs: Any) -> Any:
        outputs = update(self, *args, **kwargs)
        waiting, ready = pending(self), []
        if waiting is None or not waiting.prompts:
            return outputs
        for each in outputs.values():
            ended = [(output, waiting.end(output)) for output in each.outputs]
            each.outputs = [output for output, requests in ended if requests is None]
            ready += [request for _, requests in ended for request in requests or ()]
        for request in reversed(ready):  # each continues at the position of its vote: before later ones
            add(self, request)
            self.waiting.remove_request(request)
            self.waiting.prepend_request(request)
        return outputs

    add_request.votes_first = True  # type: ignore[attr-defined]
    Scheduler.add_request = add_request  # type: ignore[method-assign]
    Scheduler.finish_requests = finish_requests  # type: ignore[method-assign]
    Scheduler.update_from_output = update_from_output  # type: ignore[method-assign]


def smile_vote(x: Tensor, weights: Tensor, ids: Tensor, name: str) -> None:
    """Evidence of the SMILE layer `name` for x [T, D]; writes its tokens' experts to weights and ids [T, width]."""
    layer: Any = get_forward_context().no_compile_layers[name]
    for into, served in zip((weights, ids), layer.quant_method.vote(layer, x)):
        into.copy_(served)


def _smile_vote_fake(x: Tensor, weights: Tensor, ids: Tensor, name: str) -> None:
    pass


direct_register_custom_op("smile_vote", smile_vote, ["weights", "ids"], _smile_vote_fake)
