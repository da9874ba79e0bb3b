"""What a KL setting really follows: a judgement by enumeration, the table of all, the check of a claim, a paragraph.

The functions of klreg_verl.core that train are the ones that are judged, on every problem of the panel. A setting
follows a divergence only if its expected gradient equals that divergence's on all of them (relative error below 1e-9).
All judgements are on-policy: one update per batch, untruncated sampling.
"""

from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Literal, Protocol

from torch import Tensor

from klreg_verl.core import kl, penalties
from klreg_verl.doctor import gradients
from klreg_verl.doctor.gradients import Direction, Level
from klreg_verl.doctor.policies import Problem, panel

PLACEMENTS = ("none", "reward", "loss")
TOLERANCE = 1e-9
DIVERGENCES: dict[Direction, str] = {
    "reverse": "the reverse KL, KL(pi || pi_ref)",
    "forward": "the forward KL, KL(pi_ref || pi)",
}
Verdict = Literal["ok", "biased", "void"]
_LEVELS: dict[str, Level] = {"reward": "sequence", "loss": "token"}


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What one setting does, as found by enumeration; cosines are the lowest over the panel."""

    placement: str
    estimator: str | None
    value: str
    """What the logged value estimates."""
    follows: Literal["reverse", "forward", "none"]
    """The divergence whose gradient is followed; none where it is nobody's or zero."""
    level: Level
    """Whether cosines (and `follows`) are about whole responses or single tokens on the policy's own prefixes."""
    cosine_reverse: float | None
    """To the gradient of KL(pi || pi_ref); None where the setting has no gradient."""
    cosine_forward: float | None
    """To the gradient of KL(pi_ref || pi); None where the setting has no gradient."""
    verdict: Verdict
    reason: str
    sequence_note: str
    """What of the gradient for whole responses is there."""


class KLSetting(Protocol):
    """What the doctor reads of a recipe's KL block."""

    @property
    def placement(self) -> str:
        """none, reward or loss."""

    @property
    def estimator(self) -> str | None:
        """A name of klreg_verl.core.kl; None where placement is none."""

    @property
    def follows(self) -> str | None:
        """The user's claim: reverse, forward or none."""

    @property
    def beta(self) -> float | None:
        """Coefficient, in reward units per nat."""

    @property
    def allow_biased(self) -> bool:
        """Run a setting that follows no divergence, knowingly."""


@cache
def judge(placement: str, estimator: str | None) -> Judgement:
    """The judgement on one setting; milliseconds, and cached. ValueError for a name that does not exist."""
    if placement not in PLACEMENTS:
        raise ValueError(f"There is no KL placement {placement!r}. Known placements: {', '.join(PLACEMENTS)}.")
    if placement == "none" or estimator is None:
        return _without_kl(placement, estimator)
    found = {listed.name: _expected_gradient(placement, estimator, listed) for listed in panel()}
    follows, level = _match(found) or ("none", _LEVELS[placement])
    verdict = _verdict(follows, found)
    lowest = {direction: min(_cosines(found, direction, level), default=None) for direction in DIVERGENCES}
    return Judgement(
        placement=placement,
        estimator=estimator,
        value=_value(estimator),
        follows=follows,
        level=level,
        cosine_reverse=lowest["reverse"],
        cosine_forward=lowest["forward"],
        verdict=verdict,
        reason=_reason(placement, estimator, follows, level, verdict),
        sequence_note=_sequence_note(found, follows, level),
    )


def table() -> list[dict[str, str | float | None]]:
    """Every setting as a plain dictionary, for printing and for JSON; a direction that does not exist is None."""
    settings = [("none", None), *((placement, name) for placement in PLACEMENTS[1:] for name in kl.names())]
    hidden = ("level", "sequence_note")
    return [
        {key: entry for key, entry in asdict(judge(placement, name)).items() if key not in hidden}
        for placement, name in settings
    ]


