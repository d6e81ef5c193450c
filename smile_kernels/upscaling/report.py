"""What an upscaling reports of each layer."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from ..publishing import write_text
from ..routing import CalibrationReport
from ..storage import read_json
from ..svd import Certificate

__all__ = ["LayerReport", "UpscaleReport"]


@dataclass(frozen=True)
class LayerReport:
    """What became of one linear layer.

    Attributes:
        name: the layer's name in the model.
        rank: r, the rank of its experts; 0 where it was left alone.
        energy: per expert, the share of ||W_i - W||_F^2 that its factors hold.
        error: per expert, ||W_i - W - U_i diag(s_i) V_i^T||_F / ||W_i - W||_F.
        seconds: the time its decomposition took.
        skipped: why it was left alone, or None.
        untrained: the experts whose weight equals the shared one: their score is 0, so they take no tokens.
    """

    name: str
    rank: int
    energy: list[float]
    error: list[float]
    seconds: float
    skipped: str | None = None
    untrained: Sequence[int] = ()

    @classmethod
    def of(
        cls, name: str, factors: Mapping[str, Tensor | None], certificates: Sequence[Certificate], seconds: float
    ) -> "LayerReport":
        """The report of what `svd.decompose_linear` returned; `skipped` where every weight equals the base's."""
        s = factors["s"]
        assert s is not None
        untrained = [i for i, c in enumerate(certificates) if c.directions == 0]
        skipped = None
        if len(untrained) == len(certificates) and factors["expert_bias"] is None:
            skipped = "every expert equals the base"
        elif len(untrained) == len(certificates) > 1:
            skipped = "experts differ in their biases only, by which no token can be routed"
        return cls(
            name,
            0 if skipped else s.shape[1],
            [c.energy for c in certificates],
            [c.error for c in certificates],
            seconds,
            skipped,
            untrained,
        )


@dataclass(frozen=True)
class UpscaleReport:
    """The report of every layer; printed as a table, saved as JSON."""

    layers: list[LayerReport]
    calibration: CalibrationReport | None = None

    def save(self, path: str | Path) -> None:
        """Write the report as JSON; the file appears whole or not at all."""
        write_text(Path(path), json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "UpscaleReport":
        """The report that `save` wrote."""
        stored = read_json(Path(path))
        calibration = stored.get("calibration")
        return cls(
            [LayerReport(**layer) for layer in stored["layers"]],
            calibration and CalibrationReport.from_dict(calibration),
        )

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        done = [layer for layer in self.layers if not layer.skipped]
        table = Table("layer", "rank", "energy held", "largest error", "seconds", "note")
        for layer in self.layers:
            note = layer.skipped or ", ".join(f"expert {i} untrained" for i in layer.untrained)
            held = "" if layer.skipped else f"{min(layer.energy):.4f} to {max(layer.energy):.4f}"
            error = "" if layer.skipped else f"{max(layer.error):.4f}"
            table.add_row(layer.name, str(layer.rank or ""), held, error, f"{layer.seconds:.2f}", note)
        table.caption = f"{len(done)} of {len(self.layers)} layers upscaled"
        console = Console(width=120)
        with console.capture() as text:
            console.print(table)
        return text.get().rstrip("\n") + (f"\n{self.calibration}" if self.calibration else "")
