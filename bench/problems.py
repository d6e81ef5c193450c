"""The layers, settings and numbers of tokens of the committed results."""

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
        """A name that is unique for each run of a plan."""
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


def plan(device: str) -> dict[str, Callable[[], Record]]:
    """Name -> the function that measures it."""
    return {run.name: lambda run=run: run(device) for run in cpu()}
