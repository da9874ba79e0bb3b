"""Expressions that are not handed to a computer algebra system: a few characters that cost it minutes or gigabytes.

The worker's limits stop whatever is not recognized here; refusing the plain cases at once saves those two seconds. A
refused answer is still compared as text, and else has no verdict. Ordinary answers pass: 2^{1999}, e^{-x^2}, 100!,
\\binom{20}{10}.
"""

import re

MAX_LENGTH = 1000
MAX_DEPTH = 30
MAX_EXPONENT_DIGITS = 4
MAX_COMBINED_POWER = 10_000

_DEPTH = re.compile(r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\[{}]|[({\[)}\]]")
_LONG_EXPONENT = re.compile(rf"\^[\s{{(+-]*(?:\d[\s,.]?){{{MAX_EXPONENT_DIGITS + 1},}}")
_NUMERIC_POWER = re.compile(r"[)}\]0-9a-zA-Z]\s*\^[\s{(+-]*([0-9]{1,9})")
_GROUP_FACTORIAL = re.compile(r"[)}\]]\s*!")
_BIG_FACTORIAL = re.compile(r"\d{5,}\s*!|!\s*!")
_BIG = re.compile(r"\d{5,}|!|\^")
_BIG_CHOICE = re.compile(r"\\[dt]?binom\s*\{[^{}]*\d{5,}|\\[dt]?binom\s*\{[^{}]*\^")


def refusal(text: str) -> str:
    """Why this expression is not evaluated, or "" if it may be."""
    text = text.replace("**", "^")
    if len(text) > MAX_LENGTH:
        return f"longer than {MAX_LENGTH} characters"
    if _depth(text) > MAX_DEPTH:
        return f"nested more than {MAX_DEPTH} deep"
    if _LONG_EXPONENT.search(text):
        return f"an exponent or bound of more than {MAX_EXPONENT_DIGITS} digits"
    if _BIG_FACTORIAL.search(text) or any(_BIG.search(group) for group in _groups_before_factorials(text)):
        return "a giant factorial"
    if _BIG_CHOICE.search(text):
        return "a giant binomial coefficient"
    return _power_refusal(text)


def _depth(text: str) -> int:
    """Deepest nesting of brackets of any kind; closing ones without an opening count for nothing."""
    depth = deepest = 0
    for token in _DEPTH.findall(text):
        if token[-1] in "({[":
            depth += 1
            deepest = max(deepest, depth)
        elif token[-1] in ")}]":
            depth = max(0, depth - 1)
    return deepest


def _groups_before_factorials(text: str) -> list[str]:
    """The content of every bracketed group that a factorial is taken of."""
    return [_group_ending_at(text, match.start()) for match in _GROUP_FACTORIAL.finditer(text)]


def _group_ending_at(text: str, end: int) -> str:
    depth = 0
    for place in range(end, -1, -1):
        depth += (text[place] in ")}]") - (text[place] in "({[")
        if depth == 0:
            return text[place + 1 : end]
    return text[:end]


def _power_refusal(text: str) -> str:
    """Refuses a power in an exponent where all of it is numbers, three powers deep whatever they are, and powers of
    powers whose exponents multiply to more than MAX_COMBINED_POWER."""
    for exponent in exponents(text):
        inner = exponents(exponent)
        if any("^" in deeper for deeper in inner):
            return "a power tower"
        if inner and not re.search("[a-zA-Z]", re.sub(r"\\(?:left|right|cdot|times)", "", exponent)):
            return "a power tower of numbers"
    return "a power of powers" if _combined_power(text) > MAX_COMBINED_POWER else ""


def _combined_power(text: str) -> int:
    """The largest product of exponents that apply to one another: 6 for (x^2)^3, 3 for x^2 y^3."""
    powers = {match.start(): int(match[1]) for match in _NUMERIC_POWER.finditer(text)}
    largest = [1]  # in each group that is open, the outermost first
    for place, character in enumerate(text):
        if character in "({[":
            largest.append(1)
            continue
        closes = character in ")}]"
        inner = largest.pop() if closes and len(largest) > 1 else largest[0] if closes else 1
        largest[-1] = max(largest[-1], inner * powers.get(place, 1))
    return max(largest)


def exponents(text: str) -> list[str]:
    """The text of every exponent: its braces' or parentheses' content, or else up to the next space, sign or end."""
    return [_exponent(text[match.end() :].lstrip()) for match in re.finditer(r"\^", text)]


def _exponent(rest: str) -> str:
    if rest[:1] not in ("{", "("):
        return re.split(r"[\s+*/,;=)}\]-]", rest.removeprefix("-"), maxsplit=1)[0]
    depth = 0
    for place, character in enumerate(rest):
        depth += (character in "({") - (character in ")}")
        if depth == 0:
            return rest[1:place]
    return rest[1:]
