"""compute_score: what is right, what is only well formed, and that it never raises."""

import logging
import random
import string

import pytest

from data_prep.rewards import compute_score

KEYS = ["score", "acc", "pred", "format_ok", "truncated", "timeout"]


def grade(response: str, ground_truth: str = "abba") -> dict[str, float | str]:
    return compute_score("palindrome", response, ground_truth)


@pytest.mark.parametrize("response", ["abba", "baab", " baab\n", "ABBA", "<think>try abab</think>\nabba"])
def test_every_palindrome_of_the_letters_is_right(response):
    result = grade(response)
    assert (result["score"], result["acc"], result["format_ok"], result["truncated"]) == (1.0, 1.0, 1.0, 0.0)


@pytest.mark.parametrize("response", ["abab", "aba", "abcba", "aabbaa", "cddc"])
def test_a_wrong_word_has_the_form_but_no_score(response):
    result = grade(response)
    assert (result["score"], result["acc"], result["format_ok"]) == (0.0, 0.0, 1.0)
    assert result["pred"] == response


@pytest.mark.parametrize(
    "response", ["", " ", "a b b a", "abba.", '"abba"', r"\boxed{abba}", "1221", "the answer is abba"]
)
def test_another_form_scores_nothing(response):
    assert (grade(response)["score"], grade(response)["format_ok"]) == (0.0, 0.0)


def test_a_letter_that_only_lowers_to_ascii_is_not_a_letter():
    kelvin = "\u212a"  # KELVIN SIGN, whose lower case is the ascii k
    assert kelvin.lower() == "k"
    assert grade(f"{kelvin}a{kelvin}", "kak")["score"] == 0.0


def test_an_empty_answer_is_never_right():
    assert grade("", "")["score"] == 0.0


def test_what_follows_the_last_closing_mark_is_the_answer():
    assert grade("abba</think>abab")["score"] == 0.0
    assert grade("x</think>y</think> baab")["pred"] == "baab"


def test_an_unclosed_think_is_truncated():
    assert grade("<think>a b b")["truncated"] == 1.0
    assert grade("<think>x</think>abba")["truncated"] == 0.0
    assert grade("<think>x</think><think>again")["truncated"] == 1.0


def test_an_unknown_source_scores_zero_and_warns_once(caplog):
    with caplog.at_level(logging.WARNING, logger="data_prep.rewards"):
        results = [compute_score("no_such_task", "abba", "abba") for _ in range(3)]
    assert [result["score"] for result in results] == [0.0] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "No reward for data_source 'no_such_task': every response scores 0. Known: palindrome."
    ]


@pytest.mark.parametrize("source", ["palindrome", "unheard", None, 3])
@pytest.mark.parametrize("response", [None, 7, b"abba", "abba", ["abba"]])
@pytest.mark.parametrize("truth", [None, 1.5, ["abba"], "abba"])
def test_the_keys_and_types_are_always_the_same_whatever_comes(source, response, truth):
    result = compute_score(source, response, truth, {"index": 3}, reward_kwarg=1)
    assert list(result) == KEYS
    assert [type(value) for value in result.values()] == [float, float, str, float, float, float]


def test_random_text_never_raises_and_only_real_palindromes_score():
    rng = random.Random(0)
    pieces = [*string.printable, "<think>", "</think>", "\u212a", "\x00", "\ud800", "abba", "\u0130"]
    for _ in range(2000):
        response = "".join(rng.choices(pieces, k=rng.randint(0, 12)))
        answer = response.rpartition("</think>")[2].strip().lower()
        assert grade(response)["score"] == float(answer in ("abba", "baab")), repr(response)
