"""klreg_verl.core.advantages: arithmetic by hand, identities, and parity with the installed verl."""

import math
from functools import partial

import pytest
import torch

from klreg_verl.core import advantages

SCORES = torch.tensor([1.0, 0.0, 4.0, 3.0, 2.0])
GROUPS = torch.tensor([9, 9, 5, 9, 5])  # group 9: 1, 0, 3 (mean 4/3); group 5: 4, 2 (mean 3)


def test_rloo_subtracts_the_mean_of_the_siblings():
    # 1 - 3/2, 0 - 4/2, 4 - 2, 3 - 1/2, 2 - 4
    assert advantages.rloo(SCORES, GROUPS).tolist() == [-0.5, -2.0, 2.0, 2.5, -2.0]


def test_dr_grpo_subtracts_the_mean_of_the_group():
    expected = torch.tensor([-1 / 3, -4 / 3, 1.0, 5 / 3, -1.0])
    torch.testing.assert_close(advantages.dr_grpo(SCORES, GROUPS), expected)


def test_grpo_divides_by_the_standard_deviation_with_n_minus_one():
    # group 5: 4 and 2 have the std sqrt(2), group 9: squares (1 + 16 + 25) / 9 = 14/3 over 2 -> sqrt(7/3)
    small, large = math.sqrt(2.0), math.sqrt(7.0 / 3.0)
    expected = torch.tensor([-1 / 3 / large, -4 / 3 / large, 1 / small, 5 / 3 / large, -1 / small])
    torch.testing.assert_close(advantages.grpo(SCORES, GROUPS), expected, atol=2e-6, rtol=0)


def test_dr_grpo_is_rloo_times_n_minus_one_over_n():
    factor = torch.tensor([2 / 3, 2 / 3, 1 / 2, 2 / 3, 1 / 2])
    torch.testing.assert_close(advantages.dr_grpo(SCORES, GROUPS), advantages.rloo(SCORES, GROUPS) * factor)


@pytest.mark.parametrize("name", advantages.names())
def test_advantages_of_a_group_sum_to_zero(name):
    found = advantages.compute(name, SCORES, GROUPS)
    torch.testing.assert_close(found[GROUPS == 9].sum(), torch.zeros(()), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", advantages.names())
def test_order_of_rows_and_names_of_groups_do_not_matter(name):
    order = torch.tensor([3, 1, 4, 0, 2])
    moved = advantages.compute(name, SCORES[order], -1000 * GROUPS[order])
    torch.testing.assert_close(moved, advantages.compute(name, SCORES, GROUPS)[order])


@pytest.mark.parametrize(("name", "expected"), [("rloo", 2.0), ("dr_grpo", 2.0), ("grpo", 2.0 / (1 + 1e-6))])
def test_a_group_of_one_keeps_its_score(name, expected):
    assert advantages.compute(name, torch.tensor([2.0]), torch.tensor([3])).item() == pytest.approx(expected)


def test_equal_scores_give_zero_also_in_grpo():
    # 0.7 is not a float32: a float32 mean of five is off by 6e-8, which eps = 1e-6 would blow up to 0.06
    found = advantages.grpo(torch.full((5,), 0.7), torch.zeros(5, dtype=torch.int64))
    assert found.abs().max().item() < 1e-9


def test_integer_scores_are_real_numbers():
    assert advantages.rloo(torch.tensor([1, 0]), torch.tensor([0, 0])).tolist() == [1.0, -1.0]


def test_an_empty_batch_is_an_empty_answer():
    assert advantages.grpo(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="no advantage estimator 'gae'. Known: rloo, grpo, dr_grpo"):
        advantages.compute("gae", SCORES, GROUPS)


def of_verl(name: str, scores: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos", reason="verl is not installed")
    theirs = {
        "rloo": core_algos.compute_rloo_outcome_advantage,
        "grpo": core_algos.compute_grpo_outcome_advantage,
        "dr_grpo": partial(core_algos.compute_grpo_outcome_advantage, norm_adv_by_std_in_grpo=False),
    }[name]
    mask = torch.ones(len(scores), 1, dtype=scores.dtype)
    # a copy: verl writes into its argument when there is one token per response
    advantages_per_token, _ = theirs(scores[:, None].clone(), mask, group_ids.numpy())
    return advantages_per_token[:, 0]


@pytest.mark.parametrize("name", advantages.names())
@pytest.mark.parametrize("seed", range(3))
def test_rewards_of_a_task_get_verls_advantages_in_float32(name, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 3, (200,), generator=generator) / 2  # 0, 1/2, 1
    group_ids = torch.randint(0, 60, (200,), generator=generator)  # sizes from 1 up
    assert (torch.bincount(group_ids) == 1).any()
    found = advantages.compute(name, scores, group_ids)
    torch.testing.assert_close(found, of_verl(name, scores, group_ids), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", advantages.names())
def test_any_scores_get_verls_advantages_in_float64(name):
    # float64, because verl's float32 mean is off by more than 1e-6 of a very small std
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(300, generator=generator, dtype=torch.float64)
    group_ids = torch.randint(0, 90, (300,), generator=generator)
    found = advantages.compute(name, scores, group_ids)
    torch.testing.assert_close(found, of_verl(name, scores, group_ids), atol=1e-6, rtol=1e-6)
