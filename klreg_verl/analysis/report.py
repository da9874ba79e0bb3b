"""The report of a recipe: report.html, report.md, summary.csv, metrics_long.csv and figures/*.png beside the runs.

    runs/<recipe>/report.html        self-contained: style and figures inside
                  report.md          the same in Markdown; what a person writes between its findings marks is kept
                  summary.csv        the final table
                  claims.csv         how the claims ended, where the recipe has any
                  diversity.csv      a row a run: diversity of its stored samples at the start and at the end
                  metrics_long.csv   every recorded number: arm, task, grid, seed, status, step, key, value
                  figures/           overview and one figure each, as PNG and PDF (several tasks: in a folder a task)
                  tables/            the tables of the report as LaTeX, for booktabs

The same run folders give the same bytes. An anonymous report has no host, path or remote in any of these files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klreg_verl.analysis import cards, claims, figures, findings, optimum, retention, stats, tables
from klreg_verl.analysis.cards import differing_facts, facts
from klreg_verl.analysis.embeddings import Embedder
from klreg_verl.analysis.page import against_kl_text, counts, render, smoothing_text
from klreg_verl.analysis.runs import write_long_table
from klreg_verl.analysis.study import Study, read_study
from klreg_verl.analysis.summary import (
    Group,
    alarms,
    checks,
    gradients,
    recorded_columns,
    scope,
    sentences,
    summary_table,
    unfinished,
)
from klreg_verl.experiment.store import replacing, spreadsheet_text

FINDINGS = ("<!-- findings: written by a person, kept by the generator -->", "<!-- end of findings -->")
MAX_LINES = 15
TERMINAL_COLUMNS = ("accuracy", "score", "kl_k1_response", "entropy_token", "coverage")

__all__ = ["ReportPaths", "markdown_text", "read_study", "write_report"]


@dataclass(frozen=True, kw_only=True)
class ReportPaths:
    """The files that were written."""

    html: Path
    markdown: Path
    summary: Path
    metrics: Path
    figures: tuple[Path, ...]
    """PNG files, overviews first; a PDF lies beside each."""
    lines: tuple[str, ...] = ()
    """The summary for a terminal, at most 15 lines."""


def write_report(
    recipe_dir: Path,
    recipe_text: Mapping[str, Any] | None = None,
    *,
    anonymous: bool = False,
    embedder: Embedder | None = None,
    further: bool = False,
) -> ReportPaths:
    """Reads the runs below ``recipe_dir`` and writes their report into it.

    Args:
        recipe_dir: runs/<recipe>.
        recipe_text: what only the recipe knows, all optional: "question"; "name" (else the folder's);
            "arms", names in the order in which they are to be shown; "planned", the run ids
            (<arm>/<task>/[<grid>/]seed<k>) that should exist, so that one without a folder is named; "claims", as
            the recipe has them now: those of the run cards are decided without it.
        anonymous: leave out hosts, paths, remotes and addresses.
        embedder: for the cosines of responses; None leaves them out.
        further: also self-BLEU, and with an embedder the Vendi score, which take longer.

    Raises:
        ValueError: there is no such folder.
    """
    recipe_dir = Path(recipe_dir)
    study = read_study(recipe_dir, recipe_text or {}, anonymous=anonymous, embedder=embedder, further=further)
    drawn = _write_figures(study, recipe_dir / "figures")
    html, markdown = recipe_dir / "report.html", recipe_dir / "report.md"
    _write(html, render(study))
    places = [path.relative_to(recipe_dir).as_posix() for path in drawn]
    _write(markdown, markdown_text(study, places, _findings(markdown)))
    _write_tables(study, recipe_dir)
    return ReportPaths(
        html=html,
        markdown=markdown,
        summary=recipe_dir / "summary.csv",
        metrics=recipe_dir / "metrics_long.csv",
        figures=tuple(drawn),
        lines=tuple(_lines(study)),
    )


def _write_tables(study: Study, folder: Path) -> None:
    """The CSV files and the LaTeX tables; those of an earlier report that have no rows any more go."""
    summary = {"summary": summary_table(study.groups)}
    summary |= {"claims": claims.table(study.verdicts)} if study.verdicts else {}
    summary |= {"diversity": study.variety.per_run} if study.variety.rows else {}
    for name, table in summary.items():
        _write(folder / f"{name}.csv", table.map(spreadsheet_text).to_csv(index=False, lineterminator="\n"))
    with replacing(folder / "metrics_long.csv") as temporary:
        write_long_table(study.runs, temporary)
    (folder / "tables").mkdir(exist_ok=True)
    made = {f"{table.name}.tex": tables.latex(table) for table in tables.all_tables(study)}
    for name, text in made.items():
        _write(folder / "tables" / name, text)
    kept = {*made, *(f"{name}.csv" for name in summary)}
    written = ("final", "claims", "stopping", "diversity", "optimum", "retention")
    gone = [folder / "tables" / f"{name}.tex" for name in written]
    for path in [*gone, folder / "claims.csv", folder / "diversity.csv"]:
        if path.name not in kept:
            path.unlink(missing_ok=True)


def _lines(study: Study) -> list[str]:
    ends = claims.lines(study.verdicts)
    shown = study.groups[: max(4, MAX_LINES - 5 - len(ends))]
    columns = [column for column in recorded_columns(study.groups) if column.slug in TERMINAL_COLUMNS]
    more = _more_columns(study, shown)
    rows = [
        [line.label, line.small, *line.cells[:-2], *extra, *line.cells[-2:]]
        for line, extra in zip(tables.final_of(shown, columns).lines, more[1], strict=True)
    ]
    header = ["arm", "gradient follows", *(column.name for column in columns), *more[0], "steps", "± over"]
    lines = _aligned([header, *rows]) if rows else ["No runs."]
    unseen = len(study.groups) - len(shown)
    lines += [f"... and {unseen} more in summary.csv"] if unseen > 0 else []
    lines += ["Means of the last ten steps."] if rows else []
    waiting = [f"{run.run_id} ({run.status})" for run in study.runs if not run.is_done]
    rest = f" and {len(waiting) - 4} more" if len(waiting) > 4 else ""
    lines += [f"Not done: {', '.join(waiting[:4])}{rest}"] if waiting else []
    fields = list(dict.fromkeys(each.field for each in study.differences))
    told = ", ".join(fields[:3]) + (f" and {len(fields) - 3} more" if len(fields) > 3 else "")
    lines += [f"Cards differ in {told}: not declared by the recipe."] if fields else []
    return lines + (ends if len(ends) <= MAX_LINES - len(lines) else [*ends[: MAX_LINES - len(lines) - 1], "..."])


def _more_columns(study: Study, shown: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """Cosine, and the lowest change of a retained skill, where any setting has them: heads, and cells a setting."""
    cosines = [study.variety.of(group, "cosine") for group in shown]
    lost = [retention.lowest_change(group) for group in shown]
    columns = [(name, each) for name, each in (("Cosine", cosines), ("Retention", lost)) if any(e.num for e in each)]
    texts = [
        [stats.text(value, stats.places(column), sign=name == "Retention") for value in column]
        for name, column in columns
    ]
    return [name for name, _ in columns], [[column[index] for column in texts] for index in range(len(shown))]


def markdown_text(study: Study, drawn: Sequence[str], written: str = "") -> str:
    """report.md; ``drawn`` are the figures' paths relative to it, ``written`` what a person wrote into it before."""
    parts = [
        f"# {study.question}",
        f"klreg_verl, recipe `{study.name}`: {counts(study)}.",
        f"{FINDINGS[0]}\n{written.strip()}\n{FINDINGS[1]}" if written.strip() else "\n".join(FINDINGS),
        _section("Findings", "\n".join(f"- {each.text}" for each in findings.findings(study))),
        f"## What this is, and what it is not\n\n{scope(study.groups)}",
        _section("Claims", _claim_lines(study)),
        _section(
            "Run cards that differ though no recipe says so",
            "\n".join(f"- {sentence}" for sentence in cards.sentences(study.differences)),
        ),
        _section("Runs that are not finished or not whole", _unfinished_lines(study)),
        _section("Alarms", tables.pipes(("run", "alarm", "where"), alarms(study.runs))),
        _section("At the end", _summary_markdown(study)),
        _section("Figures", _figures_markdown(study, drawn)),
        _section("Against early stopping", _with_note(tables.stopped(study))),
        _section("Diversity", _with_note(tables.diversity(study))),
        _section("Predicted optimum and what was achieved", _optimum_markdown(study)),
        _section("What each arm's gradient followed", _gradient_lines(study)),
        _section("Held-out evaluation", _titled(tables.evaluated(study))),
        _section("Skills that were not trained", _with_note(tables.retained(study))),
        _section("Checkpoints evaluated", _titled(tables.checkpoints(study), retention.EVALUATION_NOTE)),
        _section(
            "Can the measurements be trusted?", tables.pipes(("looked at", "found", "should be"), checks(study.groups))
        ),
        _section("Run cards", _card_lines(study)),
    ]
    told = (part if part.startswith(FINDINGS[0]) else tables.without_html(part) for part in parts if part)
    return "\n\n".join(told) + "\n"


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def _write_figures(study: Study, folder: Path) -> list[Path]:
    overviews, single = [], []
    for task in study.tasks:
        groups = study.of_task(task)
        place = folder / task if len(study.tasks) > 1 else folder
        drawings = figures.drawings(groups, study.optima)
        if any(panel.name in drawings for panel in figures.OVERVIEW):
            overviews.append(figures.overview(groups, place / "overview.png"))
        single += [figures.png(draw, place / f"{name}.png") for name, draw in drawings.items()]
    _remove_undrawn(study, folder, {*overviews, *single})
    return overviews + single


def _remove_undrawn(study: Study, folder: Path, drawn: set[Path]) -> None:
    """Figures of an earlier report that these runs do not give."""
    for place in (folder, *(folder / task for task in study.tasks)):
        for path in (place / f"{name}.png" for name in figures.TITLES):
            if path not in drawn:
                path.unlink(missing_ok=True)
                path.with_suffix(".pdf").unlink(missing_ok=True)


def _findings(path: Path) -> str:
    """What stands between the marks of an existing report.md."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    _, start, rest = text.partition(FINDINGS[0])
    inside, end, _ = rest.partition(FINDINGS[1])
    return inside if start and end else ""


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _claim_lines(study: Study) -> str:
    told = [f"- {sentence}" for sentence in claims.sentences(study.verdicts)]
    return "\n".join([claims.NOTE, "", *told]) if told else ""


def _unfinished_lines(study: Study) -> str:
    told = [(run, "; ".join(text for text in (run.reason, *run.problems) if text)) for run in unfinished(study.runs)]
    lines = [f"- `{run.run_id}`: {run.status} at step {run.last_step}{': ' if why else ''}{why}" for run, why in told]
    return "\n".join([*lines, *(f"- `{run_id}`: not started" for run_id in study.missing)])


def _summary_markdown(study: Study) -> str:
    found = "\n".join(f"- {sentence}" for sentence in sentences(study.groups))
    return f"{_with_note(tables.final(study))}\n\n{found}" if study.groups else ""


def _figures_markdown(study: Study, drawn: Sequence[str]) -> str:
    images = [f"![{figures.TITLES[Path(path).stem]}]({path})" for path in drawn]
    bands = any(path.split("/")[-1].startswith("frontier_") for path in drawn)
    told = [smoothing_text(study), against_kl_text(study, bands)]
    return "\n\n".join([*told, *images]) if images else ""


def _with_note(table: tables.Table) -> str:
    return "\n\n".join(part for part in (tables.markdown(table), table.note) if part) if table.lines else ""


def _optimum_markdown(study: Study) -> str:
    table = tables.optima(study)
    told = "\n".join(f"- {sentence}" for sentence in optimum.sentences(study.optima))
    return "\n\n".join([tables.markdown(table), told, optimum.NOTE]) if table.lines else ""


def _gradient_lines(study: Study) -> str:
    told = {group.label: " ".join(gradients(group)) for group in study.groups}
    return "\n".join(f"- **{label}**: {text}" for label, text in told.items())


def _titled(every: Sequence[tables.Table], note: str = "") -> str:
    parts = [f"`{table.title}`\n\n{tables.markdown(table)}" for table in every]
    return "\n\n".join([*parts, *filter(None, [note])]) if parts else ""


def _card_lines(study: Study) -> str:
    """Facts shared by all runs, then those that differ."""
    if not study.runs:
        return ""
    differing = differing_facts(study.runs)
    first = facts(study.runs[0].provenance)
    shared = [(key, _code(value)) for key, value in first.items() if key not in differing]
    rows = [
        (run.run_id, *(_code(values[index]) for values in differing.values())) for index, run in enumerate(study.runs)
    ]
    changed = [
        (run.run_id, key, f"{number}", _code(value))
        for run in study.runs
        for key, values in cards.changed(run).items()
        for number, value in values
    ]
    parts = [
        tables.pipes(("the same in all runs", "value"), shared),
        tables.pipes(("run", *differing), rows if differing else ()),
        tables.pipes(("run", "changed between its attempts", "attempt", "value"), changed),
    ]
    return "\n\n".join(part for part in parts if part)


def _code(value: str) -> str:
    shown = cards.short(value).replace("`", "'")  # it would end the span
    return f"`{shown}`"
