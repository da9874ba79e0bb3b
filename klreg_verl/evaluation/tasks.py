"""What models are evaluated on: prompts in verl's schema, and the function that grades the responses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_prep import functions
from klreg_verl.core.right import right_or_wrong
from klreg_verl.evaluation.store import Rows
from klreg_verl.evaluation.subjects import Note, Subject, read_provenance

Reward = Callable[[Mapping[str, Any], str], Any]
"""(a row of `read`, a response) -> what the task's function returns."""

OWN = "own"
"""The task of a run."""
RETENTION = "retention"
"""The skills that a run's recipe says it is to retain."""
SKILL_PROMPTS = 64
"""Of a built-in skill, where nothing says how many."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One set of prompts and its reward."""

    name: str
    """In file names, keys and tables."""
    file: Path
    reward: str = functions.OURS
    """`pkg.module:function` with verl's custom-reward signature."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keywords of the function."""
    root: str | None = None
    """Where a user's own reward module lies, besides the current folder."""

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where the reward's module is looked for."""
        return (*([] if self.root is None else [Path(self.root)]), Path.cwd())


def find(
    name: str, subjects: list[Subject], cache: Path, size: int | None, reward: str | None, note: Note
) -> list[Task]:
    """The task of a name, or several.

    Args:
        name: `own` (the validation file and reward of the runs that are evaluated), `retention` (the skills of their
            recipe), `palindrome`, a built-in skill, a parquet file in verl's schema, or a folder with test.parquet, as
            `klreg data` makes it.
        subjects: what is evaluated on it.
        cache: where built files live.
        size: how many prompts a built-in skill gets.
        reward: the user's, in place of the task's; it gets no options.
        note: told what is built.

    Raises:
        ValueError: there is no such task; or the runs have different ones, or different prompts of a skill.
    """
    if name == RETENTION:
        found = _retained(subjects, cache, size, note)
    else:
        found = [_own(subjects) if name == OWN else _named(name, cache, size, note)]
    return found if reward is None else [Task(name=one.name, file=one.file, reward=reward) for one in found]


def _retained(subjects: list[Subject], cache: Path, size: int | None, note: Note) -> list[Task]:
    """The skills of the runs' recipes, each once; of a user's file all prompts."""
    specs = [spec for one in subjects if one.run is not None and (spec := one.run.spec()) is not None]
    found: dict[str, Task] = {}
    for spec in specs:
        options = spec.task.reward_options if spec.task.reward is None else {}  # a user's reward grades no skill
        for name, skill in spec.retention.skills.items():
            file = None if skill.val is None else Path(skill.val)
            task = _skill(name, file, size or spec.retention.prompts, skill.options, cache, note)
            task = replace(task, options=dict(options))
            if found.setdefault(name, task) != task:
                raise ValueError(
                    f"The runs have different prompts or reward options of the skill {name} ({_what(found[name])}; "
                    f"{_what(task)}). Evaluate them apart, or name one file with --task."
                )
    if not found:
        raise ValueError("No recipe of these runs says `retention: {skills: ...}`. Name a skill or a file with --task.")
    return list(found.values())


def _skill(name: str, file: Path | None, size: int, options: Mapping[str, Any], cache: Path, note: Note) -> Task:
    """A skill's prompts: the user's file, or those of the built-in one."""
    from data_prep import skills
    from data_prep.cache import options_from

    if file is None:
        asked = options_from(skills.SkillOptions, {**options, "skill": name, "size": size}, f"skill {name}")
        file = skills.cache(asked, cache, lambda done, total, text: note(f"{name}: {text}")) / "test.parquet"
    return Task(name=f"skill/{name}", file=file)


def _own(subjects: list[Subject]) -> Task:
    runs = {subject.run.path: subject.run for subject in subjects if subject.run is not None}
    tasks = [_task_of_run(run) for run in runs.values()]
    if not tasks:
        raise ValueError(f"A model folder has no task of its own. Say which: --task {_known()}.")
    if others := [task for task in tasks if replace(task, name=tasks[0].name) != tasks[0]]:
        names = "; ".join(dict.fromkeys(map(_what, [tasks[0], *others])))
        raise ValueError(f"The runs have different tasks ({names}). Evaluate them apart, or name one with --task.")
    return tasks[0]


def _what(task: Task) -> str:
    """What tells tasks apart, as text."""
    parts = (task.file, task.reward, dict(task.options) or None, task.root)
    return ", ".join(str(part) for part in parts if part is not None)


