"""A reward function named pkg.module:function: found, and called as verl calls it."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from klreg_verl.experiment.own_code import own_modules

Function = Callable[..., Any]
OURS = "data_prep.rewards:compute_score"


def load(name: str, *folders: Path | str) -> Function:
    """The function of this name; its module is looked for in `folders`, then among installed packages.

    Raises ValueError where it is not there or does not import.
    """
    module, _, function = name.partition(":")
    try:
        with _modules_in(folders):
            imported = importlib.import_module(module)
    except Exception as error:  # a user's module can fail in any way
        places = ", ".join([*map(str, folders), "installed packages"])
        raise ValueError(
            f"{name}: cannot import {module!r} ({type(error).__name__}: {error}). It is looked for in: {places}. Give "
            "pkg.module:function."
        ) from error
    found = getattr(imported, function, None)
    if not callable(found):
        where = f"{module!r} has no function {function!r} in {imported.__file__}"
        raise ValueError(f"{name}: {where}. Give pkg.module:function; an installed module of the same name goes first.")
    return found


def call(function: Function, /, *folders: Path | str, **given: Any) -> Any:
    """What the function returns, awaited where it is asynchronous; `folders` are there for what it imports late."""
    with _modules_in(folders):
        found = function(**given)
        return asyncio.run(_awaited(found)) if inspect.isawaitable(found) else found


@contextlib.contextmanager
def _modules_in(folders: tuple[Path | str, ...]) -> Iterator[None]:
    """The first folder comes first."""
    with contextlib.ExitStack() as opened:
        for folder in reversed(folders):
            opened.enter_context(own_modules(folder))
        yield


async def _awaited(found: Any) -> Any:
    return await found
