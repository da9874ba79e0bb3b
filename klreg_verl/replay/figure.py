"""The cosines between the gradients of all settings as a picture: who pulls where, and how strongly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from klreg_verl.replay.comparison import Comparison, Row
from klreg_verl.replay.settings import FORWARD, REVERSE, RUN, TASK

INK, MUTED, GRID, PAPER, BAR = "#1b1f24", "#667079", "#e4e7ea", "#ffffff", "#3c434a"
COLORS = LinearSegmentedColormap.from_list(
    "cosine", ["#8a3200", "#d55e00", "#f6c9a3", "#f7f7f5", "#a9cfe8", "#0072b2", "#003d66"]
).with_extremes(bad="#c9ced3")
"""Orange against, white across, blue along, grey for none. Okabe and Ito (2008), safe for colour-blind readers."""
DOTS_PER_INCH = 200
CELL = 0.205
"""Inches of one cell."""
LEFT, RIGHT, TOP, BOTTOM = 2.15, 2.5, 1.3, 1.55


def save(found: Comparison, path: Path, title: str, subtitle: str) -> Path:
    """A PNG: one row for each different gradient, in the order of the settings; bars are sizes."""
    rows = [row for row in found.rows if row.same_as is None]
    places = [found.names.index(row.name) for row in rows]
    twins = [[other.name for other in found.rows if other.same_as == row.name] for row in rows]
    side = CELL * len(rows)
    size = (LEFT + side + RIGHT, TOP + side + BOTTOM)
    figure = Figure(figsize=size, facecolor=PAPER)
    FigureCanvasAgg(figure)
    axes = figure.add_axes(_place(size, LEFT, BOTTOM, side, side))
    _draw_cells(axes, found.cosines.numpy()[np.ix_(places, places)], rows, twins)
    _draw_halves(figure.add_axes(_place(size, LEFT + side + 0.2, BOTTOM, CELL, side)), rows)
    _draw_sizes(figure.add_axes(_place(size, LEFT + side + 0.2 + 2.6 * CELL, BOTTOM, 1.1, side)), rows)
    _draw_scale(figure.add_axes(_place(size, LEFT + side + RIGHT - 2.4, size[1] - 0.52, 2.1, 0.1)))
    _write_head(figure, size, title, subtitle)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH, metadata={"Software": None})
    return path


def _place(size: tuple[float, float], left: float, bottom: float, width: float, height: float) -> Any:
    """Inches to figure fractions."""
    return (left / size[0], bottom / size[1], width / size[0], height / size[1])


def _write_head(figure: Figure, size: tuple[float, float], title: str, subtitle: str) -> None:
    x = 0.2 / size[0]
    figure.text(x, 1 - 0.38 / size[1], title, color=INK, fontsize=12.5, fontweight="bold", va="center")
    figure.text(x, 1 - 0.6 / size[1], subtitle, color=MUTED, fontsize=8.5, va="top", linespacing=1.5)


def _draw_cells(axes: Axes, cosines: np.ndarray, rows: Sequence[Row], twins: Sequence[Sequence[str]]) -> None:
    axes.imshow(np.ma.masked_invalid(cosines), cmap=COLORS, vmin=-1, vmax=1, aspect="equal", interpolation="none")
    names = [_label(row.name) for row in rows]
    axes.set_yticks(range(len(rows)), [f"{name}  " + _count(same) for name, same in zip(names, twins, strict=True)])
    axes.set_xticks(range(len(rows)), names, rotation=90)
    axes.tick_params(length=0, labelsize=7, labelcolor=INK, pad=3)
    for edge in (place - 0.5 for place in range(1, len(rows))):
        axes.axhline(edge, color=PAPER, linewidth=0.5)
        axes.axvline(edge, color=PAPER, linewidth=0.5)
    for edge, width in _edges(rows).items():
        axes.axhline(edge, color=PAPER, linewidth=width)
        axes.axvline(edge, color=PAPER, linewidth=width)
    axes.spines[:].set_visible(False)


def _label(name: str) -> str:
    named = {TASK: "task", RUN: "the run's own KL", REVERSE: "exact reverse KL", FORWARD: "exact forward KL"}
    placement, _, rest = name.replace("_detached", " (detached)").replace("_", " ").partition("/")
    return named.get(name) or f"{placement}  {rest.replace('/', ' · ')}".strip()


def _count(same: Sequence[str]) -> str:
    return f"(+{len(same)})" if same else ""


def _edges(rows: Sequence[Row]) -> dict[float, float]:
    """Place -> width of the gaps: wide between kinds of settings, narrow between estimators in the reward."""
    gaps = {}
    for place in range(1, len(rows)):
        before, here = rows[place - 1].name, rows[place].name
        if _kind(before) != _kind(here):
            gaps[place - 0.5] = 3.2
        elif _kind(here) == "reward" and before.split("/")[1] != here.split("/")[1]:
            gaps[place - 0.5] = 1.5
    return gaps


def _kind(name: str) -> str:
    return "exact" if name in (REVERSE, FORWARD) else name.partition("/")[0]


def _draw_halves(axes: Axes, rows: Sequence[Row]) -> None:
    """One column of cosines: how far a gradient agrees with itself."""
    cells = np.array([[np.nan if row.halves is None else row.halves] for row in rows])
    axes.imshow(np.ma.masked_invalid(cells), cmap=COLORS, vmin=-1, vmax=1, aspect="auto", interpolation="none")
    for edge in (place - 0.5 for place in range(1, len(rows))):
        axes.axhline(edge, color=PAPER, linewidth=_edges(rows).get(edge, 0.5))
    axes.set_xticks([0], ["between halves\nof the prompts"], rotation=90)
    axes.set_yticks([])
    axes.tick_params(length=0, labelsize=7, labelcolor=MUTED, pad=3)
    axes.spines[:].set_visible(False)


def _draw_sizes(axes: Axes, rows: Sequence[Row]) -> None:
    """Sizes on a logarithmic scale, from the smallest that is there."""
    sizes = [row.norm_to_task or row.norm for row in rows]
    positive = [size for size in sizes if size]
    low, high = (min(positive) / 1.5, max(positive) * 1.5) if positive else (0.1, 1.0)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    for place, size in enumerate(sizes):
        if size:
            axes.barh(place, size - low, left=low, height=0.56, color=BAR)
            where: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center"}
            axes.text(1.04, place, f"{size:.2g}", color=MUTED, fontsize=6.5, **where)
    if low < 1 < high:
        axes.axvline(1, color=MUTED, linewidth=0.7, linestyle=(0, (2, 2)))
    axes.set_title("length, task's = 1\n(at β = 1; the run's at its own)", color=MUTED, fontsize=7.5, loc="left", pad=5)
    axes.set_yticks([])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()
    axes.tick_params(length=2, labelsize=7, color=MUTED, labelcolor=MUTED)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)


def _draw_scale(axes: Axes) -> None:
    axes.imshow(np.linspace(-1, 1, 256)[None], cmap=COLORS, aspect="auto", extent=(-1, 1, 0, 1))
    axes.set_xticks([-1, 0, 1], ["−1 against", "0", "1 along"])
    axes.set_yticks([])
    axes.set_title("cosine between gradients", color=MUTED, fontsize=7.5, loc="left", pad=4)
    axes.tick_params(length=0, labelsize=7, labelcolor=MUTED, pad=3)
    axes.spines[:].set_visible(False)
