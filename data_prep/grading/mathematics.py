"""Is this answer to a mathematics question one of the right ones?

As cheap as can be: text and rational numbers first; then what would hang an algebra system is refused; the rest goes
to math-verify in a worker process. Verdicts are remembered, because the responses to one prompt repeat their answers.
"""

import json
import logging
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from data_prep.grading.bombs import refusal
from data_prep.grading.equality import compare, tidy
from data_prep.grading.pool import Pool, Ungraded

logger = logging.getLogger(__name__)

MAX_ANSWER = 5000
"""Longer answers are only compared as they are [characters]."""
POOL = Pool()


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Right or not; `ungraded` says why there is no verdict, where there is none, and then `right` is False."""

    right: bool
    ungraded: str = ""


class Counts:
    """How often each way of grading was taken in this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, name: str) -> int:
        """Counts one more; returns how many it makes."""
        with self._lock:
            self._counts[name] += 1
            return self._counts[name]

    def now(self) -> dict[str, int]:
        """compared (text or numbers decided), refused (a bomb), verified (math-verify decided), ungraded."""
        with self._lock:
            return {name: self._counts[name] for name in ("compared", "refused", "verified", "ungraded")}


COUNTS = Counts()


def right_answers(ground_truth: Any) -> list[str]:
    """The right answers of a row: the texts of a JSON list of strings, or the one that is given, of any type; none for
    None."""
    if ground_truth is None:
        return []
    if isinstance(ground_truth, str) and ground_truth.lstrip()[:1] == "[":
        try:
            listed = json.loads(ground_truth)
        except (ValueError, RecursionError):
            listed = None
        if isinstance(listed, list) and listed and all(isinstance(entry, str) for entry in listed):
            return listed
    if isinstance(ground_truth, Iterable) and not isinstance(ground_truth, str | bytes):
        return [str(entry) for entry in ground_truth]
    return [str(ground_truth)]


def judge(answer: str, golds: Iterable[str]) -> Verdict:
    """Whether the answer equals one of the right ones."""
    POOL.prepare()
    texts = list(dict.fromkeys(golds))
    if len(answer) > MAX_ANSWER:
        COUNTS.add("refused")
        return Verdict(right=answer in texts)
    tidied, golds = tidy(answer), [tidy(text) for text in texts]
    cheap = [compare(gold, tidied) for gold in golds]
    if any(cheap) or None not in cheap:
        COUNTS.add("compared")
        return Verdict(right=any(cheap))
    return _judge_by_algebra([gold for gold, same in zip(golds, cheap, strict=True) if same is None], tidied)


def _judge_by_algebra(golds: list[str], answer: str) -> Verdict:
    allowed = tuple(gold for gold in golds if not refusal(gold)) if not refusal(answer) else ()
    if not allowed:
        COUNTS.add("refused")
        return Verdict(right=False)
    try:
        right = _verified(allowed, answer)
    except Ungraded as reason:
        _warn(allowed, answer, reason)
        return Verdict(right=False, ungraded=str(reason))
    COUNTS.add("verified")
    return Verdict(right=right)


@lru_cache(maxsize=4096)
def _verified(golds: tuple[str, ...], answer: str) -> bool:
    """Remembered unless it raises Ungraded: a slow moment is no property of an answer."""
    return POOL.is_right(golds, answer)


def _warn(golds: tuple[str, ...], answer: str, reason: Ungraded) -> None:
    """Logs the 1st, 2nd, 4th, 8th ... answer without a verdict."""
    count = COUNTS.add("ungraded")
    if count & (count - 1) == 0:
        text = "%d answers have no verdict so far and score 0. The last: %s; right: %.100r; answer: %.200r"
        logger.warning(text, count, reason, golds[0], answer)
