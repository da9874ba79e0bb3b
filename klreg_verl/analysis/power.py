"""How many seeds a question needs, before the runs: in general, or with the spread between seeds of runs that exist.

Everything is about paired seeds: the spread is the standard deviation over seeds of the *difference* between two arms,
which is smaller than the arms' own spreads where good seeds are good in both. Measured on few seeds it is uncertain;
what is planned with it uses the value that it does not exceed with 80 % confidence (statistics.sd_limit).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klreg_verl.core import statistics
from klreg_verl.core.statistics import LEVEL, POWER, Paired, paired
from klreg_verl.experiment.claims import ACHIEVED_KL, ClaimSpec

if TYPE_CHECKING:
    from klreg_verl.analysis.runs import Run

# What reads runs is imported inside the functions: it imports pandas, and `klreg plan` of a new recipe has no runs.

SEEDS = (3, 4, 5, 6, 8, 10, 12, 16, 20)
DEFAULT_METRICS = ("train/accuracy", ACHIEVED_KL, "entropy/token", "diversity/coverage")


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How much the difference of two settings varies between seeds, in runs that exist."""

    task: str
    metric: str
    first: str
    second: str
    comparison: Paired

    @property
    def limit(self) -> float:
        """The sd that the true one does not exceed with 80 % confidence."""
        return statistics.sd_limit(self.comparison.sd, self.comparison.num - 1)


def spreads(runs: Sequence[Run], metrics: Sequence[str] | None = None) -> list[Spread]:
    """Every two settings of a task with two finished seeds or more in common; metrics by default those that exist.

    Raises:
        ValueError: a metric is named that no run has recorded.
    """
    from klreg_verl.analysis.endpoints import endpoint

    recorded = sorted({str(key) for run in runs for key in run.training})
    if unknown := [metric for metric in metrics or () if all(math.isnan(endpoint(run, metric)) for run in runs)]:
        raise ValueError(f"No run has recorded {unknown[0]}. Recorded are: {', '.join(recorded)}.")
    held_out = [key for key in recorded if key.startswith("eval/")]
    chosen = metrics or [*held_out, *(key for key in DEFAULT_METRICS if key in recorded)]
    done = [run for run in runs if run.is_done]
    return [
        spread
        for task in dict.fromkeys(run.task for run in done)
        for metric in chosen
        for spread in _of_task([run for run in done if run.task == task], task, metric)
    ]


def _of_task(runs: Sequence[Run], task: str, metric: str) -> list[Spread]:
    from klreg_verl.analysis.endpoints import endpoint

    labels = list(dict.fromkeys(run.label for run in runs))
    values = {label: {run.seed: endpoint(run, metric) for run in runs if run.label == label} for label in labels}
    found = [
        Spread(task=task, metric=metric, first=first, second=second, comparison=paired(values[first], values[second]))
        for first, second in itertools.combinations(labels, 2)
    ]
    return [each for each in found if each.comparison.num > 1]


