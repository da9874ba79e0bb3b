"""Modules beside a recipe are found, inside only, and the first on the path."""

import importlib
import sys
from pathlib import Path

import pytest

from klreg_verl.experiment.own_code import own_modules


def test_a_module_of_the_folder_is_found_inside_and_the_path_is_as_it_was_after(tmp_path: Path):
    (tmp_path / "klreg_own_code_probe.py").write_text("ANSWER = 42")
    before = list(sys.path)
    with own_modules(tmp_path):
        assert importlib.import_module("klreg_own_code_probe").ANSWER == 42
    assert sys.path == before
    with pytest.raises(ImportError):
        importlib.import_module("klreg_own_code_probe_2")


def test_the_current_folder_is_meant_where_none_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    context = own_modules()
    monkeypatch.chdir(tmp_path)
    with context:
        assert sys.path[0] == str(tmp_path)


def test_an_error_inside_leaves_the_path_as_it_was(tmp_path: Path):
    before = list(sys.path)
    with pytest.raises(RuntimeError), own_modules(tmp_path):
        raise RuntimeError
    assert sys.path == before
