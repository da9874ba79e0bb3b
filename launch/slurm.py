"""Submit a recipe to Slurm: everything that can be known to be wrong is said first, then one array is submitted.

    runs that are neither done, nor in the queue, nor failed for good
      -> checks (profile against recipe, paths, the cluster's partitions, sbatch --test-only)
      -> runs/<recipe>/slurm/<n>/ with the script and the list of runs -> sbatch -> its job id

Slurm is asked through its own commands, each with a limit of time: a controller that is down answers nobody.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.store import atomic_write, cache_root, run_folder, write_json
from launch import job as job_script
from launch.job_folder import PRIVATE, Job, Submitted, new_folder, runs_of, submissions
from launch.profile import Profile, seconds

COMMAND_SECONDS = 60.0
LIVE = (
    "PENDING",
    "RUNNING",
    "CONFIGURING",
    "COMPLETING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "SUSPENDED",
    "STOPPED",
    "RESIZING",
)
"""States of a job that Slurm has not finished with."""
NODE_LOCAL = ("/tmp", "/var/tmp", "/dev/shm", "/run", "/proc")
IN_MEMORY = ("tmpfs", "ramfs", "overlay")
MODES = ("done", "queued", "failed", "missing")


class SlurmError(RuntimeError):
    """A command of Slurm's failed; its own words are in the message."""


# ---------------------------------------------------------------------------------------------------- asking Slurm


def ask(*command: str) -> str:
    """Output of one of Slurm's commands.

    Raises:
        SlurmError: it failed, or did not answer in time.
        ValueError: it is not installed here.
    """
    if shutil.which(command[0]) is None:
        raise ValueError(
            f"{command[0]} is not on this machine's PATH. Submit from a login node of the cluster; "
            "`klreg submit --dry-run` shows the script anywhere."
        )
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} did not answer within {COMMAND_SECONDS:.0f} s: is slurmctld up?") from None
    if done.returncode:
        raise SlurmError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


@dataclass(frozen=True, kw_only=True)
class Partition:
    """What sinfo says about one group of equal nodes of a partition."""

    name: str
    is_default: bool
    nodes: int
    cpus: int
    memory_mb: int
    gpus: int
    gpu_types: frozenset[str]
    limit: float
    """[s]."""


def partitions() -> list[Partition]:
    """All partitions that are up, one entry for each kind of node."""
    lines = ask("sinfo", "-h", "-o", "%P|%D|%c|%m|%G|%l|%a").splitlines()
    return [_partition(line) for line in lines if line.endswith("|up")]


def _partition(line: str) -> Partition:
    name, nodes, cpus, memory, gres, limit, _ = line.split("|")
    found = re.findall(r"gpu:(?:([^:,()]+):)?(\d+)", gres)
    return Partition(
        name=name.rstrip("*"),
        is_default=name.endswith("*"),
        nodes=int(nodes),
        cpus=int(cpus.rstrip("+")),
        memory_mb=int(memory.rstrip("+")),
        gpus=sum(int(count) for _, count in found),
        gpu_types=frozenset(kind for kind, _ in found if kind),
        limit=float("inf") if limit == "infinite" else seconds(limit),
    )


@dataclass(frozen=True, kw_only=True)
class Element:
    """One task of an array as Slurm shows it."""

    name: str
    """As 12_3."""
    state: str
    left: str
    reason: str
    nodes: str
    exit_code: str = ""

    @property
    def is_live(self) -> bool:
        """Whether Slurm will go on with it."""
        return self.state in LIVE


def elements(submitted: Sequence[Submitted]) -> dict[str, Element]:
    """Every task of these submissions that Slurm knows: squeue's, and of older ones sacct's where that is there."""
    if not submitted or shutil.which("squeue") is None:
        return {}
    names = ",".join(sorted({str(one.job_id) for one in submitted}))
    return _from_sacct(names) | _from_squeue(names)


def _from_squeue(names: str) -> dict[str, Element]:
    try:
        text = ask("squeue", "-h", "-r", "-t", "all", "-j", names, "-o", "%i|%T|%L|%r|%N")
    except SlurmError as error:
        if "Invalid job id" in str(error):  # all of them are forgotten
            return {}
        raise
    rows = (line.split("|") for line in text.splitlines())
    return {row[0]: Element(name=row[0], state=row[1], left=row[2], reason=row[3], nodes=row[4]) for row in rows}


