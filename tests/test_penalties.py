"""klreg_verl.core.penalties: where KL enters, by enumeration, identities, signs, masks, extremes.

What the settings converge to with a reward is in test_bandit.py.
"""

import math

import pytest
import torch
from torch import Tensor

from klreg_verl.core import advantages, kl, penalties
from klreg_verl.core.shaping import Clip, LengthNormalized, Sigmoid

REFERENCE = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
START = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()
SAMPLER = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64).log()
EVERY_TOKEN = torch.ones(3, 1, dtype=torch.bool)
ALONE = torch.arange(3)
SHAPINGS = [None, Clip(0.5), Sigmoid(), LengthNormalized()]


class OwnK3:
    """A user's own estimator, found as test_penalties:OWN_K3."""

    @staticmethod
    def value(log_ratio: Tensor) -> Tensor:
        return torch.exp(-log_ratio) - 1 + log_ratio

    @staticmethod
    def coefficient(log_ratio: Tensor) -> Tensor:
        return 1 - torch.exp(-log_ratio)


class OwnWithoutDerivative(OwnK3):
    @staticmethod
    def value(log_ratio: Tensor) -> Tensor:
        return OwnK3.value(log_ratio.detach())


class OwnShifted(OwnK3):
    """Not 0 where policy and reference agree, as they do under the mask after its inputs are blanked."""

    @staticmethod
    def value(log_ratio: Tensor) -> Tensor:
        return OwnK3.value(log_ratio) + 1

    reward_charge = value


OWN_K3, OWN_WITHOUT_DERIVATIVE, OWN_SHIFTED = OwnK3(), OwnWithoutDerivative(), OwnShifted()


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
    advantage = penalties.penalized_advantages(torch.zeros(3, 1, dtype=torch.float64), penalty, beta=1.0)
    return torch.autograd.grad(-(chance * advantage[:, 0] * logprobs[:, 0]).sum(), logits)[0]


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
    [
        (gradient_in_reward, "k1", "reverse"),
        (gradient_in_reward, "forward", "forward"),
        (gradient_in_loss, "k2", "reverse"),
        (gradient_in_loss, "k3", "forward"),
        (gradient_in_loss, "forward", "forward"),
    ],
)
def test_one_step_on_kl_alone_lowers_it(gradient, estimator, direction):
    stepped = START - 0.1 * gradient(estimator, START)
    assert divergence(stepped, direction) < 0.95 * divergence(START, direction)


def test_descending_the_reward_penalty_ends_at_the_reference():
    logits = START.clone()
    for _ in range(2000):
        logits = logits - 0.5 * gradient_in_reward("k1", logits)
    torch.testing.assert_close(logits.softmax(-1), REFERENCE.exp(), atol=1e-6, rtol=0)


def test_k1_in_the_reward_with_token_credit_and_no_baseline_is_k2_in_the_loss_sample_by_sample():
    logprobs, ref_logprobs, response_mask, group_ids = batch()
    logprobs.requires_grad_()
    given = (logprobs, ref_logprobs, response_mask)
    penalty = penalties.reward_penalty("k1", *given, group_ids, credit="token", baseline="none")
    (in_reward,) = torch.autograd.grad((penalty * logprobs).sum(), logprobs)
    (in_loss,) = torch.autograd.grad(penalties.kl_loss_per_token("k2", *given).sum(), logprobs)
    assert torch.equal(in_reward, in_loss) and in_loss.any()


D = torch.tensor([[1.0, 2.0, 4.0], [5.0, 9.0, 9.0], [3.0, 1.0, 9.0], [7.0, 2.0, 1.0]])
"""Log-ratios of three siblings of 3, 1 and 2 tokens and of a response of 3 that has none; the 9s are padding."""
WRITTEN = torch.arange(3) < torch.tensor([[3], [1], [2], [3]])
FAMILY = torch.tensor([0, 0, 0, 1])


def penalty_by(**how: str) -> list[list[float]]:
    return penalties.reward_penalty("k1", D, torch.zeros_like(D), WRITTEN, FAMILY, **how).tolist()


