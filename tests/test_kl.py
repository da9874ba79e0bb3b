"""klreg_verl.core.kl: closed forms on categoricals by enumeration, numerics at the extremes, error texts."""

import math
import sys
from decimal import Decimal, localcontext

import pytest
import torch

from klreg_verl.core import kl

POLICY = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
REFERENCE = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
REVERSE = (POLICY * (POLICY / REFERENCE).log()).sum()
FORWARD = (REFERENCE * (REFERENCE / POLICY).log()).sum()
MIXTURE = (POLICY + REFERENCE) / 2
JS = (POLICY * (POLICY / MIXTURE).log()).sum() / 2 + (REFERENCE * (REFERENCE / MIXTURE).log()).sum() / 2
CHI2 = (REFERENCE.square() / POLICY).sum() - 1
TV = (POLICY - REFERENCE).abs().sum() / 2
SCORES = torch.eye(3, dtype=torch.float64) - POLICY  # with logits z: d log pi_y / d z_j = [y = j] - pi_j


def from_partials(partials: torch.Tensor) -> torch.Tensor:
    """d D / d z_j = pi_j * (g_j - sum_y pi_y g_y) for a divergence D with g_y = d D / d pi_y."""
    return POLICY * (partials - (POLICY * partials).sum())


GRADIENT_OF_REVERSE = from_partials((POLICY / REFERENCE).log() + 1)
GRADIENT_OF_FORWARD = POLICY - REFERENCE
GRADIENT_OF_JS = from_partials((POLICY / MIXTURE).log() / 2)
GRADIENT_OF_CHI2 = from_partials(-(REFERENCE / POLICY).square())
GRADIENT_OF_TV = from_partials((POLICY - REFERENCE).sign() / 2)


def expected_gradient(factor: torch.Tensor) -> torch.Tensor:
    """E[factor * grad log pi] over the three tokens: (3,) -> (3,)."""
    return (POLICY * factor) @ SCORES


def test_the_partials_give_the_gradient_of_the_reverse_kl():
    # d KL / d z_j = pi_j * (log(pi_j / ref_j) - KL), worked by hand: the + 1 of d (p log p) / d p drops out
    torch.testing.assert_close(GRADIENT_OF_REVERSE, POLICY * ((POLICY / REFERENCE).log() - REVERSE))


HALF = (torch.tensor([[0.5]]).log(), torch.tensor([[0.25]]).log())


@pytest.mark.parametrize(
    ("name", "value", "coefficient", "charge"),
    # pi = 0.5, ref = 0.25: d = log 2, r = 1/2, and m = (1 + r) / 2 = 3/4
    [
        ("k1", math.log(2), 1.0, math.log(2)),
        ("k2", math.log(2) ** 2 / 2, math.log(2), math.log(2) ** 2 / 2),
        ("k3", math.log(2) - 0.5, 0.5, math.log(2) - 0.5),
        ("abs", math.log(2), 1.0, math.log(2)),
        ("forward", 0.5 - math.log(2) / 2, 0.5, 0.5),
        ("js", (-math.log(2) / 2 - 1.5 * math.log(0.75)) / 2, math.log(4 / 3) / 2, math.log(4 / 3) / 2),
        ("chi2", 0.25, 0.75, 0.75),
        ("tv", 0.25, 0.5, 0.5),
        ("k3_verl", math.log(2) - 0.5, 0.5, math.log(2) - 0.5),
    ],
)
def test_each_row_at_a_log_ratio_worked_by_hand(name, value, coefficient, charge):
    assert kl.value(name, *HALF).item() == pytest.approx(value, rel=1e-6)
    assert kl.coefficient(name, *HALF).item() == pytest.approx(coefficient, rel=1e-6)
    assert kl.reward_charge(name, *HALF).item() == pytest.approx(charge, rel=1e-6)


