"""Running `klreg` as a user does, as a process, and looking at what it leaves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest

from klreg_verl.experiment import plan, recipe
from launch import inputs

ROOT = Path(__file__).resolve().parents[2]
QUICK = ROOT / "recipes" / "quickstart.yaml"


@dataclass(frozen=True)
class Lab:
    """A runs folder, and the command."""

    runs: Path
    cache: Path

    @property
    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("KLREG_", "VERL_", "RAY_"))}
        return {**kept, "KLREG_RUNS": str(self.runs), "KLREG_CACHE": str(self.cache), "COLUMNS": "160"}

    def start(self, *arguments: str | Path, cwd: Path = ROOT, **variables: str) -> subprocess.Popen[str]:
        """`klreg ...` as a process of its own."""
        command = [sys.executable, "-m", "klreg_verl.cli", *map(str, arguments)]
        output = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=cwd, env=self.environment | variables, stdout=output, stderr=subprocess.STDOUT, text=True
        )

    def klreg(self, *arguments: str | Path, cwd: Path = ROOT, timeout: float = 2400) -> str:
        """Run to the end; the output, which must come with exit code 0."""
        return finish(self.start(*arguments, cwd=cwd), timeout)

    def evaluate(self, *arguments: str | Path) -> tuple[list[dict[str, Any]], str]:
        """`klreg eval`: the records, and what was said on the way."""
        command = [sys.executable, "-m", "klreg_verl.cli", "eval", *map(str, arguments), "--json"]
        done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout), done.stderr

    def folder(self, recipe: str, arm: str, task: str = "palindrome", seed: int = 1) -> Path:
        return self.runs / recipe / arm / task / f"seed{seed}"


def finish(process: subprocess.Popen[str], timeout: float = 2400) -> str:
    """Wait for a command; fail with its output unless it succeeded."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()
        output, _ = process.communicate(timeout=60)
        pytest.fail(f"not finished after {timeout} s:\n{output[-4000:]}")
    assert process.returncode == 0, output[-4000:]
    return output


def metrics(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, a dictionary per step."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def remains(before: Mapping[int, str]) -> list[str]:
    """Processes of the stack that were not there before."""
    now = stack_processes()
    return [text for pid, text in now.items() if pid not in before]


MARKS = ("raylet", "gcs_server", "ray::", "VLLM::", "guardian.py", "verl_hooks.main")


def stack_processes() -> dict[int, str]:
    """Ray, vLLM and driver processes by pid, below this process or left without a parent; nobody else's studies."""
    return {process.pid: command(process)[:120] for process in psutil.process_iter() if is_ours(process)}


def is_ours(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        above = process.parents() if is_marked(process) else None
        if above is not None:
            mine = any(one.pid == os.getpid() for one in above)
            return mine or all(one.pid == 1 or is_marked(one) for one in above)
    return False


def is_marked(process: psutil.Process) -> bool:
    return any(mark in command(process) for mark in MARKS)


def command(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def build_inputs(study: Path, lab: Lab) -> Path:
    """A study's data and model, which a plain verl command finds but does not build; the model's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KLREG_CACHE", str(lab.cache))
        return inputs.prepare(plan.expand(recipe.load(study))[0], lab.runs, print).model


def plain_verl(script: str, folder: Path, lab: Lab) -> subprocess.Popen[bytes]:
    """The stock command that `klreg plan --as-verl` prints, in a shell, on a Ray of its own."""
    folder.mkdir()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = lab.environment | {"PATH": path, "RAY_AUTH_MODE": "disabled"}
    with open(folder / "log", "w") as output:  # a pipe that nobody reads fills up and stops verl
        return subprocess.Popen(["bash", "-euc", script], cwd=folder, env=environment, stdout=output, stderr=output)


def shared_segments() -> set[str]:
    return {str(path) for path in Path("/dev/shm").iterdir()}


def samples(folder: Path, step: int) -> pd.DataFrame:
    return pd.read_parquet(folder / "samples" / f"step_{step:06d}.parquet").sort_values(["group", "sample"])


def log(folder: Path) -> str:
    return (folder / "latest" / "log").read_text()


def kill_9(what: str, before: Mapping[int, str]) -> None:
    os.kill(next(pid for pid, text in stack_processes().items() if pid not in before and what in text), signal.SIGKILL)


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str], attempt: int) -> None:
    """Until the attempt has written the step; one that resumes first takes back what an earlier one had written."""
    if attempt > 1:
        wait_for(lambda: (folder / "attempts" / str(attempt) / "discarded.jsonl").exists(), process)
        wait_for(lambda: last_step(folder) < step, process)
    wait_for(lambda: last_step(folder) >= step, process)


def last_step(folder: Path) -> int:
    lines = metrics(folder) if (folder / "metrics.jsonl").exists() else []
    return lines[-1]["step"] if lines else 0


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], timeout: float = 1800) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and process.poll() is None:
        if condition():
            return
        time.sleep(0.1)
    process.kill()
    pytest.fail(f"not reached:\n{process.communicate()[0][-4000:]}")


def wait_until_gone(before: dict[int, str], timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while remains(before) and time.monotonic() < deadline:
        time.sleep(0.5)
    left = remains(before)
    for pid in set(stack_processes()) - set(before):
        psutil.Process(pid).kill()
    assert not left
