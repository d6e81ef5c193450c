"""The command line: `smile-kernels COMMAND`, or `python -m smile_kernels COMMAND`; `--help` lists the commands."""

import functools
import io
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from .console import Commands, new_console, progress, say, user_errors
from .errors import SmileError
from .recipe import DTYPES, dtype_of, listed, named_experts, number, policy_fields, scope_or_fields, settings_of

app = typer.Typer(
    cls=Commands,
    help="Fuse fine-tuned models into a sparse mixture of low-rank experts (SMILE), and run it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
        str | None, typer.Option(help="Scope: token, sequence, causal, prompt or window.  [default: token]")
    ] = None,
    accumulate: Annotated[bool, typer.Option("--accumulate", help="Sum the evidence over layers.")] = False,
    lock_after: Annotated[int | None, typer.Option(help="Reuse the choice of the first n blocks.")] = None,
    half_life: Annotated[float | None, typer.Option(help="Tokens after which a weight is halved.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens to each side, with scope window.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="The fewest of the m experts whose weights reach it, in (0, 1].")
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="Calibrate the routers; default policy: the recommended one."),
    ] = False,
    dtype: Annotated[str | None, typer.Option(help=f"{listed(DTYPES)}.  [default: the base's]")] = None,
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
    with user_errors():
        given: dict[str, Any] = {
            "base": base,
            **named_experts(expert),
            "rank_of_expert": None if rank_of_expert is None else number("rank_of_expert", rank_of_expert),
            "rank_of_router": rank_of_router,
            "router": router,
            "num_experts_per_tok": num_experts_per_tok,
            "include": include,
            "exclude": exclude,
            "remaining": remaining,
            "embeddings_from": embeddings_from,
            "dtype": dtype,
            "routing": policy_fields(routing, accumulate, lock_after, half_life, window, top_p, calibrate),
            "calibrate": calibrate or None,
        }
        settings = settings_of(config, {name: value for name, value in given.items() if value is not None}, out)
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
        settings["dtype"] = dtype_of(torch, settings["dtype"])
    first, out = os.environ.get("RANK", "0") == "0", settings["out"]
    if first:
        say(f"{out}: is created when complete; the same command resumes an interrupted run")
    with progress(first) as advance:
        report = upscale_checkpoints(**settings, **options, progress=advance)
    if first:
        print(report.table() if table else report)
        print(f"\n{out}: complete. `smile-kernels inspect {out}` shows its contents, its README.md how to load it.")


@app.command()
def calibrate(
    folder: Annotated[Path, typer.Argument(help="SMILE checkpoint written by smile-kernels.")],
    routing: Annotated[
        str | None,
        typer.Option(help="Scope: token, sequence, causal, prompt or window.  [default: recommended]"),
    ] = None,
    accumulate: Annotated[bool, typer.Option("--accumulate", help="Sum the evidence over layers.")] = False,
    lock_after: Annotated[int | None, typer.Option(help="Reuse the choice of the first n blocks.")] = None,
    half_life: Annotated[float | None, typer.Option(help="Tokens after which a weight is halved.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens to each side, with scope window.")] = None,
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
    with user_errors():
        from .checkpoint import calibrate_checkpoint
        from .routing import RoutingPolicy

        policy = policy_fields(routing, accumulate, lock_after, half_life, window, top_p, calibrated=True)
        options = {} if device_map is None else {"device_map": device_map}
        chosen = None if policy is None else RoutingPolicy.from_dict(policy)
        say(f"{folder}: is replaced when complete; the model first generates the text it is calibrated on")
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
    with user_errors():
        from .storage import read_safetensors
        from .upscaling import verify as run

        given = None if inputs is None else {tensor.name: tensor.load() for tensor in read_safetensors(inputs)}
        with progress() as advance:
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
    with user_errors():
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
    with user_errors():
        from .inspection import KEYS, describe, plot_layers, show
        from .publishing import check_outputs, write_report

        check_outputs([folder], KEYS, plot=plot, json=json_path)
        description = describe(folder)
        show(description, new_console(), table)
        if json_path:
            write_report(json_path, description)
        if plot:
            plot_layers(description, plot)


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
    with user_errors():
        from .analysis import Analysis
        from .analysis import analyze as run
        from .publishing import check_outputs

        check_outputs([base, *expert], Analysis.__dataclass_fields__, plot=plot, json=json_path)
        options: dict[str, Any] = {"include": include, "exclude": exclude, "workers": workers}
        with progress() as advance:
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
    with user_errors():
        from .checkpoint import load_pretrained
        from .publishing import check_outputs
        from .sweeping import Sweep, scoring_function
        from .sweeping import sweep as run

        check_outputs([folder, score.rpartition(":")[0]], Sweep.__dataclass_fields__, plot=plot, json=json_path)
        policies = {text: scope_or_fields(text) for text in routing} if routing else None
        function = scoring_function(score)
        options: dict[str, Any] = {} if device_map is None else {"device_map": device_map}
        model = load_pretrained(folder, **options)
        with progress() as advance:
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
    with user_errors():
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
            console=new_console(),
        )


@app.command()
def tune(
    shape: Annotated[list[str], typer.Option(help="IN_FEATURESxOUT_FEATURES or a named layer; repeatable.")],
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens per call.  [default: 1 4 16 64 512 2048]")] = None,
    num_local_experts: Annotated[int, typer.Option(help="N.")] = 8,
    rank_of_expert: Annotated[int, typer.Option(help="r.")] = 32,
    rank_of_router: Annotated[int, typer.Option(help="g.")] = 16,
    num_experts_per_tok: Annotated[int, typer.Option(help="m, experts per token.")] = 1,
    dtype: Annotated[str, typer.Option(help=f"{listed(DTYPES[:3])}.")] = "bfloat16",
) -> None:
    """Find the fastest launch configuration of the Triton kernels for given layers on this GPU and store it.

    \b
    Example:
      smile-kernels tune --shape 4096x4096 --shape 4096x14336 --rank-of-expert 64
    """
    with user_errors():
        import torch

        kind = dtype_of(torch, dtype, DTYPES[:3])
        if not torch.cuda.is_available():
            raise SmileError("device: torch sees no GPU here; expected one, to time launches on")
        from .benchmark.problems import layer_shape
        from .ops.triton import configs, tuning
        from .testing import Problem

        device = torch.device("cuda")
        layers = [layer_shape(name) for name in shape]
        console = new_console(stderr=True)
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
    with user_errors():
        import torch

        from .doctor import show_backends, show_machine
        from .doctor import verify as run
        from .ops import excluded
        from .publishing import check_outputs

        console = new_console()
        device_types = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
        if report is not None and not verify:
            raise SmileError(f"report: is {str(report)!r} without verify; expected --verify, whose results it gets")
        check_outputs(keys=("cpu", "cuda"), report=report)
        if forget:
            for device_type in device_types:
                excluded.record(excluded.device_name(device_type), {})
        failed = run(device_types, report, console) if verify else False
        show_machine(console)
        for device_type in device_types:
            show_backends(device_type, console)
    if failed:
        raise typer.Exit(1)
