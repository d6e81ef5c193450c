"""The layers of real models by name, the settings people use, and the least work a layer has to do."""

from dataclasses import asdict, astuple, dataclass

import torch
from torch import Tensor

from ..errors import SmileError
from ..ops import reference
from ..testing import Problem

# Name -> (in_features, out_features, bias).
LAYERS = {
    "clip-b32.attn": (768, 768, True),
    "clip-b32.fc1": (768, 3072, True),
    "clip-b32.fc2": (3072, 768, True),
    "clip-l14.attn": (1024, 1024, True),
    "clip-l14.fc1": (1024, 4096, True),
    "clip-l14.fc2": (4096, 1024, True),
    "flan-t5-base.attn": (768, 768, False),
    "flan-t5-base.wi": (768, 2048, False),
    "flan-t5-base.wo": (2048, 768, False),
    "mistral-7b.q": (4096, 4096, False),
    "mistral-7b.k": (4096, 1024, False),
    "mistral-7b.up": (4096, 14336, False),
    "mistral-7b.down": (14336, 4096, False),
    # One of eight tensor-parallel shards.
    "llama-3-70b-tp8.q": (8192, 1024, False),
    "llama-3-70b-tp8.k": (8192, 128, False),
    "llama-3-70b-tp8.o": (1024, 8192, False),
    "llama-3-70b-tp8.up": (8192, 3584, False),
    "llama-3-70b-tp8.down": (3584, 8192, False),
    "qwen2.5-7b.q": (3584, 3584, True),
    "qwen2.5-7b.k": (3584, 512, True),
    "qwen2.5-7b.up": (3584, 18944, False),
    "qwen2.5-7b.down": (18944, 3584, False),
}


@dataclass(frozen=True)
class Work:
    """Bytes that are moved, and FLOPs, two for a multiplication and its addition."""

    bytes: int
    flops: int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flops + other.flops)

    def floor(self, bandwidth: float, rate: float) -> float:
        """The least seconds at `bandwidth` bytes and `rate` FLOPs a second."""
        return max(self.bytes / bandwidth, self.flops / rate)


def product(rows: int, depth: int, columns: int) -> int:
    """FLOPs of [rows, depth] x [depth, columns]."""
    return 2 * rows * depth * columns


@dataclass(frozen=True)
class Setting:
    """N experts of rank r with a router of rank g, m of them per token."""

    num_local_experts: int
    rank_of_expert: int
    rank_of_router: int
    num_experts_per_tok: int = 1

    def __str__(self) -> str:
        return f"N{self.num_local_experts} r{self.rank_of_expert} g{self.rank_of_router} top-{self.num_experts_per_tok}"


# What the SMILE paper and fusion_bench's configurations use, by family of models.
PUBLISHED = {
    "clip": [Setting(8, r, 16) for r in (32, 128)],
    "flan-t5": [Setting(8, r, g) for r in (16, 32, 64, 128) for g in (4, 8, 16, 32)],
    "mistral": [Setting(3, r, 8) for r in (8, 16, 32, 64, 128, 256, 512)],
}


@dataclass(frozen=True)
class Case:
    """One SMILE layer and a batch: what a row of a benchmark is about."""

    layer: str
    setting: Setting
    tokens: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int, bool]:
        """(in_features, out_features, bias)."""
        return layer_shape(self.layer)

    def problem(self, device: str) -> Problem:
        """Random tensors of this case, whose inputs no rounding of the case's dtype routes to other experts."""
        in_features, out_features, bias = self.shape
        problem = Problem.random(
            self.tokens + self.tokens // 2 + 64,
            in_features,
            out_features,
            **asdict(self.setting),
            bias=bias,
            expert_bias=bias,
            dtype=self.dtype,
            device=device,
        )
        problem.x = _clearly_routed(problem)[: self.tokens].contiguous()
        return problem

    def dense(self, backward: bool = False) -> Work:
        """F.linear: x, W and b are read, y is written; with `backward` again, dy too, and their gradients written."""
        d, o, bias = self.shape
        t, size = self.tokens, self.dtype.itemsize
        forward = Work(size * (t * d + o * d + bias * o + t * o), product(t, d, o))
        return Work(3 * forward.bytes - size * t * o, 3 * forward.flops) if backward else forward

    def work(self, experts: int | None = None, backward: bool = False) -> Work:
        """The minimum for every implementation, if the tokens together choose `experts` of the experts.

        Every operand is moved once: x, y, W, b, the router's rows, and of each chosen expert the rows of vh that are
        not the router's, s, u and its bias. Forward and backward read the operands and dy again and write a gradient of
        each operand; dW and dx cost a product each. By default as many experts as chosen at random are present.
        """
        (d, o, bias), setting, t, size = self.shape, self.setting, self.tokens, self.dtype.itemsize
        n, r, g, m = astuple(setting)
        experts = round(self.present()) if experts is None else experts
        own = max(r - g, 0)
        moved = self.dense().bytes + size * (n * g * d + experts * (own * d + r * o + bias * o)) + 4 * experts * r
        flops = self.dense().flops + product(t, d, n * g) + product(t * m, own, d) + product(t * m, r, o)
        if not backward:
            return Work(moved, flops)
        return Work(3 * moved - size * t * o, flops + 2 * self.dense().flops + 2 * product(t * m, r, d + o))

    def present(self, tokens: int | None = None) -> float:
        """Experts that at least one of `tokens` (by default all) chooses, if all are equally likely."""
        n, m = self.setting.num_local_experts, self.setting.num_experts_per_tok
        return n * (1 - (1 - m / n) ** (self.tokens if tokens is None else tokens))


def layer_shape(layer: str) -> tuple[int, int, bool]:
    """(in_features, out_features, bias) of a named layer, or of "<in_features>x<out_features>", which has a bias.

    Raises:
        ValueError: neither a name in LAYERS nor two positive integers.
    """
    if layer in LAYERS:
        return LAYERS[layer]
    sizes = layer.split("x")
    if len(sizes) == 2 and all(size.isdecimal() and int(size) > 0 for size in sizes):
        return int(sizes[0]), int(sizes[1]), True
    raise SmileError(f"layer: is {layer!r}; expected <in_features>x<out_features>, or one of {', '.join(LAYERS)}")


def _clearly_routed(problem: Problem) -> Tensor:
    """The tokens of x whose last selected score is over 1% above the next.

    Closer than that, implementations that route in low precision choose another expert, and would be refused.
    """
    scores = reference.scores(problem.x, problem.rows()).sort(dim=-1, descending=True).values
    m = problem.num_experts_per_tok
    if m == scores.shape[1]:
        return problem.x
    return problem.x[scores[:, m - 1] - scores[:, m] > 0.01 * scores[:, 0]]
