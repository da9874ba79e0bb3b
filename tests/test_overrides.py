"""From a RunSpec to verl's settings and command line."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from verl_stack import FILES, FORWARD, REVERSE, spec

from klreg_verl.experiment.settings import (
    EvalSpec,
    KLSpec,
    LoggingSpec,
    ResourcesSpec,
    SaveSpec,
    TaskSpec,
    TrainSpec,
)
from klreg_verl.verl_hooks.overrides import _REFUSED, _passthrough, hydra_arguments, settings, verl_command

ACTOR, ROLLOUT, REF = (f"actor_rollout_ref.{part}" for part in ("actor", "rollout", "ref"))
NORM = "seq-mean-token-sum-norm"


def of(platform: str = "cpu", **sections: Any) -> dict[str, Any]:
    return settings(spec(**sections), FILES, platform)


def pick(values: Mapping[str, Any], *keys: str) -> tuple[Any, ...]:
    return tuple(values[key] for key in keys)


# ------------------------------------------------------------------------------------------------------- the recipe


@pytest.mark.parametrize(
    ("advantage", "aggregation", "factor"),
    [("rloo", "token-mean", None), ("grpo", "token-mean", None), ("dr_grpo", NORM, 48)],
)
def test_an_advantage_is_ours_with_the_aggregation_that_belongs_to_it(
    advantage: str, aggregation: str, factor: int | None
):
    # Dr. GRPO sums tokens over a constant, max_response_tokens = 48
    values = of(train=TrainSpec(advantage=advantage, max_response_tokens=48))
    keys = ("algorithm.adv_estimator", f"{ACTOR}.loss_agg_mode", f"{ACTOR}.loss_scale_factor")
    assert pick(values, *keys) == (f"klreg_{advantage}", aggregation, factor)


def test_a_kl_summed_over_a_constant_has_that_constant_beside_any_policy_loss():
    kl = KLSpec(placement="loss", estimator="k3", follows="forward", beta=0.1, aggregation=NORM)
    values = of(kl=kl, train=TrainSpec(max_response_tokens=48))
    assert pick(values, f"{ACTOR}.loss_agg_mode", f"{ACTOR}.loss_scale_factor") == ("token-mean", 48)


@pytest.mark.parametrize("kl", [KLSpec(), REVERSE, FORWARD])
def test_every_arm_loads_the_reference_and_has_no_kl_of_verls(kl: KLSpec):
    keys = (f"{ACTOR}.use_kl_loss", f"{ACTOR}.kl_loss_coef", "algorithm.use_kl_in_reward")
    assert pick(of(kl=kl), *keys) == (True, 0.0, False)


def test_only_verls_synchronous_trainer_is_asked_for():
    assert pick(of(), "trainer.use_v1", "trainer.v1.trainer_mode") == (True, "sync")


@pytest.mark.parametrize(
    ("updates", "workers", "micro", "expected"),
    [
        (1, 1, None, (16, 128)),  # 16 prompts x 8 responses, all in one pass
        (2, 1, None, (8, 64)),  # 8 prompts per update
        (1, 2, None, (16, 64)),  # each worker has half
        (4, 2, None, (4, 16)),  # 4 x 8 / 2
        (1, 2, 16, (16, 16)),
    ],
)
def test_mini_batches_count_prompts_and_micro_batches_a_workers_responses(
    updates: int, workers: int, micro: int | None, expected: tuple[int, int]
):
    train = TrainSpec(updates_per_batch=updates, micro_batch=micro)
    values = of(train=train, resources=ResourcesSpec(gpus_per_node=workers))
    assert pick(values, f"{ACTOR}.ppo_mini_batch_size", f"{ACTOR}.ppo_micro_batch_size_per_gpu") == expected
    sizes = {values[f"{part}.log_prob_micro_batch_size_per_gpu"] for part in (ROLLOUT, REF)}
    assert sizes == {expected[1]}


def test_on_a_gpu_verl_packs_by_tokens_unless_a_micro_batch_is_given():
    values = of("cuda", train=TrainSpec(max_prompt_tokens=1000, max_response_tokens=15000))
    # at least two of the longest: 2 * 16000
    assert pick(values, f"{ACTOR}.use_dynamic_bsz", f"{ACTOR}.ppo_max_token_len_per_gpu") == (True, 32000)
    values = of("cuda", train=TrainSpec(micro_batch=4))
    assert values[f"{ACTOR}.ppo_micro_batch_size_per_gpu"] == 4
    assert f"{ACTOR}.use_dynamic_bsz" not in values


def test_only_a_cpu_gets_the_settings_of_a_cpu():
    cpu, cuda = of("cpu"), of("cuda")
    assert pick(cpu, "trainer.device", f"{ROLLOUT}.dtype", f"{ROLLOUT}.enable_sleep_mode") == ("cpu", "float32", False)
    assert cpu[f"{ACTOR}.fsdp_config.mixed_precision"]["param_dtype"] == "fp32"
    assert not {"trainer.device", f"{ROLLOUT}.dtype", f"{ACTOR}.fsdp_config.mixed_precision"} & set(cuda)
    assert {key: cpu[key] for key in cuda if key in cpu and "batch" not in key and "bsz" not in key} == {
        key: cuda[key] for key in cuda if key in cpu and "batch" not in key and "bsz" not in key
    }


@pytest.mark.parametrize(
    ("logging", "expected"),
    [
        (LoggingSpec(), ["console", "tensorboard"]),
        (LoggingSpec(tensorboard=False), ["console"]),
        (LoggingSpec(wandb="offline"), ["console", "tensorboard", "wandb"]),
        (LoggingSpec(tensorboard=False, wandb="online"), ["console", "wandb"]),
    ],
)
def test_trackers_are_those_of_the_recipe(logging: LoggingSpec, expected: list[str]):
    assert of(logging=logging)["trainer.logger"] == expected


def test_a_task_of_ones_own_brings_its_reward():
    keys = ("reward.custom_reward_function.path", "reward.custom_reward_function.name")
    own = TaskSpec(train="/d/t.parquet", val="/d/v.parquet", reward="pkg.mod:score")
    assert pick(of(task=own), *keys) == ("pkg://pkg.mod", "score")
    assert pick(of(), *keys) == ("pkg://data_prep.rewards", "compute_score")


def test_evaluation_and_saving_follow_the_recipe():
    values = of(eval=EvalSpec(every=0, before=False), save=SaveSpec(every=5), train=TrainSpec(steps=12))
    keys = ("trainer.test_freq", "trainer.val_before_train", "trainer.save_freq")
    assert pick(values, *keys) == (12, False, 5)  # the last step is validated in any case
    assert values["trainer.max_actor_ckpt_to_keep"] is None  # ours prunes
    values = of(eval=EvalSpec(every=10, responses_per_prompt=1, temperature=0))
    keys = [f"{ROLLOUT}.val_kwargs.{key}" for key in ("n", "temperature", "do_sample")]
    assert pick(values, "trainer.test_freq", *keys) == (10, 1, 0, False)


def test_the_seed_reaches_the_data_the_mini_batches_and_the_engine():
    assert pick(of(seed=3), "data.seed", f"{ACTOR}.data_loader_seed", f"{ROLLOUT}.seed") == (3, 3, 3)


# --------------------------------------------------------------------------------------------------- the passthrough


def test_keys_of_verls_own_are_added():
    values = of(verl={"trainer.balance_batch": False, f"{ROLLOUT}.max_num_seqs": 8})
    assert pick(values, "trainer.balance_batch", f"{ROLLOUT}.max_num_seqs") == (False, 8)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (f"{ROLLOUT}.n", "to 8). Change the recipe's own key instead: train.responses_per_prompt."),
        (f"{ACTOR}.kl_loss_coef", "to 0.0). Change the recipe's own key instead: kl.beta."),
        ("trainer.save_freq", "to 20). Change the recipe's own key instead: save.every."),
        ("trainer.v1.trainer_mode", "to 'sync'). Change the recipe's own key instead"),
        (f"{ACTOR}.loss_agg_mode", "to 'token-mean'). Change the recipe's own key instead"),
    ],
)
def test_a_key_that_the_recipe_decides_is_refused_with_the_way_out(key: str, text: str):
    with pytest.raises(ValueError, match=re.escape(f"verl.{key}: klreg sets this key from the recipe ({text}")):
        of(verl={key: 1})


def test_what_is_said_twice_and_alike_is_no_contradiction():
    attention = "actor_rollout_ref.model.override_config.attn_implementation"  # a GPU recipe's, which a CPU has anyway
    assert pick(of(verl={attention: "sdpa"}), attention) == ("sdpa",)
    with pytest.raises(ValueError, match="klreg sets this key"):
        of(verl={attention: "eager"})
    inside = f"{ACTOR}.fsdp_config.mixed_precision.param_dtype"  # of a mapping that is ours
    assert pick(of(verl={inside: "fp32"}), inside) == ("fp32",)
    with pytest.raises(ValueError, match=re.escape("klreg sets actor_rollout_ref.actor.fsdp_config.mixed_precision")):
        of(verl={inside: "bf16"})


# --------------------------------------------------------------------------------------------------- the command line

VALUES: list[Any] = [
    *(1, 0, -3, 0.1, 1e-06, 1e20, True, False, None),
    *("plain", "", " ", "two words", "a=b", "a,b", "it's", 'say "x"', "null", "true", "1e3", "12"),
    *("{a:1}", "[1,2]", "(x)", "a:b", "#no comment", "$HOME", "%", "~", "/a b/c", "${data.seed}"),
    *("back\\slash", "C:\\", '\\"', "\\\\", "two\nlines", "tab\t", "caf\u00e9", "\u4f60\u597d", "\U0001f600"),
    *([], [1, "a,b", None, True], ["console", "tensorboard"], [[1], ["x y"]]),
    *({}, {"a": 1, "b": "x y"}, {"outer": {"inner": [1, {"k": 'q"'}]}}),
]


@pytest.mark.skipif(importlib.util.find_spec("hydra") is None, reason="hydra comes with the training stack")
@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_hydra_reads_back_every_value(value: Any):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (argument,) = hydra_arguments({"some.key": value})
    parsed = OverridesParser.create().parse_override(argument)
    assert (parsed.key_or_group, parsed.value()) == ("some.key", value)
    assert type(parsed.value()) is type(value)
    assert parsed.is_force_add()


@pytest.mark.skipif(importlib.util.find_spec("hydra") is None, reason="hydra comes with the training stack")
def test_hydra_reads_back_a_path_as_text():
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (argument,) = hydra_arguments({"p": Path("/a b/\u00e9.parquet")})
    assert OverridesParser.create().parse_override(argument).value() == "/a b/\u00e9.parquet"


def test_a_shell_reads_the_command_as_it_was_meant():
    values = {"a.b": "x y; rm -rf $HOME `id` 'q' \"d\"", "c": ["p q"]}
    command = verl_command(values, {"KLREG_KL": "/my runs/kl.yaml"})
    words = shlex.split(command.replace("\\\n", ""))
    assert words == ["KLREG_KL=/my runs/kl.yaml", "python", "-m", "verl.trainer.main_ppo", *hydra_arguments(values)]


@pytest.mark.parametrize("key", sorted(_REFUSED))
def test_settings_that_break_measuring_or_resuming_are_refused(key: str):
    with pytest.raises(ValueError, match=f"verl.{key}: .* Leave it out."):
        _passthrough({key: True}, {})


def test_a_key_inside_one_of_ours_is_refused_too():
    with pytest.raises(ValueError, match="klreg sets a.b from the recipe"):
        _passthrough({"a.b.c": 1}, {"a.b": {"c": 2}})
