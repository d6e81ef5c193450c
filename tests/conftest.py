import os
import zlib

import pytest
import torch

# Triton reads this when it is imported: without a GPU its kernels run under its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _fresh_seed(request):
    """Each test draws from its own seed, the same on every run."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))
