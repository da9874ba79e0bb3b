"""What an arm reaches at a given KL: comparison at equal KL instead of equal beta, and frontiers with bands over seeds.

Equal betas are not equal regularization: forward KL at the same beta leaves more entropy and less reward than reverse,
and a charge per response weighs otherwise than one per token. So each arm is run at several betas; within a seed its
points (KL, metric) are joined by straight lines. Arms are compared by the mean of these lines over an interval of KL:
at a single KL the chord between two noisy points is biased, and its error is that of two runs alone.

Nothing is extrapolated: a seed whose points do not enclose the interval has no value, and is named.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from klreg_verl.core.statistics import LEVEL, Paired, mean_and_error, paired, t_quantile

Point = tuple[float, float]
"""(KL to the reference [nats per response], metric) of one finished run."""
Paths = Mapping[int, Sequence[Point]]
"""Seed -> the points of one arm's runs at its betas, in any order."""


def at_kl(points: Iterable[Point], kl: float) -> float:
    """The metric at this KL on the lines between neighbouring points; NaN outside of them.

    Points of equal KL are averaged first. A single point has a value at its own KL only.
    """
    xs, ys = _sorted(points)
    if not len(xs) or not xs[0] <= kl <= xs[-1]:
        return math.nan
    return float(np.interp(kl, xs, ys))


def _sorted(points: Iterable[Point]) -> tuple[np.ndarray, np.ndarray]:
    known = np.array([point for point in points if all(map(math.isfinite, point))], dtype=np.float64).reshape(-1, 2)
    xs, inverse, counts = np.unique(known[:, 0], return_inverse=True, return_counts=True)
    return xs, np.bincount(inverse, weights=known[:, 1], minlength=len(xs)) / np.maximum(counts, 1)


def over_kl(points: Iterable[Point], low: float, high: float) -> float:
    """The mean, from KL `low` to `high`, of the lines between neighbouring points; NaN if they do not enclose it."""
    xs, ys = _sorted(points)
    if not len(xs) or xs[0] > low or xs[-1] < high:
        return math.nan
    grid = np.concatenate([[low], xs[(low < xs) & (xs < high)], [high]])
    return float(np.trapezoid(np.interp(grid, xs, ys), grid) / (high - low))


def matched(left: Paths, right: Paths, between: tuple[float, float]) -> Paired:
    """Left minus right, the mean over an interval of KL, by seed; seeds that do not enclose it are `unpaired`.

    The paired jackknife over seeds of this mean is the paired t: leaving a seed out takes its difference out.
    """
    return paired(*({seed: over_kl(points, *between) for seed, points in paths.items()} for paths in (left, right)))


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """The mean over seeds of one arm's metric at a row of KLs, with a pointwise t interval."""

    kl: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    """NaN where fewer than two seeds reach the KL."""
    high: np.ndarray
    seeds: np.ndarray
    """Seeds that reach it."""


def frontier(paths: Paths, num: int = 33, level: float = LEVEL) -> Frontier:
    """The arm's frontier between the smallest and the largest KL that at least one seed reaches."""
    xs = np.concatenate([_sorted(points)[0] for points in paths.values()]) if paths else np.array([])
    kls = np.linspace(xs.min(), xs.max(), num) if len(xs) else np.array([])
    columns = [mean_and_error(at_kl(points, kl) for points in paths.values()) for kl in kls.tolist()]
    mean, error = (np.array([getattr(each, name) for each in columns]) for name in ("mean", "standard_error"))
    seeds = np.array([each.num for each in columns], dtype=int)
    half = error * np.array([t_quantile(1 - level / 2, each.num - 1) if each.num > 1 else math.nan for each in columns])
    return Frontier(kl=kls, mean=mean, low=mean - half, high=mean + half, seeds=seeds)