def test_the_table_has_nine_rows():
    assert kl.names() == ("k1", "k2", "k3", "abs", "forward", "js", "chi2", "tv", "k3_verl")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("k1", REVERSE), ("k3", REVERSE), ("forward", FORWARD), ("js", JS), ("chi2", CHI2), ("tv", TV)],
)
def test_the_expected_value_is_the_divergence_of_the_table(name, expected):
    torch.testing.assert_close((POLICY * kl.value(name, POLICY.log(), REFERENCE.log())).sum(), expected)


def test_k2_is_half_the_mean_square_and_abs_the_mean_distance_and_neither_is_a_kl():
    distance = (POLICY / REFERENCE).log()
    for name, expected in (("k2", distance.square() / 2), ("abs", distance.abs())):
        mean = (POLICY * kl.value(name, POLICY.log(), REFERENCE.log())).sum()
        torch.testing.assert_close(mean, (POLICY * expected).sum())
        assert all(abs(mean - divergence) > 0.01 for divergence in (REVERSE, FORWARD, JS, CHI2, TV))


def test_only_k1_is_ever_negative():
    negative = [name for name in kl.names() if kl.value(name, POLICY.log(), REFERENCE.log()).min() < 0]
    assert negative == ["k1"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("k1", torch.zeros(3)),
        ("k2", GRADIENT_OF_REVERSE),
        ("k3", GRADIENT_OF_FORWARD),
        ("abs", 2 * GRADIENT_OF_TV),
        ("forward", GRADIENT_OF_FORWARD),
        ("js", GRADIENT_OF_JS),
        ("chi2", GRADIENT_OF_CHI2),
        ("tv", GRADIENT_OF_TV),
    ],
)
def test_the_expected_coefficient_gradient_is_the_one_in_the_table(name, expected):
    found = expected_gradient(kl.coefficient(name, POLICY.log(), REFERENCE.log()))
    torch.testing.assert_close(found, expected.double(), atol=1e-15, rtol=1e-12)


def test_charging_k1_follows_the_reverse_kl_and_charging_k3_the_difference():
    charges = {name: kl.reward_charge(name, POLICY.log(), REFERENCE.log()) for name in kl.names()}
    torch.testing.assert_close(expected_gradient(charges["k1"]), GRADIENT_OF_REVERSE)
    # charge r - 1 + d: d gives the reverse KL, r - 1 = -(1 - r) minus the forward KL
    torch.testing.assert_close(expected_gradient(charges["k3"]), GRADIENT_OF_REVERSE - GRADIENT_OF_FORWARD)


@pytest.mark.parametrize("name", ["forward", "js", "chi2", "tv"])
def test_a_divergence_charges_its_coefficient(name):
    charge = kl.reward_charge(name, POLICY.log(), REFERENCE.log())
    torch.testing.assert_close(charge, kl.coefficient(name, POLICY.log(), REFERENCE.log()), atol=0, rtol=0)


def test_of_the_coefficients_that_are_charged_only_forwards_has_mean_zero():
    means = {
        name: (POLICY * kl.reward_charge(name, POLICY.log(), REFERENCE.log())).sum()
        for name in ("forward", "js", "chi2", "tv")
    }
    assert abs(means["forward"]) < 1e-15
    torch.testing.assert_close(means["js"], (POLICY * (POLICY / MIXTURE).log()).sum() / 2)
    torch.testing.assert_close(means["chi2"], -CHI2)
    # pi > ref on the first token alone: (0.6 - 0.3 - 0.1) / 2
    assert means["tv"].item() == pytest.approx(0.1)


LOG_RATIOS = torch.linspace(-3, 3, 62, dtype=torch.float64)  # an even number, so that 0, where |d| has a kink, is out


@pytest.mark.parametrize("name", ["k1", "k2", "k3", "abs", "k3_verl"])
def test_the_coefficient_is_the_derivative_of_the_value(name):
    logprobs = LOG_RATIOS.clone().requires_grad_()
    (derivative,) = torch.autograd.grad(kl.value(name, logprobs, torch.zeros_like(logprobs)).sum(), logprobs)
    torch.testing.assert_close(kl.coefficient(name, logprobs.detach(), torch.zeros_like(logprobs)), derivative)


