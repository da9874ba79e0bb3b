"""What the doctor found, kept on disk: whoever asks the same again waits for no enumeration, and imports no torch.

<KLREG_CACHE, or the user's cache folder>/verdicts/<key>.json, a file an answer. The key is a hash of the question, of
the source that answers it and of the versions below it, so that changed code answers anew. A file begins with the hash
of its content: one that is torn, damaged or under another name is as none. The cache is a convenience: a folder that
cannot be written is no error.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import klreg_verl
from klreg_verl.experiment.kl_settings import KLSpec

PACKAGE = Path(klreg_verl.__file__).parent
ANSWERING = ("core", "doctor", "experiment/kl_settings.py")
"""Files and folders whose source decides a verdict."""
BELOW = ("torch", "numpy")
"""Distributions whose version may."""


def kept(question: Mapping[str, Any], answer: Callable[[], str | None]) -> str | None:
    """The answer as it was kept, else computed and kept; what `answer` raises is not.

    `question`: all that the answer depends on beside the source, as JSON.
    """
    key = _hash(json.dumps({"source": _source(), **question}, sort_keys=True))
    place = _folder()
    found = None if place is None else _read(place / f"{key}.json", key)
    if found is not None:
        return found["answer"]
    value = answer()
    if place is not None:
        _write(place / f"{key}.json", json.dumps({"key": key, "answer": value}))
    return value


def about(kl: KLSpec, question: Mapping[str, Any], answer: Callable[[], str | None]) -> str | None:
    """`kept` for a KL block. Where the estimator is the user's own, whose source may be anywhere, nothing is kept."""
    return answer() if ":" in str(kl.estimator) else kept({"kl": asdict(kl), **question}, answer)


def _folder() -> Path | None:
    """None for a user without a home."""
    chosen = os.environ.get("KLREG_CACHE")
    users = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    place = Path(chosen).expanduser().resolve() if chosen else Path(users, "klreg_verl")
    return place / "verdicts" if place.is_absolute() else None


def _read(path: Path, key: str) -> dict[str, Any] | None:
    """None where it is not there, or is not what was written."""
    try:
        written, _, text = path.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    found: dict[str, Any] | None = json.loads(text) if written == _hash(text) else None
    return found if found and found["key"] == key else None


def _write(path: Path, text: str) -> None:
    """By a rename; without fsync, since a torn file is as none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(f"{_hash(text)}\n{text}", encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@functools.cache
def _source() -> str:
    """Hash of what answers."""
    places = [PACKAGE / name for name in ANSWERING]
    files = [file for place in places for file in (sorted(place.rglob("*.py")) if place.is_dir() else [place])]
    named = [f"{file.relative_to(PACKAGE)} {_hash(file.read_text(encoding='utf-8'))}" for file in files]
    return _hash("\n".join([*named, *map(_version, BELOW)]))


def _version(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return f"{name} absent"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
