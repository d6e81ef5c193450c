"""How fine-tuning changes linear layers: the subspace analysis of SMILE (arXiv 2408.10174, section 2).

For a layer W [O, D] = U diag(sigma) V^T, q = min(O, D), and its fine-tuned version W_i, the change D_i = W_i - W has
coordinates d_ab = u_a^T D_i v_b. k is the smallest number with sigma_1 + ... + sigma_k >= half of the whole sum:

    zone I      a <= k and b <= k                 the directions with the largest singular values
    zone II     a > k and b > k, both <= q        the directions with the smaller ones
    zone III    a > k and b > k, not in II        the null space: a > q or b > q; empty where W is square
    mixed       the others: one index <= k, the other > k

The share of a zone is its part of ||D_i||_F^2. The zones are those of the published implementation (fusion_bench).

Interference between N tasks. A merged layer W* should give the outputs of each W_i on the inputs of task i:

    minimise over W*:  L(W*) = sum_i E_x ||(W* - W_i) x||^2

There is no data, so inputs are assumed to have identity covariance: E_x ||A x||^2 = ||A||_F^2. The reported value is
L(W*) / L(W), which is 1 for the unchanged base:

    averaging          W* = W + 1/N sum_j D_j      the minimum of L over all W* of W's shape
    task arithmetic    W* = W + scale * sum_j D_j
    expanded           W + D_i^(r) for inputs of task i: the best rank-r approximation of D_i, which a
                       SMILE layer computes with correct routing; 0 at full rank
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import SmileConfig
from .errors import SmileError, check_integer
from .functional import check_tensor
from .nn import all_or_nothing, is_conv1d
from .publishing import check_outputs, write_plot, write_report
from .schema import check_arguments
from .svd import without_autocast
from .upscaling.decompose import in_threads
from .upscaling.disk import Job
from .upscaling.layers import Layer, linear_layers, select_layers
from .upscaling.report import kind_of
from .upscaling.sources import local_folder, read_plain

__all__ = [
    "Analysis",
    "ChangeAnalysis",
    "Interference",
    "LayerAnalysis",
    "analyze",
    "analyze_layer",
    "keep_zone",
    "zone",
]

ZONES = ("I", "II", "III", "mixed")
_LEGEND = """
change: relative to the base's weight; zones: shares of the change. The last three columns: the remaining distance
to all fine-tuned weights, in percent of the base's"""


@dataclass(frozen=True)
class ChangeAnalysis:
    """The change of one layer by one fine-tuning.

    Attributes:
        norm: ||D_i||_F.
        relative: ||D_i||_F / ||W||_F.
        zones: zone -> its share of ||D_i||_F^2; all 0 where nothing changed.
        energy: the share of ||D_i||_F^2 captured at rank 1, 2, 4, ..., up to the full rank.
    """

    norm: float
    relative: float
    zones: dict[str, float]
    energy: list[float]


@dataclass(frozen=True)
class Interference:
    """L(W*) / L(W) of one layer; 0 where no expert changes it.

    Attributes:
        average, task_arithmetic: for the weight merged in this way.
        expanded: for a SMILE layer with correct routing.
    """

    average: float
    task_arithmetic: float
    expanded: float


@dataclass(frozen=True)
class LayerAnalysis:
    """One linear layer.

    Attributes:
        name: name of the layer.
        shape: [O, D].
        half_rank: k, as in the definition of the zones.
        changes: one entry per expert.
        cosines: [N, N] <D_i, D_j> / (||D_i||_F ||D_j||_F); 0 where a norm is 0.
        interference: L(W*) / L(W), as in `Interference`.
    """

    name: str
    shape: tuple[int, int]
    half_rank: int
    changes: list[ChangeAnalysis]
    cosines: list[list[float]]
    interference: Interference


