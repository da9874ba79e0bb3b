"""Statistics of a few paired seeds: what differs, what is equivalent, what is open, and how many seeds would decide.

    Paired            the differences of two arms over the seeds that both have: t interval, t test, TOST, sign flips
    decide            a list of pre-registered comparisons -> differs | equivalent | undecided, Holm inside the list
    sequence_p        one p-value of several looks at a growing number of pairs, by O'Brien and Fleming's bounds
    power_*, seeds_*  power and sample sizes of the rule that decides, from the noncentral t
    evaluation_noise  the part of a difference's error that comes from the prompts it was evaluated on

With 3 to 8 seeds a bootstrap over seeds is far from its nominal coverage (0.74 of 0.95 with three), the t interval is
not; so seeds get t, prompts (hundreds) get the bootstrap. The paired t with Holm decides, and nothing else: the sign
flips stand beside it as a check of what normality does, and a power is the power of that rule.

Sources: TOST: Schuirmann (1987), J. Pharmacokinet. Biopharm. 15; Holm (1979), Scand. J. Statist. 6; sign flips: Fisher
(1935), The Design of Experiments, section 21; power of TOST: Phillips (1990), J. Pharmacokinet. Biopharm. 18; looks:
O'Brien & Fleming (1979), Biometrics 35, with the t test at each look's nominal level (Jennison & Turnbull 2000, Group
Sequential Methods, 3.8), and Holm over the p-values of whole sequences (Liu & Anderson 2008, JASA 103).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Literal

import numpy as np

Array = np.ndarray
Outcome = Literal["differs", "equivalent", "undecided"]

LEVEL = 0.05
"""Two-sided error rate of a difference, and error rate of an equivalence."""
POWER = 0.8
"""The power that sample sizes are stated for."""
MAX_SEEDS = 1000
"""Sample sizes above this are told as "more than"."""
SURE = 5
"""Pairs from which differences without any spread are taken as certain; of fewer the spread is not known."""
MAX_FLIPS = 20
"""Pairs up to which all sign flips are listed (2^19 of them by symmetry)."""


# ---------------------------------------------------------------------------------------------------- means


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean, its standard error (NaN when there are fewer than two values), and the number of values."""

    mean: float
    standard_error: float
    num: int


def mean_and_error(values: Iterable[float]) -> Estimate:
    """The mean of the values that are not NaN, with sd / sqrt(n)."""
    known = np.asarray([value for value in values if not math.isnan(value)], dtype=np.float64)
    if not len(known):
        return Estimate(mean=math.nan, standard_error=math.nan, num=0)
    error = float(known.std(ddof=1) / math.sqrt(len(known))) if len(known) > 1 else math.nan
    return Estimate(mean=float(known.mean()), standard_error=error, num=len(known))


def difference(left: Estimate, right: Estimate) -> Estimate:
    """left - right, the two taken as independent: the standard errors add in squares."""
    error = math.hypot(left.standard_error, right.standard_error)
    return Estimate(mean=left.mean - right.mean, standard_error=error, num=min(left.num, right.num))


# ---------------------------------------------------------------------------------------------------- Student's t

# scipy.special is imported inside the functions: it takes a third of a second, which commands that decide nothing save.


def t_tail(t: float, df: float) -> float:
    """P(T > t) of Student's t with `df` degrees of freedom; it keeps its digits far out."""
    from scipy.special import stdtr

    return float(stdtr(df, -t))


@lru_cache(maxsize=4096)
def t_quantile(p: float, df: float) -> float:
    """The t with P(T <= t) = p.

    Raises:
        ValueError: p is not inside (0, 1), or df is not positive.
    """
    if not 0 < p < 1 or not df > 0:
        raise ValueError(f"t_quantile({p}, {df}): p must be between 0 and 1 and df positive.")
    from scipy.special import stdtrit

    return float(stdtrit(df, p))


def _bisect(is_below: Callable[[float], bool], low: float, high: float) -> float:
    """The point where `is_below` turns false, to a part in 10^12; `high` is doubled until it is there."""
    while is_below(high):
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if is_below(middle) else (low, middle)
    return high


