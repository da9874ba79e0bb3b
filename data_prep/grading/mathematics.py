"""Is this answer to a mathematics question one of the right ones?

As cheap as can be: text and rational numbers first; then what would hang an algebra system is refused, which is no
verdict; the rest goes to math-verify in a worker process. Verdicts are remembered, because the responses to one prompt
repeat their answers.
"""

import itertools
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from data_prep.grading.bombs import MAX_LENGTH, refusal
from data_prep.grading.equality import compare, tidy
from data_prep.grading.pool import Pool, Ungraded

logger = logging.getLogger(__name__)

MAX_ANSWER = 5000
"""Longer answers are only compared as they are [characters]."""
POOL = Pool()
_UNGRADED = itertools.count(1)
"""The number of the next answer of this process that has no verdict."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Right or not; `ungraded` says why there is no verdict, where there is none, and then `right` is False."""

    right: bool
    ungraded: str = ""


def judge(answer: str, golds: Iterable[str]) -> Verdict:
    """Whether the answer equals one of the right ones."""
    POOL.prepare()
    texts = list(dict.fromkeys(golds))
    if len(answer) > MAX_ANSWER:
        return Verdict(right=answer in texts)
    tidied, golds = tidy(answer), [tidy(text) for text in texts]
    cheap = [compare(gold, tidied) for gold in golds]
    if any(cheap) or None not in cheap or len(tidied) > MAX_LENGTH:
        return Verdict(right=any(cheap))
    return _judge_by_algebra([gold for gold, same in zip(golds, cheap, strict=True) if same is None], tidied)


def _judge_by_algebra(golds: list[str], answer: str) -> Verdict:
    refused = {gold: refusal(answer) or refusal(gold) for gold in golds}
    allowed = tuple(gold for gold in golds if not refused[gold])
    try:
        if allowed and _verified(allowed, answer):
            return Verdict(right=True)
        if why := next(filter(None, refused.values()), ""):
            raise Ungraded(f"refused: {why}")
    except Ungraded as reason:
        _warn(golds, answer, reason)
        return Verdict(right=False, ungraded=str(reason))
    return Verdict(right=False)


@lru_cache(maxsize=4096)
def _verified(golds: tuple[str, ...], answer: str) -> bool:
    """Remembered unless it raises Ungraded: a slow moment is no property of an answer."""
    return POOL.is_right(golds, answer)


def _warn(golds: list[str], answer: str, reason: Ungraded) -> None:
    """Logs the 1st, 2nd, 4th, 8th ... answer without a verdict."""
    count = next(_UNGRADED)
    if count & (count - 1) == 0:
        text = "%d answers have no verdict so far and score 0. The last: %s; right: %.100r; answer: %.200r"
        logger.warning(text, count, reason, golds[0], answer)
