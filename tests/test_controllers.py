"""klreg_verl.core.controllers: every rule by hand, bounds, exact restoring, and what each does to a simulated KL.

The simulated policy: its KL tends to pull / beta (the stronger the penalty, the lower), with a time constant of `delay`
updates, and never above the KL without a penalty, `free`.
"""

import json
import math
import random
import sys

import pytest

from klreg_verl.core import controllers
from klreg_verl.core.controllers import BetaState, Observation, controller


def seen(kl=0.1, *, step=1, score=0.0, responses=64, **changes):
    """One step with the same number as both KL signals, unless `changes` say otherwise."""
    return Observation(
        **{"kl_token": kl, "kl_response": kl, "score": score, "responses": responses, "step": step} | changes
    )


def betas(rule, first, observations):
    """The betas of update 1, 2, ... under `observations` of update 1, 2, ..."""
    states = [rule.start(first)]
    for observation in observations:
        states.append(rule.after(states[-1], observation))
    return [state.beta for state in states]


def once(rule, first, observation):
    """The state of update 2."""
    return rule.after(rule.start(first), observation)


def simulate(rule, first, *, pull, updates, delay=10.0, free=100.0, noise=0.0, seed=0):
    """The KL and the state of every update; `noise` is the relative standard deviation of the measured KL."""
    draw, kl, state, trace = random.Random(seed), 0.0, rule.start(first), []
    for step in range(1, updates + 1):
        trace.append((kl, state))
        state = rule.after(state, seen(kl * (1 + noise * draw.gauss(0, 1)), step=step))
        kl += (min(pull / state.beta, free) - kl) / delay
    return trace


EXAMPLES = {
    "fixed": {},
    "verl_adaptive": {"target": 0.1},
    "multiplicative": {"target": 0.1},
    "dynamic": {},
    "linear": {"beta_end": 0.5, "steps": 10},
    "exponential": {"beta_end": 0.5, "steps": 10},
    "cosine": {"beta_end": 0.5, "steps": 10},
    "matched_kl": {"target": 0.1},
}


def example(kind, **changes):
    return controller(kind, **EXAMPLES[kind] | changes)


@pytest.fixture(params=EXAMPLES)
def kind(request):
    return request.param


def test_every_kind_has_an_example_here():
    assert tuple(EXAMPLES) == tuple(controllers.KINDS)


# Every formula by hand


def test_fixed_never_moves():
    assert betas(controller("fixed"), 0.3, [seen(9.0), seen(-1.0, score=5.0)]) == [0.3, 0.3, 0.3]


@pytest.mark.parametrize(
    ("kl", "error"),
    # 0.11 / 0.1 - 1 = 0.1; 0.05 / 0.1 - 1 = -0.5, clipped; 0.5 / 0.1 - 1 = 4, clipped; negative k1 is far below target
    [(0.11, 0.1), (0.1, 0.0), (0.05, -0.2), (0.5, 0.2), (-0.3, -0.2)],
)
def test_verl_adaptive_moves_by_the_clipped_error_times_responses_over_horizon(kl, error):
    rule = controller("verl_adaptive", target=0.1, horizon=1000)
    assert once(rule, 2.0, seen(kl, responses=100)).beta == pytest.approx(2.0 * (1 + error * 0.1), rel=1e-14)


def test_verl_adaptive_is_verls_to_the_last_bit():
    pytest.importorskip("verl", reason="verl is not installed")
    from verl.trainer.ppo.core_algos import AdaptiveKLController

    draw = random.Random(0)
    theirs = AdaptiveKLController(init_kl_coef=0.001, target_kl=0.1, horizon=10000)
    rule = controller("verl_adaptive", target=0.1)
    state = rule.start(0.001)
    for step in range(1, 501):
        kl, responses = draw.gauss(0.1, 0.05), draw.randrange(1, 2048)
        theirs.update(current_kl=kl, n_steps=responses)
        state = rule.after(state, seen(kl, responses=responses, step=step))
        assert state.beta.hex() == float(theirs.value).hex()
    assert state.beta != 0.001


