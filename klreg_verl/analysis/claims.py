"""The claims of a recipe, decided from its runs: each ends as differs, equivalent, uninformative or undecided.

What is decided, and how many comparisons Holm corrects for, is read from the run cards, where the claims stand as they
were when each run started (experiment/claims.py). A claim that is not in the card of every run it compares was written
later: it is computed all the same, called exploratory, and decides nothing. So is everything else in a report.

A run's value is its primary endpoint: of an evaluation metric the mean of the last three evaluations, of a training
metric the mean of the last ten steps. Only finished runs enter, paired by seed; the others are named and not imputed.

An equivalence is uninformative where its margin is not smaller than what training without KL moves the metric by: such
a margin cannot tell KL from no KL.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from klreg_verl.analysis import cards, frontier, stats
from klreg_verl.analysis.endpoints import (
    LAST_EVALUATIONS,
    endpoint,
    evaluations,
    is_evaluation,
    kl_beside,
    prompt_values,
    settings,
    start,
)
from klreg_verl.analysis.runs import Run
from klreg_verl.core.statistics import (
    LEVEL,
    MAX_SEEDS,
    SURE,
    Decision,
    Noise,
    Paired,
    at_look,
    decide,
    evaluation_noise,
    look_level,
    paired,
    reached,
    seeds_to_decide,
)
from klreg_verl.experiment import strict
from klreg_verl.experiment.claims import ACHIEVED_KL, CURVE, ClaimSpec, canonical, registered, said

FEWEST = 5
"""Seeds from which arms are compared at equal KL."""
NOTE = (
    "Written in the recipe before the runs and hashed into their cards; decided on finished runs paired by seed, with "
    "Holm's correction of the p-values inside this list; the intervals are each claim's own. A claim that came later "
    "is exploratory, and so is everything else in this report. Seeds that are added because of what is read here are a "
    "second look, which raises the error rate, unless the claim declared its looks. The paired t test decides; the "
    "sign flips beside it decide nothing."
)
"""What a reader must know of the list."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How one claim ended."""

    name: str
    claim: ClaimSpec
    comparison: Paired
    decision: Decision
    family: int
    """Claims registered together, which Holm corrected for; 0 for an exploratory one, which is not corrected."""
    seeds: int | None = None
    """Seeds with which it would be decided, where it is undecided; None: more than statistics.MAX_SEEDS, or unknown."""
    noise: Noise | None = None
    """What of the estimate's error comes from the prompts, where the samples tell."""
    notes: tuple[str, ...] = ()
    """Sentences about what was left out, and how the arms differ besides."""
    refused: str = ""
    """Why arms cannot be compared at equal KL; then there are no pairs."""
    moved: Paired | None = None
    """What training without KL moves the metric by, from the start; None where it is not known."""
    every: int = 0
    """Pairs that there are; the comparison has those up to the last look that was reached."""

    @property
    def is_registered(self) -> bool:
        """Whether the claim was in every compared run's card from its start."""
        return self.family > 0

    @property
    def is_uninformative(self) -> bool:
        """Whether the margin is so wide that equivalence within it says nothing: training without KL stays inside."""
        return self.moved is not None and abs(self.moved.mean) <= self.claim.margin

    @property
    def outcome(self) -> str:
        """How it ended; an equivalence within too wide a margin is "uninformative"."""
        ended = self.decision.outcome
        return "uninformative" if ended == "equivalent" and self.is_uninformative else ended

    @property
    def interval(self) -> tuple[float, float]:
        """The t interval that covers the difference 95 times in 100, whatever look it stopped at."""
        looks = self.claim.looks
        taken = len(reached(looks, self.every))
        return self.comparison.interval(look_level(looks, taken) if taken else LEVEL)


# ---------------------------------------------------------------------------------------------------- comparing


def of_arm(runs: Sequence[Run], claim: ClaimSpec, arm: str) -> list[Run]:
    """The finished runs of one arm that a claim compares."""
    return [run for run in runs if run.arm == arm and run.is_done and _is_meant(run, claim)]


def _is_meant(run: Run, claim: ClaimSpec) -> bool:
    """Whether a run is of the claim's task and arms, and at its beta where it names one."""
    mine = run.task == claim.task and run.arm in claim.contrast
    return mine and (claim.compare != "beta" or run.kl.get("beta") == claim.at)


