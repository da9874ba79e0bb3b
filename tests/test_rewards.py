"""compute_score: what is right, what is only well formed, how an answer is found, and that it never raises."""

import itertools
import json
import logging
import random
import string

import pytest

from data_prep.grading import mathematics
from data_prep.grading.pool import Ungraded
from data_prep.rewards import RewardOptions, compute_score

KEYS = ["score", "acc", "pred", "format_ok", "truncated", "timeout", "echoed"]


def grade(response: str, ground_truth: str = "abba", **options) -> dict[str, float | str]:
    return compute_score("palindrome", response, ground_truth, **options)


def solve(response: str, ground_truth="5", source: str = "deepscaler", **options) -> dict[str, float | str]:
    return compute_score(source, response, ground_truth, **options)


# ------------------------------------------------------------------------------------------------------- palindromes


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
    assert solve(r"\boxed{}", "")["score"] == 0.0


def test_what_follows_the_last_closing_mark_is_the_answer():
    assert grade("abba</think>abab")["score"] == 0.0
    assert grade("x</think>y</think> baab")["pred"] == "baab"


def test_an_unclosed_think_is_truncated():
    assert grade("<think>a b b")["truncated"] == 1.0
    assert grade("<think>x</think>abba")["truncated"] == 0.0
    assert grade("<think>x</think><think>again")["truncated"] == 1.0


@pytest.mark.parametrize(
    ("response", "score"),
    [("abba", 1.0), ("aba", 0.05), ("a", 0.05), ("abab", 0.02), ("abba.", 0.02), ("a b b a", 0.05), ("", 0.0)],
)
def test_partial_credit_is_reasoning_gyms_and_leaves_accuracy_alone(response, score):
    result = grade(response, partial_credit=True)
    assert (result["score"], result["acc"]) == (score, float(score == 1.0))


# ------------------------------------------------------------------------------------------- where the answer is found


@pytest.mark.parametrize("response", [r"so \boxed{abba}", r"<answer>abba</answer>\boxed{BAAB}"])
def test_an_option_says_where_the_answer_is(response):
    assert grade(response, answer_format="boxed")["score"] == 1.0
    assert grade("abba", answer_format="boxed") | {"pred": ""} == grade("", answer_format="boxed")


def test_the_row_says_where_its_answer_is_and_an_option_overrules_it():
    row = {"meta": json.dumps({"answer_format": "answer"})}
    response = r"<answer>abba</answer> \boxed{abab}"
    assert compute_score("palindrome", response, "abba", row)["score"] == 1.0
    assert compute_score("palindrome", response, "abba", row, answer_format="boxed")["pred"] == "abab"


@pytest.mark.parametrize("meta", [None, "", "{", "[1]", '{"answer_format": "nowhere"}', '["answer_format"]', 3])
def test_a_row_without_a_form_leaves_it_to_the_task(meta):
    assert compute_score("palindrome", "abba", "abba", {"meta": meta})["score"] == 1.0
    assert compute_score("deepscaler", r"\boxed{5}", "5", {"meta": meta})["score"] == 1.0


def test_an_answer_in_unfinished_reasoning_does_not_count_where_the_prompt_opened_it():
    cut = r"Let me try \boxed{5} but wait"
    assert solve(cut)["score"] == 1.0  # a model that does not think this way
    result = solve(cut, thinks=True)
    assert (result["score"], result["truncated"], result["pred"]) == (0.0, 1.0, "")
    assert solve(rf"{cut}</think> \boxed{{5}}", thinks=True)["score"] == 1.0


def test_options_that_there_are_not_are_named_once_and_ignored(caplog):
    with caplog.at_level(logging.WARNING, logger="data_prep.rewards"):
        for _ in range(3):
            assert grade("abba", reward_router_address="1.2.3.4", partial=True)["score"] == 1.0
            assert grade("abba", answer_format="bxoed")["score"] == 1.0
    assert [record.getMessage() for record in caplog.records] == [
        "compute_score has no option 'partial', so it is ignored. There are answer_format, partial_credit, "
        "refuse_echo, thinks.",
        "compute_score ignores its options: answer_format: 'bxoed' is not one of plain, boxed, answer, hashes, line.",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answer_format": "bxoed"}, "'bxoed' is not one of plain, boxed, answer"),
        ({"partial_credit": "yes"}, "'yes' is neither true nor false"),
    ],
)
def test_options_can_be_checked_before_a_run(options, message):
    with pytest.raises(ValueError, match=message):
        RewardOptions(**options)


