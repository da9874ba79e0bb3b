"""What of verl's settings acts beside the KL term: named in the arm's sentence, or refused where the claim is false."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from klreg_verl import doctor
from klreg_verl.core import objective
from klreg_verl.core.objective import CORRECTION, GROUPS, LOSS, Objective
from klreg_verl.experiment import plan, recipe
from klreg_verl.experiment.kl_settings import KLSpec

ENTROPY = f"{objective.ACTOR}.entropy_coeff"
MODE = f"{LOSS}.loss_mode"
KL_TERMS = {
    "none": KLSpec(),
    "reward": KLSpec(placement="reward", estimator="k1", follows="reverse", beta=0.1),
    "loss": KLSpec(placement="loss", estimator="k3", follows="forward", beta=0.1),
    "both": KLSpec(placement="both", estimator="k3", follows="reverse", beta=0.1, aggregation="seq-mean-token-sum"),
}
SETTINGS: list[dict[str, Any]] = [
    {},
    *({MODE: mode} for mode in ("gspo", "sapo", "geo_mean", "gpg", "cispo", "dppo_tv", "dppo_kl", "clip_cov")),
    {MODE: "clip_cov", f"{LOSS}.clip_cov_ratio": 0.1},
    {MODE: "clip_cov", f"{LOSS}.clip_cov_ub": 9.0},
    {MODE: "sapo", f"{objective.ACTOR}.tau_pos": 2.0},
    {MODE: "cispo", f"{objective.ACTOR}.clip_ratio_high": 0.28},
    {MODE: "kl_cov"},
    {MODE: "kl_cov", f"{LOSS}.ppo_kl_coef": 1.0},
    {MODE: "kl_cov", f"{LOSS}.kl_cov_ratio": 0.2},
    {MODE: "dro", f"{LOSS}.dro_beta": 0.1},
    {MODE: "dro", f"{LOSS}.dro_beta": 0.2},
    {MODE: "my_own"},
    {ENTROPY: 0.5},
    {ENTROPY: 0.25},
    {ENTROPY: -0.5},
    {f"{CORRECTION}.rollout_is": "token"},
    {f"{CORRECTION}.rollout_is": "sequence"},
    {f"{CORRECTION}.rollout_is": "token", f"{CORRECTION}.rollout_is_threshold": 5.0},
    {f"{CORRECTION}.rollout_is": "token", f"{CORRECTION}.rollout_is_batch_normalize": True},
    {f"{CORRECTION}.rollout_rs": "token_k3", f"{CORRECTION}.rollout_rs_threshold": 0.5},
    {f"{CORRECTION}.rollout_rs": "token_k3", f"{CORRECTION}.rollout_rs_threshold": 0.1},
    {f"{GROUPS}.enable": True},
    {f"{GROUPS}.enable": True, f"{GROUPS}.metric": "acc"},
]


def beside(settings: dict[str, Any], updates: int = 1, aggregation: str = "token-mean") -> Objective:
    options = {"advantage": "rloo", "updates_per_batch": updates, "loss_aggregation": aggregation}
    return objective.objective(settings, **options)


@pytest.mark.parametrize("placement", KL_TERMS)
def test_no_two_settings_that_differ_in_effect_have_the_same_sentence(placement: str):
    texts = [doctor.explain(KL_TERMS[placement], beside(settings)) for settings in SETTINGS]
    same = [
        pair
        for pair, two in zip(itertools.combinations(SETTINGS, 2), itertools.combinations(texts, 2), strict=True)
        if two[0] == two[1]
    ]
    assert same == []


@pytest.mark.parametrize("placement", KL_TERMS)
def test_what_acts_beside_it_is_named_in_every_arm_none_included(placement: str):
    for settings in SETTINGS[1:]:
        names = [
            str(value) if key == MODE else key.split(".")[-1].removesuffix(".enable") for key, value in settings.items()
        ]
        text = doctor.explain(KL_TERMS[placement], beside(settings))
        assert "acts beside it" in text, settings
        assert names[0].split("_is")[0] in text.replace("filter_groups", "enable"), settings


def test_a_setting_that_nothing_reads_is_not_named():
    unread = {f"{LOSS}.kl_cov_ratio": 0.1, f"{objective.ACTOR}.tau_pos": 2.0, f"{CORRECTION}.rollout_is_threshold": 9.0}
    clip = {f"{objective.ACTOR}.clip_ratio_high": 0.28}
    assert beside(unread | clip).beside("reward") == []
    assert beside(clip, updates=2).beside("reward") == ["In the later updates PPO clips with clip_ratio_high=0.28."]


@pytest.mark.parametrize("mode", ["sapo", "geo_mean"])
def test_k1_in_the_reward_is_biased_where_the_policy_loss_weighs_by_length(mode: str):
    given = beside({MODE: mode})
    with pytest.raises(ValueError) as caught:
        doctor.check_claim(KL_TERMS["reward"], given)
    text = str(caught.value)
    assert f"is biased. The policy loss {mode} averages over each response's tokens (seq-mean-token-mean)" in text
    assert (
        "Set policy_loss.loss_mode=vanilla, or use kl.placement='loss'" in text and "train.loss_aggregation" not in text
    )
    assert "kl.follows='none' and kl.allow_biased=true" in text
    biased = KLSpec(placement="reward", estimator="k1", follows="none", beta=0.1, allow_biased=True)
    doctor.check_claim(biased, given)
    assert f"This is biased and follows no divergence. The policy loss {mode} averages" in doctor.explain(biased, given)
    doctor.check_claim(KL_TERMS["loss"], given)  # its own mean over tokens
    assert "the policy loss aggregates by seq-mean-token-mean and the KL by token-mean" in doctor.explain(
        KL_TERMS["loss"], given
    )


@pytest.mark.parametrize("mode", ["vanilla", "gspo", "gpg", "cispo", "dppo_tv", "dppo_kl", "kl_cov", "clip_cov", "dro"])
def test_the_others_carry_k1_in_the_reward_in_the_first_update_and_say_so_of_the_later_ones(mode: str):
    doctor.check_claim(KL_TERMS["reward"], beside({MODE: mode}))
    later = doctor.explain(KL_TERMS["reward"], beside({MODE: mode}, updates=4))
    assert "With 4 updates per batch this holds for the first one only" in later
    assert ("goes through " + mode in later) == (mode != "vanilla")


def test_a_policy_loss_of_ones_own_is_unknown_and_so_is_what_it_does_to_a_charge():
    own = beside({MODE: "my_own"})
    with pytest.raises(ValueError, match="loss_mode='my_own' is none of verl's .* Use kl.placement='loss', or set"):
        doctor.check_claim(KL_TERMS["reward"], own)
    doctor.check_claim(KL_TERMS["loss"], own)


ARMS = """
question: Does the doctor read verl's keys?
model: {path: tiny}
tasks: {p: {builtin: palindrome}}
train: {steps: 4, prompts_per_step: 4, responses_per_prompt: 2}
kl: {placement: reward, estimator: k1, follows: reverse, beta: 0.1}
arms:
  plain: {}
  klcov: {verl: {actor_rollout_ref.actor.policy_loss.loss_mode: kl_cov}}
  nested: {verl: {actor_rollout_ref: {actor: {entropy_coeff: 0.5}}}}
seeds: [1]
"""


def test_a_recipes_arms_are_read_with_the_keys_that_they_pass_to_verl(tmp_path: Path):
    (tmp_path / "study.yaml").write_text(ARMS)
    study = recipe.load(tmp_path / "study.yaml")
    recipe.check_claims(study)
    texts = {spec.arm: doctor.explain(spec.kl, spec.objective) for spec in plan.expand(study)}
    assert "verl's policy loss kl_cov acts beside it" in texts["klcov"]
    assert "entropy_coeff=0.5 acts beside it" in texts["nested"]
    assert "acts beside it" not in texts["plain"]
    biased = recipe.load(tmp_path / "study.yaml", [f"arms.klcov.verl={{{MODE}: geo_mean}}"])
    with pytest.raises(ValueError, match="is biased. The policy loss geo_mean averages"):
        recipe.check_claims(biased)