@pytest.mark.parametrize("name", ["forward", "js", "chi2", "tv"])
def test_a_divergences_coefficient_is_its_value_plus_the_derivative(name):
    # f(r) - r f'(r), and d f / d d = -r f'(r) because r = exp(-d)
    logprobs = LOG_RATIOS.clone().requires_grad_()
    value = kl.value(name, logprobs, torch.zeros_like(logprobs))
    (derivative,) = torch.autograd.grad(value.sum(), logprobs)
    torch.testing.assert_close(
        kl.coefficient(name, logprobs.detach(), torch.zeros_like(logprobs)), value.detach() + derivative
    )


def exactly(name: str, log_ratio: float) -> tuple[Decimal, Decimal]:
    """(value, coefficient) in 60 digits, by the formulas of the table as they are written."""
    with localcontext(prec=60):
        d = Decimal(log_ratio)
        r = (-d).exp()
        m = (1 + r) / 2
        sign = Decimal(math.copysign(1, log_ratio))
        return {
            "k1": (d, Decimal(1)),
            "k2": (d * d / 2, d),
            "k3": (r - 1 + d, 1 - r),
            "abs": (abs(d), sign),
            "forward": (-r * d - r + 1, 1 - r),
            "js": ((-r * d - (1 + r) * m.ln()) / 2, -m.ln() / 2),
            "chi2": ((r - 1) ** 2, 1 - r * r),
            "tv": (abs(r - 1) / 2, sign / 2),
        }[name]


FLOAT32_MAX = 3.4028234e38
SIZES = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 1.0, 3.0, 10.0, 30.0, 44.0, 60.0, 80.0]


@pytest.mark.parametrize("name", kl.names()[:-1])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_float32_is_accurate_from_tiny_to_huge_log_ratios(name, sign):
    logprobs = (sign * torch.tensor(SIZES)).requires_grad_()
    value = kl.value(name, logprobs, torch.zeros_like(logprobs))
    (derivative,) = torch.autograd.grad(value.sum(), logprobs)
    coefficient = kl.coefficient(name, logprobs.detach(), torch.zeros_like(logprobs))
    for d, *found, slope in zip(*(one.tolist() for one in (logprobs, value, coefficient, derivative)), strict=True):
        exact = [float(one) for one in exactly(name, d)]
        held = [abs(one) < FLOAT32_MAX for one in exact]
        assert all(held) or (name == "chi2" and d < -44.3), (d, exact)
        for one, other, fits in zip(found, exact, held, strict=True):
            assert one == (pytest.approx(other, rel=2e-6) if fits else math.copysign(math.inf, other)), d
        assert math.isfinite(slope) or not held[0]


@pytest.mark.parametrize("name", ["k3", "forward", "js"])
@pytest.mark.parametrize("d", [1e-6, -1e-4, 1e-2])
def test_the_derivative_keeps_its_digits_near_zero(name, d):
    # plain float32 derives k3 as 1 - exp(-d), wrong by its rounding step 6e-8: 6 % at 1e-6
    logprobs = torch.tensor([d], requires_grad=True)
    kl.value(name, logprobs, torch.zeros(1)).backward()
    value, coefficient = exactly(name, logprobs.item())
    exact = coefficient if name == "k3" else coefficient - value
    assert logprobs.grad.item() == pytest.approx(float(exact), rel=1e-6)


@pytest.mark.parametrize("name", kl.names())
def test_equal_log_probs_give_exact_zeros(name):
    here = torch.tensor([-1.5])
    assert kl.value(name, here, here).item() == 0
    assert kl.coefficient(name, here, here).item() == (1 if name == "k1" else 0)


@pytest.mark.parametrize("name", kl.names())
@pytest.mark.parametrize("size", [-80.0, -1.0, 1e-6, 1.0, 80.0])
def test_bfloat16_is_computed_in_float32(name, size):
    logprobs, ref_logprobs = torch.tensor([size], dtype=torch.bfloat16), torch.zeros(1, dtype=torch.bfloat16)
    for column in (kl.value, kl.coefficient, kl.reward_charge):
        found = column(name, logprobs, ref_logprobs)
        assert found.dtype == torch.float32 and (found.isfinite().all() or (name == "chi2" and size == -80))
        torch.testing.assert_close(found, column(name, logprobs.float(), ref_logprobs.float()), atol=0, rtol=0)


