"""report.html: one self-contained page, its figures as inline SVG that follow the reader's light or dark setting."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from klreg_verl.analysis import cards, claims, figures, findings, optimum, retention, tables, templates, themes
from klreg_verl.analysis.cards import differing_facts, facts
from klreg_verl.analysis.runs import Run
from klreg_verl.analysis.samples import Response, SideBySide, side_by_side
from klreg_verl.analysis.study import Study
from klreg_verl.analysis.summary import (
    Group,
    alarms,
    checks,
    gradients,
    scope,
    sentences,
    unfinished,
)

MAX_RESPONSES = 8
FOOTER = (
    "Every number and sentence on this page is computed from the run folders. "
    "report.md, summary.csv, diversity.csv, metrics_long.csv, figures/ (PNG and PDF) and tables/ (LaTeX) lie beside it."
)


def render(study: Study) -> str:
    """The whole page."""
    sections = [section for section in _sections(study) if section[2]]
    return templates.PAGE.substitute(
        title=escape(f"{study.name}: {study.question}"),
        style=templates.STYLE.strip(),
        colors=_colors(),
        kicker=f"klreg_verl · recipe {escape(study.name)}",
        question=escape(study.question),
        facts=escape(counts(study)),
        navigation=" ".join(f'<a href="#{anchor}">{escape(title)}</a>' for anchor, title, _ in sections),
        sections="".join(_section(*section) for section in sections),
        footer=FOOTER,
    )


def counts(study: Study) -> str:
    """ "3 arms · 1 task · 1 seed · 3 of 3 runs done"."""
    arms = len({group.label for group in study.groups})
    seeds = len({run.seed for run in study.runs})
    done, total = sum(run.is_done for run in study.runs), len(study.runs) + len(study.missing)
    parts = [_plural(arms, "arm"), _plural(len(study.tasks), "task"), _plural(seeds, "seed")]
    return " · ".join([*parts, f"{done} of {_plural(total, 'run')} done"])


def smoothing_text(study: Study) -> str:
    """How to read the lines of the time courses."""
    windows = {task: figures.window_of(study.of_task(task)) for task in study.tasks}
    told = [f"{window} steps" if len(windows) == 1 else f"{window} steps ({task})" for task, window in windows.items()]
    return (
        "The thick line is the mean of an arm's runs, smoothed by a centred mean over "
        f"{', '.join(told)} where that window exists; the band of {figures.BANDED} or more runs is the standard error "
        "over them. A thin line is one run, every step as recorded. A step is measured on the batch sampled before "
        "its update: step 1 is the starting policy. A cross ends a run that failed or was interrupted."
    )


def _sections(study: Study) -> list[tuple[str, str, str]]:
    return [
        ("findings", "Findings", _findings(study)),
        ("scope", "What this is, and what it is not", f'<div class="scope"><p>{escape(scope(study.groups))}</p></div>'),
        ("claims", "Claims", _claims(study)),
        ("undeclared", "Run cards that differ though no recipe says so", _undeclared(study)),
        ("unfinished", "Runs that are not finished or not whole", _unfinished(study)),
        ("alarms", "Alarms", _alarms(study)),
        ("summary", "At the end", _summary(study)),
        ("courses", "Over the steps", _courses(study)),
        ("beta", "Against beta", _sweep(study)),
        ("frontier", "Against KL", _frontier(study)),
        ("stopping", "Against early stopping", _stopped(study)),
        ("diversity", "Diversity", _diversity(study)),
        ("optimum", "Predicted optimum and what was achieved", _optimum(study)),
        ("gradient", "What each arm's gradient followed", _gradients(study)),
        ("evaluation", "Held-out evaluation", _evaluations(study)),
        ("retention", "Skills that were not trained", _retained(study)),
        ("checkpoints", "Checkpoints evaluated", _evaluated(study)),
        ("samples", "Responses side by side", _samples(study)),
        ("checks", "Can the measurements be trusted?", _checks(study)),
        ("cards", "Run cards", _cards(study)),
    ]


def _section(anchor: str, title: str, body: str) -> str:
    return templates.SECTION.substitute(anchor=anchor, title=escape(title), body=body)


def _colors() -> str:
    """The theme of the figures as CSS variables, light and dark; paper is always light."""
    dark = f"@media screen and (prefers-color-scheme: dark) {{\n:root {{ {themes.variables(themes.DARK)} }}\n}}"
    return f":root {{ {themes.variables(themes.LIGHT)} }}\n{dark}"


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _dot(group: Group) -> str:
    return f'<span class="dot" style="background: {themes.css(group)}"></span>'


def _table(head: str, rows: Iterable[str]) -> str:
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _findings(study: Study) -> str:
    """Each with a link to its evidence, where that section is shown."""
    rows = [
        f'<li class="{"caution" if each.is_caution else "finding"}">{_unbroken(each.text)} '
        f'<a class="evidence" href="#{each.anchor}">{EVIDENCE[each.anchor]}</a></li>'
        for each in findings.findings(study)
    ]
    return f'<ul class="findings">{"".join(rows)}</ul>' if rows else ""


EVIDENCE = {
    "scope": "what that means",
    "claims": "its evidence",
    "summary": "table",
    "stopping": "figure and table",
    "diversity": "table",
    "optimum": "figure and table",
    "retention": "table",
    "undeclared": "which",
    "unfinished": "why",
    "alarms": "where",
}
"""What a link to a section is called."""


def _undeclared(study: Study) -> str:
    told = "".join(f"<li>{escape(sentence)}</li>" for sentence in cards.sentences(study.differences))
    note = _note(
        "Code, data, model and settings should be alike but for what the arms declare. Where they are not, a "
        "difference between arms may be a difference of this."
    )
    return f'{note}<ul class="found">{told}</ul>' if told else ""


def _claims(study: Study) -> str:
    told = "".join(f"<li>{_unbroken(sentence)}</li>" for sentence in claims.sentences(study.verdicts))
    return f'{_note(claims.NOTE)}<ul class="found">{told}</ul>' if told else ""


def _unfinished(study: Study) -> str:
    rows = [_run_row(run) for run in unfinished(study.runs)]
    rows += [
        f'<th>{escape(run_id)}</th><td class="status">not started</td><td></td><td></td>' for run_id in study.missing
    ]
    if not rows:
        return ""
    note = _note("They are drawn as far as they came. Final values are of finished runs only, where an arm has one.")
    return _table("<th>Run</th><th>Status</th><th>Last step</th><th>What is known</th>", rows) + note


def _alarms(study: Study) -> str:
    cells = [tuple(map(escape, each)) for each in alarms(study.runs)]
    rows = [f"<th>{run}</th><td>{name}</td><td>{steps}</td>" for run, name, steps in cells]
    return _table("<th>Run</th><th>Alarm</th><th>Where</th>", rows) if rows else ""


def _run_row(run: Run) -> str:
    known = "; ".join(text for text in (run.reason, *run.problems) if text)
    status = f'<td class="status {escape(run.status)}">{escape(run.status)}</td>'
    steps = f"{run.last_step}" if run.steps is None else f"{run.last_step} of {run.steps}"
    return f"<th>{escape(run.run_id)}</th>{status}<td>{steps}</td><td>{escape(known)}</td>"


def _summary(study: Study) -> str:
    if not study.groups:
        return ""
    found = "".join(f"<li>{_unbroken(sentence)}</li>" for sentence in sentences(study.groups))
    return f'{_shown(tables.final(study))}<ul class="found">{found}</ul>'


def _unbroken(sentence: str) -> str:
    """Escaped, and a line never ends at ±."""
    return escape(sentence).replace(" ± ", "&nbsp;±&nbsp;")


def _shown(table: tables.Table) -> str:
    """A table of texts; what follows ± goes below its number."""
    head = f"<th>{escape(table.first.capitalize())}</th>" + "".join(
        f'<th class="number">{escape(each.name)}<small>{escape(each.unit)}</small></th>' for each in table.heads
    )
    rows = []
    for line in table.lines:
        cells = "".join(f'<td class="number">{_below(cell)}</td>' for cell in line.cells)
        dot = _dot(line.group) if line.group else '<span class="dot none"></span>'
        small = f"<small>{escape(line.small)}</small>" if line.small else ""
        rows.append(f"<th>{dot}{escape(line.label)}{small}</th>{cells}")
    wide = _table(head, rows).replace('class="scroll"', 'class="scroll wide"', 1)
    return wide + (_note(table.note) if table.note else "")


def _below(cell: str) -> str:
    mean, _, error = cell.partition(" ± ")
    return f"{escape(mean)}<small>± {escape(error)}</small>" if error else escape(cell)


def _per_task(study: Study, names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(task, figures of it that can be drawn); tasks without one are left out."""
    shown = []
    for task in study.tasks:
        groups = study.of_task(task)
        drawn = [
            f"<figure>{figures.svg(draw, f'{task}-{name}')}</figure>"
            for name, draw in figures.drawings(groups, study.optima).items()
            if name in names
        ]
        if drawn:
            shown.append((task, drawn))
    return shown


