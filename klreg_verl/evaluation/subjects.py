"""What `klreg eval` is asked to look at: a run at some step, a checkpoint, or a model folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klreg_verl.evaluation import export
from klreg_verl.experiment import provenance
from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.store import RunFolder, runs_root
from klreg_verl.verl_hooks import checkpoints

Note = Callable[[str], None]

WEIGHTS = ("*.safetensors", "*.bin")
FRAME = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")
"""What a model is besides its weights: configuration, tokenizer, templates, code."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One model to evaluate."""

    name: str
    """As tables show it."""
    step: int
    """Updates done; 0 for a model that is no checkpoint of a run."""
    path: Path
    """Model folder, or checkpoint that is exported first."""
    evals: Path
    """Where its evaluations lie."""
    run: RunFolder | None = None
    is_start: bool = False
    """Whether it is the model that the run started from."""

    def folder(self, note: Note) -> Path:
        """The Hugging Face folder; a checkpoint is exported, unless its export is there. Raises ValueError."""
        actor = export.actor_folder(self.path)
        if actor is None:
            return self.path
        target = self.exported
        if target.is_dir() and not export.is_current(target, actor):
            note(f"{target} is of other weights than the checkpoint's, or of another dtype: exported anew")
            _remove(target)
        if not target.is_dir():
            note(f"exporting {self.name} to {target}")
            facts = {"run": None if self.run is None else str(self.run.path), "step": self.step}
            export.export(self.path, target, facts=facts)
        return target

    @property
    def exported(self) -> Path:
        """Where the export of this checkpoint goes by default; of one without a run, by the checkpoint's own path."""
        if self.run is not None:
            return self.run.path / "exports" / f"step{self.step}"
        place = hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:8]
        return self.evals.parent / "exports" / f"step{self.step}-{place}"


def find(text: str, out: Path | None = None) -> list[Subject]:
    """The models that an argument names.

    `RUN` (a run folder, or its path below the runs folder) is its newest whole checkpoint, `RUN@20` the one of step 20,
    `RUN@0` its starting model, `RUN@all` all that are whole; else the folder of a checkpoint or of a model. `out` is
    where evaluations go that do not belong to a run (default: an `evals` folder beside the model).

    Raises ValueError for what is none of these, or a step of which nothing whole is kept.
    """
    name, at, which = text.rpartition("@")
    place = Path(name if at else which).expanduser()
    run = _run(place)
    if run is not None:
        return _of_run(run, which if at else "", text)
    path = Path(text).expanduser()
    if not path.is_dir():
        raise ValueError(f"{text} is neither a run nor a folder. Give RUN, RUN@STEP, a checkpoint, or a model folder.")
    return [_of_checkpoint(path, out) or _of_model(path, out)]


def start_of(run: RunFolder) -> Subject:
    """The model that a run started from, as its provenance names it."""
    spec, record = _spec(run), read_provenance(run)
    path = Path(record.get("model", {}).get("path") or spec.model.path)
    if not path.is_dir():
        raise ValueError(
            f"{run.path}: its starting model, {path}, is not there any more. Give it with --start FOLDER, or leave the "
            "comparison out with --no-start."
        )
    return Subject(name=f"{spec.run_id} start", step=0, path=path, evals=run.evals_dir, run=run, is_start=True)


def read_provenance(run: RunFolder) -> dict[str, Any]:
    """provenance.json; empty where there is none."""
    return json.loads(run.provenance_path.read_text()) if run.provenance_path.is_file() else {}


def _run(place: Path) -> RunFolder | None:
    for path in (place, runs_root() / place):
        if (path / "spec.json").is_file():
            return RunFolder(path.resolve())
    return None


def _spec(run: RunFolder) -> RunSpec:
    spec = run.spec()
    assert spec is not None  # _run looked for it
    return spec


def _of_run(run: RunFolder, which: str, text: str) -> list[Subject]:
    root = run.checkpoints_dir
    whole = [step for step in checkpoints.steps(root) if not checkpoints.problems(checkpoints.step_folder(root, step))]
    if which == "0":
        return [start_of(run)]
    wanted = whole[-1:] if which == "" else whole if which == "all" else [int(which)] if which.isdigit() else []
    if not wanted or not set(wanted) <= set(whole):
        known = ", ".join(map(str, [0, *whole]))
        raise ValueError(
            f"{text}: {run.path} has no whole checkpoint of that step. Steps that can be evaluated: {known} (0 is the "
            "starting model). `save: {every, keep, at_end}` of a recipe says what is kept."
        )
    return [_checkpoint_of(run, step) for step in wanted]


def _checkpoint_of(run: RunFolder, step: int) -> Subject:
    path = checkpoints.step_folder(run.checkpoints_dir, step)
    return Subject(name=f"{_spec(run).run_id} step {step}", step=step, path=path, evals=run.evals_dir, run=run)


def _of_checkpoint(path: Path, out: Path | None) -> Subject | None:
    """A folder with shards; one inside a run folder belongs to the run."""
    if export.actor_folder(path) is None:
        return None
    path = path.resolve()
    path = path.parent if path.name == "actor" else path
    step = int(path.name.removeprefix(checkpoints.PREFIX)) if path.name.startswith(checkpoints.PREFIX) else 0
    run = _run(path.parent.parent)
    if run is not None and path.parent == run.checkpoints_dir:
        if found := checkpoints.problems(path):
            raise ValueError("\n".join(found))
        return _checkpoint_of(run, step)
    return Subject(name=path.name, step=step, path=path, evals=(out or path.parent / "evals").resolve())


def _of_model(path: Path, out: Path | None) -> Subject:
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} holds no model: neither config.json, nor shards of verl's workers, nor spec.json.")
    path = path.resolve()
    card = export.card(path)
    evals = (out or path.parent / "evals" / path.name).resolve()
    name = path.name if not card.get("run") else f"{Path(card['run']).name} {path.name}"
    return Subject(name=name, step=int(card.get("step") or 0), path=path, evals=evals)


def model_hash(folder: Path) -> str:
    """sha256 of weights, configuration and tokenizer; other files of the folder do not matter."""
    return _hash(folder, (*WEIGHTS, *FRAME))


def frame_hash(folder: Path) -> str:
    """The same without the weights: models of one frame can take turns in one engine."""
    return _hash(folder, FRAME)


_APART = (export.CARD, "card.json")


def _hash(folder: Path, patterns: Sequence[str]) -> str:
    digest = hashlib.sha256()
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    for path in files:
        if path.name not in _APART:
            digest.update(f"{path.name}\0{_content(path)}\n".encode())
    return digest.hexdigest()


_OF_THE_WRITER = ("transformers_version", "_name_or_path", "is_local", "local_files_only")


def _content(path: Path) -> str:
    """A configuration goes by what it says: which version of transformers wrote it, and from where, is no property."""
    if path.name not in ("config.json", "generation_config.json", "tokenizer_config.json"):
        return provenance.hash_path(path)
    values = json.loads(path.read_text())
    said = {key: value for key, value in values.items() if key not in _OF_THE_WRITER}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder)
