"""klreg_verl.core.exact: closed forms by hand, gradients against enumeration, bounds, numerics at the extremes."""

import math

import pytest
import torch

from klreg_verl.core import exact, kl

POLICY = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
REFERENCE = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
REVERSE = 0.6 * math.log(3) + 0.3 * math.log(3 / 5) + 0.1 * math.log(1 / 3)
FORWARD = 0.2 * math.log(1 / 3) + 0.5 * math.log(5 / 3) + 0.3 * math.log(3)
DIRECTIONS = {"reverse": exact.full_reverse, "forward": exact.full_forward}


def random_logits(*shape: int, seed: int = 1, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_divergences_by_hand():
    # logits are log-probabilities up to a constant, which must not matter
    logits, ref_logits = POLICY.log() + 7, REFERENCE.log() - 3
    assert exact.full_reverse(logits, ref_logits).item() == pytest.approx(REVERSE)
    assert exact.full_forward(logits, ref_logits).item() == pytest.approx(FORWARD)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_shape_is_that_of_the_positions(direction):
    assert DIRECTIONS[direction](random_logits(2, 3, 5), random_logits(2, 3, 5, seed=2)).shape == (2, 3)
    assert exact.topk(random_logits(2, 3, 5), random_logits(2, 3, 5, seed=2), 2, direction).shape == (2, 3)


def test_the_gradients_by_hand():
    # d KL(pi || ref) / d z = p (log(p / q) - KL); d KL(ref || pi) / d z = p - q
    expected = {"reverse": POLICY * ((POLICY / REFERENCE).log() - REVERSE), "forward": POLICY - REFERENCE}
    for direction, full in DIRECTIONS.items():
        logits = POLICY.log().requires_grad_()
        full(logits, REFERENCE.log()).backward()
        torch.testing.assert_close(logits.grad, expected[direction])


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("k", [None, 1, 3, 5])
def test_gradients_agree_with_finite_differences(direction, k):
    ref_logits = random_logits(4, 6, seed=2)
    divergence = DIRECTIONS[direction] if k is None else lambda *given: exact.topk(*given, k, direction)
    assert torch.autograd.gradcheck(lambda logits: divergence(logits, ref_logits), random_logits(4, 6).requires_grad_())


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_reference_gets_no_gradient(direction):
    logits, ref_logits = random_logits(3, 5).requires_grad_(), random_logits(3, 5, seed=2).requires_grad_()
    DIRECTIONS[direction](logits, ref_logits).sum().backward()
    exact.topk(logits, ref_logits, 2, direction).sum().backward()
    assert ref_logits.grad is None and logits.grad.abs().sum() > 0


@pytest.mark.parametrize(("name", "direction"), [("k1", "reverse"), ("k3", "reverse"), ("forward", "forward")])
def test_a_sampled_estimators_expectation_is_the_exact_divergence(name, direction):
    logits, ref_logits = random_logits(4, 9), random_logits(4, 9, seed=2)
    logprobs, ref_logprobs = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    expected = (logprobs.exp() * kl.value(name, logprobs, ref_logprobs)).sum(-1)
    torch.testing.assert_close(DIRECTIONS[direction](logits, ref_logits), expected)


def test_top_one_with_a_tail_by_hand():
    # pi's first token 0.6 against 0.2 and the rest 0.4 against 0.8; the reference's first is the second, 0.5
    reverse = exact.topk(POLICY.log(), REFERENCE.log(), 1, "reverse").item()
    forward = exact.topk(POLICY.log(), REFERENCE.log(), 1, "forward").item()
    assert reverse == pytest.approx(0.6 * math.log(3) + 0.4 * math.log(1 / 2))
    assert forward == pytest.approx(0.5 * math.log(5 / 3) + 0.5 * math.log(5 / 7))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_topk_is_a_lower_bound_that_grows_to_the_full_divergence(direction):
    logits, ref_logits = random_logits(64, 12), random_logits(64, 12, seed=2)
    bounds = [exact.topk(logits, ref_logits, k, direction) for k in range(1, 13)]
    full = DIRECTIONS[direction](logits, ref_logits)
    assert (bounds[0] >= 0).all() and (bounds[0] < full).all()
    assert all((low <= high + 1e-12).all() for low, high in zip(bounds, bounds[1:], strict=False))
    torch.testing.assert_close(bounds[-1], full)
    assert torch.equal(exact.topk(logits, ref_logits, 99, direction), full)


def test_without_the_tail_the_sum_would_be_negative():
    # the two tokens the reference likes best: 0.3 log(0.3 / 0.5) + 0.1 log(0.1 / 0.3) < 0, which is no bound at all
    truncated = 0.3 * math.log(0.3 / 0.5) + 0.1 * math.log(0.1 / 0.3)
    assert truncated < 0 < exact.topk(POLICY.log(), REFERENCE.log(), 2, "reverse").item()


def test_a_tail_of_1e_20_counts():
    # pi = (1, 1e-20, 2e-42), ref = (1/2, 1/2, 1e-35). Of the top 1 of ref, the first token, pi's tail is 1 - 1 in
    # float32 and its KL infinite; summed up it is 1e-20: 0.5 log(0.5 / 1) + 0.5 log(0.5 / 1e-20)
    logits = torch.tensor([0.0, math.log(1e-20), math.log(1e-20) - 50])
    ref_logits = torch.tensor([0.0, 0.0, -80.0])
    expected = 0.5 * math.log(0.5) + 0.5 * math.log(0.5 / 1e-20)
    assert exact.topk(logits, ref_logits, 1, "forward").item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_is_computed_in_float32(direction, dtype):
    logits, ref_logits = random_logits(5, 40).to(dtype).requires_grad_(), random_logits(5, 40, seed=2).to(dtype)
    found = DIRECTIONS[direction](logits, ref_logits)
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), DIRECTIONS[direction](logits.double(), ref_logits.double()), rtol=1e-6, atol=0
    )
    found.sum().backward()
    assert logits.grad.dtype == dtype and logits.grad.isfinite().all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_tiny_divergence_keeps_its_digits_in_float32(direction):
    # d of size 1e-4 gives a KL near 5e-9, thirty times below the rounding step of a log-probability
    logits = random_logits(16, 5000).float()
    ref_logits = logits + 1e-4 * random_logits(16, 5000, seed=2, scale=1).float()
    exactly = DIRECTIONS[direction](logits.double(), ref_logits.double())
    found = DIRECTIONS[direction](logits, ref_logits)
    assert exactly.max() < 1e-8
    torch.testing.assert_close(found.double(), exactly, rtol=0.02, atol=0)
    naive = (logits.softmax(-1) * (logits.log_softmax(-1) - ref_logits.log_softmax(-1))).sum(-1)
    assert (naive - exactly).abs().max() > 10 * (found - exactly).abs().max()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("gap", [80.0, 500.0, 1e4])
