"""klreg_verl.core.kl: closed forms on categoricals by enumeration, numerics at the extremes, error texts."""

import math

import pytest
import torch

from klreg_verl.core import kl

POLICY = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
REFERENCE = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
REVERSE = (POLICY * (POLICY / REFERENCE).log()).sum()
FORWARD = (REFERENCE * (REFERENCE / POLICY).log()).sum()
# With logits z: d log pi_y / d z_j = [y = j] - pi_j, so
# d KL(pi || ref) / d z_j = pi_j * (log(pi_j / ref_j) - KL(pi || ref)) and d KL(ref || pi) / d z_j = pi_j - ref_j.
GRADIENT_OF_REVERSE = POLICY * ((POLICY / REFERENCE).log() - REVERSE)
GRADIENT_OF_FORWARD = POLICY - REFERENCE
SCORES = torch.eye(3, dtype=torch.float64) - POLICY


def expected_gradient(factor: torch.Tensor) -> torch.Tensor:
    """E[factor * grad log pi] over the three tokens: (3,) -> (3,)."""
    return (POLICY * factor) @ SCORES


def test_values_at_a_log_ratio_worked_by_hand():
    # pi = 0.5, ref = 0.25: d = log 2, r = 1/2: k1 = log 2, k2 = log(2)^2 / 2, k3 = 1/2 - 1 + log 2
    logprobs, ref_logprobs = torch.tensor([[0.5]]).log(), torch.tensor([[0.25]]).log()
    assert kl.value("k1", logprobs, ref_logprobs).item() == pytest.approx(math.log(2))
    assert kl.value("k2", logprobs, ref_logprobs).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl.value("k3", logprobs, ref_logprobs).item() == pytest.approx(math.log(2) - 0.5)


@pytest.mark.parametrize(("name", "expected"), [("k1", REVERSE), ("k3", REVERSE)])
def test_k1_and_k3_are_unbiased_for_the_reverse_kl(name, expected):
    torch.testing.assert_close((POLICY * kl.value(name, POLICY.log(), REFERENCE.log())).sum(), expected)


def test_k2_is_half_the_mean_square_and_not_a_kl():
    mean = (POLICY * kl.value("k2", POLICY.log(), REFERENCE.log())).sum()
    torch.testing.assert_close(mean, (POLICY * (POLICY / REFERENCE).log().square()).sum() / 2)
    assert abs(mean - REVERSE) > 0.01 and abs(mean - FORWARD) > 0.01


def test_k2_and_k3_are_never_negative_and_k1_is():
    values = {name: kl.value(name, POLICY.log(), REFERENCE.log()) for name in kl.names()}
    assert values["k2"].min() >= 0 and values["k3"].min() >= 0 and values["k1"].min() < 0


@pytest.mark.parametrize(
    ("name", "expected"), [("k1", torch.zeros(3)), ("k2", GRADIENT_OF_REVERSE), ("k3", GRADIENT_OF_FORWARD)]
)
def test_the_expected_coefficient_gradient_is_the_one_in_the_table(name, expected):
    found = expected_gradient(kl.coefficient(name, POLICY.log(), REFERENCE.log()))
    torch.testing.assert_close(found, expected.double(), atol=1e-15, rtol=1e-12)


def test_charging_k1_follows_the_reverse_kl_and_charging_k3_the_difference():
    charges = {name: kl.reward_charge(name, POLICY.log(), REFERENCE.log()) for name in kl.names()}
    torch.testing.assert_close(expected_gradient(charges["k1"]), GRADIENT_OF_REVERSE)
    # charge r - 1 + d: d gives the reverse KL, r - 1 = -(1 - r) minus the forward KL
    torch.testing.assert_close(expected_gradient(charges["k3"]), GRADIENT_OF_REVERSE - GRADIENT_OF_FORWARD)


@pytest.mark.parametrize("name", kl.names())
def test_the_coefficient_is_the_derivative_of_the_value(name):
    logprobs = torch.linspace(-3, 0, 31, dtype=torch.float64).requires_grad_()
    ref_logprobs = torch.full_like(logprobs, -1.5).detach()
    (derivative,) = torch.autograd.grad(kl.value(name, logprobs, ref_logprobs).sum(), logprobs)
    torch.testing.assert_close(kl.coefficient(name, logprobs.detach(), ref_logprobs), derivative)


