"""Which checkpoints are whole, what a restart finds after a kill at any point of a save, and what is kept.

The folder states are those that a SIGKILL leaves in verl's own save: shards, data.pt, the tracker, then our marker.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from klreg_verl.verl_hooks.checkpoints import (
    MARKER,
    TRACKER,
    mark_complete,
    newest_complete,
    problems,
    prune,
    repair,
    step_folder,
    steps,
)

SHARDS = ("model", "optim", "extra_state")


def write_actor(root: Path, step: int, workers: int = 2) -> None:
    actor = step_folder(root, step) / "actor"
    actor.mkdir(parents=True)
    for rank in range(workers):
        for shard in SHARDS:
            (actor / f"{shard}_world_size_{workers}_rank_{rank}.pt").write_bytes(bytes([step]) * (10 + rank))


def write_data(root: Path, step: int) -> None:
    step_folder(root, step).mkdir(parents=True, exist_ok=True)
    (step_folder(root, step) / "data.pt").write_bytes(b"d" * step)


def write_tracker(root: Path, text: str) -> None:
    (root / TRACKER).write_text(text)


def save(root: Path, step: int) -> None:
    """A save that went through, as verl and the recorder do it."""
    write_actor(root, step)
    write_data(root, step)
    write_tracker(root, str(step))
    mark_complete(step_folder(root, step))


def tracker(root: Path) -> str | None:
    return (root / TRACKER).read_text() if (root / TRACKER).exists() else None


@pytest.fixture
def two(tmp_path: Path) -> Path:
    save(tmp_path, 1)
    save(tmp_path, 2)
    return tmp_path


def test_a_finished_checkpoint_is_whole_and_the_newest_counts(two: Path):
    assert problems(step_folder(two, 2)) == []
    assert (steps(two), newest_complete(two)) == ([1, 2], 2)
    assert json.loads((step_folder(two, 2) / MARKER).read_text())["data.pt"] == 2


def test_steps_are_numbers_in_order_and_other_folders_are_nobody(tmp_path: Path):
    for name in ("global_step_10", "global_step_9", "global_step_x", "incomplete_global_step_3", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "global_step_11").write_text("a file")
    assert steps(tmp_path) == [9, 10]


def test_a_checkpoint_without_a_marker_does_not_count(two: Path):
    write_actor(two, 3)
    write_data(two, 3)
    assert problems(step_folder(two, 3)) == [
        "global_step_3: no COMPLETE marker (the run ended while it was being saved)"
    ]
    assert newest_complete(two) == 2


def test_missing_and_truncated_files_are_named_with_their_sizes(two: Path):
    folder = step_folder(two, 2)
    (folder / "actor" / "model_world_size_2_rank_0.pt").unlink()
    (folder / "actor" / "optim_world_size_2_rank_1.pt").write_bytes(b"123")
    assert problems(folder) == [
        "global_step_2/actor/model_world_size_2_rank_0.pt: missing, expected 10 bytes",
        "global_step_2/actor/optim_world_size_2_rank_1.pt: 3 bytes, expected 11 bytes",
    ]
    assert newest_complete(two) == 1


@pytest.mark.parametrize(("text", "reason"), [("", "cannot be read"), ("{", "cannot be read"), ("{}", "names no file")])
def test_a_marker_that_says_nothing_is_a_problem_and_no_crash(two: Path, text: str, reason: str):
    (step_folder(two, 2) / MARKER).write_text(text)
    (problem,) = problems(step_folder(two, 2))
    assert reason in problem
    assert newest_complete(two) == 1


# ------------------------------------------------------------------------------- kills while step 3 is saved after 1, 2


def nothing_written(root: Path) -> None:
    """Killed before the first shard."""


def folder_made(root: Path) -> None:
    (step_folder(root, 3) / "actor").mkdir(parents=True)


def shards_half_written(root: Path) -> None:
    write_actor(root, 3)
    (step_folder(root, 3) / "actor" / "optim_world_size_2_rank_1.pt").write_bytes(b"1")
    (step_folder(root, 3) / "actor" / "extra_state_world_size_2_rank_1.pt").unlink()


def actor_written(root: Path) -> None:
    write_actor(root, 3)


def data_written(root: Path) -> None:
    write_actor(root, 3)
    write_data(root, 3)


def tracker_torn(root: Path) -> None:
    data_written(root)
    write_tracker(root, "")


def tracker_written(root: Path) -> None:
    data_written(root)
    write_tracker(root, "3")


KILLS = [
    nothing_written,
    folder_made,
    shards_half_written,
    actor_written,
    data_written,
    tracker_torn,
    tracker_written,
]


@pytest.mark.parametrize("kill", KILLS, ids=lambda kill: kill.__name__)
def test_a_kill_anywhere_in_a_save_resumes_from_the_checkpoint_before(two: Path, kill: Callable[[Path], None]):
    kill(two)
    notes = repair(two)
    assert (newest_complete(two), tracker(two)) == (2, "2")
    assert steps(two) == [1, 2]
    assert bool(notes) == (kill is not nothing_written)
    assert repair(two) == []  # nothing is left to do


@pytest.mark.parametrize("kill", KILLS, ids=lambda kill: kill.__name__)
def test_a_kill_in_the_first_save_starts_from_the_beginning(tmp_path: Path, kill: Callable[[Path], None]):
    kill(tmp_path)
    repair(tmp_path)
    assert (newest_complete(tmp_path), tracker(tmp_path), steps(tmp_path)) == (None, None, [])


def test_the_actor_deleted_under_the_tracker_resumes_from_what_is_whole(two: Path):
    # verl with one checkpoint kept: 3/actor is written, 2/actor already removed, the tracker still says 2
    write_actor(two, 3)
    shutil.rmtree(step_folder(two, 2) / "actor")
    repair(two)
    assert (newest_complete(two), tracker(two)) == (1, "1")


@pytest.mark.parametrize("text", ["", "7", "x", "-1"])
def test_a_tracker_that_points_nowhere_is_rewritten(two: Path, text: str):
    write_tracker(two, text)
    repair(two)
    assert tracker(two) == "2"


def test_a_missing_tracker_never_means_from_scratch(two: Path):
    (two / TRACKER).unlink()
    repair(two)
    assert tracker(two) == "2"


def test_a_tracker_without_checkpoints_is_removed(tmp_path: Path):
    write_tracker(tmp_path, "4")
    assert repair(tmp_path) == []
    assert tracker(tmp_path) is None


def test_a_run_that_never_started_has_nothing_to_repair(tmp_path: Path):
    assert repair(tmp_path / "checkpoints") == []


def test_repair_keeps_what_it_puts_aside_and_says_what_it_was(two: Path):
    write_actor(two, 3)
    assert repair(two) == ["put aside: global_step_3: no COMPLETE marker (the run ended while it was being saved)"]
    assert (two / "incomplete_global_step_3" / "actor").is_dir()
    write_actor(two, 3)  # the same again: the older remains give way
    repair(two)
    assert [path.name for path in two.glob("incomplete_*")] == ["incomplete_global_step_3"]


def test_pruning_keeps_the_newest_whole_ones_and_clears_what_was_put_aside(two: Path):
    save(two, 3)
    write_actor(two, 4)
    repair(two)
    prune(two, 2)
    assert sorted(path.name for path in two.iterdir()) == ["global_step_2", "global_step_3", TRACKER]
    prune(two, 2)
    assert steps(two) == [2, 3]


def test_pruning_counts_only_whole_ones_and_leaves_the_one_being_written(two: Path):
    write_actor(two, 3)
    prune(two, 2)
    assert steps(two) == [1, 2, 3]


def test_pruning_after_a_restart_removes_what_verl_has_forgotten(tmp_path: Path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    prune(tmp_path, 2)
    assert steps(tmp_path) == [3, 4]
