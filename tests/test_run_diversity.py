"""analysis.diversity: stored samples to one row a run, with arms that can be compared."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from run_folders import SAMPLE_FIELDS, write_run, write_study

from klreg_verl.analysis import diversity, embeddings, runs


def samples(step: int, prompts: dict[str, list[tuple[str, bool]]], num_valid: str | None = "4") -> pa.Table:
    """One row a (answer, right) of each prompt."""
    rows = [
        {
            "step": step,
            "group": group,
            "sample": index,
            "data_source": "palindrome",
            "prompt": group,
            "response": answer,
            "score": float(right),
            "valid": right,
            "answer": answer,
            "num_valid": num_valid,
        }
        for group, draws in prompts.items()
        for index, (answer, right) in enumerate(draws)
    ]
    return pa.Table.from_pylist(rows, schema=pa.schema(SAMPLE_FIELDS))


def write(folder: Path, arm: str, stored: dict[int, pa.Table], **more: Any) -> None:
    write_run(folder, arm, [{"step": step} for step in range(1, max(stored) + 1)], samples=stored, **more)


def rows(folder: Path, **how: Any) -> dict[str, dict[str, Any]]:
    return {row["arm"]: row for row in diversity.table(runs.load(folder), **how).to_dict("records")}


ALL_RIGHT = [("abba", True), ("baab", True), ("abba", True), ("abba", True)]
HALF_RIGHT = [("abba", True), ("baab", True), ("abab", False), ("aabb", False)]
ONE_RIGHT = [("abba", True), ("ab", False), ("ba", False), ("aa", False)]


def test_numbers_by_hand(tmp_path: Path) -> None:
    write(tmp_path, "none", {1: samples(1, {"p": ALL_RIGHT})})
    row = rows(tmp_path)["none"]
    assert (row["accuracy"], row["distinct"], row["share_of_possible"]) == (1.0, 2.0, 0.5)
    # two of four right draws differ in 3 of 6 pairs
    assert row["valid_distinct"] == 1.5 and row["valid_entropy"] == pytest.approx(0.5 * math.log(2))


def test_conditional_measures_are_taken_where_all_arms_have_enough_right_draws(tmp_path: Path) -> None:
    # prompt q: only `good` has two right draws. It must not enter the comparison, though it would change `good`
    write(tmp_path, "good", {1: samples(1, {"p": ALL_RIGHT, "q": [("cddc", True)] * 4})})
    write(tmp_path, "poor", {1: samples(1, {"p": HALF_RIGHT, "q": ONE_RIGHT})})
    found = rows(tmp_path)
    assert [found[arm]["valid_prompts"] for arm in ("good", "poor")] == [1, 1]
    assert found["good"]["valid_distinct"] == 1.5 and found["poor"]["valid_distinct"] == 2.0
    assert found["good"]["prompts"] == 2 and found["good"]["distinct"] == 1.5


def test_another_seed_has_other_prompts_and_is_no_reason_to_leave_one_out(tmp_path: Path) -> None:
    write(tmp_path, "none", {1: samples(1, {"p": ALL_RIGHT})}, seed=1)
    write(tmp_path, "none", {1: samples(1, {"r": ALL_RIGHT})}, seed=2)
    assert diversity.table(runs.load(tmp_path))["valid_prompts"].tolist() == [1, 1]


def test_all_runs_are_rarefied_to_the_fewest_draws(tmp_path: Path) -> None:
    write(tmp_path, "many", {1: samples(1, {"p": ALL_RIGHT * 2})})
    write(tmp_path, "few", {1: samples(1, {"p": ALL_RIGHT})})
    found = rows(tmp_path)
    assert found["many"]["samples"] == found["few"]["samples"] == 4
    # 6 abba and 2 baab of 8: four draws without baab are C(6, 4) / C(8, 4) = 15 / 70
    assert found["many"]["distinct"] == pytest.approx(1 + (1 - 15 / 70))


def test_the_start_is_step_1_and_the_end_the_last_ten_steps(tmp_path: Path) -> None:
    stored = {1: samples(1, {"p": ONE_RIGHT}), 5: samples(5, {"p": HALF_RIGHT}), 20: samples(20, {"p": ALL_RIGHT})}
    write(tmp_path, "none", stored)
    assert rows(tmp_path, when="start")["none"]["accuracy"] == 0.25
    assert rows(tmp_path, when="end")["none"]["accuracy"] == 1.0


def test_runs_that_are_not_done_have_no_end(tmp_path: Path) -> None:
    write(tmp_path, "none", {1: samples(1, {"p": ALL_RIGHT})}, status="failed")
    assert rows(tmp_path) == {} and rows(tmp_path, when="start")["none"]["accuracy"] == 1.0


def test_a_task_without_a_known_number_of_answers_has_no_share(tmp_path: Path) -> None:
    write(tmp_path, "none", {1: samples(1, {"p": ALL_RIGHT}, num_valid=None)})
    row = rows(tmp_path)["none"]
    assert math.isnan(row["share_of_possible"]) and row["valid_distinct"] == 1.5


def test_cosines_are_of_the_responses_and_name_their_model(tmp_path: Path) -> None:
    write(tmp_path, "same", {1: samples(1, {"p": [("abba", True)] * 4, "q": [("cddc", True)] * 4})})
    write(tmp_path, "varied", {1: samples(1, {"p": HALF_RIGHT, "q": ONE_RIGHT})})
    found = rows(tmp_path, embedder=embeddings.ngrams())
    assert found["same"]["cosine"] == pytest.approx(1.0, abs=1e-6) and found["varied"]["cosine"] < 0.9
    assert found["same"]["cosine_across"] < 0.5 and found["same"]["embedder"] == "hashed n-grams"
    assert "cosine" not in rows(tmp_path)["same"]


def test_self_bleu_and_vendi_come_when_asked_for(tmp_path: Path) -> None:
    write(tmp_path, "same", {1: samples(1, {"p": [("a b c d", True)] * 4})})
    row = rows(tmp_path, embedder=embeddings.ngrams(), further=True)["same"]
    assert row["self_bleu"] == pytest.approx(1.0) and row["vendi"] == pytest.approx(1.0, abs=1e-4)
    # four words, each four times
    assert row["distinct_1"] == 4 / 16 and row["distinct_2"] == 3 / 12


def test_a_study_of_synthetic_runs_has_a_row_a_run(tmp_path: Path) -> None:
    table = diversity.table(runs.load(write_study(tmp_path, seeds=(1, 2))), embeddings.ngrams())
    assert len(table) == 6 and table["accuracy"].between(0, 1).all() and table["cosine"].notna().all()


def test_no_samples_give_an_empty_table(tmp_path: Path) -> None:
    write_run(tmp_path, "none", [{"step": 1}])
    assert diversity.table(runs.load(tmp_path)).empty and diversity.table([]).empty
