"""Rules for the whole repository: the order of imports, short functions, words, tests that hide no package."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "smile_kernels"
# From top to bottom: a module imports only from its own level and from those below.
ROOMS = (
    ("__init__", "__main__"),
    ("cli",),
    ("doctor",),
    ("analysis", "benchmark", "chat", "inspection", "recipe", "selftest", "sweeping"),
    ("upscaling",),
    ("checkpoint",),
    ("integrations",),
    ("config",),
    ("guard", "routing"),
    ("nn",),
    ("functional",),
    ("svd", "storage", "testing", "worker"),
    ("ops",),
    ("console", "publishing", "schema", "versions"),
    ("errors",),
)
FLOORS = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}
BACKENDS = ("composed", "extension", "triton")
# Modules of ops/ that another may not import: a backend imports no other backend, and not the module that chooses.
APART = {"reference": (*BACKENDS, "library"), **dict.fromkeys(BACKENDS, (*BACKENDS, "library"))}
INSTALLS = r"pip install [^\n`]*smile[-_]kernels"
CHANGES = ("add", "append", "clear", "extend", "insert", "pop", "popitem", "remove", "setdefault", "update")
# Words that plain technical English replaces, as regular expressions, and what to write instead.
WORDS = {
    "a(new|fresh)": "again",
    "aloud": "explicitly",
    "aside( from)?": "except for",
    "all but|(but|save) for": "except for",
    "became of|becomes of": "the result for",
    "beside": "next to, with, in addition to",
    "by turns": "interleaved, one after another",
    "go(es|ing)? on": "continue",
    "hangs? on": "depends on",
    "in place of": "instead of",
    "in silence": "silently",
    "(is|are) told of": "is called with",
    "keeps? its standing": "is assigned the mean log-evidence of the others",
    "l(ies|ay|ain) (in|on|at|before|behind|beside|between|side)": "is, is stored",
    "leave[s]? \\w+ alone|left alone": "does not change",
    "lest|shall|thereof|upon|whence|whither|wherein": "a modern form",
    "made anew|mere(ly)?|nothing but": "again, only",
    "puts? (it|them) back": "restores",
    "read past|past (its|the) experts": "bypasses the experts",
    "remember(s|ed)?": "stores, keeps",
    "spoil(s|ed|t)?": "affects",
    "stands? (at|before|beside|behind|for|in|where)|stood": "is, denotes, replaces",
    "under way": "running, pending",
    "untouched": "unchanged",
    "win(s|ning)? back|won back": "recover",
    "(?<![Tt]here )(is|are) no (?!longer|better|faster|larger|more|less)[a-z]+": "is not a",
}
LONGEST = 80  # lines of a function, without its docstring


def imports(source: str, module: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The imports of a module, anywhere in its text, as paths; `module` is its own path."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = module[: len(module) - node.level] if node.level else ()
            start += tuple(node.module.split(".")) if node.module else ()
            yield from ((*start, alias.name) for alias in node.names)


def wrong_imports(source: str, module: tuple[str, ...]) -> list[str]:
    """Imports from a higher level, from one backend to another, or of code that is not installed."""
    wrong = []
    for path in imports(source, module):
        own, other = (p[1] if len(p) > 1 else "__init__" for p in (module, path))
        if path[0] in ("bench", "studies", "tests", "examples"):
            wrong.append(".".join(path))
        elif path[0] != "smile_kernels" or path[1:] == ("__version__",):
            continue
        elif (
            FLOORS[other] < FLOORS[own]
            or (FLOORS[other] == FLOORS[own] and other != own)
            or (own == other == "ops" and module[2] != path[2] and module[2] in APART and path[2] in APART[module[2]])
        ):
            wrong.append(".".join(path))
    return wrong


def long_functions(source: str) -> list[str]:
    """The functions that are too long, except for GPU kernels."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or any("jit" in ast.unparse(each) for each in node.decorator_list):
            continue
        documented = ast.get_docstring(node) is not None
        first = node.body[0].end_lineno + 1 - node.body[0].lineno if documented else 0
        if node.end_lineno + 1 - node.lineno - first > LONGEST:
            found.append(node.name)
    return found


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_modules_import_from_below(file):
    assert not wrong_imports(file.read_text(), file.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("smile_kernels/nn", "from .routing import set_routing"),
        ("smile_kernels/nn", "def f():\n    from smile_kernels.config import SmileConfig"),
        ("smile_kernels/storage", "from .svd import check_ranks"),
        ("smile_kernels/integrations/fusion_bench", "from ..checkpoint import describe"),
        ("smile_kernels/integrations/vllm/linear", "from ...upscaling import upscale"),
        ("smile_kernels/ops/extension", "from . import composed"),
        ("smile_kernels/ops/triton/route", "from ..extension import load"),
        ("smile_kernels/ops/reference", "from . import library"),
        ("smile_kernels/testing", "import bench.problems"),
        ("smile_kernels/cli", "from studies.encoder import run"),
    ],
)
def test_an_import_from_above_is_found(module, source):
    assert len(wrong_imports(source, tuple(module.split("/")))) == 1


