"""Rows of `klreg status`: what a run's folder says, and Slurm of its job. squeue here is a script that prints."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from verl_stack import spec

from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.store import RunFolder, write_json
from launch import slurm, status
from launch.job_folder import new_folder
from launch.slurm import Element


def task(state: str, **values: str) -> slurm.Task:
    shown = {"name": "7_0", "state": state, "left": "1:00", "reason": "None", "nodes": "node1"} | values
    return slurm.Task(name="7_0", log=Path("/no/log"), element=Element(**shown))


def squeue(folder: Path, monkeypatch: pytest.MonkeyPatch, *lines: str, code: int = 0, error: str = "") -> None:
    """A squeue that prints so, and no sacct."""
    bin_folder = folder / "bin"
    bin_folder.mkdir(exist_ok=True)
    text = "\n".join(lines)
    (bin_folder / "squeue").write_text(f"#!/bin/sh\ncat <<'X'\n{text}\nX\necho '{error}' >&2\nexit {code}\n")
    (bin_folder / "sacct").write_text("#!/bin/sh\necho accounting is disabled >&2\nexit 1\n")
    for file in bin_folder.iterdir():
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:{os.environ['PATH']}")


def submitted(root: Path, job: int, *tasks: list[str]) -> None:
    folder = new_folder(root / "study")
    write_json(folder / "submitted.json", {"job_id": job, "runs": tasks})


@pytest.fixture
def one(tmp_path: Path) -> RunSpec:
    made = spec()
    folder = RunFolder(tmp_path / "study" / made.run_id)
    folder.create(made)
    folder.append_metrics(3, {"train/accuracy": 0.5, "kl_ref/k1_response": 0.25})
    folder.set_state("interrupted", step=3, steps=40, attempt=2, reason="node b was lost")
    return made


def test_a_row_has_the_job_its_state_and_the_time_left(tmp_path: Path, one: RunSpec, monkeypatch):
    submitted(tmp_path, 7, ["other"], [one.run_id])
    squeue(tmp_path, monkeypatch, "7_0|COMPLETED|0:00|None|node1", "7_1|RUNNING|1:02:03|None|node[1-2]")
    (row,) = status.rows([one], tmp_path)
    assert status.line(row).split() == (
        f"interrupted {one.run_id} step 3/40 attempt 2 RUNNING 7_1 left 1:02:03 accuracy 0.500 kl 0.250 "
        "node b was lost".split()
    )


def test_without_slurm_and_with_a_dead_controller_the_folders_speak_alone(tmp_path: Path, one: RunSpec, monkeypatch):
    submitted(tmp_path, 7, [one.run_id])
    squeue(tmp_path, monkeypatch, code=1, error="slurm_load_jobs error: Unable to contact slurm controller")
    (row,) = status.rows([one], tmp_path)
    assert (row["status"], row["slurm"], row["job"]) == ("interrupted", "", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert status.rows([one], tmp_path) == [row]


def test_jobs_that_slurm_has_forgotten_are_over(tmp_path: Path, one: RunSpec, monkeypatch):
    submitted(tmp_path, 7, [one.run_id])
    squeue(tmp_path, monkeypatch, code=1, error="slurm_load_jobs error: Invalid job id specified")
    assert slurm.in_queue(tmp_path / "study") == {}


def test_of_two_submissions_of_a_run_the_living_one_counts(tmp_path: Path, one: RunSpec, monkeypatch):
    submitted(tmp_path, 7, [one.run_id])
    submitted(tmp_path, 9, [one.run_id])
    squeue(tmp_path, monkeypatch, "7_0|CANCELLED|0:00|None|", "9_0|PENDING|4:00:00|Priority|")
    assert slurm.in_queue(tmp_path / "study")[one.run_id].name == "9_0"


def test_what_a_run_waits_for_and_that_it_starts_are_said(one: RunSpec, tmp_path: Path):
    new = status.row(spec(arm="new"), tmp_path)
    assert status.with_slurm(new, task("PENDING", reason="Resources"))["reason"] == "waits: Resources"
    assert status.with_slurm(new, task("RUNNING"))["reason"] == "starting on node1"
    assert status.with_slurm(status.row(one, tmp_path), task("PENDING"))["reason"] == "node b was lost"


def test_how_the_newest_job_ended_is_said_of_runs_that_it_left_undone(tmp_path: Path, one: RunSpec, monkeypatch):
    submitted(tmp_path, 7, [one.run_id])
    submitted(tmp_path, 9, [one.run_id])
    (tmp_path / "study/slurm/2/logs/0.log").write_text("first\njob: exit code 76: no folder can be made in /scratch\n")
    squeue(tmp_path, monkeypatch, "7_0|CANCELLED|0:00|None|")
    (tmp_path / "bin" / "sacct").write_text("#!/bin/sh\necho '9_0|FAILED|76:0|node1'\n")
    (row,) = status.rows([one], tmp_path)
    last = "job: exit code 76: no folder can be made in /scratch"
    assert row["reason"] == f"node b was lost; job 9_0 FAILED (exit code 76): {last}"
    assert (row["job"], row["slurm"]) == ("", "")  # nothing will go on with it
    squeue(tmp_path, monkeypatch, code=1, error="slurm_load_jobs error: Invalid job id specified")
    assert status.rows([one], tmp_path)[0]["reason"] == f"node b was lost; job 9_0 over: {last}"
    RunFolder(tmp_path / "study" / one.run_id).append_metrics(40, {})
    RunFolder(tmp_path / "study" / one.run_id).set_state("done", step=40)
    assert status.rows([one], tmp_path)[0]["reason"] == ""


def test_a_live_table_ends_when_every_run_is_over(tmp_path: Path, one: RunSpec, monkeypatch):
    monkeypatch.setattr(status, "REFRESH_SECONDS", 0.0)
    folder, shown = RunFolder(tmp_path / "study" / one.run_id), []

    def look() -> list[status.Row]:
        found = status.rows([one], tmp_path)
        folder.append_metrics(40 + len(shown), {})  # meanwhile
        folder.set_state("done", step=40)
        return found

    status.watch(look, lambda rows: shown.append(rows[0]["status"]))
    assert shown == ["interrupted", "done"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: folder.state_path.write_text(""),
        lambda folder: folder.state_path.write_text('{"status": "done", "step": "x"}'),
        lambda folder: folder.metrics_path.write_text('{"step": NaN}\n'),
        lambda folder: folder.spec_path.write_text("[]"),
        lambda folder: (folder.metrics_path.unlink(), folder.metrics_path.mkdir()),
    ],
    ids=["empty state", "state of text", "step that is no number", "spec", "folder"],
)
def test_one_damaged_run_hides_no_other(tmp_path: Path, one: RunSpec, damage):
    other = replace(one, seed=one.seed + 1)
    broken = RunFolder(tmp_path / "study" / other.run_id)
    broken.create(other)
    broken.append_metrics(1, {"x": 1.0})
    broken.set_state("running", step=1)
    damage(broken)
    sound, damaged = status.rows([one, other], tmp_path)
    assert (sound["status"], sound["step"]) == ("interrupted", 3)
    assert damaged["status"] == "damaged" and str(broken.path) in damaged["reason"]
    assert "damaged" in status.line(damaged)
