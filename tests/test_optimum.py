"""core.optimum: closed forms against enumeration and against each other; predictions from draws of a known policy."""

import math

import numpy as np
import pytest

from klreg_verl.core import optimum
from klreg_verl.core.diversity import Answers
from klreg_verl.core.optimum import optimal_accuracy, predict

REFERENCE = np.array([0.05, 0.25, 0.40, 0.20, 0.10])
REWARDS = np.array([1.0, 1.0, 0.0, 0.0, 0.5])


def reverse_optimum(reference: np.ndarray, rewards: np.ndarray, beta: float) -> np.ndarray:
    """(N,) probabilities ref exp(R / beta) / Z; `beta` in reward units per nat, above 0."""
    with np.errstate(divide="ignore"):
        logits = np.log(np.asarray(reference, dtype=np.float64)) + np.asarray(rewards, dtype=np.float64) / beta
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def forward_optimum(reference: np.ndarray, rewards: np.ndarray, beta: float) -> np.ndarray:
    """(N,) probabilities beta ref / (Lambda - R), by bisection; every entry of `reference` above 0.

    The sum falls from infinity at Lambda = max R to at most 1 at max R + beta.
    """
    ref, reward = np.asarray(reference, dtype=np.float64), np.asarray(rewards, dtype=np.float64)
    low, high = float(reward.max()), float(reward.max()) + beta
    for _ in range(200):
        middle = (low + high) / 2
        too_large = middle <= reward.max() or (beta * ref / (middle - reward)).sum() > 1
        low, high = (middle, high) if too_large else (low, middle)
    return beta * ref / (high - reward)


def reverse_kl(accuracy, right):
    """KL(pi || ref) of a policy that changes ref by a factor on right and another on wrong answers."""
    p, q = np.asarray(accuracy, dtype=np.float64), np.asarray(right, dtype=np.float64)
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


def objective(policy, rewards, beta, direction) -> float:
    p, q = (policy, REFERENCE) if direction == "reverse" else (REFERENCE, policy)
    return float(policy @ rewards - beta * (p * np.log(p / q)).sum())


def test_the_optima_are_those_of_the_bandit():
    # the numbers that exact gradient ascent of k1 in reward and k3 in loss ends at (tests/test_bandit.py)
    assert reverse_optimum(REFERENCE, REWARDS, 0.2).round(3).tolist() == [0.160, 0.801, 0.009, 0.004, 0.026]
    assert forward_optimum(REFERENCE, REWARDS, 0.2).round(3).tolist() == [0.142, 0.711, 0.075, 0.037, 0.035]


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("beta", [0.05, 0.2, 1.0, 3.0])
def test_no_policy_nearby_has_more(direction, beta):
    best = {"reverse": reverse_optimum, "forward": forward_optimum}[direction](REFERENCE, REWARDS, beta)
    top = objective(best, REWARDS, beta, direction)
    generator = np.random.default_rng(0)
    for _ in range(200):
        other = best * np.exp(generator.normal(0, 0.1, size=5))
        assert objective(other / other.sum(), REWARDS, beta, direction) <= top + 1e-12


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0, 2.5])
def test_right_or_wrong_has_a_closed_form(direction, beta):
    rewards = np.array([1.0, 1.0, 0.0, 0.0, 0.0])
    best = {"reverse": reverse_optimum, "forward": forward_optimum}[direction](REFERENCE, rewards, beta)
    assert optimal_accuracy(0.3, beta, direction) == pytest.approx(best[:2].sum(), abs=1e-9)
    assert best[0] / best[1] == pytest.approx(0.05 / 0.25)  # right answers keep their ratio
    assert reverse_kl(best[:2].sum(), 0.3) == pytest.approx((best * np.log(best / REFERENCE)).sum(), abs=1e-9)


