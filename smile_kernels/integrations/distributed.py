"""Models with SMILE layers on several devices: tensor-parallel styles for `parallelize_module`.

    parallelize_module(model, mesh, tensor_parallel_plan(model))

Column: `weight`, `bias`, `u` and `expert_bias` are split along out_features; every rank computes the same routing.
Row: `weight`, `vh`, `router` and x are split along in_features. The router needs the norm of a sum over ranks, so
V_i^T x is all-reduced in float32, T x N x g numbers. Each rank adds its part of the chosen experts to its part of W x,
and the output is all-reduced once, as for a dense layer.

FSDP2 shards a model of one dtype directly; for a low-precision model see `replicate_singular_values`.
"""

import fnmatch
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from ..errors import SmileError
from ..functional import router_projections, select_experts, smile_linear
from ..nn import SmileLinear
from ..schema import check_arguments

__all__ = ["ColwiseSmile", "RowwiseSmile", "replicate_singular_values", "tensor_parallel_plan"]


class ColwiseSmile(ParallelStyle):
    """Splits a SmileLinear along out_features; the arguments are those of torch's ColwiseParallel.

    Args:
        input_layouts: layout of x; replicated by default.
        output_layouts: layout of y; split along its last dimension by default.
        use_local_output: return y as this rank's plain tensor instead of a DTensor.

    Gradients equal those of one process; those of replicated parameters are summed over ranks in the backward.
    """

    shards = {"weight": 0, "bias": 0, "u": 1, "expert_bias": 1}  # noqa: RUF012 (read only)

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ):
        super().__init__()
        self.input_layouts = input_layouts or Replicate()
        self.output_layouts = output_layouts or Shard(-1)
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, SmileLinear):
            raise SmileError(f"module: is a {type(module).__name__}; {type(self).__name__} expects a SmileLinear")
        if module.parts is not None:
            raise SmileError("module: is a merged layer; expected the layers of its parts (split)")
        if device_mesh.ndim != 1:
            raise SmileError(f"device_mesh: has {device_mesh.ndim} dimensions; expected one, such as mesh['tp']")
        for name, p in module.named_parameters(recurse=False):
            placement = Shard(self.shards[name]) if name in self.shards else Replicate()
            sharded = nn.Parameter(distribute_tensor(p, device_mesh, [placement]), requires_grad=p.requires_grad)
            module.register_parameter(name, sharded)
        module.__dict__["forward"] = functools.partial(self.forward, module, device_mesh)
        return module

    def forward(self, layer: Any, mesh: DeviceMesh, x: Tensor) -> Tensor:
        """y of a SmileLinear with DTensors as parameters."""
        _refuse_policy(layer)
        x = _summed_gradient(_dtensor(x, mesh, self.input_layouts, layer.in_features).redistribute(mesh, [Replicate()]))
        y = smile_linear(
            x,
            layer.weight.to_local(),
            _local(layer.bias),
            _summed_gradient(layer.vh),
            _summed_gradient(layer.s),
            layer.u.to_local(),
            _local(layer.expert_bias),
            _summed_gradient(layer.router),
            num_experts_per_tok=layer.num_experts_per_tok,
            rank_of_router=layer.rank_of_router,
        )
        return self._output(_dtensor(y, mesh, Shard(-1), layer.out_features), mesh)

    def _output(self, y: DTensor, mesh: DeviceMesh) -> Tensor:
        y = y.redistribute(mesh, [self.output_layouts])
        return y.to_local() if self.use_local_output else y


