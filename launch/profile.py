"""Cluster profiles: what `klreg submit` must know about a cluster, typed and strict like a recipe.

A profile says where jobs run and how they get there; it is no part of a run, so it can change between attempts. How
many workers a run has is the recipe's (`resources`): the profile has the same numbers, and `submit` compares them.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from klreg_verl.experiment import strict
from klreg_verl.experiment.strict import ConfigError, FieldError, at_least

SHIPPED = Path(__file__).parent / "profiles"
LONGEST_SCRATCH = 30
"""Characters: below it come klreg-xxxxxxxx/ray/session_.../sockets/plasma_store, and a socket may have 107."""


@dataclass(frozen=True, kw_only=True)
class Container:
    """In which the steps of a job run; Slurm's own commands stay outside."""

    kind: Literal["none", "pyxis", "apptainer"] = "none"
    image: str | None = None
    """pyxis: a .sqsh file or registry reference; apptainer: a .sif file."""
    mounts: tuple[str, ...] = ()
    """`outside` or `outside:inside`; all paths of a run must be the same inside."""
    python: str = "python"
    """The interpreter inside, with klreg-verl installed."""
    options: tuple[str, ...] = ()
    """More arguments for srun (pyxis) or `apptainer exec`."""

    def __post_init__(self) -> None:
        if (self.kind == "none") != (self.image is None):
            raise FieldError("image", f"{self.image!r} does not go with kind {self.kind}. Give both, or neither.")


@dataclass(frozen=True, kw_only=True)
class Ports:
    """The ports that nodes may use among each other."""

    first: int
    last: int

    def __post_init__(self) -> None:
        at_least("first", self.first, 1024)
        if not self.first + 100 <= self.last <= 65535:
            raise FieldError("last", f"{self.last}: Ray needs at least 100 ports above {self.first}, below 65536.")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How often a run is tried."""

    attempts: int = 20
    """In all; preemptions and lost nodes count, too."""
    without_progress: int = 3
    """Attempts in a row that end by themselves without a new step."""

    def __post_init__(self) -> None:
        at_least("attempts", self.attempts, 1)
        at_least("without_progress", self.without_progress, 1)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One way to run on one cluster."""

    name: str = ""
    """File stem."""
    platform: Literal["cuda", "cpu"] = "cuda"
    partition: str | None = None
    """null: the cluster's default; likewise account and qos."""
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    nodes: int | None = None
    """Per run; null: what the recipe asks for (resources.nodes)."""
    gpus_per_node: int | None = None
    """null: what the recipe asks for (resources.gpus_per_node). On platform cpu these are worker processes."""
    gpu_type: str | None = None
    """As in --gpus-per-node=h100:8."""
    cpus_per_node: int = 8
    memory_gb: int | None = None
    """Per node; null: the partition's default. 0: all of the node."""
    exclusive: bool = False
    time: str = "4:00:00"
    """Limit of one job, as Slurm writes it; a run that takes longer goes on in the next one."""
    notice_seconds: int = 300
    """Before the limit the run saves and stops: more than the longest step and a save."""
    max_parallel: int = 8
    """Jobs of one submission that run at the same time."""
    runs_per_job: int = 1
    """Runs that share one allocation, one after the other: for short ones."""
    container: Container = Container()
    modules: tuple[str, ...] = ()
    venv: str | None = None
    """Folder of the environment, the same on every node; null: the one that submits."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of every process of the job."""
    setup: tuple[str, ...] = ()
    """Shell lines before anything starts."""
    shared: tuple[str, ...] = ()
    """Folders that every node sees; where given, all paths of a run must be below one of them."""
    scratch: str = "/tmp"
    """Node-local, short."""
    interface: str | None = None
    """Network interface between the nodes; null: found by trying."""
    ports: Ports | None = None
    """null: any free ones."""
    object_store_gb: float | None = None
    """Ray's, per node; null: a third of memory_gb at most, or 256 MB on platform cpu."""
    form_seconds: int = 300
    """How long the nodes may take to find each other."""
    requeues: int = 100
    """Of one job."""
    budget: Budget = Budget()
    sbatch: tuple[str, ...] = ()
    """More lines for the head of the script, e.g. --reservation=x."""

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "cpus_per_node", "max_parallel", "runs_per_job"):
            at_least(name, getattr(self, name), 1)
        for name in ("memory_gb", "requeues"):
            at_least(name, getattr(self, name), 0)
        at_least("notice_seconds", self.notice_seconds, 10)
        at_least("form_seconds", self.form_seconds, 10)
        self._check_text()
        self._check_time()
        self._check_ports()
        self._check_paths()
        self._check_commands()

    def _check_time(self) -> None:
        try:
            limit = seconds(self.time)
        except ValueError as error:
            raise FieldError("time", str(error)) from None
        if limit < self.notice_seconds + 60:
            raise FieldError(
                "notice_seconds",
                f"{self.notice_seconds} s before the limit of {self.time} leave no minute to work. Lengthen time.",
            )

    def _check_ports(self) -> None:
        """Ray takes one a slot for its workers and seven of its own, the meeting of the nodes one."""
        needed = self.cpus_per_node + 8
        if self.ports is not None and self.ports.last - self.ports.first + 1 < needed:
            raise FieldError("ports", f"{self.cpus_per_node} CPUs a node need at least {needed} ports. Give more.")

    def _check_paths(self) -> None:
        for name, paths in (("shared", self.shared), ("scratch", (self.scratch,)), ("venv", (self.venv or "/",))):
            for path in paths:
                if not Path(path).is_absolute():
                    raise FieldError(name, f"{path!r} is not absolute, so nodes would look for it in different places.")
        if len(self.scratch) > LONGEST_SCRATCH:
            raise FieldError(
                "scratch",
                f"{self.scratch!r} has {len(self.scratch)} characters and Ray's sockets below it may have 107 in all. "
                f"At most {LONGEST_SCRATCH}; /tmp fits.",
            )

    def _check_text(self) -> None:
        """Every text becomes a part of a script or a command line."""
        for name, text in _texts(asdict(self)):
            if any(ord(letter) < 32 for letter in text):
                raise FieldError(name, f"{text!r} has a line break or control character: it would be another line.")
        for name in ("partition", "account", "qos", "constraint", "gpu_type"):
            if _SEPARATES.search(text := getattr(self, name) or ""):
                raise FieldError(name, f"{text!r} is no such name: spaces, quotes, ; # $ \\ and ` cannot be in it.")

    def _check_commands(self) -> None:
        for line in self.sbatch:
            self._check_option(line)
        for name in self.environment:
            if name in _NOT_THEIRS or not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise FieldError("environment", f"{name} {_NOT_THEIRS.get(name, 'is no name of a variable')}.")

    @staticmethod
    def _check_option(line: str) -> None:
        """One option of sbatch, which is not set from another field."""
        try:
            option, *values = shlex.split(line)
        except ValueError as error:
            raise FieldError("sbatch", f"{line!r} cannot be read as an option of sbatch: {error}.") from None
        if not option.startswith("-"):
            raise FieldError("sbatch", f"{line!r} is no option of sbatch. Write it as in --reservation=x.")
        if len(values) > 1 or (values and ("=" in option or values[0].startswith("-"))):
            raise FieldError(
                "sbatch", f"{line!r} is more than one option. Give each its own line; quote a value with spaces."
            )
        if (name := option.partition("=")[0]) in _OURS:
            raise FieldError("sbatch", f"{name} is set from the profile: {_OURS[name]}.")

    @property
    def seconds(self) -> int:
        """The time limit [s]."""
        return seconds(self.time)


