"""Per-token divergence estimators between the policy pi and the frozen reference pi_ref.

Every function maps log-probabilities of *sampled* tokens, shape (B, T), in nats, to (B, T). Write s = grad log pi(y_t),
d = logprobs - ref_logprobs, r = exp(-d) = pi_ref / pi; reverse is KL(pi || pi_ref), forward is KL(pi_ref || pi).
Expectations are over one token y_t ~ pi(. | prefix), the prefix fixed.

    name     value            E[value]         coefficient    in the loss:        charge       in the reward:
                                                              E[coefficient s]                 E[charge s]
    k1       d                reverse          1              0                   d            grad reverse
    k2       d^2 / 2          no divergence    d              grad reverse        value        biased
    k3       r - 1 + d        reverse          1 - r          grad forward        value        grad (reverse - forward)
    abs      |d|              no divergence    sign d         2 grad tv           value        biased
    forward  r log r - r + 1  forward          1 - r          grad forward        coefficient  grad forward
    js       (1)              js               -log(m) / 2    grad js             coefficient  grad js       (2)
    chi2     (r - 1)^2        chi2             1 - r^2        grad chi2           coefficient  grad chi2     (2)
    tv       |r - 1| / 2      tv               sign(d) / 2    grad tv             coefficient  grad tv       (2)
    k3_verl  k3, clamped (3)  below reverse    1 - r or 0     biased              value        biased

(1) [r log r - (1 + r) log m] / 2 with m = (1 + r) / 2. js is the mean of the KLs of pi and pi_ref to their mixture;
    chi2 is E_ref[r] - 1, that is chi2(pi_ref || pi); tv is half the sum of |pi - pi_ref|.
(2) With credit "token" only. Of the four charges that are a coefficient, only forward's has mean zero: the others' are
    KL(pi || mixture) / 2, -chi2 and (pi(d > 0) - pi(d < 0)) / 2. Summed over a response, a later token's mean charge
    steers the earlier tokens, and it is not the later token's divergence (for chi2 it is the opposite of it).
(3) verl 0.9.1's k3, for parity: -d clamped to +-20, the value to +-10. No gradient outside: where d > 11, and where
    r > 13.61, which are the tokens that the policy has lost.

The value is what is logged; the coefficient is the factor on s that a KL loss back-propagates; the charge is what a
penalty in the reward takes off. They are separate columns because a good value may have a wrong gradient: for k1, k2,
k3 and abs the coefficient is the value's derivative in d; for a divergence E[f(r)] (forward, js, chi2, tv), whose
sampling depends on pi too, it is f - r f'. klreg_verl.core.exact has the divergences over the whole vocabulary.

Numbers: bfloat16 and float16 inputs are subtracted in float32 (exact for them; what half precision already lost stays
lost). Values that cancel near d = 0 are computed in float64, derivative included. Nothing but k3_verl is clamped
unless `cap` says so: what grows as r is inf in float32 below about d = -88.7 (forward's value -84.3, chi2 -44.4).

Sources: Schulman (2020), http://joschu.net/blog/kl-approx.html (values); Tang and Munos (2025), arXiv:2506.09477, and
Liu et al. (2025), arXiv:2510.01555 (gradients); Go et al. (2023), arXiv:2302.08215 (f-divergences).
klreg_verl.doctor checks the table by enumeration.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import wraps
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

OfLogRatio = Callable[[Tensor], Tensor]
_COLUMNS = ("value", "coefficient", "reward_charge")


@dataclass(frozen=True, kw_only=True)
class Estimator:
    """One row of the table above: three functions of the log-ratio d, each (B, T) -> (B, T)."""

    value: OfLogRatio
    coefficient: OfLogRatio
    reward_charge: OfLogRatio


def _in_float64(formula: OfLogRatio) -> OfLogRatio:
    """Near d = 0 these cancel to d^2: in float32 no digit of the value, and few of its derivative, would be left."""

    @wraps(formula)
    def of_log_ratio(log_ratio: Tensor) -> Tensor:
        """`formula` in float64, given back in the type of `log_ratio`."""
        return formula(log_ratio.double()).to(log_ratio.dtype)

    return of_log_ratio


def _itself(log_ratio: Tensor) -> Tensor:
    return log_ratio


def _half_square(log_ratio: Tensor) -> Tensor:
    return 0.5 * log_ratio.square()


def _excess_ratio(log_ratio: Tensor) -> Tensor:
    """r - 1; expm1 and not exp(-d) - 1, which loses the digits of a small difference."""
    return torch.expm1(-log_ratio)


def _one_minus_ratio(log_ratio: Tensor) -> Tensor:
    return -_excess_ratio(log_ratio)


@_in_float64
def _k3(log_ratio: Tensor) -> Tensor:
    return _excess_ratio(log_ratio) + log_ratio


@_in_float64
def _forward(log_ratio: Tensor) -> Tensor:
    """r log r - r + 1 = -d - (1 + d) (r - 1), which is never inf - inf; 1 where the reference excludes the token."""
    value = -log_ratio - (1 + log_ratio) * _excess_ratio(log_ratio)
    return torch.where(log_ratio == torch.inf, 1.0, value)


def _log_two_over_one_plus(size: Tensor) -> Tensor:
    """log(2 / (1 + exp(-size))), between 0 and log 2 for size >= 0."""
    return -torch.log1p(0.5 * torch.expm1(-size))


@_in_float64
def _js(log_ratio: Tensor) -> Tensor:
    """f(r) = r f(1 / r), so that the formula is needed for d >= 0 alone, where nothing overflows.

    log(2) / 2 where the reference excludes the token: size exp(-size) goes to 0.
    """
    size = log_ratio.abs()
    inverse = torch.exp(-size)
    steep = torch.where(size == torch.inf, 0.0, size * inverse)
    above = 0.5 * ((1 + inverse) * _log_two_over_one_plus(size) - steep)
    return torch.exp(torch.relu(-log_ratio)) * above


def _js_coefficient(log_ratio: Tensor) -> Tensor:
    """log(2 / (1 + r)) / 2; where r > 1 that is [log(2 / (1 + 1 / r)) - log r] / 2, which does not overflow."""
    return 0.5 * (_log_two_over_one_plus(log_ratio.abs()) - torch.relu(-log_ratio))


def _chi2(log_ratio: Tensor) -> Tensor:
    return _excess_ratio(log_ratio).square()


def _chi2_coefficient(log_ratio: Tensor) -> Tensor:
    return _one_minus_ratio(2 * log_ratio)


def _tv(log_ratio: Tensor) -> Tensor:
    return 0.5 * _excess_ratio(log_ratio).abs()


def _tv_coefficient(log_ratio: Tensor) -> Tensor:
    return 0.5 * torch.sign(log_ratio)


def _k3_verl(log_ratio: Tensor) -> Tensor:
    """The operations of verl.trainer.ppo.core_algos.kl_penalty_forward in their order, so that every bit agrees."""
    negative = torch.clamp(-log_ratio, min=-20, max=20)
    return torch.clamp(torch.exp(negative) - negative - 1, min=-10, max=10)


def _k3_verl_coefficient(log_ratio: Tensor) -> Tensor:
    """The derivative that autograd finds of it, bit for bit; NaN stays NaN."""
    outside = (log_ratio.abs() > 20) | (torch.exp(-log_ratio) + log_ratio - 1 > 10)
    return torch.where(outside, 0.0, 1 - torch.exp(-log_ratio))


def _divergence(value: OfLogRatio, coefficient: OfLogRatio) -> Estimator:
    """A row for E[f(r)]: its coefficient is charged, since charging f itself would not follow it."""
    return Estimator(value=value, coefficient=coefficient, reward_charge=coefficient)


_ESTIMATORS: dict[str, Estimator] = {
    "k1": Estimator(value=_itself, coefficient=torch.ones_like, reward_charge=_itself),
    "k2": Estimator(value=_half_square, coefficient=_itself, reward_charge=_half_square),
    "k3": Estimator(value=_k3, coefficient=_one_minus_ratio, reward_charge=_k3),
    "abs": Estimator(value=torch.abs, coefficient=torch.sign, reward_charge=torch.abs),
    "forward": _divergence(_forward, _one_minus_ratio),
    "js": _divergence(_js, _js_coefficient),
    "chi2": _divergence(_chi2, _chi2_coefficient),
    "tv": _divergence(_tv, _tv_coefficient),
    "k3_verl": Estimator(value=_k3_verl, coefficient=_k3_verl_coefficient, reward_charge=_k3_verl),
}


def names() -> tuple[str, ...]:
    """The names of the built-in estimators, in the order of the table."""
    return tuple(_ESTIMATORS)


def estimator(name: str) -> Estimator:
    """The row called `name`, or the user's own when `name` is "pkg.module:name".

    A user's own is an `Estimator`, or any object with callables value(d) and coefficient(d), each (B, T) -> (B, T), and
    optionally reward_charge(d); where that is absent the coefficient is charged. ValueError says what is missing.
    """
    if ":" in name:
        return _users_own(name)
    if name not in _ESTIMATORS:
        near = get_close_matches(name, _ESTIMATORS, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"There is no KL estimator {name!r}.{hint} Known estimators: {', '.join(names())}. One of your own is "
            "written pkg.module:name."
        )
    return _ESTIMATORS[name]


def log_ratio(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d = logprobs - ref_logprobs in nats, (B, T), in float32 or wider whatever comes in."""
    if logprobs.shape != ref_logprobs.shape:
        raise ValueError(
            f"Policy log-probs have shape {tuple(logprobs.shape)}, reference log-probs {tuple(ref_logprobs.shape)}. "
            "Both must hold one number for the same sampled token."
        )
    wide = torch.promote_types(torch.promote_types(logprobs.dtype, ref_logprobs.dtype), torch.float32)
    return logprobs.to(wide) - ref_logprobs.to(wide)


