"""SMILE layers in vLLM, for any architecture built from vLLM's linear layers.

vLLM merges the projections of one x (q, k and v; gate and up) into one layer of P parts, which is one call of the
kernels (`functional.smile_linear`, parts): each part has its own router and experts, or none.
"""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    WEIGHT_LOADER_V2_SUPPORTED,
    LinearBase,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.utils import set_weight_attrs

from ...config import QUANT_METHOD, SmileConfig, SmileModuleConfig, check_tensors, read_smile_config
from ...errors import SmileError
from ...functional import select_experts, smile_delta, smile_linear
from ...ops import library
from ...storage import read_safetensors
from .passes import choose_the_runner
from .reports import FLAG, count_tokens, report_experts, reports
from .requests import KEY, RequestedExperts, admit_requests, extra_args, give, may_choose, why_not
from .routing import RememberedRouting
from .votes import HasVoted, PromptRouting

logger = init_logger("vllm.smile_kernels")  # vLLM shows only its own loggers

# The SMILE parameters of a layer; the others belong to its base.
_OWN = ("vh", "s", "u", "expert_bias", "router", "router_prior")


def _prepare_vllm() -> None:
    """Patches vLLM where it has no interface; other models are not affected."""
    admit_requests()
    choose_the_runner()
    report_experts()


