"""Means, errors, differences, smoothing and number texts against values worked out by hand."""

import math

import numpy as np
import pandas as pd
import pytest

from klreg_verl.analysis import stats
from klreg_verl.analysis.stats import Estimate


def test_mean_and_error_of_four_numbers():
    # mean 5; squared deviations 9 + 1 + 1 + 9 = 20; sd = sqrt(20 / 3); error = sqrt(20 / 3) / 2 = 1.29099
    found = stats.mean_and_error([2, 4, 6, 8])
    assert found.mean == 5 and found.num == 4
    assert found.standard_error == pytest.approx(math.sqrt(20 / 3) / 2)


def test_missing_values_are_left_out():
    assert stats.mean_and_error([1.0, math.nan, 3.0]) == stats.mean_and_error([1.0, 3.0])


def test_one_value_has_no_error_and_none_has_no_mean():
    assert stats.mean_and_error([3.0]).mean == 3 and math.isnan(stats.mean_and_error([3.0]).standard_error)
    assert math.isnan(stats.mean_and_error([]).mean) and stats.mean_and_error([]).num == 0


def test_the_last_steps_are_the_last_ten_or_all():
    assert stats.last_steps(list(range(100))).mean == 94.5  # 90 ... 99
    assert stats.last_steps([1.0, 2.0]).mean == 1.5


def test_errors_of_a_difference_add_in_squares():
    # sqrt(0.03^2 + 0.04^2) = 0.05
    left, right = Estimate(mean=0.9, standard_error=0.03, num=10), Estimate(mean=0.5, standard_error=0.04, num=10)
    found = stats.difference(left, right)
    assert found.mean == pytest.approx(0.4) and found.standard_error == pytest.approx(0.05)


def test_change_compares_the_first_with_the_last_window():
    # 1 ... 40: first ten mean 5.5, last ten 35.5; each window's error sqrt(55/6)/sqrt(10), together * sqrt(2)
    found = stats.change(list(range(1, 41)))
    assert (found.first.mean, found.last.mean, found.difference.mean, found.window) == (5.5, 35.5, 30.0, 10)
    assert found.difference.standard_error == pytest.approx(math.sqrt(2 * 55 / 6 / 10))
    assert found.direction == 1


def test_windows_of_a_short_run_do_not_overlap():
    assert stats.change([1.0, 2.0, 3.0, 4.0, 5.0]).window == 2
    assert stats.change([1.0]) is None


@pytest.mark.parametrize(
    ("mean", "num", "sign"),
    [(0.3, 8, 1), (-0.3, 8, -1), (0.2, 8, 0), (0.3, 3, 0), (0.44, 3, 1), (9.0, 1, 0)],
)
def test_a_sign_is_clear_where_the_t_interval_leaves_zero_out(mean, num, sign):
    # 2.36 errors of 0.1 with eight values, 4.30 with three: three errors there are p 0.095
    error = 0.1 if num > 1 else math.nan
    assert stats.clear_sign(Estimate(mean=mean, standard_error=error, num=num)) == sign


def test_changes_of_several_runs_are_averaged_with_errors_over_runs():
    # differences 2 and 4: mean 3, sd sqrt(2), error sqrt(2) / sqrt(2) = 1
    changes = [stats.change([0.0, 0.0, 2.0, 2.0]), stats.change([1.0, 1.0, 5.0, 5.0])]
    found = stats.mean_change(changes)
    assert found.difference == Estimate(mean=3.0, standard_error=pytest.approx(1.0), num=2)
    assert stats.mean_change(changes[:1]) is changes[0]


def test_pairs_are_the_shared_seeds_only():
    # seeds 2 and 3: 5 - 1 = 4 and 7 - 1 = 6: mean 5, error 1
    found = stats.paired_difference({1: 100.0, 2: 5.0, 3: 7.0}, {2: 1.0, 3: 1.0, 4: 50.0})
    assert found == Estimate(mean=5.0, standard_error=pytest.approx(1.0), num=2)


@pytest.mark.parametrize(
    ("steps", "window"), [(0, 1), (11, 1), (12, 3), (40, 5), (48, 5), (56, 7), (100, 11), (900, 25)]
)
def test_smoothing_windows_are_odd_and_about_an_eighth(steps, window):
    assert stats.smoothing_window(steps) == window


def test_smoothing_is_a_centred_mean_where_the_whole_window_exists():
    values = pd.Series([0.0, 3.0, 6.0, 3.0], index=[1, 2, 3, 4])
    assert stats.smooth(values, 3).to_dict() == {2: 3.0, 3: 4.0}


def test_smoothing_over_one_step_or_more_than_there_are_changes_nothing():
    values = pd.Series([1.0, 5.0])
    assert stats.smooth(values, 1).tolist() == [1.0, 5.0]
    assert stats.smooth(values, 3).tolist() == [1.0, 5.0]


def test_block_means_leave_out_missing_values_and_an_incomplete_block():
    found = stats.block_means(pd.Series([1.0, 3.0, math.nan, 5.0, math.nan, math.nan, 9.0]), 2)
    np.testing.assert_array_equal(found, [2.0, 5.0, math.nan])


@pytest.mark.parametrize(
    ("mean", "error", "text"),
    [
        (0.6312, 0.0124, "0.631 ± 0.012"),
        (12.34, 1.2, "12.3 ± 1.2"),
        (250.0, 31.0, "250.0 ± 31.0"),
        (-0.00001, 0.05, "0.000 ± 0.050"),
        (-1.5, 0.25, "−1.50 ± 0.25"),
        (0.5, math.nan, "0.500"),
        (0.5, 0.0, "0.500 ± 0.000"),
        (math.nan, math.nan, "–"),
    ],
)
def test_texts_show_two_digits_of_the_error(mean, error, text):
    assert stats.text(Estimate(mean=mean, standard_error=error, num=3)) == text


def test_a_difference_can_show_its_sign():
    assert stats.text(Estimate(mean=0.1, standard_error=0.02, num=3), sign=True) == "+0.100 ± 0.020"


def test_a_column_has_the_decimals_of_its_largest_error():
    assert stats.decimals([0.05, 0.0004, math.nan]) == 3
    assert stats.decimals([0.00001]) == 4
    assert stats.decimals([]) == 3
