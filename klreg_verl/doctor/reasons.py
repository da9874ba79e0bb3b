"""Verdicts and their reasons in words. A reason is found where it can be: what would have to change to be right.

A rule that is not right is judged again with one or two things changed; the change that makes it right is the reason.
"""

from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

from klreg_verl.core import exact
from klreg_verl.doctor import enumeration, facts, gradients
from klreg_verl.doctor.facts import Facts, Match, Verdict
from klreg_verl.doctor.policies import panel
from klreg_verl.doctor.rules import Rule
from klreg_verl.doctor.subjects import BETA, Subject

NAMED = {
    "reverse": "the reverse KL, KL(pi || pi_ref)",
    "forward": "the forward KL, KL(pi_ref || pi)",
    "js": "the Jensen-Shannon divergence of pi and pi_ref",
    "chi2": "the chi-squared divergence, chi2(pi_ref || pi)",
    "tv": "the total variation distance of pi and pi_ref",
}
SIGNS = {
    "reverse": "KL(pi||ref)",
    "forward": "KL(ref||pi)",
    "js": "JS(pi, ref)",
    "chi2": "chi2(ref||pi)",
    "tv": "TV(pi, ref)",
}
_SCOPES = {
    "sequence": "of whole responses",
    "token": "per token, on the policy's own prefixes",
    "coarse": "per token, on the policy's own prefixes, with all tokens but the top ones in one bucket",
}


@cache
def verdict(subject: Subject, rule: Rule) -> Verdict:
    """ok, biased or void; see klreg_verl.doctor.verdict."""
    found = facts.facts(subject, rule)
    if found.vanishes or _corrects_the_reward(rule) or _has_a_void_half(subject, rule):
        return "void"
    if found.followed is None or (rule.placement == "both" and found.followed.level != "sequence"):
        return "biased"
    return "ok"


def reason(subject: Subject, rule: Rule, judged: Verdict) -> str:
    """Why the verdict is what it is, in one to three sentences."""
    found = facts.facts(subject, rule)
    if judged == "ok" and found.followed is not None:
        drawn = f" {_DRAWN}" if rule.is_drawn else ""
        return f"{_followed(found.followed, found)}{drawn}"
    if _corrects_the_reward(rule):
        return (
            "PPO's ratio pi / pi_old already multiplies what is charged to the reward: a correction has nothing to "
            "act on there."
        )
    if found.vanishes or _has_a_void_half(subject, rule):
        return _about_void(subject, rule)
    if found.on_policy is not None and found.on_policy.factor != 1.0:
        return _about_multiple(rule, found.on_policy)
    return _about_bias(subject, rule, found)


@dataclass(frozen=True, kw_only=True)
class Repair:
    """A change of a rule's fields."""

    fields: tuple[tuple[str, Any], ...]

    def of(self, rule: Rule) -> Rule:
        """The rule with the change made."""
        return rule.but(**dict(self.fields))

    def spelled(self, placement: str) -> str:
        """As it is written in a recipe."""
        aggregation = ("aggregation", "token-mean")
        spellings = _SPELLED | ({} if placement == "loss" else {aggregation: "train.loss_aggregation='token-mean'"})
        return " and ".join(spellings.get(pair, f"kl.{pair[0]}={pair[1]!r}") for pair in self.fields)


@cache
def repair(subject: Subject, rule: Rule) -> Repair | None:
    """The smallest change of the same estimator in the same place that makes it right; None where there is none."""
    single = [pair for pair in _CHANGES if getattr(rule, pair[0]) != pair[1] and _is_read(rule, pair[0])]
    for number in (1, 2, 3):
        for pairs in combinations(single, number):
            if len({name for name, _ in pairs}) == number and verdict(subject, rule.but(**dict(pairs))) == "ok":
                return Repair(fields=pairs)
    return None


def sequence_note(subject: Subject, rule: Rule) -> str:
    """What of the gradient for whole responses a followed divergence has; empty where nothing is followed."""
    found = facts.facts(subject, rule)
    if found.followed is None:
        return ""
    if rule.is_drawn:
        return "This is the full gradient, on the prefixes that the reference reaches."
    if found.followed.level == "sequence":
        return "Tokens are also charged for the prefixes they lead to, so this is the full gradient."
    cosines = facts.cosines(found.found, found.followed.name, "sequence")
    return (
        "How a token steers later ones is left out: against the full gradient for whole responses the cosine is "
        f"{min(cosines):.2f} to {max(cosines):.2f} on the doctor's policies."
    )


@cache
def value(subject: Subject, rule: Rule) -> str:
    """What the mean of the logged value is, and its relative bias on the panel."""
    return _value(subject, rule.estimator, rule.cap)


