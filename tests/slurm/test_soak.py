"""Kills at random instants: as many come-backs, no step lost or doubled. Three here; `make soak` does twenty."""

from __future__ import annotations

import os
import random
import time

import pytest
from lab import Lab
from test_jobs import (
    assert_whole,
    folder,
    kill_rays_head,
    kill_slurmd_of_the_other_node,
    kill_the_driver,
    kill_the_other_nodes_ray,
    kill_the_runner,
    last,
    requeue,
    submit,
    time_limit,
)

KILLS = int(os.environ.get("KLREG_SOAK", "3"))
SEED = int(os.environ.get("KLREG_SOAK_SEED", "1"))
VICTIMS = (
    kill_the_driver,
    kill_the_runner,
    kill_rays_head,
    kill_the_other_nodes_ray,
    kill_slurmd_of_the_other_node,
    requeue,
    time_limit,
)
STEPS_BETWEEN = 8
STEPS_UNNOTICED = 120
"""How far a run gets, at most, before Slurm notices that a node's slurmd is gone."""

pytestmark = pytest.mark.timeout(300 + 300 * KILLS)


def attempts(lab: Lab) -> int:
    return len(list((folder(lab) / "attempts").iterdir()))


def test_random_kills_lose_no_step_and_double_none(lab: Lab):
    draws = random.Random(SEED)
    victims = draws.choices(VICTIMS, k=KILLS)
    steps = STEPS_BETWEEN * (KILLS + 1) + STEPS_UNNOTICED * victims.count(kill_slurmd_of_the_other_node)
    job = submit(
        lab,
        *("--arm", "none", f"train.steps={steps}"),
        profile="environment: {STANDIN_SECONDS: '0.6'}\nbudget: {attempts: 200, without_progress: 10}\ntime: '2:00:00'",
    )
    best = 0
    for killed, victim in enumerate(victims):
        lab.until(lambda: last(lab) > best, f"a step after {best}", 240)  # noqa: B023
        time.sleep(draws.uniform(0.0, 3.0))
        best = max(best, last(lab))
        print(f"kill {killed + 1}: {victim.__name__} at step {best}", flush=True)
        victim(lab, job)
        lab.until(lambda: attempts(lab) == killed + 2, "the next attempt", 300)  # noqa: B023
    lab.wait(job, 200 + steps)
    assert_whole(lab, steps=steps)
    assert attempts(lab) == KILLS + 1
