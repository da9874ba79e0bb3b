"""The runs that a command is about: a recipe, its overrides, and perhaps some arms, tasks or seeds of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from klreg_verl.experiment import plan as plans
from klreg_verl.experiment import recipe as recipes
from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.recipe import Recipe


def selected(
    path: Path,
    overrides: Sequence[str] | None = None,
    arms: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> tuple[Recipe, list[RunSpec]]:
    """The recipe, checked by the doctor too, and those of its runs that were asked for; all where nothing is said.

    Raises ValueError: a bad recipe or override, or a name that it does not have.
    """
    read = recipes.load(recipe_file(path), overrides or ())
    recipes.check_claims(read)
    specs = plans.expand(read)
    for name, wanted in (("arm", arms), ("task_name", tasks), ("seed", seeds)):
        specs = _those(specs, name, wanted, path) if wanted else specs
    return read, specs


def recipe_file(path: Path) -> Path:
    """A recipe's file: as it stands, or by its name below recipes/."""
    named = Path("recipes", f"{path}.yaml")
    return named if not path.exists() and path.suffix != ".yaml" and named.is_file() else path


def run_path(path: Path, runs_dir: Path) -> Path | None:
    """A run's folder: as it stands, or below the runs folder; None where the path is none."""
    return next((each for each in (path, runs_dir / path) if (each / "spec.json").is_file()), None)


def _those(specs: list[RunSpec], name: str, wanted: Sequence[str | int], path: Path) -> list[RunSpec]:
    known = list(dict.fromkeys(getattr(spec, name) for spec in specs))
    for one in wanted:
        if one not in known:
            kind = name.removesuffix("_name")
            raise ValueError(f"{path}: there is no {kind} {one!r}. Known: {', '.join(map(str, known))}.")
    return [spec for spec in specs if getattr(spec, name) in wanted]
