"""analysis.stock: verl's own logs and dumps become run folders and a report, each file by what it holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import real_data
from run_folders import synthetic_rows, write_run
from typer.testing import CliRunner

from klreg_verl import cli
from klreg_verl.analysis import report, runs, stock, stock_dumps


def write_lines(path: Path, lines: list[dict[str, Any]], before: str = "", after: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(before + "".join(json.dumps(line) + "\n" for line in lines) + after, encoding="utf-8")
    return path


def response(prompt: str, output: str, score: float, step: int, **more: Any) -> dict[str, Any]:
    """A line of verl's dump, as trainer_base._write_generations writes it."""
    return {"input": prompt, "output": output, "gts": "7", "score": score, "step": step, **more}


def dump(folder: Path, step: int, right: int, of: int = 4, **more: Any) -> Path:
    """`right` of `of` responses, two a prompt, score 1; the others 0."""
    drawn = [response(f"p{index // 2}", f"{index}", float(index < right), step, **more) for index in range(of)]
    return write_lines(folder / f"{step}.jsonl", drawn)


def logged(step: int, score: float, entropy: float = 0.5, **more: float) -> dict[str, Any]:
    """A line of verl's file logger."""
    return {"step": step, "data": {"critic/score/mean": score, "actor/entropy": entropy, **more}}


def board(folder: Path, rows: dict[int, dict[str, float]]) -> None:
    """A TensorBoard log as verl's logger writes it."""
    writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter(str(folder))
    for step, row in rows.items():
        for key, value in row.items():
            writer.add_scalar(key, value, step)
    writer.close()


def read(folder: Path) -> dict[str, runs.Run]:
    """The runs of a folder by the name of their arm."""
    return {run.arm: run for run in runs.load(stock.import_run(folder).folder)}


def only(folder: Path) -> runs.Run:
    (run,) = read(folder).values()
    return run


def series(run: runs.Run, key: str) -> dict[int, float]:
    return run.metrics[key].dropna().to_dict() if key in run.metrics else {}


def klreg(*arguments: str) -> tuple[int, str]:
    ended = CliRunner().invoke(cli.app, list(arguments))
    return ended.exit_code, ended.output


def write_stock(folder: Path, steps: int = 3) -> Path:
    """Entropy 0.9, 0.8, ...; step s has s of 4 responses right; validated before training and at the end."""
    data = [{"actor/entropy": 1 - step / 10, "critic/score/mean": step / 4} for step in range(1, steps + 1)]
    lines: list[dict[str, Any]] = [{"step": 0, "data": {"val-core/math/acc/mean@4": 0.25}}]
    lines += [{"step": step, "data": each} for step, each in enumerate(data, start=1)]
    lines[-1]["data"]["val-core/math/acc/mean@4"] = 0.75
    write_lines(folder / "log" / "verl.jsonl", lines)
    for step in range(1, steps + 1):
        drawn = [
            response(f"p{index // 2}", f"{index}", float(index < step), step, acc=index < step, pred=f"{index}")
            for index in range(4)
        ]
        write_lines(folder / "rollouts" / f"{step}.jsonl", drawn)
    return folder


# ---------------------------------------------------------------------------------------------------- one run


def test_log_and_dumps_become_a_run(tmp_path: Path) -> None:
    assert stock.is_stock(write_stock(tmp_path))
    run = only(tmp_path)
    assert (run.run_id, run.status, run.last_step, run.problems) == ("stock/math/seed0", "done", 3, ())
    assert run.training["entropy/token"].tolist() == pytest.approx([0.9, 0.8, 0.7])
    assert run.training["train/accuracy"].tolist() == [0.25, 0.5, 0.75]
    assert series(run, "eval/math/accuracy") == {0: 0.25, 3: 0.75}
    assert run.training["actor/entropy"].tolist() == run.training["entropy/token"].tolist()


