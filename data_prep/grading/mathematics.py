"""Is this answer to a mathematics question one of the right ones?

As cheap as can be: text and rational numbers first; then what would hang an algebra system is refused, which is no
verdict; the rest goes to math-verify in a worker process. Verdicts are remembered, because the responses to one prompt
repeat their answers.
"""

import itertools
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from data_prep.grading.bombs import MAX_LENGTH, refusal
from data_prep.grading.equality import compare
from data_prep.grading.notation import tidy
from data_prep.grading.pool import Pool, Ungraded

logger = logging.getLogger(__name__)

MAX_ANSWER = 5000
"""Longer answers are only compared as they are [characters]."""
MAX_PAIRS = 200
"""Expressions of one answer that are compared with expressions of a right one."""
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
    questions = {gold: _Questions() for gold in golds}
    cheap = [compare(gold, tidied, questions[gold]) for gold in golds]
    if any(cheap) or None not in cheap or len(tidied) > MAX_LENGTH:
        return Verdict(right=any(cheap))
    undecided = {gold: questions[gold] for gold, same in zip(golds, cheap, strict=True) if same is None}
    return _judge_by_algebra(undecided, tidied)


class _Questions:
    """The pairs of expressions that only algebra can compare, and its verdicts once they are there."""

    def __init__(self) -> None:
        self.verdicts: dict[tuple[str, str], bool | None] = {}

    def __call__(self, gold: str, answer: str) -> bool | None:
        return self.verdicts.setdefault((gold, answer), None)


def _judge_by_algebra(undecided: Mapping[str, _Questions], answer: str) -> Verdict:
    """One request for all that the right answers ask of algebra; those with a bomb in them are left out."""
    refused = {gold: _refusal(questions.verdicts) for gold, questions in undecided.items()}
    allowed = {gold: questions for gold, questions in undecided.items() if not refused[gold]}
    try:
        pairs = tuple(pair for questions in allowed.values() for pair in questions.verdicts)
        found = dict(zip(pairs, _verified(pairs) if pairs else (), strict=True))
        for gold, questions in allowed.items():
            questions.verdicts |= {pair: found[pair] for pair in questions.verdicts}
            if compare(gold, answer, questions):
                return Verdict(right=True)
        if why := next(filter(None, refused.values()), ""):
            raise Ungraded(f"refused: {why}")
    except Ungraded as reason:
        _warn(list(undecided), answer, reason)
        return Verdict(right=False, ungraded=str(reason))
    return Verdict(right=False)


def _refusal(pairs: Iterable[tuple[str, str]]) -> str:
    """Why these are not given to algebra, "" if they may be."""
    expressions = [text for gold, answer in pairs for text in (answer, gold)]
    if len(expressions) > 2 * MAX_PAIRS:
        return f"{len(expressions) // 2} pairs of expressions"
    return next(filter(None, map(refusal, expressions)), "")


@lru_cache(maxsize=4096)
def _verified(pairs: tuple[tuple[str, str], ...]) -> tuple[bool, ...]:
    """Remembered unless it raises Ungraded: a slow moment is no property of an answer."""
    return tuple(POOL.verdicts(pairs))


def _warn(golds: list[str], answer: str, reason: Ungraded) -> None:
    """Logs the 1st, 2nd, 4th, 8th ... answer without a verdict."""
    count = next(_UNGRADED)
    if count & (count - 1) == 0:
        text = "%d answers have no verdict so far and score 0. The last: %s; right: %.100r; answer: %.200r"
        logger.warning(text, count, reason, golds[0], answer)