def compare(runs: Sequence[Run], claim: ClaimSpec) -> Paired:
    """The claim's contrast, first arm minus second, paired by seed."""
    sides = [of_arm(runs, claim, arm) for arm in claim.contrast]
    if claim.compare != "kl":
        return paired(*(_by_seed(side, claim.metric) for side in sides))
    if refusal(runs, claim):
        return paired({}, {})
    return _at_equal_kl(runs, claim)


def _at_equal_kl(runs: Sequence[Run], claim: ClaimSpec) -> Paired:
    left, right = (paths(of_arm(runs, claim, arm), claim.metric) for arm in claim.contrast)
    return frontier.matched(left, right, (claim.between[0], claim.between[1]))


def refusal(runs: Sequence[Run], claim: ClaimSpec) -> str:
    """Why the arms are not compared at equal KL: a single KL, runs or betas missing, too few seeds; "" if they are."""
    if not claim.between:
        return "a claim at a single KL is not decided: chords between betas are biased there; give `between`"
    for arm in claim.contrast:
        if why := _missing_betas(runs, claim, arm):
            return why
    found = _at_equal_kl(runs, claim)
    if found.num < FEWEST:
        low, high = claim.between
        return f"{found.num} seeds of both arms enclose KL {low:g} to {high:g}, {FEWEST} are needed"
    return ""


def _missing_betas(runs: Sequence[Run], claim: ClaimSpec, arm: str) -> str:
    """The runs that an arm's curves lack, or that too few of its betas end inside the interval."""
    planned = {(run.seed, run.kl.get("beta")) for run in runs if run.arm == arm and run.task == claim.task}
    done = of_arm(runs, claim, arm)
    betas = sorted({beta for _, beta in planned if isinstance(beta, int | float)})
    seeds = sorted({seed for seed, _ in planned})
    known = {(run.seed, run.kl.get("beta")) for run in done}
    if lacking := [(beta, seed) for beta in betas for seed in seeds if (seed, beta) not in known]:
        told = ", ".join(f"beta {beta:g} of seed {seed}" for beta, seed in lacking[:6])
        return f"the arm {arm} has no finished run at {told}{' and more' * (len(lacking) > 6)}"
    ends = {beta: _mean_kl([run for run in done if run.kl.get("beta") == beta], claim.metric) for beta in betas}
    inside = [beta for beta in betas if claim.between[0] <= ends[beta] <= claim.between[1]]
    if len(inside) >= CURVE:
        return ""
    told = ", ".join(f"beta {beta:g} at {stats.number(kl, 2)}" for beta, kl in ends.items())
    return (
        f"{len(inside)} betas of the arm {arm} end between KL {claim.between[0]:g} and {claim.between[1]:g}, {CURVE} "
        f"are needed ({told or 'there are no runs'})"
    )


def _mean_kl(runs: Iterable[Run], metric: str) -> float:
    return stats.mean_and_error(kl_beside(run, metric) for run in runs).mean


def paths(runs: Iterable[Run], metric: str) -> dict[int, list[frontier.Point]]:
    """Seed -> (KL, metric) of its runs: one arm's, at all its betas, for `frontier.frontier` and `frontier.matched`."""
    points: dict[int, list[frontier.Point]] = {}
    for run in runs:
        points.setdefault(run.seed, []).append((kl_beside(run, metric), endpoint(run, metric)))
    return points


def moved(runs: Sequence[Run], claim: ClaimSpec) -> Paired | None:
    """What training without KL moves the metric by: the end of each run without a KL term minus the start.

    The start is the mean over all measurements of the same weights, so its error is small beside a run's own.
    """
    mine = [run for run in runs if run.task == claim.task and run.is_done]
    free = [run for run in mine if run.kl.get("placement") == "none"]
    begun = [value for run in mine if math.isfinite(value := start(run, claim.metric))]
    if not free or not begun:
        return None
    found = paired(_by_seed(free, claim.metric), {run.seed: float(np.mean(begun)) for run in free})
    return found if found.num else None


