"""Run a function on a module right after it is imported, or at once if it already was.

Plugins load while verl itself is half imported, so they cannot import what they want to change. This waits for it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

Callback = Callable[[ModuleType], None]


class _CallbackLoader(importlib.abc.Loader):
    """The module's own loader, followed by the callbacks."""

    def __init__(self, loader: importlib.abc.Loader, callbacks: Sequence[Callback]) -> None:
        self._loader = loader
        self._callbacks = callbacks

    def __getattr__(self, name: str):  # resources, source and the like stay the original loader's
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        for callback in self._callbacks:
            callback(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds only modules that somebody waits for, through the finders behind it."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Callback]] = {}

    def find_spec(self, name, path=None, target=None):
        if name not in self.waiting:
            return None
        callbacks = self.waiting.pop(name)  # popped first: the look-up below must not find us again
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _CallbackLoader(spec.loader, callbacks)
        return spec


_finder = _Finder()


def after_import(name: str, callback: Callback) -> None:
    """Call `callback(module)` once, when module `name` has been executed in this process.

    Args:
        name: dotted module name.
        callback: receives the module; its exceptions reach whoever imports the module.
    """
    module = sys.modules.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        callback(module)
        return
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    _finder.waiting.setdefault(name, []).append(callback)
