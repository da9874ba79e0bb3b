"""Figures of a study: groups in, Axes out; and from them PNG files or SVG that takes its colours from the page.

In every time course the thick line of a setting is the mean of its runs (one run: the run itself), smoothed by a
centred moving mean whose window the captions state. The band of three or more runs is the standard error over them,
each smoothed likewise; any other run is a thin line, step by step as recorded. Settings are named at the ends of their
lines. A run that failed or was interrupted ends in a cross.

An arm has one colour (themes.py), its grid points shades of it; from the eighth arm on lines are dashed. No figure
contains a time or a random identifier: the same runs give the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import Formatter, MaxNLocator

from klreg_verl.analysis import claims, retention, stats, stopping, themes
from klreg_verl.analysis import frontier as frontiers
from klreg_verl.analysis.optimum import Achieved, starting_draws
from klreg_verl.analysis.runs import Run
from klreg_verl.analysis.stats import Estimate
from klreg_verl.analysis.summary import ACCURACY, KL_K1, SCORE, Group, final_value
from klreg_verl.analysis.themes import LIGHT, PAGE, Theme
from klreg_verl.core import optimum
from klreg_verl.core.alarms import RETENTION
from klreg_verl.core.optimum import Prediction

DOTS_PER_INCH = 200
PANEL_SIZE = (4.9, 2.9)
"""Inches of a single figure: 980 x 580 pixels as PNG."""
OVERVIEW_SIZE = (12.0, 3.25)
OVERVIEW_DOTS_PER_INCH = 220
"""The row of four: 2640 x 715 pixels as PNG, twice what a README shows and more."""
CHARACTER = 0.072
"""Inches of a name's character, about."""
ROW = 0.2
"""Inches of a row of names below an overview."""
MOST_ROOM = 1.7
"""Inches that names may take beside a single figure."""
LABEL_ROOM = 0.9
"""Inches that names may take at the ends of the lines of one panel of an overview."""
BLOCK = 10
"""Steps that one dot of the KL-accuracy figure averages."""


Draw = Callable[[Axes, Theme], Axes]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One metric against steps."""

    key: str
    name: str
    """File name and anchor."""
    title: str
    unit: str
    smoothed: bool = True
    drawn_if_constant: bool = True
    """Whether a figure in which no run ever moves is worth its place."""
    missed: bool = True
    """Whether a report without it says so."""


TIME_COURSES = (
    Panel(key=ACCURACY, name="accuracy", title="Accuracy", unit="valid share of the training batch"),
    Panel(key=SCORE, name="score", title="Score", unit="mean reward of the training batch", missed=False),
    Panel(key="entropy/token", name="entropy", title="Entropy", unit="nats per token"),
    Panel(key=KL_K1, name="kl_k1", title="KL to the reference, k1", unit="nats per response"),
    Panel(key="kl_ref/k3_response", name="kl_k3", title="KL to the reference, k3", unit="nats per response"),
    Panel(key="diversity/coverage", name="coverage", title="Coverage", unit="distinct valid / possible answers"),
    Panel(key="diversity/unique_valid", name="unique_valid", title="Distinct valid answers", unit="answers per prompt"),
    Panel(key="response/length", name="length", title="Response length", unit="tokens"),
    Panel(
        key="kl/beta", name="beta", title="Beta", unit="reward units per nat", smoothed=False, drawn_if_constant=False
    ),
    Panel(key="stock/kl_loss", name="stock_kl_loss", title="KL loss", unit="as verl logs it", missed=False),
    Panel(
        key="stock/kl_reward", name="stock_kl_reward", title="KL in the reward", unit="as verl logs it", missed=False
    ),
)
MISMATCH = (
    Panel(key="kl_rollout/k1_token", name="mismatch_k1", title="Sampler against trainer, k1", unit="nats per token"),
    Panel(
        key="kl_rollout/max",
        name="mismatch_max",
        title="Sampler against trainer, largest",
        unit="nats, one token of the batch",
    ),
)
OVERVIEW = tuple(
    panel for name in ("accuracy", "kl_k1", "entropy", "coverage") for panel in TIME_COURSES if panel.name == name
)
KL_ACCURACY = "kl_accuracy"
OPTIMUM = "optimum"
STOPPING = "early_stopping"
BETAS = tuple(np.geomspace(0.05, 20, 40).tolist())
"""Of the tilted optimum's curve."""
FRONTIERS = (
    Panel(key=ACCURACY, name="frontier_accuracy", title="Accuracy at the same KL", unit="valid share at the end"),
    Panel(key=SCORE, name="frontier_score", title="Score at the same KL", unit="mean reward at the end"),
    Panel(
        key="entropy/token", name="frontier_entropy", title="Entropy at the same KL", unit="nats per token, at the end"
    ),
    Panel(
        key="diversity/coverage",
        name="frontier_coverage",
        title="Coverage at the same KL",
        unit="distinct valid / possible answers",
    ),
)
"""Drawn where an arm was run at several betas."""
SWEEP = (
    *(
        replace(panel, name=f"beta_{panel.name}", unit=panel.unit.split(" of the ")[0])
        for panel in (*OVERVIEW, *(panel for panel in TIME_COURSES if panel.key == SCORE))
    ),
    Panel(key=RETENTION, name="beta_retention", title="A skill not trained", unit="change of its accuracy"),
)
"""Drawn where an arm was swept over beta."""
SWEPT = 3
"""Betas that make a sweep."""
BROKEN_OFF = ("failed", "interrupted")
BANDED = 3
"""From so many runs on a band shows their spread; fewer are drawn one by one."""
MOST_POINTS = 300
"""Points of a thin line: a longer one keeps the extremes of each stretch, which look the same at this size."""
TITLES = {panel.name: panel.title for panel in (*TIME_COURSES, *MISMATCH, *FRONTIERS)} | {
    **{panel.name: f"{panel.title} against beta" for panel in SWEEP},
    KL_ACCURACY: "Accuracy against KL",
    STOPPING: "Against early stopping",
    OPTIMUM: "Predicted optimum and what was achieved",
    "overview": "Accuracy, KL to the reference, entropy and coverage",
}


