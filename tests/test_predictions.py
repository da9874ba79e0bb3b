"""analysis.optimum: which arms have a known optimum, and predicted against achieved from run folders."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from run_folders import SAMPLE_FIELDS, write_run

from klreg_verl.analysis import optimum, runs
from klreg_verl.analysis.summary import group_runs
from klreg_verl.core.optimum import optimal_accuracy

REVERSE = {"placement": "reward", "estimator": "k1", "follows": "reverse", "beta": 0.5}
DRAWN = {"placement": "loss", "estimator": "reference_samples", "follows": "forward", "beta": 0.1}


def spec(kl: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"kl": kl, **more}


@pytest.mark.parametrize(
    ("kl", "direction", "is_exact"),
    [
        (REVERSE, "reverse", True),
        (REVERSE | {"credit": "reward_to_go"}, "reverse", True),
        (REVERSE | {"credit": "token"}, "reverse", False),
        ({"placement": "loss", "estimator": "k2", "follows": "reverse", "beta": 0.5}, "reverse", False),
        ({"placement": "loss", "estimator": "k3", "follows": "forward", "beta": 0.5}, "forward", False),
        ({"placement": "loss", "estimator": "full_reverse", "follows": "reverse", "beta": 0.5}, "reverse", False),
    ],
)
def test_arms_whose_optimum_is_known(kl: dict[str, Any], direction: str, is_exact: bool) -> None:
    found = optimum.known(spec(kl))
    assert (found.direction, found.is_exact, found.beta) == (direction, is_exact, 0.5)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (spec({"placement": "none"}), "the optimum is accuracy 1, at any distance"),
        (spec({}), "the optimum is accuracy 1, at any distance"),
        (spec(REVERSE | {"beta": 0.0}), "beta 0 or none: the optimum is accuracy 1"),
        (spec(REVERSE | {"controller": {"kind": "matched_kl"}}), "its beta moves"),
        (spec(REVERSE | {"shaping": {"kind": "clip"}}), "shaped or capped"),
        (spec(REVERSE, reference={"ema": 0.99}), "its reference moves"),
        (spec(REVERSE, train={"advantage": "grpo"}), "grpo weighs the reward otherwise than the KL"),
        (spec(REVERSE | {"estimator": "k3"}), "no closed form is known"),
        (spec(REVERSE | {"placement": "both"}), "no closed form is known"),
        (spec({"placement": "loss", "estimator": "js", "follows": "js", "beta": 1.0}), "it follows js"),
    ],
)
def test_arms_whose_optimum_is_not_known_say_why(given: dict[str, Any], why: str) -> None:
    found = optimum.known(given)
    assert found.direction is None and why in found.why


def test_reference_samples_have_a_beta_per_response_beside_a_policy_loss_per_token() -> None:
    # -beta mean_responses sum_t log pi, beside policy terms divided by the mean length: 0.1 * 6 tokens
    found = optimum.known(spec(DRAWN), length=6.0)
    assert (found.direction, found.is_exact) == ("forward", True) and found.beta == pytest.approx(0.6)
    summed = optimum.known(spec(DRAWN, train={"loss_aggregation": "seq-mean-token-sum"}), length=6.0)
    assert summed.beta == 0.1 and summed.why == ""
    assert optimum.known(spec(DRAWN, train={"loss_aggregation": "seq-mean-token-mean"})).direction is None


def samples(step: int, accuracy: float, seed: int, prompts: int = 40, draws: int = 16) -> pa.Table:
    """Right answers evenly one of four, right with the given chance."""
    generator = random.Random(f"{step}/{seed}/{accuracy}")
    rows = []
    for prompt in range(prompts):
        for sample in range(draws):
            right = generator.random() < accuracy
            answer = generator.choice("wxyz") if right else ""
            values = [step, str(prompt), sample, "palindrome", "p", answer, float(right), right, answer, "4"]
            rows.append(dict(zip([name for name, _ in SAMPLE_FIELDS], values, strict=True)))
    return pa.Table.from_pylist(rows, schema=pa.schema(SAMPLE_FIELDS))


def study(folder: Path, arm: str, kl: dict[str, Any], start: float, end: float) -> None:
    for seed in (1, 2):
        rows = [
            {"step": step, "train/accuracy": end, "kl_ref/k1_response": 0.31, "response/length": 6.0}
            for step in range(1, 21)
        ]
        stored = {1: samples(1, start, seed), 20: samples(20, end, seed)}
        write_run(folder, arm, rows, seed=seed, kl=kl, samples=stored)


def achieved(folder: Path, **how: Any) -> list[optimum.Achieved]:
    return optimum.compare(group_runs(runs.load(folder)), **how)


def test_an_arm_at_its_optimum_reaches_what_was_predicted(tmp_path: Path) -> None:
    best = float(optimal_accuracy(0.5, 0.5, "reverse"))  # 1 / (1 + e^-2) = 0.881
    study(tmp_path, "reverse", REVERSE, start=0.5, end=best)
    (row,) = achieved(tmp_path)
    assert best == pytest.approx(1 / (1 + math.exp(-2)))
    assert row.prediction is not None and row.prediction.prompts == 80 and row.prediction.samples == 4
    assert row.prediction.accuracy == pytest.approx(row.accuracy.mean, abs=0.03)
    # KL: 0.881 log(0.881 / 0.5) + 0.119 log(0.119 / 0.5) = 0.328
    assert row.prediction.kl == pytest.approx(0.328, abs=0.03)
    # four draws right with 0.881, evenly one of four: 4 (1 - (1 - 0.881 / 4)^4) = 2.52
    assert row.prediction.distinct == pytest.approx(2.52, abs=0.12)
    assert row.distinct.mean == pytest.approx(2.52, abs=0.12) and row.distinct.num == 2


def test_starting_draws_are_counted_once_a_seed(tmp_path: Path) -> None:
    study(tmp_path, "none", {"placement": "none"}, start=0.5, end=0.9)
    study(tmp_path, "reverse", REVERSE, start=0.5, end=0.9)
    assert len(optimum.starting_draws(group_runs(runs.load(tmp_path)))) == 80


def test_sentences_say_what_was_predicted_or_why_nothing_was(tmp_path: Path) -> None:
    study(tmp_path, "none", {"placement": "none"}, start=0.5, end=0.9)
    study(tmp_path, "reverse", REVERSE, start=0.5, end=0.8)
    study(tmp_path, "weak", REVERSE | {"beta": 0.05}, start=0.5, end=0.9)
    study(tmp_path, "tokens", REVERSE | {"credit": "token"}, start=0.5, end=0.9)
    told = {text.partition(": ")[0]: text for text in optimum.sentences(achieved(tmp_path))}
    assert told["none"] == "none: no optimum is known (no KL term: the optimum is accuracy 1, at any distance)."
    assert told["reverse"].startswith("reverse: the optimum of reverse KL at beta 0.5 is accuracy 0.8")
    assert "achieved were 0.800 ± 0.000 at 0.31" in told["reverse"]
    # 0.8 - 0.5 * 0.31 = 0.645; at p = 1/2 the optimum has beta log((1 + e^2) / 2) = 0.717: 0.14 nats
    assert "Its objective E[R] - beta KL is 0.645 of 0.7" in told["reverse"]
    assert told["reverse"].endswith("nats from the optimum.") and "objective" not in told["tokens"]
    assert told["weak"].startswith("weak: empty: at beta 0.05 the optimum of reverse KL is accuracy 1.000")
    assert "(orientation only: its KL term is each token's own" in told["tokens"]


def test_without_stored_samples_there_is_no_prediction(tmp_path: Path) -> None:
    write_run(tmp_path, "reverse", [{"step": 1, "train/accuracy": 0.5}], kl=REVERSE)
    (row,) = achieved(tmp_path)
    assert row.prediction is None
    assert optimum.sentences([row]) == ["reverse: no prediction (no samples of the starting model are stored)."]
