"""What prompts ask for, and what their rows say of it to the reward."""

from typing import get_args

import pytest

from data_prep import palindrome, skills
from data_prep.grading.extraction import AnswerFormat
from data_prep.styles import INSTRUCTIONS, R1_FORMATS, form_of, prompt_text


def test_every_form_asked_for_is_one_that_the_reward_reads():
    assert set(R1_FORMATS.values()) == set(INSTRUCTIONS) < set(get_args(AnswerFormat))


def test_every_style_of_the_builders_gives_its_own_prompt():
    for kinds, compact in ((palindrome.Style, "letters"), (skills.Style, "compact")):
        styles = get_args(kinds)
        assert set(R1_FORMATS) < set(styles) and compact in styles
        assert len({prompt_text("abab", "Which?\n", style) for style in styles}) == len(styles)


@pytest.mark.parametrize(
    ("style", "prompt", "meta"),
    [
        ("letters", "abab", {}),
        ("question", "Which?\n", {}),
        (
            "r1_boxed",
            r"Which? Please reason step by step, and put your final answer within \boxed{}.",
            {"answer_format": "boxed"},
        ),
        (
            "r1_answer",
            "Which? Please reason step by step, and put your final answer between <answer> and </answer>.",
            {"answer_format": "answer"},
        ),
    ],
)
def test_prompt_and_meta_of_each_style(style, prompt, meta):
    assert prompt_text("abab", "Which?\n", style) == prompt
    assert form_of(style) == meta