def value(name: str, logprobs: Tensor, ref_logprobs: Tensor, *, cap: float | None = None) -> Tensor:
    """The estimate of the divergence at each token, (B, T) in nats: what is logged.

    With `cap`, in nats, d is limited to +-cap first; ValueError unless it is positive.
    """
    return estimator(name).value(_capped(log_ratio(logprobs, ref_logprobs), cap))


def coefficient(name: str, logprobs: Tensor, ref_logprobs: Tensor, *, cap: float | None = None) -> Tensor:
    """The factor c on grad log pi of each token when the estimator is a loss, (B, T).

    With `cap` it is 0 where |d| > cap: a constant has no gradient, so a cap lets go of the tokens that drifted most.
    """
    difference = log_ratio(logprobs, ref_logprobs)
    factor = estimator(name).coefficient(_capped(difference, cap))
    return factor if cap is None else torch.where(difference.abs() > cap, 0.0, factor)


def reward_charge(name: str, logprobs: Tensor, ref_logprobs: Tensor, *, cap: float | None = None) -> Tensor:
    """What each token costs when the estimator is charged to the reward, (B, T) in nats, before beta.

    With `cap`, in nats, it is that of d limited to +-cap: bounded, and not 0 where the cap was hit.
    """
    return estimator(name).reward_charge(_capped(log_ratio(logprobs, ref_logprobs), cap))


