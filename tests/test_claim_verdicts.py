"""analysis.claims: from run folders to differs, equivalent, undecided; what is registered; what the sentences say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from run_folders import KL_BLOCKS, card, synthetic_samples, write_run

from klreg_verl.analysis import claims, runs
from klreg_verl.analysis.endpoints import kl_beside
from klreg_verl.core import statistics
from klreg_verl.experiment import claims as written
from klreg_verl.experiment.claims import ClaimSpec

COVERAGE = ClaimSpec(metric="diversity/coverage", contrast=("reverse", "none"), margin=0.05, task="palindrome")
ENTROPY = ClaimSpec(metric="entropy/token", contrast=("reverse", "none"), margin=0.05, task="palindrome")
ACCURACY = ClaimSpec(metric="eval/palindrome/accuracy", contrast=("reverse", "none"), margin=0.02, task="palindrome")


def write(
    folder: Path,
    arm: str,
    values: Mapping[int, float],
    *,
    metric: str = "diversity/coverage",
    registered: Mapping[str, ClaimSpec] | None = None,
    kl: float = 1.0,
    block: Mapping[str, object] | None = None,
    **more,
) -> None:
    """One finished run of three steps a seed, with the metric's value at each; cards hold the registered claims."""
    for seed, value in values.items():
        rows = [{"step": step, metric: value, "kl_ref/k1_response": kl} for step in (1, 2, 3)]
        entry = {} if registered is None else {"claims": written.card(registered, None, "monday")}
        write_run(folder, arm, rows, seed=seed, provenance=card(arm, seed) | entry, kl=block, **more)


def judged(folder: Path, recipe: Mapping[str, ClaimSpec] | None = None) -> list[claims.Verdict]:
    return claims.judge(runs.load(folder), recipe)


NONE = {1: 0.50, 2: 0.52, 3: 0.54, 4: 0.56, 5: 0.58}


def against(differences: Sequence[float]) -> dict[int, float]:
    return {seed: NONE[seed] + difference for seed, difference in zip(NONE, differences, strict=True)}


FAR, NEAR, WIDE = [0.10, 0.11, 0.09, 0.10, 0.105], [0.001, -0.001, 0.0, 0.002, -0.002], [0.08, -0.05, 0.06, -0.01, 0.02]


@pytest.mark.parametrize(("differences", "outcome"), [(FAR, "differs"), (NEAR, "equivalent"), (WIDE, "undecided")])
def test_a_claim_ends_in_one_of_three_ways(tmp_path: Path, differences: list[float], outcome: str) -> None:
    write(tmp_path, "none", NONE, registered={"c": COVERAGE})
    write(tmp_path, "reverse", against(differences), registered={"c": COVERAGE})
    (verdict,) = judged(tmp_path)
    assert verdict.decision.outcome == outcome and verdict.is_registered and verdict.family == 1
    assert verdict.comparison.mean == pytest.approx(np.mean(differences))
    assert (verdict.seeds is None) == (outcome != "undecided")


def test_a_claim_that_only_the_recipe_has_is_exploratory_and_not_corrected(tmp_path: Path) -> None:
    write(tmp_path, "none", NONE, registered={})
    write(tmp_path, "reverse", against(FAR), registered={})
    (verdict,) = judged(tmp_path, {"late": COVERAGE})
    assert not verdict.is_registered and verdict.decision.outcome == "differs"
    assert "late (exploratory, not registered before the runs):" in claims.sentences([verdict])[0]
    assert "differs (exploratory)" in claims.lines([verdict])[0]
    assert judged(tmp_path) == []


def test_one_run_that_started_before_the_claim_makes_it_exploratory(tmp_path: Path) -> None:
    write(tmp_path, "none", NONE, registered={"c": COVERAGE})
    write(tmp_path, "reverse", dict(list(against(FAR).items())[:4]), registered={"c": COVERAGE})
    write(tmp_path, "reverse", {5: 0.7}, registered={})
    assert not judged(tmp_path)[0].is_registered


def test_a_card_of_a_version_whose_claims_had_fewer_fields_registers_the_claim(tmp_path: Path) -> None:
    write(tmp_path, "none", NONE, registered={"c": COVERAGE})
    write(tmp_path, "reverse", against(FAR), registered={"c": COVERAGE})
    path = tmp_path / "reverse" / "palindrome" / "seed5" / "provenance.json"
    entry = json.loads(path.read_text())
    del entry["claims"]["list"]["c"]["compare"]
    path.write_text(json.dumps(entry))
    assert judged(tmp_path)[0].is_registered
    entry["claims"]["list"]["c"] |= {"compare": "beta", "at": 0.1}
    path.write_text(json.dumps(entry))
    assert not judged(tmp_path)[0].is_registered


