"""What the first node of a job does before any run starts. Ray over several nodes is in tests/slurm."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from verl_stack import spec

from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.settings import ModelSpec, ResourcesSpec, TaskSpec
from klreg_verl.experiment.store import run_folder
from launch import runner, slurm
from launch.display import PlainDisplay
from launch.job_folder import Job
from launch.meeting import NotMet
from launch.profile import Profile


def job(root: Path, one: RunSpec, **profile: object) -> Job:
    return slurm.make_job([one], Profile(**profile), root / "runs")


def test_a_node_without_gpus_is_told_before_ray_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # nvidia-smi is not there
    one = spec(
        root=str(tmp_path),
        model=ModelSpec(path=str(tmp_path / "model")),
        task=TaskSpec(train=str(tmp_path / "a"), val=str(tmp_path / "b"), reward="rewards:score"),
    )
    with pytest.raises(ValueError, match="nvidia-smi is not there"):
        runner.run_all(job(tmp_path, one), (one,), tmp_path, PlainDisplay(1))
    assert not run_folder(one, tmp_path / "runs").path.exists()


def test_gpus_are_looked_at_before_a_model_is_trained_on_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Else its own process would be found there as somebody else's."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("KLREG_CACHE", str(tmp_path / "cache"))
    one = spec(root=str(tmp_path), model=ModelSpec(path="tiny", options={"steps": 1}))
    with pytest.raises(ValueError, match="nvidia-smi is not there"):
        runner.run_all(job(tmp_path, one), (one,), tmp_path, PlainDisplay(1))
    assert not (tmp_path / "cache").exists()


def test_one_node_alone_needs_no_meeting_and_so_no_interface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    @contextmanager
    def no_ray(*_: object):
        yield SimpleNamespace(address="10.0.0.1:6379")

    monkeypatch.setattr(runner, "ray_session", no_ray)
    one = spec()
    with runner.cluster(job(tmp_path, one, interface="nope0"), one, tmp_path) as watched:
        watched.look_at_nodes()  # nobody who could be lost
    two = spec(resources=ResourcesSpec(nodes=2))
    with pytest.raises(NotMet, match="no IPv4 address at 'nope0'"):
        with runner.cluster(job(tmp_path, two, interface="nope0"), two, tmp_path):
            pass


def test_a_start_of_the_job_is_marked_once_a_run_begins(tmp_path: Path):
    session = SimpleNamespace(start=lambda *_: None)
    watched = runner.Watched(session, tmp_path, None)
    watched.start(["driver"], {"KLREG_RUN": str(tmp_path / "run")}, tmp_path / "log")
    assert (tmp_path / "began").exists()  # job.py counts starts without it
