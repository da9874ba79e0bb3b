r"""Answers that repeat the question: "box the longest formula of the problem" is right on 6 % of MATH.

math-verify evaluates sums, integrals, binomials and unsimplified roots, so the question's own formula is equal to its
answer. Such an answer shows no work and is none. It is an echo where it is a piece of the problem as it is written
there, has an operator in it, and is written differently from every right answer: "Which is larger, 3 or 5?" keeps
its 5, and a question that gives the right answer's text in passing keeps that.
"""

import re
from collections.abc import Iterable
from functools import lru_cache

_MEANINGLESS = re.compile(
    r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|nolimits|q?quad)(?![a-zA-Z])"
    r"|(?<!\\)\\[,;:!> ()\[\]]|[\s~${}]"
)
_SAME = (
    (re.compile(r"\\[dtc](frac|binom)"), r"\\\1"),
    (re.compile(r"(?<![\w.])(\d+)\s*/\s*(\d+)(?![\w.])"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\dots[cbmio]?|\\[cl]dots|\.\.\."), r"\\ldots"),
)
_OPERATOR = re.compile(
    r"(?<=[\w)}\]!|.])\s*[-+*/]|=|\^(?!\s*\{?\\circ)|!|\||\\overline\{?\d|\\(?:[dtc]?frac|sqrt|[dt]?binom|sum|prod|i*int|lim"
    r"|log|ln|lg|exp|(?:arc)?(?:sin|cos|tan)|cot|sec|csc|lfloor|lceil|gcd|lcm|max|min|det|cdot|times|div|pm|mp|pmod"
    r"|bmod|mod|cup|cap|begin|operatorname)(?![a-z])"
)


def is_echo(answer: str, problem: str, golds: Iterable[str]) -> bool:
    """Whether an answer only repeats a piece of its problem that would have to be worked out."""
    if not problem or not _OPERATOR.search(answer):
        return False
    text = _squeezed(answer)
    return text in _squeezed(problem) and all(text != _squeezed(gold) for gold in golds)


@lru_cache(maxsize=4096)
def _squeezed(text: str) -> str:
    """The text without spacing, dollars and braces, so that \\dfrac{1}{2} is in $\\frac12$."""
    for pattern, replacement in _SAME:
        text = pattern.sub(replacement, text)
    text = _MEANINGLESS.sub("", text)
    return text.strip(".,;:?")