def cap_hits(logprobs: Tensor, ref_logprobs: Tensor, cap: float) -> Tensor:
    """Where |d| > cap, (B, T) bool. Over the unmasked tokens its mean is the share that a cap changes."""
    _check_cap(cap)
    return log_ratio(logprobs, ref_logprobs).abs() > cap


def _capped(difference: Tensor, cap: float | None) -> Tensor:
    if cap is None:
        return difference
    _check_cap(cap)
    return difference.clamp(min=-cap, max=cap)


def _check_cap(cap: float) -> None:
    if math.isnan(cap) or cap <= 0:
        raise ValueError(f"A cap of {cap} nats on |log pi - log pi_ref| leaves nothing. Give a positive one, or None.")


def _users_own(name: str) -> Estimator:
    module_name, _, attribute = name.partition(":")
    try:
        module = import_module(module_name)
    except (ImportError, TypeError, ValueError) as error:
        raise ValueError(
            f"KL estimator {name!r}: the module {module_name!r} cannot be imported ({error}). Write pkg.module:name, "
            "and have its folder on PYTHONPATH."
        ) from error
    if not hasattr(module, attribute):
        where = f"the module {module_name!r} has no {attribute!r} in {module.__file__}"
        raise ValueError(f"KL estimator {name!r}: {where}.")
    return _from_object(name, getattr(module, attribute))


def _from_object(name: str, given: object) -> Estimator:
    found: dict[str, Any] = {column: getattr(given, column, None) for column in _COLUMNS}
    found["reward_charge"] = found["reward_charge"] or found["coefficient"]
    missing = [column for column, function in found.items() if not callable(function)]
    if missing or isinstance(given, type):
        lacks = f"has no callable {' and no callable '.join(missing)}" if missing else "is a class, not an object"
        raise ValueError(
            f"KL estimator {name!r} {lacks}. It must be an Estimator, or an object with functions value(d) and "
            "coefficient(d) of the log-ratio, and optionally reward_charge(d)."
        )
    return Estimator(**{column: _shape_kept(f"{name}.{column}", found[column]) for column in found})


def _shape_kept(name: str, function: OfLogRatio) -> OfLogRatio:
    """A mean or a scalar would broadcast over the tokens and be taken for one number each."""

    def checked(log_ratio: Tensor) -> Tensor:
        """`function`, refused where it does not give one number per token."""
        result = function(log_ratio)
        if not isinstance(result, Tensor) or result.shape != log_ratio.shape:
            what = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(f"{name} returned {what} for log-ratios of shape {tuple(log_ratio.shape)}.")
        return result

    return checked
