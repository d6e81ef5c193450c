"""`SmileLinear`: a drop-in `nn.Linear` whose weight is shared by N low-rank experts and a zero-shot router."""

import operator
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import SmileError, check_integer, reason
from .functional import (
    DTYPES,
    check_input,
    check_parts,
    check_tensor,
    route,
    shape_error,
    smile_delta,
    smile_linear,
)
from .ops import library
from .schema import check_arguments
from .svd import decompose_linear

# weight, bias, vh, s, u, expert_bias and router of a layer.
Tensors = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


class DirectPolicy:
    """A `router_policy` that can compute a layer's output in inference, its choice and its product by one operator."""

    def output(self, layer: Any, x: Tensor, tensors: Tensors) -> Tensor | None:
        """The output [..., O] of a layer with these tensors; None: the policy is called for its choice."""
        raise NotImplementedError


class RoutedExperts(nn.Module):
    """The experts of a layer, and what routing policies read and set there.

    `s` and `router_prior` stay float32 when the module is cast to a lower precision.
    """

    vh: nn.Parameter
    s: nn.Parameter
    u: nn.Parameter
    expert_bias: nn.Parameter | None
    router: nn.Parameter | None
    router_prior: Tensor | None
    num_local_experts: int
    num_experts_per_tok: int
    rank_of_router: int
    # Returns the routing (weights, ids) of an input; without a policy, or if it returns None, the layer routes itself.
    router_policy: Callable[[Any, Tensor], tuple[Tensor, Tensor] | None] | None = None
    expert_names: tuple[str, ...] | None = None
    _own_num_experts_per_tok: int | None = None  # if a routing policy has set another number

    def set_num_experts_per_tok(self, num_experts_per_tok: int | None) -> None:
        """Set the number of experts per token; None restores the number of the constructor."""
        own = self.own_num_experts_per_tok()
        if num_experts_per_tok is not None:
            n = self.num_local_experts
            check_integer("num_experts_per_tok", num_experts_per_tok, 1, n, "the number of experts")
            self._own_num_experts_per_tok = own
        self.num_experts_per_tok = num_experts_per_tok or own
        if num_experts_per_tok is None:
            self._own_num_experts_per_tok = None

    def own_num_experts_per_tok(self) -> int:
        """The number given to the constructor, also while another thread sets one."""
        own, m = self._own_num_experts_per_tok, self.num_experts_per_tok
        return own or self._own_num_experts_per_tok or m

    def _apply(self, fn, recurse: bool = True):
        # Module.to(bfloat16) and half() would round them.
        s, prior = self.s.data, self.router_prior
        super()._apply(fn, recurse)
        wanted = torch.float64 if self.vh.dtype == torch.float64 else torch.float32
        if self.s.dtype != wanted:
            self.s.data = s.to(self.s.device, wanted)
        if prior is not None and self.router_prior is not None and self.router_prior.dtype != wanted:
            self.router_prior = prior.to(self.router_prior.device, wanted)
        return self


