"""What the tests of verl_hooks share: verl imported as a CPU run imports it, RunSpecs, and verl's composed settings."""

from __future__ import annotations

import functools
import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.settings import (
    EvalSpec,
    KLSpec,
    LoggingSpec,
    ModelSpec,
    ResourcesSpec,
    SamplesSpec,
    SaveSpec,
    TaskSpec,
    TrainSpec,
)
from klreg_verl.verl_hooks.overrides import Files, hydra_arguments

ROOT = Path(__file__).parent.parent
PLUGIN = "klreg_verl.verl_hooks.plugin"
STACK = ("verl", "vllm", "ray", "transfer_queue")
FILES = Files(train=Path("/d/train.parquet"), val=Path("/d/val.parquet"), model=Path("/m"), checkpoints=Path("/c"))
REVERSE = KLSpec(placement="reward", estimator="k1", follows="reverse", beta=0.1)
FORWARD = KLSpec(placement="loss", estimator="k3", follows="forward", beta=0.1)


def spec(**sections: Any) -> RunSpec:
    """A small run; sections replace the defaults."""
    given = {
        "recipe": "study",
        "question": "Does it?",
        "root": "/r",
        "arm": "arm",
        "task_name": "palindrome",
        "seed": 7,
        "model": ModelSpec(path="tiny"),
        "task": TaskSpec(builtin="palindrome"),
        "train": TrainSpec(max_prompt_tokens=64, max_response_tokens=32),
        "kl": KLSpec(),
        "eval": EvalSpec(),
        "save": SaveSpec(),
        "samples": SamplesSpec(),
        "logging": LoggingSpec(),
        "resources": ResourcesSpec(),
    }
    return RunSpec(**(given | sections))


def need_stack() -> None:
    """Skip, with the reason, where the training stack is not installed."""
    missing = [name for name in STACK if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (make setup)")


@functools.cache
def import_verl() -> None:
    """verl in this process, on the platform that tests/conftest.py chose."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from verl.plugin.platform import get_platform

    expected = "PlatformCPU" if os.environ.get("VERL_PLATFORM") == "cpu" else "PlatformCUDA"
    assert type(get_platform()).__name__ == expected


def environment(**variables: str) -> dict[str, str]:
    """Of a process of its own: ours, nothing of a run's, the plugin reachable whether or not it is installed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KLREG_", "VERL_", "RAY_"))}
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    installed = any(point.value == PLUGIN for point in entry_points(group="verl.plugins"))
    reach = {} if installed else {"VERL_USE_EXTERNAL_MODULES": PLUGIN}
    return {**kept, "PYTHONPATH": python_path, **reach, **variables}


def run_python(code: str, **variables: str) -> str:
    """Output of `python -c code` in its own process, which must succeed."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment(**variables), capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_workers(script: Path, folder: Path, workers: int) -> list[dict[Any, Any]]:
    """What `script FOLDER RANK WORKERS`, one process per worker, left in result_<rank>.pt."""
    import torch

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    variables = {"VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cuda", "OMP_NUM_THREADS": "1", "MASTER_PORT": port}
    logs = [open(folder / f"log_{rank}", "w") for rank in range(workers)]
    commands = [[sys.executable, str(script), str(folder), str(rank), str(workers)] for rank in range(workers)]
    processes = [
        subprocess.Popen(command, env=environment(**variables), stdout=log, stderr=log)
        for command, log in zip(commands, logs, strict=True)
    ]
    try:
        codes = [process.wait(timeout=1500) for process in processes]
    finally:
        for process, log in zip(processes, logs, strict=True):
            process.kill()
            log.close()
    assert codes == [0] * workers, (folder / "log_0").read_text()[-3000:]
    return [torch.load(folder / f"result_{rank}.pt", weights_only=False) for rank in range(workers)]


def compose(values: Mapping[str, Any] = {}, extra: Sequence[str] = ()) -> Any:  # noqa: B006
    """verl's PPO settings with `values`, through the arguments that its command line would get."""
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=[*hydra_arguments(values), *extra])
