r"""The right answer of a mathematics item as one string, whatever type its file gives it.

Published files hold numbers (AMC: 142.0), lists of alternatives with a newline at their end (Minerva), lists of one
with dollar signs around it (OlympiadBench), LaTeX, nulls and empty strings. verl concatenates files and fails where a
column is text in one and a number in another, so all of them become text:

    142.0 -> 142        0.25 -> 0.25        "$2$" -> 2        "\\boxed{2}" -> 2        None, "", nan, [] -> no answer
    ["9.6\n"] -> 9.6    ["a", "b"], or that as JSON -> ["a", "b"], JSON: any of them is right
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any

NO_ANSWER = frozenset({"", "None", "null", "nan", "NaN"})
_WRAPPED = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (r"\$\$([^$]*)\$\$", r"\$([^$]*)\$", r"\\\(((?:(?!\\\)).)*)\\\)", r"\\\[((?:(?!\\\]).)*)\\\]")
)


def golden_text(value: Any) -> str:
    """The ground truth as text, a JSON list where there are several different right answers, "" for none.

    Raises ValueError for a type that no answer has (a mapping, bytes).
    """
    answers = list(dict.fromkeys(text for text in map(_one, _flat(value)) if text))
    if not answers:
        return ""
    return answers[0] if len(answers) == 1 else json.dumps(answers, ensure_ascii=False)


def alternatives(ground_truth: Any) -> list[str]:
    """The right answers of a row: the texts of a JSON list of strings, also of one in another, or the one that is
    given, of any type; none for None and for a mapping, whose keys are no answers."""
    if ground_truth is None:
        return []
    if isinstance(ground_truth, str):
        listed = _listed(ground_truth)
        return alternatives(listed) if listed else [ground_truth]
    if isinstance(ground_truth, Mapping):
        return []
    if isinstance(ground_truth, Iterable) and not isinstance(ground_truth, bytes):
        return [text for entry in ground_truth for text in alternatives(entry)]
    return [str(ground_truth)]


def _flat(value: Any) -> Iterator[Any]:
    several = (_listed(value) or value) if isinstance(value, str) else value
    if isinstance(several, list | tuple):
        for item in several:
            yield from _flat(item)
    else:
        yield value


def _one(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "" if value is None else str(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float | Decimal):
        return _number(Decimal(repr(value)) if isinstance(value, float) else value)
    if isinstance(value, str):
        return _bare(value)
    raise ValueError(f"a {type(value).__name__} is no answer; text, a number, or a list of them is")


def _number(value: Decimal) -> str:
    """Without exponent and without a fraction of zeros: 142.0 -> 142."""
    if not value.is_finite():
        return ""
    text = format(value, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def _bare(text: str) -> str:
    """Without white space, dollar signs or a box around the whole."""
    text = text.strip()
    inner = _unboxed(text)
    for pattern in _WRAPPED:
        if inner == text and (found := pattern.fullmatch(text)):
            inner = found.group(1)
    if inner != text:
        return _bare(inner)
    return "" if text in NO_ANSWER else text


def _unboxed(text: str) -> str:
    """What is inside \\boxed{...}, if that is all of the text and its braces are balanced."""
    if not (text.startswith(r"\boxed{") and text.endswith("}")) or text.endswith("\\}"):
        return text
    inner, depth = text[7:-1], 0
    for before, character in zip("x" + inner, inner, strict=False):
        depth += 0 if before == "\\" else {"{": 1, "}": -1}.get(character, 0)
        if depth < 0:
            return text
    return inner if depth == 0 else text


def _listed(text: str) -> list[str]:
    """The texts of a JSON list of strings; nothing for any other text."""
    if text.lstrip()[:1] != "[":
        return []
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return []
    return found if isinstance(found, list) and all(isinstance(item, str) for item in found) else []


def is_number(text: str) -> bool:
    """Whether an answer is a plain decimal number."""
    return bool(re.fullmatch(r"-?\d+(\.\d+)?", text)) and math.isfinite(float(text))
