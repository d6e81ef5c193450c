"""SMILE layers in vLLM, for any architecture built of vLLM's linear layers.

vLLM merges the projections that read one x (q, k and v; gate and up) into one layer of P parts. Each part keeps its own
router: the merged layer is a SMILE layer of P x N experts, of which each part selects m, and whose `u` and
`expert_bias` are zero outside their part's rows.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.utils import set_weight_attrs

from ...config import QUANT_METHOD, SmileConfig, SmileModuleConfig
from ...errors import SmileError
from ...functional import router_projections, select_experts, smile_linear
from .routing import RememberedRouting


class SmileQuantizationConfig(QuantizationConfig):
    """`quantization_config` of a SMILE checkpoint as vLLM holds it."""

    def __init__(self, config: SmileConfig):
        super().__init__()
        self.config = config
        self.modules = config.modules
        self.num_experts_per_tok = config.routing.num_experts_per_tok or config.num_experts_per_tok
        self.routing = None
        if not config.routing.is_published:
            self.routing = RememberedRouting(config.routing, config.num_local_experts, self.num_experts_per_tok)

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

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
        return cls(smile)

    def apply_vllm_mapper(self, hf_to_vllm_mapper) -> None:
        self.modules = hf_to_vllm_mapper.apply_dict(self.modules)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        parent, _, leaf = prefix.rpartition(".")
        names = [prefix]
        if prefix not in self.modules:
            names = [f"{parent}.{name}" if parent else name for name in self.packed_modules_mapping.get(leaf, ())]
        parts = {name: self.modules.get(name) for name in names}
        if not any(parts.values()):
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        if not isinstance(layer, LinearBase):
            raise SmileError(f"modules: {prefix} is a {type(layer).__name__} in vLLM; expected a linear layer")
        return SmileLinearMethod(parts, self.config.num_local_experts, self.num_experts_per_tok, self.routing)


class SmileLinearMethod(UnquantizedLinearMethod):
    """Creates, loads and applies one layer's experts; `parts` has one entry for each router, None for a dense part."""

    def __init__(
        self,
        parts: dict[str, SmileModuleConfig | None],
        num_local_experts: int,
        num_experts_per_tok: int,
        routing: RememberedRouting | None = None,
    ):
        super().__init__()
        self.names, self.parts = list(parts), list(parts.values())
        self.n, self.m, self.routing = num_local_experts, num_experts_per_tok, routing
        self.present = {i: part for i, part in enumerate(self.parts) if part}
        self.r = max(part.rank_of_expert for part in self.present.values())
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
        super().create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            weight_loader=functools.partial(self._load_weight, load),
            **extra_weight_attrs,
        )
        d, o, p = input_size_per_partition, sum(output_partition_sizes), len(self.parts)
        self.rows = [o] if p == 1 else output_partition_sizes
        present = list(self.present.values())
        if self.routing is not None:
            self.first = self.routing.add([self.names[i] for i in self.present])
        k = max(self.r, *(part.rank_of_router for part in present if not part.router), 0)

        def register(name: str, shape: tuple[int, ...], loader: Callable, dtype=params_dtype, **attributes) -> None:
            # NaN marks what the checkpoint did not give: vLLM itself does not notice a tensor that is missing.
            parameter = nn.Parameter(torch.full(shape, torch.nan, dtype=dtype), requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": loader, **attributes})
            layer.register_parameter(name, parameter)

        layer.weight.data.fill_(torch.nan)
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
        """One part of weight [O, D], which the checkpoint stores as [D, O] where it says fan_in_fan_out.

        Some models of vLLM transpose what they read, as GPT-2 does for its Conv1D layers, whatever a checkpoint says.
        """
        part = self.parts[_index(len(self.parts), *shard)]
        if part is not None and loaded.dim() == 2:
            transposed = loaded.stride(0) == 1 and loaded.shape[1] > 1
            if transposed != part.fan_in_fan_out:
                loaded = loaded.t()
        load(parameter, loaded, *shard)

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        n = self.n
        expected = {name: t for name, t in layer.named_parameters(recurse=False) if name != "bias"}
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
                elif piece.isnan().any():
                    missing.append(f"{self.names[i]}.{name}")
        if missing:
            raise SmileError(f"checkpoint: missing, or with NaN in them: {', '.join(missing)}")
        tensors = {name: getattr(layer, name)[list(self.present)].flatten(0, 1) for name in ("vh", "s")}
        if any(part.router or part.rank_of_router != self.g for part in self.present.values()):
            routers = layer.vh.new_zeros(len(self.present), n, self.g, layer.vh.shape[-1])
            for to, (i, part) in zip(routers, self.present.items(), strict=True):
                own = layer.router[i] if part.router else layer.vh[i]
                to[:, : part.rank_of_router] = own[:, : part.rank_of_router]
            tensors["router"] = routers.flatten(0, 1)
        for name in ("u", "expert_bias"):
            if name in expected:
                t = expected[name]
                spread = t.new_zeros(len(self.present), *t.shape)
                for to, i in zip(spread, self.present, strict=True):
                    to[:, ends[i] - self.rows[i] : ends[i]] = t[:, ends[i] - self.rows[i] : ends[i]]
                tensors[name] = spread.flatten(0, 1)
        if "router_prior" in expected:
            tensors["router_prior"] = layer.router_prior[list(self.present)]
        for name in ("vh", "s", "u", "expert_bias", "router", "router_prior"):
            kept = tensors.get(name)
            kept = None if kept is None else nn.Parameter(kept.contiguous(), requires_grad=False)
            layer.register_parameter(name, kept)

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        split = isinstance(layer, RowParallelLinear) and layer.tp_size > 1
        alone = self.routing is None and len(self.present) == 1 and not split  # then the kernel routes by itself
        return smile_linear(
            x,
            layer.weight,
            bias,
            layer.vh,
            layer.s,
            layer.u,
            layer.expert_bias if not split or layer.tp_rank == 0 else None,
            layer.router if alone else None,
            num_experts_per_tok=self.m,
            rank_of_router=self.g if alone else 1,
            routing=None if alone else self._route(layer, x, split),
        )

    def _route(self, layer: LinearBase, x: Tensor, split: bool) -> tuple[Tensor, Tensor]:
        """The choices of all the layer's routers, side by side: weights and ids [..., P x m]."""
        p = len(self.present)
        scored = p if self.routing is None else self.routing.count(self.first, p)
        if scored:
            rows = slice(scored * self.n)
            router = None if layer.router is None else layer.router[rows]
            projections = router_projections(x, layer.vh[rows], router, rank_of_router=self.g)
            if split:
                # x holds a part of the columns: the projections are sums over ranks, and the norm comes after.
                projections = tensor_model_parallel_all_reduce(projections)
            scores = torch.linalg.vector_norm(projections, dim=-1).unflatten(-1, (scored, self.n))
        else:
            scores = x.new_empty(*x.shape[:-1], 0, self.n)
        if self.routing is None:
            weights, ids = select_experts(scores, self.m)
        else:
            weights, ids = self.routing.choose(scores.flatten(0, -3), self.first, p, layer.router_prior)
        first = torch.arange(0, p * self.n, self.n, device=x.device, dtype=ids.dtype)
        shape = (*x.shape[:-1], p * self.m)
        return weights.reshape(shape), (ids + first[:, None]).reshape(shape)


def _index(parts: int, shard: Any = None) -> int:
    """The number of one of a layer's parts, by vLLM's name for it; a layer of one part may be read by any name."""
    return 0 if parts == 1 else {"q": 0, "k": 1, "v": 2}.get(shard, shard)


def _load_part(layer: LinearBase, parameter: Tensor, loaded: Tensor, *shard: Any) -> None:
    """One part of vh, s or router [P, N, ranks, D]; a shorter rank ends in zeros, D is cut for tensor parallelism."""
    target = parameter.data[_index(len(parameter), *shard)]
    if target.dim() == 3 and loaded.shape[-1] != target.shape[-1]:
        loaded = loaded.narrow(-1, layer.tp_rank * target.shape[-1], target.shape[-1])
    target.zero_()
    if target.dim() == 1:
        target.copy_(loaded)
        return
    target[:, : loaded.shape[1]] = loaded


def _load_rows(load: Callable, parameter: Tensor, loaded: Tensor, *shard: Any) -> None:
    """One part of u [N, O, r], placed by vLLM's own loader; a shorter rank ends in zeros."""
    load(parameter, F.pad(loaded, (0, parameter.shape[-1] - loaded.shape[-1])), *shard)
