import pytest
import torch


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Every tensor that PyTorch allocates is filled with NaN, including scratch space and results of the operators."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
