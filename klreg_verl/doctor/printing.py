"""The doctor's table as lines of text: settings that differ in the aggregation alone and fare alike share a line."""

from collections.abc import Iterable
from typing import Any

from klreg_verl.core.aggregation import AGGREGATIONS

Row = dict[str, Any]
HEAD = (
    *("placement", "estimator", "setting", "verdict", "follows", "off-policy"),
    *("cos reverse", "cos forward", "noise 1..4 tokens", "value"),
)


def overview(rows: list[Row]) -> list[str]:
    """A line for each row (the usual settings: `table(only_usual=True)`), and what spoils all of them."""
    return [
        *_columns(map(_cells, rows)),
        "",
        "Aggregation token-mean; seq-mean-token-sum and seq-mean-token-sum-norm are the same. With seq-mean-token-mean",
        "and with GRPO's division by the std over KL-penalized rewards no estimator follows a divergence.",
        "off-policy: what is followed with samples of an older policy. cos: cosine to the gradient of KL(pi || pi_ref)",
        "and of KL(pi_ref || pi), the lowest on the doctor's policies. noise: standard deviation of one response's",
        "gradient over |grad KL(pi || pi_ref)|. Reasons and all settings: --estimator NAME; numbers: --json.",
    ]


def in_full(rows: list[Row]) -> list[str]:
    """Every setting, with its reason under it."""
    merged = _merged(rows)
    lines = _columns(map(_cells, merged))
    return [lines[0], *(f"{line}\n    {row['reason']}" for line, row in zip(lines[1:], merged, strict=True))]


def _columns(cells: Iterable[tuple[str, ...]]) -> list[str]:
    table = [HEAD, *cells]
    widths = [max(len(line[i]) for line in table) for i in range(len(HEAD))]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in table]


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row["placement"],
        row["estimator"] or "-",
        _setting(row),
        row["verdict"],
        row["follows"],
        row["follows_off_policy"],
        *(_number(row[f"cosine_{name}"], 3) for name in ("reverse", "forward")),
        "-" if row["noise"] is None else " ".join(_number(number, 2) for number in row["noise"]),
        row["value"],
    )


def _setting(row: Row) -> str:
    correction = None if row["correction"] == "none" else row["correction"]
    std = "inside the std" if row["normalization"] == "std" else None
    parts = [part for part in (row["credit"], std, correction, row.get("aggregations")) if part]
    return ", ".join(parts) or "-"


def _number(number: float | None, digits: int) -> str:
    return "-" if number is None else f"{number:.{digits}f}"


def _merged(rows: list[Row]) -> list[Row]:
    """Rows that differ in the aggregation only, one for each verdict and reason, with the aggregations spelled out."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = tuple(str(row[name]) for name in row if not name.startswith(("aggregation", "cosine_", "noise")))
        groups.setdefault(key, []).append(row)
    return [group[0] | {"aggregations": _spelled([row["aggregation"] for row in group])} for group in groups.values()]


def _spelled(aggregations: list[str | None]) -> str:
    if len(aggregations) == len(AGGREGATIONS):
        return "any aggregation"
    left_out = [name for name in AGGREGATIONS if name not in aggregations]
    if len(left_out) == 1:
        return f"not {left_out[0]}"
    return ", ".join(name for name in aggregations if name)
