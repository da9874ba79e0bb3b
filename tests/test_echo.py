"""Answers that repeat a formula of the question: none, unless that is how the right answer is written."""

import json

import pytest

from data_prep.grading.echo import is_echo
from data_prep.rewards import compute_score

SUM = r"Evaluate $\displaystyle\sum_{k=1}^{10} k^2$ and give a number."
ECHOES = [
    # problem, right answer, answer
    (SUM, "385", r"\sum_{k=1}^{10} k^2"),
    (SUM, "385", r"\displaystyle \sum_{k=1}^{10}k^2."),
    (SUM, "385", "k^2"),
    (r"Simplify $\sqrt{50}$.", r"5\sqrt{2}", r"\sqrt{50}"),
    (r"What is $\dbinom{10}{3}$?", "120", r"\binom{10}{3}"),
    (r"Compute $\left(2+3\right)\cdot 4$.", "20", r"(2+3)\cdot4"),
    (r"Write \(\frac{3}{20}\) as a decimal.", "0.15", r"\dfrac{3}{20}"),
    (r"Find $7!$.", "5040", "7!"),
    (r"Let $f(x) = 2$ for all $x$. What is $f(3)$?", "2", "f(x)=2"),
    (r"What is $|{-5}|$?", "5", "|-5|"),
    (r"Find $\log_2 8$.", "3", r"\log_2 8"),
]
ANSWERS = [
    ("Which is larger, 3 or 5?", "5", "5"),
    (SUM, "385", "385"),
    (SUM, "385", r"\sum_{k=1}^{10} k^3"),  # no piece of it, and wrong for itself
    (r"Which of $x^2+1$ and $x^2-1$ is irreducible?", "x^2+1", "x^{2}+1"),
    (r"Is $\frac12$ or $\frac13$ larger?", "1/2", r"\frac{1}{2}"),
    (r"How far is $-5$ from $-12$?", "7", "-5"),  # a sign is no operator
    (r"An angle has $30^\circ$. What is it?", "30", r"30^\circ"),
    ("", "385", r"\sum_{k=1}^{10} k^2"),
]


@pytest.mark.parametrize(("problem", "gold", "answer"), ECHOES)
def test_a_formula_of_the_question_is_no_answer(problem, gold, answer):
    assert is_echo(answer, problem, [gold])


@pytest.mark.parametrize(("problem", "gold", "answer"), ANSWERS)
def test_what_is_no_formula_or_no_piece_or_the_right_text_is_one(problem, gold, answer):
    assert not is_echo(answer, problem, [gold])


def test_one_of_several_right_answers_may_be_written_as_the_question_has_it():
    assert is_echo("2^3", "What is $2^3$?", ["8"])
    assert not is_echo("2^3", "What is $2^3$?", ["8", "2^{3}"])


def grade(meta: dict[str, str], **options: bool) -> tuple[float, float, float, float]:
    row = {"meta": json.dumps(meta)}
    found = compute_score("deepscaler", r"So \boxed{\sum_{k=1}^{10} k^2}.", "385", row, **options)
    return found["score"], found["acc"], found["echoed"], found["format_ok"]


def test_the_reward_refuses_an_echo_where_the_row_brings_the_question_unless_told_otherwise():
    pytest.importorskip("math_verify", reason="math-verify is not installed (make setup)")
    assert grade({"problem": SUM}) == (0.0, 0.0, 1.0, 1.0)
    assert grade({"problem": SUM}, refuse_echo=False) == (1.0, 1.0, 0.0, 1.0)
    assert grade({}) == (1.0, 1.0, 0.0, 1.0)  # a user's file without it grades as before


def test_an_echo_is_looked_for_in_mathematics_only():
    row = {"meta": json.dumps({"problem": "a-b-b-a or abba+?"})}
    assert compute_score("palindrome", "abba", "abba", row)["echoed"] == 0.0
