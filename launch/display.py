"""What a person sees while a study runs: one calm table on a terminal, one plain line per step elsewhere."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from klreg_verl.experiment.plan import RunSpec, grid_name

Line = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Start:
    """How far an attempt has come on its way to its first step."""

    doing: str
    """What is being done now, as the run says it."""
    seconds: float
    """Since the attempt began."""
    usual: float | None
    """How long it took until the first step in other attempts of the recipe [s]; None: there is none."""
    log: Path

    def __str__(self) -> str:
        return f"{self.doing} {clock(self.seconds)}{remaining(' of about {}', self.usual)}, log: {self.log}"


class Display(Protocol):
    """Told of everything worth seeing; `step` gets a line of metrics.jsonl."""

    def note(self, text: str) -> None: ...
    def skip(self, spec: RunSpec) -> None: ...
    def start(self, spec: RunSpec, steps_done: int) -> None: ...
    def starting(self, spec: RunSpec, start: Start) -> None: ...
    def step(self, spec: RunSpec, line: Line) -> None: ...
    def end(self, spec: RunSpec, status: str, reason: str) -> None: ...


def number(line: Line, key: str, digits: int = 3) -> str:
    """A metric as text; an absent one is a dash."""
    value = line.get(key)
    return "-" if value is None else f"{value:.{digits}f}"


def headline(line: Line) -> tuple[str, float | None]:
    """accuracy or, where the reward grades, score: the training batch's, or the evaluation's before training."""
    for name in ("accuracy", "score"):
        held_out = [key for key in line if key.startswith("eval/") and key.endswith(f"/{name}")]
        if known := [key for key in (f"train/{name}", *held_out) if key in line]:
            return name, line[known[0]]
    return "accuracy", None


def headline_text(line: Line) -> str:
    """Three decimals; a dash where there is none."""
    return number({"": headline(line)[1]}, "")


def clock(seconds: float) -> str:
    """75 -> 1:15."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def remaining(text: str, seconds: float | None) -> str:
    """The text with the time in it; empty where it is not known."""
    return "" if seconds is None else text.format(clock(seconds))


class PlainDisplay:
    """One line per event, for logs and pipes."""

    def __init__(self, runs: int) -> None:
        self._pace = Pace(runs)
        self._doing = ""

    def note(self, text: str) -> None:
        print(text, flush=True)

    def skip(self, spec: RunSpec) -> None:
        """It is done already."""
        self._pace.end(spec)

    def start(self, spec: RunSpec, steps_done: int) -> None:
        self._pace.start(spec, steps_done)
        resumed = f", resumed after step {steps_done}" if steps_done else ""
        print(f"{spec.run_id}: starting{resumed} ({spec.train.steps} steps)", flush=True)

    def starting(self, spec: RunSpec, start: Start) -> None:
        """A line whenever something else is being done."""
        if start.doing != self._doing:
            self._doing = start.doing
            print(f"{spec.run_id}: {start}", flush=True)

    def step(self, spec: RunSpec, line: Line) -> None:
        self._pace.step(line)
        print(
            f"{spec.run_id} step {line['step']}/{spec.train.steps} {headline(line)[0]} {headline_text(line)} "
            f"KL {number(line, 'kl_ref/k1_response')} entropy {number(line, 'entropy/token')} "
            f"{number(line, 'perf/tokens_per_s', 0)} tokens/s{remaining(' left {}', self._pace.left(spec))}",
            flush=True,
        )

    def end(self, spec: RunSpec, status: str, reason: str) -> None:
        self._pace.end(spec)
        print(f"{spec.run_id}: {status}{': ' + reason if reason else ''}", flush=True)