# ---------------------------------------------------------------------------------------------------- pairs of seeds


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Two arms over the seeds that both have; `difference` is left minus right. Statistics are NaN below two pairs."""

    seeds: tuple[int, ...]
    left: tuple[float, ...]
    right: tuple[float, ...]
    unpaired: tuple[int, ...] = ()
    """Seeds that only one of the two has; they are left out, not imputed."""

    @property
    def num(self) -> int:
        """Pairs."""
        return len(self.seeds)

    @cached_property
    def differences(self) -> Array:
        """(num,) left minus right."""
        return np.asarray(self.left, dtype=np.float64) - np.asarray(self.right, dtype=np.float64)

    @cached_property
    def mean(self) -> float:
        """The estimate of the difference."""
        return float(self.differences.mean()) if self.num else math.nan

    @cached_property
    def sd(self) -> float:
        """Standard deviation of the differences, over n - 1; one that is rounding error only counts as 0."""
        if self.num < 2:
            return math.nan
        size = max(map(abs, (*self.left, *self.right)))
        spread = float(self.differences.std(ddof=1))
        return spread if spread > 1e-12 * size else 0.0

    @cached_property
    def standard_error(self) -> float:
        """sd / sqrt(n)."""
        return self.sd / math.sqrt(self.num) if self.num else math.nan

    @property
    def correlation(self) -> float:
        """Pearson's between the arms over seeds; NaN below three pairs, or where one arm does not vary.

        What pairing gains: var(left - right) = var(left) + var(right) - 2 corr sd(left) sd(right).
        """
        if self.num < 3:
            return math.nan
        left, right = (np.asarray(side) - np.mean(side) for side in (self.left, self.right))
        norm = math.sqrt(float((left**2).sum() * (right**2).sum()))
        return float((left * right).sum() / norm) if norm > 0 else math.nan

    @property
    def is_testable(self) -> bool:
        """Whether there is a t statistic: two pairs, and five where all differences are equal."""
        return self.num >= (SURE if self.sd == 0 else 2)

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """The t interval of coverage 1 - level; NaN where there is no t statistic."""
        if not self.is_testable:
            return math.nan, math.nan
        half = t_quantile(1 - level / 2, self.num - 1) * self.standard_error
        return self.mean - half, self.mean + half

    def p_difference(self) -> float:
        """Two-sided p of "no difference" by the paired t test; NaN where there is no t statistic."""
        return min(1.0, 2 * t_tail(abs(self._t(0.0)), self.num - 1)) if self.is_testable else math.nan

    def p_equivalence(self, margin: float) -> float:
        """p of "the difference is at least `margin`" by two one-sided t tests: the larger of the two, or NaN."""
        if not self.is_testable:
            return math.nan
        df = self.num - 1
        return max(t_tail(self._t(-margin), df), t_tail(-self._t(margin), df))

    def p_flips(self) -> float:
        """Exact two-sided p when every pair's sign is as good as any; NaN below two and above MAX_FLIPS pairs."""
        if not 2 <= self.num <= MAX_FLIPS:
            return math.nan
        first, *others = self.differences
        sums = np.array([first])
        for value in others:
            sums = np.concatenate([sums + value, sums - value])
        observed = abs(self.differences.sum())
        return float((np.abs(sums) >= observed - 1e-12 * np.abs(self.differences).sum()).mean())

    def first(self, num: int) -> Paired:
        """The pairs of the `num` lowest seeds."""
        return replace(self, seeds=self.seeds[:num], left=self.left[:num], right=self.right[:num])

    def _t(self, value: float) -> float:
        """(mean - value) / standard error; infinite without any spread, 0 if there is no distance either."""
        distance = self.mean - value
        if self.standard_error > 0:
            return distance / self.standard_error
        return math.copysign(math.inf, distance) if distance else 0.0


def paired(left: Mapping[int, float], right: Mapping[int, float]) -> Paired:
    """The pairs of the seeds where both values are finite, each value standing under its seed."""
    known = [{seed: value for seed, value in side.items() if math.isfinite(value)} for side in (left, right)]
    seeds = tuple(sorted(known[0].keys() & known[1].keys()))
    return Paired(
        seeds=seeds,
        left=tuple(float(known[0][seed]) for seed in seeds),
        right=tuple(float(known[1][seed]) for seed in seeds),
        unpaired=tuple(sorted((left.keys() | right.keys()) - set(seeds))),
    )


