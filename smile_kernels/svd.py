"""Truncated SVD of a weight difference, with a certificate of its error; and from weights to SMILE factors."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from .errors import SmileError, check_integer

_F = TypeVar("_F", bound=Callable[..., Any])

# Guarantees of a decomposition: error <= (1 + EXCESS) * optimal + FLOOR * ||a||_F, and at most this sine between
# the computed and the true subspace of the router's rows. float32 arithmetic does not reach a FLOOR much below 1e-5.
EXCESS, FLOOR, SINE = 1e-3, 1e-5, 1e-3

# Up to this share of the smaller side, a Krylov basis that converges beats the exact route (2.4 times or more at 2048).
KRYLOV_SHARE = 0.6

# Up to this smaller side LAPACK's float64 SVD is as fast as the alternatives.
SMALL = 256


@dataclass(frozen=True)
class Certificate:
    """Accuracy of a truncated SVD of a matrix `a`, measured on the returned factors.

    Attributes:
        rank: r, the number of singular values kept.
        directions: number of rows of vh that are directions of `a`; the others are at rounding level and are zero.
        energy: share of ||a||_F^2 captured by u diag(s) vh[:r].
        error: ||a - u diag(s) vh[:r]||_F / ||a||_F.
        router_converged: the sine between the first g rows of vh and the true leading subspace is at most 1e-3, or
            the g-th and the next singular value are equal to rounding, so that the subspace is not unique.
        method: "lora" (QR of both factors), "krylov", "gram" (float64 Gram matrix) or "exact" (float64 SVD).
    """

    rank: int
    directions: int
    energy: float
    error: float
    router_converged: bool
    method: str


@dataclass(frozen=True)
class TruncatedSVD:
    """u [O, r], s [r] in descending order, vh [max(r, g), D] with unit rows, and the certificate.

    Null directions are zero in all three. Signs: the largest entry by magnitude in each row of vh is positive.
    """

    u: Tensor
    s: Tensor
    vh: Tensor
    certificate: Certificate


def without_autocast(function: _F) -> _F:
    """A function of weights for which autocast is off: it would round their products."""

    @functools.wraps(function)
    def exact(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return cast(_F, exact)


@torch.no_grad()
def truncated_svd(a: Tensor, rank: int | float, *, rank_of_router: int = 0, noise_floor: float = 0.0) -> TruncatedSVD:
    """a ≈ u diag(s) vh[:r], within 1e-3 of the optimal error plus 1e-5 ||a||_F.

    A block Krylov method is used; if it would be slower or does not converge, a float64 Gram matrix or a float64 SVD.
    Same input, same bits: no global random state is read or changed.

    Args:
        a: [O, D], any floating dtype. The factors are float32, or float64 where `a` is.
        rank: r, from 1 to min(O, D); or -1 for every direction that is not null (exact); or a fraction in (0, 1)
            for the smallest r that captures this share of ||a||_F^2.
        rank_of_router: g; the first g rows of vh are converged as a subspace by themselves.
        noise_floor: if fewer than g singular values exceed it, the others are noise and set to zero. Singular
            values at the rounding level of float32 (float64 for a float64 `a`) are always set to zero.

    Raises:
        ValueError: `a` is not a matrix or not finite, or a rank is out of range.
        TypeError: `a` is not floating point, or a rank is not a number.
    """
    peak = check_matrix("a", a)
    rank, g = check_ranks(rank, rank_of_router, a.shape, layer=False)
    wide = a.dtype == torch.float64
    # float32 products on a GPU may run in TF32, which would invalidate the certificate.
    work = torch.float64 if wide or a.is_cuda else torch.float32
    # Scaling by a power of two is exact, and keeps the squares of tiny or huge entries in range.
    unit = 1.0 if 1e-6 < peak < 1e6 else 2.0 ** (math.frexp(peak)[1] - 1)
    with torch.autocast(a.device.type, enabled=False):
        x = a.to(work) if unit == 1.0 else a.to(work) / unit
        total = _norm(x)
        floor = torch.finfo(torch.float64 if wide else torch.float32).eps * total

        def count(values: Tensor) -> int:
            """Number of these leading singular values that are not null."""
            loud = int((values > max(floor, noise_floor / unit)).sum())
            return loud if loud < g else int((values > floor).sum())

        nothing = x.new_zeros(0, x.shape[1]), "exact", True
        rows, method, converged = _leading_rows(x, rank, g, count, total) if total else nothing
        image = rows @ x.T
        s, order = torch.linalg.vector_norm(image, dim=1, dtype=torch.float64).sort(descending=True, stable=True)
        rows, image = rows[order], image[order]
        u = (image / s.clamp_min(torch.finfo(work).tiny).to(work)[:, None]).T
        u, s, vh, live = _cut(u, s, rows, rank, g, count(s), total)
        error = _norm(x, minus=(u * s.to(work), vh[: len(s)])) / total if total else 0.0
    out = torch.float64 if wide else torch.float32
    certificate = Certificate(len(s), live, max(0.0, 1 - error**2), error, converged, method)
    return TruncatedSVD(u.to(out), (s * unit).to(out), vh.to(out), certificate)


@torch.no_grad()
def lora_svd(
    b_factor: Tensor,
    a_factor: Tensor,
    scale: float,
    rank: int | float,
    *,
    rank_of_router: int = 0,
) -> TruncatedSVD:
    """The SVD of scale * b_factor @ a_factor, exact, without forming the product: QR of both, then a q x q SVD.

    Args:
        b_factor: [O, q], any floating dtype.
        a_factor: [q, D], any floating dtype. Factors come back in float64 if either is float64, else in float32.
        scale: alpha / q, alpha / sqrt(q), or another factor of the adapter.
        rank, rank_of_router: as in `truncated_svd`; beyond the product's rank, u, s and vh are zero.

    Raises:
        ValueError: incompatible shapes, entries that are not finite, or a rank out of range.
        TypeError: factors that are not floating point, or a rank that is not a number.
    """
    check_matrix("b_factor", b_factor)
    check_matrix("a_factor", a_factor)
    if b_factor.shape[1] != a_factor.shape[0]:
        raise SmileError(
            f"a_factor: has shape {tuple(a_factor.shape)} with b_factor's {tuple(b_factor.shape)}; "
            f"expected ({b_factor.shape[1]}, D)"
        )
    if not math.isfinite(scale):
        raise SmileError(f"scale: is {scale}; expected a finite number")
    rank, g = check_ranks(rank, rank_of_router, (b_factor.shape[0], a_factor.shape[1]), layer=False)
    with torch.autocast(b_factor.device.type, enabled=False):
        left, left_r = torch.linalg.qr(b_factor.double())
        right, right_r = torch.linalg.qr(a_factor.double().T)
        u, s, vh = torch.linalg.svd(scale * left_r @ right_r.T, full_matrices=False)
        u, vh = left @ u, vh @ right.T
    total = s.norm().item()
    epsilon = torch.finfo(torch.float64).eps
    live = int((s > epsilon * total).sum())
    converged = _separated(s, min(g, live), epsilon, epsilon)
    u, s, vh, live = _cut(u, s, vh, rank, g, live, total)
    lost = max(0.0, total**2 - s.square().sum().item()) / total**2 if total else 0.0
    out = torch.promote_types(torch.promote_types(b_factor.dtype, a_factor.dtype), torch.float32)
    certificate = Certificate(len(s), live, 1 - lost, math.sqrt(lost), converged, "lora")
    return TruncatedSVD(u.to(out), s.to(out), vh.to(out), certificate)


@torch.no_grad()
def decompose_linear(
    weight: Tensor,
    bias: Tensor | None,
    expert_weights: Sequence[Tensor | tuple[Tensor, Tensor, float]],
    expert_biases: Sequence[Tensor | None],
    *,
    rank_of_expert: int | float,
    rank_of_router: int,
) -> tuple[dict[str, Tensor | None], list[Certificate]]:
    """One linear layer and N fine-tuned versions of it -> the parameters of a SMILE layer, and a certificate for each.

    In each difference W_i - W, directions at the rounding level of W_i's dtype are set to zero, so an expert that was
    not trained has zero rows, and score 0 in the router.

    Args:
        weight: W [O, D].
        bias: [O] | None.
        expert_weights: N of W_i [O, D] in W's dtype, or of LoRA factors (b_factor [O, q], a_factor [q, D], scale) of
            any floating dtype, for W + scale * b_factor @ a_factor.
        expert_biases: N of [O] | None. A missing bias counts as 0 with a W_i, and as the shared bias with factors.
        rank_of_expert: r as in `truncated_svd`; for -1 or a fraction, r is the largest rank that an expert needs.
        rank_of_router: g, from 1 to min(O, D).

    Returns:
        vh [N, max(r, g), D], u [N, O, r] and expert_bias [N, O] | None (all biases equal the shared one) in W's dtype;
        s [N, r] in float32, or float64 if W is. The certificates describe the factors before rounding to W's dtype.

    Raises:
        ValueError: no experts, a different shape or dtype, NaN or inf, or a rank out of range; the message names it.
        TypeError: a tensor that is not floating point.
    """
    check_matrix("weight", weight)
    shape, n = tuple(weight.shape), len(expert_weights)
    if n == 0:
        raise SmileError("expert_weights: is empty; expected one fine-tuned weight or more")
    if len(expert_biases) != n:
        raise SmileError(f"expert_biases: has {len(expert_biases)} entries; expected {n}, one per expert weight")
    check_ranks(rank_of_expert, rank_of_router, shape)
    for name, b in (("bias", bias), *((f"expert_biases[{i}]", b) for i, b in enumerate(expert_biases))):
        if b is not None and (b.shape != shape[:1] or not torch.isfinite(b).all()):
            raise SmileError(f"{name}: shape {tuple(b.shape)}; expected {shape[:1]} and finite entries")

    shared = weight.new_zeros(shape[0]) if bias is None else bias
    parts, biases = [], []
    for i, (expert, own) in enumerate(zip(expert_weights, expert_biases)):
        _check_expert(i, expert, weight)
        if isinstance(expert, Tensor):
            parts.append(_decompose(i, expert, weight, rank_of_expert, rank_of_router))
            own = torch.zeros_like(shared) if own is None else own
        else:
            b_factor, a_factor, scale = expert
            factors = b_factor.to(weight.device), a_factor.to(weight.device), scale
            parts.append(lora_svd(*factors, rank_of_expert, rank_of_router=rank_of_router))
            own = shared if own is None else own
        biases.append(_difference(f"expert_biases[{i}]", own, shared))
    r = max(len(part.s) for part in parts)
    vh, u = weight.new_zeros(n, max(r, rank_of_router), shape[1]), weight.new_zeros(n, shape[0], r)
    s = weight.new_zeros(n, r, dtype=torch.promote_types(weight.dtype, torch.float32))
    for i, part in enumerate(parts):
        vh[i, : len(part.vh)], s[i, : len(part.s)], u[i, :, : len(part.s)] = part.vh, part.s, part.u
    expert_bias = torch.stack(biases).to(weight.dtype)
    for name, changes in (("expert_weights", s), ("expert_biases", expert_bias)):
        if not torch.isfinite(changes).all():
            bad = int((~torch.isfinite(changes)).nonzero()[0, 0])
            raise SmileError(f"{name}[{bad}]: its change is beyond {changes.dtype}; expected what that holds")
    parameters = {"vh": vh, "s": s, "u": u, "expert_bias": expert_bias if expert_bias.any() else None}
    return parameters, [part.certificate for part in parts]


def _decompose(i: int, expert: Tensor, weight: Tensor, rank: int | float, g: int) -> TruncatedSVD:
    """The SVD of dense expert i's difference [O, D], with rounding-level directions set to zero."""
    delta = _difference(f"expert_weights[{i}]", expert, weight)
    result = truncated_svd(delta, rank, rank_of_router=g, noise_floor=_rounding_noise(expert, delta))
    if result.certificate.directions < g and expert.dtype.itemsize == 2:
        # A low-rank update merged in 16 bits leaves rounding noise. If single steps are most of the difference, they
        # are the only signal of the expert.
        held = _norm(delta @ result.vh.T) / max(_norm(delta), torch.finfo(delta.dtype).tiny)
        if held**2 < 0.5:
            return truncated_svd(delta, rank, rank_of_router=g)
    return result


