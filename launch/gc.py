"""What run folders hold that nobody needs: `klreg gc` lists it, and removes it with --yes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.store import RunFolder, atomic_write, run_folder
from klreg_verl.verl_hooks import checkpoints
from launch.preflight import WEIGHTS_ONLY, check_same


@dataclass(frozen=True, kw_only=True)
class Waste:
    """Something to remove."""

    path: Path
    why: str
    bytes: int


def find(specs: Sequence[RunSpec], runs_dir: Path, optimizer: bool) -> list[Waste]:
    """Of runs that nobody works in; of done ones also older checkpoints and, if asked for, the optimizer's state.

    Raises ValueError for a folder that holds another run.
    """
    check_same(specs, runs_dir)
    found = []
    for spec in specs:
        folder = run_folder(spec, runs_dir)
        if folder.path.exists() and not folder.is_locked():
            found += _of_run(folder, folder.is_done(spec), optimizer)
    return found


def _of_run(folder: RunFolder, is_done: bool, optimizer: bool) -> list[Waste]:
    root = folder.checkpoints_dir
    found = [_waste(path, "a checkpoint that was not whole") for path in sorted(root.glob("incomplete_*"))]
    newest = checkpoints.newest_complete(root)
    if not is_done or newest is None:
        return found
    older = [step for step in checkpoints.steps(root) if step < newest]
    found += [_waste(checkpoints.step_folder(root, step), "an older checkpoint of a done run") for step in older]
    if optimizer:
        files = sorted(checkpoints.step_folder(root, newest).rglob("optim_*.pt"))
        found += [_waste(path, "optimizer state of a done run, which then cannot be extended") for path in files]
    return found


def _waste(path: Path, why: str) -> Waste:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return Waste(path=path, why=why, bytes=sum(file.stat().st_size for file in files))


def remove(found: Sequence[Waste]) -> None:
    """Remove it all. A checkpoint that loses its optimizer is first marked so, and its list of files follows."""
    for waste in found:
        if waste.path.is_dir():
            shutil.rmtree(waste.path)
        else:
            _remove_optimizer(waste.path)


def _remove_optimizer(file: Path) -> None:
    folder = next(parent for parent in file.parents if parent.name.startswith(checkpoints.PREFIX))
    (folder / WEIGHTS_ONLY).touch()
    marker = folder / checkpoints.MARKER
    files = json.loads(marker.read_text())
    files.pop(str(file.relative_to(folder)), None)
    atomic_write(marker, json.dumps(files, indent=1, sort_keys=True))
    file.unlink()