def _from_sacct(names: str) -> dict[str, Element]:
    """Nothing where accounting is off."""
    if shutil.which("sacct") is None:
        return {}
    try:
        text = ask("sacct", "-X", "-n", "-P", "-j", names, "-o", "JobID,State,ExitCode,NodeList")
    except SlurmError:
        return {}
    rows = [line.split("|") for line in text.splitlines()]
    return {
        name: Element(name=name, state=state.split()[0], left="", reason="", nodes=nodes, exit_code=code)
        for name, state, code, nodes in rows
    }


# ---------------------------------------------------------------------------------------------------- what to submit


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The runs of a recipe, sorted by whether there is anything to submit."""

    missing: tuple[RunSpec, ...]
    queued: tuple[RunSpec, ...]
    failed: tuple[RunSpec, ...]
    done: tuple[RunSpec, ...]

    def describe(self) -> str:
        """One line."""
        parts = [f"{len(self.missing)} to submit", f"{len(self.done)} done", f"{len(self.queued)} in the queue"]
        failed = [f"{len(self.failed)} failed (`klreg retry` tries them again)"] if self.failed else []
        return ", ".join(parts + failed)


def choose(specs: Sequence[RunSpec], runs_dir: Path, queued: Iterable[str]) -> Choice:
    """Sort runs; `queued` are the ids of those that a job of ours will do."""
    queued = set(queued)
    of: dict[str, list[RunSpec]] = {mode: [] for mode in MODES}
    for spec in specs:
        folder = run_folder(spec, runs_dir)
        if folder.is_done(spec):
            of["done"].append(spec)
        elif spec.run_id in queued:
            of["queued"].append(spec)
        else:
            of["failed" if folder.state().status == "failed" else "missing"].append(spec)
    return Choice(**{mode: tuple(runs) for mode, runs in of.items()})


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task of a submission."""

    name: str
    log: Path
    element: Element | None
    """None: Slurm has forgotten it, so it is over."""

    @property
    def is_live(self) -> bool:
        """Whether Slurm will go on with it."""
        return self.element is not None and self.element.is_live

    def ended(self) -> str:
        """How it ended, in words: its state, exit code, and the last line of its log."""
        state = self.element.state if self.element else "over"
        code = self.element.exit_code.partition(":")[0] if self.element else ""
        last = self.log.read_text(errors="replace").strip().splitlines()[-1:] if self.log.is_file() else []
        return f"job {self.name} {state}{f' (exit code {code})' if code else ''}" + "".join(
            f": {line}" for line in last
        )


def tasks(recipe_dir: Path) -> dict[str, Task]:
    """Run ids -> the task that will do it, else the newest that had it. Empty where Slurm is not here."""
    if shutil.which("squeue") is None:
        return {}
    submitted = submissions(recipe_dir)
    known = elements(submitted)
    found: dict[str, Task] = {}
    for one in submitted:
        for number, runs in enumerate(one.runs):
            task = Task(name=one.element(number), log=one.log(number), element=known.get(one.element(number)))
            found |= {run: task for run in runs if task.is_live or run not in found or not found[run].is_live}
    return found


def in_queue(recipe_dir: Path) -> dict[str, Element]:
    """Run ids that a live task will do -> that task; the newest submission wins."""
    return {run: task.element for run, task in tasks(recipe_dir).items() if task.element and task.is_live}


def grouped(specs: Sequence[RunSpec], runs_per_job: int) -> tuple[tuple[RunSpec, ...], ...]:
    """Tasks of up to `runs_per_job` runs that need the same workers, in order."""
    tasks: list[list[RunSpec]] = []
    for spec in specs:
        last = tasks[-1] if tasks else []
        if last and len(last) < runs_per_job and last[0].resources == spec.resources:
            last.append(spec)
        else:
            tasks.append([spec])
    return tuple(tuple(task) for task in tasks)


# ---------------------------------------------------------------------------------------------------- checks


