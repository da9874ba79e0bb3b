"""The judgement on one KL setting, and the table of all.

    ok       the expected gradient is a divergence's, at its true size
    biased   it is no divergence's, or a multiple of one, or the setting holds a half that does not belong there
    void     it is zero, or the setting holds a half whose gradient is zero: noise that pulls nowhere

On-policy means one update per batch of untruncated samples. Off-policy the batch comes from the policy of one update
ago, and PPO's ratio (without its clip) multiplies whatever sits in the advantage.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

from klreg_verl.core.aggregation import AGGREGATIONS
from klreg_verl.doctor import enumeration, facts, reasons
from klreg_verl.doctor.facts import Facts, Verdict
from klreg_verl.doctor.gradients import Level
from klreg_verl.doctor.rules import PLACEMENTS, Rule
from klreg_verl.doctor.subjects import OURS, Subject

TABLE_KEYS = (
    *("estimator", "placement", "credit", "correction", "normalization", "aggregation", "value", "follows"),
    *("follows_off_policy", "cosine_reverse", "cosine_forward", "noise", "verdict", "reason"),
)
_LEVELS: dict[str, Level] = {"reward": "sequence", "both": "sequence", "loss": "token"}


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What one setting does, as found by enumeration; cosines are the lowest over the panel."""

    placement: str
    estimator: str | None
    credit: str | None
    """None where nothing is charged to the reward."""
    correction: str
    normalization: str
    aggregation: str | None
    value: str
    """What the logged value estimates, and its bias."""
    follows: str
    """The divergence whose gradient is followed on-policy; none where it is nobody's or zero."""
    level: Level
    """Whether cosines (and `follows`) are about whole responses or single tokens on the policy's own prefixes."""
    follows_off_policy: str
    """The same with samples of an older policy."""
    cosine_reverse: float | None
    """To the gradient of KL(pi || pi_ref); None where the setting has no gradient."""
    cosine_forward: float | None
    """To the gradient of KL(pi_ref || pi); None where the setting has no gradient."""
    relative_error: float | None
    """Against the divergence followed, or the nearer direction of KL where there is none; the worst of the panel."""
    noise: tuple[float, ...] | None
    """Standard deviation of one response's gradient over |grad KL(pi || pi_ref)|, at 1, 2, 3 and 4 tokens."""
    verdict: Verdict
    reason: str
    sequence_note: str
    """What of the gradient for whole responses is there."""


def judge(placement: str, estimator: str | None, *, subject: Subject = OURS, **rest: Any) -> Judgement:
    """The judgement on one setting, given in the fields of `Rule`; milliseconds, and cached. ValueError for a name
    that does not exist.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"There is no KL placement {placement!r}. Known placements: {', '.join(PLACEMENTS)}.")
    if placement == "none" or estimator is None:
        return _without_kl(placement, estimator)
    return judge_rule(subject, Rule(placement=placement, estimator=estimator, **rest))


@cache
def judge_rule(subject: Subject, rule: Rule) -> Judgement:
    """The judgement on a rule."""
    found = facts.facts(subject, rule)
    level: Level = found.followed.level if found.followed is not None else _LEVELS[rule.placement]
    compared: Level = "token" if level == "coarse" else level
    lowest = {name: min(facts.cosines(found.found, name, compared), default=None) for name in ("reverse", "forward")}
    verdict = reasons.verdict(subject, rule)
    return Judgement(
        placement=rule.placement,
        estimator=rule.estimator,
        credit=None if rule.charge is None else rule.charge.credit,
        correction=rule.correction,
        normalization=rule.normalization,
        aggregation=rule.aggregation,
        value=reasons.value(subject, rule),
        follows=found.followed.name if found.followed is not None else "none",
        level=level,
        follows_off_policy=found.follows_off_policy,
        cosine_reverse=lowest["reverse"],
        cosine_forward=lowest["forward"],
        relative_error=_relative_error(found, compared),
        noise=enumeration.noise(subject, rule.charge, rule.pull),
        verdict=verdict,
        reason=reasons.reason(subject, rule, verdict),
        sequence_note=reasons.sequence_note(subject, rule),
    )


def table(
    subject: Subject = OURS, estimators: tuple[str, ...] | None = None, *, only_usual: bool = False
) -> list[dict[str, Any]]:
    """Every setting as a plain dictionary with TABLE_KEYS, for printing and for JSON; or only what an overview shows.

    A direction that does not exist is None. With `estimators`, only theirs, and not the setting without a KL;
    ValueError for a name that the subject does not know.
    """
    names = estimators or (*subject.estimators, *subject.in_loss_only)
    for name in names:
        subject.check(name)
    without = [] if estimators else [_without_kl("none", None)]
    asked = [rule for rule in rules(subject, names) if rule.is_usual or not only_usual]
    return [row(judgement) for judgement in (*without, *(judge_rule(subject, rule) for rule in asked))]


def rules(subject: Subject, estimators: tuple[str, ...]) -> list[Rule]:
    """Every setting of some estimators, the usual one of each placement first."""
    every = (
        Rule(placement=placement, estimator=name, aggregation=aggregation, **options)
        for placement in PLACEMENTS[1:]
        for name in estimators
        for options in subject.options(placement, name)
        for aggregation in AGGREGATIONS
    )
    return list(dict.fromkeys(every))  # one aggregation only belongs to reference_samples


def row(judgement: Judgement) -> dict[str, Any]:
    """A judgement as TABLE_KEYS; numbers are rounded to nine digits: a cosine of 1 is 1."""
    entries = {key: getattr(judgement, key) for key in TABLE_KEYS}
    noise = None if judgement.noise is None else [round(number, 9) for number in judgement.noise]
    cosines = {key: entries[key] and round(entries[key], 9) for key in ("cosine_reverse", "cosine_forward")}
    return entries | cosines | {"noise": noise}


def _relative_error(found: Facts, level: Level) -> float | None:
    if found.followed is not None:
        return facts.largest_error(found.found, found.followed.name, found.followed.level)
    return min(facts.largest_error(found.found, name, level) for name in ("reverse", "forward"))


def _without_kl(placement: str, estimator: str | None) -> Judgement:
    if placement != "none" or estimator is not None:
        given = f"kl.placement={placement!r} with kl.estimator={estimator!r}"
        raise ValueError(
            f"{given} is half a setting. Give an estimator with 'reward', 'loss' or 'both', and none with 'none'."
        )
    return Judgement(
        placement="none",
        estimator=None,
        credit=None,
        correction="none",
        normalization="none",
        aggregation=None,
        value="measured only",
        follows="none",
        level="sequence",
        follows_off_policy="none",
        cosine_reverse=None,
        cosine_forward=None,
        relative_error=None,
        noise=None,
        verdict="ok",
        reason="No KL term: the distance to the reference is measured and nothing acts on it.",
        sequence_note="",
    )
