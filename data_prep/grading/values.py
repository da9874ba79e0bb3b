"""Simple expressions at one arbitrary point: two that differ there are not equal, which saves asking algebra.

Only what can be read in one way is read: sums, products, quotients and powers of numbers, letters, pi, \\frac and
\\sqrt. Functions, words, subscripts, e, i, mixed numbers, 1/2x and whatever else are left to math-verify. Equality is
never concluded here, only difference.
"""

import math
import re
import zlib

MAX_LENGTH = 120
TOLERANCE = 1e-4
"""Far above what rounding does here, and above what math-verify lets through as rounded to six decimals."""

_TOKENS = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+|\\[a-zA-Z]+|[a-zA-Z]|[-+*/^(){}\[\]])")
_WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}")
_TIMES = ("*", r"\cdot", r"\times")
_AMBIGUOUS_LETTERS = frozenset("eiEI")
_END = ""


class _Unreadable(Exception):
    """The text can be read in another way or not at all."""


def differ(one: str, other: str) -> bool:
    """Whether both expressions can be read, and have different values at the point that their letters' names fix."""
    left, right = value(one), value(other)
    if left is None or right is None:
        return False
    return abs(left - right) > TOLERANCE * max(1.0, abs(left), abs(right))


def value(text: str) -> float | None:
    """The expression at that point, None if it cannot be read or has no finite real value there."""
    if len(text) > MAX_LENGTH or _WORD.search(text):
        return None
    try:
        result = _Reader(text).whole()
    except (_Unreadable, ArithmeticError, ValueError, RecursionError):
        return None
    return result if math.isfinite(result) else None


class _Reader:
    """Recursive descent over the tokens of one expression."""

    def __init__(self, text: str) -> None:
        self._tokens = _TOKENS.findall(text)
        if "".join(self._tokens) != re.sub(r"\s", "", text):
            raise _Unreadable
        self._tokens.append(_END)
        self._place = 0

    @property
    def _next(self) -> str:
        return self._tokens[self._place]

    def _take(self, expected: str | None = None) -> str:
        token = self._next
        if token == _END or expected not in (None, token):
            raise _Unreadable
        self._place += 1
        return token

    def whole(self) -> float:
        result = self._sum()
        if self._next != _END:
            raise _Unreadable
        return result

    def _sum(self) -> float:
        sign = -1.0 if self._next in ("+", "-") and self._take() == "-" else 1.0
        result = sign * self._product()
        while self._next in ("+", "-"):
            result += self._product() if self._take() == "+" else -self._product()
        return result

    def _product(self) -> float:
        result = self._power()
        while True:
            before = self._tokens[self._place - 1]
            if self._next in _TIMES:
                self._take()
                result *= self._power()
            elif self._next == "/":
                self._take()
                result /= self._power()
                if self._next == "/" or self._starts_atom():
                    raise _Unreadable
            elif self._starts_atom():
                self._refuse_two_readings(before)
                result *= self._power()
            else:
                return result

    def _starts_atom(self) -> bool:
        return self._next in ("(", "{", r"\frac", r"\sqrt", r"\pi") or self._next[:1].isalnum() or self._next[:1] == "."

    def _refuse_two_readings(self, before: str) -> None:
        """x2, f(x) and 1\\frac{1}{2} are not plainly products."""
        is_number = before[-1:].isdigit()
        if self._next[:1].isdigit() or self._next[:1] == ".":
            raise _Unreadable
        if (before.isalpha() and self._next == "(") or (is_number and self._next == r"\frac"):
            raise _Unreadable

    def _power(self) -> float:
        base = self._atom()
        if self._next != "^":
            return base
        self._take()
        result = base ** self._exponent()
        if isinstance(result, complex) or self._next == "^":
            raise _Unreadable
        return result

    def _exponent(self) -> float:
        if self._next == "{":
            return self._group("{", "}")
        if len(self._next) != 1 or not self._next.isalnum():
            raise _Unreadable
        return self._atom()

    def _group(self, opening: str, closing: str) -> float:
        self._take(opening)
        result = self._sum()
        self._take(closing)
        return result

    def _atom(self) -> float:
        token = self._next
        if token in ("(", "{"):
            return self._group(token, ")" if token == "(" else "}")
        self._take()
        if token == r"\frac":
            return self._group("{", "}") / self._group("{", "}")
        if token == r"\sqrt":
            return self._root()
        if token == r"\pi":
            return math.pi
        if len(token) == 1 and token.isalpha() and token not in _AMBIGUOUS_LETTERS:
            return 1.0 + zlib.crc32(token.encode()) % 9973 / 4987
        return float(token) if token[0].isdigit() or token[0] == "." else self._fail()

    def _root(self) -> float:
        degree = self._group("[", "]") if self._next == "[" else 2.0
        if self._next != "{" and len(self._next) != 1:
            raise _Unreadable
        radicand = self._exponent()
        if radicand < 0:
            raise _Unreadable
        return radicand ** (1 / degree)

    def _fail(self) -> float:
        raise _Unreadable
