"""`make bench`: advantages of a large batch, ours against verl's RLOO loop, turn by turn. Prints; asserts no time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from klreg_verl.core import advantages

RESPONSES, SIBLINGS, TURNS = 8192, 8, 15
TARGETS = {1: "target 20", 1024: "no target: reading and writing (B, T) is the same in both"}

core_algos = pytest.importorskip("verl.trainer.ppo.core_algos", reason="the stack is not installed (make setup)")


def ours(token_rewards: Tensor, mask: Tensor, group_ids: Tensor) -> Tensor:
    return advantages.rloo(token_rewards.sum(dim=-1), group_ids)[:, None] * mask


def verls(token_rewards: Tensor, mask: Tensor, group_ids: Tensor) -> Tensor:
    return core_algos.compute_rloo_outcome_advantage(token_rewards, mask, group_ids.numpy())[0]


@pytest.mark.parametrize("tokens", TARGETS)
def test_rloo_of_8192_responses(tokens: int):
    generator = torch.Generator().manual_seed(1)
    group_ids = torch.arange(RESPONSES // SIBLINGS).repeat_interleave(SIBLINGS)
    group_ids = group_ids[torch.randperm(RESPONSES, generator=generator)]
    rewards = torch.zeros(RESPONSES, tokens)
    rewards[:, -1] = torch.randint(0, 3, (RESPONSES,), generator=generator) / 2
    mask = torch.ones_like(rewards)
    given = (mask, group_ids)
    torch.testing.assert_close(ours(rewards.clone(), *given), verls(rewards.clone(), *given), atol=1e-6, rtol=0)
    seconds = [(timed(ours, rewards, *given), timed(verls, rewards, *given)) for _ in range(TURNS)]
    ratios = [theirs / mine for mine, theirs in seconds]
    print(f"\nRLOO advantages of {RESPONSES} responses, {tokens} tokens each, groups of {SIBLINGS}; equal within 1e-6")
    for name, column in zip(("ours", "verl"), zip(*seconds, strict=True), strict=True):
        print(f"  {name}          {spread([1000 * entry for entry in column])} ms")
    print(f"  verl / ours   {spread(ratios)}  ({TARGETS[tokens]})")


def timed(function: Callable[..., Tensor], rewards: Tensor, *given: Tensor) -> float:
    """Seconds of one call; on a copy, since verl writes into its argument when there is one token."""
    copy = rewards.clone()
    begun = time.perf_counter()
    function(copy, *given)
    return time.perf_counter() - begun


def spread(values: list[float]) -> str:
    """Median, and the quartiles around it."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3g} [{low:.3g}, {high:.3g}] n={len(values)}"
