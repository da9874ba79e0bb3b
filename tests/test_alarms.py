"""klreg_verl.core.alarms: what fires, on which line, and what it says."""

import math
import re

import pytest

from klreg_verl.core import alarms
from klreg_verl.core.alarms import Alarms, check
from klreg_verl.core.metrics import METRICS

QUIET = {
    "train/score": 0.5,
    "actor/grad_norm": 1.0,
    "kl/beta": 0.01,
    "kl_ref/k1_token": 0.05,
    "kl_ref/k1_response": 5.0,
    "kl_ref/k1_response_se": 0.5,
    "entropy/token": 1.0,
    "retention/sums": 0.9,
}
ALL_ON = Alarms(kl_above=0.2, kl_below=0.01, entropy_floor=0.2, retention_drop=0.1, window=4, horizon=5, warm_up=0)


def line(step=100, **changes):
    """A line on which nothing fires, but for `changes` (a / in a key is written __)."""
    return {"step": step} | QUIET | {key.replace("__", "/"): value for key, value in changes.items()}


def run(values, *, key="entropy/token", first_step=1):
    """Lines with these values of one key, one a step."""
    return [line(step) | {key: value} for step, value in enumerate(values, first_step)]


def fired(rules, *history):
    return [alarm.name for alarm in check(rules, history)]


def test_a_healthy_run_is_quiet():
    assert check(ALL_ON, [line(step) for step in range(1, 50)]) == ()


def test_nothing_is_said_about_a_run_without_lines():
    assert check(ALL_ON, []) == ()


@pytest.mark.parametrize(
    ("changes", "name", "value", "threshold"),
    [
        ({"kl_ref__k1_token": 0.201}, "kl_above", 0.201, 0.2),
        ({"kl_ref__k1_token": 0.009}, "kl_below", 0.009, 0.01),
        ({"kl_ref__k1_token": -0.3}, "kl_below", -0.3, 0.01),
        ({"kl_ref__k1_response": -1.51}, "k1_negative", -1.51, -1.5),  # 3 standard errors of 0.5
        ({"kl_ref__k1_response": -0.1, "kl_ref__k1_response_se": 0.0}, "k1_negative", -0.1, 0.0),
        ({"entropy__token": 0.19}, "entropy_floor", 0.19, 0.2),
        ({"kl_ref__k1_token": math.inf}, "kl_above", math.inf, 0.2),
    ],
)
def test_a_threshold_that_is_crossed_fires_with_its_numbers(changes, name, value, threshold):
    (alarm,) = [alarm for alarm in check(ALL_ON, [line(**changes)]) if alarm.name != "non_finite"]
    assert (alarm.name, alarm.value, alarm.threshold) == (name, value, threshold)


@pytest.mark.parametrize(
    "changes",
    [
        {"kl_ref__k1_token": 0.2},
        {"kl_ref__k1_token": 0.01},
        {"kl_ref__k1_response": -1.5},
        {"kl_ref__k1_response": 0.0, "kl_ref__k1_response_se": 0.0},  # policy and reference are the same
        {"kl_ref__k1_response": -9.0, "kl_ref__k1_response_se": math.nan},  # one response has no standard error
        {"entropy__token": 0.2},
        {"retention__sums": 0.0},  # the first measurement is the standard
    ],
)
def test_exactly_at_a_threshold_and_without_a_comparison_nothing_fires(changes):
    assert fired(ALL_ON, line(**changes)) == []


def test_only_the_newest_line_is_judged():
    assert fired(ALL_ON, line(1, kl_ref__k1_token=9.0), line(2)) == []
    assert fired(ALL_ON, line(1), line(2, kl_ref__k1_token=9.0)) == ["kl_above"]


def test_a_key_that_the_newest_line_lacks_is_not_judged():
    assert check(ALL_ON, [line(1, kl_ref__k1_token=9.0), {"step": 2}]) == ()


def test_several_rules_fire_in_the_order_of_the_table():
    bad = {"kl_ref__k1_token": 9.0, "kl_ref__k1_response": -9.0, "entropy__token": 0.1, "retention__sums": 0.0}
    found = fired(ALL_ON, line(1), line(2, **bad, kl__beta=math.nan))
    assert found == ["non_finite", "kl_above", "k1_negative", "entropy_floor", "retention_drop"]
    assert [name for name in alarms._RULES if name != "kl_below"] == found