def test_the_report_has_its_curves_samples_and_diversity(tmp_path: Path) -> None:
    folder = stock.import_run(write_stock(tmp_path)).folder
    html = report.write_report(folder).html.read_text()
    for anchor in ("courses", "samples", "diversity", "evaluation"):
        assert f'<section id="{anchor}">' in html
    assert "its folder does not say which gradient its KL term followed" in html


def test_importing_again_gives_the_same_and_does_not_read_its_own_output(tmp_path: Path) -> None:
    write_stock(tmp_path)
    first = (stock.import_run(tmp_path).folder / "stock/math/seed0/metrics.jsonl").read_bytes()
    assert stock.is_stock(tmp_path)
    assert (stock.import_run(tmp_path).folder / "stock/math/seed0/metrics.jsonl").read_bytes() == first


def test_arms_of_an_earlier_import_that_are_gone_leave_the_report(tmp_path: Path) -> None:
    write_lines(tmp_path / "p/a.jsonl", [logged(1, 0.1)])
    other = write_lines(tmp_path / "p/b.jsonl", [logged(1, 0.9)])
    assert set(read(tmp_path)) == {"a", "b"}
    other.unlink()
    assert set(read(tmp_path)) == {"stock"}


# ---------------------------------------------------------------------------------------------------- logs


def test_a_torn_log_is_read_to_its_last_whole_line(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [logged(1, 0.1, 0.5)], after='{"step": 2, "da')
    assert series(only(tmp_path), "entropy/token") == {1: 0.5}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_loses_no_line(tmp_path: Path, encoding: str) -> None:
    text = "".join(json.dumps(logged(step, 0.1, step / 4)) + "\n" for step in (1, 2))
    (tmp_path / "e.jsonl").write_text(text, encoding=encoding)
    assert series(only(tmp_path), "entropy/token") == {1: 0.25, 2: 0.5}


def test_steps_and_values_that_are_no_numbers_are_left_out_and_counted(tmp_path: Path) -> None:
    odd = [{"step": None, "data": {"actor/entropy": 9.0}}, {"step": "2", "data": {"actor/entropy": [0.5]}}]
    odd += [{"step": 3, "data": {"actor/entropy": float("nan")}}, {"step": 10**400, "data": {"actor/entropy": 1.0}}]
    write_lines(tmp_path / "e.jsonl", [logged(1, 0.1, 0.25), *odd])
    assert "e.jsonl: 2 lines without a step are left out." in stock.import_run(tmp_path).notes
    assert series(only(tmp_path), "entropy/token") == {1: 0.25, 2: 0.5}


def test_keys_of_older_verl_versions_have_our_names_and_validation_scores_are_scores(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"step": 0, "data": {"val/test_score/openai/gsm8k": 0.3}}]
    lines += [{"step": 1, "data": {"actor/entropy_loss": 0.5, "critic/kl": 0.01}}]
    lines += [{"step": 1, "data": {"val/test_score/openai/gsm8k": 0.6}}]
    run = only(write_lines(tmp_path / "p/e.jsonl", lines).parents[1])
    assert series(run, "eval/openai-gsm8k/score") == {0: 0.3, 1: 0.6}
    assert (series(run, "entropy/token"), series(run, "stock/kl_reward")) == ({1: 0.5}, {1: 0.01})
    assert series(run, "eval/openai-gsm8k/accuracy") == {}


def test_what_verl_calls_acc_is_a_score_where_it_leaves_zero_to_one(tmp_path: Path) -> None:
    write_lines(tmp_path / "e.jsonl", [logged(1, 1.5, **{"val-core/x/acc/mean@1": 1.5})])
    assert series(only(tmp_path), "eval/x/score") == {1: 1.5}


def test_tensorboard_alone_is_read(tmp_path: Path) -> None:
    board(tmp_path / "tb", {1: {"actor/entropy": 0.25}, 2: {"actor/entropy": 0.5}})
    assert series(only(tmp_path), "entropy/token") == {1: 0.25, 2: 0.5}


