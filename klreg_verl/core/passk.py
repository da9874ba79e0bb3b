"""What n samples of each prompt say about k of them: pass@k, maj@k, solved prompts, intervals.

Everything is an average over *all* subsets of k of the n samples, computed in closed form: unbiased for k independent
samples, without a random number, and refused for k > n, about which n samples say nothing.

verl's best@k draws with replacement, which is biased (one right answer of 16 gives best@16 = 0.64, not 1), and
takes a thousand draws per prompt.

Shapes: P prompts; `right` and `samples` are (P,) counts, or one number of samples for all prompts.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from klreg_verl.core.statistics import t_quantile

Floats = NDArray[np.float64]
Vote = tuple[str, float]
"""An answer as it was read ("" for none), and whether it is right (0 to 1)."""


def pass_at_k(right: ArrayLike, samples: ArrayLike, k: int) -> Floats:
    """(P,) probability that at least one of k of the samples is right: 1 - C(n - c, k) / C(n, k).

    Chen et al. 2021 (arXiv 2107.03374), equation 1. Whole numbers are divided once, so that every value is the float64
    nearest to the true one, at any n.

    Raises ValueError for k below 1 or above the number of samples of a prompt, and for counts that cannot be.
    """
    counts, totals = np.broadcast_arrays(np.asarray(right), np.asarray(samples))
    _check_counts(counts, totals)
    _check_k(k, totals)
    pairs, places = np.unique(np.stack([counts.ravel(), totals.ravel()]), axis=1, return_inverse=True)
    values = np.array([_share_of_subsets(int(count), int(total), k) for count, total in pairs.T], dtype=np.float64)
    return values[places.ravel()].reshape(counts.shape)


@lru_cache(maxsize=65536)
def _share_of_subsets(marked: int, total: int, k: int) -> float:
    """Share of the subsets of k of `total` that hold at least one of the `marked`."""
    subsets = math.comb(total, k)
    return (subsets - math.comb(total - marked, k)) / subsets


def maj_at_k(votes: Sequence[Sequence[Vote]], k: int) -> Floats:
    """(P,) probability that the most frequent answer of k of a prompt's samples is right.

    Answers tied for the first place share it. An empty answer has no vote; without any vote the prompt counts as
    wrong. Right and wrong go by text: answers that mean the same and are spelled differently do not support each other.

    Exact over all subsets: for each size m of the majority, the number of ways is the coefficient of z^k in the
    product over the answers of sum_{i<m} C(n_a, i) z^i + u C(n_a, m) z^m, where u counts those tied at m.

    Raises ValueError for k below 1 or above the number of samples of a prompt.
    """
    _check_k(k, np.array([len(each) for each in votes]))
    return np.array([_majority(*_tally(each), k) for each in votes], dtype=np.float64)


Tally = tuple[tuple[int, float], ...]
"""(how often it was drawn, its score) of each answer, in sorted order."""


def _tally(votes: Sequence[Vote]) -> tuple[int, Tally]:
    """How many samples have no answer, and the answers."""
    times = Counter(answer for answer, _ in votes)
    scores: dict[str, float] = {}
    for answer, score in votes:
        scores[answer] = scores.get(answer, 0.0) + score / times[answer]
    return times[""], tuple(sorted((times[answer], scores[answer]) for answer in times if answer))


@lru_cache(maxsize=65536)
def _majority(silent: int, named: Tally, k: int) -> float:
    """The probability for one prompt, summed over the sizes that a majority can have."""
    total = silent + sum(times for times, _ in named)
    largest = min(k, max((times for times, _ in named), default=0))
    won = sum(_won(silent, named, size, k, k / total) for size in range(1, largest + 1))
    return min(1.0, float(won / _binomial(total, k / total)[k]))


def _won(silent: int, named: Tally, size: int, k: int, rate: float) -> float:
    """Probability that the winners have `size` votes each, times the share of right ones among them.

    Each sample is drawn with probability `rate` on its own, and all is conditioned on k drawn by the caller: the
    condition makes every subset of k equally likely again, and no number overflows. Answers that were drawn too rarely
    to win take any part of the k: together they are one binomial.
    """
    able = [(times, score) for times, score in named if times >= size]
    rest = silent + sum(times for times, _ in named if times < size)
    ways = np.zeros((min(k // size, len(able)) + 1, k + 1))
    ways[0, : min(rest, k) + 1] = _binomial(rest, rate)[: k + 1]
    credit = np.zeros_like(ways)
    for times, score in able:
        *below, at = _binomial(times, rate)[: size + 1].tolist()
        credit = _shifted(credit, below) + at * _one_more(credit + score * ways, size)
        ways = _shifted(ways, below) + at * _one_more(ways, size)
    return float((credit[1:, k] / np.arange(1, len(ways))).sum())


def _shifted(ways: Floats, chances: Sequence[float]) -> Floats:
    """Row by row, the product of a polynomial in z with the one of `chances`, cut at the same degree."""
    if len(chances) > len(ways):
        return np.stack([np.convolve(row, chances)[: ways.shape[1]] for row in ways])
    result = np.zeros_like(ways)
    for drawn, chance in enumerate(chances[: ways.shape[1]]):
        result[:, drawn:] += chance * ways[:, : ways.shape[1] - drawn]
    return result


def _one_more(ways: Floats, size: int) -> Floats:
    """One more answer at `size`: a row down, `size` degrees up."""
    result = np.zeros_like(ways)
    result[1:, size:] = ways[:-1, : ways.shape[1] - size]
    return result


@lru_cache(maxsize=4096)
def _binomial(total: int, rate: float) -> Floats:
    """(total + 1,) chances of 0, 1, ... of `total` draws."""
    if rate >= 1:
        return np.eye(1, total + 1, total)[0]
    logs = [
        math.lgamma(total + 1) - math.lgamma(drawn + 1) - math.lgamma(total - drawn + 1)
        + drawn * math.log(rate) + (total - drawn) * math.log1p(-rate)
        for drawn in range(total + 1)
    ]  # fmt: skip
    return np.exp(np.array(logs))


# ---------------------------------------------------------------------------------------------------- solved prompts


@dataclass(frozen=True, kw_only=True)
class Turnover:
    """Which prompts changed sides between two models, each with n samples of every prompt."""

    new: tuple[int, ...]
    """Solved by the second model (at least one right sample), not by the first."""
    lost: tuple[int, ...]
    by_chance: float
    """How many of each would be expected if nothing had changed: the same 2n answers of a prompt dealt anew."""


def turnover(before: ArrayLike, after: ArrayLike, samples: int) -> Turnover:
    """Prompts newly solved and newly lost; `before` and `after` are (P,) counts of right samples of `samples` each.

    A prompt with c right answers among the 2n of both models has none in one half by chance with probability
    C(2n - c, n) / C(2n, n): the permutation distribution, exact under "both models answer it alike".
    """
    first, second = np.asarray(before), np.asarray(after)
    if first.shape != second.shape:
        raise ValueError(f"{len(first)} and {len(second)} prompts cannot be compared: both need the same ones.")
    for counts in (first, second):
        _check_counts(counts, np.full(counts.shape, samples))
    together = first + second
    dealt = 1.0 - pass_at_k(together, 2 * samples, samples)
    return Turnover(
        new=tuple(np.flatnonzero((first == 0) & (second > 0)).tolist()),
        lost=tuple(np.flatnonzero((first > 0) & (second == 0)).tolist()),
        by_chance=float(dealt[together > 0].sum()),
    )


# ---------------------------------------------------------------------------------------------------- intervals


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over prompts with its 95 % interval; the prompt is the unit, its samples are not independent."""

    mean: float
    low: float
    high: float
    error: float
    """Standard error over prompts; NaN for fewer than two."""


