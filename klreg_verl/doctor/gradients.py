"""Exact gradients on a listed problem: of the two divergences, and of what a KL setting does in expectation.

Every gradient is with respect to the policy's logits, flat, (P * V,), float64, in the sense of descent: a step against
it lowers what it belongs to. "sequence" is the KL between distributions of whole responses; "token" is the KL of the
next token, averaged over the prefixes that the policy visits, with the visits held fixed.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from klreg_verl.core.aggregation import response_sum
from klreg_verl.doctor.policies import Problem

Direction = Literal["reverse", "forward"]
Level = Literal["sequence", "token"]
LossPerToken = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logprobs, ref_logprobs, response_mask), (B, T) each -> (B, T): what a KL in the loss back-propagates."""
Penalty = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(logprobs, ref_logprobs, response_mask, group_ids) -> (B,): what a KL in the reward takes off the advantage."""
TokenValue = Callable[[Tensor, Tensor], Tensor]


def divergence(listed: Problem, direction: Direction, level: Level) -> Tensor:
    """KL(pi || pi_ref) for reverse, KL(pi_ref || pi) for forward, summed over the response: a number in nats."""
    return _DIVERGENCES[level](listed, listed.logits, direction)


def divergence_gradient(listed: Problem, direction: Direction, level: Level) -> Tensor:
    """Its gradient with respect to the logits, flat."""
    return _gradient(listed, lambda logits: _DIVERGENCES[level](listed, logits, direction))


def loss_gradient(listed: Problem, loss_per_token: LossPerToken) -> Tensor:
    """E[grad sum_t loss_t] over responses sampled from the policy itself (on-policy, no gradient through sampling)."""
    ref_logprobs, mask = _logprobs(listed, listed.ref_logits), listed.response_mask

    def objective(logits: Tensor) -> Tensor:
        logprobs = _logprobs(listed, logits)
        chance = response_sum(logprobs, mask).exp().detach()
        return (chance * response_sum(loss_per_token(logprobs, ref_logprobs, mask), mask)).sum()

    return _gradient(listed, objective)


def reward_gradient(listed: Problem, penalty: Penalty) -> Tensor:
    """E[penalty_i * grad log pi(y_i)] over groups of two responses, all N * N pairs listed, baseline included."""
    number = len(listed.tokens)
    rows = torch.cartesian_prod(torch.arange(number), torch.arange(number)).flatten()
    group_ids = torch.arange(number * number).repeat_interleave(2)
    ref_logprobs, mask = _logprobs(listed, listed.ref_logits)[rows], listed.response_mask[rows]

    def objective(logits: Tensor) -> Tensor:
        logprobs = _logprobs(listed, logits)[rows]
        likelihood = response_sum(logprobs, mask)
        chance = likelihood.detach().reshape(-1, 2).sum(dim=1).exp().repeat_interleave(2) / 2
        return (chance * penalty(logprobs.detach(), ref_logprobs, mask, group_ids) * likelihood).sum()

    return _gradient(listed, objective)


def expected_value(listed: Problem, token_value: TokenValue) -> float:
    """E[sum_t value_t] over responses of the policy, in nats."""
    logprobs, mask = _logprobs(listed, listed.logits), listed.response_mask
    values = response_sum(token_value(logprobs, _logprobs(listed, listed.ref_logits)), mask)
    return float((response_sum(logprobs, mask).exp() * values).sum())


def cosine(one: Tensor, other: Tensor) -> float | None:
    """Cosine of the angle between two gradients; None where one of them vanishes and has no direction."""
    norms = one.norm() * other.norm()
    return float(one @ other / norms) if norms > 1e-12 else None


def relative_error(estimate: Tensor, truth: Tensor) -> float:
    """|estimate - truth| / |truth|."""
    return float((estimate - truth).norm() / truth.norm())


def _logprobs(listed: Problem, logits: Tensor) -> Tensor:
    """Log-probability of each token of each response, (N, T); under the mask that of an unrelated token."""
    return logits.log_softmax(dim=-1)[listed.prefixes, listed.tokens]


def _gradient(listed: Problem, objective: Callable[[Tensor], Tensor]) -> Tensor:
    logits = listed.logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(logits), logits)
    return gradient.flatten()


def _sequence_divergence(listed: Problem, logits: Tensor, direction: Direction) -> Tensor:
    policy = response_sum(_logprobs(listed, logits), listed.response_mask)
    reference = response_sum(_logprobs(listed, listed.ref_logits), listed.response_mask)
    return _kl(policy, reference, direction)


def _token_divergence(listed: Problem, logits: Tensor, direction: Direction) -> Tensor:
    per_prefix = _kl(logits.log_softmax(dim=-1), listed.ref_logits.log_softmax(dim=-1), direction)
    return (_visits(listed, logits.detach()) * per_prefix).sum()


def _visits(listed: Problem, logits: Tensor) -> Tensor:
    """How often the policy reaches each prefix, (P,)."""
    mask = listed.response_mask
    chance = response_sum(_logprobs(listed, logits), mask).exp()
    per_token = chance.unsqueeze(-1).expand(mask.shape)[mask]
    return logits.new_zeros(len(logits)).index_add(0, listed.prefixes[mask], per_token)


def _kl(policy: Tensor, reference: Tensor, direction: Direction) -> Tensor:
    """Over the last dimension of two log-distributions."""
    if direction == "forward":
        policy, reference = reference, policy
    return (policy.exp() * (policy - reference)).sum(dim=-1)


_DIVERGENCES = {"sequence": _sequence_divergence, "token": _token_divergence}
