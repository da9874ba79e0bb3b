"""Answers compared as text and as exact rational numbers: what most answers are, decided without any algebra system.

`compare` says True or False where that is certain, and None where algebra has to decide. It is stricter than
math-verify where that takes different numbers for equal: all numbers below 1e-6 (it rounds to six decimals), and
digits in different bases (2516_8 and 2516_9).
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

from data_prep.grading.values import differ

MAX_DIGITS = 400
DECIMALS = 6
RELATIVE_TOLERANCE = Fraction(1, 10_000)

_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\u2014\ufe63\uff0d", "-"),
        **dict.fromkeys("\u00a0\u2002\u2003\u2007\u2009\u200a\u202f\u3000\n\t\r", " "),
        **dict.fromkeys("\u200b\u2060\ufeff\u00b0$", None),
        "\u00d7": r"\times ",
        "\u00b7": r"\cdot ",
        "\u22c5": r"\cdot ",
        "\u03c0": r"\pi ",
        "\u221e": r"\infty ",
    }
)
_TIDYINGS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:left|right|bigl?|bigr?|Bigl?|Bigr?|displaystyle|limits)(?![a-zA-Z])", ""),
        (r"(?<!\\)\\[()\[\]](?=\s|$)|^\\[(\[]", ""),
        (r"(?<!\\)\\!\s*", ""),
        (r"(?<!\\)\\[,;:> ]|(?<!\\)~", " "),
        (r"\\q?quad(?![a-zA-Z])", " "),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\{,\}", ","),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree(?![a-zA-Z])", ""),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"\\frac\s*(\{[^{}]*\})\s*(\d)", r"\\frac\1{\2}"),
        (r"\\text(?:normal|rm|bf|it)(?![a-zA-Z])|\\mbox(?![a-zA-Z])|\\math(?:rm|bf|it)(?![a-zA-Z])", r"\\text"),
    )
]
_SPACE = re.compile(r"(?<![0-9])\s+|\s+(?![0-9])")
_WRAPPED = re.compile(r"\\text\{([^{}]*)\}|\{([^{}]*)\}|\(([A-Za-z])\)")
_UNIT = re.compile(r"(?<=[0-9}.,%])\s*\\text\{[^{}]*\}(?:\^\{?[0-9]\}?)?$")
_PERCENT = re.compile(r"\s*(?:\\?%|\\text\{\s*percent\s*\}|percent)$")
_PLAIN = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
_DECIMAL = re.compile(rf"([-+]?)({_PLAIN})")
_SCIENTIFIC = re.compile(
    rf"([-+]?)({_PLAIN})?(?:(?:\\times|\\cdot|\*)?10\^(?:\{{([-+]?[0-9]{{1,3}})\}}|([0-9]))|[eE]([-+]?[0-9]{{1,3}}))"
)
_FRACTION = re.compile(rf"([-+]?)\\frac\{{([-+]?)({_PLAIN})\}}\{{([-+]?)({_PLAIN})\}}")
_SLASH = re.compile(rf"([-+]?)()({_PLAIN})/([-+]?)({_PLAIN})")
_MIXED = re.compile(r"([-+]?)([0-9]+)\s*(?:\\frac\{([0-9]+)\}\{([0-9]+)\}|\s([0-9]+)/([0-9]+))")
_IN_BASE = re.compile(r"([0-9][0-9A-Za-z]*)_(?:\{?\(?([0-9]{1,2})\)?\}?|\{?\\text\{([a-z]+)\}\}?)")
_LISTED = re.compile(r",\s")
_DIGITS = re.compile(r"[0-9][0-9A-Fa-f]*")
_PIECES = re.compile(r"\\[{}]|\\[a-zA-Z]+|\\.|.", re.DOTALL)
_OPENING = ("(", "[", "{", r"\{")
_CLOSING = (")", "]", "}", r"\}")
_BASES = dict(two=2, three=3, four=4, five=5, six=6, seven=7, eight=8, nine=9, ten=10, twelve=12, sixteen=16)


@dataclass(frozen=True)
class Number:
    """An exact rational number as it was written."""

    value: Fraction
    is_decimal: bool
    """Written with a point or a power of ten, so perhaps rounded."""
    is_percentage: bool = False


def tidy(text: str) -> str:
    """The expression without what does not change its meaning: dollars, spacing commands, \\left, degrees, the kind of
    minus. It stays LaTeX."""
    text = text.replace(r"\$", "").translate(_CHARACTERS)
    for pattern, replacement in _TIDYINGS:
        text = pattern.sub(replacement, text)
    text = text.strip()
    return text[:-1].rstrip() if text.endswith((".", ",")) else text


def canonical(tidied: str) -> str:
    """A tidied expression as text to be compared: without white space except between digits, without a wrapping
    \\text{} or braces, a letter without parentheses, words in lower case."""
    text = _SPACE.sub("", tidied)
    while wrapped := _WRAPPED.fullmatch(text):
        text = wrapped[wrapped.lastindex or 0].strip()
    return text.casefold() if len(text) > 1 and text.isalpha() else text


def compare(gold: str, answer: str) -> bool | None:
    """Whether two tidied expressions are the same, None if neither text nor numbers decide it.

    An empty answer is never right.
    """
    one, other = canonical(gold), canonical(answer)
    if not one or not other:
        return False
    if one == other:
        return True
    if (same := _same_digits(one, other)) is not None:
        return same
    left, right = number(gold), number(answer)
    if left and right:
        return equal_numbers(left, right)
    same = _same_elements(gold, answer, left or right)
    return False if same is None and differ(gold, answer) else same


@dataclass(frozen=True)
class Elements:
    """A tuple, an interval or a set as it was written."""

    brackets: str
    """The outer ones, like "(]"; "{}" for a set, also for one without brackets: 1, 2."""
    texts: tuple[str, ...]

    @staticmethod
    def of(tidied: str) -> "Elements | None":
        """Of a text with at least two elements, None of any other."""
        pieces = _PIECES.findall(tidied)
        depths = list(accumulate(_depth_change(piece) for piece in pieces))
        if not pieces or min(depths) < 0 or depths[-1]:
            return None
        within = 1 if pieces[0] in _OPENING and 0 not in depths[:-1] else 0
        inner = pieces[1:-1] if within else pieces
        commas = [piece == "," and depth == within for piece, depth in zip(inner, depths[within:], strict=False)]
        texts = "".join("\0" if comma else piece for piece, comma in zip(inner, commas, strict=True)).split("\0")
        if len(texts) < 2 or not all(text.strip() for text in texts):
            return None
        brackets = (pieces[0] + pieces[-1]).replace("\\", "") if within else "{}"
        return Elements(brackets, tuple(text.strip() for text in texts))


def _depth_change(piece: str) -> int:
    return (piece in _OPENING) - (piece in _CLOSING)


def _same_elements(gold: str, answer: str, alone: Number | None) -> bool | None:
    """Elements one by one, or in any order for sets of numbers; a number, if one side is `alone`, is no tuple, and no
    set that has another one."""
    one, other = Elements.of(gold), Elements.of(answer)
    if one and other and one.brackets == other.brackets:
        return _same_set(one, other) if one.brackets == "{}" else _same_tuple(one, other)
    if not alone or not (several := one or other):
        return None
    others = any((entry := number(text)) and not equal_numbers(alone, entry) for text in several.texts)
    return False if several.brackets != "{}" or others else None


def _same_tuple(gold: Elements, answer: Elements) -> bool | None:
    if len(gold.texts) != len(answer.texts):
        return False
    same = [compare(*pair) for pair in zip(gold.texts, answer.texts, strict=True)]
    return False if False in same else None if None in same else True


def _same_set(gold: Elements, answer: Elements) -> bool | None:
    one, other = ([number(text) for text in elements.texts] for elements in (gold, answer))
    if None in one or None in other:
        return None
    pairs = ((one, other), (other, one))
    return all(any(equal_numbers(x, y) for y in those) for these, those in pairs for x in these)  # type: ignore[arg-type]


def equal_numbers(one: Number, other: Number) -> bool:
    """Equal as rational numbers; a decimal also when it is equal to a decimal or fraction rounded to six decimals and
    within 1e-4 of it, but an integer is only equal to itself; where one is a percentage, as number or as percentage:
    80% is 80 and 0.8."""
    if one.is_percentage != other.is_percentage:
        percentage, plain = (one, other) if one.is_percentage else (other, one)
        return any(_near(value, plain.value, True) for value in (percentage.value, percentage.value / 100))
    exact_integer = any(side.value.denominator == 1 and not side.is_decimal for side in (one, other))
    return _near(one.value, other.value, not exact_integer and (one.is_decimal or other.is_decimal))


def _near(one: Fraction, other: Fraction, is_rounded: bool) -> bool:
    if one == other or not is_rounded:
        return one == other
    close = abs(one - other) <= RELATIVE_TOLERANCE * max(abs(one), abs(other))
    return close and round(one, DECIMALS) == round(other, DECIMALS)


def number(tidied: str) -> Number | None:
    """The number that a tidied expression is, None if it is none: an integer, a decimal, a fraction, a mixed number,
    scientific notation, each with a unit or a percent sign after it or not. ASCII digits only."""
    if len(tidied) > MAX_DIGITS or _LISTED.search(tidied):
        return None
    text = _UNIT.sub("", tidied)
    bare = _PERCENT.sub("", text)
    while wrapped := re.fullmatch(r"\{([^{}]*)\}", bare):
        bare = wrapped[1]
    bare = bare.strip()
    value = _mixed(bare) or _rational(_SPACE.sub("", bare))
    return value and Number(value.value, value.is_decimal, bare != text.strip() and bool(_PERCENT.search(text)))


def _mixed(text: str) -> Number | None:
    if not (match := _MIXED.fullmatch(text)):
        return None
    sign, whole, *parts = match.groups()
    top, bottom = (int(part) for part in parts if part is not None)
    return Number(_signed(sign, int(whole) + Fraction(top, bottom)), False) if bottom else None


def _rational(text: str) -> Number | None:
    if match := _DECIMAL.fullmatch(text):
        return Number(_signed(match[1], _plain(match[2])), "." in text)
    if match := _SCIENTIFIC.fullmatch(text):
        exponent = int(match[3] or match[4] or match[5])
        if match[2] is None and match[5] is not None:
            return None
        return Number(_signed(match[1], _plain(match[2] or "1") * Fraction(10) ** exponent), True)
    if match := _FRACTION.fullmatch(text) or _SLASH.fullmatch(text):
        sign, top_sign, top, bottom_sign, bottom = match.groups()
        if not _plain(bottom):
            return None
        ratio = _plain(top) / _plain(bottom)
        return Number(_signed(sign, _signed(top_sign, _signed(bottom_sign, ratio))), "." in text)
    return None


def _plain(digits: str) -> Fraction:
    return Fraction(digits.replace(",", "").replace(" ", "").rstrip("."))


def _signed(sign: str, value: Fraction) -> Fraction:
    return -value if sign == "-" else value


def _same_digits(gold: str, answer: str) -> bool | None:
    """For answers in a base, like 2516_8: the digits must be the same, and the base where both state one."""
    in_base = [_IN_BASE.fullmatch(text) for text in (gold, answer)]
    if not any(in_base):
        return None
    if not all(match or _DIGITS.fullmatch(text) for match, text in zip(in_base, (gold, answer), strict=True)):
        return None
    digits = [match[1] if match else text for match, text in zip(in_base, (gold, answer), strict=True)]
    bases = {_base(match) for match in in_base if match}
    return len(bases) == 1 and digits[0].lstrip("0").casefold() == digits[1].lstrip("0").casefold()


def _base(match: re.Match[str]) -> int | str:
    return int(match[2]) if match[2] else _BASES.get(match[3], match[3])