def share_interval(values: ArrayLike) -> Interval:
    """Mean of (P,) shares between 0 and 1, one a prompt, with Wilson's interval at the effective number of answers.

    n_eff = p (1 - p) / error^2 with the error over prompts, as for surveys with clusters (Korn and Graubard 1998;
    Franco et al. 2019, doi 10.1093/jssam/smy019), and Student's t for the normal quantile. Unlike mean +- 2 errors it
    stays in [0, 1] and says something when every prompt is right or wrong: then n_eff is the number of prompts.

    Raises ValueError without prompts, or for a value outside [0, 1].
    """
    given = _known(values)
    if given.min() < 0 or given.max() > 1:
        raise ValueError(f"Shares lie between 0 and 1, not from {given.min():.4g} to {given.max():.4g}.")
    mean, error, quantile = float(given.mean()), _error(given), _quantile(len(given))
    if not math.isfinite(quantile):
        return Interval(mean=mean, low=0.0, high=1.0, error=error)
    effective = mean * (1 - mean) / error**2 if error > 0 else float(len(given))
    spread = quantile**2 / effective
    centre = (mean + spread / 2) / (1 + spread)
    half = math.sqrt(max(0.0, mean * (1 - mean) * spread + spread**2 / 4)) / (1 + spread)
    return Interval(mean=mean, low=max(0.0, centre - half), high=min(1.0, centre + half), error=error)