# ---------------------------------------------------------------------------------------------------- decisions


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given. A NaN cannot be rejected but counts as a member of the family.

    Rejecting what is at most alpha makes one false rejection or more with probability at most alpha, whatever the
    dependence between the tests.
    """
    known = [1.0 if math.isnan(p) else p for p in p_values]
    adjusted, largest = [math.nan] * len(known), 0.0
    for rank, index in enumerate(sorted(range(len(known)), key=known.__getitem__)):
        largest = max(largest, min(1.0, (len(known) - rank) * known[index]))
        adjusted[index] = largest
    return adjusted


def _crossing(height: float, shares: Sequence[float], sides: int) -> float:
    """P(B(t) >= height at one of the times `shares`) of Brownian motion, or of |B(t)| where `sides` is 2."""
    from scipy.special import ndtr

    if sides == 2 and height <= 0:
        return 1.0
    height = max(-9.0, min(height, 9.0))  # beyond there is nothing to integrate
    low = -height if sides == 2 else min(height, 0.0) - 9.0
    x, w = _legendre()
    nodes, weights = low + (height - low) * (x + 1) / 2, w * (height - low) / 2
    if len(shares) == 1:
        return float(sides * ndtr(-height / math.sqrt(shares[0])))
    inside = _density(nodes, shares[0])
    for before, now in pairwise(shares):
        inside = _density(nodes[:, None] - nodes, now - before) @ (weights * inside)
    return max(0.0, 1.0 - float(weights @ inside))


def _density(x: Array, variance: float) -> Array:
    """Of a normal variable with mean 0."""
    return np.asarray(np.exp(-(x**2) / (2 * variance)) / math.sqrt(2 * math.pi * variance))


def sequence_p(p_values: Sequence[float], looks: Sequence[int], *, sides: int) -> float:
    """The p-value of all looks up to now: the smallest error rate at which one passes O'Brien and Fleming's bound.

    Their bound on the z of the look at n of N pairs is c sqrt(N / n), the same c for all looks; so what counts is the
    largest z sqrt(n / N) seen. It is at most `level` with probability `level` at most, however the looks end.

    Args:
        p_values: of the tests at the looks that were reached, in order; empty gives NaN.
        looks: pairs at all looks that were planned, ascending.
        sides: 2 for two-sided p-values, 1 for one-sided ones (an equivalence's).
    """
    from scipy.special import ndtri

    if not p_values or any(map(math.isnan, p_values)):
        return math.nan
    shares = [num / looks[-1] for num in looks]
    heights = [-float(ndtri(p / sides)) * math.sqrt(share) for p, share in zip(p_values, shares, strict=False)]
    return _crossing(max(heights), shares, sides)


def look_level(looks: Sequence[int], taken: int, level: float = LEVEL) -> float:
    """The two-sided nominal error rate of look number `taken` (from 1), such that all together have `level`."""
    from scipy.special import ndtr

    return float(2 * ndtr(-_bound(tuple(looks), level) * math.sqrt(looks[-1] / looks[taken - 1])))


@lru_cache(maxsize=256)
def _bound(looks: tuple[int, ...], level: float) -> float:
    """The c of `sequence_p` that is exceeded with probability `level`."""
    return _bisect(lambda c: _crossing(c, [num / looks[-1] for num in looks], 2) > level, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """How one comparison of a list ended; the p-values are Holm-adjusted inside the list."""

    outcome: Outcome
    p_difference: float
    p_equivalence: float
    p_flips: float
    """Of the exact sign flips: for a reader, it decides nothing."""
    is_nonzero: bool
    """Whether the difference is told from zero; an equivalence can be nonzero, too: real, but too small to matter."""


def decide(
    comparisons: Sequence[Paired],
    margins: Sequence[float],
    *,
    looks: Sequence[Sequence[int]] | None = None,
    level: float = LEVEL,
    family: int | None = None,
) -> list[Decision]:
    """Ends each comparison of one list as differs, equivalent or undecided.

    *equivalent*: TOST within the margin passes. Else *differs*: the paired t passes. Else *undecided*. The p-values of
    the differences are adjusted by Holm over the list, and so are those of the equivalences: the probability of one
    false "differs" or more in the list is at most `level`, and that of one false "equivalent" or more is, too.

    Args:
        comparisons: the whole list; those without two pairs are undecided and count.
        margins: of each, in the unit of its values, > 0.
        looks: of each, the numbers of pairs at which it was planned to be looked at, ascending; empty: at all that
            there are, once. Pairs between two looks wait for the next, those after the last one do not enter.
        level: of each of the two families.
        family: members of the list, if more were registered than are given here.
    """
    missing = [math.nan] * max(0, (family or 0) - len(comparisons))
    planned = looks or [()] * len(comparisons)
    members = list(zip(comparisons, margins, planned, strict=True))
    differing = holm([_p_difference(each, at) for each, _, at in members] + missing)
    equal = holm([_p_equivalence(each, margin, at) for each, margin, at in members] + missing)
    flipped = holm([at_look(each, at).p_flips() for each, _, at in members] + missing)
    return [_decision(*p_values, level) for p_values in zip(differing, equal, flipped, strict=True)][: len(members)]


def reached(looks: Sequence[int], num: int) -> list[int]:
    """The looks that `num` pairs have reached."""
    return [look for look in looks if look <= num]


def at_look(comparison: Paired, looks: Sequence[int]) -> Paired:
    """The pairs that decide: those up to the last look that was reached; all of them where no looks were planned."""
    return comparison.first(max(reached(looks, comparison.num), default=0)) if looks else comparison


def _p_difference(comparison: Paired, looks: Sequence[int]) -> float:
    if not looks:
        return comparison.p_difference()
    taken = [comparison.first(num).p_difference() for num in reached(looks, comparison.num)]
    return sequence_p(taken, looks, sides=2)


def _p_equivalence(comparison: Paired, margin: float, looks: Sequence[int]) -> float:
    if not looks:
        return comparison.p_equivalence(margin)
    taken = [comparison.first(num).p_equivalence(margin) for num in reached(looks, comparison.num)]
    return sequence_p(taken, looks, sides=1)


def _decision(p_difference: float, p_equivalence: float, p_flips: float, level: float) -> Decision:
    nonzero = p_difference <= level
    outcome: Outcome = "equivalent" if p_equivalence <= level else "differs" if nonzero else "undecided"
    return Decision(
        outcome=outcome,
        p_difference=p_difference,
        p_equivalence=p_equivalence,
        p_flips=p_flips,
        is_nonzero=nonzero,
    )


# ---------------------------------------------------------------------------------------------------- power


@lru_cache(maxsize=1)
def _legendre() -> tuple[Array, Array]:
    """(nodes, weights) of Gauss and Legendre on [-1, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(100)
    return nodes, weights


def power_difference(effect: float, num: int, level: float = LEVEL) -> float:
    """Probability that the two-sided paired t passes, for `num` pairs and `effect` = difference / sd of a difference.

    P(|T| > t) of the noncentral t.
    """
    from scipy.special import nctdtr

    df, t, shift = num - 1, t_quantile(1 - level / 2, num - 1), abs(effect) * math.sqrt(num)
    return float(1 - nctdtr(df, shift, t) + nctdtr(df, shift, -t))


def power_equivalence(margin: float, num: int, effect: float = 0.0, level: float = LEVEL) -> float:
    """Probability that TOST passes; `margin` and the true `effect` in units of the sd of a difference.

    Given the spread S seen over the true one the mean is normal, and S is integrated out: over v = df S^2 / 2, a gamma
    variable, by its distribution function u. With S above margin sqrt(num) / t no mean passes both tests.
    """
    from scipy.special import gammainc, gammaincinv, ndtr

    df, t, root = num - 1, t_quantile(1 - level, num - 1), math.sqrt(num)
    most = gammainc(df / 2, df / 2 * (root * margin / t) ** 2) if t > 0 else 1.0
    x, w = _legendre()
    y = (x + 1) / 2
    u, density = y**2 * (3 - 2 * y), 3 * y * (1 - y)  # more nodes at both ends, where S changes fastest with u
    spread = np.sqrt(2 / df * gammaincinv(df / 2, most * u))
    passing = ndtr(root * (margin - effect) - t * spread) - ndtr(t * spread - root * (margin + effect))
    return float(most * (w * density) @ passing)


def seeds_for_difference(effect: float, level: float = LEVEL, power: float = POWER) -> int | None:
    """Pairs with which the t test finds `effect` (in sd of a difference) with that power; None above MAX_SEEDS."""
    return _fewest(lambda num: power_difference(effect, num, level) >= power)


def seeds_for_equivalence(margin: float, effect: float = 0.0, level: float = LEVEL, power: float = POWER) -> int | None:
    """Pairs with which TOST passes with that power; None above MAX_SEEDS, and where the effect is not inside."""
    if not abs(effect) < margin:
        return None
    return _fewest(lambda num: power_equivalence(margin, num, effect, level) >= power)


def _fewest(enough: Callable[[int], bool]) -> int | None:
    """The smallest number from 2 to MAX_SEEDS that is enough; what is enough stays so."""
    low, high = 1, 2
    while not enough(high):
        low, high = high, 2 * high
        if low >= MAX_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high if high <= MAX_SEEDS else None


def detectable_difference(num: int, level: float = LEVEL, power: float = POWER) -> float:
    """The smallest difference, in sd of a difference, that `num` pairs find with that power."""
    return _bisect(lambda effect: power_difference(effect, num, level) < power, 0.0, 1.0)


def smallest_margin(num: int, level: float = LEVEL, power: float = POWER) -> float:
    """The smallest margin, in sd of a difference, within which `num` pairs show equivalence if nothing differs."""
    return _bisect(lambda margin: power_equivalence(margin, num, 0.0, level) < power, 0.0, 1.0)


def sd_limit(sd: float, df: int, confidence: float = 0.8) -> float:
    """The value that the true standard deviation does not exceed with this confidence, from one seen with `df`.

    A pilot of a few seeds shows a spread that is as often too small as too large, and a study planned with it is too
    small as often (Browne 1995, Statistics in Medicine 14). From sd^2 df / sigma^2 ~ chi2.
    """
    from scipy.special import chdtri

    return float(sd / math.sqrt(chdtri(df, confidence) / df))


def seeds_to_decide(comparison: Paired, margin: float, level: float = LEVEL, power: float = POWER) -> int | None:
    """Pairs, those there are included, with which the comparison would end, if its mean is the true one.

    The sd is taken at its 80 % limit (`sd_limit`), as wherever a number of seeds is planned. The fewer of what a
    difference and what an equivalence would need; None where both need more than MAX_SEEDS, or the spread is not
    known. More than there are by at least one.
    """
    if not comparison.sd > 0:
        return None
    sd = sd_limit(comparison.sd, comparison.num - 1)
    effect, scaled = comparison.mean / sd, margin / sd
    needed = (seeds_for_difference(effect, level, power), seeds_for_equivalence(scaled, effect, level, power))
    known = [number for number in needed if number is not None]
    return max(min(known), comparison.num + 1) if known else None


# ---------------------------------------------------------------------------------------------------- prompts


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What a resampling of the prompts does to the mean difference over seeds."""

    standard_error: float


def evaluation_noise(differences: Sequence[Array], *, shared: bool, resamples: int = 2000, seed: int = 0) -> Noise:
    """Bootstrap over prompts inside seeds: the seeds stay as they are, so this is evaluation noise alone.

    Args:
        differences: for each seed (P,) the difference of the two arms' means over samples, prompt by prompt.
        shared: the same P prompts in the same order for all seeds (one held-out set); they are drawn together.

    Raises:
        ValueError: no prompts, or `shared` with different numbers of them.
    """
    columns = [np.asarray(each, dtype=np.float64) for each in differences]
    if not columns or not all(len(each) for each in columns):
        raise ValueError("There is a seed without prompts, or no seed at all: nothing can be resampled.")
    if shared and len({len(each) for each in columns}) > 1:
        raise ValueError(f"Shared prompts, but the seeds have {sorted({len(each) for each in columns})} of them.")
    if shared:
        columns = [np.mean(columns, axis=0)]
    generator = np.random.default_rng(seed)
    means = np.mean([_resampled(each, resamples, generator) for each in columns], axis=0)
    return Noise(standard_error=float(means.std(ddof=1)))


def _resampled(values: Array, resamples: int, generator: np.random.Generator) -> Array:
    """(resamples,) means of draws with replacement, as counts of each value."""
    counts = generator.multinomial(len(values), np.full(len(values), 1 / len(values)), size=resamples)
    return counts @ values / len(values)
