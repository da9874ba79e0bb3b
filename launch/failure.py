"""What to tell a user when a run fails: the first error of a log that verl, Ray and vLLM wrote thousands of lines into.

The first, because a failure inside an agent loop shows up at the end only as "no materializable trajectories".
"""

from __future__ import annotations

import re
import signal
from pathlib import Path

TRACEBACK = "Traceback (most recent call last):"
_ACTOR = re.compile(r"^(\x1b\[\d+m)?\([^)]*pid=\d+[^)]*\)(\x1b\[0m)? ?")
_ERROR = re.compile(r"^[\w.]*(Error|Exception|Interrupt|Exit)\b.*")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def reason(log: Path, code: int | None) -> str:
    """One line: the first error that a traceback of the log ends in, or how the driver ended."""
    error = first_error(clean(log))
    return error or exit_reason(code)


def exit_reason(code: int | None) -> str:
    """An exit code in words."""
    if code is not None and code < 0:
        return f"the driver was killed by {signal.Signals(-code).name}"
    if code == 0:
        return "the driver ended before the last step, without an error"
    return f"the driver ended with exit code {code} and left no traceback"


def first_error(lines: list[str]) -> str | None:
    """The last line of the first traceback."""
    starts = [index for index, line in enumerate(lines) if TRACEBACK in line]
    if not starts:
        return None
    after = (line.strip() for line in lines[starts[0] + 1 :])
    return next((line for line in after if _ERROR.match(line)), None)


def first_traceback(lines: list[str], most: int = 25) -> list[str]:
    """The first traceback of a log, its end if it is long."""
    starts = [index for index, line in enumerate(lines) if TRACEBACK in line]
    if not starts:
        return []
    block = lines[starts[0] : starts[0] + 200]
    end = next((i for i, line in enumerate(block) if i and _ERROR.match(line.strip())), len(block) - 1)
    return block[: end + 1][-most:]


def clean(log: Path) -> list[str]:
    """The log's lines without Ray's "(Actor pid=..)" prefixes and colours."""
    if not log.is_file():
        return []
    text = log.read_text(errors="replace")
    return [_COLOUR.sub("", _ACTOR.sub("", line)) for line in text.splitlines()]


def excerpt(log: Path, last: int = 12) -> list[str]:
    """What to print under a failed run: the first traceback, or the last lines."""
    lines = clean(log)
    return first_traceback(lines) or lines[-last:]
