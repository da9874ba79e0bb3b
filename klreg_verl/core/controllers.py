"""What moves beta, the coefficient of the KL term, from one update to the next; for every placement alike.

A controller is frozen. What changes is a BetaState, which is saved with every checkpoint and restored to the last bit:

    state = rule.start(beta)            # the beta of update 1
    state = rule.after(state, seen)     # after update s: the beta of update s + 1

`seen` was measured on the batch that was sampled *before* update s, so at s = 1 it is the starting policy.

    kind            beta of update s + 1                                            reads     source
    fixed           beta                                                            -
    verl_adaptive   beta * (1 + clip(KL / target - 1, -0.2, 0.2) * B / horizon)     KL        Ziegler et al. 2019
    multiplicative  * raise_by above the band, * lower_by below it, else beta       KL        documents 000 and 002
    dynamic         * decay where score > threshold; beta_min from s >= N on        score     document 003
    linear          start + (end - start) * s / N                                   step
    exponential     start * (end / start)^(s / N)                                   step      announced in document 003
    cosine          end + (start - end) * (1 + cos(pi s / N)) / 2                   step
    matched_kl      exp(I + proportional * e), I += gain * e, e = KL / target - 1   KL        textbook PI in log beta

(B responses in the batch, N steps, e clipped to [-1, 1].) The three documents are those that this project set out from:
000 a tutorial on KL in GRPO, 002 a note on KL in policy optimization, 003 an "adaptive KL" extension of GRPO. What is
wrong with their rules stands in the docstrings below.

Which KL: `signal` is "token" (k1, mean over all response tokens, nats per token) or "response" (k1 summed over each
response, mean over responses, nats per response). The sources leave this open, and their targets mean something else in
each: at 1000 tokens a response the two differ by a factor of 1000. A target must be given in the unit of the signal.

A signal that is NaN or infinite says nothing: a rule that reads it leaves beta, memory and `saturated` as they were.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, ClassVar

SIGNALS = ("token", "response")


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What a controller may read about one step; measured on the batch sampled before update `step`."""

    kl_token: float
    """Reverse KL to the reference by k1, mean over all response tokens, nats per token (kl_ref/k1_token)."""
    kl_response: float
    """The same summed over each response, mean over responses, nats per response (kl_ref/k1_response)."""
    score: float
    """Mean score of the task before any KL (train/score)."""
    responses: int
    """How many responses the batch has, padding rows not counted."""
    step: int
    """The update, counted from 1."""

    def __post_init__(self) -> None:
        _require(self.step >= 1, f"Observation.step={self.step}: updates are counted from 1.")
        _require(self.responses >= 1, f"Observation.responses={self.responses}: a batch has at least one response.")


@dataclass(frozen=True, kw_only=True)
class BetaState:
    """The beta in force and what its rule remembers; all that a checkpoint needs of a controller."""

    beta: float
    """Coefficient of the KL term, reward per nat."""
    memory: tuple[float, ...] = ()
    """The rule's own numbers; how many and what they are is said where the rule is."""
    saturated: bool = False
    """The rule asked for a beta outside its bounds at the last step, so it does not hold what it should."""

    def to_json(self) -> dict[str, Any]:
        """JSON values with every float in hexadecimal (float.hex): nothing is rounded."""
        return {
            "beta": float(self.beta).hex(),
            "memory": [float(number).hex() for number in self.memory],
            "saturated": self.saturated,
        }

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "BetaState":
        """The inverse of to_json, to the last bit. Raises ValueError when `values` are not from there."""
        try:
            beta, *memory = (float.fromhex(text) for text in [values["beta"], *values["memory"]])
            fine = math.isfinite(beta) and beta >= 0 and all(map(math.isfinite, memory))
            fine = fine and isinstance(values["memory"], list | tuple) and isinstance(values["saturated"], bool)
        except (KeyError, TypeError, ValueError, OverflowError) as problem:
            raise ValueError(f"Not a saved beta state ({type(problem).__name__}: {problem}): {values!r}.") from problem
        _require(fine, f"Not a saved beta state (a number that cannot be, or a value of another type): {values!r}.")
        return BetaState(beta=beta, memory=tuple(memory), saturated=values["saturated"])