def test_steps_that_a_resumed_log_lost_come_from_tensorboard(tmp_path: Path) -> None:
    rows = {step: {"critic/score/mean": step / 16, "actor/entropy": 0.5} for step in range(1, 7)}
    write_lines(tmp_path / "proj/exp.jsonl", [logged(step, step / 16) for step in (4, 5, 6)])
    board(tmp_path / "tensorboard_log/proj/exp", rows)
    assert series(only(tmp_path), "train/score") == {step: step / 16 for step in range(1, 7)}


def test_what_an_attempt_made_after_the_step_it_was_resumed_at_is_left_out(tmp_path: Path) -> None:
    """Steps 1 to 4, resumed after 2 and ended at 3: step 4 is of no run any more."""
    made = [logged(step, 0.25) for step in (1, 2, 3, 4)] + [logged(3, 0.5)]
    write_lines(tmp_path / "p/e.jsonl", made)
    assert series(only(tmp_path), "train/score") == {1: 0.25, 2: 0.25, 3: 0.5}
    board(tmp_path / "b/tb", {step: {"critic/score/mean": 0.25} for step in (1, 2, 3, 4)})
    write_lines(tmp_path / "b/tb.jsonl", [logged(3, 0.5)])
    assert series(only(tmp_path / "b"), "train/score") == {1: 0.25, 2: 0.25, 3: 0.5}


def test_two_experiments_are_two_arms(tmp_path: Path) -> None:
    """Both begin alike, as arms of one seed do; their means are not one curve's."""
    write_lines(tmp_path / "proj/armA.jsonl", [logged(1, 0.0), logged(2, 0.25), logged(3, 0.5)])
    write_lines(tmp_path / "proj/armB.jsonl", [logged(1, 0.0), logged(2, 1.0)])
    found = read(tmp_path)
    assert {arm: series(run, "train/score") for arm, run in found.items()} == {
        "armA": {1: 0.0, 2: 0.25, 3: 0.5},
        "armB": {1: 0.0, 2: 1.0},
    }


def test_experiments_of_one_name_in_two_projects_are_two_arms(tmp_path: Path) -> None:
    for project, score in (("a", 0.25), ("b", 0.75)):
        write_lines(tmp_path / project / "exp.jsonl", [logged(1, score)])
    assert {arm: series(run, "train/score") for arm, run in read(tmp_path).items()} == {
        "a-exp": {1: 0.25},
        "b-exp": {1: 0.75},
    }


# ---------------------------------------------------------------------------------------------------- dumps


def test_scores_without_acc_are_scores_and_nothing_says_which_are_right(tmp_path: Path) -> None:
    lines = [response("p", text, score, 2) for text, score in (("a", 0.5), ("b", 0.0))]
    write_lines(tmp_path / "rollouts/2.jsonl", lines)
    write_lines(tmp_path / "validation/2.jsonl", lines[:1])
    run = only(tmp_path)
    assert (series(run, "train/score"), series(run, "eval/verl/score")) == ({2: 0.25}, {2: 0.5})
    assert not [key for key in run.metrics if "accuracy" in str(key)]
    made = report.write_report(tmp_path / stock.FOLDER)
    assert "Score" in made.lines[0] and "Accuracy" not in made.lines[0]
    assert '<span class="invalid">' not in made.html.read_text()


def test_a_graded_acc_is_a_score(tmp_path: Path) -> None:
    """verl writes every float score as acc."""
    drawn = [response("p", f"{acc}", acc, 1, acc=acc) for acc in (0.25, 0.75)]
    write_lines(tmp_path / "rollouts/1.jsonl", drawn)
    run = only(tmp_path)
    assert series(run, "train/score") == {1: 0.5} and series(run, "train/accuracy") == {}


def test_padding_rows_are_no_samples(tmp_path: Path) -> None:
    drawn = [response(f"p{index // 2}", "x", 1.0, 1, uid=f"u{index // 2}_{index % 2}_0") for index in range(4)]
    padding = [response("", "", 0.0, 1, uid=f"pad{index}_0_0") for index in range(4)]
    write_lines(tmp_path / "dumped/1.jsonl", [*drawn, *padding])
    assert series(only(tmp_path), "train/score") == {1: 1.0}
    assert any("4 rows that verl added" in note for note in stock.import_run(tmp_path).notes)


