"""The smoke job: what it runs, and the verdicts it draws from what is found. The job itself is in tests/slurm."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from klreg_verl.experiment.store import RunFolder, run_folder
from klreg_verl.verl_hooks import checkpoints
from launch import gpu, smoke
from launch.job_folder import Job, Submitted
from launch.profile import Container, Profile


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return smoke.make_job(Profile(name="p", nodes=2, gpus_per_node=8), tmp_path / "runs", ())


@pytest.fixture
def submitted(tmp_path: Path) -> Submitted:
    (tmp_path / "job" / "tasks" / "0" / "1").mkdir(parents=True)
    (tmp_path / "job" / "logs").mkdir()
    return Submitted(folder=tmp_path / "job", job_id=7, runs=(("a", "a"),))


def test_it_is_one_run_that_is_extended_on_the_profiles_workers(job: Job):
    ((first, second),) = job.tasks
    assert (first.train.steps, second.train.steps) == (2, 3)
    assert first.hash == second.hash and first.run_id == second.run_id
    assert (second.resources.nodes, second.resources.gpus_per_node) == (2, 8)
    assert second.train.prompts_per_step * second.train.responses_per_prompt % 16 == 0
    assert job.probe


@pytest.mark.parametrize("workers", range(1, 10))
def test_any_number_of_workers_shares_its_prompts(tmp_path: Path, workers: int):
    """The fewest prompts that are 8 or more and a multiple of the workers: 8 8 9 8 10 12 14 8 9."""
    job = smoke.make_job(Profile(gpus_per_node=workers), tmp_path, ())
    assert job.specs[0].train.prompts_per_step == {3: 9, 5: 10, 6: 12, 7: 14, 9: 9}.get(workers, 8)


def test_it_does_without_flash_attn_where_that_is_not_known_to_be_there(tmp_path: Path, monkeypatch):
    def attention(**values: object) -> dict[str, object]:
        return dict(smoke.make_job(Profile(**values), tmp_path, ()).specs[0].verl)

    image = Container(kind="apptainer", image="/k.sif")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert attention() == gpu.WITHOUT_FLASH
    assert attention(platform="cpu") == {}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert attention() == {}
    assert attention(container=image) == gpu.WITHOUT_FLASH


def test_a_model_of_ones_own_is_an_override(tmp_path: Path):
    job = smoke.make_job(Profile(), tmp_path, ["model.path=org/model", "train.max_response_tokens=256"])
    assert job.specs[0].model.path == "org/model"


def test_all_is_fine(job: Job, submitted: Submitted):
    folder = run_folder(job.specs[-1], Path(job.runs_dir))
    folder.create(job.specs[-1])
    for attempt in range(2):
        (folder.new_attempt() / "end.json").write_text(
            json.dumps({"status": "done", "reason": "", "step": 2 + attempt})
        )
    for step in (1, 2, 3):
        line = {"time/step_s": 2.0, "kl_rollout/k1_token": 1e-6, "kl_ref/k3_token": 0.0}
        folder.append_metrics(step, line)
        save(folder, step)
    probe = [["nodes", True, "a, b (0.1 s)"], ["collectives", False, "RuntimeError: no route"]]
    (submitted.folder / "tasks/0/1/probe.json").write_text(json.dumps(probe))
    assert [str(verdict) for verdict in smoke.verdicts(job, submitted)] == [
        "ok    nodes: a, b (0.1 s)",
        "FAIL  collectives: RuntimeError: no route",
        "ok    vLLM samples what the trainer computes: they differ by 1.0e-06 nats/token",
        "ok    reference pass, equal to the policy at step 1: they differ by 0.0e+00 nats/token",
        "ok    two steps: 2.0 s, 2.0 s",
        "ok    save: whole after steps 1, 2, 3",
        "ok    resume: 2 attempts did steps [1, 2, 3]",
    ]


def save(folder: RunFolder, step: int) -> None:
    made = checkpoints.step_folder(folder.checkpoints_dir, step)
    made.mkdir(parents=True)
    (made / "data.pt").write_bytes(b"x")
    checkpoints.mark_complete(made)


def test_a_job_that_never_came_up_says_so_in_every_line(job: Job, submitted: Submitted):
    (submitted.folder / "logs" / "0.log").write_text("first\njob: the nodes of the job did not come together: why\n")
    found = smoke.verdicts(job, submitted)
    assert not any(verdict.fine for verdict in found)
    assert "Ray was never up on all of them. job: the nodes of the job did not come together: why" in found[0].detail
    assert [verdict.detail for verdict in found[1:4]] == ["no step was done", "no step was done", "none was done"]


def test_a_run_that_began_anew_has_not_resumed(job: Job, submitted: Submitted):
    folder = run_folder(job.specs[-1], Path(job.runs_dir))
    folder.create(job.specs[-1])
    (folder.new_attempt() / "end.json").write_text(json.dumps({"status": "failed", "reason": "broken", "step": 1}))
    folder.append_metrics(1, {"kl_rollout/k1_token": 0.5})
    found = {verdict.what: verdict for verdict in smoke.verdicts(job, submitted)}
    assert not found["vLLM samples what the trainer computes"].fine
    assert found["resume"].detail == "1 attempts did steps [1]; broken"
