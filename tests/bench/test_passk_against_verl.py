"""`make bench`: pass@k and maj@k of 500 prompts x 16 samples, ours against verl's bootstrap, turn by turn.

verl's best@k draws 1,000 subsets with replacement per prompt and k, and computes worst@k beside it: a pass@k that is
biased and has noise. Both sides give k = 2, 4, 8, 16. Prints; asserts no time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from klreg_verl.core import passk

PROMPTS, SAMPLES, TURNS = 500, 16, 3
KS = (2, 4, 8, 16)

metric_utils = pytest.importorskip("verl.trainer.ppo.metric_utils", reason="the stack is not installed (make setup)")


def answers() -> tuple[np.ndarray, list[list[passk.Vote]]]:
    """Right or wrong, (P, n), of prompts from hopeless to easy, and answers of which one is right."""
    rng = np.random.default_rng(1)
    right = rng.random((PROMPTS, SAMPLES)) < rng.beta(0.5, 0.7, size=(PROMPTS, 1))
    wrong = rng.integers(0, 5, size=right.shape)
    votes = [
        [("right" if good else f"wrong {number}", float(good)) for good, number in zip(*row, strict=True)]
        for row in zip(right, wrong, strict=True)
    ]
    return right, votes


def verls(right: np.ndarray, predictions: list[list[str]] | None) -> dict[str, float]:
    """verl's own summary of a validation; the answers decide whether it computes maj@k, too."""
    uids = [str(prompt) for prompt in range(PROMPTS) for _ in range(SAMPLES)]
    infos: dict[str, list[Any]] = {"acc": right.astype(float).ravel().tolist()}
    if predictions is not None:
        infos["pred"] = [answer for row in predictions for answer in row]
    found = metric_utils.process_validation_metrics(["task"] * len(uids), uids, infos)
    return found["task"]["acc"]


def cold(function: Callable[[], Any]) -> Callable[[], Any]:
    """With nothing remembered of earlier calls."""

    def call() -> Any:
        for cached in (passk._share_of_subsets, passk._majority, passk._binomial):
            cached.cache_clear()
        return function()

    return call


def test_pass_at_k_of_500_prompts():
    right, _ = answers()

    def ours() -> list[float]:
        counts = right.sum(axis=1)
        return [float(passk.pass_at_k(counts, SAMPLES, k).mean()) for k in KS]

    found = verls(right, None)
    compare("pass@k", cold(ours), lambda: verls(right, None), target="target 1000")
    exact = dict(zip(KS, ours(), strict=True))
    print("  k     exact    verl's best@k")
    for k in KS:
        print(f"  {k:<4}  {exact[k]:.5f}  {found[f'best@{k}/mean']:.5f}")
    assert all(exact[k] > found[f"best@{k}/mean"] - 0.005 for k in KS)  # with replacement finds less


def test_maj_at_k_of_500_prompts():
    right, votes = answers()
    predictions = [[answer for answer, _ in row] for row in votes]

    def ours() -> list[float]:
        return [float(passk.maj_at_k(votes, k).mean()) for k in KS]

    compare("maj@k", cold(ours), lambda: verls(right, predictions), target="no target: verl's includes best@k")


def compare(name: str, ours: Callable[[], Any], theirs: Callable[[], Any], target: str) -> None:
    seconds = [(timed(ours), timed(theirs)) for _ in range(TURNS)]
    ratios = [slow / fast for fast, slow in seconds]
    print(f"\n{name} of {PROMPTS} prompts x {SAMPLES} samples, k = {', '.join(map(str, KS))}")
    for label, column in zip(("ours", "verl"), zip(*seconds, strict=True), strict=True):
        print(f"  {label}         {spread([1000 * value for value in column])} ms")
    print(f"  verl / ours  {spread(ratios)}  ({target})")


def timed(function: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def spread(values: list[float]) -> str:
    """Median, and the lowest and highest."""
    return f"{statistics.median(values):.3g} [{min(values):.3g}, {max(values):.3g}] n={len(values)}"
