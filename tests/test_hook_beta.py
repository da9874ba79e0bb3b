"""beta over a run: what the controller sees, when its beta is in force, and that a resume goes on to the last bit."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
from verl_stack import import_verl, need_stack

from klreg_verl.experiment.kl_settings import ControllerSpec, KLSpec

MATCHED = KLSpec(
    placement="loss",
    estimator="k3",
    follows="forward",
    beta=0.1,
    controller=ControllerSpec(kind="matched_kl", target=0.3, signal="response", beta_min=1e-4, beta_max=10.0),
)
FIXED = KLSpec(placement="loss", estimator="k3", follows="forward", beta=0.1)


@pytest.fixture(autouse=True)
def stack() -> None:
    need_stack()
    import_verl()


def hook(name: str) -> Any:
    return importlib.import_module(f"klreg_verl.verl_hooks.{name}")


def measured(kl: float) -> dict[str, float]:
    """Of a batch whose responses have a KL of `kl` nats."""
    return {"kl_ref/k1_token": kl / 10, "kl_ref/k1_response": kl, "train/score": 0.5}


@pytest.mark.parametrize(
    ("signal", "beta"), [("token", 0.1 * (1 - 0.2 * 4 / 100)), ("response", 0.1 * (1 + 0.2 * 4 / 100))]
)
def test_a_controller_sees_the_signal_that_it_asks_for(signal: str, beta: float):
    # Ziegler: beta * (1 + clip(kl / target - 1, -0.2, 0.2) * responses / horizon); 0.03 is below 0.1, 0.3 above
    rule = ControllerSpec(kind="verl_adaptive", target=0.1, horizon=100, signal=signal)
    moved = hook("beta").Beta(KLSpec(placement="loss", estimator="k3", follows="forward", beta=0.1, controller=rule))
    moved.updated(measured(0.3), responses=4, step=3)
    assert moved.state.beta == pytest.approx(beta, rel=1e-12)


def test_the_new_beta_is_in_force_from_the_next_step_on():
    beta = hook("beta").Beta(MATCHED)
    assert not beta.begin_step()
    beta.updated(measured(5.0), 8, 1)  # far above the target: beta must rise
    assert beta.now == 0.1
    assert beta.begin_step()
    assert beta.now > 0.1


def test_a_resumed_run_goes_on_with_the_same_beta_to_the_last_bit(tmp_path: Path):
    whole, cut = hook("beta").Beta(MATCHED), hook("beta").Beta(MATCHED)
    for step, kl in enumerate((0.31, 0.07, 1 / 3, 0.2), start=1):
        whole.updated(measured(kl), 8, step)
        cut.updated(measured(kl), 8, step)
        cut.save(tmp_path)
        cut = hook("beta").Beta(MATCHED)
        cut.load(tmp_path)
    assert cut.state == whole.state
    assert math.isfinite(cut.now) and cut.now == cut.state.beta


def test_without_its_state_a_moving_beta_cannot_go_on_and_a_fixed_one_can(tmp_path: Path):
    hook("beta").Beta(FIXED).load(tmp_path)
    with pytest.raises(ValueError, match=r"klreg.json is missing: .*matched_kl"):
        hook("beta").Beta(MATCHED).load(tmp_path)


def test_the_state_of_another_controller_is_refused(tmp_path: Path):
    hook("beta").Beta(FIXED).save(tmp_path)
    assert json.loads((tmp_path / "klreg.json").read_text())["kind"] == "fixed"
    with pytest.raises(ValueError, match="is of controller fixed, this run has matched_kl"):
        hook("beta").Beta(MATCHED).load(tmp_path)


def test_without_kl_there_is_nothing_to_move():
    beta = hook("beta").Beta(KLSpec())
    assert (beta.now, beta.moves) == (0.0, False)
