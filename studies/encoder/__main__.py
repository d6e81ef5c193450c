"""`python -m studies.encoder [--quick] ...`, as `make demo` runs it."""

from pathlib import Path
from typing import Annotated

import typer


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Four tasks, fewer texts and settings.")] = False,
    seeds: Annotated[int, typer.Option(help="How many times each task is fine-tuned.")] = 1,
    tasks: Annotated[int, typer.Option(help="6, or 8 for the hard case.")] = 6,
    cache: Annotated[Path | None, typer.Option(help="Folder for packages and fine-tuned models.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the results there.")] = None,
    keep_merged: Annotated[
        bool, typer.Option("--keep-merged", help="Keep what --json has of merged models and times; test the rest.")
    ] = False,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Instead, accuracy over ranks, m and the number of experts.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the results there: .png, .svg or .pdf.")] = None,
) -> None:
    """Fine-tune a small encoder on real tasks, merge the results by each method, and compare them."""
    from .run import study
    from .sweeps import study as of_sweeps

    try:
        options = {"quick": quick, "seeds": seeds, "tasks": tasks, "cache": cache, "json_path": json_path, "plot": plot}
        if sweep:
            of_sweeps(**options)
        else:
            study(**options, keep_merged=keep_merged)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from None


typer.run(main)
