"""klreg_verl.core.diversity: counts by hand, and data that contradicts itself."""

import pytest
import torch

from klreg_verl.core.diversity import unique_valid


def test_distinct_valid_answers_are_counted_per_prompt_and_averaged():
    # prompt 3: abba twice and baab, so 2 of 2; prompt 8: one valid of 4, the other answer is wrong
    found = unique_valid(
        answers=["abba", "aca", "abba", "baab", "xyz"],
        valid=[True, True, True, True, False],
        group_ids=[3, 8, 3, 3, 8],
        num_possible=[2, 4, 2, 2, 4],
    )
    assert found == {"diversity/unique_valid": 1.5, "diversity/coverage": (2 / 2 + 1 / 4) / 2}


def test_a_prompt_without_valid_answers_counts_as_zero():
    found = unique_valid(["a", "b"], [True, False], [0, 1], [1, 1])
    assert found == {"diversity/unique_valid": 0.5, "diversity/coverage": 0.5}


def test_coverage_is_over_prompts_whose_number_is_known():
    found = unique_valid(["a", "b"], [True, True], [0, 1], [None, 4])
    assert found == {"diversity/unique_valid": 1.0, "diversity/coverage": 0.25}
    assert unique_valid(["a"], [True], [0], [None]) == {"diversity/unique_valid": 1.0}


def test_nothing_to_average_gives_no_key():
    assert unique_valid([], [], [], []) == {}


def test_tensors_are_taken_as_they_come_from_the_trainer():
    found = unique_valid(["a", "b"], torch.tensor([True, True]), torch.tensor([5, 5]), [4, 4])
    assert found == {"diversity/unique_valid": 2.0, "diversity/coverage": 0.5}


def test_the_same_answer_to_two_prompts_counts_for_both():
    assert unique_valid(["a", "a"], [True, True], [0, 1], [None, None]) == {"diversity/unique_valid": 1.0}


def test_more_answers_than_possible_show_as_a_coverage_above_one():
    assert unique_valid(["a", "A"], [True, True], [7, 7], [1, 1])["diversity/coverage"] == 2.0


def test_less_than_one_possible_answer_is_refused():
    with pytest.raises(ValueError, match=r"Prompt 7 is said to have 0 valid answers. Give at least 1, or None"):
        unique_valid(["a"], [False], [7], [0])


def test_responses_to_one_prompt_must_agree_on_the_number():
    with pytest.raises(ValueError, match=r"prompt 7 state different numbers of valid answers: 1, 2"):
        unique_valid(["a", "a"], [True, True], [7, 7], [1, 2])


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="zip"):
        unique_valid(["a"], [True, False], [0, 0], [1, 1])