def time_course(groups: Sequence[Group], panel: Panel, axes: Axes, theme: Theme = LIGHT, *, named: bool = True) -> Axes:
    """``panel.key`` against the step: the smoothed mean of every group that recorded it, with the spread of its runs.

    ``named``: whether the groups' names stand at the ends of their lines.
    """
    window = window_of(groups) if panel.smoothed else 1
    ends = [_draw_group(group, panel.key, window, axes, theme) for group in groups if group.series(panel.key)]
    _frame(axes, panel.title, panel.unit, theme)
    axes.set_xlabel("step", color=theme.muted)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.margins(x=0, y=0.08)
    _widen(axes)
    _label_ends(axes, [end for end in ends if end is not None and named])
    return axes


def kl_accuracy(groups: Sequence[Group], axes: Axes, theme: Theme = LIGHT) -> Axes:
    """Accuracy, or score, against KL(policy || reference) by k1: a dot for the mean of ten steps, arrows along time.

    Dots and arrows are the mean of a group's runs; with more than one run, each run is a thin line besides.
    """
    size = block_size(groups)
    for group in groups:
        runs = [
            _blocks(run.training[KL_K1], run.training[group.headline], size)
            for run in group.final_runs
            if _has_both(run)
        ]
        for points in runs if len(runs) > 1 else ():
            axes.plot(points[:, 0], points[:, 1], color=themes.color(group, theme), linewidth=0.7, alpha=0.35, zorder=1)
    paths = [(group, _blocks(group.arm_mean(KL_K1), group.arm_mean(group.headline), size)) for group in groups]
    ends = [_draw_path(points, group, axes, theme) for group, points in paths if len(points)]
    panel = next(panel for panel in TIME_COURSES if panel.key == groups[0].headline)
    _frame(axes, f"{panel.title} against KL", panel.unit, theme)
    _kl_axis(axes, theme)
    _label_beside(axes, ends)
    return axes


def frontier(groups: Sequence[Group], panel: Panel, axes: Axes, theme: Theme = LIGHT) -> Axes:
    """``panel.key`` against the KL that a finished run ended at; nothing is extrapolated.

    An arm at several betas: a dot a run, the mean over its seeds at each KL on the lines between a seed's dots, and a
    95 % t band where two seeds or more reach the KL. An arm at one beta: its dots alone.
    """
    ends = [_draw_at_kl(members, panel.key, axes, theme) for members in _by_arm(groups)]
    _frame(axes, panel.title, panel.unit, theme)
    _kl_axis(axes, theme)
    _label_beside(axes, [end for end in ends if end is not None])
    return axes


def against_beta(
    groups: Sequence[Group], panel: Panel, axes: Axes, theme: Theme = LIGHT, *, named: bool = True
) -> Axes:
    """``panel.key`` at the end against beta, logarithmic: means of the last ten steps with their standard errors.

    What is no path of betas (none, without a KL term) is a level across, its band the standard error. The retained
    skills' panel shows the one that lost most. Settings without a finished run have no end yet.
    """
    members = _by_arm(_ended(groups))
    axes.set_xscale("log")
    ends = [_draw_sweep(each, panel.key, axes, theme) for each in members if _is_swept(each)]
    fixed = [group for each in members if not _is_swept(each) for group in each]
    ends += [_draw_level(group, panel.key, axes, theme) for group in fixed]
    _frame(axes, panel.title, panel.unit, theme)
    axes.set_xlabel("beta", color=theme.muted)
    betas = sorted({group.beta for each in members if _is_swept(each) for group in each})
    axes.set_xticks(betas, [f"{beta:g}" for beta in betas])
    axes.minorticks_off()
    axes.margins(x=0.06, y=0.1)
    _widen(axes)
    _label_ends(axes, [end for end in ends if end is not None and named])
    return axes


