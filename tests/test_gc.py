"""What `klreg gc` removes, and that a run that has lost what it needs says so instead of beginning anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from verl_stack import spec

from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.settings import TrainSpec
from klreg_verl.experiment.store import RunFolder
from klreg_verl.verl_hooks import checkpoints
from launch import gc, local
from launch.display import PlainDisplay
from launch.inputs import run_folder

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


def test_without_its_optimizer_a_checkpoint_is_whole_and_the_run_says_that_it_cannot_be_extended(tmp_path: Path):
    one, folder = saved(tmp_path, 40)
    found = gc.find([one], tmp_path, optimizer=True)
    assert names(found) == [("optim_world_size_1_rank_0.pt", 200)]
    assert local.lost_checkpoints(folder, one.save.every) is None
    gc.remove(found)
    assert checkpoints.newest_complete(folder.checkpoints_dir) == 40
    longer = replace(one, train=replace(TRAIN, steps=80))
    seen: list[str] = []
    display = type(
        "Display", (), {"note": lambda *_: None, "end": lambda self, spec, status, reason: seen.append(reason)}
    )
    outcome = local.run_one(longer, None, tmp_path, "cpu", None, display())
    assert outcome.status == "failed" and seen == [outcome.reason]
    assert "`klreg gc --optimizer` removed the optimizer's state of step 40" in outcome.reason
    assert folder.state().status == "failed" and not folder.attempts_dir.exists()


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
    assert local.lost_checkpoints(folder, 20) is None
    folder.metrics_path.write_text('{"step": 21}\n')
    assert "it would start anew" in local.lost_checkpoints(folder, 20)
