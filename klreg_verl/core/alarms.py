"""What a run must be watched for: thresholds with units, and a check of its newest line of metrics.

    name            fires when, on the newest line                                        threshold in
    non_finite      a number that a run cannot go on without is NaN, infinite or null     -
    kl_above        kl_ref/k1_token > kl_above                                            nats per token
    kl_below        kl_ref/k1_token < kl_below                                            nats per token
    k1_negative     kl_ref/k1_response < -k1_negative_z * kl_ref/k1_response_se           standard errors
    entropy_floor   entropy/token, or its forecast, < entropy_floor                       nats per token
    retention_drop  a retention/<skill> < its first value - retention_drop                fraction

A threshold of None switches its rule off. Up to step `warm_up` only non_finite fires. A key that the newest line lacks
is not judged on it (retention is not measured at every step); nor is a NaN, which is non_finite's business. Checking
reads numbers and returns alarms; what they lead to (a line in the log, a mark, the end of the run) is the caller's.

KL above 0.2 and below 0.01 are the "warning signs" of document 000, a tutorial among the documents that this project
set out from. It names neither unit nor source; its code takes the mean over tokens, and so does this module. Both are
None here because the right number depends on model and task: an arm without KL goes above, a short run stays below.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Line = Mapping[str, float | None]
"""One line of metrics.jsonl: `step` and any metrics. None stands where JSON has null, which is how NaN is written."""

MUST_BE_FINITE = (
    "train/score",
    "actor/loss",
    "actor/grad_norm",
    "kl/beta",
    "kl/penalty",
    "kl_ref/k1_token",
    "kl_ref/k1_response",
    "kl_ref/k3_token",
    "kl_ref/k3_response",
    "kl_ref/max",
    "kl_rollout/k1_token",
    "entropy/token",
)
"""The keys of non_finite. Others may be NaN in a healthy run: a share of no KL mass, a correlation of equal values."""

RETENTION = "retention/"


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """One rule that fired."""

    name: str
    """As in the table above; the metric is alarm/<name>."""
    message: str
    """What was measured, in which unit, against what, and what to do."""
    value: float
    """What was compared: for entropy_floor the lower of entropy and forecast, for retention_drop the largest drop."""
    threshold: float
    """What it was compared with, in the unit of `value`."""


@dataclass(frozen=True, kw_only=True)
class Alarms:
    """The thresholds. Raises ValueError for one that cannot work, naming it."""

    kl_above: float | None = None
    """Nats per token. KL by k1, mean over all response tokens."""
    kl_below: float | None = None
    """Nats per token."""
    k1_negative_z: float | None = 3.0
    """Standard errors over responses. A KL is never negative, its estimate may be: at a KL of zero 1 step in 740 is
    below -3 by chance, more where the responses to a prompt are alike (the standard error is then too small)."""
    non_finite: bool = True
    entropy_floor: float | None = None
    """Nats per token."""
    window: int = 20
    """Lines with an entropy that its forecast, a straight line by least squares, is fitted to; fewer give none."""
    horizon: int = 20
    """Steps after the newest one that the forecast is made for."""
    retention_drop: float | None = None
    """Fraction of the skill's held-out prompts, 0 to 1: how much of the first accuracy may be lost."""
    warm_up: int = 10
    """The last step at which only non_finite fires."""

    def __post_init__(self) -> None:
        for name, low, high, unit in _LIMITS:
            value = getattr(self, name)
            fine = value is None or (_is_number(value) and low <= value <= high)
            _require(fine, f"alarms.{name}={value!r} cannot work: give {unit}.")
        for name, low in (("window", 3), ("horizon", 1), ("warm_up", 0)):
            value = getattr(self, name)
            fine = isinstance(value, int) and not isinstance(value, bool) and value >= low
            _require(fine, f"alarms.{name}={value!r} cannot work: give a whole number from {low} on.")
        least, most = self.kl_below, self.kl_above
        crossed = f"alarms.kl_below={least!r} is not below alarms.kl_above={most!r}: at any KL one of them would fire."
        _require(least is None or most is None or least < most, crossed)
        _require(isinstance(self.non_finite, bool), f"alarms.non_finite={self.non_finite!r} is neither true nor false.")


_LARGEST = 1e9
_LIMITS = (
    ("kl_above", -_LARGEST, _LARGEST, "a number of nats per token, or null for no such alarm"),
    ("kl_below", -_LARGEST, _LARGEST, "a number of nats per token, or null for no such alarm"),
    ("k1_negative_z", 0.0, _LARGEST, "a number of standard errors, 0 or more, or null for no such alarm"),
    ("entropy_floor", 0.0, _LARGEST, "a number of nats per token, 0 or more, or null for no such alarm"),
    ("retention_drop", 0.0, 1.0, "a fraction from 0 to 1, or null for no such alarm"),
)


def check(alarms: Alarms, history: Sequence[Line]) -> tuple[Alarm, ...]:
    """The rules that fire on the newest, last line of `history`, each at most once; empty for an empty history.

    `history` holds a run's lines in order: all of them for retention_drop (its first line sets the standard), the last
    `window` ones for entropy_floor, the newest for the others. Raises ValueError when the newest line has no step.
    """
    if not history:
        return ()
    step = _value(history[-1], "step")
    _require(math.isfinite(step), f"A line of metrics without its step cannot be judged: {dict(history[-1])!r}.")
    rules = _RULES.values() if step > alarms.warm_up else (_non_finite,)
    return tuple(alarm for rule in rules if (alarm := rule(alarms, history)) is not None)


