"""Writes a run's folder from inside the trainer: metrics.jsonl, samples, and the end of each checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from klreg_verl.experiment.store import RunFolder
from klreg_verl.verl_hooks import checkpoints
from klreg_verl.verl_hooks.plugin import RUN_VARIABLE


class Recorder:
    """The run folder named by KLREG_RUN. One of verl's trackers: `log` is called once a step with all metrics."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        spec = folder.spec()
        if spec is None:
            raise ValueError(f"{RUN_VARIABLE}={folder.path} is not a run folder: it has no spec.json.")
        self.spec = spec
        self._owner = folder.owner()
        self._unmarked: int | None = None

    @classmethod
    def from_environment(cls) -> Recorder | None:
        """None where a user's own command runs without a run folder."""
        path = os.environ.get(RUN_VARIABLE)
        return cls(RunFolder(Path(path))) if path else None

    def resume_at(self, step: int) -> None:
        """Continue after `step` updates: later lines of an attempt that was lost move to this attempt's folder."""
        self.folder.discard_after(step if step > 0 else -1, self.folder.latest.resolve())

    def wants_checkpoint(self, step: int) -> bool:
        """verl saves the last step whenever it saves at all; `save.at_end: false` is for large models."""
        return self.spec.save.at_end or step % self.spec.save.every == 0 or self.folder.stop_asked()

    def has_saved(self, step: int) -> bool:
        """Whether verl has written this step's checkpoint, which its metrics line will make whole."""
        return self._unmarked == step

    def checkpoint_saved(self, step: int) -> None:
        """verl has written its files; the checkpoint counts once this step's line is on the disk, too."""
        self._unmarked = step

    def log(self, data: dict[str, Any], step: int) -> None:
        """Append one line; then declare this step's checkpoint whole and remove the oldest.

        Raises:
            RuntimeError: the process that started this attempt is gone, so another one may write here now.
        """
        if self._owner is not None and not self.folder.still_owned(self._owner):
            raise RuntimeError(
                f"{self.folder.path} is no longer held by the process that started this attempt: it was killed, and "
                f"another one may write here now. Step {step} was not written. Run the same command again to resume."
            )
        self.folder.append_metrics(step, numbers(data))
        if self._unmarked == step:
            checkpoints.mark_complete(checkpoints.step_folder(self.folder.checkpoints_dir, step))
            checkpoints.prune(self.folder.checkpoints_dir, self.spec.save.keep)
            self._unmarked = None

    def wants_samples(self, step: int) -> bool:
        """Whether the recipe asks for this step's samples."""
        every = self.spec.samples.every
        return bool(every) and (step - 1) % every == 0

    def write_samples(self, step: int, columns: dict[str, list[Any]]) -> None:
        """samples/step_<n>.parquet, of as many prompts as the recipe asks for."""
        policy, table = self.spec.samples, _table(columns)
        if policy.prompts is not None:
            numbered = sorted(set(columns["group"]), key=lambda group: (len(group), group))  # 9 before 10
            table = table.filter(pa.array([group in numbered[: policy.prompts] for group in columns["group"]]))
        self.folder.write_samples(step, table)


def _table(columns: dict[str, list[Any]]) -> pa.Table:
    """`valid` keeps its type where a reward grades and nothing is valid or not."""
    return pa.table(columns | {"valid": pa.array(columns["valid"], pa.bool_())} if "valid" in columns else columns)


def numbers(data: Mapping[str, Any]) -> dict[str, float]:
    """The scalars among verl's metrics (a few are tables or text)."""
    return {key: float(value) for key, value in data.items() if np.isscalar(value) and not isinstance(value, str)}
