"""Functions that wait for a module: on real modules, written for the test."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from klreg_verl.verl_hooks.post_import import after_import

WriteModule = Callable[[str, str], None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteModule:
    """Writes importable modules; afterwards they, and whatever waits, are forgotten."""
    modules, finders = set(sys.modules), list(sys.meta_path)
    monkeypatch.syspath_prepend(tmp_path)

    def write_module(name: str, text: str) -> None:
        path = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        importlib.invalidate_caches()

    yield write_module
    sys.meta_path[:] = finders
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def add(module: ModuleType) -> None:
    module.seen = [*getattr(module, "seen", []), module.value]


def test_a_function_runs_once_when_its_module_has_been_executed(write: WriteModule):
    write("later", "value = 1")
    after_import("later", add)
    assert "later" not in sys.modules
    assert importlib.import_module("later").seen == [1]
    assert importlib.import_module("later").seen == [1]


def test_of_an_imported_module_it_runs_at_once(write: WriteModule):
    write("before", "value = 2")
    module = importlib.import_module("before")
    after_import("before", add)
    assert module.seen == [2]


def test_several_wait_for_one_module_in_their_order(write: WriteModule):
    write("several", "value = 3")
    order: list[str] = []
    after_import("several", lambda module: order.append("first"))
    after_import("several", lambda module: order.append("second"))
    importlib.import_module("several")
    assert order == ["first", "second"]


def test_a_submodule_is_waited_for_and_its_package_is_left_alone(write: WriteModule):
    write("package.__init__", "value = 4")
    write("package.inner", "value = 5")
    after_import("package.inner", add)
    assert not hasattr(importlib.import_module("package"), "seen")
    from package.inner import seen

    assert seen == [5]


def test_who_imports_a_name_from_the_module_gets_the_changed_one(write: WriteModule):
    write("changed", "def f():\n    return 'old'")
    write("reader", "from changed import f")
    after_import("changed", lambda module: setattr(module, "f", lambda: "new"))
    assert importlib.import_module("reader").f() == "new"


def test_looking_whether_a_module_exists_loses_nothing(write: WriteModule):
    write("looked", "value = 6")
    after_import("looked", add)
    for _ in range(2):
        spec = importlib.util.find_spec("looked")
        assert spec is not None
        assert "value = 6" in spec.loader.get_source("looked")  # the loader still answers like its own
    assert importlib.import_module("looked").seen == [6]


def test_after_a_failed_import_the_next_one_is_still_waited_for(write: WriteModule, tmp_path: Path):
    write("flaky", "raise OSError('first')")
    after_import("flaky", add)
    with pytest.raises(OSError, match="first"):
        importlib.import_module("flaky")
    write("flaky", "value = 7  # a text of another length, so that no stale bytecode is used")
    assert importlib.import_module("flaky").seen == [7]


def test_a_functions_exception_reaches_whoever_imports_every_time(write: WriteModule):
    write("refused", "value = 8")

    def refuse(module: ModuleType) -> None:
        raise ValueError("no")

    after_import("refused", refuse)
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            importlib.import_module("refused")
    assert "refused" not in sys.modules


def test_waiting_for_a_module_that_does_not_exist_changes_nothing(write: WriteModule):
    after_import("klreg_no_such_module", add)
    with pytest.raises(ModuleNotFoundError, match="klreg_no_such_module"):
        importlib.import_module("klreg_no_such_module")


def test_a_half_imported_module_is_refused_since_nothing_would_call_back(write: WriteModule):
    write(
        "half",
        "from klreg_verl.verl_hooks.post_import import after_import\nafter_import('half', lambda module: None)\n",
    )
    with pytest.raises(RuntimeError, match="half is half imported: too late to wait for it"):
        importlib.import_module("half")


def test_a_function_may_wait_for_the_module_it_was_given(write: WriteModule):
    write("again", "value = 9")
    after_import("again", lambda module: after_import("again", add))
    assert importlib.import_module("again").seen == [9]