def test_a_small_difference_of_bfloat16_log_probs_is_exact():
    # 2.015625 - 2 = 0.015625, both representable; bfloat16 arithmetic on larger numbers would round it
    logprobs, ref_logprobs = torch.tensor([2.015625, -80.5]).bfloat16(), torch.tensor([2.0, -0.0078125]).bfloat16()
    assert kl.log_ratio(logprobs, ref_logprobs).tolist() == [0.015625, -80.4921875]


@pytest.mark.parametrize(
    ("name", "below", "beyond"),
    [
        ("k3", -88.0, -89.0),
        ("forward", -84.0, -85.0),
        ("js", -89.0, -90.0),
        ("chi2", -44.0, -45.0),
        ("tv", -88.0, -89.0),
    ],
)
def test_nothing_is_clamped_and_overflow_comes_where_documented(name, below, beyond):
    values = kl.value(name, torch.tensor([below, beyond, -1e4]), torch.zeros(3)).tolist()
    assert 1e37 < values[0] < math.inf and values[1:] == [math.inf, math.inf]


@pytest.mark.parametrize(("name", "limit"), [("forward", 1.0), ("js", math.log(2) / 2), ("chi2", 1.0), ("tv", 0.5)])
def test_a_divergence_is_bounded_where_the_policy_gained(name, limit):
    # r -> 0: f(0) = 1, log(2) / 2, 1, 1/2
    assert kl.value(name, torch.tensor([1e4]), torch.zeros(1)).item() == pytest.approx(limit)


def test_js_coefficient_grows_only_linearly_where_the_policy_lost():
    # log(2 / (1 + r)) / 2 with r = exp(1000), which overflows: (log 2 - 1000) / 2
    found = kl.coefficient("js", torch.tensor([-1000.0]), torch.zeros(1)).item()
    assert found == pytest.approx((math.log(2) - 1000) / 2)


@pytest.mark.parametrize("name", ["k3", "forward", "js", "chi2", "k3_verl"])
def test_float64_stays_float64(name):
    assert kl.value(name, POLICY.log(), REFERENCE.log()).dtype == torch.float64


@pytest.mark.parametrize("name", ["k2", "k3", "forward", "js", "chi2", "k3_verl"])
def test_nan_is_not_hidden(name):
    nothing = torch.tensor([math.nan])
    for column in (kl.value, kl.coefficient, kl.reward_charge):
        assert column(name, nothing, torch.zeros(1)).isnan().all()


def test_an_unknown_estimator_is_refused_with_the_nearest_name():
    known = "Known estimators: k1, k2, k3, abs, forward, js, chi2, tv, k3_verl. One of your own"
    with pytest.raises(ValueError, match=rf"no KL estimator 'K3'. Did you mean 'k3'\? {known}"):
        kl.value("K3", POLICY, REFERENCE)
    with pytest.raises(ValueError, match=rf"no KL estimator 'quux'. {known} is written pkg.module:name"):
        kl.estimator("quux")


def test_different_shapes_are_refused_instead_of_broadcast():
    with pytest.raises(ValueError, match=r"shape \(2, 3\), reference log-probs \(2, 1\)"):
        kl.value("k1", torch.zeros(2, 3), torch.zeros(2, 1))


CAPPED = (torch.tensor([[-3.0, -1.0, 0.5, 2.0]]), torch.zeros(1, 4))