@dataclass(frozen=True, kw_only=True)
class Controller:
    """The base: bounds, the watched KL, and saturation. A kind fills in `_propose` and, where it remembers, `_begin`.

    Raises ValueError where a number is impossible; the message names the kind, the parameter and a way out.
    """

    kind: ClassVar[str] = ""
    reads_kl: ClassVar[bool] = False
    """Whether the rule moves beta by the watched KL."""
    multiplies: ClassVar[bool] = False
    """Whether the rule moves beta by factors, so that it can never leave 0."""
    remembers: ClassVar[int] = 0
    """How many numbers the memory holds."""

    signal: str = "token"
    """Which KL is watched: "token" or "response". A kind that reads no KL accepts it and is not moved by it."""
    beta_min: float = 0.0
    beta_max: float = math.inf

    def __post_init__(self) -> None:
        self._require(self.signal in SIGNALS, "signal", f"choose one of {', '.join(SIGNALS)}")
        self._require_number("beta_min")
        self._require(self.beta_min >= 0, "beta_min", "a negative beta would reward drift; give 0 or more")
        self._require(_is_number(self.beta_max), "beta_max", "give a number, or leave it out for no upper bound")
        reachable = self.beta_max >= self.beta_min and self.beta_max > 0
        self._require(reachable, "beta_max", f"no beta above 0 lies between beta_min={self.beta_min!r} and this")

    def start(self, beta: float) -> BetaState:
        """The state of update 1, with exactly `beta` (reward per nat).

        Raises ValueError when beta is outside [beta_min, beta_max], or 0 under a rule that multiplies it.
        """
        fine = _is_number(beta) and math.isfinite(beta) and self.beta_min <= beta <= self.beta_max
        bounds = f"[{self.beta_min!r}, {self.beta_max!r}]"
        _require(fine, f"{self.kind}: the first beta, {beta!r}, is not a number in {bounds}. Move it or the bounds.")
        stuck = f"{self.kind} multiplies beta, and 0 stays 0. Start from a small beta above 0, or use kind fixed."
        _require(beta > 0 or not self.multiplies, stuck)
        return BetaState(beta=float(beta), memory=self._begin(float(beta)))

    def after(self, state: BetaState, seen: Observation) -> BetaState:
        """The state of update `seen.step` + 1. The only place where beta is bounded and saturation is decided.

        Raises ValueError when the state's memory is not one of this kind.
        """
        held = len(state.memory)
        strange = f"{self.kind} remembers {self.remembers} numbers, the state holds {held}: is it of another kind?"
        _require(held == self.remembers, strange)
        if self.reads_kl and not math.isfinite(self.watched(seen)):
            return state
        wanted = self._propose(state, seen)
        beta = _clip(float(wanted.beta), self.beta_min, min(self.beta_max, sys.float_info.max))
        return wanted if wanted is state else replace(wanted, beta=beta, saturated=beta != wanted.beta)

    def watched(self, seen: Observation) -> float:
        """The KL that `signal` names, in nats per token or per response."""
        return seen.kl_token if self.signal == "token" else seen.kl_response

    def _begin(self, beta: float) -> tuple[float, ...]:
        return ()

    def _propose(self, state: BetaState, seen: Observation) -> BetaState:
        """The next state before it is bounded; `state` itself where the rule does not act."""
        raise NotImplementedError

    def _require(self, fine: bool, name: str, advice: str) -> None:
        _require(fine, f"{self.kind}: {name}={getattr(self, name)!r} cannot work: {advice}.")

    def _require_number(self, *names: str) -> None:
        for name in names:
            number = getattr(self, name)
            self._require(_is_number(number) and math.isfinite(number), name, "give a finite number")

    def _require_target(self, target: float) -> None:
        self._require_number("target")
        advice = f"give a KL above 0, in nats per {self.signal}, below what the policy reaches without a penalty"
        self._require(target > 0, "target", advice)

    def _require_count(self, name: str) -> None:
        count = getattr(self, name)
        self._require(_is_number(count) and count == int(count) and count >= 1, name, "give a whole number from 1 on")


@dataclass(frozen=True, kw_only=True)
class Fixed(Controller):
    """Beta stays what it was."""

    kind: ClassVar[str] = "fixed"

    def _propose(self, state: BetaState, seen: Observation) -> BetaState:
        return state


