"""Predicted against achieved: what each arm's objective is optimal at, from the starting model's draws.

Every arm's step 1 is drawn from the starting model, so a study holds the draws that the prediction needs
(core/optimum.py). The prediction has no model in it that could be wrong but two assumptions: the reward is 1 for right
and 0 for wrong, and the policy can be anything. So an arm may stay below its prediction because it has not converged,
because its parameters cannot follow each prompt by itself, or because its KL term is not the whole divergence's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from klreg_verl.analysis import stats
from klreg_verl.analysis.diversity import read, starters
from klreg_verl.analysis.runs import Run, mapping
from klreg_verl.analysis.summary import KL_K1, Group, final_value
from klreg_verl.core import optimum
from klreg_verl.core.diversity import Answers, rarefied_distinct
from klreg_verl.core.optimum import Direction, Prediction
from klreg_verl.core.statistics import Estimate, mean_and_error

NOTE = (
    "Computed from the starting model's own draws, for a reward of 1 for right and 0 for wrong and a policy that can "
    "be anything. An arm may stay below because it has not converged, because its parameters cannot follow each prompt "
    "by itself, or because its term is not the whole divergence's."
)
"""What a reader must know of the prediction."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known of an arm's optimum."""

    direction: Direction | None
    """None: nothing is known, `why` says why."""
    beta: float = math.nan
    """In reward units per nat of a whole response."""
    is_exact: bool = True
    """Whether the arm's expected gradient is that objective's; else it is so only for responses of one token."""
    why: str = ""


def known(spec: Mapping[str, Any], length: float = math.nan) -> Known:
    """What a run's spec says about its optimum; `length` is its mean response length at the end [tokens].

    Exact are k1 in the reward charged to whole responses or to go (reverse), and the reference's own samples in the
    loss (forward). Terms per token in the loss, and token credit, leave out that a token steers into later KL.
    """
    kl, train = mapping(spec.get("kl")), mapping(spec.get("train"))
    if kl.get("placement") in (None, "none"):
        return Known(direction=None, why="no KL term: the optimum is accuracy 1, at any distance")
    if obstacle := _obstacle(kl, train, mapping(spec.get("reference"))):
        return Known(direction=None, why=obstacle)
    if not kl.get("beta"):
        return Known(direction=None, why="beta 0 or none: the optimum is accuracy 1, at any distance")
    estimator, placement, beta = kl.get("estimator"), kl.get("placement"), float(kl["beta"])
    if placement == "reward":
        whole = kl.get("credit") in (None, "sequence", "reward_to_go")
        return Known(direction="reverse", beta=beta, is_exact=whole, why="" if whole else PER_TOKEN)
    if estimator == "reference_samples":
        return _of_reference_samples(beta, train, length)
    directions: dict[str, Direction] = {"reverse": "reverse", "forward": "forward"}
    direction = directions.get(str(kl.get("follows")))
    if direction is None or kl.get("aggregation") not in (None, train.get("loss_aggregation") or "token-mean"):
        return Known(direction=None, why=f"it follows {kl.get('follows')}, or its beta is of another aggregation")
    return Known(direction=direction, beta=beta, is_exact=False, why=PER_TOKEN)


PER_TOKEN = "its KL term is each token's own on the policy's prefixes: exact for responses of one token"


