"""Several models on several tasks: what is there is read, what is missing is sampled, all is graded and summed up.

subjects x tasks -> Evaluation (settings, hash, files)
  -> the same model on the same task under two runs is sampled once
  -> models that differ in their weights alone take turns in one vLLM (engine.py, worker.py)
  -> graded (tasks.py) -> parquet (store.py) -> numbers (summary.py) -> JSON beside it
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep import functions
from klreg_verl.evaluation import engine, store, subjects, summary, tasks
from klreg_verl.evaluation.store import Rows, Store
from klreg_verl.evaluation.subjects import Note, Subject
from klreg_verl.evaluation.tasks import Reward, Task
from klreg_verl.evaluation.worker import Job, Order
from klreg_verl.experiment import provenance
from klreg_verl.experiment.store import atomic_write, write_json


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are drawn."""

    samples: int = 16
    """Per prompt."""
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 1024
    seed: int = 1
    prompts: int | None = None
    """Only the first so many of a task."""

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("max_tokens", 1), ("temperature", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} cannot work: at least {least}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is no share of the probability. Give more than 0, at most 1.")
        if self.prompts is not None and self.prompts < 1:
            raise ValueError(f"prompts={self.prompts} leaves nothing to evaluate. Give at least 1.")
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(f"{self.samples} greedy samples (temperature 0) are all the same. Ask for 1.")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What vLLM runs on."""

    platform: str
    """cpu or cuda."""
    tensor_parallel: int = 1
    memory_share: float = 0.9
    """Of a GPU's memory."""
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One model on one task."""

    subject: Subject
    task: Task
    sampling: Sampling
    model: Path
    asked: Rows
    """The task's rows (tasks.read)."""
    settings: dict[str, Any]
    """What decides samples and grades; hashed."""

    @property
    def store(self) -> Store:
        return Store(folder=self.subject.evals, stem=store.stem(self.subject.step, self.task.name, self.settings))

    @property
    def hash(self) -> str:
        """The same for the same model, task and settings, in whatever run it lies."""
        return store.content_hash(self.settings)

    @property
    def job(self) -> Job:
        return Job(
            model=str(self.model),
            data=str(self.task.file),
            parts=str(self.store.parts),
            prompts=len(self.asked),
            **{name: getattr(self.sampling, name) for name in _SAMPLED},
        )


_SAMPLED = ("samples", "temperature", "top_p", "max_tokens", "seed")


def evaluate(
    models: Sequence[Subject],
    wanted: Sequence[Task],
    sampling: Sampling,
    machine: Machine,
    *,
    ks: Sequence[int] | None = None,
    note: Note,
) -> list[list[dict[str, Any]]]:
    """The records of every task, a list a task, in the order of the models.

    Each model is compared with the start of its run, or else with the first start among `models`.

    Raises:
        ValueError: something given cannot work.
        RuntimeError: vLLM failed; what it sampled is kept.
    """
    _check_ks(ks, sampling.samples)
    graders = [Grader(reward=tasks.reward_function(task), source=reward_hash(task)) for task in wanted]
    folders = {subject.path: subject.folder(note) for subject in models}
    hashes = {path: subjects.model_hash(folder) for path, folder in folders.items()}
    planned = [
        [_evaluation(subject, task, sampling, folders[subject.path], hashes[subject.path]) for subject in models]
        for task in wanted
    ]
    every = [one for row in planned for one in row]
    for one in every:
        one.store.folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as locks:
        missing = [one for one in _once(every) if not _take_over(one, every)]
        for one in missing:
            locks.enter_context(one.store.lock())
        sample([one for one in missing if not one.store.table.is_file()], machine, note)
        for row, grader in zip(planned, graders, strict=True):
            for one in row:
                finish(one, every, grader, note)
    return [_records(row, ks) for row in planned]


