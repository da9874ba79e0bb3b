"""core.statistics: closed forms and hand arithmetic first, then error rates and coverage by simulation."""

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest

from klreg_verl.core import statistics
from klreg_verl.core.statistics import (
    Estimate,
    Paired,
    at_look,
    decide,
    holm,
    look_level,
    paired,
    sequence_p,
    t_quantile,
    t_tail,
)

SIMULATIONS = 2000
"""At a rate of 0.05 the standard error of a simulated rate is sqrt(0.05 * 0.95 / 2000) = 0.0049."""
THREE_ERRORS = 3 * math.sqrt(0.05 * 0.95 / SIMULATIONS)


def of(differences) -> Paired:
    """Pairs with these differences, the second arm at 0."""
    values = [float(value) for value in differences]
    return Paired(seeds=tuple(range(len(values))), left=tuple(values), right=(0.0,) * len(values))


# ---------------------------------------------------------------------------------------------------- Student's t


def test_with_one_degree_of_freedom_t_is_cauchy():
    for t in (-3.0, 0.0, 0.5, 40.0):
        assert t_tail(t, 1) == pytest.approx(0.5 - math.atan(t) / math.pi, rel=1e-12)


def test_with_two_degrees_the_tail_has_a_closed_form():
    # P(T > t) = 1/2 - t / (2 sqrt(2 + t^2))
    for t in (-1.0, 0.3, 5.0):
        assert t_tail(t, 2) == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t * t)), rel=1e-12)


def test_far_out_the_tail_keeps_its_digits():
    # df = 2, t = 1e4: 1/2 - t / (2 sqrt(2 + t^2)) = 1 / (2 t^2) (1 - 3 / t^2 ...) = 5e-9
    assert t_tail(1e4, 2) == pytest.approx(5e-9 * (1 - 1.5e-8), rel=1e-9)


@pytest.mark.parametrize(
    ("p", "df", "quantile"),
    [(0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 4, 2.77645), (0.975, 7, 2.36462), (0.95, 4, 2.13185)],
)
def test_quantiles_are_those_of_the_tables(p, df, quantile):
    assert t_quantile(p, df) == pytest.approx(quantile, abs=5e-5 * quantile)
    assert t_quantile(1 - p, df) == -t_quantile(p, df)


def test_with_many_degrees_t_is_normal():
    assert t_quantile(0.975, 10**7) == pytest.approx(1.959964, abs=1e-5)


@pytest.mark.parametrize(("p", "df"), [(0.0, 3), (1.0, 3), (0.5, 0)])
def test_a_quantile_that_does_not_exist_is_refused(p, df):
    with pytest.raises(ValueError, match="p must be between 0 and 1 and df positive"):
        t_quantile(p, df)


# ---------------------------------------------------------------------------------------------------- pairs


def test_pairs_are_the_shared_finite_seeds_and_the_rest_is_named():
    found = paired({1: 9.0, 2: 5.0, 3: 7.0, 5: math.nan}, {2: 1.0, 3: 2.0, 4: 0.0, 5: 1.0})
    assert (found.seeds, found.left, found.right) == ((2, 3), (5.0, 7.0), (1.0, 2.0))
    assert found.unpaired == (1, 4, 5)


def test_mean_interval_and_p_of_four_pairs_by_hand():
    # differences 1 2 3 6: mean 3, sd sqrt((4 + 1 + 0 + 9) / 3) = 2.1602, error 1.0801, t = 2.7775 on 3 df
    found = of([1, 2, 3, 6])
    assert (found.mean, found.sd) == (3.0, pytest.approx(math.sqrt(14 / 3)))
    half = 3.182446 * math.sqrt(14 / 3) / 2
    assert found.interval() == pytest.approx((3 - half, 3 + half), abs=1e-5)
    assert found.p_difference() == pytest.approx(0.0691, abs=1e-4)


def test_equivalence_is_the_larger_of_two_one_sided_p():
    # the same differences within 5: t = (5 - 3) / 1.0801 = 1.8517 on 3 df above, (3 + 5) / 1.0801 below
    found = of([1, 2, 3, 6])
    assert found.p_equivalence(5.0) == pytest.approx(t_tail(2 / (math.sqrt(14 / 3) / 2), 3))
    assert found.p_equivalence(2.0) > 0.5  # the mean itself is outside


def test_equivalence_passes_exactly_when_the_ninety_percent_interval_is_inside():
    generator = np.random.default_rng(5)
    for _ in range(200):
        found = of(generator.normal(0.3, 1.0, size=6))
        low, high = found.interval(0.10)
        assert (found.p_equivalence(1.0) <= 0.05) == (-1.0 <= low and high <= 1.0)