def _check_expert(i: int, expert: Tensor | tuple[Tensor, Tensor, float], weight: Tensor) -> None:
    if isinstance(expert, Tensor):
        if expert.shape != weight.shape or expert.dtype != weight.dtype:
            raise SmileError(
                f"expert_weights[{i}]: {expert.dtype} {tuple(expert.shape)}; expected {weight.dtype} "
                f"{tuple(weight.shape)} as the shared weight"
            )
        check_matrix(f"expert_weights[{i}]", expert)
        return
    b_factor, a_factor, _ = expert
    check_matrix(f"expert_weights[{i}][0]", b_factor)
    check_matrix(f"expert_weights[{i}][1]", a_factor)
    if (b_factor.shape[0], a_factor.shape[1]) != tuple(weight.shape):
        raise SmileError(
            f"expert_weights[{i}]: factors {tuple(b_factor.shape)} and {tuple(a_factor.shape)}; expected a product of "
            f"shape {tuple(weight.shape)}"
        )


def _difference(name: str, expert: Tensor, shared: Tensor) -> Tensor:
    wide = torch.promote_types(shared.dtype, torch.float32)
    change = expert.to(shared.device, wide) - shared.to(wide)
    if not torch.isfinite(change).all():
        raise SmileError(f"{name}: its change is beyond {wide}; expected what that holds")
    return change


