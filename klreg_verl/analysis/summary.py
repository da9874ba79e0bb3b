"""What the runs of a recipe add up to: groups, the final table, sentences and checks. Everything is computed.

A *group* is one setting (arm and grid point) on one task with its seeds. Final values are means of the last ten steps.
Only runs that are done enter them; a group without a finished run shows what it has and is marked interim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from klreg_verl.analysis import cards, stats
from klreg_verl.analysis.runs import ACCURACY, SCORE, Run
from klreg_verl.analysis.stats import Estimate
from klreg_verl.experiment.claims import ACHIEVED_KL

KL_K1 = ACHIEVED_KL
MANY_SEEDS = 5
"""Seeds from which the spread between them is taken seriously."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One number of the final table."""

    key: str
    name: str
    unit: str
    slug: str
    """Its name in summary.csv."""
    spoken: str = ""
    """Its name in a sentence."""


COLUMNS = (
    Column(key=ACCURACY, name="Accuracy", unit="share valid", slug="accuracy", spoken="accuracy"),
    Column(key=SCORE, name="Score", unit="reward", slug="score", spoken="mean score"),
    Column(
        key=KL_K1,
        name="KL (k1)",
        unit="nats / response",
        slug="kl_k1_response",
        spoken="KL to the reference (k1, nats per response)",
    ),
    Column(key="kl_ref/k3_response", name="KL (k3)", unit="nats / response", slug="kl_k3_response"),
    Column(key="entropy/token", name="Entropy", unit="nats / token", slug="entropy_token"),
    Column(key="response/length", name="Length", unit="tokens", slug="response_length"),
    Column(key="diversity/unique_valid", name="Distinct valid", unit="answers / prompt", slug="unique_valid"),
    Column(key="diversity/coverage", name="Coverage", unit="distinct / possible", slug="coverage"),
)


@dataclass(frozen=True, kw_only=True)
class Group:
    """All seeds of one setting on one task, in the order in which figures and tables show it."""

    task: str
    label: str
    runs: tuple[Run, ...]
    index: int
    """Position of the arm in the report; picks the colour, so an arm keeps it on every task."""
    shade: float = 1.0
    """How much of the arm's colour a grid point has: from PALEST for the first to 1 for the last."""

    @property
    def final_runs(self) -> tuple[Run, ...]:
        """The runs that final values are taken from: finished ones, or else every run with a training step."""
        measured = tuple(run for run in self.runs if run.last_step)
        return tuple(run for run in measured if run.is_done) or measured

    @property
    def arm(self) -> str:
        """The arm that this is a grid point of."""
        return self.runs[0].arm

    @property
    def beta(self) -> float:
        """The KL block's beta; 0 where there is none."""
        return _beta(self.runs)

    @property
    def is_interim(self) -> bool:
        """Whether no run is finished."""
        return not any(run.is_done and run.last_step for run in self.runs)

    @property
    def follows(self) -> str:
        """The direction, estimator, placement and beta of the spec's KL block in a few words."""
        return follows(self.runs[0].kl)

    def series(self, key: str) -> list[tuple[Run, pd.Series]]:
        """The values of ``key`` by training step, for every run that recorded any."""
        columns = [(run, run.values(key)) for run in self.runs]
        return [(run, values) for run, values in columns if len(values)]

    @property
    def headline(self) -> str:
        """The metric that says how well it does: accuracy, or of a graded reward the score."""
        return SCORE if any(run.graded for run in self.runs) else ACCURACY

    def arm_mean(self, key: str) -> pd.Series:
        """Mean over ``final_runs`` by step, up to the last step that all of them reached; empty if none recorded it."""
        known = [run.training[key] for run in self.final_runs if key in run.training]
        if not known:
            return pd.Series(dtype="float64")
        table = pd.concat(known, axis=1)
        return table[table.index <= min(values.index[-1] for values in known)].mean(axis=1).dropna()


