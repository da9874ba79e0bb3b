"""klreg_verl.core.passk: against counting every subset, exact to the last bit, refused where samples say nothing."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from klreg_verl.core import passk

# ------------------------------------------------------------------------------------------------------- pass@k


def test_pass_at_k_by_hand():
    # 2 right of 4, k = 2: one of the 6 pairs has no right one
    assert passk.pass_at_k([2], 4, 2).tolist() == [5 / 6]
    # k = 1 is the accuracy; k = n asks whether any is right
    assert passk.pass_at_k([0, 1, 4], 4, 1).tolist() == [0.0, 0.25, 1.0]
    assert passk.pass_at_k([0, 1, 4], 4, 4).tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_k_is_the_mean_over_all_subsets(samples: int):
    for right, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        answers = [True] * right + [False] * (samples - right)
        subsets = [any(subset) for subset in itertools.combinations(answers, k)]
        expected = Fraction(sum(subsets), len(subsets))
        assert passk.pass_at_k([right], samples, k).tolist() == [float(expected)]


@pytest.mark.parametrize(("samples", "k"), [(16, 8), (1024, 512), (5000, 2500)])
def test_pass_at_k_is_the_nearest_float_at_any_number_of_samples(samples: int, k: int):
    counts = [0, 1, 2, 3, samples // 7, samples - k, samples - k + 1, samples]
    exact = [1 - Fraction(math.comb(samples - c, k), math.comb(samples, k)) for c in counts]
    assert passk.pass_at_k(counts, samples, k).tolist() == [float(value) for value in exact]


def test_pass_at_k_is_unbiased_for_k_fresh_samples():
    # p = 0.3, n = 5, k = 3: the mean over all counts, weighted by their probability, is 1 - 0.7^3
    counts = np.arange(6)
    weights = [math.comb(5, c) * 0.3**c * 0.7 ** (5 - c) for c in counts]
    assert np.dot(weights, passk.pass_at_k(counts, 5, 3)) == pytest.approx(1 - 0.7**3, abs=1e-15)


def test_prompts_may_have_different_numbers_of_samples():
    assert passk.pass_at_k([1, 1], [2, 4], 2).tolist() == [1.0, 0.5]


@pytest.mark.parametrize(
    ("right", "samples", "k", "message"),
    [
        ([1, 2], 4, 5, "k=5 is more than the 4 samples of a prompt, which say nothing about 5 of them. Sample more"),
        ([1, 2], [8, 3], 4, "k=4 is more than the 3 samples"),
        ([1], 4, 0, "k=0 cannot work"),
        ([5], 4, 1, "5 right answers of 4 samples cannot be"),
        ([-1], 4, 1, "-1 right answers of 4 samples cannot be"),
        ([0.5], 4, 1, "`right` must be whole numbers, got float64: count, do not average"),
    ],
)
def test_what_samples_cannot_say_is_refused(right, samples, k, message):
    with pytest.raises(ValueError, match=message):
        passk.pass_at_k(right, samples, k)


# ------------------------------------------------------------------------------------------------------- maj@k


def by_subsets(votes: list[passk.Vote], k: int) -> float:
    """maj@k by looking at every subset."""
    scores = dict(votes)
    won = []
    for subset in itertools.combinations(votes, k):
        times = Counter(answer for answer, _ in subset if answer)
        first = [answer for answer in times if times[answer] == max(times.values())]
        won.append(sum(scores[answer] for answer in first) / len(first) if first else 0.0)
    return sum(won) / len(won)


def test_maj_at_k_by_hand():
    votes = [("a", 1.0), ("a", 1.0), ("b", 0.0), ("c", 0.0)]
    # k = 4: a leads with 2. k = 1: half of the samples. k = 2: aa wins; ab, ab, ac, ac tie: 1/2 each; bc loses
    assert passk.maj_at_k([votes], 4).tolist() == [1.0]
    assert passk.maj_at_k([votes], 1).tolist() == pytest.approx([0.5])
    assert passk.maj_at_k([votes], 2).tolist() == pytest.approx([(1 + 4 * 0.5 + 0) / 6])


def test_maj_at_k_is_the_mean_over_all_subsets():
    rng = np.random.default_rng(1)
    for _ in range(150):
        answers = rng.choice(["", "a", "b", "c", "d"], size=rng.integers(1, 9)).tolist()
        votes = [(answer, float(answer in ("a", "b"))) for answer in answers]
        for k in range(1, len(votes) + 1):
            assert passk.maj_at_k([votes], k)[0] == pytest.approx(by_subsets(votes, k), abs=1e-12)


def test_an_empty_answer_has_no_vote():
    # "" three times, right once: the only vote wins; no vote at all is wrong, whatever an empty answer scored
    assert passk.maj_at_k([[("", 0.0)] * 3 + [("a", 1.0)]], 4).tolist() == [1.0]
    assert passk.maj_at_k([[("", 1.0)] * 4], 2).tolist() == [0.0]


def test_maj_at_k_does_not_overflow_at_large_numbers_of_samples():
    votes = [("a", 1.0)] * 1100 + [("b", 0.0)] * 1000  # C(2100, 1050) is beyond every float64
    found = passk.maj_at_k([votes], 1050)[0]
    # the difference of the two counts has mean 50 and standard deviation about sqrt(1050 * 0.5) = 22.9
    assert 0.98 < found < 1.0
    with pytest.raises(ValueError, match="k=3000 is more than the 2100 samples"):
        passk.maj_at_k([votes], 3000)


# ------------------------------------------------------------------------------------------------------- turnover


def test_newly_solved_and_newly_lost_prompts():
    found = passk.turnover([0, 2, 0, 1], [1, 0, 0, 2], 2)
    assert (found.new, found.lost) == ((0,), (1,))
    # C(4 - c, 2) / C(4, 2) of the totals 1, 2, 0, 3: 3/6, 1/6, not counted, 0
    assert found.by_chance == pytest.approx(3 / 6 + 1 / 6)


def test_chance_is_what_dealing_the_same_answers_anew_gives():
    rng = np.random.default_rng(2)
    chances = rng.beta(0.4, 0.8, size=400)
    before, after = (rng.binomial(4, chances) for _ in range(2))
    expected = [passk.turnover(*(rng.binomial(4, chances) for _ in range(2)), 4) for _ in range(200)]
    found = passk.turnover(before, after, 4).by_chance
    mean = np.mean([len(one.new) for one in expected])
    # about 40 of 400 prompts turn by chance; by_chance has the spread of the total counts only
    assert found == pytest.approx(mean, abs=6)


def test_different_prompts_cannot_be_compared():
    with pytest.raises(ValueError, match="2 and 1 prompts cannot be compared"):
        passk.turnover([0, 1], [1], 2)


# ------------------------------------------------------------------------------------------------------- intervals


def test_the_interval_of_independent_answers_is_wilsons():
    # one sample of 40 prompts, 10 right: n_eff = p (1 - p) / error^2 = 39, since the error divides by n - 1
    found = passk.share_interval([1.0] * 10 + [0.0] * 30)
    t, n, p = 2.0226909, 39, 0.25
    centre, half = (p + t**2 / (2 * n)) / (1 + t**2 / n), t * math.sqrt(p * (1 - p) / n + t**2 / (4 * n * n))
    assert found.error == pytest.approx(math.sqrt(0.25 * 0.75 / 39))
    assert found.low == pytest.approx(centre - half / (1 + t**2 / n), abs=1e-6)
    assert found.high == pytest.approx(centre + half / (1 + t**2 / n), abs=1e-6)


def test_samples_of_one_prompt_do_not_count_as_independent():
    # 20 prompts whose 16 samples agree: the interval is that of 20 answers, not of 320
    together = passk.share_interval([1.0] * 10 + [0.0] * 10)
    apart = passk.share_interval([0.5 + 0.11 * (-1) ** place for place in range(20)])
    assert together.high - together.low > 0.4
    assert apart.high - apart.low < 0.12


def test_an_interval_says_something_when_every_prompt_is_wrong():
    # no right one of 30: upper end t^2 / (n + t^2) = 4.183 / 34.183
    found = passk.share_interval([0.0] * 30)
    assert (found.mean, found.low) == (0.0, 0.0)
    assert found.high == pytest.approx(4.18289 / 34.18289, abs=1e-4)
    assert passk.share_interval([1.0] * 30).high == 1.0


def test_one_prompt_has_no_interval():
    found = passk.share_interval([0.25])
    assert (found.mean, found.low, found.high) == (0.25, 0.0, 1.0)
    assert math.isnan(found.error)


@pytest.mark.parametrize(("share", "prompts", "samples"), [(0.3, 30, 16), (0.5, 8, 4), (0.9, 100, 8)])
def test_intervals_cover_the_true_share_as_often_as_they_say(share: float, prompts: int, samples: int):
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(600):
        chances = rng.beta(2 * share, 2 * (1 - share), size=prompts)
        found = passk.share_interval(rng.binomial(samples, chances) / samples)
        hits += found.low <= share <= found.high
    assert hits / 600 > 0.95 - 3 * math.sqrt(0.95 * 0.05 / 600)


def test_a_difference_has_students_interval():
    found = passk.mean_interval([0.1, 0.2, 0.3])
    # sd 0.1, error 0.1 / sqrt 3, t of two degrees of freedom 4.302653
    assert found.mean == pytest.approx(0.2)
    assert found.high - found.mean == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [([0.5, 1.2], "Shares lie between 0 and 1"), ([], "at least one prompt"), ([math.nan], "a finite number")],
)
def test_an_interval_of_no_shares_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        passk.share_interval(values)


def test_the_k_that_a_table_shows():
    assert passk.powers_up_to(1) == (1,)
    assert passk.powers_up_to(16) == (1, 2, 4, 8, 16)
    assert passk.powers_up_to(12) == (1, 2, 4, 8, 12)
