"""Alarms in a run: said once a line, kept over a resume, and ending the run only where the recipe asks for it."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from verl_stack import import_verl, need_stack

from klreg_verl.experiment.kl_settings import AlarmsSpec

FINE = {"kl_ref/k1_token": 0.1, "entropy/token": 1.0, "train/score": 0.5}


@pytest.fixture(autouse=True)
def stack() -> None:
    need_stack()
    import_verl()


def watch(**thresholds: Any) -> Any:
    return importlib.import_module("klreg_verl.verl_hooks.watch").Watch(AlarmsSpec(warm_up=0, **thresholds))


def test_a_line_beyond_its_threshold_is_marked_and_said(capsys: pytest.CaptureFixture[str]):
    watching = watch(kl_above=0.2)
    assert watching.check(1, FINE) == {}
    assert watching.check(2, FINE | {"kl_ref/k1_token": 0.3}) == {"alarm/kl_above": 1.0}
    assert "[klreg] alarm kl_above at step 2: " in capsys.readouterr().out
    watching.end_if_asked()  # not asked


def test_an_alarm_ends_the_run_where_the_recipe_says_so_and_not_after_it_is_over():
    watching = watch(kl_above=0.2, stop=True)
    watching.check(1, FINE | {"kl_ref/k1_token": 0.3})
    with pytest.raises(RuntimeError, match="alarms.stop is true.* kl_above: .*0.3"):
        watching.end_if_asked()
    watching.check(2, FINE)
    watching.end_if_asked()


def test_what_is_not_finite_is_an_alarm_from_the_first_step_on():
    module = importlib.import_module("klreg_verl.verl_hooks.watch")
    watching = module.Watch(AlarmsSpec(warm_up=100))
    assert watching.check(1, FINE | {"entropy/token": float("nan")}) == {"alarm/non_finite": 1.0}


def test_a_resumed_run_remembers_what_came_before():
    # entropy falls by 0.1 a step: 0.6 at step 4 is above the floor of 0.5, its forecast 2 steps on is 0.4
    falling = [{"step": step, "entropy/token": 1.0 - 0.1 * step} for step in (1, 2, 3)]
    fresh, resumed = (watch(entropy_floor=0.5, window=4, horizon=2) for _ in range(2))
    resumed.resume(falling)
    assert fresh.check(4, {"entropy/token": 0.6}) == {}
    assert resumed.check(4, {"entropy/token": 0.6}) == {"alarm/entropy_floor": 1.0}


def test_a_run_that_an_alarm_ended_does_not_go_on_after_the_checkpoint_of_that_step():
    beyond = [{"step": step, "kl_ref/k1_token": kl} for step, kl in ((1, 0.1), (2, 0.3))]
    resumed, relaxed = watch(kl_above=0.2, stop=True), watch(kl_above=0.4, stop=True)
    resumed.resume(beyond)
    relaxed.resume(beyond)
    with pytest.raises(RuntimeError, match="kl_above: .*0.3.* relax the recipe's alarms"):
        resumed.end_if_asked()
    relaxed.end_if_asked()
