"""The Triton kernels, one operation per file: `backend` combines them, `configs` chooses their launch parameters."""