def group_runs(runs: Sequence[Run], arms: Sequence[str] = ()) -> list[Group]:
    """Groups by task, then in the order of ``arms`` (a recipe's), arms that are not among them last; then by beta."""
    present = dict.fromkeys(run.arm for run in runs)
    shown = [arm for arm in dict.fromkeys([*arms, *present]) if arm in present]
    ordered = sorted(runs, key=lambda run: shown.index(run.arm))
    points = {arm: _labels([run for run in ordered if run.arm == arm]) for arm in shown}
    groups = []
    for task in dict.fromkeys(run.task for run in ordered):
        for index, arm in enumerate(shown):
            for position, label in enumerate(points[arm]):
                members = tuple(run for run in ordered if (run.task, run.label) == (task, label))
                shade = _shade(position, len(points[arm]))
                groups += [Group(task=task, label=label, runs=members, index=index, shade=shade)] if members else []
    return groups


def _labels(runs: Sequence[Run]) -> list[str]:
    """The labels of an arm's runs, by beta."""
    labels = dict.fromkeys(run.label for run in runs)
    return sorted(labels, key=lambda label: _beta([run for run in runs if run.label == label]))


def _beta(runs: Sequence[Run]) -> float:
    """The beta that runs of one setting share; 0 where none is recorded, or is no number."""
    betas = [run.kl.get("beta") for run in runs]
    return max((float(beta) for beta in betas if isinstance(beta, int | float)), default=0.0)


PALEST = 0.35


def _shade(position: int, count: int) -> float:
    return 1.0 if count == 1 else PALEST + (1 - PALEST) * position / (count - 1)


def follows(kl: Mapping[str, Any]) -> str:
    """ "reverse KL: k1 in the reward, beta 0.1"; with credit or correction where they are not the usual ones; "no KL
    term"; "not recorded" without a KL block."""
    if not kl:
        return "not recorded"
    if kl.get("placement") == "none":
        return "no KL term"
    direction = "no divergence" if kl.get("follows") in (None, "none") else f"{kl['follows']} KL"
    beta = kl.get("beta")
    amount = "" if beta is None else f", beta {beta:g}" if isinstance(beta, int | float) else f", beta {beta}"
    usual = {"credit": (None, "sequence"), "correction": (None, "none")}
    own = "".join(f", {name} {kl[name]}" for name, values in usual.items() if kl.get(name) not in values)
    return f"{direction}: {kl.get('estimator', '?')} in the {kl.get('placement', '?')}{own}{amount}"


def final_value(group: Group, key: str) -> Estimate:
    """Mean of the last ten steps. One run: standard error over those steps. More runs: mean and error over runs."""
    known = [run for run in group.final_runs if len(run.values(key))]
    finals = [stats.last_steps(run.training[key].tolist()) for run in known]
    return finals[0] if len(finals) == 1 else stats.mean_and_error(final.mean for final in finals)


def recorded_columns(groups: Sequence[Group]) -> list[Column]:
    """The columns of the final table that any group has a value for; scores only of runs that are graded."""
    return [column for column in COLUMNS if any(final_value(group, column.key).num for group in groups)]


def final_change(group: Group, key: str) -> stats.Change | None:
    """The first against the last ten steps, over the runs that final values are taken from."""
    changes = [stats.change(run.training[key].tolist()) for run in group.final_runs if key in run.training]
    known = [each for each in changes if each is not None]
    return stats.mean_change(known) if known else None


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """The final values of a group and of its baseline, and group - baseline."""

    group: float
    baseline: float
    difference: Estimate
    num_pairs: int
    """Seeds that both have, over which the difference is paired; 1 where it is not paired."""


