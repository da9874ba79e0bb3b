"""Under KLREG_KL a command of verl's runs with its KL block, or is refused before Ray starts with one sentence."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from verl_stack import FORWARD, REVERSE, compose, environment, import_verl, need_stack, run_python

from klreg_verl.experiment.kl_settings import KLSpec, ProbesSpec, ReferenceSpec
from klreg_verl.experiment.recipe import KLBlock
from klreg_verl.verl_hooks import names

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
KL = "placement: reward\nestimator: k1\nfollows: reverse\nbeta: 0.1\n"


@pytest.fixture(scope="module", autouse=True)
def stack() -> None:
    need_stack()
    import_verl()


@pytest.fixture(autouse=True)
def kl_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "kl.yaml"
    path.write_text(KL)
    monkeypatch.setenv("KLREG_KL", str(path))
    return path


def commands() -> Any:
    from klreg_verl.verl_hooks import commands

    return commands


@functools.cache
def plain() -> Any:
    return compose({f"{ROLLOUT}.name": "vllm", "algorithm.adv_estimator": "rloo"})


def config(**values: Any) -> Any:
    """A right command's settings with some changed; composing takes a second."""
    from omegaconf import OmegaConf

    made = copy.deepcopy(plain())
    for key, value in values.items():
        OmegaConf.update(made, key, value)
    return made


def refusal(**values: Any) -> str:
    with pytest.raises(ValueError) as caught:
        commands().check_command(config(**values))
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ whole commands


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """From verl's own folder, where its other mains look for their settings."""
    made, folder = environment(VERL_PLATFORM="cpu", **variables), Path(str(import_module("verl").__file__)).parents[1]
    command = (sys.executable, *command, "hydra.run.dir=/tmp")
    return subprocess.run(command, cwd=folder, env=made, capture_output=True, text=True, timeout=240)