class SmileQuantizationConfig(QuantizationConfig):
    """`quantization_config` of a SMILE checkpoint in vLLM."""

    def __init__(self, config: SmileConfig):
        super().__init__()
        self.config = config
        self.modules = config.modules
        self.num_experts_per_tok = config.num_experts_per_tok
        self.routing: RememberedRouting | None = None
        if not config.routing.is_alone:
            kind = PromptRouting if config.routing.scope == "prompt" else RememberedRouting
            self.routing = kind(config.routing, config.num_local_experts, self.num_experts_per_tok)
        self.base: Any = None  # of a quantised base
        if config.base is not None:
            method = get_quantization_config(config.base["quant_method"])
            self.base = method.from_config(copy.deepcopy(config.base))
        self.requests = RequestedExperts(config.num_local_experts, config.expert_names)
        _prepare_vllm()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _prepare_vllm()  # in another process

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        dtypes = [torch.bfloat16, torch.float16, torch.float32]
        return dtypes if self.base is None else [d for d in dtypes if d in self.base.get_supported_act_dtypes()]

    def get_cache_scale_mapper(self) -> Any:
        return (QuantizationConfig if self.base is None else self.base).get_cache_scale_mapper()

    def get_checkpoint_weight_mapper(self) -> Any:
        return (QuantizationConfig if self.base is None else self.base).get_checkpoint_weight_mapper()

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SmileQuantizationConfig":
        smile = SmileConfig.from_dict(config)
        if smile.base_model_name_or_path is not None:
            raise SmileError(
                f"base_model_name_or_path: is {smile.base_model_name_or_path!r}; vLLM reads one folder, so expected a "
                "whole checkpoint (load_pretrained, then save_pretrained, makes one)"
            )
        if smile.base is not None and smile.base.get("quant_method") == "torchao":
            raise SmileError(
                "base: is stored as 'torchao', which the plugin does not load; expected another method, or transformers"
            )
        return cls(smile)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        # Called before any weight is read: vLLM's own errors name neither truncated files nor misshapen tensors.
        for file in sorted(Path(model_name).glob("*.safetensors")):
            check_tensors(self.config, read_safetensors(file))
        if self.base is not None:
            self.base.maybe_update_config(model_name, hf_config=hf_config, revision=revision)

    def apply_vllm_mapper(self, hf_to_vllm_mapper) -> None:
        self.modules = hf_to_vllm_mapper.apply_dict(self.modules)
        if self.base is not None:
            self.base.apply_vllm_mapper(hf_to_vllm_mapper)

    def check_reload(self, folder: str) -> None:
        """Raises SmileError unless the checkpoint in a folder has the layers and experts of the one being served."""
        config = read_smile_config(folder)
        for name in ("num_local_experts", "num_experts_per_tok", "expert_names", "routing", "base"):
            theirs, ours = getattr(config, name), getattr(self.config, name)
            if theirs != ours:
                raise SmileError(
                    f"{folder}: {name} is {theirs}; expected {ours}, as the engine was started with: another takes a "
                    "restart"
                )
        for name in config.modules.keys() | self.config.modules.keys():
            theirs, ours = config.modules.get(name), self.config.modules.get(name)
            if theirs != ours:
                raise SmileError(
                    f"{folder}: layer {name} is {theirs}; expected {ours}, as the engine was started with: another "
                    "takes a restart"
                )
        stored = [tensor for file in sorted(Path(folder).glob("*.safetensors")) for tensor in read_safetensors(file)]
        check_tensors(config, stored)
        names = {tensor.name for tensor in stored}
        for name, entry in config.modules.items():
            optional = [one for one in ("expert_bias", "router", "router_prior") if getattr(entry, one)]
            for factor in ("vh", "s", "u", *optional, *(["weight"] if config.base is None else [])):
                if f"{name}.{factor}" not in names:
                    raise SmileError(f"{folder}: tensor {name}.{factor} is missing; expected all of the layer's")

    def admit(self, request: Any, config: VllmConfig) -> None:
        """Check the selection of a request, and store it there.

        Raises:
            ValueError: an unknown expert, or an engine whose requests cannot choose.
        """
        if reports(config):
            count_tokens()
        if request.sampling_params is None:
            return
        asked = self.requests.asked(request)
        if isinstance(self.routing, PromptRouting):
            self.routing.admit(request, asked, config)
        elif asked is not None and (reason := why_not(config)) is not None:
            raise SmileError(f"{KEY}: is {extra_args(request.sampling_params)[KEY]!r}; expected none, since {reason}")
        if asked is not None:
            give(request, asked)

    def needs_passes(self, config: VllmConfig) -> list[str]:
        """What of this model needs information about each pass; may be empty."""
        policy = self.config.routing
        needs = [f"routing with scope {policy.scope!r} of SMILE models"] if policy.scope != "token" else []
        return needs + (["experts of SMILE models by request"] if may_choose(config) else [])

    def begin_pass(self, runner: Any, scheduler_output: Any, counts: np.ndarray) -> None:
        """Begin a pass: the number of tokens of each request, in the order of the model runner's batch."""
        if self.routing is not None:
            self.routing.begin_pass(runner, scheduler_output, counts)
        if not isinstance(self.routing, PromptRouting):
            self.requests.begin_pass(runner, counts)

    def end_pass(self) -> None:
        self.requests.rows = None

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        parent, _, leaf = prefix.rpartition(".")
        names = [prefix]
        if prefix not in self.modules:
            names = [f"{parent}.{name}" if parent else name for name in self.packed_modules_mapping.get(leaf, ())]
        parts = {name: self.modules.get(name) for name in names}
        base = None
        if self.base is not None:
            self.base.packed_modules_mapping = self.packed_modules_mapping
            base = self.base.get_quant_method(layer, prefix)
        if not any(parts.values()):
            if self.base is not None:
                return base
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        if not isinstance(layer, LinearBase):
            raise SmileError(f"modules: {prefix} is a {type(layer).__name__} in vLLM; expected a linear layer")
        return SmileLinearMethod(
            parts,
            self.config.num_local_experts,
            self.num_experts_per_tok,
            self.routing,
            self.requests,
            top_p=self.config.routing.top_p,
            base=None if isinstance(base, UnquantizedLinearMethod) else base,
        )


