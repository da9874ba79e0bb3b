"""compute_score: verl's reward function for all tasks of this project.

verl calls it once per response, from several threads, with the response decoded without special tokens. A reward
function that raises there loses the response silently and biases the group, so this one never does; and since verl
takes the list of keys from the first sample, every call returns the same ones:

    score        1.0 for a right answer, else 0.0 (or partial credit, where asked for): what RL trains on
    acc          1.0 for a right answer, else 0.0, under the name that verl's validation averages
    pred         the answer as it was read, "" if there is none
    format_ok    1.0 if the response has the task's form, right or wrong
    truncated    1.0 if the response ended inside its reasoning
    timeout      1.0 if there is no verdict: refused as a bomb, time limit, or its process died
    echoed       1.0 if the answer repeats a formula of the question, which scores 0 (data_prep/grading/echo.py)

The data_source names the task: "palindrome", "skill/<name>" for a skill of data_prep.skills, and mathematics for
every other name (deepscaler, aime24, math500, skill/gsm8k, a user's own); there several right answers are a JSON list
of strings. `graded_as` in the row's meta names another task to be graded as. The form in which the answer is looked
for is, in this order: the option `answer_format`; `answer_format` in the row's meta (data_prep/styles.py); the task's
own. For mathematics that is the first of a box, "#### 72", "Answer: 72" at the beginning of a line and <answer> tags
that the response has; for the others it is the whole text.
Whether an answer repeats the question can only be told where the row brings it: as `problem` in the meta of its
extra_info, which the files of `klreg data deepscaler` do. Rows without it are graded without that.
Options come by keyword, in verl as reward.custom_reward_function.reward_kwargs: see RewardOptions.
"""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache, lru_cache
from typing import Any, get_args

from data_prep.golden import alternatives
from data_prep.grading.echo import is_echo
from data_prep.grading.extraction import ASKED, AnswerFormat, extract, final_text, is_truncated, last_box
from data_prep.grading.mathematics import judge
from klreg_verl.experiment.strict import FieldError

logger = logging.getLogger(__name__)

PARTIAL_PALINDROME = 0.05
PARTIAL_TEXT = 0.02
MAX_PRED = 500
"""Characters of an answer that are reported."""
GRADED_AS = "graded_as"
"""In the meta of a retained row: its data_source before it became skill/<name>."""
PROBLEM = "problem"
"""In the meta of a row: the question without what the prompt says around it, which an answer must not repeat."""
VERLS_ARGUMENTS = ("reward_router_address", "reward_model_tokenizer")


@dataclass(frozen=True, kw_only=True)
class Grade:
    """What compute_score returns, as a dictionary of these fields."""

    score: float = 0.0
    acc: float = 0.0
    pred: str = ""
    format_ok: float = 0.0
    truncated: float = 0.0
    timeout: float = 0.0
    echoed: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RewardOptions:
    """What can be chosen by keyword. Raises FieldError, a ValueError, for a value that there is not."""

    answer_format: AnswerFormat | None = None
    """Where the answer is: "boxed", "answer" (tags), "hashes" (#### 72), "line" (Answer: 72), "plain" (the whole final
    text); None: as row and task say."""
    partial_credit: bool = False
    """Palindromes: reasoning-gym's 0.05 for a palindrome of other letters and 0.02 for any other text in `score`;
    `acc` stays what is right. It pays for the form: a model can live on it without a right answer."""
    refuse_echo: bool = True
    """Mathematics: an answer that repeats a formula of the question is none, where the row brings the question."""
    thinks: bool = False
    """The prompt opens the reasoning (<think> in the chat template): a response without </think> was cut, is counted
    as truncated, and scores 0 whatever it contains."""

    def __post_init__(self) -> None:
        if self.answer_format not in (None, *get_args(AnswerFormat)):
            known = ", ".join(get_args(AnswerFormat))
            raise FieldError("answer_format", f"{self.answer_format!r} is not one of {known}.")
        for name in ("partial_credit", "refuse_echo", "thinks"):
            if not isinstance(getattr(self, name), bool):
                raise FieldError(name, f"{getattr(self, name)!r} is neither true nor false.")


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
    **kwargs: Any,
) -> dict[str, float | str]:
    """Grades one response.

    Args:
        data_source: names the task.
        solution_str: the response, without the prompt.
        ground_truth: the right answer, or a JSON list of several (mathematics).
        extra_info: the row's; only `answer_format`, `graded_as` and `problem` in its `meta` are read.
        kwargs: RewardOptions; verl's own are ignored, others warned of once.
    """
    response = solution_str if isinstance(solution_str, str) else ""
    try:
        return dict(vars(_grade(data_source, response, ground_truth, extra_info, kwargs)))
    except Exception as error:  # whatever it is: a response that cannot be graded must be seen, and must not be lost
        _warn(f"Grading a response of {data_source!r} failed ({type(error).__name__}: {error}).")
        return dict(vars(Grade(timeout=1.0)))


