"""klreg_verl.core.shaping: closed forms, derivatives against autograd, what each does to the gradient, refusals."""

import math
from dataclasses import FrozenInstanceError

import pytest
import torch

from klreg_verl.core import kl
from klreg_verl.core.shaping import Clip, LengthNormalized, NoShaping, Sigmoid, kinds, shaping

VALUES = torch.tensor([[-3.0, 0.0, 0.1, 0.7], [1.5, 2.4, 40.0, 9.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True, True], [True, True, True, False]])
ALL = [NoShaping(), Clip(), Clip(0.5), Sigmoid(), Sigmoid(2.0), LengthNormalized()]


def shape_of(shaped, value: float) -> float:
    """Of one token in a response of one token."""
    return shaped.shape(torch.tensor([[value]], dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)).item()


def factor_of(shaped, value: float) -> float:
    """What a coefficient of 1 becomes."""
    given = torch.tensor([[value]], dtype=torch.float64)
    return shaped.coefficient(given, torch.ones_like(given), torch.ones(1, 1, dtype=torch.bool)).item()


def test_none_changes_nothing():
    assert torch.equal(NoShaping().shape(VALUES, MASK), VALUES)
    assert torch.equal(NoShaping().coefficient(VALUES, VALUES + 1, MASK), VALUES + 1)


def test_clip_is_the_minimum_and_lets_go_above_it():
    assert Clip().shape(VALUES, MASK).tolist() == [[-3.0, 0.0, 0.1, 0.7], [1.0, 1.0, 1.0, 1.0]]
    found = Clip().coefficient(VALUES, torch.full_like(VALUES, 5.0), MASK)
    assert found.tolist() == [[5.0, 5.0, 5.0, 5.0], [0.0, 0.0, 0.0, 0.0]]
    assert (shape_of(Clip(0.5), 0.5), factor_of(Clip(0.5), 0.5)) == (0.5, 1.0)


def test_sigmoid_weighs_the_value():
    # at the target the weight is 1/2; at v = target + log 3 it is 3/4
    assert shape_of(Sigmoid(0.1), 0.1) == pytest.approx(0.05)
    assert shape_of(Sigmoid(0.1), 0.1 + math.log(3)) == pytest.approx(0.75 * (0.1 + math.log(3)))
    # product rule at v = target + log 3: 3/4 + v * 3/4 * 1/4
    assert factor_of(Sigmoid(0.1), 0.1 + math.log(3)) == pytest.approx(0.75 + (0.1 + math.log(3)) * 3 / 16)


