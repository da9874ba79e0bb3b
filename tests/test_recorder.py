"""What the trainer writes into a run folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from verl_stack import spec

from klreg_verl.experiment.settings import SamplesSpec, SaveSpec
from klreg_verl.experiment.store import RunFolder
from klreg_verl.verl_hooks import checkpoints
from klreg_verl.verl_hooks.recorder import Recorder, numbers


def recorder(path: Path, **sections: Any) -> Recorder:
    folder = RunFolder(path / "run")
    folder.create(spec(**sections))
    folder.new_attempt()
    return Recorder(folder)


def write_checkpoint(run: Recorder, step: int) -> None:
    folder = checkpoints.step_folder(run.folder.checkpoints_dir, step)
    folder.mkdir(parents=True)
    (folder / "data.pt").write_bytes(b"1")
    run.checkpoint_saved(step)


def whole(run: Recorder) -> list[int]:
    root = run.folder.checkpoints_dir
    return [step for step in checkpoints.steps(root) if not checkpoints.problems(checkpoints.step_folder(root, step))]


def test_numbers_are_the_scalars():
    data = {
        "int": 1,
        "numpy": np.float32(0.5),
        "flag": True,
        "text": "x",
        "table": [1, 2],
        "array": np.ones(2),
        "nothing": None,
    }
    assert numbers(data) == {"int": 1.0, "numpy": 0.5, "flag": 1.0}


def test_a_line_has_verls_keys_and_ours(tmp_path: Path):
    run = recorder(tmp_path)
    run.log({"actor/entropy": 0.7, "eval/palindrome/accuracy": 0.5, "text": "x"}, step=0)
    assert run.folder.read_metrics() == [{"step": 0, "actor/entropy": 0.7, "eval/palindrome/accuracy": 0.5}]


LOCK = """
import sys, time
from pathlib import Path
from klreg_verl.experiment.store import RunFolder
with RunFolder(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(1000)
"""


def test_nothing_is_written_once_the_process_that_holds_the_folder_was_killed(tmp_path: Path):
    run = recorder(tmp_path)
    owner = subprocess.Popen([sys.executable, "-c", LOCK, str(run.folder.path)], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None and owner.stdout.readline() == "held\n"
        held = Recorder(run.folder)
        held.log({"a": 1.0}, step=1)
        owner.kill()
        owner.wait()
        with pytest.raises(RuntimeError, match="no longer held by the process .* Step 2 was not written"):
            held.log({"a": 1.0}, step=2)
        with run.folder.lock(), pytest.raises(RuntimeError, match="no longer held"):  # nor once another one has it
            held.log({"a": 1.0}, step=2)
    finally:
        owner.kill()
        owner.wait()
        owner.stdout.close()
    assert [line["step"] for line in run.folder.read_metrics()] == [1]


def test_of_a_process_on_another_node_its_name_is_enough(tmp_path: Path):
    run = recorder(tmp_path)
    (run.folder.path / ".lock").write_text(json.dumps({"pid": 1, "host": "another", "time": 0.0}))
    held = Recorder(run.folder)
    held.log({"a": 1.0}, step=1)
    (run.folder.path / ".lock").write_text(json.dumps({"pid": 2, "host": "another", "time": 1.0}))
    with pytest.raises(RuntimeError, match="no longer held"):
        held.log({"a": 1.0}, step=2)


def test_a_checkpoint_is_whole_only_with_its_line_written(tmp_path: Path):
    run = recorder(tmp_path)
    write_checkpoint(run, 1)
    assert whole(run) == []
    run.log({"a": 1.0}, step=1)
    assert whole(run) == [1]


def test_only_as_many_checkpoints_are_kept_as_the_recipe_says(tmp_path: Path):
    run = recorder(tmp_path, save=SaveSpec(every=1, keep=2))
    for step in (1, 2, 3):
        write_checkpoint(run, step)
        run.log({"a": 1.0}, step=step)
    assert whole(run) == [2, 3]


def test_a_resumed_run_moves_lines_after_its_checkpoint_aside(tmp_path: Path):
    run = recorder(tmp_path)
    for step in (0, 1, 2, 3):
        run.log({"a": float(step)}, step=step)
    run.resume_at(2)
    assert [line["step"] for line in run.folder.read_metrics()] == [0, 1, 2]
    run.resume_at(0)  # no checkpoint at all: the validation before training is done again, too
    assert run.folder.read_metrics() == []


def columns(groups: list[str]) -> dict[str, list[Any]]:
    return {"group": groups, "score": [float(index) for index in range(len(groups))]}


def kept_groups(run: Recorder, step: int) -> list[str]:
    (path,) = run.folder.samples_dir.glob(f"*{step:06d}.parquet")
    return pq.read_table(path).column("group").to_pylist()


def test_samples_are_written_as_often_and_as_many_as_the_recipe_says(tmp_path: Path):
    run = recorder(tmp_path, samples=SamplesSpec(every=2, prompts=2))
    groups = ["10", "2", "9", "2", "10", "9"]
    assert [step for step in (1, 2, 3, 4) if run.wants_samples(step)] == [1, 3]
    run.write_samples(1, columns(groups))
    assert kept_groups(run, 1) == ["2", "9", "2", "9"]  # numbers, not texts: 2 and 9 come before 10


def test_prompts_are_counted_where_groups_have_no_numbers(tmp_path: Path):
    run = recorder(tmp_path, samples=SamplesSpec(prompts=1))
    run.write_samples(1, columns(["b3-x", "a1-x", "b3-x", "a1-x"]))
    assert kept_groups(run, 1) == ["a1-x", "a1-x"]


def test_no_samples_are_written_where_none_are_asked_for(tmp_path: Path):
    run = recorder(tmp_path, samples=SamplesSpec(every=0))
    assert not any(run.wants_samples(step) for step in (1, 2, 3))


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KLREG_RUN", str(tmp_path))
    with pytest.raises(ValueError, match=f"KLREG_RUN={tmp_path} is not a run folder: it has no spec.json."):
        Recorder.from_environment()


def test_without_a_run_folder_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("KLREG_RUN", raising=False)
    assert Recorder.from_environment() is None


@pytest.mark.parametrize(("at_end", "wanted"), [(True, [True, True, True]), (False, [False, True, False])])
def test_the_last_step_is_saved_only_if_the_recipe_says_so(tmp_path: Path, at_end: bool, wanted: list[bool]):
    run = recorder(tmp_path, save=SaveSpec(every=2, at_end=at_end))
    assert [run.wants_checkpoint(step) for step in (1, 2, 3)] == wanted  # verl asks at multiples of 2 and at the end