class RowwiseSmile(ColwiseSmile):
    """Splits a SmileLinear along in_features; the arguments are those of torch's RowwiseParallel.

    Args:
        input_layouts: layout of x; split along its last dimension by default.
        output_layouts: layout of y; replicated by default.
        use_local_output: return y as this rank's plain tensor instead of a DTensor.
    """

    shards = {"weight": 1, "vh": 2, "router": 2}  # noqa: RUF012 (read only)

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ):
        super().__init__(
            input_layouts=input_layouts or Shard(-1),
            output_layouts=output_layouts or Replicate(),
            use_local_output=use_local_output,
        )

    def forward(self, layer: Any, mesh: DeviceMesh, x: Tensor) -> Tensor:
        """y of a SmileLinear with DTensors as parameters."""
        _refuse_policy(layer)
        x = _dtensor(x, mesh, self.input_layouts, layer.in_features).redistribute(mesh, [Shard(x.dim() - 1)]).to_local()
        vh = layer.vh.to_local()
        router = None if layer.router is None else layer.router.to_local()
        projections = router_projections(x, vh, router, rank_of_router=layer.rank_of_router)
        whole = DTensor.from_local(projections, mesh, [Partial()], run_check=False).redistribute(mesh, [Replicate()])
        scores = torch.linalg.vector_norm(_summed_gradient(whole), dim=-1)
        # Biases are added once in the sum over ranks; the product keeps every rank in the backward's all-reduce.
        first = float(mesh.get_local_rank() == 0)
        bias, expert_bias = (
            b if b is None else b * first for b in (_summed_gradient(layer.bias), _summed_gradient(layer.expert_bias))
        )
        y = smile_linear(
            x,
            layer.weight.to_local(),
            bias,
            vh,
            _summed_gradient(layer.s),
            _summed_gradient(layer.u),
            expert_bias,
            num_experts_per_tok=layer.num_experts_per_tok,
            rank_of_router=1,  # not used: the routing is given
            routing=select_experts(scores, layer.num_experts_per_tok),
        )
        return self._output(DTensor.from_local(y, mesh, [Partial()], run_check=False), mesh)


def _refuse_policy(layer: SmileLinear) -> None:
    if layer.router_policy is not None:
        raise NotImplementedError(
            "routing: a layer split over ranks has a router_policy; expected the default, the published routing"
        )


def tensor_parallel_plan(model: nn.Module) -> dict[str, ParallelStyle]:
    """The plan of `parallelize_module` for a transformers model, from the model's `tp_plan`.

    SMILE layers with a column or row split get ColwiseSmile and RowwiseSmile, dense linear layers get torch's styles,
    and everything else is replicated on every rank.

    Raises:
        ValueError: the model has no plan, or its plan splits a linear layer in an unsupported way.
    """
    plan = getattr(model, "tp_plan", None)
    if not plan:
        raise SmileError(f"model: {type(model).__name__} has no tp_plan; expected one of transformers")
    styles: dict[str, ParallelStyle] = {}
    column: type[ParallelStyle]
    row: type[ParallelStyle]
    for name, module in model.named_modules():
        smile = isinstance(module, SmileLinear)
        style = next((s for pattern, s in plan.items() if fnmatch.fnmatchcase(name, pattern)), None)
        if style is None or not (smile or isinstance(module, nn.Linear)):
            continue
        column, row = (ColwiseSmile, RowwiseSmile) if smile else (ColwiseParallel, RowwiseParallel)
        if style == "colwise":
            styles[name] = column()
        elif style == "rowwise":
            styles[name] = row()
        elif style in ("colwise_gather_output", "colwise_rep"):
            styles[name] = column(output_layouts=Replicate())
        elif style in ("rowwise_split_input", "rowwise_rep"):
            styles[name] = row(input_layouts=Replicate())
        else:
            raise SmileError(f"tp_plan: {name} is {style!r}; expected a column or row split")
    return styles


@check_arguments
def replicate_singular_values(model: nn.Module, mesh: DeviceMesh) -> set[nn.Parameter]:
    """The `s` of every SMILE layer, for replication on each rank while FSDP2 shards everything else.

        fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=replicate_singular_values(model, mesh))

    FSDP2 shards parameters of one dtype together and casts them to one dtype for the forward, while `s` [N, r] stays
    float32 in a low-precision model. Its gradient is averaged over `mesh`, as FSDP2 averages the others.
    """

    def average(p: Tensor) -> None:
        assert p.grad is not None
        gradient = p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad
        torch.distributed.all_reduce(gradient, group=mesh.get_group())
        gradient.div_(mesh.size())

    values = {module.s for module in model.modules() if isinstance(module, SmileLinear)}
    for s in values:
        s.register_post_accumulate_grad_hook(average)
    return values


def _dtensor(x: Tensor, mesh: DeviceMesh, layout: Placement, features: int) -> DTensor:
    """x as a DTensor with `features` columns, which need not be divisible by the number of ranks."""
    if isinstance(x, DTensor):
        return x
    if not (isinstance(layout, Shard) and layout.dim in (-1, x.dim() - 1)):
        return DTensor.from_local(x, mesh, [layout], run_check=False)
    shape = torch.Size((*x.shape[:-1], features))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(x, mesh, [Shard(x.dim() - 1)], run_check=False, shape=shape, stride=stride)


def _local(p: DTensor | None) -> Tensor | None:
    return None if p is None else p.to_local()


def _summed_gradient(p: DTensor | None) -> Any:
    """The local tensor of a replicated one; each rank's gradient is a part of the sum."""
    return None if p is None else p.redistribute(placements=p.placements).to_local(grad_placements=[Partial()])


