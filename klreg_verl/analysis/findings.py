"""What a reader should know first: generated sentences, each with its numbers and the section that has its evidence.

Claims come first, because they alone were written before the runs. What follows is exploratory and says so. Then what
weakens all of it: runs that are not done, cards that differ, alarms.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from klreg_verl.analysis import cards, claims, retention, stats, stopping
from klreg_verl.analysis.runs import ACCURACY, SCORE
from klreg_verl.analysis.study import Study
from klreg_verl.analysis.summary import (
    COLUMNS,
    KL_K1,
    MANY_SEEDS,
    Group,
    alarms,
    contrast,
    final_change,
    interim,
    unfinished,
)

SHORT = {
    ACCURACY: "accuracy",
    SCORE: "score",
    KL_K1: "KL",
    "entropy/token": "entropy",
    "diversity/coverage": "coverage",
}
"""Metrics of a comparison in one sentence."""
MOST_ARMS = 12
"""Sentences of one kind; more are counted and left to the section."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One sentence."""

    text: str
    anchor: str
    """The section of the page with its evidence."""
    is_caution: bool = False
    """Whether it weakens the others."""


def findings(study: Study) -> list[Finding]:
    """All sentences in order; empty where no run has a training step."""
    if not any(run.last_step for run in study.runs):
        return _cautions(study)
    found = [
        *_claimed(study),
        *_limited(_moved(study), "summary"),
        *_limited(_compared(study), "summary"),
        *_stopped(study),
        *_varied(study),
        *_predicted(study),
        *_retained(study),
    ]
    return [*found, *_cautions(study)]


def _claimed(study: Study) -> list[Finding]:
    if not study.verdicts:
        text = "No claim was written before these runs: everything here is exploratory."
        return [Finding(text=text, anchor="scope")]
    return [Finding(text=claims.finding(each), anchor="claims") for each in study.verdicts]


def _limited(found: Iterable[Finding], anchor: str) -> list[Finding]:
    every = list(found)
    more = len(every) - MOST_ARMS
    rest = [Finding(text=f"The same of {more} more settings stands in the table.", anchor=anchor)]
    return every[:MOST_ARMS] + (rest if more > 0 else [])


def _moved(study: Study) -> Iterable[Finding]:
    """How far each task's settings moved from the start, in one sentence a task."""
    for task in study.tasks:
        told = []
        for group in study.of_task(task):
            change = final_change(group, group.headline)
            if change is not None:
                places = stats.places([change.difference])
                first, last = stats.number(change.first.mean, places), stats.number(change.last.mean, places)
                told.append(f"{group.label} {first} → {last}{' (interim)' if group.is_interim else ''}")
        if told:
            more = f" and {len(told) - MOST_ARMS} more" if len(told) > MOST_ARMS else ""
            where, name = _task(study, task), study.of_task(task)[0].headline.removeprefix("train/").capitalize()
            yield Finding(
                text=f"{where}{name}, first steps → last steps: {'; '.join(told[:MOST_ARMS])}{more}.",
                anchor="summary",
            )


def _compared(study: Study) -> Iterable[Finding]:
    """Each setting against the first one of its task: all main metrics in one sentence."""
    for task in study.tasks:
        first, *others = study.of_task(task)
        for group in others:
            if text := _against(group, first):
                yield Finding(text=f"{_task(study, task)}{text}", anchor="summary")


def _against(group: Group, first: Group) -> str:
    found = {column.key: contrast(group, first, column.key) for column in COLUMNS if column.key in SHORT}
    known = {key: each for key, each in found.items() if not math.isnan(each.difference.mean)}
    if not known:
        return ""
    told = [f"{SHORT[key]} {_gap(each.difference)}" for key, each in known.items()]
    pairs = min(each.num_pairs for each in known.values())
    over = f"{pairs} paired seeds" if pairs > 1 else "not paired by seed: no evidence of an order"
    clear = [SHORT[key] for key, each in known.items() if stats.clear_sign(each.difference)]
    verdict = ""
    if pairs >= MANY_SEEDS:
        verdict = f" Zero is outside the 95 % t interval of: {', '.join(clear) or 'none of them'}."
    cautions = (interim([group, first]), cards.caution([*group.final_runs, *first.final_runs]))
    text = f"{group.label} against {first.label} ({over}, exploratory): {', '.join(told)}.{verdict}"
    return " ".join([text, *filter(None, cautions)])


def _gap(difference: stats.Estimate) -> str:
    return stats.text(difference, stats.places([difference]), sign=True)


def _stopped(study: Study) -> Iterable[Finding]:
    """Each arm against early stopping at its own KL, in one sentence a task."""
    for task in study.tasks:
        if told := stopping.sentence([row for row in study.stopped if row.group.task == task]):
            yield Finding(text=f"{_task(study, task)}{told}", anchor="stopping")


