"""Tables that are shown alike in the page, in report.md and as LaTeX: texts in rows, rendered three ways."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from klreg_verl.analysis import claims, retention, stats, stopping
from klreg_verl.analysis.optimum import Achieved
from klreg_verl.analysis.stats import Estimate
from klreg_verl.analysis.study import Study
from klreg_verl.analysis.summary import (
    Column,
    Group,
    error_over,
    evaluations,
    final_value,
    recorded_columns,
    steps_text,
)

WHICH = ("predicted", "achieved")
LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "·": r"$\cdot$",
}


@dataclass(frozen=True, kw_only=True)
class Head:
    """A column of numbers."""

    name: str
    unit: str = ""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row."""

    label: str
    cells: tuple[str, ...]
    group: Group | None = None
    """Whose colour the label has."""
    small: str = ""
    """Under the label."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """What is shown."""

    name: str
    """File name."""
    title: str
    first: str
    """Head of the labels."""
    small: str = ""
    """Head of what stands under the labels: a column of its own where nothing can stand under another; "" leaves it
    out there."""
    heads: tuple[Head, ...]
    lines: tuple[Line, ...]
    note: str = ""


def markdown(table: Table) -> str:
    """The table alone, without its note; "" without rows."""
    small = [table.small] if table.small else []
    rows = [(line.label, *([line.small] if small else []), *line.cells) for line in table.lines]
    return pipes([table.first, *small, *_heads(table)], rows)


def pipes(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of texts as a table in Markdown, each row one line; "" without rows."""
    lines = [f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *lines]) if lines else ""


def without_html(text: str) -> str:
    """Markdown in which no text begins an HTML tag: a task's or a model's name would be run by whoever shows it."""
    parts = re.split(r"(`[^`\n]*`)", text)  # every second one is a span of code, which Markdown shows as it stands
    return "".join(part if index % 2 else re.sub(r"<(?=[A-Za-z/!?])", "&lt;", part) for index, part in enumerate(parts))


def _heads(table: Table) -> list[str]:
    return [f"{head.name} [{head.unit}]" if head.unit else head.name for head in table.heads]


