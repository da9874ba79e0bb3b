"""Tables that are shown alike in the page, in report.md and as LaTeX: texts in rows, rendered three ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from klreg_verl.analysis import claims, retention, stats
from klreg_verl.analysis.optimum import Achieved
from klreg_verl.analysis.stats import Estimate
from klreg_verl.analysis.study import Study
from klreg_verl.analysis.summary import Group, error_over, final_value, recorded_columns, steps_text

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
    heads: tuple[Head, ...]
    lines: tuple[Line, ...]
    note: str = ""


def markdown(table: Table) -> str:
    """The table alone, without its note; "" without rows."""
    if not table.lines:
        return ""
    heads = [f"{head.name} [{head.unit}]" if head.unit else head.name for head in table.heads]
    rows = [[table.first, *heads], ["---"] * (len(heads) + 1)]
    rows += [[line.label, *line.cells] for line in table.lines]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)


def latex(table: Table) -> str:
    """A tabular for \\usepackage{booktabs}, with the title and the note as comments."""
    heads = [f"{head.name} [{head.unit}]" if head.unit else head.name for head in table.heads]
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
    made: list[Callable[[Study], Table]] = [final, claimed, diversity, optima, retained]
    return [table for table in (make(study) for make in made) if table.lines]


def final(study: Study) -> Table:
    """The final values of every setting."""
    columns = recorded_columns(study.groups)
    values = [[final_value(group, column.key) for group in study.groups] for column in columns]
    texts = _columns(values)
    return Table(
        name="final",
        title="Means of the last ten steps of training",
        first="arm",
        heads=(*(Head(name=column.name, unit=column.unit) for column in columns), Head(name="steps")),
        lines=tuple(
            Line(
                label=_label(study, group),
                small=group.follows,
                group=group,
                cells=(*(column[index] for column in texts), f"{steps_text(group)}, {error_over(group)}"),
            )
            for index, group in enumerate(study.groups)
        ),
    )


def diversity(study: Study) -> Table:
    """Diversity: all draws, right draws, texts."""
    found = study.variety
    measures = found.measures()
    kinds = {"unconditional": "", "conditional": "right draws: ", "text": ""}
    texts = _columns([[row.values[one.key] for row in found.rows] for one in measures])
    several = len(study.tasks) > 1
    return Table(
        name="diversity",
        title="Diversity of the last ten steps' samples",
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
                label=f"{row.task}: {row.arm}" if several else row.arm,
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
    found = claims.table(study.verdicts).to_dict("records") if study.verdicts else []
    heads = ("outcome", "difference", "95 % interval", "margin", "seeds", "p difference", "p equivalence")
    return Table(
        name="claims",
        title="The claims, Holm-corrected inside the list",
        first="claim",
        heads=tuple(Head(name=name) for name in heads),
        lines=tuple(_claim_line(row) for row in found),
    )


def _claim_line(row: dict[str, float]) -> Line:
    low, high = (stats.number(row[name], 3) for name in ("low", "high"))
    cells = (
        f"{row['outcome']}{'' if row['registered'] else ' (exploratory)'}",
        stats.number(row["difference"], 3, sign=True),
        f"{low} to {high}",
        f"±{row['margin']:g}",
        f"{row['pairs']}",
        claims.p_text(row["p_difference"]),
        claims.p_text(row["p_equivalence"]),
    )
    return Line(label=f"{row['claim']}: {row['metric']}, {row['first']} − {row['second']}", cells=cells)


def retained(study: Study) -> Table:
    """Skills before and after."""
    return Table(
        name="retention",
        title=retention.RETENTION_NOTE,
        first="arm",
        heads=tuple(Head(name=name) for name in ("skill", "before", "after", "change")),
        lines=tuple(
            Line(label=_label(study, group), group=group, cells=texts)
            for task in study.tasks
            for group, skills in retention.retained(study.of_task(task))
            for texts in retention.retained_cells(skills)
        ),
    )


def _columns(values: Sequence[Sequence[Estimate]]) -> list[list[str]]:
    """Columns of estimates as text; a column's numbers have the same decimals."""
    return [[stats.text(value, stats.places(column)) for value in column] for column in values]


def _label(study: Study, group: Group) -> str:
    return f"{group.task}: {group.label}" if len(study.tasks) > 1 else group.label
