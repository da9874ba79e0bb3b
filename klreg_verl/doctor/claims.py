"""A recipe's KL block against the judgement: the check of its claim, and one paragraph on it."""

from klreg_verl.core.shaping import Clip
from klreg_verl.doctor import reasons
from klreg_verl.doctor.policies import LENGTHS
from klreg_verl.doctor.reasons import NAMED, named
from klreg_verl.doctor.rules import PLACEMENTS, KLSetting, Rule, read
from klreg_verl.doctor.subjects import OURS
from klreg_verl.doctor.verdict import Judgement, judge, judge_rule


def check_claim(setting: KLSetting, policy_aggregation: str = "token-mean") -> None:
    """Raise ValueError unless `follows` is what the setting follows, and it follows something or is allowed not to.

    `policy_aggregation` is the policy loss's: a charge in the reward goes through it, and so does a KL loss without an
    aggregation of its own. Where what is followed is neither direction of KL, the claim may name it or be none.
    """
    if setting.placement == "none" and setting.follows in (None, "none"):
        return
    judgement = judge_setting(setting, policy_aggregation)
    name = f"kl.estimator={setting.estimator!r} with kl.placement={setting.placement!r}"
    if judgement.verdict != "ok" and not setting.allow_biased:
        raise ValueError(
            f"{name} is {judgement.verdict}. {judgement.reason} {_way_out(setting.follows)} To run it all the same, "
            f"set kl.follows={judgement.follows!r} and kl.allow_biased=true."
        )
    if setting.follows not in _true_claims(judgement):
        raise ValueError(
            f"kl.follows={setting.follows!r} is claimed, but {name} follows {judgement.follows!r}. {judgement.reason} "
            f"Set kl.follows={judgement.follows!r}{_alternative(setting.follows)}."
        )


def explain(setting: KLSetting, advantage: str, updates_per_batch: int, policy_aggregation: str = "token-mean") -> str:
    """One paragraph in plain words: what the arm's KL term follows, and under which caveats."""
    judgement = judge_setting(setting, policy_aggregation)
    if setting.placement == "none":
        return judgement.reason
    rule = read(setting, policy_aggregation)
    sentences = (
        _opening(setting, judgement),
        judgement.sequence_note,
        _about_error(judgement),
        _about_cap(rule, judgement),
        _about_updates(rule, judgement, updates_per_batch),
        _about_beta(rule, advantage, policy_aggregation),
        _about_noise(judgement),
    )
    return " ".join(sentence for sentence in sentences if sentence)


def judge_setting(setting: KLSetting, policy_aggregation: str = "token-mean") -> Judgement:
    """The judgement on a recipe's KL block."""
    if setting.placement not in PLACEMENTS[1:] or setting.estimator is None:
        return judge(setting.placement, setting.estimator)
    return judge_rule(OURS, read(setting, policy_aggregation))


def _true_claims(judgement: Judgement) -> tuple[str, ...]:
    if judgement.follows in ("reverse", "forward"):
        return (judgement.follows,)
    return (judgement.follows, "none")


def _sound(follows: str | None) -> list[Judgement]:
    """What is right without further settings: in the reward, in the loss."""
    names = {"reward": OURS.estimators, "loss": (*OURS.estimators, "full_reverse", "full_forward")}
    rules = [Rule(placement=placement, estimator=name) for placement in names for name in names[placement]]
    every = [judge_rule(OURS, rule) for rule in rules if reasons.verdict(OURS, rule) == "ok"]
    return [one for one in every if follows in (None, "none", one.follows)]


def _spelled(judgements: list[Judgement]) -> str:
    """One clause for each placement."""
    clauses = []
    for placement in ("reward", "loss"):
        names = [repr(one.estimator) for one in judgements if one.placement == placement]
        if names:
            clauses.append(f"kl.placement={placement!r} with kl.estimator={' or '.join(names)}")
    return ", or ".join(clauses)


def _way_out(follows: str | None) -> str:
    goal = f" to follow {named(follows)}" if follows in NAMED else ""
    return f"Use {_spelled(_sound(follows))}{goal}."


def _alternative(follows: str | None) -> str:
    return f", or use {_spelled(_sound(follows))} to follow {named(follows)}" if follows in NAMED else ""


