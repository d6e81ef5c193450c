"""`python -m studies.language_model [--quick] ...`, as `make demo-llm` runs it."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Three tasks, fewer rows.")] = False,
    seeds: Annotated[int, typer.Option(help="How many times each task is fine-tuned.")] = 1,
    rows: Annotated[int, typer.Option(help="Test rows per task; half as many for secondary methods.")] = 50,
    cache: Annotated[Path | None, typer.Option(help="Folder for packages, fine-tunes and answers.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the fused model; default: in the cache.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the results there.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the results there: .png, .svg or .pdf.")] = None,
) -> None:
    """Fine-tune a small language model on six tasks, fuse the adapters by each method, and compare the answers."""
    from .run import Size, study
    from .tasks import QUICK, TASKS

    size = Size(seeds, rows)
    try:
        if quick:
            study(replace(size, rows=20, full=False), QUICK, cache, out, json_path, plot)
        else:
            study(size, TASKS, cache, out, json_path, plot)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    typer.run(main)