def test_verl_adaptive_refuses_a_batch_that_could_make_beta_negative():
    # 1 - 0.2 * 500 / 100 = 0 would never come back, 501 responses would turn the sign
    rule = controller("verl_adaptive", target=0.1, horizon=100)
    assert once(rule, 1.0, seen(0.0, responses=499)).beta == pytest.approx(1 - 0.2 * 4.99)
    with pytest.raises(ValueError, match=r"horizon=100 .* 500 responses .* raise it above responses / 5"):
        once(rule, 1.0, seen(0.0, responses=500))


@pytest.mark.parametrize(
    ("factors", "kl", "expected"),
    # target 0.1, so the band is 0.05 to 0.15 with its ends inside; document 000, then document 002
    [
        ({}, 0.151, 2 * 1.5),
        ({}, 0.15, 2.0),
        ({}, 0.05, 2.0),
        ({}, 0.049, 2 * 0.75),
        ({}, -0.1, 2 * 0.75),
        ({"raise_by": 1.1, "lower_by": 0.9}, 0.2, 2 * 1.1),
        ({"raise_by": 1.1, "lower_by": 0.9}, 0.0, 2 * 0.9),
        ({"upper": 3.0, "lower": 0.0}, 0.29, 2.0),
        ({"upper": 3.0, "lower": 0.0}, 0.31, 2 * 1.5),
        ({"upper": 3.0, "lower": 0.0}, 0.0, 2.0),
    ],
)
def test_multiplicative_acts_outside_its_band_only(factors, kl, expected):
    assert once(controller("multiplicative", target=0.1, **factors), 2.0, seen(kl)).beta == expected


def test_the_numbers_that_the_multiplicative_docstring_gives():
    assert [round(factor**10, 1) for factor in (1.5, 1.1)] == [57.7, 2.6]
    assert (1.5 * 0.75, round(1.1 * 0.9, 12)) == (1.125, 0.99)


def test_dynamic_decays_on_high_scores_only_and_never_rises():
    rule = controller("dynamic")
    scores = [0.8, 0.81, 1.0, 0.0, math.nan, 0.9]  # 0.8 is not above 0.8
    expected = [1, 1, 0.9, 0.9**2, 0.9**2, 0.9**2, 0.9**3]
    observations = [seen(9.0, score=score, step=step) for step, score in enumerate(scores, 1)]
    assert betas(rule, 1.0, observations) == pytest.approx(expected, rel=1e-14)


def test_dynamic_stops_at_beta_min():
    assert betas(controller("dynamic", beta_min=0.85), 1.0, [seen(score=1.0)] * 3) == [1.0, 0.9, 0.85, 0.85]


@pytest.mark.parametrize("beta_min", [0.0, 0.25])
def test_dynamic_is_at_beta_min_from_the_first_update_after_its_schedule(beta_min):
    # schedule_steps = 3: updates 1, 2, 3 still have their beta, update 4 is the first after step 3
    rule = controller("dynamic", schedule_steps=3, beta_min=beta_min)
    assert betas(rule, 1.0, [seen(step=step) for step in (1, 2, 3, 4)]) == [1.0, 1.0, 1.0, beta_min, beta_min]


def test_dynamic_has_the_documented_defaults():
    rule = controller("dynamic")
    assert (rule.decay, rule.reward_threshold, rule.beta_min, rule.schedule_steps) == (0.9, 0.8, 0.0, 1000)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("linear", [16.0, 12.25, 8.5, 4.75, 1.0]),  # 15 / 4 down each time
        ("exponential", [16.0, 8.0, 4.0, 2.0, 1.0]),  # (1 / 16)^(1 / 4) = 1 / 2
        ("cosine", [16.0, 8.5 + 7.5 * math.sqrt(0.5), 8.5, 8.5 - 7.5 * math.sqrt(0.5), 1.0]),  # mean 8.5, cos(pi / 4)
    ],
)
def test_schedules_by_hand(kind, expected):
    rule = controller(kind, beta_end=1, steps=4)
    found = betas(rule, 16, [seen(step=step) for step in range(1, 7)])
    assert found == pytest.approx([*expected, 1.0, 1.0], rel=1e-14)