def _opening(setting: KLSetting, judgement: Judgement) -> str:
    place = {
        "reward": "is charged to the reward",
        "loss": "is added to the loss",
        "both": "is charged to the reward and added to the loss",
    }[setting.placement]
    details = _details(judgement)
    refusal = ""
    if judgement.verdict != "ok":
        nothing = " and follows no divergence" if judgement.follows == "none" else ""
        refusal = f"This is {judgement.verdict}{nothing}. "
    return f"{setting.estimator} {place} with beta {setting.beta}{details}. {refusal}{judgement.reason}"


def _details(judgement: Judgement) -> str:
    """What differs from the defaults."""
    parts = []
    if judgement.credit not in (None, "sequence"):
        parts.append(f"credit {judgement.credit}")
    if judgement.correction != "none":
        parts.append(f"correction {judgement.correction}")
    return f" ({', '.join(parts)})" if parts else ""


def _about_error(judgement: Judgement) -> str:
    if judgement.verdict != "biased" or judgement.relative_error is None:
        return ""
    return f"Its gradient's relative error is {judgement.relative_error:.2g} at worst on the doctor's policies."


def _about_cap(rule: Rule, judgement: Judgement) -> str:
    if judgement.verdict != "ok":
        return ""
    if isinstance(rule.shaping, Clip):
        return f"This holds while no token's value reaches the clip at {rule.shaping.threshold:g} nats."
    if rule.cap is not None:
        return f"This holds while no token reaches the cap of {rule.cap:g} nats; kl/cap_fraction says how many do."
    return ""


def _about_updates(rule: Rule, judgement: Judgement, updates_per_batch: int) -> str:
    if rule.is_drawn:
        return "The policy's own samples are not asked, so this holds in every update of a batch."
    if updates_per_batch == 1:
        return "With one update per batch every update is on-policy and this holds for all of them."
    if judgement.follows != "none" and judgement.follows_off_policy == judgement.follows:
        return (
            f"It still holds in the later ones of {updates_per_batch} updates per batch, per token and on the prefixes "
            "of the older policy that sampled: the ratio pi / pi_old corrects the drawn token, not how it was reached."
        )
    start = f"With {updates_per_batch} updates per batch this holds for the first one only; then the direction changes"
    if rule.placement == "loss":
        return f"{start}: {_uncorrected(rule)}"
    drift = " mu, so the gradient is that of KL(pi || pi_ref) - KL(pi || mu)" if rule.estimator == "k1" else ""
    return (
        f"{start}: the charge stays that of the sampling policy{drift}. PPO's clip also zeroes the KL part of every "
        "clipped token, since it sits in the advantage."
    )


def _uncorrected(rule: Rule) -> str:
    if rule.correction == "none":
        return "samples come from the older policy without an importance weight, and follow no divergence."
    return "the importance weight does not mend a gradient that is no divergence's to begin with."


_ABOUT_BETA = {
    "rloo": "Nothing divides the task's advantage, so beta is in units of reward per nat",
    "grpo": (
        "GRPO divides the task's scores by their group's std; the KL term comes in after that division, so beta is not "
        "rescaled by it: it is per nat of the normalized advantage, which is beta * std in units of reward"
    ),
    "dr_grpo": (
        "Nothing divides the task's advantage, so beta is in units of reward per nat; only Dr. GRPO's own mean, which "
        "includes the response itself, makes the task's part (n - 1) / n of its full size in groups of n"
    ),
}


def _about_beta(rule: Rule, advantage: str, policy_aggregation: str) -> str:
    if advantage not in _ABOUT_BETA:
        raise ValueError(f"There is no advantage estimator {advantage!r}. Known: {', '.join(_ABOUT_BETA)}.")
    if rule.normalization == "std":
        return "What beta means changes from group to group with the std of its scores."
    if rule.aggregation == policy_aggregation:
        return f"{_ABOUT_BETA[advantage]}."
    return (
        f"{_ABOUT_BETA[advantage]}, up to a factor: the policy loss aggregates by {policy_aggregation} and the KL by "
        f"{rule.aggregation}, so the two are not in the same units."
    )


def _about_noise(judgement: Judgement) -> str:
    if judgement.noise is None:
        return ""
    return (
        f"Noise of one response's gradient, against |grad KL(pi || pi_ref)| of the doctor's example: "
        f"{judgement.noise[0]:.2f} for {LENGTHS[0]} token, {judgement.noise[-1]:.2f} for {LENGTHS[-1]}."
    )
