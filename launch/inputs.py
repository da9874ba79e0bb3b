"""The files a run reads: parquet data and starting model, built here (cached by content) or the user's own; its KL."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from data_prep.cache import content_hash, options_from
from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.recipe import KLBlock, ModelSpec, TaskSpec
from klreg_verl.experiment.store import RunFolder
from klreg_verl.verl_hooks.overrides import Files

Note = Callable[[str], None]


def cache_root(runs_dir: Path) -> Path:
    """Where built data and models live: KLREG_CACHE, or .cache beside the runs."""
    return Path(os.environ.get("KLREG_CACHE") or runs_dir / ".cache").expanduser().resolve()


def run_folder(spec: RunSpec, runs_dir: Path) -> RunFolder:
    """runs/<recipe>/<arm>/<task>/[<grid>/]seed<k>."""
    return RunFolder(runs_dir / spec.recipe / spec.run_id)


def prepare(spec: RunSpec, runs_dir: Path, note: Note) -> Files:
    """Build what is missing; returns absolute paths.

    Args:
        spec: the run.
        runs_dir: where run folders and the cache live.
        note: told what is built and how far it is.
    """
    train, val = task_files(spec.task, cache_root(runs_dir), note)
    model = model_folder(spec.model, cache_root(runs_dir), note)
    return Files(train=train, val=val, model=model, checkpoints=_checkpoints(spec, runs_dir))


def planned_files(spec: RunSpec, runs_dir: Path) -> Files:
    """Where everything is or will be; builds nothing."""
    cache = cache_root(runs_dir)
    train, val = Path(spec.task.train or ""), Path(spec.task.val or "")
    if spec.task.builtin is not None:
        data = _cache_folder(cache, "palindrome", "palindrome", "PalindromeOptions", spec.task.options)
        train, val = data / "train.parquet", data / "test.parquet"
    model = Path(spec.model.path)
    if spec.model.path == "tiny":
        model = _cache_folder(cache, "tiny-model", "tiny_model", "TinyModelOptions", spec.model.options)
    return Files(train=train, val=val, model=model, checkpoints=_checkpoints(spec, runs_dir))


def _cache_folder(cache: Path, name: str, module: str, options: str, values: Mapping[str, Any]) -> Path:
    """The builder's cache folder; its name alone where the builder's packages are not installed."""
    try:
        builder = importlib.import_module(f"data_prep.{module}")
    except ImportError:
        return cache / name
    typed = options_from(getattr(builder, options), values, "options")
    return cache / f"{name}-{content_hash(typed, Path(builder.__file__ or ''))}"


def _checkpoints(spec: RunSpec, runs_dir: Path) -> Path:
    return run_folder(spec, runs_dir).checkpoints_dir.absolute()


def kl_yaml(spec: RunSpec) -> str:
    """The run's KL block as the file that KLREG_KL names; JSON is YAML. What is as by default is left out."""
    block = KLBlock(kl=spec.kl, reference=spec.reference, probes=spec.probes, alarms=spec.alarms)
    return json.dumps({"kl": {"placement": spec.kl.placement}, **_written(block)}, indent=1) + "\n"


def _written(section: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not as by default, dataclasses inside them likewise."""
    changed = {entry.name: getattr(section, entry.name) for entry in fields(section)}
    changed = {name: value for name, value in changed.items() if value != getattr(type(section)(), name)}
    return {name: _written(value) if is_dataclass(value) else value for name, value in changed.items()}


def task_files(task: TaskSpec, cache: Path, note: Note) -> tuple[Path, Path]:
    """Training and validation parquet of a task."""
    if task.builtin is None:
        assert task.train is not None and task.val is not None  # TaskSpec refuses anything else
        return Path(task.train), Path(task.val)
    from data_prep import palindrome

    options = palindrome_options(task.options)
    folder = palindrome.cache(options, cache, _reporter(note, "Palindrome data"))
    return folder / "train.parquet", folder / "test.parquet"


def palindrome_options(options: Mapping[str, Any]) -> Any:
    """The builtin's options, typed. Raises ValueError on an unknown one."""
    from data_prep.palindrome import PalindromeOptions

    return options_from(PalindromeOptions, options, "tasks.<name>.options")


def model_folder(model: ModelSpec, cache: Path, note: Note) -> Path:
    """The starting model: built here, a folder, or a snapshot of a Hugging Face id at its revision."""
    if model.path == "tiny":
        from data_prep import tiny_model

        options = options_from(tiny_model.TinyModelOptions, model.options, "model.options")
        return tiny_model.cache(options, cache, _reporter(note, "tiny model"))
    if Path(model.path).is_absolute():
        return Path(model.path)
    from huggingface_hub import snapshot_download

    note(f"Model {model.path} ({model.revision or 'newest revision'}) from the Hugging Face cache or Hub")
    return Path(snapshot_download(model.path, revision=model.revision))


def _reporter(note: Note, what: str) -> Callable[[int, int, str], None]:
    """A builder's progress as a few notes: at the start, at each quarter, at the end."""
    told = {-1}

    def report(done: int, total: int, text: str) -> None:
        quarter = 4 * done // max(total, 1)
        if quarter not in told:
            told.add(quarter)
            note(f"{what}: {text} ({100 * done // max(total, 1)} %)")

    return report
