"""Experts selected by a request: `vllm_xargs: {"expert": ...}` over HTTP, SamplingParams.extra_args in Python.

The front end checks the selection and adds it to the salt of the request's prefix cache: keys and values of different
experts are never shared. Before each pass the model runner reports the tokens of each request; the layers use the
selections instead of their routers' choice, in one operator per layer, so that they are read when the pass runs, not
when it is compiled.
"""

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import CUDAGraphMode, VllmConfig, get_current_vllm_config
from vllm.exceptions import VLLMClientError
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from ...errors import SmileError
from ...routing.override import expert_weights
from ...versions import expect
from .passes import follow_passes, smile_of

KEY = "expert"
FLAG = "smile_expert_per_request"  # in --additional-config: without it layers have no additional cost

Asked = Sequence[tuple[int, float]]  # (expert, weight), sent with the request


class RequestError(SmileError, VLLMClientError):
    """An error of a request: the server answers it with status 400 and the message, and continues."""


def may_choose(config: VllmConfig) -> bool:
    """Whether an engine was started for requests that choose their experts."""
    return isinstance(config.additional_config, dict) and bool(config.additional_config.get(FLAG))


def why_not(config: VllmConfig) -> str | None:
    """Why the requests of an engine cannot choose their experts; None: they can."""
    if not may_choose(config):
        return f"this engine's layers do not look for it (with --additional-config '{{\"{FLAG}\": true}}' they do)"
    model, parallel = config.model_config, config.parallel_config
    if config.use_v2_model_runner:
        return "the V2 model runner does not tell layers whose tokens they have (VLLM_USE_V2_MODEL_RUNNER=0 takes V1)"
    if model.is_multimodal_model or model.is_encoder_decoder:
        return "the parts of a multimodal or encoder-decoder model have tokens of their own"
    if parallel.use_ubatching or parallel.prefill_context_parallel_size > 1:
        return "dual-batch overlap and prefill context parallelism split the tokens of a pass"
    if config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE:
        return "CUDA graphs replay what they were captured with (--enforce-eager, or cudagraph_mode NONE, takes none)"
    return None