def _with_heading(study: Study, task: str, body: str) -> str:
    return f"<h3>{escape(task)}</h3>{body}" if len(study.tasks) > 1 else body


def _courses(study: Study) -> str:
    shown = _per_task(study, [panel.name for panel in figures.TIME_COURSES])
    grids = [_with_heading(study, task, f'<div class="grid">{"".join(each)}</div>') for task, each in shown]
    return _note(smoothing_text(study)) + "".join(grids) + _not_recorded(study) if grids else ""


def _not_recorded(study: Study) -> str:
    panels = (*figures.TIME_COURSES, *figures.MISMATCH)
    absent = [panel.title for panel in panels if panel.missed and not figures.recorded(study.groups, panel)]
    return _note(f"Not recorded by any run: {', '.join(absent)}.") if absent else ""


def _sweep(study: Study) -> str:
    shown = _per_task(study, [panel.name for panel in figures.SWEEP])
    return (
        _note(AGAINST_BETA) + "".join(_with_heading(study, task, _grid(each)) for task, each in shown) if shown else ""
    )


AGAINST_BETA = (
    "Means of the last ten steps with their standard errors, over seeds where there are more than one; an arm that has "
    "no beta is a level across. A skill that was not trained is measured at validations: its change from before "
    "training to the last one (of several, the one that lost most). Equal beta is not equal strength in different "
    "estimators and places: see also the figures against KL."
)


