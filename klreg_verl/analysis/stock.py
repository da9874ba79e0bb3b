"""Runs of verl without this package's hooks, made into run folders, so that they get the same report.

What is read, wherever it lies below the given folder, and told apart by what it holds: verl's file logger and its
TensorBoard log (`stock_logs`), its dumps of responses (`stock_dumps`). Each experiment is an arm of its own.

verl does not measure the KL of every arm. What it logs of a KL term keeps a name of its own and is not compared with
kl_ref/*, which is a mean over whole responses.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from klreg_verl.analysis import stock_dumps, stock_logs
from klreg_verl.analysis.runs import run_folders
from klreg_verl.analysis.stock_dumps import Dump, Step
from klreg_verl.analysis.stock_logs import Log

FOLDER = "klreg-report"
"""Where the run folders and their report go, below the given folder."""
ARM = "stock"
"""The arm of a folder with one run."""
NAMES = {
    "critic/score/mean": "train/score",
    "critic/rewards/mean": "reward/penalized",
    "actor/entropy": "entropy/token",
    "actor/entropy_loss": "entropy/token",
    "response_length/mean": "response/length",
    "response_length/clip_ratio": "response/truncated",
    "timing_s/step": "time/step_s",
    "actor/kl_loss": "stock/kl_loss",
    "actor/reward_kl_penalty": "stock/kl_reward",
    "critic/kl": "stock/kl_reward",
}
"""verl's key, in this or an earlier version -> ours, where both measure the same; all of verl's keys are kept, too."""
VALIDATED = re.compile(r"val-core/(?P<source>.+)/(?P<what>acc|reward|score)/mean@\d+|val/test_score/(?P<older>.+)")
MATCHES = 1e-3
"""Relative difference up to which the mean score of a dump is the one that a log has of that step."""
PROBED = 20
"""Lines of a file that are looked at to see what it is."""
STATEMENT = (
    "A stock verl run: its folder does not say which gradient its KL term followed. `klreg doctor --verl` judges the "
    "functions that verl has for it."
)


@dataclass(frozen=True, kw_only=True)
class Imported:
    """The folder with the run folders, and what reading left out or had to guess, a sentence each."""

    folder: Path
    notes: tuple[str, ...]


@dataclass(kw_only=True)
class _Run:
    """What belongs to one run."""

    name: str
    log: Log | None = None
    dumps: list[Dump] = field(default_factory=list)

    def steps(self, kind: stock_dumps.Kind) -> dict[int, Step]:
        return {step: each for dump in self.dumps if dump.kind == kind for step, each in dump.steps.items()}


def is_stock(folder: Path) -> bool:
    """Whether the folder has verl's own output and no run folders."""
    if not folder.is_dir() or any(True for child in _children(folder) for _ in run_folders(child, 1)):
        return False
    return any(kind is not None for kind in map(_kind_of_file, _files(folder)))


def import_run(folder: Path) -> Imported:
    """Writes FOLDER with a run folder for each run in it, anew each time.

    Raises:
        ValueError: nothing can be read, or it cannot be told which of the dumps are validations, or of which run.
            Nothing is written then.
    """
    files = {path: _kind_of_file(path) for path in _files(folder)}
    logs = stock_logs.read_logs((path for path, kind in files.items() if kind == "log"), folder)
    dumps = stock_dumps.read_dumps((path for path, kind in files.items() if kind == "dump"), folder)
    notes = [note for log in logs for note in log.notes] + [note for dump in dumps for note in _left_out(dump)]
    dumps, guessed = _settled(dumps, logs)
    runs = _named(_runs(logs, dumps))
    if not runs:
        raise ValueError("\n".join([f"There are no runs in {folder}: its logs hold no numbers.", *notes]))
    for run in runs:
        if clash := stock_dumps.twice(run.dumps):
            raise ValueError(f"{clash}. Report on the folder of one run at a time.")
    if len(runs) > 1:
        notes.append(f"There are {len(runs)} runs here: {', '.join(run.name for run in runs)}.")
    target = folder / FOLDER
    _clear(target)
    cut = [each for run in runs for each in _write(target, run)]
    return Imported(folder=target, notes=(*notes, *guessed, *cut))


def _clear(target: Path) -> None:
    """The run folders of an earlier import go; the report stays until it is written anew."""
    old = {path.relative_to(target).parts[0] for path in run_folders(target)} if target.is_dir() else set()
    for arm in old:
        shutil.rmtree(target / arm)
    target.mkdir(exist_ok=True)