def _by_seed(runs: Iterable[Run], metric: str) -> dict[int, float]:
    """Seed -> value. A seed with several grid points has no single value: NaN."""
    values: dict[int, list[float]] = {}
    for run in runs:
        values.setdefault(run.seed, []).append(endpoint(run, metric))
    return {seed: each[0] if len(each) == 1 else math.nan for seed, each in values.items()}


# ---------------------------------------------------------------------------------------------------- deciding


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    name: str
    claim: ClaimSpec
    comparison: Paired
    is_registered: bool


def judge(
    runs: Sequence[Run], written: Mapping[str, ClaimSpec] | None = None, *, level: float = LEVEL, noise: bool = True
) -> list[Verdict]:
    """Every claim that a run card holds, then those of `written` (the recipe as it is now) that none holds.

    Args:
        runs: all runs of the recipe.
        written: the recipe's claims, where the recipe is at hand.
        level: of the family of differences, and of that of equivalences.
        noise: whether stored samples are read to tell the prompts' part of the error.
    """
    listed = _from_cards(runs)
    family = sum(map(len, listed.values()))
    candidates = list(_candidates(runs, listed, written or {}))
    decisions = _decisions(candidates, family, level)
    undecided = sum(
        each.is_registered and decision.outcome == "undecided"
        for each, decision in zip(candidates, decisions, strict=True)
    )
    remaining = max(1, undecided + family - sum(each.is_registered for each in candidates))
    return [
        Verdict(
            name=each.name,
            claim=each.claim,
            comparison=at_look(each.comparison, each.claim.looks),
            every=each.comparison.num,
            refused=refusal(runs, each.claim) if each.claim.compare == "kl" else "",
            moved=moved(runs, each.claim),
            decision=decision,
            family=family if each.is_registered else 0,
            seeds=_seeds(each, decision, level / remaining if each.is_registered else level),
            noise=prompt_noise(runs, each.claim) if noise else None,
            notes=tuple(_notes(runs, each.claim, each.comparison)),
        )
        for each, decision in zip(candidates, decisions, strict=True)
    ]


def _candidates(
    runs: Sequence[Run], listed: Mapping[str, Sequence[ClaimSpec]], written: Mapping[str, ClaimSpec]
) -> Iterable[_Candidate]:
    claims = [(name, claim, True) for name, several in listed.items() for claim in several]
    claims += [(name, claim, False) for name, claim in written.items() if claim not in listed.get(name, ())]
    for name, claim, from_card in claims:
        yield _Candidate(
            name=name,
            claim=claim,
            comparison=compare(runs, claim),
            is_registered=from_card and _is_registered(runs, name, claim),
        )


def _decisions(candidates: Sequence[_Candidate], family: int, level: float) -> list[Decision]:
    """The registered ones as one family; each of the others alone."""
    inside = [each for each in candidates if each.is_registered]
    together = iter(_decide(inside, level, family))
    return [next(together) if each.is_registered else _decide([each], level, 1)[0] for each in candidates]


def _decide(candidates: Sequence[_Candidate], level: float, family: int) -> list[Decision]:
    comparisons, claims = [each.comparison for each in candidates], [each.claim for each in candidates]
    margins, looks = [claim.margin for claim in claims], [claim.looks for claim in claims]
    return decide(comparisons, margins, looks=looks, level=level, family=family)


def _seeds(candidate: _Candidate, decision: Decision, level: float) -> int | None:
    """Seeds that would decide what is not decided, at the level that Holm leaves the first of the undecided.

    A claim with looks has its numbers of seeds already.
    """
    if decision.outcome != "undecided" or candidate.claim.looks:
        return None
    return seeds_to_decide(candidate.comparison, candidate.claim.margin, level)


def _from_cards(runs: Sequence[Run]) -> dict[str, list[ClaimSpec]]:
    """name -> the different claims registered under it, in the order of the runs."""
    listed: dict[str, list[ClaimSpec]] = {}
    for run in runs:
        for name, values in registered(run.provenance).items():
            claim = _read(name, values)
            if claim is not None and claim not in listed.setdefault(name, []):
                listed[name].append(claim)
    return {name: several for name, several in listed.items() if several}


