"""A reward function tried on a file's own rows: does it take verl's call, return what verl can use, know its answers?

verl loses a response silently where its reward function raises, and fails where the keys it returns change from one
sample to the next. Both show here first.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_prep.functions import call
from data_prep.golden import alternatives
from data_prep.grading.extraction import AnswerFormat, asked_form
from klreg_verl.core.right import right_or_wrong

TRIED = 64
"""Rows, spread over the file."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """How a reward function did."""

    rows: int
    right: int
    """Rows whose ground truth, as a response in the form that the prompt asks for, scored higher than an empty one;
    where the prompt names no form, alone or in a box."""
    forms: tuple[str, ...]
    """The forms of an answer that the prompts ask for (extraction.AnswerFormat)."""
    keys: tuple[str, ...]
    """What it returns; ("score",) for a plain number."""
    slowest: float
    """Longest call [seconds]."""
    graded: bool
    """Whether neither every `acc` nor every score was 0 or 1."""


def try_reward(function: Callable[..., Any], table: pa.Table) -> Trial:
    """Calls the function as verl does, with right, empty and senseless responses to rows spread over the table.

    Raises ValueError where a call raises, returns no finite score, or returns other keys than the first call did.
    """
    rows = table.take(pa.array(_spread(table.num_rows))).to_pylist()
    keys: set[tuple[str, ...]] = set()
    accs: list[float | None] = []
    every: list[float] = []
    right, slowest = 0, 0.0
    for row in rows:
        scores = {}
        for kind, response in _responses(row).items():
            begun = time.perf_counter()
            scores[kind], found, acc = _score(function, row, response)
            accs, every = [*accs, acc], [*every, scores[kind]]
            slowest = max(slowest, time.perf_counter() - begun)
            keys.add(found)
        right += max(scores[kind] for kind in scores if kind not in ("empty", "senseless")) > scores["empty"]
    if len(keys) > 1:
        raise ValueError(
            f"{_name(function)} returns different keys from call to call: {' and '.join(map(str, sorted(keys)))}. verl "
            "takes the keys of the first sample for all. Return the same keys always."
        )
    forms = tuple(sorted({form for row in rows if (form := _form(row)) is not None}))
    graded = right_or_wrong(accs, every) is None
    return Trial(rows=len(rows), right=right, forms=forms, keys=keys.pop(), slowest=slowest, graded=graded)


def _spread(size: int) -> list[int]:
    return sorted({place * (size - 1) // max(min(size, TRIED) - 1, 1) for place in range(min(size, TRIED))})


FORMS: dict[str, str] = {
    "plain": "{}",
    "boxed": "<think>x</think> The answer is \\boxed{{{}}}.",
    "hashes": "<think>x</think> So it is this.\n#### {}",
    "line": "<think>x</think> So it is this.\nAnswer: {}",
    "answer": "<think>x</think> <answer>{}</answer>",
}
"""A response in each form of an answer."""


def _form(row: dict[str, Any]) -> AnswerFormat | None:
    return asked_form("\n".join(str(message["content"]) for message in row["prompt"] if message))


def _responses(row: dict[str, Any]) -> dict[str, str]:
    golden = alternatives(row["reward_model"]["ground_truth"])[0]
    form = _form(row)
    right = {name: FORMS[name].format(golden) for name in ([form] if form else ("plain", "boxed"))}
    return {**right, "empty": "", "senseless": "\x00{{\\boxed{" + "9^" * 50 + "<think>"}


def _score(
    function: Callable[..., Any], row: dict[str, Any], response: str
) -> tuple[float, tuple[str, ...], float | None]:
    """The score, the keys and the `acc` of one call."""
    given = {
        "data_source": row["data_source"],
        "solution_str": response,
        "ground_truth": row["reward_model"]["ground_truth"],
        "extra_info": dict(row.get("extra_info") or {}),
    }
    try:
        returned = call(function, Path.cwd(), **given)
    except Exception as error:  # a user's function can fail in any way
        if not _takes(function, given):
            raise ValueError(
                f"{_name(function)}{inspect.signature(function)} does not take verl's call. verl calls a reward as "
                "f(data_source=..., solution_str=..., ground_truth=..., extra_info=...): define "
                f"def {_name(function)}(data_source, solution_str, ground_truth, extra_info=None, **options)."
            ) from error
        raise ValueError(
            f"{_name(function)} raises {type(error).__name__}: {error} for the response {response[:60]!r}. verl then "
            "loses the response without a word, which biases its group. Return a score of 0 instead."
        ) from error
    fields = returned if isinstance(returned, dict) else {"score": returned}
    return _checked_score(function, fields), tuple(sorted(fields)), fields.get("acc")


def _takes(function: Callable[..., Any], given: dict[str, Any]) -> bool:
    try:
        inspect.signature(function).bind(**given)
    except TypeError:
        return False
    except ValueError:  # some built-in functions have no signature
        return True
    return True


def _checked_score(function: Callable[..., Any], fields: dict[str, Any]) -> float:
    """The score, once it is a finite number and nothing else returned is a list or an object."""
    score: Any = fields.get("score")
    if isinstance(score, str) or not hasattr(score, "__float__") or not math.isfinite(float(score)):
        raise ValueError(
            f"{_name(function)} returns score {score!r}, which cannot be trained on. Return a finite number, or a "
            "dictionary with one under 'score'."
        )
    for name, value in fields.items():
        if not isinstance(value, str | bool | int | float) and not hasattr(value, "__float__"):
            raise ValueError(
                f"{_name(function)} returns {name}={value!r}: verl averages every key over the samples. Return numbers "
                "and short texts only."
            )
    return float(score)


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", repr(function))