def contrast(group: Group, baseline: Group, key: str) -> Contrast:
    """Paired by seed where both groups have two or more of the same; else the groups are taken as independent."""
    left, right = _finals_by_seed(group, key), _finals_by_seed(baseline, key)
    shared = sorted(left.keys() & right.keys())
    if len(shared) < 2:
        one, other = final_value(group, key), final_value(baseline, key)
        gap = stats.difference(one, other)
        return Contrast(group=one.mean, baseline=other.mean, difference=gap, num_pairs=1)
    means = [stats.mean_and_error(values[seed] for seed in shared).mean for values in (left, right)]
    gap = stats.paired_difference(left, right)
    return Contrast(group=means[0], baseline=means[1], difference=gap, num_pairs=len(shared))


def summary_table(groups: Sequence[Group]) -> pd.DataFrame:
    """One row a group: task, arm, follows, seeds, steps, error_over, and every column's mean, error and count."""
    return pd.DataFrame([_summary_row(group) for group in groups], columns=_summary_columns())


def error_over(group: Group) -> str:
    """What the number after ± is taken over: "10 steps" of one run, or "3 seeds"."""
    runs = group.final_runs
    if len(runs) >= 2:
        return f"{len(runs)} seeds"
    return f"{min(stats.WINDOW, len(runs[0].training))} steps" if runs else "–"


def steps_text(group: Group) -> str:
    """ "40 of 40", the least advanced of the runs that final values are taken from."""
    last = min((run.last_step for run in group.final_runs), default=0)
    asked = group.runs[0].steps
    return f"{last}" if asked is None else f"{last} of {asked}"


def sentences(groups: Sequence[Group]) -> list[str]:
    """How accuracy, or the score, moved in every group, then how each group ended against the first one of its task."""
    moved = [_movement(group, _prefix(group, groups)) for group in groups]
    against = [
        _comparison(group, baseline, column, _prefix(group, groups))
        for column in recorded_columns(groups)
        if column.spoken
        for baseline, group in _pairs(groups)
    ]
    return [sentence for sentence in (*moved, *against) if sentence]


def scope(groups: Sequence[Group]) -> str:
    """What the number of finished seeds allows a reader to conclude, and what is missing."""
    seeds = [sum(run.is_done for run in group.final_runs) for group in groups]
    if not any(group.final_runs for group in groups):
        return "No run has a training step yet, so there is nothing to read from this report but its list of runs."
    if min(seeds) == 0:
        waiting = ", ".join(dict.fromkeys(group.label for group in groups if group.is_interim))
        return (
            f"No finished run of {waiting}: the values there are interim, of runs as far as they came, and differences "
            "from them are at unequal steps. Nothing is to be concluded before every arm has finished."
        )
    if min(seeds) == 1:
        return (
            "With one seed in an arm this report shows the machinery, not evidence: another seed may order the arms "
            "otherwise. Where an arm has one seed, what follows ± is the standard error over the steps of that run; it "
            "does not contain the spread between seeds. Evidence begins at about five seeds matched across arms: then "
            "± and the bands in the figures are taken over seeds, and differences between arms paired."
        )
    few = " Fewer than five seeds give a rough idea of the spread only." if min(seeds) < MANY_SEEDS else ""
    return (
        f"Every arm has {min(seeds)} or more finished seeds; what follows ± is the standard error over seeds, and "
        f"differences between arms are paired by seed.{few} Only registered claims are corrected for their number: "
        "read every other comparison as exploratory."
    )


