"""`python -m studies.pages`: writes the sections of the documentation that are generated from the committed results."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from smile_kernels.publishing import write_text

from .encoder import report as encoder
from .encoder import sweeps_report
from .language_model import report as language_model
from .report import fill, markdown_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "studies" / "results"


# What the two studies call a row of the summary: (the encoder's, the language model's).
SUMMARY = {
    "simple averaging": ("simple averaging", "simple averaging"),
    "task arithmetic": ("task arithmetic", "task arithmetic"),
    "TIES": ("TIES", "ties"),
    "TSV-Merge": ("TSV-Merge", "tsv-merge"),
    "Iso-C": ("Iso-C", "iso-c"),
    "Fisher merging": ("Fisher merging", "fisher"),
    "RegMean": ("RegMean", "regmean"),
    "AdaMerging, by layer": ("AdaMerging, by layer", "adamerging, by layer"),
    "WEMoE": ("WEMoE", "wemoe"),
    "SMILE, published routing": ("SMILE (g 16, r 32)", "published"),
    "SMILE, recommended routing": ("SMILE (g 16, r 32), window + layers", "recommended"),
    "SMILE, sequence + layers": ("SMILE (g 16, r 32), sequence + layers", "sequence + layers, calibrated, restarts"),
    "SMILE, oracle routing": ("SMILE (g 16, r 32), oracle routing", "oracle"),
}


def summary(easy: dict, hard: dict, language: dict, small: dict) -> str:
    """Accuracy of every method as a share of the individual models', in both studies.

    A method that only the `small` run of the language model has tested is marked.
    """

    def of_encoder(results: dict, name: str) -> tuple[str, str]:
        rows = {row["name"]: row for row in results["rows"]}
        if name not in rows:
            return "–", "–"
        mean, individual = (statistics.fmean(encoder.averages(rows[row])) for row in (name, "individual"))
        return f"{100 * mean / individual:.1f}", f"{rows[name]['parameters']:.2f}×"

    def of_language(name: str) -> tuple[str, str, str]:
        row = language["methods"].get(name) or small["methods"][name]
        turns = row.get("two_turns")
        return (
            f"{row['of_individual']:.1f}{'' if name in language['methods'] else ' †'}",
            f"{turns['of_individual']:.1f}" if turns else "–",
            f"{row['parameters']:.2f}×",
        )

    columns = ["% of the individual models", "encoder, six tasks", "parameters", "encoder, eight tasks", "parameters"]
    columns += ["language model", "second turn", "parameters"]
    rows = [[shown, *of_encoder(easy, e), *of_encoder(hard, e), *of_language(l)] for shown, (e, l) in SUMMARY.items()]
    return markdown_table(columns, [row for row in rows if row.count("–") < len(row) - 1]) + "\n"


def walk(results: dict) -> str:
    """The time of each step from a clone to a served answer, as `time` gave it."""
    machine = results["machine"]
    rows = [
        [step["step"], f"{step['wall_s'] / 60:.1f}", "–" if step["cpu_s"] is None else f"{step['cpu_s'] / 60:.1f}"]
        for step in results["steps"]
    ]
    table = markdown_table(["step", "minutes", "of CPU time"], rows)
    return (
        f"{machine['processor']}, commit {machine['commit']}, {machine['measured']}; other work on the machine: "
        f"{machine['other work']}.\n\n{table}\n"
    )


def sections() -> dict[Path, dict[str, str]]:
    """{page: {section: its text}}."""

    def read(name: str) -> dict:
        return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))

    docs, easy, hard = ROOT / "docs", read("encoder"), read("encoder_hard")
    language, small = read("language_model"), read("language_model_small")
    return {
        docs / "demo.md": {
            "easy": encoder.markdown(easy),
            "hard": encoder.markdown(hard),
            "sweep": sweeps_report.markdown(read("encoder_sweep")),
        },
        docs / "log.md": {"easy": encoder.markdown(easy, details=True), "hard": encoder.markdown(hard, details=True)},
        docs / "language_model.md": {
            "results": language_model.markdown(language),
            "small": language_model.markdown(
                small, "Right answers (exact match), %", "Right answers in the second turn of a conversation, %"
            ),
        },
        docs / "language_models.md": {"walk": walk(read("walk"))},
        docs / "study.md": {"summary": summary(easy, hard, language, small)},
        ROOT / "README.md": {"language model": language_model.headline(language)},
    }


if __name__ == "__main__":
    for page, texts in sections().items():
        write_text(page, fill(page, texts))
        print(page.relative_to(ROOT))
