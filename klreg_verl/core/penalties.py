"""The two places where the KL to the reference enters the objective.

In the reward   A_t = A_task_t - beta * (S_t - mean of S_t over the siblings), taken off finished advantages: inside the
                division by the group's std, groups of equal rewards would lose beta altogether.

    credit        S_t, a sum of charges [nats]   gradient followed with k1        siblings whose mean is the baseline
    sequence      of the whole response          of the KL of whole responses     all that are written
    reward_to_go  of the tokens from t on        the same, with less noise        those still being written at t
    token         of token t alone               of the next token's KL, prefix   those still being written at t
                                                 by prefix: steering into bad
                                                 prefixes is not charged

                The siblings' mean is a leave-one-out baseline: it does not see the response itself, so it removes noise
                and adds no bias. Without one (`baseline="none"`) the expectation is the same.

In the loss     loss = policy loss + beta * aggregate(l_t). Each token is pulled on its own; how it steers later tokens
                is left out. v: value of the estimator, c: its coefficient, w = pi / pi_old, s = grad log pi.

    correction           l_t      gradient of l_t             off-policy, w of the token and not of its prefix
    none                 v        c * s                       no divergence: c weighs samples of another policy
    importance           w * v    d(w * v) = w * (v + v') s   grad E[v]: k1 reverse KL, noisy even at pi = pi_ref; k3
                                                              reverse KL; forward, js, chi2, tv their own divergence;
                                                              k2, abs no divergence
    importance_detached  w * v    w * c * s                   as on-policy: k2 reverse KL; k3 forward KL; abs 2 tv;
                                                              forward, js, chi2, tv their own divergence; k1 nothing

                v' is the derivative of v by d. For forward, js, chi2 and tv v + v' = f - r f' = c: the importance
                corrections agree.

A shaping (klreg_verl.core.shaping) acts last: on the charge of each token, or on l_t and the factor of its gradient.
A cap limits |d|: a token beyond it is charged (or logged) as at the cap and passes no gradient to the loss, whatever
the correction. klreg_verl.core.kl.cap_hits counts such tokens.

Sources: Tang and Munos (2025), arXiv:2506.09477; Shah et al. (2025), arXiv:2512.21852; DeepSeek-AI (2025),
arXiv:2512.02556, equation 7 (w * k3). Estimators: klreg_verl.core.kl. klreg_verl.doctor checks both tables.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from klreg_verl.core import advantages, kl
from klreg_verl.core.aggregation import leave_one_out_mean, leave_one_out_mean_per_position, masked, response_sum
from klreg_verl.core.shaping import NoShaping, Shaping

CREDITS = ("sequence", "reward_to_go", "token")
BASELINES = ("siblings", "none")
CORRECTIONS = ("none", "importance", "importance_detached")


@torch.no_grad()
def token_charge(
    estimator: str,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    *,
    shaping: Shaping | None = None,
    cap: float | None = None,
) -> Tensor:
    """What each token costs, (B, T) in nats, after shaping and before beta; 0 under the mask, without gradient."""
    policy, reference = masked(logprobs, response_mask), masked(ref_logprobs, response_mask)
    charge = kl.reward_charge(estimator, policy, reference, cap=cap)
    return masked((shaping or NoShaping()).shape(charge, response_mask), response_mask)


@torch.no_grad()
def response_charge(
    estimator: str,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    *,
    shaping: Shaping | None = None,
    cap: float | None = None,
) -> Tensor:
    """The charge of each whole response in nats: (B, T) -> (B,), without gradient."""
    charge = token_charge(estimator, logprobs, ref_logprobs, response_mask, shaping=shaping, cap=cap)
    return response_sum(charge, response_mask)


@torch.no_grad()
def charges(
    estimator: str,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    *,
    credit: str = "sequence",
    shaping: Shaping | None = None,
    cap: float | None = None,
) -> Tensor:
    """S_t of the table above, (B, T) in nats, 0 under the mask, without gradient.

    Args:
        logprobs, ref_logprobs: (B, T), of the sampled tokens; log-probs of the policy they were sampled with.
        response_mask: (B, T) bool.
        credit: sequence, reward_to_go or token.
        shaping: acts on the charge of each token, before any sum.
        cap: limit on |d| in nats.
    """
    _check("credit", credit, CREDITS)
    charge = token_charge(estimator, logprobs, ref_logprobs, response_mask, shaping=shaping, cap=cap)
    return masked(_CREDIT[credit](charge), response_mask)


@torch.no_grad()
def baseline(charges: Tensor, response_mask: Tensor, group_ids: Tensor, *, credit: str = "sequence") -> Tensor:
    """The mean of S_t over the siblings, (B, T) in nats; 0 where there is none, and under the mask.

    Under credit sequence the siblings are all rows of the group with an unmasked token, so that one number goes with
    the whole response; otherwise those unmasked at t, since a finished sibling has no S_t. `group_ids` is (B,).
    """
    _check("credit", credit, CREDITS)
    if not charges.shape[-1]:
        return charges  # responses without any token have no first one
    if credit == "sequence":
        first = response_mask.int().argmax(dim=-1, keepdim=True)
        mean = leave_one_out_mean(charges.gather(1, first)[:, 0], group_ids, response_mask.any(dim=-1))
        return masked(mean.unsqueeze(-1).expand_as(charges), response_mask)
    return masked(leave_one_out_mean_per_position(charges, response_mask, group_ids), response_mask)


_leave_one_out_baseline = baseline
"""`reward_penalty` has a parameter of that name."""


@torch.no_grad()
def reward_penalty(
    estimator: str,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    group_ids: Tensor,
    *,
    credit: str = "sequence",
    baseline: str = "siblings",
    shaping: Shaping | None = None,
    cap: float | None = None,
) -> Tensor:
    """S_t minus its baseline, (B, T) in nats: what `penalized_advantages` takes times beta.

    Masked positions get 0; a fully masked row (padding) is nobody's sibling. Arguments as in `charges`, `group_ids`,
    (B,) integers, and `baseline`: siblings or none.
    """
    _check("baseline", baseline, BASELINES)
    charge = charges(estimator, logprobs, ref_logprobs, response_mask, credit=credit, shaping=shaping, cap=cap)
    if baseline == "none":
        return charge
    return charge - _leave_one_out_baseline(charge, response_mask, group_ids, credit=credit)


def penalized_advantages(task_advantages: Tensor, penalty: Tensor, *, beta: float) -> Tensor:
    """Task advantages minus beta times the penalty, token by token, (B, T) both; beta in reward units per nat.

    An advantage of whole responses, (B,), must be spread over their tokens first.
    """
    if task_advantages.dim() != 2 or penalty.shape != task_advantages.shape:
        raise ValueError(
            f"Advantages of shape {tuple(task_advantages.shape)} and a penalty of shape {tuple(penalty.shape)} do not "
            "match: tokens would be charged for each other. Both must be (B, T); spread one number per response over "
            "its tokens with advantages[:, None] * response_mask."
        )
    return task_advantages - beta * penalty


@torch.no_grad()
def normalized_advantages(scores: Tensor, charges: Tensor, group_ids: Tensor, *, beta: float) -> Tensor:
    """GRPO on scores that were charged first, (B,) each: the group's std divides the KL term, too.

    It rescales beta by that std, and in a group of equal task scores cancels it: biased, and here to be measured.
    `charges` are whole responses' [nats] (`response_charge`); beta in reward units per nat.
    """
    return advantages.grpo(scores - beta * charges, group_ids)


def kl_loss_per_token(
    estimator: str,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor | None = None,
    *,
    old_logprobs: Tensor | None = None,
    correction: str = "none",
    shaping: Shaping | None = None,
    cap: float | None = None,
) -> Tensor:
    """The KL loss l_t at each token, (B, T) in nats, before beta and before aggregation over tokens.

    Its value and the factor of its gradient are chosen apart (straight-through), as in the table above; no gradient
    goes to `ref_logprobs` or `old_logprobs`. Where the factor overflows to inf, the value is NaN.

    Args:
        logprobs: (B, T), of the policy being updated, with gradient.
        ref_logprobs: (B, T).
        response_mask: (B, T) bool. Masked tokens give 0 and pass no gradient even where an input is NaN or inf; without
            a mask, 0 * NaN makes such a gradient NaN although the aggregation masks the value.
        old_logprobs: (B, T), of the policy that sampled; needed by both importance corrections.
        correction: none, importance or importance_detached.
        shaping: acts on w * v, and its derivative there on the gradient's factor.
        cap: limit on |d| in nats.

    Raises:
        ValueError: an unknown correction; importance without `old_logprobs`, or of an estimator whose value has no
            derivative.
    """
    _check("correction", correction, CORRECTIONS)
    mask = torch.ones_like(logprobs, dtype=torch.bool) if response_mask is None else response_mask
    policy = masked(logprobs, mask)
    fixed, reference = policy.detach(), masked(ref_logprobs.detach(), mask)
    weight = _weight(correction, fixed, old_logprobs, mask)
    factor = weighted_coefficient if correction == "importance" else kl.coefficient
    value = weight * kl.value(estimator, fixed, reference, cap=cap)
    coefficient = weight * factor(estimator, fixed, reference, cap=cap)
    shaped = shaping or NoShaping()
    surrogate = shaped.coefficient(value, coefficient, mask) * (policy - fixed)
    return masked(shaped.shape(value, mask) + surrogate, mask)


def weighted_coefficient(estimator: str, logprobs: Tensor, ref_logprobs: Tensor, *, cap: float | None = None) -> Tensor:
    """v + v', (B, T): the factor on w * grad log pi when w * v is differentiated through both; 0 beyond a cap.

    Closed forms where a name of the table has one: the sum of r - 1 + d and 1 - r loses every digit of d at d = -20 in
    float32. Otherwise v is differentiated, in float64: ValueError where it passes no gradient.
    """
    if estimator in _WEIGHTED_AS:
        return kl.coefficient(_WEIGHTED_AS[estimator], logprobs, ref_logprobs, cap=cap)
    with torch.enable_grad():
        policy = logprobs.detach().double().requires_grad_()
        value = kl.value(estimator, policy, ref_logprobs.detach().double())
        if not value.requires_grad:
            raise ValueError(
                f"The value of KL estimator {estimator!r} passes no gradient, so that pi / pi_old times it cannot be "
                "differentiated. Write it with differentiable torch functions, or choose importance_detached."
            )
        (slope,) = torch.autograd.grad(value.sum(), policy)
    found = (value.detach() + slope).to(kl.log_ratio(logprobs, ref_logprobs).dtype)
    return found if cap is None else masked(found, ~kl.cap_hits(logprobs, ref_logprobs, cap))


_WEIGHTED_AS = {"k3": "k2", "forward": "forward", "js": "js", "chi2": "chi2", "tv": "tv"}
"""Estimator -> the one whose coefficient is v + v': (r - 1 + d) + (1 - r) = d, and f - r f' for an f-divergence."""


def _from_here_on(charge: Tensor) -> Tensor:
    return charge.flip(-1).cumsum(dim=-1).flip(-1)


_CREDIT: dict[str, Callable[[Tensor], Tensor]] = {
    "sequence": lambda charge: charge.sum(dim=-1, keepdim=True).expand_as(charge),
    "reward_to_go": _from_here_on,
    "token": lambda charge: charge,
}


def _weight(correction: str, logprobs: Tensor, old_logprobs: Tensor | None, mask: Tensor) -> Tensor:
    """w = pi / pi_old of each token, (B, T), 1 under the mask; 1 where nothing is corrected."""
    if correction == "none":
        return torch.ones_like(logprobs, dtype=torch.promote_types(logprobs.dtype, torch.float32))
    if old_logprobs is None:
        raise ValueError(
            f"KL correction {correction!r} weighs each token by pi / pi_old and needs old_logprobs, of the policy that "
            "sampled the responses. Pass them, or use correction 'none' with one update per batch."
        )
    return kl.log_ratio(logprobs, masked(old_logprobs.detach(), mask)).exp()


def _check(what: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise ValueError(f"There is no KL {what} {given!r}. Known: {', '.join(known)}.")