@dataclass(frozen=True)
class Analysis:
    """Results for every layer. `print` shows a summary by kind of layer; `save` writes JSON.

    Attributes:
        layers: one entry per linear layer.
        rank_of_expert, scale: the arguments of `analyze`.
        base, experts: paths of the checkpoints.
    """

    layers: list[LayerAnalysis]
    rank_of_expert: int
    scale: float
    base: str = ""
    experts: Sequence[str] = field(default_factory=list)

    @check_arguments
    def save(self, path: str | Path) -> None:
        """Write all results as JSON, atomically; of the files with content, only such a file is replaced."""
        write_report(path, asdict(self))

    def __str__(self) -> str:
        return self._table("layers", kind_of)

    def table(self) -> str:
        """A table with one row per layer."""
        return self._table("layer", lambda name: name)

    def _table(self, title: str, group: Callable[[str], str]) -> str:
        from rich.console import Console
        from rich.table import Column, Table

        r = self.rank_of_expert
        groups: dict[str, list[LayerAnalysis]] = {}
        for layer in self.layers:
            groups.setdefault(group(layer.name), []).append(layer)
        longest = max(map(len, groups), default=0)
        columns = ("shape", "change", *(f"zone {zone}" for zone in ZONES[:3]), "mixed", f"in rank {r}")
        merged = ("average", f"sum x {self.scale:g}", f"SMILE r {r}")
        first = Column(title, no_wrap=True, min_width=longest)
        table = Table(first, *columns, *merged, box=None, pad_edge=False)
        for name, layers in (*groups.items(), ("all", self.layers)):
            shapes = {"x".join(map(str, layer.shape)) for layer in layers}
            means = means_of(layers)
            values = [means[key] for key in (*ZONES, "held", "average", "task_arithmetic", "expanded")]
            shape = shapes.pop() if len(shapes) == 1 else ""
            table.add_row(name, shape, f"{means['relative']:.3g}", *(f"{value:.1%}" for value in values))
        console = Console(width=100 + longest, color_system=None)
        with console.capture() as text:
            console.print(table)
        return text.get().rstrip("\n") + _LEGEND

    @check_arguments
    def plot(self, file: str | Path) -> None:
        """Plot energy against rank and the zones' shares by kind of layer, as .png, .svg or .pdf."""
        from matplotlib.figure import Figure

        check_outputs(plot=Path(file))
        groups: dict[str, list[LayerAnalysis]] = {}
        for layer in self.layers:
            groups.setdefault(kind_of(layer.name), []).append(layer)
        figure = Figure(figsize=(12, 4.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        for name, layers in groups.items():
            curves = [change.energy for layer in layers for change in layer.changes if change.norm]
            length = min(map(len, curves), default=0)
            if length:
                mean = [sum(curve[i] for curve in curves) / len(curves) for i in range(length)]
                left.plot([min(2**i, *layers[0].shape) for i in range(length)], mean, label=name)
        left.set(xlabel="rank", ylabel="share of the change", title="Energy against rank, mean")
        left.set_xscale("log", base=2)
        left.legend(fontsize=7)
        below = [0.0] * len(groups)
        for zone in ZONES:
            shares = [means_of(layers)[zone] for layers in groups.values()]
            right.barh(list(groups), shares, left=below, label=zone if zone == "mixed" else f"zone {zone}")
            below = [a + b for a, b in zip(below, shares)]
        right.set(xlabel="share of the change", title="Change by zone")
        right.tick_params(axis="y", labelsize=7)
        right.legend(fontsize=7, ncols=len(ZONES), loc="upper center", bbox_to_anchor=(0.5, -0.12))
        write_plot(file, figure)


def means_of(layers: Sequence[LayerAnalysis]) -> dict[str, float]:
    """Means over layers and experts, weighted by ||D_i||_F^2, so that shares are of the whole change."""
    changes = [change for layer in layers for change in layer.changes]
    total = sum(change.norm**2 for change in changes)
    weight = 1 / total if total else 0.0
    means = {zone: sum(c.norm**2 * c.zones[zone] for c in changes) * weight for zone in ZONES}
    base = sum((c.norm / c.relative) ** 2 if c.relative else 0.0 for c in changes)
    means["relative"] = math.sqrt(total / base) if base else 0.0
    for name in ("average", "task_arithmetic", "expanded"):
        parts = ((sum(c.norm**2 for c in layer.changes), getattr(layer.interference, name)) for layer in layers)
        means[name] = sum(energy * value for energy, value in parts) * weight
    means["held"] = 1 - means["expanded"] if total else 0.0
    return means


def half_rank(sigma: Tensor) -> int:
    """k, the smallest number of leading singular values that add up to half of the sum."""
    sums = sigma.cumsum(0)
    return min(int((sums < 0.5 * sums[-1]).sum()) + 1, len(sigma))


@check_arguments
@torch.no_grad()
@without_autocast
def zone(weight: Tensor, finetuned: Tensor, name: str) -> Tensor:
    """The component of a layer's change in one zone.

    Args:
        weight, finetuned: W and W_i [O, D], in any floating-point dtype.
        name: "I", "II", "III", "mixed", or several joined by "+", as in "II+III".

    Returns:
        [O, D] in float32 (float64 for float64).

    Raises:
        ValueError: an unknown zone; matrices that are not floating point, or differ in shape or device; NaN or inf.
    """
    names = name.split("+")
    if unknown := [one for one in names if one not in ZONES]:
        raise SmileError(f"name: is {name!r}, with {unknown[0]!r}; expected {', '.join(ZONES)}, or several joined by +")
    weight, change = _change(weight, finetuned)
    parts = _parts(weight, change)
    return sum((parts[one] for one in dict.fromkeys(names)), torch.zeros_like(change))


def _change(weight: Tensor, finetuned: Tensor) -> tuple[Tensor, Tensor]:
    """W and W_i - W in float32 or float64."""
    _check_matrix("weight", weight, weight)
    _check_matrix("finetuned", finetuned, weight)
    wide = _wide(weight, finetuned)
    weight, change = weight.to(wide), finetuned.to(wide) - weight.to(wide)
    if not change.isfinite().all():
        raise SmileError(f"finetuned: its change is beyond {wide}; expected what that holds")
    return weight, change


def _wide(*matrices: Tensor) -> torch.dtype:
    """The dtype of the computation."""
    return torch.float64 if any(matrix.dtype == torch.float64 for matrix in matrices) else torch.float32


def _check_matrix(name: str, matrix: Tensor, weight: Tensor) -> None:
    """Raise ValueError unless it is a floating-point matrix of weight's shape, on its device, with finite numbers."""
    check_tensor(name, matrix)
    if matrix.dim() != 2 or not matrix.numel() or matrix.shape != weight.shape:
        expected = "[O, D]" if matrix is weight else f"weight's, {list(weight.shape)}"
        raise SmileError(f"{name}: has shape {list(matrix.shape)}; expected {expected}")
    if matrix.device != weight.device or matrix.is_meta:
        raise SmileError(f"{name}: is on {matrix.device}, and weight on {weight.device}; expected one device with data")
    if not matrix.is_floating_point():
        raise SmileError(f"{name}: is {matrix.dtype}; expected floating-point numbers")
    if not matrix.to(_wide(matrix)).isfinite().all():
        raise SmileError(f"{name}: contains NaN or inf; expected finite numbers")


def _check_numbers(rank_of_expert: int, scale: float) -> None:
    check_integer("rank_of_expert", rank_of_expert, 1)
    if not -1e9 < scale < 1e9:
        raise SmileError(f"scale: is {scale}; expected a finite number, of at most 1e9")


def _parts(weight: Tensor, change: Tensor) -> dict[str, Tensor]:
    """The components of the change by zone; their sum is the change."""
    u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
    k = half_rank(sigma)
    left, right = u[:, :k], vh[:k]
    first = left @ (left.T @ change @ right.T) @ right
    below = change - left @ (left.T @ change)
    outside = below - below @ right.T @ right  # zones II and III
    second = u[:, k:] @ (u[:, k:].T @ change @ vh[k:].T) @ vh[k:]
    return {"I": first, "II": second, "III": outside - second, "mixed": change - first - outside}


@check_arguments
@torch.no_grad()
@without_autocast
def analyze_layer(
    name: str, weight: Tensor, changes: Sequence[Tensor], *, rank_of_expert: int = 16, scale: float = 0.3
) -> LayerAnalysis:
    """The analysis of one layer.

    Args:
        name: name of the layer.
        weight: W [O, D], in any floating-point dtype.
        changes: D_i [O, D], one per expert, likewise.
        rank_of_expert: r of `Interference.expanded`.
        scale: factor of task arithmetic.

    Raises:
        ValueError: matrices that are not floating point, or differ in shape or device; NaN or inf; a rank below 1; or a
            scale beyond 1e9.
    """
    _check_numbers(rank_of_expert, scale)
    if not len(changes):
        raise SmileError("changes: is empty; expected one matrix or more")
    for i, matrix in enumerate((weight, *changes)):
        _check_matrix(f"changes[{i - 1}]" if i else "weight", matrix, weight)
    wide = _wide(weight, *changes)
    weight, changes = weight.to(wide), [change.to(wide) for change in changes]
    u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
    k, size = half_rank(sigma), torch.linalg.vector_norm(weight).item()
    gram = torch.tensor([[(a.double() * b.double()).sum() for b in changes] for a in changes], dtype=torch.float64)
    analyses, left_out = [], 0.0
    for i, change in enumerate(changes):
        total = gram[i, i].item()
        energies = torch.linalg.svdvals(change).double().square()
        sums = (energies.cumsum(0) / energies.sum()).tolist() if total else [0.0] * len(energies)
        ranks = [2**step for step in range(len(energies).bit_length()) if 2**step < len(energies)]
        left_out += total * (1 - sums[min(rank_of_expert, len(sums)) - 1]) if total else 0.0
        analyses.append(
            ChangeAnalysis(
                math.sqrt(total),
                math.sqrt(total) / size if size else 0.0,
                _shares(u, vh, k, change, total),
                [sums[rank - 1] for rank in ranks] + sums[-1:],
            )
        )
    norms = gram.diagonal().sqrt()
    cosines = torch.nan_to_num(gram / norms[:, None] / norms, nan=0.0, posinf=0.0, neginf=0.0)
    interference = Interference(
        _distance(gram, 1 / len(changes)), _distance(gram, scale), left_out / t if (t := gram.trace().item()) else 0.0
    )
    return LayerAnalysis(name, (weight.shape[0], weight.shape[1]), k, analyses, cosines.tolist(), interference)


def _shares(u: Tensor, vh: Tensor, k: int, change: Tensor, total: float) -> dict[str, float]:
    """The share of each zone, from the coordinates of the change."""
    if not total:
        return dict.fromkeys(ZONES, 0.0)
    inside = (u.T @ change @ vh.T).double().square()
    first, second = inside[:k, :k].sum().item(), inside[k:, k:].sum().item()
    rows = (u[:, :k].T @ change).double().square().sum().item()
    columns = (change @ vh[:k].T).double().square().sum().item()
    outside = max(total - rows - columns + first, 0.0)
    third = max(outside - second, 0.0) if change.shape[0] != change.shape[1] else 0.0
    shares = {"I": first / total, "II": second / total, "III": third / total}
    return {**shares, "mixed": max(1 - sum(shares.values()), 0.0)}


def _distance(gram: Tensor, scale: float) -> float:
    """sum_i ||scale * sum_j D_j - D_i||^2 / sum_i ||D_i||^2 from the products <D_i, D_j> [N, N]."""
    total = gram.trace().item()
    return (len(gram) * scale**2 * gram.sum() - 2 * scale * gram.sum() + total).item() / total if total else 0.0


@check_arguments
@torch.no_grad()
def analyze(
    base: str | Path,
    experts: Sequence[str | Path],
    *,
    rank_of_expert: int = 16,
    scale: float = 0.3,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    workers: int | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Analysis:
    """Analyze checkpoints on disk, with a few layers in memory at a time.

    Args:
        base: checkpoint of the pre-trained model: a folder or the id of a Hub repository.
        experts: checkpoints of the fine-tuned models, or PEFT adapters of the base.
        rank_of_expert: r of `Interference.expanded`.
        scale: factor of task arithmetic.
        include, exclude: shell patterns of layer names, as in `upscale_checkpoints`.
        workers: number of layers computed in parallel; by default the number of cores, at most 4.
        progress: called with the stage, the number of finished layers and the number of layers.

    Returns:
        The analysis; `print` shows a summary by kind of layer.

    Raises:
        ValueError, FileNotFoundError: as in `upscale_checkpoints`, before any layer is read.
    """
    if not experts:
        raise SmileError("experts: is empty; expected one fine-tuned model or more")
    _check_numbers(rank_of_expert, scale)
    if workers is not None and workers < 1:
        raise SmileError(f"workers: is {workers}; expected 1 or more")
    base, experts = local_folder("base", base), [local_folder(f"experts[{i}]", e) for i, e in enumerate(experts)]
    read_plain("base", base)  # whose weights are analyzed, and not only copied
    config = SmileConfig(len(experts), 1, 1, 1, modules={})  # no layer is too small to be analyzed
    job = Job(base, experts, config, include, exclude, "base", torch.float32, "cpu", False, None)
    analyses = []
    for analysis in in_threads(lambda layer: _analyzed(job, layer, rank_of_expert, scale), job.layers, workers):
        analyses.append(analysis)
        progress("layers", len(analyses), len(job.layers))
    folders = str(job.base.resolve()), [str(folder.resolve()) for folder in job.experts]
    return Analysis(analyses, rank_of_expert, scale, *folders)


def _analyzed(job: Job, layer: Layer, rank_of_expert: int, scale: float) -> LayerAnalysis:
    def oriented(weight: Tensor) -> Tensor:
        weight = weight.to(_wide(weight))
        return weight.T if layer.fan_in_fan_out else weight

    weight, changes = oriented(job.tensors[layer.weight]), []
    for source in job.sources:
        tuned: Any = source.weight(layer)
        if isinstance(tuned, Tensor):
            changes.append(oriented(tuned) - weight)
        else:  # an adapter's factors
            b, a, factor = tuned
            changes.append((factor * (b.float() @ a.float())).to(weight.dtype))
    return analyze_layer(layer.name, weight, changes, rank_of_expert=rank_of_expert, scale=scale)


@check_arguments
@torch.no_grad()
@without_autocast
def keep_zone(
    model: nn.Module,
    finetuned: nn.Module,
    name: str,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Reduce a fine-tuned model's changes to one zone, in place: its linear layers become W + zone(W, W_i).

    All other parameters, biases included, stay fine-tuned, as in the published implementation. The accuracy of the
    resulting model measures how much of the task is in that zone.

    Args:
        model: the pre-trained model; it is not changed.
        finetuned: a model of the same architecture.
        name: as in `zone`.
        include, exclude: shell patterns of layer names.
        progress: called with the number of finished layers and the number of layers.

    Raises:
        ValueError: an unknown zone, a different architecture, or patterns that match no layer. Nothing is changed then.
    """
    theirs, ours = linear_layers(finetuned), linear_layers(model)
    layers = select_layers({one: Layer(one, is_conv1d(module)) for one, module in ours.items()}, include, exclude)
    for one in layers:
        if one not in theirs or theirs[one].weight.shape != ours[one].weight.shape:
            raise SmileError(f"finetuned: has no {one} of model's shape; expected a model of the same architecture")
    kept = {}
    for done, (one, layer) in enumerate(layers.items(), 1):
        weight, tuned = ours[one].weight, theirs[one].weight
        part = zone(weight.T, tuned.T, name).T if layer.fan_in_fan_out else zone(weight, tuned, name)
        kept[one] = (weight.to(part.dtype) + part).to(tuned)
        progress(done, len(layers))
    with all_or_nothing(finetuned, [theirs[one].weight for one in kept]):
        for one, new in kept.items():
            theirs[one].weight.copy_(new)
