"""What `klreg gc` removes, and that a run that has lost what it needs says so instead of beginning anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from verl_stack import spec

from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.settings import TrainSpec
from klreg_verl.experiment.store import RunFolder, run_folder
from klreg_verl.verl_hooks import checkpoints
from launch import gc, local
from launch.display import PlainDisplay

TRAIN = TrainSpec(steps=40, max_prompt_tokens=64, max_response_tokens=32)


def saved(root: Path, *steps: int, status: str = "done") -> tuple[RunSpec, RunFolder]:
    """A run of 40 steps with whole checkpoints."""
    one = spec(train=TRAIN)
    folder = run_folder(one, root)
    folder.create(one)
    for step in steps:
        actor = checkpoints.step_folder(folder.checkpoints_dir, step) / "actor"
        actor.mkdir(parents=True)
        (actor / "model_world_size_1_rank_0.pt").write_bytes(b"m" * 100)
        (actor / "optim_world_size_1_rank_0.pt").write_bytes(b"o" * 200)
        checkpoints.mark_complete(actor.parent)
    folder.append_metrics(40, {})
    folder.set_state(status, step=40)
    return one, folder


def names(found: list[gc.Waste]) -> list[tuple[str, int]]:
    return [(waste.path.name, waste.bytes) for waste in found]


def test_a_done_run_keeps_its_newest_checkpoint_and_its_optimizer_unless_asked(tmp_path: Path):
    one, folder = saved(tmp_path, 20, 40)
    (folder.checkpoints_dir / "incomplete_global_step_10").mkdir()
    found = gc.find([one], tmp_path, optimizer=False)
    assert [name for name, _ in names(found)] == ["incomplete_global_step_10", "global_step_20"]
    gc.remove(found)
    assert sorted(path.name for path in folder.checkpoints_dir.iterdir()) == ["global_step_40"]
    assert gc.find([one], tmp_path, optimizer=False) == []


def test_a_run_that_is_not_done_keeps_everything_whole(tmp_path: Path):
    one, folder = saved(tmp_path, 20, 40, status="interrupted")
    assert gc.find([one], tmp_path, optimizer=True) == []
    with folder.lock():
        folder.set_state("done", step=40)
        assert gc.find([one], tmp_path, optimizer=True) == []  # somebody works in it


def test_without_its_optimizer_a_done_run_stays_as_it_is_and_cannot_be_extended(tmp_path: Path):
    one, folder = saved(tmp_path, 40)
    found = gc.find([one], tmp_path, optimizer=True)
    assert names(found) == [("optim_world_size_1_rank_0.pt", 200)]
    gc.remove(found)
    assert checkpoints.newest_complete(folder.checkpoints_dir) == 40
    longer = replace(one, train=replace(TRAIN, steps=80))
    before = folder.state()
    for refused in (
        lambda: local.run([longer], tmp_path, "cpu", PlainDisplay(1)),
        lambda: local.run_one(longer, None, tmp_path, "cpu", None, PlainDisplay(1)),
    ):
        with pytest.raises(ValueError, match="removed the optimizer's state of step 40.*cannot be extended to 80"):
            refused()
        assert folder.state() == before and folder.spec() == one and folder.is_done(one)
    assert not folder.attempts_dir.exists()


def test_a_done_run_without_its_optimizer_that_was_called_failed_is_done_again(tmp_path: Path):
    one, folder = saved(tmp_path, 40)
    gc.remove(gc.find([one], tmp_path, optimizer=True))
    folder.set_state("failed", reason="it could not be extended")
    outcome = local.run_one(one, None, tmp_path, "cpu", None, PlainDisplay(1))
    assert outcome.status == "done" and folder.is_done(one)  # 40 of 40 steps are there


def test_nothing_of_another_run_is_listed(tmp_path: Path):
    one, _ = saved(tmp_path, 20, 40)
    hotter = replace(one, train=replace(TRAIN, temperature=0.9))
    with pytest.raises(ValueError, match="holds another run"):
        gc.find([hotter], tmp_path, optimizer=True)


def test_a_run_whose_checkpoints_are_all_broken_is_not_started_anew(tmp_path: Path):
    one, folder = saved(tmp_path, 20, 40, status="interrupted")
    for marker in folder.checkpoints_dir.rglob(checkpoints.MARKER):
        marker.unlink()
    outcome = local.run_one(one, None, tmp_path, "cpu", None, PlainDisplay(1))
    assert "40 steps are done and no checkpoint in" in outcome.reason and "it would start anew" in outcome.reason
    assert len(list(folder.checkpoints_dir.glob("incomplete_*"))) == 2  # both are still there


def test_a_run_that_was_killed_before_its_first_checkpoint_counted_starts_from_scratch(tmp_path: Path):
    one, folder = saved(tmp_path, status="interrupted")
    folder.metrics_path.write_text('{"step": 20}\n')  # saved every 20: killed between the line and the marker
    assert local.lost_checkpoints(folder, one) is None
    folder.metrics_path.write_text('{"step": 21}\n')
    assert "it would start anew" in local.lost_checkpoints(folder, one)


def test_a_run_that_never_saved_goes_on_with_more_frequent_checkpoints(tmp_path: Path):
    """Every 100 steps, killed at 60: nothing was saved, so nothing is lost, however often it saves from now on."""
    one, folder = saved(tmp_path, status="interrupted")
    folder.metrics_path.write_text('{"step": 60}\n')
    often = replace(one, save=replace(one.save, every=10))
    for every in (100, 10):  # the second attempt was killed before its first step
        (folder.new_attempt() / "verl.json").write_text(f'{{"trainer.save_freq": {every}}}')
        assert local.lost_checkpoints(folder, often) is None
    folder.metrics_path.write_text('{"step": 101}\n')
    assert "101 steps are done" in local.lost_checkpoints(folder, often)
