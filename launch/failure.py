"""What to tell a user when a run fails: the first error of a log that verl, Ray and vLLM wrote thousands of lines into.

The first, because a failure inside an agent loop shows up at the end only as "no materializable trajectories".
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from pathlib import Path

from klreg_verl.verl_hooks import names
from launch.session import End

TRACEBACK = "Traceback (most recent call last):"
_STARTS = (TRACEBACK, "raised in its creation task", "Unhandled error (suppress")
"""What comes before the frames; the latter two are Ray's."""
_IGNORED = "Exception ignored in"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_SOURCE = re.compile(r"^\(((?:raylet|autoscaler|[^()]*\bpid=\d+)[^()]*)\) ?")
_VLLM = re.compile(r"^(?:CRITICAL|ERROR|WARNING|INFO|DEBUG) \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] ?")
_WRAPPER = re.compile(r"^[\w.]*RayTaskError\b|^ray::|^[\w.]*: The actor died because of an error raised in its")
"""How Ray hands on an error: the frames and the text of the process where it happened follow."""


@dataclass(frozen=True)
class Line:
    """One line of the log; several processes write into it."""

    source: str
    """Who wrote it, as "TaskRunner pid=12"; empty for the driver itself."""
    text: str


def reason(log: Path, end: End) -> str:
    """One line: why our hooks refused to start, the first error that a traceback of the log ends in, or how the driver
    ended; both if it was killed."""
    lines = clean(log)
    error = _refusal(lines) or first_error(lines)
    killed = end.lost or (exit_reason(end.code) if end.code < 0 else None)
    if killed:
        return killed + (f"; the first error in its log: {error}" if error else "")
    return error or exit_reason(end.code)


def _refusal(lines: list[Line]) -> str | None:
    return next((line.text.removeprefix(names.REFUSED) for line in lines if line.text.startswith(names.REFUSED)), None)


def exit_reason(code: int) -> str:
    """An exit code in words."""
    if code < 0:
        names = {number.value: number.name for number in signal.Signals}
        return f"the driver was killed by {names.get(-code, f'signal {-code}')}"
    if code == 0:
        return "the driver ended before the last step, without an error"
    return f"the driver ended with exit code {code} and left no traceback"


def first_error(lines: list[Line]) -> str | None:
    """The last line of the first traceback, unless it was cut off."""
    error = next(reversed(first_traceback(lines)), "")
    return error if error[:1].strip() and TRACEBACK not in error else None


def first_traceback(lines: list[Line]) -> list[str]:
    """The first traceback, down to its error; what other processes wrote meanwhile and Python ignored is left out."""
    for index, line in enumerate(lines):
        if any(start in line.text for start in _STARTS) and not _is_ignored(lines, index):
            return _to_error([other.text for other in lines[index:] if other.source == line.source])
    return []


def _is_ignored(lines: list[Line], index: int) -> bool:
    before = (line.text for line in reversed(lines[:index]) if line.source == lines[index].source)
    return next(before, "").startswith(_IGNORED)


def _to_error(texts: list[str]) -> list[str]:
    """Down to the first line that is not indented; where Ray hands on another process's error, to that error."""
    end = 0
    for index, text in enumerate(texts[1:], start=1):
        if text and not text[0].isspace():
            end = index
            if not _WRAPPER.match(text):
                break
    return texts[: end + 1] if end else texts


def clean(log: Path) -> list[Line]:
    """The log's lines without colours, Ray's "(Actor pid=..)" and vLLM's "ERROR 01-31 12:00:00 [core.py:1]"."""
    if not log.is_file():
        return []
    return [_line(_COLOUR.sub("", line)) for line in log.read_text(errors="replace").splitlines()]


def _line(text: str) -> Line:
    sources = []
    while found := _SOURCE.match(text):
        sources.append(found[1])
        text = text[found.end() :]
    return Line(source=" ".join(sources), text=_VLLM.sub("", text))


STOOD_STILL = "[klreg] the run stood still; the last lines of every process:"


def last_lines(lines: list[Line], each: int = 3) -> list[str]:
    """The last lines that each process wrote, under its name."""
    by_source: dict[str, list[str]] = {}
    for line in lines:
        if line.text.strip():
            by_source.setdefault(line.source or "driver", []).append(line.text)
    return [text for source, texts in by_source.items() for text in (f"{source}:", *(f"  {t}" for t in texts[-each:]))]


def excerpt(log: Path, last: int = 12, most: int = 25) -> list[str]:
    """What to print under a failed run: the last lines of every process where it stood still, else the end of the first
    traceback, or the last lines."""
    lines = clean(log)
    still = [place for place, line in enumerate(lines) if line.text == STOOD_STILL]
    if still:
        return [line.text for line in lines[still[-1] :]]
    return first_traceback(lines)[-most:] or [line.text for line in lines[-last:]]