class SmileLinear(RoutedExperts, nn.Linear):
    """A pre-trained linear layer and N fine-tuned versions of it, as a sparse mixture of low-rank experts.

    It is a subclass of nn.Linear, so code that looks for linear layers, such as PEFT's `target_modules`, finds it. An
    addition to its output or to its shared weight, as LoRA makes it, applies to every expert. What multiplies the
    weight (merged IA3, OFT, BOFT or RoAd), or computes with it (DoRA, HRA, SHiRA), has no effect on the experts.

        y = W x + b + sum over the m selected i of w_i (U_i (s_i * V_i[:, :r]^T x) + expert_bias_i)

    The m experts with the largest ||V_i[:, :g]^T x||_2 are selected for each token; w is the softmax of those scores.

    Parameters (D in_features, O out_features, N experts, r rank of an expert, g rank of the router):
        weight [O, D], bias [O] | None: the shared layer, with nn.Linear's names.
        vh [N, max(r, g), D], s [N, r], u [N, O, r]: the experts. `s` stays float32 when the module is cast down.
        expert_bias [N, O] | None: each expert's bias minus the shared bias.
        router [N, g, D] | None: the router's rows; None: the first g rows of `vh`.
        router_prior [N] | None: a float32 buffer: log of each expert's mean share of the router's energy on inputs
            without a task (`calibrate`); used only by calibrated routing policies.

    A layer of P parts is equivalent to P layers with the same x and concatenated outputs (`merge`). Its vh, s, router
    and router_prior have a leading dimension P.

    `expert_names` is None or the N names of the experts, used by `routing_override` and reports.

    Args:
        in_features, out_features: D and O.
        num_local_experts: N.
        rank_of_expert: r, 1 to min(D, O).
        rank_of_router: g, 1 to D.
        num_experts_per_tok: m, 1 to N.
        bias, expert_bias, router, router_prior: whether the layer has these tensors.
        parts, rank_of_parts: out_features and rank of each part of a merged layer, as in `functional.smile_linear`.
        device: as in nn.Linear.
        dtype: float32, bfloat16, float16 or float64; by default torch's default dtype.

    Raises:
        ValueError: an argument out of range or of another kind; the message names it.

    Source: SMILE, arXiv 2408.10174.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None  # type: ignore[assignment]  # which nn.Linear's own annotation leaves out
    parts: tuple[int, ...] | None = None
    rank_of_parts: tuple[int, ...] | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_local_experts: int,
        rank_of_expert: int,
        rank_of_router: int,
        num_experts_per_tok: int = 1,
        *,
        bias: bool = True,
        expert_bias: bool = True,
        router: bool = False,
        router_prior: bool = False,
        parts: Sequence[int] | None = None,
        rank_of_parts: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super(nn.Linear, self).__init__()  # nn.Linear would allocate the weight
        d, o = check_integer("in_features", in_features, 1), check_integer("out_features", out_features, 1)
        n = check_integer("num_local_experts", num_local_experts, 1)
        r = check_integer("rank_of_expert", rank_of_expert, 1, min(d, o), "the shorter side of the weight")
        g = check_integer("rank_of_router", rank_of_router, 1, d, "in_features")
        m = check_integer("num_experts_per_tok", num_experts_per_tok, 1, n, "the number of experts")
        self.in_features, self.out_features = d, o
        self.num_local_experts, self.num_experts_per_tok = n, m
        self.rank_of_expert, self.rank_of_router = r, g
        _check_flags(bias=bias, expert_bias=expert_bias, router=router, router_prior=router_prior)
        dtype = _checked_dtype(device, dtype)
        of_parts: tuple[int, ...] = ()
        if parts is not None or rank_of_parts is not None:
            self.parts, ranks = check_parts(parts, rank_of_parts, o, r)
            self.rank_of_parts = ranks or (r,) * len(self.parts)
            of_parts = (len(self.parts),)

        def parameter(*shape: int, dtype: torch.dtype = dtype) -> nn.Parameter:
            try:
                return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            except (RuntimeError, TypeError) as error:
                too_large = any(word in str(error) for word in ("memory", "overflow", "Overflow"))
                if isinstance(error, torch.OutOfMemoryError) or not too_large:
                    raise
                raise SmileError(
                    f"in_features, out_features, num_local_experts, rank_of_expert: are {d}, {o}, {n}, {r}; expected "
                    f"sizes that memory holds ({str(error).splitlines()[0]})"
                ) from None

        s_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.weight = parameter(o, d)
        self.register_parameter("bias", parameter(o) if bias else None)
        self.vh = parameter(*of_parts, n, r if router else max(r, g), d)
        self.s = parameter(*of_parts, n, r, dtype=s_dtype)
        self.u = parameter(n, o, r)
        self.register_parameter("expert_bias", parameter(n, o) if expert_bias else None)
        self.register_parameter("router", parameter(*of_parts, n, g, d) if router else None)
        prior = torch.zeros(*of_parts, n, device=device, dtype=s_dtype) if router_prior else None
        self.register_buffer("router_prior", prior)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random weights of nn.Linear's scale, for benchmarks and tests; use `from_linears` for real layers."""
        bound = self.in_features**-0.5
        for name, p in self.named_parameters(recurse=False):
            nn.init.uniform_(p, 0.0 if name == "s" else -bound, 1.0 if name == "s" else bound)

    @classmethod
    @check_arguments
    def from_linears(
        cls,
        base: nn.Linear,
        finetuned: Sequence[nn.Linear],
        *,
        rank_of_expert: int | float,
        rank_of_router: int,
        num_experts_per_tok: int = 1,
    ) -> "SmileLinear":
        """Zero-shot construction: each expert is the truncated SVD of a fine-tuned layer's difference from the base.

        Args:
            base: the pre-trained layer; its weight and bias are copied.
            finetuned: N layers of the same shape and dtype. A missing bias counts as 0 if another layer has one.
            rank_of_expert: r; -1 for full rank (exact); or a fraction in (0, 1), the share of the energy to keep.
            rank_of_router: g.
            num_experts_per_tok: m.

        Raises:
            ValueError: no experts, different shapes or dtypes, NaN or inf, a layer that is not W x + b or has no data,
                or a rank out of range.
        """
        for name, layer in (("base", base), *((f"finetuned[{i}]", layer) for i, layer in enumerate(finetuned))):
            _check_linear(name, layer)
        try:
            factors, _ = decompose_linear(
                base.weight,
                base.bias,
                [layer.weight for layer in finetuned],
                [layer.bias for layer in finetuned],
                rank_of_expert=rank_of_expert,
                rank_of_router=rank_of_router,
            )
        except SmileError as error:  # which names the arguments of decompose_linear
            message = re.sub(r"^expert_biases(\[\d+\])", r"finetuned\1.bias", str(error))
            message = re.sub(r"^(weight|bias):", r"base.\1:", message)
            raise SmileError(re.sub(r"^expert_weights", "finetuned", message)) from None
        return cls.from_factors(
            base.weight, base.bias, factors, rank_of_router=rank_of_router, num_experts_per_tok=num_experts_per_tok
        )

    @classmethod
    @check_arguments
    def from_factors(
        cls,
        weight: Tensor,
        bias: Tensor | None,
        factors: Mapping[str, Tensor | None],
        *,
        rank_of_router: int,
        num_experts_per_tok: int = 1,
    ) -> "SmileLinear":
        """A layer of the given tensors, which are copied.

        Args:
            weight: [O, D], on the device and in the dtype of the layer.
            bias: [O], or None.
            factors: vh, s and u, and possibly expert_bias, router and router_prior, by name, with the shapes of the
                layer's (vh [N, r, D] with a router); None: the layer has none.
            rank_of_router: g.
            num_experts_per_tok: m.

        Raises:
            ValueError: a tensor that is missing, unknown, without data, not floating point or of another shape, or a
                number out of range; the message names it. Nothing is built then.
        """
        n, o, r = _check_factors(weight, bias, factors, rank_of_router)
        layer = cls(
            weight.shape[1],
            o,
            n,
            r,
            rank_of_router,
            num_experts_per_tok,
            bias=bias is not None,
            expert_bias=factors.get("expert_bias") is not None,
            router=factors.get("router") is not None,
            router_prior=factors.get("router_prior") is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        tensors = {"weight": weight, "bias": bias, **factors}
        layer.load_state_dict({name: t.detach() for name, t in tensors.items() if t is not None})
        return layer

    def forward(
        self, input: Tensor, routing: tuple[Tensor, Tensor] | None = None, routing_weights: Tensor | None = None
    ) -> Tensor:
        """x [..., D], named `input` as in nn.Linear -> y [..., O]; the rest as in `functional.smile_linear`."""
        m = self.num_experts_per_tok  # read before the policy runs, which may return None for this number
        layer, policy = self._tensors(), self.router_policy if routing is None and routing_weights is None else None
        serves = routing_weights is None and not torch.is_grad_enabled()
        if policy is not None:
            check_input(input, self.in_features)
            y = policy.output(self, input, layer) if serves and isinstance(policy, DirectPolicy) else None
            if y is not None:
                return y
            routing = policy(self, input)
        if serves and (routing is None or _is_routing(routing)):
            y = library.serve(input, layer, m, self.rank_of_router, routing, self.parts, self.rank_of_parts)
            if y is not None:
                return y
        return smile_linear(
            input,
            *layer,
            num_experts_per_tok=m,
            rank_of_router=self.rank_of_router,
            routing=routing,
            routing_weights=routing_weights,
            parts=self.parts,
            rank_of_parts=self.rank_of_parts,
        )

    @classmethod
    @check_arguments
    def merge(cls, layers: Sequence[nn.Linear]) -> "SmileLinear":
        """Merge layers with the same input, such as query, key and value, into one with concatenated outputs.

        Each part keeps its router, experts, ranks and routing policy; a plain nn.Linear becomes a part without experts.
        The tensors are copied; inference and training work as before. Padding of shorter ranks is not read and gets no
        gradient. A missing bias counts as 0 if another layer has one. `split` is the inverse.

        Functions on models (set_routing, save_pretrained, ...) do not accept merged layers: call them before `merge`.

        Args:
            layers: SmileLinear or nn.Linear, with the same in_features, dtype and device; the SmileLinear also with
                the same num_local_experts, num_experts_per_tok and rank_of_router.

        Raises:
            ValueError: no SmileLinear among them, or layers that differ in one of these; the message names it.
        """
        _check_mergeable(layers)
        smile = [layer for layer in layers if isinstance(layer, SmileLinear)]
        first, n = smile[0], smile[0].num_local_experts
        ranks = [layer.rank_of_expert if isinstance(layer, SmileLinear) else 0 for layer in layers]
        merged = cls(
            first.in_features,
            sum(layer.out_features for layer in layers),
            n,
            max(ranks),
            first.rank_of_router,
            first.own_num_experts_per_tok(),
            bias=any(layer.bias is not None for layer in layers),
            expert_bias=any(layer.expert_bias is not None for layer in smile),
            router=first.router is not None,
            router_prior=first.router_prior is not None,
            parts=[layer.out_features for layer in layers],
            rank_of_parts=ranks,
            device=first.weight.device,
            dtype=first.weight.dtype,
        )
        with torch.no_grad():
            for name, whole in (*merged.named_parameters(), *merged.named_buffers()):
                whole.zero_()
                for layer, piece in zip(layers, merged._pieces(name, whole), strict=True):
                    own = getattr(layer, name, None)
                    if own is not None:
                        piece.copy_(own)
                sources = [getattr(layer, name, None) for layer in layers]
                whole.requires_grad_(any(own is not None and own.requires_grad for own in sources))
        merged.expert_names = first.expert_names
        policies = [getattr(layer, "router_policy", None) for layer in layers]
        if any(policy is not None for policy in policies):
            merged.router_policy = _PoliciesOfParts(policies)
        if first.num_experts_per_tok != merged.num_experts_per_tok:
            merged.set_num_experts_per_tok(first.num_experts_per_tok)
        return merged.train(first.training)

    def split(self) -> list[nn.Linear]:
        """The layers before `merge`: a SmileLinear for each part, or an nn.Linear for a part without experts.

        Raises:
            ValueError: the layer has no parts.
        """
        if self.parts is None or self.rank_of_parts is None:
            raise SmileError("parts: is None; expected a layer made by SmileLinear.merge")
        options: dict[str, Any] = {"device": self.weight.device, "dtype": self.weight.dtype}
        layers: list[nn.Linear] = []
        for features, rank in zip(self.parts, self.rank_of_parts):
            if rank == 0:
                layers.append(nn.Linear(self.in_features, features, self.bias is not None, **options))
                continue
            layers.append(
                SmileLinear(
                    self.in_features,
                    features,
                    self.num_local_experts,
                    rank,
                    self.rank_of_router,
                    self.own_num_experts_per_tok(),
                    bias=self.bias is not None,
                    expert_bias=self.expert_bias is not None,
                    router=self.router is not None,
                    router_prior=self.router_prior is not None,
                    **options,
                )
            )
        with torch.no_grad():
            for name, whole in (*self.named_parameters(), *self.named_buffers()):
                for layer, piece in zip(layers, self._pieces(name, whole), strict=True):
                    own = getattr(layer, name, None)
                    if own is not None:
                        own.copy_(piece).requires_grad_(whole.requires_grad)
        policies = self.router_policy.policies if isinstance(self.router_policy, _PoliciesOfParts) else ()
        for layer, policy in zip(layers, policies):
            if isinstance(layer, SmileLinear):
                layer.router_policy = policy
        for layer in layers:
            if isinstance(layer, SmileLinear):
                layer.expert_names = self.expert_names
                if self.num_experts_per_tok != layer.num_experts_per_tok:
                    layer.set_num_experts_per_tok(self.num_experts_per_tok)
            layer.train(self.training)
        return layers

    def _pieces(self, name: str, whole: Tensor) -> Iterator[Tensor]:
        """Views of a merged layer's tensor, one per part, with the shape of an unmerged layer's tensor."""
        assert self.parts is not None
        assert self.rank_of_parts is not None
        end = 0
        for part, (features, rank) in enumerate(zip(self.parts, self.rank_of_parts)):
            end += features
            o = slice(end - features, end)
            if name in ("weight", "bias"):
                yield whole[o]
            elif name in ("u", "expert_bias"):
                yield whole[:, o, :rank] if name == "u" else whole[:, o]
            elif name == "vh":
                yield whole[part, :, : rank if self.router is not None else max(rank, self.rank_of_router)]
            else:
                yield whole[part, :, :rank] if name == "s" else whole[part]

    def _tensors(self) -> Tensors:
        p: dict[str, Any] = self._parameters
        try:  # faster than attributes, which Module.__getattr__ looks up one by one
            return p["weight"], p["bias"], p["vh"], p["s"], p["u"], p["expert_bias"], p["router"]
        except KeyError:  # one of them is computed, for example by torch.nn.utils.parametrize
            return self.weight, self.bias, self.vh, self.s, self.u, self.expert_bias, self.router

    def extra_repr(self) -> str:
        of_parts = "" if self.parts is None else f", parts={self.parts}, rank_of_parts={self.rank_of_parts}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"num_local_experts={self.num_local_experts}, num_experts_per_tok={self.num_experts_per_tok}, "
            f"rank_of_expert={self.rank_of_expert}, rank_of_router={self.rank_of_router}{of_parts}"
        )


