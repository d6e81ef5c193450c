"""The study: fine-tune one small language model on six tasks, fuse the adapters by each method, count right answers."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

import smile_kernels as sk
from smile_kernels.publishing import write_text

from .. import report as shared
from ..data import cache_folder, new_folder
from ..report import Step
from . import report
from .case import Case
from .evaluate import Question, correct, generate, own_expert_by_block, time_per_token
from .methods import METHODS, Method
from .model import SMOLLM2, Example, Recipe, base_folder, chat, examples, finetuned_folder
from .tasks import TASKS, Task

VALIDATION = 12  # rows per task for choosing the scales of merged models
TEXTS = 32  # per task for methods of merging that need training or test texts
PICTURED = 2  # rows per task for the share of tokens at their own expert
FULL = ("adjective", "town")  # tasks that are also fine-tuned in full
FULL_RANK = 64  # of experts that are full fine-tunes
MOST_PROCESSES = 4  # each has a few models in memory: about 4 GB
MOST_WITH_DATA = 2  # where methods of merging also keep statistics of every fine-tune: up to 9 GB


def ignored(what: str, done: int, total: int) -> None:
    """A `Step` that shows nothing."""


@dataclass(frozen=True)
class Size:
    """The size of the study.

    Attributes:
        seeds: adapters per task.
        rows: test rows per task.
        few_rows: those of the methods that are not essential; with 0 these methods are skipped.
        conversations: of two turns, over all pairs of tasks.
        full: whether the tasks of FULL are also fine-tuned in full.
    """

    seeds: int = 1
    rows: int = 20
    few_rows: int = 0
    conversations: int = 30
    full: bool = False


class Study:
    """The tasks' rows, and the fine-tunes of every seed, in a cache folder."""

    def __init__(self, tasks: Sequence[Task], cache: Path):
        self.tasks, self.cache, self.recipe = tasks, cache, Recipe()
        self.full, self.rank_of_full = FULL, FULL_RANK
        self.cases: dict[tuple[int, bool], Case] = {}  # the last one: it holds several models
        every = {"train": 10**6, "validation": 10**6, "test": 10**6}
        self.splits = [task.splits(cache / "packages", every) for task in tasks]
        self.base = base_folder(cache / "packages", cache / "language_model" / "base")

    def examples(self, split: str, rows: int) -> list[list[Example]]:
        """The first rows of a split, task by task."""
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        return [examples(tokenizer, task, splits[split][:rows]) for task, splits in zip(self.tasks, self.splits)]

    def is_full(self, task: Task, full: bool) -> bool:
        return full and task.name in self.full

    def finetuned(self, task: int, seed: int, full: bool = False, step: Step = ignored) -> Path:
        """Folder of the task's adapter, or of its full fine-tune if it is one of FULL. It is trained if not cached."""
        of, whole = self.tasks[task], self.is_full(self.tasks[task], full)
        options = (self.base, self.cache / "language_model" / "finetuned", of, self.splits[task]["train"], self.recipe)
        return finetuned_folder(*options, seed, partial(step, of.name), full=whole)

    def case(self, seed: int, full: bool = False) -> Case:
        """The fine-tunes of a seed, full ones for the tasks of FULL with `full`, and the other inputs of merging."""
        if (seed, full) not in self.cases:
            folders = [self.finetuned(i, seed, full) for i in range(len(self.tasks))]
            validation = [example for of in self.examples("validation", VALIDATION) for example in of]
            prompts = [[prompt for prompt, _ in of] for of in self.examples("test", TEXTS)]
            texts = validation, self.examples("train", TEXTS), prompts
            rank = {"rank_of_expert": self.rank_of_full} if full else {}
            self.cases = {(seed, full): Case(self.base, folders, *texts, **rank)}
        return self.cases[seed, full]

    def answers(self, method: Method, case: Case) -> Path:
        """The file of a method's answers; its name depends on the fine-tunes and on the code that answers."""
        decides = json.dumps([[str(f) for f in case.finetuned], torch.__version__, transformers.__version__])
        digest = hashlib.sha256(decides.encode())
        here, library = Path(__file__).parent, Path(sk.__file__).parent
        sources = [here / f"{name}.py" for name in ("case", "evaluate", "merging", "methods")]
        sources += [here.parent / "merge.py", here.parent / "vote.py"]
        for source in [*sources, *(sorted(library.rglob("*.py")) if method.routed else [])]:
            digest.update(source.read_bytes())
        return self.cache / "language_model" / "answers" / digest.hexdigest()[:16] / f"{method.name}.json"

    def questions(self, rows: int) -> list[Question]:
        """The first `rows` test rows of every task, each a conversation of one turn."""
        return [
            Question((task.user_turn(text),), i, answer)
            for i, (task, split) in enumerate(zip(self.tasks, self.splits))
            for text, answer in split["test"][:rows]
        ]

    def conversations(self, count: int) -> list[Question]:
        """About `count` conversations of two turns, every ordered pair of tasks equally often: the second is answered.

        The first turn is a validation row with its right answer, the second a test row.
        """
        n = len(self.tasks)
        rows = (n - 1) * round(count / n / (n - 1))
        found = []
        for j, (task, split) in enumerate(zip(self.tasks, self.splits)):
            for k, (text, answer) in enumerate(split["test"][:rows]):
                i = (j + 1 + k % (n - 1)) % n
                first, first_answer = self.splits[i]["validation"][k]
                found.append(Question((self.tasks[i].user_turn(first), first_answer, task.user_turn(text)), j, answer))
        return found