# ------------------------------------------------------------------------------------------------------------- skills


def test_a_built_in_skill_is_its_text():
    from data_prep.skills import SKILLS

    for name in SKILLS:
        assert compute_score(f"skill/{name}", " olleh\n", "olleh")["score"] == 1.0
        assert compute_score(f"skill/{name}", "Olleh", "olleh")["score"] == 0.0
        assert compute_score(f"skill/{name}", "", "")["score"] == 0.0


def test_another_skill_is_mathematics():
    assert compute_score("skill/gsm8k", r"\boxed{\frac{10}{2}}", "5")["score"] == 1.0


# -------------------------------------------------------------------------------------------------------- mathematics


@pytest.mark.parametrize("source", ["deepscaler", "aime24", "math500", "minerva", "a_users_own", None, 3])
def test_every_other_source_is_mathematics_in_a_box(source):
    result = compute_score(source, r"x</think> so \boxed{5.0}", "5")
    assert result == dict(score=1.0, acc=1.0, pred="5.0", format_ok=1.0, truncated=0.0, timeout=0.0, echoed=0.0)


@pytest.mark.parametrize("response", ["", "5", r"\boxed{}", r"\boxed{5", r"\boxed{5}</think> so 5"])
def test_without_a_box_there_is_no_answer(response):
    result = solve(response)
    assert (result["score"], result["format_ok"], result["pred"]) == (0.0, 0.0, "")


@pytest.mark.parametrize(
    ("truth", "answer", "score"),
    [
        ('["4080", "4.08e3"]', "4080.0", 1.0),
        ('["x+1", "y+1"]', "1+y", 1.0),
        ('["4080"]', "4081", 0.0),
        ("[0,1)", "[0, 1)", 1.0),  # no JSON
        ("[1, 2]", "[1,2]", 1.0),  # JSON, but of no strings: an interval
        (142.0, "142", 1.0),
        (["7", "8"], "8", 1.0),
        (None, "None", 0.0),
    ],
)
def test_a_ground_truth_is_one_answer_or_a_json_list_of_them(truth, answer, score):
    assert solve(rf"\boxed{{{answer}}}", truth)["score"] == score


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("(x+1)^2", "x^2+2x+1"),
        (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
        (r"1 \pm \sqrt{19}", r"1 - \sqrt{19}, 1 + \sqrt{19}"),
        (r"x \in [-2,7]", "[-2, 7]"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"),
        (r"12\pi", r"\pi \cdot 12"),
        ("k=3", "3"),
    ],
)
def test_what_is_equal_by_algebra_is_right(gold, answer):
    result = solve(rf"\boxed{{{answer}}}", gold)
    assert (result["score"], result["timeout"]) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("(x+1)^2", "x^2+2x+2"),
        (r"\pi", r"\frac{355}{113}"),
        (r"4.6 \times 10^{-24}", "0"),
        ("5", "4, 5, 6"),
        ("5", "x"),
        ("5", r"5 \text{ or } 6"),
        ("x", "y"),
        ("5", r"\frac{0}{0}"),
        ("5", r"\infty"),
    ],
)
def test_what_is_not_equal_is_wrong(gold, answer):
    result = solve(rf"\boxed{{{answer}}}", gold)
    assert (result["score"], result["timeout"]) == (0.0, 0.0)


@pytest.mark.parametrize("bomb", ["9^{9^{9^{9}}}", "99999!", r"2^{1000000007}"])
def test_a_bomb_has_no_verdict_unless_it_is_the_right_answer_to_the_letter(bomb):
    result = solve(rf"\boxed{{{bomb}}}")
    assert (result["score"], result["timeout"]) == (0.0, 1.0)
    result = solve(rf"\boxed{{{bomb}}}", bomb)
    assert (result["score"], result["timeout"]) == (1.0, 0.0)


def test_a_refused_answer_is_logged_with_its_reason(monkeypatch, caplog):
    monkeypatch.setattr(mathematics, "_UNGRADED", itertools.count(1))
    with caplog.at_level(logging.WARNING, logger="data_prep.grading.mathematics"):
        solve(r"\boxed{9^{9^{9}}}", "x+1")
    assert "1 answers have no verdict so far and score 0. The last: refused: a power tower of numbers" in caplog.text