class Pace:
    """Time left, from the mean of the steps seen; start-up is not a step."""

    def __init__(self, runs: int) -> None:
        self.runs = runs
        self._over: set[str] = set()
        self.step_seconds: float | None = None
        self.startup_seconds = 0.0
        self.done = 0
        self._started = self._last = time.monotonic()
        self._counted = 0

    def start(self, spec: RunSpec, steps_done: int) -> None:
        self._over.discard(spec.run_id)  # another attempt
        self.done, self._counted = steps_done, 0
        self._started = self._last = time.monotonic()

    def step(self, line: Line) -> None:
        now = time.monotonic()
        if self._counted == 0:
            self.startup_seconds = now - self._started
        elif line["step"] > self.done:
            seconds = (now - self._last) / (line["step"] - self.done)
            self.step_seconds = seconds if self.step_seconds is None else 0.8 * self.step_seconds + 0.2 * seconds
        self._last, self.done, self._counted = now, line["step"], self._counted + 1

    def end(self, spec: RunSpec) -> None:
        self._over.add(spec.run_id)

    def left(self, spec: RunSpec) -> float | None:
        """Seconds to the end of the study, if all runs are as long as this one; None before a step was timed."""
        step = self.step_seconds
        if step is None:
            return None
        later = max(0, self.runs - len(self._over) - 1) * (self.startup_seconds + step * spec.train.steps)
        return step * (spec.train.steps - self.done) + later


class LiveDisplay:
    """A table with one row per run, and a bar for the current one."""

    def __init__(self, specs: list[RunSpec], console: Console | None = None) -> None:
        self._pace = Pace(len(specs))
        self._headline = "accuracy"
        self._rows: dict[str, list[str]] = {spec.run_id: self._row(spec, "waiting") for spec in specs}
        self._bar = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(None), TextColumn("{task.fields[left]}")
        )
        self._task = self._bar.add_task("starting", total=None, left="")
        self._live = Live(self._render(), console=console, refresh_per_second=4)

    def __enter__(self) -> LiveDisplay:
        self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._live.update(self._table())
        self._live.__exit__(*error)

    def note(self, text: str) -> None:
        self._live.console.print(text, style="dim", markup=False, highlight=False)

    def skip(self, spec: RunSpec) -> None:
        """It is done already."""
        self._pace.end(spec)
        self._set(spec, self._row(spec, "done", str(spec.train.steps)))

    def start(self, spec: RunSpec, steps_done: int) -> None:
        self._pace.start(spec, steps_done)
        self._set(spec, self._row(spec, "starting", str(steps_done)))
        self._bar.reset(self._task, total=spec.train.steps, completed=steps_done, description=f"{spec.arm}: starting")

    def starting(self, spec: RunSpec, start: Start) -> None:
        self._bar.update(self._task, description=f"{spec.arm}: {start}")
        self._live.update(self._render())

    def step(self, spec: RunSpec, line: Line) -> None:
        self._pace.step(line)
        self._headline = headline(line)[0]
        numbers = [
            headline_text(line),
            number(line, "kl_ref/k1_response"),
            number(line, "entropy/token"),
            number(line, "perf/tokens_per_s", 0),
        ]
        self._set(spec, [*self._row(spec, "running", str(line["step"]))[:5], *numbers])
        left = remaining("{} left", self._pace.left(spec))
        self._bar.update(self._task, completed=line["step"], left=left, description=f"{spec.arm} seed {spec.seed}")

    def end(self, spec: RunSpec, status: str, reason: str) -> None:
        self._pace.end(spec)
        row = self._rows[spec.run_id]
        self._set(spec, [*row[:3], status, *row[4:]])
        if reason:
            self.note(f"{spec.run_id}: {status}: {reason}")

    def _set(self, spec: RunSpec, row: list[str]) -> None:
        self._rows[spec.run_id] = row
        self._live.update(self._render())

    @staticmethod
    def _row(spec: RunSpec, status: str, step: str = "0") -> list[str]:
        name = f"{spec.arm} {grid_name(spec.grid)}".strip()
        return [name, spec.task_name, str(spec.seed), status, f"{step}/{spec.train.steps}", "-", "-", "-", "-"]

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False)
        for column in ("arm", "task", "seed", "state", "step", self._headline, "KL [nats]", "entropy", "tokens/s"):
            table.add_column(Text(column), justify="left" if column in ("arm", "task", "state") else "right")
        for row in self._rows.values():
            table.add_row(*row, style={"done": "green", "failed": "red", "waiting": "dim"}.get(row[3], ""))
        return table

    def _render(self) -> Group:
        return Group(self._table(), self._bar)


def is_terminal() -> bool:
    """Whether a person is watching."""
    return sys.stdout.isatty()