def _task_of_run(run: Any) -> Task:
    spec = run.spec()
    path = read_provenance(run).get("data", {}).get("val", {}).get("path") or spec.task.val
    if not path or not Path(path).is_file():
        raise ValueError(
            f"{run.path}: its validation file, {path or '(never built)'}, is not there any more. Name a file: --task."
        )
    return Task(
        name=spec.task_name,
        file=Path(path),
        reward=spec.task.reward or functions.OURS,
        options=dict(spec.task.reward_options),
        root=spec.root if spec.task.reward else None,
    )


def _named(name: str, cache: Path, size: int | None, note: Note) -> Task:
    from data_prep import palindrome, skills

    if name in skills.SKILLS:
        return _skill(name, None, size or SKILL_PROMPTS, {}, cache, note)
    if name == palindrome.DATA_SOURCE:
        folder = palindrome.cache(palindrome.PalindromeOptions(), cache, lambda done, total, text: note(text))
        return Task(name=name, file=folder / "test.parquet")
    path = Path(name).expanduser()
    if path.is_dir() and (path / "test.parquet").is_file():
        return Task(name=path.name, file=(path / "test.parquet").resolve())
    if not path.is_file():
        raise ValueError(f"{name!r} is no task and no file. Give {_known()}.")
    return Task(name=path.stem, file=path.resolve())


def _known() -> str:
    from data_prep import skills

    names = ", ".join(("palindrome", *skills.SKILLS))
    return f"a parquet file, a folder with test.parquet, {names}; of runs also {OWN}, {RETENTION}"


def read(task: Task, limit: int | None) -> Rows:
    """Rows of a task's file: data_source, prompt (its last message), ground_truth, extra_info. Raises ValueError."""
    from data_prep.schema import check_file

    table = check_file(task.file).slice(0, limit)
    infos = table["extra_info"].to_pylist() if "extra_info" in table.column_names else [None] * table.num_rows
    columns = (table[name].to_pylist() for name in ("data_source", "prompt", "reward_model"))
    return [
        {
            "data_source": source,
            "text": messages[-1]["content"],
            "ground_truth": reward["ground_truth"],
            "extra_info": info or {},
        }
        for source, messages, reward, info in zip(*columns, infos, strict=True)
    ]


# ---------------------------------------------------------------------------------------------------- grading


def reward_function(task: Task) -> Reward:
    """The task's function with its options and its folders. Raises ValueError where it cannot be imported."""
    function, folders = functions.load(task.reward, *task.folders), task.folders

    def reward(asked: Mapping[str, Any], text: str) -> Any:
        given = {"data_source": asked["data_source"], "ground_truth": asked["ground_truth"], "solution_str": text}
        return functions.call(function, *folders, **given, extra_info=dict(asked["extra_info"]), **task.options)

    return reward


def graded(row: Mapping[str, Any], asked: Mapping[str, Any], reward: Reward) -> dict[str, Any]:
    """A sample with its grade, in the columns of the table.

    A reward that raises, or returns what is no grade, gives 0 and its message in `error`: counted and shown, never a
    silent zero. `acc` is the reward's, or the score where it returns none; what is right, `with_right` says once all
    are known, as in a run. Without a `pred` the answer is the response itself.
    """
    text, info = row["response"], asked["extra_info"]
    try:
        grade = {**_grade(reward(asked, text), text), "error": ""}
    except Exception as error:  # a user's function can fail in any way
        grade = {**_grade(0.0, text), "error": f"{type(error).__name__}: {error}"}
    return {
        **row,
        "data_source": asked["data_source"],
        "question": asked["text"],
        "ground_truth": asked["ground_truth"],
        "num_valid": None if info.get("num_valid") in (None, "") else str(info["num_valid"]),
        **grade,
    }


def with_right(rows: Rows) -> Rows:
    """The graded samples with `valid`: right or not; null in all of them where the reward grades (core.right)."""
    right = right_or_wrong([row["acc"] for row in rows], [row["score"] for row in rows])
    return [row | {"valid": None if right is None else right[place]} for place, row in enumerate(rows)]


def _grade(returned: Any, text: str) -> dict[str, Any]:
    """The columns that a reward's return value fills. Raises what the conversions raise."""
    given = returned if isinstance(returned, Mapping) else {"score": returned}
    score = float(given["score"])
    if not math.isfinite(score):
        raise ValueError(f"score {score}")
    return {
        "score": score,
        "acc": float(given.get("acc", score)),
        "answer": str(given.get("pred", text)).strip(),
        "format_ok": float(given.get("format_ok", 1.0)),
        "timeout": float(given.get("timeout", 0.0)),
    }