def check_claim(setting: KLSetting) -> None:
    """Raise ValueError unless `follows` is what the setting follows, and it follows something or is allowed not to."""
    if setting.placement == "none" and setting.follows in (None, "none"):
        return
    judgement = judge(setting.placement, setting.estimator)
    name = f"kl.estimator={setting.estimator!r} with kl.placement={setting.placement!r}"
    if judgement.verdict != "ok" and not setting.allow_biased:
        raise ValueError(
            f"{name} is {judgement.verdict}. {judgement.reason} {_way_out(setting.follows)} To run it all the same, "
            "set kl.follows='none' and kl.allow_biased=true."
        )
    if setting.follows != judgement.follows:
        raise ValueError(
            f"kl.follows={setting.follows!r} is claimed, but {name} follows {judgement.follows!r}. {judgement.reason} "
            f"Set kl.follows={judgement.follows!r}{_alternative(setting.follows)}."
        )


def explain(setting: KLSetting, advantage: str, updates_per_batch: int) -> str:
    """One paragraph in plain words: what the arm's KL term follows, and under which caveats."""
    judgement = judge(setting.placement, setting.estimator)
    if setting.placement == "none":
        return judgement.reason
    about_updates = _about_updates(setting, updates_per_batch)
    sentences = (_opening(setting, judgement), judgement.sequence_note, about_updates, _about_beta(advantage))
    return " ".join(sentence for sentence in sentences if sentence)


def _without_kl(placement: str, estimator: str | None) -> Judgement:
    if placement != "none" or estimator is not None:
        given = f"kl.placement={placement!r} with kl.estimator={estimator!r}"
        raise ValueError(f"{given} is half a setting. Give an estimator with 'reward' or 'loss', and none with 'none'.")
    return Judgement(
        placement="none",
        estimator=None,
        value="measured only",
        follows="none",
        level="sequence",
        cosine_reverse=None,
        cosine_forward=None,
        verdict="ok",
        reason="No KL term: the distance to the reference is measured and nothing acts on it.",
        sequence_note="",
    )


def _expected_gradient(placement: str, estimator: str, listed: Problem) -> Tensor:
    """What training with this setting follows on one problem, by the functions that train."""
    if placement == "loss":
        return gradients.loss_gradient(listed, partial(penalties.kl_loss_per_token, estimator))
    return gradients.reward_gradient(listed, partial(penalties.reward_penalty, estimator))


def _match(found: dict[str, Tensor]) -> tuple[Direction, Level] | None:
    """The divergence and level whose gradient equals the one found on every problem; whole responses come first."""
    for level in ("sequence", "token"):
        for direction in DIVERGENCES:
            truth = (gradients.divergence_gradient(listed, direction, level) for listed in panel())
            errors = map(gradients.relative_error, found.values(), truth)
            if all(error < TOLERANCE for error in errors):
                return direction, level
    return None


def _verdict(follows: str, found: dict[str, Tensor]) -> Verdict:
    if follows != "none":
        return "ok"
    return "void" if _vanishes(found) else "biased"


def _vanishes(found: dict[str, Tensor]) -> bool:
    truth = {listed.name: gradients.divergence_gradient(listed, "reverse", "sequence") for listed in panel()}
    return all(found[name].norm() < TOLERANCE * truth[name].norm() for name in found)


def _cosines(found: dict[str, Tensor], direction: Direction, level: Level) -> list[float]:
    truth = {listed.name: gradients.divergence_gradient(listed, direction, level) for listed in panel()}
    cosines = [gradients.cosine(found[name], truth[name]) for name in found]
    return [number for number in cosines if number is not None]


def _value(estimator: str) -> str:
    """What the mean of the logged value is, from its relative bias on the panel."""
    means = [gradients.expected_value(listed, partial(kl.value, estimator)) for listed in panel()]
    signs: dict[Direction, str] = {"reverse": "KL(pi||ref)", "forward": "KL(ref||pi)"}
    for direction, sign in signs.items():
        truth = [gradients.divergence(listed, direction, "sequence").item() for listed in panel()]
        if all(abs(mean - exact) < TOLERANCE * exact for mean, exact in zip(means, truth, strict=True)):
            return f"{sign}, unbiased"
    reverse = [gradients.divergence(listed, "reverse", "sequence").item() for listed in panel()]
    bias = [mean / exact - 1.0 for mean, exact in zip(means, reverse, strict=True)]
    return f"not a KL: {min(bias):+.0%} to {max(bias):+.0%} against KL(pi||ref)"