def assert_refused(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Exit code 2, one last line that holds the parts, and no Ray."""
    assert done.returncode == 2, done.stderr[-2000:]
    last = done.stderr.rstrip().splitlines()[-1]
    assert last.startswith("[klreg] refused: ") and all(part in last for part in parts), done.stderr[-2000:]
    assert "ray init kwargs" not in done.stdout and "Traceback" not in done.stderr


PLAIN = (f"{ROLLOUT}.name=vllm", "algorithm.adv_estimator=rloo", f"{ACTOR}.use_dynamic_bsz=True")


def test_verls_own_main_in_another_mode_is_refused_before_ray_starts(kl_file: Path):
    mode = "trainer.v1.trainer_mode=colocate_async"
    done = run("-m", "verl.trainer.main_ppo", *PLAIN, mode, KLREG_KL=str(kl_file))
    assert_refused(done, mode, "Set trainer.v1.trainer_mode=sync, or unset KLREG_KL.")


def test_a_kl_file_that_does_not_exist_is_refused_before_ray_starts(tmp_path: Path):
    done = run("-m", "verl.trainer.main_ppo", *PLAIN, KLREG_KL=str(tmp_path / "kll.yaml"))
    assert_refused(done, "kll.yaml: no such file. Did you mean", "kl.yaml")


def test_another_main_with_a_runner_of_its_own_is_refused_before_ray_starts(kl_file: Path):
    done = run("-m", "verl.experimental.one_step_off_policy.main_ppo", KLREG_KL=str(kl_file))
    assert_refused(done, "OneStepTaskRunner is not verl's TaskRunnerV1", "or unset KLREG_KL.")


GUARDS = """
import json, os
from verl.experimental.separation.ray_trainer import SeparateRayPPOTrainer
from verl.trainer.ppo.ray_trainer import RayPPOTrainer
from verl.trainer.ppo.v1 import PPOTrainerColocateAsync, PPOTrainerSync, get_trainer_cls

class Own(PPOTrainerSync):
    def __init__(self):
        pass

class Older(SeparateRayPPOTrainer):
    def __init__(self):
        pass

def made(cls):
    try:
        return type(cls.__new__(cls)).__name__
    except RuntimeError as error:
        return str(error)

trainers = [RayPPOTrainer, Older, PPOTrainerColocateAsync, Own, get_trainer_cls("sync")]
print("FOUND", json.dumps({cls.__name__: made(cls) for cls in trainers}))
"""


def found(**variables: str) -> dict[str, str]:
    (line,) = [line for line in run_python(GUARDS, **variables).splitlines() if line.startswith("FOUND ")]
    return json.loads(line.removeprefix("FOUND "))


def test_no_trainer_but_ours_is_made_under_a_kl_block_whatever_main_makes_it(kl_file: Path):
    made = found(KLREG_KL=str(kl_file))
    assert made.pop("KLRegTrainer") == "KLRegTrainer"
    assert set(made) == {"RayPPOTrainer", "Older", "PPOTrainerColocateAsync", "Own"}
    for name, text in made.items():
        assert re.search(rf"\.?{name} would train without the block of KLREG_KL: only verl's sync trainer", text), text


def test_without_a_kl_block_every_trainer_is_made():
    made = found()
    assert made == {name: name for name in made} and "PPOTrainerSync" in made


# --------------------------------------------------------------------------------------------- modes and KL files


@pytest.mark.parametrize(
    ("values", "given"),
    [
        ({"trainer.use_v1": False}, "trainer.use_v1=False"),
        ({"trainer.v1.trainer_mode": "colocate_async"}, "trainer.v1.trainer_mode=colocate_async"),
        ({"trainer.v1.trainer_mode": "separate_async"}, "trainer.v1.trainer_mode=separate_async"),
        ({"trainer.v1.trainer_mode": "mine"}, "trainer.v1.trainer_mode=mine"),
    ],
)
def test_every_mode_but_sync_is_refused(values: dict[str, Any], given: str):
    assert refusal(**values).startswith(f"{given}: ")
    assert "would train without the block of KLREG_KL. Set trainer." in refusal(**values)


def test_only_verls_own_runner_may_be_handed_over():
    from verl.trainer import main_ppo, main_ppo_v0

    commands().check_runner(main_ppo.TaskRunnerV1, main_ppo.TaskRunnerV1)
    with pytest.raises(ValueError, match="^TaskRunner is not verl's TaskRunnerV1"):
        commands().check_runner(main_ppo_v0.TaskRunner, main_ppo.TaskRunnerV1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the file is empty"),
        ("# nothing\n", "the file is empty"),
        ("{}", "there is no KL block. Say `placement: none`"),
        ("kl: {}", "there is no KL block"),
        ("kl:", "there is no KL block"),
        ("- placement: none", "expected a mapping"),
        ("arms: {none: {kl: {placement: none}}}", "this is a recipe"),
        ("placement: loss\nestimator: k1\nfollows: reverse\nbeta: 0.1", "is void"),
    ],
)
def test_what_is_no_kl_block_is_refused(kl_file: Path, text: str, words: str):
    kl_file.write_text(text)
    assert words in refusal()


@pytest.mark.parametrize("name", ["", " "])
def test_a_variable_that_is_set_and_empty_is_refused(monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setenv("KLREG_KL", name)
    assert refusal() == "KLREG_KL is set and empty. Let it name a file with a KL block, or unset it."


def test_a_folder_is_no_kl_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("KLREG_KL", str(tmp_path))
    assert "cannot be read" in refusal()


def test_a_right_command_passes_and_keeps_its_settings():
    given = config()
    commands().check_command(given)
    assert given == config()


# ------------------------------------------------------------------------------------------- settings of verl's


def test_distillation_is_refused_and_not_replaced_by_reinforcement():
    text = refusal(**{"distillation.enabled": True})
    assert text.startswith("distillation.enabled=True: our loss would take the place of the distillation's")
    assert text.endswith("Set distillation.enabled=False, or unset KLREG_KL.")


@pytest.mark.parametrize(
    "values",
    [
        {"algorithm.rollout_correction.bypass_mode": True},
        {"algorithm.rollout_correction.bypass_mode": True, f"{ACTOR}.policy_loss.loss_mode": "gspo"},
        {f"{ACTOR}.policy_loss.loss_mode": "bypass_mode"},
    ],
)
def test_bypass_mode_is_refused_since_the_step_would_lack_what_is_measured(values: dict[str, Any]):
    assert "algorithm.rollout_correction.bypass_mode=True" in refusal(**values)


def step_fields() -> Any:
    """What verl's sync trainer hands to an advantage estimator (trainer_base.PPOTrainer._compute_advantage)."""
    import numpy as np
    import torch
    from verl.protocol import DataProto

    mask = torch.ones(4, 3, dtype=torch.long)
    scores = torch.zeros(4, 3)
    scores[:, -1] = torch.tensor([1.0, 0.0, 0.0, 1.0])
    scored = ("rm_scores", "token_level_scores", "token_level_rewards")
    tensors = {"response_mask": mask, **dict.fromkeys(scored, scores)}
    tensors |= dict.fromkeys(("old_log_probs", "rollout_log_probs", "ref_log_prob", "values"), torch.full((4, 3), -1.0))
    uids = {"uid": np.array(["a", "a", "b", "b"], dtype=object)}
    return DataProto.from_dict(tensors=tensors, non_tensors=uids)


def works(name: str) -> bool:
    from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories

    keys = ["a_0_0", "a_1_0", "b_0_0", "b_1_0"]
    algorithm = config().algorithm
    try:
        compute_advantage_for_multi_trajectories(step_fields(), keys, name, num_repeat=2, config=algorithm)
    except (AssertionError, TypeError, KeyError, ValueError, AttributeError):
        return False
    return True


def test_an_advantage_estimator_that_verls_trainer_starves_is_refused_and_no_other():
    from verl.trainer.ppo.core_algos import AdvantageEstimator

    starved = {str(each.value) for each in AdvantageEstimator if not works(each.value)}
    assert starved == set(names.WITHOUT_INPUT)
    block = KLBlock(kl=FORWARD)
    for each in AdvantageEstimator:
        given = config(**{"algorithm.adv_estimator": each.value})
        if each.value in starved:
            with pytest.raises(ValueError, match=f"^algorithm.adv_estimator={each.value}: .* Use another one"):
                commands().check(given, block)
        else:
            commands().check(given, block)


EXACT = KLSpec(placement="loss", estimator="full_reverse", follows="reverse", beta=0.1)
DRAWN = KLSpec(placement="loss", estimator="reference_samples", follows="forward", beta=0.1)


@pytest.mark.parametrize(
    ("block", "values", "words"),
    [
        (KLBlock(kl=EXACT), {f"{ACTOR}.strategy": "megatron"}, "only fsdp and fsdp2 give the logits"),
        (KLBlock(kl=EXACT), {"actor_rollout_ref.model.lora_rank": 8}, "Set actor_rollout_ref.model.lora_rank=0"),
        (KLBlock(kl=EXACT), {"actor_rollout_ref.model.use_fused_kernels": True}, "model.use_fused_kernels=False"),
        (KLBlock(probes=ProbesSpec(exact_every=2)), {f"{ACTOR}.strategy": "veomni"}, "probes.exact_every with"),
        (KLBlock(kl=DRAWN), {f"{ACTOR}.strategy": "megatron"}, "use fsdp or fsdp2"),
        (KLBlock(reference=ReferenceSpec(ema=0.9)), {f"{ACTOR}.strategy": "fsdp"}, "actor.strategy=fsdp2"),
        (KLBlock(reference=ReferenceSpec(path="/m")), {"actor_rollout_ref.model.lora_rank": 8}, "under the adapter"),
    ],
)
def test_what_the_workers_would_refuse_after_minutes_is_refused_at_once(block: KLBlock, values: Any, words: str):
    plain = {f"{ACTOR}.strategy": "fsdp2"}
    commands().check(config(**plain), block)
    with pytest.raises(ValueError, match=re.escape(words)):
        commands().check(config(**plain | values), block)


NORM = {f"{ACTOR}.loss_agg_mode": "seq-mean-token-sum-norm"}


@pytest.mark.parametrize("kl", [REVERSE, FORWARD])
def test_a_policy_loss_over_the_padded_width_is_refused_with_the_constant_it_lacks(kl: KLSpec):
    with pytest.raises(ValueError, match="Set it, e.g. to data.max_response_length=512"):
        commands().prepare(config(**NORM), kl)
    commands().prepare(config(**NORM, **{f"{ACTOR}.loss_scale_factor": 512}), kl)
    commands().prepare(config(**NORM), KLSpec())
    commands().prepare(config(**NORM), dataclasses.replace(FORWARD, aggregation="token-mean"))


# ----------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({f"{ROLLOUT}.name": "sglang"}, "every request is without a seed (rollout.name=sglang)"),
        ({f"{ROLLOUT}.agent.default_agent_loop": "tool_agent"}, "(the command has an agent loop of its own)"),
        ({f"{ROLLOUT}.agent.agent_loop_config_path": "a.yaml"}, "(the command has an agent loop of its own)"),
        ({f"{ROLLOUT}.multi_turn.enable": True}, "a request of another loop than single_turn_agent is without a seed"),
    ],
)
def test_the_log_says_where_requests_have_no_seed(values: dict[str, Any], why: str):
    (line,) = commands().unseeded(config(**values))
    assert why in line and "a resumed run draws other tokens" in line


