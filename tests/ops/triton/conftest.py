import pytest
import torch

from smile_kernels.ops.triton import backend, configs

DEVICE = "cuda" if torch.cuda.is_available() and not backend.INTERPRETED.value else "cpu"


@pytest.fixture
def device() -> str:
    """The device of the kernels: the GPU, or the CPU under the interpreter."""
    if reason := backend.why_not(DEVICE, torch.float32, 1, False):
        pytest.fail(f"tests/ops/triton needs Triton's interpreter or a GPU: {reason}")
    return DEVICE


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """New memory contains NaN, or an integer that is neither a valid count nor an expert.

    Every byte of a NaN is 255, so that parts of other dtypes that are cut from it contain NaN or -1.
    """
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def poison(t):
        if t.dtype == torch.bool:
            return t.fill_(True)
        if t.is_floating_point():
            t.view(torch.uint8).fill_(255) if t.numel() else None
            return t
        return t.fill_(torch.iinfo(t.dtype).min)

    def poisoned(*args, **kwargs):
        return poison(empty(*args, **kwargs))

    with torch.device("cpu"):  # on first use torch.device notes the functions that it affects: the real ones
        torch.zeros(0)
    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: poison(new_empty(*args, **kwargs)))
    monkeypatch.setattr(
        torch, "empty_like", lambda t, **kwargs: poisoned(t.shape, **{"dtype": t.dtype, "device": t.device} | kwargs)
    )


@pytest.fixture
def take(monkeypatch):
    """Make layers use given paths instead of those of the heuristics."""

    def take(linear: str = "route_first", apply: str = "fused"):
        monkeypatch.setattr(configs, "linear_path", lambda *_: linear)
        monkeypatch.setattr(configs, "apply_path", lambda *_: apply)

    return take