@dataclass(frozen=True, kw_only=True)
class VerlAdaptive(Controller):
    """beta *= 1 + clip(KL / target - 1, -0.2, 0.2) * responses / horizon.

    Source: Ziegler et al. (2019), arXiv:1909.08593, section 2.2 (a constant 0.1 in place of responses / horizon, which
    comes from their code); verl's AdaptiveKLController computes the same bits.
    What to know: the step is slow, at most 0.2 * responses / horizon (1024 responses: 2 % an update). verl feeds it the
    mean over *rows*, padding rows included, of each row's token mean of whatever estimator is charged; ours watches k1
    without padding, so a target carries over only approximately. verl loses the state on resume, offers it for KL in
    the reward only and has no bounds. From responses = 5 * horizon on beta would turn zero or negative: refused.
    """

    kind: ClassVar[str] = "verl_adaptive"
    reads_kl: ClassVar[bool] = True
    multiplies: ClassVar[bool] = True

    target: float
    """Of the watched KL, nats per token or per response; verl's default is 0.1 (kl_ctrl.target_kl)."""
    horizon: float = 10000
    """Responses over which an error of 20 % or more moves beta by 20 % (to first order)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_target(self.target)
        self._require_number("horizon")
        self._require(self.horizon > 0, "horizon", "give the number of responses, above 0")

    def _propose(self, state: BetaState, seen: Observation) -> BetaState:
        negative = f"{seen.responses} responses a batch let beta fall to 0 or below: raise it above responses / 5"
        self._require(0.2 * seen.responses < self.horizon, "horizon", negative)
        error = _clip(self.watched(seen) / self.target - 1, -0.2, 0.2)
        return replace(state, beta=state.beta * (1 + error * seen.responses / self.horizon))


@dataclass(frozen=True, kw_only=True)
class Multiplicative(Controller):
    """beta *= raise_by where KL > upper * target, *= lower_by where KL < lower * target, unchanged between.

    Source: document 000 (factors 1.5 and 0.75, the defaults here, with a target of 0.05) and document 002 (factors 1.1
    and 0.9); both have the band from 0.5 to 1.5 targets. What is wrong there: neither says which KL (token or response)
    nor how often the rule is applied; neither bounds beta, so it grows or falls without end where the target is out of
    reach (give beta_min and beta_max, and look at `saturated`); 000's function changes a name that it is not given and
    stores nothing, so called as written it forgets every change. Neither holds its *target*: within the band nothing
    happens. And KL answers late: before it does, ten updates above the band have multiplied beta by 58 (000) or 2.6
    (002), so 000's factors overshoot. One step up and one down leave 1.125 (000) or 0.99 (002) of beta, not 1.
    """

    kind: ClassVar[str] = "multiplicative"
    reads_kl: ClassVar[bool] = True
    multiplies: ClassVar[bool] = True

    target: float
    """Of the watched KL, nats per token or per response."""
    raise_by: float = 1.5
    lower_by: float = 0.75
    upper: float = 1.5
    """The band's upper end, in targets."""
    lower: float = 0.5
    """The band's lower end, in targets."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_target(self.target)
        self._require_number("raise_by", "lower_by", "upper", "lower")
        self._require(self.raise_by > 1, "raise_by", "it must raise beta where the KL is high; give a factor above 1")
        self._require(0 < self.lower_by < 1, "lower_by", "it must lower beta; give a factor between 0 and 1")
        self._require(self.upper >= 1, "upper", "the target would lie outside its band; give 1 or more")
        self._require(0 <= self.lower <= 1, "lower", "the target would lie outside its band; give 0 to 1")

    def _propose(self, state: BetaState, seen: Observation) -> BetaState:
        kl = self.watched(seen)
        if self.lower * self.target <= kl <= self.upper * self.target:
            return replace(state, beta=state.beta)
        factor = self.raise_by if kl > self.upper * self.target else self.lower_by
        # From a beta that rounds to 0 no factor would lead back.
        return replace(state, beta=max(state.beta * factor, sys.float_info.min))


@dataclass(frozen=True, kw_only=True)
class Dynamic(Controller):
    """beta *= decay after every batch with score > reward_threshold, not below beta_min; beta_min after schedule_steps.

    Updates 1 to schedule_steps may use more than beta_min, update schedule_steps + 1 and later use exactly beta_min.

    Source: document 003 ("dynamic beta scheduling": decay 0.9, threshold 0.8, beta_min 0.0, 1000 steps; its example has
    threshold 0.7, beta_min 0.001, 500 steps). What is wrong there: it reads no KL at all; the leash is let go exactly
    when the score is high, where over-optimization is to be feared; it only ever falls (22 batches above the threshold
    leave a tenth, and a score that drops again gives nothing back); the threshold is in the units of one task's score;
    "after N steps" leaves open which update is the first (here N + 1); and with its beta_min of 0 a beta that was still
    in force vanishes at once there. That it keeps responses from growing is claimed, not shown.
    """

    kind: ClassVar[str] = "dynamic"
    multiplies: ClassVar[bool] = True

    decay: float = 0.9
    reward_threshold: float = 0.8
    """In units of the task's mean score, before any KL."""
    schedule_steps: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_number("decay", "reward_threshold")
        self._require(0 < self.decay <= 1, "decay", "it must lower beta; give a factor above 0 and at most 1")
        self._require_count("schedule_steps")

    def _propose(self, state: BetaState, seen: Observation) -> BetaState:
        if seen.step >= self.schedule_steps:
            return replace(state, beta=self.beta_min)
        if not seen.score > self.reward_threshold:  # also where the score is NaN
            return state
        return replace(state, beta=max(state.beta * self.decay, self.beta_min))