def test_sequence_credit_charges_every_token_the_response_sum_minus_the_mean_of_all_siblings():
    # sums 7, 5, 4 and, alone, 10: 7 - (5 + 4) / 2, 5 - (7 + 4) / 2, 4 - (7 + 5) / 2, 10 - 0
    expected = [[2.5, 2.5, 2.5], [-0.5, 0.0, 0.0], [-2.0, -2.0, 0.0], [10.0, 10.0, 10.0]]
    assert penalty_by() == expected
    assert penalty_by(credit="sequence", baseline="siblings") == expected


def test_reward_to_go_charges_what_follows_minus_the_mean_of_the_siblings_that_still_write():
    # from t on: 7 6 4 | 5 | 4 1 | 10 3 1. At t = 0: 7 - 4.5, 5 - 5.5, 4 - 6; at t = 1 the two rows left: 6 - 1, 1 - 6;
    # at t = 2 row 0 is alone: 4 - 0
    expected = [[2.5, 5.0, 4.0], [-0.5, 0.0, 0.0], [-2.0, -5.0, 0.0], [10.0, 3.0, 1.0]]
    assert penalty_by(credit="reward_to_go") == expected


def test_token_credit_charges_the_token_minus_the_mean_of_the_siblings_that_still_write():
    # at t = 0: 1 - (5 + 3) / 2, 5 - (1 + 3) / 2, 3 - (1 + 5) / 2; at t = 1: 2 - 1, 1 - 2; at t = 2: 4 - 0
    assert penalty_by(credit="token") == [[-3.0, 1.0, 4.0], [3.0, 0.0, 0.0], [0.0, -1.0, 0.0], [7.0, 2.0, 1.0]]


def test_without_a_baseline_the_charge_itself_is_the_penalty():
    for credit in penalties.CREDITS:
        charge = penalties.charges("k1", D, torch.zeros_like(D), WRITTEN, credit=credit)
        assert penalty_by(credit=credit, baseline="none") == charge.tolist()
    assert penalty_by(credit="reward_to_go", baseline="none")[0] == [7.0, 6.0, 4.0]


def test_a_hole_in_the_mask_is_not_charged_and_does_not_cut_the_response():
    # a tool's tokens in the middle: 1 and 4 are ours, the 100 is not
    d, mask = torch.tensor([[1.0, 100.0, 4.0]]), torch.tensor([[True, False, True]])
    found = {
        credit: penalties.charges("k1", d, torch.zeros_like(d), mask, credit=credit)[0].tolist()
        for credit in penalties.CREDITS
    }
    assert found == {"sequence": [5.0, 0.0, 5.0], "reward_to_go": [5.0, 0.0, 4.0], "token": [1.0, 0.0, 4.0]}


def test_the_baseline_is_the_penalty_s_other_half():
    given = batch()
    for credit in penalties.CREDITS:
        charge = penalties.charges("k3", *given[:3], credit=credit)
        difference = charge - penalties.baseline(charge, *given[2:], credit=credit)
        assert torch.equal(difference, penalties.reward_penalty("k3", *given, credit=credit))


def test_a_response_that_begins_with_a_tool_s_tokens_has_its_siblings_mean():
    # the first unmasked position differs between the rows: sums 4 and 3
    d, mask = torch.tensor([[9.0, 4.0], [1.0, 2.0]]), torch.tensor([[False, True], [True, True]])
    found = penalties.reward_penalty("k1", d, torch.zeros_like(d), mask, torch.tensor([2, 2]))
    assert found.tolist() == [[0.0, 1.0], [-1.0, -1.0]]


def test_sequence_credit_is_the_rloo_advantage_of_the_charge_on_every_token():
    given = batch()
    charge = penalties.response_charge("k1", *given[:3])
    expected = advantages.rloo(charge, given[3])[:, None] * given[2]
    assert torch.equal(penalties.reward_penalty("k1", *given), expected)


def test_penalty_on_finished_advantages_equals_rloo_on_charged_rewards():
    # RLOO is linear, so it does not matter for it whether KL is charged before or after the baseline
    given, beta = batch(), 0.3
    scores = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    charged = scores - beta * penalties.response_charge("k1", *given[:3])
    task = advantages.rloo(scores, given[3])[:, None] * given[2]
    after = penalties.penalized_advantages(task, penalties.reward_penalty("k1", *given), beta=beta)
    torch.testing.assert_close(after, advantages.rloo(charged, given[3])[:, None] * given[2])