def test_a_cap_by_hand():
    # d = -3, -1, 0.5, 2 with cap 2: the first is hit, the last just not
    assert kl.cap_hits(*CAPPED, 2.0).tolist() == [[True, False, False, False]]
    assert kl.value("k2", *CAPPED, cap=2.0).tolist() == [[2.0, 0.5, 0.125, 2.0]]
    assert kl.coefficient("k2", *CAPPED, cap=2.0).tolist() == [[0.0, -1.0, 0.5, 2.0]]
    assert kl.coefficient("k1", *CAPPED, cap=2.0).tolist() == [[0.0, 1.0, 1.0, 1.0]]
    assert kl.reward_charge("k1", *CAPPED, cap=2.0).tolist() == [[-2.0, -1.0, 0.5, 2.0]]


@pytest.mark.parametrize("name", kl.names())
def test_a_cap_bounds_every_column_and_leaves_the_rest_alone(name):
    hit = kl.cap_hits(*CAPPED, 1.0)
    edge = torch.tensor([[-1.0, -1.0, 0.5, 1.0]])
    for column in (kl.value, kl.reward_charge):
        torch.testing.assert_close(column(name, *CAPPED, cap=1.0), column(name, edge, CAPPED[1]), atol=0, rtol=0)
    free = kl.coefficient(name, *CAPPED)
    assert torch.equal(kl.coefficient(name, *CAPPED, cap=1.0), torch.where(hit, 0.0, free))


def test_a_capped_coefficient_is_the_derivative_of_the_capped_value():
    logprobs = CAPPED[0].clone().requires_grad_()
    kl.value("k3", logprobs, CAPPED[1], cap=2.0).sum().backward()
    torch.testing.assert_close(logprobs.grad, kl.coefficient("k3", *CAPPED, cap=2.0))


def test_a_cap_keeps_what_would_overflow_finite():
    far = torch.tensor([-200.0])
    assert kl.value("chi2", far, torch.zeros(1)).item() == math.inf
    assert kl.value("chi2", far, torch.zeros(1), cap=10.0).item() == pytest.approx(math.expm1(10) ** 2, rel=1e-6)
    assert kl.coefficient("chi2", far, torch.zeros(1), cap=10.0).item() == 0


@pytest.mark.parametrize("cap", [0.0, -1.0, math.nan])
def test_an_impossible_cap_is_refused(cap):
    for column in (kl.value, kl.coefficient, kl.reward_charge):
        with pytest.raises(ValueError, match="Give a positive one"):
            column("k1", *CAPPED, cap=cap)
    with pytest.raises(ValueError, match="Give a positive one"):
        kl.cap_hits(*CAPPED, cap)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A user's module `mine`, outside the package."""
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from klreg_verl.core.kl import Estimator\n"
        "class Quartic:\n"
        "    def value(self, d): return d**4\n"
        "    def coefficient(self, d): return 4 * d**3\n"
        "class Charged(Quartic):\n"
        "    def reward_charge(self, d): return 2 * d\n"
        "class Half:\n"
        "    def value(self, d): return d\n"
        "class Mean(Quartic):\n"
        "    def value(self, d): return d.mean()\n"
        "    def coefficient(self, d): return 1.0\n"
        "quartic, charged, half, mean = Quartic(), Charged(), Half(), Mean()\n"
        "ready = Estimator(value=torch.abs, coefficient=torch.sign, reward_charge=torch.square)\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("mine", None)


def test_a_users_own_estimator_is_used_in_every_column(own):
    d = torch.tensor([[0.5, -2.0]])
    assert kl.value("mine:quartic", d, torch.zeros(1, 2)).tolist() == [[0.0625, 16.0]]
    assert kl.coefficient("mine:quartic", d, torch.zeros(1, 2)).tolist() == [[0.5, -32.0]]
    assert kl.reward_charge("mine:quartic", d, torch.zeros(1, 2)).tolist() == [[0.5, -32.0]]
    assert kl.reward_charge("mine:charged", d, torch.zeros(1, 2)).tolist() == [[1.0, -4.0]]
    assert kl.reward_charge("mine:ready", d, torch.zeros(1, 2)).tolist() == [[0.25, 4.0]]
    assert kl.coefficient("mine:quartic", d, torch.zeros(1, 2), cap=1.0).tolist() == [[0.5, 0.0]]
    assert "mine:quartic" not in kl.names()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.at_all:x", r"module 'nowhere.at_all' cannot be imported \(No module named 'nowhere'\).*PYTHONPATH"),
        (":x", "module '' cannot be imported"),
        ("mine:absent", "module 'mine' has no 'absent'"),
        ("mine:half", "has no callable coefficient and no callable reward_charge"),
        ("mine:number", "'mine:number' has no callable value and"),
        ("mine:Quartic", "'mine:Quartic' is a class, not an object"),
    ],
)
def test_what_a_users_own_lacks_is_named(own, name, message):
    with pytest.raises(ValueError, match=message):
        kl.estimator(name)


