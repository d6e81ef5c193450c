"""The command line: `smile-kernels COMMAND`, or `python -m smile_kernels COMMAND`; `--help` lists the commands."""

import contextlib
import errno
import functools
import io
import itertools
import json
import logging
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

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
from rich.table import Column, Table

from . import __version__
from .errors import SmileError
from .schema import KNOWN_KEYS_ONLY, parse


class _Commands(typer.core.TyperGroup):
    """The commands; standard output that cannot be written ends any of them, and its help, with one line."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except OSError as error:
            if not _is_of_output(error):
                raise
            _say(f"error: standard output: cannot be written ({error.strerror}); expected a file or pipe with space")
            with contextlib.suppress(OSError):  # else Python tries again when it ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)


app = typer.Typer(
    cls=_Commands,
    help="Fuse fine-tuned models into a sparse mixture of low-rank experts (SMILE), and run it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@dataclass(frozen=True)
class _Model:
    """An entry of `models` in a YAML file."""

    model: str
    name: str | None = None

    __pydantic_config__ = KNOWN_KEYS_ONLY


@dataclass(frozen=True)
class _Parameters:
    """`parameters` in a YAML file: arguments of `upscale_checkpoints`."""

    rank_of_expert: int | float | None = None
    rank_of_router: int | None = None
    router: str | None = None
    num_experts_per_tok: int | None = None
    include: list[str] | str | None = None
    exclude: list[str] | str | None = None
    remaining: str | None = None
    embeddings_from: int | str | None = None
    routing: dict[str, Any] | None = None
    calibrate: bool | None = None

    __pydantic_config__ = KNOWN_KEYS_ONLY


@dataclass(frozen=True)
class _Recipe:
    """A YAML file."""

    base_model: str | None = None
    models: list[_Model] | None = None
    dtype: str | None = None
    parameters: _Parameters = _Parameters()

    __pydantic_config__ = KNOWN_KEYS_ONLY


def _show_version(asked: bool) -> None:
    if asked:
        print(f"smile-kernels {__version__}", flush=True)
        raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    # Streams that the caller closed, in the order of their descriptors, which files of the output would get otherwise.
    for stream, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, stream) is None:
            setattr(sys, stream, open(os.devnull, mode))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of experts and paths may be of another encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    if not sys.stderr.isatty():  # read by huggingface_hub, and so by transformers, when they are imported
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # transformers imports torchao if it is installed, which logs missing libraries.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


@app.command()
def upscale(
    config: Annotated[Path | None, typer.Argument(help="YAML file that sets options.")] = None,
    out: Annotated[str | None, typer.Option(help="Output folder, new or empty.")] = None,
    base: Annotated[str | None, typer.Option(help="Pre-trained checkpoint: a folder or a Hub id.")] = None,
    expert: Annotated[
        list[str] | None,
        typer.Option(help="Fine-tuned checkpoint or PEFT adapter: FOLDER or NAME=FOLDER; repeatable."),
    ] = None,
    rank_of_expert: Annotated[
        str | None, typer.Option(help="r; -1 for full rank (exact); a fraction such as 0.9 for the energy to keep.")
    ] = None,
    rank_of_router: Annotated[int | None, typer.Option(help="g, for router smile.")] = None,
    router: Annotated[
        str | None, typer.Option(help="How experts are scored: smile, arrow or norm.  [default: smile]")
    ] = None,
    num_experts_per_tok: Annotated[int | None, typer.Option(help="m, experts per token.  [default: 1]")] = None,
    include: Annotated[list[str] | None, typer.Option(help="Pattern of layers to upscale.  [default: all]")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Pattern of layers to skip.")] = None,
    remaining: Annotated[
        str | None, typer.Option(help="Source of other tensors: base or average.  [default: base]")
    ] = None,
    embeddings_from: Annotated[str | None, typer.Option(help="Name of the expert with added tokens.")] = None,
    routing: Annotated[
        str | None, typer.Option(help="Scope of routing: token, sequence, causal or prompt.  [default: token]")
    ] = None,
    accumulate: Annotated[bool, typer.Option("--accumulate", help="Sum the evidence over layers.")] = False,
    lock_after: Annotated[int | None, typer.Option(help="Reuse the choice of the first n blocks.")] = None,
    half_life: Annotated[float | None, typer.Option(help="Tokens after which a weight is halved.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="The fewest of the m experts whose weights reach it, in (0, 1].")
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="Calibrate the routers; default policy: the recommended one."),
    ] = False,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32.  [default: the base's]")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse layers that cannot have experts.")] = False,
    table: Annotated[bool, typer.Option("--table", help="Print every layer and lost change.")] = False,
    experts_only: Annotated[bool, typer.Option("--experts-only", help="Store no base, only its path.")] = False,
    out_shard_size: Annotated[str, typer.Option(help="Maximum size of a file.")] = "5GB",
    device: Annotated[str, typer.Option(help="Device for the decompositions.")] = "cpu",
    workers: Annotated[int | None, typer.Option(help="Layers in parallel.  [default: one per core, up to 4]")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder written by smile-kernels.")] = False,
) -> None:
    """Fuse a base checkpoint and its fine-tuned versions into one SMILE checkpoint.

    Only a few layers are in memory at a time. The same command continues an interrupted run. Under torchrun, processes
    share the work: torchrun --nproc-per-node 4 -m smile_kernels upscale ...

    \b
    Examples:
      smile-kernels upscale --base mistral --expert math --expert code \\
          --rank-of-expert 32 --rank-of-router 16 --out fused
      smile-kernels upscale fused.yml --out fused

    \b
    fused.yml:
      base_model: mistral
      models:
        - model: math
          name: maths
        - model: code
      dtype: bfloat16
      parameters:
        rank_of_expert: 32
        rank_of_router: 16
        exclude: ["*lm_head"]
    """
    with _errors():
        given: dict[str, Any] = {
            "base": base,
            **_named(expert),
            "rank_of_expert": None if rank_of_expert is None else _number("rank_of_expert", rank_of_expert),
            "rank_of_router": rank_of_router,
            "router": router,
            "num_experts_per_tok": num_experts_per_tok,
            "include": include,
            "exclude": exclude,
            "remaining": remaining,
            "embeddings_from": embeddings_from,
            "dtype": dtype,
            "routing": _policy(routing, accumulate, lock_after, half_life, top_p, calibrate),
            "calibrate": calibrate or None,
        }
        settings = _settings(config, {name: value for name, value in given.items() if value is not None}, out)
        _fuse(
            settings,
            table,
            strict=strict,
            experts_only=experts_only,
            max_shard_size=out_shard_size,
            device=device,
            workers=workers,
            force=force,
        )


def _fuse(settings: dict[str, Any], table: bool, **options: Any) -> None:
    """Run `upscale_checkpoints` with its settings as files and options give them, and print its report."""
    import torch

    from .routing import RoutingPolicy
    from .upscaling import upscale_checkpoints

    if "routing" in settings:
        settings["routing"] = RoutingPolicy.from_dict(settings["routing"])
    if "dtype" in settings:
        settings["dtype"] = _dtype(torch, settings["dtype"])
    first, out = os.environ.get("RANK", "0") == "0", settings["out"]
    if first:
        _say(f"{out}: is created when complete; the same command resumes an interrupted run")
    with _progress(first) as advance:
        report = upscale_checkpoints(**settings, **options, progress=advance)
    if first:
        print(report.table() if table else report)
        print(f"\n{out}: complete. `smile-kernels inspect {out}` shows its contents, its README.md how to load it.")


def _named(experts: list[str] | None) -> dict[str, Any]:
    """The settings of --expert NAME=FOLDER, or FOLDER, which may contain a = itself."""
    pairs: list[tuple[str | None, str]] = []
    for expert in experts or ():
        name, sign, folder = expert.partition("=")
        named = bool(sign) and not Path(expert).exists()
        if named and not (name and folder):
            raise SmileError(f"expert: is {expert!r}; expected FOLDER or NAME=FOLDER")
        pairs.append((name, folder) if named else (None, expert))
    return _experts(pairs) if pairs else {}


def _experts(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    """The settings of experts with their names, None for an expert without one."""
    names, folders = [name for name, _ in pairs], [folder for _, folder in pairs]
    return {"experts": folders} | ({} if names.count(None) == len(names) else {"expert_names": names})


@contextmanager
def _progress(shown: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """Shows progress by stage: finished parts and their total; bars on a terminal, otherwise plain lines."""
    console = _console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not (shown and console.is_terminal)
    ) as progress:
        bars: dict[str, TaskID] = {}
        tenths: dict[str, int] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if console.is_terminal:
                bar = bars[stage] if stage in bars else bars.setdefault(stage, progress.add_task(stage, total=total))
                progress.update(bar, completed=done)
            elif shown and tenths.get(stage) != (tenth := 10 * done // max(total, 1)):
                tenths[stage] = tenth
                _say(f"{stage}: {done} of {total}")

        yield advance


def _console(stderr: bool = False) -> Console:
    """A console as wide as the terminal; without one, wide enough that no line wraps. NO_COLOR disables all styles."""
    style: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
    console = Console(stderr=stderr, color_system=style)
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return Console(stderr=stderr, color_system=style, width=240)


def _say(text: str) -> None:
    """One line on stderr, if that can be written."""
    with contextlib.suppress(OSError):
        Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


def _is_of_output(error: Exception) -> bool:
    """Whether standard output could not be written: `publishing` names the file in each error of another one."""
    codes = errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO
    return isinstance(error, OSError) and error.filename is None and error.errno in codes


def _policy(
    scope: str | None,
    accumulate: bool,
    lock_after: int | None,
    half_life: float | None,
    top_p: float | None,
    calibrated: bool,
) -> dict[str, Any] | None:
    """The fields of the routing policy set by options; None if none is set."""
    policy = {"scope": scope, "accumulate": accumulate or None, "lock_after": lock_after, "half_life": half_life}
    policy["top_p"] = top_p
    policy = {name: value for name, value in policy.items() if value is not None}
    return policy | ({"calibrated": True} if calibrated else {}) if policy else None


@app.command()
def calibrate(
    folder: Annotated[Path, typer.Argument(help="SMILE checkpoint written by smile-kernels.")],
    routing: Annotated[
        str | None, typer.Option(help="Scope of routing: token, sequence, causal or prompt.  [default: recommended]")
    ] = None,
    accumulate: Annotated[bool, typer.Option("--accumulate", help="Sum the evidence over layers.")] = False,
    lock_after: Annotated[int | None, typer.Option(help="Reuse the choice of the first n blocks.")] = None,
    half_life: Annotated[float | None, typer.Option(help="Tokens after which a weight is halved.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="The fewest of the m experts whose weights reach it, in (0, 1].")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed for the text that the model generates.")] = 0,
    device_map: Annotated[str | None, typer.Option(help="As in transformers: auto, cpu, cuda:0, ...")] = None,
) -> None:
    """Measure the constant part of every router's shares, which calibrated routing policies subtract. Needs no data.

    A language model is calibrated on text that it generates itself. The folder is replaced atomically.

    \b
    Example:
      smile-kernels calibrate fused
    """
    with _errors():
        from .checkpoint import calibrate_checkpoint
        from .routing import RoutingPolicy

        policy = _policy(routing, accumulate, lock_after, half_life, top_p, calibrated=True)
        options = {} if device_map is None else {"device_map": device_map}
        chosen = None if policy is None else RoutingPolicy.from_dict(policy)
        _say(f"{folder}: is replaced when complete; the model first generates the text it is calibrated on")
        print(calibrate_checkpoint(folder, routing=chosen, seed=seed, **options))


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="SMILE checkpoint (not experts only).")],
    base: Annotated[str | None, typer.Option(help="Folder of the base.  [default: from the report]")] = None,
    expert: Annotated[
        list[str] | None, typer.Option(help="Folder of an expert; repeatable, in order.  [default: from the report]")
    ] = None,
    inputs: Annotated[
        Path | None, typer.Option(help="Safetensors file with the arguments of forward.  [default: random]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed for the random inputs.")] = 0,
) -> None:
    """Compare a SMILE checkpoint with its fine-tuned models. Exit status 1 if they differ.

    Experts are forced one after another, in float32. Only one model is in memory at a time.

    \b
    Example:
      smile-kernels verify fused
    """
    with _errors():
        from .storage import read_safetensors
        from .upscaling import verify as run

        given = None if inputs is None else {tensor.name: tensor.load() for tensor in read_safetensors(inputs)}
        with _progress() as advance:
            verdicts = run(folder, base, expert, inputs=given, seed=seed, progress=functools.partial(advance, "models"))
        for verdict in verdicts:
            print(verdict)
    if any(verdict.verdict == "off" for verdict in verdicts):
        raise typer.Exit(1)


@app.command()
def chat(
    folder: Annotated[Path, typer.Argument(help="SMILE checkpoint of a causal language model with a chat template.")],
    max_new_tokens: Annotated[int, typer.Option(help="Maximum length of an answer, in tokens.")] = 512,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.  [default: a GPU if there is one]")] = None,
) -> None:
    """Chat with a SMILE checkpoint through transformers and see which experts serve each answer.

    Each line is a user turn, answered under the checkpoint's routing policy; a backslash at its end continues it.
    /reset starts a new conversation. /expert NAME selects one expert, /expert returns to the policy. /exit, end of
    input and Ctrl-C end the program. Answers go to stdout, the experts that served them to stderr.

    \b
    Examples:
      smile-kernels chat fused
      echo "Tell me a joke." | smile-kernels chat fused
    """
    with _errors():
        from .chat import chat as run

        run(folder, max_new_tokens=max_new_tokens, device=device)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="SMILE checkpoint.")],
    table: Annotated[bool, typer.Option("--table", help="Print every layer instead of kinds of layers.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Plot energies and singular values (.png, .svg, .pdf).")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
) -> None:
    """Show the contents of a SMILE checkpoint: layers, ranks, sizes and energies.

    \b
    Example:
      smile-kernels inspect fused --plot energy.png --json fused.json
    """
    with _errors():
        from .checkpoint import describe
        from .publishing import check_outputs, write_text

        check_outputs([folder], plot=plot, json=json_path)
        description = describe(folder)
        _show(description, _console(), table)
        if json_path:
            write_text(json_path, json.dumps(description, indent=1) + "\n")
        if plot:
            _plot(description, plot)


@app.command()
def analyze(
    base: Annotated[str, typer.Option(help="Pre-trained checkpoint: a folder or a Hub id.")],
    expert: Annotated[list[str], typer.Option(help="Folder of a fine-tuned checkpoint or a PEFT adapter; repeatable.")],
    rank_of_expert: Annotated[int, typer.Option(help="Rank of the truncated changes.")] = 16,
    scale: Annotated[float, typer.Option(help="Factor of task arithmetic.")] = 0.3,
    include: Annotated[list[str] | None, typer.Option(help="Pattern of layers.  [default: all]")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Pattern of layers to skip.")] = None,
    table: Annotated[bool, typer.Option("--table", help="Print every layer instead of kinds of layers.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Plot to this file: .png, .svg or .pdf.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write all results to this file.")] = None,
    workers: Annotated[int | None, typer.Option(help="Layers in parallel.  [default: one per core, up to 4]")] = None,
) -> None:
    """Show how fine-tuning changed the linear layers: subspaces and rank of the changes, interference between tasks.

    The subspace analysis of the SMILE paper. Only a few layers are in memory at a time. Files are written only with
    --plot and --json.

    \b
    Example:
      smile-kernels analyze --base mistral --expert math --expert code --plot zones.png --json zones.json
    """
    with _errors():
        from .analysis import analyze as run
        from .publishing import check_outputs

        check_outputs([base, *expert], plot=plot, json=json_path)
        options: dict[str, Any] = {"include": include, "exclude": exclude, "workers": workers}
        with _progress() as advance:
            analysis = run(base, expert, rank_of_expert=rank_of_expert, scale=scale, progress=advance, **options)
        print(analysis.table() if table else analysis)
        if json_path:
            analysis.save(json_path)
        if plot:
            analysis.plot(plot)


@app.command()
def sweep(
    folder: Annotated[Path, typer.Argument(help="SMILE checkpoint, fused at the largest ranks.")],
    score: Annotated[str, typer.Option(help="Scoring function: MODULE:FUNCTION or FILE.py:FUNCTION.")],
    rank_of_expert: Annotated[
        list[int] | None, typer.Option(help="r; repeatable.  [default: the checkpoint's, its half and its quarter]")
    ] = None,
    rank_of_router: Annotated[
        list[int] | None, typer.Option(help="g; repeatable.  [default: the checkpoint's, its half and its quarter]")
    ] = None,
    num_experts_per_tok: Annotated[
        list[int] | None, typer.Option(help="m, experts per token; repeatable.  [default: the checkpoint's]")
    ] = None,
    routing: Annotated[
        list[str] | None,
        typer.Option(help="Scope, or the fields of a routing policy as JSON; repeatable.  [default: token]"),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw heat maps to this file: .png, .svg or .pdf.")] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the results to this file, after each setting.")
    ] = None,
    device_map: Annotated[str | None, typer.Option(help="As in transformers: auto, cpu, cuda:0, ...")] = None,
) -> None:
    """Score a SMILE checkpoint at every combination of ranks, experts per token and routing policies.

    The function gets the model and returns a number, or a dict of numbers by task. The ranks are truncated from the
    checkpoint's, so nothing is fused again.

    \b
    Examples:
      smile-kernels sweep fused --score evaluate.py:accuracy --json sweep.json --plot sweep.png
      smile-kernels sweep fused --score my_package.evaluation:accuracy --rank-of-expert 16 --rank-of-expert 32 \\
          --routing token --routing '{"scope": "sequence", "accumulate": true}'
    """
    with _errors():
        from .checkpoint import load_pretrained
        from .publishing import check_outputs
        from .sweeping import sweep as run

        check_outputs([folder], plot=plot, json=json_path)
        policies = {text: _scope_or_fields(text) for text in routing} if routing else None
        function = _scoring_function(score)
        options: dict[str, Any] = {} if device_map is None else {"device_map": device_map}
        model = load_pretrained(folder, **options)
        with _progress() as advance:
            result = run(
                model,
                function,
                rank_of_expert=rank_of_expert,
                rank_of_router=rank_of_router,
                num_experts_per_tok=num_experts_per_tok,
                routing=policies,
                file=json_path,
                progress=advance,
            )
        print(result)
        if plot:
            result.plot(plot)


def _scope_or_fields(text: str) -> Any:
    """The policy of --routing."""
    from .routing import RoutingPolicy

    if not text.lstrip().startswith("{"):
        return RoutingPolicy(text)
    try:
        return RoutingPolicy.from_dict(json.loads(text))
    except json.JSONDecodeError as error:
        raise SmileError(
            f"routing: is {text!r}, which is not JSON ({error}); expected a scope or a JSON object"
        ) from None


def _scoring_function(text: str) -> Callable[[Any], Any]:
    """The function of --score; what it raises is shown with its traceback."""
    import importlib
    import importlib.util
    import traceback

    place, _, name = text.rpartition(":")
    if not place or not name.isidentifier():
        raise SmileError(f"score: is {text!r}; expected MODULE:FUNCTION or FILE.py:FUNCTION")
    file = Path(place) if place.endswith(".py") else None
    if file and not file.is_file():
        raise FileNotFoundError(f"score: {place}: no such file; expected a Python file")
    try:
        if file:  # by its path, since it may have the name of an installed module
            spec: Any = importlib.util.spec_from_file_location(file.stem, file)
            module = importlib.util.module_from_spec(spec)
            sys.modules.setdefault(file.stem, module)
            sys.path.append(str(file.absolute().parent))
            spec.loader.exec_module(module)
        else:
            sys.path.append(os.getcwd())  # last, since its files may have the names of installed modules
            module = importlib.import_module(place)
    except Exception as error:
        traceback.print_exc()
        raise SmileError(
            f"score: {place} cannot be imported ({type(error).__name__}: {error}); expected Python code"
        ) from None
    function = getattr(module, name, None)
    if not callable(function):
        raise SmileError(f"score: {place} has no function {name!r}; expected one that takes the model")

    def scored(model: Any) -> Any:
        try:
            return function(model)
        except Exception as error:
            traceback.print_exc()
            raise SmileError(f"score: {text} raised {type(error).__name__}: {error}; expected a score") from None

    return scored


@app.command()
def bench(
    shape: Annotated[
        list[str] | None, typer.Option(help="IN_FEATURESxOUT_FEATURES or a named layer; repeatable.")
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens per call; repeatable.")] = None,
    num_local_experts: Annotated[int, typer.Option(help="N.")] = 8,
    rank_of_expert: Annotated[int, typer.Option(help="r.")] = 32,
    rank_of_router: Annotated[int, typer.Option(help="g.")] = 16,
    num_experts_per_tok: Annotated[int, typer.Option(help="m, experts per token.")] = 1,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16.  [default: bfloat16 on a GPU, else float32]")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.  [default: a GPU if there is one]")] = None,
    peers: Annotated[list[str] | None, typer.Option(help="What to compare; repeatable.  [default: all]")] = None,
    backward: Annotated[bool, typer.Option("--backward", help="Forward + backward.")] = False,
    graph: Annotated[bool, typer.Option("--graph", help="Replay CUDA graphs instead of launching eagerly.")] = False,
    seconds: Annotated[float, typer.Option(help="Time to measure each table.")] = 1.0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write every sample to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Plot time relative to F.linear: .png, .svg or .pdf.")] = None,
) -> None:
    """Time a SMILE layer on this machine against F.linear, other implementations and the machine's limits.

    All implementations run interleaved on the same tensors; each is first checked against a float64 reference.

    \b
    Example:
      smile-kernels bench --shape 768x3072 --shape clip-b32.attn --tokens 1 --tokens 64 --json bench.json
    """
    with _errors():
        from .benchmark.command import bench as run
        from .benchmark.peers import PEERS
        from .benchmark.problems import Setting

        run(
            shape or ["clip-b32.attn"],
            tokens or [1, 64, 1024],
            Setting(num_local_experts, rank_of_expert, rank_of_router, num_experts_per_tok),
            dtype=dtype,
            device=device,
            peers=peers or tuple(PEERS),
            backward=backward,
            graph=graph,
            seconds=seconds,
            json_file=json_path,
            plot_file=plot,
            console=_console(),
        )


@app.command()
def tune(
    shape: Annotated[list[str], typer.Option(help="IN_FEATURESxOUT_FEATURES or a named layer; repeatable.")],
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens per call.  [default: 1 4 16 64 512 2048]")] = None,
    num_local_experts: Annotated[int, typer.Option(help="N.")] = 8,
    rank_of_expert: Annotated[int, typer.Option(help="r.")] = 32,
    rank_of_router: Annotated[int, typer.Option(help="g.")] = 16,
    num_experts_per_tok: Annotated[int, typer.Option(help="m, experts per token.")] = 1,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
) -> None:
    """Find the fastest launch configuration of the Triton kernels for given layers on this GPU and store it.

    \b
    Example:
      smile-kernels tune --shape 4096x4096 --shape 4096x14336 --rank-of-expert 64
    """
    with _errors():
        import torch

        if not torch.cuda.is_available():
            raise SmileError("device: torch sees no GPU here; expected one, to time launches on")
        from .benchmark.problems import layer_shape
        from .ops.triton import configs, tuning
        from .testing import Problem

        device, kind = torch.device("cuda"), _dtype(torch, dtype)
        layers = [layer_shape(name) for name in shape]
        console = _console(stderr=True)
        for name, (in_features, out_features, bias) in zip(shape, layers):
            with console.status(name) as status:

                def report(key: str, choices: dict, seconds: float, name: str = name, status: Any = status) -> None:
                    status.update(f"{name}: {key} {choices[key]}: {1e6 * seconds:.1f} us")

                problem = Problem.random(
                    1,
                    in_features,
                    out_features,
                    num_local_experts,
                    rank_of_expert,
                    rank_of_router,
                    num_experts_per_tok,
                    bias=bias,
                    expert_bias=bias,
                    dtype=kind,
                    device="cuda",
                )
                best = tuning.tune(
                    *problem.arguments()[1:],
                    num_experts_per_tok,
                    rank_of_router,
                    tokens=tokens or [1, 4, 16, 64, 512, 2048],
                    report=report,
                )
                tuning.save(device, best)
            for key, choice in best.items():
                print(f"{name}: {key}: {choice}")
        print(f"{configs.user_table()}: written")


@app.command()
def doctor(
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every path with the float64 reference; exclude failures.")
    ] = False,
    forget: Annotated[bool, typer.Option("--forget", help="Clear the list of excluded paths.")] = False,
    report: Annotated[
        Path | None, typer.Option(help="File for the results of --verify.  [default: in the cache folder]")
    ] = None,
) -> None:
    """Show versions, devices, the backend chosen on each device, and why others cannot run.

    --verify runs every path of this machine's backends in child processes: seconds on a CPU; on a GPU kernels are
    compiled first. Paths that fail are excluded on this machine until a new version, --verify or --forget.

    \b
    Examples:
      smile-kernels doctor
      smile-kernels doctor --verify --report verify.json
    """
    import torch

    console = _console()
    device_types = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    with _errors():
        from .publishing import check_outputs

        check_outputs(report=report)
        if forget:
            from .ops import excluded

            for device_type in device_types:
                excluded.record(excluded.device_name(device_type), {})
        failed = _verify(device_types, report, console) if verify else False
        _show_machine(console)
        for device_type in device_types:
            _show_backends(device_type, console)
    if failed:
        raise typer.Exit(1)


def _verify(device_types: tuple[str, ...], report: Path | None, console: Console) -> bool:
    """Run the selftest, write its results and the excluded paths; return whether anything failed."""
    from contextlib import ExitStack

    from . import selftest
    from .benchmark.measure import machine
    from .ops import excluded
    from .storage import write_text
    from .worker import Worker

    results: dict[str, dict[str, Any]] = {}
    left_out, failed = {}, 0
    with _progress() as advance:
        for device_type in device_types:
            todo, done = selftest.checks(device_type), itertools.count(1)

            def report_one(*_: Any, stage: str = f"verify {device_type}", done: Any = done, n: int = len(todo)) -> None:
                advance(stage, next(done), n)

            count = min(8, os.cpu_count() or 1) if device_type == "cuda" else 1
            with ExitStack() as stack:
                workers = [stack.enter_context(Worker(selftest.perform)) for _ in range(count)]
                outcomes = selftest.verify(todo, workers, report=report_one)
            left_out[device_type] = selftest.blamed(todo, outcomes)
            checks = [selftest.as_record(check, outcomes[check.name]) for check in todo]
            results[device_type] = {"machine": machine(device_type), "checks": checks}
            failed += sum(check["failure"] is not None for check in checks)
    file = report or excluded.file().with_name("verify.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(results, indent=1) + "\n")
    for device_type, reasons in left_out.items():
        excluded.record(excluded.device_name(device_type), reasons)
    for device_type, result in results.items():
        wrong = [check for check in result["checks"] if check["failure"] is not None]
        total = len(result["checks"])
        console.print(
            f"{device_type}: {total - len(wrong)} of {total} checks agree with the reference", highlight=False
        )
        for check in wrong:
            console.print(f"  {check['name']}: {check['failure']}", markup=False, highlight=False, soft_wrap=True)
    said = "attach it to a bug report" if failed else "written"
    console.print(f"{file}: {said}", markup=False, highlight=False, soft_wrap=True)
    return failed > 0


def _show_machine(console: Console) -> None:
    """Versions and devices."""
    import torch

    from . import __version__
    from .versions import TESTED, installed, newer_than_tested, tested

    versions = Table(
        "package", "version", "tested with", box=None, pad_edge=False, title="versions", title_justify="left"
    )
    versions.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    versions.add_row("smile-kernels", __version__)
    for package in TESTED:
        newer = " (this one is newer)" if newer_than_tested(package) else ""
        versions.add_row(package, installed(package) or "not installed", tested(package) + newer)
    console.print(versions, "")

    devices = Table("device", "description", box=None, pad_edge=False, title="devices", title_justify="left")
    devices.add_row("cpu", f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        memory = f"{p.total_memory / 2**30:.0f} GiB"
        devices.add_row(f"cuda:{i}", f"{p.name}, {memory}, {p.multi_processor_count} SMs, sm_{p.major}{p.minor}")
    if not torch.cuda.is_available():
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        devices.add_row("cuda", f"not available: torch {torch.__version__} is built with {build}")
    console.print(devices, "")


def _show_backends(device_type: str, console: Console) -> None:
    """The backend chosen on each device, why the others cannot run, and the paths excluded by --verify."""
    import warnings

    import torch

    from .ops import excluded
    from .ops.library import backends, choose_backend

    table = Table(
        "backend",
        "on " + device_type,
        box=None,
        pad_edge=False,
        title=f"backends on {device_type}",
        title_justify="left",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # excluded paths are shown below
        left_out = excluded.paths(excluded.device_name(device_type))
        try:
            chosen = choose_backend(None, device_type, torch.float32, 1, False)
        except (RuntimeError, ValueError) as error:
            chosen = None
            console.print(f"SMILE_KERNELS_BACKEND={os.environ.get('SMILE_KERNELS_BACKEND')}: {error}", markup=False)
    for backend, reason in backends(device_type).items():
        table.add_row(backend, reason or ("would run" if backend == chosen else "can run"))
    console.print(table)
    for name, reason in left_out.items():
        console.print(f"left out: {name}: {reason}", markup=False, highlight=False, soft_wrap=True)
    if left_out:
        console.print("`smile-kernels doctor --forget` enables it again", markup=False, highlight=False)


def _settings(config: Path | None, given: dict[str, Any], out: str | None) -> dict[str, Any]:
    """The settings of the YAML file and of the options; each may be set only once."""
    settings = _from_yaml(config) if config else {}
    for name in given:
        if name in settings:
            raise SmileError(f"{name}: is given as an option and in {config}; expected one of the two")
    settings |= given
    needed = ["base", "experts", "rank_of_expert"]
    if settings.get("router", "smile") == "smile":  # the others set it
        needed.append("rank_of_router")
    for name in needed:
        if name not in settings:
            option = {"experts": "expert"}.get(name, name).replace("_", "-")
            raise SmileError(f"{name}: is not given; expected --{option}, or a YAML file that sets it")
    if out is None:
        raise SmileError("out: is not given; expected --out FOLDER")
    return {**settings, "out": out}


def _from_yaml(file: Path) -> dict[str, Any]:
    """Settings of `upscale_checkpoints` from a YAML file similar to mergekit's."""
    import yaml

    from .storage import read_text

    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file; expected a YAML file")
    text = read_text(file, limit=1 << 16)
    try:
        depth = 0
        for event in yaml.parse(text):
            if isinstance(event, yaml.AliasEvent):
                raise SmileError(f"{file}: contains an alias, *{event.anchor}; expected its value")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > 16:  # the scanner's time grows with the square of it
                raise SmileError(f"{file}: has more than 16 nested lists and mappings; expected settings")
        if twice := _repeated_key(yaml.compose(text, yaml.SafeLoader)):
            raise SmileError(f"{file}: sets {twice} twice; expected one value")
        content = yaml.safe_load(text)
    except SmileError:
        raise
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: a number of thousands of digits
        raise SmileError(f"{file}: is not YAML: {error}") from None
    recipe = parse(_Recipe, content, str(file))
    settings: dict[str, Any] = {"base": recipe.base_model, "dtype": recipe.dtype, **asdict(recipe.parameters)}
    if recipe.models is not None:
        settings |= _experts([(model.name, model.model) for model in recipe.models])
    for name in ("include", "exclude"):
        settings[name] = [settings[name]] if isinstance(settings[name], str) else settings[name]
    return {name: value for name, value in settings.items() if value is not None}


