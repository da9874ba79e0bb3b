"""A recipe's sections about KL: `kl`, `reference`, `probes`, `alarms`; typed, frozen, checked on construction.

A setting that would have no effect is refused with the reason; whether a setting follows what it claims is the doctor's
to say (`recipe.check_claims`). Imports no torch, so that recipes load anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from klreg_verl.experiment import strict
from klreg_verl.experiment.strict import FieldError

Aggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
Placement = Literal["none", "reward", "loss", "both"]
Follows = Literal["reverse", "forward", "js", "chi2", "tv", "none"]

SAMPLED = ("k1", "k2", "k3", "abs", "forward", "js", "chi2", "tv", "k3_verl")
"""Estimators from the sampled token alone: the table of core/kl.py."""
EXACT = ("full_reverse", "full_forward", "topk_reverse", "topk_forward")
"""Divergences over the vocabulary, from both models' logits: core/exact.py. In the loss only."""
REFERENCE_SAMPLES = "reference_samples"
"""-sum_t log pi(y_t) of whole responses drawn from the reference before the first update. In the loss only."""
LOSS_ONLY = ("aggregation", "correction")
"""Fields of a KL block that placement reward does not read."""
REWARD_ONLY = ("credit", "baseline", "normalize_with_reward")
"""Fields that placement loss does not read."""
_OWN_ESTIMATOR = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def _given(spec: Any, leave_out: set[str]) -> dict[str, Any]:
    return {name: value for name, value in asdict(spec).items() if value is not None and name not in leave_out}


def _fields_of(cls: Any) -> list[str]:
    return [entry.name for entry in fields(cls)]


def _default_of(cls: Any, name: str) -> Any:
    return cls.__dataclass_fields__[name].default


def _named_in(message: str, names: Iterable[str], otherwise: str) -> str:
    """The one of the names that the message speaks of first."""
    places = {name: found.start() for name in names if (found := re.search(rf"\b{name}\b", message))}
    return min(places, key=places.__getitem__, default=otherwise)


@dataclass(frozen=True, kw_only=True)
class ShapingSpec:
    """What is done to the estimate before it acts (core/shaping.py says what that does to the gradient)."""

    kind: Literal["none", "clip", "sigmoid", "length_normalized"] = "none"
    threshold: float | None = None
    """clip: the estimate's ceiling [nats]; null: 1.0."""
    target: float | None = None
    """sigmoid: where its weight is one half [nats]; null: 0.1."""

    def __post_init__(self) -> None:
        for name, kind in (("threshold", "clip"), ("target", "sigmoid")):
            if getattr(self, name) is not None and self.kind != kind:
                raise FieldError(name, f"has no effect with kind {self.kind}: only {kind} reads it.")
        if self.threshold is not None and not self.threshold > 0:
            raise FieldError("threshold", f"{self.threshold} is not positive. Give a number of nats above 0.")

    @property
    def parameters(self) -> dict[str, float]:
        """What was given beside the kind."""
        return _given(self, leave_out={"kind"})


@dataclass(frozen=True, kw_only=True)
class ControllerSpec:
    """What moves beta (core/controllers.py); null parameters take the kind's own defaults."""

    kind: Literal[
        "fixed", "verl_adaptive", "multiplicative", "dynamic", "linear", "exponential", "cosine", "matched_kl"
    ] = "fixed"
    signal: Literal["token", "response"] | None = None
    """The KL it watches: k1 to the reference, per token or summed over the response."""
    beta_min: float | None = None
    beta_max: float | None = None
    target: float | None = None
    """The KL it aims at [nats per token or response, as its signal]."""
    horizon: float | None = None
    raise_by: float | None = None
    lower_by: float | None = None
    upper: float | None = None
    lower: float | None = None
    decay: float | None = None
    reward_threshold: float | None = None
    schedule_steps: int | None = None
    beta_end: float | None = None
    steps: int | None = None
    gain: float | None = None
    proportional: float | None = None

    def __post_init__(self) -> None:
        if self.kind == "fixed" and not self.parameters:
            return
        from klreg_verl.core import controllers

        try:
            controllers.controller(self.kind, **self.parameters)
        except ValueError as error:
            raise FieldError(_named_in(str(error), self.parameters, "kind"), str(error)) from None

    @property
    def parameters(self) -> dict[str, Any]:
        """What was given beside the kind."""
        return _given(self, leave_out={"kind"})