def test_a_rollout_of_several_outputs_is_one_sample(tmp_path: Path) -> None:
    """Two rollouts of one prompt, one in two turns: scores 1 and 0, not 1, 1 and 0."""
    drawn = [response("p", f"{at}", score, 1, uid=f"u_{at}") for at, score in (("0_0", 1), ("0_1", 1), ("1_0", 0))]
    write_lines(tmp_path / "rollout/1.jsonl", drawn)
    assert series(only(tmp_path), "train/score") == {1: 0.5}


@pytest.mark.parametrize(
    ("scores", "mean"),
    [((True, [1.0], "0.0", "False"), 0.5), ((1.0, None, "x", [1, 2], float("inf")), 1.0)],
    ids=["numbers in other clothes", "no numbers"],
)
def test_scores_of_every_kind_that_json_has(tmp_path: Path, scores: tuple[Any, ...], mean: float) -> None:
    drawn = [response("p", "x", score, 1) for score in scores] + [
        response([{"role": "user", "content": "p"}], "", 1, 1)
    ]
    write_lines(tmp_path / "rollout/1.jsonl", drawn[: len(scores)])
    assert series(only(tmp_path), "train/score") == {1: mean}


def test_acc_as_text_is_read_as_what_it_says(tmp_path: Path) -> None:
    """verl's V0 trainer writes numpy's booleans by str()."""
    drawn = [response("p", "x", 1.0, 1, acc=text) for text in ("True", "False", "False", "False")]
    write_lines(tmp_path / "rollout/1.jsonl", drawn)
    assert series(only(tmp_path), "train/accuracy") == {1: 0.25}


@pytest.mark.parametrize("names", ["000010.jsonl step_20.jsonl", "global_step_10.jsonl 20.jsonl"])
def test_steps_are_those_of_the_lines_whatever_the_files_are_called(tmp_path: Path, names: str) -> None:
    for name, step in zip(names.split(), (10, 20), strict=True):
        dump(tmp_path / "made", step, 2).rename(tmp_path / name)
        write_lines(tmp_path / "rollout" / name, [response("p", "x", step / 20, step)])
        (tmp_path / name).unlink()
    assert series(only(tmp_path), "train/score") == {10: 0.5, 20: 1.0}


KINDS = {
    "nested": ("rollout_data/exp1", "validation_data/exp1"),
    "test generations": ("rollout", "test_generations"),
    "a word that has val in it": ("retrieval/rollout", "retrieval/val"),
    "camel case": ("trainDumps", "valDumps"),
    "validations are rollouts, too": ("rollouts", "validation_rollouts"),
    "a training folder that says nothing": ("interval", "eval"),
}


@pytest.mark.parametrize("places", KINDS.values(), ids=KINDS)
def test_training_and_validation_are_told_apart_by_whole_words(tmp_path: Path, places: tuple[str, str]) -> None:
    for place, right in zip(places, (1, 3), strict=True):
        for step in (5, 10):
            dump(tmp_path / place, step, right)
    run = only(tmp_path)
    assert series(run, "train/score") == {5: 0.25, 10: 0.25}
    assert series(run, "eval/verl/score") == {5: 0.75, 10: 0.75}


def test_what_the_lines_say_goes_before_names(tmp_path: Path) -> None:
    """Only validation dumps have `reward`, only V0's training dumps `request_id`; step 0 is before training."""
    dump(tmp_path / "reward" / "rollouts", 5, 3, reward=1.0)
    dump(tmp_path / "reward" / "retrieval", 5, 1, request_id="r")
    dump(tmp_path / "zero" / "one", 0, 3)
    dump(tmp_path / "zero" / "two", 1, 1)
    for each, at in (("reward", 5), ("zero", 0)):
        assert series(only(tmp_path / each), "eval/verl/score") == {at: 0.75}
    assert series(only(tmp_path / "reward"), "train/score") == {5: 0.25}


