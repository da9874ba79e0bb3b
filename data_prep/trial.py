"""A reward function tried on a file's own rows: does it take verl's call, return what verl can use, know its answers?

verl loses a response silently where its reward function raises, and fails where the keys it returns change from one
sample to the next. Both show here first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_prep.functions import call
from data_prep.golden import alternatives
from klreg_verl.core.right import right_or_wrong

TRIED = 64
"""Rows, spread over the file."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """How a reward function did."""

    rows: int
    right: int
    """Rows whose ground truth, given as the response, scored higher than an empty response."""
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
        right += max(scores["plain"], scores["boxed"]) > scores["empty"]
    if len(keys) > 1:
        raise ValueError(
            f"{_name(function)} returns different keys from call to call: {' and '.join(map(str, sorted(keys)))}. verl "
            "takes the keys of the first sample for all. Return the same keys always."
        )
    graded = right_or_wrong(accs, every) is None
    return Trial(rows=len(rows), right=right, keys=keys.pop(), slowest=slowest, graded=graded)


def _spread(size: int) -> list[int]:
    return sorted({place * (size - 1) // max(min(size, TRIED) - 1, 1) for place in range(min(size, TRIED))})


def _responses(row: dict[str, Any]) -> dict[str, str]:
    golden = alternatives(row["reward_model"]["ground_truth"])[0]
    boxed = f"<think>x</think> The answer is \\boxed{{{golden}}}."
    return {"plain": golden, "boxed": boxed, "empty": "", "senseless": "\x00{{\\boxed{" + "9^" * 50 + "<think>"}


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
        raise ValueError(
            f"{_name(function)} raises {type(error).__name__}: {error} for the response {response[:60]!r}. verl then "
            "loses the response without a word, which biases its group. Return a score of 0 instead."
        ) from error
    fields = returned if isinstance(returned, dict) else {"score": returned}
    return _checked_score(function, fields), tuple(sorted(fields)), fields.get("acc")


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