def _rounding_noise(expert: Tensor, delta: Tensor) -> float:
    """Upper estimate of the spectral norm of the rounding noise of `expert`'s dtype in `delta` [O, D].

    Rounding changes an entry w by at most eps |w| / 2, standard deviation eps |w| / sqrt(12); an entry that changed
    by one step or not at all counts as noise. The norm of a matrix of independent entries is about the largest norm of
    a row of standard deviations plus the largest of a column.
    """
    step = torch.finfo(expert.dtype).eps
    rows, columns = 0.0, delta.new_zeros(delta.shape[1], dtype=torch.float64)  # where no square overflows
    for start in range(0, len(delta), 512):
        moved = delta[start : start + 512].abs()
        steps = expert[start : start + 512].to(moved.device, moved.dtype).abs() * step
        deviation = torch.where(moved <= steps, moved, steps / math.sqrt(12))
        rows = max(rows, torch.linalg.vector_norm(deviation, dim=1, dtype=torch.float64).max().item())
        columns = torch.hypot(columns, torch.linalg.vector_norm(deviation, dim=0, dtype=torch.float64))
    return rows + columns.max().item()


def check_matrix(name: str, a: Tensor) -> float:
    """The largest absolute entry of `a`; raises unless it is a non-empty floating-point matrix of finite entries."""
    if not a.is_floating_point():
        raise TypeError(f"{name}: is {a.dtype}; expected a floating-point matrix")
    if a.is_nested or a.layout != torch.strided or a.is_meta:
        kind = "a nested tensor" if a.is_nested else "on the meta device" if a.is_meta else f"a {a.layout} tensor"
        raise SmileError(f"{name}: is {kind}; expected a dense matrix with data")
    if a.dim() != 2 or a.numel() == 0:
        raise SmileError(f"{name}: has shape {tuple(a.shape)}; expected a non-empty matrix [out_features, in_features]")
    low, high = (extreme.item() for extreme in torch.aminmax(a.detach()))
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = (~torch.isfinite(a)).nonzero()
        raise SmileError(f"{name}: {len(bad)} entries are NaN or inf, the first at {tuple(bad[0].tolist())}")
    return max(-low, high)


