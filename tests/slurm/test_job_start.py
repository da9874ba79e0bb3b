"""How long a job of two nodes takes from its start to the first step of its run, and where the time goes.

The driver is the stand-in of tests/slurm, which trains nothing: what verl and vLLM take to load comes on top, and is in
tests/bench/test_quick_study.py. Printed by `make bench`, not asserted.
"""

from __future__ import annotations

import shutil
from datetime import datetime
from statistics import median

import pytest
from lab import Lab, metrics
from test_jobs import folder, submit

REPEATS = 3
PHASES = ("runner starts and invites", "nodes meet, Ray is up on both", "driver starts, first step", "all")

pytestmark = pytest.mark.timeout(1200)


def stamp(line: str) -> float:
    return datetime.fromisoformat(line[:19]).timestamp()


def phases(lab: Lab, number: int) -> list[float]:
    """Seconds of each phase of one job, from its log and the time of the first line of metrics."""
    first_step = folder(lab) / "metrics.jsonl"
    job = submit(lab, "--arm", "none", "train.steps=1", f"train.learning_rate={number}e-6")
    lab.until(lambda: metrics(folder(lab)), "the first line", 300)
    seen = first_step.stat().st_mtime
    lab.wait(job)
    log = (lab.shared / "runs/study/slurm/1/logs/0.log").read_text().splitlines()
    began, invited, up = (
        next(stamp(line) for line in log if text in line) for text in ("attempt 1 on", "launch.node", "Ray is up")
    )
    return [invited - began, up - invited, seen - up, seen - began]


def test_from_the_start_of_a_two_node_job_to_the_first_step(lab: Lab):
    measured = []
    for number in range(1, REPEATS + 1):
        measured.append(phases(lab, number))
        shutil.rmtree(lab.shared / "runs")
    print("\nfrom the start of a two-node job to the first step [s], median (least to most)")
    for name, values in zip(PHASES, zip(*measured, strict=True), strict=True):
        print(f"  {name:<32} {median(values):5.1f} ({min(values):.1f} to {max(values):.1f})")