def test_beta_survives_groups_of_equal_rewards_under_grpo():
    # inside the std division these groups would get unit-size advantages whatever beta is
    given = batch()
    task = advantages.grpo(torch.ones(6), given[3])[:, None] * given[2]
    penalty = penalties.reward_penalty("k1", *given)
    small = penalties.penalized_advantages(task, penalty, beta=0.001)
    torch.testing.assert_close(small, -0.001 * penalty)


# Whole responses: token 0 ends, token 1 goes on once; responses 0 | 1 0 | 1 1. Row 0 of the logits is for the first
# token, row 1 for the token after 1.
TREE = torch.tensor([[0.5, 0.5], [0.9, 0.1]], dtype=torch.float64).log()
TREE_REFERENCE = torch.tensor([[0.4, 0.6], [0.3, 0.7]], dtype=torch.float64).log()
TREE_TOKENS = torch.tensor([[0, 0], [1, 0], [1, 1]])
TREE_MASK = torch.tensor([[True, False], [True, True], [True, True]])


def tree_logprobs(logits: Tensor) -> Tensor:
    """(3, 2), of each token of each of the three responses."""
    return logits.log_softmax(-1)[torch.arange(2), TREE_TOKENS]


def tree_gradient_in_reward(estimator: str, **how: str) -> Tensor:
    """E over all nine pairs of siblings of the sum of penalty_t * grad log pi(y_t), to descend."""
    logits = TREE.clone().requires_grad_()
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3)).flatten()
    group_ids = torch.arange(9).repeat_interleave(2)
    logprobs, ref_logprobs, mask = tree_logprobs(logits)[pairs], tree_logprobs(TREE_REFERENCE)[pairs], TREE_MASK[pairs]
    chance = torch.where(mask, logprobs.detach(), 0.0).sum(-1).reshape(9, 2).sum(-1).exp().repeat_interleave(2) / 2
    penalty = penalties.reward_penalty(estimator, logprobs, ref_logprobs, mask, group_ids, **how)
    return torch.autograd.grad((chance[:, None] * penalty * logprobs).sum(), logits)[0]


def tree_gradient_in_loss(estimator: str) -> Tensor:
    logits = TREE.clone().requires_grad_()
    logprobs = tree_logprobs(logits)
    chance = torch.where(TREE_MASK, logprobs.detach(), 0.0).sum(-1, keepdim=True).exp()
    loss = penalties.kl_loss_per_token(estimator, logprobs, tree_logprobs(TREE_REFERENCE), TREE_MASK)
    return torch.autograd.grad((chance * loss).sum(), logits)[0]


def gradient_of_the_sequence_kl() -> Tensor:
    """KL of the first token plus pi(1) times KL of the second, differentiated through pi(1) as well."""
    logits = TREE.clone().requires_grad_()
    policy, reference = logits.log_softmax(-1), TREE_REFERENCE
    per_prefix = (policy.exp() * (policy - reference)).sum(-1)
    return torch.autograd.grad(per_prefix[0] + policy[0, 1].exp() * per_prefix[1], logits)[0]


@pytest.mark.parametrize("baseline", penalties.BASELINES)
@pytest.mark.parametrize("credit", ["sequence", "reward_to_go"])
def test_k1_charged_for_the_whole_response_or_from_here_on_is_the_gradient_of_the_sequence_kl(credit, baseline):
    found = tree_gradient_in_reward("k1", credit=credit, baseline=baseline)
    torch.testing.assert_close(found, gradient_of_the_sequence_kl())


@pytest.mark.parametrize("baseline", penalties.BASELINES)
def test_k1_charged_token_by_token_is_only_the_part_that_k2_in_the_loss_follows(baseline):
    found = tree_gradient_in_reward("k1", credit="token", baseline=baseline)
    torch.testing.assert_close(found, tree_gradient_in_loss("k2"))
    # steering: choosing token 1 leads to the prefix that drifted, and only the first token's logits can avoid it
    truth = gradient_of_the_sequence_kl()
    torch.testing.assert_close(found[1], truth[1])
    assert found[0] @ truth[0] < 0


