"""compute_score: verl's reward function for all tasks of this project.

verl calls it once per response, from several threads, with the response decoded without special tokens. A reward
function that raises there loses the response silently and biases the group, so this one never does; and since verl
takes the list of keys from the first sample, every call returns the same ones:

    score        1.0 for a right answer, else 0.0: what RL trains on
    acc          the same, under the name that verl's validation averages
    pred         the answer as it was read, "" if there is none
    format_ok    1.0 if the response has the task's form, right or wrong
    truncated    1.0 if a <think> is never closed, so that the response ended inside its reasoning
    timeout      1.0 if the grading was stopped at its time limit (palindromes are graded at once, so never)

A task is an entry of GRADERS, by data_source; an unknown data_source scores 0 with a warning, once per source
(data_prep.check refuses it before a run starts).
"""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Grade:
    """What compute_score returns, as a dictionary of these fields."""

    score: float = 0.0
    acc: float = 0.0
    pred: str = ""
    format_ok: float = 0.0
    truncated: float = 0.0
    timeout: float = 0.0


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
    **kwargs: Any,
) -> dict[str, float | str]:
    """Grades one response; `extra_info` and `kwargs` are verl's and are not read by the tasks here."""
    grader = GRADERS.get(data_source) if isinstance(data_source, str) else None
    response = solution_str if isinstance(solution_str, str) else ""
    if grader is None:
        _warn_unknown(repr(data_source))
        return asdict(Grade(truncated=is_truncated(response)))
    return asdict(grader(response, str(ground_truth)))


def grade_palindrome(response: str, ground_truth: str) -> Grade:
    """Right is every palindrome that uses exactly the letters of `ground_truth`; upper case counts as lower.

    The form asked for is one string of letters without spaces or punctuation. Reasoning-gym's partial credit for any
    string or any palindrome is not given: it pays for the form, and its mean is no accuracy.
    """
    answer = final_text(response)
    format_ok = answer.isascii() and answer.isalpha()
    pred = answer.lower()
    right = float(format_ok and pred == pred[::-1] and sorted(pred) == sorted(ground_truth.lower()))
    return Grade(score=right, acc=right, pred=pred, format_ok=float(format_ok), truncated=is_truncated(response))


def final_text(response: str) -> str:
    """What follows the last </think>, or all of it without one, stripped of white space.

    Only the closing mark is looked for: chat templates of reasoning models put the opening one into the prompt.
    """
    return response.rpartition("</think>")[2].strip()


def is_truncated(response: str) -> float:
    """1.0 if the last <think> is not closed."""
    _, opened, reasoning = response.rpartition("<think>")
    return float(bool(opened) and "</think>" not in reasoning)


@cache
def _warn_unknown(data_source: str) -> None:
    known = ", ".join(sorted(GRADERS))
    logger.warning("No reward for data_source %s: every response scores 0. Known: %s.", data_source, known)


GRADERS: dict[str, Callable[[str, str], Grade]] = {"palindrome": grade_palindrome}
