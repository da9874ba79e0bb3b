"""Everything that can be known to go wrong before Ray starts. `klreg run` checks it; `--dry-run` stops after it."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.cache import options_from
from data_prep.check import check_model, check_task
from klreg_verl.experiment import fit
from klreg_verl.experiment.own_code import own_modules
from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.store import RunFolder, run_folder
from klreg_verl.verl_hooks import checkpoints
from klreg_verl.verl_hooks.names import TESTED
from launch import gpu, retained
from launch.inputs import planned_files

CPU_MEMORY_GB = 9.0
"""What one worker's run took at its peak over all processes (recipes/results/README.md)."""
CPU_WORKER_GB = 4.0
"""Each further worker: a trainer process, a vLLM server with its engine and worker."""
FREE_DISK_GB = 2.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was checked."""

    what: str
    detail: str


def detect_platform(ray_address: str | None = None) -> str:
    """The platform: "cuda" if torch sees a GPU, else "cpu"; VERL_PLATFORM decides if it is set.

    Of a Ray that somebody else started this machine tells nothing: its nodes have GPUs unless VERL_PLATFORM says cpu.
    """
    chosen = os.environ.get("VERL_PLATFORM", "").strip().lower()
    if chosen or ray_address is not None:
        return "cpu" if chosen == "cpu" else "cuda"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def check(specs: Sequence[RunSpec], runs_dir: Path, platform: str, ray_address: str | None = None) -> list[Finding]:
    """Check software, data and models of all runs, and this machine unless their Ray is somewhere else.

    Raises:
        ValueError: with what was found, why it cannot work, and what to do.
    """
    findings = [check_software(), check_disk(runs_dir)]
    check_folders(specs, runs_dir)
    return findings + (check_machine(specs, runs_dir, platform) if ray_address is None else []) + check_files(specs)


def check_machine(specs: Sequence[RunSpec], runs_dir: Path, platform: str) -> list[Finding]:
    """What this machine, alone, has for the runs. Raises ValueError."""
    nodes = max(spec.resources.nodes for spec in specs)
    if nodes > 1:
        raise ValueError(
            f"resources.nodes is {nodes}, and the Ray that `klreg run` starts has this machine only. Use `klreg "
            "submit`, or --ray-address HOST:PORT of a Ray over all nodes, or resources.nodes=1."
        )
    return [check_memory(specs, platform), *(check_gpus(specs, runs_dir) if platform == "cuda" else [])]


def check_gpus(specs: Sequence[RunSpec], runs_dir: Path) -> list[Finding]:
    """This node's GPUs are enough, alike, free and large enough for every run, as far as arithmetic can say."""
    devices, apps = gpu.here()
    said = gpu.check_devices(devices, apps, max(spec.resources.gpus_per_node for spec in specs))
    attention = [Finding(what="attention", detail=gpu.check_attention(specs))]
    kind = gpu.kind_of(devices)
    if kind is None:
        unknown = f"{devices[0].name} is in no table, so whether it is large enough shows when it runs"
        return [Finding(what="gpus", detail=said), *attention, Finding(what="fit", detail=unknown)]
    found = gpu.fit_of(specs, runs_dir, kind)
    fit.require(found)
    told = [*found.unknown.values(), *(_peak(one) for one in found.runs.values())]
    fits = [Finding(what="fit", detail="; ".join(dict.fromkeys(told)))]
    return [Finding(what="gpus", detail=said), *attention, *fits]


def _peak(one: fit.Fit) -> str:
    gib = max(one.training_bytes, one.rollout_bytes) / fit.GIB
    return f"about {gib:.0f} of {one.gpu.memory_bytes / fit.GIB:.0f} GiB at the peak, by arithmetic"


def check_same(specs: Sequence[RunSpec], runs_dir: Path) -> None:
    """No run's folder holds another run, or has lost what it would need for more steps. Raises ValueError."""
    for spec in specs:
        folder = run_folder(spec, runs_dir)
        folder.check(spec)
        if (folder.last_step() or 0) < spec.train.steps and (step := without_optimizer(folder)) is not None:
            raise ValueError(
                f"{folder.path}: `klreg gc --optimizer` removed the optimizer's state of step {step}, so the run "
                f"cannot be extended to {spec.train.steps} steps. Ask for no more than it has, or use another "
                "--runs-dir."
            )


WEIGHTS_ONLY = "WEIGHTS_ONLY"
"""Marks a checkpoint whose optimizer state was removed."""


def without_optimizer(folder: RunFolder) -> int | None:
    """The step of a run's newest whole checkpoint, where that has lost its optimizer."""
    newest = checkpoints.newest_complete(folder.checkpoints_dir)
    marked = newest is not None and (checkpoints.step_folder(folder.checkpoints_dir, newest) / WEIGHTS_ONLY).exists()
    return newest if marked else None


def check_folders(specs: Sequence[RunSpec], runs_dir: Path) -> None:
    """No run's folder holds another run, and nobody works in one. Raises ValueError."""
    check_same(specs, runs_dir)
    for folder in (run_folder(spec, runs_dir) for spec in specs):
        if folder.is_locked():
            raise ValueError(
                f"{folder.path} is in use by {folder.holder()}. Wait for it or stop it; --share takes the runs that "
                "nobody works on; for a second study side by side use another --runs-dir."
            )


def free(specs: Sequence[RunSpec], runs_dir: Path) -> list[RunSpec]:
    """The runs that no process works on. Raises ValueError where there is none."""
    found = [spec for spec in specs if not run_folder(spec, runs_dir).is_locked()]
    if not found:
        raise ValueError("Another process works on each of these runs: none is left to share.")
    return found