def test_the_ends_of_the_closed_forms():
    assert optimal_accuracy(np.array([0.0, 1.0]), 0.2, "reverse").tolist() == [0.0, 1.0]
    # forward KL does not forbid what the reference never does: 1 - beta at p = 0
    assert optimal_accuracy(np.array([0.0, 1.0]), 0.2, "forward") == pytest.approx([0.8, 1.0])
    assert optimal_accuracy(np.array([0.0, 1.0]), 2.0, "forward") == pytest.approx([0.0, 1.0])
    # beta -> infinity: the reference itself
    assert optimal_accuracy(0.3, 1e6, "reverse") == pytest.approx(0.3, abs=1e-6)
    assert optimal_accuracy(0.3, 1e6, "forward") == pytest.approx(0.3, abs=1e-6)
    # p = 1e-12 at beta = 1 / 20: e^20 = 4.9e8, so 4.9e-4
    assert optimal_accuracy(1e-12, 0.05, "reverse") == pytest.approx(math.exp(20) * 1e-12, rel=1e-3)


@pytest.mark.parametrize("beta", [0.0, -1.0])
def test_without_a_kl_term_there_is_no_optimum(beta):
    with pytest.raises(ValueError, match="there is no optimum but accuracy 1"):
        optimal_accuracy(0.5, beta, "reverse")


def draws(right: np.ndarray, samples: int, seed: int = 0) -> list[Answers]:
    """Each prompt's right draws of so many, over four equally likely right answers."""
    generator = np.random.default_rng(seed)
    drawn = []
    for p in right:
        counts = generator.multinomial(generator.binomial(samples, p), [0.25] * 4)
        counts = tuple(sorted((int(count) for count in counts if count), reverse=True))
        drawn.append(Answers(num_samples=samples, counts=counts, num_possible=4))
    return drawn


def test_a_fitted_beta_is_the_one_that_was_drawn_from():
    right = np.random.default_rng(0).beta(2.0, 3.0, size=4000)
    counts = np.random.default_rng(1).binomial(16, right)
    found = optimum.fit_beliefs(counts.tolist(), [16] * 4000)
    assert found.mean == pytest.approx(0.4, abs=0.01) and found.alpha + found.beta == pytest.approx(5.0, rel=0.1)


@pytest.mark.parametrize(("counts", "mean"), [([8] * 20, 1.0), ([0] * 20, 0.0)])
def test_prompts_that_are_all_right_or_all_wrong_have_a_belief(counts, mean):
    assert optimum.fit_beliefs(counts, [8] * 20).mean == pytest.approx(mean, abs=1e-3)


def test_a_posterior_is_a_beta_distribution():
    # Beta(2, 3) and 5 of 8 right: Beta(7, 6), mean 7 / 13
    p, rest, weights = optimum.posterior(optimum.Beliefs(alpha=2.0, beta=3.0), 5, 8)
    assert weights.sum() == pytest.approx(1.0) and weights @ p == pytest.approx(7 / 13) and p + rest == pytest.approx(1)


@pytest.mark.parametrize(
    ("direction", "beta"), [("reverse", 0.2), ("reverse", 1.0), ("forward", 0.5), ("forward", 2.0)]
)
def test_a_prediction_from_eight_draws_is_near_the_truth_and_inside_its_bracket(direction, beta):
    right = np.random.default_rng(0).beta(0.8, 1.5, size=600)
    best = optimal_accuracy(right, beta, direction)
    kl = reverse_kl(best, right)
    charged = kl if direction == "reverse" else reverse_kl(right, best)
    found = predict(draws(right, 8), beta, direction, samples=2)
    assert found.start == pytest.approx(right.mean(), abs=0.03)
    assert found.accuracy == pytest.approx(best.mean(), abs=0.03)
    assert found.low - 0.03 <= best.mean() <= found.high + 0.03 and found.low <= found.accuracy <= found.high
    assert found.kl == pytest.approx(kl.mean(), rel=0.12)
    assert found.objective == pytest.approx((best - beta * charged).mean(), abs=0.03)


