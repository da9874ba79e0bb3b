"""Exact gradients on a listed problem: those of the divergences, and sums of what single tokens contribute.

Every gradient is with respect to the policy's logits, flat, (P * V,), float64, in the sense of descent: a step against
it lowers what it belongs to. "sequence" is the divergence between distributions of whole responses; "token" is that of
the next token, averaged over the prefixes that the sampler visits, with the visits held fixed; "coarse" is the same
between distributions in which all but the likeliest token are one bucket.
"""

from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from klreg_verl.core.aggregation import response_sum
from klreg_verl.doctor.policies import Problem

Level = Literal["sequence", "token", "coarse"]
Sampler = Literal["policy", "older", "reference"]
"""Who drew the responses: the policy itself (on-policy), mu, the policy of one update ago, or the reference."""


def _kl(one: Tensor, other: Tensor) -> Tensor:
    """sum one * log(one / other) over the last dimension of two log-distributions; 0 log 0 is 0."""
    return torch.where(one > -torch.inf, one.exp() * (one - other), 0.0).sum(dim=-1)


def _js(policy: Tensor, reference: Tensor) -> Tensor:
    mixture = torch.logaddexp(policy, reference) - torch.log(torch.tensor(2.0, dtype=policy.dtype))
    return 0.5 * (_kl(policy, mixture) + _kl(reference, mixture))


def _chi2(policy: Tensor, reference: Tensor) -> Tensor:
    return ((reference.exp() - policy.exp()).square() / policy.exp()).sum(dim=-1)


def _tv(policy: Tensor, reference: Tensor) -> Tensor:
    return 0.5 * (policy.exp() - reference.exp()).abs().sum(dim=-1)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "reverse": _kl,
    "forward": lambda policy, reference: _kl(reference, policy),
    "js": _js,
    "chi2": _chi2,
    "tv": _tv,
}
"""Name -> the divergence of two log-distributions, (..., V), (..., V) -> (...), in nats (tv and chi2: numbers)."""


def divergence(listed: Problem, name: str, level: Level, sampler: Sampler = "policy") -> Tensor:
    """The divergence of the policy from the reference, summed over the response: a number."""
    return _LEVELS[level](listed, listed.logits, name, sampler)


@cache
def divergence_gradient(listed: Problem, name: str, level: Level, sampler: Sampler = "policy") -> Tensor:
    """Its gradient with respect to the logits, flat. `sampler` matters below the level of whole responses."""
    logits = listed.logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(_LEVELS[level](listed, logits, name, sampler), logits)
    return gradient.flatten()


def sampler_logits(listed: Problem, sampler: Sampler) -> Tensor:
    """(P, V), of the policy that the responses are drawn from."""
    return {"policy": listed.logits, "older": listed.older_logits, "reference": listed.ref_logits}[sampler]


def logprobs(listed: Problem, logits: Tensor) -> Tensor:
    """Log-probability of each token of each response, (N, T); under the mask that of an unrelated token."""
    return logits.log_softmax(dim=-1)[listed.prefixes, listed.tokens]


@cache
def chances(listed: Problem, sampler: Sampler = "policy") -> Tensor:
    """Probability of each response, (N,)."""
    return response_sum(logprobs(listed, sampler_logits(listed, sampler)), listed.response_mask).exp()


@cache
def mean_tokens(listed: Problem, sampler: Sampler = "policy") -> float:
    """Expected length of a response, in tokens."""
    return float((chances(listed, sampler) * listed.response_mask.sum(dim=-1)).sum())


@cache
def token_scores(listed: Problem) -> Tensor:
    """grad log pi of each token by the logits it was drawn from, (N, T, V): one-hot minus probabilities."""
    probabilities = listed.logits.softmax(dim=-1)
    scores = torch.nn.functional.one_hot(listed.tokens, probabilities.shape[-1]) - probabilities[listed.prefixes]
    return scores * listed.response_mask.unsqueeze(-1)


def collect(listed: Problem, pulls: Tensor) -> Tensor:
    """Gradients with respect to each token's logits, (N, T, V), added up over the tokens of one prefix: (P * V,)."""
    mask = listed.response_mask
    return torch.zeros_like(listed.logits).index_add(0, listed.prefixes[mask], pulls[mask]).flatten()


def cosine(one: Tensor, other: Tensor) -> float | None:
    """Cosine of the angle between two gradients; None where one of them vanishes and has no direction."""
    norms = one.norm() * other.norm()
    return float(one @ other / norms) if norms > 1e-12 else None


def relative_error(estimate: Tensor, truth: Tensor) -> float:
    """|estimate - truth| / |truth|."""
    return float((estimate - truth).norm() / truth.norm())


def _of_responses(listed: Problem, logits: Tensor, name: str, _: Sampler) -> Tensor:
    policy = response_sum(logprobs(listed, logits), listed.response_mask)
    return DIVERGENCES[name](policy, response_sum(logprobs(listed, listed.ref_logits), listed.response_mask))


def _of_tokens(listed: Problem, logits: Tensor, name: str, sampler: Sampler) -> Tensor:
    per_prefix = DIVERGENCES[name](logits.log_softmax(dim=-1), listed.ref_logits.log_softmax(dim=-1))
    return (_visits(listed, sampler) * per_prefix).sum()


def _of_coarse_tokens(listed: Problem, logits: Tensor, name: str, sampler: Sampler) -> Tensor:
    """The likeliest token by the policy for reverse, by the reference for forward; all others in one bucket."""
    policy, reference = logits.softmax(dim=-1), listed.ref_logits.softmax(dim=-1)
    chosen = (reference if name == "forward" else policy).argmax(dim=-1, keepdim=True)
    first, other = policy.gather(-1, chosen), reference.gather(-1, chosen)
    buckets = (torch.cat((p, 1.0 - p), dim=-1).log() for p in (first, other))
    return (_visits(listed, sampler) * DIVERGENCES[name](*buckets)).sum()


def _visits(listed: Problem, sampler: Sampler) -> Tensor:
    """How often the sampler reaches each prefix, (P,)."""
    mask = listed.response_mask
    per_token = chances(listed, sampler).unsqueeze(-1).expand(mask.shape)[mask]
    return listed.logits.new_zeros(len(listed.logits)).index_add(0, listed.prefixes[mask], per_token)


_LEVELS = {"sequence": _of_responses, "token": _of_tokens, "coarse": _of_coarse_tokens}