def _non_finite(alarms: Alarms, history: Sequence[Line]) -> Alarm | None:
    newest = history[-1]
    broken = [key for key in MUST_BE_FINITE if key in newest and not math.isfinite(_value(newest, key))]
    if not alarms.non_finite or not broken:
        return None
    message = (
        f"Not finite: {', '.join(f'{key} = {_value(newest, key)}' for key in broken)}. The weights may be lost: go "
        "back to the last checkpoint; lower the learning rate, clip the gradient, or set kl.cap where k3 is infinite."
    )
    return Alarm(name="non_finite", message=message, value=_value(newest, broken[0]), threshold=math.inf)


def _kl_above(alarms: Alarms, history: Sequence[Line]) -> Alarm | None:
    kl, most = _value(history[-1], "kl_ref/k1_token"), alarms.kl_above
    if most is None or not kl > most:
        return None
    message = (
        f"KL to the reference is {kl:.4g} nats per token (kl_ref/k1_token), above {most:.4g}. The policy drifts: raise "
        "beta or lower the learning rate, and look at retention and at samples."
    )
    return Alarm(name="kl_above", message=message, value=kl, threshold=most)


def _kl_below(alarms: Alarms, history: Sequence[Line]) -> Alarm | None:
    kl, least = _value(history[-1], "kl_ref/k1_token"), alarms.kl_below
    if least is None or not kl < least:
        return None
    message = (
        f"KL to the reference is {kl:.4g} nats per token (kl_ref/k1_token), below {least:.4g}. The policy hardly "
        "moves: lower beta, raise the learning rate, or look whether the rewards within a group differ at all."
    )
    return Alarm(name="kl_below", message=message, value=kl, threshold=least)


def _k1_negative(alarms: Alarms, history: Sequence[Line]) -> Alarm | None:
    kl, error = (_value(history[-1], key) for key in ("kl_ref/k1_response", "kl_ref/k1_response_se"))
    if alarms.k1_negative_z is None or not kl < -alarms.k1_negative_z * error:
        return None
    message = (
        f"Mean k1 is {kl:.4g} nats per response (kl_ref/k1_response) with a standard error of {error:.4g}: below "
        f"-{alarms.k1_negative_z:.4g} standard errors, though a KL is never negative. The samples are not from the "
        "distribution whose log-probs were taken: set top_p=1, top_k=-1, the same temperature for both and no minimum "
        "length, take padding out of the mask, and compare sampler and trainer (kl_rollout/k1_token)."
    )
    return Alarm(name="k1_negative", message=message, value=kl, threshold=-alarms.k1_negative_z * error)


def _entropy_floor(alarms: Alarms, history: Sequence[Line]) -> Alarm | None:
    now, floor = _value(history[-1], "entropy/token"), alarms.entropy_floor
    if floor is None or math.isnan(now):
        return None
    ahead = _forecast(alarms, history)
    if not min(now, ahead) < floor:
        return None
    coming = f"and {ahead:.4g} in {alarms.horizon} steps by the line through the last {alarms.window} values"
    message = (
        f"Entropy is {now:.4g} nats per token (entropy/token){'' if ahead == now else ', ' + coming}; the floor is "
        f"{floor:.4g}. The policy is about to stop exploring: raise beta or the sampling temperature, lower the "
        "learning rate, or stop here and keep this checkpoint."
    )
    return Alarm(name="entropy_floor", message=message, value=min(now, ahead), threshold=floor)


def _forecast(alarms: Alarms, history: Sequence[Line]) -> float:
    """Entropy `horizon` steps after the newest line, by least squares; the newest one where the window is not full."""
    points: list[tuple[float, float]] = []
    for line in reversed(history):
        if len(points) == alarms.window:
            break
        step, entropy = _value(line, "step"), _value(line, "entropy/token")
        points += [(step, entropy)] if math.isfinite(step) and math.isfinite(entropy) else []
    if len(points) < alarms.window:
        return points[0][1] if points else math.nan
    steps, entropies = np.array(points, dtype=np.float64).T
    centred = steps - steps.mean()
    slope = (centred * entropies).sum() / np.square(centred).sum()
    return float(entropies.mean() + slope * (steps[0] + alarms.horizon - steps.mean()))


def _retention_drop(alarms: Alarms, history: Sequence[Line]) -> Alarm | None:
    most = alarms.retention_drop
    if most is None:
        return None
    newest = {key: _value(history[-1], key) for key in history[-1] if key.startswith(RETENTION)}
    before = {key: _first(key, history) for key in newest}
    lost = {key: before[key] - now for key, now in newest.items() if before[key] - now > most}
    if not lost:
        return None
    told = ", ".join(f"{key} from {before[key]:.4g} to {newest[key]:.4g}" for key in lost)
    message = (
        f"Held-out accuracy fell by more than {most:.4g} (fraction): {told}. The policy forgets: raise beta, lower the "
        "learning rate, or go back to an earlier checkpoint."
    )
    return Alarm(name="retention_drop", message=message, value=max(lost.values()), threshold=most)


def _first(key: str, history: Sequence[Line]) -> float:
    """The first finite value of `key`; NaN when there is none."""
    values = (_value(line, key) for line in history)
    return next((value for value in values if math.isfinite(value)), math.nan)


_RULES: dict[str, Callable[[Alarms, Sequence[Line]], Alarm | None]] = {
    "non_finite": _non_finite,
    "kl_above": _kl_above,
    "kl_below": _kl_below,
    "k1_negative": _k1_negative,
    "entropy_floor": _entropy_floor,
    "retention_drop": _retention_drop,
}


def _value(line: Line, key: str) -> float:
    """NaN where the key is absent or null: every comparison with it is False."""
    value = line.get(key)
    return math.nan if value is None else float(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require(fine: bool, message: str) -> None:
    if not fine:
        raise ValueError(message)