def test_prompts_that_change_and_scores_that_the_log_has_are_of_training(tmp_path: Path) -> None:
    for step in (1, 2):
        write_lines(tmp_path / "prompts/a" / f"{step}.jsonl", [response(f"q{step}", "x", 0.5, step)])
        dump(tmp_path / "prompts/b", step, 3)
        dump(tmp_path / "scores/a", step, 1)
        dump(tmp_path / "scores/b", step, 3)
    write_lines(tmp_path / "scores/log.jsonl", [logged(1, 0.25), logged(2, 0.25)])
    assert series(only(tmp_path / "prompts"), "train/score") == {1: 0.5, 2: 0.5}
    run = only(tmp_path / "scores")
    assert series(run, "train/score") == {1: 0.25, 2: 0.25} and series(run, "eval/verl/score") == {1: 0.75, 2: 0.75}


def test_a_lone_dump_without_a_sign_is_training_and_the_report_says_that_it_was_guessed(tmp_path: Path) -> None:
    dump(tmp_path / "retrieval", 5, 1)
    assert series(only(tmp_path), "train/score") == {5: 0.25}
    assert stock.import_run(tmp_path).notes == (
        "Nothing tells whether retrieval are responses of training or of validation: taken as training's.",
    )


REFUSED = {
    "two folders that say nothing": (("one", "two"), "Neither the lines nor the names tell which of these dumps"),
    "one step twice": (("rollout", "rollouts"), "both have step 5 of training"),
}