def test_a_margin_changed_after_the_runs_is_another_claim(tmp_path: Path) -> None:
    wider = ClaimSpec(metric="diversity/coverage", contrast=("reverse", "none"), margin=0.5, task="palindrome")
    write(tmp_path, "none", NONE, registered={"c": COVERAGE})
    write(tmp_path, "reverse", against(WIDE), registered={"c": COVERAGE})
    first, second = judged(tmp_path, {"c": wider})
    assert (first.claim, first.is_registered, first.decision.outcome) == (COVERAGE, True, "undecided")
    assert (second.claim, second.is_registered, second.decision.outcome) == (wider, False, "equivalent")


def test_claims_without_runs_yet_or_taken_out_of_the_recipe_count_in_the_family(tmp_path: Path) -> None:
    both = {"c": COVERAGE, "e": ENTROPY}
    write(tmp_path, "none", NONE, registered=both)
    write(tmp_path, "reverse", against(WIDE), registered=both)
    found = {verdict.name: verdict for verdict in judged(tmp_path, {"c": COVERAGE})}
    assert found["c"].family == 2 and found["e"].comparison.num == 0
    assert found["c"].decision.p_difference == pytest.approx(2 * found["c"].comparison.p_difference())


def test_only_finished_runs_enter_and_the_others_are_named(tmp_path: Path) -> None:
    write(tmp_path, "none", NONE, registered={"c": COVERAGE})
    write(tmp_path, "reverse", dict(list(against(FAR).items())[:3]), registered={"c": COVERAGE})
    write(tmp_path, "reverse", {4: 9.0}, registered={"c": COVERAGE}, status="failed", reason="out of memory")
    (verdict,) = judged(tmp_path)
    assert verdict.comparison.seeds == (1, 2, 3) and verdict.comparison.mean == pytest.approx(0.1)
    assert verdict.notes[0] == "Left out: reverse/palindrome/seed4 (failed)."
    assert verdict.notes[1] == "Not paired: seeds 5 have a value in one arm only."


def test_less_than_two_pairs_are_undecided_and_said(tmp_path: Path) -> None:
    write(tmp_path, "none", {1: 0.5}, registered={"c": COVERAGE})
    write(tmp_path, "reverse", {1: 0.6}, registered={"c": COVERAGE})
    (verdict,) = judged(tmp_path)
    assert verdict.decision.outcome == "undecided" and verdict.seeds is None
    assert (
        "diversity/coverage of reverse minus none has 1 pair of seeds, at least 2 are needed"
        in (claims.sentences([verdict])[0])
    )


def test_equal_differences_of_few_seeds_are_undecided_and_said(tmp_path: Path) -> None:
    for arm in ("none", "reverse"):
        write(tmp_path, arm, {1: 1.0, 2: 1.0, 3: 1.0}, registered={"c": COVERAGE})
    (verdict,) = judged(tmp_path)
    assert verdict.decision.outcome == "undecided"
    (told,) = claims.sentences([verdict])
    assert "c: undecided. diversity/coverage of reverse minus none +0.000 in each of 3 seeds, 5 are needed." in told
    assert "All 3 differences are equal: below 5 pairs that says nothing about their spread." in told


def test_a_claim_at_one_beta_says_nothing_of_runs_at_another(tmp_path: Path) -> None:
    at = replace(COVERAGE, contrast=("reverse", "forward"), compare="beta", at=0.1)
    for arm in ("reverse", "forward"):
        for beta, status in ((0.1, "done"), (0.3, "failed")):
            block = KL_BLOCKS[arm] | {"beta": beta}
            write(tmp_path, arm, NONE, registered={"c": at}, block=block, grid=(f"kl.beta={beta}",), status=status)
    assert not any("Left out" in note for note in judged(tmp_path)[0].notes)


def test_a_metric_that_no_run_records_is_said(tmp_path: Path) -> None:
    write(tmp_path, "none", NONE, registered={"c": ACCURACY})
    write(tmp_path, "reverse", against(FAR), registered={"c": ACCURACY})
    assert "No finished run has recorded eval/palindrome/accuracy after step 0." in judged(tmp_path)[0].notes


