"""Right or wrong, or graded: whether "accuracy" says what a reward says."""

from __future__ import annotations

from collections.abc import Sequence


def right_or_wrong(acc: Sequence[float | None], scores: Sequence[float]) -> list[bool] | None:
    """Which responses are right, where right and wrong are all there is; None where the reward grades.

    Args:
        acc: what the reward returned as `acc`, of each response; None where it returned none, and the score counts.
            verl itself writes the score there for every plain number.
        scores: the reward of each response.

    Every `acc`, or else every score, must be 0 or 1. Of no responses there is nothing wrong: the list is empty.
    """
    said = [score if one is None else float(one) for one, score in zip(acc, scores, strict=True)]
    for values in (said, scores):
        if all(value in (0, 1) for value in values):
            return [value == 1 for value in values]
    return None
