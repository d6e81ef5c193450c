"""Output of the studies: the machine, tables on the terminal and in Markdown, sections of pages, files of results."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from smile_kernels.ops import library
from smile_kernels.ops.excluded import device_name
from smile_kernels.publishing import write_plot, write_text
from smile_kernels.upscaling import ExpertVerdict

TableRows = tuple[str, list[str], list[list[str]]]  # title, columns, rows
Step = Callable[[str, int, int], None]  # (what, done, total)
Right = Mapping[str, Sequence[str]]  # {task: [one string of 0 and 1 a seed]}


@contextmanager
def progress() -> Iterator[Step]:
    """Progress on stderr by stage: a bar on a terminal, otherwise a line for each tenth."""
    columns = TextColumn("{task.description:<44}"), BarColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    bars: dict[str, TaskID] = {}
    tenths: dict[str, int] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as shown:

        def step(what: str, done: int, total: int) -> None:
            if not console.is_terminal and tenths.get(what) != (tenth := 10 * done // max(total, 1)):
                tenths[what] = tenth
                print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)
            if what not in bars:
                for bar in bars.values():
                    shown.update(bar, completed=1, total=1)
                bars[what] = shown.add_task(what)
            shown.update(bars[what], completed=done, total=total)

        yield step
        for bar in bars.values():
            shown.update(bar, completed=1, total=1)


def machine() -> dict:
    """The machine and versions of the results."""
    return {
        "processor": f"{device_name('cpu')} ({os.cpu_count()} logical cores)",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "backend": library.choose_backend(None, "cpu", torch.float32, 1, training=False),
    }


def check(verdicts: Sequence[ExpertVerdict]) -> str:
    """The worst verdict of `verify`: "exact" or "truncated".

    Raises:
        RuntimeError: a forced expert differs from the fine-tuned model by more than the truncation of its ranks.
    """
    worst = max(verdicts, key=lambda one: ("exact", "truncated", "off").index(one.verdict))
    if worst.verdict == "off":
        raise RuntimeError(f"the fused model is not what was fused: {worst}")
    return worst.verdict


def show(tables: Sequence[TableRows]) -> None:
    """Print tables."""
    console = Console(width=max(170, Console().width))  # folded tables are unreadable
    for title, columns, rows in tables:
        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if i else "left", no_wrap=not i)
        for row in rows:
            table.add_row(*row)
        console.print(table)


def row_scores(by_seed: Sequence[str]) -> list[float]:
    """Each row's share of seeds in which it was answered right."""
    return [statistics.fmean(map(int, column)) for column in zip(*by_seed)]


def stratified(scores: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Mean over tasks, in percent, and its standard error: rows are drawn within tasks, tasks and seeds are fixed."""
    means = [statistics.fmean(rows) for rows in scores]
    variance = sum(statistics.variance(rows) / len(rows) for rows in scores)
    return 100 * statistics.fmean(means), 100 * variance**0.5 / len(scores)


def difference(right: Right, reference: Right) -> tuple[float, float]:
    """Mean over tasks of the paired difference to `reference`, in percent, and its standard error."""
    pairs = ((row_scores(of), row_scores(reference[task])) for task, of in right.items())
    return stratified([[a - b for a, b in zip(own, other)] for own, other in pairs])


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; columns of numbers are aligned to the right."""
    numeric = (all(cell == "–" or cell.lstrip("+-")[0].isdigit() for cell in column) for column in zip(*rows))
    lines = [columns, ["---:" if is_numeric else "---" for is_numeric in numeric], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown(results: Mapping, seeds: int, tables: Sequence[TableRows]) -> str:
    """Tables as Markdown, below a line that names the seeds and the machine."""
    first = f"{seeds} seed{'s' * (seeds > 1)}; {_on(results['machine'])}."
    if "machine_of_smile" in results:
        first += f" Base, individual models, SMILE and routing again: {_on(results['machine_of_smile'])}."
    parts = [first]
    parts += [f"**{title}**\n\n{markdown_table(columns, rows)}" for title, columns, rows in tables]
    return "\n\n".join(parts) + "\n"


def _on(where: Mapping) -> str:
    threads = f"{where['threads']} thread{'s' * (where['threads'] > 1)}"
    return (
        f"{where['processor']}, {threads}, PyTorch {where['torch']}, transformers {where['transformers']}, "
        f"backend {where['backend']}"
    )


def fill(page: Path, sections: Mapping[str, str]) -> str:
    """The text of a Markdown page with new text between `<!-- NAME -->` and `<!-- /NAME -->`."""
    text = page.read_text(encoding="utf-8")
    for name, section in sections.items():
        before, opened, rest = text.partition(f"<!-- {name} -->\n")
        _, closed, after = rest.partition(f"<!-- /{name} -->")
        if not opened or not closed:
            raise ValueError(f"{page}: has no section between <!-- {name} --> and <!-- /{name} -->")
        text = before + opened + section + closed + after
    return text


def write(results: Mapping, json_path: Path | None, plot: Path | None, draw: Callable[[Mapping], Figure]) -> None:
    """Write the requested files of a study, each atomically."""
    for path in filter(None, (json_path, plot)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if json_path:
        write_text(json_path, json.dumps(results, indent=1) + "\n")
    if plot:
        write_plot(plot, draw(results), dpi=150)
