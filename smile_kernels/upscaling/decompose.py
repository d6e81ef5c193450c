"""Decomposes one layer and its fine-tuned versions into SMILE factors: the same bits on any number of threads."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..errors import SmileError
from ..svd import decompose_linear
from .layers import Layer
from .report import LayerReport
from .sources import ExpertSource

ROUTERS = ("smile", "arrow", "norm")


def check_router(router: str, rank_of_router: int | None) -> int:
    """The rows of vh that a router of this kind needs: g, or 1 where g is not asked for.

    Raises:
        ValueError: an unknown router, or a rank_of_router that is missing, or given where the router sets it.
    """
    if router not in ROUTERS:
        raise SmileError(f"router: is {router!r}; expected one of {', '.join(map(repr, ROUTERS))}")
    if router == "smile":
        if rank_of_router is None:
            raise SmileError("rank_of_router: is not given; expected g, an integer of 1 or more")
        return rank_of_router
    if rank_of_router is not None:
        rows = "one row" if router == "arrow" else "as many rows as an expert has ranks"
        raise SmileError(f"rank_of_router: is {rank_of_router} with router {router!r}, which has {rows}; expected None")
    return 1


def norm_rows(vh: Tensor, s: Tensor) -> Tensor:
    """The rows of router "norm", s_i * V_i^T: vh [N, >= r, D], s [N, r] -> [N, r, D] in vh's dtype."""
    rows = (s[..., None] * vh[:, : s.shape[1]].to(s.dtype)).to(vh.dtype)
    if not rows.isfinite().all():
        raise SmileError(f"router: is 'norm', with rows beyond {vh.dtype}; expected what that holds, or router 'smile'")
    return rows


class _Weights(Sequence[Any]):
    """The experts' weights of one layer, read one at a time."""

    def __init__(self, read: Callable[[ExpertSource], Any], sources: Sequence[ExpertSource]):
        self.read, self.sources = read, sources

    def __getitem__(self, index: Any) -> Any:
        return self.read(self.sources[index])

    def __len__(self) -> int:
        return len(self.sources)


@torch.no_grad()
def decompose(
    layer: Layer,
    base: Mapping[str, Tensor],
    sources: Sequence[ExpertSource],
    *,
    rank_of_expert: int | float,
    rank_of_router: int,
    router: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[dict[str, Tensor | None], LayerReport]:
    """The factors of a layer, as `svd.decompose_linear` returns them and `router` where it is "norm", and its report.

    Args:
        layer, base, sources: the layer, the base's tensors and the experts.
        rank_of_expert, rank_of_router: r and g, as `check_router` returned it.
        router: one of ROUTERS.
        device, dtype: for the differences of the weights; by default those of the base.

    Raises:
        ValueError: a weight or rank does not fit; the message names the layer.
    """
    start = time.perf_counter()

    def oriented(weight: Any) -> Any:
        if not isinstance(weight, Tensor):
            return weight
        weight = weight.to(device or weight.device, dtype or weight.dtype)
        return weight.T.contiguous() if layer.fan_in_fan_out else weight

    try:
        factors, certificates = decompose_linear(
            oriented(base[layer.weight]),
            base.get(layer.bias),
            _Weights(lambda source: oriented(source.weight(layer)), sources),
            [source.bias(layer) for source in sources],
            rank_of_expert=rank_of_expert,
            rank_of_router=rank_of_router,
        )
        if router == "norm":
            vh, s = factors["vh"], factors["s"]
            assert vh is not None
            assert s is not None
            factors["router"] = norm_rows(vh, s)
    except ValueError as error:
        raise SmileError(f"{layer.name}: {error}") from error
    return factors, LayerReport.of(layer.name, factors, certificates, time.perf_counter() - start)


def in_threads(function: Callable[[Any], Any], arguments: Sequence[Any], workers: int | None = None) -> Iterator[Any]:
    """Yield function(argument) for each argument, in order; several in parallel, each in one thread.

    torch's own threads would split one call, and then the bits depend on the number of threads.

    Args:
        workers: calls in parallel; by default torch's number of threads, at most 4.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers or min(threads, 4), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                yield from pool.map(function, arguments)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(threads)