def test_one_pair_and_none_have_no_test():
    for found in (of([1.0]), of([])):
        assert math.isnan(found.p_difference()) and math.isnan(found.p_equivalence(1.0)) and math.isnan(found.sd)
        assert math.isnan(found.interval()[0]) and math.isnan(found.p_flips())


def test_five_differences_without_spread_are_sure():
    assert of([0.0] * 5).p_difference() == 1.0 and of([0.0] * 5).p_equivalence(0.1) == 0.0
    assert of([0.5] * 5).p_difference() == 0.0 and of([0.5] * 5).p_equivalence(0.1) == 1.0


@pytest.mark.parametrize("num", [2, 3, 4])
def test_fewer_differences_without_spread_decide_nothing(num):
    for value in (0.0, 0.5):
        found = of([value] * num)
        assert math.isnan(found.p_difference()) and math.isnan(found.interval()[1])
        assert decide([found], [0.1])[0].outcome == "undecided"


def test_rounding_errors_are_no_spread():
    found = paired({1: 0.3, 2: 0.6, 3: 0.9}, {1: 0.1 + 0.1 + 0.1, 2: 0.2 * 3, 3: 0.3 * 3})
    assert found.sd == 0.0


def test_pairing_gains_what_the_correlation_says():
    # var(left - right) = 1 + 1 - 2 * 0.5 = 1 with left 0 1 2 and right 0 2 1: differences 0 -1 1
    found = paired({1: 0.0, 2: 1.0, 3: 2.0}, {1: 0.0, 2: 2.0, 3: 1.0})
    assert found.correlation == pytest.approx(0.5) and found.sd == pytest.approx(1.0)
    assert math.isnan(paired({1: 0.0, 2: 1.0}, {1: 0.0, 2: 2.0}).correlation)
    assert math.isnan(paired({1: 1.0, 2: 1.0, 3: 1.0}, {1: 0.0, 2: 2.0, 3: 1.0}).correlation)


def test_sign_flips_are_counted_as_by_hand():
    # 1 2 3: sums of +-1 +-2 +-3 that are as far out as 6: +6 and -6, 2 of 8
    assert of([1, 2, 3]).p_flips() == 0.25
    # 1 2 -3: sum 0, all 8 are as far out
    assert of([1, 2, -3]).p_flips() == 1.0


def test_sign_flips_equal_brute_force():
    differences = np.random.default_rng(1).normal(0.4, 1.0, size=7)
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((-1, 1), repeat=7)]
    expected = np.mean([total >= abs(differences.sum()) - 1e-12 for total in sums])
    assert of(differences).p_flips() == pytest.approx(expected)


def test_too_many_pairs_for_all_flips_say_so():
    assert math.isnan(of(range(statistics.MAX_FLIPS + 1)).p_flips())


# ---------------------------------------------------------------------------------------------------- decisions