def changed_state(source: str) -> list[str]:
    """Names of a module that its functions rebind, or whose dict, list or set they modify."""
    tree = ast.parse(source)
    assigned = [node for node in tree.body if isinstance(node, (ast.Assign, ast.AnnAssign))]
    targets = [target for node in assigned for target in getattr(node, "targets", None) or [node.target]]
    held = {target.id for target in targets if isinstance(target, ast.Name)}
    changed = []
    for node in ast.walk(tree):
        owner = None
        if isinstance(node, ast.Global):
            changed += node.names
        elif isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
            owner = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
            owner = node.func.value
        if isinstance(owner, ast.Name) and owner.id in held:
            changed.append(owner.id)
    return changed


@pytest.mark.parametrize("file", sorted((PACKAGE / "ops").rglob("*.py")), ids=lambda file: file.stem)
def test_no_module_of_ops_has_mutable_state(file):
    """Caches by functools.cache and lru_cache depend only on their arguments."""
    assert changed_state(file.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "seen = {}\ndef f(x):\n    seen[x] = 1",
        "seen = list()\ndef f(x):\n    seen.append(x)",
        "seen: set = set()\ndef f(x):\n    seen.add(x)",
        "seen = None\ndef f(x):\n    global seen\n    seen = x",
    ],
)
def test_mutable_state_is_found(source):
    assert changed_state(source) == ["seen"]


def prose(file: Path) -> str:
    """Comments, docstrings and messages of a source file; the text of a page without code and generated tables."""
    text = file.read_text()
    if file.suffix == ".md":
        text = re.sub(r"<!-- ([\w:. -]+?) -->.*?<!-- /.*?-->|```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
        return re.sub(r"^(\|.*\||    .*)$", "", text, flags=re.MULTILINE) if file.stem == "log" else text
    if file.suffix != ".py":
        return "\n".join(re.findall(r'//.*|"[^"\n]* [^"\n]*"', text))
    comments = [
        token.string for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type == tokenize.COMMENT
    ]
    strings = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)]
    return "\n".join([*comments, *(string for string in strings if isinstance(string, str) and " " in string)])


def unplain(text: str) -> list[str]:
    """The words of WORDS in a text."""
    text = " ".join(re.sub(r"^\s*(#|//)", "", line) for line in text.splitlines())
    return [match[0] for word in WORDS for match in re.finditer(rf"\b(?:{word})\b", re.sub(r"\s+", " ", text))]


def test_prose_is_plain_technical_english():
    """By words that are unambiguous; the rest is for readers."""
    folders = ("smile_kernels", "csrc", "bench", "studies", "tests", "examples", "docs")
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*"))] + sorted(ROOT.glob("*.md"))
    files = [file for file in files if file.suffix in (".py", ".md", ".h", ".cpp", ".cu", ".cuh")]
    found = {str(f.relative_to(ROOT)): words for f in files if f != Path(__file__) and (words := unplain(prose(f)))}
    assert found == {}, f"write instead: {WORDS}"


@pytest.mark.parametrize(
    "text", ["the sums that a cache\n    # remembers", "this is no checkpoint", "kept beside the weights", "made anew"]
)
def test_words_that_are_not_plain_are_found(text):
    assert len(unplain(text)) >= 1
    assert unplain("there is no checkpoint, and the layer is no longer used") == []


def test_the_plan_of_rooms_names_every_module():
    plan = (ROOT / "CONTRIBUTING.md").read_text().split("```")[3]
    modules = [file for file in PACKAGE.rglob("*.py") if not file.name.startswith("__")]
    inside = {"triton", "vllm", "benchmark"}  # these folders are listed as one
    assert [f.name for f in modules if not inside & {*f.parts} and f.name not in plan] == []
    assert [name for name in re.findall(r"\w+\.py\b", plan) if not list(PACKAGE.rglob(name))] == []


@pytest.mark.parametrize("folder", ["smile_kernels", "bench", "studies"])
def test_functions_are_short(folder):
    found = {file.name: names for file in (ROOT / folder).rglob("*.py") if (names := long_functions(file.read_text()))}
    assert not found


def test_a_long_function_is_found():
    body = "    x = 1\n" * (LONGEST - 1)
    assert not long_functions(f'def f():\n    """One line."""\n{body}')
    assert long_functions(f"def f():\n    x = 0\n{body}") == ["f"]
    assert not long_functions(f"@triton.jit\ndef f():\n    x = 0\n{body}")


def test_no_folder_of_tests_hides_a_package():
    """Each is a package, so pytest adds only the root of the repository to sys.path, which has no `triton`."""
    folders = {file.parent for file in (ROOT / "tests").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_no_document_installs_what_is_on_no_index():
    files = (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *PACKAGE.rglob("*.py"))
    assert re.search(INSTALLS, "`pip install vllm smile-kernels`")
    assert [file.name for file in files if re.search(INSTALLS, file.read_text())] == []
