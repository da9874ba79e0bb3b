r"""What an answer is: a value, several of them, an interval, an assignment, a ratio, a time of day, a chosen option.

Only the outermost layer is read, again and again inwards; what is left are values, the texts that equality.py compares.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from data_prep.grading import units
from data_prep.grading.notation import FUNCTIONS, tidy
from data_prep.grading.rationals import number
from data_prep.grading.values import value

MAX_DEPTH = 8
MAX_ITEMS = 40
"""A longer list is one value, compared as it is written."""


@dataclass(frozen=True)
class Value:
    """One expression, without its unit."""

    text: str
    unit: units.Dimension | None = None
    loose: str | None = None
    """The text without letters at its end that may be a unit or may be variables."""


@dataclass(frozen=True)
class Many:
    """A tuple, a set or a list."""

    brackets: str
    """"()", "[]", "{}", or "" for a list without any."""
    items: tuple[Shape, ...]


@dataclass(frozen=True)
class Range:
    """The numbers between two ends."""

    low: Value
    high: Value
    closed: tuple[bool, bool]
    name: str = ""
    """Of the variable, where it was written as an inequality."""


@dataclass(frozen=True)
class Union:
    """Intervals and sets joined."""

    pieces: tuple[Shape, ...]


@dataclass(frozen=True)
class Equation:
    """A left side that equals something."""

    left: str
    value: Shape
    whole: str
    is_name: bool
    """The left side is a name (x, AB, f(x), a_{10}), so the right one is what it is."""
    is_quantity: bool
    """The left side has no numbers: it names a quantity, like a+b, whose value is the right side."""


@dataclass(frozen=True)
class Ratio:
    """a : b : c"""

    parts: tuple[Value, ...]


@dataclass(frozen=True)
class Clock:
    """A time of day."""

    hour: int
    minute: int
    second: int
    half: str
    """"a" before noon, "p" after, "" if not said."""


@dataclass(frozen=True)
class Choice:
    """An option's letter with what it says."""

    letter: str
    content: Shape


@dataclass(frozen=True)
class Rounded:
    """An exact value and its rounding, which agree."""

    exact: Shape
    rounded: Shape


Shape = Value | Many | Range | Union | Equation | Ratio | Clock | Choice | Rounded
NEVER = Value("")
"""What contradicts itself: equal to nothing."""

_PIECES = re.compile(r"\\[{}]|\\[a-zA-Z]+|\\.|[a-zA-Z]+|.", re.DOTALL)
_OPENING = {"(": ")", "[": "]", "{": "}", r"\{": r"\}", r"\langle": r"\rangle"}
_CLOSING = frozenset(_OPENING.values())
_CLOCK = re.compile(
    r"(?:at\s+)?([01]?\d|2[0-4])(?:\s*:\s*([0-5]\d)(?:\s*:\s*([0-5]\d))?)?\s*(?:\\text\{)?\s*"
    r"(?:([ap])\.?\s*m\.?|o'?clock)?\s*\}?",
    re.IGNORECASE,
)
_LETTER = r"(?:\\text)?\{?\s*\(?\s*(?:\\text\{\s*)?([A-J])\s*\}?"
_CHOICE = re.compile(
    r"(?:(?:\\text)?\{\s*)?(?:\(([A-J])\)\s*\}?\s*|\\text\{\s*\(?([A-J])\)\s*\}\s*|([A-J])\s*(?:[.):]\s*\}?|\}\s*[.):])\s*)"
    r"(?![\s+\-*/^_=<>}]|\\(?:le|ge|cdot|times|in)(?![a-zA-Z]))(.+)",
    re.DOTALL,
)
_NO_CONTENT = re.compile(
    r"\(?[A-J]\)?\s*(?:$|[.):,;]|\\text|and(?![a-z])|or(?![a-z])|/)|(?:or|and|not|but|nor|maybe)(?![a-z])"
)
_OPTION = re.compile(
    r"(?:\\text\{)?\s*(?:option|choice|statement)\s*\}?\s*(?:\\text)?\{?\s*\(?([A-Z])\)?\s*\}?|"
    r"(?:\\text\{)?\(?([A-J])\s*\}?\s*\)\s*\}?",
    re.IGNORECASE,
)
_POINT = re.compile(r"[A-Z](?:_\{?\w\}?|')?\s*(?=\()")
_BUILDER = re.compile(r"\\\{\s*([a-zA-Z])\s*(?:\\in\s*\\mathbb\{R\}\s*)?(?:\||\\mid(?![a-zA-Z])|:)(.*)\\\}", re.DOTALL)
_FRENCH = re.compile(r"([\[\]])([^,;\[\]]+)[,;]([^,;\[\]]+)([\[\]])")
_SPLIT = re.compile(r"\s*[,;]\s*(?:and|or)(?![a-zA-Z])\s*|\s*(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])\s*|[,;]")
_RELATION = re.compile(r"\\(?:le|ge|ne|approx|in|notin|equiv|simeq)(?![a-zA-Z])|[=<>]")
_VARIABLE = re.compile(r"(?:[a-zA-Z]|\\(?!pi|infty)[a-z]+)(?:_\{?\w+\}?)?(?:\([a-z]\))?")
_SUBSCRIPT = re.compile(r"_(?:\{(?:[^{}]|\{[^{}]*\})*\}|\w)")
_ARGUMENT = re.compile(r"\([^()]*\)")
_TUPLE_OF_NAMES = re.compile(r"\(\s*[a-zA-Z](?:_\{?\w\}?)?(?:\s*,\s*[a-zA-Z](?:_\{?\w\}?)?)+\s*\)")
_OPERATOR = re.compile(r"[-+*/^]|\\(?:frac|cdot|times|sqrt|sum|int|binom|pmod)(?![a-zA-Z])")


