"""What runs will cost, as far as it can be known: time from steps that were measured, disk from checkpoints.

A step's time is that of the run itself, else of its arm, else of the recipe, among runs whose steps do the same work.
Where none has run yet it is unknown, and is said to be. Disk is what `save` and `samples` keep at the most at one time.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.store import RunFolder, run_folder

BYTES_PER_PARAMETER = 12
"""Of a checkpoint: float32 weights and Adam's two moments."""
BYTES_PER_TOKEN = 8
"""Of stored samples, compressed: id and text, or id and mask."""
FIRST_MEASURED = 2
"""Step 1 compiles and warms up."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Of one run; None: unknown."""

    step_seconds: float | None
    """Median of measured steps."""
    hours_left: float | None
    """Of the steps not done, without start-up and validation."""
    gpu_hours_left: float | None
    """The same times the run's workers."""
    disk_bytes: int | None
    """At the most, at one time."""


def estimate(
    specs: Sequence[RunSpec], runs_dir: Path, model_folder: Callable[[RunSpec], Path | None]
) -> dict[str, Estimate]:
    """Run id -> estimate.

    Args:
        specs: the runs of one recipe.
        runs_dir: where run folders live; read only.
        model_folder: where a run's starting model is, or will be.
    """
    steps = step_times(specs, runs_dir)
    sizes = {spec.run_id: checkpoint_bytes(run_folder(spec, runs_dir), model_folder(spec)) for spec in specs}
    return {
        spec.run_id: _estimate(spec, run_folder(spec, runs_dir), steps.get(spec.run_id), sizes[spec.run_id])
        for spec in specs
    }


def step_times(specs: Sequence[RunSpec], runs_dir: Path) -> dict[str, float]:
    """Run id -> seconds of one step, of runs of which it is known."""
    measured = {spec.run_id: step_seconds(run_folder(spec, runs_dir)) for spec in specs}
    found = {spec.run_id: _of_alike(spec, specs, measured) for spec in specs}
    return {run: seconds for run, seconds in found.items() if seconds is not None}


def same_work(one: RunSpec, other: RunSpec) -> bool:
    """Whether a step of both does as much: equal model, layout, batch, lengths and kind of KL."""
    train = replace(one.train, steps=1) == replace(other.train, steps=1)
    kind = one.model == other.model and one.kl.is_exact == other.kl.is_exact
    return train and kind and one.resources == other.resources and dict(one.verl) == dict(other.verl)


def _of_alike(spec: RunSpec, specs: Sequence[RunSpec], steps: dict[str, float | None]) -> float | None:
    """The run's own time, else the median of its arm's, else of all runs whose steps do the same work."""
    alike = [other for other in specs if same_work(spec, other)]
    for chosen in ([spec], [other for other in alike if other.arm == spec.arm], alike):
        known = [seconds for other in chosen if (seconds := steps[other.run_id]) is not None]
        if known:
            return median(known)
    return None


def _estimate(spec: RunSpec, folder: RunFolder, step: float | None, checkpoint: int | None) -> Estimate:
    left = max(0, spec.train.steps - (folder.last_step() or 0))
    hours = None if step is None else left * step / 3600
    return Estimate(
        step_seconds=step,
        hours_left=hours,
        gpu_hours_left=None if hours is None else hours * spec.resources.world_size,
        disk_bytes=None if checkpoint is None else checkpoint * checkpoints_at_once(spec) + samples_bytes(spec),
    )


def checkpoints_at_once(spec: RunSpec) -> int:
    """The most that a run has on disk: what it keeps and the one that it writes, but no more than it ever saves.

    A run that is asked to stop saves, too, so one at least.
    """
    save, steps = spec.save, spec.train.steps
    saved = steps // save.every + (save.at_end and steps % save.every > 0)
    return min(save.keep + 1, max(1, saved))


def step_seconds(folder: RunFolder) -> float | None:
    """Median time of a run's steps after the first [s]."""
    lines = [line for line in folder.read_metrics() if line["step"] >= FIRST_MEASURED]
    times = [line["time/step_s"] for line in lines if line.get("time/step_s") is not None]
    return median(times) if times else None


def samples_bytes(spec: RunSpec) -> int:
    """Of all samples that a run keeps, if every response were as long as it may be."""
    if not spec.samples.every:
        return 0
    kept = -(-spec.train.steps // spec.samples.every)
    prompts = min(spec.samples.prompts or spec.train.prompts_per_step, spec.train.prompts_per_step)
    longest = spec.train.max_prompt_tokens + spec.train.max_response_tokens
    return kept * prompts * spec.train.responses_per_prompt * longest * BYTES_PER_TOKEN


def checkpoint_bytes(folder: RunFolder, model: Path | None) -> int | None:
    """Of the run's largest checkpoint, else computed from the model's parameters."""
    found = [path for path in folder.checkpoints_dir.glob("global_step_*") if path.is_dir()]
    if found:
        return max(sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in found)
    count = None if model is None else parameters(model)
    return None if count is None else count * BYTES_PER_PARAMETER


def parameters(model: Path) -> int | None:
    """Of a model's folder, from the headers of its safetensors files; None where there are none.

    A file begins with the length of its header, 8 bytes little-endian, and the header is JSON:
    https://github.com/huggingface/safetensors#format
    """
    files = sorted(model.glob("*.safetensors")) if model.is_dir() else []
    return sum(map(_numbers, files)) if files else None


def _numbers(file: Path) -> int:
    with open(file, "rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
    return sum(_product(shape) for shape in shapes)


def _product(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def in_words(estimates: Sequence[Estimate]) -> str:
    """Of the whole plan, one line."""
    hours = [each.gpu_hours_left for each in estimates]
    disk = [each.disk_bytes for each in estimates]
    known = [value for value in hours if value is not None]
    time = f"{sum(known):.2f} worker-hours of steps left" if known else "time unknown until a run has done two steps"
    if known and len(known) < len(hours):
        time += f" in {len(known)} of {len(hours)} runs"
    sized = [value for value in disk if value is not None]
    room = f"at most {size(sum(sized))} on disk" if sized else "disk unknown until the model is here"
    if sized and len(sized) < len(disk):
        room += f" for {len(sized)} of {len(disk)} runs"
    return f"estimate: {time}; {room}"


def size(count: float) -> str:
    """Bytes in the unit that fits.

    >>> size(1_234_000)
    '1.2 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.1f} TB"
