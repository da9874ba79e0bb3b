"""Running `klreg` as a user does, as a process, and looking at what it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]


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

    def klreg(self, *arguments: str | Path, cwd: Path = ROOT, timeout: float = 1200) -> str:
        """Run to the end; the output, which must come with exit code 0."""
        return finish(self.start(*arguments, cwd=cwd), timeout)

    def folder(self, recipe: str, arm: str, task: str = "palindrome", seed: int = 1) -> Path:
        return self.runs / recipe / arm / task / f"seed{seed}"


def finish(process: subprocess.Popen[str], timeout: float = 1200) -> str:
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


def stack_processes() -> dict[int, str]:
    """Ray, vLLM and driver processes of this machine by pid."""
    marks = ("raylet", "gcs_server", "ray::", "VLLM::", "guardian.py", "verl_hooks.main")
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        text = " ".join(process.info["cmdline"] or [])
        if any(mark in text for mark in marks):
            found[process.pid] = text[:120]
    return found
