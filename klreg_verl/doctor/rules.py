"""A KL setting as the doctor judges it, and how it is read from a recipe's KL block."""

from dataclasses import dataclass, replace
from typing import Any, Protocol

from klreg_verl.core import penalties
from klreg_verl.core import shaping as shapings
from klreg_verl.core.aggregation import AGGREGATIONS
from klreg_verl.core.objective import Objective
from klreg_verl.core.shaping import Shaping

PLACEMENTS = ("none", "reward", "loss", "both")
NORMALIZATIONS = ("none", "std")
REFERENCE_SAMPLES = "reference_samples"
"""-sum_t log pi(y_t) of responses that the reference wrote: for the loss only, aggregated in one way only."""
_SAME_DIRECTION = {"token-sum": "seq-mean-token-sum"}
"""verl's token-sum is that many times larger as there are responses."""


@dataclass(frozen=True, kw_only=True)
class Charge:
    """What decides the penalty in the reward."""

    estimator: str
    credit: str
    baseline: str
    normalization: str
    shaping: Shaping | None
    cap: float | None


@dataclass(frozen=True, kw_only=True)
class Pull:
    """What decides the KL loss of each token."""

    estimator: str
    correction: str
    shaping: Shaping | None
    cap: float | None


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Everything about a setting that can change the direction of its gradient; beta is not."""

    placement: str
    estimator: str
    credit: str = "sequence"
    """Of the charge in the reward: sequence, reward_to_go or token."""
    baseline: str = "siblings"
    """Of the charge in the reward: siblings or none."""
    correction: str = "none"
    """Of the loss: none, importance or importance_detached."""
    normalization: str = "none"
    """std: the charge is part of the scores that GRPO divides by their group's std, whole responses always."""
    aggregation: str = "token-mean"
    """Over the tokens of the KL's own loss; in the reward that of the policy loss, which carries the charge."""
    policy_aggregation: str | None = None
    """Of the policy loss; None: the same. Only placement both reads it."""
    shaping: Shaping | None = None
    cap: float | None = None

    def __post_init__(self) -> None:
        known = (
            ("placement", self.placement, PLACEMENTS[1:]),
            ("credit", self.credit, penalties.CREDITS),
            ("baseline", self.baseline, penalties.BASELINES),
            ("correction", self.correction, penalties.CORRECTIONS),
            ("normalization", self.normalization, NORMALIZATIONS),
            ("aggregation", self.aggregation, AGGREGATIONS),
            ("aggregation", self.policy_aggregation or self.aggregation, AGGREGATIONS),
        )
        for what, given, names in known:
            if given not in names:
                raise ValueError(f"There is no KL {what} {given!r}. Known: {', '.join(names)}.")
        if self.is_drawn:
            self._check_drawn()

    def _check_drawn(self) -> None:
        if (self.placement, self.correction, self.shaping, self.cap) != ("loss", "none", None, None):
            raise ValueError(f"{REFERENCE_SAMPLES} is for the loss only, without correction, shaping and cap.")
        object.__setattr__(self, "aggregation", "seq-mean-token-sum")
        object.__setattr__(self, "policy_aggregation", None)

    @property
    def is_drawn(self) -> bool:
        """Whether the loss is on responses that the reference wrote."""
        return self.estimator == REFERENCE_SAMPLES

    @property
    def is_usual(self) -> bool:
        """One that an overview shows: the first or only aggregation, outside the std, both halves as they belong."""
        halves = self.placement != "both" or (self.credit == "sequence" and self.correction == "none")
        aggregation = self.is_drawn or self.aggregation == AGGREGATIONS[0]
        return halves and self.normalization == "none" and aggregation

    @property
    def of_policy(self) -> str:
        """The aggregation that the charge in the reward goes through."""
        return self.policy_aggregation or self.aggregation

    @property
    def charge(self) -> Charge | None:
        """The half in the reward; None where there is none."""
        if self.placement == "loss":
            return None
        whole = self.normalization == "std"
        return Charge(
            estimator=self.estimator,
            credit="sequence" if whole else self.credit,
            baseline="siblings" if whole else self.baseline,
            normalization=self.normalization,
            shaping=self.shaping,
            cap=self.cap,
        )

    @property
    def pull(self) -> Pull | None:
        """The half in the loss; None where there is none."""
        if self.placement == "reward":
            return None
        return Pull(estimator=self.estimator, correction=self.correction, shaping=self.shaping, cap=self.cap)

    def but(self, **changes: Any) -> "Rule":
        """The same rule with some fields changed."""
        return replace(self, **changes)


class KLSetting(Protocol):
    """What the doctor must find in a recipe's KL block.

    What else it reads may be absent or None, which stands for its default: credit (sequence), baseline (siblings),
    correction (none), aggregation (that of the policy loss), normalize_with_reward (false), shaping (an object with
    kind, threshold, target; none), cap (none).
    """

    @property
    def placement(self) -> str:
        """none, reward, loss or both."""

    @property
    def estimator(self) -> str | None:
        """A name of klreg_verl.core.kl or of its exact ones, or pkg.module:name; None where placement is none."""

    @property
    def follows(self) -> str | None:
        """The user's claim: reverse, forward, another divergence's name, or none."""

    @property
    def beta(self) -> float | None:
        """Coefficient, in reward units per nat."""

    @property
    def allow_biased(self) -> bool:
        """Run a setting that the doctor refuses, knowingly."""


def read(setting: KLSetting, objective: Objective = Objective()) -> Rule:  # noqa: B008
    """The rule that a KL block with a placement states beside an objective. ValueError for a word that does not exist.

    A charge in the reward goes through the policy loss and its aggregation; a KL loss without an aggregation of its own
    has the one that verl's settings name, whether or not the policy loss heeds it.
    """
    policy_aggregation, named = map(_direction, (objective.policy_aggregation, objective.loss_aggregation))
    own = policy_aggregation if setting.placement == "reward" else _given(setting, "aggregation", named)
    return Rule(
        placement=setting.placement,
        estimator=str(setting.estimator),
        credit=_given(setting, "credit", "sequence"),
        baseline=_given(setting, "baseline", "siblings"),
        correction=_given(setting, "correction", "none"),
        normalization="std" if _given(setting, "normalize_with_reward", False) else "none",
        aggregation=own,
        policy_aggregation=policy_aggregation if setting.placement == "both" and own != policy_aggregation else None,
        shaping=_shaping(_given(setting, "shaping", None)),
        cap=_given(setting, "cap", None),
    )


def _direction(aggregation: str) -> str:
    return _SAME_DIRECTION.get(aggregation, aggregation)


def _given(setting: KLSetting, name: str, default: Any) -> Any:
    value = getattr(setting, name, None)
    return default if value is None else value


def _shaping(spec: Any) -> Shaping | None:
    kind = getattr(spec, "kind", "none")
    if kind == "none":
        return None
    return shapings.shaping(kind, threshold=getattr(spec, "threshold", None), target=getattr(spec, "target", None))
