"""Run folders as values: what was asked for, how far it came, what was measured.

    runs/<recipe>/<arm>/<task>/[<key=value>/...]seed<k>/
        spec.json  provenance.json  state.json  metrics.jsonl  samples/  attempts/  checkpoints/

Who a run is (arm, task, grid point, seed) is read from its path, so that a folder whose files are broken can still be
named. Everything wrong with a folder is a sentence in ``Run.problems``; nothing is repaired and nothing is left out.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq
from pyarrow import csv

from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.store import RunFolder, spreadsheet_text

ACCURACY, SCORE = "train/accuracy", "train/score"
ALARM, SATURATED = "alarm/", "kl/saturated"
SEED_FOLDER = re.compile(r"seed(\d+)")


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """One run folder, read."""

    path: Path
    arm: str
    task: str
    grid: tuple[str, ...]
    """The grid point as its folders spell it, for example ("kl.beta=0.1",)."""
    seed: int
    spec: Mapping[str, Any]
    provenance: Mapping[str, Any]
    status: str
    """pending | running | interrupted | failed | done."""
    reason: str
    """Why it failed or stopped, as state.json says; "" if it does not."""
    metrics: pd.DataFrame
    """One row a step in order, indexed by "step" (0 is the validation before training); columns are metric keys."""
    problems: tuple[str, ...] = ()
    graded: bool = False
    """Whether the mean score is the headline and not accuracy: the reward gives other scores than 0 and 1, or, in plain
    verl's logs, nothing says which responses are right."""
    attempts: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """The card of each attempt that steps were made in, by its number; empty in folders that have none."""

    @property
    def label(self) -> str:
        """Arm and grid point: what one line in a figure is called."""
        return " · ".join((self.arm, *(point.removeprefix("kl.") for point in self.grid)))

    @property
    def run_id(self) -> str:
        """The path below the recipe's folder."""
        return "/".join((self.arm, self.task, *self.grid, f"seed{self.seed}"))

    @property
    def is_done(self) -> bool:
        """Whether the run reached its last step."""
        return self.status == "done"

    @property
    def kl(self) -> Mapping[str, Any]:
        """The spec's KL block; empty when the spec has none."""
        return mapping(self.spec.get("kl"))

    @property
    def steps(self) -> int | None:
        """The number of training steps asked for, if the spec says."""
        steps = mapping(self.spec.get("train")).get("steps")
        return steps if isinstance(steps, int) else None

    def values(self, key: str) -> pd.Series:
        """What it measured by training step; empty where it did not. A score is a headline only where it is graded."""
        known = key in self.training and (key != SCORE or self.graded)
        return self.training[key].dropna() if known else pd.Series(dtype="float64")

    @cached_property
    def training(self) -> pd.DataFrame:
        """The rows of training steps (1, 2, ...)."""
        return self.metrics[self.metrics.index >= 1]

    @property
    def alarms(self) -> dict[str, list[int]]:
        """Alarm -> the steps whose line raised it; a controller that left its bounds is told as `beta saturated`."""
        marks = [str(key) for key in self.training if str(key).startswith(ALARM) or key == SATURATED]
        raised = {key: self.training.index[self.training[key] > 0].tolist() for key in marks}
        names = {key: "beta saturated" if key == SATURATED else key.removeprefix(ALARM) for key in marks}
        return {names[key]: steps for key, steps in raised.items() if steps}

    @property
    def last_step(self) -> int:
        """The last training step with a line; 0 before the first."""
        return int(self.training.index[-1]) if len(self.training) else 0


def load(recipe_dir: Path) -> list[Run]:
    """Every run below ``recipe_dir``: settings without a KL term first, then by arm, task, grid point and seed.

    Raises:
        ValueError: there is no such folder.
    """
    recipe_dir = Path(recipe_dir)
    if not recipe_dir.is_dir():
        raise ValueError(
            f"There is no folder {recipe_dir}. Run the recipe first, or say where its runs are: --runs-dir."
        )
    return sorted((read_run(path, recipe_dir) for path in run_folders(recipe_dir)), key=_order)


def run_folders(folder: Path, depth: int = 0) -> Iterator[Path]:
    """Folders <arm>/<task>/[<grid>/...]seed<k> below ``folder``. What is inside a run is not walked."""
    for child in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if child.is_symlink() and folder.resolve().is_relative_to(child.resolve()):
            continue  # a link to a folder that it lies in has no end
        if depth >= 2 and SEED_FOLDER.fullmatch(child.name):
            yield child
        else:
            yield from run_folders(child, depth + 1)


