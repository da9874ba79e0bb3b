"""Modules beside a recipe are found, inside only, and the last on the path."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from klreg_verl.experiment import own_code
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
        assert sys.path[-1] == str(tmp_path)


def test_an_error_inside_leaves_the_path_as_it_was(tmp_path: Path):
    before = list(sys.path)
    with pytest.raises(RuntimeError), own_modules(tmp_path):
        raise RuntimeError
    assert sys.path == before


def test_a_file_with_an_installed_modules_name_is_not_run(tmp_path: Path):
    """Both directions: colorsys (standard library) and yaml (installed) are theirs, a free name is the user's."""
    for name in ("colorsys", "yaml", "klreg_own_code_probe_3"):
        (tmp_path / f"{name}.py").write_text("WHOSE = 'the user'")
    code = (
        "from klreg_verl.experiment.own_code import own_modules\n"
        f"with own_modules({str(tmp_path)!r}):\n"
        "    import colorsys, yaml, klreg_own_code_probe_3\n"
        "print([getattr(m, 'WHOSE', None) for m in (colorsys, yaml, klreg_own_code_probe_3)])"
    )
    shown = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[None, None, 'the user']"


def test_a_process_of_a_run_finds_the_folder_that_its_environment_names(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    own_code.add_from_environment()
    assert str(tmp_path) not in sys.path
    monkeypatch.setenv(own_code.VARIABLE, str(tmp_path))
    own_code.add_from_environment()
    own_code.add_from_environment()
    assert sys.path[-1] == str(tmp_path)
    assert sys.path.count(str(tmp_path)) == 1
