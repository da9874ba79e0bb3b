"""Golden answers: one string of whatever a file holds, and nothing of what is no answer."""

import json
from decimal import Decimal

import pytest

from data_prep.golden import alternatives, golden_text, is_number


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (142.0, "142"),
        (0.25, "0.25"),
        (-0.5, "-0.5"),
        (1e22, "10000000000000000000000"),
        (1e-7, "0.0000001"),
        (7, "7"),
        (10**30, "1" + 30 * "0"),
        (Decimal("2.50"), "2.5"),
        (True, "True"),
        (" 9.6\n", "9.6"),
        ("$2$", "2"),
        ("$$x+1$$", "x+1"),
        (r"\(3\)", "3"),
        (r"\[ \frac{1}{2} \]", r"\frac{1}{2}"),
        (r"$\boxed{\frac{1}{2}}$", r"\frac{1}{2}"),
        ("097", "097"),
        (["9.6\n"], "9.6"),
        ([["5"]], "5"),
        (["5", "5 ", None, ""], "5"),
        ((1, 2.0), '["1", "2"]'),
        (["a", "b"], '["a", "b"]'),
    ],
)
def test_answers_of_any_type_become_one_string(given, expected):
    assert golden_text(given) == expected


@pytest.mark.parametrize("given", ["$2$,$3$", r"\boxed{1}+\boxed{2}", r"\boxed{\}", r"\(1\)+\(2\)", "[0,1)", "[1, 2]"])
def test_what_only_looks_wrapped_stays_as_it_is(given):
    assert golden_text(given) == given


def test_a_brace_that_is_escaped_does_not_count_in_a_box():
    assert golden_text(r"\boxed{\{1, 2\}}") == r"\{1, 2\}"


@pytest.mark.parametrize(
    "given", [None, "", "  \n", "None", "null", "nan", [], [None], ["", None], float("nan"), float("inf"), "$$", "$ $"]
)
def test_no_answer_is_the_empty_string(given):
    assert golden_text(given) == ""


@pytest.mark.parametrize("given", [{"a": 1}, b"5", [{"a": 1}]])
def test_a_type_that_no_answer_has_is_refused(given):
    with pytest.raises(ValueError, match="is no answer; text, a number, or a list of them is"):
        golden_text(given)


@pytest.mark.parametrize("answers", [["a"], ["a", "b"], ["[1]"], ["[1, 2]", "c"]])
def test_alternatives_read_back_what_was_written(answers):
    assert alternatives(golden_text(answers)) == answers


@pytest.mark.parametrize("given", ['["a", "b"]', ['["a", "b"]'], [['["a"]', "b"]], '["[\\"a\\", \\"b\\"]"]'])
def test_a_text_that_is_a_json_list_is_that_list_and_is_not_quoted_again(given):
    assert golden_text(given) == '["a", "b"]'
    assert alternatives(given) == ["a", "b"]


def test_the_keys_of_a_mapping_are_no_answers():
    assert alternatives({"5": 1}) == [] and alternatives([{"5": 1}, "6"]) == ["6"]


def test_a_json_list_of_other_things_is_one_answer():
    assert alternatives("[1, 2]") == ["[1, 2]"] and alternatives("[]") == ["[]"] and alternatives("[a") == ["[a"]
    assert json.loads(golden_text(["x", "[1, 2]"])) == ["x", "[1, 2]"]


def test_plain_decimals_are_numbers():
    assert [is_number(text) for text in ("12", "-1.5", "1/2", "1e3", "", "x")] == [True, True] + [False] * 4


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ("She has 3+4=<<3+4=7>>7.\n#### 7", "7"),
        ("The answer is $5$", "5"),
        ("Final answer: \\frac{1}{2}.", "\\frac{1}{2}"),
        ("$x=5$.", "x=5"),
        ("5.", "5"),
        ('["0"]', "0"),
        ('["a", "b"]', '["a", "b"]'),
        ("1, 2, 3, ...", "1, 2, 3, ..."),
    ],
)
def test_forms_in_which_published_files_wrap_an_answer(given, answer):
    assert golden_text(given) == answer


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("\frac{1}{2}", r"control character '\\x0c', where a backslash may have been lost"),
        ("She buys three apples and then eats two of them", "is prose, and no response is equal to it"),
        ("half \ud83d", "half of a character"),
    ],
)
def test_what_cannot_be_an_answer_is_refused_with_the_reason(given, why):
    with pytest.raises(ValueError, match=why):
        golden_text(given)


def test_a_formula_with_its_conditions_is_no_prose_and_a_solution_with_formulas_is():
    answer = "$f(x)=a x+b$, where $b$ is an arbitrary integer, and $a$ is an arbitrary positive integer"
    assert golden_text(answer) == answer
    with pytest.raises(ValueError, match="is prose"):
        golden_text("We have $x=2$, which gives $y=1$. Adding both of them leads to $3$")


def test_words_of_a_text_answer_are_no_prose():
    assert golden_text(r"\text{the circle of radius 2}") == r"\text{the circle of radius 2}"
