"""Results of `bench.gpu` as tables, and aims that are met or missed: plain functions of its records."""

import statistics
from collections.abc import Iterable, Sequence

import torch

from smile_kernels.benchmark.measure import Record
from smile_kernels.benchmark.peers import BASELINE
from smile_kernels.benchmark.problems import Case, Setting

# The peers that loop over the experts like fusion_bench's layer, the original first.
LOOPS = ("fusion_bench", "expert loop")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with its first column aligned to the left."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def case_of(record: Record) -> Case:
    return Case(record["layer"], Setting(**record["setting"]), record["tokens"], torch.bfloat16)


def over_linear(record: Record) -> dict[str, float]:
    """Name -> the median of the time relative to F.linear in the same round."""
    dense = record["us"][BASELINE]
    return {
        name: statistics.median(a / b for a, b in zip(us, dense))
        for name, us in record["us"].items()
        if name != BASELINE
    }


def floor_ratio(record: Record, limits: Sequence[Record]) -> float | None:
    """The layer's minimum time relative to the dense layer's, at the measured memory bandwidth and matmul rate.

    None if these limits were not measured.
    """
    if not limits:
        return None
    case, trained = case_of(record), record["mode"] == "training"
    rates = limits[0]["bandwidth"][-1][1], limits[0]["matmul"]["bfloat16"]
    return case.work(backward=trained).floor(*rates) / case.dense(trained).floor(*rates)


def _timed(part: Record, *modes: str) -> list[Record]:
    """The records of these modes in which the layer was timed; none of a rehearsal."""
    if part["machine"].get("rehearsal"):
        return []
    found = [record for record in part["records"] if record.get("mode") in modes and "us" in record]
    return [record for record in found if BASELINE in record["us"]]


def _merged(part: Record, mode: str) -> list[tuple[Record, dict[str, float]]]:
    """Each case with the ratios of all its records: some paths are measured in separate rows."""
    found: dict[tuple[str, str, int], tuple[Record, dict[str, float]]] = {}
    for record in _timed(part, mode):
        key = record["layer"], str(Setting(**record["setting"])), record["tokens"]
        found.setdefault(key, (record, {}))[1].update(over_linear(record))
    return [found[key] for key in sorted(found)]


def _cell(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}"


def forward(part: Record, mode: str) -> str:
    """Time relative to F.linear of the layer's own choice and of every path; a row per layer, setting and tokens."""
    merged = _merged(part, mode)
    if not merged:
        return ""
    names = list(dict.fromkeys(name for _, ratios in merged for name in ratios))
    names = sorted(names, key=lambda name: name != "chosen")
    rows = []
    for record, ratios in merged:
        about = [f"{record['layer']}, {Setting(**record['setting'])}", str(record["tokens"])]
        dense = f"{statistics.median(record['us'][BASELINE]):.1f}"
        cells = [_cell(ratios.get(name)) for name in names]
        rows.append([*about, dense, _cell(floor_ratio(record, part["limits"])), *cells])
    return markdown(["layer", "tokens", "F.linear µs", "floor", *names], rows)


def headline(part: Record) -> str:
    """The layer's own choice relative to F.linear (the floor): a row per layer and mode, columns by tokens."""
    records = _timed(part, "graph", "eager", "training")
    if not records:
        return ""
    usual = [record for record in records if record["setting"] == records[0]["setting"]]
    tokens = sorted({record["tokens"] for record in usual})
    lines: dict[tuple[str, str], dict[int, str]] = {}
    for record in usual:
        ratios = over_linear(record)
        if "chosen" in ratios:
            cell = f"{ratios['chosen']:.2f} ({_cell(floor_ratio(record, part['limits']))})"
            lines.setdefault((record["layer"], record["mode"]), {})[record["tokens"]] = cell
    words = {"graph": "forward, CUDA graph", "eager": "forward, eager", "training": "forward + backward, CUDA graph"}
    rows = [[f"{layer}, {words[mode]}", *(of.get(t, "") for t in tokens)] for (layer, mode), of in lines.items()]
    return markdown([f"{Setting(**usual[0]['setting'])}, bfloat16", *(f"T {t}" for t in tokens)], rows)