def test_holm_multiplies_the_smallest_by_all_and_never_falls():
    # sorted 0.01 0.02 0.03 0.4 times 4 3 2 1: 0.04 0.06 0.06 0.4
    assert holm([0.02, 0.4, 0.01, 0.03]) == pytest.approx([0.06, 0.4, 0.04, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_what_cannot_be_tested_is_a_member_of_the_family():
    assert holm([0.02, math.nan]) == [0.04, 1.0]


def test_the_three_ends_of_a_comparison():
    far, near, wide = of([1.0, 1.1, 0.9, 1.05, 0.95]), of([0.01, -0.01, 0.0, 0.02, -0.02]), of([1, -1, 2, -2, 0.5])
    ends = decide([far, near, wide], [0.5, 0.5, 0.5])
    assert [each.outcome for each in ends] == ["differs", "equivalent", "undecided"]
    assert [each.is_nonzero for each in ends] == [True, False, False]


def test_a_small_difference_that_is_real_is_equivalent_and_says_that_it_is_real():
    (end,) = decide([of([0.10, 0.11, 0.09, 0.10])], [0.5])
    assert end.outcome == "equivalent" and end.is_nonzero


def test_the_list_is_as_long_as_it_was_registered():
    # p = 0.02 alone passes; with four more registered claims that have no runs it is 0.1
    comparison = of([1.0, 2.0, 3.0, 1.5, 0.4])
    p = comparison.p_difference()
    (alone,), (among,) = decide([comparison], [0.01]), decide([comparison], [0.01], family=5)
    assert alone.outcome == "differs" and among.outcome == "undecided"
    assert among.p_difference == pytest.approx(5 * p)


def test_sign_flips_are_shown_and_decide_nothing():
    # mean 0.7875, error 0.3159: t = 2.49 on 7 df, p = 0.041; 14 of 256 sign patterns are as far out, p = 0.055
    comparison = of([1.8, 1.8, 1.1, -0.4, 0.9, 0.2, -0.4, 1.3])
    assert comparison.p_difference() < 0.05 < comparison.p_flips() == 14 / 256
    (end,) = decide([comparison], [0.01])
    assert (end.outcome, end.p_flips) == ("differs", 14 / 256)


# ---------------------------------------------------------------------------------------------------- looks


def test_the_bounds_are_those_of_the_tables():
    # two-sided 0.05, equally spaced looks (Jennison & Turnbull 2000, table 2.3): c = 1.977 for two, 2.040 for five
    normal = NormalDist()
    assert look_level([5, 10], 1) == pytest.approx(2 * normal.cdf(-1.977 * math.sqrt(2)), rel=0.005)
    assert look_level([5, 10], 2) == pytest.approx(2 * normal.cdf(-1.977), rel=0.005)
    assert look_level([1, 2, 3, 4, 5], 5) == pytest.approx(2 * normal.cdf(-2.040), rel=0.005)


def test_one_look_is_no_look():
    for p in (1e-6, 0.03, 0.5, 0.99):
        assert sequence_p([p], [8], sides=2) == pytest.approx(p) == sequence_p([p], [8], sides=1)
    assert look_level([8], 1) == pytest.approx(0.05)


def test_a_sequence_passes_exactly_when_a_look_passes_its_nominal_level():
    first, last = look_level([5, 10], 1), look_level([5, 10], 2)
    assert sequence_p([first], [5, 10], sides=2) == pytest.approx(0.05) == sequence_p([0.5, last], [5, 10], sides=2)
    assert sequence_p([first / 2, 0.9], [5, 10], sides=2) < 0.05  # what the first look saw, the second cannot unsee
    assert sequence_p([2 * first, 1.1 * last], [5, 10], sides=2) > 0.05


def test_p_values_at_the_ends_of_their_range_stay_there():
    assert sequence_p([1.0], [5, 10], sides=1) == sequence_p([1.0], [5, 10], sides=2) == pytest.approx(1.0)
    assert sequence_p([0.0], [5, 10], sides=2) == pytest.approx(0.0, abs=1e-12)
    assert math.isnan(sequence_p([], [5, 10], sides=2))


def test_pairs_between_two_looks_wait_and_those_after_the_last_do_not_enter():
    far = of([1.0, 1.1, 0.9, 1.05, 0.95, -9.0, 9.0])
    assert at_look(far, (5, 10)).num == 5 and at_look(far, (8, 10)).num == 0 and at_look(far, (3, 6)).num == 6
    assert at_look(far, ()) is far
    between, after = decide([far], [0.1], looks=[(5, 10)]), decide([far], [0.1], looks=[(3, 5)])
    assert between[0].outcome == after[0].outcome == "differs"
    assert decide([far], [0.1], looks=[(8, 10)])[0].outcome == "undecided"
    assert decide([far], [0.1])[0].outcome == "undecided"


# ---------------------------------------------------------------------------------------------------- simulation


def accuracies(generator, num, effect=0.0) -> Paired:
    """Two arms of `num` seeds: an effect of the seed on both, and 64 prompts x 4 responses of each."""
    shared = generator.normal(0.0, 0.05, size=num)
    sides = [np.clip(0.6 + shared + shift + generator.normal(0, 0.02, size=num), 0, 1) for shift in (effect, 0.0)]
    drawn = [generator.binomial(256, side) / 256 for side in sides]
    return paired(*(dict(enumerate(side.tolist())) for side in drawn))


@pytest.mark.parametrize("num", [5, 8])
@pytest.mark.parametrize("effect", [0.0, 0.1])
def test_the_interval_covers_the_truth_95_times_in_100(num, effect):
    generator = np.random.default_rng(num)
    inside = 0
    for _ in range(SIMULATIONS):
        low, high = accuracies(generator, num, effect).interval()
        inside += low <= effect <= high
    assert 0.93 <= inside / SIMULATIONS <= 0.97


@pytest.mark.parametrize("num", [5, 8])
def test_an_effect_on_the_margin_is_called_equivalent_at_most_5_times_in_100(num):
    generator = np.random.default_rng(num)
    passed = sum(of(generator.normal(1.0, 0.3, size=num)).p_equivalence(1.0) <= 0.05 for _ in range(SIMULATIONS))
    assert passed / SIMULATIONS <= 0.05 + THREE_ERRORS


def lists(num, effect, claims=3, seed=0):
    """Lists of claims that share an arm, as those of a recipe do."""
    generator = np.random.default_rng(seed)
    for _ in range(SIMULATIONS):
        baseline = generator.normal(size=num)
        yield [of(generator.normal(effect, 1.0, size=num) - baseline) for _ in range(claims)]


@pytest.mark.parametrize("num", [5, 8])
def test_a_list_without_differences_has_a_false_one_at_most_5_times_in_100(num):
    false = sum(any(end.outcome == "differs" for end in decide(each, [0.01] * 3)) for each in lists(num, 0.0))
    assert false / SIMULATIONS <= 0.05 + THREE_ERRORS


def test_a_list_of_effects_on_the_margin_has_a_false_equivalence_at_most_5_times_in_100():
    margin = 4.0
    false = sum(any(end.outcome == "equivalent" for end in decide(each, [margin] * 3)) for each in lists(5, margin))
    assert false / SIMULATIONS <= 0.05 + THREE_ERRORS


def test_true_claims_do_not_make_room_for_false_ones():
    # one claim is far from zero, two are nothing: Holm steps down from 3 to 2, and must not let more than 5 % through
    false = 0
    for first, *others in lists(8, 0.0, seed=3):
        ends = decide([of(first.differences + 20.0), *others], [0.01] * 3)
        false += any(end.outcome == "differs" for end in ends[1:])
    assert false / SIMULATIONS <= 0.05 + THREE_ERRORS


# ---------------------------------------------------------------------------------------------------- power


def test_sample_sizes_are_the_known_ones():
    # two-sided paired t, 80 % power at 0.05: 34 pairs for half an sd, 199 for a fifth (Cohen's tables, G*Power)
    assert statistics.seeds_for_difference(0.5) == 34
    assert statistics.seeds_for_difference(0.2) == 199
    assert statistics.power_difference(0.5, 33) < 0.8 <= statistics.power_difference(0.5, 34)


def test_without_an_effect_the_power_is_the_error_rate():
    assert statistics.power_difference(0.0, 6, 0.05) == pytest.approx(0.05, abs=1e-9)
    assert statistics.power_equivalence(2.0, 6, 2.0, 0.05) == pytest.approx(0.05, abs=1e-3)


@pytest.mark.parametrize(("num", "effect", "margin"), [(3, 1.0, 3.0), (5, 1.0, 2.0), (8, 0.5, 1.2)])
def test_power_is_that_of_simulated_tests(num, effect, margin):
    draws = np.random.default_rng(2).normal(effect, 1.0, size=(100_000, num))
    mean, error = draws.mean(axis=1), draws.std(axis=1, ddof=1) / math.sqrt(num)
    differs = np.abs(mean) > t_quantile(0.975, num - 1) * error
    equal = np.abs(mean) + t_quantile(0.95, num - 1) * error < margin
    assert statistics.power_difference(effect, num) == pytest.approx(differs.mean(), abs=0.006)
    assert statistics.power_equivalence(margin, num, effect) == pytest.approx(equal.mean(), abs=0.006)


@pytest.mark.parametrize("num", [3, 5, 8])
def test_the_detectable_difference_and_margin_are_where_the_power_is_80_percent(num):
    assert statistics.power_difference(statistics.detectable_difference(num), num) == pytest.approx(0.8, abs=1e-6)
    assert statistics.power_equivalence(statistics.smallest_margin(num), num) == pytest.approx(0.8, abs=1e-6)


def test_what_no_number_of_seeds_shows():
    assert statistics.seeds_for_difference(0.01) is None
    assert statistics.seeds_for_equivalence(0.5, 0.5) is None and statistics.seeds_for_equivalence(0.5, 0.7) is None


def test_seeds_to_decide_are_the_fewer_of_both_ways_at_the_limit_of_the_sd():
    # mean 0.5, sd sqrt(4 / 5) = 0.894; its limit of 6 pairs is 0.894 sqrt(5 / 2.343) = 1.307
    comparison = of([1.5, -0.5, 0.5, 1.5, -0.5, 0.5])
    scale = statistics.sd_limit(comparison.sd, 5)
    assert scale == pytest.approx(1.307, abs=1e-3)
    assert statistics.seeds_to_decide(comparison, 0.5) == statistics.seeds_for_difference(0.5 / scale)
    wide = statistics.seeds_to_decide(comparison, 0.5 + 1.0 * scale)
    assert wide == statistics.seeds_for_equivalence(0.5 / scale + 1.0, 0.5 / scale) < 34


def test_what_is_not_decided_needs_at_least_one_seed_more():
    assert statistics.seeds_to_decide(of([1.0, 1.1, 0.9, 1.0]), 0.5) == 5
    assert (
        statistics.seeds_to_decide(of([1.0]), 0.5) is None and statistics.seeds_to_decide(of([1.0, 1.0]), 0.5) is None
    )


def test_the_limit_of_a_spread_holds_as_often_as_it_says():
    # at df = 1, sd^2 / sigma^2 ~ chi2_1, whose 20 % quantile is 0.0642: the limit is sd / sqrt(0.0642) = 3.947 sd
    assert statistics.sd_limit(1.0, 1) == pytest.approx(1 / math.sqrt(0.0641848), rel=1e-4)
    draws = np.random.default_rng(0).normal(size=(20_000, 5)).std(axis=1, ddof=1)
    assert (draws * statistics.sd_limit(1.0, 4) >= 1.0).mean() == pytest.approx(0.8, abs=0.01)


# ---------------------------------------------------------------------------------------------------- prompts


def test_evaluation_noise_is_the_error_over_prompts_with_the_seeds_as_they_are():
    # two seeds of 400 prompts each: error of their mean sqrt(v1 / 400 + v2 / 400) / 2
    generator = np.random.default_rng(0)
    columns = [generator.normal(0.1, 1.0, size=400), generator.normal(0.9, 2.0, size=400)]
    expected = math.sqrt(columns[0].var() / 400 + columns[1].var() / 400) / 2
    found = statistics.evaluation_noise(columns, shared=False)
    assert found.standard_error == pytest.approx(expected, rel=0.05)
    assert statistics.evaluation_noise(columns, shared=False) == found


def test_shared_prompts_are_drawn_together():
    # the same prompt is hard for every seed: more seeds do not average its effect away
    column = np.random.default_rng(0).normal(size=300)
    one = statistics.evaluation_noise([column], shared=True).standard_error
    four = statistics.evaluation_noise([column] * 4, shared=True).standard_error
    apart = statistics.evaluation_noise([column] * 4, shared=False).standard_error
    assert four == pytest.approx(one) and apart == pytest.approx(one / 2, rel=0.1)


def test_nothing_to_resample_is_refused():
    with pytest.raises(ValueError, match="nothing can be resampled"):
        statistics.evaluation_noise([np.array([])], shared=False)
    with pytest.raises(ValueError, match=r"Shared prompts, but the seeds have \[2, 3\] of them"):
        statistics.evaluation_noise([np.ones(2), np.ones(3)], shared=True)


# ---------------------------------------------------------------------------------------------------- means


def test_mean_and_error_leave_out_what_is_missing():
    # mean 5; squared deviations 9 + 1 + 1 + 9 = 20; sd = sqrt(20 / 3); error = sd / 2
    found = statistics.mean_and_error([2, 4, math.nan, 6, 8])
    assert found == Estimate(mean=5.0, standard_error=pytest.approx(math.sqrt(20 / 3) / 2), num=4)


def test_errors_of_a_difference_add_in_squares():
    left, right = Estimate(mean=0.9, standard_error=0.03, num=10), Estimate(mean=0.5, standard_error=0.04, num=9)
    found = statistics.difference(left, right)
    assert found.mean == pytest.approx(0.4) and found.standard_error == pytest.approx(0.05) and found.num == 9


def test_the_power_of_equivalence_of_two_pairs_has_a_closed_form():
    # one degree of freedom: T = (Z + 0) / |Z'|, and both tests pass where |Z| < r - t |Z'| with r = margin sqrt 2:
    # the integral over s = |Z'| from 0 to r / t of 2 phi(s) (2 Phi(r - t s) - 1), by a fine midpoint rule
    t, r, steps = t_quantile(0.95, 1), 2.0 * math.sqrt(2), 200_000
    s = (np.arange(steps) + 0.5) * (r / t / steps)
    passing = np.array([math.erf(value / math.sqrt(2)) for value in r - t * s])
    expected = float((2 * np.exp(-(s**2) / 2) / math.sqrt(2 * math.pi) * passing).sum() * r / t / steps)
    assert statistics.power_equivalence(2.0, 2) == pytest.approx(expected, abs=1e-10)