def check(specs: Sequence[RunSpec], profile: Profile, runs_dir: Path, seconds_of: dict[str, float]) -> list[str]:
    """What is wrong between recipe, profile and paths; empty if nothing is. Asks nobody, so it works anywhere.

    Args:
        specs: the runs to submit.
        profile: where to.
        runs_dir: where run folders live.
        seconds_of: run id -> seconds of one step, of runs where it was measured.
    """
    problems = [problem for spec in specs for problem in _check_run(spec, profile)]
    problems += _check_image(profile)
    for what, path in paths(specs, profile, runs_dir):
        problems += _check_path(what, path, profile)
    for spec in specs:
        step = seconds_of.get(spec.run_id)
        if step is not None and step > profile.seconds - profile.notice_seconds:
            problems.append(
                f"{spec.run_id}: a step takes {step:.0f} s, and {profile.time} less {profile.notice_seconds} s of "
                "notice leave no room for one: no attempt could get on. Lengthen the profile's time."
            )
        elif step is not None and step > profile.notice_seconds:
            problems.append(
                f"{spec.run_id}: a step takes {step:.0f} s and the notice before the time limit is "
                f"{profile.notice_seconds} s: the step in hand would be lost. Lengthen the profile's notice_seconds."
            )
    return list(dict.fromkeys(problems))


def _check_run(spec: RunSpec, profile: Profile) -> list[str]:
    problems = []
    asked = spec.resources
    for name in ("nodes", "gpus_per_node"):
        given, needed = getattr(profile, name), getattr(asked, name)
        if given is not None and given != needed:
            problems.append(
                f"{spec.arm}: the recipe's resources.{name} is {needed} and profile {profile.name} has {given}. "
                f"The number of workers is part of a run: say resources.{name}={given}, or use a profile with {needed}."
            )
    if profile.platform == "cuda" and asked.tensor_parallel > asked.gpus_per_node:
        problems.append(
            f"{spec.arm}: resources.tensor_parallel={asked.tensor_parallel} spans nodes of {asked.gpus_per_node} GPUs. "
            "vLLM's engines here fill at most one node."
        )
    if spec.logging.wandb == "online" and profile.environment.get("WANDB_MODE") == "offline":
        problems.append(f"{spec.arm}: logging.wandb is online and the profile sets WANDB_MODE=offline. Decide for one.")
    return problems


def _check_image(profile: Profile) -> list[str]:
    """A file, where it is named by its path; a registry's image shows when the job starts."""
    image = profile.container.image
    if image is None or not image.startswith("/") or Path(image).exists():
        return []
    return [f"the container's image {image} is not there. launch/env/klreg.def says how one is built."]


def paths(specs: Sequence[RunSpec], profile: Profile, runs_dir: Path) -> list[tuple[str, Path]]:
    """Everything that nodes read or write, by name."""
    found = [("the runs' folder", runs_dir), ("the cache", cache_root(runs_dir))]
    if profile.venv is not None or profile.container.kind == "none":
        found.append(("the environment", Path(profile.venv or sys.prefix)))
    for spec in specs:
        found.append(("the recipe's folder", Path(spec.root)))
        own = (spec.model.path, spec.reference.path, spec.task.train, spec.task.val)
        found += [("a file of the recipe", Path(path)) for path in own if path and Path(path).is_absolute()]
    return list(dict.fromkeys(found))


def _check_path(what: str, path: Path, profile: Profile) -> list[str]:
    if profile.shared:
        if any(path.is_relative_to(root) for root in profile.shared):
            return []
        return [f"{what} {path} is not below a folder that all nodes share (shared: {', '.join(profile.shared)})."]
    local = next((place for place in NODE_LOCAL if path.is_relative_to(place)), None)
    if what != "the environment" and (local or file_system(path) in IN_MEMORY):
        return [
            f"{what} {path} is on {local or 'a file system in memory'}, which every node has for itself: what one "
            "writes no other reads. Use a shared folder, or name it in the profile's `shared` if it is one."
        ]
    return []


def file_system(path: Path) -> str:
    """Type of the file system a path is on, as the kernel names it; empty where it cannot be told."""
    try:
        lines = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return ""
    mounts = [(fields[1].replace("\\040", " "), fields[2]) for fields in map(str.split, lines)]
    fitting = [(len(place), kind) for place, kind in mounts if path.is_relative_to(place)]
    return max(fitting, default=(0, ""))[1]


def check_cluster(specs: Sequence[RunSpec], profile: Profile, known: Sequence[Partition]) -> list[str]:
    """What this cluster cannot give; Slurm would leave such a job pending for ever, or say less.

    `known`: what `partitions` found.
    """
    names = sorted({each.name for each in known})
    default = next((each.name for each in known if each.is_default), None)
    wanted = profile.partition or default
    if wanted is None:
        return [f"the profile names no partition and the cluster has no default one. There are: {', '.join(names)}."]
    problems = []
    for name in wanted.split(","):
        kinds = [each for each in known if each.name == name]
        if not kinds:
            problems.append(f"partition {name!r} is unknown or down. There are: {', '.join(names)}.")
            continue
        for resources in dict.fromkeys(spec.resources for spec in specs):
            gpus = resources.gpus_per_node if profile.platform == "cuda" else 0
            problems += _check_kinds(name, kinds, resources.nodes, gpus, profile)
    return problems


