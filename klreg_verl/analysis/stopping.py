"""Early stopping as the baseline: what the arm without KL reached, stopped at the KL where another arm ended.

Stopping `none` earlier costs nothing and holds the policy near its reference too. Its evaluations along the run are a
frontier of held-out accuracy against KL, by straight lines between them; each seed's runs of an arm are contrasted with
the same seed's frontier at their own KL. Nothing is extrapolated. Every evaluation stands at the KL of the ten steps
around it, an arm's end at the KL of the window that its accuracy is the mean of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from klreg_verl.analysis import frontier, stats
from klreg_verl.analysis.endpoints import endpoint, kl_beside
from klreg_verl.analysis.runs import Run
from klreg_verl.analysis.summary import Group
from klreg_verl.core.statistics import Estimate, Paired, mean_and_error, paired
from klreg_verl.experiment.claims import ACHIEVED_KL

NOTE = (
    "The arm without KL at its earlier evaluations is a frontier of accuracy against KL for free. An arm's runs are "
    "compared with the same seed's frontier at the KL where they ended, on straight lines between evaluations; seeds "
    "whose run lies beyond it are left out. The arm without KL against its own frontier is the control: what the lines "
    "and windows alone give. Exploratory: 95 % t intervals over seeds, not corrected for their number."
)
"""What a reader must know of the contrast."""


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """One arm against the arm without KL, stopped where it had the same KL."""

    group: Group
    metric: str
    kl: Estimate
    comparison: Paired
    """The arm's end minus the frontier, by seed."""

    @property
    def is_control(self) -> bool:
        """Whether it is the arm without KL itself."""
        return self.group.runs[0].kl.get("placement") == "none"


def metric_of(groups: Sequence[Group]) -> str | None:
    """The held-out accuracy that training logged for the groups' task; None without one."""
    keys = {str(key) for group in groups for run in group.runs for key in run.training}
    wanted = [key for key in sorted(keys) if key.startswith("eval/") and key.endswith("/accuracy")]
    mine = [key for key in wanted if groups and key == f"eval/{groups[0].task}/accuracy"]
    return next(iter([*mine, *wanted]), None)


def path(run: Run, metric: str) -> list[frontier.Point]:
    """(KL, value) at every evaluation of one run, the starting model's at KL 0."""
    values = run.metrics[metric].dropna() if metric in run.metrics else pd.Series(dtype="float64")
    return [(_kl_around(run, int(step)), float(value)) for step, value in values.items()]


def _kl_around(run: Run, step: int) -> float:
    """The mean KL of the ten steps around an evaluation; at the end of a run of the five before."""
    if step == 0 or ACHIEVED_KL not in run.training:
        return 0.0 if step == 0 else math.nan
    half, series = stats.WINDOW // 2, run.training[ACHIEVED_KL]
    return mean_and_error(series[(series.index > step - half) & (series.index <= step + half)]).mean


def paths(groups: Sequence[Group], metric: str) -> dict[int, list[frontier.Point]]:
    """Seed -> the frontier of the finished runs without a KL term."""
    runs = [run for group in groups for run in group.runs if run.is_done and run.kl.get("placement") == "none"]
    found = {run.seed: path(run, metric) for run in runs}
    return {seed: points for seed, points in found.items() if len(points) > 1}


def compare(groups: Sequence[Group]) -> list[Stopped]:
    """A row an arm that shares two seeds or more with the frontier of one task's groups; last the control, none itself.

    Empty where no arm but none does.
    """
    metric = metric_of(groups)
    known = paths(groups, metric) if metric else {}
    if not metric or not known:
        return []
    rows = [_row(group, metric, known) for group in groups if group.runs[0].kl.get("placement")]
    rows = sorted((row for row in rows if row.comparison.num > 1), key=lambda row: row.is_control)
    return [] if all(row.is_control for row in rows) else rows


def _row(group: Group, metric: str, known: dict[int, list[frontier.Point]]) -> Stopped:
    ends = {run.seed: (kl_beside(run, metric), endpoint(run, metric)) for run in group.runs if run.is_done}
    at_same = {seed: frontier.at_kl(known.get(seed, ()), kl) for seed, (kl, _) in ends.items()}
    return Stopped(
        group=group,
        metric=metric,
        kl=mean_and_error(kl for kl, _ in ends.values()),
        comparison=paired({seed: value for seed, (_, value) in ends.items()}, at_same),
    )


FEWEST = 5
"""Seeds from which the contrast is told in a sentence."""


def sentence(rows: Sequence[Stopped]) -> str:
    """All arms of a task in one, "reverse +0.044 [0.018, 0.070] at KL 0.50"; "" with fewer than five seeds."""
    if min((row.comparison.num for row in rows), default=0) < FEWEST:
        return ""
    told = [f"{row.group.label} {interval(row)} at KL {stats.number(row.kl.mean, 2)}" for row in rows]
    told[-1] += " (the control)" * rows[-1].is_control
    return f"Held-out accuracy against none stopped at the same KL (exploratory): {'; '.join(told)}."


def interval(row: Stopped) -> str:
    """The contrast with its 95 % t interval."""
    found = row.comparison
    places = stats.decimals([found.standard_error])
    low, high = (stats.number(end, places) for end in found.interval())
    mean = stats.number(found.mean, places, sign=True)
    return f"{mean} [{low}, {high}]" if found.is_testable else mean


def frontier_of(groups: Sequence[Group], metric: str) -> frontier.Frontier:
    """The mean over seeds with its band, where half of the seeds or more reach the KL."""
    found = frontier.frontier(paths(groups, metric))
    enough = 2 * found.seeds >= found.seeds.max()
    return replace(found, **{name: np.where(enough, getattr(found, name), np.nan) for name in ("mean", "low", "high")})