def answer_all(
    method: Method, case: Case, questions: Sequence[Question], path: Path, step: Step
) -> tuple[list[str], dict]:
    """The method's answers to `questions`, and its details; answers in `path` are not generated again.

    `path` is written after each task, so that an interrupted run resumes.
    """
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"answers": {}}
    known: dict[str, str] = stored["answers"]
    keys = ["\n\n".join(q.turns) for q in questions]
    tasks = sorted({q.task for q, key in zip(questions, keys) if key not in known})
    if tasks:
        step(method.name, 0, len(tasks))
        contender = method.build(case)
        stored["details"] = contender.details
    for done, i in enumerate(tasks):
        step(method.name, done, len(tasks))
        missing = [(key, q) for key, q in zip(keys, questions) if q.task == i and key not in known]
        for turns in {len(q.turns) for _, q in missing}:  # conversations of different lengths are batched separately
            part = [(key, q) for key, q in missing if len(q.turns) == turns]
            with contender.for_task(i) as model:
                known.update(zip([key for key, _ in part], generate(model, case.tokenizer, [q for _, q in part])))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(stored))
    return [known[key] for key in keys], stored["details"]


def right_by_task(tasks: Sequence[Task], questions: Sequence[Question], answers: Sequence[str]) -> dict[str, str]:
    """For every task, one character per question: 1 if its answer is right, otherwise 0."""
    right = {task.name: "" for task in tasks}
    for question, answer in zip(questions, answers):
        right[tasks[question.task].name] += str(int(correct(question, answer)))
    return right


@dataclass(frozen=True)
class Run:
    """A method that answers a study's questions, with the fine-tunes of one seed."""

    method: str
    seed: int
    full: bool = False

    def questions(self, study: Study, size: Size) -> tuple[list[Question], list[Question]]:
        """Those of one turn and of two."""
        method = named(self.method)
        single = study.questions(size.rows if method.essential else size.few_rows)
        if self.full:
            return [q for q in single if study.is_full(study.tasks[q.task], True)], []
        return single, study.conversations(size.conversations) if method.turns else []

    def answers(self, study: Study, size: Size, step: Step = ignored) -> tuple[list[str], dict]:
        single, double = self.questions(study, size)
        method, case = named(self.method), study.case(self.seed, self.full)
        return answer_all(method, case, single + double, study.answers(method, case), step)


def named(name: str) -> Method:
    return next(method for method in METHODS if method.name == name)


def runs(size: Size) -> Iterator[Run]:
    """All jobs: variants run only with the first seed."""
    for seed in range(size.seeds):
        for method in METHODS:
            if method.essential or (size.few_rows and (seed == 0 or not method.variant)):
                yield Run(method.name, seed)
    if size.full:
        yield from (Run(method.name, 0, full=True) for method in METHODS if method.full)


def prepare(study: Study, size: Size, step: Step) -> None:
    """Fine-tune and answer, except for cached results, with one thread per process and about one process per core.

    For so small a model, a second thread saves little time.
    """
    kinds = [(i, seed, False) for seed in range(size.seeds) for i in range(len(study.tasks))]
    kinds += [(i, 0, True) for i, task in enumerate(study.tasks) if size.full and study.is_full(task, True)]
    context = multiprocessing.get_context("spawn")
    told = context.SimpleQueue()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(MOST_WITH_DATA if size.few_rows else MOST_PROCESSES, cores)
    with ProcessPoolExecutor(workers, context, _begin, (study, size, told)) as pool:
        for what, job, arguments in (
            ("fine-tuning", _finetune, kinds),
            ("answers", _answer, [(run,) for run in runs(size)]),
        ):
            shares = [0.0] * len(arguments)
            waiting = [pool.submit(job, i, *given) for i, given in enumerate(arguments)]
            while waiting:
                done, pending = wait(waiting, 0.5)
                for one in done:
                    one.result()
                while not told.empty():
                    i, share = told.get()
                    shares[i] = share
                step(what, int(sum(shares)), len(shares))
                waiting = list(pending)


_worker: tuple[Study, Size, multiprocessing.SimpleQueue]  # in a process of the pool


def _begin(study: Study, size: Size, told: multiprocessing.SimpleQueue) -> None:
    global _worker
    _worker = study, size, told
    torch.set_num_threads(1)


def _finetune(job: int, task: int, seed: int, full: bool) -> None:
    study, _, told = _worker
    study.finetuned(task, seed, full, lambda what, done, total: told.put((job, done / total)))
    told.put((job, 1.0))


def _answer(job: int, run: Run) -> None:
    study, size, told = _worker
    run.answers(study, size, lambda what, done, total: told.put((job, done / total)))
    told.put((job, 1.0))


