"""The weights that verl's FSDP workers saved, put together without verl and without starting any process.

verl writes `model_world_size_<W>_rank_<R>.pt` for every worker: a state dict of DTensors, each with the worker's part
and the mesh of workers that it belongs to.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_NAME = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")


def has_shards(folder: Path) -> bool:
    """Whether a folder holds the weights of at least one FSDP worker."""
    return any(_NAME.fullmatch(path.name) for path in folder.glob("model_world_size_*.pt"))


def load_shards(folder: Path) -> dict[str, Tensor]:
    """Name -> whole weight, on the CPU, in the dtype that was saved.

    Raises ValueError if the shards of a worker are missing, belong to different numbers of workers, or do not fit.
    """
    ranks = [_read(path) for path in _files(folder)]
    return {name: _merged(name, [rank[name] for rank in ranks], folder) for name in ranks[0]}


def _files(folder: Path) -> list[Path]:
    """One per worker, in the order of their ranks."""
    found = [match for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    workers = {int(match[1]) for match in found}
    if len(workers) != 1:
        raise ValueError(f"{folder} holds shards of {sorted(workers)} workers. Keep those of one save.")
    expected = [folder / f"model_world_size_{size}_rank_{rank}.pt" for size in workers for rank in range(size)]
    if missing := [path.name for path in expected if not path.is_file()]:
        raise ValueError(
            f"{folder} lacks {', '.join(missing)}: every worker saves its own part. Copy them from the worker's node."
        )
    return expected


def _read(path: Path) -> dict[str, Any]:
    import torch.distributed.tensor  # noqa: F401 (makes DTensors known to the safe loader)

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Restore it, or take another checkpoint.") from error


def _merged(name: str, parts: list[Any], folder: Path) -> Tensor:
    from torch.distributed.tensor import DTensor

    first = parts[0]
    if not isinstance(first, DTensor):
        return first  # a buffer, whole on every worker
    mesh = first.device_mesh.mesh
    whole = _along(list(first.placements), mesh, parts)
    if whole.shape != first.shape:
        raise ValueError(f"{folder}: the parts of {name} make {tuple(whole.shape)} and not {tuple(first.shape)}.")
    return whole


def _along(placements: list[Any], mesh: Tensor, parts: list[Any]) -> Tensor:
    """Joins over the mesh's dimensions, the last one first: parts of rows are parts of parts of rows."""
    if not placements:
        return parts[int(mesh)]._local_tensor  # to_local() would ask for a process group
    first, *rest = placements
    if first.is_replicate():
        return _along(rest, mesh[0], parts)
    if not first.is_shard():
        raise ValueError(f"A weight that is placed as {first} cannot be put together: only shards and copies can.")
    return torch.cat([_along(rest, row, parts) for row in mesh], dim=first.dim)


def load_reference_weights(folder: Path, workers: int, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The weights of a reference that moved, as verl_hooks/reference.py saved them: each worker its rows.

    Raises ValueError where a worker's file is missing, or the rows do not make the model's `shapes`.
    """
    paths = [folder / f"weights_{rank}_of_{workers}.pt" for rank in range(workers)]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise ValueError(f"{folder} lacks {', '.join(missing)}: every worker saves its own part of the reference.")
    parts = [_read(path) for path in paths]
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if wrong := [name for name, weight in whole.items() if weight.shape != shapes.get(name)]:
        raise ValueError(f"{folder}: the reference's {wrong[0]} does not fit the run's model.")
    return whole