def mean_interval(values: ArrayLike) -> Interval:
    """Mean of (P,) numbers, one a prompt, with Student's interval; for differences of two models, prompt by prompt."""
    given = _known(values)
    mean, error, quantile = float(given.mean()), _error(given), _quantile(len(given))
    half = quantile * error if math.isfinite(quantile) else math.inf
    return Interval(mean=mean, low=mean - half, high=mean + half, error=error)


@lru_cache(maxsize=256)
def _quantile(prompts: int) -> float:
    """Of Student's t for a 95 % interval; infinite below two prompts."""
    return t_quantile(0.975, prompts - 1) if prompts > 1 else math.inf


def powers_up_to(samples: int) -> tuple[int, ...]:
    """1, 2, 4, ... and `samples` itself: the k that a table shows.

    >>> powers_up_to(12)
    (1, 2, 4, 8, 12)
    """
    doubled = [2**power for power in range(samples.bit_length()) if 2**power <= samples]
    return tuple(dict.fromkeys([*doubled, samples]))


def _known(values: ArrayLike) -> Floats:
    given = np.asarray(values, dtype=np.float64).ravel()
    if not len(given) or not np.isfinite(given).all():
        raise ValueError("An interval needs at least one prompt, and a finite number for each.")
    return given


def _error(values: Floats) -> float:
    """Standard error of the mean over prompts; 0 where only rounding tells them apart."""
    if len(values) < 2:
        return math.nan
    error = float(values.std(ddof=1) / math.sqrt(len(values)))
    return 0.0 if error < 1e-14 else error


def _check_counts(counts: NDArray, totals: NDArray) -> None:
    for name, given in (("right", counts), ("samples", totals)):
        if given.dtype.kind not in "iu":
            raise ValueError(f"`{name}` must be whole numbers, got {given.dtype}: count, do not average.")
    wrong = (counts < 0) | (counts > totals)
    if wrong.any():
        raise ValueError(f"{counts[wrong].flat[0]} right answers of {totals[wrong].flat[0]} samples cannot be.")


def _check_k(k: int, totals: NDArray) -> None:
    if k < 1:
        raise ValueError(f"k={k} cannot work: at least one sample is looked at.")
    fewest = int(totals.min()) if totals.size else k
    if k > fewest:
        raise ValueError(
            f"k={k} is more than the {fewest} samples of a prompt, which say nothing about {k} of them. Sample more, "
            "or ask for a smaller k."
        )