def latex(table: Table) -> str:
    """A tabular for \\usepackage{booktabs}, with the title and the note as comments."""
    heads = _heads(table)
    rows = [" & ".join(map(tex, (line.label, *line.cells))) + r" \\" for line in table.lines]
    comments = [f"% {text}" for text in (table.title, table.note) if text]
    return "\n".join(
        [
            *(comment.replace("\n", " ") for comment in comments),
            rf"\begin{{tabular}}{{l{'r' * len(heads)}}}",
            r"\toprule",
            " & ".join(map(tex, (table.first, *heads))) + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def tex(text: str) -> str:
    """The text with what LaTeX reads as commands written out."""
    return "".join(LATEX.get(character, character) for character in text)


def all_tables(study: Study) -> list[Table]:
    """Every table that has a row, for tables/*.tex."""
    made: list[Callable[[Study], Table]] = [final, claimed, stopped, diversity, optima, retained]
    return [table for table in (make(study) for make in made) if table.lines]


def final(study: Study) -> Table:
    """The final values of every setting."""
    return final_of(study.groups, recorded_columns(study.groups))


def final_of(groups: Sequence[Group], columns: Sequence[Column]) -> Table:
    """The final values of some settings; one without a finished run is marked."""
    texts = _columns([[final_value(group, column.key) for group in groups] for column in columns])
    heads = [Head(name=column.name, unit=column.unit) for column in columns]
    return Table(
        name="final",
        title="Every setting at the end",
        first="arm",
        small="gradient follows",
        heads=(*heads, Head(name="steps"), Head(name="± over")),
        lines=tuple(
            Line(
                label=_label(groups, group),
                small=group.follows,
                group=group,
                cells=(*(column[index] for column in texts), _steps(group), error_over(group)),
            )
            for index, group in enumerate(groups)
        ),
        note="Means of the last ten steps of training; what ± is taken over stands in the last column.",
    )


def _steps(group: Group) -> str:
    return f"{steps_text(group)}{' (interim)' if group.is_interim else ''}"


def diversity(study: Study) -> Table:
    """Diversity: all draws, right draws, texts."""
    found = study.variety
    measures = found.measures()
    kinds = {"unconditional": "", "conditional": "right draws: ", "text": ""}
    texts = _columns([[row.values[one.key] for row in found.rows] for one in measures])
    several = len(study.tasks) > 1
    return Table(
        name="diversity",
        title="Diversity of the samples at the end",
        first="arm",
        heads=tuple(Head(name=f"{kinds[one.kind]}{one.name}", unit=found.unit(one)) for one in measures),
        lines=tuple(
            Line(
                label=f"{row.task}: {row.label}" if several else row.label,
                group=row.group,
                cells=tuple(column[index] for column in texts),
            )
            for index, row in enumerate(found.rows)
        ),
        note=found.note() if found.rows else "",
    )


def stopped(study: Study) -> Table:
    """Every arm against none stopped at the same KL."""
    heads = ("KL at the end", "accuracy", "none at that KL", "difference", "95 % interval", "seeds")
    return Table(
        name="stopping",
        title="Against early stopping: held-out accuracy at the KL where an arm ended",
        first="arm",
        heads=tuple(Head(name=name) for name in heads),
        lines=tuple(
            Line(
                label=_label(study.groups, row.group) + " (control)" * row.is_control,
                group=row.group,
                cells=_stopped_cells(row),
            )
            for row in study.stopped
        ),
        note=stopping.NOTE,
    )


def _stopped_cells(row: stopping.Stopped) -> tuple[str, ...]:
    found = row.comparison
    places = stats.decimals([found.standard_error])
    ends = (stats.number(stats.mean_and_error(side).mean, places) for side in (found.left, found.right))
    low, high = (stats.number(end, places) for end in found.interval())
    mean = stats.number(found.mean, places, sign=True)
    return (stats.text(row.kl, 2), *ends, mean, f"{low} to {high}" if found.is_testable else "–", f"{found.num}")


def optima(study: Study) -> Table:
    """Predicted against achieved, of the arms whose optimum is known."""
    rows = [row for row in study.optima if row.prediction is not None]
    names = ("accuracy", "KL", "distinct right")
    heads = [Head(name=name.capitalize() if name != "KL" else name, unit=which) for name in names for which in WHICH]
    several = len(study.tasks) > 1
    return Table(
        name="optimum",
        title="The optimum of each arm's objective, from the starting model's draws, and what its runs reached",
        first="arm",
        heads=tuple(heads),
        lines=tuple(
            Line(
                label=f"{f'{row.task}: ' if several else ''}{row.arm}{' (interim)' if row.is_interim else ''}",
                small=row.known.why,
                group=next((g for g in study.groups if (g.task, g.label) == (row.task, row.arm)), None),
                cells=_optimum_cells(row),
            )
            for row in rows
        ),
    )


def _optimum_cells(row: Achieved) -> tuple[str, ...]:
    found = row.prediction
    assert found is not None
    more = f" to {found.distinct + found.unresolved:.2f}" if found.unresolved > 0.05 * found.samples else ""
    return (
        f"{found.accuracy:.3f} ({found.low:.3f} to {found.high:.3f})",
        stats.text(row.accuracy, 3),
        f"{found.kl:.2f}",
        stats.text(row.kl, 2),
        f"{found.distinct:.2f}{more} in {found.samples}",
        stats.text(row.distinct, 2),
    )


def claimed(study: Study) -> Table:
    """How the claims ended."""
    heads = ("outcome", "difference", "95 % interval", "margin", "seeds", "p difference", "p equivalence")
    return Table(
        name="claims",
        title="The claims, Holm-corrected inside the list",
        first="claim",
        heads=tuple(Head(name=name) for name in heads),
        lines=tuple(_claim_line(verdict) for verdict in study.verdicts),
    )


def _claim_line(verdict: claims.Verdict) -> Line:
    claim, decision = verdict.claim, verdict.decision
    cells = (
        f"{verdict.outcome}{'' if verdict.is_registered else ' (exploratory)'}",
        *_claim_estimate(verdict),
        f"±{claim.margin:g}",
        f"{verdict.comparison.num}",
        claims.p_text(decision.p_difference),
        claims.p_text(decision.p_equivalence),
    )
    return Line(label=f"{verdict.name}: {claim.metric}, {claim.contrast[0]} − {claim.contrast[1]}", cells=cells)


def _claim_estimate(verdict: claims.Verdict) -> tuple[str, str]:
    """Difference and interval with the decimals that the error allows; "–" for what is not known."""
    found = verdict.comparison
    places = stats.decimals([found.standard_error])
    mean = stats.number(found.mean, places, sign=True) if found.num else "–"
    low, high = (stats.number(end, places) for end in verdict.interval)
    return mean, f"{low} to {high}" if found.is_testable else "–"


def retained(study: Study) -> Table:
    """Skills before and after."""
    return Table(
        name="retention",
        title="Skills that were not trained",
        first="arm",
        heads=tuple(Head(name=name) for name in ("skill", "before", "after", "change", "against the first")),
        lines=tuple(
            Line(
                label=f"{_label(study.groups, group)}{' (interim)' if group.is_interim else ''}",
                group=group,
                cells=texts,
            )
            for task in study.tasks
            for group, skills in retention.retained(study.of_task(task))
            for texts in retention.retained_cells(skills)
        ),
        note=retention.RETENTION_NOTE,
    )


def evaluated(study: Study) -> list[Table]:
    """A table an evaluation metric that training logged, over the steps."""
    return [
        Table(
            name="evaluation",
            title=key,
            first="arm",
            heads=tuple(Head(name=f"step {step}") for step in found.steps),
            lines=tuple(
                Line(label=group.label, group=group, cells=tuple(stats.text(value, 3) for value in values))
                for group, values in zip(study.of_task(task), found.values, strict=True)
            ),
        )
        for task in study.tasks
        for key, found in evaluations(study.of_task(task)).items()
    ]


def checkpoints(study: Study) -> list[Table]:
    """What `klreg eval` left in the run folders, a table a task."""
    found = retention.evaluated(study.runs)
    first, *heads = retention.HEAD
    return [
        Table(
            name="checkpoints",
            title=task,
            first=first,
            heads=tuple(Head(name=name) for name in heads),
            lines=tuple(_checkpoint_line(study, row) for row in found if row.task == task),
        )
        for task in dict.fromkeys(row.task for row in found)
    ]


def _checkpoint_line(study: Study, row: retention.Evaluated) -> Line:
    label, *texts = retention.cells(row, f"{row.run.label}, seed {row.run.seed}")
    group = next(group for group in study.groups if row.run in group.runs)
    return Line(label=label, group=group, cells=tuple(texts))


def _columns(values: Sequence[Sequence[Estimate]]) -> list[list[str]]:
    """Columns of estimates as text; a column's numbers have the same decimals."""
    return [[stats.text(value, stats.places(column)) for value in column] for column in values]


def _label(groups: Sequence[Group], group: Group) -> str:
    return f"{group.task}: {group.label}" if len({each.task for each in groups}) > 1 else group.label
