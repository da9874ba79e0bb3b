"""What a run left behind of one step: the checkpoint before it, its samples, and the reference at that time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from klreg_verl.experiment import provenance
from klreg_verl.experiment.kl_settings import ControllerSpec
from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.store import RunFolder, runs_root
from klreg_verl.replay import models, shards
from klreg_verl.replay.batch import pad
from klreg_verl.replay.gradients import Samples
from klreg_verl.replay.models import Model
from klreg_verl.replay.settings import RUN, Setting
from klreg_verl.verl_hooks import checkpoints
from klreg_verl.verl_hooks.reference import RECORD

_COLUMNS = ("group", "prompt_ids", "token_ids", "mask", "score")


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A run after `step` updates, about to learn from the samples of the next step."""

    folder: RunFolder
    spec: RunSpec
    step: int

    @property
    def samples_path(self) -> Path:
        return _samples_path(self.folder, self.step)

    @property
    def checkpoint(self) -> Path:
        return checkpoints.step_folder(self.folder.checkpoints_dir, self.step)

    def samples(self) -> Samples:
        """The batch of the next step. Raises ValueError where it cannot be read or lacks what was not always saved."""
        rows = _table(self.samples_path)
        number = {group: place for place, group in enumerate(dict.fromkeys(rows["group"]))}
        train = self.spec.train
        return Samples(
            batch=pad(rows["prompt_ids"], rows["token_ids"], rows["mask"]),
            group_ids=torch.tensor([number[group] for group in rows["group"]]),
            scores=torch.tensor(rows["score"], dtype=torch.float32),
            temperature=train.temperature,
            advantage=train.advantage,
            aggregation=train.policy_aggregation,
            scale_factor=train.max_response_tokens,
        )

    def own_setting(self) -> list[Setting]:
        """The run's own KL term at the beta of that step; empty without one, and where it is on other responses."""
        kl, beta = self.spec.kl, self.logged("kl/beta")
        if kl.placement == "none" or kl.is_drawn:
            return []
        return [Setting(name=RUN, kl=replace(kl, beta=kl.beta if beta is None else beta, controller=ControllerSpec()))]

    def logged_gradient_norm(self) -> float | None:
        """That of the update's whole loss, before clipping; None unless the batch was updated on once."""
        known = self.spec.train.updates_per_batch == 1 and not self.spec.kl.is_drawn
        return self.logged("actor/grad_norm") if known else None

    def logged(self, key: str) -> float | None:
        """A metric that the run wrote about exactly these samples; None without one, or where it kept only some."""
        lines = {line["step"]: line for line in self.folder.read_metrics()}
        found = lines.get(self.step + 1, {}).get(key)
        return found if key == "kl/beta" or self.spec.samples.prompts is None else None


def find(run: Path, step: int | None = None) -> Moment:
    """A run after `step` updates; by default the newest checkpoint with samples of the step that followed.

    `run` is a run folder, or its path below the runs folder (KLREG_RUNS). Step 0 is the starting model.

    Raises:
        ValueError: no such run; nothing was kept of that step.
    """
    folder = RunFolder(run if run.is_dir() else runs_root() / run)
    spec = folder.spec()
    if spec is None:
        raise ValueError(f"{run} is no run folder: it has no spec.json. Give runs/<recipe>/<arm>/<task>/seed<k>.")
    kept = _steps(folder)
    if not kept or (step is not None and step not in kept):
        known = ", ".join(map(str, kept)) or "none"
        asked = "" if step is None else f" of step {step}"
        raise ValueError(
            f"{folder.path} has no whole checkpoint{asked} with samples of the step after it. Steps that have both: "
            f"{known}. `save: {{every}}` and `samples: {{every}}` of a recipe say what is kept."
        )
    return Moment(folder=folder, spec=spec, step=kept[-1] if step is None else step)


def _steps(folder: RunFolder) -> list[int]:
    """Steps that can be replayed, ascending."""
    root = folder.checkpoints_dir
    whole = [step for step in checkpoints.steps(root) if not checkpoints.problems(checkpoints.step_folder(root, step))]
    return [step for step in (0, *whole) if _samples_path(folder, step).is_file()]


def _samples_path(folder: RunFolder, step: int) -> Path:
    return folder.samples_dir / f"step_{step + 1:06d}.parquet"


def _table(path: Path) -> dict[str, list[Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}") from error
    if missing := [name for name in _COLUMNS if name not in table.column_names]:
        raise ValueError(f"{path} has no column {missing[0]!r}: its run was made by a version that did not save it.")
    return {name: table[name].to_pylist() for name in _COLUMNS}


# ---------------------------------------------------------------------------------------------------- models


def load_models(
    moment: Moment, *, reference: Path | None, device: str, note: Callable[[str], None]
) -> tuple[Model, Model]:
    """(policy, reference) of a moment.

    Args:
        moment: which.
        reference: in place of the folder that the run's provenance names, e.g. because it was moved.
        device: where both go.
        note: told when the reference's files are not those that the run saw.

    Raises:
        ValueError: a model is not there, cannot be loaded, or the vocabularies differ.
    """
    options: dict[str, Any] = {"device": device, "trust_remote_code": moment.spec.model.trust_remote_code}
    start, start_hash = _recorded(moment, "model")
    policy = models.load(start if moment.step == 0 else moment.checkpoint, **options)
    path, expected = (start, start_hash) if moment.spec.reference.path is None else _recorded(moment, "reference")
    path = reference or path
    if not path.is_dir():
        raise ValueError(f"The run's reference, {path}, is not there any more. Say where it is: --reference FOLDER.")
    if expected is not None and provenance.hash_path(path) != expected:
        note(f"{path} is not the reference that the run saw: its files have another hash.")
    found = _moved(models.load(path, **options), moment)
    models.check_same_vocabulary(policy, found)
    return policy, found


def _recorded(moment: Moment, name: str) -> tuple[Path, str | None]:
    """Path and hash of the run's model or reference."""
    record = json.loads(moment.folder.provenance_path.read_text()) if moment.folder.provenance_path.is_file() else {}
    entry, spec = record.get(name, {}), getattr(moment.spec, name)
    return Path(entry.get("path") or spec.path), entry.get("sha256")


def _moved(reference: Model, moment: Moment) -> Model:
    """The reference as it was after `step` updates: one with reset or average is saved with each checkpoint."""
    if moment.step == 0 or not moment.spec.reference.moves:
        return reference
    record = moment.checkpoint / RECORD
    if not record.is_file():
        raise ValueError(f"{moment.checkpoint} holds no {RECORD}, and the reference moves in this run: it is unknown.")
    known = json.loads(record.read_text())
    if not known["moved_at"]:
        return reference
    shapes = {name: weight.shape for name, weight in reference.network.named_parameters()}
    weights = shards.load_reference_weights(moment.checkpoint, known["workers"], shapes)
    reference.network.load_state_dict(weights, strict=False)
    return replace(reference, path=moment.checkpoint)