def test_one_right_answer_that_is_refused_leaves_the_others_to_be_compared():
    several = '["9^{9^{9}}", "x+1"]'
    assert [
        (found["score"], found["timeout"]) for found in (solve(r"\boxed{1+x}", several), solve(r"\boxed{x}", several))
    ] == [
        (1.0, 0.0),
        (0.0, 1.0),  # perhaps it is the first one
    ]


@pytest.mark.parametrize("length", [1001, 5001])
def test_a_long_answer_that_is_no_right_one_as_text_is_wrong(length):
    result = solve(rf"\boxed{{{('x+' * length)[:length]}}}", "x+1")
    assert (result["score"], result["timeout"]) == (0.0, 0.0)


def test_without_a_verdict_the_timeout_is_one_and_a_warning_is_logged(monkeypatch, caplog):
    monkeypatch.setattr(mathematics, "_UNGRADED", itertools.count(1))
    bomb = r"\boxed{(y+1)^{999}(x^2+2x+1)^{1004}}"
    with caplog.at_level(logging.WARNING, logger="data_prep.grading.mathematics"):
        result = solve(bomb, "(x+1)^{2008}(y+1)^{999}")
    assert (result["score"], result["format_ok"], result["timeout"]) == (0.0, 1.0, 1.0)
    assert "1 answers have no verdict so far and score 0. The last: not finished after 2 s" in caplog.text


def test_a_verdict_is_remembered_and_the_lack_of_one_is_not(monkeypatch):
    asked = []

    class Fails:
        def prepare(self) -> None: ...

        def verdicts(self, pairs):
            asked.append(pairs)
            if len(asked) == 1:
                raise Ungraded("the first time")
            return [True]

    monkeypatch.setattr(mathematics, "POOL", Fails())
    mathematics._verified.cache_clear()
    results = [solve(r"\boxed{q+1}", "1+q") for _ in range(3)]
    assert [(result["score"], result["timeout"]) for result in results] == [(0.0, 1.0), (1.0, 0.0), (1.0, 0.0)]
    assert len(asked) == 2
    mathematics._verified.cache_clear()


def test_a_failure_of_the_grader_itself_is_seen_and_loses_no_response(monkeypatch, caplog):
    monkeypatch.setattr("data_prep.rewards.judge", lambda *_: 1 / 0)
    with caplog.at_level(logging.WARNING, logger="data_prep.rewards"):
        result = solve(r"\boxed{5}")
    assert list(result) == KEYS and (result["score"], result["timeout"]) == (0.0, 1.0)
    assert "Grading a response of 'deepscaler' failed (ZeroDivisionError: division by zero)." in caplog.text


# ----------------------------------------------------------------------------------------------------- always the same


@pytest.mark.parametrize("source", ["palindrome", "unheard", None, 3, "skill/", "skill/none"])
@pytest.mark.parametrize("response", [None, 7, b"abba", "abba", ["abba"], r"\boxed{abba}"])
@pytest.mark.parametrize("truth", [None, 1.5, ["abba"], "abba", {"a": 1}, b"abba"])
def test_the_keys_and_types_are_always_the_same_whatever_comes(source, response, truth):
    result = compute_score(source, response, truth, {"index": 3}, reward_kwarg=1)
    assert list(result) == KEYS
    assert [type(value) for value in result.values()] == [float, float, str, float, float, float, float]


def test_a_long_answer_is_reported_in_short():
    assert len(solve(rf"\boxed{{{'1+' * 5000}1}}")["pred"]) == 500
    assert len(grade("a" * 10_000)["pred"]) == 500


def test_random_text_never_raises_and_only_real_palindromes_score():
    rng = random.Random(0)
    pieces = [*string.printable, "<think>", "</think>", "\u212a", "\x00", "\ud800", "abba", "\u0130"]
    for _ in range(2000):
        response = "".join(rng.choices(pieces, k=rng.randint(0, 12)))
        answer = response.rpartition("</think>")[2].strip().lower()
        assert grade(response)["score"] == float(answer in ("abba", "baab")), repr(response)