@dataclass(frozen=True, kw_only=True)
class _Schedule(Controller):
    """Beta as a function of the step alone: the first beta in update 1, exactly beta_end from update steps + 1 on.

    Remembers the first beta, so that nothing accumulates: the beta of a step is the same however one got there.
    """

    remembers: ClassVar[int] = 1

    beta_end: float
    """Reward per nat."""
    steps: int
    """Updates after which beta_end is reached."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_number("beta_end")
        bounds = f"[{self.beta_min!r}, {self.beta_max!r}]"
        within = self.beta_min <= self.beta_end <= self.beta_max
        self._require(within, "beta_end", f"it is outside {bounds}; move it or the bounds")
        self._require_count("steps")

    def _begin(self, beta: float) -> tuple[float, ...]:
        return (beta,)

    def _propose(self, state: BetaState, seen: Observation) -> BetaState:
        if seen.step >= self.steps:
            return replace(state, beta=float(self.beta_end))
        (first,) = state.memory
        return replace(state, beta=self._between(first, seen.step / self.steps))

    def _between(self, first: float, progress: float) -> float:
        """Beta where `progress`, above 0 and below 1, of the steps are done."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Linear(_Schedule):
    """first + (beta_end - first) * s / steps after s updates."""

    kind: ClassVar[str] = "linear"

    def _between(self, first: float, progress: float) -> float:
        return first + (self.beta_end - first) * progress


@dataclass(frozen=True, kw_only=True)
class Exponential(_Schedule):
    """first * (beta_end / first)^(s / steps) after s updates: the same factor every update; both ends above 0.

    Document 003 announces "exponential decay" without a formula.
    """

    kind: ClassVar[str] = "exponential"
    multiplies: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.beta_end > 0, "beta_end", "no factor leads to 0; give a small beta above 0, or use linear")

    def _between(self, first: float, progress: float) -> float:
        return first * (self.beta_end / first) ** progress


@dataclass(frozen=True, kw_only=True)
class Cosine(_Schedule):
    """beta_end + (first - beta_end) * (1 + cos(pi s / steps)) / 2 after s updates: flat at both ends."""

    kind: ClassVar[str] = "cosine"

    def _between(self, first: float, progress: float) -> float:
        return self.beta_end + (first - self.beta_end) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True)
