"""What plain verl logged, as step -> key -> number, one log a run.

    <experiment>.jsonl         verl's file logger: {"step": 3, "data": {"actor/entropy": 0.4, ...}} a line
    events.out.tfevents.*      verl's TensorBoard log, a folder an experiment

verl's file logger opens its file anew, so a resumed run has lost the steps before the resume there, while TensorBoard
still has them. Two logs are of one run where they say the same of every step that both have; a log of the same name
that begins after step 1 continues the other.
"""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Rows = dict[int, dict[str, float]]
EVENTS = "events.out.tfevents."
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
"""How a text file begins whose editor wrote a byte order mark."""
SAME = 1e-4
"""Relative difference up to which two logged values are one: TensorBoard keeps float32."""


@dataclass(frozen=True, kw_only=True)
class Log:
    """One run's numbers."""

    name: str
    """The experiment's, as its file or folder has it."""
    source: str
    """Where it was read, below the given folder."""
    rows: Mapping[int, Mapping[str, float]]
    notes: tuple[str, ...] = ()
    """What was left out, a sentence each."""

    @property
    def start(self) -> int:
        """The first training step; step 0 is the validation before it."""
        return min((step for step in self.rows if step), default=0)


def read_logs(files: Iterable[Path], folder: Path) -> list[Log]:
    """The runs that the log files below ``folder`` are of."""
    files = list(files)
    events: dict[Path, list[Path]] = {}
    for path in files:
        if path.name.startswith(EVENTS):
            events.setdefault(path.parent, []).append(path)
    texts = [_of_lines(path, folder) for path in files if not path.name.startswith(EVENTS)]
    boards = [_of_events(each, place, folder) for place, each in events.items()]
    alone = len(texts) <= 1 and len(boards) <= 1
    found: list[Log] = []
    for log in [log for log in [*texts, *boards] if log.rows]:
        joined = [(place, one) for place, each in enumerate(found) if (one := _joined(each, log, alone)) is not None]
        if joined:
            found[joined[0][0]] = joined[0][1]
        else:
            found.append(log)
    return found


def lines(path: Path) -> Iterator[Mapping[str, Any]]:
    """The lines that are JSON objects: a process that is killed cuts its file anywhere."""
    with path.open("rb") as file:
        start = file.read(3)
    encoding = next((name for mark, name in MARKS.items() if start.startswith(mark)), "utf-8")
    with path.open(encoding=encoding, errors="replace", newline="\n") as text:
        for line in text:
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict):
                yield value


def is_log_line(line: Mapping[str, Any]) -> bool:
    """Whether verl's file logger wrote it."""
    return "step" in line and isinstance(line.get("data"), dict)


def number(value: Any) -> float | None:
    """A finite number, whatever JSON made of it: true, "1.0", "False" and [0.5] count, null and NaN do not."""
    if isinstance(value, list):
        return number(value[0]) if len(value) == 1 else None
    if isinstance(value, str):
        value = {"true": 1.0, "false": 0.0}.get(value.strip().lower(), value)
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def whole(value: Any) -> int | None:
    """A step."""
    found = number(value)
    return int(found) if found is not None and found >= 0 and found == int(found) else None


def _of_lines(path: Path, folder: Path) -> Log:
    source = path.relative_to(folder).as_posix()
    logged = [line for line in lines(path) if is_log_line(line)]
    known = [(step, line["data"]) for line in logged if (step := whole(line["step"])) is not None]
    rows, replaced = _in_order((step, _numbers(data)) for step, data in known)
    lost = len(logged) - len(known)
    notes = [f"{source}: {lost} lines without a step are left out."] if lost else []
    return Log(name=path.stem, source=source, rows=rows, notes=(*notes, *_told(source, replaced)))


def _numbers(data: Mapping[str, Any]) -> dict[str, float]:
    return {str(key): found for key, value in data.items() if (found := number(value)) is not None}


def _of_events(files: list[Path], place: Path, folder: Path) -> Log:
    """A folder of event files in the order in which they were begun: each start of a run writes one of its own."""
    source, notes = place.relative_to(folder).as_posix(), []
    attempts: list[tuple[float, Rows]] = []
    for path in files:
        try:
            attempts.append(_of_tensorboard(path))
        except Exception as error:  # TensorBoard raises whatever a damaged record makes it stumble over
            notes.append(f"{path.relative_to(folder)} cannot be read ({type(error).__name__}: {error}).")
    attempts.sort(key=lambda each: each[0])
    rows, replaced = _in_order((step, each[step]) for _, each in attempts for step in sorted(each))
    name = place.name if place != folder else folder.resolve().name
    return Log(name=name, source=source, rows=rows, notes=(*notes, *_told(source, replaced)))


def _of_tensorboard(path: Path) -> tuple[float, Rows]:
    """(time of its first number, the numbers)."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        raise ValueError("the package tensorboard reads it: pip install tensorboard") from error
    read = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    rows, begun = Rows(), math.inf
    for key in read.Tags()["scalars"]:
        for event in read.Scalars(key):
            begun = min(begun, event.wall_time)
            if math.isfinite(event.value):
                rows.setdefault(event.step, {})[key] = event.value
    return begun, rows


def _in_order(logged: Iterable[tuple[int, Mapping[str, float]]]) -> tuple[Rows, int]:
    """Lines as they were written, and how many steps of an earlier attempt a resume has replaced.

    verl writes a step in one line or in several. A line that goes back and repeats what is known is of a resumed run:
    what was made after that step is not this run's any more.
    """
    rows, last, replaced = Rows(), -1, 0
    for step, values in logged:
        if step < last and rows.get(step, {}).keys() & values.keys():
            gone = [known for known in rows if known >= step]
            replaced += len(gone)
            rows = {known: each for known, each in rows.items() if known < step}
        rows.setdefault(step, {}).update(values)
        last = step
    return rows, replaced


def _told(source: str, replaced: int) -> list[str]:
    return [f"{source}: {replaced} steps of an earlier attempt were made again, and are left out."] if replaced else []


def _joined(first: Log, second: Log, alone: bool) -> Log | None:
    """Both as one run's, the first's values where both have one; None where they are of two runs."""
    shared = first.rows.keys() & second.rows.keys()
    related = first.name == second.name or alone
    if len(shared - {0}) >= (1 if related else 2) and all(
        _alike(first.rows[step], second.rows[step]) for step in shared
    ):
        return _union(first, second)
    if not related:
        return None
    if not shared:
        return _union(first, second)
    earlier, later = sorted((first, second), key=lambda log: log.start)
    if later.start <= max(1, earlier.start):
        return None
    kept = {step: row for step, row in earlier.rows.items() if step < later.start}
    gone = len(earlier.rows) - len(kept)
    cut = Log(name=earlier.name, source=earlier.source, rows=kept, notes=(*earlier.notes, *_told(earlier.source, gone)))
    return _union(later, cut)


def _alike(first: Mapping[str, float], second: Mapping[str, float]) -> bool:
    both = first.keys() & second.keys()
    return bool(both) and all(math.isclose(first[key], second[key], rel_tol=SAME, abs_tol=1e-9) for key in both)


def _union(first: Log, second: Log) -> Log:
    steps = sorted(first.rows.keys() | second.rows.keys())
    return Log(
        name=first.name,
        source=first.source,
        rows={step: {**second.rows.get(step, {}), **first.rows.get(step, {})} for step in steps},
        notes=(*first.notes, *second.notes, f"{first.source} and {second.source} are of one run, and read together."),
    )
