"""sanitize.py LIBRARY cpu|emulated: the operators of a sanitized library, which ends it on a finding."""

import os
import sys

import torch

from smile_kernels.testing import Problem
from tests.ops.extension import cases


def check_cpu(shapes: list[tuple[int, ...]]) -> None:
    for dtype in cases.DTYPES:
        for shape in shapes:
            problem = Problem.random(*shape, dtype=dtype, router=shape[0] % 2 == 0, bias=shape[0] % 5 != 0)
            problem.x = torch.cat([problem.x, problem.x], 1)[:, 1 : shape[1] + 1]  # rows start between cache lines
            cases.check_forward(torch.ops.smile_kernels_ext, problem)
            x, weight, bias, vh, s, u, *_ = problem.arguments()
            none = x.new_empty((shape[0], 0), dtype=s.dtype), x.new_empty((shape[0], 0), dtype=torch.int32)
            torch.ops.smile_kernels_ext.apply(x, weight, bias, vh, s, u, None, *none, False)
            # float32 is checked with bounds that need fused multiply-adds, which -O0 lacks; float16 goes the same way.
            if shape[0] > 1 and dtype != torch.float32:
                cases.check_backward(torch.ops.smile_kernels_ext, problem)


torch.ops.load_library(sys.argv[1])
torch.set_num_threads(1)
if sys.argv[2] == "emulated":
    shapes = [cases.SHAPES[3], (13, 40, 65, 3, 5, 2, 2), (7, 33, 29, 3, 5, 2, 2)]
    for dtype, shape, router in zip(cases.DTYPES, shapes, (False, True, False)):
        problem = Problem.random(*shape, dtype=dtype, router=router)
        cases.check_forward(torch.ops.smile_kernels_emulated, problem)
        cases.check_backward(torch.ops.smile_kernels_emulated, problem)
else:
    for capability in ("default", "avx2", "avx512", ""):  # "": everything, including tiles
        if child := os.fork():
            if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
                sys.exit(f"failed on {capability}")
            continue
        os.environ["ATEN_CPU_CAPABILITY"] = capability  # read by the library's first call
        check_cpu(cases.SHAPES + cases.SHAPES_OF_PANELS)
        os._exit(0)
print("clean")