def test_distinct_answers_are_predicted_from_the_starting_model_alone():
    # four equally likely right answers, right with chance a: 2 draws expect 4 (1 - (1 - a / 4)^2) distinct ones
    right = np.full(300, 0.5)
    accuracy = float(optimal_accuracy(0.5, 0.5, "reverse"))
    found = predict(draws(right, 64), 0.5, "reverse", samples=2)
    assert found.distinct == pytest.approx(4 * (1 - (1 - accuracy / 4) ** 2), abs=0.03)
    assert found.unresolved == pytest.approx(0.0, abs=1e-6)


def test_what_the_start_has_too_few_right_draws_for_is_said():
    # one right draw of 8, but the optimum is right nearly always: of two draws at most one is resolved
    found = predict([Answers(num_samples=8, counts=(1,), num_possible=4)] * 50, 0.05, "reverse", samples=2)
    assert found.distinct <= 1.0 and found.unresolved > 0.9


def test_a_prediction_is_empty_where_the_optimum_is_accuracy_1():
    right = np.full(100, 0.5)
    assert predict(draws(right, 8), 0.05, "reverse", samples=2).is_empty
    assert not predict(draws(right, 8), 0.5, "reverse", samples=2).is_empty


def test_nothing_drawn_is_refused():
    with pytest.raises(ValueError, match="no draws of the starting model"):
        predict([], 0.1, "reverse", samples=2)


def test_per_token_terms_have_another_optimum_than_the_whole_divergence():
    """Why k2 in the loss is told as orientation only: two tokens, the second's KL is steered into by the first.

    Reference: first token 0 or 1 with 1/2; after 0 the answer is right always, after 1 with 1/10. Reward: right.
    Whole divergence: pi* = ref e^(R/beta) / Z gives P(first = 0) proportional to 1/2 e^(1/beta) against
    1/2 (1/10 e^(1/beta) + 9/10). Per token: the second token after 1 goes to 1/10 e^(1/beta) / (1/10 e^(1/beta) + 9/10)
    = a, and the first follows ref e^(Q / beta) with Q = expected reward: e^(1/beta) against e^(a / beta), because
    the KL that the second token will pay is not charged to it.
    """
    beta = 0.5
    up = math.exp(1 / beta)
    a = 0.1 * up / (0.1 * up + 0.9)
    whole = up / (up + 0.1 * up + 0.9)
    per_token = up / (up + math.exp(a / beta))
    assert whole == pytest.approx(0.8185, abs=1e-4) and per_token == pytest.approx(0.7499, abs=1e-4)

    def ascend(charge_later: bool) -> float:
        first, second = 0.0, math.log(1 / 9)  # logits of first = 0, and of right after 1
        for _ in range(4000):
            p, q = 1 / (1 + math.exp(-first)), 1 / (1 + math.exp(-second))
            kl_second = q * math.log(q / 0.1) + (1 - q) * math.log((1 - q) / 0.9)
            later = q - (beta * kl_second if charge_later else 0.0)
            first += 0.5 * p * (1 - p) * ((1 - later) - beta * (math.log(p / 0.5) - math.log((1 - p) / 0.5)))
            second += 0.5 * q * (1 - q) * (1 - beta * (math.log(q / 0.1) - math.log((1 - q) / 0.9)))
        return p

    assert ascend(charge_later=True) == pytest.approx(whole, abs=1e-6)
    assert ascend(charge_later=False) == pytest.approx(per_token, abs=1e-6)


def test_a_beta_whose_exponential_is_beyond_a_float_turns_any_chance_into_certainty():
    # exp(-1 / 0.001) = exp(-1000) = 0: p / (p + 0) = 1 at p = 0.2, and p = 0 stays 0
    assert optimal_accuracy(np.array([0.0, 0.2, 1.0]), 1e-3, "reverse").tolist() == [0.0, 1.0, 1.0]
    never = [Answers(num_samples=8, counts=(), num_possible=4), Answers(num_samples=8, counts=(2,), num_possible=4)]
    found = predict(never, 1e-3, "reverse", samples=2)
    assert (found.low, found.high) == (0.5, 1.0)  # 0 and 1 on the two prompts; one p = 1/8 for both
    assert np.isfinite([found.accuracy, found.kl, found.objective, found.distinct]).all()
