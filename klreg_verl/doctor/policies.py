"""Small policies whose every response can be listed, so that an expectation is a sum and not a sample.

A policy is a tree: {prefix: probabilities of the next token}. A response goes on while its prefix is a key and ends
where it is not, so a token without a key behind it is an end token. All numbers are float64.

Off-policy, the responses come from an older policy mu: the policy before an update that raised some tokens and lowered
others. What mu was is made up, one for each problem; only that it differs from pi and from pi_ref matters.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

Prefix = tuple[int, ...]
Tree = Mapping[Prefix, tuple[float, ...]]
UPDATE = 0.5
"""How far one update moved the logits, from the token it raised most to the one it lowered most."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """A policy, its reference, and all N responses of up to T tokens from P prefixes over V tokens.

    Compared and hashed by identity, so that what is computed on it can be cached.
    """

    name: str
    logits: Tensor
    """(P, V), the policy's parameters: log-probabilities of the next token after each prefix."""
    ref_logits: Tensor
    """(P, V), the reference's."""
    older_logits: Tensor
    """(P, V), mu's: the policy one update ago."""
    prefixes: Tensor
    """(N, T) int64, the row of `logits` that each token is drawn from; 0 under the mask."""
    tokens: Tensor
    """(N, T) int64; 0 under the mask."""
    response_mask: Tensor
    """(N, T) bool."""


def problem(name: str, policy: Tree, reference: Tree) -> Problem:
    """List all responses of `policy`; both trees must have the same prefixes."""
    if policy.keys() != reference.keys():
        raise ValueError(f"{name}: policy and reference have different prefixes: {set(policy) ^ set(reference)}.")
    row = {prefix: number for number, prefix in enumerate(policy)}
    responses = list(_responses(policy, ()))
    paths = [[(row[y[:t]], y[t]) for t in range(len(y))] for y in responses]
    longest = max(map(len, paths))
    table = torch.tensor([path + [(0, 0)] * (longest - len(path)) for path in paths])
    mask = torch.tensor([[t < len(path) for t in range(longest)] for path in paths])
    rows, tokens = table.unbind(dim=-1)
    logits = torch.tensor(list(policy.values()), dtype=torch.float64).log()
    return Problem(
        name=name,
        logits=logits,
        ref_logits=torch.tensor([reference[prefix] for prefix in policy], dtype=torch.float64).log(),
        older_logits=_one_update_ago(logits),
        prefixes=rows,
        tokens=tokens,
        response_mask=mask,
    )


def repeated(policy: tuple[float, ...], reference: tuple[float, ...], length: int) -> Problem:
    """Responses of `length` tokens, each drawn from the same distribution: one row of parameters for all positions."""
    tokens = torch.cartesian_prod(*[torch.arange(len(policy))] * length).reshape(-1, length)
    logits = torch.tensor([policy], dtype=torch.float64).log()
    return Problem(
        name=f"{length} times",
        logits=logits,
        ref_logits=torch.tensor([reference], dtype=torch.float64).log(),
        older_logits=_one_update_ago(logits),
        prefixes=torch.zeros_like(tokens),
        tokens=tokens,
        response_mask=torch.ones_like(tokens, dtype=torch.bool),
    )


def _one_update_ago(logits: Tensor) -> Tensor:
    """The update raised the first token and lowered the last, after every other prefix the other way round."""
    size, width = logits.shape
    direction = torch.linspace(0.5, -0.5, width, dtype=logits.dtype) * UPDATE
    sign = 1.0 - 2.0 * (torch.arange(size) % 2)
    return logits - sign.unsqueeze(-1) * direction


def _responses(policy: Tree, prefix: Prefix) -> Iterator[Prefix]:
    if prefix not in policy:
        yield prefix
        return
    for token in range(len(policy[prefix])):
        yield from _responses(policy, (*prefix, token))


@cache
def panel() -> tuple[Problem, ...]:
    """The problems that a verdict rests on: from the easiest to those that tell settings apart."""
    return (
        problem("near", {(): (0.50, 0.30, 0.20)}, {(): (0.45, 0.33, 0.22)}),
        problem("far", {(): (0.60, 0.25, 0.10, 0.05)}, {(): (0.15, 0.35, 0.10, 0.40)}),
        problem("lost token", {(): (0.70, 0.298, 0.002)}, {(): (0.30, 0.30, 0.40)}),
        # The first token agrees with the reference; only what follows token 1 does not.
        problem(
            "steering",
            {(): (0.50, 0.50), (0,): (0.52, 0.48), (1,): (0.95, 0.05)},
            {(): (0.50, 0.50), (0,): (0.50, 0.50), (1,): (0.30, 0.70)},
        ),
        # The policy mostly visits a prefix that the reference rarely reaches.
        problem(
            "own prefixes",
            {(): (0.90, 0.10), (0,): (0.70, 0.30), (1,): (0.90, 0.10)},
            {(): (0.20, 0.80), (0,): (0.40, 0.60), (1,): (0.20, 0.80)},
        ),
        # Responses of one to three tokens; token 2 ends.
        problem(
            "ending",
            {
                (): (0.5, 0.3, 0.2),
                (0,): (0.2, 0.5, 0.3),
                (1,): (0.4, 0.3, 0.3),
                (0, 0): (0.6, 0.2, 0.2),
                (0, 1): (0.3, 0.3, 0.4),
                (1, 0): (0.1, 0.7, 0.2),
                (1, 1): (0.1, 0.1, 0.8),
            },
            {
                (): (0.3, 0.3, 0.4),
                (0,): (0.4, 0.4, 0.2),
                (1,): (0.2, 0.2, 0.6),
                (0, 0): (0.2, 0.4, 0.4),
                (0, 1): (0.5, 0.3, 0.2),
                (1, 0): (0.3, 0.3, 0.4),
                (1, 1): (0.3, 0.3, 0.4),
            },
        ),
    )


LENGTHS = (1, 2, 3, 4)
"""Tokens of the responses on which noise is measured."""


@cache
def lengthening() -> tuple[Problem, ...]:
    """One policy and reference at each of LENGTHS: what its noise does as responses grow."""
    return tuple(repeated((0.6, 0.3, 0.1), (0.35, 0.4, 0.25), length) for length in LENGTHS)