@cache
def _value(subject: Subject, estimator: str, cap: float | None) -> str:
    means = facts.value_means(subject, estimator, cap)
    quality = "exact" if estimator in exact.NAMES else "unbiased"
    for level, scope in (("sequence", ""), ("token", " of each token")):
        for name in gradients.DIVERGENCES:
            truth = [float(gradients.divergence(listed, name, level)) for listed in panel()]  # type: ignore[arg-type]
            if all(abs(mean - exact) < subject.tolerance * exact for mean, exact in zip(means, truth, strict=True)):
                return f"{SIGNS[name]}{scope}, {quality}"
    name = "forward" if estimator == "topk_forward" else "reverse"
    truth = [float(gradients.divergence(listed, name, "token")) for listed in panel()]
    bias = [mean / exact - 1.0 for mean, exact in zip(means, truth, strict=True)]
    if max(bias) <= subject.tolerance:
        return f"below {SIGNS[name]}, by up to {-min(bias):.0%}"
    return f"not a KL: {min(bias):+.0%} to {max(bias):+.0%} against {SIGNS[name]}"


def named(follows: str) -> str:
    """A divergence in words."""
    return NAMED.get(follows, "no divergence")


def _corrects_the_reward(rule: Rule) -> bool:
    return rule.placement == "reward" and rule.correction != "none"


def _has_a_void_half(subject: Subject, rule: Rule) -> bool:
    return rule.placement == "both" and rule.pull is not None and facts.loss_half_vanishes(subject, rule.pull)


def _followed(match: Match, found: Facts) -> str:
    start = f"It follows {named(match.name)}, {_SCOPES[match.level]}: the expected gradient is exactly that one."
    if match.level != "coarse":
        return start
    cosines = facts.cosines(found.found, match.name, "token")
    return (
        f"{start} That divergence is a lower bound: against the gradient of the full one per token the cosine is "
        f"{min(cosines):.2f} to {max(cosines):.2f} on the doctor's policies."
    )


def _about_void(subject: Subject, rule: Rule) -> str:
    half = "The loss's half is void: its" if rule.placement == "both" else "Its"
    return (
        f"{half} gradient is grad log pi whatever the reference is, and over the policy's own samples the mean of that "
        "is zero: it adds noise and pulls nowhere."
    )


def _about_multiple(rule: Rule, match: Match) -> str:
    start = f"It follows {match.factor:g} times {named(match.name)}, {_SCOPES[match.level]}"
    if match.factor < 0:
        return f"{start}: it drives the policy away from the reference."
    if rule.placement == "both":
        return f"{start}: each half follows it already. Keep one of them."
    return f"{start}, and its value is not that: use {match.name}."


def _about_bias(subject: Subject, rule: Rule, found: Facts) -> str:
    if rule.placement == "both" and found.followed is not None:
        return (
            f"Together the halves follow {named(found.followed.name)}, but per token only, which one of them can do "
            "alone. Both placements belong together where they give the gradient of whole responses: k3 with credit "
            "sequence or reward_to_go."
        )
    change = repair(subject, rule)
    if change is None:
        return _beyond_repair(subject, rule)
    right = facts.facts(subject, change.of(rule)).followed
    sentences = [_SPOILS[name](subject, rule) for name, _ in change.fields]
    follows = named(right.name if right else "none")
    return " ".join((*sentences, f"With {change.spelled(rule.placement)} it follows {follows}."))


def _beyond_repair(subject: Subject, rule: Rule) -> str:
    """What the estimator does in the usual setting, and what the rest of the rule adds."""
    usual = {"normalization": "none", "shaping": None, "cap": None}
    if not enumeration.weighs_alike(subject, rule.aggregation):
        usual["aggregation"] = "token-mean"
    added = [name for name, plain in usual.items() if getattr(rule, name) != plain]
    if not added:
        return _why(subject, rule)
    base = rule.but(**usual)
    if facts.facts(subject, base).vanishes and added == ["aggregation"]:
        return (
            f"Without the weights of {rule.aggregation} its gradient would be zero. With them it is that of E[1 / |y|] "
            "and knows no reference: it makes responses longer."
        )
    return " ".join((reason(subject, base, verdict(subject, base)), *(_SPOILS[name](subject, rule) for name in added)))


def _why(subject: Subject, rule: Rule) -> str:
    """What is known of estimators that no change makes right."""
    if rule.placement == "both":
        return (
            "Together the halves follow no divergence. Only k3, unclamped, belongs in both places: its mean is a KL, "
            "and its loss is the gradient of itself."
        )
    if rule.placement == "loss" and rule.correction == "importance":
        return _SPOILS["correction"](subject, rule)
    return _WHY.get((rule.placement, subject.row(rule.estimator)), "Its expected gradient is no divergence's.")