def test_the_log_says_nothing_where_every_request_has_a_seed():
    assert commands().unseeded(config()) == []


# ---------------------------------------------------------------------------------------------- what acts beside it


def test_the_objectives_defaults_are_verls():
    from omegaconf import OmegaConf

    from klreg_verl.core import objective

    plain = compose()
    assert {key: OmegaConf.select(plain, key) for key in objective.DEFAULTS} == objective.DEFAULTS
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    ours = {"bypass_mode", *objective._MODES}
    assert set(POLICY_LOSS_REGISTRY) == ours, "a policy loss of verl's without a word on what it does"


def test_a_commands_objective_is_read_from_all_of_its_settings():
    values = {"data.train_batch_size": 512, f"{ACTOR}.ppo_mini_batch_size": 128, f"{ACTOR}.ppo_epochs": 2}
    values |= {"algorithm.adv_estimator": "grpo", "algorithm.norm_adv_by_std_in_grpo": False}
    read = commands().objective_of(config(**values, **{f"{ACTOR}.entropy_coeff": 0.5}))
    assert (read.advantage, read.updates_per_batch, read.loss_aggregation) == ("dr_grpo", 8, "token-mean")
    assert read.beside("none") == ["entropy_coeff=0.5 acts beside it, a reward for the policy's entropy."]


def test_a_policy_loss_that_weighs_by_length_is_refused_beside_k1_in_the_reward():
    text = refusal(**{f"{ACTOR}.policy_loss.loss_mode": "sapo"})
    assert "'k1' with kl.placement='reward' is biased. The policy loss sapo averages over each" in text
