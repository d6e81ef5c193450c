"""The layers, settings and numbers of tokens that the committed results are measured on."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from smile_kernels.benchmark.measure import Record, measure
from smile_kernels.benchmark.peers import PEERS
from smile_kernels.benchmark.problems import PUBLISHED, Case, Setting

# The CPU tables are geometric means over these.
CPU_SETTINGS = (Setting(8, 32, 16), Setting(8, 32, 16, 2), Setting(8, 128, 16), Setting(3, 64, 8))
CPU_PEERS = ("smile:cpu", "smile:torch", "fusion_bench", "plain")


@dataclass(frozen=True)
class Run:
    """One call of `measure`, at a number of host threads (None: as torch chooses)."""

    case: Case
    peers: tuple[str, ...]
    threads: int | None = None
    backward: bool = False
    graph: bool = False
    seconds: float = 0.5

    @property
    def name(self) -> str:
        """What no two runs of a plan share."""
        case = self.case
        passes = "forward+backward" if self.backward else "forward"
        name = f"{case.layer} {case.setting} T{case.tokens} {str(case.dtype).removeprefix('torch.')} {passes}"
        name += " graph" if self.graph else ""
        name += f" {self.threads} threads" if self.threads else ""
        return name + (" all peers" if len(self.peers) == len(PEERS) else "")

    def __call__(self, device: str) -> Record:
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return measure(
            self.case,
            self.peers,
            device=device,
            backward=self.backward,
            graph=self.graph,
            seconds=self.seconds,
        )


def cpu() -> list[Run]:
    """CLIP-B's and Mistral's layers from one token to a long prompt; every peer on one layer; training."""
    float32, bfloat16, everyone = torch.float32, torch.bfloat16, tuple(PEERS)
    runs = [
        Run(Case(layer, setting, t, dtype), CPU_PEERS, threads)
        for layer, tokens in (
            ("clip-b32.attn", (1, 4, 8, 64, 2048)),
            ("mistral-7b.q", (1, 8)),
            ("mistral-7b.up", (512,)),
        )
        for t in tokens
        for threads in (1, 2)
        for dtype in (float32, bfloat16)
        for setting in CPU_SETTINGS
    ]
    runs += [
        Run(Case("clip-b32.attn", setting, t, dtype), CPU_PEERS, threads, backward=True)
        for t in (64, 2048)
        for threads in (1, 2)
        for dtype in (float32, bfloat16)
        for setting in CPU_SETTINGS[:2]
    ]
    runs += [Run(Case("clip-b32.attn", PUBLISHED["clip"][0], t, float32), everyone, 2) for t in (1, 64, 2048)]
    return runs


def cuda() -> list[Run]:
    """Every named family in the settings people use, decode to prefill, eager and as CUDA graphs; training."""
    dtype, everyone = torch.bfloat16, tuple(PEERS)
    # Compilation takes longer than all else: on one layer only.
    uncompiled = tuple(name for name in PEERS if name != "torch.compile")
    usual, two = Setting(8, 32, 16), Setting(8, 32, 16, 2)
    layers = (
        *("mistral-7b.q", "mistral-7b.k", "mistral-7b.up", "mistral-7b.down"),
        *("llama-3-70b-tp8.q", "llama-3-70b-tp8.up", "llama-3-70b-tp8.down", "qwen2.5-7b.q", "qwen2.5-7b.up"),
    )
    forward = [
        *((layer, s) for layer in ("clip-b32.attn", "clip-b32.fc1", "clip-l14.fc2") for s in PUBLISHED["clip"]),
        *((layer, Setting(8, 32, 8)) for layer in ("flan-t5-base.attn", "flan-t5-base.wo")),
        *(("mistral-7b.q", setting) for setting in (*PUBLISHED["mistral"], two)),
        *((layer, usual) for layer in layers),
    ]
    runs = [
        Run(Case(layer, setting, t, dtype), uncompiled, graph=graph, seconds=0.1)
        for layer, setting in forward
        for t in (1, 16, 64, 512, 4096)
        for graph in (False, True)
    ]
    runs += [
        Run(Case(layer, setting, 4096, dtype), uncompiled, backward=True, seconds=0.1)
        for layer, setting in (("clip-b32.attn", usual), ("mistral-7b.q", usual), ("mistral-7b.q", two))
    ]
    runs += [Run(Case("mistral-7b.q", usual, t, dtype), everyone, seconds=0.1) for t in (1, 64, 4096)]
    return runs


def plan(device: str) -> dict[str, Callable[[], Record]]:
    """Name -> what measures it."""
    runs = cpu() if device == "cpu" else cuda()
    return {run.name: lambda run=run: run(device) for run in runs}