@pytest.mark.parametrize("kind", ["linear", "exponential", "cosine"])
@pytest.mark.parametrize(("first", "end"), [(0.1, 0.02), (0.3, 0.35), (0.3, 0.3), (1e-3, 1e3)])
def test_schedules_are_exact_at_both_ends_and_monotone(kind, first, end):
    # 0.1 + (0.02 - 0.1) is not 0.02, and 0.3 * (0.35 / 0.3) is not 0.35
    found = betas(controller(kind, beta_end=end, steps=7), first, [seen(step=step) for step in range(1, 10)])
    assert (found[0], found[7:]) == (first, [end] * 3)
    assert found == sorted(found, reverse=end < first)


@pytest.mark.parametrize("kind", ["linear", "exponential", "cosine"])
def test_a_schedule_depends_on_the_step_only(kind):
    rule = example(kind)
    all_of_them = betas(rule, 2.0, [seen(step=step) for step in range(1, 9)])
    assert once(rule, 2.0, seen(math.nan, step=8)).beta == all_of_them[-1]  # the same without updates 2 to 7


def test_matched_kl_by_hand():
    rule = controller("matched_kl", target=2.0, gain=0.1, proportional=0.5, beta_max=100.0)
    # KL 3: e = 0.5, I = 0.05, log beta = 0.05 + 0.25; KL 1: e = -0.5, I = 0, log beta = -0.25; KL 2: e = 0, I = 0
    found = betas(rule, 1.0, [seen(3.0), seen(1.0), seen(2.0)])
    assert found == pytest.approx([1.0, math.exp(0.30), math.exp(-0.25), 1.0], rel=1e-14)


@pytest.mark.parametrize(("kl", "error"), [(4.0, 1.0), (1e9, 1.0), (0.0, -1.0), (-5.0, -1.0)])
def test_matched_kl_moves_log_beta_by_at_most_gain_plus_proportional(kl, error):
    rule = controller("matched_kl", target=2.0, gain=0.1, proportional=0.5)
    assert once(rule, 1.0, seen(kl)).beta == pytest.approx(math.exp(0.6 * error), rel=1e-14)


# Signals


@pytest.mark.parametrize(("signal", "low_signal"), [("token", "kl_token"), ("response", "kl_response")])
@pytest.mark.parametrize("kind", ["verl_adaptive", "multiplicative"])
def test_the_named_signal_is_the_one_that_is_read(kind, signal, low_signal):
    rule, high = example(kind, signal=signal), {"kl_token": 9.0, "kl_response": 9.0}
    assert once(rule, 1.0, seen(**high | {low_signal: 0.0})).beta < 1.0
    assert once(rule, 1.0, seen(**{name: 0.0 for name in high} | {low_signal: 9.0})).beta > 1.0


def test_matched_kl_reads_the_response_summed_kl():
    assert once(example("matched_kl"), 1.0, seen(kl_token=9.0, kl_response=0.0)).beta < 1.0


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["verl_adaptive", "multiplicative", "matched_kl"])
def test_a_kl_that_is_not_finite_changes_nothing(kind, number):
    rule = example(kind, beta_min=0.5, beta_max=2.0)
    saturated = rule.after(once(rule, 2.0, seen(9.0)), seen(9.0))
    assert saturated.saturated
    assert rule.after(saturated, seen(number)) == saturated


@pytest.mark.parametrize("kind", ["fixed", "dynamic", "linear", "exponential", "cosine"])
def test_rules_that_read_no_kl_do_not_mind_what_it_is(kind):
    rule = example(kind)
    moved = [once(rule, 2.0, seen(kl, score=1.0)) for kl in (0.0, 7.0, math.nan)]
    assert moved[0] == moved[1] == moved[2]


# Bounds and saturation