def test_a_users_estimator_must_give_one_number_per_token(own):
    with pytest.raises(ValueError, match=r"mine:mean.value returned shape \(\) for log-ratios of shape \(1, 4\)"):
        kl.value("mine:mean", *CAPPED)
    with pytest.raises(ValueError, match=r"mine:mean.coefficient returned float for"):
        kl.coefficient("mine:mean", *CAPPED)


VERL_NAMES = ("k1", "k2", "k3", "abs")


def test_unclamped_k3_equals_verls_where_verl_does_not_clamp():
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos", reason="verl is not installed")
    # verl clamps the log-ratio at 20 and the value at 10: |d| <= 2.3 stays clear of both
    logprobs, ref_logprobs = torch.linspace(-2.3, 0, 47), torch.linspace(0, -2.3, 47)
    for name in VERL_NAMES:
        theirs = core_algos.kl_penalty(logprobs, ref_logprobs, name)
        torch.testing.assert_close(kl.value(name, logprobs, ref_logprobs), theirs, atol=1e-6, rtol=1e-6)


def test_k3_verl_clamps_by_hand():
    # r = 13.6: 13.6 - 1 - log 13.6 = 9.99 counts; r = 13.62 gives 10.008; d = 11 gives 10.00002
    inside, outside = torch.tensor([-math.log(13.6), 10.9]), torch.tensor([-math.log(13.62), 11.0, -21.0, 21.0])
    assert (kl.value("k3_verl", inside, torch.zeros(2)) < 10).all()
    assert kl.coefficient("k3_verl", inside, torch.zeros(2)).tolist() == pytest.approx([-12.6, 1 - math.exp(-10.9)])
    assert kl.value("k3_verl", outside, torch.zeros(4)).tolist() == [10.0] * 4
    assert kl.coefficient("k3_verl", outside, torch.zeros(4)).tolist() == [0.0] * 4


def test_k3_verl_is_verls_function_and_its_gradient_bit_for_bit():
    core_algos = pytest.importorskip("verl.trainer.ppo.core_algos", reason="verl is not installed")
    generator = torch.Generator().manual_seed(3)
    spread = torch.cat([torch.randn(4000, generator=generator) * scale for scale in (1e-4, 0.1, 2.0, 30.0)])
    logprobs, ref_logprobs = spread.clone().requires_grad_(), torch.randn(len(spread), generator=generator)
    theirs = core_algos.kl_penalty_forward(logprobs, ref_logprobs, "low_var_kl")
    (gradient,) = torch.autograd.grad(theirs.sum(), logprobs)
    assert torch.equal(kl.value("k3_verl", spread, ref_logprobs), theirs.detach())
    assert torch.equal(kl.coefficient("k3_verl", spread, ref_logprobs), gradient)
    assert (gradient == 0).any() and (gradient != 0).any()


def test_where_the_reference_excludes_the_token_values_are_their_limits():
    # r -> 0: r log r - r + 1 -> 1; the Jensen-Shannon value -> log(2) / 2; chi2 (r - 1)^2 -> 1; tv |r - 1| / 2 -> 1/2
    mine, excluded = torch.zeros(1), torch.tensor([-math.inf])
    limits = {"forward": 1.0, "js": math.log(2) / 2, "chi2": 1.0, "tv": 0.5}
    assert {name: kl.value(name, mine, excluded).item() for name in limits} == pytest.approx(limits)