def _is_routing(routing: Any) -> bool:
    """Whether `routing` is two tensors, the ids with a dimension; `smile_linear` refuses others by name."""
    if not isinstance(routing, (tuple, list)) or len(routing) != 2:
        return False
    weights, ids = routing
    return isinstance(weights, Tensor) and isinstance(ids, Tensor) and ids.dim() > 0


def _check_flags(**flags: Any) -> None:
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise SmileError(f"{name}: is {reprlib.repr(flag)}; expected True or False")


def _checked_dtype(device: Any, dtype: Any) -> torch.dtype:
    """The dtype of a new layer; raises unless a layer can have it, and torch has the device."""
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:
        raise SmileError(f"dtype: is {reprlib.repr(dtype)}; expected one of {DTYPES}")
    try:
        if device is not None:
            torch.empty(0, device=device)
    except Exception as error:  # torch raises several kinds, AssertionError without CUDA
        raise SmileError(
            f"device: is {reprlib.repr(device)}; expected a device that torch has here ({reason(error)})"
        ) from None
    return dtype


def _check_linear(name: str, layer: nn.Linear) -> None:
    """Raise unless the layer's output is W x + b, with W and b that are stored."""
    if unfit := why_not_linear(layer):
        raise SmileError(f"{name}: is a {type(layer).__name__}, and {unfit}; expected an nn.Linear")
    for part, tensor in (("", layer.weight), (".bias", layer.bias)):
        if isinstance(tensor, nn.UninitializedParameter):
            raise SmileError(f"{name}{part}: has no shape yet; expected a layer that has run once")
        if tensor is not None:
            _check_stored(f"{name}{part}", tensor)


