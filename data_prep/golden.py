r"""The right answer of a mathematics item as one string, whatever type its file gives it.

Published files hold numbers (AMC: 142.0), lists of alternatives with a newline at their end (Minerva), lists of one
with dollar signs around it (OlympiadBench), LaTeX, nulls and empty strings. verl concatenates files and fails where a
column is text in one and a number in another, so all of them become text:

    142.0 -> 142        0.25 -> 0.25        "$2$" -> 2        "\\boxed{2}" -> 2        None, "", nan, [] -> no answer
    ["9.6\n"] -> 9.6    ["a", "b"], or that as JSON -> ["a", "b"], JSON: any of them is right
    "... so 3+4=7.\n#### 7" -> 7 (GSM8K)    "The answer is $5$." -> 5    "5." -> 5

Text that goes on for a sentence is a solution and no answer, and a control character is a slip ("\frac" in JSON is a
form feed and "rac"): such a row is refused.
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

_SAID = re.compile(r"(?:so |thus |therefore,? )?(?:the )?(?:final )?answer(?: is|:)\s*(.+)", re.IGNORECASE | re.DOTALL)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_WORD = re.compile(r"[^\W\d_]{2,}")
_SENTENCE = re.compile(r"[.!?]\s+\S")
PROSE_WORDS = 6
"""Words of at least two letters that make an answer prose. An answer with as many has formulas and is one sentence:
"$f(x)=ax+b$, where $b$ is an arbitrary integer, and $a$ ..." (OlympiadBench)."""


def golden_text(value: Any) -> str:
    """The ground truth as text, a JSON list where there are several different right answers, "" for none.

    Raises ValueError for a type that no answer has (a mapping, bytes), for prose, and for control characters.
    """
    given = list(_flat(value))
    answers = list(dict.fromkeys(text for text in map(_one, given) if text))
    for text in (*(one for one in given if isinstance(one, str) and _CONTROL.search(one)), *answers):
        if wrong := no_answer(text):
            raise ValueError(wrong)
    if not answers:
        return ""
    return answers[0] if len(answers) == 1 else json.dumps(answers, ensure_ascii=False)


def no_answer(text: str) -> str | None:
    """Why a text cannot be an answer, None if it can."""
    if "####" in text:
        return f"{text[:60]!r} is a solution with its answer after ####, not the answer: give that alone"
    if found := _CONTROL.search(text):
        return f"{text[:60]!r} has the control character {found[0]!r}, where a backslash may have been lost"
    if len(_WORD.findall(_COMMAND.sub(" ", text))) >= PROSE_WORDS and (_SENTENCE.search(text) or "$" not in text):
        return f"{text[:60]!r} is prose, and no response is equal to it: give the answer alone"
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"{text[:60]!r} has half of a character (a lone surrogate)"
    return None


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
    text = text.rpartition("####")[2].strip()
    inner = _unboxed(text)
    if inner == text and (said := _SAID.fullmatch(text)):
        inner = said.group(1).strip()
    if inner == text and text.endswith(".") and not text.endswith(".."):
        inner = text[:-1]
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