def _obstacle(kl: Mapping[str, Any], train: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    """Why no optimum is known, "" if nothing stands in the way."""
    if mapping(kl.get("controller")).get("kind", "fixed") != "fixed":
        return "its beta moves"
    if mapping(kl.get("shaping")).get("kind", "none") != "none" or kl.get("cap") is not None:
        return "its estimate is shaped or capped"
    if reference.get("reset_every") or reference.get("ema"):
        return "its reference moves"
    if train.get("advantage", "rloo") != "rloo":
        return f"{train.get('advantage')} weighs the reward otherwise than the KL"
    if kl.get("placement") == "both" or (kl.get("placement") == "reward" and kl.get("estimator") != "k1"):
        return "no closed form is known for this estimator there"
    return ""


def _of_reference_samples(beta: float, train: Mapping[str, Any], length: float) -> Known:
    """-beta times the mean of whole responses beside a policy loss that may be a mean over tokens: beta in its unit."""
    aggregation = train.get("loss_aggregation") or "token-mean"
    scale = {"token-mean": length, "seq-mean-token-sum": 1.0}.get(aggregation, math.nan)
    if not math.isfinite(scale):
        return Known(direction=None, why=f"the policy loss is aggregated by {aggregation}, its KL over responses")
    why = "" if scale == 1 else f"beta {beta:g} times the {scale:.1f} tokens that the policy loss is a mean over"
    return Known(direction="forward", beta=beta * scale, why=why)


@dataclass(frozen=True, kw_only=True)
class Achieved:
    """One arm's prediction beside what its runs reached; means over runs with errors over runs."""

    task: str
    arm: str
    known: Known
    prediction: Prediction | None
    accuracy: Estimate
    kl: Estimate
    distinct: Estimate
    """Distinct right answers in as many draws as the prediction's, of the samples at the end."""
    is_interim: bool = False
    """Whether no run is finished: then what was reached is not where the arm ends."""


def compare(groups: Sequence[Group]) -> list[Achieved]:
    """A row a group; the distinct answers are those of a quarter of the draws that were made of a prompt."""
    rows = []
    for group in groups:
        start = starting_draws([each for each in groups if each.task == group.task])
        draws = max(1, min((each.num_samples for each in start), default=4) // 4)
        length = final_value(group, "response/length").mean
        what = known(group.runs[0].spec, length)
        if group.runs[0].graded:
            what = Known(direction=None, why="its reward grades, and the prediction is for right and wrong")
        prediction = None
        if start and what.direction is not None and what.beta > 0:
            prediction = optimum.predict(start, what.beta, what.direction, samples=draws)
        rows.append(
            Achieved(
                task=group.task,
                arm=group.label,
                known=what,
                prediction=prediction,
                accuracy=final_value(group, group.headline),
                kl=final_value(group, KL_K1),
                is_interim=group.is_interim,
                distinct=_distinct(group.final_runs, draws),
            )
        )
    return rows


def starting_draws(groups: Sequence[Group]) -> list[Answers]:
    """Step 1 of one run a seed."""
    first = starters(run for group in groups for run in group.runs)
    return [each for run in sorted(first, key=lambda run: run.seed) for each in read(run, "start").answers.values()]


def _distinct(runs: Sequence[Run], draws: int) -> Estimate:
    per_run = []
    for run in runs:
        prompts = [each for each in read(run).answers.values() if each.num_samples >= draws]
        values = [rarefied_distinct(each.counts, each.num_samples, draws) for each in prompts]
        per_run += [sum(values) / len(values)] if values else []
    return mean_and_error(per_run)


def sentences(rows: Sequence[Achieved]) -> list[str]:
    """One a row: predicted against achieved, or why there is no prediction, or why it is empty."""
    several = len({row.task for row in rows}) > 1
    return [f"{row.task + ': ' if several else ''}{row.arm}: {_sentence(row)}" for row in rows]


def _sentence(row: Achieved) -> str:
    found = row.prediction
    if found is None:
        why = row.known.why or "no samples of the starting model are stored"
        return f"no optimum is known ({why})." if row.known.direction is None else f"no prediction ({why})."
    if found.is_empty:
        return (
            f"empty: at beta {found.beta:g} the optimum of {found.direction} KL is accuracy {found.accuracy:.3f} at KL "
            f"{found.kl:.2f}, so nothing about the arm follows from it but that right answers keep their ratios."
        )
    kind = "" if row.known.is_exact else f" (orientation only: {row.known.why})"
    return (
        f"the optimum of {found.direction} KL at beta {found.beta:g}{kind} is accuracy {found.accuracy:.3f} (between "
        f"{found.low:.3f} and {found.high:.3f} whatever the prompts' chances are) at KL {found.kl:.2f}; achieved were "
        f"{'so far, without a finished run, ' if row.is_interim else ''}"
        f"{stats.text(row.accuracy, 3)} at {stats.text(row.kl, 2)}. Distinct right answers in {found.samples} draws: "
        f"predicted {found.distinct:.2f}{_unresolved(found)}, achieved {stats.text(row.distinct, 2)}.{_distance(row)}"
    )


def _distance(row: Achieved) -> str:
    """KL(pi || pi*) = (J* - J) / beta, J the objective E[R] - beta KL(pi || ref), where that is the arm's own."""
    found = row.prediction
    if found is None or found.direction != "reverse" or not row.known.is_exact or math.isnan(row.kl.mean):
        return ""
    reached = row.accuracy.mean - found.beta * row.kl.mean
    return (
        f" Its objective E[R] - beta KL is {stats.number(reached, 3)} of {found.objective:.3f}: about "
        f"{max(0.0, found.objective - reached) / found.beta:.2f} nats from the optimum."
    )


def _unresolved(found: Prediction) -> str:
    """Said where more than a twentieth of the draws is beyond what the start has drawn."""
    return f" to {found.distinct + found.unresolved:.2f}" if found.unresolved > 0.05 * found.samples else ""