def _frontier(study: Study) -> str:
    shown = _per_task(study, [figures.KL_ACCURACY, *(panel.name for panel in figures.FRONTIERS)])
    drawn = [_with_heading(study, task, _grid(each)) for task, each in shown]
    bands = any(figures.has_frontier(study.of_task(task), panel) for task in study.tasks for panel in figures.FRONTIERS)
    return _note(against_kl_text(study, bands)) + "".join(drawn) if drawn else ""


def against_kl_text(study: Study, bands: bool) -> str:
    """How to read the figures over KL."""
    path = (
        f"Over the steps, a dot is the mean of {figures.block_size(study.groups)} steps; arrows point forward in time. "
        "Higher at the same KL is more accuracy for the same distance from the reference."
    )
    at_end = (
        " At the same KL, a dot is where a finished run ended; the line is an arm's mean over seeds, each seed's betas "
        "joined by straight lines, and the band its pointwise 95 % t interval. Nothing is extrapolated."
    )
    return path + at_end * bands


def _grid(drawn: Sequence[str]) -> str:
    return f'<div class="single">{drawn[0]}</div>' if len(drawn) == 1 else f'<div class="grid">{"".join(drawn)}</div>'


def _stopped(study: Study) -> str:
    table = tables.stopped(study)
    shown = [_with_heading(study, task, _grid(each)) for task, each in _per_task(study, [figures.STOPPING])]
    return "".join(shown) + _shown(table) if table.lines else ""


def _diversity(study: Study) -> str:
    table = tables.diversity(study)
    return _shown(table) if table.lines else ""


def _optimum(study: Study) -> str:
    """Nothing where no arm has stored what a prediction needs."""
    table = tables.optima(study)
    if not table.lines:
        return ""
    told = "".join(f"<li>{_unbroken(sentence)}</li>" for sentence in optimum.sentences(study.optima))
    shown = [_with_heading(study, task, _grid(each)) for task, each in _per_task(study, [figures.OPTIMUM])]
    return f'{"".join(shown)}{_shown(table)}<ul class="found">{told}</ul>{_note(optimum.NOTE)}'


def _gradients(study: Study) -> str:
    """One statement a setting; settings on several tasks are told once."""
    told = {group.label: group for group in reversed(study.groups)}
    cards = [_statement(group) for group in reversed(told.values())]
    return f'<div class="statements">{"".join(cards)}</div>' if cards else ""


def _statement(group: Group) -> str:
    told = "".join(f"<p>{escape(text)}</p>" for text in gradients(group))
    head = f"<p><strong>{_dot(group)}{escape(group.label)}</strong></p>{_note(group.follows)}"
    return f'<div class="card">{head}{told}</div>'


def _evaluations(study: Study) -> str:
    note = "Before training is step 0. With several seeds: mean ± standard error over those that evaluated there."
    return _titled(tables.evaluated(study), note)