# ---------------------------------------------------------------------------------------------------- what seeds show


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of a study: the smallest difference and the margin of interest, at which error rate and power."""

    difference: float | None = None
    margin: float | None = None
    claims: int = 1
    """Claims in the list; the first that Holm passes is tested at level / claims."""
    level: float = LEVEL
    power: float = POWER

    def __post_init__(self) -> None:
        for name in ("difference", "margin"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"--{name} {value}: give a number above 0, in the unit of the metric.")
        if self.claims < 1:
            raise ValueError(f"--claims {self.claims}: a list has at least one claim.")
        for name in ("level", "power"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: give a number between 0 and 1.")
        if self.power <= self.level:
            raise ValueError(f"--power {self.power} is not above the error rate {self.level}: no seeds are needed.")

    @property
    def share(self) -> float:
        """The error rate of the first step of Holm."""
        return self.level / self.claims


def seeds_table(question: Question, sd: float = 1.0, seeds: Sequence[int] = SEEDS) -> list[dict[str, Any]]:
    """A row a number of seeds: the difference it sees, and the margin it shows equivalence in."""
    return [
        {
            "seeds": num,
            "difference": sd * statistics.detectable_difference(num, question.share, question.power),
            "margin": sd * statistics.smallest_margin(num, question.share, question.power),
        }
        for num in seeds
    ]


def general_rows(question: Question, sd: float | None) -> list[dict[str, Any]]:
    """`seeds_table` with what the question needs in every row, where `sd` is given."""
    rows = seeds_table(question, 1.0 if sd is None else sd)
    return rows if sd is None else [row | _seeds_for(question, sd) for row in rows]


def _seeds_for(question: Question, sd: float) -> dict[str, int | None]:
    return {f"seeds_for_{key}": value for key, value in needed(question, sd).items()}


def needed(question: Question, sd: float) -> dict[str, int | None]:
    """Seeds for the question's difference and margin, if `sd` is the spread; None: more than statistics.MAX_SEEDS."""
    found: dict[str, int | None] = {}
    if question.difference is not None:
        effect = question.difference / sd if sd > 0 else math.inf
        found["difference"] = _seeds(effect, statistics.seeds_for_difference, question)
    if question.margin is not None:
        margin = question.margin / sd if sd > 0 else math.inf
        found["margin"] = _seeds(
            margin, lambda m, level, power: statistics.seeds_for_equivalence(m, 0.0, level, power), question
        )
    return found


def _seeds(scaled: float, seeds_for: Any, question: Question) -> int | None:
    return statistics.SURE if math.isinf(scaled) else seeds_for(scaled, question.share, question.power)


def spread_row(spread: Spread, question: Question) -> dict[str, Any]:
    """One spread with what its present seeds can show and what the question needs."""
    comparison, limit = spread.comparison, spread.limit
    now = seeds_table(question, limit, [comparison.num])[0]
    row = {
        "task": spread.task,
        "metric": spread.metric,
        "first": spread.first,
        "second": spread.second,
        "seeds": comparison.num,
        "difference": comparison.mean,
        "sd": comparison.sd,
        "sd_limit": limit,
        "correlation": comparison.correlation,
        "detectable": now["difference"],
        "smallest_margin": now["margin"],
    }
    return row | _seeds_for(question, limit)


def check_options(runs: Path | None, metrics: Sequence[str] | None, sd: float | None, question: Question) -> None:
    """Refuses options of `klreg power` that contradict or miss each other. Raises ValueError."""
    if runs is not None and sd is not None:
        raise ValueError("--from takes the spread from runs and --sd gives it. Keep one of them.")
    if runs is None and metrics:
        raise ValueError("--metric has no effect without --from RUNS.")
    if sd is not None and not sd > 0:
        raise ValueError(f"--sd {sd}: give a number above 0, in the unit of the metric.")
    if runs is None and sd is None and (question.difference is not None or question.margin is not None):
        raise ValueError("--difference and --margin are in the metric's unit: give --sd too, or --from RUNS.")