_SEPARATES = re.compile(r"""[\s;'"`$\\#]""")


def _texts(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """Every text of a profile with the field that has it, the names of variables among them."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, Mapping):
        for key, below in value.items():
            yield name, key
            yield from _texts(below, f"{name}.{key}" if name else key)
    elif isinstance(value, (list, tuple)):
        for below in value:
            yield from _texts(below, name)


_OURS = {
    "--array": "max_parallel, runs_per_job",
    "--nodes": "nodes", "-N": "nodes",
    "--ntasks": "one task a node", "-n": "one task a node",
    "--ntasks-per-node": "one task a node",
    "--gres": "gpus_per_node, gpu_type", "--gpus": "gpus_per_node", "--gpus-per-node": "gpus_per_node",
    "--gpus-per-task": "gpus_per_node",
    "--cpus-per-task": "cpus_per_node", "-c": "cpus_per_node",
    "--mem": "memory_gb", "--time": "time", "-t": "time",
    "--partition": "partition", "-p": "partition", "--account": "account", "-A": "account",
    "--qos": "qos", "-q": "qos", "--constraint": "constraint", "-C": "constraint",
    "--signal": "notice_seconds", "--requeue": "requeues", "--no-requeue": "requeues",
    "--output": "logs lie beside the runs", "-o": "logs lie beside the runs",
    "--error": "logs lie beside the runs", "-e": "logs lie beside the runs",
    "--open-mode": "attempts append to one log", "--exclusive": "exclusive",
    "--job-name": "names tell the recipe", "-J": "names tell the recipe",
}  # fmt: skip
_NOT_THEIRS = {
    "RAY_ADDRESS": "is where each job's own Ray is",
    "RAY_AUTH_MODE": "is set for each job, with a token of its own",
    "RAY_AUTH_TOKEN_PATH": "is set for each job",
    "RAY_TMPDIR": "follows scratch",
    "ROCR_VISIBLE_DEVICES": "beside CUDA_VISIBLE_DEVICES makes verl refuse to start",
    "PYTHONDONTWRITEBYTECODE": "would compile every package anew in each of a dozen processes",
}


def seconds(text: str) -> int:
    """A time as Slurm writes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S. Raises ValueError.

    >>> seconds("1-02:30"), seconds("4:00:00"), seconds("90")
    (95400, 14400, 5400)
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise ValueError(f"{text!r} is no time. Write minutes, H:M:S or D-H:M:S.")
    days, *rest = (None if part is None else int(part) for part in match.groups())
    given = [part for part in rest if part is not None]
    if days is not None:
        hours, minutes, secs = (given + [0, 0])[:3]
    elif len(given) == 3:
        hours, minutes, secs = given
    else:
        hours, minutes, secs = 0, given[0], (given + [0])[1]
    return ((days or 0) * 24 + hours) * 3600 + minutes * 60 + secs


def load(name: str) -> Profile:
    """A profile by the path of its file or the name of a shipped one. Raises ConfigError with every problem."""
    path = Path(name) if name.endswith((".yaml", ".yml")) or "/" in name else SHIPPED / f"{name}.yaml"
    if path.parent == SHIPPED and not path.is_file():
        known = sorted(file.stem for file in SHIPPED.glob("*.yaml"))
        near = strict.suggestion(name, known)
        raise ConfigError(
            [f"there is no profile {name!r}.{near} Shipped: {', '.join(known)}; or give the path of your own file."]
        )
    node = strict.parse_file(path)
    if "name" in node.mapping():
        raise node.mapping()["name"].error("a profile is named by its file. Leave it out.")
    return strict.build(Profile, node.with_value({**node.mapping(), "name": node.with_value(path.stem)}))


def from_json(values: Mapping[str, object]) -> Profile:
    """The inverse of dataclasses.asdict."""
    return strict.build(Profile, strict.from_plain(values, file="job.json", path="profile"))