def test_fewer_than_three_evaluations_are_said(tmp_path: Path) -> None:
    for arm, value in (("none", 0.5), ("reverse", 0.6)):
        for seed in (1, 2):
            rows = [{"step": 1}, {"step": 2, ACCURACY.metric: value}]
            entry = {"claims": written.card({"a": ACCURACY}, None, "monday")}
            write_run(tmp_path, arm, rows, seed=seed, provenance=card(arm, seed) | entry)
    (verdict,) = judged(tmp_path)
    assert "Each run's value is the mean of 1 evaluation, not 3." in verdict.notes


# ---------------------------------------------------------------------------------------------------- where compared


def test_at_equal_beta_only_the_runs_at_that_beta_are_compared(tmp_path: Path) -> None:
    claim = replace(COVERAGE, contrast=("reverse", "forward"), compare="beta", at=0.3)
    for beta, shift in ((0.1, 0.0), (0.3, 0.2)):
        for arm, own in (("reverse", 0.01), ("forward", 0.0)):
            values = {seed: value + shift + own + 0.001 * seed * own for seed, value in NONE.items()}
            block = dict(KL_BLOCKS[arm]) | {"beta": beta}
            write(tmp_path, arm, values, registered={"c": claim}, grid=(f"beta={beta}",), block=block)
    (verdict,) = judged(tmp_path)
    assert verdict.comparison.left[0] == pytest.approx(0.71, abs=1e-3)
    assert verdict.comparison.mean == pytest.approx(0.01, abs=1e-3) and "at beta 0.3" in claims.lines([verdict])[0]


KL_CLAIM = ClaimSpec(
    metric="diversity/coverage",
    contrast=("reverse", "forward"),
    margin=0.001,
    compare="kl",
    between=(1.0, 2.0),
    task="palindrome",
)
CURVES = {
    "reverse": {0.4: (0.9, 0.89), 0.3: (1.1, 0.91), 0.2: (1.5, 0.95), 0.1: (2.0, 1.00), 0.05: (2.5, 1.05)},
    "forward": {0.4: (0.5, 0.80), 0.3: (1.0, 0.85), 0.2: (1.5, 0.90), 0.1: (1.9, 0.94), 0.05: (3.0, 1.05)},
}
"""Coverage 0.8 + 0.1 KL for reverse and 0.05 less for forward, at betas that end at other KLs."""


def write_curves(folder: Path, seeds: Sequence[int], *, without: Sequence[tuple[str, float, int]] = ()) -> None:
    for arm, several in CURVES.items():
        for beta, (kl, value) in several.items():
            lift = 0.001 * (arm == "reverse")
            own = {seed: value + lift * seed for seed in seeds if (arm, beta, seed) not in without}
            block = KL_BLOCKS[arm] | {"beta": beta}
            write(folder, arm, own, registered={"c": KL_CLAIM}, grid=(f"beta={beta}",), kl=kl, block=block)


def test_at_equal_kl_arms_are_compared_by_the_mean_over_the_interval(tmp_path: Path) -> None:
    write_curves(tmp_path, [1, 2, 3, 4, 5])
    (verdict,) = judged(tmp_path)
    # both curves are straight lines: 0.05 apart at every KL, and 0.001 times the seed
    assert verdict.comparison.differences == pytest.approx([0.05 + 0.001 * seed for seed in (1, 2, 3, 4, 5)])
    assert verdict.outcome == "differs" and "at KL 1 to 2" in claims.sentences([verdict])[0]


def test_at_equal_kl_less_than_five_seeds_are_refused(tmp_path: Path) -> None:
    write_curves(tmp_path, [1, 2, 3, 4])
    (verdict,) = judged(tmp_path)
    assert verdict.outcome == "undecided" and verdict.comparison.num == 0
    assert "is not compared: 4 seeds of both arms enclose KL 1 to 2, 5 are needed" in claims.sentences([verdict])[0]


def test_at_equal_kl_a_missing_beta_is_named(tmp_path: Path) -> None:
    write_curves(tmp_path, [1, 2, 3, 4, 5, 6], without=[("forward", 0.2, 3)])
    (verdict,) = judged(tmp_path)
    assert verdict.refused == "the arm forward has no finished run at beta 0.2 of seed 3"