def check_ranks(
    rank: int | float, rank_of_router: int, shape: Sequence[int], layer: bool = True
) -> tuple[int | float, int]:
    """(r, g) for a matrix of `shape` [O, D]; raises, naming the argument, unless both are in range.

    With `layer`, messages call `rank` rank_of_expert, and the router must have at least one row.
    """
    most, least, name = min(shape), int(layer), "rank_of_expert" if layer else "rank"
    if not (0 < rank < 1 if isinstance(rank, float) else rank == -1):
        try:
            rank = check_integer(name, rank, 1, most)
        except SmileError as error:
            raise SmileError(
                f"{error}, for a weight of shape {tuple(shape)}, -1 for full rank, or a fraction in (0, 1)"
            ) from None
    g = check_integer("rank_of_router", rank_of_router, least, most, f"for a weight of shape {tuple(shape)}")
    return rank, g


def _leading_rows(
    x: Tensor, rank: int | float, g: int, count: Callable[[Tensor], int], total: float
) -> tuple[Tensor, str, bool]:
    """Orthonormal rows [w, D] of leading right singular vectors, the method, and whether the router's converged."""
    o, d = x.shape
    small = min(o, d)
    side = x if d <= o else x.T  # [longer, smaller]: bases are on the smaller side
    if rank != -1 and small > SMALL:
        basis = _krylov(side, rank, g, count, total)
        if basis is not None:
            return _right_rows(x, basis), "krylov", True
    exact = _exact(x) if x.dtype == torch.float64 or small <= SMALL else None
    method = "gram" if exact is None else "exact"
    if exact is None:
        s, basis = _gram(side)
        vh = _right_rows(x, basis)
    else:
        s, vh = exact
    live = count(s)
    router = min(g, live)
    resolution = _gram_resolution(s, router) if method == "gram" else torch.finfo(torch.float64).eps
    keep = max(_rank(rank, s.square(), total**2) or live, g, 1)
    return vh[:keep].to(x.dtype), method, _separated(s, router, resolution, torch.finfo(x.dtype).eps)