def _repeated_key(node: Any) -> str | None:
    """A key that a mapping in a YAML document has twice; YAML readers take the last value."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        return twice or next((found for _, value in node.value if (found := _repeated_key(value))), None)
    if isinstance(node, yaml.SequenceNode):
        return next((found for value in node.value if (found := _repeated_key(value))), None)
    return None


def _number(name: str, text: str) -> int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    raise SmileError(f"{name}: is {text!r}; expected a number")


def _dtype(torch: Any, name: Any) -> Any:
    dtype = getattr(torch, str(name), None)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise SmileError(f"dtype: is {name!r}; expected bfloat16, float16, float32 or float64")
    return dtype


def _show(description: dict[str, Any], console: Console, every: bool) -> None:
    from .upscaling.report import kind_of

    smile = description["config"]
    console.print(
        f"{description['folder']}: {len(description['layers'])} SMILE layers, {smile['num_local_experts']} experts, "
        f"{smile['num_experts_per_tok']} per token",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    for name in ("base", "experts", "other"):
        console.print(f"  {name:8}{_bytes(description['bytes'][name]):>10}", highlight=False)
    if names := smile.get("expert_names"):
        listed = ", ".join(f"{i} {name}" for i, name in enumerate(names))
        console.print(f"  experts: {listed}", markup=False, highlight=False, soft_wrap=True)
    if base := smile.get("base_model_name_or_path"):
        console.print(f"  experts only; base: {base}", markup=False, highlight=False, soft_wrap=True)
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for layer in description["layers"]:
        name = layer["name"] if every else kind_of(layer["name"])
        shape = f"{layer['out_features']}x{layer['in_features']}" if layer["out_features"] else "?"
        kinds.setdefault((name, shape), []).append(layer)
    columns = [Column(name, no_wrap=True) for name in ("shape", "r", "g", "experts", "change", "energy")]
    table = Table(Column("layer", overflow="fold"), *columns, box=None, pad_edge=False)
    if not every:
        table.add_column("layers", justify="right")
    for (name, shape), layers in kinds.items():
        energies = [energy for layer in layers for energy in layer["energy"]]
        row = (
            name,
            shape,
            _span([layer["rank_of_expert"] for layer in layers], "{}"),
            _span([layer["rank_of_router"] for layer in layers], "{}"),
            _bytes(sum(layer["bytes"] for layer in layers)),
            _span([norm for layer in layers for norm in layer["norm"]], "{:.3g}"),
            _span(energies, "{:.1%}") if energies else "-",
        )
        table.add_row(*row, *([] if every else [str(len(layers))]))
    console.print(table)


def _span(values: Sequence[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low}-{high}"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def _plot(description: dict[str, Any], file: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    from .publishing import new_file

    layers = description["layers"]
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    shades = matplotlib.colormaps["viridis"]([i / max(1, len(layers) - 1) for i in range(len(layers))])
    for layer, shade in zip(layers, shades):
        left.plot(range(1, len(layer["s"]) + 1), layer["s"], color=shade, linewidth=0.8)
    left.set(xlabel="singular value", ylabel="size, mean over experts", yscale="log", title="Singular values, by layer")
    known = [(i, energy) for i, layer in enumerate(layers) for energy in layer["energy"]]
    if known:
        right.plot(*zip(*known), ".", markersize=4)
    right.set(xlabel="layer", ylabel="captured energy", title="Captured energy, by layer and expert")
    with new_file(file) as f:
        figure.savefig(f, format=file.suffix.removeprefix("."))


@contextmanager
def _errors() -> Iterator[None]:
    """Print a user error in one line on stderr and exit with status 1; a bug keeps its traceback."""
    try:
        yield
        sys.stdout.flush()
    except (SmileError, OSError, ImportError) as error:
        if _is_of_output(error):
            raise  # to _Commands
        _say(f"error: {' '.join(str(error).split())}")
        raise typer.Exit(1) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error)):
            _say(f"error: out of memory: {' '.join(str(error).split())}")
            raise typer.Exit(1) from None
        _say("this is a bug: please report it with the file that `smile-kernels doctor --verify` writes")
        raise
