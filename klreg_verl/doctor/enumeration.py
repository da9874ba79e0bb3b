"""The expected gradient of a rule on a listed problem, and its noise, by going through every response or group.

A response's part of the policy loss is -sum_t weight_t * (pi / pi_old)_t * A_t, without PPO's clip; what the KL takes
off A_t is its penalty. Expectations are over responses of the sampler, in groups where siblings matter: of 2, and of 3
where scores are normalized (of 2 in long lists, and for noise). The weights are those of a large batch, in which the
mean length of its responses is the expected one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from klreg_verl.doctor import gradients
from klreg_verl.doctor.gradients import Sampler
from klreg_verl.doctor.policies import Problem, lengthening, panel
from klreg_verl.doctor.rules import REFERENCE_SAMPLES, Charge, Pull, Rule
from klreg_verl.doctor.subjects import Subject


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread, as a context or a decorator: more only wait for each other on tensors this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True, kw_only=True, eq=False)
class Draws:
    """Everything that can be drawn: R outcomes, each one response as a member of its group."""

    chance: Tensor
    """(R,), summing to 1."""
    response: Tensor
    """(R,) int64, which of the N responses."""
    pulls: Tensor
    """(R, T, V), the gradient of the KL term with respect to each token's logits, before aggregation."""

    def mean(self, number: int) -> Tensor:
        """The pulls of each response times its probability, (N, T, V)."""
        weighted = self.chance.reshape(-1, 1, 1) * self.pulls
        return weighted.new_zeros(number, *weighted.shape[1:]).index_add(0, self.response, weighted)


def gradient(subject: Subject, rule: Rule, listed: Problem, sampler: Sampler) -> Tensor:
    """The expected gradient, flat, in the units of the KL summed over a response whatever the aggregation."""
    parts = []
    if rule.charge is not None:
        weights = _weights(subject, rule.of_policy, listed, sampler)
        parts.append(weights * _mean_in_reward(subject, rule.charge, listed, sampler))
    if rule.pull is not None:
        weights = _weights(subject, rule.aggregation, listed, sampler)
        parts.append(weights * _mean_in_loss(subject, rule.pull, listed, sampler))
    aggregation = rule.aggregation if rule.charge is None else rule.of_policy
    return gradients.collect(listed, sum(parts, start=torch.zeros(()))) / scale(aggregation, listed, sampler)


def scale(aggregation: str, listed: Problem, sampler: Sampler) -> float:
    """How much smaller an aggregation makes a gradient than the sum over a response's tokens would be."""
    tokens = gradients.mean_tokens(listed, sampler)
    return {"seq-mean-token-sum": 1.0, "seq-mean-token-sum-norm": 1.0 / listed.tokens.shape[1]}.get(
        aggregation, 1.0 / tokens
    )


@cache
@one_thread()
def noise(subject: Subject, charge: Charge | None, pull: Pull | None) -> tuple[float, ...]:
    """Standard deviation of one response's gradient over |grad KL(pi || pi_ref)|, at each of policies.LENGTHS tokens.

    On-policy, for one policy that draws all tokens alike; all responses are of one length, so no aggregation matters.
    """
    return tuple(_noise(subject, charge, pull, listed) for listed in lengthening())


def _noise(subject: Subject, charge: Charge | None, pull: Pull | None, listed: Problem) -> float:
    in_reward = None if charge is None else _in_reward(subject, charge, listed, "policy")
    in_loss = None if pull is None else _in_loss(subject, pull, listed, "policy")
    draws = in_reward or in_loss
    assert draws is not None, "a rule has a half in the reward or in the loss"
    pulls = draws.pulls if in_reward is None or in_loss is None else draws.pulls + in_loss.pulls[draws.response]
    each = pulls.sum(dim=1)
    spread = each - draws.chance @ each
    truth = gradients.divergence_gradient(listed, "reverse", "sequence")
    return float((draws.chance @ spread.square().sum(dim=-1)).sqrt() / truth.norm())