def test_beta_stays_within_its_bounds_whatever_is_seen(kind):
    rule, draw = example(kind, beta_min=0.25, beta_max=2.0), random.Random(1)
    values = [0.0, -1.0, 0.1, 50.0, math.nan, math.inf]
    observations = [
        seen(draw.choice(values), score=draw.choice(values), responses=draw.randrange(1, 9999), step=step)
        for step in range(1, 400)
    ]
    assert all(0.25 <= beta <= 2.0 for beta in betas(rule, 1.0, observations))


@pytest.mark.parametrize("kind", ["verl_adaptive", "multiplicative", "matched_kl"])
@pytest.mark.parametrize(("kl", "bound"), [(9.0, 2.0), (0.0, 0.5)])
def test_saturated_while_on_a_bound_and_pushed_outwards(kind, kl, bound):
    rule = example(kind, beta_min=0.5, beta_max=2.0)
    state = rule.start(bound)
    assert not state.saturated
    outwards = rule.after(state, seen(kl))
    assert (outwards.beta, outwards.saturated) == (bound, True)
    inwards = rule.after(outwards, seen(9.0 - kl))
    assert 0.5 < inwards.beta < 2.0 and not inwards.saturated
    assert not rule.after(outwards, seen(0.1)).saturated  # on target nothing pushes


def test_rounding_in_the_logarithm_is_not_saturation():
    assert math.exp(math.log(10.0)) > 10.0
    state = once(controller("matched_kl", target=5.0, beta_max=10.0), 10.0, seen(5.0))
    assert (state.beta, state.saturated) == (10.0, False)


def test_a_schedule_or_decay_that_ends_on_a_bound_is_not_saturated():
    for kind in ("linear", "exponential", "cosine"):
        rule = controller(kind, beta_end=0.5, steps=3, beta_min=0.5)
        assert not any(rule.after(rule.start(1.0), seen(step=step)).saturated for step in range(1, 6))
    assert not once(controller("dynamic", beta_min=0.95), 1.0, seen(score=1.0)).saturated


def test_without_bounds_multiplication_neither_reaches_zero_nor_infinity():
    rule = controller("multiplicative", target=0.1)
    low = betas(rule, 1e-300, [seen(0.0)] * 100)[-1]
    high = betas(rule, 1e300, [seen(9.0)] * 100)[-1]
    assert (low, high) == (sys.float_info.min, sys.float_info.max)
    assert once(rule, low, seen(9.0)).beta > low
    assert once(rule, high, seen(0.0)).beta < high


# Saving


@pytest.mark.parametrize("beta", [0.1 + 0.2, 1 / 3, 5e-324, sys.float_info.max, 0.0])
def test_a_saved_state_comes_back_to_the_last_bit(beta):
    state = BetaState(beta=beta, memory=(math.pi, -1 / 7), saturated=True)
    back = BetaState.from_json(json.loads(json.dumps(state.to_json())))
    assert back == state
    assert [number.hex() for number in (back.beta, *back.memory)] == [
        number.hex() for number in (beta, math.pi, -1 / 7)
    ]


def test_a_run_that_saves_and_restores_at_every_step_has_the_same_bits(kind):
    rule, draw = example(kind), random.Random(2)
    through = resumed = rule.start(1 / 3)
    for step in range(1, 60):
        observation = seen(abs(draw.gauss(0.1, 0.1)), score=draw.random(), step=step)
        through = rule.after(through, observation)
        resumed = rule.after(BetaState.from_json(json.loads(json.dumps(resumed.to_json()))), observation)
        assert resumed == through
    assert kind == "fixed" or through.beta != 1 / 3


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"beta": 0.1, "memory": [], "saturated": False},
        {"beta": "nan", "memory": [], "saturated": False},
        {"beta": "-0x1p-3", "memory": [], "saturated": False},
        {"beta": "0x1p9999", "memory": [], "saturated": False},
        {"beta": "0x1p-3", "memory": ["inf"], "saturated": False},
        {"beta": "0x1p-3", "memory": "1", "saturated": False},
        {"beta": "0x1p-3", "memory": [], "saturated": "no"},
        None,
    ],
)
def test_what_is_not_a_saved_state_is_refused(values):
    with pytest.raises(ValueError, match="Not a saved beta state"):
        BetaState.from_json(values)


