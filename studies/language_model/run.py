"""The study: fine-tune one small language model on six tasks, fuse the adapters in every way, count right answers."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

import smile_kernels as sk
from smile_kernels.publishing import write_text

from .. import report as shared
from ..data import new_folder
from ..report import Step
from . import report
from .evaluate import Question, correct, generate, own_expert_by_block, time_per_token
from .methods import METHODS, Case, Method
from .model import SMOLLM2, Recipe, base_folder, chat, examples, finetuned_folder
from .tasks import TASKS, Task

VALIDATION = 12  # rows a task by which the scales of merged models are chosen
PICTURED = 2  # rows a task that are read for the share of tokens at their own expert
FULL = ("adjective", "town")  # tasks that are also fine-tuned in full
FULL_RANK = 64  # of experts that are full fine-tunes


@dataclass(frozen=True)
class Size:
    """How much is run.

    Attributes:
        seeds: how many adapters a task.
        rows: test rows a task.
        few_rows: those of the methods that are not essential; 0 leaves these methods out.
        conversations: of two turns, over all pairs of tasks.
        full: whether the tasks of FULL are also fine-tuned in full.
    """

    seeds: int = 1
    rows: int = 50
    few_rows: int = 25
    conversations: int = 60
    full: bool = True


class Study:
    """The tasks' rows, and the fine-tunes of every seed, in a cache folder."""

    def __init__(self, tasks: Sequence[Task], cache: Path):
        self.tasks, self.cache, self.recipe = tasks, cache, Recipe()
        every = {"train": 10**6, "validation": 10**6, "test": 10**6}
        self.splits = [task.splits(cache / "packages", every) for task in tasks]
        self.base = base_folder(cache / "packages", cache / "language_model" / "base")

    @cached_property
    def validation(self) -> list[tuple[list[int], list[int]]]:
        tokenizer = AutoTokenizer.from_pretrained(self.base)
        rows = zip(self.tasks, self.splits)
        return [e for task, split in rows for e in examples(tokenizer, task, split["validation"][:VALIDATION])]

    def finetuned(self, seed: int, step: Step, full: bool = False) -> list[Path]:
        """Each task's adapter; with `full`, the tasks of FULL as full fine-tunes. What is not cached is trained."""
        folders = []
        for task, split in zip(self.tasks, self.splits):
            whole = full and task.name in FULL
            kind = f"{task.name}, {'full fine-tune' if whole else 'adapter'}, seed {seed}"
            options = (self.base, self.cache / "language_model" / "finetuned", task, split["train"], self.recipe, seed)
            folders.append(finetuned_folder(*options, lambda done, of, kind=kind: step(kind, done, of), full=whole))
        return folders

    def answers(self, method: Method, case: Case) -> Path:
        """The file of a method's answers: another one where the fine-tunes or the code that makes answers differ."""
        decides = json.dumps([[str(f) for f in case.finetuned], torch.__version__, transformers.__version__])
        digest = hashlib.sha256(decides.encode())
        here, library = Path(__file__).parent, Path(sk.__file__).parent
        sources = [here / "methods.py", here / "evaluate.py", here.parent / "merge.py"]
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
    """The method's answers to `questions`, and its details; answers that `path` holds are not generated again.

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
        for turns in {len(q.turns) for _, q in missing}:  # conversations of different lengths are batched apart
            part = [(key, q) for key, q in missing if len(q.turns) == turns]
            with contender.for_task(i) as model:
                known.update(zip([key for key, _ in part], generate(model, case.tokenizer, [q for _, q in part])))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(stored))
    return [known[key] for key in keys], stored["details"]


def right_by_task(tasks: Sequence[Task], questions: Sequence[Question], answers: Sequence[str]) -> dict[str, str]:
    """For every task, one character a question: 1 where its answer is right, 0 where it is not."""
    right = {task.name: "" for task in tasks}
    for question, answer in zip(questions, answers):
        right[tasks[question.task].name] += str(int(correct(question, answer)))
    return right


def measure(study: Study, chosen: Sequence[Method], size: Size, step: Step) -> dict[str, dict]:
    """{method: {"right": {task: [one string a seed]}, "turns": the same of conversations, "details": [one a seed]}}."""
    found: dict[str, dict] = {}
    for seed in range(size.seeds):
        case = Case(study.base, study.finetuned(seed, step), study.validation)
        for method in chosen:
            if not method.essential and (seed or not size.few_rows):
                continue
            single = study.questions(size.rows if method.essential else size.few_rows)
            double = study.conversations(size.conversations) if method.turns else []
            answers, details = answer_all(method, case, single + double, study.answers(method, case), step)
            entry = found.setdefault(method.name, {"right": {}, "turns": {}, "details": []})
            entry["details"].append(details)
            for what, questions, given in (
                ("right", single, answers[: len(single)]),
                ("turns", double, answers[len(single) :]),
            ):
                for task, right in right_by_task(study.tasks, questions, given).items():
                    if questions:
                        entry[what].setdefault(task, []).append(right)
    return found


def full_fine_tunes(study: Study, step: Step, rows: int) -> dict:
    """Full fine-tunes, truncated, and the other tasks' adapters as experts: right answers on the tasks of FULL."""
    case = Case(study.base, study.finetuned(0, step, full=True), study.validation, rank_of_expert=FULL_RANK)
    questions = [q for q in study.questions(rows) if study.tasks[q.task].name in FULL]
    found = {}
    for method in METHODS:
        if method.full:
            answers, details = answer_all(method, case, questions, study.answers(method, case), step)
            right = right_by_task(study.tasks, questions, answers)
            found[method.name] = {"right": {task: [right[task]] for task in FULL}, "details": [details]}
    return {"rank_of_expert": FULL_RANK, "methods": found}


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
    """Write the model and its tokenizer; `folder` is replaced when they are whole."""
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
    methods: Sequence[Method] = tuple(METHODS),
) -> dict:
    """Fine-tune SmolLM2-135M on every task, fuse the adapters in every way, and compare the answers.

    Args:
        size: how much is run.
        tasks: the tasks, two or more.
        cache: folder for packages, fine-tunes and answers; default: the user's cache folder.
        out: where the fused model is saved, under the recommended policy; default: in the cache.
        json_path: also write the results there.
        plot: also draw them there (.png, .svg or .pdf).
        methods: the rows of the table; "base", "individual" and "recommended" are among them.

    Returns:
        The results, as in the JSON file.

    Raises:
        ValueError: a size out of range.
        RuntimeError: a package cannot be downloaded, or is not the one that is expected.
    """
    for name, least in (("seeds", 1), ("rows", 2), ("few_rows", 0), ("conversations", 0)):
        if getattr(size, name) < least:
            raise ValueError(f"{name}: is {getattr(size, name)}; expected {least} or more")
    start = time.perf_counter()
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "smile_kernels"
    folder = out or cache / "language_model" / "fused"
    if out and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: is {out}, which holds something; expected a new or empty folder")
    with shared.progress() as step:
        step("tasks and base model", 0, 1)
        loaded = Study(tasks, cache)
        found = measure(loaded, methods, size, step)
        case = Case(loaded.base, loaded.finetuned(0, step), loaded.validation)
        shares = picture(loaded, case, step)
        times = timings(loaded, case, step)
        full = full_fine_tunes(loaded, step, size.rows) if size.full else None
        step("saving the fused model", 0, 1)
        save(next(m for m in METHODS if m.name == "recommended").build(case).model, case.tokenizer, folder)
        step("verify", 0, 1)
        verdict = shared.check(sk.verify(folder, case.base, case.finetuned, progress=partial(step, "verify")))
    plain = sum(p.numel() for p in case.model.parameters())
    results = {
        "machine": shared.machine(),
        "model": f"SmolLM2-135M-Instruct ({SMOLLM2.name} {SMOLLM2.version}), bfloat16, {plain} parameters",
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
    shared.show(report.tables(results)[1:])  # the instructions are left to the documentation
    print(f"{time.perf_counter() - start:.0f} s in all")
    shared.write(results, json_path, plot, report.draw)
    print(f"verify, each expert forced against its fine-tuned model: {verdict}")
    print(f"smile-kernels chat {folder}", f"vllm serve {folder} & vllm chat", sep="\n")
    return results
