"""Windows of steps, smoothing for the eye, and numbers as texts. The statistics themselves are core.statistics's.

A standard error here is sd / sqrt(n) with the n - 1 standard deviation. Over the steps of one run it takes the steps as
independent and says nothing about other seeds; over seeds it is the spread between runs. Both are called by their name
wherever they are shown. NaN marks a value that was not recorded; it is left out, and an empty set has mean NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from klreg_verl.core.statistics import LEVEL, Estimate, difference, mean_and_error, paired, t_quantile

__all__ = [
    "WINDOW",
    "Change",
    "Estimate",
    "block_means",
    "change",
    "clear_sign",
    "decimals",
    "difference",
    "last_steps",
    "mean_and_error",
    "mean_change",
    "number",
    "paired_difference",
    "places",
    "smooth",
    "smoothing_window",
    "text",
]

WINDOW = 10
"""Steps in "the first" and "the last steps" of a run."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """The first and the last window of steps, and last minus first."""

    first: Estimate
    last: Estimate
    difference: Estimate
    window: int

    @property
    def direction(self) -> int:
        """The sign of the difference where its 95 % t interval leaves zero out, else 0 (also without an error)."""
        return clear_sign(self.difference)


def last_steps(values: Sequence[float], window: int = WINDOW) -> Estimate:
    """Mean over the last ``window`` steps (all of them if there are fewer)."""
    return mean_and_error(list(values)[-window:])


def change(values: Sequence[float], window: int = WINDOW) -> Change | None:
    """The first against the last ``window`` steps; half of the steps each if there are fewer than two windows.

    None for fewer than two steps.
    """
    values = list(values)
    window = min(window, len(values) // 2)
    if window < 1:
        return None
    first, last = mean_and_error(values[:window]), mean_and_error(values[-window:])
    return Change(first=first, last=last, difference=difference(last, first), window=window)


def mean_change(changes: Sequence[Change]) -> Change:
    """Over runs: means of the first and last windows, and of the differences within runs, with errors over runs.

    One run keeps its own errors, which are over steps.
    """
    if len(changes) == 1:
        return changes[0]
    return Change(
        first=mean_and_error(each.first.mean for each in changes),
        last=mean_and_error(each.last.mean for each in changes),
        difference=mean_and_error(each.difference.mean for each in changes),
        window=min(each.window for each in changes),
    )


def paired_difference(left: Mapping[int, float], right: Mapping[int, float]) -> Estimate:
    """left - right over the seeds that both have, each value standing under its seed."""
    return mean_and_error(paired(left, right).differences.tolist())


def clear_sign(estimate: Estimate) -> int:
    """The sign of a mean whose 95 % t interval leaves zero out; else 0. Three values need 4.3 errors, not two."""
    if math.isnan(estimate.standard_error) or estimate.num < 2:
        return 0
    if abs(estimate.mean) <= t_quantile(1 - LEVEL / 2, estimate.num - 1) * estimate.standard_error:
        return 0
    return 1 if estimate.mean > 0 else -1


def smoothing_window(num_steps: int) -> int:
    """An odd number of steps, about an eighth of the run: 1 (no smoothing) below 12, then 3 to 25; 5 at 40 steps."""
    eighth = num_steps // 8
    return 1 if num_steps < 12 else min(25, max(3, eighth - 1 + eighth % 2))


def smooth(values: pd.Series, window: int) -> pd.Series:
    """Centred moving mean over ``window`` (odd) rows, at the rows where the whole window exists. NaN is left out first.

    Nothing is made up at the ends: a truncated window would flatten a trend, a fitted one would follow the noise.
    """
    known = values.dropna()
    return known.rolling(window, center=True).mean().dropna() if window <= len(known) else known


def block_means(values: pd.Series, size: int) -> np.ndarray:
    """Means of consecutive blocks of ``size`` rows, NaN left out; an incomplete last block is dropped."""
    whole = len(values) // size * size
    blocks = values.to_numpy(dtype=np.float64)[:whole].reshape(-1, size)
    known = ~np.isnan(blocks)
    totals, counts = np.where(known, blocks, 0.0).sum(axis=1), known.sum(axis=1)
    return np.where(counts > 0, totals / np.maximum(counts, 1), np.nan)


def decimals(errors: Iterable[float]) -> int:
    """Decimals that show two digits of the largest error: at least 1, at most 4; 3 if no error is positive."""
    positive = [error for error in errors if error > 0]
    return min(4, max(1, 1 - math.floor(math.log10(max(positive))))) if positive else 3


def places(column: Iterable[Estimate]) -> int:
    """Decimals for a column of estimates that is to be read as one."""
    return decimals(estimate.standard_error for estimate in column)


def text(estimate: Estimate, num_decimals: int | None = None, *, sign: bool = False) -> str:
    """ "0.631 ± 0.012"; without an error the mean alone; "–" if there is no value."""
    if math.isnan(estimate.mean):
        return "–"
    shown = places([estimate]) if num_decimals is None else num_decimals
    mean = number(estimate.mean, shown, sign=sign)
    return mean if math.isnan(estimate.standard_error) else f"{mean} ± {number(estimate.standard_error, shown)}"


def number(value: float, num_decimals: int, *, sign: bool = False) -> str:
    """Fixed decimals with a real minus; never "-0.00"."""
    rounded = round(value, num_decimals) + 0.0
    return f"{rounded:{'+' if sign else ''}.{num_decimals}f}".replace("-", "−")
