"""sanitize.py LIBRARY: a library built with sanitizers, on every shape, dtype and instruction set."""

import os
import sys

import cases
import torch

from smile_kernels.testing import Problem

torch.ops.load_library(sys.argv[1])
torch.set_num_threads(1)
for capability in ("default", "avx2", "avx512"):
    if child := os.fork():
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            sys.exit(f"failed on {capability}")
        print(capability)
        continue
    os.environ["ATEN_CPU_CAPABILITY"] = capability  # read by the library's first call
    for dtype in cases.DTYPES:
        for shape in cases.SHAPES:
            problem = Problem.random(*shape, dtype=dtype, router=shape[0] % 2 == 0)
            problem.x = torch.cat([problem.x, problem.x], 1)[:, 1 : shape[1] + 1]  # rows start between cache lines
            cases.check_forward(torch.ops.smile_kernels_ext, problem)
    os._exit(0)
