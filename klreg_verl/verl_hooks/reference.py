"""The reference's weights on one worker: moved, hashed, saved and restored, each worker its own shard. Knows no verl.

Actor and reference are sharded alike by FSDP2, so a weight's local parts belong together and nothing is gathered. The
reference may lie on the CPU and in another dtype than the actor: copying converts. An average needs a float32 master,
since 1 % of a small change rounds to nothing in bfloat16; the reference then is the master, rounded.

Everything here is collective: every worker calls it, with the same arguments.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from klreg_verl.experiment.store import atomic_write, replacing

_CHUNK = 1 << 22
"""Weights worked on at a time: 32 MiB in 64 bits."""
RECORD = "reference.json"
"""What is known of a checkpoint's reference; beside it its weights, if it ever moved."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """The reference at one checkpoint."""

    hash: str
    """See `weights_hash`."""
    moved_at: int = 0
    """Updates after which it last moved; 0: it is still the one the run started with."""
    workers: int = 1
    """Into how many shards its weights are saved."""


class Reference:
    """The weights of the reference on this worker."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.moved_at = 0
        self._master: dict[str, Tensor] = {}

    def check_can_follow(self, policy: torch.nn.Module) -> None:
        """ValueError unless the policy's weights fit into the reference's places."""
        theirs, ours = _shapes(policy), _shapes(self.module)
        if theirs != ours:
            name = min(set(theirs.items()) ^ set(ours.items()))[0]
            raise ValueError(
                f"The reference cannot move towards the policy: {name} is {theirs.get(name)} in the policy and "
                f"{ours.get(name)} in the reference. Give a reference.path of the same architecture, or drop "
                "reference.reset_every and reference.ema."
            )

    @torch.no_grad()
    def move(self, policy: torch.nn.Module, step: int, *, ema: float | None = None) -> dict[str, float]:
        """Make the reference a copy of the policy or, given `ema`, ema * reference + (1 - ema) * policy.

        Args:
            policy: the module under training, sharded as the reference.
            step: the updates done; remembered as the time of the last move.
            ema: the share of the reference that is kept, between 0 and 1; None: nothing is.

        Returns:
            `reference/moved_at` and `reference/moved_rms`, the root mean square over all weights of this change.

        Raises:
            ValueError: the two modules' weights differ in name or shape.
        """
        self.check_can_follow(policy)
        squares = torch.zeros(2, dtype=torch.float64)
        targets = local_shards(policy)
        for name, weight in local_shards(self.module).items():
            master = None if ema is None else self._master_of(name, weight)
            squares[0] += _follow(weight, targets[name], master, ema)
            squares[1] += weight.numel()
        dist.all_reduce(squares)
        self.moved_at = step
        total, count = squares.tolist()
        return {"reference/moved_at": float(step), "reference/moved_rms": math.sqrt(total / count)}

    def _master_of(self, name: str, weight: Tensor) -> Tensor:
        """The float32 weight that is averaged: the weight itself where it is float32."""
        if weight.dtype != torch.float32 and name not in self._master:
            self._master[name] = weight.float()
        return self._master.get(name, weight)

    def hash(self) -> str:
        """See `weights_hash`."""
        return weights_hash(self.module)

    @torch.no_grad()
    def save(self, folder: Path) -> Record:
        """Write the record and, if the reference ever moved, this worker's weights. Nothing half written is left."""
        folder.mkdir(parents=True, exist_ok=True)
        record = Record(hash=self.hash(), moved_at=self.moved_at, workers=dist.get_world_size())
        if record.moved_at:
            _save_tensors(self._exact_shards(), _shard_file(folder))
        dist.barrier()  # the record names files that exist
        if dist.get_rank() == 0:
            atomic_write(folder / RECORD, json.dumps(asdict(record), indent=1))
        return record

    @torch.no_grad()
    def load(self, folder: Path) -> Record:
        """Restore what `save` wrote.

        Raises:
            ValueError: the checkpoint's reference was saved by another number of workers, or is not the one that
                results (its hash differs): a run must not go on against another reference.
        """
        record = Record(**json.loads((folder / RECORD).read_text()))
        self._master, self.moved_at = {}, record.moved_at
        if record.moved_at:
            self._load_shards(folder, record)
        if (found := self.hash()) != record.hash:
            raise ValueError(
                f"{folder}: the checkpoint's reference has the hash {record.hash}, the loaded one {found}. The run "
                "would go on against another reference: is reference.path (or the model) still the same?"
            )
        return record

    def _load_shards(self, folder: Path, record: Record) -> None:
        if record.workers != dist.get_world_size():
            raise ValueError(
                f"{folder}: the reference was saved by {record.workers} workers, this run has {dist.get_world_size()}. "
                "Resume with the same number, as verl needs for the actor."
            )
        saved = torch.load(_shard_file(folder), map_location="cpu", weights_only=True)
        for name, weight in local_shards(self.module).items():
            weight.copy_(saved[name])
            if saved[name].dtype != weight.dtype:
                self._master[name] = saved[name].to(weight.device)

    def _exact_shards(self) -> dict[str, Tensor]:
        return {name: self._master.get(name, weight) for name, weight in local_shards(self.module).items()}


def _follow(weight: Tensor, target: Tensor, master: Tensor | None, ema: float | None) -> float:
    """Make `weight` the target or, with a master, the master's new average. Returns the sum of squared changes.

    Works on some elements at a time: copies of a whole embedding in float64 would take gigabytes.
    """
    flat, aims, averages = (None if part is None else part.view(-1) for part in (weight, target, master))
    total = 0.0
    for start in range(0, weight.numel(), _CHUNK):
        part = slice(start, start + _CHUNK)
        before = flat[part].to(torch.float32, copy=True)
        flat[part] = aims[part] if averages is None else averages[part].lerp_(aims[part].to(averages), 1 - ema)
        total += float((flat[part].float() - before).double().square().sum())
    return total


