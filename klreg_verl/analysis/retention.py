"""What a run did to skills it did not train, and the evaluations that `klreg eval` left in its folder.

A retained skill is the metric retention/<skill>, validated before training and at the end at least. Arms are contrasted
end against end, paired by seed. The starting model has one accuracy, which every seed measures anew: the change is from
the mean of all of them, and never from a run's own noisy start.

An evaluation is evals/<name>.json beside evals/<name>.parquet; one without the other is not shown, since a resumed run
takes back the tables of steps that it repeats.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from klreg_verl.analysis import stats
from klreg_verl.analysis.runs import Run, mapping
from klreg_verl.analysis.stats import Estimate
from klreg_verl.analysis.summary import Group
from klreg_verl.core.alarms import RETENTION

RETENTION_NOTE = (
    "Accuracy on prompts of skills that the run did not train. Before: the starting model's, pooled over all seeds "
    "that measured the same weights. After: the mean of a run's last three validations, as in the claims. Against the "
    "first: end minus end, paired by seed, which no start's noise enters. Mean ± standard error over seeds; one seed's "
    "values also have the noise of sampling, which `klreg eval` gives an interval for."
)
EVALUATION_NOTE = (
    "By `klreg eval`. Intervals are 95 % over prompts. New and lost: prompts with any right sample only after, or only "
    "before training; by chance as many of each are expected if nothing had changed."
)


@dataclass(frozen=True, kw_only=True)
class Retained:
    """One skill under one setting."""

    skill: str
    before: Estimate
    after: Estimate
    change: Estimate
    """After minus before; the two errors add in squares."""
    against: Estimate
    """After minus the first setting's after, paired by seed; no value for the first itself."""


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """One evaluation of one run as a row of a table; its cells are text."""

    run: Run
    task: str
    step: int
    sampling: str
    accuracy: str
    best: str
    """pass@n."""
    majority: str
    """maj@n."""
    distinct: str
    new: str
    lost: str


HEAD = (
    "run",
    "step",
    "prompts x samples",
    "accuracy",
    "pass@n",
    "maj@n",
    "distinct right",
    "new (chance)",
    "lost (chance)",
)


def retained(groups: Sequence[Group]) -> list[tuple[Group, list[Retained]]]:
    """Every setting of one task with the skills that it was measured on; settings without one are left out."""
    found = [(group, [_retained(groups, group, skill) for skill in _skills(group)]) for group in groups]
    return [(group, skills) for group, skills in found if skills]


def lowest_change(group: Group) -> Estimate:
    """The change of the skill that lost most; without a skill measured twice, no value."""
    changes = [one.change for _, skills in retained([group]) for one in skills if one.change.num]
    return min(changes, key=lambda each: each.mean, default=stats.mean_and_error([]))


def retained_cells(skills: Sequence[Retained]) -> list[tuple[str, str, str, str, str]]:
    """(skill, before, after, change, against) as text, all with the decimals that the errors allow."""
    places = stats.places([value for one in skills for value in (one.before, one.after, one.change, one.against)])
    return [
        (
            one.skill,
            stats.text(one.before, places),
            stats.text(one.after, places),
            stats.text(one.change, places, sign=True),
            stats.text(one.against, places, sign=True),
        )
        for one in skills
    ]


def _skills(group: Group) -> list[str]:
    keys = {str(key) for run in group.final_runs for key in run.metrics if str(key).startswith(RETENTION)}
    return sorted(key.removeprefix(RETENTION) for key in keys)


def _retained(groups: Sequence[Group], group: Group, skill: str) -> Retained:
    """Over the runs that final values are taken from and that measured the skill after training."""
    mine, first = ends(group, skill), ends(groups[0], skill)
    before, after = pooled_start(groups, group, skill), stats.mean_and_error(mine.values())
    gap = stats.paired_difference(mine, first) if group is not groups[0] else stats.mean_and_error([])
    return Retained(skill=skill, before=before, after=after, change=stats.difference(after, before), against=gap)


def ends(group: Group, skill: str) -> dict[int, float]:
    """Seed -> the mean of the last three validations after step 0."""
    having = [run for run in group.final_runs if RETENTION + skill in run.training]
    known = {run.seed: run.training[RETENTION + skill].dropna() for run in having}
    return {seed: stats.last_steps(values.tolist(), 3).mean for seed, values in known.items() if len(values)}


def pooled_start(groups: Sequence[Group], group: Group, skill: str) -> Estimate:
    """The starting model's accuracy over the seeds of all runs that began from the group's weights.

    Arms of one seed sample the same responses at step 0, so a seed counts once.
    """
    weights = _weights(group.runs[0])
    found: dict[int, list[float]] = {}
    for run in (run for each in groups for run in each.runs if _weights(run) == weights):
        if RETENTION + skill in run.metrics and 0 in run.metrics.index:
            found.setdefault(run.seed, []).append(float(run.metrics.loc[0, RETENTION + skill]))
    return stats.mean_and_error(stats.mean_and_error(values).mean for values in found.values())


def _weights(run: Run) -> str:
    """The starting model's hash, or its path where the card has none."""
    known = mapping(run.provenance.get("model")).get("sha256")
    return str(known or mapping(run.spec.get("model")).get("path"))


def evaluated(runs: Sequence[Run]) -> list[Evaluated]:
    """The evaluations of all runs, by task, then in the order of the runs, then by step."""
    rows = [_row(run, record) for run in runs for record in records(run)]
    tasks = list(dict.fromkeys(row.task for row in rows))
    return sorted(rows, key=lambda row: (tasks.index(row.task), runs.index(row.run), row.step))


def cells(row: Evaluated, label: str) -> list[str]:
    """A row as text, in the order of HEAD."""
    return [label, str(row.step), row.sampling, row.accuracy, row.best, row.majority, row.distinct, row.new, row.lost]


def records(run: Run) -> list[Mapping[str, Any]]:
    """What lies in evals/, whole: the JSON beside each table; a broken one is left out, since its table has it all."""
    found = []
    for path in sorted((run.path / "evals").glob("*.json")):
        if path.with_suffix(".parquet").is_file():
            record = _object(path.read_text(encoding="utf-8"))
            found += [record] if _NEEDED <= set(record) else []
    return found


_NEEDED = {"task", "step", "samples", "prompts", "temperature", "accuracy", "pass", "maj", "distinct_right"}


def _object(text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, Mapping) else {}


def _row(run: Run, record: Mapping[str, Any]) -> Evaluated:
    largest = max(record["pass"], key=int)
    change = record.get("against") or {}
    return Evaluated(
        run=run,
        task=str(record["task"]),
        step=int(record["step"]),
        sampling=f"{record['prompts']} x {record['samples']} at T = {record['temperature']:g}",
        accuracy=_interval(record["accuracy"]),
        best=_interval(record["pass"][largest]),
        majority=_interval(record["maj"][largest]),
        distinct=_number(record["distinct_right"], 2),
        new=_turned(change, "solved_new"),
        lost=_turned(change, "solved_lost"),
    )


def _interval(value: Mapping[str, Any]) -> str:
    mean, low, high = (_number(value.get(name), 3) for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _turned(change: Mapping[str, Any], name: str) -> str:
    return f"{len(change[name])} ({_number(change.get('by_chance'), 1)})" if name in change else "–"


def _number(value: float | None, places: int) -> str:
    return "–" if value is None else stats.number(float(value), places)
