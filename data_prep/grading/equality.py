r"""Whether two answers are the same, decided without any algebra system wherever that is certain.

`compare` says True or False, and None where algebra has to decide; what algebra is asked are pairs of single values.
It is stricter than math-verify, which takes a pair for a set, an assignment for its values, a time of day for a ratio,
letters in any order for one word, and numbers that round alike for equal.

What can be argued either way is decided so, here and everywhere:

    answer               right answer      decision
    5\%                  5, 0.05           right: a percentage is its number and its hundredth
    33.3, 37.699         100/3, 12\pi      wrong: a decimal has to agree to six decimals
    12\pi \approx 37.70  12\pi, 37.70      right for both; 6 \approx 5 is neither
    0.333\ldots          1/3               wrong: dots do not say what repeats; 0.\overline{3} and 0.(3) are right
    7.4 million          7400000           right; 5k is not read
    7.425.000, 3,14      7425000, 3.14     wrong: the point is decimal, the comma separates thousands or items
    five, V, 0xA         5, 10             wrong: numerals are digits
    4 10/3               22/3              right: a mixed number, also with an improper fraction
    25 cm                25                right; 25 m against 25 cm is wrong: who states a unit states the right one
    5 m                  5                 right for a number; 5m against 5n is algebra
    52                   52_8              right: the base may be left out; 42_{10} is wrong: it asks for base 8
    2,4                  (2,4)             right: a list without brackets is read in order; 4,2 is wrong
    5,5; [5]; \{5\}      5                 right: one value, once or twice, with any brackets
    3, 5                 x=5, y=3          wrong, in the order of the names; 5, 3 is right, \{5,3\} is wrong
    x_1=1, x_2=2         \{1,2\}           right: values of one name are a set
    (1,2)                a column vector   wrong: a matrix is only equal to a matrix
    A(2,4)               (2,4)             right: a point's name may stand before it
    k \le 5              5                 wrong: an inequality is an interval
    x+1=5                5                 right: the right side counts, unless numbers contradict (6=5)
    4                    x^2+y^2=4         wrong: an equation with numbers on its left is no value
    3/4, 6:8             3:4               right; times of day (9:15) are equal to themselves alone
    7:30 PM              7:30, 19:30       right; against 7:30 AM it is wrong
    B. 12, Option B      B, 12             right, also in the other direction; b is not B, and B, C is not B
    5 (not 6)            5                 wrong: a unit is an entry of the table in units.py, all else is words
    no solutions         \emptyset         right
    60^\circ             \pi/3             wrong: outside of \sin and its like a degree sign is a unit
    1 \pmod 4, C(10,3)   1, 120            wrong: not read; \binom{10}{3} is
    1+2j                 1+2i              wrong
    \sqrt{1/n}           1/\sqrt{n}        wrong: equal for positive n only
    ]0,1[                (0,1)             right
    colours, bold        the same without  right
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from data_prep.grading import units
from data_prep.grading.rationals import equal_numbers, number
from data_prep.grading.structure import (
    Choice,
    Clock,
    Equation,
    Many,
    Range,
    Ratio,
    Rounded,
    Shape,
    Union,
    Value,
    as_range,
    is_wordy,
    read,
)
from data_prep.grading.values import differ

Algebra = Callable[[str, str], bool | None]
"""Whether two expressions are equal; None: not known yet."""

_SPACE = re.compile(r"(?<![0-9])\s+|\s+(?![0-9])")
_WRAPPED = re.compile(r"\\text\{([^{}]*)\}|\{([^{}]*)\}|\(([A-Za-z])\)")
_IN_BASE = re.compile(r"\(?([0-9A-F][0-9A-Za-z]*)\)?_(?:\{?\(?([0-9]{1,2})\)?\}?|\{?\\text\{([a-z]+)\}\}?)")
_DIGITS = re.compile(r"[0-9][0-9A-Fa-f]*|[0-9A-F]+")
_BASES = dict(two=2, three=3, four=4, five=5, six=6, seven=7, eight=8, nine=9, ten=10, twelve=12, sixteen=16)
_CODE = re.compile(r"[A-Za-z][A-Za-z0-9]+|[0-9]+[A-Za-z]+[0-9][A-Za-z0-9]*")
_MODULO = re.compile(r"\\[bp]?mod(?![a-zA-Z])")
_SET = re.compile(r"\\(?:emptyset|mathbb\{[A-Z]\})(?:\^\{?[+\-*0-9]\}?)?")
_REALS = r"\mathbb{R}"
_DOTS = re.compile(r"\\ldots")


def unknown(_: str, __: str) -> None:
    """Algebra that knows nothing."""


def canonical(tidied: str) -> str:
    """A tidied expression as text to be compared: without white space except between digits, without a wrapping
    \\text{} or braces, a letter without parentheses, words in lower case."""
    text = _SPACE.sub("", tidied)
    while wrapped := _WRAPPED.fullmatch(text):
        text = wrapped[wrapped.lastindex or 0].strip()
    return text.casefold() if len(text) > 1 and text.isalpha() else text


def compare(gold: str, answer: str, algebra: Algebra = unknown) -> bool | None:
    """Whether two tidied expressions are the same, None if neither text nor numbers nor `algebra` decide it.

    An empty answer is never right.
    """
    one, other = canonical(gold), canonical(answer)
    if not one or not other:
        return False
    return True if one == other else _same(read(gold), read(answer), algebra)


def _all(verdicts: Iterable[bool | None]) -> bool | None:
    found = list(verdicts)
    return False if False in found else None if None in found else True


def _any(verdicts: Iterable[bool | None]) -> bool | None:
    found = list(verdicts)
    return True if True in found else None if None in found else False


def _same(gold: Shape, answer: Shape, algebra: Algebra) -> bool | None:
    if isinstance(gold, Value) and isinstance(answer, Value):
        return _same_value(gold, answer, algebra)
    for kind, compared in _WAYS:
        if isinstance(gold, kind) or isinstance(answer, kind):
            return compared(gold, answer, algebra)
    raise AssertionError(f"no way to compare {gold} and {answer}")


def _same_rounded(gold: Shape, answer: Shape, algebra: Algebra) -> bool | None:
    golds = (gold.exact, gold.rounded) if isinstance(gold, Rounded) else (gold,)
    answers = (answer.exact, answer.rounded) if isinstance(answer, Rounded) else (answer,)
    return _any(_same(one, other, algebra) for one in golds for other in answers)


def _same_choice(gold: Shape, answer: Shape, algebra: Algebra) -> bool | None:
    """By letter where both have one; else by letter or content, whichever the other side is."""
    letters = [side.letter if isinstance(side, Choice) else _letter(side) for side in (gold, answer)]
    if all(letters):
        return letters[0] == letters[1]
    contents = [side.content if isinstance(side, Choice) else side for side in (gold, answer)]
    return _same(contents[0], contents[1], algebra)


def _letter(shape: Shape) -> str:
    return shape.text if isinstance(shape, Value) and re.fullmatch("[A-J]", shape.text) else ""


def _same_clock(gold: Shape, answer: Shape, algebra: Algebra) -> bool | None:
    if not isinstance(gold, Clock) or not isinstance(answer, Clock):
        hour_alone = isinstance(answer, Clock) and isinstance(gold, Value) and number(gold.text) is not None
        return hour_alone and answer.half != "" and (answer.minute, gold.text) == (0, str(answer.hour))  # type: ignore[union-attr]
    if bool(gold.half) != bool(answer.half) and gold.hour <= 12 and answer.hour <= 12:
        gold, answer = replace(gold, half=""), replace(answer, half="")
    return _of_day(gold) == _of_day(answer)


def _of_day(time: Clock) -> tuple[int, int, int]:
    hour = time.hour % 12 + 12 * (time.half == "p") if time.half else time.hour
    return hour, time.minute, time.second


def _same_equation(gold: Shape, answer: Shape, algebra: Algebra) -> bool | None:
    if not isinstance(answer, Equation):
        return _same(gold.value, answer, algebra) if gold.is_quantity else False  # type: ignore[union-attr]
    if not isinstance(gold, Equation):
        return _same(gold, answer.value, algebra)
    if gold.left == answer.left and (gold.is_name or gold.is_quantity):
        return _same(gold.value, answer.value, algebra)
    sides = [side.value for side in (gold, answer)]
    if all(isinstance(side, Value) and number(side.text) for side in sides) and gold.is_name and answer.is_name:
        return False
    if is_wordy(gold.whole) or is_wordy(answer.whole):
        return False
    return algebra(gold.whole, answer.whole)


def _same_ratio(gold: Shape, answer: Shape, algebra: Algebra) -> bool | None:
    one, other = (side.parts if isinstance(side, Ratio) else None for side in (gold, answer))
    if one and other:
        if len(one) != len(other):
            return False
        pairs = zip(_quotients(one), _quotients(other), strict=True)
        return _all(_same_value(left, right, algebra) for left, right in pairs)
    parts, single = (one, answer) if one else (other, gold)
    if not parts or len(parts) != 2 or not isinstance(single, Value):
        return False
    quotient = _quotients(parts[::-1])[0]
    return _same_value(*((quotient, single) if one else (single, quotient)), algebra)


def _quotients(parts: Sequence[Value]) -> list[Value]:
    """Each part over the first."""
    first, *others = (part.text for part in parts)
    return [Value(rf"\frac{{{other}}}{{{first}}}") for other in others]


def _same_range(gold: Shape, answer: Shape, algebra: Algebra) -> bool | None:
    """Intervals by their ends; of two inequalities also the variable has to be the same."""
    one, other = _whole_line(gold), _whole_line(answer)
    if one is None or other is None:
        return False
    if one.name and other.name and one.name != other.name:
        return False
    if one.closed != other.closed:
        return False
    return _all(_same_value(*ends, algebra) for ends in ((one.low, other.low), (one.high, other.high)))


def _whole_line(shape: Shape) -> Range | None:
    if isinstance(shape, Value) and shape.text == _REALS:
        return Range(Value(r"-\infty"), Value(r"\infty"), (False, False))
    return as_range(shape)


def _same_union(gold: Shape, answer: Shape, algebra: Algebra) -> bool | None:
    return _same_set(_pieces(gold), _pieces(answer), algebra)


def _pieces(shape: Shape) -> tuple[Shape, ...]:
    """Of a union, also of one that is written as a list of intervals."""
    if isinstance(shape, Union):
        return shape.pieces
    ranges = [as_range(item) for item in shape.items] if isinstance(shape, Many) and not shape.brackets else []
    return tuple(one for one in ranges if one) if ranges and all(ranges) else (shape,)


def _same_many(gold: Shape, answer: Shape, algebra: Algebra) -> bool | None:
    if isinstance(gold, Many) and isinstance(answer, Many):
        return _same_several(gold, answer, algebra)
    several, single = (gold, answer) if isinstance(gold, Many) else (answer, gold)
    if isinstance(single, Value) and single.text == _REALS:
        return _same_range(gold, answer, algebra)
    if not isinstance(several, Many) or several.brackets not in ("", "{}", "[]"):
        return False
    if isinstance(single, Value) and single.text == r"\emptyset":
        return False
    pairs = ((item, single) if several is gold else (single, item) for item in several.items)
    return _all(_same(*pair, algebra) for pair in pairs)


def _same_several(gold: Many, answer: Many, algebra: Algebra) -> bool | None:
    named = [_by_name(side) for side in (gold, answer)]
    if all(named):
        one, other = named
        return one.keys() == other.keys() and _all(_same(one[name], other[name], algebra) for name in one)
    if any(named):
        return _same_named(gold, answer, named, algebra)
    kinds = {gold.brackets, answer.brackets}
    if kinds <= {"", "{}"}:
        if _is_sequence(gold):
            return _same_tuple(gold.items, answer.items, algebra)
        return _same_set(gold.items, answer.items, algebra)
    if len(kinds) > 1 and ("{}" in kinds or (kinds == {"()", "[]"} and len(gold.items) == 2)):
        return False
    return _same_tuple(gold.items, answer.items, algebra)


def _by_name(shape: Many) -> dict[str, Shape]:
    """The values of a list of assignments to different names."""
    found = {item.left: item.value for item in shape.items if isinstance(item, Equation) and item.is_name}
    return found if len(found) == len(shape.items) else {}


def _same_named(gold: Many, answer: Many, named: list[dict[str, Shape]], algebra: Algebra) -> bool | None:
    """Values without names against those of names: in the order of the names, or in any for x_1 and x_2."""
    one, other = (
        Many("" if values else side.brackets, tuple(values[name] for name in sorted(values)) or side.items)
        for values, side in zip(named, (gold, answer), strict=True)
    )
    names = {re.sub(r"_.*", "", name) for name in (*named[0], *named[1])}
    if len(names) == 1:
        brackets = {gold.brackets, answer.brackets}
        return (
            _same_set(one.items, other.items, algebra)
            if brackets <= {"", "{}"}
            else _same_tuple(one.items, other.items, algebra)
        )
    return False if "{}" in (one.brackets, other.brackets) else _same_tuple(one.items, other.items, algebra)


def _is_sequence(gold: Many) -> bool:
    """A list with dots or with an entry twice has an order."""
    texts = [item.text if isinstance(item, Value) else repr(item) for item in gold.items]
    return (gold.brackets == "" and len(set(texts)) < len(texts)) or any(_DOTS.search(text) for text in texts)


def _same_tuple(gold: Sequence[Shape], answer: Sequence[Shape], algebra: Algebra) -> bool | None:
    if len(gold) != len(answer):
        return False
    return _all(_same(*pair, algebra) for pair in zip(gold, answer, strict=True))


def _same_set(gold: Sequence[Shape], answer: Sequence[Shape], algebra: Algebra) -> bool | None:
    table = [[_same(one, other, algebra) for other in answer] for one in gold]
    return _all((*map(_any, table), *map(_any, zip(*table, strict=True))))


_WAYS = (
    (Rounded, _same_rounded),
    (Choice, _same_choice),
    (Equation, _same_equation),
    (Clock, _same_clock),
    (Union, _same_union),
    (Range, _same_range),
    (Many, _same_many),
    (Ratio, _same_ratio),
)
"""How two shapes are compared where one of them is of a kind: the first that fits."""


def _same_value(gold: Value, answer: Value, algebra: Algebra) -> bool | None:
    """Two single values: as text, as digits in a base, as numbers, as words, at a point, by algebra."""
    one, other = canonical(gold.text), canonical(answer.text)
    if not one or not other:
        return False
    if (same := _same_digits(one, other)) is not None:
        return same
    left, right = number(gold.text), number(answer.text)
    if left and not right and answer.loose:
        right = number(answer.loose)
    if not units.agree(gold.unit, answer.unit):
        return False
    wordy = is_wordy(gold.text) or is_wordy(answer.text)
    if one == other or (wordy and _as_words(one) == _as_words(other)):
        return True
    if left and right:
        return equal_numbers(left, right)
    if _are_texts(one, other) or wordy:
        return False
    if bool(_MODULO.search(one)) != bool(_MODULO.search(other)):
        return False
    if _SET.fullmatch(one) or _SET.fullmatch(other) or differ(gold.text, answer.text):
        return False
    return algebra(gold.text, answer.text)


def _as_words(text: str) -> str:
    """The text without its \\text{} and white space, in lower case."""
    return re.sub(r"\s", "", re.sub(r"\\text\{([^{}]*)\}", r"\1", text)).casefold()


def _are_texts(one: str, other: str) -> bool:
    """Strings of letters without an operator are no products: listen is not silent."""
    both = one + " " + other
    return bool(_CODE.fullmatch(one) and _CODE.fullmatch(other)) or bool(re.fullmatch("[a-zA-Z] [a-zA-Z]", both))


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
