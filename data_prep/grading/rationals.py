"""Answers as exact rational numbers, as they were written."""

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 400
DECIMALS = 6
RELATIVE_TOLERANCE = Fraction(1, 10_000)

_PERCENT = re.compile(r"\s*\\?%$")
_PLAIN = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
_DECIMAL = re.compile(rf"([-+]?)({_PLAIN})")
_SCIENTIFIC = re.compile(
    rf"([-+]?)({_PLAIN})?(?:(?:\\times|\\cdot|\*)?10\^(?:\{{([-+]?[0-9]{{1,3}})\}}|([0-9]))|[eE]([-+]?[0-9]{{1,3}}))"
)
_FRACTION = re.compile(rf"([-+]?)\\frac\{{([-+]?)({_PLAIN})\}}\{{([-+]?)({_PLAIN})\}}")
_SLASH = re.compile(rf"([-+]?)()({_PLAIN})/([-+]?)({_PLAIN})")
_MIXED = re.compile(r"([-+]?)([0-9]+)\s*(?:\\frac\{([0-9]+)\}\{([0-9]+)\}|\s([0-9]+)/([0-9]+))")
_LISTED = re.compile(r",\s")
_SPACE = re.compile(r"(?<![0-9])\s+|\s+(?![0-9])")


@dataclass(frozen=True)
class Number:
    """An exact rational number as it was written."""

    value: Fraction
    is_decimal: bool
    """Written with a point, so perhaps rounded."""
    is_percentage: bool = False


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
    scientific notation, each with a percent sign after it or not. ASCII digits only."""
    if len(tidied) > MAX_DIGITS or _LISTED.search(tidied):
        return None
    bare = _PERCENT.sub("", tidied)
    while wrapped := re.fullmatch(r"\{([^{}]*)\}", bare):
        bare = wrapped[1]
    bare = bare.strip()
    value = _mixed(bare) or _rational(_SPACE.sub("", bare))
    return value and Number(value.value, value.is_decimal, bool(_PERCENT.search(tidied)))


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
        return Number(_signed(match[1], _plain(match[2] or "1") * Fraction(10) ** exponent), "." in text)
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
