"""The runs that a command is about: a recipe, its overrides, and perhaps one arm, task or seed of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from klreg_verl.experiment import plan as plans
from klreg_verl.experiment import recipe as recipes
from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.recipe import Recipe


def selected(
    path: Path, overrides: Sequence[str] | None, arm: str | None, task: str | None, seed: int | None
) -> tuple[Recipe, list[RunSpec]]:
    """The recipe, checked by the doctor too, and those of its runs that were asked for. Raises ValueError."""
    read = recipes.load(path, overrides or ())
    recipes.check_claims(read)
    specs = plans.expand(read)
    for name, wanted in (("arm", arm), ("task_name", task), ("seed", seed)):
        known = list(dict.fromkeys(str(getattr(spec, name)) for spec in specs))
        if wanted is not None and str(wanted) not in known:
            raise ValueError(f"{path}: there is no {name.removesuffix('_name')} {wanted!r}. Known: {', '.join(known)}.")
        specs = [spec for spec in specs if wanted is None or getattr(spec, name) == wanted]
    return read, specs