def read_run(path: Path, recipe_dir: Path) -> Run:
    """One run folder. Files that are missing or broken become sentences in ``problems``."""
    arm, task, *grid = path.relative_to(recipe_dir).parts[:-1]
    problems: list[str] = []
    names = ("spec.json", "state.json", "provenance.json")
    spec, state, provenance = (_read_object(path / name, problems) for name in names)
    kept = path / "headline.json"
    decided = _read_object(kept, problems).get("headline") if kept.exists() else None
    metrics = read_metrics(path / "metrics.jsonl", problems)
    faults = {file.name: fault for file in sample_files(path).values() if (fault := fault_of(file))}
    problems += [f"samples/{name} {fault}; it is left out" for name, fault in faults.items()]
    status = _status(state, path)
    if status == "done" and len(metrics) and _end(state, spec) > metrics.index[-1]:
        problems.append(f"it says done at step {_end(state, spec)}, and metrics.jsonl ends at step {metrics.index[-1]}")
        status = "interrupted"
    return Run(
        path=path,
        arm=arm,
        task=task,
        grid=tuple(grid),
        seed=int(path.name.removeprefix("seed")),
        spec=_resolved(mapping(spec.get("spec", spec))),
        provenance=provenance,
        status=status,
        reason=str(state.get("reason") or ""),
        metrics=_as_scores(metrics) if decided == "score" else metrics,
        graded=decided == "score" or (decided is None and ACCURACY not in metrics and SCORE in metrics),
        problems=tuple(problems),
        attempts=_attempts(path / "attempts"),
    )


def _resolved(spec: Mapping[str, Any]) -> Mapping[str, Any]:
    """With the settings that came after it, at their defaults, so that specs of two versions can be compared; as it is
    where this version cannot read it."""
    try:
        return json.loads(json.dumps(RunSpec.from_json(spec).to_json()))
    except (AttributeError, TypeError, ValueError):
        return spec


def _as_scores(metrics: pd.DataFrame) -> pd.DataFrame:
    """Of a graded run: until its first score beside 0 and 1 it logged accuracies, which were the mean scores."""
    late = {key: key.removesuffix("accuracy") + "score" for key in map(str, metrics) if key.endswith("/accuracy")}
    early = metrics[list(late)].rename(columns=late)
    return metrics.drop(columns=list(late)).combine_first(early)


def _attempts(folder: Path) -> dict[int, Mapping[str, Any]]:
    """Attempts with a card; one that ended before a training step is left out, as it made nothing."""
    found = {}
    for card in sorted(folder.glob("*/provenance.json"), key=lambda path: _natural(f"attempt={path.parent.name}")):
        end = _read_object(card.with_name("end.json"), [])
        if card.parent.name.isdecimal() and end.get("step", 1):
            found[int(card.parent.name)] = _read_object(card, [])
    return found


def sample_files(folder: Path) -> dict[int, Path]:
    """Step -> file of samples/."""
    files = sorted((folder / "samples").glob("step_*.parquet"))
    return {int(path.stem.removeprefix("step_")): path for path in files if path.stem.removeprefix("step_").isdigit()}


SAMPLE_COLUMNS = ("group", "prompt", "response", "valid", "answer")
"""Columns of samples/ that a report reads."""


def fault_of(path: Path) -> str | None:
    """What is wrong with a file of samples/, in words; None for a sound one."""
    try:
        stat = path.stat()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return _fault_of(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=65536)
