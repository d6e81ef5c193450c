"""`python -m studies.published {clip,flan-t5,mistral} FOLDER ...`."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from smile_kernels.publishing import check_outputs, write_text

from .. import report
from . import clip, flan_t5, mistral

app = typer.Typer(add_completion=False, rich_markup_mode=None)


def command(name: str, module: ModuleType) -> Callable[..., None]:
    """The command that runs `module.study` and writes its results; its help is the module's docstring."""

    @app.command(name, help=module.__doc__.replace("\n\n", "\n\n\b\n"))
    def run(
        folder: Annotated[Path, typer.Argument(help="Folder with the models and the data.")],
        device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
        json_path: Annotated[Path | None, typer.Option("--json", help="Write the results there.")] = None,
    ) -> None:
        try:
            check_outputs([folder], json=json_path)
            with report.progress() as step:
                results, tables, paper = module.study(folder, device, step)
        except (ValueError, OSError, ImportError) as error:
            raise SystemExit(f"error: {error}") from None
        if json_path:
            write_text(json_path, json.dumps({"machine": report.machine(), **results}, indent=1) + "\n")
        report.show(tables)
        print(f"The authors' numbers: {paper.source}." if paper else "No numbers of the authors for this architecture.")

    return run


for _name, _module in {"clip": clip, "flan-t5": flan_t5, "mistral": mistral}.items():
    command(_name, _module)

if __name__ == "__main__":
    app()
