"""A recipe's KL block against the judgement: the check of its claim, and one paragraph on it."""

from dataclasses import replace

from klreg_verl.core.objective import Objective
from klreg_verl.core.shaping import Clip
from klreg_verl.doctor import reasons
from klreg_verl.doctor.policies import LENGTHS
from klreg_verl.doctor.reasons import NAMED, named
from klreg_verl.doctor.rules import PLACEMENTS, KLSetting, Rule, read
from klreg_verl.doctor.subjects import OURS
from klreg_verl.doctor.verdict import Judgement, judge, judge_rule

PLAIN = Objective()
"""RLOO, one update per batch, token-mean, verl's other defaults."""


def check_claim(setting: KLSetting, objective: Objective = PLAIN) -> None:
    """Raise ValueError unless `follows` is what the setting follows, and it follows something or is allowed not to.

    `objective` is what the policy follows beside it: a charge in the reward goes through the policy loss. Where what is
    followed is neither direction of KL, the claim may name it or be none.
    """
    if setting.placement == "none" and setting.follows in (None, "none"):
        return
    judgement = judge_setting(setting, objective)
    name = f"kl.estimator={setting.estimator!r} with kl.placement={setting.placement!r}"
    if _is_charged(setting) and not objective.is_known and not setting.allow_biased:
        raise ValueError(
            f"policy_loss.loss_mode={objective.loss_mode!r} is none of verl's policy losses, and what it does with a "
            "KL in the reward cannot be known. Use kl.placement='loss', or set kl.allow_biased=true."
        )
    if judgement.verdict != "ok" and not setting.allow_biased:
        raise ValueError(
            f"{name} is {judgement.verdict}. {_reason(setting, objective, judgement)} "
            f"{_way_out(setting, objective)} To run it all the same, set kl.follows={judgement.follows!r} and "
            "kl.allow_biased=true."
        )
    if setting.follows not in _true_claims(judgement):
        raise ValueError(
            f"kl.follows={setting.follows!r} is claimed, but {name} follows {judgement.follows!r}. {judgement.reason} "
            f"Set kl.follows={judgement.follows!r}{_alternative(setting.follows)}."
        )


def explain(setting: KLSetting, objective: Objective = PLAIN) -> str:
    """One paragraph in plain words: what the arm's KL term follows, under which caveats, and what acts beside it."""
    judgement = judge_setting(setting, objective)
    beside = objective.beside(setting.placement)
    if setting.placement == "none":
        return " ".join([judgement.reason, *beside])
    rule = read(setting, objective)
    sentences = (
        _opening(setting, judgement, _reason(setting, objective, judgement)),
        judgement.sequence_note,
        _about_error(judgement),
        _about_cap(rule, judgement),
        _about_updates(rule, judgement, objective),
        *beside,
        _about_beta(rule, objective),
        _about_noise(judgement),
    )
    return " ".join(sentence for sentence in sentences if sentence)


def judge_setting(setting: KLSetting, objective: Objective = PLAIN) -> Judgement:
    """The judgement on a recipe's KL block."""
    if setting.placement not in PLACEMENTS[1:] or setting.estimator is None:
        return judge(setting.placement, setting.estimator)
    return judge_rule(OURS, read(setting, objective))


def _is_charged(setting: KLSetting) -> bool:
    return setting.placement in ("reward", "both")


def _reason(setting: KLSetting, objective: Objective, judgement: Judgement) -> str:
    """Why the verdict is what it is; where the policy loss has an aggregation of its own, no other setting mends it."""
    if judgement.verdict == "ok" or not (_is_charged(setting) and objective.forces_aggregation):
        return judgement.reason
    plain = judge_setting(setting, replace(objective, settings=()))
    forced = (
        f"The policy loss {objective.loss_mode} averages over each response's tokens (seq-mean-token-mean) whatever "
        "loss_agg_mode is, so that a token's KL counts less in a long response than in a short one."
    )
    return forced if plain.verdict == "ok" else f"{plain.reason} {forced}"


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


def _way_out(setting: KLSetting, objective: Objective) -> str:
    sound = _sound(setting.follows)
    goal = f" to follow {named(setting.follows)}" if setting.follows in NAMED else ""
    if _is_charged(setting) and objective.forces_aggregation:
        in_loss = _spelled([one for one in sound if one.placement == "loss"])
        return f"Set policy_loss.loss_mode=vanilla, or use {in_loss}{goal}."
    return f"Use {_spelled(sound)}{goal}."


def _alternative(follows: str | None) -> str:
    return f", or use {_spelled(_sound(follows))} to follow {named(follows)}" if follows in NAMED else ""


def _opening(setting: KLSetting, judgement: Judgement, reason: str) -> str:
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
    return f"{setting.estimator} {place} with beta {setting.beta}{details}. {refusal}{reason}"


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


def _about_updates(rule: Rule, judgement: Judgement, objective: Objective) -> str:
    updates_per_batch, mode = objective.updates_per_batch, objective.loss_mode
    if rule.is_drawn:
        return "The policy's own samples are not asked, so this holds in every update of a batch."
    if updates_per_batch == 1:
        return "With one update per batch every update is on-policy and this holds for all of them."
    if rule.charge is not None and mode != "vanilla":
        return (
            f"With {updates_per_batch} updates per batch this holds for the first one only; in the later ones the "
            f"charge, which stays that of the sampling policy mu, goes through {mode} as the task's advantage does."
        )
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


def _about_beta(rule: Rule, objective: Objective) -> str:
    if rule.normalization == "std":
        return "What beta means changes from group to group with the std of its scores."
    units = _ABOUT_BETA.get(objective.advantage) or (
        f"{objective.advantage} puts the task's advantage on a scale of its own, so beta is per nat of that advantage"
    )
    if rule.aggregation == objective.policy_aggregation:
        return f"{units}."
    return (
        f"{units}, up to a factor: the policy loss aggregates by {objective.policy_aggregation} and the KL by "
        f"{rule.aggregation}, so the two are not in the same units."
    )


def _about_noise(judgement: Judgement) -> str:
    if judgement.noise is None:
        return ""
    return (
        f"Noise of one response's gradient, against |grad KL(pi || pi_ref)| of the doctor's example: "
        f"{judgement.noise[0]:.2f} for {LENGTHS[0]} token, {judgement.noise[-1]:.2f} for {LENGTHS[-1]}."
    )