class RequestedExperts:
    """The selections of the requests of one engine, read by its layers in each pass."""

    def __init__(self, num_local_experts: int, expert_names: Sequence[str] | None):
        self.n, self.names = num_local_experts, expert_names
        self.rows: tuple[Tensor, Tensor, Tensor] | None = None  # weights, ids [T, k] and whether the policy chooses [T]

    def attach(self, layer: nn.Module, name: str) -> "RequestedExperts | None":
        """Register a layer under construction by its name, for passes; None if requests cannot choose."""
        config = get_current_vllm_config()
        if why_not(config) is not None:
            return None
        follow_passes()
        config.compilation_config.static_forward_context[name] = layer
        return self

    def asked(self, request: Any) -> Asked | None:
        """The selection of a request, checked; None: none."""
        expert = extra_args(request.sampling_params).get(KEY)
        return None if expert is None else self.check(expert)

    def check(self, expert: Any) -> Asked:
        """The selection of a request, by experts' indices; a list has one weight for each expert.

        Raises:
            ValueError: an unknown expert, or a wrong number of weights.
        """
        if isinstance(expert, (list, tuple)) and all(isinstance(e, (list, tuple)) for e in expert) and expert:
            expert = dict(map(tuple, expert))  # checked before
        elif isinstance(expert, (list, tuple)):
            if len(expert) != self.n:
                raise SmileError(f"{KEY}: has {len(expert)} weights; expected {self.n}, one for each expert")
            expert = dict(enumerate(expert))
        return list(expert_weights(expert, self.n, self.names, KEY).items())

    def begin_pass(self, runner: Any, counts: np.ndarray) -> None:
        """Begin a pass: the number of tokens of each request, in the order of the batch."""
        asked = (extra_args(runner.requests[name].sampling_params).get(KEY) for name in runner.input_batch.req_ids)
        self.begin([None if one is None else self.check(one) for one in asked], counts, runner.device)

    def begin(self, asked: Sequence[Asked | None], tokens: np.ndarray, device: torch.device) -> None:
        """Begin a pass: the selections of its requests, and the number of tokens of each, in the order of the batch."""
        self.rows = None
        if all(one is None for one in asked):
            return
        weights, ids = asked_rows([one or () for one in asked], tokens, max(1, *(len(one or ()) for one in asked)))
        own: np.ndarray = np.repeat(np.array([one is None for one in asked]), tokens)
        weights_of, ids_of, own_of = (torch.from_numpy(each).to(device) for each in (weights, ids, own))
        self.rows = weights_of, ids_of, own_of

    def merge(self, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The choice of a layer's P routers, [T, P, m], replaced by the selections of requests, [T, P, max(m, k)].

        Raises:
            RuntimeError: the layer's input has fewer tokens than the pass.
        """
        if self.rows is None:
            return weights, ids
        asked, asked_ids, own = self.rows
        more = len(ids) - len(own)  # vLLM pads a batch at its end
        if more < 0:
            raise RuntimeError(f"{KEY}: a SMILE layer has {len(ids)} tokens in a pass of {len(own)}; expected as many")
        width = max(ids.shape[-1], asked_ids.shape[-1])
        keep = F.pad(own, (0, more), value=True)[:, None, None]
        asked = F.pad(asked, (0, width - asked.shape[-1], 0, more))[:, None]
        asked_ids = F.pad(asked_ids, (0, width - asked_ids.shape[-1], 0, more), value=-1)[:, None]
        weights = F.pad(weights, (0, width - weights.shape[-1]))
        ids = F.pad(ids, (0, width - ids.shape[-1]), value=-1)
        return torch.where(keep, weights, asked), torch.where(keep, ids, asked_ids)


def asked_rows(
    asked: Sequence[Sequence[tuple[int, float]]], tokens: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """The selections of requests, a row per token: weights [T, width] float32 and ids [T, width] int32."""
    weights: np.ndarray = np.zeros((len(asked), width), np.float32)
    ids: np.ndarray = np.full((len(asked), width), -1, np.int32)
    for row, one in enumerate(asked):
        for i, (expert, weight) in enumerate(one):
            weights[row, i], ids[row, i] = weight, expert
    return np.repeat(weights, tokens, axis=0), np.repeat(ids, tokens, axis=0)


def admit_requests() -> None:
    """Make vLLM's front end check the selections of requests to SMILE models; other models are not affected."""
    from vllm.v1.engine.input_processor import InputProcessor

    expect("vllm", callable(getattr(InputProcessor, "process_inputs", None)), "InputProcessor.process_inputs")
    process = InputProcessor.process_inputs
    if getattr(process, "admits_experts", False):
        return

    @functools.wraps(process)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = process(self, *args, **kwargs)
        if (smile := smile_of(self.vllm_config)) is not None:
            try:
                smile.admit(request, self.vllm_config)
            except SmileError as error:
                raise RequestError(str(error)) from error
        return request

    process_inputs.admits_experts = True  # type: ignore[attr-defined]
    InputProcessor.process_inputs = process_inputs  # type: ignore[method-assign]


def extra_args(params: Any) -> Mapping[str, Any]:
    return getattr(params, "extra_args", None) or {}


def give(request: Any, asked: Asked) -> None:
    """Set the experts of a request, and separate its prefix cache from those with other experts."""
    params = copy.copy(request.sampling_params)  # requests with the same prompt and experts may share theirs
    params.extra_args = {**extra_args(params), KEY: asked or [(0, 0.0)]}
    request.sampling_params = params
    request.cache_salt = f"{request.cache_salt or ''}|{KEY}={asked}"


def smile_layer(x: Tensor, bias: Tensor | None, name: str, rows: int) -> Tensor:
    """The SMILE layer `name` of the engine whose pass is running: x [..., D] -> [..., rows]."""
    layer: Any = get_forward_context().no_compile_layers[name]
    return layer.quant_method.compute(layer, x, bias)


def _smile_layer_like(x: Tensor, bias: Tensor | None, name: str, rows: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


direct_register_custom_op("smile_layer", smile_layer, fake_impl=_smile_layer_like)
