"""What the commands write to a terminal: consoles, progress, and errors in one line."""

import contextlib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .errors import SmileError

# Arguments of the functions that commands call, and the options that set them where those have other names.
OPTIONS = {
    "expert_names": "expert",
    "experts": "expert",
    "finetuned": "expert",
    "layer": "shape",
    "max_shard_size": "out_shard_size",
}


class Commands(typer.core.TyperGroup):
    """The commands; standard output that cannot be written ends any of them, and its help, with one line."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except OSError as error:
            if not is_of_output(error):
                raise
            say(f"error: standard output: cannot be written ({error.strerror}); expected a file or pipe with space")
            with contextlib.suppress(OSError):  # else Python tries again when it ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)


@contextmanager
def user_errors() -> Iterator[None]:
    """Print a user error in one line on stderr and exit with status 1; a bug keeps its traceback."""
    try:
        yield
        sys.stdout.flush()
    except (SmileError, OSError, ImportError) as error:
        if is_of_output(error):
            raise  # to Commands
        say(f"error: {in_options(' '.join(str(error).split()))}")
        raise typer.Exit(1) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error)):
            say(f"error: out of memory: {' '.join(str(error).split())}")
            raise typer.Exit(1) from None
        if str(error) == "can't start new thread":
            say("error: no further thread can be started; expected a higher limit of the user's or container's threads")
            raise typer.Exit(1) from None
        if re.match(r"backend: '\w+' cannot run here", str(error)):
            say(f"error: {' '.join(str(error).split())}; expected another SMILE_KERNELS_BACKEND, or none")
            raise typer.Exit(1) from None
        say("this is a bug: please report it with the file that `smile-kernels doctor --verify` writes")
        raise


def in_options(message: str) -> str:
    """A function's message about an argument in the words of the command line, where None is an option not given."""
    message = re.sub(
        r"^\w+(?=\[|:)|\bexperts(?=\[\d+\])", lambda argument: OPTIONS.get(argument[0], argument[0]), message
    )
    message = re.sub(r"\bis None(?= with |;)", "is not given", message)
    return re.sub(r"\bexpected None( or)?\b", lambda none: "expected" if none[1] else "expected it not given", message)


def is_of_output(error: Exception) -> bool:
    """Whether standard output could not be written: `publishing` names the file in each error of another one."""
    codes = errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO
    return isinstance(error, OSError) and error.filename is None and error.errno in codes


def say(text: str) -> None:
    """One line on stderr, if that can be written."""
    with contextlib.suppress(OSError):
        Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


def new_console(stderr: bool = False) -> Console:
    """A console as wide as the terminal; without one, wide enough that no line wraps. NO_COLOR disables all styles."""
    style: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
    console = Console(stderr=stderr, color_system=style)
    if console.width and (console.is_terminal or "COLUMNS" in os.environ):
        return console
    return Console(stderr=stderr, color_system=style, width=240)


@contextmanager
def progress(shown: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """Shows progress by stage: finished parts and their total; bars on a terminal, otherwise plain lines."""
    console = new_console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not (shown and console.is_terminal)
    ) as display:
        bars: dict[str, TaskID] = {}
        tenths: dict[str, int] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if console.is_terminal:
                bar = bars[stage] if stage in bars else bars.setdefault(stage, display.add_task(stage, total=total))
                display.update(bar, completed=done)
            elif shown and tenths.get(stage) != (tenth := 10 * done // max(total, 1)):
                tenths[stage] = tenth
                say(f"{stage}: {done} of {total}")

        yield advance