def _check_kinds(name: str, kinds: Sequence[Partition], nodes: int, gpus: int, profile: Profile) -> list[str]:
    """One message for the first thing that no kind of node has, given that it has what was asked before."""
    limit = max(kind.limit for kind in kinds)
    if profile.seconds > limit:
        return [f"partition {name}: time {profile.time} is over its limit of {limit / 3600:.4g} h."]
    steps = (
        (f"{gpus} GPUs a node", "gpus_per_node", lambda kind: kind.gpus >= gpus, max(k.gpus for k in kinds)),
        (
            f"GPUs of type {profile.gpu_type}",
            "gpu_type",
            lambda kind: not (gpus and profile.gpu_type) or profile.gpu_type in kind.gpu_types,
            ", ".join(sorted(set().union(*(kind.gpu_types for kind in kinds)))) or "no types",
        ),
        (
            f"{profile.cpus_per_node} CPUs a node",
            "cpus_per_node",
            lambda kind: kind.cpus >= profile.cpus_per_node,
            max(k.cpus for k in kinds),
        ),
        (
            f"{profile.memory_gb} GB a node",
            "memory_gb",
            lambda kind: kind.memory_mb >= (profile.memory_gb or 0) * 1024,
            f"{max(k.memory_mb for k in kinds) / 1024:.0f} GB",
        ),
    )
    left = list(kinds)
    for what, key, fits, most in steps:
        left = [kind for kind in left if fits(kind)]
        if not left:
            return [f"partition {name}: no node has {what} ({key}); it has at most {most}."]
    have = sum(kind.nodes for kind in left)
    if have < nodes:
        return [f"partition {name}: {nodes} nodes are needed and {have} of its nodes fit what is asked for."]
    return []


# ---------------------------------------------------------------------------------------------------- the script


def make_job(specs: Sequence[RunSpec], profile: Profile, runs_dir: Path) -> Job:
    """A submission of these runs."""
    outside = str(Path(profile.venv) / "bin" / "python") if profile.venv else sys.executable
    container = profile.container
    inside = [container.python if container.kind != "none" else outside, "-P"]
    mounts = [part for mount in container.mounts for part in ("--bind", mount)]
    before = {
        "none": [],
        "pyxis": [],
        "apptainer": ["apptainer", "exec", *_nv(profile), *mounts, *container.options, str(container.image)],
    }
    srun = ["--overlap", "--wait=0", "--kill-on-bad-exit=1", f"--cpus-per-task={profile.cpus_per_node}"]
    if container.kind == "pyxis":
        srun += [f"--container-image={container.image}", "--no-container-mount-home", *container.options]
        srun += [f"--container-mounts={','.join(container.mounts)}"] if container.mounts else []
    return Job(
        recipe=specs[0].recipe,
        runs_dir=str(runs_dir),
        profile=profile,
        tasks=grouped(specs, profile.runs_per_job),
        python=outside if container.kind == "none" else "python3",
        steps=tuple(before[container.kind] + inside),
        srun=tuple(srun),
    )


def _nv(profile: Profile) -> list[str]:
    return ["--nv"] if profile.platform == "cuda" else []


def render(job: Job, folder: Path) -> str:
    """The batch script. Everything in it is absolute: Slurm runs a copy of it, from a folder of its own."""
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in (*options(job, folder), *job.profile.sbatch))]
    profile = job.profile
    lines += [f"module load {shlex.quote(module)}" for module in profile.modules]
    if profile.platform == "cuda":
        lines.append('test -n "${CUDA_VISIBLE_DEVICES:-}" || echo "no GPU is visible in this job" >&2')
    lines.append("unset VERL_PLATFORM VERL_ENGINE_DEVICE")  # the submitting shell's; the platform is the profile's
    lines += [f"export {name}={shlex.quote(value)}" for name, value in environment(job).items()]
    lines += profile.setup
    script = shlex.quote(str(job_script.__file__))
    lines.append(f"exec {shlex.quote(job.python)} -I {script} {shlex.quote(str(folder))}")
    return "\n".join(lines) + "\n"


