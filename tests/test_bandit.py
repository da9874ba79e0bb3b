"""What the KL settings converge to, with a reward, on a bandit whose optima are known in closed form.

    maximize E[R] - beta * KL(pi || ref)   pi = ref * exp(R / beta) / Z
    maximize E[R] - beta * KL(ref || pi)   pi = beta * ref / (Lambda - R), Lambda > max R such that pi sums to 1

The second from the stationarity of sum pi R + beta sum ref log pi - Lambda sum pi. Two right answers of equal reward
keep the ratio of their reference probabilities under both.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from klreg_verl.core import advantages, penalties

REFERENCE = torch.tensor([0.05, 0.25, 0.40, 0.20, 0.10], dtype=torch.float64)
REWARDS = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.5], dtype=torch.float64)
BETA = 0.2
ARMS = torch.arange(5)


def reverse_optimum() -> Tensor:
    return (REFERENCE.log() + REWARDS / BETA).softmax(-1)


def forward_optimum() -> Tensor:
    """Bisection: the sum falls from infinity at Lambda = max R to below 1 at max R + beta."""
    low, high = REWARDS.max(), REWARDS.max() + BETA
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (BETA * REFERENCE / (middle - REWARDS)).sum() > 1 else (low, middle)
    return BETA * REFERENCE / (high - REWARDS)


def penalized(estimator: str, logprobs: Tensor, arms: Tensor, task: Tensor, group_ids: Tensor, **how) -> Tensor:
    """Advantages (B,) of the drawn arms with the KL charged to the reward."""
    mask = torch.ones(len(arms), 1, dtype=torch.bool)
    given = (logprobs.detach()[arms, None], REFERENCE.log()[arms, None], mask)
    penalty = penalties.reward_penalty(estimator, *given, group_ids, **how)
    return penalties.penalized_advantages(task[:, None], penalty, beta=BETA)[:, 0]


def kl_loss(estimator: str, logprobs: Tensor, arms: Tensor, sampler: Tensor | None = None, **how) -> Tensor:
    """The KL loss (B,) of the drawn arms."""
    old = None if sampler is None else sampler.log()[arms, None]
    reference = REFERENCE.log()[arms, None]
    return penalties.kl_loss_per_token(estimator, logprobs[arms, None], reference, old_logprobs=old, **how)[:, 0]


def in_reward(estimator: str, **how) -> Callable[[Tensor], Tensor]:
    """The loss whose gradient is the expected update, all arms listed."""

    def loss(logprobs: Tensor) -> Tensor:
        advantage = penalized(estimator, logprobs, ARMS, REWARDS, ARMS, **how)
        return -(logprobs.detach().exp() * advantage * logprobs).sum()

    return loss


def in_loss(estimator: str, **how) -> Callable[[Tensor], Tensor]:
    def loss(logprobs: Tensor) -> Tensor:
        chance = logprobs.detach().exp()
        return (chance * (BETA * kl_loss(estimator, logprobs, ARMS, chance, **how) - REWARDS * logprobs)).sum()

    return loss


def descend(loss: Callable[[Tensor], Tensor], start: Tensor, steps: int = 600, rate: float = 15.0) -> Tensor:
    """Exact gradient descent in the logits, to the policy where it ends."""
    logits = start.log()
    for _ in range(steps):
        logits.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(logits.log_softmax(-1)), logits)
        logits = (logits - rate * gradient).detach()
    return logits.softmax(-1)


def test_the_optima_are_those_of_the_notes():
    rounded = [[round(p, 3) for p in optimum.tolist()] for optimum in (reverse_optimum(), forward_optimum())]
    assert rounded == [[0.160, 0.801, 0.009, 0.004, 0.026], [0.142, 0.711, 0.075, 0.037, 0.035]]
    for optimum in (reverse_optimum(), forward_optimum()):
        assert optimum.sum().item() == pytest.approx(1.0)
        assert (optimum[0] / optimum[1]).item() == pytest.approx(0.05 / 0.25)


REVERSE = {
    "k1 in reward, sequence": in_reward("k1"),
    "k1 in reward, reward to go": in_reward("k1", credit="reward_to_go"),
    "k1 in reward, token": in_reward("k1", credit="token", baseline="none"),
    "k2 in loss": in_loss("k2"),
    "k2 in loss, detached importance": in_loss("k2", correction="importance_detached"),
    "k3 in loss, importance": in_loss("k3", correction="importance"),
}
FORWARD = {
    "k3 in loss": in_loss("k3"),
    "forward in loss": in_loss("forward"),
    "forward in loss, importance": in_loss("forward", correction="importance"),
    "forward in reward, token": in_reward("forward", credit="token"),
}


@pytest.mark.parametrize("setting", REVERSE)
@pytest.mark.parametrize("start", [REFERENCE, torch.full((5,), 0.2, dtype=torch.float64)], ids=["ref", "uniform"])
def test_reverse_settings_converge_to_the_reference_tilted_by_the_reward(setting, start):
    torch.testing.assert_close(descend(REVERSE[setting], start), reverse_optimum(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("setting", FORWARD)
@pytest.mark.parametrize("start", [REFERENCE, torch.full((5,), 0.2, dtype=torch.float64)], ids=["ref", "uniform"])
def test_forward_settings_converge_to_beta_ref_over_lambda_minus_reward(setting, start):
    torch.testing.assert_close(descend(FORWARD[setting], start), forward_optimum(), atol=1e-6, rtol=0)


def test_k1_in_the_loss_is_no_regularizer():
    # its expected gradient is zero: what is left is the reward, and the wrong answers vanish as without any KL
    found = descend(in_loss("k1"), REFERENCE)
    torch.testing.assert_close(found, descend(lambda logprobs: -(logprobs.exp() * REWARDS).sum(), REFERENCE))
    assert found[2:].sum() < 0.001


def sampled_descent(update: Callable[[Tensor, Tensor, Tensor], Tensor], seed: int, steps: int = 400) -> Tensor:
    """The mean policy of the last half of the steps, each on 64 prompts of 16 draws with RLOO advantages."""
    generator = torch.Generator().manual_seed(seed)
    logits, late = REFERENCE.log(), []
    group_ids = torch.arange(64).repeat_interleave(16)
    for step in range(steps):
        logits.requires_grad_()
        logprobs = logits.log_softmax(-1)
        arms = torch.multinomial(logprobs.detach().exp(), 1024, replacement=True, generator=generator)
        task = advantages.rloo(REWARDS[arms], group_ids)
        (gradient,) = torch.autograd.grad(update(logprobs, arms, task), logits)
        logits = (logits - 4.0 * gradient).detach()
        late += [logits.softmax(-1)] if step >= steps // 2 else []
    return torch.stack(late).mean(dim=0)


def update_in_reward(logprobs: Tensor, arms: Tensor, task: Tensor) -> Tensor:
    group_ids = torch.arange(64).repeat_interleave(16)
    return -(penalized("k1", logprobs, arms, task, group_ids) * logprobs[arms]).mean()


def update_in_loss(estimator: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda logprobs, arms, task: (BETA * kl_loss(estimator, logprobs, arms) - task * logprobs[arms]).mean()


@pytest.mark.parametrize(
    ("update", "optimum"),
    [
        (update_in_reward, reverse_optimum()),
        (update_in_loss("k2"), reverse_optimum()),
        (update_in_loss("k3"), forward_optimum()),
    ],
    ids=["k1 in reward", "k2 in loss", "k3 in loss"],
)
def test_sampled_groups_with_rloo_and_siblings_converge_to_the_same(update, optimum):
    found = sampled_descent(update, seed=1)
    torch.testing.assert_close(found, optimum, atol=0.005, rtol=0)
