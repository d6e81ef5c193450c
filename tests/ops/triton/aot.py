"""Compile the kernels ahead of time, for devices that are not present, and report their resources.

    python tests/ops/triton/aot.py [usual | recorded | every | extreme] [FAMILY ...]
    python tests/ops/triton/aot.py --write

prints one JSON line per kernel: those of decode and prefill; of one layer in every regime; every tile of every kernel;
or those of the largest layers.
--write stores the second for this version of Triton in resources.json, with which the tests compare. The backend's own
launchers run on tensors without storage, and Triton compiles the launched kernels without running them.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from smile_kernels.ops.triton import backend, configs
from smile_kernels.testing import taking

RESOURCES = Path(__file__).with_name("resources.json")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Target:
    """A device to compile for."""

    family: str  # its tiles
    triton: GPUTarget
    shared: int  # shared memory per block, in bytes
    pdl: bool
    tma: bool


# The tiles of sm80 are also used by devices with 99 KB per block: 8.6, 8.9 and 12.0.
TARGETS = {
    "sm80": Target("sm80", GPUTarget("cuda", 80, 32), 101376, pdl=False, tma=False),
    "sm90": Target("sm90", GPUTarget("cuda", 90, 32), 232448, pdl=True, tma=True),
    "sm100": Target("sm100", GPUTarget("cuda", 100, 32), 232448, pdl=True, tma=True),
    "sm120": Target("sm80", GPUTarget("cuda", 120, 32), 101376, pdl=True, tma=False),
    "gfx942": Target("gfx942", GPUTarget("hip", "gfx942", 64), 65536, pdl=False, tma=False),
}
INSTRUCTIONS = {
    "HGMMA": r"\bHGMMA",
    "UTCMMA": r"\bUTC\w*MMA",
    "HMMA": r"\bHMMA",
    "FFMA": r"\bFFMA",
    "LDGSTS": r"\bLDGSTS",
    "LDGSTS.128": r"\bLDGSTS\S*128",
    "UTMALDG": r"\bUTMALDG",
    "LDL": r"\bLDL",
    "STL": r"\bSTL",
}


# Instructions that read and write device memory. ACQBULK waits for the previous kernel.
LOAD, STORE = r"\b(LDG|LDGSTS|UTMALDG)\b", r"\b(STG|ATOMG|RED|UTMASTG)\b"


class _Driver:
    """A substitute for the driver of a device that is not present."""

    def __init__(self, name: str):
        self.name = name

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.name)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name].triton


@contextlib.contextmanager
def compiling(name: str) -> Iterator[dict[str, dict]]:
    """In this context, launches for device `name` are compiled and not run; yields each kernel's resources by label."""
    target, found = TARGETS[name], {}
    run, device = JITFunction.run, configs.device_of

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            options = [f"{k}={v}" for k, v in kwargs.items() if v is not False and not k.startswith("launch_")]
            if "PRECISION" in kwargs:
                options.insert(0, str(getattr(args[0], "base", args[0]).dtype).removeprefix("torch."))
            key = " ".join([name, f"{self.fn.__module__.split('.')[-1]}.{self.fn.__name__}", *options])
            found[f"{key} #{sum(k.startswith(key) for k in found)}"] = resources(kernel)
        return kernel

    seen: set[str] = set()
    driver.set_active(_Driver(name))
    JITFunction.run = compile_only
    configs.device_of = lambda _: configs.Device(name, target.family, 132, pdl=target.pdl, tma=target.tma)
    try:
        yield found
    finally:
        JITFunction.run, configs.device_of = run, device


