"""What a machine offers a run besides its GPUs: slots of Ray, memory, a compiler for kernels made while it runs."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path

CGROUPS, CGROUP_ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


FEWEST_SLOTS = 16
"""Ray's CPUs are slots here, and with too few a run waits for ever."""


def ray_slots(workers: int) -> int:
    """Slots that verl needs on a node with so many workers: three each in its resource pool, nine for TransferQueue's
    controller and storage units, and one that is free whenever another actor is placed."""
    return max(FEWEST_SLOTS, 3 * workers + 12)


FEW_PARAMETERS = 20_000_000
"""Of a model whose products are so small that a second thread costs more than it computes."""


def threads(parameters: int | None, workers: int) -> int:
    """Threads for each operation of a CPU run: one for a tiny model, else all cores. Sampling and training take turns;
    only training workers compute at the same time.

    Args:
        parameters: of the model; None: not known, so not tiny.
        workers: training workers on this machine.
    """
    if parameters is not None and parameters < FEW_PARAMETERS:
        return 1
    return max(1, len(os.sched_getaffinity(0)) // workers)


def memory_available(cgroups: Path = CGROUPS, root: Path = CGROUP_ROOT) -> int:
    """Bytes for this job's processes: what the machine has free, at most its cgroup's limit, of which little is taken
    before a run."""
    import psutil  # part of the stack

    return min([int(psutil.virtual_memory().available), *_limits(cgroups, root)])


def _limits(cgroups: Path, root: Path) -> Iterator[int]:
    """Of this process's cgroup and those above it, which hold for it, too; version 1 says no limit as a huge number."""
    for file in _limit_files(cgroups.read_text() if cgroups.exists() else "", root):
        said = file.read_text().strip() if file.is_file() else "max"
        if said.isdecimal():
            yield int(said)


def _limit_files(text: str, root: Path) -> Iterator[Path]:
    """`number:controllers:path` a line; version 2 names no controllers. A path out of a namespace has `..`."""
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        own = base if ".." in path else base / path.lstrip("/")
        yield from (folder / name for folder in (own, *own.parents) if folder.is_relative_to(base))


def check_compiler(environment: Mapping[str, str], include: Path | None = None) -> str:
    """A C compiler, as Triton looks for it, and this Python's headers; returns the compiler.

    Args:
        environment: of the processes that compile.
        include: where Python.h should be; None: where this Python has it.

    Raises:
        ValueError: one of them is missing.
    """
    named = [environment["CC"]] if environment.get("CC") else ["gcc", "clang"]
    found = next(filter(None, (shutil.which(name, path=environment.get("PATH")) for name in named)), None)
    if found is None:
        raise ValueError(
            f"There is no C compiler ({' or '.join(named)} on the PATH), and Triton compiles a launcher for each "
            "kernel of vLLM and torch when it first runs. Install one (apt-get install gcc), load its module, or name "
            "it in CC."
        )
    own = include or _include()
    if not any((folder / "Python.h").is_file() for folder in (own, *_searched(environment))):
        python = f"python{sys.version_info.major}.{sys.version_info.minor}"
        raise ValueError(
            f"{own}/Python.h is not there, and what Triton compiles for each kernel includes it. Install this Python's "
            f"headers (apt-get install {python}-dev), name their folder in CPATH, or make the environment with a "
            "Python that has them."
        )
    return found


def _searched(environment: Mapping[str, str]) -> list[Path]:
    """Where a C compiler looks, too."""
    said = [environment.get(name, "") for name in ("CPATH", "C_INCLUDE_PATH")]
    return [Path(folder) for folder in os.pathsep.join(said).split(os.pathsep) if folder]


def _include() -> Path:
    """As Triton asks for it; Debian's own scheme names a folder without headers."""
    scheme = sysconfig.get_default_scheme()
    return Path(sysconfig.get_paths(scheme="posix_prefix" if scheme == "posix_local" else scheme)["include"])