def test_at_equal_kl_three_betas_must_end_inside(tmp_path: Path) -> None:
    narrow = replace(KL_CLAIM, between=(1.2, 1.8))
    write_curves(tmp_path, [1, 2, 3, 4, 5])
    found = {verdict.name: verdict for verdict in judged(tmp_path, {"narrow": narrow})}
    assert found["narrow"].refused.startswith("1 betas of the arm reverse end between KL 1.2 and 1.8, 3 are needed")


def test_a_claim_of_earlier_versions_at_one_kl_is_a_member_of_the_family_and_open(tmp_path: Path) -> None:
    write_curves(tmp_path, [1, 2, 3, 4, 5])
    (_, old) = judged(tmp_path, {"old": replace(KL_CLAIM, between=(), at=1.5)})
    assert old.outcome == "undecided" and old.refused.startswith("a claim at a single KL is not decided")


def test_kl_and_evaluations_are_of_one_window_of_steps(tmp_path: Path) -> None:
    rows = [{"step": step, "kl_ref/k1_response": float(step)} for step in range(1, 51)]
    for step in (10, 20, 30, 40, 50):
        rows[step - 1]["eval/palindrome/accuracy"] = 0.5
    write_run(tmp_path, "reverse", rows)
    (run,) = runs.load(tmp_path)
    # evaluated after steps 30, 40, 50: batches 31 to 50, mean 40.5; a training metric: the last ten steps, 45.5
    assert kl_beside(run, "eval/palindrome/accuracy") == 40.5 and kl_beside(run, "train/accuracy") == 45.5


# ---------------------------------------------------------------------------------------------------- margins


def study_with_start(folder: Path, moved: float) -> claims.Verdict:
    """reverse and forward alike; none moves from 0.5 at step 1 by `moved`."""
    claim = replace(COVERAGE, contrast=("reverse", "forward"), margin=0.03)
    for arm, end in (("none", 0.5 + moved), ("reverse", 0.5), ("forward", 0.5)):
        for seed in (1, 2, 3, 4, 5):
            rows = [
                {"step": step, "diversity/coverage": 0.5 if step == 1 else end + 0.0005 * seed * (arm != "forward")}
                for step in range(1, 13)
            ]
            entry = {"claims": written.card({"c": claim}, None, "monday")}
            write_run(folder, arm, rows, seed=seed, provenance=card(arm, seed) | entry)
    return judged(folder)[0]


def test_a_margin_that_training_without_kl_stays_inside_tells_nothing(tmp_path: Path) -> None:
    verdict = study_with_start(tmp_path, -0.018)
    assert verdict.decision.outcome == "equivalent" and verdict.outcome == "uninformative"
    (told,) = claims.sentences([verdict])
    assert "margin too wide to tell: training without KL itself moved it by −0.0165" in told
    assert "equivalent to zero" not in told and "uninformative" in claims.lines([verdict])[0]
    assert claims.table([verdict])["outcome"].tolist() == ["uninformative"]


def test_a_margin_smaller_than_what_training_moves_is_decided(tmp_path: Path) -> None:
    assert study_with_start(tmp_path, -0.2).outcome == "equivalent"


def test_the_kl_that_the_arms_ended_at_is_said(tmp_path: Path) -> None:
    write(tmp_path, "none", NONE, registered={"c": COVERAGE}, kl=2.5)
    write(tmp_path, "reverse", against(FAR), registered={"c": COVERAGE}, kl=0.75)
    (verdict,) = judged(tmp_path)
    assert verdict.notes[-1] == "KL to the reference at the end: reverse 0.75 and none 2.50 nats per response."


# ---------------------------------------------------------------------------------------------------- noise and words


def test_the_prompts_part_of_the_error_comes_from_the_stored_samples(tmp_path: Path) -> None:
    claim = ClaimSpec(metric="train/accuracy", contrast=("reverse", "none"), margin=0.05, task="palindrome")
    for arm in ("none", "reverse"):
        for seed in (1, 2, 3):
            samples = {step: synthetic_samples(arm, seed, step, 12) for step in range(2, 13)}
            rows = [
                {
                    "step": step,
                    "train/accuracy": float(np.mean(samples[step]["valid"].to_pylist())) if step > 1 else 0.5,
                }
                for step in range(1, 13)
            ]
            entry = {"claims": written.card({"a": claim}, None, "monday")}
            write_run(tmp_path, arm, rows, seed=seed, provenance=card(arm, seed) | entry, samples=samples)
    (verdict,) = judged(tmp_path)
    assert verdict.noise is not None
    # 10 steps x 4 prompts x 3 seeds of 8 draws: about sqrt(2 * 0.25 / 8 / 120) = 0.023
    assert 0.01 < verdict.noise.standard_error < 0.04
    assert "the choice of prompts alone gives 0.0" in claims.sentences([verdict])[0]


