"""The files a run reads: parquet data and starting model, built here (cached by content) or the user's own; its KL."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from data_prep import smollm2, tiny_options
from data_prep.cache import Progress, options_from
from klreg_verl.experiment import strict
from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.recipe import KLBlock, ModelSpec
from klreg_verl.experiment.settings import SMOLLM2
from klreg_verl.experiment.store import cache_root, run_folder
from klreg_verl.verl_hooks.overrides import Files
from launch import gpu, retained

Note = Callable[[str], None]


def prepare(spec: RunSpec, runs_dir: Path, note: Note) -> Files:
    """Build what is missing; returns absolute paths.

    Args:
        spec: the run.
        runs_dir: where run folders and the cache live.
        note: told what is built and how far it is.
    """
    cache = cache_root(runs_dir)
    train, val = task_files(spec, cache, note)
    model = model_folder(spec.model, cache, note)
    skills = retained.build(spec, val, model, cache, note)
    return Files(train=train, val=val, retention=skills, model=model, checkpoints=_checkpoints(spec, runs_dir))


def planned_files(spec: RunSpec, runs_dir: Path) -> Files:
    """Where everything is or will be; builds nothing."""
    cache = cache_root(runs_dir)
    train, val = Path(spec.task.train or ""), Path(spec.task.val or "")
    if spec.task.builtin is not None:
        data = importlib.import_module(f"data_prep.{spec.task.builtin}").planned(task_options(spec), cache)
        train, val = data / "train.parquet", data / "test.parquet"
    model = Path(spec.model.path)
    if spec.model.path == "tiny":
        options = options_from(tiny_options.TinyModelOptions, spec.model.options, "options")
        model = tiny_options.planned(options, cache)
    if spec.model.path == SMOLLM2:
        model = smollm2.planned(cache)
    skills = retained.planned(spec, val, cache)
    return Files(train=train, val=val, retention=skills, model=model, checkpoints=_checkpoints(spec, runs_dir))


def _checkpoints(spec: RunSpec, runs_dir: Path) -> Path:
    return run_folder(spec, runs_dir).checkpoints_dir.absolute()


def kl_yaml(spec: RunSpec) -> str:
    """The run's KL block as the file that KLREG_KL names; JSON is YAML. What is as by default is left out."""
    block = KLBlock(kl=spec.kl, reference=spec.reference, probes=spec.probes, alarms=spec.alarms)
    written = strict.away_from_default(block, asdict(block))
    return json.dumps({"kl": {"placement": spec.kl.placement}, **written}, indent=1) + "\n"


def task_files(spec: RunSpec, cache: Path, note: Note) -> tuple[Path, Path]:
    """Training and validation parquet of a run's task."""
    task = spec.task
    if task.builtin is None:
        assert task.train is not None and task.val is not None  # TaskSpec refuses anything else
        return Path(task.train), Path(task.val)
    builder = importlib.import_module(f"data_prep.{task.builtin}")
    folder = builder.cache(task_options(spec), cache, _reporter(note, f"{BUILTINS[task.builtin][0]} data"))
    return folder / "train.parquet", folder / "test.parquet"


BUILTINS = {"palindrome": ("Palindrome", "PalindromeOptions"), "deepscaler": ("DeepScaleR", "DeepScaleROptions")}
"""Name for people and options class of each builtin task; its module in data_prep is named as in recipes."""


def task_options(spec: RunSpec) -> Any:
    """The builtin's options, typed; DeepScaleR's prompts are held to the run's own tokenizer and limit.

    Raises ValueError on an unknown or impossible one.
    """
    name = str(spec.task.builtin)
    values = dict(spec.task.options)
    if name == "deepscaler":
        values = {"tokenizer": _tokenizer(spec.model), "max_prompt_tokens": spec.train.max_prompt_tokens} | values
    options = getattr(importlib.import_module(f"data_prep.{name}"), BUILTINS[name][1])
    return options_from(options, values, "tasks.<name>.options")


def _tokenizer(model: ModelSpec) -> str:
    """What data_prep.lengths knows the model's tokenizer by."""
    return f"{model.path}@{model.revision}" if model.revision else model.path


def model_folder(model: ModelSpec, cache: Path, note: Note) -> Path:
    """The starting model: built here, a folder, or a snapshot of a Hugging Face id at its revision."""
    if model.path == "tiny":
        from data_prep import tiny_model

        options = options_from(tiny_options.TinyModelOptions, model.options, "model.options")
        build = _apart if options.device == "cuda" else tiny_model.cache
        return build(options, cache, _reporter(note, "tiny model"))
    if model.path == SMOLLM2:
        return smollm2.cache(cache, _reporter(note, "SmolLM2"))
    if Path(model.path).is_absolute():
        return Path(model.path)
    from huggingface_hub import snapshot_download

    note(f"Model {model.path} ({model.revision or 'newest revision'}) from the Hugging Face cache or Hub")
    return Path(snapshot_download(model.path, revision=model.revision))


def _apart(options: tiny_options.TinyModelOptions, cache: Path, report: Progress) -> Path:
    """The tiny model, trained in a process of its own: this one would keep a CUDA context, and gigabytes, for good.

    Raises:
        ValueError: it could not be made, and why.
    """
    folder = tiny_options.planned(options, cache)
    if folder.exists():
        return folder
    command = [sys.executable, "-P", "-m", "launch.inputs", json.dumps(asdict(options)), str(cache)]
    with tempfile.TemporaryFile("w+") as errors:
        code = _follow(command, errors, report)
        errors.seek(0)
        said = errors.read().strip().splitlines()[-1:]
    if code:
        raise ValueError(f"The tiny model could not be made on the GPU: {''.join(said) or f'exit code {code}'}")
    return folder


def _follow(command: list[str], errors: IO[str], report: Progress) -> int:
    """Run `main` below, tell its progress, return its exit code; it ends with us, however we end."""
    from launch.session import WITH_ITS_PARENT  # which needs the stack, as this does

    ends_with_us = [sys.executable, "-c", WITH_ITS_PARENT, *command]
    environment = {**gpu.ENVIRONMENT, **os.environ}
    with subprocess.Popen(ends_with_us, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as child:
        try:
            for line in child.stdout or ():
                report(*json.loads(line))
            return child.wait()
        finally:
            child.kill()


def main() -> None:
    """`python -m launch.inputs OPTIONS CACHE`: makes the tiny model, a line of JSON for each report of progress."""
    from data_prep import tiny_model

    out, sys.stdout = sys.stdout, sys.stderr  # libraries that print
    try:
        options = options_from(tiny_options.TinyModelOptions, json.loads(sys.argv[1]), "model.options")
        tiny_model.cache(options, Path(sys.argv[2]), lambda *told: print(json.dumps(told), file=out, flush=True))
    except ValueError as error:
        sys.exit(str(error))


def _reporter(note: Note, what: str) -> Callable[[int, int, str], None]:
    """A builder's progress as a few notes: at the start, at each quarter, at the end."""
    told = {-1}

    def report(done: int, total: int, text: str) -> None:
        quarter = 4 * done // max(total, 1)
        if quarter not in told:
            told.add(quarter)
            note(f"{what}: {text} ({100 * done // max(total, 1)} %)")

    return report


if __name__ == "__main__":
    main()