def options(job: Job, folder: Path) -> list[str]:
    """sbatch's options from the profile's fields, as written in the head of the script."""
    profile, resources = job.profile, job.tasks[0][0].resources
    names = {"partition": profile.partition, "account": profile.account, "qos": profile.qos}
    names["constraint"] = profile.constraint
    gpus = f"{profile.gpu_type}:" * bool(profile.gpu_type) + str(resources.gpus_per_node)
    found = [
        f"--job-name=klreg-{job.recipe}",
        f"--array=0-{len(job.tasks) - 1}%{profile.max_parallel}",
        *(f"--{name}={value}" for name, value in names.items() if value is not None),
        f"--nodes={resources.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={profile.cpus_per_node}",
        *([f"--gpus-per-node={gpus}"] if profile.platform == "cuda" else []),
        *([f"--mem={profile.memory_gb}G"] if profile.memory_gb is not None else []),
        *(["--exclusive"] if profile.exclusive else []),
        f"--time={profile.time}",
        f"--signal=B:USR1@{profile.notice_seconds}",
        "--requeue",
        "--open-mode=append",
        f"--chdir={folder}",
        f"--output={folder}/logs/%a.log",
    ]
    return [_in_head(option) for option in found]


def _in_head(option: str) -> str:
    """sbatch reads the words of a line as a shell does, as far as spaces, quotes and backslashes go."""
    if "\n" in option:
        raise ValueError(f"{option!r} has a line break, which would begin another line of the script. Rename it.")
    return shlex.quote(option) if re.search(r"""[\s'"\\#]""", option) else option


def environment(job: Job) -> dict[str, str]:
    """Variables of every process of the job; the profile's last."""
    kept = {name: os.environ[name] for name in ("KLREG_CACHE", "HF_HOME") if os.environ.get(name)}
    platform = {"VERL_PLATFORM": "cpu"} if job.profile.platform == "cpu" else {}
    return {"PYTHONUNBUFFERED": "1"} | platform | kept | dict(job.profile.environment)


# ---------------------------------------------------------------------------------------------------- submitting


def require(problems: Sequence[str]) -> None:
    """Raise ValueError with all problems, a line each."""
    if problems:
        raise ValueError("\n".join(problems))


def submit(job: Job, recipe_dir: Path) -> Submitted:
    """Write the folder, ask Slurm whether it would take the script, and submit it.

    Raises:
        ValueError: Slurm would not take it; nothing was submitted, and no folder is left.
        SlurmError: Slurm does not answer.
    """
    folder = new_folder(recipe_dir)
    try:
        job.write(folder)
        atomic_write(folder / "job.sbatch", render(job, folder), mode=PRIVATE)
        _ask_first(folder / "job.sbatch")
        answer = _sbatch("--parsable", folder / "job.sbatch")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    number = int(answer.strip().partition(";")[0])  # a federation's cluster follows it
    write_json(folder / "submitted.json", {"job_id": number, "runs": runs_of(job.tasks)})
    return submissions(recipe_dir)[-1]


def _ask_first(script: Path) -> None:
    _sbatch("--test-only", script)


def _sbatch(option: str, script: Path) -> str:
    try:
        return ask("sbatch", option, str(script))
    except SlurmError as error:
        if "did not answer" in str(error):
            raise
        raise ValueError(f"Slurm does not take the job. {error}") from error


def prepare(specs: Sequence[RunSpec], profile: Profile, runs_dir: Path, note: Callable[[str], None]) -> None:
    """Build or fetch data and models here, where there is internet; what cannot work is told first.

    Software is looked at where this environment is the job's.
    """
    from launch import gpu, inputs, preflight  # heavy, and `klreg status` does not need them

    if profile.container.kind == "none" and profile.venv is None:
        preflight.check_software()
        if profile.platform == "cuda":
            gpu.check_build(gpu.torch_in(os.environ))  # of GPUs a login node tells nothing
    if profile.platform == "cuda":
        gpu.check_padding(specs)
    if name := profile.environment.get("VERL_PLATFORM"):
        preflight.named_platform(name)
    preflight.check_disk(runs_dir, preflight.disk_needed(specs, runs_dir))
    preflight.check_folders(specs, runs_dir)
    preflight.check_files(specs)
    for spec in specs:
        inputs.prepare(spec, runs_dir, note)
