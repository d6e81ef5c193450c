"""`python -m smile_kernels ...`, as torchrun starts it."""

from .cli import app

app(prog_name="smile-kernels")