def _evaluation(subject: Subject, task: Task, sampling: Sampling, folder: Path, model_hash: str) -> Evaluation:
    asked = tasks.read(task, sampling.prompts)
    settings = {
        "model": model_hash,
        "data": provenance.hash_path(task.file),
        "prompts": len(asked),
        "reward": task.reward,
        **({"options": dict(task.options)} if task.options else {}),
        **{name: getattr(sampling, name) for name in _SAMPLED},
    }
    return Evaluation(subject=subject, task=task, sampling=sampling, model=folder, asked=asked, settings=settings)


def _check_ks(ks: Sequence[int] | None, samples: int) -> None:
    for k in ks or ():
        if not 1 <= k <= samples:
            raise ValueError(
                f"k={k} with {samples} samples of a prompt says nothing. Give 1 to {samples}, or sample more."
            )


def _once(every: Sequence[Evaluation]) -> list[Evaluation]:
    """The first one of each hash."""
    first: dict[str, Evaluation] = {}
    for one in every:
        first.setdefault(one.hash, one)
    return list(first.values())


def _take_over(one: Evaluation, every: Sequence[Evaluation]) -> bool:
    """Whether it is there, here or under another run, from where it is copied."""
    if one.store.table.is_file():
        return True
    places = [other.store.table for other in every if other.hash == one.hash]
    found = next((path for path in places if path.is_file()), None)
    if found is not None:
        atomic_write(one.store.table, found.read_bytes())
    return found is not None


# ---------------------------------------------------------------------------------------------------- sampling


def sample(wanted: Sequence[Evaluation], machine: Machine, note: Note) -> None:
    """Draw what is missing of these into their parts, under their locks: one vLLM for all models of one frame."""
    frames: dict[str, list[Evaluation]] = {}
    for one in wanted:
        if _missing(one):
            frames.setdefault(subjects.frame_hash(one.model), []).append(one)
    for group in frames.values():
        _sample_together(group, machine, note)


def _missing(one: Evaluation) -> int:
    return len(store.missing(store.read_parts(one.store.parts), len(one.asked), one.sampling.samples))


def _sample_together(group: Sequence[Evaluation], machine: Machine, note: Note) -> None:
    order = Order(
        jobs=tuple(one.job for one in group),
        platform=machine.platform,
        tensor_parallel=machine.tensor_parallel,
        memory_share=machine.memory_share,
        trust_remote_code=machine.trust_remote_code,
    )
    left = [_missing(one) for one in group]

    def tell(message: dict[str, Any]) -> None:
        if message["event"] == "ready":
            note(f"vLLM is up after {message['seconds']:.0f} s")
        if message["event"] == "sampled":
            left[message["job"]] -= message["new"]
            one = group[message["job"]]
            total = len(one.asked) * one.sampling.samples
            note(f"{one.subject.name}, {one.task.name}: {total - left[message['job']]} of {total} samples")

    total, here = sum(len(one.asked) * one.sampling.samples for one in group), sum(left)
    note(f"starting vLLM for {len(group)} evaluations: {here} samples to draw, {total - here} are there")
    log = group[0].store.parts / "log"
    engine.run(order, log, tell)


# ---------------------------------------------------------------------------------------------------- grading


@dataclass(frozen=True, kw_only=True)
class Grader:
    """What grades the samples of a task."""

    reward: Reward
    source: str
    """reward_hash."""


def finish(one: Evaluation, every: Sequence[Evaluation], grader: Grader, note: Note) -> None:
    """Write the table of an evaluation whose samples are there; grade anew what another version graded."""
    settings = one.settings | {"reward_source": grader.source}
    if not one.store.table.is_file() and not _take_over(one, every):
        drawn = store.read_parts(one.store.parts)
        note(f"{one.subject.name}, {one.task.name}: grading {len(drawn)} responses")
        one.store.finish(_graded(drawn, one, grader), settings)
        return
    rows, there = one.store.read()
    if there.get("reward_source") != grader.source:
        note(f"{one.subject.name}, {one.task.name}: the reward has changed, {len(rows)} responses are graded anew")
        drawn = [{name: row[name] for name in store.SAMPLE_COLUMNS} for row in rows]
        one.store.finish(_graded(drawn, one, grader), settings)