def has_sweep(groups: Sequence[Group], panel: Panel) -> bool:
    """Whether an arm differs in beta alone, has the metric at three betas or more, and no beta is 0."""
    return any(
        sum(_at_end(group, panel.key).num > 0 for group in members) >= SWEPT
        for members in _by_arm(_ended(groups))
        if _is_swept(members)
    )


def _ended(groups: Sequence[Group]) -> list[Group]:
    return [group for group in groups if not group.is_interim]


def _is_swept(members: Sequence[Group]) -> bool:
    return len(members) >= SWEPT and _is_path(members) and all(group.beta > 0 for group in members)


def _at_end(group: Group, key: str) -> Estimate:
    return retention.lowest_change(group) if key == RETENTION else final_value(group, key)


def has_frontier(groups: Sequence[Group], panel: Panel) -> bool:
    """Whether an arm has finished runs with the metric at two betas or more, and differs in beta alone."""
    return any(
        _is_path([group for group in members if any(_ended_with(run, panel.key) for run in group.runs)])
        for members in _by_arm(groups)
        if _is_path(members)
    )


def _ended_with(run: Run, key: str) -> bool:
    return run.is_done and KL_K1 in run.training and bool(len(run.values(key)))


def _is_path(members: Sequence[Group]) -> bool:
    """Whether the grid points of an arm are as many different betas, so that joining them mixes nothing else."""
    betas = [group.beta for group in members]
    return len(betas) > 1 and len(set(betas)) == len(betas)


def predicted(rows: Sequence[Achieved], groups: Sequence[Group], axes: Axes, theme: Theme = LIGHT) -> Axes:
    """Every arm with a known optimum: a ring where its objective has it, a dot where its runs ended, a line between.

    Axes as in ``kl_accuracy``. Whiskers of a ring: the accuracy whatever the prompts' chances are; of a dot: a
    standard error. Arms whose optimum is unknown are dots alone.
    """
    by_label, ends = {group.label: group for group in groups}, []
    for row in rows:
        if not (np.isfinite(row.kl.mean) and np.isfinite(row.accuracy.mean)):
            continue
        color, reached = themes.color(by_label[row.arm], theme), (row.kl.mean, row.accuracy.mean)
        errors = [float(np.nan_to_num(each.standard_error)) for each in (row.kl, row.accuracy)]
        axes.errorbar(
            *reached, xerr=errors[0], yerr=errors[1], fmt="o", color=color, markersize=5, linewidth=1, zorder=4
        )
        name = _short_name(by_label[row.arm])
        ends.append(_End(x=reached[0], y=reached[1], label=name, color=themes.of_arm(by_label[row.arm], theme)))
        if row.prediction is not None:
            _draw_prediction(row.prediction, reached, color, not row.known.is_exact, axes, theme)
    _frame(axes, "Predicted optimum and what was achieved", "valid share · ring predicted, dot achieved", theme)
    _kl_axis(axes, theme)
    _label_beside(axes, ends)
    return axes


def early_stopping(groups: Sequence[Group], axes: Axes, theme: Theme = LIGHT) -> Axes:
    """Held-out accuracy of none at all its evaluations against KL, with a 95 % t band, and the ends of the other arms.

    Dots are means over seeds with standard errors. Above: the tilted optimum, which no policy exceeds at its KL
    (dashed), and the best of 2, 4, 8 draws at the upper bound of its KL (rings), both from the starting model's draws.
    """
    metric = stopping.metric_of(groups)
    rows, ends = [row for row in stopping.compare(groups) if not row.is_control], []
    if metric is None or not rows:
        return axes
    free = next(group for group in groups if group.runs[0].kl.get("placement") == "none")
    last = _draw_frontier(stopping.frontier_of(groups, metric), themes.of_arm(free, theme), "-", axes)
    ends.append(_End(x=last[0], y=last[1], label=f"{free.label}, stopped early", color=themes.of_arm(free, theme)))
    for row in rows:
        color, reached = themes.color(row.group, theme), stats.mean_and_error(row.comparison.left)
        errors = [float(np.nan_to_num(each.standard_error)) for each in (row.kl, reached)]
        place = (row.kl.mean, reached.mean)
        axes.errorbar(*place, xerr=errors[0], yerr=errors[1], fmt="o", color=color, markersize=5, linewidth=1, zorder=4)
        ends.append(_End(x=place[0], y=place[1], label=_short_name(row.group), color=themes.of_arm(row.group, theme)))
    ends += _draw_bounds(groups, max(last[0], *(row.kl.mean for row in rows)), axes, theme)
    _frame(axes, TITLES[STOPPING], "held-out accuracy · arms at their ends", theme)
    _kl_axis(axes, theme)
    _label_beside(axes, ends)
    return axes