@lru_cache(maxsize=8192)
def read(text: str, depth: int = 0) -> Shape:
    """What a tidied text is."""
    text = _unwrapped(text)
    if depth > MAX_DEPTH or number(text):
        return Value(text)
    if number(units.split(text, loosely=True)[0]):
        return _single(text, depth)
    return _fixed_form(text, depth) or _several(text, depth) or _related(text, depth) or _single(text, depth)


def _unwrapped(text: str) -> str:
    """Without brackets of any kind around a single thing."""
    while True:
        text = text.strip()
        inner = _inside(text, {"{": "}"})
        if inner is None and len(text) < 1000 and not re.match(r"\\\{\s*[a-zA-Z]\s*(?:\||:|\\mid|\\in)", text):
            inner = _inside(text, {"(": ")", "[": "]", r"\{": r"\}"})
            if inner is not None and (not inner.strip() or len(_split(inner, _SPLIT)) > 1):
                return text
        found = re.fullmatch(r"\\text\{([^{}]*)\}", text) if inner is None else None
        if found:
            inner = found[1]
        if inner is None:
            return text
        text = inner


def _inside(text: str, pairs: dict[str, str]) -> str | None:
    """What is inside one pair of brackets that is all of the text."""
    opening = next((sign for sign in pairs if text.startswith(sign)), None)
    if opening is None or not text.endswith(pairs[opening]) or (opening == "{" and text.endswith(r"\}")):
        return None
    depth, place = 0, 0
    for piece in _PIECES.findall(text):
        depth += (piece in _OPENING) - (piece in _CLOSING)
        place += len(piece)
        if depth == 0:
            return text[len(opening) : -len(pairs[opening])] if place == len(text) else None
    return None


def _split(text: str, pattern: re.Pattern[str]) -> list[str]:
    """The text cut at every match outside of brackets."""
    if not pattern.search(text):
        return [text]
    depths: list[int] = []
    depth = 0
    for piece in _PIECES.findall(text):
        depth -= piece in _CLOSING
        depths += [depth] * len(piece)
        depth += piece in _OPENING
    if depth or min(depths) < 0:
        return [text]
    cut, begin = [], 0
    for found in pattern.finditer(text):
        if depths[found.start()] == 0:
            cut.append(text[begin : found.start()])
            begin = found.end()
    return [*cut, text[begin:]]


def _fixed_form(text: str, depth: int) -> Shape | None:
    """Times of day, options, French intervals, sets of the x with a property."""
    if (found := _CLOCK.fullmatch(text)) and (found[2] or found[4]):
        return Clock(int(found[1]), int(found[2] or 0), int(found[3] or 0), (found[4] or "").lower())
    if found := _OPTION.fullmatch(text):
        return Value(found[1] or found[2])
    if (found := _CHOICE.fullmatch(text)) and not _NO_CONTENT.match(found[4]):
        content = (
            re.sub(r"^(?:\\text\{)?([^{}]*)\}?$", r"\1", found[4])
            if found[4].count("}") > found[4].count("{")
            else found[4]
        )
        return Choice(found[1] or found[2] or found[3], read(content, depth + 1))
    if (found := _FRENCH.fullmatch(text)) and found[1] + found[4] != "[]":
        return Range(*_ends(found[2], found[3]), (found[1] == "[", found[4] == "]"))
    if found := _BUILDER.fullmatch(text):
        return read(found[2].strip(), depth + 1)
    return None


