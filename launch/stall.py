"""Ends a run that stands still, and says where: the phase, the process that is waited for, everybody's last lines.

What counts as progress is written by the run itself (klreg_verl/verl_hooks/progress.py). How long a phase may do
without any is the recipe's `stall`.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from launch import failure

LOOK_SECONDS = 2.0
WAITED_FOR = {
    "generation": ("VLLM::EngineCore", "vLLM's engine"),
    "reward": ("ray::RewardLoopWorker", "the reward worker"),
    "update": ("ray::WorkerDict", "the training worker"),
    "start": ("ray::WorkerDict", "the training worker"),
}
"""How the title of the process begins that works in a phase, and what it is."""


class Stall:
    """Looks at one attempt."""

    def __init__(self, attempt: Path, minutes: Mapping[str, float]) -> None:
        self.folder, self.log, self.minutes = attempt / "progress", attempt / "log", minutes
        self.said: dict[str, str] = {}
        self.moved, self.next_look = time.monotonic(), 0.0

    def reason(self) -> str | None:
        """Why the run is to end, once a phase has stood still for too long; then the log gets all last lines, too."""
        now = time.monotonic()
        if now < self.next_look:
            return None
        self.next_look = now + LOOK_SECONDS
        said = self.told()
        if said != self.said:
            self.said, self.moved = said, now
        phase, doing = where(said)
        limit = self.minutes[phase]
        if not limit or now - self.moved < 60 * limit:
            return None
        with open(self.log, "a") as log:
            log.write("\n".join([failure.STOOD_STILL, *failure.last_lines(failure.clean(self.log)), ""]))
        return (
            f"no progress for {limit:g} minutes in the phase {phase} ({doing}); {waited_for(phase)}. So the run was "
            f"ended: stall.{phase} in the recipe is the limit, 0 switches it off"
        )

    def told(self) -> dict[str, str]:
        """What the processes of the run have written: file stem -> JSON."""
        return {path.stem: path.read_text() for path in self.folder.glob("*.json")}

    def doing(self) -> str:
        """What the run is at, in words."""
        return where(self.told())[1]


def where(said: Mapping[str, str]) -> tuple[str, str]:
    """The phase, and what is done in it, by what the processes wrote (file stem -> JSON)."""
    values = {name: json.loads(text) for name, text in said.items()}
    trainer = values.pop("trainer", {"phase": "start", "doing": "starting Ray's actors", "step": 0})
    phase, doing = trainer["phase"], f"step {trainer['step']}, {trainer['doing']}"
    if phase != "rollout":
        return phase, doing
    owed = {what: sum(one.get(f"owed_{what}", 0) for one in values.values()) for what in ("responses", "rewards")}
    phase = "reward" if owed["rewards"] and not owed["responses"] else "generation"
    return phase, f"{doing}, {owed['responses']} responses and {owed['rewards']} rewards are owed"


def waited_for(phase: str) -> str:
    """The process that works in this phase and how it is, as far as this machine can tell."""
    title, name = WAITED_FOR[phase]
    found = [one for one in psutil.Process().children(recursive=True) if _title(one).startswith(title)]
    if not found:
        return f"{name} is not among the processes below this one"
    return ", ".join(f"{name} (pid {one.pid}) {_how_it_is(one)}" for one in found)


def _how_it_is(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        if process.status() == psutil.STATUS_STOPPED:
            return "is stopped by a signal"
        return "is computing" if process.cpu_percent(interval=0.5) > 20 else "does nothing"
    return "is gone"


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""