class SmileLinearMethod(UnquantizedLinearMethod):
    """Creates, loads and applies one layer's experts; `parts` has one entry for each router, None for a dense part.

    `base` is the method of a quantised base, to whose product the experts are added.
    """

    def __init__(
        self,
        parts: dict[str, SmileModuleConfig | None],
        num_local_experts: int,
        num_experts_per_tok: int,
        routing: RememberedRouting | None = None,
        requests: RequestedExperts | None = None,
        top_p: float = 1.0,
        base: Any = None,
    ):
        super().__init__()
        self.base = base
        self.top_p = top_p
        self.loaded: set[tuple[str, int]] = set()  # tensors read since the layer was last complete, by part
        self.complete = False
        self.requests = requests
        self.names, self.parts = list(parts), list(parts.values())
        self.merged = len(parts) > 1
        self.n, self.m, self.routing = num_local_experts, num_experts_per_tok, routing
        self.prompt = routing if isinstance(routing, PromptRouting) else None
        self.present = {i: part for i, part in enumerate(self.parts) if part}
        self.ranks = [part.rank_of_expert if part else 0 for part in self.parts]
        self.r = max(self.ranks)
        self.g = max(part.rank_of_router for part in self.present.values())

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ) -> None:
        load = extra_weight_attrs.pop("weight_loader")
        p = len(self.parts)

        def loader(name: str, place: Callable[..., None]) -> Callable[..., None]:
            # When vLLM reloads weights, it expects a loader with a name and an argument `param`.
            def load_tensor(param: Tensor, loaded_weight: Tensor, *shard: Any) -> None:
                if not param.is_meta:  # for which vLLM first counts the loaded tensors
                    self.loaded.add((name, _index(p, *shard)))
                place(param, loaded_weight, *shard)

            return load_tensor

        sizes = input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype
        if self.base is None:
            own = loader("weight", functools.partial(self._load_weight, load))
            super().create_weights(layer, *sizes, weight_loader=own, **extra_weight_attrs)
            layer.weight.data.fill_(torch.nan)
        else:  # vLLM chose the loader by the name of this class
            theirs = layer.weight_loader_v2 if type(self.base).__name__ in WEIGHT_LOADER_V2_SUPPORTED else load
            self.base.create_weights(layer, *sizes, weight_loader=theirs, **extra_weight_attrs)
        d, o = input_size_per_partition, sum(output_partition_sizes)
        self.rows = [o] if p == 1 else output_partition_sizes
        if self.prompt is not None:
            self.prompt.attach(layer, self.names[0])
            self.requests = None  # its experts are stored with the votes
        elif self.requests is not None:
            self.requests = self.requests.attach(layer, self.names[0])
            if self.requests is None and reports(get_current_vllm_config()):
                raise SmileError(
                    f"{FLAG}: is True, and layers choose an expert for each token, which only the device knows; "
                    "expected routing with scope 'prompt', or requests that choose their experts"
                )
        present = list(self.present.values())
        if self.routing is not None:
            self.first = self.routing.add([self.names[i] for i in self.present])
        k = max(self.r, *(part.rank_of_router for part in present if not part.router), 0)

        def register(name: str, shape: tuple[int, ...], place: Callable, dtype=params_dtype, **attributes) -> None:
            # NaN marks tensors that are not in the checkpoint: vLLM does not detect missing ones.
            parameter = nn.Parameter(torch.full(shape, torch.nan, dtype=dtype), requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": loader(name, place), **attributes})
            layer.register_parameter(name, parameter)

        register("vh", (p, self.n, k, d), functools.partial(_load_part, layer))
        register("s", (p, self.n, self.r), functools.partial(_load_part, layer), dtype=torch.float32)
        register("u", (self.n, o, self.r), functools.partial(_load_rows, load), output_dim=1)
        if any(part.expert_bias for part in present):
            register("expert_bias", (self.n, o), load, output_dim=1)
        if any(part.router for part in present):
            register("router", (p, self.n, self.g, d), functools.partial(_load_part, layer))
        if any(part.router_prior for part in present):
            register("router_prior", (p, self.n), functools.partial(_load_part, layer), dtype=torch.float32)
        elif self.routing is not None and self.routing.policy.calibrated:
            raise SmileError(
                f"calibrated: is True in the checkpoint's routing, and {self.names[next(iter(self.present))]} has no "
                "router_prior; expected `smile-kernels calibrate` to have run on it"
            )

    def _load_weight(self, load: Callable, parameter: Tensor, loaded: Tensor, *shard: Any) -> None:
        """One part of weight [O, D], which the checkpoint stores as [D, O] with fan_in_fan_out.

        Some models of vLLM, such as GPT-2 for its Conv1D layers, transpose weights in any case.
        """
        part = self.parts[_index(len(self.parts), *shard)]
        if part is not None and loaded.dim() == 2:
            transposed = loaded.stride(0) == 1 and loaded.shape[1] > 1
            if transposed != part.fan_in_fan_out:
                loaded = loaded.t()
        load(parameter, loaded, *shard)

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        logger.info_once(
            "SMILE layers: %d experts, %d per token, routing %s; backend %s; %s",
            self.n,
            self.m,
            f"published, top_p {self.top_p}" if self.routing is None else str(self.routing.policy),
            library.choose_backend(None, layer.vh.device.type, layer.vh.dtype, self.n, False),
            f"requests {'cannot' if self.requests is self.prompt is None else 'may'} choose their experts",
        )
        names = _OWN if self.base is not None else ("weight", *_OWN)
        expected = {name: t for name, t in layer.named_parameters(recurse=False) if name in names}
        ends = torch.tensor(self.rows).cumsum(0).tolist()
        missing = []
        for i, part in enumerate(self.parts):
            rows = slice(ends[i] - self.rows[i], ends[i])
            for name, t in expected.items():
                if name == "weight":
                    piece, stored = t[rows], True
                elif name in ("u", "expert_bias"):
                    piece, stored = t[:, rows], part is not None and (name == "u" or part.expert_bias)
                else:
                    own = part is not None and (name not in ("router", "router_prior") or getattr(part, name))
                    piece, stored = t[i], own
                if not stored:
                    piece.zero_()
                elif piece.isnan().any() or (self.complete and (name, i) not in self.loaded):
                    missing.append(f"{self.names[i]}.{name}")
        if missing:
            raise SmileError(f"checkpoint: missing, or with NaN in them: {', '.join(missing)}")
        self.loaded, self.complete = set(), True
        self._find_router(layer)
        if self.base is not None:
            self.base.process_weights_after_loading(layer)

    def _find_router(self, layer: LinearBase) -> None:
        """Complete the router's rows of all parts if some are not the first of vh; `scored_rows` are for `_route`."""
        for name in ("expert_bias", "router", "router_prior"):
            if not hasattr(layer, name):
                layer.register_parameter(name, None)
        if any(part.router or part.rank_of_router != self.g for part in self.present.values()):
            if layer.router is None:
                rows = layer.vh.new_zeros(*layer.vh.shape[:2], self.g, layer.vh.shape[-1])
                layer.router = nn.Parameter(rows, requires_grad=False)
            for i, part in self.present.items():
                if not part.router:
                    layer.router[i, :, : part.rank_of_router] = layer.vh[i, :, : part.rank_of_router]
        scored, scored_rows = list(self.present), None
        if self.routing is not None:
            scored = scored[: self.routing.count(self.first, len(scored))]
        if scored and not self._routes_itself(layer):
            scored_rows = self._rows(layer, scored)
        # The first layer after the voting blocks ends a pass of votes.
        self.votes = self.prompt is not None and self.first <= self.prompt.count(0, self.prompt.routers)
        layer.register_buffer("scored_rows", scored_rows)  # persistent, so that vLLM copies it when it reloads weights

    def _rows(self, layer: LinearBase, parts: list[int]) -> Tensor:
        """The router's rows of some parts in float32, [parts x N x g, D]."""
        rows = layer.vh[:, :, : self.g] if layer.router is None else layer.router
        return rows[parts].flatten(0, 2).float()

    def _routes_itself(self, layer: LinearBase) -> bool:
        """Whether the kernel routes: no policy, m experts for each token, and x is not split."""
        return (
            self.routing is None
            and self.top_p == 1
            and not (isinstance(layer, RowParallelLinear) and layer.tp_size > 1)
        )

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.requests is None:
            return self.compute(layer, x, bias)
        return torch.ops.vllm.smile_layer(x, bias, self.names[0], sum(self.rows))

    def compute(self, layer: LinearBase, x: Tensor, bias: Tensor | None) -> Tensor:
        """y of the layer, with the selections of the requests of this pass, if supported."""
        split = isinstance(layer, RowParallelLinear) and layer.tp_size > 1
        asked = self.requests is not None and self.requests.rows is not None
        alone = self._routes_itself(layer) and not asked
        vh, s, router = layer.vh, layer.s, layer.router if alone else None
        if not self.merged:
            vh, s, router = vh[0], s[0], None if router is None else router[0]
        expert_bias = layer.expert_bias if not split or layer.tp_rank == 0 else None
        experts = vh, s, layer.u, expert_bias, router
        options: dict[str, Any] = {
            "num_experts_per_tok": self.m,
            "rank_of_router": self.g if alone else 1,
            "routing": None if alone else self._route(layer, x),
            "parts": self.rows if self.merged else None,
            "rank_of_parts": self.ranks if self.merged else None,
        }
        if self.base is None:
            return smile_linear(x, layer.weight, bias, *experts, **options)
        return smile_delta(self.base.apply(layer, x, bias), x, *experts, **options)

    def vote(self, layer: LinearBase, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scope "prompt": sum the evidence of votes -> the experts of each token of x [T, D]."""
        assert self.prompt is not None
        if self.prompt.voting:
            if layer.scored_rows is not None:
                scores = self._scores(layer, x, layer.scored_rows)
                self.prompt.add_evidence(scores, self.first, len(self.present), self._prior(layer))
            elif self.prompt.only_votes:
                raise HasVoted
        return self.prompt.served(len(x))

    def _scores(self, layer: LinearBase, x: Tensor, rows: Tensor) -> Tensor:
        """x [T, D] -> the scores of the routers with these rows, [T, routers, N]."""
        projections = F.linear(x.float(), rows)
        if isinstance(layer, RowParallelLinear) and layer.tp_size > 1:
            # x has a part of the columns: the projections are summed over ranks before the norm.
            projections = tensor_model_parallel_all_reduce(projections)
        return torch.linalg.vector_norm(projections.unflatten(-1, (-1, self.n, self.g)), dim=-1)

    def _prior(self, layer: LinearBase) -> Tensor | None:
        prior = layer.router_prior
        return prior if prior is None or len(self.present) == len(prior) else prior[list(self.present)]

    def _route(self, layer: LinearBase, x: Tensor) -> tuple[Tensor, Tensor]:
        """The choices of the layer's routers: weights and ids [..., P, m], or [..., m] where it is not merged."""
        p, leading, rows = len(self.present), x.shape[:-1], layer.scored_rows
        x = x.flatten(0, -2)
        if self.prompt is not None:
            if not self.votes:
                weights, ids = self.prompt.served(len(x))
            elif torch.compiler.is_compiling():
                served = self.prompt.served(len(x))
                weights, ids = (torch.empty_like(each) for each in served)
                torch.ops.vllm.smile_vote(x, weights, ids, self.names[0])
            else:
                weights, ids = self.vote(layer, x)
            weights, ids = (t[:, None].expand(-1, p, -1) for t in (weights, ids))
        elif self.routing is None:
            # The kernel routes if no request selects experts.
            scores = self._scores(layer, x, self._rows(layer, list(self.present)) if rows is None else rows)
            weights, ids = select_experts(scores, self.m, self.top_p)
        else:
            scores = x.new_empty(len(x), 0, self.n, dtype=torch.float32)
            scores = scores if rows is None else self._scores(layer, x, rows)
            weights, ids = self.routing.choose(scores, self.first, p, self._prior(layer))
        if self.requests is not None:
            weights, ids = self.requests.merge(weights, ids)
        shape = (*leading, p, ids.shape[-1])
        weights, ids = weights.reshape(shape), ids.reshape(shape)
        if not self.merged:
            return weights[..., 0, :], ids[..., 0, :]
        if p == len(self.parts):
            return weights, ids
        where = [list(self.present).index(i) if part else p for i, part in enumerate(self.parts)]
        weights, ids = F.pad(weights, (0, 0, 0, 1)), F.pad(ids, (0, 0, 0, 1), value=-1)  # for a dense part
        return weights[..., where, :], ids[..., where, :]


def _index(parts: int, shard: Any = None) -> Any:
    """The index of a part by vLLM's name for it; a layer with one part accepts any name."""
    return 0 if parts == 1 else {"q": 0, "k": 1, "v": 2}.get(shard, shard)


def _load_part(layer: LinearBase, parameter: Tensor, loaded: Tensor, *shard: Any) -> None:
    """One part of vh, s or router [P, N, ranks, D]; a lower rank is padded with zeros, D is split over ranks."""
    target = parameter.data[_index(len(parameter), *shard)]
    if target.dim() == 3 and loaded.shape[-1] != target.shape[-1]:
        loaded = loaded.narrow(-1, layer.tp_rank * target.shape[-1], target.shape[-1])
    target.zero_()
    if target.dim() == 1:
        target.copy_(loaded)
        return
    target[:, : loaded.shape[1]] = loaded


def _load_rows(load: Callable, parameter: Tensor, loaded: Tensor, *shard: Any) -> None:
    """One part of u [N, O, r], loaded by vLLM's own loader; a lower rank is padded with zeros."""
    load(parameter, F.pad(loaded, (0, parameter.shape[-1] - loaded.shape[-1])), *shard)