@pytest.mark.parametrize("credit", ["sequence", "reward_to_go"])
def test_k3_in_reward_and_in_loss_together_are_the_gradient_of_the_sequence_kl(credit):
    # E[sum of k3] is the KL; its gradient is E[(sum of k3) * s], the reward, plus E[grad of the sum], the loss
    together = tree_gradient_in_reward("k3", credit=credit) + tree_gradient_in_loss("k3")
    torch.testing.assert_close(together, gradient_of_the_sequence_kl())


# Off-policy: responses of SAMPLER, the policy at START.


def off_policy_gradient(estimator: str, correction: str) -> Tensor:
    """E over SAMPLER of the gradient of the loss, of one-token responses."""
    logits = START.clone().requires_grad_()
    logprobs, ref_logprobs, _ = sampled(logits)
    loss = penalties.kl_loss_per_token(
        estimator, logprobs, ref_logprobs, EVERY_TOKEN, old_logprobs=SAMPLER[:, None], correction=correction
    )
    return torch.autograd.grad((SAMPLER.exp() * loss[:, 0]).sum(), logits)[0]


F_DIVERGENCES = {
    "forward": lambda r: r * r.log() - r + 1,
    "js": lambda r: (r * r.log() - (1 + r) * ((1 + r) / 2).log()) / 2,
    "chi2": lambda r: (r - 1).square(),
    "tv": lambda r: (r - 1).abs() / 2,
}


def gradient_of_f(name: str) -> Tensor:
    logits = START.clone().requires_grad_()
    policy = logits.log_softmax(-1)
    return torch.autograd.grad((policy.exp() * F_DIVERGENCES[name]((REFERENCE - policy).exp())).sum(), logits)[0]


@pytest.mark.parametrize(
    ("estimator", "correction", "direction"),
    [
        ("k1", "importance", "reverse"),
        ("k3", "importance", "reverse"),
        ("k2", "importance_detached", "reverse"),
        ("k3", "importance_detached", "forward"),
    ],
)
def test_the_corrections_follow_a_divergence_off_policy(estimator, correction, direction):
    torch.testing.assert_close(off_policy_gradient(estimator, correction), gradient_of(direction))


@pytest.mark.parametrize("correction", ["importance", "importance_detached"])
@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_an_f_divergence_follows_itself_off_policy_by_either_correction(name, correction):
    torch.testing.assert_close(off_policy_gradient(name, correction), gradient_of_f(name))


def test_importance_on_k2_follows_the_mean_of_k2_and_no_divergence():
    logits = START.clone().requires_grad_()
    policy = logits.log_softmax(-1)
    (mean_of_k2,) = torch.autograd.grad((policy.exp() * (policy - REFERENCE).square() / 2).sum(), logits)
    found = off_policy_gradient("k2", "importance")
    torch.testing.assert_close(found, mean_of_k2)
    assert (found - gradient_of("reverse")).norm() > 0.1 * gradient_of("reverse").norm()


def test_uncorrected_off_policy_samples_follow_nothing():
    for estimator, direction in [("k2", "reverse"), ("k3", "forward")]:
        error = (off_policy_gradient(estimator, "none") - gradient_of(direction)).norm()
        assert error > 0.1 * gradient_of(direction).norm()
    # k1: E over mu of s is mu - pi, whatever the reference
    torch.testing.assert_close(off_policy_gradient("k1", "none"), SAMPLER.exp() - START.exp())


@pytest.mark.parametrize("estimator", [*kl.names(), "test_penalties:OWN_K3"])
def test_importance_is_the_derivative_of_the_weighted_value_sample_by_sample(estimator):
    logprobs, ref_logprobs, _, _ = (values.double() for values in batch())
    old = logprobs - 0.5 * torch.rand(6, 5, generator=torch.Generator().manual_seed(3))
    logprobs.requires_grad_()
    weighted = (logprobs - old).exp() * kl.value(estimator, logprobs, ref_logprobs)
    (expected,) = torch.autograd.grad(weighted.sum(), logprobs)
    loss = penalties.kl_loss_per_token(estimator, logprobs, ref_logprobs, old_logprobs=old, correction="importance")
    torch.testing.assert_close(loss, weighted)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), logprobs)[0], expected)