def _check_stored(name: str, tensor: Any) -> None:
    check_tensor(name, tensor)
    if tensor.is_meta:
        raise SmileError(f"{name}: is on the meta device; expected its data")
    if tensor.dtype not in DTYPES:
        raise SmileError(f"{name}: is {tensor.dtype}; expected one of {DTYPES}")


def _check_factors(
    weight: Tensor, bias: Tensor | None, factors: Mapping[str, Tensor | None], rank_of_router: int
) -> tuple[int, int, int]:
    """N, O and r of the tensors of a layer; raises unless they fit together."""

    def check(name: str, tensor: Any, *shape: int | str) -> None:
        _check_stored(name, tensor)
        fits = len(shape) == tensor.dim() and all(want in (own, str(want)) for want, own in zip(shape, tensor.shape))
        if not fits or not tensor.numel():
            raise shape_error(name, tensor, shape)

    check("weight", weight, "O", "D")
    o, d = weight.shape
    u: Any = factors.get("u")
    check("factors['u']", u, "N", o, "r")
    n, _, r = u.shape
    if r > min(o, d):
        raise SmileError(f"factors['u']: has rank {r}; expected at most {min(o, d)}, the shorter side of the weight")
    g = check_integer("rank_of_router", rank_of_router, 1, d, "in_features")
    rows = r if factors.get("router") is not None else max(r, g)
    shapes = {"vh": (n, rows, d), "s": (n, r), "u": (n, o, r)}
    shapes |= {"expert_bias": (n, o), "router": (n, g, d), "router_prior": (n,)}
    for name in factors:
        if name not in shapes:
            raise SmileError(f"factors[{name!r}]: is not a factor; expected {', '.join(shapes)}")
    for name, shape in shapes.items():
        if name in ("vh", "s") or factors.get(name) is not None:
            check(f"factors[{name!r}]", factors.get(name), *shape)
    if bias is not None:
        check("bias", bias, o)
    return n, o, r


