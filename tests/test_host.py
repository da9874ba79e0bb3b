"""What a machine has besides GPUs: a job's memory by its cgroups, and what Triton compiles with."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from launch import host


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """100 GB free; memory_available under a /proc/self/cgroup of these lines and these limit files."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100))

    def available(lines: str, **limits: str) -> int:
        (tmp_path / "cgroup").write_text(lines)
        for name, text in limits.items():
            file = tmp_path / "fs" / name.replace("__", "/").replace("memory_", "memory.")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")
        return host.memory_available(tmp_path / "cgroup", tmp_path / "fs")

    return available


def test_a_jobs_limit_holds_in_version_2_wherever_above_the_process_it_is(machine):
    slurm = {"slurm__job_7__step_0__memory_max": "max", "slurm__job_7__memory_max": "40"}
    assert machine("0::/slurm/job_7/step_0/task_0\n", **slurm) == 40
    assert machine("0::/elsewhere\n") == 100
    assert machine("0::/../../task_0\n", memory_max="30") == 30  # in a cgroup namespace only the root can be read


def test_a_jobs_limit_holds_in_version_1_and_no_limit_is_a_huge_number(machine):
    lines = "9:cpu,cpuacct:/slurm/job_7\n4:memory:/slurm/job_7\n0::/\n"
    none = {"memory__memory_limit_in_bytes": "9223372036854771712"}
    assert machine(lines, **none) == 100
    assert machine(lines, **none, memory__slurm__job_7__memory_limit_in_bytes="50") == 50


def test_a_machine_without_cgroups_has_what_is_free(machine, tmp_path: Path):
    assert machine("") == 100
    assert host.memory_available(tmp_path / "no such file", tmp_path) == 100


# ---------------------------------------------------------------------------------------------------- compiler


@pytest.fixture
def include(tmp_path: Path) -> Path:
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "Python.h").touch()
    return tmp_path / "include"


def program(path: Path) -> str:
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return str(path)


def test_triton_finds_its_compiler_by_cc_then_gcc_then_clang(tmp_path: Path, include: Path):
    place = {"PATH": str(tmp_path)}
    clang = program(tmp_path / "clang")
    assert host.check_compiler(place, include) == clang
    gcc = program(tmp_path / "gcc")
    assert host.check_compiler(place, include) == gcc
    assert host.check_compiler({**place, "CC": "clang"}, include) == clang


def test_no_compiler_and_no_headers_are_refused(tmp_path: Path, include: Path):
    with pytest.raises(ValueError, match=r"no C compiler \(gcc or clang on the PATH\).*apt-get install gcc"):
        host.check_compiler({"PATH": str(tmp_path)}, include)
    program(tmp_path / "gcc")
    with pytest.raises(ValueError, match=r"no C compiler \(icc on the PATH\)"):
        host.check_compiler({"PATH": str(tmp_path), "CC": "icc"}, include)
    with pytest.raises(ValueError, match=r"Python.h is not there.*apt-get install python3\.\d+-dev"):
        host.check_compiler({"PATH": str(tmp_path)}, tmp_path)


@pytest.mark.parametrize("name", ["CPATH", "C_INCLUDE_PATH"])
def test_headers_that_the_compiler_is_told_of_do(tmp_path: Path, include: Path, name: str):
    gcc = program(tmp_path / "gcc")
    told = {"PATH": str(tmp_path), name: f"/elsewhere:{include}"}
    assert host.check_compiler(told, tmp_path / "none") == gcc


def test_the_headers_are_looked_for_where_this_python_has_them(tmp_path: Path):
    program(tmp_path / "gcc")
    if not (host._include() / "Python.h").is_file():
        pytest.skip(f"{host._include()} has no Python.h")
    assert host.check_compiler({"PATH": str(tmp_path)}) == str(tmp_path / "gcc")


def test_a_tiny_model_gets_one_thread_and_a_larger_one_the_cores_shared_by_its_workers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    assert host.threads(905_000, workers=1) == 1
    assert host.threads(134_515_008, workers=1) == 6
    assert host.threads(134_515_008, workers=4) == 1  # 6 cores for four
    assert host.threads(134_515_008, workers=8) == 1
    assert host.threads(None, workers=2) == 3  # a model that is not counted is not tiny
