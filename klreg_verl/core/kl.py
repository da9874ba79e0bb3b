"""Per-token KL estimators between the policy pi and the frozen reference pi_ref.

Every function maps log-probabilities of *sampled* tokens, shape (B, T), in nats, to (B, T). Write s = grad log pi(y_t),
d = logprobs - ref_logprobs, r = exp(-d) = pi_ref / pi. Expectations are over y_t ~ pi(. | prefix), the prefix fixed.

    name  value      E[value]           in the loss: E[coefficient * s]     in the reward: E[charge * s]
    k1    d          KL(pi || pi_ref)   coefficient 1:      0               charge d:      grad KL(pi || pi_ref)
    k2    d^2 / 2    not a KL           coefficient d:      grad KL(pi || pi_ref)         charge value:  biased
    k3    r - 1 + d  KL(pi || pi_ref)   coefficient 1 - r:  grad KL(pi_ref || pi)         charge value:  biased

The value is what is logged; the coefficient is the factor on s that a KL loss back-propagates; the charge is what a
penalty in the reward takes off. They are separate columns because a good value may have a wrong gradient.

Numbers: bfloat16 and float16 inputs are subtracted in float32 (exact for them; what half precision already lost stays
lost). Nothing is clamped: k3 and its coefficient grow as exp(-d), finite in float32 down to d = -88.7, inf below.

Sources: Schulman (2020), http://joschu.net/blog/kl-approx.html (values); Tang and Munos (2025), arXiv:2506.09477, and
Liu et al. (2025), arXiv:2510.01555 (gradients). klreg_verl.doctor checks the table by enumeration.
"""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import Tensor

OfLogRatio = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Estimator:
    """One row of the table above: three functions of the log-ratio d, each (B, T) -> (B, T)."""

    value: OfLogRatio
    coefficient: OfLogRatio
    reward_charge: OfLogRatio


def _half_square(log_ratio: Tensor) -> Tensor:
    return 0.5 * log_ratio.square()


def _k3(log_ratio: Tensor) -> Tensor:
    """expm1 and not exp(-d) - 1: the latter loses all digits of the small r - 1 near d = 0."""
    return torch.expm1(-log_ratio) + log_ratio


def _one_minus_ratio(log_ratio: Tensor) -> Tensor:
    return -torch.expm1(-log_ratio)


def _itself(log_ratio: Tensor) -> Tensor:
    return log_ratio


_ESTIMATORS: dict[str, Estimator] = {
    "k1": Estimator(value=_itself, coefficient=torch.ones_like, reward_charge=_itself),
    "k2": Estimator(value=_half_square, coefficient=_itself, reward_charge=_half_square),
    "k3": Estimator(value=_k3, coefficient=_one_minus_ratio, reward_charge=_k3),
}


def names() -> tuple[str, ...]:
    """The names of all estimators, in the order of the table."""
    return tuple(_ESTIMATORS)


def estimator(name: str) -> Estimator:
    """The row called `name`; ValueError with the nearest name when there is none."""
    if name not in _ESTIMATORS:
        near = get_close_matches(name, _ESTIMATORS, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"There is no KL estimator {name!r}.{hint} Known estimators: {', '.join(names())}.")
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


def value(name: str, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The estimate of the KL at each token, (B, T) in nats: what is logged."""
    return estimator(name).value(log_ratio(logprobs, ref_logprobs))


def coefficient(name: str, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The factor c on grad log pi of each token when the estimator is a loss, (B, T)."""
    return estimator(name).coefficient(log_ratio(logprobs, ref_logprobs))


def reward_charge(name: str, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """What each token costs when the estimator is charged to the reward, (B, T) in nats, before beta."""
    return estimator(name).reward_charge(log_ratio(logprobs, ref_logprobs))
