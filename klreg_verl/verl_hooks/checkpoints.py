"""Which of verl's checkpoints are whole, and which one a run resumes from.

verl 0.9.1 writes shards in place without a marker, its tracker file without a temporary name, and forgets what it
saved after a restart. So a checkpoint counts only once `COMPLETE` names each of its files with its size; that marker
is written after the step's metrics line, hence no step is lost or doubled however a run dies.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from klreg_verl.experiment.store import atomic_write

MARKER = "COMPLETE"
TRACKER = "latest_checkpointed_iteration.txt"
PREFIX = "global_step_"


def step_folder(root: Path, step: int) -> Path:
    """verl's folder of the checkpoint after `step` updates."""
    return root / f"{PREFIX}{step}"


def mark_complete(folder: Path) -> None:
    """Flush every file of a finished checkpoint to the disk, then name them all in the marker."""
    files = {str(path.relative_to(folder)): path.stat().st_size for path in _files(folder)}
    for path in _files(folder):
        _flush(path)
    atomic_write(folder / MARKER, json.dumps(files, indent=1, sort_keys=True))


def problems(folder: Path) -> list[str]:
    """Why a checkpoint cannot be resumed from, file by file; empty if it is whole."""
    marker = folder / MARKER
    if not marker.is_file():
        return [f"{folder.name}: no {MARKER} marker (the run ended while it was being saved)"]
    try:
        expected: dict[str, int] = json.loads(marker.read_text())
    except ValueError:
        return [f"{folder.name}: its {MARKER} marker cannot be read (the disk lost it)"]
    if not expected:
        return [f"{folder.name}: its {MARKER} marker names no file (is the folder shared by all nodes?)"]
    return [
        f"{folder.name}/{name}: {'missing' if found is None else f'{found} bytes'}, expected {size} bytes"
        for name, size in expected.items()
        if (found := _size(folder / name)) != size
    ]


def steps(root: Path) -> list[int]:
    """Steps of all checkpoint folders, whole or not, ascending."""
    names = (path.name.removeprefix(PREFIX) for path in root.glob(f"{PREFIX}*") if path.is_dir())
    return sorted(int(name) for name in names if name.isdigit())


def newest_complete(root: Path) -> int | None:
    """The step that a run resumes from, or None."""
    return next((step for step in reversed(steps(root)) if not problems(step_folder(root, step))), None)


def repair(root: Path) -> list[str]:
    """Make verl resume from the newest whole checkpoint: what is not whole is put aside, the tracker is rewritten.

    Returns:
        What was found and done, a line each; empty if nothing was wrong.
    """
    newest = newest_complete(root)
    notes = []
    for step in steps(root):
        found = problems(step_folder(root, step))
        if found:
            notes += [f"put aside: {line}" for line in found]
            _put_aside(step_folder(root, step))
    _write_tracker(root, newest)
    return notes


def prune(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` whole checkpoints, and what was put aside before them."""
    whole = [step for step in steps(root) if not problems(step_folder(root, step))]
    for step in whole[:-keep]:
        shutil.rmtree(step_folder(root, step))
    for folder in root.glob("incomplete_*"):
        shutil.rmtree(folder)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _put_aside(folder: Path) -> None:
    target = folder.with_name(f"incomplete_{folder.name}")
    shutil.rmtree(target, ignore_errors=True)
    folder.rename(target)


def _write_tracker(root: Path, step: int | None) -> None:
    if step is not None:
        atomic_write(root / TRACKER, str(step))
    else:
        (root / TRACKER).unlink(missing_ok=True)