def test_a_state_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="linear remembers 1 numbers, the state holds 0: is it of another kind"):
        example("linear").after(example("fixed").start(1.0), seen())


# What each does to a KL that answers to beta


@pytest.mark.parametrize("delay", [1.0, 10.0, 30.0])
@pytest.mark.parametrize("first", [0.02, 2.0])  # the right beta is pull / target = 0.2
def test_matched_kl_brings_kl_to_its_target(first, delay):
    trace = simulate(controller("matched_kl", target=5.0), first, pull=1.0, updates=400, delay=delay)
    assert all(abs(kl / 5.0 - 1) < 0.2 and not state.saturated for kl, state in trace[80:])
    assert all(abs(kl / 5.0 - 1) < 0.05 for kl, _ in trace[170:])
    assert trace[-1][1].beta == pytest.approx(0.2, rel=1e-3)


def test_noise_does_not_shift_the_mean_that_matched_kl_holds():
    # relative noise of 20 % in 2000 settled updates: a log error would hold the mean at about 2 % above the target
    rule = controller("matched_kl", target=5.0, gain=0.02, proportional=0.1)
    trace = simulate(rule, 0.2, pull=1.0, updates=2400, noise=0.2)[400:]
    assert sum(kl for kl, _ in trace) / len(trace) == pytest.approx(5.0, rel=0.01)


def test_matched_kl_says_that_its_target_is_out_of_reach():
    # without a penalty the policy reaches a KL of 3 only
    rule = controller("matched_kl", target=5.0, beta_min=1e-3)
    _, last = simulate(rule, 0.2, pull=1.0, updates=400, free=3.0)[-1]
    assert (last.beta, last.saturated) == (1e-3, True)


def test_anti_windup_a_target_that_comes_into_reach_is_held_as_soon_after_a_long_wait_as_after_a_short_one():
    def updates_off_the_bound(waiting):
        rule = controller("matched_kl", target=5.0, beta_min=1e-3)
        state = rule.start(1e-3)
        for _ in range(waiting):
            state = rule.after(state, seen(1.0))
        return next(n for n in range(1, 1000) if (state := rule.after(state, seen(10.0))).beta > 10e-3)

    # from the bound log(10) = 2.3 = 0.05 n + 0.5: 37 updates, however long it sat there
    assert updates_off_the_bound(10) == updates_off_the_bound(10_000) == 37


@pytest.mark.parametrize("kind", ["multiplicative", "verl_adaptive"])
def test_the_other_rules_bring_a_slowly_answering_kl_near_their_target(kind):
    extra = {"raise_by": 1.1, "lower_by": 0.9} if kind == "multiplicative" else {"horizon": 640}
    rule = controller(kind, target=5.0, signal="response", **extra)
    trace = simulate(rule, 0.02, pull=1.0, updates=3000, delay=3.0)
    assert all(2.5 <= kl <= 7.5 for kl, _ in trace[-500:])


def test_the_band_of_multiplicative_is_not_its_target():
    # a beta that leaves KL at 1.4 targets is never corrected; matched_kl corrects it
    start = {"first": 1.0 / 7.0, "pull": 1.0, "updates": 800, "delay": 1.0}
    band = simulate(controller("multiplicative", target=5.0, upper=1.5, lower=0.0), **start)
    held = simulate(controller("matched_kl", target=5.0), **start)
    assert band[-1][0] == pytest.approx(7.0)
    assert held[-1][0] == pytest.approx(5.0, rel=1e-3)


def test_the_factors_of_document_000_overshoot_more_than_those_of_document_002():
    def largest_beta(**factors):
        rule = controller("multiplicative", target=5.0, **factors)
        return max(state.beta for _, state in simulate(rule, 0.02, pull=1.0, updates=500, delay=30.0))

    # the right beta is 0.2
    assert largest_beta(raise_by=1.5, lower_by=0.75) > 10 * 0.2 > largest_beta(raise_by=1.1, lower_by=0.9) > 0.2


