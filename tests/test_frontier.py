"""analysis.frontier: lines between points by hand, equal KL instead of equal beta, bands over seeds."""

import math

import numpy as np
import pytest

from klreg_verl.analysis import frontier
from klreg_verl.core.statistics import t_quantile


def test_between_two_points_is_a_straight_line():
    points = [(2.0, 0.8), (0.0, 0.4)]
    assert frontier.at_kl(points, 0.5) == pytest.approx(0.5)
    assert frontier.at_kl(points, 0.0) == 0.4 and frontier.at_kl(points, 2.0) == 0.8


def test_nothing_is_extrapolated():
    assert math.isnan(frontier.at_kl([(0.5, 0.4), (2.0, 0.8)], 0.4))
    assert math.isnan(frontier.at_kl([(0.5, 0.4), (2.0, 0.8)], 2.1))
    assert math.isnan(frontier.at_kl([], 1.0))


def test_points_of_equal_kl_are_averaged_and_missing_ones_left_out():
    points = [(1.0, 0.2), (1.0, 0.4), (2.0, 0.7), (math.nan, 9.0), (3.0, math.nan)]
    assert frontier.at_kl(points, 1.0) == pytest.approx(0.3)
    assert frontier.at_kl(points, 1.5) == pytest.approx(0.5)
    assert math.isnan(frontier.at_kl(points, 2.5))


def test_arms_on_one_curve_differ_at_equal_beta_and_not_at_equal_kl():
    # metric = sqrt(KL) for both; the same betas bring the second arm half as far
    curve = {seed: [(kl, math.sqrt(kl)) for kl in np.linspace(0.1, 4, 200)] for seed in (1, 2, 3)}
    slow = {seed: [(kl / 2, math.sqrt(kl / 2)) for kl, _ in points] for seed, points in curve.items()}
    at_equal_beta = curve[1][100][1] - slow[1][100][1]
    assert at_equal_beta > 0.3
    assert frontier.matched(curve, slow, (0.5, 1.5)).differences == pytest.approx([0.0] * 3, abs=1e-3)


def test_the_mean_over_an_interval_is_that_of_the_lines():
    # from 1 to 3 along (0, 0), (2, 1), (4, 0): 0.5 up to 1 and back to 0.5, mean 0.75
    points = [(4.0, 0.0), (0.0, 0.0), (2.0, 1.0)]
    assert frontier.over_kl(points, 1.0, 3.0) == pytest.approx(0.75)
    # between two points it is the chord's middle
    assert frontier.over_kl(points, 0.0, 2.0) == pytest.approx(0.5)
    assert math.isnan(frontier.over_kl(points, 1.0, 4.1)) and math.isnan(frontier.over_kl(points[1:2], 0.0, 0.1))


def test_seeds_that_do_not_enclose_the_interval_are_named_not_guessed():
    left = {1: [(0.0, 0.0), (2.0, 1.0)], 2: [(0.0, 0.0), (0.5, 1.0)], 3: [(0.0, 0.2), (2.0, 1.0)]}
    right = {seed: [(0.0, 0.0), (2.0, 0.5)] for seed in (1, 2, 3)}
    found = frontier.matched(left, right, (0.5, 1.5))  # means at KL 1: 0.5, 0.6 and 0.25
    assert found.seeds == (1, 3) and found.unpaired == (2,)
    assert found.differences == pytest.approx([0.25, 0.35])


def test_a_band_is_the_t_interval_of_the_seeds_at_each_kl():
    paths = {1: [(0.0, 0.0), (2.0, 1.0)], 2: [(0.0, 0.2), (2.0, 1.2)], 3: [(0.0, 0.1), (1.0, 0.6)]}
    found = frontier.frontier(paths, num=5)  # KL 0, 0.5, 1, 1.5, 2
    assert found.kl.tolist() == [0.0, 0.5, 1.0, 1.5, 2.0] and found.seeds.tolist() == [3, 3, 3, 2, 2]
    assert found.mean[0] == pytest.approx(0.1) and found.mean[2] == pytest.approx(0.6)
    # at 0: 0, 0.2, 0.1: sd 0.1, error 0.1 / sqrt(3)
    assert found.high[0] - found.mean[0] == pytest.approx(t_quantile(0.975, 2) * 0.1 / math.sqrt(3))
    assert found.mean[4] == pytest.approx(1.1) and found.low[4] < 1.0


def test_one_seed_has_a_line_and_no_band():
    found = frontier.frontier({1: [(0.0, 0.0), (2.0, 1.0)]}, num=3)
    assert found.mean.tolist() == [0.0, 0.5, 1.0] and np.isnan(found.low).all()


def test_no_runs_have_no_frontier():
    assert len(frontier.frontier({}).kl) == 0