# ---------------------------------------------------------------------------------------------------- files


def _children(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir() and path.name != FOLDER and path.name[0] != "."]


def _files(folder: Path) -> list[Path]:
    found = [*folder.rglob("*.jsonl"), *folder.rglob(f"{stock_logs.EVENTS}*")]
    return sorted(path for path in found if path.is_file() and FOLDER not in path.relative_to(folder).parts)


def _kind_of_file(path: Path) -> str | None:
    """log | dump | None, by its first lines."""
    if path.name.startswith(stock_logs.EVENTS):
        return "log"
    for line, _ in zip(stock_logs.lines(path), range(PROBED), strict=False):
        if stock_logs.is_log_line(line):
            return "log"
        if stock_dumps.is_response(line):
            return "dump"
    return None


def _left_out(dump: Dump) -> Iterator[str]:
    """What of a dump does not count."""
    every = dump.steps.values()
    padded, unscored = sum(each.padded for each in every), sum(each.samples - each.scored for each in every)
    if padded:
        yield f"{dump.place}: {padded} rows that verl added to fill its batches are no samples, and are left out."
    if unscored:
        yield f"{dump.place}: {unscored} responses have no score that is a number; means are over the others."


# ---------------------------------------------------------------------------------------------------- what is whose


def _settled(dumps: Sequence[Dump], logs: Sequence[Log]) -> tuple[list[Dump], list[str]]:
    """Every dump with its kind, and what was guessed."""
    known = [
        replace(dump, kind="training") if dump.kind is None and any(_agrees(log, dump) for log in logs) else dump
        for dump in dumps
    ]
    unknown = [dump for dump in known if dump.kind is None]
    if not unknown:
        return known, []
    if len(known) == 1:
        told = (
            f"Nothing tells whether {known[0].place} are responses of training or of validation: taken as training's."
        )
        return [replace(known[0], kind="training")], [told]
    if len(known) == 2 and len(unknown) == 1:
        other = next(dump.kind for dump in known if dump.kind is not None)
        kind: stock_dumps.Kind = "validation" if other == "training" else "training"
        return [replace(dump, kind=dump.kind or kind) for dump in known], []
    places = ", ".join(dump.place for dump in unknown)
    raise ValueError(
        f"Neither the lines nor the names tell which of these dumps are training's and which validation's: {places}. "
        "Rename the folders to rollout... and validation..., or report on the folder of one run at a time."
    )


def _agrees(log: Log, dump: Dump) -> bool:
    """Whether the log has the dump's mean scores at every step that both have."""
    logged = {step: row["critic/score/mean"] for step, row in log.rows.items() if "critic/score/mean" in row}
    means = {step: mean for step, each in dump.steps.items() if (mean := each.mean_score) is not None}
    shared = logged.keys() & means.keys()
    return bool(shared) and all(
        math.isclose(logged[step], means[step], rel_tol=MATCHES, abs_tol=1e-6) for step in shared
    )


def _runs(logs: Sequence[Log], dumps: Sequence[Dump]) -> list[_Run]:
    """Logs with the dumps that are theirs; dumps without a log by their names."""
    runs = [_Run(name=log.name, log=log) for log in logs]
    waiting = []
    for dump in dumps:
        owner = _owner(dump, runs)
        waiting += [] if owner else [dump]
        if owner:
            owner.dumps.append(dump)
    for words in dict.fromkeys(dump.words for dump in waiting):
        mine = [dump for dump in waiting if dump.words == words]
        owner = _by_company(mine, waiting, runs)
        if owner is None and logs:
            places = ", ".join(dump.place for dump in mine)
            names = ", ".join(run.name for run in runs)
            raise ValueError(
                f"Neither scores nor names tell of which run the responses in {places} are; there are: {names}. "
                "Report on the folder of one run at a time, or name the dumps' folders as the runs."
            )
        if owner is None:
            owner = _Run(name="_".join(words) or ARM)
            runs.append(owner)
        owner.dumps += mine
    return runs


def _owner(dump: Dump, runs: Sequence[_Run]) -> _Run | None:
    """The only run whose log has the dump's scores, or else whose name the dump's folders have."""
    by_value = [run for run in runs if run.log is not None and dump.kind == "training" and _agrees(run.log, dump)]
    by_name = [run for run in runs if run.name in dump.place.split("/") or run.name in "_".join(dump.words).split("_")]
    return next((found[0] for found in (by_value, by_name) if len(found) == 1), None)


