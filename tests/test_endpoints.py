"""analysis.endpoints: values of a metric from metrics.jsonl or from what `klreg eval` left, and of single prompts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from run_folders import card, evaluate, synthetic_samples, write_run

from klreg_verl.analysis import claims, endpoints, runs
from klreg_verl.analysis.runs import Run
from klreg_verl.experiment import claims as claiming
from klreg_verl.experiment.claims import ClaimSpec


def run_of(folder: Path, rows: list[dict[str, Any]], **more: Any) -> Run:
    path = write_run(folder, "none", rows, **more)
    return runs.read_run(path, folder)


ACCURACY, PASS = "eval/palindrome/accuracy", "eval/palindrome/pass@2"
HALF, ALL = [[True, False], [True, False]], [[True, True], [True, True]]
STEPS = [{"step": step} for step in range(21)]


def test_an_evaluation_metric_is_the_mean_of_the_last_three(tmp_path: Path) -> None:
    values = {0: 0.1, 5: 0.2, 10: 0.6, 15: 0.7, 20: 0.8}
    rows = [{"step": step} | ({ACCURACY: values[step]} if step in values else {}) for step in range(21)]
    assert endpoints.endpoint(run_of(tmp_path, rows), ACCURACY) == pytest.approx(0.7)


def test_the_evaluation_before_training_is_none_of_them(tmp_path: Path) -> None:
    rows = [{"step": 0, ACCURACY: 0.1}, {"step": 1}, {"step": 2, ACCURACY: 0.5}]
    assert endpoints.endpoint(run_of(tmp_path, rows), ACCURACY) == 0.5


def test_a_training_metric_is_the_mean_of_the_last_ten_steps(tmp_path: Path) -> None:
    rows = [{"step": step, "train/accuracy": float(step)} for step in range(1, 31)]
    assert endpoints.endpoint(run_of(tmp_path, rows), "train/accuracy") == 25.5  # 21 ... 30


def test_a_metric_that_was_not_recorded_has_no_value(tmp_path: Path) -> None:
    run = run_of(tmp_path, [{"step": 1, "x": 1.0}])
    assert math.isnan(endpoints.endpoint(run, "train/accuracy")) and math.isnan(endpoints.endpoint(run, ACCURACY))


# ---------------------------------------------------------------------------------------------------- klreg eval


def test_what_klreg_eval_left_stands_in_where_training_did_not_log_it(tmp_path: Path) -> None:
    run = run_of(tmp_path, STEPS)
    evaluate(run.path, 0, ALL)
    evaluate(run.path, 10, HALF)
    evaluate(run.path, 20, ALL)
    # steps 10 and 20: accuracy (1/2 + 1) / 2, pass@2 as recorded; step 0 is the starting model
    assert endpoints.endpoint(run, ACCURACY) == 0.75 and endpoints.endpoint(run, PASS) == 0.375
    assert endpoints.endpoint(run, "eval/palindrome/diversity/valid_distinct") == 1.5
    assert math.isnan(endpoints.endpoint(run, "eval/palindrome/diversity/share_of_uniform"))


def test_what_training_logged_comes_first(tmp_path: Path) -> None:
    run = run_of(tmp_path, [*STEPS[:20], {"step": 20, ACCURACY: 0.3}])
    evaluate(run.path, 20, ALL)
    assert endpoints.endpoint(run, ACCURACY) == 0.3 and endpoints.settings(run, ACCURACY) is None


def test_a_validation_before_training_alone_does_not_hide_what_klreg_eval_left(tmp_path: Path) -> None:
    run = run_of(tmp_path, [{"step": 0, ACCURACY: 0.1}, *({"step": step, "x": 1.0} for step in range(1, 21))])
    evaluate(run.path, 20, HALF)
    assert ACCURACY in run.training and endpoints.endpoint(run, ACCURACY) == 0.5
    assert endpoints.settings(run, ACCURACY) is not None


def test_evaluations_of_several_settings_are_not_mixed(tmp_path: Path) -> None:
    run = run_of(tmp_path, STEPS)
    evaluate(run.path, 10, HALF, name="a", temperature=0.6)
    evaluate(run.path, 20, [each * 2 for each in ALL], name="b")
    assert endpoints.endpoint(run, ACCURACY) == 1.0  # the one with more samples
    assert json.loads(endpoints.settings(run, ACCURACY) or "")["temperature"] == 1.0


def test_arms_evaluated_with_different_settings_are_said_to_be(tmp_path: Path) -> None:
    claim = ClaimSpec(metric=ACCURACY, contrast=("reverse", "none"), margin=0.1, task="palindrome")
    entry = {"claims": claiming.card({"a": claim}, None, "monday")}
    for arm, temperature in (("none", 1.0), ("reverse", 0.6)):
        for seed in (1, 2):
            path = write_run(tmp_path, arm, STEPS, seed=seed, provenance=card(arm, seed) | entry)
            evaluate(path, 20, HALF, temperature=temperature)
    (verdict,) = claims.judge(runs.load(tmp_path))
    assert verdict.comparison.num == 2
    assert "The runs were evaluated with different settings (samples, temperature, data): this is no fair test." in (
        verdict.notes
    )


# ---------------------------------------------------------------------------------------------------- prompts


def test_prompts_of_training_are_those_of_the_last_ten_steps(tmp_path: Path) -> None:
    samples = {step: synthetic_samples("none", 1, step, 12) for step in range(1, 13)}
    run = run_of(tmp_path, [{"step": step} for step in range(1, 13)], samples=samples)
    found = endpoints.prompt_values(run, "train/accuracy")
    assert {step for step, _ in found} == set(range(3, 13)) and len(found) == 40
    right = [valid for step in range(3, 13) for valid in samples[step]["valid"].to_pylist()]
    assert sum(found.values()) / 40 == pytest.approx(sum(right) / len(right))
    coverage, unique = (endpoints.prompt_values(run, f"diversity/{name}") for name in ("coverage", "unique_valid"))
    assert all(0 <= coverage[place] <= unique[place] for place in coverage)


def test_steps_without_samples_say_nothing_about_prompts(tmp_path: Path) -> None:
    samples = {step: synthetic_samples("none", 1, step, 12) for step in (1, 12)}
    run = run_of(tmp_path, [{"step": step} for step in range(1, 13)], samples=samples)
    assert endpoints.prompt_values(run, "train/accuracy") == {} == endpoints.prompt_values(run, "entropy/token")


def test_held_out_prompts_are_those_of_the_last_evaluation(tmp_path: Path) -> None:
    run = run_of(tmp_path, STEPS)
    evaluate(run.path, 10, ALL)
    evaluate(run.path, 20, [[True, False], [False, False], [True, True]])
    assert endpoints.prompt_values(run, ACCURACY) == {(0,): 0.5, (1,): 0.0, (2,): 1.0}
    assert endpoints.prompt_values(run, PASS) == {}


def test_held_out_prompts_are_of_the_evaluations_that_the_value_is_the_mean_of(tmp_path: Path) -> None:
    run = run_of(tmp_path, STEPS)
    for step, right in ((5, ALL), (10, HALF), (15, HALF), (20, ALL)):
        evaluate(run.path, step, right)
    # the last three: (1/2 + 1/2 + 1) / 3 on both prompts
    found = endpoints.prompt_values(run, ACCURACY)
    assert found == {(0,): pytest.approx(2 / 3), (1,): pytest.approx(2 / 3)}
    assert endpoints.endpoint(run, ACCURACY) == pytest.approx(sum(found.values()) / 2)


def test_a_value_that_training_logged_has_no_prompts_of_another_evaluation(tmp_path: Path) -> None:
    run = run_of(tmp_path, [*STEPS[:20], {"step": 20, ACCURACY: 0.3}])
    evaluate(run.path, 20, ALL)
    assert endpoints.prompt_values(run, ACCURACY) == {}


def test_held_out_prompts_are_drawn_together_over_seeds(tmp_path: Path) -> None:
    claim = ClaimSpec(metric=ACCURACY, contrast=("reverse", "none"), margin=0.1, task="palindrome")
    entry = {"claims": claiming.card({"a": claim}, None, "monday")}
    hard = {"none": [[True, False]] * 20, "reverse": [[True, True]] * 10 + [[False, False]] * 10}
    for arm, right in hard.items():
        for seed in (1, 2, 3):
            evaluate(write_run(tmp_path, arm, STEPS, seed=seed, provenance=card(arm, seed) | entry), 20, right)
    (verdict,) = claims.judge(runs.load(tmp_path))
    # the difference is +1/2 on ten prompts and -1/2 on the others, in every seed: error 1/2 / sqrt(20), not / sqrt(60)
    assert verdict.noise is not None and verdict.noise.standard_error == pytest.approx(0.5 / math.sqrt(20), rel=0.1)
