"""Run folders as values: everything readable is read, everything else is named."""

import json
import os

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from run_folders import write_run, write_study

from klreg_verl.analysis import report, runs, samples
from klreg_verl.experiment.store import RunFolder, write_json


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


# ---------------------------------------------------------------------------------------------------- damage


def sampled(folder, name="sound", **more):
    """A run with samples of step 1 and 2."""
    write_run(folder, name, [{"step": 1, "x": 1.0}, {"step": 2, "x": 2.0}], **more)
    (run,) = [run for run in runs.load(folder) if run.arm == name]
    columns = {"group": "0", "prompt": "p", "response": "r" * 500, "valid": True, "answer": "a"}
    for step in (1, 2):
        rows = [{"step": step, "sample": sample, "score": 1.0, **columns} for sample in range(4)]
        RunFolder(run.path).write_samples(step, pa.Table.from_pylist(rows))
    return run.path


def flip(path):
    data = bytearray(path.read_bytes())
    for place in range(4, 60):
        data[place] ^= 0xFF
    path.write_bytes(data)


def folder_instead(path):
    path.unlink()
    path.mkdir()


LINE = '{"step": 3, "x": %s}\n'
DAMAGE = {
    "a whole number of 400 digits": ("metrics.jsonl", lambda p: p.write_text(LINE % ("9" * 400)), ""),
    "a step of 400 digits": (
        "metrics.jsonl",
        lambda p: p.write_text('{"step": 1, "x": 1}\n{"step": %s}\n' % ("9" * 400)),
        "the last line is torn",
    ),
    "a thousand brackets": ("metrics.jsonl", lambda p: p.write_text("[" * 100_000 + "\n"), "is torn"),
    "NaN and infinity": ("metrics.jsonl", lambda p: p.write_text(LINE % "NaN" + LINE % "-Infinity"), ""),
    "metrics that are a folder": ("metrics.jsonl", folder_instead, "metrics.jsonl is a folder, not a file"),
    "a state that is a folder": ("state.json", folder_instead, "state.json cannot be read (Is a directory)"),
    "an empty state": ("state.json", lambda p: p.write_text(""), "state.json is not JSON"),
    "a spec that is a list": ("spec.json", lambda p: p.write_text("[1]"), "spec.json holds no JSON object"),
    "flipped bytes": ("samples/step_000002.parquet", flip, "samples/step_000002.parquet is damaged ("),
    "a torn file": ("samples/step_000002.parquet", lambda p: p.write_bytes(p.read_bytes()[:-3]), "is torn"),
    "samples that are a folder": ("samples/step_000002.parquet", folder_instead, "is a folder, not a file"),
    "missing columns": (
        "samples/step_000002.parquet",
        lambda p: pq.write_table(pa.table({"prompt": ["p"]}), p),
        "has no column group, response, valid, answer",
    ),
    "a link to itself": ("metrics.jsonl", lambda p: (p.unlink(), p.symlink_to(p)), "metrics.jsonl is missing"),
}


@pytest.mark.parametrize(("name", "damage", "told"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_a_sentence_and_hides_no_other_run(tmp_path, name, damage, told):
    sampled(tmp_path)
    damage(sampled(tmp_path, "broken") / name)
    found = {run.arm: run for run in runs.load(tmp_path)}
    assert found["sound"].problems == () and set(samples.stored_steps(found["sound"])) == {1, 2}
    assert any(told in problem for problem in found["broken"].problems) if told else True


def test_a_report_of_damaged_runs_names_each_and_shows_the_sound_one(tmp_path):
    sampled(tmp_path)
    for number, (name, damage, _) in enumerate(DAMAGE.values()):
        damage(sampled(tmp_path, f"broken{number}") / name)
    written = report.write_report(tmp_path)
    assert "sound" in written.summary.read_text()
    assert all(told in written.markdown.read_text() for _, _, told in DAMAGE.values())


def test_links_without_an_end_are_not_followed(tmp_path):
    folder = sampled(tmp_path)
    (folder.parent / "up").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    assert [run.arm for run in runs.load(tmp_path)] == ["sound"]


def test_a_seed_of_twenty_digits_is_a_seed(tmp_path):
    seed = 10**20 - 1
    write_run(tmp_path, "none", [{"step": 1, "x": 1.0}], seed=seed)
    (run,) = runs.load(tmp_path)
    runs.write_long_table([run], tmp_path / "long.csv")
    assert (
        run.seed == seed
        and (tmp_path / "long.csv").read_text().splitlines()[1] == f"none,palindrome,,{seed},done,1,x,1"
    )


def test_a_run_that_says_done_and_whose_metrics_end_before_is_not_done(tmp_path):
    write_run(tmp_path, "short", [{"step": 1, "x": 1.0}], steps=3)
    (run,) = runs.load(tmp_path)
    write_json(run.path / "state.json", {"status": "done", "step": 3})
    (run,) = runs.load(tmp_path)
    assert run.status == "interrupted" and not run.is_done
    assert "it says done at step 3, and metrics.jsonl ends at step 1" in run.problems
