"""What an arm should reach: the optimum of E[R] - beta * KL over all policies, from what the starting model draws.

    reverse   max E[R] - beta KL(pi || ref):   pi* = ref exp(R / beta) / Z
    forward   max E[R] - beta KL(ref || pi):   pi* = beta ref / (Lambda - R),  Lambda > max R such that pi* sums to 1

Both change ref by a factor that depends on R alone. So where every right answer has the same reward, the right answers
keep the ratios that they have under the reference, in both directions: a conditional diversity other than the
starting model's is not the KL's doing. What differs is how much probability the right answers get, and that follows
from p, the probability that the reference is right:

    reverse   a = p e^(1/beta) / (1 - p + p e^(1/beta))
    forward   a = (1 - beta + sqrt((1 - beta)^2 + 4 beta p)) / 2        1 - beta at p = 0 where beta < 1

From draws p is not known exactly. Both a are concave in p, which gives a bracket without any assumption: the mean of
a(c / n) over prompts is too low in expectation, and a(mean of c / n) too high (Jensen). In between stands the mean
under a Beta distribution of p fitted to all prompts. Policies are limited by nothing here, so for an arm whose
objective this is, E[R] - beta KL cannot exceed `Prediction.objective`, and falls short of it by beta KL(pi || pi*).

Sources: the reverse optimum: e.g. Korbak et al. (2022), arXiv 2205.11275, eq. 3; the forward one, and that neither adds
modes: GX-Chen et al. (2025), arXiv 2510.20817; the Beta-binomial by maximum marginal likelihood (empirical Bayes).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from klreg_verl.core.diversity import Answers, rarefied_distinct

Array = np.ndarray
Direction = Literal["reverse", "forward"]

CERTAIN = 0.99
"""Mean accuracy from which a prediction is empty: any arm that learns the task at all comes near it."""


# ---------------------------------------------------------------------------------------------------- right or wrong


def optimal_accuracy(right: Array, beta: float, direction: Direction) -> Array:
    """The probability of a right answer under pi*, for rewards 1 and 0; `right` is the reference's, any shape."""
    p = np.asarray(right, dtype=np.float64)
    return _optimum(p, 1 - p, beta, direction)[0]


def _optimum(p: Array, q: Array, beta: float, direction: Direction) -> tuple[Array, Array]:
    """(a, 1 - a) under pi*; q is 1 - p, given so that neither loses its digits near the ends."""
    _check_beta(beta)
    if direction == "forward":
        root = np.sqrt((1 - beta) ** 2 + 4 * beta * p)
        right = (1 - beta + root) / 2 if beta <= 1 else 2 * beta * p / (root + beta - 1)
        return right, 2 * beta * q / (1 + beta + root)
    wrong = q * math.exp(-1 / beta)  # 0 below beta = 1/745: then any p above 0 is turned into certainty
    total = p + wrong
    right = np.divide(p, total, out=np.zeros_like(total), where=total > 0)
    return right, np.divide(wrong, total, out=np.ones_like(total), where=total > 0)


def _divergence(first: tuple[Array, Array], second: tuple[Array, Array]) -> Array:
    """Sum over the two of p log(p / q), 0 at p = 0; infinite where only q is 0."""
    return _term(first[0], second[0]) + _term(first[1], second[1])


def _term(p: Array, q: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0)


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta {beta}: without a KL term there is no optimum but accuracy 1. Give a beta above 0.")


# ---------------------------------------------------------------------------------------------------- from draws


@dataclass(frozen=True, kw_only=True)
class Beliefs:
    """A Beta distribution of p over prompts, fitted to draws of the starting model."""

    alpha: float
    beta: float

    @property
    def mean(self) -> float:
        """Mean of p."""
        return self.alpha / (self.alpha + self.beta)


