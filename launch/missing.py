"""What a recipe names and is not there, and what its `verl:` may not say: plan, run and submit refuse the same."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from klreg_verl.experiment import selection
from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.recipe import Cell, Recipe
from klreg_verl.experiment.strict import ConfigError, FieldError
from klreg_verl.verl_hooks import overrides


def selected(
    path: Path,
    changes: Sequence[str] | None,
    arms: Sequence[str] | None,
    tasks: Sequence[str] | None,
    seeds: Sequence[int] | None,
    *,
    runs_dir: Path,
    platform: Callable[[], str],
) -> tuple[Recipe, list[RunSpec]]:
    """The recipe and the runs asked for, as experiment.selection has them, once `check` finds nothing."""
    read, specs = selection.selected(path, changes, arms, tasks, seeds)
    check(read, specs, runs_dir, platform)
    return read, specs


def check(read: Recipe, specs: Sequence[RunSpec], runs_dir: Path, platform: Callable[[], str]) -> None:
    """Files, folders and functions that are not there, and settings of verl's that klreg sets: all at once.

    What is in the files, `klreg run --dry-run` checks. Raises ConfigError with file and line of each.
    """
    cells = {(cell.arm, cell.task_name, cell.grid): cell for cell in read.cells}
    first = {(spec.arm, spec.task_name, spec.grid): spec for spec in reversed(specs)}
    problems = [
        problem
        for place, spec in reversed(first.items())
        for problem in (
            *_not_there(cells[place]),
            *_no_reward(cells[place], spec),
            *_refused(cells[place], spec, runs_dir, platform),
        )
    ]
    if problems:
        raise ConfigError(problems)


def _not_there(cell: Cell) -> Iterator[str]:
    """Paths of a cell's data, models and skills that lead nowhere."""
    settings, task = cell.settings, cell.task
    named = {"task.train": task.train, "task.val": task.val}
    named |= {f"task.options.{key}": task.options.get(key) for key in ("source", "evaluation")}
    named |= {f"retention.skills.{name}.val": skill.val for name, skill in settings.retention.skills.items()}
    for key, value in named.items():
        if isinstance(value, str) and Path(value).is_absolute() and not Path(value).exists():
            advice = "Give a file that exists, or build one (`klreg data --help`)."
            yield f"{cell.places[key]}: {value} is not there.{_near(Path(value))} {advice}"
    for key, value in {"model.path": settings.model.path, "reference.path": settings.reference.path}.items():
        if value is not None and _is_folder_name(value) and not Path(value).is_dir():
            advice = _near(Path(value)) or " Give the folder of a model in Hugging Face's format."
            yield f"{cell.places[key]}: {value} is not a folder.{advice}"


def _is_folder_name(path: str) -> bool:
    """A Hugging Face id has one slash at the most."""
    return Path(path).is_absolute() or path.count("/") > 1


def _near(path: Path) -> str:
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f" Did you mean {str(path.parent / near[0])!r}?" if near else ""


def _no_reward(cell: Cell, spec: RunSpec) -> Iterator[str]:
    from launch.preflight import check_reward

    if spec.task.reward is None:
        return
    try:
        check_reward(spec)
    except ValueError as error:
        place = cell.places["task.reward"].partition(": ")[0]
        yield f"{place}: {error}"


def _refused(cell: Cell, spec: RunSpec, runs_dir: Path, platform: Callable[[], str]) -> Iterator[str]:
    from launch.inputs import planned_files

    if not spec.verl:  # and so nothing is asked of torch
        return
    try:
        overrides.settings(spec, planned_files(spec, runs_dir), platform())
    except FieldError as error:
        yield f"{cell.places[error.field]}: {error.message}"
