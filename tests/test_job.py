"""The batch script's program: which Pythons can run it, and what it does with how its runner ended. srun and scontrol
here are scripts that answer; they are real in tests/slurm."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import job
from launch.job_folder import new_folder

SRUN = """#!/bin/sh
for attempt; do :; done
{before}
echo "no folder can be made in /scratch" > "$attempt/reason"
exit {code}
"""
SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then echo node1; else echo requeue; exit 1; fi
"""
"""That refuses to requeue saves the wait for being requeued."""


@pytest.fixture
def start(tmp_path: Path):
    """Starts the job once; `code` and `before` are its runner's. Returns exit code and output."""
    folder = new_folder(tmp_path / "study")
    profile = {"notice_seconds": 60, "requeues": 100}
    (folder / "job.json").write_text(json.dumps({"nodes": [1], "srun": [], "steps": [], "profile": profile}))
    (tmp_path / "scontrol").write_text(SCONTROL)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_JOB_END_TIME": str(time.time() + 3600),
    }

    def once(code: int, before: str = "") -> tuple[int, str]:
        (tmp_path / "srun").write_text(SRUN.format(code=code, before=before))
        for name in ("srun", "scontrol"):
            (tmp_path / name).chmod(0o755)
        command = [sys.executable, "-I", job.__file__, str(folder)]
        done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=900)
        assert not done.stderr, done.stderr
        return done.returncode, done.stdout

    return once


def test_the_systems_python_of_an_old_cluster_can_run_it():
    text = Path(job.__file__).read_text()
    tree = ast.parse(text, feature_version=(3, 6))
    imports = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "__future__" not in imports  # annotations are of 3.7
    assert "fromisoformat" not in text  # as it is


def test_three_starts_that_come_to_no_run_end_it_with_their_reason(start):
    for _ in range(2):
        code, said = start(job.LOST)
        assert code == job.LOST and "requeueing 7" in said
    code, said = start(job.LOST)
    assert code == job.LOST and "requeueing" not in said
    assert said.splitlines()[-1].endswith(
        "not requeued: 3 starts in a row made no attempt at a run: no folder can be made in /scratch"
    )


def test_starts_in_which_a_run_began_or_that_were_asked_to_stop_are_requeued_as_before(start):
    start(job.LOST)
    start(job.NOT_FORMED)
    assert "requeueing 7" in start(job.LOST, before='touch "$attempt/began"')[1]
    start(job.LOST)
    start(job.LOST)
    assert "requeueing 7" in start(job.STOPPED)[1]
    assert "requeueing 7" in start(job.LOST)[1]  # the first in a row again


def test_a_run_that_failed_is_not_requeued_and_the_log_ends_with_the_reason(start):
    code, said = start(job.FAILED)
    assert code == job.FAILED
    assert said.splitlines()[-1].endswith("exit code 1: no folder can be made in /scratch")


def test_both_steps_are_asked_to_end_before_either_is_waited_for(tmp_path: Path):
    """Each ends once the other has heard, too: one after the other they would wait until they are killed."""
    code = """
import signal, sys, time
from pathlib import Path
mine, other = Path(sys.argv[1]), Path(sys.argv[2])
def end(number, frame):
    mine.touch()
    while not other.exists():
        time.sleep(0.01)
    sys.exit(3)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(100)
"""
    names = [str(tmp_path / name) for name in "ab"]
    pairs = (names, names[::-1])
    steps = [subprocess.Popen([sys.executable, "-c", code, *pair], stdout=subprocess.PIPE) for pair in pairs]
    for step in steps:
        assert step.stdout.readline() == b"ready\n"
    job.end_steps(steps)
    assert [step.returncode for step in steps] == [3, 3]
    for step in steps:
        step.stdout.close()