def test_without_all_samples_of_the_last_steps_nothing_is_said_about_prompts(tmp_path: Path) -> None:
    write(tmp_path, "none", NONE, registered={"c": COVERAGE})
    write(tmp_path, "reverse", against(FAR), registered={"c": COVERAGE})
    assert judged(tmp_path)[0].noise is None


def test_sentences_state_estimate_interval_p_and_what_they_rest_on(tmp_path: Path) -> None:
    write(tmp_path, "none", NONE, registered={"kept": COVERAGE})
    write(tmp_path, "reverse", against(FAR), registered={"kept": COVERAGE})
    (told,) = claims.sentences(judged(tmp_path))
    # differences 0.10 0.11 0.09 0.10 0.105: mean 0.101, sd 0.0074, error 0.0033, times 2.776
    assert told.startswith(
        "kept: diversity/coverage of reverse minus none differs from zero: +0.1010 (95 % interval 0.0918 to 0.1102, "
        "5 paired seeds)."
    )
    assert "for a difference (paired t)" in told and "Exact sign flips, which decide nothing: p 0.062." in told
    assert "The arms' values correlate by 0.97 over seeds." in told


def test_an_undecided_claim_says_how_many_more_seeds_would_decide(tmp_path: Path) -> None:
    write(tmp_path, "none", NONE, registered={"kept": COVERAGE})
    write(tmp_path, "reverse", against(WIDE), registered={"kept": COVERAGE})
    (verdict,) = judged(tmp_path)
    more = verdict.seeds - 5
    assert more > 0 and f"About {more} more seeds would decide it (80 % power" in claims.sentences([verdict])[0]


def test_a_claim_with_looks_stops_at_those_and_says_which_is_next(tmp_path: Path) -> None:
    looked = replace(COVERAGE, looks=(4, 8))
    write(tmp_path, "none", NONE, registered={"kept": looked})
    write(tmp_path, "reverse", against(WIDE), registered={"kept": looked})
    (verdict,) = judged(tmp_path)
    (told,) = claims.sentences([verdict])
    assert verdict.comparison.seeds == (1, 2, 3, 4) and verdict.every == 5 and verdict.is_registered
    assert "Look 1 of 2; the next is at 8 seeds." in told and "more seed" not in told
    assert "allow for looks at 4, 8 seeds" in told
    low, high = verdict.interval
    wider = verdict.comparison.interval(statistics.look_level((4, 8), 1))
    assert (low, high) == wider and wider[1] - wider[0] > np.diff(verdict.comparison.interval())


def test_before_the_first_look_nothing_is_decided(tmp_path: Path) -> None:
    looked = replace(COVERAGE, looks=(8, 16))
    write(tmp_path, "none", NONE, registered={"kept": looked})
    write(tmp_path, "reverse", against(FAR), registered={"kept": looked})
    (verdict,) = judged(tmp_path)
    assert verdict.decision.outcome == "undecided"
    assert "has 5 pairs of seeds, the first look is at 8." in claims.sentences([verdict])[0]


def test_the_table_has_what_decided(tmp_path: Path) -> None:
    write(tmp_path, "none", NONE, registered={"kept": COVERAGE})
    write(tmp_path, "reverse", against(NEAR), registered={"kept": COVERAGE})
    (row,) = claims.table(judged(tmp_path)).to_dict("records")
    assert (row["claim"], row["outcome"], row["pairs"], row["holm_family"]) == ("kept", "uninformative", 5, 1)
    assert row["low"] < row["difference"] < row["high"] and row["p_equivalence"] < 0.05


def test_no_claims_have_no_lines() -> None:
    assert claims.lines([]) == [] and claims.sentences([]) == [] and claims.table([]).empty


@pytest.mark.parametrize(("p", "text"), [(0.00001, "< 0.0001"), (0.0123, "0.012"), (0.5, "0.50"), (1.0, "1.00")])
def test_p_values_have_two_digits(p: float, text: str) -> None:
    assert claims.p_text(p) == text