@cache
def weighs_alike(subject: Subject, aggregation: str) -> bool:
    """Whether every token of a problem has the same weight, so that no direction depends on the aggregation."""
    for listed in panel():
        weights = _weights(subject, aggregation, listed, "policy")[listed.response_mask]
        if not torch.allclose(weights, weights[0], rtol=subject.tolerance, atol=0.0):
            return False
    return True


@cache
def _weights(subject: Subject, aggregation: str, listed: Problem, sampler: Sampler) -> Tensor:
    """(N, T, 1)."""
    tokens = gradients.mean_tokens(listed, sampler)
    return subject.token_weights(aggregation, listed.response_mask, tokens).unsqueeze(-1)


@cache
def _mean_in_reward(subject: Subject, charge: Charge, listed: Problem, sampler: Sampler) -> Tensor:
    return _in_reward(subject, charge, listed, sampler).mean(len(listed.tokens))


@cache
def _mean_in_loss(subject: Subject, pull: Pull, listed: Problem, sampler: Sampler) -> Tensor:
    return _in_loss(subject, pull, listed, sampler).mean(len(listed.tokens))


@cache
def _in_reward(subject: Subject, charge: Charge, listed: Problem, sampler: Sampler) -> Draws:
    groups = _groups(len(listed.tokens), _group_size(subject, charge, listed))
    rows, size = groups.flatten(), groups.shape[1]
    old = gradients.logprobs(listed, gradients.sampler_logits(listed, sampler))
    penalty = subject.penalty(
        charge,
        old[rows],
        gradients.logprobs(listed, listed.ref_logits)[rows],
        listed.response_mask[rows],
        torch.arange(len(groups)).repeat_interleave(size),
        _task_scores(listed)[rows],
    )
    ratio = (gradients.logprobs(listed, listed.logits) - old).exp()[rows]
    return Draws(
        chance=gradients.chances(listed, sampler)[groups].prod(dim=1).repeat_interleave(size) / size,
        response=rows,
        pulls=(ratio * penalty).unsqueeze(-1) * gradients.token_scores(listed)[rows],
    )


@cache
def _in_loss(subject: Subject, pull: Pull, listed: Problem, sampler: Sampler) -> Draws:
    if pull.estimator == REFERENCE_SAMPLES:
        return _of_reference(listed)
    logits = listed.logits[listed.prefixes].requires_grad_()
    old = gradients.logprobs(listed, gradients.sampler_logits(listed, sampler))
    mask = listed.response_mask
    loss = subject.loss(pull, logits, listed.ref_logits[listed.prefixes], listed.tokens, mask, old)
    (pulls,) = torch.autograd.grad(loss.sum(), logits)
    return Draws(
        chance=gradients.chances(listed, sampler),
        response=torch.arange(len(mask)),
        pulls=pulls.double() * mask.unsqueeze(-1),
    )


def _of_reference(listed: Problem) -> Draws:
    """-sum_t log pi(y_t) of the reference's responses, whatever the policy samples."""
    return Draws(
        chance=gradients.chances(listed, "reference"),
        response=torch.arange(len(listed.tokens)),
        pulls=-gradients.token_scores(listed),
    )


def _groups(number: int, size: int) -> Tensor:
    """Every group of responses, (G, size) int64."""
    return torch.cartesian_prod(*[torch.arange(number)] * size)


def _group_size(subject: Subject, charge: Charge, listed: Problem) -> int:
    """Of 2 at all of policies.LENGTHS, so that the noise there can be compared."""
    few = len(listed.tokens) ** 3 <= subject.largest and listed not in lengthening()
    return 3 if few and charge.normalization == "std" else 2


def _task_scores(listed: Problem) -> Tensor:
    """A made-up task, (N,): every other response of the list is right."""
    return (torch.arange(len(listed.tokens)) % 2).double()
