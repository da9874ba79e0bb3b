"""setup_gpu.sh and klreg.def, as far as a machine without a GPU can try them: commands, refusals, files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.gpu import DRIVER

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "launch/env/setup_gpu.sh"
DEFINITION = (ROOT / "launch/env/klreg.def").read_text()


def setup(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=os.environ | variables)


@pytest.fixture
def driver(tmp_path: Path):
    """A PATH whose nvidia-smi tells this driver."""

    def make(version: str) -> str:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\necho {version}\n")
        program.chmod(0o755)
        return f"{tmp_path}{os.pathsep}{os.environ['PATH']}"

    return make


def installations(*arguments: str) -> list[str]:
    done = setup("--dry-run", "--python", sys.executable, *arguments)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if " pip install " in line]


def test_the_lock_is_installed_as_it_is_and_nothing_is_resolved():
    builders, packages, wheel, project = installations("--flash-attn", "./wheel.whl")
    for part, line in {"builders": builders, "packages": packages}.items():
        assert "--require-hashes --no-build-isolation" in line and line.endswith(f"/{part}.txt")
    assert wheel.endswith("./wheel.whl") and project.endswith(f"--editable {ROOT}")
    assert all("--no-deps" in line for line in (builders, packages, wheel, project))
    assert "--no-build-isolation flash-attn==2.8.3" in installations("--flash-attn", "build")[2]


def test_without_flash_attn_it_says_what_recipes_need():
    done = setup("--dry-run", "--python", sys.executable)
    assert "recipes need attn_implementation sdpa and use_remove_padding false" in done.stdout
    assert not any("flash" in line for line in installations())


def test_no_driver_and_an_old_one_are_refused_before_anything_is_made(driver, tmp_path: Path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "uname", "head", "awk", "df"):
        found = next(folder for folder in os.environ["PATH"].split(os.pathsep) if (Path(folder) / name).exists())
        (tools / name).symlink_to(Path(found) / name)
    venv = tmp_path / "venv"
    done = setup("--venv", str(venv), "--python", sys.executable, PATH=str(tools))
    assert done.returncode == 1 and "nvidia-smi is not there" in done.stderr
    done = setup("--venv", str(venv), "--python", sys.executable, PATH=driver("550.144.03"))
    assert done.returncode == 1 and "driver is 550.144.03, CUDA 13 needs 580.65 or newer" in done.stderr
    done = setup("--venv", str(venv), "--python", sys.executable, PATH=driver("580.10.01"))  # of its first branch
    assert done.returncode == 1 and "driver is 580.10.01, CUDA 13 needs 580.65 or newer" in done.stderr
    assert DRIVER == (580, 65)  # as klreg run's
    done = setup("--venv", str(venv), "--python", sys.executable, PATH=driver("NVIDIA-SMI has failed"))
    assert done.returncode == 1 and "nvidia-smi does not answer" in done.stderr
    assert not venv.exists()


@pytest.fixture
def harmless(tmp_path: Path) -> str:
    """This Python without headers, as Debian's is where its -dev package is missing, and without venv and pip: a test
    whose refusal does not come must not install anything here."""
    python = tmp_path / "python3.12"
    cases = f"""case "$1 $2" in -m*) exit 9 ;; *include*) echo {tmp_path} ;; *) exec {sys.executable} "$@" ;; esac"""
    python.write_text(f"#!/bin/sh\n{cases}\n")
    python.chmod(0o755)
    return str(python)


@pytest.mark.skipif(shutil.disk_usage("/tmp").free < 30 * 2**30, reason="less than 30 GiB of disk")
def test_a_folder_whose_parents_are_not_there_is_measured_by_the_nearest_that_is(driver, harmless, tmp_path: Path):
    venv = tmp_path / "not" / "made" / "yet"
    done = setup("--venv", str(venv), "--python", harmless, PATH=driver("580.95.05"), CC="no-such-compiler")
    assert done.returncode == 1 and "cannot go on: there is no C compiler (no-such-compiler)" in done.stderr
    assert not (tmp_path / "not").exists()


def test_no_compiler_and_no_headers_are_refused_in_a_container_too(harmless, tmp_path: Path):
    program = tmp_path / "cc"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    done = setup("--container", "--python", harmless, CC=str(program))
    assert done.returncode == 1 and f"cannot go on: {tmp_path}/Python.h is not there" in done.stderr
    done = setup("--container", "--python", harmless, CC="no-such-compiler")
    assert done.returncode == 1 and "apt-get install gcc" in done.stderr


def test_it_ends_with_where_klreg_is_whatever_the_interpreter_is_called(tmp_path: Path):
    python = tmp_path / "python3.11"
    python.symlink_to(sys.executable)
    ask = "import sysconfig; print(sysconfig.get_path('scripts'))"  # Debian's own Python installs elsewhere
    scripts = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    done = setup("--dry-run", "--container", "--python", str(python))
    assert done.stdout.splitlines()[-1] == f"[setup] ready: {scripts}/klreg"
    done = setup("--dry-run", "--venv", "/v", "--python", sys.executable)
    assert done.stdout.splitlines()[-1] == "[setup] ready: /v/bin/klreg"


def test_bad_options_and_a_foreign_folder_are_refused(tmp_path: Path):
    assert "unknown option --frobnicate" in setup("--frobnicate").stderr
    assert "--venv needs a value" in setup("--venv").stderr
    assert "need Python 3.11 or 3.12" in setup("--dry-run", "--python", "/bin/false").stderr
    done = setup("--dry-run", "--venv", str(tmp_path), "--python", sys.executable)
    assert done.returncode == 1 and "exists and is no environment" in done.stderr


def test_the_definition_copies_what_there_is_and_runs_the_same_script():
    copied = re.findall(r"^    (\S+) /opt/klreg/\S+$", DEFINITION, re.MULTILINE)
    assert {"pyproject.toml", "klreg_verl", "data_prep", "launch", "recipes"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
    assert "/opt/klreg/launch/env/setup_gpu.sh --container" in DEFINITION
