"""`python -m studies.pages`: writes the sections of the documentation that are generated from the committed results."""

from __future__ import annotations

import json
from pathlib import Path

from smile_kernels.publishing import write_text

from .encoder import report as encoder
from .language_model import report as language_model
from .report import fill

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "studies" / "results"


def sections() -> dict[Path, dict[str, str]]:
    """{page: {section: its text}}."""

    def read(name: str) -> dict:
        return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))

    docs, easy, hard, language = ROOT / "docs", read("encoder"), read("encoder_hard"), read("language_model")
    return {
        docs / "demo.md": {"easy": encoder.markdown(easy), "hard": encoder.markdown(hard)},
        docs / "log.md": {"easy": encoder.markdown(easy, details=True), "hard": encoder.markdown(hard, details=True)},
        docs / "language_model.md": {"results": language_model.markdown(language)},
        ROOT / "README.md": {"language model": language_model.headline(language)},
    }


if __name__ == "__main__":
    for page, texts in sections().items():
        write_text(page, fill(page, texts))
        print(page.relative_to(ROOT))