def test_extreme_logits_are_finite_forward_and_backward(direction, gap):
    # two tokens, gap nats apart the other way round: the KL is the gap, up to exp(-gap)
    logits, ref_logits = torch.tensor([gap, 0.0], requires_grad=True), torch.tensor([0.0, gap])
    for divergence in (DIRECTIONS[direction], lambda *given: exact.topk(*given, 1, direction)):
        found = divergence(logits, ref_logits)
        assert found.item() == pytest.approx(gap)
        (gradient,) = torch.autograd.grad(found, logits)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("k", [None, 1, 3, 4])
def test_tokens_that_nobody_can_produce_are_inert(direction, k):
    divergence = DIRECTIONS[direction] if k is None else lambda *given: exact.topk(*given, k, direction)
    short, ref_short = POLICY.log().requires_grad_(), REFERENCE.log()
    padding = torch.full((2,), -torch.inf, dtype=torch.float64)
    long = torch.cat([POLICY.log(), padding]).requires_grad_()
    found, expected = divergence(long, torch.cat([ref_short, padding])), divergence(short, ref_short)
    torch.testing.assert_close(found, expected)
    torch.autograd.backward([found, expected])
    torch.testing.assert_close(long.grad, torch.cat([short.grad, torch.zeros(2, dtype=torch.float64)]))


def test_a_token_that_one_side_excludes():
    # pi excludes the third token: KL(pi || ref) = 0.5 log(0.5 / 0.2) + 0.5 log(0.5 / 0.5), KL(ref || pi) is infinite
    logits = torch.tensor([0.0, 0.0, -torch.inf], dtype=torch.float64)
    assert exact.full_reverse(logits, REFERENCE.log()).item() == pytest.approx(0.5 * math.log(2.5))
    assert exact.full_forward(logits, REFERENCE.log()).item() == math.inf
    assert exact.full_reverse(REFERENCE.log(), logits).item() == math.inf


def test_nan_is_not_hidden():
    logits = torch.tensor([0.0, math.nan])
    for direction, full in DIRECTIONS.items():
        assert full(logits, torch.zeros(2)).isnan() and full(torch.zeros(2), logits).isnan(), direction


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 5\), reference logits \(2, 6\).*same vocabulary"):
        exact.full_reverse(torch.zeros(2, 5), torch.zeros(2, 6))
    with pytest.raises(ValueError, match="no KL direction 'backward'. Known directions: reverse, forward"):
        exact.topk(torch.zeros(5), torch.zeros(5), 2, "backward")
    with pytest.raises(ValueError, match="The 0 most likely tokens say nothing"):
        exact.topk(torch.zeros(5), torch.zeros(5), 0, "reverse")


def test_every_name_stands_for_its_divergence():
    logits, ref_logits = torch.tensor([[0.0, 1.0, 2.0, 0.5]]), torch.tensor([[1.0, 0.0, 0.3, 0.2]])
    expected = {
        "full_reverse": exact.full_reverse(logits, ref_logits),
        "full_forward": exact.full_forward(logits, ref_logits),
        "topk_reverse": exact.topk(logits, ref_logits, 2, "reverse"),
        "topk_forward": exact.topk(logits, ref_logits, 2, "forward"),
    }
    assert {name: exact.divergence(name, k=2)(logits, ref_logits) for name in exact.NAMES} == expected
    assert exact.divergence("topk_reverse")(logits, ref_logits) == expected["full_reverse"]  # 64 of 4 tokens are all
    with pytest.raises(ValueError, match="There is no exact KL 'topk'. Known: full_reverse"):
        exact.divergence("topk")
