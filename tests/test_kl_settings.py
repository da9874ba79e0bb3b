"""The sections kl, reference and alarms: what is accepted, and that a setting without effect is refused by name."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from klreg_verl.core import aggregation, controllers, exact, kl, penalties, shaping
from klreg_verl.doctor import rules
from klreg_verl.experiment.kl_settings import (
    EXACT,
    REFERENCE_SAMPLES,
    SAMPLED,
    AlarmsSpec,
    ControllerSpec,
    KLSpec,
    ProbesSpec,
    ReferenceSpec,
    ShapingSpec,
)
from klreg_verl.experiment.strict import FieldError

LOSS: dict[str, Any] = {"placement": "loss", "estimator": "k3", "follows": "forward", "beta": 0.1}
REWARD: dict[str, Any] = {"placement": "reward", "estimator": "k1", "follows": "reverse", "beta": 0.1}


def refusal(make: Any, **values: Any) -> tuple[str, str]:
    with pytest.raises(FieldError) as caught:
        make(**values)
    return caught.value.field, caught.value.message


def choices(cls: Any, name: str) -> set[str]:
    """What the annotation of a field allows."""
    from typing import get_args, get_type_hints

    kind = get_type_hints(cls)[name]
    arms = [kind, *get_args(kind)]
    return {choice for arm in arms for choice in get_args(arm) if isinstance(choice, str)}


def test_every_name_that_a_recipe_may_say_exists_in_core():
    assert SAMPLED == kl.names()
    assert EXACT == exact.NAMES
    assert REFERENCE_SAMPLES == rules.REFERENCE_SAMPLES
    assert choices(KLSpec, "aggregation") == set(aggregation.AGGREGATIONS)
    assert choices(KLSpec, "credit") == set(penalties.CREDITS)
    assert choices(KLSpec, "baseline") == set(penalties.BASELINES)
    assert choices(KLSpec, "correction") == set(penalties.CORRECTIONS)
    assert choices(ShapingSpec, "kind") == set(shaping.kinds())
    assert choices(ControllerSpec, "kind") == set(controllers.KINDS)
    every = {name for kind in controllers.KINDS for name in controllers.parameters(kind)}
    assert every == {field.name for field in fields(ControllerSpec)} - {"kind"}


@pytest.mark.parametrize("estimator", [*SAMPLED, *EXACT, "my_package.kl:mine"])
def test_every_estimator_can_be_said_in_the_loss(estimator: str):
    assert KLSpec(**(LOSS | {"estimator": estimator})).is_exact == (estimator in EXACT)


@pytest.mark.parametrize(
    ("values", "field", "words"),
    [
        ({"placement": "none", "beta": 0.1}, "beta", "0.1 has no effect with placement none"),
        ({"placement": "none", "shaping": ShapingSpec(kind="clip")}, "shaping", "clip has no effect"),
        ({"placement": "loss"}, "estimator", "missing. `placement: loss` needs estimator, follows and beta"),
        (LOSS | {"beta": -1.0}, "beta", "would reward leaving the reference"),
        (LOSS | {"estimator": "k9"}, "estimator", "'k9' is not one of k1, k2, k3, abs"),
        (LOSS | {"estimator": "forwad"}, "estimator", "Did you mean 'forward'?"),
        (LOSS | {"estimator": "not a name:x"}, "estimator", "nor of the form pkg.module:name"),
        (LOSS | {"credit": "token"}, "credit", "'token' has no effect with placement loss: nothing is charged"),
        (LOSS | {"baseline": "none"}, "baseline", "has no effect with placement loss"),
        (REWARD | {"correction": "importance"}, "correction", "has no effect with placement reward"),
        (REWARD | {"aggregation": "token-mean"}, "aggregation", "has no effect with placement reward"),
        (REWARD | {"estimator": "full_reverse"}, "estimator", "needs the models' logits, which only `placement: loss`"),
        (LOSS | {"estimator": "full_reverse", "correction": "importance"}, "correction", "sums over the vocabulary"),
        (LOSS | {"estimator": "full_reverse", "top_k": 8}, "top_k", "8 has no effect with estimator full_reverse"),
        (LOSS | {"estimator": "topk_reverse", "top_k": 0}, "top_k", "at least 1"),
        (LOSS | {"cap": 0.0}, "cap", "not positive"),
        (REWARD | {"normalize_with_reward": True, "credit": "token"}, "credit", "becomes a part of its score"),
        (REWARD | {"normalize_with_reward": True, "baseline": "none"}, "baseline", "with GRPO's own mean"),
    ],
)
def test_a_setting_without_effect_or_sense_is_refused(values: dict[str, Any], field: str, words: str):
    found, message = refusal(KLSpec, **values)
    assert (found, words in message) == (field, True), message


def test_both_placements_read_what_either_reads():
    both = KLSpec(**(LOSS | {"placement": "both", "credit": "reward_to_go", "aggregation": "seq-mean-token-sum"}))
    assert (both.in_reward, both.in_loss) == (True, True)
    assert (KLSpec(**LOSS).in_reward, KLSpec(**REWARD).in_loss) == (False, False)


def test_shaping_reads_only_its_own_parameter():
    assert ShapingSpec(kind="clip", threshold=0.5).parameters == {"threshold": 0.5}
    assert refusal(ShapingSpec, kind="sigmoid", threshold=0.5)[0] == "threshold"
    assert refusal(ShapingSpec, target=0.1) == ("target", "has no effect with kind none: only sigmoid reads it.")
    assert refusal(ShapingSpec, kind="clip", threshold=0.0)[0] == "threshold"


def test_a_controller_says_which_parameter_is_wrong():
    spec = ControllerSpec(kind="matched_kl", target=0.3, signal="response")
    assert controllers.controller(spec.kind, **spec.parameters).signal == "response"
    assert refusal(ControllerSpec, kind="matched_kl", target=0.3, horizon=10.0)[0] == "horizon"
    assert refusal(ControllerSpec, kind="verl_adaptive", target=-1.0)[0] == "target"
    assert refusal(ControllerSpec, kind="verl_adaptive")[0] in ("target", "kind")
    assert refusal(ControllerSpec, beta_end=0.1)[0] == "beta_end"


def test_beta_starts_where_its_controller_can():
    bounded = ControllerSpec(kind="matched_kl", target=0.3, signal="response", beta_min=0.01, beta_max=0.05)
    field, message = refusal(KLSpec, **LOSS, controller=bounded)
    assert (field, "the first beta, 0.1, is not a number in [0.01, 0.05]" in message) == ("beta", True)
    field, message = refusal(KLSpec, **(LOSS | {"beta": 0.0}), controller=ControllerSpec(kind="dynamic"))
    assert (field, "0 stays 0" in message) == ("beta", True)


@pytest.mark.parametrize(
    ("values", "field"),
    [({"reset_every": 0}, "reset_every"), ({"ema": 1.0}, "ema"), ({"ema": 0.9, "reset_every": 5}, "ema")],
)
def test_a_reference_follows_one_rule_that_makes_sense(values: dict[str, Any], field: str):
    assert refusal(ReferenceSpec, **values)[0] == field


def test_probes_are_due_at_multiples_of_their_distance_and_never_at_0():
    probes = ProbesSpec(temperature_one_every=3)
    assert [step for step in range(1, 8) if probes.is_due("temperature_one_every", step)] == [3, 6]
    assert not any(probes.is_due("exact_every", step) for step in range(1, 8))
    assert refusal(ProbesSpec, temperature_one_every=-1)[0] == "temperature_one_every"


def test_a_reference_moves_by_reset_or_average_only():
    assert not ReferenceSpec(path="elsewhere").moves
    assert ReferenceSpec(ema=0.99).moves and ReferenceSpec(reset_every=10).moves


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"retention_drop": 1.5}, "retention_drop"),
        ({"kl_above": 0.1, "kl_below": 0.2}, "kl_below"),
        ({"entropy_floor": -1.0}, "entropy_floor"),
        ({"warm_up": -1}, "warm_up"),
    ],
)
def test_thresholds_that_no_run_can_meet_are_refused(values: dict[str, Any], field: str):
    assert refusal(AlarmsSpec, **values)[0] == field
