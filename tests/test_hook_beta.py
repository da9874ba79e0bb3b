"""beta over a run: what the controller sees, when its beta is in force, and that a resume goes on to the last bit."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
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


def rows(shift: float) -> Any:
    """Two responses of two and one tokens, d = shift at each."""
    mask = torch.tensor([[True, True], [True, False]])
    old = torch.full((2, 2), -1.0)
    scores = torch.tensor([1.0, 0.0])
    return SimpleNamespace(
        response_mask=mask,
        old_logprobs=old,
        ref_logprobs=old - shift,
        scores=scores,
        samples=[0, 1],
        reward_extras=[{"acc": 1.0}, {"acc": 0.0}],
    )


def test_a_controller_sees_the_batch_before_the_update():
    seen = hook("beta").observation(rows(0.2), step=3)
    # 0.2 at each of three tokens: 0.2 per token, (0.4 + 0.2) / 2 per response
    assert (seen.kl_token, seen.kl_response) == (pytest.approx(0.2), pytest.approx(0.3))
    assert (seen.score, seen.responses, seen.step) == (0.5, 2, 3)


def test_the_new_beta_is_in_force_from_the_next_step_on():
    beta = hook("beta").Beta(MATCHED)
    assert not beta.begin_step()
    beta.updated(rows(5.0), 1)  # far above the target: beta must rise
    assert beta.now == 0.1
    assert beta.begin_step()
    assert beta.now > 0.1


def test_a_resumed_run_goes_on_with_the_same_beta_to_the_last_bit(tmp_path: Path):
    whole, cut = hook("beta").Beta(MATCHED), hook("beta").Beta(MATCHED)
    for step, shift in enumerate((0.31, 0.07, 1 / 3, 0.2), start=1):
        whole.updated(rows(shift), step)
        cut.updated(rows(shift), step)
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