def _fault_of(path: Path, size: int, modified: int) -> str | None:
    if not path.is_file():
        return "is a folder, not a file"
    with path.open("rb") as file:
        file.seek(-min(4, size), os.SEEK_END)
        if size < 12 or file.read() != b"PAR1":
            return "is torn"
    try:
        missing = [name for name in SAMPLE_COLUMNS if name not in pq.read_schema(path).names]
        if not missing:
            pq.read_table(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        return f"is damaged ({str(error).splitlines()[0]})"
    return f"has no column {', '.join(missing)}" if missing else None


def read_metrics(path: Path, problems: list[str]) -> pd.DataFrame:
    """metrics.jsonl as a table indexed by step. Null is NaN. Lines that cannot be read are told to ``problems``."""
    table = _read_whole(path)
    table = _read_lines(path, problems) if table is None else table
    repeated = sorted(set(table.index[table.index.duplicated()]))
    if repeated:
        problems.append(f"metrics.jsonl has step {_join(repeated)} more than once; the last line is used")
    table = table[~table.index.duplicated(keep="last")].sort_index()
    problems.extend(_gaps(table.index[table.index >= 1]))
    return table


def _read_whole(path: Path) -> pd.DataFrame | None:
    """The table where every line is sound and holds numbers; else None, and it is read line by line."""
    if not path.is_file() or not path.stat().st_size:
        return None
    try:
        table = pyarrow.json.read_json(path)
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        return None
    numbers = all(pa.types.is_floating(t) or pa.types.is_integer(t) or pa.types.is_null(t) for t in table.schema.types)
    steps = table["step"] if numbers and table.column_names.count("step") == 1 else None
    if steps is None or steps.null_count or not pa.types.is_integer(steps.type):
        return None
    columns = {
        name: table[name].cast(pa.float64()).to_numpy(zero_copy_only=False)
        for name in table.column_names
        if name != "step"
    }
    index = pd.Index(steps.to_numpy(), name="step", dtype="int64")
    return pd.DataFrame(columns, index=index, dtype="float64")


def _read_lines(path: Path, problems: list[str]) -> pd.DataFrame:
    rows = list(_metric_lines(path, problems))
    steps = [int(row["step"]) for row in rows]
    values = [{key: _number(value) for key, value in row.items() if key != "step"} for row in rows]
    return pd.DataFrame(values, index=pd.Index(steps, name="step", dtype="int64"), dtype="float64")


LONG_COLUMNS = ("arm", "task", "grid", "seed", "status", "step", "key", "value")


def write_long_table(runs: Sequence[Run], path: Path) -> None:
    """``LONG_COLUMNS`` as CSV, one row per recorded finite number, run by run, so that memory does not grow."""
    plain = not any(set(',"\r\n') & set("".join((run.run_id, *map(str, run.metrics)))) for run in runs)
    options = csv.WriteOptions(include_header=False, quoting_style="none" if plain else "needed")
    with path.open("wb") as file:
        file.write((",".join(LONG_COLUMNS) + "\n").encode())
        for run in runs:
            if len(run.metrics):
                csv.write_csv(_long(run), file, options)


def _long(run: Run) -> pa.Table:
    values = run.metrics.to_numpy(dtype=np.float64).T
    columns, rows = np.nonzero(np.isfinite(values))
    keys = pa.array([spreadsheet_text(str(key)) for key in run.metrics], pa.string())
    named = (*map(spreadsheet_text, (run.arm, run.task, ",".join(run.grid))), str(run.seed), run.status)
    arrays = [pa.repeat(pa.scalar(value), len(rows)) for value in named]
    steps = pa.array(run.metrics.index.to_numpy()[rows])
    arrays += [steps, keys.take(pa.array(columns)), pa.array(values[columns, rows])]
    return pa.table(dict(zip(LONG_COLUMNS, arrays, strict=True)))


def mapping(value: Any) -> Mapping[str, Any]:
    """``value`` if it is a mapping, else an empty one: for reading JSON that others wrote."""
    return value if isinstance(value, Mapping) else {}


def _order(run: Run) -> tuple[Any, ...]:
    return (run.kl.get("placement") != "none", run.arm, run.task, [_natural(point) for point in run.grid], run.seed)


def _natural(text: str) -> tuple[str, float, str]:
    """Sorts key=0.01 before key=0.1 before key=1e1, by number."""
    key, _, value = text.partition("=")
    try:
        return key, float(value), ""
    except ValueError:
        return key, math.inf, value


def _read_object(path: Path, problems: list[str]) -> Mapping[str, Any]:
    if not path.exists():
        problems.append(f"{path.name} is missing")
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        problems.append(f"{path.name} cannot be read ({error.strerror})")
        return {}
    except (ValueError, RecursionError) as error:
        problems.append(f"{path.name} is not JSON ({error})")
        return {}
    if not isinstance(value, Mapping):
        problems.append(f"{path.name} holds no JSON object")
    return mapping(value)


def _end(state: Mapping[str, Any], spec: Mapping[str, Any]) -> int:
    """The step at which a run that is done has ended."""
    train = mapping(mapping(spec.get("spec", spec)).get("train"))
    steps = [value for value in (state.get("step"), train.get("steps")) if isinstance(value, int)]
    return min(steps, default=0)


def _status(state: Mapping[str, Any], path: Path) -> str:
    """As written; a run that says "running" and that nobody works in was interrupted (store.RunFolder.state)."""
    status = str(state.get("status", "pending"))
    return "interrupted" if status == "running" and not RunFolder(path).is_locked() else status


def _metric_lines(path: Path, problems: list[str]) -> Iterator[Mapping[str, Any]]:
    if not path.is_file():
        problems.append(f"metrics.jsonl is {'a folder, not a file' if path.exists() else 'missing'}")
        return
    lines = path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        row = _parse(line)
        if row is not None:
            yield row
        elif line.strip():
            where = "the last line is torn" if number == len(lines) else f"line {number} cannot be read"
            problems.append(f"metrics.jsonl: {where}; it is left out")


def _parse(line: str) -> Mapping[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_row = isinstance(row, dict) and abs(_number(row.get("step"))) < MOST_STEPS
    return row if is_row else None


MOST_STEPS = 2**53
"""A step beyond this is no step: a damaged line."""


def _number(value: Any) -> float:
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:  # a whole number of hundreds of digits
        return math.nan


def _gaps(steps: pd.Index) -> list[str]:
    """A sentence naming the steps between 1 and the last that have no line."""
    if not len(steps):
        return []
    missing = sorted(set(range(1, int(steps[-1]) + 1)) - set(steps))
    return [f"metrics.jsonl has no line for step {_join(missing)}"] if missing else []


def _join(steps: list[int]) -> str:
    shown = ", ".join(str(step) for step in steps[:8])
    return shown if len(steps) <= 8 else f"{shown} and {len(steps) - 8} more"
