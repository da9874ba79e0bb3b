"""A user's own modules (estimators, rewards), named in recipes as pkg.module:name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def own_modules(folder: Path | str | None = None) -> Iterator[None]:
    """Modules in `folder` (default: the current one) can be imported, as those beside a recipe can in its runs."""
    place = str(Path.cwd() if folder is None else folder)
    sys.path.insert(0, place)
    try:
        yield
    finally:
        sys.path.remove(place)