@pytest.mark.parametrize("name", kl.names())
@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2, 1.0, 10.0, 80.0])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_float32_is_accurate_from_tiny_to_huge_log_ratios(name, size, sign):
    log_ratio = sign * size
    logprobs, ref_logprobs = torch.tensor([log_ratio]), torch.zeros(1)
    # k3 = expm1(-d) + d still cancels to d^2 / 2: error about 1e-7 of |d|
    exact = {"k1": log_ratio, "k2": log_ratio**2 / 2, "k3": math.expm1(-log_ratio) + log_ratio}[name]
    allowed = 1.2e-7 * size if name == "k3" and size < 1 else 1e-6 * abs(exact)
    assert kl.value(name, logprobs, ref_logprobs).item() == pytest.approx(exact, rel=1e-5, abs=allowed)
    factor = {"k1": 1.0, "k2": log_ratio, "k3": -math.expm1(-log_ratio)}[name]
    assert kl.coefficient(name, logprobs, ref_logprobs).item() == pytest.approx(factor, rel=1e-5)


def test_k3_keeps_the_digits_that_exp_minus_one_loses():
    # at d = 1e-4, k3 = 5e-9; exp(-d) - 1 + d in float32 is wrong by its rounding step near 1, about 6e-8
    d = torch.tensor([1e-4])
    exact = math.expm1(-1e-4) + 1e-4
    assert abs(kl.value("k3", d, torch.zeros(1)).item() - exact) < 2e-11
    assert abs((torch.exp(-d) - 1 + d).item() - exact) > 5e-9


@pytest.mark.parametrize("name", kl.names())
@pytest.mark.parametrize("size", [-80.0, -1.0, 1e-6, 1.0, 80.0])
def test_bfloat16_is_computed_in_float32(name, size):
    logprobs, ref_logprobs = torch.tensor([size], dtype=torch.bfloat16), torch.zeros(1, dtype=torch.bfloat16)
    for column in (kl.value, kl.coefficient, kl.reward_charge):
        found = column(name, logprobs, ref_logprobs)
        assert found.dtype == torch.float32 and found.isfinite().all()
        torch.testing.assert_close(found, column(name, logprobs.float(), ref_logprobs.float()))


def test_a_small_difference_of_bfloat16_log_probs_is_exact():
    # 2.015625 - 2 = 0.015625, both representable; bfloat16 arithmetic on larger numbers would round it
    logprobs, ref_logprobs = torch.tensor([2.015625, -80.5]).bfloat16(), torch.tensor([2.0, -0.0078125]).bfloat16()
    assert kl.log_ratio(logprobs, ref_logprobs).tolist() == [0.015625, -80.4921875]


def test_k3_is_not_clamped_and_overflows_where_documented():
    below, beyond = torch.tensor([-88.0]), torch.tensor([-89.0])
    assert kl.value("k3", below, torch.zeros(1)).item() > 1e38
    assert kl.value("k3", beyond, torch.zeros(1)).item() == math.inf


def test_float64_stays_float64():
    assert kl.value("k3", POLICY.log(), REFERENCE.log()).dtype == torch.float64


def test_an_unknown_estimator_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"no KL estimator 'K3'. Did you mean 'k3'\? Known estimators: k1, k2, k3\."):
        kl.value("K3", POLICY, REFERENCE)
    with pytest.raises(ValueError, match=r"no KL estimator 'banana'. Known estimators"):
        kl.estimator("banana")


def test_different_shapes_are_refused_instead_of_broadcast():
    with pytest.raises(ValueError, match=r"shape \(2, 3\), reference log-probs \(2, 1\)"):
        kl.value("k1", torch.zeros(2, 3), torch.zeros(2, 1))


def test_unclamped_k3_equals_verls_where_verl_does_not_clamp():
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos", reason="verl is not installed")
    # verl clamps the log-ratio at 20 and the value at 10: |d| <= 2.3 stays clear of both
    logprobs, ref_logprobs = torch.linspace(-2.3, 0, 47), torch.linspace(0, -2.3, 47)
    for name in kl.names():
        theirs = core_algos.kl_penalty(logprobs, ref_logprobs, name)
        torch.testing.assert_close(kl.value(name, logprobs, ref_logprobs), theirs, atol=1e-6, rtol=1e-6)
