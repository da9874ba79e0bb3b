"""klreg_verl.core.penalties: where KL enters, by enumeration on a bandit, identities, signs, masks, extremes."""

import math

import pytest
import torch
from torch import Tensor

from klreg_verl.core import advantages, kl, penalties

REFERENCE = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
START = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()
EVERY_TOKEN = torch.ones(3, 1, dtype=torch.bool)
ALONE = torch.arange(3)


def divergence(logits: Tensor, direction: str) -> Tensor:
    policy, reference = logits.log_softmax(-1), REFERENCE
    one, other = (policy, reference) if direction == "reverse" else (reference, policy)
    return (one.exp() * (one - other)).sum()


def sampled(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All three one-token responses: (logprobs, ref_logprobs), (3, 1), and their probabilities, (3,)."""
    logprobs = logits.log_softmax(-1)
    return logprobs[:, None], REFERENCE[:, None], logprobs.detach().exp()


def gradient_in_loss(estimator: str, start: Tensor = START) -> Tensor:
    logits = start.clone().requires_grad_()
    logprobs, ref_logprobs, chance = sampled(logits)
    loss = penalties.kl_loss_per_token(estimator, logprobs, ref_logprobs, EVERY_TOKEN)[:, 0]
    return torch.autograd.grad((chance * loss).sum(), logits)[0]


def gradient_in_reward(estimator: str, start: Tensor = START) -> Tensor:
    """Policy gradient of advantages that hold nothing but the penalty, as a gradient to descend."""
    logits = start.clone().requires_grad_()
    logprobs, ref_logprobs, chance = sampled(logits)
    penalty = penalties.reward_penalty(estimator, logprobs, ref_logprobs, EVERY_TOKEN, ALONE)
    advantage = penalties.penalized_advantages(torch.zeros(3, dtype=torch.float64), penalty, beta=1.0)
    return torch.autograd.grad(-(chance * advantage * logprobs[:, 0]).sum(), logits)[0]


def gradient_of(direction: str, start: Tensor = START) -> Tensor:
    logits = start.clone().requires_grad_()
    return torch.autograd.grad(divergence(logits, direction), logits)[0]


def batch(seed: int = 1, rows: int = 6, length: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, ref_logprobs, response_mask, group_ids): two groups of responses of unequal lengths."""
    generator = torch.Generator().manual_seed(seed)
    logprobs, ref_logprobs = (-3 * torch.rand(rows, length, generator=generator) for _ in range(2))
    response_mask = torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=generator)
    return logprobs, ref_logprobs, response_mask, torch.arange(rows) % 2


def test_k1_in_the_reward_has_the_gradient_of_the_reverse_kl():
    torch.testing.assert_close(gradient_in_reward("k1"), gradient_of("reverse"))


def test_in_the_loss_k2_follows_the_reverse_kl_k3_the_forward_kl_and_k1_nothing():
    torch.testing.assert_close(gradient_in_loss("k2"), gradient_of("reverse"))
    torch.testing.assert_close(gradient_in_loss("k3"), gradient_of("forward"))
    assert gradient_in_loss("k1").abs().max() < 1e-15


@pytest.mark.parametrize(
    ("gradient", "estimator", "direction"),
    [(gradient_in_reward, "k1", "reverse"), (gradient_in_loss, "k2", "reverse"), (gradient_in_loss, "k3", "forward")],
)
def test_one_step_on_kl_alone_lowers_it(gradient, estimator, direction):
    stepped = START - 0.1 * gradient(estimator, START)
    assert divergence(stepped, direction) < 0.95 * divergence(START, direction)


def test_descending_the_reward_penalty_ends_at_the_reference():
    logits = START.clone()
    for _ in range(2000):
        logits = logits - 0.5 * gradient_in_reward("k1", logits)
    torch.testing.assert_close(logits.softmax(-1), REFERENCE.exp(), atol=1e-6, rtol=0)


def test_with_a_reward_the_optimum_is_the_reference_tilted_by_reward_over_beta():
    # maximizing E[R] - beta * KL(pi || ref) has the solution ref * exp(R / beta) / Z
    rewards, beta = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64), 0.5
    logits = START.clone().requires_grad_()
    for _ in range(3000):
        logprobs, ref_logprobs, chance = sampled(logits)
        penalty = penalties.reward_penalty("k1", logprobs, ref_logprobs, EVERY_TOKEN, ALONE)
        advantage = penalties.penalized_advantages(rewards, penalty, beta=beta)
        (ascent,) = torch.autograd.grad((chance * advantage * logprobs[:, 0]).sum(), logits)
        logits = (logits + ascent).detach().requires_grad_()
    optimum = (REFERENCE + rewards / beta).softmax(-1)
    torch.testing.assert_close(logits.detach().softmax(-1), optimum, atol=1e-6, rtol=0)