class MatchedKL(Controller):
    """Holds the response-summed k1 to the reference at `target`, so that arms can be compared at equal KL.

    The signal is the same in every arm whatever its estimator and placement, nats per response; "token" is refused.
    With e = clip(KL / target - 1, -1, 1), after every update

        I    += gain * e                                  the memory; starts as log(first beta)
        beta  = exp(I + proportional * e)

    The error is linear in KL, so at rest the *mean* of KL is the target and noise within the clip does not shift it
    (log KL would; and k1 may be negative). The proportional part damps: KL answers to beta over tens of updates, and a
    bare integral overshoots. Where KL tends to c / beta with a time constant of 1 to 30 updates, the defaults
    hold it within 20 % of the target from update 80 on (simulated in the tests). Where KL falls like 1 / beta^2 or
    faster, and at once, lower `proportional`.

    Anti-windup by clamping: I never leaves [log beta_min, log beta_max], so a target that was out of reach for long
    costs no time once it is in reach. Both bounds must therefore be above 0 and finite. While beta sits on a bound and
    the error still pushes outwards, `saturated` is True. At beta_min that means that the policy does not reach the
    target even without a penalty (the target must lie below the KL of an arm without KL): such an arm is not at equal
    KL. Early in a run every arm is saturated or below target, since KL starts at 0.

    Source: PI control with anti-windup by clamping (Astrom and Hagglund, PID Controllers, 1995, chapter 3), in log beta
    because beta spans orders of magnitude and must stay above 0.
    """

    kind: ClassVar[str] = "matched_kl"
    reads_kl: ClassVar[bool] = True
    multiplies: ClassVar[bool] = True
    remembers: ClassVar[int] = 1

    target: float
    """Of the response-summed k1, nats per response."""
    gain: float = 0.05
    """Change of log beta per update at an error of 1, summed up."""
    proportional: float = 0.5
    """Change of log beta at an error of 1, while it lasts."""
    signal: str = "response"
    beta_min: float = 1e-6
    beta_max: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.signal == "response", "signal", "arms are matched by the response-summed k1; leave it out")
        self._require_target(self.target)
        self._require_number("gain", "proportional", "beta_max")
        self._require(self.beta_min > 0, "beta_min", "the rule moves log beta; give a small beta above 0")
        self._require(self.gain > 0, "gain", "without it nothing leads back to the target; give e.g. 0.05")
        self._require(self.proportional >= 0, "proportional", "it would push away from the target; give 0 or more")

    def _begin(self, beta: float) -> tuple[float, ...]:
        return (math.log(beta),)

    def _propose(self, state: BetaState, seen: Observation) -> BetaState:
        low, high = math.log(self.beta_min), math.log(self.beta_max)
        error = _clip(self.watched(seen) / self.target - 1, -1.0, 1.0)
        integral = state.memory[0] + self.gain * error
        log_beta = integral + self.proportional * error
        beta = math.exp(log_beta)
        if low <= log_beta <= high:  # exp may round across a bound, which is not saturation
            beta = _clip(beta, self.beta_min, self.beta_max)
        return replace(state, beta=beta, memory=(_clip(integral, low, high),))


KINDS: dict[str, type[Controller]] = {
    rule.kind: rule for rule in (Fixed, VerlAdaptive, Multiplicative, Dynamic, Linear, Exponential, Cosine, MatchedKL)
}


def parameters(kind: str) -> tuple[str, ...]:
    """The names of the parameters that `kind` reads, its own first; ValueError when there is no such kind."""
    if kind not in KINDS:
        near = get_close_matches(kind, KINDS, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"There is no controller {kind!r}.{hint} Known controllers: {', '.join(KINDS)}.")
    shared = [field.name for field in fields(Controller)]
    return (*(field.name for field in fields(KINDS[kind]) if field.name not in shared), *shared)


def controller(kind: str, **given: Any) -> Controller:
    """The controller `kind` with the parameters given; what is not given has the kind's default.

    Raises ValueError when there is no such kind, when it does not read a parameter or lacks one, and when a number is
    impossible.
    """
    known = parameters(kind)
    strange = [name for name in given if name not in known]
    _require(not strange, f"{kind} does not read {', '.join(strange)}. Its parameters: {', '.join(known)}.")
    needed = [field.name for field in fields(KINDS[kind]) if field.default is MISSING]
    missing = [name for name in needed if name not in given]
    _require(not missing, f"{kind} needs {', '.join(missing)}. Its parameters: {', '.join(known)}.")
    return KINDS[kind](**given)


def _require(fine: bool, message: str) -> None:
    if not fine:
        raise ValueError(message)


def _is_number(value: object) -> bool:
    """An int or a float that is not NaN; a bool is neither."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
