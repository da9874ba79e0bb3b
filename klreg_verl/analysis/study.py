"""What a report is about: the runs of a recipe, grouped, with everything that is computed from all of them once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klreg_verl.analysis import cards, claims, optimum, stopping, variety
from klreg_verl.analysis.embeddings import Embedder
from klreg_verl.analysis.runs import Run, load
from klreg_verl.analysis.summary import Group, group_runs


@dataclass(frozen=True, kw_only=True)
class Study:
    """What a report is about."""

    name: str
    question: str
    runs: tuple[Run, ...]
    groups: tuple[Group, ...]
    missing: tuple[str, ...] = ()
    """Run ids that the recipe plans and that have no folder."""
    verdicts: tuple[claims.Verdict, ...] = ()
    """How the claims ended."""
    variety: variety.Variety = variety.Variety()
    optima: tuple[optimum.Achieved, ...] = ()
    """Predicted against achieved, a row a group."""
    stopped: tuple[stopping.Stopped, ...] = ()
    """Arms against the one without KL at the KL where they ended."""
    differences: tuple[cards.Difference, ...] = ()
    """What the run cards differ in though no recipe declared it."""

    @property
    def tasks(self) -> list[str]:
        """Tasks in order of appearance."""
        return list(dict.fromkeys(group.task for group in self.groups))

    def of_task(self, task: str) -> list[Group]:
        """The groups of one task."""
        return [group for group in self.groups if group.task == task]


def read_study(
    recipe_dir: Path,
    recipe_text: Mapping[str, Any],
    *,
    anonymous: bool = False,
    embedder: Embedder | None = None,
    further: bool = False,
) -> Study:
    """The runs of a recipe with its question; the arguments are those of ``report.write_report``."""
    recipe_dir = Path(recipe_dir)
    loaded = load(recipe_dir)
    runs = tuple(cards.anonymous(run) if anonymous else run for run in loaded)
    groups = tuple(group_runs(runs, recipe_text.get("arms") or _arms(runs)))
    tasks = dict.fromkeys(group.task for group in groups)
    existing = {run.run_id for run in runs}
    name = str(recipe_text.get("name") or recipe_dir.resolve().name)
    question = str(recipe_text.get("question") or _asked(loaded) or name).strip()
    return Study(
        name=name,
        question=cards.Named.by(*loaded).cleaned(question) if anonymous else question,
        runs=tuple(run for group in groups for run in group.runs),
        groups=groups,
        missing=tuple(run_id for run_id in recipe_text.get("planned") or () if run_id not in existing),
        verdicts=tuple(claims.judge(runs, recipe_text.get("claims"))),
        variety=variety.measure(groups, embedder, further=further),
        optima=tuple(optimum.compare(groups)),
        stopped=tuple(row for task in tasks for row in stopping.compare([g for g in groups if g.task == task])),
        differences=tuple(cards.undeclared(runs)),
    )


def _asked(runs: Sequence[Run]) -> str:
    """The question as the runs' specs have it, for a report of a folder without its recipe."""
    return next((str(run.spec["question"]) for run in runs if run.spec.get("question")), "")


def _arms(runs: Sequence[Run]) -> Sequence[str]:
    """The recipe's arms in its order, likewise; of runs from before and after an arm was added, the longer list."""
    return max((run.spec.get("arms") or () for run in runs), key=len, default=())
