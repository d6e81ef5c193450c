"""Reports of an upscaling: the result for each layer, and changes that are not in the result."""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..publishing import write_report
from ..routing import CalibrationReport
from ..schema import check_arguments, parse
from ..storage import read_json
from ..svd import Certificate

__all__ = ["LayerReport", "LostChange", "LostFile", "LostSetting", "UpscaleReport"]

# Lost changes above this share of the base's tensor give a warning; and the number that is printed.
LARGE, SHOWN = 0.01, 10
NEW = "the base has no such tensor"


@dataclass(frozen=True)
class LayerReport:
    """Result for one linear layer.

    Attributes:
        name: the layer's name in the model.
        rank: r, the rank of its experts; 0 if the layer was skipped.
        energy: per expert, the share of ||W_i - W||_F^2 captured by its factors.
        error: per expert, ||W_i - W - U_i diag(s_i) V_i^T||_F / ||W_i - W||_F.
        seconds: time of its decomposition.
        skipped: why it was skipped, or None.
        untrained: the experts with the base's weight: their score is 0, so they get no tokens.
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
        """The report of a result of `svd.decompose_linear`; `skipped` if every weight equals the base's."""
        s = factors["s"]
        assert s is not None
        untrained = [i for i, c in enumerate(certificates) if c.directions == 0]
        skipped = None
        if len(untrained) == len(certificates) and factors["expert_bias"] is None:
            skipped = "every expert equals the base"
        elif len(untrained) == len(certificates) > 1:
            skipped = "experts differ in their biases only, so the router cannot distinguish them"
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
class LostChange:
    """A change by fine-tuning that is not in the result.

    Attributes:
        name: the tensor's name in the model.
        sizes: per expert, ||W_i - W'||_F / ||W||_F for the base's W and the result's W'; 1 if W is zero, of another
            shape, or missing on one side.
        reason: why it is not in the result.
    """

    name: str
    sizes: list[float]
    reason: str


@dataclass(frozen=True)
class LostSetting:
    """A setting that an expert's config has otherwise than the base's, by which the result is run.

    Attributes:
        name: its path in config.json, "rope_parameters.rope_theta".
        base: the base's value; "" where it has none.
        experts: each expert's value; the base's where the expert has no config of its own.
    """

    name: str
    base: str
    experts: list[str]

    def __str__(self) -> str:
        experts = ", ".join(one or "none" for one in self.experts)
        return f"{self.name}: {self.base or 'none'} in the base, {experts} in the experts"


@dataclass(frozen=True)
class LostFile:
    """A file next to the weights that experts have otherwise than the base, such as tokenizer.json, and the result.

    Attributes:
        name: its path in the folder; chat_template.jinja for a chat template in any file.
        experts: the numbers of these experts.
    """

    name: str
    experts: list[int]