def test_k1_charged_per_token_without_baseline_is_k2_in_the_loss_sample_by_sample():
    logprobs, ref_logprobs, response_mask, _ = batch()
    logprobs.requires_grad_()
    charge = kl.reward_charge("k1", logprobs, ref_logprobs).detach()
    (in_reward,) = torch.autograd.grad((charge * logprobs)[response_mask].sum(), logprobs)
    in_loss = penalties.kl_loss_per_token("k2", logprobs, ref_logprobs, response_mask).sum()
    torch.testing.assert_close(torch.autograd.grad(in_loss, logprobs)[0], in_reward)


def test_one_token_responses_without_siblings_make_reward_penalty_k2_in_the_loss():
    logprobs = START[:, None].clone().requires_grad_()
    penalty = penalties.reward_penalty("k1", logprobs, REFERENCE[:, None], EVERY_TOKEN, ALONE)
    (in_reward,) = torch.autograd.grad((penalty * logprobs[:, 0]).sum(), logprobs)
    (in_loss,) = torch.autograd.grad(penalties.kl_loss_per_token("k2", logprobs, REFERENCE[:, None]).sum(), logprobs)
    torch.testing.assert_close(in_reward, in_loss)


def test_reward_penalty_is_the_response_sum_minus_the_mean_of_the_siblings():
    # d summed: row 0: 1 + 2 = 3, row 1: 4 (its second token is masked), row 2: 1 + 1 = 2, row 3: alone, 5
    d = torch.tensor([[1.0, 2.0], [4.0, 9.0], [1.0, 1.0], [5.0, 0.0]])
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    penalty = penalties.reward_penalty("k1", d, torch.zeros_like(d), mask, torch.tensor([0, 0, 0, 1]))
    # 3 - (4 + 2) / 2, 4 - (3 + 2) / 2, 2 - (3 + 4) / 2, 5 - 0
    assert penalty.tolist() == [0.0, 1.5, -1.5, 5.0]


def test_reward_penalty_is_the_rloo_advantage_of_the_charge():
    given = batch()
    charge = penalties.response_charge("k1", *given[:3])
    torch.testing.assert_close(penalties.reward_penalty("k1", *given), advantages.rloo(charge, given[3]))


def test_penalty_on_finished_advantages_equals_rloo_on_charged_rewards():
    # RLOO is linear, so it does not matter for it whether KL is charged before or after the baseline
    given, beta = batch(), 0.3
    scores = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    charged = scores - beta * penalties.response_charge("k1", *given[:3])
    after = penalties.penalized_advantages(
        advantages.rloo(scores, given[3]), penalties.reward_penalty("k1", *given), beta=beta
    )
    torch.testing.assert_close(after, advantages.rloo(charged, given[3]))


def test_beta_survives_groups_of_equal_rewards_under_grpo():
    # inside the std division these groups would get unit-size advantages whatever beta is
    given = batch()
    task = advantages.grpo(torch.ones(6), given[3])
    penalty = penalties.reward_penalty("k1", *given)
    small = penalties.penalized_advantages(task, penalty, beta=0.001)
    torch.testing.assert_close(small, -0.001 * penalty)


@pytest.mark.parametrize("estimator", kl.names())
def test_the_kl_loss_has_the_value_of_one_column_and_the_gradient_of_the_other(estimator):
    logprobs, ref_logprobs, _, _ = batch()
    logprobs.requires_grad_()
    loss = penalties.kl_loss_per_token(estimator, logprobs, ref_logprobs)
    torch.testing.assert_close(loss.detach(), kl.value(estimator, logprobs.detach(), ref_logprobs))
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, kl.coefficient(estimator, logprobs.detach(), ref_logprobs))


def test_the_reference_and_the_penalty_carry_no_gradient():
    logprobs, ref_logprobs, response_mask, group_ids = batch()
    logprobs.requires_grad_()
    ref_logprobs.requires_grad_()
    assert not penalties.reward_penalty("k1", logprobs, ref_logprobs, response_mask, group_ids).requires_grad
    penalties.kl_loss_per_token("k3", logprobs, ref_logprobs).sum().backward()
    assert ref_logprobs.grad is None