def _retained(study: Study) -> str:
    """Before and after, a row a setting and skill."""
    table = tables.retained(study)
    return _shown(table) if table.lines else ""


def _evaluated(study: Study) -> str:
    """What `klreg eval` left in the run folders, a table a task."""
    return _titled(tables.checkpoints(study), retention.EVALUATION_NOTE)


def _titled(every: Sequence[tables.Table], note: str) -> str:
    parts = [f"<h3>{escape(table.title)}</h3>{_shown(table)}" for table in every]
    return "".join(parts) + _note(note) if parts else ""


def _samples(study: Study) -> str:
    parts = []
    for task in study.tasks:
        groups = study.of_task(task)
        shown = side_by_side(groups)
        for step in dict.fromkeys(each.step for each in shown):
            prompts = [_side_by_side(each, groups) for each in shown if each.step == step]
            parts.append(f"<h3>{escape(task)}, step {step}</h3>{''.join(prompts)}")
    note = _note(
        "At the first and the last step that all arms stored, of one seed: prompts with the most possible answers. "
        " ✓ valid, ✗ not; × how often it was drawn."
    )
    return note + "".join(parts) if parts else ""


def _side_by_side(shown: SideBySide, groups: Sequence[Group]) -> str:
    by_label = {group.label: group for group in groups}
    head = "".join(f"<th>{_dot(by_label[label])}{escape(label)}</th>" for label, _ in shown.responses)
    cells = "".join(f"<td>{_responses(responses)}</td>" for _, responses in shown.responses)
    possible = f" · {escape(shown.num_valid)} possible valid answers" if shown.num_valid else ""
    prompt = f'<p class="note"><span class="prompt">{escape(_cut(shown.prompt, 600))}</span>{possible}</p>'
    return prompt + _table(head, [cells])


MARKS = {
    True: '<span class="valid">✓</span>',
    False: '<span class="invalid">✗</span>',
    None: "<span>·</span>",
}
"""Of a response that is right, wrong, or of which nothing says so."""


def _responses(responses: Sequence[Response]) -> str:
    rows = "".join(
        f"<li>{MARKS[each.valid]}"
        f'<span>{escape(_cut(each.text, 400)) or "(empty)"}</span><span class="count">× {each.count}</span></li>'
        for each in responses[:MAX_RESPONSES]
    )
    more = len(responses) - MAX_RESPONSES
    rest = f'<li><span class="count">and {more} more distinct responses</span></li>' if more > 0 else ""
    return f'<ul class="responses">{rows}{rest}</ul>'


def _cut(text: str, limit: int) -> str:
    text = text.strip()
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit:,} more characters)"


def _checks(study: Study) -> str:
    rows = [
        f"<td>{escape(what)}</td><td>{escape(found)}</td><td>{escape(wanted)}</td>"
        for what, found, wanted in checks(study.groups)
    ]
    table = _table("<th>Looked at</th><th>Found</th><th>Should be</th>", rows) if rows else ""
    shown = _per_task(study, [panel.name for panel in figures.MISMATCH])
    return table + "".join(
        _with_heading(study, task, f'<div class="grid">{"".join(each)}</div>') for task, each in shown
    )


def _cards(study: Study) -> str:
    differing = differing_facts(study.runs)
    head = "<th>Fact</th>" + "".join(f"<th>{escape(run.run_id)}</th>" for run in study.runs)
    rows = [_fact_row(key, values) for key, values in differing.items()]
    table = (
        f"<p>Facts that are not the same in all runs:</p>{_table(head, rows)}"
        if 0 < len(study.runs) <= 8 and rows
        else ""
    )
    note = f"<p>Not the same in all runs: {escape(', '.join(differing))}.</p>" if rows and not table else ""
    return table + note + "".join(_card(run) for run in study.runs)


def _card(run: Run) -> str:
    values = {key: [value] for key, value in facts(run.provenance).items()}
    values |= {f"{key}, by attempt": [value for _, value in each] for key, each in cards.changed(run).items()}
    rows = "".join(f"<tr>{_fact_row(key, each)}</tr>" for key, each in values.items())
    status = f'<span class="status {escape(run.status)}">{escape(run.status)}</span>'
    return f"<details><summary>{escape(run.run_id)} · {status}</summary><table><tbody>{rows}</tbody></table></details>"


def _fact_row(key: str, values: Sequence[str]) -> str:
    return f"<th>{escape(key)}</th>" + "".join(
        f'<td class="value">{escape(cards.short(value))}</td>' for value in values
    )