def alarms(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """(run, alarm, steps) of every alarm; with a saturated beta an arm does not hold the KL that it should."""
    return [
        (run.run_id, name, f"step {ranges(steps)}" if len(steps) == 1 else f"{len(steps)} steps: {ranges(steps)}")
        for run in runs
        for name, steps in run.alarms.items()
    ]


def ranges(steps: Sequence[int]) -> str:
    """ "3 to 5, 9" of 3, 4, 5, 9; at most six parts."""
    parts: list[list[int]] = []
    for step in steps:
        if parts and step == parts[-1][-1] + 1:
            parts[-1].append(step)
        else:
            parts.append([step])
    told = [f"{part[0]}" if len(part) == 1 else f"{part[0]} to {part[-1]}" for part in parts]
    return ", ".join(told[:6] + ["..."] * (len(told) > 6))


def checks(groups: Sequence[Group]) -> list[tuple[str, str, str]]:
    """(what is looked at, what was found, what it should be): whether the measurements can be trusted."""
    runs = [run for group in groups for run in group.runs]
    rows = [
        (
            f"{'Score' if any(run.graded for run in runs) else 'Accuracy'} at step 1 across arms of one seed",
            _first_step_spread(runs),
            "equal: the starting policy in every arm",
        ),
        (
            "Largest |KL to the reference, k1| at step 1",
            _first_step_kl(runs),
            "about 0: the policy still is the reference",
        ),
        ("Largest |log-prob difference| sampler to trainer", _largest(runs, "kl_rollout/max"), "well below 1 nat"),
        ("Largest share of truncated responses in a step", _largest(runs, "response/truncated"), "small"),
    ]
    return [row for row in rows if row[1]]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation metric: what every group had at some steps."""

    steps: tuple[int, ...]
    values: tuple[tuple[Estimate, ...], ...]
    """A row a group, a column a step: mean and standard error over the runs that evaluated there."""


def evaluations(groups: Sequence[Group], num_steps: int = 8) -> dict[str, Evaluation]:
    """eval/* metric -> its table, at no more than ``num_steps`` evenly chosen steps with the first and the last."""
    keys = sorted({key for group in groups for run in group.runs for key in run.metrics if key.startswith("eval/")})
    return {key: _evaluation(groups, key, num_steps) for key in keys}


def gradients(group: Group) -> list[str]:
    """The statements under "gradient" in the run cards of a group, each once."""
    stated = [str(run.provenance["gradient"]) for run in group.runs if run.provenance.get("gradient")]
    return list(dict.fromkeys(stated)) or ["The run cards do not say what the gradient followed."]


def unfinished(runs: Sequence[Run]) -> list[Run]:
    """Runs that are not done or have something wrong with their files: failed ones first."""
    rank = {"failed": 0, "interrupted": 1, "running": 2, "pending": 3}
    return sorted((run for run in runs if not run.is_done or run.problems), key=lambda run: rank.get(run.status, 4))


def _pairs(groups: Sequence[Group]) -> list[tuple[Group, Group]]:
    """(first group of the task, other group) for every other group."""
    first: dict[str, Group] = {}
    for group in groups:
        first.setdefault(group.task, group)
    return [(first[group.task], group) for group in groups if group is not first[group.task]]


def _prefix(group: Group, groups: Sequence[Group]) -> str:
    return f"{group.task}: " if len({each.task for each in groups}) > 1 else ""


def _movement(group: Group, prefix: str) -> str:
    moved, name = final_change(group, group.headline), {ACCURACY: "accuracy", SCORE: "mean score"}[group.headline]
    if moved is None:
        return f"{prefix}{group.label}: no {name} was recorded over two steps or more."
    places = stats.places([moved.difference])
    first, last = stats.number(moved.first.mean, places), stats.number(moved.last.mean, places)
    gap = f"difference {stats.text(moved.difference, places, sign=True)}"
    when = f"first {moved.window} against last {moved.window} steps"
    over = f", over {error_over(group)}" if len(group.final_runs) > 1 else ""
    over += f"; interim, {steps_text(group)} steps" if group.is_interim else ""
    how = {1: f"rose from {first} to {last}", -1: f"fell from {first} to {last}"}
    moving = how.get(moved.direction, f"went from {first} to {last}, zero inside the 95 % t interval")
    return f"{prefix}{group.label}: {name} {moving}; {when} ({gap}{over})."


def _comparison(group: Group, baseline: Group, column: Column, prefix: str) -> str:
    found = contrast(group, baseline, column.key)
    gap = found.difference
    if math.isnan(gap.mean):
        return ""
    places = stats.places([gap])
    told = (
        f"{prefix}{group.label} against {baseline.label}: {column.spoken} ended at {stats.number(found.group, places)} "
        f"against {stats.number(found.baseline, places)} "
        f"(difference {stats.text(gap, places, sign=True)} {_pairing(found, group, baseline)})."
    )
    cautions = (interim([group, baseline]), cards.caution([*group.final_runs, *baseline.final_runs]))
    return " ".join([told, *filter(None, cautions)])


def interim(groups: Sequence[Group]) -> str:
    """What is to be said beside a comparison of which a side has no finished run; "" where both have one."""
    names = [f"{group.label} ({steps_text(group)} steps)" for group in groups if group.is_interim]
    return f"Interim: no finished run of {' and '.join(names)}." if names else ""


def _pairing(found: Contrast, group: Group, baseline: Group) -> str:
    """What the error of a difference is over; from five seeds on also whether its t interval has zero in it."""
    if found.num_pairs < 2:
        single = len(group.final_runs) == 1 == len(baseline.final_runs)
        return "over steps" if single else f"not paired: over {error_over(group)} and {error_over(baseline)}"
    over = f"over {found.num_pairs} paired seeds"
    clear = "outside" if stats.clear_sign(found.difference) else "inside"
    return over if found.num_pairs < MANY_SEEDS else f"{over}, zero {clear} the 95 % t interval"


def _finals_by_seed(group: Group, key: str) -> dict[int, float]:
    runs = [run for run in group.final_runs if len(run.values(key))]
    return {run.seed: stats.last_steps(run.training[key].tolist()).mean for run in runs}


def _summary_row(group: Group) -> dict[str, Any]:
    row: dict[str, Any] = {
        "task": group.task,
        "arm": group.label,
        "follows": group.follows,
        "seeds": len(group.final_runs),
        "steps": steps_text(group),
        "interim": group.is_interim,
        "error_over": error_over(group),
    }
    for column in COLUMNS:
        value = final_value(group, column.key)
        row |= {column.slug: value.mean, f"{column.slug}_error": value.standard_error}
    return row


def _summary_columns() -> list[str]:
    numbers = [name for column in COLUMNS for name in (column.slug, f"{column.slug}_error")]
    return ["task", "arm", "follows", "seeds", "steps", "interim", "error_over", *numbers]


def _first_step_spread(runs: Sequence[Run]) -> str:
    """The largest range of step-1 accuracy or score across the arms of one task and seed."""
    values: dict[tuple[str, int], list[float]] = {}
    for run in runs:
        first = run.values(SCORE if run.graded else ACCURACY)
        if 1 in first.index:
            values.setdefault((run.task, run.seed), []).append(float(first[1]))
    spreads = [max(each) - min(each) for each in values.values() if len(each) >= 2]
    return f"largest difference {max(spreads):.4f}" if spreads else ""


def _first_step_kl(runs: Sequence[Run]) -> str:
    with_kl = [run for run in runs if KL_K1 in run.training and 1 in run.training.index]
    known = [abs(float(run.training.loc[1, KL_K1])) for run in with_kl]
    return f"{max(known):.2g} nats per response" if known else ""


def _largest(runs: Sequence[Run], key: str) -> str:
    known = [float(run.training[key].max()) for run in runs if key in run.training and run.training[key].notna().any()]
    return f"{max(known):.2g}" if known else ""


def _evaluation(groups: Sequence[Group], key: str, num_steps: int) -> Evaluation:
    columns = [[run.metrics[key].dropna() for run in group.runs if key in run.metrics] for group in groups]
    steps = sorted({int(step) for group in columns for values in group for step in values.index})
    if len(steps) > num_steps:
        chosen = {round(index * (len(steps) - 1) / (num_steps - 1)) for index in range(num_steps)}
        steps = [steps[index] for index in sorted(chosen)]
    rows = [
        tuple(stats.mean_and_error(float(values.get(step, math.nan)) for values in group) for step in steps)
        for group in columns
    ]
    return Evaluation(steps=tuple(steps), values=tuple(rows))
