"""Run folders as values: everything readable is read, everything else is named."""

import json
import os

import pandas as pd
import pytest
from run_folders import write_run, write_study

from klreg_verl.analysis import runs
from klreg_verl.experiment.store import RunFolder


def test_a_run_is_known_by_its_path(tmp_path):
    write_run(tmp_path, "reverse", [{"step": 1, "train/accuracy": 0.5}], grid=("kl.beta=0.1",), seed=3)
    (run,) = runs.load(tmp_path)
    assert (run.arm, run.task, run.grid, run.seed) == ("reverse", "palindrome", ("kl.beta=0.1",), 3)
    assert run.run_id == "reverse/palindrome/kl.beta=0.1/seed3"
    assert run.label == "reverse · beta=0.1"
    assert run.is_done and run.problems == ()


def test_metrics_are_indexed_by_step_and_null_is_missing(tmp_path):
    rows = [{"step": 0, "eval/a": 0.25}, {"step": 1, "x": 1.5}, {"step": 2, "x": None}]
    write_run(tmp_path, "none", rows)
    (run,) = runs.load(tmp_path)
    assert list(run.metrics.index) == [0, 1, 2]
    assert run.metrics.loc[1, "x"] == 1.5
    assert run.metrics["x"].isna().tolist() == [True, False, True]
    assert list(run.training.index) == [1, 2]
    assert run.last_step == 2


def test_a_torn_last_line_is_named_and_the_rest_is_kept(tmp_path):
    folder = write_run(tmp_path, "none", [{"step": 1, "x": 1.0}, {"step": 2, "x": 2.0}])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "x"')
    (run,) = runs.load(tmp_path)
    assert run.metrics["x"].tolist() == [1.0, 2.0]
    assert run.problems == ("metrics.jsonl: the last line is torn; it is left out",)


def test_a_repeated_step_keeps_its_last_line_and_a_gap_is_named(tmp_path):
    write_run(tmp_path, "none", [{"step": 1, "x": 1.0}, {"step": 1, "x": 9.0}, {"step": 4, "x": 4.0}])
    (run,) = runs.load(tmp_path)
    assert run.metrics["x"].to_dict() == {1: 9.0, 4: 4.0}
    assert run.problems == (
        "metrics.jsonl has step 1 more than once; the last line is used",
        "metrics.jsonl has no line for step 2, 3",
    )


def test_lines_that_are_no_rows_are_named_by_number(tmp_path):
    folder = write_run(tmp_path, "none", [])
    (folder / "metrics.jsonl").write_text('[1]\n{"step": NaN}\n{"step": 1, "x": "word", "y": 2}\n')
    (run,) = runs.load(tmp_path)
    assert run.metrics["y"].tolist() == [2.0]
    assert run.metrics["x"].isna().all()
    assert [problem[:35] for problem in run.problems] == [
        "metrics.jsonl: line 1 cannot be rea",
        "metrics.jsonl: line 2 cannot be rea",
    ]


def test_an_empty_run_folder_is_a_pending_run_with_everything_missing(tmp_path):
    (tmp_path / "reverse" / "palindrome" / "seed1").mkdir(parents=True)
    (run,) = runs.load(tmp_path)
    assert run.status == "pending"
    assert run.last_step == 0 and run.steps is None
    names = ["spec.json", "state.json", "provenance.json", "metrics.jsonl"]
    assert run.problems == tuple(f"{name} is missing" for name in names)


def test_a_broken_spec_is_named_and_the_run_still_read(tmp_path):
    folder = write_run(tmp_path, "none", [{"step": 1, "x": 1.0}])
    (folder / "spec.json").write_text("{")
    (run,) = runs.load(tmp_path)
    assert run.arm == "none" and len(run.training) == 1 and not run.kl
    assert run.problems[0].startswith("spec.json is not JSON (")


def test_a_run_that_says_running_is_believed_while_somebody_works_in_it(tmp_path):
    folder = write_run(tmp_path, "none", [{"step": 1, "x": 1.0}])
    # the process id is this living one: a later process may have the number of one that is gone
    (folder / "state.json").write_text(json.dumps({"status": "running", "pid": os.getpid(), "host": "elsewhere"}))
    with RunFolder(folder).lock():
        assert runs.load(tmp_path)[0].status == "running"
    assert runs.load(tmp_path)[0].status == "interrupted" == RunFolder(folder).state().status


def test_order_is_without_kl_first_then_names_then_grid_points_by_number(tmp_path):
    for point in ("beta=0.1", "beta=1e-2", "beta=1"):
        write_run(tmp_path, "reverse", [], grid=(point,))
    for seed in (10, 2):
        write_run(tmp_path, "zero", [], seed=seed, kl={"placement": "none"})
    assert [run.run_id for run in runs.load(tmp_path)] == [
        "zero/palindrome/seed2",
        "zero/palindrome/seed10",
        "reverse/palindrome/beta=1e-2/seed1",
        "reverse/palindrome/beta=0.1/seed1",
        "reverse/palindrome/beta=1/seed1",
    ]


def test_arms_may_be_called_like_seeds_and_insides_of_runs_are_not_searched(tmp_path):
    folder = write_run(tmp_path, "seed1", [])
    (folder / "checkpoints" / "a" / "seed9").mkdir(parents=True)
    assert [run.run_id for run in runs.load(tmp_path)] == ["seed1/palindrome/seed1"]


def test_the_long_table_has_one_row_a_recorded_number(tmp_path):
    write_run(tmp_path, "none", [{"step": 0, "eval/a": 0.5}, {"step": 1, "x": 2.0, "y": None}], seed=7, status="failed")
    runs.write_long_table(runs.load(tmp_path), tmp_path / "long.csv")
    table = pd.read_csv(tmp_path / "long.csv", keep_default_na=False)
    assert table.to_dict("records") == [
        dict(arm="none", task="palindrome", grid="", seed=7, status="failed", step=0, key="eval/a", value=0.5),
        dict(arm="none", task="palindrome", grid="", seed=7, status="failed", step=1, key="x", value=2.0),
    ]


def test_the_long_table_of_nothing_has_its_columns(tmp_path):
    runs.write_long_table([], tmp_path / "long.csv")
    assert (tmp_path / "long.csv").read_text() == "arm,task,grid,seed,status,step,key,value\n"


def test_a_missing_folder_says_what_to_do(tmp_path):
    with pytest.raises(
        ValueError, match="There is no folder .*nowhere. Run the recipe first, or say where .*--runs-dir"
    ):
        runs.load(tmp_path / "nowhere")


def test_the_synthetic_study_starts_every_arm_of_a_seed_alike(tmp_path):
    loaded = runs.load(write_study(tmp_path / "study", steps=3))
    assert len({run.training.loc[1, "train/accuracy"] for run in loaded}) == 1
    assert len({run.training.loc[3, "train/accuracy"] for run in loaded}) == 3


def test_alarms_are_listed_with_their_steps_and_a_saturated_beta_among_them(tmp_path):
    rows = [{"step": step, "train/accuracy": 0.5, "kl/saturated": float(step == 3)} for step in range(5)]
    rows[2]["alarm/kl_above"] = rows[4]["alarm/kl_above"] = 1.0
    run = runs.read_run(write_run(tmp_path, "arm", rows=rows), tmp_path)
    assert run.alarms == {"beta saturated": [3], "kl_above": [2, 4]}
