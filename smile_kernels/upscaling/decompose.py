"""The computation that upscaling in memory and from disk share."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor


def average_tensors(tensors: Iterable[Tensor]) -> Tensor:
    """The mean of tensors of one shape and dtype, summed in float32 (float64 for float64)."""
    total, count = None, 0
    for tensor in tensors:
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        total, count = wide.clone() if total is None else total.add_(wide), count + 1
    return (total / count).to(tensor.dtype)


def in_threads(function: Callable[[Any], Any], arguments: Sequence[Any], workers: int | None = None) -> Iterator[Any]:
    """function(each) for each of the arguments, in their order; some at a time, each by one thread.

    torch's own threads would share one call between them, and another number of threads gives other bits.

    Args:
        workers: calls at a time; by default as many as torch has threads, at most 4.
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