# Not finite


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None])
@pytest.mark.parametrize("key", alarms.MUST_BE_FINITE)
def test_a_number_that_is_not_finite_fires_and_is_named(key, value):
    (alarm,) = [alarm for alarm in check(Alarms(), [line() | {key: value}]) if alarm.name == "non_finite"]
    assert f"{key} = " in alarm.message
    assert not math.isfinite(alarm.value)


def test_all_that_is_not_finite_is_in_one_alarm():
    (alarm,) = check(Alarms(), [line(kl__beta=math.inf, train__score=math.nan)])
    assert "train/score = nan, kl/beta = inf" in alarm.message


def test_what_may_be_undefined_in_a_healthy_run_is_let_pass():
    assert check(Alarms(), [line(kl_ref__top1pct_share=math.nan, kl_ref__k1_response_se=None)]) == ()


def test_our_keys_of_non_finite_are_keys_that_exist():
    ours = [key for key in alarms.MUST_BE_FINITE if not key.startswith("actor/")]
    assert [key for key in ours if key not in METRICS] == []


# Warm-up


def test_during_warm_up_only_non_finite_fires():
    rules = Alarms(kl_above=0.2, warm_up=10)
    bad = {"kl_ref__k1_token": 9.0, "kl_ref__k1_response": -9.0, "kl__beta": math.nan}
    assert fired(rules, line(10, **bad)) == ["non_finite"]
    assert fired(rules, line(11, **bad)) == ["non_finite", "kl_above", "k1_negative"]


def test_lines_of_the_warm_up_count_as_history():
    rules = Alarms(retention_drop=0.1, warm_up=10)
    assert fired(rules, line(0), line(11, retention__sums=0.7)) == ["retention_drop"]


# The entropy's forecast

FORECAST = Alarms(entropy_floor=0.2, window=4, horizon=5, warm_up=0)


def test_the_forecast_of_a_straight_line_is_its_continuation():
    # 1.0, 0.9, 0.8, 0.7 falls by 0.1 a step: 0.2 five steps later, 0.2 - 0.1 one line on
    (alarm,) = check(FORECAST, run([1.0, 0.9, 0.8, 0.7, 0.6]))
    assert alarm.name == "entropy_floor"
    assert alarm.value == pytest.approx(0.1)
    assert (
        "0.6 nats per token (entropy/token), and 0.1 in 5 steps by the line through the last 4 values" in alarm.message
    )
    assert check(FORECAST, run([1.0, 0.901, 0.802, 0.703])) == ()  # 0.703 - 5 * 0.099 = 0.208


def test_the_forecast_is_least_squares_and_not_the_last_difference():
    # steps -1.5 .. 1.5 against 1.0, 0.9, 1.1, 0.8: slope (-1.5 - 0.45 + 0.55 + 1.2) / 5 = -0.04, mean 0.95
    # five steps after the last: 0.95 - 0.04 * 6.5 = 0.69; the last difference would give 0.8 - 1.5 = -0.7
    history = run([1.0, 0.9, 1.1, 0.8])
    assert check(FORECAST, history) == ()
    (alarm,) = check(Alarms(entropy_floor=0.70, window=4, horizon=5, warm_up=0), history)
    assert alarm.value == pytest.approx(0.69)
    assert check(Alarms(entropy_floor=0.68, window=4, horizon=5, warm_up=0), history) == ()


def test_the_forecast_counts_steps_and_not_lines():
    # every tenth step only: 0.1 in 10 steps, so 0.65 five steps later
    history = [line(step, entropy__token=value) for step, value in ((10, 1.0), (20, 0.9), (30, 0.8), (40, 0.7))]
    assert check(FORECAST, history) == ()
    (alarm,) = check(Alarms(entropy_floor=0.66, window=4, horizon=5, warm_up=0), history)
    assert alarm.value == pytest.approx(0.65)


def test_the_window_forgets_what_is_older():
    assert check(FORECAST, run([9.0, 5.0, 0.8, 0.8, 0.8, 0.8])) == ()


def test_without_a_full_window_there_is_no_forecast():
    assert check(FORECAST, run([1.0, 0.7, 0.4])) == ()
    assert fired(FORECAST, *run([1.0, 0.7, 0.1])) == ["entropy_floor"]


def test_lines_without_an_entropy_are_skipped_in_the_window():
    history = [line(1, entropy__token=1.0), {"step": 2}, *run([0.8, 0.7, 0.6], first_step=3)]
    assert fired(FORECAST, *history) == ["entropy_floor"]  # through 1, 3, 4, 5: 0.1 a step, 0.6 - 0.5


