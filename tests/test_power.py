"""analysis.power and `klreg power`: seeds for a difference or an equivalence, from a spread given or measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from run_folders import evaluate, write_run
from typer.testing import CliRunner

from klreg_verl.analysis import power, runs
from klreg_verl.analysis.power import Question
from klreg_verl.cli import app
from klreg_verl.core import statistics
from klreg_verl.experiment.claims import ClaimSpec

LEFT, RIGHT = {1: 0.60, 2: 0.64, 3: 0.61, 4: 0.67}, {1: 0.50, 2: 0.52, 3: 0.53, 4: 0.55}
"""Differences 0.10 0.12 0.08 0.12: mean 0.105, sd 0.01915."""
SD = 0.0191485


@pytest.fixture
def study(tmp_path: Path) -> Path:
    for arm, values in (("none", LEFT), ("reverse", RIGHT)):
        for seed, value in values.items():
            write_run(tmp_path / "study", arm, [{"step": 1, "train/accuracy": value}], seed=seed)
    return tmp_path / "study"


def klreg(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["power", *arguments])
    return result.exit_code, result.output


def test_the_table_is_in_units_of_the_spread_without_one() -> None:
    (row,) = power.seeds_table(Question(), seeds=[5])
    # 5 pairs: power_difference(1.682, 5) = 0.8
    assert row["difference"] == pytest.approx(1.682, abs=1e-3)
    (scaled,) = power.seeds_table(Question(), sd=0.02, seeds=[5])
    assert scaled["difference"] == pytest.approx(0.02 * row["difference"])


def test_more_claims_need_more_seeds() -> None:
    alone, three = (power.needed(Question(difference=0.5, claims=claims), 1.0)["difference"] for claims in (1, 3))
    assert alone == 34 == statistics.seeds_for_difference(0.5)
    assert three == statistics.seeds_for_difference(0.5, 0.05 / 3) > alone


def test_the_spread_is_that_of_paired_differences(study: Path) -> None:
    (spread,) = power.spreads(runs.load(study), ["train/accuracy"])
    assert (spread.first, spread.second) == ("none", "reverse")
    assert spread.comparison.mean == pytest.approx(0.105) and spread.comparison.sd == pytest.approx(SD, rel=1e-4)
    assert spread.limit == pytest.approx(statistics.sd_limit(SD, 3), rel=1e-4) and spread.limit > 1.5 * SD


def test_unfinished_runs_say_nothing_about_the_spread(study: Path) -> None:
    write_run(study, "none", [{"step": 1, "train/accuracy": 9.0}], seed=5, status="failed")
    write_run(study, "reverse", [{"step": 1, "train/accuracy": 0.0}], seed=5)
    assert power.spreads(runs.load(study), ["train/accuracy"])[0].comparison.num == 4


def test_a_metric_that_no_run_has_is_refused(study: Path) -> None:
    with pytest.raises(ValueError, match="No run has recorded entropy/token. Recorded are: train/accuracy."):
        power.spreads(runs.load(study), ["entropy/token"])


def test_without_a_spread_everything_is_shown_by_five_seeds() -> None:
    assert power.needed(Question(margin=0.1, difference=0.1), 0.0) == {"difference": 5, "margin": 5}


# ---------------------------------------------------------------------------------------------------- klreg plan

CLAIM = ClaimSpec(metric="train/accuracy", contrast=("none", "reverse"), margin=0.05, task="palindrome")


def test_a_plan_of_one_seed_says_that_it_shows_nothing() -> None:
    assert power.plan_lines(1, {}) == [
        "seeds 1: shows that the recipe works; a difference between arms cannot be told from chance"
    ]


def test_a_plan_says_what_its_seeds_show_and_what_a_margin_asks_of_the_spread() -> None:
    first, claim = power.plan_lines(5, {"c": CLAIM})
    assert first.startswith("seeds 5: see differences of 1.68 times the sd between paired seeds (80% power)")
    # margin 0.05 over 1.600 sd = 0.0312
    assert claim == (
        "claim c: train/accuracy of none minus reverse, margin ±0.05: equivalence can be shown if the sd is at most "
        "0.0312"
    )


def test_a_plan_with_runs_speaks_in_the_metrics_unit(study: Path) -> None:
    _, claim = power.plan_lines(8, {"c": CLAIM}, runs.load(study))
    limit = statistics.sd_limit(SD, 3)
    assert f"with the spread of 4 finished seeds sees {limit * statistics.detectable_difference(8):.3f}" in claim
    assert claim.endswith("equivalence can be shown")


def test_a_claim_with_looks_is_planned_for_its_last_one() -> None:
    _, claim = power.plan_lines(5, {"c": replace(CLAIM, looks=(5, 10))})
    # ten pairs at the nominal level 0.0480 of the second look instead of 0.05
    margin = statistics.smallest_margin(10, statistics.look_level((5, 10), 2))
    assert claim.endswith(f"looks at 5, 10 seeds: equivalence can be shown if the sd is at most {0.05 / margin:.3g}")


def test_the_plan_command_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KLREG_RUNS", str(tmp_path))
    recipe = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
    result = CliRunner().invoke(app, ["plan", str(recipe), "seeds=[1,2,3,4,5]"])
    assert result.exit_code == 0 and "seeds 5: see differences of 1.68 times the sd" in result.output
    claim = "claims.kept={metric: diversity/coverage, contrast: [reverse, none], margin: 0.02}"
    result = CliRunner().invoke(app, ["plan", str(recipe), "seeds=[1,2,3,4,5]", claim])
    assert (
        "claim kept: diversity/coverage of reverse minus none, margin ±0.02: equivalence can be shown" in result.output
    )


# ---------------------------------------------------------------------------------------------------- klreg power


def test_the_command_without_options_prints_the_table() -> None:
    code, told = klreg()
    assert code == 0 and "80% power at an error rate of 0.05, times the sd of a paired difference:" in told
    assert "    5             1.68                 1.60" in told


def test_the_command_answers_for_a_difference_and_a_margin() -> None:
    code, told = klreg("--sd", "0.02", "--difference", "0.01", "--margin", "0.01")
    assert code == 0 and "to see a difference of 0.01: 34 seeds" in told
    assert "to show equivalence within ±0.01: 36 seeds" in told


def test_the_json_answers_for_a_difference_and_a_margin_too() -> None:
    code, told = klreg("--sd", "0.02", "--difference", "0.01", "--margin", "0.01", "--json")
    rows = json.loads(told)
    assert code == 0 and {(row["seeds_for_difference"], row["seeds_for_margin"]) for row in rows} == {(34, 36)}


def test_the_spread_of_what_klreg_eval_left_is_known(tmp_path: Path) -> None:
    metric = "eval/palindrome/pass@2"
    for arm in ("none", "reverse"):
        for seed in (1, 2):
            evaluate(write_run(tmp_path, arm, [{"step": 1, "x": 1.0}], seed=seed), 1, [[True, seed == 1]])
    (found,) = power.spreads(runs.load(tmp_path), [metric])
    assert found.comparison.left == (0.5, 0.25)  # as recorded: half of the accuracies 1 and 1/2


def test_the_command_measures_the_spread_from_runs(study: Path) -> None:
    code, told = klreg("--from", str(study), "--difference", "0.05")
    assert code == 0 and "train/accuracy  none minus reverse: sd 0.0191 (at most 0.0331) over 4 seeds" in told
    code, text = klreg("--from", str(study), "--json")
    assert code == 0 and json.loads(text)[0]["sd"] == pytest.approx(SD, rel=1e-4)


def test_runs_without_shared_seeds_say_so(tmp_path: Path) -> None:
    write_run(tmp_path / "study", "none", [{"step": 1, "train/accuracy": 0.5}])
    code, told = klreg("--from", str(tmp_path / "study"))
    assert code == 0 and "no spread between seeds is known" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--difference", "0.1"], "--difference and --margin are in the metric's unit: give --sd too, or --from RUNS."),
        (["--sd", "0"], "--sd 0.0: give a number above 0"),
        (["--sd", "1", "--difference", "-1"], "--difference -1.0: give a number above 0"),
        (["--sd", "1", "--from", "runs"], "--from takes the spread from runs and --sd gives it."),
        (["--metric", "x/y"], "--metric has no effect without --from RUNS."),
        (["--claims", "0"], "--claims 0: a list has at least one claim."),
        (["--level", "1.5"], "--level 1.5: give a number between 0 and 1."),
        (["--power", "0.04"], "--power 0.04 is not above the error rate 0.05"),
        (["--from", "nowhere"], "There is no folder nowhere."),
    ],
)
def test_bad_options_are_refused(arguments: list[str], message: str) -> None:
    code, told = klreg(*arguments)
    assert code == 2 and message in told
