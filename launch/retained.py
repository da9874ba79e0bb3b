"""The validation files of the skills that a run is to retain: planned, checked, built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.cache import options_from
from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.settings import SkillSpec

Note = Callable[[str], None]


def planned(spec: RunSpec, val: Path, cache: Path) -> tuple[Path, ...]:
    """Where the files are or will be; makes nothing."""
    if not spec.retention.skills:
        return ()
    from data_prep import retention

    columns = retention.columns_like(val)
    return tuple(_planned(spec, name, skill, columns, cache) for name, skill in spec.retention.skills.items())


def build(spec: RunSpec, val: Path, model: Path, cache: Path, note: Note) -> tuple[Path, ...]:
    """Make what is missing, the task's validation file and the model being there.

    Raises ValueError for a file that cannot work, and for prompts over the run's limit.
    """
    if not spec.retention.skills:
        return ()
    from data_prep import retention

    columns = retention.columns_like(val)
    for name, skill in spec.retention.skills.items():
        _build(spec, name, skill, columns, cache, note)
    files = planned(spec, val, cache)
    _check_lengths(files, model, spec.train.max_prompt_tokens)
    return files


def check(spec: RunSpec) -> None:
    """What can be known before anything is built: the skills exist, and the user's files are in verl's schema.

    Raises ValueError.
    """
    from data_prep.schema import check_file

    for name, skill in spec.retention.skills.items():
        if skill.val is None:
            _options(spec, name, skill)
        else:
            check_file(Path(skill.val))


def _check_lengths(files: tuple[Path, ...], model: Path, max_prompt_tokens: int) -> None:
    from data_prep import check, lengths
    from data_prep.schema import check_file

    if files:
        check.check_lengths(
            {path: check_file(path) for path in files}, lengths.load_tokenizer(model), max_prompt_tokens
        )


def _planned(spec: RunSpec, name: str, skill: SkillSpec, columns: Any, cache: Path) -> Path:
    """A built-in skill's own file where its columns are the task's, else a copy that has them."""
    from data_prep import retention, skills
    from data_prep.schema import SCHEMA

    source = retention.identity(Path(skill.val)) if skill.val is not None else ""
    if skill.val is None:
        folder = skills.planned(_options(spec, name, skill), cache)
        if columns.equals(SCHEMA):
            return folder / retention.FILE
        source = folder.name
    return retention.planned(name, source, spec.retention.prompts, columns, cache)


def _build(spec: RunSpec, name: str, skill: SkillSpec, columns: Any, cache: Path, note: Note) -> None:
    from data_prep import retention, skills
    from data_prep.schema import SCHEMA

    def told(done: int, total: int, text: str) -> None:
        note(f"skill {name}: {text}")

    if skill.val is not None:
        file, source = Path(skill.val), retention.identity(Path(skill.val))
    else:
        folder = skills.cache(_options(spec, name, skill), cache, told)
        file, source = folder / retention.FILE, folder.name
    if skill.val is not None or not columns.equals(SCHEMA):
        retention.cache(name, file, source, spec.retention.prompts, columns, cache)


def _options(spec: RunSpec, name: str, skill: SkillSpec) -> Any:
    """Of a built-in skill. Raises ValueError for a name or an option that it has not."""
    from data_prep import skills

    if name not in skills.SKILLS:
        raise ValueError(
            f"retention.skills.{name}: there is no built-in skill of this name. Known: {', '.join(skills.SKILLS)}. For "
            "prompts of your own give their file: `{val: FILE.parquet}`."
        )
    given = {**skill.options, "skill": name, "size": spec.retention.prompts}
    return options_from(skills.SkillOptions, given, f"retention.skills.{name}.options")