def _varied(study: Study) -> Iterable[Finding]:
    """Distinct right answers of all draws and of right draws, the starting model's first."""
    for task in dict.fromkeys(row.task for row in study.variety.rows):
        rows = [row for row in study.variety.rows if row.task == task][: MOST_ARMS + 1]
        told = [
            f"{row.label} {stats.number(row.values['distinct'].mean, 2)} / "
            f"{stats.number(row.values['valid_distinct'].mean, 2)}"
            for row in rows
            if row.values["distinct"].num
        ]
        found = study.variety
        if told:
            yield Finding(
                text=(
                    f"{_task(study, task)}Distinct right answers in {found.samples} draws / in {found.valid_samples} "
                    f"right draws: {'; '.join(told)}. The second number does not rise with accuracy."
                ),
                anchor="diversity",
            )


def _predicted(study: Study) -> Iterable[Finding]:
    """Where the optimum of an arm is known and says something."""
    telling = [row for row in study.optima if row.prediction is not None and not row.prediction.is_empty]
    for row in telling[:MOST_ARMS]:
        found = row.prediction
        assert found is not None
        kind = "" if row.known.is_exact else " (for orientation: its term is each token's own)"
        yield Finding(
            text=(
                f"{_task(study, row.task)}{row.arm}: its objective{kind} is best at accuracy {found.accuracy:.3f} and "
                f"KL {found.kl:.2f}; its runs reached {stats.text(row.accuracy, 3)} and "
                f"{stats.text(row.kl, 2)}{' (interim)' if row.is_interim else ''}."
            ),
            anchor="optimum",
        )


def _retained(study: Study) -> Iterable[Finding]:
    """The largest fall of a skill in each task, and what it is against the first setting, end against end."""
    for task in study.tasks:
        every = [
            (one.change.mean, group, one)
            for group, skills in retention.retained(study.of_task(task))
            for one in skills
            if one.change.num
        ]
        if every:
            _, group, one = min(every, key=lambda each: each[0])
            yield Finding(
                text=(
                    f"{_task(study, task)}Skills that were not trained: the lowest change from the pooled start is "
                    f"{_gap(one.change)} ({group.label}, {one.skill}{', interim' if group.is_interim else ''})"
                    f"{_ends(study, task, one)}."
                ),
                anchor="retention",
            )


def _ends(study: Study, task: str, one: retention.Retained) -> str:
    first = study.of_task(task)[0].label
    return f"; end against end {_gap(one.against)} against {first} (exploratory)" if one.against.num else ""


# ---------------------------------------------------------------------------------------------------- cautions


def _cautions(study: Study) -> list[Finding]:
    texts = [
        *(("undeclared", text) for text in _differences(study)),
        *(("unfinished", text) for text in _unfinished(study)),
        *(("alarms", text) for text in _alarms(study)),
    ]
    return [Finding(text=text, anchor=anchor, is_caution=True) for anchor, text in texts]


def _differences(study: Study) -> Iterable[str]:
    fields = list(dict.fromkeys(each.field for each in study.differences))
    if fields:
        more = f" and {len(fields) - 6} more" if len(fields) > 6 else ""
        yield (
            f"The run cards differ in {', '.join(fields[:6])}{more}, which no recipe declared: comparisons that mix "
            "such runs are marked."
        )


def _unfinished(study: Study) -> Iterable[str]:
    waiting = [f"{run.run_id} ({run.status})" for run in unfinished(study.runs) if not run.is_done]
    waiting += [f"{run_id} (not started)" for run_id in study.missing]
    if waiting:
        more = f" and {len(waiting) - 6} more" if len(waiting) > 6 else ""
        yield (
            f"{len(waiting)} of {len(study.runs) + len(study.missing)} runs are not done, and nothing is put in their "
            f"place: {', '.join(waiting[:6])}{more}."
        )
    broken = [run.run_id for run in study.runs if run.problems]
    if broken:
        more = f" and {len(broken) - 6} more" if len(broken) > 6 else ""
        yield f"Something is wrong with the files of {', '.join(broken[:6])}{more}."


def _alarms(study: Study) -> Iterable[str]:
    raised = alarms(study.runs)
    if raised:
        kinds = ", ".join(sorted({name for _, name, _ in raised}))
        yield f"Alarms in {_count({run for run, _, _ in raised}, 'run')}: {kinds}."


def _count(items: Sequence[str] | set[str], noun: str) -> str:
    return f"{len(items)} {noun}{'' if len(items) == 1 else 's'}"


def _task(study: Study, task: str) -> str:
    return f"{task}: " if len(study.tasks) > 1 else ""