def finite(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows for JSON, which has no NaN: null."""
    return [
        {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
        for row in rows
    ]


# ---------------------------------------------------------------------------------------------------- words


def lines(question: Question, sd: float | None = None) -> list[str]:
    """The general table, in units of the spread, or in those of the metric where `sd` is given."""
    unit = "times the sd of a paired difference" if sd is None else f"with an sd of {sd:g} between paired differences"
    rows = seeds_table(question, 1.0 if sd is None else sd)
    told = [f"{question.power:.0%} power at {_rate(question)}, {unit}:", "seeds  difference seen  equivalent within ±"]
    told += [f"{row['seeds']:>5}  {row['difference']:>#15.3g}  {row['margin']:>#19.3g}" for row in rows]
    return told + _needed_lines(question, sd)


def _rate(question: Question) -> str:
    if question.claims == 1:
        return f"an error rate of {question.level:g}"
    return f"an error rate of {question.level:g} / {question.claims} (the first step of Holm over so many claims)"


def _needed_lines(question: Question, sd: float | None) -> list[str]:
    names = {"difference": question.difference, "margin": question.margin}
    if sd is None:
        return []
    what = {"difference": "to see a difference of", "margin": "to show equivalence within ±"}
    return [
        f"{what[name]} {names[name]:g}: {seeds_text(number)}".replace("± ", "±")
        for name, number in needed(question, sd).items()
    ]


def seeds_text(number: int | None) -> str:
    """ "12 seeds"; "more than 1,000 seeds"."""
    return f"more than {statistics.MAX_SEEDS:,} seeds" if number is None else f"{number} seeds"


def spread_lines(found: Sequence[Spread], question: Question) -> list[str]:
    """A line for each spread that was measured."""
    if not found:
        return ["No two settings have two finished seeds in common, so no spread between seeds is known."]
    told = [
        f"Paired differences between seeds; {question.power:.0%} power at {_rate(question)}, for the sd's 80 % limit:"
    ]
    return told + [_spread_line(spread_row(spread, question)) for spread in found]


def _spread_line(row: Mapping[str, Any]) -> str:
    limit, correlation = f"{row['sd']:.3g} (at most {row['sd_limit']:.3g})", row["correlation"]
    paired_by = "" if math.isnan(correlation) else f", correlation {correlation:.2f}"
    told = (
        f"  {row['task']}  {row['metric']}  {row['first']} minus {row['second']}: sd {limit} over {row['seeds']} seeds"
        f"{paired_by}; they see {row['detectable']:.3g}, equivalence within ±{row['smallest_margin']:.3g}"
    )
    for key, name in (("seeds_for_difference", "the difference"), ("seeds_for_margin", "the margin")):
        if key in row:
            told += f"; {name} needs {seeds_text(row[key])}"
    return told


def plan_lines(seeds: int, claims: Mapping[str, ClaimSpec], runs: Sequence[Run] = ()) -> list[str]:
    """What a recipe's seeds can show; for a claim in its own unit, where `runs` (its own so far) tell the spread."""
    if seeds < 2:
        return ["seeds 1: shows that the recipe works; a difference between arms cannot be told from chance"]
    question = Question(claims=max(1, len(claims)))
    row = seeds_table(question, 1.0, [seeds])[0]
    over = f", {len(claims)} claims under Holm" if len(claims) > 1 else ""
    told = [
        f"seeds {seeds}: see differences of {row['difference']:.2f} times the sd between paired seeds "
        f"({POWER:.0%} power{over}), show equivalence within ±{row['margin']:.2f} times it"
    ]
    return told + [
        _claim_line(name, claim, _at_last_look(claim, question) or row, runs) for name, claim in claims.items()
    ]


def _at_last_look(claim: ClaimSpec, question: Question) -> dict[str, Any]:
    """What the claim's last look shows at its own nominal level (the looks before add to that); empty without looks."""
    if not claim.looks:
        return {}
    level = statistics.look_level(claim.looks, len(claim.looks), question.share)
    return seeds_table(replace(question, level=level, claims=1), 1.0, claim.looks[-1:])[0]


def _claim_line(name: str, claim: ClaimSpec, row: Mapping[str, float], runs: Sequence[Run]) -> str:
    head = f"claim {name}: {claim.metric} of {claim.contrast[0]} minus {claim.contrast[1]}, margin ±{claim.margin:g}"
    head += f", looks at {', '.join(map(str, claim.looks))} seeds" if claim.looks else ""
    general = f"{head}: equivalence can be shown if the sd is at most {claim.margin / row['margin']:.3g}"
    if not runs:
        return general
    from klreg_verl.analysis import claims as verdicts
    from klreg_verl.analysis import stats

    comparison = verdicts.compare(runs, claim)
    if not comparison.is_testable:
        return general
    limit = statistics.sd_limit(comparison.sd, comparison.num - 1)
    places = stats.decimals([limit * row["difference"]])
    sees = stats.number(limit * row["difference"], places)
    shows = "can" if limit * row["margin"] <= claim.margin else "cannot"
    return f"{head}: with the spread of {comparison.num} finished seeds sees {sees}; equivalence {shows} be shown"