@pytest.mark.parametrize(("places", "told"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_told_is_refused_and_nothing_is_written(
    tmp_path: Path, places: tuple[str, str], told: str
) -> None:
    for right, place in enumerate(places):
        dump(tmp_path / place, 5, right)
    code, said = klreg("report", str(tmp_path))
    assert (code, told in said, (tmp_path / stock.FOLDER).exists()) == (2, True, False)


def test_dumps_go_to_the_run_whose_scores_or_name_they_have(tmp_path: Path) -> None:
    for arm, right in (("armA", 1), ("armB", 3)):
        write_lines(tmp_path / "log" / f"{arm}.jsonl", [logged(1, right / 4)])
        dump(tmp_path / arm / "val", 1, right + 1)
    dump(tmp_path / "made/first", 1, 3, request_id="r", acc=True)
    dump(tmp_path / "made/second", 1, 1, request_id="r", acc=False)
    found = read(tmp_path)
    assert {arm: series(run, "eval/verl/score") for arm, run in found.items()} == {"armA": {1: 0.5}, "armB": {1: 1.0}}
    assert {arm: series(run, "train/accuracy") for arm, run in found.items()} == {"armA": {1: 0.0}, "armB": {1: 1.0}}
    dump(tmp_path / "made/third", 1, 2, request_id="r")
    with pytest.raises(ValueError, match="of which run the responses in made/third are; there are: armA, armB"):
        stock.import_run(tmp_path)


def test_dumps_of_two_experiments_without_a_log_are_two_runs(tmp_path: Path) -> None:
    for experiment, right in (("exp1", 1), ("exp2", 3)):
        dump(tmp_path / "rollout_data" / experiment, 5, right)
        dump(tmp_path / "validation_data" / experiment, 5, right + 1)
    found = {arm: (series(run, "train/score"), series(run, "eval/verl/score")) for arm, run in read(tmp_path).items()}
    assert found == {"exp1": ({5: 0.25}, {5: 0.5}), "exp2": ({5: 0.75}, {5: 1.0})}


# ---------------------------------------------------------------------------------------------------- size


def test_large_dumps_are_never_held_whole(tmp_path: Path) -> None:
    """Two dumps, one twelve times the other: reading takes the same memory, within 40 MiB; the mean is over all."""
    text = "word " * 4000
    for name, rows in (("small", 200), ("large", 2400)):
        lines = [response(f"p{index // 8}", f"{index} {text}", index % 2, 1, acc=index % 2) for index in range(rows)]
        write_lines(tmp_path / name / "rollout/1.jsonl", lines)
    peaks = {name: _peak_of_import(tmp_path / name) for name in ("small", "large")}
    assert peaks["large"] - peaks["small"] < 40 * 2**20
    assert (tmp_path / "large/rollout/1.jsonl").stat().st_size > 45 * 2**20
    (run,) = runs.load(tmp_path / "large" / stock.FOLDER)
    assert series(run, "train/accuracy") == {1: 0.5}
    stored = (run.path / "samples").glob("*.parquet")
    assert sum(path.stat().st_size for path in stored) < stock_dumps.STORED_BYTES


def _peak_of_import(folder: Path) -> int:
    """Bytes, in a process of its own."""
    code = (
        "import resource, sys; from pathlib import Path; from klreg_verl.analysis import stock; "
        "stock.import_run(Path(sys.argv[1])); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    return int(ended.stdout) * 1024


# ---------------------------------------------------------------------------------------------------- no runs


def test_a_folder_without_runs_ends_with_2_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_lines(tmp_path / "other/data.jsonl", [{"instruction": "a", "input": "", "output": "b"}])
    for name in ("empty", "other"):
        before = sorted(tmp_path.rglob("*"))
        code, said = klreg("report", str(tmp_path / name))
        assert (code, "There are no runs in" in said, sorted(tmp_path.rglob("*"))) == (2, True, before)


def test_a_damaged_tensorboard_log_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "events.out.tfevents.1.x").write_bytes(b"junk" * 10)
    code, said = klreg("report", str(tmp_path))
    assert (code, "its logs hold no numbers" in said, (tmp_path / stock.FOLDER).exists()) == (2, True, False)


def test_a_folder_a_step_is_one_dump(tmp_path: Path) -> None:
    for step in (1, 2):
        write_lines(tmp_path / f"rollout/global_step_{step}/responses.jsonl", [response("p", "x", step / 2, step)])
    assert series(only(tmp_path), "train/score") == {1: 0.5, 2: 1.0}


def test_run_folders_of_our_own_and_empty_folders_are_not_stock(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "ours", "none", synthetic_rows("none", 1, 2))
    assert not stock.is_stock(tmp_path / "empty") and not stock.is_stock(tmp_path / "ours")


# ---------------------------------------------------------------------------------------------------- other people's


EXPECTED = {
    "padding": {"stock": {"train/score": {1: 1.0}}},
    "nested": {"stock": {"train/score": {5: 0.25, 10: 0.25}, "eval/verl/score": {5: 1.0, 10: 1.0}}},
    "testgen": {"stock": {"train/score": {5: 0.25}, "eval/verl/score": {5: 1.0}}},
    "names": {"stock": {"train/score": {10: 0.5, 20: 0.5, 30: 0.5}}},
    "odd": {"stock": {"train/score": {1: 1.0}}},
    "bom": {"stock": {"entropy/token": {1: 0.5, 2: 0.4}}},
    "oldkeys": {"stock": {"eval/openai-gsm8k/score": {0: 0.3, 3: 0.6}}},
    "resumed": {"stock": {"train/score": {step: step / 100 for step in range(1, 11)}}},
    "twoexp": {
        "armA": {"train/score": {step: step / 100 for step in range(1, 11)}},
        "armB": {"train/score": {step: 0.5 + step / 100 for step in range(1, 6)}},
    },
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_folders_of_public_reports(tmp_path: Path, name: str) -> None:
    folder = real_data.copied(Path("stock") / name, tmp_path)
    found = read(folder)
    assert set(found) == set(EXPECTED[name])
    for arm, metrics in EXPECTED[name].items():
        for key, values in metrics.items():
            assert series(found[arm], key) == pytest.approx(values, rel=1e-6), (arm, key)
    assert klreg("report", str(folder), "--embedder", "none")[0] == 0