def _read(name: str, values: Any) -> ClaimSpec | None:
    """A claim from a card; None where it is not of this version's form."""
    try:
        return strict.build(ClaimSpec, strict.from_plain(values, file="provenance.json", path=f"claims.list.{name}"))
    except strict.ConfigError:
        return None


def _is_registered(runs: Sequence[Run], name: str, claim: ClaimSpec) -> bool:
    """Whether every run of the two arms that has a card has the very claim in it."""
    wanted = said(canonical({name: claim})[name])
    arms = [run for run in runs if run.task == claim.task and run.arm in claim.contrast and run.provenance]
    return all(said(registered(run.provenance).get(name)) == wanted for run in arms)


def _notes(runs: Sequence[Run], claim: ClaimSpec, comparison: Paired) -> Iterable[str]:
    mine = [run for run in runs if _is_meant(run, claim)]
    ended = [run for run in mine if not run.is_done]
    if ended:
        yield f"Left out: {', '.join(f'{run.run_id} ({run.status})' for run in ended)}."
    if missing := sorted(set(comparison.unpaired) - {run.seed for run in ended}):
        shared = "do not enclose this interval of KL in both arms"
        why = shared if claim.compare == "kl" else "have a value in one arm only"
        yield f"Not paired: seeds {', '.join(map(str, missing))} {why}."
    if comparison.num > 1 and not comparison.is_testable:
        yield f"All {comparison.num} differences are equal: below {SURE} pairs that says nothing about their spread."
    done = [run for run in mine if run.is_done]
    if differing := cards.caution(done):
        yield differing
    yield from _recorded(claim, done)
    if claim.compare != "kl" and claim.metric != ACHIEVED_KL and (told := _achieved(runs, claim)):
        yield told


def _recorded(claim: ClaimSpec, done: Sequence[Run]) -> Iterable[str]:
    """What is to be said about how the finished runs measured the metric."""
    if done and all(math.isnan(endpoint(run, claim.metric)) for run in done):
        yield f"No finished run has recorded {claim.metric} after step 0."
        return
    if not is_evaluation(claim.metric):
        return
    fewest = min((count for run in done if (count := len(evaluations(run, claim.metric)))), default=LAST_EVALUATIONS)
    if fewest < LAST_EVALUATIONS:
        yield f"Each run's value is the mean of {fewest} evaluation{'s' * (fewest != 1)}, not {LAST_EVALUATIONS}."
    if len({settings(run, claim.metric) for run in done if len(evaluations(run, claim.metric))}) > 1:
        yield "The runs were evaluated with different settings (samples, temperature, data): this is no fair test."


def _achieved(runs: Sequence[Run], claim: ClaimSpec) -> str:
    """The KL that each arm ended at: a difference at unequal KL is one of direction and amount."""
    ends = [
        stats.mean_and_error(endpoint(run, ACHIEVED_KL) for run in of_arm(runs, claim, arm)) for arm in claim.contrast
    ]
    if not all(each.num for each in ends):
        return ""
    told = " and ".join(f"{arm} {stats.number(end.mean, 2)}" for arm, end in zip(claim.contrast, ends, strict=True))
    return f"KL to the reference at the end: {told} nats per response."


# ---------------------------------------------------------------------------------------------------- evaluation noise


def prompt_noise(runs: Sequence[Run], claim: ClaimSpec) -> Noise | None:
    """Bootstrap over prompts inside seeds, where both arms' values of single prompts are stored; else None.

    Arms of one seed see the same prompts at the same step, and a held-out file is the same for all; so the difference
    is taken prompt by prompt. Held-out prompts are the same in all seeds, too, and are drawn together.
    """
    if claim.compare == "kl":
        return None
    sides = [{run.seed: run for run in of_arm(runs, claim, arm)} for arm in claim.contrast]
    seeds = sorted(sides[0].keys() & sides[1].keys())
    columns = [_prompt_differences(sides[0][seed], sides[1][seed], claim.metric) for seed in seeds]
    if not columns or not all(len(column) for column in columns):
        return None
    shared = is_evaluation(claim.metric)
    return evaluation_noise(columns, shared=shared) if not shared or len({len(c) for c in columns}) == 1 else None