def _graded(drawn: Rows, one: Evaluation, grader: Grader) -> Rows:
    return tasks.with_right([tasks.graded(row, one.asked[row["prompt"]], grader.reward) for row in drawn])


def reward_hash(task: Task) -> str:
    """sha256 of the source of a reward: the files of the module that it is named in and of the one that it comes from,
    and beside the first a package `grading` and `golden`, which this project's own reads with."""
    function, named = functions.load(task.reward, *task.folders), task.reward.partition(":")[0]
    modules = [sys.modules.get(name) for name in (named, getattr(function, "__module__", named))]
    paths = [Path(file) for module in modules if (file := getattr(module, "__file__", None))]
    beside = [*sorted((paths[0].parent / "grading").glob("*.py")), paths[0].parent / "golden.py"] if paths else []
    files = dict.fromkeys(path for path in (*paths, *beside) if path.is_file())
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


# ---------------------------------------------------------------------------------------------------- numbers


def _records(row: Sequence[Evaluation], ks: Sequence[int] | None) -> list[dict[str, Any]]:
    """The evaluations of one task with their numbers, pass@k and maj@k of these ks.

    What is written beside a table depends neither on the ks (it has 1, 2, 4, ... and n) nor on a call that compares
    nothing (it keeps what it was compared with before).
    """
    tables = {one.hash: one.store.read() for one in row}
    if any(summary.is_graded(rows) for rows, _ in tables.values()):  # one of the models may have had zeros alone
        unmarked = {"valid": None}
        tables = {key: ([each | unmarked for each in rows], about) for key, (rows, about) in tables.items()}
    records = []
    for one in row:
        rows, settings = tables[one.hash]
        base = _base(one, row)
        change = {} if base is None else {"against": _against(one, base, rows, tables[base.hash][0])}
        numbers = {**_facts(one, settings), **summary.summarize(rows), "metrics": summary.metrics(rows, one.task.name)}
        write_json(one.store.numbers, numbers | (change or _compared_before(one, settings)))
        subsets = summary.of_subsets(rows, ks) if ks and not summary.is_graded(rows) else {}
        records.append(numbers | subsets | change)
    return records


def _compared_before(one: Evaluation, settings: dict[str, Any]) -> dict[str, Any]:
    """`against` of the record that is there, if that is of the same grades."""
    record = json.loads(one.store.numbers.read_text()) if one.store.numbers.is_file() else {}
    same = record.get("reward_source") == settings.get("reward_source")
    return {"against": record["against"]} if same and "against" in record else {}


def _base(one: Evaluation, row: Sequence[Evaluation]) -> Evaluation | None:
    """What a model is compared with: the start of its own run, else the first start there is."""
    starts = [other for other in row if other.subject.is_start]
    own = [other for other in starts if one.subject.run is not None and other.subject.evals == one.subject.evals]
    found = next(iter([*own, *starts]), None)
    return None if found is None or found.subject.path == one.subject.path else found


def _against(one: Evaluation, base: Evaluation, rows: Rows, start: Rows) -> dict[str, Any]:
    return {"subject": base.subject.name, "hash": base.hash, **summary.against(rows, start)}


def _facts(one: Evaluation, settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "subject": one.subject.name,
        "step": one.subject.step,
        "is_start": one.subject.is_start,
        "task": one.task.name,
        "file": one.store.table.name,
        "hash": one.hash,
        "model": {"path": str(one.model), "sha256": one.settings["model"]},
        "data": {"path": str(one.task.file), "sha256": one.settings["data"]},
        "reward": one.task.reward,
        "options": dict(one.task.options),
        "reward_source": settings.get("reward_source"),
        **{name: getattr(one.sampling, name) for name in _SAMPLED if name != "samples"},
    }
