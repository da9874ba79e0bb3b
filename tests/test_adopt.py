"""`klreg adopt`: a command with verl's own KL becomes the same command under the block that says what verl followed."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner
from verl_stack import compose, import_verl, need_stack

from klreg_verl.core.objective import ACTOR, LOSS
from klreg_verl.experiment import recipe
from klreg_verl.verl_hooks import adopt

PYTHON = ["python3", "-m", "verl.trainer.main_ppo"]
PLAIN = ["data.train_batch_size=1024", f"{ACTOR}.ppo_mini_batch_size=256", 'trainer.logger=["console","wandb"]']
IN_LOSS = [f"{ACTOR}.use_kl_loss=True", f"{ACTOR}.kl_loss_coef=0.001"]
IN_REWARD = ["algorithm.use_kl_in_reward=True", "algorithm.kl_ctrl.kl_coef=1e-3"]


def adopted(*arguments: str) -> adopt.Adopted:
    return adopt.adopt([*PYTHON, *PLAIN, *arguments])


BIASED = {"follows": "none", "allow_biased": True}
LOSS_BLOCKS = [
    ("low_var_kl", {"estimator": "k3_verl"} | BIASED),
    ("k3", {"estimator": "k3_verl"} | BIASED),
    ("k1", {"estimator": "k1"} | BIASED),
    ("abs", {"estimator": "abs"} | BIASED),
    ("mse", {"estimator": "k2", "follows": "reverse"}),
    ("k3+", {"estimator": "k2", "follows": "reverse"}),  # verl's straight-through gradient is k2's
]


@pytest.mark.parametrize(("kind", "block"), LOSS_BLOCKS)
def test_verls_kl_loss_becomes_a_block_in_the_loss(kind: str, block: dict[str, Any]):
    found = adopted("algorithm.adv_estimator=grpo", *IN_LOSS, f"{ACTOR}.kl_loss_type={kind}")
    assert found.block == {"placement": "loss", "beta": 0.001} | block
    assert found.command == (*PYTHON, *PLAIN, "algorithm.adv_estimator=grpo")
    assert found.removed == (*IN_LOSS, f"{ACTOR}.kl_loss_type={kind}")
    assert "With 4 updates per batch" in found.sentence


def test_verls_kl_in_rloos_reward_becomes_k1_charged_to_whole_responses():
    found = adopted("algorithm.adv_estimator=rloo", *IN_REWARD, "algorithm.kl_penalty=kl")
    assert found.block == {"placement": "reward", "estimator": "k1", "follows": "reverse", "beta": 0.001}


def test_verls_kl_in_grpos_reward_is_divided_by_the_std_as_verl_divides_it():
    found = adopted("algorithm.adv_estimator=grpo", *IN_REWARD)
    assert (
        found.block == {"placement": "reward", "estimator": "k1", "beta": 0.001, "normalize_with_reward": True} | BIASED
    )
    assert "GRPO's std divides the KL term too" in found.sentence
    undivided = adopted("algorithm.adv_estimator=grpo", "algorithm.norm_adv_by_std_in_grpo=False", *IN_REWARD)
    assert "normalize_with_reward" not in undivided.block


def test_verls_adaptive_controller_is_taken_over():
    control = [f"algorithm.kl_ctrl.{text}" for text in ("type=adaptive", "target_kl=0.05", "horizon=5000")]
    found = adopted("algorithm.adv_estimator=rloo", *IN_REWARD, *control)
    expected = {"kind": "verl_adaptive", "signal": "token", "target": 0.05, "horizon": 5000.0}
    assert found.block["controller"] == expected


def test_the_later_of_two_values_counts_as_it_does_for_hydra_and_a_plus_is_read():
    found = adopted("algorithm.adv_estimator=grpo", *IN_LOSS, f"++{ACTOR}.kl_loss_coef=0.01")
    assert (found.block["beta"], found.removed[-1]) == (0.01, f"++{ACTOR}.kl_loss_coef=0.01")


def test_what_acts_beside_the_kl_is_in_the_sentence():
    found = adopted("algorithm.adv_estimator=grpo", *IN_LOSS, f"{LOSS}.loss_mode=gspo", f"{ACTOR}.entropy_coeff=0.01")
    assert "gspo acts beside it" in found.sentence and "entropy_coeff=0.01 acts beside it" in found.sentence


@pytest.mark.parametrize(
    "arguments",
    [
        [f"{ACTOR}.use_kl_loss=False", f"{ACTOR}.kl_loss_coef=0.1"],
        [f"{ACTOR}.use_kl_loss=True", f"{ACTOR}.kl_loss_coef=0"],
    ],
)
def test_a_kl_that_was_off_becomes_a_block_that_measures(arguments: list[str]):
    found = adopted("algorithm.adv_estimator=grpo", *arguments)
    assert found.block == {"placement": "none"}
    assert found.notes == ("verl's KL was off in this command: the block measures only.",)


def test_a_command_without_kl_keys_says_so_and_is_as_it_was():
    found = adopted("algorithm.adv_estimator=grpo", "--config-name=mine")
    assert found.command == (*PYTHON, *PLAIN, "algorithm.adv_estimator=grpo", "--config-name=mine")
    assert found.notes == (
        "The command has no KL key of verl's, so nothing was left out of it.",
        "A configuration of its own was not read: KL keys in that file are still there.",
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["algorithm.adv_estimator=gae", *IN_REWARD], "with algorithm.adv_estimator=gae: a block charges a response"),
        (["algorithm.adv_estimator=grpo", *IN_REWARD, *IN_LOSS], "two KL terms here"),
        ([*IN_LOSS, f"{ACTOR}.kl_loss_type=full"], "computes no such KL. Use one of kl, k1, abs"),
        ([*IN_LOSS, f"{ACTOR}.kl_loss_coef=${{algorithm.kl_ctrl.kl_coef}}"], "is no number. Give the value itself"),
        ([f"{ACTOR}.use_kl_loss=$USE"], "is neither true nor false"),
        ([f"{ACTOR}.use_kl_loss=True", f"{ACTOR}.kl_loss_coef=-0.001"], "-0.001 is negative: it would reward leaving"),
    ],
)
def test_what_no_block_can_say_is_refused_with_the_way_out(arguments: list[str], words: str):
    with pytest.raises(ValueError) as caught:
        adopted(*arguments)
    assert words in str(caught.value)


def test_another_command_is_refused():
    with pytest.raises(ValueError, match="does not start `python -m verl.trainer.main_ppo`"):
        adopt.adopt(["python", "-m", "recipe.dapo.main_dapo", *IN_LOSS])


def klreg(*words: str) -> Any:
    from klreg_verl.cli import app

    return CliRunner().invoke(app, ["adopt", *words])


def test_the_printed_script_is_the_command_word_for_word_and_the_file_a_kl_block(tmp_path: Path):
    odd = ["data.train_files=['/d/a b.parquet', '/d/$c.parquet']", "data.prompt_key='it''s'", "x=`date`; rm -r y"]
    done = klreg("--", *PYTHON, *odd, "algorithm.adv_estimator=rloo", *IN_REWARD)
    assert done.exit_code == 0, done.output
    comment, *block, export, command = done.output.splitlines()
    assert comment.startswith("# k1 is charged to the reward") and export == 'export KLREG_KL="$PWD/kl.yaml"'
    assert shlex.split(command) == [*PYTHON, *odd, "algorithm.adv_estimator=rloo"]
    written = shlex.split("\n".join(block))
    assert (written[0], written[2:]) == ("echo", [">", "kl.yaml"])
    (tmp_path / "kl.yaml").write_text(written[1])
    found = adopt.adopt([*PYTHON, "algorithm.adv_estimator=rloo", *IN_REWARD])
    assert recipe.load_kl(tmp_path / "kl.yaml").kl == found.kl


def test_json_has_the_words_and_the_block_and_a_refusal_ends_2():
    done = klreg("--json", "--", *PYTHON, "algorithm.adv_estimator=rloo", *IN_REWARD)
    said = json.loads(done.output)
    assert said["command"] == [*PYTHON, "algorithm.adv_estimator=rloo"] and said["kl"]["estimator"] == "k1"
    assert klreg("--", *PYTHON, "algorithm.adv_estimator=gae", *IN_REWARD).exit_code == 2


def test_the_defaults_are_verls():
    from omegaconf import OmegaConf

    need_stack()
    import_verl()
    plain, ours = compose(), {**adopt.KL_DEFAULTS, **adopt.OTHER_DEFAULTS}
    assert {key: OmegaConf.select(plain, key) for key in ours} == ours


def test_an_adopted_command_passes_the_check_that_refused_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    need_stack()
    import_verl()
    from hydra import compose as composed
    from hydra import initialize_config_module

    from klreg_verl.verl_hooks import commands

    arguments = ["algorithm.adv_estimator=grpo", "actor_rollout_ref.rollout.name=vllm", *IN_LOSS]
    found = adopt.adopt([*PYTHON, *arguments])
    (tmp_path / "kl.yaml").write_text(yaml.safe_dump(found.block))
    monkeypatch.setenv("KLREG_KL", str(tmp_path / "kl.yaml"))
    with initialize_config_module("verl.trainer.config", version_base=None):
        with pytest.raises(ValueError, match="verl's own KL is on .* `klreg adopt -- python -m verl.trainer.main_ppo"):
            commands.check_command(composed("ppo_trainer", overrides=arguments))
        commands.check_command(composed("ppo_trainer", overrides=list(found.command[3:])))