def test_k3_in_the_loss_is_the_importance_weighted_forward_sample_by_sample():
    logprobs, ref_logprobs, mask, _ = batch()
    old = logprobs.clone()
    logprobs.requires_grad_()
    k3 = penalties.kl_loss_per_token("k3", logprobs, ref_logprobs, mask)
    forward = penalties.kl_loss_per_token(
        "forward", logprobs, ref_logprobs, mask, old_logprobs=old, correction="importance"
    )
    gradients = [torch.autograd.grad(loss.sum(), logprobs)[0] for loss in (k3, forward)]
    torch.testing.assert_close(gradients[0], gradients[1])
    assert (k3 - forward).abs().max() > 0.1  # their values estimate the two directions


def test_detached_importance_weighs_value_and_gradient():
    # w = exp(-1 - -2) = e, d = -1 - -3 = 2: value e * 2^2 / 2, gradient e * 2
    logprobs = torch.tensor([[-1.0]], requires_grad=True)
    loss = penalties.kl_loss_per_token(
        "k2",
        logprobs,
        torch.tensor([[-3.0]]),
        old_logprobs=torch.tensor([[-2.0]]),
        correction="importance_detached",
    )
    loss.backward()
    assert loss.item() == pytest.approx(2 * math.e) and logprobs.grad.item() == pytest.approx(2 * math.e)


@pytest.mark.parametrize("log_ratio", [-80.0, -20.0, -1e-6, 1e-6, 20.0, 80.0])
def test_importance_weighted_k3_keeps_the_digits_of_d(log_ratio):
    # (r - 1 + d) + (1 - r) is d; added in float32 at d = -20 it would be off by tens
    logprobs = torch.tensor([[log_ratio]], requires_grad=True)
    zeros = torch.zeros(1, 1)
    penalties.kl_loss_per_token(
        "k3", logprobs, zeros, old_logprobs=logprobs.detach(), correction="importance"
    ).backward()
    assert logprobs.grad.item() == logprobs.item()


def test_importance_on_a_user_s_own_value_is_differentiated_in_float64():
    # exp(10) is 22026: float32 would leave an error of a thousandth on d = -10
    logprobs = torch.tensor([[-10.0]], requires_grad=True)
    given = (logprobs, torch.zeros(1, 1))
    penalties.kl_loss_per_token(
        "test_penalties:OWN_K3", *given, old_logprobs=logprobs.detach(), correction="importance"
    ).backward()
    assert logprobs.grad.item() == pytest.approx(-10.0, rel=1e-7)


# Shaping and cap.


