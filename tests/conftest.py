import os
import zlib
from pathlib import Path

import pytest
import torch

# Triton reads this when it is imported; without a GPU, kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _fresh_seed(request):
    """Each test has its own seed, the same on every run."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def models() -> list[torch.nn.Module]:
    """A small model and fine-tuned versions of it."""
    from tests.upscaling.checkpoints import N, Net, finetuned

    base = Net()
    return [base, *(finetuned(base) for _ in range(N))]


@pytest.fixture
def folders(tmp_path, models) -> list[Path]:
    """Their checkpoints."""
    from tests.upscaling.checkpoints import save

    return [save(tmp_path / f"m{i}", model) for i, model in enumerate(models)]