def _draw_bounds(groups: Sequence[Group], furthest: float, axes: Axes, theme: Theme) -> list[_End]:
    """The tilted optimum and best of n, as far as the arms came; nothing without draws of the starting model."""
    start = starting_draws(groups)
    if not start:
        return []
    curve = np.array([point for point in optimum.tilted(start, BETAS) if point[0] <= furthest])
    rings = np.array([point for point in optimum.best_of(start, (2, 4, 8)) if point[0] <= furthest])
    axes.plot(*curve.reshape(-1, 2).T, color=theme.muted, linewidth=1.2, linestyle=(0, (4, 2)), zorder=2)
    axes.plot(*rings.reshape(-1, 2).T, "o", color=theme.muted, markerfacecolor="none", markersize=4.5, zorder=2)
    best = curve[np.argmax(curve[:, 0])] if len(curve) else None
    told = [] if best is None else [_End(x=float(best[0]), y=float(best[1]), label="optimum", color=theme.muted)]
    return told + [_End(x=float(x), y=float(y), label="best of n", color=theme.muted) for x, y in rings[-1:]]


def block_size(groups: Sequence[Group]) -> int:
    """Steps in a dot: ten, or a quarter of the run where that would leave fewer than two dots."""
    longest = max((run.last_step for group in groups for run in group.final_runs), default=0)
    return BLOCK if longest >= 2 * BLOCK else max(1, longest // 4)


def window_of(groups: Sequence[Group]) -> int:
    """The smoothing window that the figures of these groups use, in steps."""
    return stats.smoothing_window(max((run.last_step for group in groups for run in group.runs), default=0))


def recorded(groups: Sequence[Group], panel: Panel) -> bool:
    """Whether any run of the groups has a value for the panel."""
    return any(group.series(panel.key) for group in groups)


def drawings(groups: Sequence[Group], optima: Sequence[Achieved] = ()) -> dict[str, Draw]:
    """File name -> what draws it, for every single figure of one task for which there is data."""

    def course(panel: Panel) -> Draw:
        return lambda axes, theme: time_course(groups, panel, axes, theme)

    def at_kl(panel: Panel) -> Draw:
        return lambda axes, theme: frontier(groups, panel, axes, theme)

    def at_beta(panel: Panel) -> Draw:
        return lambda axes, theme: against_beta(groups, panel, axes, theme)

    chosen = {panel.name: course(panel) for panel in (*TIME_COURSES, *MISMATCH) if _worth_drawing(groups, panel)}
    if any(_has_both(run) for group in groups for run in group.final_runs):
        chosen[KL_ACCURACY] = lambda axes, theme: kl_accuracy(groups, axes, theme)
    chosen |= {panel.name: at_kl(panel) for panel in FRONTIERS if has_frontier(groups, panel)}
    chosen |= {panel.name: at_beta(panel) for panel in SWEEP if has_sweep(groups, panel)}
    if groups and stopping.compare(groups):
        chosen[STOPPING] = lambda axes, theme: early_stopping(groups, axes, theme)
    mine = [row for row in optima if row.task == groups[0].task] if groups else []
    if any(row.prediction is not None and np.isfinite(row.kl.mean) for row in mine):
        chosen[OPTIMUM] = lambda axes, theme: predicted(mine, groups, axes, theme)
    return chosen


def _worth_drawing(groups: Sequence[Group], panel: Panel) -> bool:
    values = [values for group in groups for _, values in group.series(panel.key)]
    return any(panel.drawn_if_constant or each.nunique() > 1 for each in values)


def png(draw: Draw, path: Path, theme: Theme = LIGHT) -> Path:
    """One figure of ``PANEL_SIZE`` at ``DOTS_PER_INCH``, and beside it the same as PDF; returns the PNG's path."""
    with matplotlib.rc_context(_style()):
        figure = _panel_figure(draw, theme)
        return _save(figure, path)


def svg(draw: Draw, name: str) -> str:
    """One figure as an <svg> element for a page: text as text, colours as var(--ink), var(--muted), var(--arm-0) ...

    ``name`` must be unique in the page; the identifiers inside are derived from it.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({**_style(), "svg.fonttype": "none", "svg.hashsalt": name}):
        _panel_figure(draw, PAGE).savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return _for_page(buffer.getvalue(), name)


def overview(groups: Sequence[Group], path: Path, theme: Theme = LIGHT) -> Path:
    """Accuracy, KL, entropy and coverage of one task in a row of ``OVERVIEW_SIZE``; a panel without data says so.

    Over the steps; where an arm was swept over betas, against beta, with the skills that were not trained. Names that
    would take the panels' room at the ends of the lines stand in rows below instead.
    """
    swept = [panel for panel in SWEEP if has_sweep(groups, panel)]
    with matplotlib.rc_context(_style()):
        figure = _row_of_four(groups, theme) if not swept else _row_against_beta(groups, swept, theme)
        return _save(figure, path, OVERVIEW_DOTS_PER_INCH)


def _row_of_four(groups: Sequence[Group], theme: Theme) -> Figure:
    needed = _label_width(group.label for group in groups)
    named = needed <= LABEL_ROOM
    names = [] if named else [(group.label, group) for group in groups]
    figure, places = _row(len(OVERVIEW), needed if named else 0.1, names, _reading(groups), theme)
    headline = next(panel for panel in TIME_COURSES if panel.key == groups[0].headline)
    for place, panel in zip(places, (headline, *OVERVIEW[1:]), strict=True):
        axes = figure.add_axes(place, facecolor="none")
        time_course(groups, panel, axes, theme, named=named)
        if not recorded(groups, panel):
            axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=theme.muted)
    return figure


def _row_against_beta(groups: Sequence[Group], panels: Sequence[Panel], theme: Theme) -> Figure:
    names = [(members[0].arm, members[-1]) for members in _by_arm(groups)]
    over = " over seeds" if min(len(group.final_runs) for group in groups) > 1 else ""
    reading = f"mean of the last ten steps ± standard error{over} · {_seeds_text(groups)}"
    figure, places = _row(len(panels), 0.1, names, reading, theme)
    for place, panel in zip(places, panels, strict=True):
        against_beta(groups, panel, figure.add_axes(place, facecolor="none"), theme, named=False)
    return figure


def _row(
    num_panels: int, label_width: float, names: Sequence[tuple[str, Group]], reading: str, theme: Theme
) -> tuple[Figure, list[tuple[float, float, float, float]]]:
    """A figure with the names in as many rows as they need and how to read it below; and where its panels go."""
    rows = _in_rows(names, OVERVIEW_SIZE[0] - 1.0 - 0.055 * len(reading))
    size = (OVERVIEW_SIZE[0], OVERVIEW_SIZE[1] + ROW * max(0, len(rows) - 1))
    figure = Figure(figsize=size, facecolor=theme.background)
    for above, row in enumerate(reversed(rows)):
        _name_in_a_row(row, (0.1 + ROW * above) / size[1], figure, theme)
    figure.text(0.995, 0.1 / size[1], reading, ha="right", color=theme.muted, fontsize=7)
    bottom = 0.66 + ROW * max(0, len(rows) - 1)
    return figure, [_place(size, label_width, index, num_panels, bottom=bottom) for index in range(num_panels)]


def _in_rows(names: Sequence[tuple[str, Group]], room: float) -> list[list[tuple[str, Group]]]:
    """The names in rows of ``room`` inches."""
    rows: list[list[tuple[str, Group]]] = []
    left = 0.0
    for name, group in names:
        width = _name_width(name)
        if not rows or width > left:
            rows.append([])
            left = room
        rows[-1].append((name, group))
        left -= width
    return rows


def _name_width(name: str) -> float:
    """Inches of a name and the piece of its line before it."""
    return 0.38 + CHARACTER * len(name)


def _name_in_a_row(names: Sequence[tuple[str, Group]], height: float, figure: Figure, theme: Theme) -> None:
    """The names from the left at this height [figure fraction], each after a piece of its line."""
    inch = 1 / OVERVIEW_SIZE[0]
    x, middle = 0.5 * inch, height + 0.065 / figure.get_figheight()
    for name, group in names:
        style = {"linewidth": 1.9, "linestyle": _dashes(group, theme)}
        figure.add_artist(Line2D([x, x + 0.2 * inch], [middle] * 2, color=themes.color(group, theme), **style))
        figure.text(x + 0.26 * inch, height, name, color=themes.of_arm(group, theme), fontweight="bold")
        x += _name_width(name) * inch


def _reading(groups: Sequence[Group]) -> str:
    """How an overview over the steps is to be read."""
    counts = [len(group.final_runs) for group in groups]
    told = ["band: ± standard error over seeds"] if max(counts, default=0) >= BANDED else []
    told += ["thin: every step of a run"] if min(counts, default=0) < BANDED else []
    return " · ".join([*told, f"thick: mean of the runs over {window_of(groups)} steps", _seeds_text(groups)])


def spread(wanted: Sequence[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """Positions at least ``gap`` apart inside [low, high], each as near to its wanted one as its neighbours allow.

    Neighbours that are too close form a block that is centred on the mean of what they want. Where not all fit, the
    gap shrinks. Order follows ``wanted``; ties keep the order given.
    """
    if not wanted:
        return []
    gap = min(gap, (high - low) / max(1, len(wanted) - 1))
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    blocks: list[list[int]] = []
    for index in order:
        blocks.append([index])
        while len(blocks) > 1 and _start(blocks[-1], wanted, gap, low, high) < _end(blocks[-2], wanted, gap, low, high):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    placed = dict.fromkeys(range(len(wanted)), 0.0)
    for block in blocks:
        start = _start(block, wanted, gap, low, high)
        placed |= {index: start + position * gap for position, index in enumerate(block)}
    return [placed[index] for index in range(len(wanted))]


@dataclass(frozen=True, kw_only=True)
class _End:
    """Where a line ends, in data units, and what to write there."""

    x: float
    y: float
    label: str
    color: str


class _Plain(Formatter):
    """Tick labels with the fewest equal decimals that tell them apart; 2e-06 where all are below 0.001."""

    def __call__(self, value: float, position: int | None = None) -> str:
        return self.format_ticks([value])[0]

    def format_ticks(self, values: Sequence[float]) -> list[str]:
        largest = max((abs(value) for value in values), default=1.0)
        if 0 < largest < 1e-3:
            return [f"{value:.3g}".replace("-", "\N{MINUS SIGN}", int(value < 0)) for value in values]
        exact = [places for places in range(6) if all(abs(round(v, places) - v) < 1e-6 * largest for v in values)]
        return [stats.number(value, min(exact, default=6)) for value in values]


def _start(block: list[int], wanted: Sequence[float], gap: float, low: float, high: float) -> float:
    """Where the first of a block goes: centred on what its members want, inside the limits."""
    centre = sum(wanted[index] for index in block) / len(block)
    extent = (len(block) - 1) * gap
    return min(max(centre - extent / 2, low), max(low, high - extent))


def _end(block: list[int], wanted: Sequence[float], gap: float, low: float, high: float) -> float:
    """The first free position after a block (a rounding error less, so that touching blocks stay apart)."""
    return _start(block, wanted, gap, low, high) + len(block) * gap - 1e-9


def _style() -> dict[Any, Any]:
    return {
        "font.family": "DejaVu Sans",
        "font.size": 8.5,
        "axes.unicode_minus": True,
        "path.simplify": True,
        "pdf.fonttype": 3,  # 42 (TrueType) parses the whole typeface for every figure: five times the time
        "lines.solid_capstyle": "round",
    }


def _dashes(group: Group, theme: Theme) -> Any:
    """Solid for the first round of colours, then dashed, then dotted."""
    return ("-", (0, (5, 1.6)), (0, (1.2, 1.4)))[group.index // len(theme.arms) % 3]


def _draw_group(group: Group, key: str, window: int, axes: Axes, theme: Theme) -> _End | None:
    color = themes.color(group, theme)
    banded = [run for run in group.final_runs if key in run.training and run.status not in BROKEN_OFF]
    banded = banded if len(banded) >= BANDED else []
    inside = {run.run_id for run in banded}
    _draw_runs([(run, values) for run, values in group.series(key) if run.run_id not in inside], color, axes)
    mean = group.arm_mean(key)
    if not len(mean):
        return None
    thick = stats.smooth(mean, window)
    axes.plot(thick.index, thick, color=color, linewidth=1.9, linestyle=_dashes(group, theme), zorder=3)
    if banded:
        smoothed = pd.concat([stats.smooth(run.training[key], window) for run in banded], axis=1)
        error = smoothed.sem(axis=1).reindex(thick.index)
        axes.fill_between(thick.index, thick - error, thick + error, color=color, alpha=0.16, linewidth=0, zorder=1)
    return _End(x=float(thick.index[-1]), y=float(thick.iloc[-1]), label=group.label, color=themes.of_arm(group, theme))


def _draw_runs(series: Sequence[tuple[Run, pd.Series]], color: str, axes: Axes) -> None:
    """Runs one by one, a cross where one failed or was interrupted."""
    for run, values in series:
        thin = thinned(values)
        axes.plot(thin.index, thin, color=color, linewidth=0.7, alpha=0.45 / len(series) ** 0.4, zorder=2)
        if run.status in BROKEN_OFF:
            axes.plot(
                values.index[-1:], values.iloc[-1:], "x", color=color, markersize=5, markeredgewidth=1.2, zorder=4
            )


def thinned(values: pd.Series, most: int = MOST_POINTS) -> pd.Series:
    """At most about ``most`` points: of each stretch the first, the smallest and the largest, and the very last."""
    if len(values) <= most:
        return values
    size = -(-3 * len(values) // most)
    numbers = values.to_numpy()
    kept = {len(values) - 1}
    for start in range(0, len(values), size):
        part = numbers[start : start + size]
        kept |= {start, start + int(part.argmin()), start + int(part.argmax())}
    return values.iloc[sorted(kept)]


def _by_arm(groups: Sequence[Group]) -> list[list[Group]]:
    """The groups of each arm: its grid points."""
    arms = dict.fromkeys(group.arm for group in groups)
    return [[group for group in groups if group.arm == arm] for arm in arms]


def _draw_at_kl(members: Sequence[Group], key: str, axes: Axes, theme: Theme) -> _End | None:
    """An arm's dots, in the shades of its grid points, and its frontier if it has one."""
    color, points = themes.of_arm(members[0], theme), []
    for group in members:
        each = [(x, y) for x, y in _points(group, key) if np.isfinite([x, y]).all()]
        axes.plot(
            *np.reshape(each, (-1, 2)).T, "o", color=themes.color(group, theme), markersize=3, alpha=0.8, zorder=3
        )
        points += each
    if not points:
        return None
    last = max(points)
    if _is_path(members):
        paths = claims.paths([run for group in members for run in group.runs if run.is_done], key)
        last = _draw_frontier(frontiers.frontier(paths), color, _dashes(members[0], theme), axes)
    return _End(x=float(last[0]), y=float(last[1]), label=members[0].arm, color=color)


def _points(group: Group, key: str) -> list[frontiers.Point]:
    """(KL, value) of the group's finished runs."""
    paths = claims.paths([run for run in group.runs if run.is_done], key)
    return [point for points in paths.values() for point in points]


def _draw_frontier(found: frontiers.Frontier, color: str, dashes: Any, axes: Axes) -> tuple[float, float]:
    """The mean and its band; returns its last point."""
    known = np.isfinite(found.mean)
    axes.plot(found.kl[known], found.mean[known], color=color, linewidth=1.9, linestyle=dashes, zorder=3)
    axes.fill_between(found.kl, found.low, found.high, color=color, alpha=0.16, linewidth=0, zorder=1)
    return float(found.kl[known][-1]), float(found.mean[known][-1])


def _draw_sweep(members: Sequence[Group], key: str, axes: Axes, theme: Theme) -> _End | None:
    """An arm's values over its betas, each with its standard error."""
    values = [(group, _at_end(group, key)) for group in members]
    known = [(group, value) for group, value in values if value.num]
    if not known:
        return None
    betas, means = [group.beta for group, _ in known], [value.mean for _, value in known]
    errors = np.nan_to_num([value.standard_error for _, value in known])
    color, dashes = themes.of_arm(members[0], theme), _dashes(members[0], theme)
    axes.errorbar(betas, means, yerr=errors, color=color, linewidth=1.9, linestyle=dashes, elinewidth=1, zorder=3)
    for group, value in known:
        face = themes.color(group, theme)
        axes.plot([group.beta], [value.mean], "o", color=color, markerfacecolor=face, markersize=4.5, zorder=4)
    return _End(x=betas[-1], y=means[-1], label=members[0].arm, color=color)


def _draw_level(group: Group, key: str, axes: Axes, theme: Theme) -> _End | None:
    """A value that has no beta, all across."""
    value = _at_end(group, key)
    if not value.num:
        return None
    color, error = themes.of_arm(group, theme), float(np.nan_to_num(value.standard_error))
    axes.axhline(value.mean, color=color, linewidth=1.3, linestyle=(0, (5, 2)), zorder=2)
    axes.axhspan(value.mean - error, value.mean + error, color=color, alpha=0.12, linewidth=0, zorder=1)
    return _End(x=axes.get_xlim()[1], y=value.mean, label=group.label, color=color)


def _draw_prediction(
    found: Prediction, reached: tuple[float, float], color: str, is_orientation: bool, axes: Axes, theme: Theme
) -> None:
    """The ring and the line to what was reached; dashed where the prediction is for orientation only."""
    style = (0, (2, 2)) if is_orientation else "-"
    ends = np.array([(found.kl, found.accuracy), reached])
    axes.plot(ends[:, 0], ends[:, 1], color=color, linewidth=0.9, linestyle=style, alpha=0.7, zorder=2)
    axes.plot([found.kl] * 2, [found.low, found.high], color=color, linewidth=0.9, zorder=3)
    ring = {"markerfacecolor": theme.background, "markeredgecolor": color, "markeredgewidth": 1.4}
    axes.plot([found.kl], [found.accuracy], "o", markersize=6.5, zorder=4, **ring)


def _kl_axis(axes: Axes, theme: Theme) -> None:
    axes.set_xlabel("KL to the reference, k1, nats per response", color=theme.muted)
    axes.margins(x=0.08, y=0.12)
    _widen(axes)


def _has_both(run: Run) -> bool:
    return KL_K1 in run.training and bool(len(run.values(SCORE if run.graded else ACCURACY)))


def _blocks(kl: pd.Series, accuracy: pd.Series, size: int) -> np.ndarray:
    """(n, 2): means of consecutive blocks of steps; a block without one of the two is left out."""
    kl, accuracy = kl.align(accuracy)
    points = np.stack([stats.block_means(kl, size), stats.block_means(accuracy, size)], axis=1)
    return points[~np.isnan(points).any(axis=1)]


def _draw_path(points: np.ndarray, group: Group, axes: Axes, theme: Theme) -> _End:
    color = themes.color(group, theme)
    axes.plot(points[:, 0], points[:, 1], "o", color=color, markersize=3.4, zorder=3)
    for start, end in zip(points[:-1], points[1:], strict=True):
        arrow = {
            "arrowstyle": "-|>,head_width=0.22,head_length=0.45",
            "color": color,
            "linewidth": 1.1,
            "shrinkA": 1,
            "shrinkB": 2.5,
        }
        axes.annotate("", xy=tuple(end), xytext=tuple(start), arrowprops=arrow, zorder=2)
    return _End(
        x=float(points[-1, 0]), y=float(points[-1, 1]), label=_short_name(group), color=themes.of_arm(group, theme)
    )


def _short_name(group: Group) -> str:
    """The last grid point of an arm has its whole name, the others what they differ in: room is short beside dots."""
    return group.label if group.shade == 1 else group.label.removeprefix(f"{group.arm} · ").split("=")[-1]


def _frame(axes: Axes, title: str, unit: str, theme: Theme) -> None:
    """Title and unit above the axes, horizontal grid only, no box."""
    axes.text(0, 1.135, title, transform=axes.transAxes, color=theme.ink, fontsize=10, fontweight="bold", va="bottom")
    axes.text(0, 1.045, unit, transform=axes.transAxes, color=theme.muted, fontsize=8, va="bottom")
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(theme.muted)
    axes.tick_params(colors=theme.muted, length=0, pad=4, labelsize=8)
    axes.tick_params(axis="x", length=3)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, min_n_ticks=3, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(_Plain())


def _widen(axes: Axes) -> None:
    """Limits of a quantity that does not move are opened, so that its line is not on the frame."""
    axes.autoscale_view()
    low, high = axes.get_ylim()
    if high - low < 1e-9 + 1e-3 * abs(high):
        middle, half = (low + high) / 2, max(abs(high) * 0.25, 1e-3)
        low, high = middle - half, middle + half
    axes.set_ylim(low, high)
    axes.set_xlim(*axes.get_xlim())


def _label_ends(axes: Axes, ends: Sequence[_End]) -> None:
    """The name of every setting right of the axes, near the end of its line and not over another name."""
    for end, (x, y), place in _label_places(axes, ends):
        moved = [[x + 0.008, 1.022], [y, place]]
        axes.plot(*moved, transform=axes.transAxes, color=end.color, linewidth=0.6, alpha=0.55, clip_on=False, zorder=1)
        axes.text(1.03, place, end.label, transform=axes.transAxes, color=end.color, va="center", fontweight="bold")


def _label_beside(axes: Axes, ends: Sequence[_End]) -> None:
    """The name of every setting just right of where it ends, and of other ends that it would cover, inside the axes."""
    placed = _label_places(axes, ends)
    points = [point for _, point, _ in placed]
    for end, (x, _), place in placed:
        covered = [right for right, height in points if x < right < x + 0.15 and abs(height - place) < 0.03]
        paper = {"facecolor": axes.figure.get_facecolor(), "edgecolor": "none", "pad": 0.5, "alpha": 0.8}
        place_and_text = (max([x, *covered]) + 0.025, place, end.label)
        axes.text(
            *place_and_text, transform=axes.transAxes, color=end.color, va="center", fontweight="bold", bbox=paper
        )


def _label_places(axes: Axes, ends: Sequence[_End]) -> list[tuple[_End, tuple[float, float], float]]:
    """(end, its place in axes fractions, the height of its label in axes fractions)."""
    to_axes = axes.transData + axes.transAxes.inverted()
    points = [tuple(to_axes.transform((end.x, end.y))) for end in ends]
    height = axes.get_window_extent().height / axes.figure.dpi * 72
    places = spread([float(y) for _, y in points], 10.5 / height, 0.0, 1.02)
    return list(zip(ends, points, places, strict=True))


def _label_width(names: Iterable[str]) -> float:
    """Inches that the longest name needs at the ends of lines."""
    return min(MOST_ROOM, 0.2 + CHARACTER * max(map(len, names), default=0))


def _place(
    size: tuple[float, float], label_width: float, index: int = 0, num_columns: int = 1, bottom: float = 0.52
) -> tuple[float, float, float, float]:
    """Axes rectangle (left, bottom, width, height) in figure fractions: fixed margins in inches in a row of columns."""
    width, height = size
    column, left, top = width / num_columns, 0.5, 0.56
    inner = (column - left - label_width) / width
    return (index * column + left) / width, bottom / height, inner, (height - top - bottom) / height


def _panel_figure(draw: Draw, theme: Theme) -> Figure:
    figure = Figure(figsize=PANEL_SIZE, facecolor=theme.background)
    axes = figure.add_axes(_place(PANEL_SIZE, 0.2), facecolor="none")
    draw(axes, theme)
    axes.set_position(_place(PANEL_SIZE, _room_beside(axes)))
    return figure


def _room_beside(axes: Axes) -> float:
    """Inches that the names need right of the axes; one that stands further left, beside its dot, needs less."""
    names = [text for text in axes.texts if text.get_verticalalignment() == "center"]
    least = PANEL_SIZE[0] - 0.5 - MOST_ROOM
    ends = [CHARACTER * len(name.get_text()) + (name.get_position()[0] - 1.03) * least for name in names]
    return min(MOST_ROOM, 0.2 + max([0.0, *ends]))


def _seeds_text(groups: Sequence[Group]) -> str:
    counts = sorted({len(group.runs) for group in groups})
    most = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{most} seed{'' if counts == [1] else 's'} per arm"


def _save(figure: Figure, path: Path, dots_per_inch: int = DOTS_PER_INCH) -> Path:
    """As PNG and as PDF, whose text stays text; neither has a time or a program's name in it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=dots_per_inch, metadata={"Software": None})
    figure.savefig(path.with_suffix(".pdf"), metadata={"Creator": None, "Producer": None, "CreationDate": None})
    return path


def _for_page(text: str, name: str) -> str:
    """Matplotlib's SVG without prologue, namespaces and group ids, with the page's colours and typeface."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r"'DejaVu Sans'(, sans-serif)?", "var(--sans)", text)
    text = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{name}">', text, count=1
    )
    return themes.in_page(text).strip()
