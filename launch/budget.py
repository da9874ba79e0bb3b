"""Whether a run may be tried again: attempts are limited, and one that fails twice in the same way is left alone.

What an attempt came to is in its end.json (local.py). One without that file was cut short: its node died, or the job
was killed. That is no fault of the run, and neither is a lost node or a signal: it counts as an attempt and as nothing
else. A run that its own alarms ended is not tried again.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from klreg_verl.experiment.store import RunFolder, write_json
from launch.profile import Budget

FORGIVEN = "forgiven.json"


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt that is over."""

    number: int
    status: str = ""
    """Empty where it was cut short, "lost" where Ray or a node was, "signal" after one, "alarm" where that ended it."""
    reason: str = ""
    step: int | None = None
    """The run's last step when it ended."""


def refusal(folder: RunFolder, budget: Budget) -> str | None:
    """Why the run must not be tried again, or None."""
    tried = attempts(folder)
    last = next((one.reason for one in reversed(tried) if one.reason), "")
    if tried and tried[-1].status == "alarm":
        return last
    if len(tried) >= budget.attempts:
        return f"{len(tried)} attempts, the profile's limit; the last reason: {last or 'cut short'}"
    ended = _with_gains(tried)
    if len(ended) >= 2 and not ended[-1][1] and _is_same_failure(ended[-2][0], ended[-1][0]):
        return f"failed twice in the same way: {last}"
    idle = [one for one, gained in ended[-budget.without_progress :] if not gained]
    if len(idle) == budget.without_progress:
        return f"{len(idle)} attempts in a row without a new step; the last reason: {last}"
    return None


def forgive(folder: RunFolder) -> None:
    """Count attempts anew from here; the run is pending again. Call it with the folder's lock held."""
    numbers = [one.number for one in _all(folder)]
    write_json(folder.path / FORGIVEN, {"attempt": max(numbers, default=0)})
    folder.set_state("pending")


def attempts(folder: RunFolder) -> list[Attempt]:
    """Those that count, the oldest first."""
    path = folder.path / FORGIVEN
    forgiven = json.loads(path.read_text())["attempt"] if path.exists() else 0
    return [one for one in _all(folder) if one.number > forgiven]


def _all(folder: RunFolder) -> list[Attempt]:
    if not folder.attempts_dir.is_dir():
        return []
    numbers = sorted(int(path.name) for path in folder.attempts_dir.iterdir() if path.name.isdecimal())
    return [_read(folder, number) for number in numbers]


def _read(folder: RunFolder, number: int) -> Attempt:
    path = folder.attempts_dir / str(number) / "end.json"
    values = json.loads(path.read_text()) if path.exists() else {}
    return Attempt(number=number, **{key: values[key] for key in ("status", "reason", "step") if key in values})


def _with_gains(tried: list[Attempt]) -> list[tuple[Attempt, bool]]:
    """The attempts that ended by themselves, each with whether it did a step that no earlier one had done."""
    found, best = [], 0
    for one in tried:
        step = one.step or 0
        if one.status not in ("", "lost", "signal"):
            found.append((one, step > best))
        best = max(best, step)
    return found


def _is_same_failure(one: Attempt, other: Attempt) -> bool:
    return one.status == other.status == "failed" and signature(one.reason) == signature(other.reason)


def signature(reason: str) -> str:
    """A reason without its numbers, addresses and temporary names.

    >>> signature("engine (pid 17) at 0x7f3a died in /tmp/klreg-a_8x/ray")
    'engine (pid #) at # died in #'
    """
    return re.sub(r"/tmp/\S+|0x[0-9a-fA-F]+|\d+", "#", reason)