# What is refused


def test_an_unknown_kind_is_refused_with_the_nearest():
    with pytest.raises(
        ValueError, match="no controller 'matched'. Did you mean 'matched_kl'. Known controllers: fixed"
    ):
        controller("matched")


def test_a_parameter_that_the_kind_does_not_read_is_refused(kind):
    with pytest.raises(ValueError, match=f"{kind} does not read wibble. Its parameters: .*signal, beta_min, beta_max"):
        example(kind, wibble=1)


def test_a_parameter_of_another_kind_is_refused_and_the_own_ones_named():
    with pytest.raises(ValueError, match="dynamic does not read target. Its parameters: decay, reward_threshold, sch"):
        controller("dynamic", target=0.1)


@pytest.mark.parametrize("kind", ["verl_adaptive", "multiplicative", "matched_kl"])
def test_a_missing_target_is_named(kind):
    with pytest.raises(ValueError, match=f"{kind} needs target"):
        controller(kind)


def test_all_missing_parameters_are_named():
    with pytest.raises(ValueError, match="cosine needs beta_end, steps. Its parameters: beta_end, steps, signal"):
        controller("cosine")


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("fixed", "signal", "tokens"),
        ("fixed", "beta_min", -0.1),
        ("fixed", "beta_min", math.inf),
        ("fixed", "beta_max", math.nan),
        ("fixed", "beta_max", 0.0),
        ("fixed", "beta_max", "1"),
        ("verl_adaptive", "target", 0.0),
        ("verl_adaptive", "target", math.nan),
        ("verl_adaptive", "target", True),
        ("verl_adaptive", "horizon", 0),
        ("multiplicative", "target", -0.1),
        ("multiplicative", "raise_by", 1.0),
        ("multiplicative", "lower_by", 1.0),
        ("multiplicative", "lower_by", 0.0),
        ("multiplicative", "upper", 0.9),
        ("multiplicative", "lower", 1.1),
        ("dynamic", "decay", 1.1),
        ("dynamic", "decay", 0.0),
        ("dynamic", "reward_threshold", math.nan),
        ("dynamic", "schedule_steps", 0),
        ("dynamic", "schedule_steps", 1.5),
        ("linear", "beta_end", -1.0),
        ("linear", "steps", 0),
        ("exponential", "beta_end", 0.0),
        ("cosine", "beta_end", math.inf),
        ("matched_kl", "target", 0.0),
        ("matched_kl", "gain", 0.0),
        ("matched_kl", "proportional", -0.1),
        ("matched_kl", "signal", "token"),
        ("matched_kl", "beta_min", 0.0),
        ("matched_kl", "beta_max", math.inf),
    ],
)
def test_an_impossible_number_is_refused_by_name(kind, name, value):
    with pytest.raises(ValueError, match=f"^{kind}: {name}="):
        example(kind, **{name: value})


def test_an_end_outside_the_bounds_is_refused():
    with pytest.raises(ValueError, match=r"linear: beta_end=0.5 .* outside \[0.6, 1.0\]"):
        example("linear", beta_min=0.6, beta_max=1.0)


@pytest.mark.parametrize("first", [0.5, 5.0, math.nan, -1.0, True])
def test_a_first_beta_outside_the_bounds_is_refused(first):
    with pytest.raises(ValueError, match=r"fixed: the first beta, .* is not a number in \[0.6, 1.0\]"):
        example("fixed", beta_min=0.6, beta_max=1.0).start(first)


def test_zero_is_refused_where_it_would_stay_for_ever(kind):
    rule = example(kind, beta_min=0.0) if kind != "matched_kl" else example(kind)
    if kind in ("fixed", "linear", "cosine"):
        assert rule.start(0.0).beta == 0.0
        return
    with pytest.raises(ValueError, match="0 stays 0|not a number in"):
        rule.start(0.0)


@pytest.mark.parametrize(("changes", "message"), [({"step": 0}, "counted from 1"), ({"responses": 0}, "at least one")])
def test_an_observation_of_nothing_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        seen(**changes)