def _parameters(weight, bias, vh, s, u, expert_bias, *, column: bool = False) -> list[Placement | None]:
    """Placements of the layer's tensors: replicated, or split along out_features; None for missing tensors."""
    split = [Shard(0), Shard(0), Replicate(), Replicate(), Shard(1), Shard(1)] if column else [Replicate()] * 6
    tensors = (weight, bias, vh, s, u, expert_bias)
    return [placement if t is not None else None for t, placement in zip(tensors, split)]


# Placements that DTensor may use for the operators: split tokens, or split outputs of the expert half; replicated
# otherwise. The router needs every column of x, so `route` and `linear` are never split along in_features.


@register_sharding(torch.ops.smile_kernels.route.default)
def _shard_route(x, router, num_experts_per_tok, backend):
    return [
        ([Replicate(), Replicate()], [Replicate(), Replicate(), None, None]),
        ([Shard(0), Shard(0)], [Shard(0), Replicate(), None, None]),
    ]


@register_sharding(torch.ops.smile_kernels.apply.default)
def _shard_apply(x, weight, bias, vh, s, u, expert_bias, weights, ids, save, backend):
    layer = weight, bias, vh, s, u, expert_bias
    r, t = Replicate(), Shard(0)
    return [
        ([r, r], [r, *_parameters(*layer), r, r, None, None]),
        ([t, t if save else r], [t, *_parameters(*layer), t, t, None, None]),
        ([Shard(1), r], [r, *_parameters(*layer, column=True), r, r, None, None]),
    ]


@register_sharding(torch.ops.smile_kernels.linear.default)
def _shard_linear(x, weight, bias, vh, s, u, expert_bias, router, num_experts_per_tok, rank_of_router, save, backend):
    layer = weight, bias, vh, s, u, expert_bias
    r, t = Replicate(), Shard(0)
    rows = None if router is None else r
    return [
        ([r, r, r, r], [r, *_parameters(*layer), rows, None, None, None, None]),
        ([t, t, t, t if save else r], [t, *_parameters(*layer), rows, None, None, None, None]),
        ([Shard(1), r, r, r], [r, *_parameters(*layer, column=True), rows, None, None, None, None]),
    ]


@register_sharding(torch.ops.smile_kernels.route_backward.default)
def _shard_route_backward(dweights, x, router, weights, ids, needs, backend):
    r, t, p = Replicate(), Shard(0), Partial()
    return [
        ([r, r], [r, r, r, r, r, None, None]),
        (_needed([t, p], needs), [t, t, r, t, t, None, None]),
        (_needed([p, p], needs), [p, r, r, r, r, None, None]),
    ]


@register_sharding(torch.ops.smile_kernels.apply_backward.default)
def _shard_apply_backward(dy, x, weight, vh, s, u, expert_bias, weights, ids, h, needs, backend):
    return _shard_gradients(expert_bias, needs, Shard(0), [], 2)


@register_sharding(torch.ops.smile_kernels.linear_backward.default)
def _shard_linear_backward(
    dy, x, weight, vh, s, u, expert_bias, router, weights, ids, h, rank_of_router, needs, backend
):
    return _shard_gradients(expert_bias, needs, Partial(), [None if router is None else Replicate()], 3)


def _shard_gradients(
    expert_bias: Tensor | None, needs: list[bool], last: Placement, router: list[Placement | None], numbers: int
) -> list[tuple[list[Placement], list[Placement | None]]]:
    """Placements of the gradients and of dy, x, the layer, `router`, weights, ids and h; `numbers` more arguments.

    last: the last gradient where the tokens are split.
    """
    r, t, p, column = Replicate(), Shard(0), Partial(), Shard(1)
    whole, split = (None, None) if expert_bias is None else (r, column)
    rest = [None] * numbers
    return [
        ([r] * 8, [r, r, r, r, r, r, whole, *router, r, r, r, *rest]),
        (_needed([t, p, p, p, p, p, p, last], needs), [t, t, r, r, r, r, whole, *router, t, t, t, *rest]),
        (
            _needed([p, Shard(0), Shard(0), p, p, column, column, p], needs),
            [column, r, Shard(0), r, r, column, split, *router, r, r, r, *rest],
        ),
    ]


def _needed(placements: list[Placement], needs: list[bool]) -> list[Placement]:
    """A gradient that is not requested has no elements."""
    return [placement if needed else Replicate() for placement, needed in zip(placements, needs)]
