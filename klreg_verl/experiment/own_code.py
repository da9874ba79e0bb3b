"""A user's own modules (estimators, rewards, controllers), named in recipes as pkg.module:name.

Whoever plans a recipe runs the modules that it names: treat a recipe as code. Their folder is the last place where
Python looks, after the standard library and the installed packages, so a file beside a recipe never stands in for
another module: a torch.py there is not torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VARIABLE = "KLREG_MODULES"
"""The folder of a run's own modules, in the environment of every process of the run."""


@contextmanager
def own_modules(folder: Path | str | None = None) -> Iterator[None]:
    """Modules in `folder` (default: the current one) can be imported, as those beside a recipe can in its runs."""
    place = str(Path.cwd() if folder is None else folder)
    sys.path.append(place)
    try:
        yield
    finally:
        del sys.path[len(sys.path) - 1 - sys.path[::-1].index(place)]


def add_from_environment() -> None:
    """In a process of a run: its own modules can be imported from now on."""
    folder = os.environ.get(VARIABLE)
    if folder and folder not in sys.path:
        sys.path.append(folder)