def test_length_normalized_divides_by_the_tokens_that_count():
    ones = torch.ones_like(VALUES)
    expected = [[0.25] * 4, [1 / 3] * 4]
    torch.testing.assert_close(LengthNormalized().shape(ones, MASK), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(
        LengthNormalized().coefficient(VALUES, ones, MASK), ones * torch.tensor(expected).double()
    )


def test_a_response_without_tokens_is_divided_by_nothing():
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    assert LengthNormalized().shape(torch.zeros(1, 3), nothing).tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("shaped", ALL)
def test_the_coefficient_is_the_derivative_of_the_shape(shaped):
    values = VALUES.clone().requires_grad_()
    (derivative,) = torch.autograd.grad(shaped.shape(values, MASK).sum(), values)
    inner = torch.linspace(-2, 2, 8, dtype=torch.float64).reshape(2, 4)
    torch.testing.assert_close(shaped.coefficient(VALUES, inner, MASK), derivative * inner)


@pytest.mark.parametrize("shaped", ALL)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_the_chain_from_the_log_probability_on(shaped, estimator):
    d = torch.linspace(-2.5, 2.5, 8, dtype=torch.float64).reshape(2, 4).requires_grad_()
    zeros = torch.zeros_like(d)
    value = kl.value(estimator, d, zeros)
    (derivative,) = torch.autograd.grad(shaped.shape(value, MASK).sum(), d)
    found = shaped.coefficient(value.detach(), kl.coefficient(estimator, d.detach(), zeros), MASK)
    torch.testing.assert_close(found, derivative)


def test_what_the_sigmoid_does_to_the_gradient_is_as_the_table_says():
    curve = [(factor_of(Sigmoid(), v / 100), v / 100) for v in range(-500, 1001)]
    assert factor_of(Sigmoid(), 0.0) == pytest.approx(0.475, abs=5e-4)
    assert max(curve) == (pytest.approx(1.108, abs=5e-4), pytest.approx(2.43, abs=0.02))
    assert factor_of(Sigmoid(), 30.0) == pytest.approx(1.0)  # no cap
    assert factor_of(Sigmoid(1.0), 0.5) < factor_of(Sigmoid(), 0.5)  # a higher target weakens it
    assert factor_of(Sigmoid(), -1.25) > 0 > factor_of(Sigmoid(), -1.26)
    assert shape_of(Sigmoid(), -30.0) == pytest.approx(0.0, abs=1e-9)  # of k1: 30 nats of credit are forgotten


def test_clip_in_the_reward_charges_less_than_the_kl():
    # pi (1/2, 1/2), ref (9/10, 1/10): d = log 5/9, log 5, the KL is their mean 0.511, that of min(d, 1) 0.206
    policy, reference = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    charge = kl.reward_charge("k1", policy, reference)
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert charge.mean().item() == pytest.approx((math.log(5 / 9) + math.log(5)) / 2)
    assert Clip().shape(charge, mask).mean().item() == pytest.approx((math.log(5 / 9) + 1) / 2)


@pytest.mark.parametrize("shaped", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_values_stay_finite(shaped, dtype):
    # k3 at d = -80 is 5e34
    values = torch.tensor([[5e34, 80.0, 1e-12, -80.0]], dtype=dtype)
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert shaped.shape(values, mask).isfinite().all()
    assert shaped.coefficient(values, -values, mask).isfinite().all()


def test_clip_hides_no_nan():
    nan = torch.tensor([[float("nan")]])
    mask = torch.ones(1, 1, dtype=torch.bool)
    assert Clip().shape(nan, mask).isnan().all() and Clip().coefficient(nan, nan, mask).isnan().all()


def test_shaping_builds_by_kind_with_the_documents_defaults():
    assert kinds() == ("none", "clip", "sigmoid", "length_normalized")
    assert [shaping(kind) for kind in kinds()] == [NoShaping(), Clip(1.0), Sigmoid(0.1), LengthNormalized()]
    assert shaping("clip", threshold=0.5) == Clip(0.5)
    assert shaping("sigmoid", target=0.2, threshold=None) == Sigmoid(0.2)
    with pytest.raises(FrozenInstanceError):
        shaping("clip").threshold = 2.0


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="no KL shaping 'clamp'. Known kinds: none, clip, sigmoid, length_normalized"):
        shaping("clamp")


@pytest.mark.parametrize(
    ("kind", "parameters", "reads"),
    [
        ("clip", {"target": 0.1}, "does not read target; it reads threshold"),
        ("sigmoid", {"threshold": 1.0, "target": 0.1}, "does not read threshold; it reads target"),
        ("length_normalized", {"threshold": 1.0, "target": 1.0}, "does not read threshold, target; it reads no para"),
        ("none", {"threshold": 0.0}, "does not read threshold; it reads no parameter"),
    ],
)
def test_a_parameter_that_the_kind_does_not_read_is_refused(kind, parameters, reads):
    with pytest.raises(ValueError, match=reads):
        shaping(kind, **parameters)


@pytest.mark.parametrize(
    ("kind", "parameter", "number"),
    [("clip", "threshold", number) for number in (0.0, -1.0, math.inf, math.nan)]
    + [("sigmoid", "target", number) for number in (-0.1, math.inf, math.nan)],
)
def test_an_impossible_number_is_refused(kind, parameter, number):
    with pytest.raises(ValueError, match=f"{kind}: {parameter}={number}"):
        shaping(kind, **{parameter: number})