def fit_beliefs(right: Sequence[int], draws: Sequence[int]) -> Beliefs:
    """The Beta-binomial of largest marginal likelihood; `right` of `draws` per prompt.

    A grid over (logit of the mean, log of alpha + beta), refined six times around its best point; the mean is kept in
    [1e-6, 1 - 1e-6] and alpha + beta in [0.02, 1e4], since all-right or all-alike prompts have no maximum inside.
    """
    pairs, weights = np.unique(np.column_stack([right, draws]), axis=0, return_counts=True)
    low, high = np.array([-13.8, math.log(0.02)]), np.array([13.8, math.log(1e4)])
    centre, width = (low + high) / 2, (high - low) / 2
    for _ in range(7):
        axes = [
            np.clip(np.linspace(c - w, c + w, 21), a, b) for c, w, a, b in zip(centre, width, low, high, strict=True)
        ]
        grid = np.array([(mean, size) for mean in axes[0] for size in axes[1]])
        centre = grid[int(np.argmax([_likelihood(mean, size, pairs, weights) for mean, size in grid.tolist()]))]
        width = width / 5
    mean, size = 1 / (1 + math.exp(-centre[0])), math.exp(centre[1])
    return Beliefs(alpha=mean * size, beta=(1 - mean) * size)


def _likelihood(logit: float, log_size: float, pairs: Array, weights: Array) -> float:
    """Log marginal likelihood, without the binomial coefficients."""
    size, mean = math.exp(log_size), 1 / (1 + math.exp(-logit))
    a, b = mean * size, (1 - mean) * size
    terms = [_log_beta(a + right, b + draws - right) - _log_beta(a, b) for right, draws in pairs.tolist()]
    return float(np.dot(weights, terms))


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


_LOGITS = np.linspace(-40.0, 40.0, 4001)


def posterior(beliefs: Beliefs, right: int, draws: int) -> tuple[Array, Array, Array]:
    """(p, 1 - p, weight) on a grid even in the logit: p given `right` of `draws`. The weights sum to 1."""
    log_p, log_rest = -np.logaddexp(0, -_LOGITS), -np.logaddexp(0, _LOGITS)
    density = (beliefs.alpha + right) * log_p + (beliefs.beta + draws - right) * log_rest
    weights = np.exp(density - density.max())
    return np.exp(log_p), np.exp(log_rest), weights / weights.sum()


# ---------------------------------------------------------------------------------------------------- the prediction


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What an arm would reach at its optimum; means over the prompts."""

    direction: Direction
    beta: float
    start: float
    """Accuracy of the starting model on these prompts."""
    accuracy: float
    low: float
    """Below the true optimum's accuracy in expectation: c / n taken for p."""
    high: float
    """Above it: one p for all prompts."""
    kl: float
    """KL(pi* || ref) [nats per response], whatever the direction: what kl_ref/k1_response measures."""
    objective: float
    """E[R] - beta KL at the optimum, the KL in the arm's own direction [reward]: no policy has more."""
    samples: int
    """Draws per prompt that `distinct` is of."""
    distinct: float
    """Distinct right answers in so many draws."""
    unresolved: float
    """Draws per prompt that the starting model's right ones are too few for; `distinct` is too low by this at most."""
    prompts: int

    @property
    def is_empty(self) -> bool:
        """Whether the optimum is accuracy 1 but for a percent: then it tells nothing about the arm."""
        return self.accuracy >= CERTAIN


def predict(prompts: Sequence[Answers], beta: float, direction: Direction, *, samples: int) -> Prediction:
    """The optimum on the prompts that the starting model's draws are of; rewards 1 for right and 0 for wrong.

    Args:
        prompts: the starting model's draws.
        beta: in reward units per nat of the whole response.
        direction: whose optimum.
        samples: draws per prompt for the distinct right answers; few of those that were made (a quarter, say) can be
            predicted, because the optimum has more right draws than the start.

    Raises:
        ValueError: no prompts, or beta not above 0.
    """
    if not prompts:
        raise ValueError("There are no draws of the starting model, so its optimum cannot be computed.")
    right, draws = [each.num_valid for each in prompts], [each.num_samples for each in prompts]
    shares = np.array(right) / np.array(draws)
    beliefs = fit_beliefs(right, draws)
    pairs = list(zip(right, draws, strict=True))
    found = {pair: _expected(posterior(beliefs, *pair), beta, direction) for pair in set(pairs)}
    means = np.array([found[pair] for pair in pairs])
    distinct, unresolved = _distinct(prompts, means[:, 0], samples)
    return Prediction(
        direction=direction,
        beta=beta,
        start=float(shares.mean()),
        accuracy=float(means[:, 0].mean()),
        low=float(optimal_accuracy(shares, beta, direction).mean()),
        high=float(optimal_accuracy(shares.mean(), beta, direction)),
        kl=float(means[:, 1].mean()),
        objective=float(means[:, 2].mean()),
        samples=samples,
        distinct=distinct,
        unresolved=unresolved,
        prompts=len(prompts),
    )


