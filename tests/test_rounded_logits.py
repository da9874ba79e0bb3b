"""What bfloat16 logits, in which verl trains on GPUs, do to a small KL: rounding parts two nearly equal policies.

bfloat16 has 8 bits of significand, so between 16 and 32 its steps are 1/8: logits that differ by less are either equal
after rounding or 1/8 apart. With logit differences of sd s << 1/8 a step is crossed with probability E|d| / (1/8), and
the mean square of the differences, which twice the KL grows with, is E|d| / 8 = s sqrt(2 / pi) / 8 instead of s^2.
"""

import math

import pytest
import torch

from klreg_verl.core import exact

TOKENS, LIKELY, S = 2000, 4, 0.01


@pytest.fixture(scope="module")
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    """Policy and reference: a few likely tokens with logits between 17 and 19, which differ by normal noise of sd S."""
    generator = torch.Generator().manual_seed(1)
    policy = 17 + 2 * torch.rand(TOKENS, LIKELY, generator=generator, dtype=torch.float64)
    return policy, policy + S * torch.randn(TOKENS, LIKELY, generator=generator, dtype=torch.float64)


def test_differences_below_a_step_grow_to_the_expected_size(logits: tuple[torch.Tensor, torch.Tensor]):
    policy, reference = logits
    rounded = policy.bfloat16().double() - reference.bfloat16().double()
    expected = S * math.sqrt(2 / math.pi) / 8
    assert rounded.square().mean().item() == pytest.approx(expected, rel=0.1)
    assert expected / S**2 == pytest.approx(10, rel=0.01)


def test_the_exact_kl_grows_with_them_and_float32_does_not(logits: tuple[torch.Tensor, torch.Tensor]):
    true = exact.full_reverse(*logits).mean().item()
    half = exact.full_reverse(*(each.bfloat16() for each in logits)).mean().item()
    single = exact.full_reverse(*(each.float() for each in logits)).mean().item()
    assert half / true == pytest.approx(10, rel=0.15)
    assert single / true == pytest.approx(1, rel=1e-4)


def test_where_the_policies_differ_by_more_than_a_step_rounding_hardly_matters(
    logits: tuple[torch.Tensor, torch.Tensor],
):
    policy, near = logits
    far = policy + 50 * (near - policy)  # sd 0.5, four steps
    true = exact.full_reverse(policy, far).mean().item()
    assert exact.full_reverse(policy.bfloat16(), far.bfloat16()).mean().item() / true == pytest.approx(1, rel=0.02)
