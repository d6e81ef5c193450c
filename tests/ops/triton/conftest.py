import pytest
import torch

from smile_kernels.ops.triton import backend, configs

DEVICE = "cpu" if backend.INTERPRETED.value else "cuda"


@pytest.fixture
def device() -> str:
    """Where kernels run: on the GPU, or on the CPU under the interpreter."""
    if reason := backend.why_not(DEVICE, torch.float32, 1, False):
        pytest.fail(f"tests/ops/triton needs Triton's interpreter or a GPU: {reason}")
    return DEVICE


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """What torch.empty gives holds NaN, or a number that no kernel may take for a count or an expert."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        t = empty(*args, **kwargs)
        if t.dtype == torch.bool:
            return t.fill_(True)
        return t.fill_(float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).min)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(
        torch, "empty_like", lambda t, **kwargs: poisoned(t.shape, **{"dtype": t.dtype, "device": t.device} | kwargs)
    )


@pytest.fixture
def take(monkeypatch):
    """Make layers take given paths, whatever the heuristics say."""

    def take(linear: str = "route_first", apply: str = "fused"):
        monkeypatch.setattr(configs, "linear_path", lambda *_: linear)
        monkeypatch.setattr(configs, "apply_path", lambda *_: apply)

    return take
