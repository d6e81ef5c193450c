"""`python -m studies.language_model [--quick] ...`, as `make demo-llm` runs it."""

from pathlib import Path
from typing import Annotated

import typer


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Three tasks.")] = False,
    whole: Annotated[bool, typer.Option("--whole", help="Also variants of the routing, and full fine-tunes.")] = False,
    seeds: Annotated[int, typer.Option(help="How many times each task is fine-tuned.")] = 1,
    rows: Annotated[int, typer.Option(help="Test rows per task; at most 25 for the variants of the routing.")] = 20,
    cache: Annotated[Path | None, typer.Option(help="Folder for packages, fine-tunes and answers.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the fused model; default: in the cache.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the results there.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the results there: .png, .svg or .pdf.")] = None,
) -> None:
    """Fine-tune a small language model on six tasks, fuse the adapters by each method, and compare the answers."""
    from .run import Size, study
    from .tasks import QUICK, TASKS

    size = Size(seeds, rows, few_rows=min(25, rows), conversations=60, full=True) if whole else Size(seeds, rows)
    try:
        study(size, QUICK if quick else TASKS, cache, out, json_path, plot)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    typer.run(main)
