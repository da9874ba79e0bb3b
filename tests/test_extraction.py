"""The answer of a response: the last box that closes, the last pair of tags, what follows the reasoning."""

import time

import pytest

from data_prep.grading.extraction import asked_form, extract, final_text, is_truncated, last_box, last_tag


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{4} no, \boxed{5}", "5"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {5}", "5"),
        (r"\fbox{5}", "5"),
        (r"\\boxed{5}", "5"),
        (r"\boxed{ 5 }", "5"),
        (r"\boxed{}", ""),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{x+\boxed{5}}", "x+5"),
        (r"\boxed{4} and \boxed{5", "4"),
        (r"\boxed{\boxed{5}", "5"),
        (r"} \boxed{5} }", "5"),
        (r"{ \boxed{5}", "5"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{a \\ b}", r"a \\ b"),
    ],
)
def test_the_last_box_that_closes_is_the_answer(text, answer):
    assert last_box(text) == answer


@pytest.mark.parametrize("text", ["", "5", "boxed{5}", r"\boxed 5", r"\boxed{5", r"\boxed{5\}", r"\box{5}", "\\"])
def test_without_a_box_that_closes_there_is_none(text):
    assert last_box(text) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>5</answer>", "5"),
        ("<answer>4</answer> no <answer> 5\n</answer>.", "5"),
        ("<answer><answer>5</answer>", "5"),
        ("<answer>5", None),
        ("5</answer>", None),
        ("</answer><answer>", None),
    ],
)
def test_the_last_pair_of_tags(text, answer):
    assert last_tag(text) == answer


def test_what_follows_the_last_closing_mark_is_final():
    assert final_text("a</think>b</think> c ") == "c"
    assert final_text(" c ") == "c"


def test_a_reasoning_that_is_not_closed_is_truncated():
    assert is_truncated("<think>a")
    assert is_truncated("<think>a</think>b<think>c")
    assert not is_truncated("<think>a</think>b")
    assert not is_truncated("a")
    assert is_truncated("a", thinks=True)  # the prompt opened the reasoning
    assert not is_truncated("a</think>b", thinks=True)


def test_each_form_is_looked_for_in_its_own_way():
    text = r"<answer>4</answer> \boxed{5}"
    assert [extract(text, form) for form in ("plain", "boxed", "answer")] == [text, "5", "4"]


MEGABYTE = 2**20


@pytest.mark.parametrize(
    "piece",
    ["\\", "{", "}", r"\boxed{", r"\boxed{}", r"\boxed ", r"\boxed" + " " * 100, "<answer>", "</answer>", "a", "\0"],
)
def test_a_megabyte_of_anything_is_read_in_linear_time(piece):
    text = piece * (MEGABYTE // len(piece))
    begun = time.monotonic()
    for form in ("boxed", "answer", "plain"):
        extract(final_text(text), form)
    assert time.monotonic() - begun < 30  # a hang limit: a pass takes a fraction of a second, a quadratic one hours


@pytest.mark.parametrize(
    ("form", "text", "answer"),
    [
        ("hashes", "3+4=7\n#### 7", "7"),
        ("hashes", "#### Step 1\nso\n#### $1,234$.", "1,234"),
        ("hashes", "7", None),
        ("line", "So it is.\nAnswer: 34", "34"),
        ("line", "**Answer:** $x = 5$.\n", "x = 5"),
        ("line", "Answer: 1\nno, wait\nanswer : 2\n", "2"),
        ("line", "the Answer: 5", None),
    ],
)
def test_forms_of_gsm8k_and_dapo(form, text, answer):
    assert extract(text, form) == answer


@pytest.mark.parametrize(
    ("prompt", "form"),
    [
        ('output the final answer after "####".', "hashes"),
        ('of the form Answer: $Answer. Put your answer on its own line after "Answer:".', "line"),
        (r"Answer: what is 2+2? Put it within \boxed{}.", "boxed"),
        ("between <answer> and </answer>", "answer"),
        ("What is 2+2?", None),
    ],
)
def test_the_form_that_a_prompt_asks_for_is_the_one_that_it_names_last(prompt, form):
    assert asked_form(prompt) == form