_WHY = {
    ("loss", "k1"): (
        "Its gradient is grad log pi whatever the reference is, and over the policy's own samples the mean of that is "
        "zero: it adds noise and pulls nowhere."
    ),
    ("reward", "k2"): "Charging d^2 / 2 follows E[d^2 / 2 * grad log pi], the gradient of no divergence.",
    ("reward", "k3"): (
        "For a single token, charging r - 1 + d follows grad KL(pi || pi_ref) minus grad KL(pi_ref || pi): the two "
        "cancel near the reference, and where the policy has lost a token the second wins and pushes it further away."
    ),
}


def _reason(placement: str, estimator: str, follows: str, level: Level, verdict: str) -> str:
    if follows != "none":
        scope = "of whole responses" if level == "sequence" else "per token, on the policy's own prefixes"
        return f"It follows {_named(follows)}, {scope}: the expected gradient is exactly that one."
    default = "Its expected gradient is " + ("zero." if verdict == "void" else "no divergence's.")
    return _WHY.get((placement, estimator), default)


def _named(follows: str) -> str:
    return next((words for direction, words in DIVERGENCES.items() if direction == follows), "no divergence")


def _sequence_note(found: dict[str, Tensor], follows: str, level: Level) -> str:
    if follows not in DIVERGENCES:
        return ""
    if level == "sequence":
        return "Tokens are also charged for the prefixes they lead to, so this is the full gradient."
    direction: Direction = "reverse" if follows == "reverse" else "forward"
    cosines = _cosines(found, direction, "sequence")
    return (
        "How a token steers later ones is left out: against the full gradient for whole responses the cosine is "
        f"{min(cosines):.2f} to {max(cosines):.2f} on the doctor's policies."
    )


def _sound(follows: str | None) -> list[Judgement]:
    every = [judge(placement, name) for placement in PLACEMENTS[1:] for name in kl.names()]
    return [one for one in every if one.verdict == "ok" and follows in (None, "none", one.follows)]


def _spelled(judgements: list[Judgement]) -> str:
    return " or ".join(f"kl.placement={one.placement!r} with kl.estimator={one.estimator!r}" for one in judgements)


def _way_out(follows: str | None) -> str:
    goal = f" to follow {_named(follows)}" if follows in DIVERGENCES else ""
    return f"Use {_spelled(_sound(follows))}{goal}."


def _alternative(follows: str | None) -> str:
    return f", or use {_spelled(_sound(follows))} to follow {_named(follows)}" if follows in DIVERGENCES else ""


def _opening(setting: KLSetting, judgement: Judgement) -> str:
    place = "is charged to the reward" if setting.placement == "reward" else "is added to the loss"
    refusal = "" if judgement.verdict == "ok" else f"This is {judgement.verdict} and follows no divergence. "
    return f"{setting.estimator} {place} with beta {setting.beta}. {refusal}{judgement.reason}"


def _about_updates(setting: KLSetting, updates_per_batch: int) -> str:
    if updates_per_batch == 1:
        return "With one update per batch every update is on-policy and this holds for all of them."
    start = f"With {updates_per_batch} updates per batch this holds for the first one only; then the direction changes"
    if setting.placement == "loss":
        return f"{start}: samples come from the older policy without an importance weight, and follow no divergence."
    drift = " mu, so the gradient is that of KL(pi || pi_ref) - KL(pi || mu)" if setting.estimator == "k1" else ""
    return (
        f"{start}: the charge stays that of the sampling policy{drift}. PPO's clip also zeroes the KL part of every "
        "clipped token, since it sits in the advantage."
    )


_ABOUT_BETA = {
    "rloo": "Nothing divides the task's advantage, so beta is in units of reward per nat.",
    "grpo": (
        "GRPO divides the task's scores by their group's std; the KL term comes in after that division, so beta is not "
        "rescaled by it: it is per nat of the normalized advantage, which is beta * std in units of reward."
    ),
    "dr_grpo": (
        "Nothing divides the task's advantage, so beta is in units of reward per nat; only Dr. GRPO's own mean, which "
        "includes the response itself, makes the task's part (n - 1) / n of its full size in groups of n."
    ),
}


def _about_beta(advantage: str) -> str:
    if advantage not in _ABOUT_BETA:
        raise ValueError(f"There is no advantage estimator {advantage!r}. Known: {', '.join(_ABOUT_BETA)}.")
    return _ABOUT_BETA[advantage]
