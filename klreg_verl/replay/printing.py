"""The results of `klreg kl` and `klreg replay` as lines of text."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, isfinite, log10, sqrt

from klreg_verl.replay.comparison import Comparison
from klreg_verl.replay.divergence import Estimate, Result


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Aligned columns, the first `left` of them to the left."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(head))]
    aligned = [
        "  ".join(
            text.ljust(width) if place < left else text.rjust(width)
            for place, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return [line.rstrip() for line in aligned]


def number(value: float | None, digits: int = 3) -> str:
    """A number with a fixed number of decimals; a dash for none."""
    return "-" if value is None else f"{_rounded(value, digits):.{digits}f}"


def short(value: float | None) -> str:
    """A size, three digits."""
    return "-" if value is None else f"{value:.3g}"


def comparison_lines(found: Comparison) -> list[str]:
    """One line a setting, and what the columns mean."""
    rows = [
        [
            row.name,
            short(row.norm_to_task),
            *(number(value) for value in (row.cosine_task, row.cosine_reverse, row.cosine_forward, row.halves)),
            *(["= " + row.same_as] if row.same_as else [""]),
        ]
        for row in found.rows
    ]
    head = ["setting", "size", "task", "reverse", "forward", "halves", ""]
    lines = table(head, [row[:-1] + [""] for row in rows])
    return [*_with_notes(lines, [row[-1] for row in rows]), "", *_legend(found)]


def _with_notes(lines: list[str], notes: list[str]) -> list[str]:
    width = max(map(len, lines)) + 2
    return [lines[0], *(f"{line:<{width}}{note}".rstrip() for line, note in zip(lines[1:], notes, strict=True))]


def _legend(found: Comparison) -> list[str]:
    sketch, products = found.products.sketch, found.products
    how = (
        f"{products.parts} different gradients of {products.parameters:,} parameters, held whole: exact products."
        if sketch is None
        else f"{products.parts} different gradients of {products.parameters:,} parameters, each sketched to "
        f"{sketch.width:,} numbers (seed {sketch.seed}): cosines c +- (1 - c^2) * {1 / sqrt(sketch.width):.2g}, sizes "
        f"+- {100 * sketch.length_error:.2g} %."
    )
    return [
        "size      length of the gradient over that of the task's, at beta 1 (or the setting's own)",
        "task      cosine with the task's policy gradient; below 0 they pull apart",
        "reverse   cosine with the gradient of KL(pi || pi_ref) over the vocabulary, token by token on these prefixes",
        "forward   cosine with that of KL(pi_ref || pi) likewise",
        "run       the run's own KL term, at its beta",
        "halves    cosine between the gradients of two halves of the prompts: 1 is all signal, 0 all noise",
        how,
    ]


# ---------------------------------------------------------------------------------------------------- klreg kl


def divergence_lines(found: Result) -> list[str]:
    """The exact KLs, then every estimator beside the exact value."""
    exact = [
        ["reverse  KL(policy || ref)", estimate(found.reverse.token), estimate(found.reverse.response)],
        ["forward  KL(ref || policy)", estimate(found.forward.token), estimate(found.forward.response)],
    ]
    rows = [
        [
            one.name,
            one.estimates,
            estimate(one.sampled.token),
            estimate(one.error.token, sign=True),
            estimate(one.bias.token, sign=True),
            short(one.spread),
            estimate(one.sampled.response),
        ]
        for one in found.estimators
    ]
    head = ["estimator", "of", "per token", "error", "of it bias", "spread", "per response"]
    return [
        f"{found.prompts} prompts, {found.responses} responses of the policy, {found.tokens:,} tokens; "
        f"{100 * found.truncated:.0f} % of the responses were cut at the token limit",
        "",
        *table(["exact over the vocabulary [nats]", "per token", "per response"], exact),
        "",
        *table(head, rows, left=2),
        "",
        "+-          standard error over prompts",
        "forward     on the policy's own prefixes: not the forward KL of whole responses",
        "error       estimate minus the exact value on the same prefixes, per token",
        "bias        the part of the error that stays with any number of samples",
        "spread      standard deviation of the estimate at one token",
    ]


_ROUNDING = 1e-11
"""Nats below which a mean in float64 is rounding."""


def estimate(value: Estimate, sign: bool = False) -> str:
    """A mean with its standard error, in as many digits as the error supports."""
    if not isfinite(value.mean):
        return str(value.mean)
    if value.error is None or not isfinite(value.error):
        return f"{value.mean:{'+' if sign else ''}.4g}"
    if max(abs(value.mean), value.error) < _ROUNDING:
        return "0"
    digits = 4 if value.error <= 0 else min(10, max(0, 1 - floor(log10(value.error))))
    return f"{_rounded(value.mean, digits):{'+' if sign else ''}.{digits}f} +- {value.error:.{digits}f}"


def _rounded(value: float, digits: int) -> float:
    """Without a minus before a zero."""
    return round(value, digits) + 0.0
