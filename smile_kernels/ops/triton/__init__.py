"""The Triton kernels, one operation a file: `backend` puts them together, `configs` chooses how they are launched."""