def _several(text: str, depth: int) -> Shape | None:
    """Lists, tuples, sets, and what a sign of plus or minus stands for."""
    if r"\begin" in text:
        return _system(text, depth)
    items = _split(text, _SPLIT)
    if len(items) > MAX_ITEMS:
        return Value(text)
    if len(items) > 1 and all(item.strip() for item in items):
        if all(_is_inequality(item) for item in items) and re.search(r"(?<![a-zA-Z])or(?![a-zA-Z])", text):
            return Union(tuple(read(item, depth + 1) for item in items))
        shapes = [read(item, depth + 1) for item in items]
        return _between_both(shapes, text) or _listed("", shapes)
    if re.search(r"\\(?:pm|mp)(?![a-zA-Z])", text):
        pairs = (("+", "-"), ("-", "+"))
        signed = [re.sub(r"\\mp(?![a-zA-Z])\s*", low, re.sub(r"\\pm(?![a-zA-Z])\s*", up, text)) for up, low in pairs]
        return _listed("", [read(re.sub(r"(^|[=(,{])\s*\+", r"\1", one), depth + 1) for one in signed])
    return _bracketed(text, depth)


def _system(text: str, depth: int) -> Shape | None:
    """Assignments below one another."""
    found = re.fullmatch(r"\\begin\{cases\}([^&]*)\\end\{cases\}", text)
    rows = [row for row in found[1].split(r"\\") if row.strip()] if found else []
    if not rows or not all("=" in row for row in rows):
        return None
    return _listed("", [read(row.strip().rstrip(","), depth + 1) for row in rows])


def _between_both(shapes: Sequence[Shape], text: str) -> Shape | None:
    """x > 1 and x < 3 as the interval between; x < 1, x > 3 as both sides of it."""
    if len(shapes) != 2 or not all(isinstance(shape, Range) and shape.name for shape in shapes):
        return None
    one, other = sorted((s for s in shapes if isinstance(s, Range)), key=lambda shape: shape.low.text == r"-\infty")
    low, high = value(one.low.text), value(other.high.text)
    if (
        one.name != other.name
        or one.high.text != r"\infty"
        or other.low.text != r"-\infty"
        or low is None
        or high is None
    ):
        return None
    if low < high:
        return Range(one.low, other.high, (one.closed[0], other.closed[1]), one.name)
    return NEVER if re.search(r"(?<![a-zA-Z])and(?![a-zA-Z])", text) else Union(tuple(shapes))


def _is_inequality(text: str) -> bool:
    return bool(re.search(r"[<>]|\\(?:le|ge)(?![a-zA-Z])", text))


def _bracketed(text: str, depth: int) -> Shape | None:
    if label := _POINT.match(text):
        text = text[label.end() :] if _inside(text[label.end() :], _OPENING) is not None else text
    for opening, closing in (("(", ")"), ("[", "]"), (r"\{", r"\}"), (r"\langle", r"\rangle"), ("(", "]"), ("[", ")")):
        if not (text.startswith(opening) and text.endswith(closing)):
            continue
        inner = _inside(text, {opening: closing})
        items = _split(inner, _SPLIT) if inner is not None else []
        if not 2 <= len(items) <= MAX_ITEMS or not all(item.strip() for item in items):
            return None
        if opening + closing in ("(]", "[)"):
            return Range(*_ends(*items), (opening == "[", closing == "]")) if len(items) == 2 else None
        brackets = {"\\{": "{}", "[": "[]"}.get(opening, "()")
        return _listed(brackets, [read(item, depth + 1) for item in items])
    return None


def _ends(low: str, high: str) -> tuple[Value, Value]:
    return _single(low, MAX_DEPTH), _single(high, MAX_DEPTH)


