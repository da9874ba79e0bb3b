"""One submission's folder, runs/<recipe>/slurm/<n>/: what was submitted, and what its jobs leave.

job.json         platform, profile, command lines, and the runs of each task of the array, resolved
job.sbatch       the script
submitted.json   job id and the runs of each task; absent where sbatch refused
logs/<task>.log  what the tasks print, all their attempts
tasks/<task>/current     the attempt that counts; an older one that still lives ends itself
tasks/<task>/<attempt>/  invitation, token, stop request of one start of the job; began, once a run has; idle, if the
                         start ended by itself before that; reason, why its runner ended
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.store import RunFolder, run_folder, write_json
from launch import host
from launch import profile as profiles
from launch.profile import Profile

if TYPE_CHECKING:
    from launch.guardian import Place

FOLDER = "slurm"
PRIVATE = 0o600
"""Of files with the values of environment variables, which may be keys and passwords."""
TOKEN = "token"
MISLEADING = (
    *("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ZE_AFFINITY_MASK"),
    *("RAY_ADDRESS", "RAY_TMPDIR", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "TMPDIR", "PYTHONDONTWRITEBYTECODE"),
)
"""Slurm sets the first four beside CUDA_VISIBLE_DEVICES, and verl refuses to start; the others may name another job's
Ray, or a folder too long for Ray's sockets."""
CPU_STORE_BYTES = 256 * 2**20
"""As in local.py: a tiny model's batches are megabytes."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A submission."""

    recipe: str
    runs_dir: str
    profile: Profile
    tasks: tuple[tuple[RunSpec, ...], ...]
    """The runs of each task of the array, in the order they are run."""
    python: str
    """Of the batch script."""
    steps: tuple[str, ...]
    """Before each `-m launch.X`: container and interpreter."""
    srun: tuple[str, ...]
    probe: bool = False
    """Whether the cluster is tried out before the runs (`klreg smoke`)."""

    def write(self, folder: Path) -> None:
        """job.json; job.py reads it with the standard library only."""
        values = asdict(self) | {"tasks": [[spec.to_json() for spec in task] for task in self.tasks]}
        values |= {"nodes": [task[0].resources.nodes for task in self.tasks]}
        write_json(folder / "job.json", values, mode=PRIVATE)

    @classmethod
    def read(cls, folder: Path) -> Job:
        """The inverse of write."""
        values = json.loads((folder / "job.json").read_text())
        tasks = tuple(tuple(RunSpec.from_json(spec) for spec in task) for task in values["tasks"])
        lists = {key: tuple(values[key]) for key in ("steps", "srun")}
        plain = {key: values[key] for key in ("recipe", "runs_dir", "python")}
        return cls(
            **plain,
            **lists,
            probe=values.get("probe", False),
            tasks=tasks,
            profile=profiles.from_json(values["profile"]),
        )

    @property
    def specs(self) -> list[RunSpec]:
        """All runs."""
        return [spec for task in self.tasks for spec in task]

    def run_folder(self, spec: RunSpec) -> RunFolder:
        """Where a run is."""
        return run_folder(spec, Path(self.runs_dir))


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """What Slurm was given."""

    folder: Path
    job_id: int
    runs: tuple[tuple[str, ...], ...]
    """Run ids of each task."""

    def element(self, task: int) -> str:
        """Slurm's name of a task."""
        return f"{self.job_id}_{task}"

    def log(self, task: int) -> Path:
        """What a task prints."""
        return self.folder / "logs" / f"{task}.log"


def submissions(recipe_dir: Path) -> list[Submitted]:
    """Of a recipe, the oldest first."""
    folders = sorted((recipe_dir / FOLDER).glob("*/submitted.json"), key=lambda path: int(path.parent.name))
    return [_submitted(path) for path in folders]


def _submitted(path: Path) -> Submitted:
    values: dict[str, Any] = json.loads(path.read_text())
    runs = tuple(tuple(task) for task in values["runs"])
    return Submitted(folder=path.parent, job_id=values["job_id"], runs=runs)


def new_folder(recipe_dir: Path) -> Path:
    """runs/<recipe>/slurm/<n> with the next n; two submissions at the same time get two."""
    parent = recipe_dir / FOLDER
    parent.mkdir(parents=True, exist_ok=True)
    number = max((int(path.name) for path in parent.iterdir() if path.name.isdecimal()), default=0)
    while True:
        number += 1
        try:
            (parent / str(number)).mkdir()
        except FileExistsError:
            continue
        (parent / str(number) / "logs").mkdir()  # a missing folder of logs ends a job without a word
        (parent / str(number) / "tasks").mkdir()
        return parent / str(number)


def place_of(profile: Profile, gpus: int, attempt: Path) -> Place:
    """Ray's share of one node."""
    from launch import guardian  # it needs psutil, which is part of the stack; `klreg status` works without

    ports = profile.ports and (profile.ports.first, profile.ports.last)
    return guardian.Place(
        gpus=gpus,
        object_store_bytes=object_store_bytes(profile),
        slots=max(host.ray_slots(gpus), profile.cpus_per_node),
        ports=ports or None,
        scratch=profile.scratch,
        token=str(attempt / TOKEN),
    )


def object_store_bytes(profile: Profile) -> int | None:
    """What the profile says, or a third of the job's memory as far as /dev/shm has room; Ray would count the node's."""
    if profile.object_store_gb is not None:
        return int(profile.object_store_gb * 1e9)
    if profile.platform == "cpu":
        return CPU_STORE_BYTES
    if not profile.memory_gb:
        return None
    return int(min(profile.memory_gb * 1e9 / 3, 0.8 * shutil.disk_usage("/dev/shm").free))


def clean_environment(attempt: Path) -> None:
    """Take away what misleads Ray and verl, and let this process into the job's Ray."""
    for name in MISLEADING:
        os.environ.pop(name, None)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(attempt / TOKEN)}


def runs_of(tasks: Sequence[Sequence[RunSpec]]) -> list[list[str]]:
    """Run ids of each task."""
    return [[spec.run_id for spec in task] for task in tasks]