@pytest.mark.parametrize("estimator", kl.names())
def test_masked_equals_sliced(estimator):
    logprobs, ref_logprobs, _, group_ids = batch()
    mask = torch.arange(5).expand(6, 5) < 3
    short = (logprobs[:, :3], ref_logprobs[:, :3], mask[:, :3])
    full = (logprobs, ref_logprobs, mask)
    torch.testing.assert_close(
        penalties.reward_penalty(estimator, *full, group_ids), penalties.reward_penalty(estimator, *short, group_ids)
    )
    loss = penalties.kl_loss_per_token(estimator, *full)
    torch.testing.assert_close(loss[:, :3], penalties.kl_loss_per_token(estimator, *short))
    assert not loss[:, 3:].any()


def test_fully_masked_rows_are_inert():
    logprobs, ref_logprobs, response_mask, group_ids = batch()
    padding = torch.zeros(2, 5)
    padded = (
        torch.cat([logprobs, padding]),
        torch.cat([ref_logprobs, padding - 7.0]),
        torch.cat([response_mask, padding.bool()]),
        torch.cat([group_ids, torch.tensor([0, 1])]),
    )
    found = penalties.reward_penalty("k1", *padded)
    torch.testing.assert_close(
        found[:6], penalties.reward_penalty("k1", logprobs, ref_logprobs, response_mask, group_ids)
    )
    assert found[6:].tolist() == [0.0, 0.0]
    assert not penalties.kl_loss_per_token("k3", *padded[:3])[6:].any()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("estimator", kl.names())
def test_poison_under_the_mask_is_inert_in_value_and_gradient(estimator, poison):
    logprobs, ref_logprobs, response_mask, group_ids = batch()
    clean = penalties.reward_penalty(estimator, logprobs, ref_logprobs, response_mask, group_ids)
    poisoned = [torch.where(response_mask, values, poison) for values in (logprobs, ref_logprobs)]
    torch.testing.assert_close(penalties.reward_penalty(estimator, *poisoned, response_mask, group_ids), clean)
    policy = poisoned[0].requires_grad_()
    loss = penalties.kl_loss_per_token(estimator, policy, poisoned[1], response_mask)
    loss.sum().backward()
    assert loss.isfinite().all()
    expected = torch.where(response_mask, kl.coefficient(estimator, logprobs, ref_logprobs), 0.0)
    torch.testing.assert_close(policy.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("estimator", kl.names())
@pytest.mark.parametrize("log_ratio", [-80.0, -1.0, -1e-6, 1e-6, 1.0, 80.0])
def test_extreme_log_ratios_are_finite_forward_and_backward(estimator, dtype, log_ratio):
    logprobs = torch.tensor([[log_ratio]], dtype=dtype, requires_grad=True)
    loss = penalties.kl_loss_per_token(estimator, logprobs, torch.zeros(1, 1, dtype=dtype))
    loss.sum().backward()
    assert loss.dtype == torch.float32 and loss.isfinite().all()
    exact = {"k1": 1.0, "k2": log_ratio, "k3": -math.expm1(-log_ratio)}[estimator]
    precision = 1e-5 if dtype == torch.float32 else 5e-3
    # rounding -80 or 1e-6 to bfloat16 changes it by up to 2^-9, and the gradient is stored in bfloat16 again
    assert logprobs.grad is not None and logprobs.grad.item() == pytest.approx(exact, rel=precision)


def test_every_token_of_a_response_carries_its_whole_penalty():
    # 1 - 0.5 * 2 = 0 and 3 - 0.5 * 4 = 1, at both tokens
    task, penalty = torch.tensor([[1.0, 1.0], [3.0, 3.0]]), torch.tensor([2.0, 4.0])
    assert penalties.penalized_advantages(task, penalty, beta=0.5).tolist() == [[0.0, 0.0], [1.0, 1.0]]


@pytest.mark.parametrize("shape", [(3, 1), (2,), ()])
def test_a_penalty_that_is_not_one_number_per_response_is_refused(shape):
    with pytest.raises(ValueError, match=r"Advantages of shape \(3,\).*responses would be charged for each other"):
        penalties.penalized_advantages(torch.zeros(3), torch.zeros(shape), beta=0.1)
