"""Reading the answer out of a response. Linear in the length of the text, whatever is in it."""

import re
from typing import Literal

AnswerFormat = Literal["plain", "boxed", "answer", "hashes", "line"]
"""The whole final text; the last balanced \\boxed{...}; what stands between the last <answer> and </answer>; what
follows the last "####" (GSM8K); what follows the last "Answer:" that begins a line (DAPO)."""
ASKED = ("boxed", "hashes", "line", "answer")
"""Forms that a prompt can ask for, in the order in which they are looked for where nothing says which."""
CLOSING_MARK = "</think>"
OPENING_MARK = "<think>"
_BOX = r"\\{1,2}(?:boxed|fbox)\s*\{"
_BOX_OPENING = re.compile(_BOX)
_BRACES = re.compile(rf"{_BOX}|\\.|[{{}}]", re.DOTALL)
"""A box's opening, an escaped character (skipped), a brace; matched from left to right."""
_LINE = re.compile(r"^[ \t*_>]*answer[ \t*_]*[:：](?P<answer>[^\n]*)", re.IGNORECASE | re.MULTILINE)
_NAMED: dict[AnswerFormat, re.Pattern[str]] = {
    "boxed": re.compile(r"\\(?:boxed|fbox)\b"),
    "hashes": re.compile(r"####"),
    "line": re.compile(r"answer:", re.IGNORECASE),
    "answer": re.compile(r"</?answer>"),
}


def final_text(response: str) -> str:
    """What follows the last </think>, or all of it without one, stripped of white space.

    Only the closing mark is looked for: chat templates of reasoning models put the opening one into the prompt.
    """
    return response.rpartition(CLOSING_MARK)[2].strip()


def is_truncated(response: str, *, thinks: bool = False) -> bool:
    """Whether the response ended inside its reasoning: the last <think> is not closed.

    `thinks` says that the prompt opened the reasoning, so that a response without </think> never left it.
    """
    if thinks and CLOSING_MARK not in response:
        return True
    _, opened, reasoning = response.rpartition(OPENING_MARK)
    return bool(opened) and CLOSING_MARK not in reasoning


def extract(text: str, answer_format: AnswerFormat) -> str | None:
    """The answer in final text, None if the form is not there."""
    if answer_format == "plain":
        return text
    return {"boxed": last_box, "answer": last_tag, "hashes": last_hashes, "line": last_line}[answer_format](text)


def asked_form(prompt: str) -> AnswerFormat | None:
    """The form that a prompt asks for: of those that it names the last; None where it names none."""
    named = {form: max((found.end() for found in mark.finditer(prompt)), default=-1) for form, mark in _NAMED.items()}
    last = max(named, key=lambda form: named[form])
    return last if named[last] >= 0 else None


def last_hashes(text: str) -> str | None:
    """The rest of the line after the last "####"."""
    _, mark, rest = text.rpartition("####")
    return _bare(rest.partition("\n")[0]) if mark else None


def last_line(text: str) -> str | None:
    """The rest of the last line that begins with "Answer:"."""
    found = _LINE.findall(text)
    return _bare(found[-1]) if found else None


def _bare(text: str) -> str:
    """Without a full stop at the end, and without stars and dollar signs around the whole."""
    return text.strip().removesuffix(".").strip("*$ \t\r")


def last_box(text: str) -> str | None:
    """The content of the last \\boxed{...} or \\fbox{...} whose braces balance, outermost if boxes are nested.

    Boxes inside it are opened: \\boxed{x+\\boxed{5}} gives x+5. Escaped braces do not count. None without a box.
    """
    first = _BOX_OPENING.search(text)
    span = _last_span(text, first.start()) if first else None
    return open_boxes(text[slice(*span)]).strip() if span else None


def _last_span(text: str, begin: int) -> tuple[int, int] | None:
    """Start and end of the content of the box that closes last: an outer box closes after those in it."""
    opened: list[int | None] = []
    last = None
    for token in _BRACES.finditer(text, begin):
        if token[0] == "}":
            start = opened.pop() if opened else None
            last = last if start is None else (start, token.start())
        elif token[0] == "{":
            opened.append(None)
        elif _BOX_OPENING.fullmatch(token[0]):
            opened.append(token.end())
    return last


def open_boxes(text: str) -> str:
    """The text with every balanced box replaced by its content."""
    if not _BOX_OPENING.search(text):
        return text
    pieces: list[str] = []
    opened: list[int | None] = []
    done = 0
    for token in _BRACES.finditer(text):
        is_box = _BOX_OPENING.fullmatch(token[0]) is not None
        if is_box or token[0] == "{":
            opened.append(len(pieces) if is_box else None)
        closes_box = token[0] == "}" and bool(opened) and opened.pop() is not None
        if is_box or closes_box:
            pieces.append(text[done : token.start()])
            done = token.end()
    return "".join([*pieces, text[done:]])


def last_tag(text: str) -> str | None:
    """What stands between the last </answer> and the <answer> before it, stripped; None without such a pair."""
    end = text.rfind("</answer>")
    begin = text.rfind("<answer>", 0, end) if end >= 0 else -1
    return text[begin + len("<answer>") : end].strip() if begin >= 0 else None