def measure(study: Study, size: Size) -> tuple[dict[str, dict], dict | None]:
    """{method: {"right": {task: [one string a seed]}, "turns": the same of conversations, "details": [one a seed]}}.

    With `size.full`, also that of the full fine-tunes, truncated, and the other tasks' adapters as experts.
    """
    found: dict[bool, dict[str, dict]] = {False: {}, True: {}}
    for run in runs(size):
        answers, details = run.answers(study, size)
        single, double = run.questions(study, size)
        entry = found[run.full].setdefault(run.method, {"right": {}, "turns": {}, "details": []})
        entry["details"].append(details)
        for what, questions, given in (
            ("right", single, answers[: len(single)]),
            ("turns", double, answers[len(single) :]),
        ):
            for task, right in right_by_task(study.tasks, questions, given).items():
                if right:
                    entry[what].setdefault(task, []).append(right)
    full = {"rank_of_expert": study.rank_of_full, "methods": found[True]} if size.full else None
    return found[False], full


def picture(study: Study, case: Case, step: Step) -> dict[str, list[list[float]]]:
    """{method: share of answer tokens at their own expert, [block][task]} of the methods to be drawn."""
    drawn = [method for method in METHODS if method.pictured]
    shares = {}
    for done, method in enumerate(drawn):
        step("tokens at their own expert", done, len(drawn))
        model = method.build(case).model
        shares[method.name] = own_expert_by_block(model, case.tokenizer, study.questions(PICTURED))
    return shares


def timings(study: Study, case: Case, step: Step) -> list[dict]:
    """Time to process a prompt and per generated token, relative to the plain model."""
    step("time per token", 0, 1)
    models = {method.name: method.build(case).model for method in METHODS if method.timed}
    prompt = chat(case.tokenizer, study.questions(1)[0].turns)
    return time_per_token({"plain model" if n == "base" else n: m for n, m in models.items()}, prompt)


def save(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the model and its tokenizer; `folder` is replaced when they are complete."""
    with new_folder(folder) as whole:
        sk.save_pretrained(model, whole)
        tokenizer.save_pretrained(whole)


def study(
    size: Size,
    tasks: Sequence[Task] = tuple(TASKS),
    cache: Path | None = None,
    out: Path | None = None,
    json_path: Path | None = None,
    plot: Path | None = None,
) -> dict:
    """Fine-tune SmolLM2-135M on every task, fuse the adapters by each method, and compare the answers.

    Args:
        size: the size of the study.
        tasks: the tasks, two or more.
        cache: folder for packages, fine-tunes and answers; default: the user's cache folder.
        out: where the fused model is saved, under the recommended policy; default: in the cache.
        json_path: also write the results there.
        plot: also draw them there (.png, .svg or .pdf).

    Returns:
        The results, as in the JSON file.

    Raises:
        ValueError: a size out of range.
        RuntimeError: a package cannot be downloaded, or is not the expected one.
    """
    for name, least in (("seeds", 1), ("rows", 2), ("few_rows", 0), ("conversations", 0)):
        if getattr(size, name) < least:
            raise ValueError(f"{name}: is {getattr(size, name)}; expected {least} or more")
    start = time.perf_counter()
    cache = cache_folder(cache)
    folder = out or cache / "language_model" / "fused"
    if out and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: is {out}, which holds something; expected a new or empty folder")
    with shared.progress() as step:
        step("tasks and base model", 0, 1)
        loaded = Study(tasks, cache)
        prepare(loaded, size, step)
        found, full = measure(loaded, size)
        case = loaded.case(0)
        shares = picture(loaded, case, step)
        times = timings(loaded, case, step)
        step("saving the fused model", 0, 1)
        save(next(m for m in METHODS if m.name == "recommended").build(case).model, case.tokenizer, folder)
        step("verify", 0, 1)
        verdict = shared.check(sk.verify(folder, case.base, case.finetuned, progress=partial(step, "verify")))
    plain = sum(p.numel() for p in case.model.parameters())
    results = {
        "machine": shared.machine(),
        "model": f"SmolLM2-135M-Instruct ({SMOLLM2.name} {SMOLLM2.version}), {loaded.recipe.dtype}, {plain} parameters",
        "recipe": asdict(loaded.recipe),
        "size": asdict(size),
        "tasks": [
            {
                "name": task.name,
                "instruction": task.instruction,
                "source": task.source,
                "train": len(split["train"]),
                "example": list(split["test"][0]),
            }
            for task, split in zip(loaded.tasks, loaded.splits)
        ],
        **report.summarise(found, full, plain),
        "own_expert": shares,
        "time": times,
    }
    shared.show(report.tables(results)[1:])  # instructions are in the documentation
    print(f"{time.perf_counter() - start:.0f} s in all")
    shared.write(results, json_path, plot, report.draw)
    print(f"verify, each expert forced against its fine-tuned model: {verdict}")
    print(f"smile-kernels chat {folder}", f"vllm serve {folder} & vllm chat", sep="\n")
    return results