def tilted(prompts: Sequence[Answers], betas: Sequence[float]) -> list[tuple[float, float]]:
    """(KL to the reference, accuracy) of the optimum of reverse KL at each beta: no policy has more at that KL."""
    found, believed = [], _believed(prompts)
    for beta in betas:
        means = [(_expected(given, beta, "reverse"), weight) for given, weight in believed]
        accuracy, kl = (sum(each[index] * weight for each, weight in means) for index in (0, 1))
        found.append((kl, accuracy))
    return found


def best_of(prompts: Sequence[Answers], counts: Sequence[int]) -> list[tuple[float, float]]:
    """(log n - (n - 1) / n, accuracy) of the best of n draws by the reward itself, for each n of `counts`.

    That KL is an upper bound, and reached where no two draws have the same reward (Beirami et al. 2024,
    arXiv 2401.01879); with right and wrong alone the KL is smaller. Accuracy is the mean of 1 - (1 - p)^n.
    """
    believed = _believed(prompts)
    return [
        (
            math.log(n) - (n - 1) / n,
            float(sum(weight * (weights @ -np.expm1(n * np.log(q))) for (_, q, weights), weight in believed)),
        )
        for n in counts
    ]


def _believed(prompts: Sequence[Answers]) -> list[tuple[tuple[Array, Array, Array], float]]:
    """(posterior of p, share of the prompts) of each different count of right draws."""
    pairs = Counter((each.num_valid, each.num_samples) for each in prompts)
    beliefs = fit_beliefs([each.num_valid for each in prompts], [each.num_samples for each in prompts])
    return [(posterior(beliefs, *pair), count / len(prompts)) for pair, count in sorted(pairs.items())]


def _expected(given: tuple[Array, Array, Array], beta: float, direction: Direction) -> tuple[float, float, float]:
    """Posterior means of accuracy, KL(pi* || ref) and objective of one prompt."""
    p, q, weights = given
    optimum = _optimum(p, q, beta, direction)
    moved = _divergence(optimum, (p, q))
    charged = moved if direction == "reverse" else _divergence((p, q), optimum)
    objective = optimum[0] - beta * charged
    return float(weights @ optimum[0]), float(weights @ moved), float(weights @ objective)


def _distinct(prompts: Sequence[Answers], accuracy: Array, samples: int) -> tuple[float, float]:
    """(mean distinct right answers in so many draws, mean number of them that could not be resolved).

    v of the draws are right, v binomial; among v right draws there are as many distinct answers as the starting model
    has among v of its own, because pi* keeps the ratios of the right answers. Beyond its own right draws, as many as
    among all of them.
    """
    values, missing = [], []
    for prompt, a in zip(prompts, accuracy.tolist(), strict=True):
        known = min(prompt.num_valid, samples)
        seen = [0.0] + [rarefied_distinct(prompt.counts, prompt.num_valid, v) for v in range(1, known + 1)]
        chances, more = _binomial(samples, a), samples - known
        values.append(float(chances @ np.array(seen + [seen[-1]] * more)))
        missing.append(float(chances[known + 1 :] @ np.arange(1, more + 1)))
    return float(np.mean(values)), float(np.mean(missing))


def _binomial(n: int, p: float) -> Array:
    """(n + 1,) probabilities of 0 ... n."""
    return np.array([math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)])