@dataclass(frozen=True)
class UpscaleReport:
    """Results for every layer, and changes that are not in the result. `print` shows a summary; `save` writes JSON.

    Attributes:
        layers: the linear layers.
        lost: changes that are not in the result, the largest first.
        base, experts: the fused folders; empty for models in memory.
        expert_names: the experts' names; empty if they have none.
        router: how the experts are scored, as in `upscale`.
        settings: what the experts' configs have otherwise than the base's, as far as a forward pass may depend on it.
        files: files with a part in the experts' results, such as tokenizers, that are not those of the result.
    """

    layers: list[LayerReport]
    lost: list[LostChange] = field(default_factory=list)
    base: str = ""
    experts: Sequence[str] = ()
    calibration: CalibrationReport | None = None
    expert_names: Sequence[str] = ()
    router: str = "smile"
    settings: list[LostSetting] = field(default_factory=list)
    files: list[LostFile] = field(default_factory=list)

    @check_arguments
    def save(self, path: str | Path) -> None:
        """Write the report as JSON, atomically; of the files with content, only such a report is replaced."""
        write_report(path, asdict(self))

    @classmethod
    @check_arguments
    def load(cls, path: str | Path) -> "UpscaleReport":
        """Read a report written by `save`; raises ValueError, naming the file, if it is not one."""
        return parse(cls, read_json(Path(path)), str(path))

    def warn(self, remaining: str, remedy: str | None = None) -> None:
        """Warn of large changes that are not in the result; the message names the largest ones and the remedy.

        The default remedy names arguments of `upscale`.
        """
        large = [lost for lost in self.lost if max(lost.sizes) >= LARGE]
        if large:
            worst = ", ".join(f"{lost.name} ({max(lost.sizes):.2g} of the base's; {lost.reason})" for lost in large[:3])
            more = f" and {len(large) - 3} more" if len(large) > 3 else ""
            remedies = [remedy or "linear layers: change the patterns of `include` and `exclude`"]
            if remaining != "average" and remedy is None:
                remedies.append("other tensors: remaining='average' (--remaining average) uses the mean of the experts")
            if any(lost.reason == NEW for lost in large) and remedy is None:
                remedies.append("modules that the base lacks: add them to the base")
            warnings.warn(
                f"changes by fine-tuning are left out of the result: {worst}{more}. {'; '.join(remedies).capitalize()}",
                stacklevel=6,
            )
        # Fine-tuned models often name tokens, for padding and for the end of a text; no other output depends on these.
        if other := [str(one) for one in self.settings if not one.name.endswith(("_token_id", "id2label"))]:
            warnings.warn(
                f"the result has the base's config, from which those of the experts differ: {'; '.join(other[:3])}"
                f"{f' and {len(other) - 3} more' if len(other) > 3 else ''}. If one value fits all, set it in the base",
                stacklevel=6,
            )
        if files := [self._named(one) for one in self.files if one.name != "generation_config.json"]:
            warnings.warn(
                f"files of the experts are not in the result, and differ from those there: {'; '.join(files[:3])}"
                f"{f' and {len(files) - 3} more' if len(files) > 3 else ''}. Outputs with the result's files, such as "
                "its tokenizer, are not those of these experts",
                stacklevel=6,
            )

    def _named(self, file: LostFile) -> str:
        names = self.expert_names or [f"expert {i}" for i in range(1 + max(file.experts))]
        return f"{file.name} of {', '.join(names[i] for i in file.experts)}"

    def __str__(self) -> str:
        done = [layer for layer in self.layers if not layer.skipped]
        lines = [f"{len(done)} of {len(self.layers)} layers upscaled"]
        if done:
            worst = max(done, key=lambda layer: max(layer.error))
            lines[0] += f"; the largest error of a change is {max(worst.error):.4f}, in {worst.name}"
        if self.router != "smile":
            lines[0] += f"; router: {self.router}"
        reasons: dict[str, list[str]] = {}
        for layer in self.layers:
            if layer.skipped:
                reasons.setdefault(layer.skipped, []).append(layer.name)
        lines += [f"skipped: {_some(names)}: {reason}" for reason, names in reasons.items()]
        if self.lost:
            lines.append(f"{len(self.lost)} tensors that fine-tuning changed are not in the result, the largest first:")
            lines += [f"  {lost.name}: {_sizes(lost)}; {lost.reason}" for lost in self.lost[:SHOWN]]
            if len(self.lost) > SHOWN:
                lines.append(f"  and {len(self.lost) - SHOWN} more")
        lines += [f"setting of the experts that is not in the result: {setting}" for setting in self.settings[:SHOWN]]
        lines += [f"file that is not in the result: {self._named(file)}" for file in self.files[:SHOWN]]
        return "\n".join([*lines, *([str(self.calibration)] if self.calibration else [])])

    def table(self) -> str:
        """A table with one row per layer and per lost change."""
        from rich.console import Console
        from rich.table import Table

        plain: dict[str, Any] = {"box": None, "pad_edge": False}
        table = Table("layer", "rank", "energy", "largest error", "seconds", "note", **plain)
        for layer in self.layers:
            names = self.expert_names or range(len(layer.energy))
            note = layer.skipped or ", ".join(f"expert {names[i]} untrained" for i in layer.untrained)
            held = "" if layer.skipped else f"{min(layer.energy):.4f} to {max(layer.energy):.4f}"
            error = "" if layer.skipped else f"{max(layer.error):.4f}"
            table.add_row(layer.name, str(layer.rank or ""), held, error, f"{layer.seconds:.2f}", note)
        lost = Table("not in the result", "size of the change, by expert", "reason", **plain)
        for change in self.lost:
            lost.add_row(change.name, _sizes(change), change.reason)
        settings = Table("setting that is not in the result", "in the base", "by expert", **plain)
        for one in self.settings:
            settings.add_row(one.name, one.base, ", ".join(one.experts))
        files = Table("file that is not in the result", "experts", **plain)
        for file in self.files:
            files.add_row(file.name, self._named(file).removeprefix(f"{file.name} of "))
        console = Console(width=120, color_system=None)
        with console.capture() as text:
            console.print(table)
            if self.lost:
                console.print("", lost)
            if self.settings:
                console.print("", settings)
            if self.files:
                console.print("", files)
        return text.get().rstrip("\n") + (f"\n{self.calibration}" if self.calibration else "")


def kind_of(layer: str) -> str:
    """The kind of a layer, without its block number: model.layers.*.mlp.up_proj."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", layer)


def _sizes(lost: LostChange) -> str:
    return ", ".join(f"{size:.2g}" for size in lost.sizes)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
