"""Random SMILE problems and the comparison with the float64 reference, for tests and benchmarks."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .ops import reference


@dataclass
class Problem:
    """The tensors of one SMILE layer and an input, with its two integers; shapes as in `functional.smile_linear`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    vh: Tensor
    s: Tensor
    u: Tensor
    expert_bias: Tensor | None
    router: Tensor | None
    num_experts_per_tok: int
    rank_of_router: int

    @classmethod
    def random(
        cls,
        tokens: int,
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
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        seed: int = 0,
    ) -> "Problem":
        """Weights of a trained layer's scale; scores of order 1; deltas of a tenth of the base product.

        Generated on `device`: the numbers differ between CPU and GPU.
        """
        generator = torch.Generator(device).manual_seed(seed)
        n, d, o, r, g = num_local_experts, in_features, out_features, rank_of_expert, rank_of_router

        def normal(*shape: int, scale: float, dtype: torch.dtype = dtype) -> Tensor:
            return (torch.randn(shape, generator=generator, dtype=torch.float64, device=device) * scale).to(dtype)

        k = r if router else max(r, g)
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        return cls(
            x=normal(tokens, d, scale=1.0),
            weight=normal(o, d, scale=d**-0.5),
            bias=normal(o, scale=0.1) if bias else None,
            vh=normal(n, k, d, scale=d**-0.5),
            s=normal(n, r, scale=0.1 * (o / max(r, 1)) ** 0.5, dtype=acc).abs(),
            u=normal(n, o, r, scale=o**-0.5),
            expert_bias=normal(n, o, scale=0.1) if expert_bias else None,
            router=normal(n, g, d, scale=d**-0.5) if router else None,
            num_experts_per_tok=num_experts_per_tok,
            rank_of_router=g,
        )

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by name."""
        return {f.name: t for f in fields(self) if isinstance(t := getattr(self, f.name), Tensor)}

    def to(self, dtype: torch.dtype) -> "Problem":
        """The same problem in another dtype; `s` in float32 or float64."""
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        tensors: dict[str, Any] = self.tensors()
        return replace(self, **{name: t.to(acc if name == "s" else dtype) for name, t in tensors.items()})

    def arguments(
        self,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """Positional arguments of `functional.smile_linear` and of the operators."""
        return self.x, self.weight, self.bias, self.vh, self.s, self.u, self.expert_bias, self.router

    def rows(self) -> Tensor:
        """The router's rows [N, g, D]."""
        return reference.router_rows(self.vh, self.router, self.rank_of_router)


def expectations(
    problem: Problem, ids: Tensor, *, weights: Tensor | None = None, dy: Tensor | None = None
) -> dict[str, tuple[Tensor, float]]:
    """Expected results of a SMILE layer for the experts `ids`: name -> (float64 value, largest error of plain PyTorch).

    Names: "y", and with dy [T, O] each tensor of the problem for its gradient. `weights` [T, m] fixes the weights (and
    adds their gradient, "weights"; ids of -1 mean no expert); without it they are the softmax of the selected scores,
    with gradients. Plain PyTorch: every operator in the problem's dtype, routing in float32.
    """
    exact = _outputs(problem.to(torch.float64), reference.apply, ids, weights, dy)
    errors = dict.fromkeys(exact, 0.0)
    # A gradient of few terms may be exact by chance: the error is the largest over four draws of dy's signs.
    generator = torch.Generator().manual_seed(0)
    for draw in range(1 if dy is None else 4):
        signed, want = dy, exact
        if dy is not None and draw > 0:
            signs = torch.randint(2, dy.shape, generator=generator).to(dy.device) * 2 - 1
            signed = dy * signs
            want = _outputs(problem.to(torch.float64), reference.apply, ids, weights, signed)
        plain = _outputs(problem, _plain, ids, weights, signed)
        for name, value in want.items():
            if value.numel():
                errors[name] = max(errors[name], (plain[name].double() - value).abs().max().item())
    return {name: (value, errors[name]) for name, value in exact.items()}


def _outputs(
    p: Problem, layer: Callable[..., Tensor], ids: Tensor, weights: Tensor | None, dy: Tensor | None
) -> dict[str, Tensor]:
    """Results of `layer` on a problem: "y", and with dy every gradient by name."""
    leaves: dict[str, Any] = {
        name: t.detach().clone().requires_grad_(dy is not None) for name, t in p.tensors().items()
    }
    if weights is not None:
        leaves["weights"] = weights.detach().to(p.s.dtype).requires_grad_(dy is not None)
    p = replace(p, **{name: t for name, t in leaves.items() if name != "weights"})
    w = leaves.get("weights")
    if w is None:
        w = reference.scores(p.x, p.rows()).gather(1, ids.long()).softmax(-1)
    out: dict[str, Tensor] = {"y": layer(*p.arguments()[:7], w, ids)}
    if dy is not None:
        gradients = torch.autograd.grad(out["y"], tuple(leaves.values()), dy.to(out["y"].dtype), allow_unused=True)
        out |= {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(leaves.items(), gradients)}
    return {name: t.detach() for name, t in out.items()}


def _plain(x, weight, bias, vh, s, u, expert_bias, weights, ids) -> Tensor:
    y = torch.nn.functional.linear(x, weight, bias)
    for j in range(ids.shape[1]):
        w, i = torch.where(ids[:, j] < 0, 0, weights[:, j])[:, None].to(x.dtype), ids[:, j].long().clamp(min=0)
        z = s.to(x.dtype)[i] * torch.einsum("td,trd->tr", x, vh[i, : s.shape[1]])
        delta = torch.einsum("tr,tor->to", z, u[i])
        if expert_bias is not None:
            delta = delta + expert_bias[i]
        y = y + w * delta
    return y


def assert_close(name: str, got: Tensor, want: Tensor, plain_error: float, slack: float = 2.0) -> None:
    """Assert that the error of `got` is at most `slack` times plain PyTorch's, plus rounding of the largest value."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if not want.numel():
        return
    # Plain PyTorch may be exact by chance on small cases, so one rounding of the largest value is allowed. In float64
    # the reference itself rounds, and its error is unknown.
    floor = torch.finfo(got.dtype).eps * want.abs().max().item() * (32 if got.dtype == torch.float64 else 1)
    error = (got.double() - want.double()).abs()
    bound = slack * plain_error + floor
    worst = error.nan_to_num(nan=float("inf")).argmax()
    where = torch.unravel_index(worst, error.shape) if error.dim() else ()
    at = tuple(int(i) for i in where)
    assert error.flatten()[worst] <= bound, (
        f"{name}: off by {error.flatten()[worst]:.3g} at {at}: got {got.flatten()[worst]:.6g}, expected "
        f"{want.flatten()[worst]:.6g}; plain PyTorch is off by {plain_error:.3g}, allowed {bound:.3g}"
    )


@functools.cache
def _always(path: str) -> Callable[..., str]:
    return lambda *_: path


@contextlib.contextmanager
def taking(linear: str, apply: str) -> Iterator[None]:
    """Within this context, layers on the Triton backend use these paths instead of tables and heuristics."""
    from .ops.triton import configs

    before = configs.linear_path, configs.apply_path
    chosen: Any = configs
    chosen.linear_path, chosen.apply_path = _always(linear), _always(apply)
    try:
        yield
    finally:
        chosen.linear_path, chosen.apply_path = before
