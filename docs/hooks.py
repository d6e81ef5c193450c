"""The site is made of the repository's pages at their own paths, so that one link serves the site and a checkout."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = (
    "*.md",
    "bench/*.md",
    "docs/*.md",
    "docs/*.png",
    "docs/*.css",
    "bench/results/**/*.svg",
    "examples/*.py",
    "LICENSE",
)


def on_files(files: Files, config: Any) -> Files:
    """The pages of the repository instead of those of docs/ alone."""
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    for path in sorted(path for pattern in PAGES for path in ROOT.glob(pattern)):
        name = path.relative_to(ROOT).as_posix()
        file = File(name, str(ROOT), config.site_dir, config.use_directory_urls)
        file.dest_uri = file.dest_uri.removeprefix("docs/")
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    if page.file.src_uri == "docs/cli.md":
        return f"{markdown}\n\n{commands()}"
    # A path from the root of the repository, as GitHub resolves it.
    depth = page.file.src_uri.count("/")
    return re.sub(r"\]\(/(?=\w)", "](" + "../" * depth, markdown)


def commands() -> str:
    """The reference of every command and option, by typer."""
    command = [sys.executable, "-m", "typer", "smile_kernels.cli", "utils", "docs", "--name", "smile-kernels"]
    text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    text = text[text.index("\n## ") :].replace("\b", "")
    # Examples are indented by two in the help; here they are code.
    return re.sub(r"(?m)^(Examples?|\S+\.yml):\n((?:  .*\n|\n(?=  ))+)", _block, text)


def _block(match: re.Match) -> str:
    kind = "yaml" if match[1].endswith(".yml") else "bash"
    lines = "\n".join(line[2:] for line in match[2].rstrip().split("\n"))
    return f"{match[1]}:\n\n```{kind}\n{lines}\n```\n"