class _PoliciesOfParts:
    """The policies that the parts of a merged layer had as layers; None for a part that routes itself."""

    def __init__(self, policies: Sequence[Callable[[Any, Tensor], tuple[Tensor, Tensor] | None] | None]):
        self.policies = list(policies)

    def __call__(self, layer: SmileLinear, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """weights and ids [..., P, m]; None: the layer routes itself."""
        assert layer.rank_of_parts is not None
        views = [_PartView(layer, part) for part in range(len(layer.rank_of_parts))]
        routings = [policy and policy(view, x) for policy, view in zip(self.policies, views)]
        if all(routing is None for routing in routings):
            return None
        for part, (rank, view) in enumerate(zip(layer.rank_of_parts, views)):
            if rank and routings[part] is None:
                rows = view.vh if view.router is None else view.router
                m, g = view.num_experts_per_tok, view.rank_of_router
                routings[part] = route(x, rows, num_experts_per_tok=m, rank_of_router=g)
        some = next(routing for routing in routings if routing is not None)
        none = torch.zeros_like(some[0]), torch.full_like(some[1], -1)
        weights, ids = zip(*(routing or none for routing in routings))
        return torch.stack(weights, -2), torch.stack(ids, -2)


class _PartView:
    """A part of a merged layer with the attributes of a layer that routing policies read."""

    def __init__(self, layer: SmileLinear, part: int):
        self.num_local_experts, self.rank_of_router = layer.num_local_experts, layer.rank_of_router
        self.num_experts_per_tok = layer.num_experts_per_tok
        self.own_num_experts_per_tok = layer.own_num_experts_per_tok
        self.vh = layer.vh[part]
        self.router = None if layer.router is None else layer.router[part]
        self.router_prior = None if layer.router_prior is None else layer.router_prior[part]


def _check_mergeable(layers: Sequence[nn.Linear]) -> None:
    """Raise if the layers cannot be merged."""
    for i, layer in enumerate(layers):
        if type(layer) not in (SmileLinear, nn.Linear):
            raise SmileError(f"layers: number {i} is a {type(layer).__name__}; expected SmileLinear or nn.Linear")
        if unfit := None if isinstance(layer, SmileLinear) else why_not_linear(layer):
            raise SmileError(f"layers: number {i} cannot be merged, since {unfit}; expected SmileLinear or nn.Linear")
        if isinstance(layer, SmileLinear) and layer.parts is not None:
            raise SmileError(f"layers: number {i} is a merged layer; expected layers of one part")
        if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
            raise SmileError(f"layers: number {i} has hooks, which a merged layer would not call; expected none")
    smile = [layer for layer in layers if isinstance(layer, SmileLinear)]
    if not smile:
        raise SmileError("layers: contain no SmileLinear; expected at least one")

    def same(name: str, of: Sequence[nn.Module], value: Callable[[Any], Any]) -> None:
        found = list(dict.fromkeys(value(layer) for layer in of))
        if len(found) > 1:
            raise SmileError(f"layers: differ in {name}, {' and '.join(map(str, found))}; expected the same of all")

    for name in ("in_features", "weight.dtype", "weight.device", "weight.requires_grad"):
        same(name, layers, operator.attrgetter(name))
    biased = [layer for layer in layers if layer.bias is not None]
    same("bias.requires_grad", biased, operator.attrgetter("bias.requires_grad"))
    for name in ("num_local_experts", "num_experts_per_tok", "rank_of_router", "expert_names"):
        same(name, smile, operator.attrgetter(name))
    same("num_experts_per_tok", smile, SmileLinear.own_num_experts_per_tok)
    same("having a router", smile, lambda layer: layer.router is not None)
    same("having a router_prior", smile, lambda layer: layer.router_prior is not None)
    for name in ("vh", "s", "u", "expert_bias", "router"):
        having = [layer for layer in smile if getattr(layer, name) is not None]
        same(f"{name}.requires_grad", having, operator.attrgetter(f"{name}.requires_grad"))


def smile_layers(model: nn.Module) -> dict[str, SmileLinear]:
    """The SMILE layers of a model by name (the first name of a shared module); "" is the model itself.

    Raises:
        ValueError: one of them is merged, which functions on models do not accept.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SmileLinear)}
    for name, layer in layers.items():
        if layer.parts is not None:
            raise SmileError(f"model: {name or 'it'} is a merged layer; expected the layers of its parts (split)")
    return layers


def routed_layers(model: nn.Module) -> dict[str, RoutedExperts]:
    """The layers of a model that routing policies apply to, by name: SMILE layers, also with a quantised base.

    Raises:
        ValueError: one of them is merged.
    """
    smile_layers(model)
    return {name: module for name, module in model.named_modules() if isinstance(module, RoutedExperts)}


def whole_layers(model: nn.Module) -> dict[str, SmileLinear]:
    """The SMILE layers of a model, at least one, all with the weight of the base.

    Raises:
        ValueError: none, a merged one, or one that holds the experts only.
    """
    for name, layer in routed_layers(model).items():
        if not isinstance(layer, SmileLinear):
            raise SmileError(
                f"model: {name or 'it'} holds the experts only, over a base that is quantised or apart (split_base); "
                "expected SMILE layers with the base's weight, as before split_base or with a base of plain weights"
            )
    layers = smile_layers(model)
    if not layers:
        raise SmileError(f"model: {type(model).__name__} has no SmileLinear; expected a model from upscale")
    return layers


@contextmanager
def all_or_nothing(model: nn.Module, overwritten: Iterable[Tensor] = ()) -> Iterator[None]:
    """Restore the modules, parameters, hooks and config of a model if the block raises.

    Args:
        model: the model.
        overwritten: the tensors with values that the block changes; they are copied.
    """
    config = getattr(model, "config", None)
    before = [
        (one, dict(vars(one)), [(held, held.copy()) for held in vars(one).values() if isinstance(held, dict)])
        for one in (*model.modules(), *([config] if hasattr(config, "__dict__") else []))
    ]
    values = [(tensor, tensor.detach().clone()) for tensor in overwritten]
    try:
        yield
    except BaseException:
        for one, attributes, dicts in before:
            vars(one).clear()
            vars(one).update(attributes)
            for held, entries in dicts:  # in place: the handles of hooks refer to them
                held.clear()
                held.update(entries)
        for tensor, value in values:
            tensor.data.copy_(value)
        raise


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D: a linear layer whose weight is stored [in_features, out_features]."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def why_not_linear(module: nn.Module) -> str | None:
    """Why a module's output is not W x + b as that of nn.Linear or Conv1D; None where it is."""
    kind = type(module)
    if not (isinstance(module, nn.Linear) or is_conv1d(module)):
        return f"a {kind.__name__} is not a linear layer"
    if quantised := why_quantised(module):
        return quantised
    changed = "forward" in vars(module) or kind.__call__ is not nn.Module.__call__
    if changed or not (is_conv1d(module) or kind.forward is nn.Linear.forward):
        return f"the forward of {kind.__name__} is not that of nn.Linear"
    return None


def why_quantised(module: nn.Module) -> str | None:
    """How a linear layer stores its weight quantised; None for a plain weight."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return f"it has no weight, but {', '.join(module.state_dict()) or 'nothing'}, as a quantised layer"
    kind = type(weight.data)
    if weight.is_floating_point() and not kind.__module__.startswith("torchao."):
        return None
    return f"its weight is quantised, {weight.dtype if kind is Tensor else kind.__name__}"


def replace_linears(model: nn.Module, layers: Mapping[str, SmileLinear]) -> None:
    """Replace modules of a model, by name, by SMILE layers, in every place that holds them; their hooks are kept.

    PyTorch's fast paths that bypass the experts, in nn.TransformerEncoder and nn.TransformerEncoderLayer in evaluation
    mode, are disabled.

    Raises:
        ValueError: a place is inside nn.MultiheadAttention, which never calls its projections. Nothing is changed.
    """
    modules = {name: model.get_submodule(name) for name in layers}
    names = {id(module): name for name, module in modules.items()}
    for parent in model.modules():
        for child in parent._modules.values() if isinstance(parent, nn.MultiheadAttention) else ():
            if id(child) in names:
                raise SmileError(
                    f"model: {names[id(child)]} cannot have experts, since nn.MultiheadAttention reads its weight and "
                    "never calls it"
                )
    for ancestor in model.modules():
        if not isinstance(ancestor, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
            continue
        if any(id(module) in names for module in ancestor.modules()):
            if isinstance(ancestor, nn.TransformerEncoderLayer):
                ancestor.activation_relu_or_gelu = 0
            else:
                ancestor.use_nested_tensor = False
    for name, module in modules.items():
        for attribute in vars(module):
            if attribute.startswith(("_forward", "_backward", "_is_full_backward")) and attribute != "_forward_method":
                vars(layers[name])[attribute] = vars(module)[attribute]
    replace_modules(model, ((module, layers[name]) for name, module in modules.items()))


def replace_modules(model: nn.Module, pairs: Iterable[tuple[nn.Module, nn.Module]]) -> None:
    """Put the second module of each pair in every place of `model` that holds the first."""
    new = {id(old): one for old, one in pairs}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in new:
                setattr(parent, name, new[id(child)])


@check_arguments
def warmup(model: nn.Module, tokens: Iterable[int], *, training: bool = False) -> None:
    """Compile the kernels for the SMILE layers of `model` before the first request, by running each layer on zeros.

    Only the Triton backend compiles at run time; layers on other backends are skipped. Layers of the same shapes share
    kernels, and Triton caches them on disk for the next process.

    Args:
        model: any module, on the device where it will run.
        tokens: expected numbers of tokens per call, from the smallest to the largest. Kernels do not depend on the
            exact number; the tiles depend on its magnitude.
        training: also compile the backward.

    Raises:
        ValueError: a number of tokens below 1.
    """
    tokens = list(tokens)
    for i, number in enumerate(tokens):
        check_integer(f"tokens[{i}]", number, 1)
    warm = set()
    for layer in model.modules():
        if not isinstance(layer, RoutedExperts):
            continue
        device = layer.vh.device
        if library.choose_backend(None, device.type, layer.vh.dtype, layer.num_local_experts, training) != "triton":
            continue
        if not isinstance(layer, SmileLinear) or layer.parts is not None:
            _warm_up_added(layer, tokens, training)
            continue
        parameters = layer._tensors()
        options = layer.num_experts_per_tok, layer.rank_of_router
        shapes = (device, *options, *(t if t is None else (t.shape, t.stride(), t.dtype) for t in parameters))
        if shapes not in warm:
            warm.add(shapes)
            from .ops.triton import tuning

            with torch.no_grad():
                tuning.warmup(*parameters, *options, tokens=tokens, training=training)


def _warm_up_added(layer: RoutedExperts, tokens: Iterable[int], training: bool) -> None:
    """Run the experts of a merged layer, or of one over a base of another kind, as they are added to a base product."""
    given = layer.vh, layer.s, layer.u, layer.expert_bias, layer.router
    leaves: list[Any] = [None if t is None else t.detach().requires_grad_(training) for t in given]
    wanted = [leaf for leaf in leaves if leaf is not None]
    options: dict[str, Any] = {"num_experts_per_tok": layer.num_experts_per_tok, "rank_of_router": layer.rank_of_router}
    if isinstance(layer, SmileLinear):
        options |= {"parts": layer.parts, "rank_of_parts": layer.rank_of_parts}
    with torch.set_grad_enabled(training):
        for t in tokens:
            x, y = layer.vh.new_zeros(t, layer.vh.shape[-1]), layer.vh.new_zeros(t, layer.u.shape[1])
            y = smile_delta(y, x, *leaves, **options, inplace=not training)
            if training:
                torch.autograd.grad(y.sum(), wanted, allow_unused=True)