def check_software() -> Finding:
    """Python and verl as tested."""
    if sys.version_info[:2] not in ((3, 11), (3, 12)):
        version = ".".join(map(str, sys.version_info[:2]))
        raise ValueError(f"Python {version}: verl and vLLM have no wheels for it. Use Python 3.11 (`make setup`).")
    found = {}
    for name, tested in TESTED.items():
        found[name] = _installed(name)
        if found[name] != tested:
            raise ValueError(
                f"{name} {found[name]} is installed and the hooks were made for {tested}: a symbol that moved would "
                f"change what is computed. `make setup` installs {tested}."
            )
    return Finding(what="software", detail=", ".join(f"{name} {version}" for name, version in found.items()))


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"{name} is not installed in {sys.prefix}. `make setup` builds an environment with the whole stack; "
            "this command needs it, `klreg doctor`, `klreg plan` and `klreg report` do not."
        ) from None


def check_disk(runs_dir: Path, needed_gb: float = FREE_DISK_GB) -> Finding:
    """Room for checkpoints and logs, and permission to write."""
    existing = next(folder for folder in (runs_dir, *runs_dir.parents) if folder.exists())
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise ValueError(
            f"{runs_dir}: run folders cannot be made there ({error.strerror}: {existing}). Choose another place with "
            "--runs-dir or KLREG_RUNS."
        ) from error
    free = shutil.disk_usage(existing).free / 1e9
    if free < needed_gb:
        raise ValueError(
            f"{existing} has {free:.1f} GB free, runs need at least {needed_gb:.0f} GB: a checkpoint that does not fit "
            "ends the run. Free some, or choose another place with --runs-dir or KLREG_RUNS."
        )
    return Finding(what="disk", detail=f"{free:.0f} GB free for {runs_dir}")


def check_memory(specs: Sequence[RunSpec], platform: str) -> Finding:
    """On a CPU, room for every process of one run."""
    import psutil  # part of the stack, which check_software has found

    available = psutil.virtual_memory().available / 1e9
    if platform != "cpu":
        return Finding(what="memory", detail=f"{available:.0f} GB available")
    workers = max(spec.resources.gpus_per_node for spec in specs)
    needed = CPU_MEMORY_GB + (workers - 1) * CPU_WORKER_GB
    if available < needed:
        raise ValueError(
            f"{available:.1f} GB of memory are available, a run with {workers} worker(s) on a CPU takes about "
            f"{needed:.0f} GB (Ray, vLLM, trainer). Close other programs, or use a machine with more memory."
        )
    return Finding(what="memory", detail=f"{available:.0f} GB available, about {needed:.0f} GB needed")


def check_files(specs: Sequence[RunSpec]) -> list[Finding]:
    """Data and model of every run that brings its own; builtin ones are checked by their builders."""
    findings = {}
    for spec in specs:
        findings[f"model {spec.model.path}"] = _check_model(spec)
        if spec.reference.path is not None:
            findings[f"reference {spec.reference.path}"] = _check_reference(spec.reference.path)
        findings[f"task {spec.task_name}"] = _check_task(spec)
        if spec.retention.skills:
            retained.check(spec)
            findings["retention"] = f"{', '.join(spec.retention.skills)}: known, or in verl's schema"
    return [Finding(what=what, detail=detail) for what, detail in findings.items()]


def _check_model(spec: RunSpec) -> str:
    if spec.model.path == "tiny":
        from data_prep.tiny_model import TinyModelOptions

        options_from(TinyModelOptions, spec.model.options, "model.options")
        return "built here"
    if not Path(spec.model.path).is_absolute():
        return gpu.check_hub(spec.model.path, spec.model.revision, os.environ)
    check_model(Path(spec.model.path))
    return "folder is complete, vocabulary fits its tokenizer"


def _check_reference(path: str) -> str:
    if not Path(path).is_absolute():
        return f"{gpu.check_hub(path, None, os.environ)}; its vocabulary is compared at the start"
    check_model(Path(path))
    return "folder is complete; its vocabulary is compared with the model's at the start"


def _check_task(spec: RunSpec) -> str:
    if spec.task.builtin is not None:
        planned_files(spec, Path())  # reads the options, and finds the files that the data is made from
        _check_reward_options(spec)
        return "built here"
    folder = Path(spec.model.path) if Path(spec.model.path).is_absolute() else None
    check_task(Path(spec.task.train or ""), Path(spec.task.val or ""), folder, spec.train.max_prompt_tokens)
    check_reward(spec)
    return "parquet files have verl's schema, the reward function is there"


def _check_reward_options(spec: RunSpec) -> None:
    from data_prep.rewards import RewardOptions

    options_from(RewardOptions, spec.task.reward_options, f"tasks.{spec.task_name}.reward_options")


def check_reward(spec: RunSpec) -> None:
    """The user's reward function can be imported from the recipe's folder. Raises ValueError."""
    module, _, function = (spec.task.reward or "").partition(":")
    try:
        with own_modules(spec.root):
            found = getattr(importlib.import_module(module), function, None)
    except Exception as error:  # a user's module can fail in any way
        raise ValueError(
            f"tasks.{spec.task_name}.reward: cannot import {module!r} ({type(error).__name__}: {error}). It is looked "
            f"for in the recipe's folder ({spec.root}) and among installed packages."
        ) from error
    if not callable(found):
        raise ValueError(f"tasks.{spec.task_name}.reward: {module!r} has no function {function!r}.")
