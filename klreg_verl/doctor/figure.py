"""The doctor's table as a picture: a tile for each setting, coloured by the divergence it follows. Needs matplotlib."""

import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klreg_verl.core import exact
from klreg_verl.core.aggregation import AGGREGATIONS
from klreg_verl.doctor.rules import REFERENCE_SAMPLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
INK, PALE_INK, PAPER = "#1d2733", "#6b7785", "#ffffff"
COLOURS = {
    "reverse": "#2f6fb0",
    "forward": "#d9822b",
    "js": "#2a9487",
    "chi2": "#2a9487",
    "tv": "#2a9487",
    "biased": "#e6e9ed",
    "void": "#ffffff",
}
WIDTH, HEIGHT, GAP = 1.36, 0.72, 0.08
"""Of a tile, and the space between tiles [inches]."""
TOP = 1.9
"""Where the tiles begin."""
SHOWN = {"js": "JS", "chi2": "chi\N{SUPERSCRIPT TWO}", "tv": "TV"}
NOTE = (
    "Dot: holds off-policy too, per token. cos: lowest cosine to the gradients of the reverse and of the forward KL. "
    "noise: standard deviation of one response's gradient over the size of the reverse KL's, at 1 and at 4 tokens. "
    "Tokens are averaged over the batch (token-mean) or summed; with seq-mean-token-mean every setting is biased where "
    "lengths vary."
)
LEGEND = (
    ("reverse", "reverse KL"),
    ("forward", "forward KL"),
    ("js", "its own divergence"),
    ("biased", "biased: no divergence's gradient"),
    ("void", "void: expected gradient zero"),
)


@dataclass(frozen=True, kw_only=True)
class Column:
    """One kind of setting."""

    block: str
    title: str
    holds: Callable[[Row], bool]


def _column(block: str, title: str, placement: str, **fields: str | None) -> Column:
    wanted = {"placement": placement, "normalization": "none", "aggregation": AGGREGATIONS[0]} | fields
    return Column(block=block, title=title, holds=lambda row: all(row[key] == wanted[key] for key in wanted))


COLUMNS = (
    _column("charged to the reward", "whole response", "reward", credit="sequence"),
    _column("charged to the reward", "tokens from t on", "reward", credit="reward_to_go"),
    _column("charged to the reward", "token t alone", "reward", credit="token"),
    _column("charged to the reward", "inside GRPO's std", "reward", normalization="std"),
    _column("added to the loss", "no correction", "loss", correction="none"),
    _column("added to the loss", "importance", "loss", correction="importance"),
    _column("added to the loss", "importance, detached", "loss", correction="importance_detached"),
    _column("both", "same beta", "both", credit="sequence", correction="none"),
)


def draw(rows: list[Row], path: Path, title: str) -> None:
    """Write the picture of a table to `path`, in the format of its suffix. ValueError for an unknown suffix."""
    picture = figure(rows, title)
    if path.suffix.lstrip(".") not in picture.canvas.get_supported_filetypes():
        raise ValueError(f"A picture cannot be written to {path}. Use a name that ends in .png, .svg or .pdf.")
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, dpi=200, facecolor=PAPER)