def _listed(brackets: str, items: Sequence[Shape]) -> Many:
    """Items one by one: 0, \\pm 1 has three; n = 2, 3, 4 and x = 1 or x = 2 have the values of one name."""
    flat: list[Shape] = []
    for item in items:
        flat += item.items if isinstance(item, Many) and item.brackets == "" and brackets != "()" else [item]
    named = [item for item in flat if isinstance(item, Equation) and item.is_name]
    one_name = len({item.left for item in named}) == 1 and (len(named) == len(flat) > 1 or named == flat[:1])
    if one_name:
        flat = [item.value if isinstance(item, Equation) else item for item in flat]
    return Many(brackets, tuple(flat))


def _related(text: str, depth: int) -> Shape | None:
    """Equations, chains of them, inequalities, membership, unions."""
    environment = text.find(r"\begin")
    head = text if environment < 0 else text[:environment]
    if not _RELATION.search(head):
        return _joined(text, depth)
    sides = [side.strip() for side in _split(text if environment < 0 else head, _RELATION)]
    signs = _outer_signs(head, len(sides) - 1)
    if environment >= 0:
        sides[-1] += text[environment:]
    if not signs or not all(sides):
        return None
    if signs[-1] == r"\approx":
        return _approximated(sides, signs, depth)
    if set(signs) == {"="}:
        return _equated(text, sides, depth)
    if signs == [r"\in"]:
        return read(sides[1], depth + 1)
    if signs == [r"\ne"] and _VARIABLE.fullmatch(sides[0]):
        low, high = _infinite(sides[1])
        return Union(
            (
                Range(low, _end(sides[1]), (False, False), sides[0]),
                Range(_end(sides[1]), high, (False, False), sides[0]),
            )
        )
    return _between(sides, signs)


def _outer_signs(text: str, count: int) -> list[str]:
    """The relation signs outside of brackets; none where brackets do not close."""
    depth, signs = 0, []
    for piece in _PIECES.findall(text):
        depth += (piece in _OPENING) - (piece in _CLOSING)
        if depth == 0 and _RELATION.fullmatch(piece):
            signs.append(piece)
    return signs if len(signs) == count else []


def _approximated(sides: list[str], signs: list[str], depth: int) -> Shape:
    """12\\pi \\approx 37.70 is the exact value, or its rounding if it is one; x \\approx 5 is 5."""
    exact = sides[-2]
    if len(sides) == 2 and _is_name(exact):
        return read(sides[-1], depth + 1)
    one, other = value(units.split(exact)[0]), value(units.split(sides[-1])[0])
    shape = read(exact, depth + 1)
    decimals = [len(found) for side in sides[-2:] if (found := (re.findall(r"\.(\d+)", side) or [""])[0]) or True]
    if one is None or other is None or abs(one - other) > 0.500001 * 10 ** -max(decimals):
        return shape if one is None or other is None or number(sides[-1]) is None else NEVER if number(exact) else shape
    return Rounded(shape, read(sides[-1], depth + 1))


def _equated(text: str, sides: list[str], depth: int) -> Shape:
    """A chain is what it ends in, unless its numbers contradict one another."""
    numbers = [found for side in sides if not re.search("[a-zA-Z]", side) and (found := value(side)) is not None]
    if len(numbers) > 1 and max(numbers) - min(numbers) > 1e-6 * max(1.0, *map(abs, numbers)):
        exact = [found.value for side in sides if (found := number(side))]
        if not any(re.search(r"\.\d", side) for side in sides) or len(set(exact)) > 1:
            return NEVER
    left, last = sides[0], read(sides[-1], depth + 1)
    if value(left) is not None and len(sides) == 2 and not re.search("[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", left)):
        if len(numbers) == 2 or not re.search("[a-zA-Z]", sides[1]):
            return last
        left, last = sides[1], read(left, depth + 1)
    if len(sides) > 2 and len(numbers) == 0 and not _is_name(left):
        return Value(text)
    return Equation(_name(left), last, text, _is_name(left), _is_name(left) or _is_quantity(left))


def _name(left: str) -> str:
    return re.sub(r"[\s{}]", "", left)


def _is_name(left: str) -> bool:
    if _TUPLE_OF_NAMES.fullmatch(left):
        return True
    return _is_quantity(left) and not _OPERATOR.search(_ARGUMENT.sub("", _SUBSCRIPT.sub("", left)))