def _exact(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Singular values and right singular vectors as rows by LAPACK, in float64; None where it fails."""
    try:
        _, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    except torch.linalg.LinAlgError:  # its divide and conquer gives up on some runs of equal singular values
        return None
    return s, vh


def _krylov(x: Tensor, rank: int | float, g: int, count: Callable[[Tensor], int], total: float) -> Tensor | None:
    """Leading right singular vectors of x [m, n], m >= n, as rows; None if they did not converge or it would be slower.

    The orthonormalised rows q, q x^T x, q (x^T x)^2, ... of a random block span the leading singular vectors to a
    precision that grows exponentially with their number (Musco & Musco, arXiv 1504.05477). The projected problem is
    solved in float64; the last block's coefficients give each vector's residual, and so its error, at no cost.
    """
    m, n = x.shape
    # A block finds at most as many equal singular values as it has rows, the last of them late: 8 more than g.
    block = max(16, g) + 8
    limit = int(KRYLOV_SHARE * n) // block * block
    if limit < 3 * max(rank, g, block):
        return None
    generator = torch.Generator().manual_seed(0)
    basis = x.new_empty(limit, n)
    image = x.new_empty(limit, m, dtype=torch.float64)  # basis @ x^T
    gram = x.new_empty(limit, limit, dtype=torch.float64)  # image @ image^T
    q = torch.linalg.qr(_random(block, x, generator).T)[0].T
    size = checked = 0
    lean = 0.0
    while size < limit:
        end = size + block
        basis[size:end] = q
        y = q @ x.T
        image[size:end] = y
        gram[:end, size:end] = image[:end] @ image[size:end].T
        gram[size:end, :size] = gram[:size, size:end].T
        size = end
        q, coefficients = _orthonormal(y @ x, basis[:size])
        if size < 1.15 * checked:
            continue

        energy, vectors = torch.linalg.eigh(gram[:size, :size])
        energy, vectors = energy.flip(0).clamp_min(0), vectors.flip(1)
        # AᵀA v - λ v of each Ritz vector, from the coefficients of the next block.
        residual = (vectors[size - block :].T @ coefficients.double()).norm(dim=1)
        s = energy.sqrt()
        live, maybe = count(s), count((energy + residual).sqrt())
        k, router = _rank(rank, energy, total**2), min(g, live)
        if k is None and maybe == size:
            # The share is not reached, and no later direction has more energy than the last converged one.
            known = size // 3
            lacking = (rank * total**2 - energy[:known].sum()) / energy[known]
            if size >= 3 * block and 3 * (known + lacking) > limit:
                return None
            continue
        k = k or max(live, 1)
        if size < min(max(k, g) + 8, limit):
            continue
        # Weight of the router's subspace on the newest block, and so on later ones if it decays geometrically.
        before, lean = lean, vectors[size - block :, :router].norm().item()
        rate = (lean / before) ** (block / (size - checked)) if before else 1.0
        ahead = lean * rate / (1 - rate) if rate < 1 else math.inf
        checked = size

        # Bound on each vector's remaining gain: its residual, or less if the energies outside are known to be smaller.
        gap = (energy[:k] - (energy[k] + residual[k] if k < size else 0)).clamp_min(0)
        missed = torch.minimum(residual[:k], residual[:k] ** 2 / gap).nan_to_num(0).sum().item()
        allowed = EXCESS * max(total**2 - energy[:k].sum().item(), 0) + 0.5 * (FLOOR * total) ** 2
        if missed > allowed or (router < g and maybe > router):
            continue
        if router and router < size:
            rounding = torch.finfo(x.dtype).eps
            if s[router - 1] - s[router] <= 4 * rounding * s[0]:
                converged = residual[:router].norm() <= 8 * rounding * s[0] * s[router - 1]
            else:
                gap = energy[router - 1] - energy[router] - residual[router]
                converged = residual[:router].norm() <= 0.5 * SINE * gap or ahead <= 0.1 * SINE
            if not converged:
                continue
            if not _separated(s, router, max(0.5 * rounding, _gram_resolution(s, router)), rounding):
                return None  # rounding of the products blurs these vectors
        found = vectors[:, : min(max(k + 1, g), size)].T.to(x.dtype) @ basis[:size]
        if k > block - 8 and _outside(x, found[:k], energy[k - 1].item(), generator) > allowed:
            return None
        return found
    return None


def _orthonormal(w: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """q, c with w = c q + (rows of basis): q orthonormal rows, orthogonal to those of basis."""
    q, c = w, torch.eye(len(w), dtype=w.dtype, device=w.device)
    for attempt in range(4):
        q = q - (q @ basis.T) @ basis
        q, r = torch.linalg.qr(q.T)
        q, c = q.T, c @ r.T
        # A unit row that shrinks has lost digits: the remainder is not orthogonal yet.
        if attempt and r.diagonal().abs().min() > 0.7:
            break
    return q, c


def _outside(x: Tensor, rows: Tensor, energy: float, generator: torch.Generator) -> float:
    """The energy above `energy` that a random block finds outside the rows; 0 unless leading directions are missing."""
    z = _random(24, x, generator)
    y = _orthonormal(z, rows)[0] @ x.T
    y = _orthonormal(y @ x, rows)[0] @ x.T
    found = torch.linalg.eigvalsh((y @ y.T).double()) - energy
    return found.clamp_min(0).sum().item() * max(1.0, len(rows) / len(y))


def _random(rows: int, x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, x.shape[1], generator=generator, dtype=x.dtype).to(x.device)


def _gram(x: Tensor) -> tuple[Tensor, Tensor]:
    """The singular values of x [m, n], m >= n, and its right singular vectors as rows, in float64."""
    n = x.shape[1]
    gram = x.new_zeros((n, n), dtype=torch.float64)
    for chunk in x.split(1024):
        chunk = chunk.double()
        gram.addmm_(chunk.T, chunk)
    energy, vectors = torch.linalg.eigh(gram)
    return energy.clamp_min(0).sqrt().flip(0), vectors.flip(1).T


def _gram_resolution(s: Tensor, g: int) -> float:
    """Resolution of s_g in a float64 Gram matrix, relative to s_1: forming it squares the condition number."""
    return torch.finfo(torch.float64).eps * (s[0] / s[max(g, 1) - 1]).item()


def _right_rows(x: Tensor, basis: Tensor) -> Tensor:
    """Right singular vectors of x [O, D] from its singular vectors on the smaller side, [w, min(O, D)]."""
    return basis if x.shape[1] <= x.shape[0] else torch.linalg.qr((basis @ x.to(basis.dtype)).T)[0].T


def _rank(rank: int | float, energy: Tensor, total: float) -> int | None:
    """r from `rank` and the squared singular values; None for full rank, or if a fraction is not reached."""
    if isinstance(rank, int):
        return rank if rank > 0 else None
    reached = energy.cumsum(0) >= rank * total
    return int(reached.to(torch.int8).argmax()) + 1 if reached.any() else None


def _separated(s: Tensor, g: int, resolution: float, rounding: float) -> bool:
    """Whether arithmetic accurate to resolution * s_1 separates the g leading vectors from the others; ties pass."""
    if g == 0 or g >= len(s):
        return True
    gap = s[g - 1] - s[g]
    return bool(gap >= resolution / SINE * s[0] or gap <= 4 * rounding * s[0])


def _cut(
    u: Tensor, s: Tensor, vh: Tensor, rank: int | float, g: int, live: int, total: float
) -> tuple[Tensor, Tensor, Tensor, int]:
    """u [O, r], s [r], vh [max(r, g), D], signed, zero from index `live` on; and the number of rows of vh not null."""
    r = _rank(rank, s.square(), total**2) or max(live, 1)
    if isinstance(rank, float):
        r = min(r, max(live, 1))
    live = min(live, max(r, g))
    sign = vh.gather(1, vh.abs().argmax(dim=1, keepdim=True)).sign()
    rows, values, columns = vh.new_zeros(max(r, g), vh.shape[1]), s.new_zeros(r), u.new_zeros(u.shape[0], r)
    rows[:live] = (vh * sign)[:live]
    values[:live] = s[: min(live, r)]
    columns[:, :live] = (u * sign.T)[:, : min(live, r)]
    return columns, values, rows, live


def _norm(x: Tensor, minus: tuple[Tensor, Tensor] | None = None) -> float:
    """||x||_F, or ||x - left @ right||_F, summed in float64 a few rows at a time."""
    norm = 0.0
    for start in range(0, len(x), 512):
        chunk = x[start : start + 512]
        if minus is not None:
            chunk = torch.addmm(chunk, minus[0][start : start + 512], minus[1], alpha=-1)
        norm = math.hypot(norm, torch.linalg.vector_norm(chunk.double()).item())
    return norm