def figure(rows: list[Row], title: str) -> "Figure":
    """The picture, 1 data unit an inch: estimators down, settings across."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(
        dict.fromkeys(
            row["estimator"] for row in rows if row["estimator"] not in (None, *exact.NAMES, REFERENCE_SAMPLES)
        )
    )
    exact_rows = [row for row in rows if row["estimator"] in exact.NAMES and row["aggregation"] == AGGREGATIONS[0]]
    columns = [column for column in COLUMNS if any(map(column.holds, rows))]
    lefts = _lefts(columns)
    wide = max(lefts[-1] + WIDTH, 6.0) + 0.35
    picture = Figure()
    FigureCanvasAgg(picture)
    axes = picture.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    _write_head(axes, title, columns, lefts)
    for number, name in enumerate(names):
        top = TOP + number * (HEIGHT + GAP)
        _write_name(axes, lefts[0], top, name)
        for column, left in zip(columns, lefts, strict=True):
            for row in filter(lambda row: row["estimator"] == name and column.holds(row), rows):
                _write_tile(axes, left, top, row, list(_lines(row)))
    bottom = TOP + len(names) * (HEIGHT + GAP)
    if exact_rows:
        _write_exact(axes, lefts[0], bottom + 0.35, exact_rows)
        bottom += HEIGHT + 0.75
    tall = _write_legend(axes, lefts[0], bottom + 0.35, wide - 0.3) + 0.2
    axes.set(xlim=(0, wide), ylim=(tall, 0))
    picture.set_size_inches(wide, tall)
    return picture


def _write_name(axes: "Axes", left: float, top: float, name: str) -> None:
    shown = name.rpartition(":")[2]
    axes.text(left - 0.18, top + HEIGHT / 2, shown, ha="right", va="center", size=11.5, color=INK, weight="bold")


def _write_exact(axes: "Axes", left: float, top: float, rows: list[Row]) -> None:
    """The divergences over the vocabulary, in a row of their own: they have one setting each."""
    right = left + len(rows) * (WIDTH + GAP) - GAP
    heading = "over the whole vocabulary, added to the loss"
    axes.text((left + right) / 2, top - 0.03, heading, ha="center", va="center", size=11.5, color=INK)
    axes.plot([left, right], [top + 0.14, top + 0.14], color=INK, linewidth=0.9, solid_capstyle="butt")
    _write_name(axes, left, top + 0.25, "exact")
    for number, row in enumerate(rows):
        bound = "a lower bound" if row["estimator"].startswith("topk") else "no sampling noise"
        lines = [(row["estimator"], 9.5), ("per token", 8.0), (bound, 8.0)]
        _write_tile(axes, left + number * (WIDTH + GAP), top + 0.25, row, lines)


def _lefts(columns: list[Column]) -> list[float]:
    """The left edge of each column; more space between blocks."""
    lefts, left = [], 1.55
    for number, column in enumerate(columns):
        if number:
            left += WIDTH + GAP + (0.3 if column.block != columns[number - 1].block else 0.0)
        lefts.append(left)
    return lefts


def _write_head(axes: "Axes", title: str, columns: list[Column], lefts: list[float]) -> None:
    axes.text(0.35, 0.42, "Which gradient each KL setting follows", size=18, weight="bold", color=INK, va="center")
    subtitle = f"{title}, by exact enumeration on small policies; one update per batch"
    axes.text(0.35, 0.77, subtitle, size=10.5, color=PALE_INK, va="center")
    for block in dict.fromkeys(column.block for column in columns):
        own = [left for column, left in zip(columns, lefts, strict=True) if column.block == block]
        axes.text((own[0] + own[-1] + WIDTH) / 2, 1.24, block, ha="center", va="center", size=11.5, color=INK)
        axes.plot([own[0], own[-1] + WIDTH], [1.41, 1.41], color=INK, linewidth=0.9, solid_capstyle="butt")
    for column, left in zip(columns, lefts, strict=True):
        axes.text(left + WIDTH / 2, 1.63, column.title, ha="center", va="center", size=9, color=PALE_INK)


def _write_tile(axes: "Axes", left: float, top: float, row: Row, lines: list[tuple[str, float]]) -> None:
    kind = row["follows"] if row["verdict"] == "ok" else row["verdict"]
    _write_box(axes, left, top, WIDTH, HEIGHT, kind)
    bright = row["verdict"] == "ok"
    middle, ink = left + WIDTH / 2, PAPER if bright else INK
    for number, (text, size) in enumerate(lines):
        height = top + HEIGHT / 2 + (number - (len(lines) - 1) / 2) * 0.2
        weight = "bold" if number == 0 else "normal"
        axes.text(middle, height, text, ha="center", va="center", size=size, color=ink, weight=weight)
    if row["follows_off_policy"] != "none" and bright and row["estimator"] not in exact.NAMES:
        axes.plot(left + WIDTH - 0.12, top + 0.12, marker="o", markersize=5, color=PAPER, markeredgewidth=0)


def _lines(row: Row) -> Iterator[tuple[str, float]]:
    """What a tile says: verdict, how much of the gradient or where it points, noise at one and at most tokens."""
    if row["verdict"] == "ok":
        yield SHOWN.get(str(row["follows"]), str(row["follows"])), 10.5
        yield "whole responses" if _is_whole(row) else "per token", 8
    elif row["verdict"] == "biased":
        yield "biased", 10.5
        yield f"cos {row['cosine_reverse']:+.2f}  {row['cosine_forward']:+.2f}".replace("-", "\N{MINUS SIGN}"), 8
    else:
        yield "void", 10.5
        yield "pulls nowhere" if row["follows"] == "none" else "its half in the loss", 8
    yield f"noise {_short(row['noise'][0])} \N{RIGHTWARDS ARROW} {_short(row['noise'][-1])}", 8


def _is_whole(row: Row) -> bool:
    return " of whole responses" in row["reason"]


def _short(number: float) -> str:
    return f"{number:.2f}" if number < 10 else f"{number:.0f}"


def _write_box(axes: "Axes", left: float, top: float, width: float, height: float, kind: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    outline = (
        {"edgecolor": PALE_INK, "linestyle": (0, (3, 2)), "linewidth": 1.0} if kind == "void" else {"linewidth": 0}
    )
    axes.add_patch(
        FancyBboxPatch(
            (left + 0.03, top + 0.03),
            width - 0.06,
            height - 0.06,
            boxstyle="round,pad=0.03,rounding_size=0.09",
            facecolor=COLOURS[kind],
            **outline,
        )
    )


def _write_legend(axes: "Axes", left: float, top: float, right: float) -> float:
    """Colours and notes, in as many lines as the width needs; gives back where they end."""
    start = left
    for kind, text in LEGEND:
        length = 0.62 + 0.073 * len(text)
        if start + length > right:
            start, top = left, top + 0.34
        _write_box(axes, start, top, 0.34, 0.22, kind)
        axes.text(start + 0.44, top + 0.11, text, va="center", size=9, color=INK)
        start += length + 0.14
    lines = textwrap.wrap(NOTE, int((right - left) * 15))
    for number, line in enumerate(lines):
        axes.text(left, top + 0.44 + 0.19 * number, line, va="center", size=8.5, color=PALE_INK)
    return top + 0.44 + 0.19 * len(lines)