def shaped_gradient(shaping, **how) -> tuple[list[float], list[float]]:
    """(value, gradient) of k2 in the loss at d = 2, 1 and, in a response of one token, 4."""
    logprobs = torch.tensor([[2.0, 1.0], [4.0, 9.0]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    loss = penalties.kl_loss_per_token("k2", logprobs, torch.zeros(2, 2), mask, shaping=shaping, **how)
    loss.sum().backward()
    return loss[mask].tolist(), logprobs.grad[mask].tolist()


def test_shaping_in_the_loss_changes_value_and_gradient():
    # k2 is 2, 0.5, 8 with the coefficients 2, 1, 4
    assert shaped_gradient(None) == ([2.0, 0.5, 8.0], [2.0, 1.0, 4.0])
    assert shaped_gradient(Clip(1.0)) == ([1.0, 0.5, 1.0], [0.0, 1.0, 0.0])
    assert shaped_gradient(LengthNormalized()) == ([1.0, 0.25, 8.0], [1.0, 0.5, 4.0])


def test_shaping_acts_on_the_weighted_value():
    # w = exp(d - d + log 2) = 2: values 4, 1, 16 and coefficients 4, 2, 8; only the second is not above 1
    old = torch.tensor([[2.0, 1.0], [4.0, 0.0]]) - math.log(2)
    value, gradient = shaped_gradient(Clip(1.001), old_logprobs=old, correction="importance_detached")
    assert value == pytest.approx([1.001, 1.0, 1.001]) and gradient == pytest.approx([0.0, 2.0, 0.0])


def test_shaping_in_the_reward_changes_the_charge_of_each_token():
    # k1 is 1 2 4 | 5 | 3 1 | 7 2 1: cut at 2 and summed 5, 2, 3, 5; divided by the length 7/3, 5, 2, 10/3
    found = {
        type(shaping): penalties.response_charge("k1", D, torch.zeros_like(D), WRITTEN, shaping=shaping).tolist()
        for shaping in (Clip(2.0), LengthNormalized())
    }
    assert found[Clip] == [5.0, 2.0, 3.0, 5.0]
    assert found[LengthNormalized] == pytest.approx([7 / 3, 5.0, 2.0, 10 / 3])
    penalty = penalties.reward_penalty("k1", D, torch.zeros_like(D), WRITTEN, FAMILY, shaping=Clip(2.0))
    assert penalty[:, 0].tolist() == [5.0 - 2.5, 2.0 - 4.0, 3.0 - 3.5, 5.0]


@pytest.mark.parametrize("correction", penalties.CORRECTIONS)
@pytest.mark.parametrize("estimator", [*kl.names(), "test_penalties:OWN_K3"])
def test_a_capped_token_passes_no_gradient_and_the_others_theirs(estimator, correction):
    d = torch.tensor([[-6.0, -1.5, 0.5, 6.0]])
    gradients = []
    for cap in (None, 2.0):
        logprobs = d.clone().requires_grad_()
        loss = penalties.kl_loss_per_token(
            estimator, logprobs, torch.zeros_like(d), old_logprobs=d - 0.1, correction=correction, cap=cap
        )
        gradients += torch.autograd.grad(loss.sum(), logprobs)
    free, capped = gradients
    assert free[0, 1] != 0 and torch.equal(capped[:, 1:3], free[:, 1:3])
    assert capped[0, [0, 3]].tolist() == [0.0, 0.0]


def test_a_cap_limits_the_charge():
    # 1 2 4 | 5 | 3 1 | 7 2 1 at most 3
    charge = penalties.response_charge("k1", D, torch.zeros_like(D), WRITTEN, cap=3.0)
    assert charge.tolist() == [6.0, 3.0, 4.0, 6.0]


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


@pytest.mark.parametrize("shaping", SHAPINGS)
@pytest.mark.parametrize("estimator", kl.names())
def test_masked_equals_sliced(estimator, shaping):
    logprobs, ref_logprobs, _, group_ids = batch()
    mask = torch.arange(5).expand(6, 5) < 3
    full, short = (logprobs, ref_logprobs, mask), (logprobs[:, :3], ref_logprobs[:, :3], mask[:, :3])
    for credit in penalties.CREDITS:
        long, cut = (
            penalties.reward_penalty(estimator, *given, group_ids, credit=credit, shaping=shaping)
            for given in (full, short)
        )
        torch.testing.assert_close(long[:, :3], cut)
        assert not long[:, 3:].any()
    for correction in penalties.CORRECTIONS:
        long, cut = (
            penalties.kl_loss_per_token(
                estimator, *given, old_logprobs=given[0] - 0.2, correction=correction, shaping=shaping
            )
            for given in (full, short)
        )
        torch.testing.assert_close(long[:, :3], cut)
        assert not long[:, 3:].any()


@pytest.mark.parametrize("credit", penalties.CREDITS)
def test_fully_masked_rows_are_inert(credit):
    logprobs, ref_logprobs, response_mask, group_ids = batch()
    padding = torch.zeros(2, 5)
    padded = (
        torch.cat([logprobs, padding]),
        torch.cat([ref_logprobs, padding - 7.0]),
        torch.cat([response_mask, padding.bool()]),
        torch.cat([group_ids, torch.tensor([0, 1])]),
    )
    for shaping in SHAPINGS:
        found = penalties.reward_penalty("k1", *padded, credit=credit, shaping=shaping)
        alone = penalties.reward_penalty(
            "k1", logprobs, ref_logprobs, response_mask, group_ids, credit=credit, shaping=shaping
        )
        torch.testing.assert_close(found[:6], alone)
        assert not found[6:].any()
        assert not penalties.kl_loss_per_token("k3", *padded[:3], shaping=shaping)[6:].any()


@pytest.mark.parametrize("estimator", [*kl.names(), "test_penalties:OWN_SHIFTED"])
@pytest.mark.parametrize("credit", penalties.CREDITS)
def test_masked_positions_are_zero_whatever_the_estimator(estimator, credit):
    logprobs, ref_logprobs, mask, group_ids = batch()
    assert not mask.all()
    charge = penalties.charges(estimator, logprobs, ref_logprobs, mask, credit=credit)
    assert not charge[~mask].any() and charge[mask].any()
    # two tokens of a response of two are charged, not the three behind them
    two = penalties.charges(estimator, logprobs[:1], ref_logprobs[:1], torch.arange(5)[None] < 2, credit=credit)
    alone = penalties.charges(estimator, logprobs[:1, :2], ref_logprobs[:1, :2], EVERY_TOKEN[:2].T, credit=credit)
    torch.testing.assert_close(two[:, :2], alone)
    assert not penalties.kl_loss_per_token(estimator, logprobs, ref_logprobs, mask)[~mask].any()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("estimator", [*kl.names(), "test_penalties:OWN_K3"])
def test_poison_under_the_mask_is_inert_in_value_and_gradient(estimator, poison):
    logprobs, ref_logprobs, mask, group_ids = batch()
    clean = (logprobs, ref_logprobs, logprobs - 0.2)
    poisoned = tuple(torch.where(mask, values, poison) for values in clean)
    for credit in penalties.CREDITS:
        with_poison, without = (
            penalties.reward_penalty(estimator, *given[:2], mask, group_ids, credit=credit)
            for given in (poisoned, clean)
        )
        torch.testing.assert_close(with_poison, without)
    for correction, shaping in [(correction, shaping) for correction in penalties.CORRECTIONS for shaping in SHAPINGS]:
        (with_poison, gradient), (without, expected) = (
            loss_and_gradient(estimator, given, mask, correction, shaping) for given in (poisoned, clean)
        )
        assert with_poison.isfinite().all() and torch.equal(with_poison, without)
        assert torch.equal(gradient, expected) and not gradient[~mask].any()


def loss_and_gradient(estimator, given, mask, correction, shaping):
    policy, ref_logprobs, old_logprobs = given[0].clone().requires_grad_(), *given[1:]
    with torch.autograd.set_detect_anomaly(True):  # a NaN that is blanked only on its way back is an error, too
        loss = penalties.kl_loss_per_token(
            estimator, policy, ref_logprobs, mask, old_logprobs=old_logprobs, correction=correction, shaping=shaping
        )
        return loss.detach(), torch.autograd.grad(loss.sum(), policy)[0]


EXACT = {
    "k1": lambda d: 1.0,
    "k2": lambda d: d,
    "k3": lambda d: -math.expm1(-d),
    "abs": lambda d: math.copysign(1.0, d),
    "forward": lambda d: -math.expm1(-d),
    "js": lambda d: -0.5 * math.log1p(math.expm1(-d) / 2),
    "chi2": lambda d: -math.expm1(-2 * d),
    "tv": lambda d: math.copysign(0.5, d),
    "k3_verl": lambda d: 0.0 if abs(d) > 20 else -math.expm1(-d),
}
"""The coefficients, in Python's float64. verl's 1 - exp(-d) keeps no more than 1e-7."""


@pytest.mark.parametrize("correction", penalties.CORRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("estimator", [name for name in kl.names() if name != "chi2"])
@pytest.mark.parametrize("log_ratio", [-80.0, -1.0, -1e-6, 1e-6, 1.0, 80.0])
def test_extreme_log_ratios_are_finite_forward_and_backward(estimator, dtype, log_ratio, correction):
    logprobs = torch.tensor([[log_ratio]], dtype=dtype, requires_grad=True)
    loss = penalties.kl_loss_per_token(
        estimator,
        logprobs,
        torch.zeros(1, 1, dtype=dtype),
        old_logprobs=logprobs.detach(),
        correction=correction,
    )
    loss.sum().backward()
    assert loss.dtype == torch.float32 and loss.isfinite().all() and logprobs.grad.isfinite().all()
    if correction != "importance":
        # rounding -80 or 1e-6 to bfloat16 changes it by up to 2^-9, and the gradient is stored in bfloat16 again
        relative, absolute = 1e-5 if dtype == torch.float32 else 5e-3, 1e-7 if estimator == "k3_verl" else 0.0
        assert logprobs.grad.item() == pytest.approx(EXACT[estimator](log_ratio), rel=relative, abs=absolute)


def test_chi2_is_finite_while_the_square_of_the_ratio_is():
    # r^2 = exp(88) is a float32, exp(160) is not: there only a cap helps
    for log_ratio, cap in [(-44.0, None), (80.0, None), (-80.0, 40.0)]:
        logprobs = torch.tensor([[log_ratio]], requires_grad=True)
        loss = penalties.kl_loss_per_token("chi2", logprobs, torch.zeros(1, 1), cap=cap)
        loss.sum().backward()
        assert loss.isfinite().all() and logprobs.grad.isfinite().all()


def test_the_penalty_is_taken_off_token_by_token():
    # 1 - 0.5 * 2, 1 - 0.5 * 0, 3 - 0.5 * 4, 3 + 0.5 * 1
    task, penalty = torch.tensor([[1.0, 1.0], [3.0, 3.0]]), torch.tensor([[2.0, 0.0], [4.0, -1.0]])
    assert penalties.penalized_advantages(task, penalty, beta=0.5).tolist() == [[0.0, 1.0], [1.0, 3.5]]


@pytest.mark.parametrize(
    ("task", "penalty"), [((3,), (3, 2)), ((3, 2), (3,)), ((3, 2), (3, 1)), ((3, 1), (3, 2)), ((3,), (3,)), ((), ())]
)
def test_advantages_and_penalty_that_do_not_match_token_by_token_are_refused(task, penalty):
    with pytest.raises(ValueError, match=r"tokens would be charged for each other. Both must be \(B, T\)"):
        penalties.penalized_advantages(torch.zeros(task), torch.zeros(penalty), beta=0.1)


def test_names_that_do_not_exist_are_refused():
    logprobs, ref_logprobs, mask, group_ids = batch()
    with pytest.raises(ValueError, match="no KL credit 'tokens'. Known: sequence, reward_to_go, token"):
        penalties.charges("k1", logprobs, ref_logprobs, mask, credit="tokens")
    with pytest.raises(ValueError, match="no KL credit 'tokens'"):
        penalties.baseline(logprobs, mask, group_ids, credit="tokens")
    with pytest.raises(ValueError, match="no KL baseline 'mean'. Known: siblings, none"):
        penalties.reward_penalty("k1", logprobs, ref_logprobs, mask, group_ids, baseline="mean")
    with pytest.raises(ValueError, match="no KL correction 'is'. Known: none, importance, importance_detached"):
        penalties.kl_loss_per_token("k1", logprobs, ref_logprobs, correction="is")


@pytest.mark.parametrize("correction", ["importance", "importance_detached"])
def test_a_correction_without_the_sampler_s_logprobs_is_refused(correction):
    logprobs, ref_logprobs, mask, _ = batch()
    with pytest.raises(ValueError, match=f"'{correction}' weighs each token by pi / pi_old and needs old_logprobs"):
        penalties.kl_loss_per_token("k3", logprobs, ref_logprobs, mask, correction=correction)


def test_importance_of_a_value_without_derivative_is_refused():
    logprobs, ref_logprobs, mask, _ = batch()
    name, given = "test_penalties:OWN_WITHOUT_DERIVATIVE", {"old_logprobs": logprobs}
    with pytest.raises(ValueError, match="passes no gradient.*or choose importance_detached"):
        penalties.kl_loss_per_token(name, logprobs, ref_logprobs, mask, correction="importance", **given)
    penalties.kl_loss_per_token(name, logprobs, ref_logprobs, mask, correction="importance_detached", **given)


def test_inside_the_normalization_the_std_divides_the_charge_too():
    scores, charges = torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 0.0, 2.0])
    groups = torch.tensor([0, 0, 1, 1])
    found = penalties.normalized_advantages(scores, charges, groups, beta=0.1)
    # first group: 0.9 and -0.1, as far apart as 1 and 0. Second: equal scores, whose charges 0 and 0.2 are blown up to
    # one standard deviation (0.1 * sqrt(2)) whatever beta is
    one = 1 / 2**0.5
    torch.testing.assert_close(found, torch.tensor([one, -one, one, -one]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("credit", penalties.CREDITS)
def test_responses_without_any_token_have_no_penalty(credit):
    nothing, mask = torch.zeros(3, 0), torch.zeros(3, 0, dtype=torch.bool)
    assert penalties.reward_penalty("k1", nothing, nothing, mask, ALONE, credit=credit).shape == (3, 0)