def resources(kernel) -> dict:
    """Registers, shared memory, spilled bytes and the relevant instructions of a compiled kernel."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        number = {k: int(re.search(rf"\.{k}:\s*(\d+)", text)[1]) for k in ("vgpr_count", "vgpr_spill_count")}
        spilled = number["vgpr_spill_count"] + int(re.search(r"\.private_segment_fixed_size:\s*(\d+)", text)[1])
        mfma = len(re.findall(r"\bv_mfma", text))
        return {"registers": number["vgpr_count"], "shared": kernel.metadata.shared, "spilled": spilled, "MFMA": mfma}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "-res-usage", cubin.name)
        sass = _tool("nvdisasm", cubin.name)
    counts = {name: len(re.findall(pattern, sass)) for name, pattern in INSTRUCTIONS.items()}
    counts["griddepcontrol"] = kernel.asm["ptx"].count("griddepcontrol.")
    if len(halves := re.split(r"\bACQBULK\b", sass)) == 2:
        counts |= {"early loads": len(re.findall(LOAD, halves[0])), "late loads": len(re.findall(LOAD, halves[1]))}
        counts["early stores"] = len(re.findall(STORE, halves[0]))
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "shared": kernel.metadata.shared,
        "spilled": int(re.search(r"STACK:(\d+)", usage)[1]) + counts.pop("LDL") + counts.pop("STL"),
        **{name: count for name, count in counts.items() if count},
        "in loops": sorted(
            name for name in ("HGMMA", "UTCMMA", "HMMA", "FFMA") if _in_a_loop(sass, INSTRUCTIONS[name])
        ),
    }


def _tool(name: str, *args: str) -> str:
    return subprocess.run([TOOLS / name, *args], capture_output=True, text=True, check=True).stdout


def _in_a_loop(sass: str, pattern: str) -> bool:
    """Whether an instruction is between a label and a later branch back to it."""
    lines = sass.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\.L_\w+):", line))}
    for i, line in enumerate(lines):
        branch = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)
        if branch and labels.get(branch[1], i) < i and re.search(pattern, "\n".join(lines[labels[branch[1]] : i])):
            return True
    return False


class Layer:
    """The arguments of the backend's functions for one layer, without storage."""

    def __init__(self, n, r, g, m=1, d=4096, o=4096, dtype=torch.bfloat16):
        def empty(*shape, dtype=dtype):
            return torch.empty(shape, dtype=dtype, device="meta")

        self.empty, self.n, self.r, self.g, self.m, self.d, self.o = empty, n, r, g, m, d, o
        self.parameters = (
            *(empty(o, d), empty(o), empty(n, max(r, g), d)),
            *(empty(n, r, dtype=torch.float32), empty(n, o, r), empty(n, o)),
        )

    def routing(self, tokens: int):
        shape = (tokens, self.m)
        return self.empty(*shape, dtype=torch.float32), self.empty(*shape, dtype=torch.int32)

    def linear(self, tokens: int, linear: str = "one_product", apply: str = "fused", save: bool = False) -> None:
        with taking(linear, apply):
            backend.linear(self.empty(tokens, self.d), *self.parameters, None, self.m, self.g, save)

    def apply(self, tokens: int, apply: str = "fused", save: bool = False) -> None:
        with taking("route_first", apply):
            backend.apply(self.empty(tokens, self.d), *self.parameters, *self.routing(tokens), save)

    def evidence(self, length: int, scope: int) -> None:
        """A routing step over 4 sequences, with all optional arguments."""
        real, rows = torch.float32, 1 if scope == 2 else length
        state = (self.empty(self.n, dtype=real), self.empty(4, length, dtype=torch.bool))
        state += tuple(self.empty(*shape, dtype=real) for shape in ((4, length), (4, self.n), (4, rows, self.n)))
        x = self.empty(4 * length, self.d)
        backend.evidence(x, self.parameters[2], *state, self.m, self.g, 4, scope, True)

    def backward(self, tokens: int, apply: str = "delta") -> None:
        x, dy = self.empty(tokens, self.d), self.empty(tokens, self.o)
        weight, _, vh, s, u, expert_bias = self.parameters
        weights, ids = self.routing(tokens)
        h = self.empty(tokens, self.m, self.r, dtype=torch.float32)
        layer, needs = (dy, x, weight, vh, s, u, expert_bias), [True] * 7
        with taking("route_first", apply):
            backend.apply_backward(*layer, weights, ids, h, [*needs, self.m > 1])
            backend.linear_backward(*layer, None, weights, ids, h, self.g, [*needs, False])
            if self.m > 1:
                backend.route_backward(weights, x, vh[:, : self.g], weights, ids, [True, True])


@contextlib.contextmanager
def _allow_tf32(allowed: bool) -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def usual(name: str) -> dict[str, dict]:
    """Decode and prefill of the most common layer."""
    with compiling(name) as found:
        layer = Layer(8, 32, 16)
        layer.linear(1, "decode")
        layer.linear(2048)
    return found