def _grade(data_source: Any, response: str, ground_truth: Any, extra_info: Any, kwargs: Mapping[str, Any]) -> Grade:
    options = _options(kwargs)
    grader, own_format = grader_of(graded_as(extra_info) or data_source)
    truncated = is_truncated(response, thinks=options.thinks)
    if truncated:
        return Grade(truncated=1.0)
    form = options.answer_format or _format_of_row(extra_info) or own_format
    text = final_text(response)
    answer = next((found for each in ([form] if form else ASKED) if (found := extract(text, each)) is not None), None)
    grade = Grade() if answer is None else grader(answer, ground_truth, options)
    problem = str(read_meta(extra_info).get(PROBLEM, "")) if options.refuse_echo else ""
    if grader is grade_mathematics and is_echo(grade.pred, problem, alternatives(ground_truth)):
        return Grade(pred=grade.pred, format_ok=grade.format_ok, echoed=1.0)
    return grade


def _options(kwargs: Mapping[str, Any]) -> RewardOptions:
    known = {field.name: kwargs[field.name] for field in fields(RewardOptions) if field.name in kwargs}
    if unknown := [name for name in kwargs if name not in known and name not in VERLS_ARGUMENTS]:
        names = ", ".join(field.name for field in fields(RewardOptions))
        _warn(f"compute_score has no option {', '.join(map(repr, unknown))}, so it is ignored. There are {names}.")
    try:
        return RewardOptions(**known)
    except FieldError as error:
        _warn(f"compute_score ignores its options: {error}")
        return RewardOptions()


def _format_of_row(extra_info: Any) -> AnswerFormat | None:
    """The form that the row's prompt asks for, if its meta says so."""
    form = read_meta(extra_info).get("answer_format")
    return form if form in get_args(AnswerFormat) else None


def graded_as(extra_info: Any) -> str:
    """The data_source by which a row is graded where its meta says another than its own (data_prep/retention.py)."""
    return str(read_meta(extra_info).get(GRADED_AS, ""))


def read_meta(extra_info: Any) -> Mapping[str, Any]:
    """The row's meta; empty where it is no JSON object."""
    text = extra_info.get("meta") if isinstance(extra_info, Mapping) else None
    try:
        found = json.loads(text) if isinstance(text, str) else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def grade_palindrome(answer: str, ground_truth: Any, options: RewardOptions) -> Grade:
    """Right is every palindrome that uses exactly the letters of `ground_truth`; upper case counts as lower.

    The form asked for is one string of letters without spaces or punctuation.
    """
    format_ok = answer.isascii() and answer.isalpha()
    pred = answer.lower()
    is_palindrome = pred == pred[::-1]
    right = float(format_ok and is_palindrome and sorted(pred) == sorted(str(ground_truth).lower()))
    part = (PARTIAL_PALINDROME if is_palindrome else PARTIAL_TEXT) if options.partial_credit and pred else 0.0
    return Grade(score=max(right, part), acc=right, pred=pred[:MAX_PRED], format_ok=float(format_ok))


def grade_text(answer: str, ground_truth: Any, options: RewardOptions) -> Grade:
    """Right is the ground truth itself, upper and lower case apart, white space around either left out."""
    right = float(bool(answer) and answer == str(ground_truth).strip())
    return Grade(score=right, acc=right, pred=answer[:MAX_PRED], format_ok=float(bool(answer)))


def grade_mathematics(answer: str, ground_truth: Any, options: RewardOptions) -> Grade:
    """Right is what is equal to one of the right answers as mathematics (data_prep/grading/mathematics.py).

    A box inside the tags or the plain text that were asked for is opened.
    """
    boxed = last_box(answer)
    answer = answer if boxed is None else boxed
    if not answer:
        return Grade()
    verdict = judge(answer, alternatives(ground_truth))
    right = float(verdict.right)
    return Grade(score=right, acc=right, pred=answer[:MAX_PRED], format_ok=1.0, timeout=float(bool(verdict.ungraded)))


Grader = Callable[[str, Any, RewardOptions], Grade]


def grader_of(data_source: Any) -> tuple[Grader, AnswerFormat | None]:
    """How a data_source is graded, and the form of its answers where nothing else is said; None: one of ASKED."""
    if isinstance(data_source, str) and data_source in GRADERS:
        return GRADERS[data_source], "plain"
    if isinstance(data_source, str) and data_source.startswith("skill/") and data_source[6:] in _skills():
        return grade_text, "plain"
    return grade_mathematics, None


GRADERS: dict[str, Grader] = {"palindrome": grade_palindrome}
"""The tasks with a way of grading of their own, besides the skills; they have a plain text for an answer."""


@cache
def _skills() -> frozenset[str]:
    from data_prep.skills import SKILLS

    return frozenset(SKILLS)


@lru_cache(maxsize=256)
def _warn(text: str) -> None:
    """Logs a text once."""
    logger.warning(text)