def _is_quantity(left: str) -> bool:
    bare = _ARGUMENT.sub("", _SUBSCRIPT.sub("", left))
    return not re.search(r"\d", bare) and bool(re.search("[a-zA-Z|]", bare))


def _between(sides: list[str], signs: list[str]) -> Shape | None:
    """a < x <= b and x > a as intervals; None for other inequalities."""
    upward = {"<": False, r"\le": True}
    downward = {">": False, r"\ge": True}
    kind = upward if all(sign in upward for sign in signs) else downward
    if not all(sign in kind for sign in signs):
        return None
    if kind is downward:
        sides, signs = sides[::-1], signs[::-1]
    closed = [kind[sign] for sign in signs]
    if len(sides) == 3 and _VARIABLE.fullmatch(sides[1]):
        return Range(_end(sides[0]), _end(sides[2]), (closed[0], closed[1]), sides[1])
    if len(sides) != 2:
        return None
    low, high = sides
    if _VARIABLE.fullmatch(low) and not (kind is downward and _VARIABLE.fullmatch(high)):
        return Range(_infinite(low)[0], _end(high), (False, closed[0]), low)
    if _VARIABLE.fullmatch(high):
        return Range(_end(low), _infinite(low)[1], (closed[0], False), high)
    return None


def _infinite(_: str) -> tuple[Value, Value]:
    return Value(r"-\infty"), Value(r"\infty")


def _end(text: str) -> Value:
    return _single(text, MAX_DEPTH)


def _joined(text: str, depth: int) -> Shape | None:
    """Intervals and sets joined by \\cup."""
    pieces = [piece.strip() for piece in _split(text, re.compile(r"\\cup(?![a-zA-Z])"))]
    if len(pieces) > 1 and all(pieces):
        shapes = [read(piece, depth + 1) for piece in pieces]
        shapes = [as_range(shape) or shape for shape in shapes]
        if all(
            isinstance(shape, Range | Many) or piece[:2] == r"\{" for shape, piece in zip(shapes, pieces, strict=True)
        ):
            return Union(tuple(shapes))
        return None
    return _ratio(text)


def as_range(shape: Shape) -> Range | None:
    """A pair in parentheses or brackets as the interval that it may be."""
    if isinstance(shape, Range):
        return shape
    if not isinstance(shape, Many) or shape.brackets not in ("()", "[]") or len(shape.items) != 2:
        return None
    low, high = shape.items
    if not isinstance(low, Value) or not isinstance(high, Value):
        return None
    return Range(low, high, (shape.brackets == "[]",) * 2)


def _ratio(text: str) -> Shape | None:
    parts = [part.strip() for part in _split(text, re.compile(":"))]
    if len(parts) < 2 or not all(parts) or any(is_wordy(part) for part in parts):
        return None
    return Ratio(tuple(_single(part, MAX_DEPTH) for part in parts))


def _single(text: str, depth: int) -> Value:
    text = re.sub(r"^\s*\+\s*(?=\\infty|\d)", "", text.strip())
    text = re.sub(r"(\\infty)\s*$", r"\1", text)
    before, unit = units.split(text)
    if unit is not None and before.strip():
        return Value(_unwrapped(before).replace(units.DEGREE, ""), unit)
    loose, loose_unit = units.split(text, loosely=True)
    return Value(text.replace(units.DEGREE, ""), None, _unwrapped(loose) if loose_unit is not None else None)


_RUN = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{2,}")
_COMMAND = re.compile(r"\\(?!text)[a-zA-Z]+")
_SMALL_WORDS = frozenset(
    "or and if not no is to of so the for nor but odd any all one two six ten yes are was has non even none "
    "true with then than when only also each from".split()
)
_LOGIC = re.compile(r"\\(?:implies|Rightarrow|iff|forall|exists|therefore|because|Leftrightarrow)(?![a-zA-Z])")


def is_wordy(text: str) -> bool:
    """Whether words stand in it, so that no algebra can compare it."""
    if r"\text" in text or r"\ldots" in text or _LOGIC.search(text):
        return True
    if r"\begin" in text:
        return False
    runs = _RUN.findall(_COMMAND.sub(" ", _SUBSCRIPT.sub("", text)))
    return any((len(run) > 3 and run not in FUNCTIONS) or run.lower() in _SMALL_WORDS for run in runs)


def reading(text: str) -> Shape:
    """What an answer is, as a model or a file writes it."""
    return read(tidy(text))