def recorded(name: str) -> dict[str, dict]:
    """The kernels of one layer in every regime; fewer for the other devices than for sm90."""
    with compiling(name) as found:
        layer = Layer(8, 32, 16)
        layer.linear(1, "decode")
        layer.linear(2048)
        if name == "sm90":
            layer.linear(1, "decode_one_launch")
            layer.linear(64)
            layer.linear(2048, apply="tma", save=True)
            layer.linear(2048, apply="delta")
            layer.apply(16)
            layer.evidence(1, 1)
            layer.evidence(512, 2)
            Layer(64, 64, 8).linear(2048, "route_first", "grouped")
            Layer(8, 32, 16, 2).backward(2048)
            Layer(64, 64, 8).backward(2048, "grouped")
            for tf32 in (False, True):
                with _allow_tf32(tf32):
                    Layer(8, 32, 16, dtype=torch.float32).linear(2048)
        elif name in ("sm80", "sm100"):
            layer.backward(2048)
            layer.backward(2048, "grouped")
    return found


def every(name: str) -> dict[str, dict]:
    """Every tile of every kernel that a layer of small and one of large rank can choose."""
    tile = configs.tile
    try:
        with compiling(name) as found:
            for operands, kernels in configs.TILES[TARGETS[name].family].items():
                dtype = torch.bfloat16 if operands == "half" else torch.float32
                for i in range(max(map(len, kernels.values()))):

                    def pick(kernel, device, dtype, rows, columns, *_, i=i, **__):
                        fitting = configs.candidates(kernel, device, dtype, rows, columns)
                        return fitting[i % len(fitting)]

                    configs.tile = pick
                    with _allow_tf32(operands == "tf32"):
                        for layer in (Layer(8, 32, 16, 2, dtype=dtype), Layer(3, 512, 8, dtype=dtype)):
                            if layer.r == 32 and "decode" in kernels:
                                layer.linear(16, "decode")
                                layer.linear(16, "decode_one_launch")
                            tma = TARGETS[name].tma and operands == "half"
                            for apply in ("fused", "delta", *(["tma"] if tma else [])):
                                layer.linear(2048, apply=apply)
                            # For few tokens, only the rows of the chosen experts are read.
                            layer.apply(64)
                            # Every block size of the grouped kernels.
                            for tokens in sorted({t[0] * layer.n for t in kernels["gather"]}):
                                layer.apply(tokens, "grouped", save=True)
                                layer.backward(tokens, "grouped")
                            layer.backward(2048)
    finally:
        configs.tile = tile
    with compiling(name) as steps:
        for length, scope in itertools.product((1, 512), (0, 1, 2)):
            Layer(8, 32, 16, 2).evidence(length, scope)
            Layer(3, 512, 8).evidence(length, scope)
    return found | steps


def extreme(name: str) -> dict[str, dict]:
    """The kernels chosen for layers with the most experts, and with the largest ranks."""
    with compiling(name) as found:
        for layer in (Layer(256, 64, 256, 256), Layer(256, 1024, 16, 2), Layer(2, 1024, 256, 2)):
            for tokens in (1, 64, 2048):
                x = layer.empty(tokens, layer.d)
                backend.linear(x, *layer.parameters, None, layer.m, layer.g, True)
                layer.backward(tokens)
                for scope in (0, 1, 2):
                    layer.evidence(tokens, scope)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("which", nargs="?", choices=("usual", "recorded", "every", "extreme"), default="recorded")
    parser.add_argument("families", nargs="*", default=list(TARGETS), metavar="FAMILY")
    options = parser.parse_args()
    if options.write and (options.which, options.families) != ("recorded", list(TARGETS)):
        parser.error("--write: takes neither a set of kernels nor families")
    found = {}
    for name in options.families:
        kernels = {"usual": usual, "recorded": recorded, "every": every, "extreme": extreme}[options.which](name)
        for key, used in kernels.items():
            print(json.dumps({key: used}), flush=True)
        found |= kernels
    if options.write:
        table = json.loads(RESOURCES.read_text()) | {triton.__version__: found}
        temporary = RESOURCES.with_suffix(".tmp")
        temporary.write_text(json.dumps(table, indent=1) + "\n")
        os.replace(temporary, RESOURCES)


if __name__ == "__main__":
    sys.exit(main())