def _by_company(mine: Sequence[Dump], waiting: Sequence[Dump], runs: Sequence[_Run]) -> _Run | None:
    """The run that a dump of the same name is of; or the only run there is, if it has none of this kind yet."""
    company = [run for run in runs if any(dump.words == mine[0].words for dump in run.dumps)]
    if len(company) == 1:
        return company[0]
    kinds = [dump.kind for dump in waiting]
    alone = all(
        kinds.count(dump.kind) == 1 and not any(d.kind == dump.kind for d in run.dumps) for dump in mine for run in runs
    )
    return runs[0] if len(runs) == 1 and alone else None


def _named(runs: Sequence[_Run]) -> list[_Run]:
    """With the names of their arms, each once."""
    if len(runs) == 1:
        return [replace(runs[0], name=ARM)]
    names = [run.name for run in runs]
    sources = [run.log.source.removesuffix(".jsonl") if run.log else run.name for run in runs]
    chosen = [_plain(name if names.count(name) == 1 else source) for name, source in zip(names, sources, strict=True)]
    return [replace(run, name=name) for run, name in zip(runs, chosen, strict=True)]


# ---------------------------------------------------------------------------------------------------- a run folder


def _write(target: Path, run: _Run) -> list[str]:
    """The files of a run folder; a run that says nowhere how it ended is taken as done."""
    rows = _rows(run)
    folder = target / run.name / _task(rows) / "seed0"
    (folder / "samples").mkdir(parents=True)
    files = {
        "spec.json": {"arm": run.name, "seed": 0, "train": {}, "kl": {}},
        "state.json": {"status": "done", "reason": "", "step": max(rows, default=0)},
        "provenance.json": {"gradient": STATEMENT},
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value) + "\n", encoding="utf-8")
    lines = [json.dumps({**rows[step], "step": step}) for step in sorted(rows)]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    responses = {step: each for step, each in run.steps("training").items() if each.samples}
    whole = [
        stock_dumps.write_samples(step, each, folder / "samples" / f"step_{step:06d}.parquet")
        for step, each in responses.items()
    ]
    kept = f"{stock_dumps.STORED_BYTES // 2**20} MiB of text a step"
    told = f"{run.name}: tables of responses are over the prompts that come first, {kept}; scores are over all."
    return [] if all(whole) else [told]


def _rows(run: _Run) -> dict[int, dict[str, float]]:
    """step -> metrics under our names where there is one, besides verl's own."""
    logged = run.log.rows if run.log is not None else {}
    training, validation = run.steps("training"), run.steps("validation")
    is_score = any(each.graded for each in [*training.values(), *validation.values()]) or _is_graded(logged)
    rows = {step: dict(row) for step, row in logged.items()}
    for row in rows.values():
        row |= {ours: value for key, value in row.items() for ours in _ours(key, is_score)}
    for step, each in training.items():
        row = rows.setdefault(step, {})
        row |= {} if each.mean_score is None or "train/score" in row else {"train/score": each.mean_score}
        row |= {} if each.accuracy is None or is_score else {"train/accuracy": each.accuracy}
    tasks = {key.split("/")[1] for row in rows.values() for key in row if key.startswith("eval/")} or {"verl"}
    for step, each in validation.items() if len(tasks) == 1 else ():
        row, (task,) = rows.setdefault(step, {}), tasks
        value, what = (each.mean_score, "score") if each.accuracy is None or is_score else (each.accuracy, "accuracy")
        row |= {} if value is None or f"eval/{task}/{what}" in row else {f"eval/{task}/{what}": value}
    return rows


def _is_graded(logged: Mapping[int, Mapping[str, float]]) -> bool:
    """Whether what verl calls acc leaves [0, 1]: verl writes every float score as acc."""
    known = [value for row in logged.values() for key, value in row.items() if _is_accuracy(key)]
    return not all(0 <= value <= 1 for value in known)


def _is_accuracy(key: str) -> bool:
    found = VALIDATED.fullmatch(key)
    return found is not None and found["what"] == "acc"


def _ours(key: str, is_score: bool) -> Iterator[str]:
    if key in NAMES:
        yield NAMES[key]
    if found := VALIDATED.fullmatch(key):
        what = "accuracy" if found["what"] == "acc" and not is_score else "score"
        yield f"eval/{_plain(found['source'] or found['older'])}/{what}"


def _task(rows: Mapping[int, Mapping[str, float]]) -> str:
    """The first task that was validated on."""
    known = sorted({key for row in rows.values() for key in row if key.startswith("eval/")})
    return known[0].split("/")[1] if known else "verl"


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip(".") or ARM