def require_same(before: str | None, after: str | None) -> None:
    """RuntimeError if a frozen reference's hash has changed since the run's start; None: it was not taken."""
    if before != after:
        raise RuntimeError(
            f"The reference was to stay as it is, and its weights changed during the run: hash {before} at the start, "
            f"{after} at the end. Every KL of this run was measured against a moving reference."
        )


def local_shards(module: torch.nn.Module) -> dict[str, Tensor]:
    """Name -> this worker's part of each weight, sharing its memory. Weights tied to another appear once."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()  # FSDP may leave it whole after a forward pass, and would go on using that copy
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # verl's offloading leaves copies to the host under way
    return {name: _local(parameter) for name, parameter in module.named_parameters()}


def _local(parameter: Tensor) -> Tensor:
    weight = parameter.detach()
    return weight.to_local() if isinstance(weight, DTensor) else weight


def _shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    local_shards(module)
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def _shard_file(folder: Path) -> Path:
    return folder / f"weights_{dist.get_rank()}_of_{dist.get_world_size()}.pt"


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    with replacing(path) as temporary:
        torch.save({name: tensor.cpu() for name, tensor in tensors.items()}, temporary)


# ------------------------------------------------------------------------------------------------------- the hash

_KEPT = (1 << 48) - 1
"""A worker's sum keeps 48 bits, so that the sum over 32768 workers does not overflow."""
_GOLDEN, _FIRST, _SECOND = (value - (1 << 64) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""splitmix64's constants, as signed 64-bit integers."""


@torch.no_grad()
def weights_hash(module: torch.nn.Module) -> str:
    """64 hexadecimal digits that depend on every bit of every weight in float32, and not on the number of workers.

    sha256 over each weight's name, shape and checksum. The checksum is the sum modulo 2^48 of splitmix64(bits + place *
    golden ratio) over the weight's elements, `place` being the flat index in the whole weight: each worker sums its own
    shard, nothing is gathered. It finds any accident (one changed bit is missed once in 2^48), not an adversary.
    """
    local_shards(module)
    weights = dict(module.named_parameters())
    sums = torch.tensor([_local_sum(weight) & _KEPT for weight in weights.values()], dtype=torch.int64)
    dist.all_reduce(sums)
    lines = [
        f"{name} {tuple(weight.shape)} {total & _KEPT:012x}\n"
        for (name, weight), total in zip(weights.items(), sums.tolist(), strict=True)
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _local_sum(parameter: Tensor) -> int:
    """This worker's part of a weight's checksum; 0 where another worker holds the same part."""
    start = _flat_start(parameter)
    if start is None:
        return 0
    total = sum(_mixed_sum(chunk, start + offset) for offset, chunk in _chunks(_local(parameter)))
    return int(total)


def _chunks(shard: Tensor) -> Iterator[tuple[int, Tensor]]:
    flat = shard.reshape(-1)
    device = torch.device("cuda") if torch.cuda.is_available() else flat.device
    for offset in range(0, flat.numel(), _CHUNK):
        yield offset, flat[offset : offset + _CHUNK].to(device)


def _mixed_sum(weights: Tensor, first_place: int) -> int:
    bits = weights.float().contiguous().view(torch.int32).to(torch.int64)
    mixed = bits + torch.arange(first_place, first_place + len(bits), device=bits.device) * _GOLDEN
    mixed = (mixed ^ _shifted(mixed, 30)) * _FIRST
    mixed = (mixed ^ _shifted(mixed, 27)) * _SECOND
    return int((mixed ^ _shifted(mixed, 31)).sum())


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Unsigned right shift of signed 64-bit integers."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _flat_start(parameter: Tensor) -> int | None:
    """Flat index in the whole weight of the first element of this worker's part; None: it holds a duplicate."""
    if not isinstance(parameter, DTensor):
        return 0 if dist.get_rank() == 0 else None
    mesh, coordinate, rows = parameter.device_mesh, parameter.device_mesh.get_coordinate(), []
    for dimension, placement in enumerate(parameter.placements):
        if placement.is_shard(0):
            share = -(-parameter.shape[0] // mesh.size(dimension))  # as torch.chunk cuts
            rows.append(min(coordinate[dimension] * share, parameter.shape[0]))
        elif placement.is_replicate() and coordinate[dimension]:
            return None
    whole = all(placement.is_replicate() or placement.is_shard(0) for placement in parameter.placements)
    if not whole or len(rows) > 1:
        raise ValueError(f"Weights placed as {parameter.placements} cannot be hashed: only rows may be sharded, once.")
    return sum(rows) * math.prod(parameter.shape[1:])


# ------------------------------------------------------------------------------------ another model's vocabulary


def check_vocabulary(policy: Any, reference: Any, path: str) -> None:
    """ValueError unless two models (with `hf_config` and `tokenizer`) give the same meaning to the same token ids."""
    sizes = [model.hf_config.get_text_config().vocab_size for model in (policy, reference)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"reference.path={path}: its vocab_size is {sizes[1]}, the policy's {sizes[0]}. Their log-probabilities "
            "cannot be compared. Give a reference of the same vocabulary."
        )
    ours, theirs = (model.tokenizer.get_vocab() for model in (policy, reference))
    if ours != theirs:
        different = {token for token, _ in set(ours.items()) ^ set(theirs.items())}
        raise ValueError(
            f"reference.path={path}: its tokenizer differs from the policy's in {len(different)} tokens, "
            f"{min(different)!r} among them. Give a reference of the same vocabulary."
        )
