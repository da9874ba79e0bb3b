"""When a run is tried again. Each case is a run's history: how its attempts ended, and at which step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from klreg_verl.experiment.store import RunFolder
from launch import budget
from launch.profile import Budget

LIMITS = Budget(attempts=6, without_progress=3)
SHORT = ("", "", None)
"""An attempt that was cut short: its node died, or its job was killed."""


def run(folder: Path, *ends: tuple[str, str, int | None]) -> RunFolder:
    """A run whose attempts ended so: (status, reason, last step)."""
    made = RunFolder(folder)
    for status, reason, step in ends:
        attempt = made.new_attempt()
        if status:
            (attempt / "end.json").write_text(json.dumps({"status": status, "reason": reason, "step": step}))
    return made


CASES = {
    "a new run": ([], None),
    "failed once": ([("failed", "out of memory", 3)], None),
    "failed twice at the same step": (
        [("failed", "out of memory", 3), ("failed", "out of memory", 3)],
        "failed twice in the same way: out of memory",
    ),
    "numbers, addresses and temporary names do not make it another failure": (
        [("failed", "pid 7 at 0x1f in /tmp/klreg-a/ray", 3), ("failed", "pid 8 at 0x2e in /tmp/klreg-b/ray", 3)],
        "failed twice in the same way: pid 8 at 0x2e in /tmp/klreg-b/ray",
    ),
    "it got on in between": ([("failed", "out of memory", 3), ("failed", "out of memory", 7)], None),
    "it failed in two ways": ([("failed", "out of memory", 3), ("failed", "a timeout", 3)], None),
    "a lost node in between is no excuse": (
        [("failed", "out of memory", 3), ("lost", "node b was lost", 3), ("failed", "out of memory", 3)],
        "failed twice in the same way: out of memory",
    ),
    "three ends without a step": (
        [("interrupted", "asked to stop", 0)] * 3,
        "3 attempts in a row without a new step; the last reason: asked to stop",
    ),
    "stopping it by hand is no fault of the run": ([("signal", "stopped by a signal", 0)] * 4, None),
    "a run that its alarms ended is not tried again": (
        [("alarm", "AlarmRaised: alarms.stop is true, and an alarm was raised. kl_above", 3)],
        "AlarmRaised: alarms.stop is true, and an alarm was raised. kl_above",
    ),
    "preempted nodes are not counted as standing still": ([("lost", "node b was lost", 0)] * 4 + [SHORT], None),
    "too many, whatever they were": (
        [("interrupted", "asked to stop", step) for step in range(5)] + [SHORT],
        "6 attempts, the profile's limit; the last reason: asked to stop",
    ),
    "all of them cut short": ([SHORT] * 6, "6 attempts, the profile's limit; the last reason: cut short"),
    "an attempt that repeats what was lost has not got on": (
        [("interrupted", "stopped", 9), ("failed", "broken", 5), ("failed", "broken", 9)],
        "failed twice in the same way: broken",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_budget_of_a_run(tmp_path: Path, case: str):
    ends, expected = CASES[case]
    assert budget.refusal(run(tmp_path / "run", *ends), LIMITS) == expected


def test_forgiven_attempts_do_not_count_and_later_ones_do(tmp_path: Path):
    failed = ("failed", "broken", 3)
    folder = run(tmp_path / "run", failed, failed)
    budget.forgive(folder)
    assert folder.state().status == "pending"
    assert budget.refusal(folder, LIMITS) is None
    assert len(budget.attempts(folder)) == 0
    run(tmp_path / "run", failed, failed)
    assert budget.refusal(folder, LIMITS) == "failed twice in the same way: broken"