def test_an_entropy_below_the_floor_fires_although_it_rises():
    (alarm,) = check(FORECAST, run([0.04, 0.09, 0.14, 0.19]))  # 0.05 a step: 0.44 five steps later
    assert alarm.value == 0.19


def test_a_rising_entropy_does_not_fire():
    assert check(FORECAST, run([0.21, 0.25, 0.3, 0.4])) == ()


# Retention


def test_retention_is_compared_with_its_first_value_and_skills_are_named():
    rules = Alarms(retention_drop=0.1, warm_up=0)
    before = line(0, retention__sums=0.9, retention__spelling=0.6, retention__german=0.5)
    now = line(20, retention__sums=0.7, retention__spelling=0.45, retention__german=0.45)
    (alarm,) = check(rules, [before, line(10, retention__sums=0.95), now])
    assert (alarm.name, alarm.threshold) == ("retention_drop", 0.1)
    assert alarm.value == pytest.approx(0.2)
    assert "retention/sums from 0.9 to 0.7, retention/spelling from 0.6 to 0.45." in alarm.message
    assert "german" not in alarm.message


def test_a_first_retention_that_is_not_finite_sets_no_standard():
    rules = Alarms(retention_drop=0.1, warm_up=0)
    history = [line(0, retention__sums=None), line(1, retention__sums=0.9), line(2, retention__sums=0.7)]
    assert fired(rules, *history) == ["retention_drop"]


# Settings


def test_by_default_only_what_is_wrong_in_every_run_fires():
    odd = line(kl_ref__k1_token=9.0, entropy__token=0.0, retention__sums=0.0)
    assert check(Alarms(), [line(1), odd]) == ()
    assert fired(Alarms(), line(kl_ref__k1_response=-9.0)) == ["k1_negative"]


@pytest.mark.parametrize("name", ["kl_above", "kl_below", "k1_negative_z", "entropy_floor", "retention_drop"])
def test_none_switches_a_rule_off(name):
    bad = line(kl_ref__k1_token=9.0, kl_ref__k1_response=-9.0, entropy__token=0.0, retention__sums=0.0)
    if name == "kl_below":
        bad["kl_ref/k1_token"] = 0.0
    on = fired(ALL_ON, line(1), bad)
    settings = {field: getattr(ALL_ON, field) for field in ALL_ON.__dataclass_fields__} | {name: None}
    rule = "k1_negative" if name == "k1_negative_z" else name
    assert rule in on
    assert fired(Alarms(**settings), line(1), bad) == [other for other in on if other != rule]


def test_non_finite_can_be_switched_off():
    assert check(Alarms(non_finite=False), [line(kl__beta=math.nan)]) == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kl_above", math.nan),
        ("kl_above", "0.2"),
        ("kl_below", math.inf),
        ("k1_negative_z", -3.0),
        ("entropy_floor", -0.1),
        ("entropy_floor", True),
        ("retention_drop", 10),
        ("window", 2),
        ("window", 2.5),
        ("horizon", 0),
        ("warm_up", -1),
        ("non_finite", None),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"alarms.{name}={value!r}"):
        Alarms(**{name: value})


def test_bounds_that_cross_are_refused():
    with pytest.raises(ValueError, match="alarms.kl_below=0.2 is not below alarms.kl_above=0.1"):
        Alarms(kl_below=0.2, kl_above=0.1)


@pytest.mark.parametrize("newest", [{}, {"step": None}, {"step": math.nan}])
def test_a_line_without_its_step_is_refused(newest):
    with pytest.raises(ValueError, match="A line of metrics without its step"):
        check(Alarms(), [line(1), newest])


def test_every_alarm_says_its_unit_and_what_to_do():
    bad = line(kl_ref__k1_token=9.0, kl_ref__k1_response=-9.0, entropy__token=0.0, retention__sums=0.0)
    low = line(kl_ref__k1_token=0.0)
    messages = {alarm.name: alarm.message for newest in (bad, low) for alarm in check(ALL_ON, [line(1), newest])}
    units = {
        "kl_above": "9 nats per token .* above 0.2.* raise beta",
        "kl_below": "0 nats per token .* below 0.01.* lower beta",
        "k1_negative": "-9 nats per response .* standard error of 0.5: below -3 standard errors.* set top_p=1",
        "entropy_floor": "0 nats per token .* floor is 0.2.* lower the learning rate",
        "retention_drop": r"more than 0.1 \(fraction\).* raise beta",
    }
    assert set(messages) == set(units) == set(alarms._RULES) - {"non_finite"}
    assert [name for name, pattern in units.items() if not re.search(pattern, messages[name])] == []