@dataclass(frozen=True, kw_only=True)
class DrawSpec:
    """The reference's responses that `estimator: reference_samples` learns: drawn once, before the first update."""

    prompts: int = 64
    """Training prompts, chosen by the run's seed."""
    per_prompt: int = 8
    """Responses drawn for each of them."""
    share: float = 0.25
    """Responses of the reference in each update, as a fraction of the update's own."""

    def __post_init__(self) -> None:
        for name in ("prompts", "per_prompt"):
            if (value := getattr(self, name)) < 1:
                raise FieldError(name, f"{value} is too small: at least 1.")
        if not self.share > 0:
            raise FieldError("share", f"{self.share} is not positive. 0.25 adds one response to every four.")

    def per_update(self, responses: int, workers: int) -> int:
        """Rows added to an update of `responses` on `workers`; FieldError where they cannot be shared equally."""
        wanted, drawn = self.share * responses, self.prompts * self.per_prompt
        rows = round(wanted)
        given = f"{self.share:g} of an update's {responses} responses is {wanted:g}"
        if abs(rows - wanted) > 1e-6 or not rows or rows % workers:
            least = max(workers, rows // workers * workers)
            raise FieldError(
                "share",
                f"{given}, which {workers} workers cannot share equally. {least / responses:g} gives {least}.",
            )
        if rows > drawn:
            raise FieldError("share", f"{given}, and only {drawn} are drawn. Ask for less, or draw more.")
        return rows


@dataclass(frozen=True, kw_only=True)
class KLSpec:
    """Where the KL to the reference enters, through which estimator, and which divergence it is claimed to follow."""

    placement: Placement = "none"
    """none: only measured; reward: charged to the response; loss: added per token; both: k3 in both, see the doctor."""
    estimator: str | None = None
    """A name of the table in core/kl.py or core/exact.py, reference_samples, or the user's own as pkg.module:name."""
    follows: Follows | None = None
    """The claim which divergence's gradient is followed; the doctor must agree."""
    beta: float | None = None
    """Coefficient [reward units per nat]; where a controller moves it, where it starts."""
    credit: Literal["sequence", "reward_to_go", "token"] | None = None
    """Reward placement: which tokens' KL a token is charged for; null: sequence."""
    baseline: Literal["siblings", "none"] | None = None
    """Reward placement: whether the siblings' mean charge is taken off; null: siblings."""
    normalize_with_reward: bool = False
    """Reward placement with GRPO: charge before the group's std division, which rescales beta (biased)."""
    correction: Literal["none", "importance", "importance_detached"] | None = None
    """Loss placement: the ratio pi / pi_old on the KL term, differentiable or detached; null: none."""
    aggregation: Aggregation | None = None
    """Of the KL in the loss; null: as the policy loss."""
    cap: float | None = None
    """|log-ratio| [nats] beyond which a token has no gradient in the loss, and is charged as at the cap in the reward;
    null: no cap."""
    top_k: int | None = None
    """Of topk_reverse and topk_forward: tokens kept apart, the rest is one bucket; null: 64."""
    shaping: ShapingSpec = ShapingSpec()
    controller: ControllerSpec = ControllerSpec()
    draw: DrawSpec = DrawSpec()
    """Of reference_samples: what is drawn from the reference, and how much of it an update sees."""
    allow_biased: bool = False
    """Lets an arm run although the doctor refuses it."""

    def __post_init__(self) -> None:
        if self.placement == "none":
            self._refuse(set(_fields_of(KLSpec)) - {"placement"}, "placement none. Say `placement: reward` or `loss`.")
        else:
            self._check_placed()

    def _refuse(self, names: Iterable[str], why: str) -> None:
        """FieldError for the first of the fields that was set: it would have no effect."""
        for name in _fields_of(KLSpec):
            if name in names and (value := getattr(self, name)) != _default_of(KLSpec, name):
                shown = getattr(value, "kind", None) or strict.show(
                    asdict(value) if isinstance(value, DrawSpec) else value
                )
                raise FieldError(name, f"{shown} has no effect with {why}")

    def _check_placed(self) -> None:
        for name in ("estimator", "follows", "beta"):
            if getattr(self, name) is None:
                raise FieldError(name, f"missing. `placement: {self.placement}` needs estimator, follows and beta.")
        if self.beta_or_zero < 0:
            raise FieldError("beta", f"{self.beta} is negative: it would reward leaving the reference. Give 0 or more.")
        self._check_estimator()
        if self.placement == "reward":
            self._refuse(LOSS_ONLY, "placement reward: the charge is a part of the advantage.")
        if self.placement == "loss":
            self._refuse(REWARD_ONLY, "placement loss: nothing is charged.")
        if self.normalize_with_reward:
            why = "normalize_with_reward: the response's charge becomes a part of its score, with GRPO's own mean."
            self._refuse({"credit", "baseline"}, why)
        if self.cap is not None and not self.cap > 0:
            raise FieldError("cap", f"{self.cap} is not positive. Give a number of nats above 0, or null.")
        self._check_controller()

    def _check_estimator(self) -> None:
        name = str(self.estimator)
        names = (*SAMPLED, *EXACT, REFERENCE_SAMPLES)
        if name not in names and not _OWN_ESTIMATOR.fullmatch(name):
            near, known = strict.suggestion(name, names), ", ".join(names)
            raise FieldError("estimator", f"{name!r} is not one of {known}, nor of the form pkg.module:name.{near}")
        if not name.startswith("topk"):
            self._refuse({"top_k"}, f"estimator {name}.")
        elif self.top_k is not None and self.top_k < 1:
            raise FieldError("top_k", f"{self.top_k} is too small: at least 1.")
        if self.is_exact and self.placement != "loss":
            raise FieldError("estimator", f"{name} needs the models' logits, which only `placement: loss` has.")
        if self.is_exact:
            self._refuse({"correction", "cap", "shaping"}, f"estimator {name}, which sums over the vocabulary.")
        self._check_drawn(name)

    def _check_drawn(self, name: str) -> None:
        if not self.is_drawn:
            self._refuse({"draw"}, f"estimator {name}: only {REFERENCE_SAMPLES} draws from the reference.")
            return
        if self.placement != "loss":
            why = "the reference's responses are in no group and have no reward. Only `placement: loss` takes them."
            raise FieldError("estimator", f"{name} with placement {self.placement}: {why}")
        why = "which is -sum log pi over whole responses of the reference: no ratio, and a mean of its own."
        self._refuse({"correction", "cap", "shaping", "aggregation"}, f"estimator {name}, {why}")

    def _check_controller(self) -> None:
        """The controller must be able to start from beta."""
        if self.controller.kind == "fixed":
            return
        from klreg_verl.core import controllers

        try:
            controllers.controller(self.controller.kind, **self.controller.parameters).start(self.beta_or_zero)
        except ValueError as error:
            raise FieldError("beta", str(error)) from None

    @property
    def beta_or_zero(self) -> float:
        """beta, and 0 where nothing is charged [reward units per nat]."""
        return 0.0 if self.beta is None else self.beta

    @property
    def in_reward(self) -> bool:
        return self.placement in ("reward", "both")

    @property
    def in_loss(self) -> bool:
        """Whether the batch's own responses have a KL term in the loss; those drawn from the reference are no batch."""
        return self.placement in ("loss", "both") and not self.is_drawn

    @property
    def is_exact(self) -> bool:
        """Whether the estimator needs the logits of both models."""
        return self.estimator in EXACT

    @property
    def is_drawn(self) -> bool:
        """Whether the loss is on responses drawn from the reference."""
        return self.estimator == REFERENCE_SAMPLES


@dataclass(frozen=True, kw_only=True)
class ReferenceSpec:
    """The reference model: where it comes from, and whether it moves."""

    path: str | None = None
    """A folder or Hugging Face id of the same vocabulary; null: the starting model."""
    reset_every: int | None = None
    """Steps after which the reference becomes a copy of the policy; null: never."""
    ema: float | None = None
    """The share of the reference kept at each step, reference <- ema * reference + (1 - ema) * policy; null: frozen."""

    def __post_init__(self) -> None:
        if self.reset_every is not None and self.reset_every < 1:
            raise FieldError("reset_every", f"{self.reset_every} is too small: at least 1 step, or null.")
        if self.ema is not None and not 0 < self.ema < 1:
            raise FieldError("ema", f"{self.ema} is not between 0 and 1. 0.99 keeps 99 % of the reference per step.")
        if self.ema is not None and self.reset_every is not None:
            raise FieldError("ema", "contradicts reset_every: the reference would follow two rules. Keep one.")

    @property
    def moves(self) -> bool:
        """Whether the reference changes during the run."""
        return self.reset_every is not None or self.ema is not None


def check_drawn(kl: KLSpec, reference: ReferenceSpec, *, starting_model: str | None = None, lora: bool = False) -> None:
    """FieldError (with dotted fields) where responses drawn once, from the starting policy, are not the reference's."""
    if not kl.is_drawn:
        return
    once = f"cannot go with kl.estimator={REFERENCE_SAMPLES}: its responses are drawn once, from the starting policy"
    for name in ("reset_every", "ema"):
        if (value := getattr(reference, name)) is not None:
            raise FieldError(f"reference.{name}", f"{value} {once}, and the reference would move away from them.")
    if reference.path not in (None, starting_model):
        raise FieldError("reference.path", f"{reference.path!r} {once}, which is another model.")
    if lora:
        raise FieldError("kl.estimator", f"LoRA {once}; there the reference is the base model under the adapter.")


@dataclass(frozen=True, kw_only=True)
class ProbesSpec:
    """Measurements that cost further passes through the models, and change nothing."""

    exact_every: int = 0
    """Steps between measurements of kl_ref/exact_token, the reverse KL over the whole vocabulary; 0: never."""
    temperature_one_every: int = 0
    """Steps between measurements of kl_ref_t1/*, the KL at temperature 1 of a run that has another; 0: never."""

    def __post_init__(self) -> None:
        for name in _fields_of(ProbesSpec):
            if (value := getattr(self, name)) < 0:
                raise FieldError(name, f"{value} is too small: at least 1 step, or 0 for never.")

    def is_due(self, name: str, step: int) -> bool:
        """Whether the measurement that a field says the distance of is made at this step."""
        every = getattr(self, name)
        return bool(every) and step % every == 0


@dataclass(frozen=True, kw_only=True)
class AlarmsSpec:
    """When a run is marked, and by policy stopped (core/alarms.py); null: that alarm is off."""

    kl_above: float | None = None
    """Mean k1 to the reference [nats per token]."""
    kl_below: float | None = None
    """Mean k1 to the reference [nats per token]."""
    k1_negative_z: float | None = 3.0
    """Standard errors below zero of the mean response k1: impossible but by a fault."""
    entropy_floor: float | None = None
    """Token entropy [nats] that neither it nor its linear forecast may fall below."""
    window: int = 20
    """Lines that the forecast is fitted to."""
    horizon: int = 20
    """Steps that it looks ahead."""
    retention_drop: float | None = None
    """Drop of a retained skill's accuracy since the start."""
    warm_up: int = 10
    """First steps, in which only non-finite values raise an alarm."""
    stop: bool = False
    """Whether an alarm ends the run (as failed, with the reason)."""

    def __post_init__(self) -> None:
        if all(value == _default_of(AlarmsSpec, name) for name, value in self.thresholds.items()):
            return
        from klreg_verl.core import alarms

        try:
            alarms.Alarms(**self.thresholds)
        except ValueError as error:
            raise FieldError(_named_in(str(error), self.thresholds, "kl_above"), str(error)) from None

    @property
    def thresholds(self) -> dict[str, Any]:
        """The fields of core.alarms.Alarms."""
        return {name: value for name, value in asdict(self).items() if name != "stop"}
