"""Run a function on a module right after it is imported, or at once if it already was.

Plugins load while verl itself is half imported, so they cannot import what they want to change. This waits for it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

Callback = Callable[[ModuleType], None]


class _CallbackLoader(importlib.abc.Loader):
    """The module's own loader, followed by the callbacks."""

    def __init__(self, loader: importlib.abc.Loader, waiting: dict[str, list[Callback]]) -> None:
        self._loader = loader
        self._waiting = waiting

    def __getattr__(self, name: str):  # resources, source and the like stay the original loader's
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        for callback in self._waiting.get(module.__name__, ()):
            callback(module)
        self._waiting.pop(module.__name__, None)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds only modules that somebody waits for, through the finders behind it."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Callback]] = {}
        self._looking: set[str] = set()

    def find_spec(self, name, path=None, target=None):
        if name not in self.waiting or name in self._looking:
            return None
        self._looking.add(name)  # the look-up below must not find us again
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._looking.discard(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _CallbackLoader(spec.loader, self.waiting)
        return spec


_finder = _Finder()


def after_import(name: str, callback: Callback) -> None:
    """Call `callback(module)` once, when module `name` has been executed in this process.

    Args:
        name: dotted module name.
        callback: receives the module; its exceptions reach whoever imports the module.

    Raises:
        RuntimeError: the module is being imported right now, so that nothing would ever call back.
    """
    module = sys.modules.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        callback(module)
        return
    if module is not None and not isinstance(module.__loader__, _CallbackLoader):
        raise RuntimeError(f"{name} is half imported: too late to wait for it. Import klreg_verl's plugin before it.")
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    _finder.waiting.setdefault(name, []).append(callback)