def _prompt_differences(left: Run, right: Run, metric: str) -> np.ndarray:
    values = [prompt_values(run, metric) for run in (left, right)]
    return np.array([values[0][place] - values[1][place] for place in sorted(values[0].keys() & values[1].keys())])


# ---------------------------------------------------------------------------------------------------- words


def sentences(verdicts: Sequence[Verdict]) -> list[str]:
    """One paragraph a claim: what was found, its interval and p, what it rests on, and what was left out."""
    return [" ".join([finding(each), *_evidence(each), *each.notes]) for each in verdicts]


def lines(verdicts: Sequence[Verdict]) -> list[str]:
    """One line a claim, for a terminal."""
    if not verdicts:
        return []
    width = max(len(each.name) for each in verdicts)
    return [f"{each.name:<{width}}  {_ending(each)}: {_contrast(each)} {_numbers(each)}" for each in verdicts]


def table(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """A row a claim with everything that decided it."""
    return pd.DataFrame([_row(each) for each in verdicts])


def _row(verdict: Verdict) -> dict[str, Any]:
    claim, comparison, decision = verdict.claim, verdict.comparison, verdict.decision
    low, high = verdict.interval
    return {
        "claim": verdict.name,
        "metric": claim.metric,
        "task": claim.task,
        "first": claim.contrast[0],
        "second": claim.contrast[1],
        "compare": claim.compare + (_where(claim) and f"={_where(claim)}"),
        "margin": claim.margin,
        "registered": verdict.is_registered,
        "outcome": verdict.outcome,
        "difference": comparison.mean,
        "low": low,
        "high": high,
        "pairs": comparison.num,
        "correlation": comparison.correlation,
        "p_difference": decision.p_difference,
        "p_equivalence": decision.p_equivalence,
        "p_sign_flips": decision.p_flips,
        "holm_family": verdict.family,
        "seeds_to_decide": verdict.seeds,
        "prompt_error": math.nan if verdict.noise is None else verdict.noise.standard_error,
    }


def _ending(verdict: Verdict) -> str:
    return verdict.outcome + ("" if verdict.is_registered else " (exploratory)")


def _contrast(verdict: Verdict) -> str:
    claim = verdict.claim
    where = f" at {'KL' if claim.compare == 'kl' else 'beta'} {_where(claim)}" if _where(claim) else ""
    return f"{claim.metric} of {claim.contrast[0]} minus {claim.contrast[1]}{where}"


def _where(claim: ClaimSpec) -> str:
    return " to ".join(f"{end:g}" for end in claim.between) or ("" if claim.at is None else f"{claim.at:g}")


def _places(verdict: Verdict) -> int:
    return stats.decimals([verdict.comparison.standard_error])


def _numbers(verdict: Verdict) -> str:
    """ "−0.031 [−0.045, −0.017], 8 seeds, p 0.002"."""
    comparison, decision, places = verdict.comparison, verdict.decision, _places(verdict)
    if verdict.refused:
        return f"is not compared: {verdict.refused}"
    if verdict.claim.looks and not reached(verdict.claim.looks, verdict.every):
        pairs = f"{verdict.every} pair{'s' * (verdict.every != 1)}"
        return f"has {pairs} of seeds, the first look is at {verdict.claim.looks[0]}"
    if comparison.num < 2:
        return f"has {comparison.num} pair{'s' * (comparison.num != 1)} of seeds, at least 2 are needed"
    if not comparison.is_testable:
        return (
            f"{stats.number(comparison.mean, places, sign=True)} in each of {comparison.num} seeds, {SURE} are needed"
        )
    low, high = (stats.number(end, places) for end in verdict.interval)
    p = decision.p_equivalence if decision.outcome == "equivalent" else decision.p_difference
    mean = stats.number(comparison.mean, places, sign=True)
    return f"{mean} [{low}, {high}], {comparison.num} seeds, p {p_text(p)}"


def p_text(p: float) -> str:
    """Two digits; "< 0.0001" below that."""
    return "< 0.0001" if p < 0.0001 else f"{p:.2g}" if p < 0.1 else f"{p:.2f}"


def finding(verdict: Verdict) -> str:
    """The outcome in a sentence, with its interval."""
    claim, comparison, places = verdict.claim, verdict.comparison, _places(verdict)
    head = f"{verdict.name}{'' if verdict.is_registered else ' (exploratory, not registered before the runs)'}:"
    if not comparison.is_testable:
        return " ".join([f"{head} undecided. {_contrast(verdict)} {_numbers(verdict)}.", *_next_look(verdict)])
    low, high = (stats.number(end, places) for end in verdict.interval)
    mean = stats.number(comparison.mean, places, sign=True)
    estimate = f"{mean} (95 % interval {low} to {high}, {comparison.num} paired seeds)"
    if verdict.decision.outcome == "differs":
        return f"{head} {_contrast(verdict)} differs from zero: {estimate}."
    if verdict.outcome == "uninformative":
        return (
            f"{head} {_contrast(verdict)}: margin too wide to tell: {_free(verdict)}, inside the margin "
            f"±{claim.margin:g}. The difference is {estimate}."
        )
    if verdict.decision.outcome == "equivalent":
        real = " The difference is told from zero, and is too small to matter." if verdict.decision.is_nonzero else ""
        return f"{head} {_contrast(verdict)} is equivalent to zero within ±{claim.margin:g}: {estimate}.{real}"
    wide = f" An equivalence would tell nothing: {_free(verdict)}." if verdict.is_uninformative else ""
    return f"{head} {_contrast(verdict)} is undecided: {estimate}, margin ±{claim.margin:g}. {_more(verdict)}{wide}"


def _free(verdict: Verdict) -> str:
    """ "training without KL itself moved it by −0.018 [−0.026, −0.010]"."""
    found = verdict.moved
    assert found is not None
    places = stats.decimals([found.standard_error])
    low, high = (stats.number(end, places) for end in found.interval())
    interval = f" [{low}, {high}]" if found.is_testable else ""
    return f"training without KL itself moved it by {stats.number(found.mean, places, sign=True)}{interval}"


def _more(verdict: Verdict) -> str:
    """What more seeds would do, and what looking again because of this sentence costs."""
    if verdict.claim.looks:
        return " ".join(_next_look(verdict)) or "That was the last look; it stays open."
    if verdict.seeds is None:
        return f"Even {MAX_SEEDS:,} seeds would not decide it if the difference is as seen."
    more = verdict.seeds - verdict.comparison.num
    return (
        f"About {more} more seed{'s' * (more != 1)} would decide it (80 % power if the difference is as seen, the sd "
        "at its 80 % limit); but no looks were declared, so a decision after this one is exploratory."
    )


def _next_look(verdict: Verdict) -> Iterable[str]:
    looks, taken = verdict.claim.looks, len(reached(verdict.claim.looks, verdict.every))
    if 0 < taken < len(looks):
        yield f"Look {taken} of {len(looks)}; the next is at {looks[taken]} seeds."


def _evidence(verdict: Verdict) -> Iterable[str]:
    comparison, decision = verdict.comparison, verdict.decision
    if not comparison.is_testable:
        return
    over = f" after Holm over {verdict.family} claims" if verdict.family > 1 else ""
    yield (
        f"p {p_text(decision.p_difference)} for a difference (paired t), {p_text(decision.p_equivalence)} for "
        f"equivalence (TOST){over}."
    )
    yield _flips(verdict)
    if verdict.claim.looks:
        looks = ", ".join(map(str, verdict.claim.looks))
        yield f"The p-values and the interval allow for looks at {looks} seeds (O'Brien and Fleming's bounds)."
    if math.isfinite(comparison.correlation):
        yield f"The arms' values correlate by {stats.number(comparison.correlation, 2)} over seeds."
    if verdict.noise is not None and comparison.standard_error > 0:
        places = _places(verdict)
        error, prompts = (
            stats.number(value, places) for value in (comparison.standard_error, verdict.noise.standard_error)
        )
        yield f"Of its standard error {error}, the choice of prompts alone gives {prompts}."


def _flips(verdict: Verdict) -> str:
    if math.isnan(verdict.decision.p_flips):
        return "Too many pairs to list all sign flips."
    return f"Exact sign flips, which decide nothing: p {p_text(verdict.decision.p_flips)}."