def faster_paths(part: Record) -> str:
    """Rows in which a path was more than 3% faster than the layer's own choice: a line each."""
    lines = []
    for record, ratios in _merged(part, "graph"):
        chosen = ratios.pop("chosen", None)
        best = min(ratios, key=lambda name: ratios[name], default=None)
        if chosen is not None and best is not None and ratios[best] < 0.97 * chosen:
            lines.append(f"{record['name']}: chosen {chosen:.2f}, {best} {ratios[best]:.2f}")
    return "\n".join(lines)


def kernels(part: Record) -> str:
    """Each kernel of each path separately, in µs, in the order of launches."""
    rows = []
    for record in part["records"]:
        for path, launched in record.get("kernels", {}).items():
            times = ", ".join(f"{name} {us:.1f}" for name, us in launched)
            rows.append(
                [f"{record['layer']}, T {record['tokens']}", path, f"{sum(us for _, us in launched):.1f}", times]
            )
    return markdown(["layer", "path", "sum µs", "kernels"], rows) if rows else ""


def failures(part: Record) -> str:
    """Failures: paths that differ from the reference, rows, tests. One line each."""
    lines = [f"{c['name']}: {c['failure']}" for c in part["checks"] if c["failure"]]
    for record in part["records"]:
        if record.get("failure"):
            lines.append(f"row {record['name']}: {record['failure']}")
        lines += [f"row {record['name']}: {name} {reason}" for name, reason in record.get("wrong", {}).items()]
    lines += [f"test {t['test']}: {t['message']}" for t in part["tests"]["failed"]]
    lines += [f"stage {name}: {reason}" for name, reason in part["stages"].items() if reason]
    return "\n".join(f"- {' '.join(line.split())[:300]}" for line in lines) or "Nothing."


def summary(part: Record) -> str:
    """The number of paths and tests that agreed with the reference."""
    checks, tests = part["checks"], part["tests"]
    agreed = sum(check["failure"] is None for check in checks)
    soaked = sum(record.get("agreed", 0) for record in part["records"])
    return (
        f"{agreed} of {len(checks)} checks of paths agree with the float64 reference, and {soaked} random layers; "
        f"tests: {tests['passed']} passed, {len(tests['failed'])} failed, {tests['skipped']} skipped."
    )


def aims(part: Record) -> list[str]:
    """A line for each row with an aim: the measured ratio to F.linear, and its limit.

    Decode in graphs, N8 r32 g16 top-1 and D >= 4096: 1.10 times the floor's ratio. Prefill from 2048 tokens: 1.08.
    Forward and backward: 1.15. A loop over the experts takes 20 times as long up to 64 tokens, 1.5 at 2048.
    """
    lines = []
    for record in _timed(part, "graph", "eager", "training"):
        case, mode, ratios = case_of(record), record["mode"], over_linear(record)
        if "chosen" not in ratios:
            continue
        usual = case.setting == Setting(8, 32, 16) and case.shape[0] >= 4096
        slack = None
        if mode == "training":
            slack = 1.15
        elif mode == "graph" and (case.tokens >= 2048 or (case.tokens <= 64 and usual)):
            slack = 1.08 if case.tokens >= 2048 else 1.10
        floor = floor_ratio(record, part["limits"])
        if slack is not None and floor is not None:
            most = slack * floor
            met = "met" if ratios["chosen"] <= most else "MISSED"
            lines.append(f"{met}: {record['name']}: {ratios['chosen']:.2f}, at most {most:.2f}")
        loop = next((name for name in LOOPS if name in ratios), None)
        if loop is not None:
            times, least = ratios[loop] / ratios["chosen"], 1.5 if case.tokens == 2048 else 20
            met = "met" if times >= least else "MISSED"
            lines.append(f"{met}: {record['name']}: {times:.1f} times as fast as {loop}, at least {least}")
    return lines