_DRAWN = (
    "Its loss is -sum log pi over responses that the reference wrote before the first update: KL(pi_ref || pi) plus "
    "the reference's entropy, which no update changes. The draw is used again and again, so it must be large."
)
_VERLS_CLAMP = (
    "The clamp of verl's k3 stops the gradient of every token with pi_ref / pi above 13.6, which are the tokens that "
    "the policy has lost."
)
_WHY = {
    ("reward", "k2"): "Charging d^2 / 2 follows E[d^2 / 2 * grad log pi], the gradient of no divergence.",
    ("reward", "abs"): "Charging |d| follows E[|d| * grad log pi], the gradient of no divergence.",
    ("reward", "k3"): (
        "For a single token, charging r - 1 + d follows grad KL(pi || pi_ref) minus grad KL(pi_ref || pi): the two "
        "cancel near the reference, and where the policy has lost a token the second wins and pushes it further away."
    ),
    ("reward", "k3_verl"): (
        "For a single token, charging k3 follows grad KL(pi || pi_ref) minus grad KL(pi_ref || pi), and the charge of "
        "the tokens that the policy has lost is clamped at 10."
    ),
    ("loss", "k3_verl"): _VERLS_CLAMP,
}


def _spoiled_by_std(subject: Subject, rule: Rule) -> str:
    # how large the KL part is against what beta says, on problems where both are there
    plain = facts.facts(subject, rule.but(normalization="none")).found.norm(dim=1)
    ratio = facts.facts(subject, rule).found.norm(dim=1)[plain > 0] / plain[plain > 0]
    return (
        "GRPO's std divides the KL term too. In groups of equal task scores nothing else is left, and beta cancels: "
        f"at beta = {BETA:g} the KL's gradient has up to {float(ratio.max()):.0f} times the size that beta asks for, "
        "and no divergence's direction."
    )


def _spoiled_by_aggregation(subject: Subject, rule: Rule) -> str:
    if rule.of_policy != rule.aggregation and rule.placement == "both":
        return f"The two halves aggregate differently ({rule.of_policy} in the policy loss, {rule.aggregation} here)."
    return (
        f"The aggregation {rule.aggregation} weighs each token by 1 / |y|, and |y| depends on what is sampled: "
        "where lengths vary, the gradient is no divergence's."
    )


def _spoiled_by_credit(subject: Subject, rule: Rule) -> str:
    if rule.credit == "token":
        return "Charging tokens for themselves leaves out the half of the gradient that steers."
    return (
        f"A charge of {rule.estimator} does not average to zero: summed over the response, the later tokens' charges "
        "pull on the earlier tokens, by what is not their divergence."
    )


def _spoiled_by_correction(subject: Subject, rule: Rule) -> str:
    through = "Differentiating (pi / pi_old) * value through the ratio too adds value * grad log pi"
    if rule.placement == "both":
        return f"{through}, which the charge in the reward holds already: it counts twice."
    return f"{through}: that makes the gradient of the value's mean, and the mean of {rule.estimator} is no divergence."


def _spoiled_by_shaping(subject: Subject, rule: Rule) -> str:
    kind = type(rule.shaping).__name__
    return f"The shaping ({kind}) changes each token's gradient by a factor of its own, and the sum is no divergence's."


def _spoiled_by_cap(subject: Subject, rule: Rule) -> str:
    return f"The cap of {rule.cap:g} nats leaves tokens beyond it without gradient, or charges them too little."


_SPOILS = {
    "shaping": _spoiled_by_shaping,
    "cap": _spoiled_by_cap,
    "normalization": _spoiled_by_std,
    "aggregation": _spoiled_by_aggregation,
    "policy_aggregation": _spoiled_by_aggregation,
    "credit": _spoiled_by_credit,
    "correction": _spoiled_by_correction,
}
_CHANGES: tuple[tuple[str, Any], ...] = (
    ("shaping", None),
    ("cap", None),
    ("normalization", "none"),
    ("policy_aggregation", None),
    ("aggregation", "token-mean"),
    ("correction", "importance_detached"),
    ("correction", "none"),
    ("credit", "sequence"),
    ("credit", "token"),
)
_SPELLED: dict[tuple[str, Any], str] = {
    ("shaping", None): "kl.shaping.kind='none'",
    ("cap", None): "kl.cap=null",
    ("normalization", "none"): "kl.normalize_with_reward=false",
    ("policy_aggregation", None): "the policy loss's aggregation for both",
}
_READ_BY = {
    "normalization": ("reward", "both"),
    "policy_aggregation": ("both",),
    "correction": ("loss", "both"),
    "credit": ("reward", "both"),
}


def _is_read(rule: Rule, field: str) -> bool:
    return rule.placement in _READ_BY.get(field, (rule.placement,))
