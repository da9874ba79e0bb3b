"""The table of verl's settings: what it lets through, what it refuses, and that it is the installed verl's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from verl_stack import compose, import_verl, need_stack

from klreg_verl.experiment import verl_keys
from klreg_verl.verl_hooks import key_table

ACTOR, ROLLOUT, MODEL = (f"actor_rollout_ref.{part}" for part in ("actor", "rollout", "model"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.shuffle", False),
        (f"{ACTOR}.optim.lr", 1e-5),
        (f"{ACTOR}.entropy_coeff", 0),  # a whole number is a number
        (f"{ACTOR}.policy_loss.loss_mode", "gspo"),
        (f"{ROLLOUT}.val_kwargs.top_p", 1),
        (f"{ROLLOUT}.max_model_len", None),
        ("trainer.logger", ["console", "wandb"]),
        ("trainer.logger", "console"),
        ("algorithm.rollout_correction.rollout_rs_threshold", "0.6_1.6,2.5"),  # as verl's own example has it
        ("algorithm.rollout_correction.rollout_is_threshold", 2.0),
        ("algorithm.gdpo_reward_keys", ["accuracy", "format"]),
        (f"{ROLLOUT}.seed", "${data.seed}"),  # Hydra reads the other key
        (f"{MODEL}.target_modules", ["q_proj", "v_proj"]),
        (f"{MODEL}.override_config.attn_implementation", "sdpa"),
        (f"{MODEL}.override_config", {}),
        (f"{ROLLOUT}.engine_kwargs.vllm.speculative_config.method", "ngram"),
        ("data.apply_chat_template_kwargs.enable_thinking", False),
        ("reward.custom_reward_function.reward_kwargs.mine", [1]),
        ("reward.reward_kwargs.overlong_buffer_cfg.len", 512),
        ("ray_kwargs.ray_init.num_gpus", 1),
        ("distillation.teacher_models.second.model_path", "x"),
    ],
)
def test_verls_own_settings_pass(key: str, value: Any):
    assert verl_keys.problem(key, value) is None


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("data.shufle", False, "verl 0.9.1 has no setting 'data.shufle', so it would do nothing, or end the run. Did"),
        ("trainer.test_freqq", 5, "Did you mean 'trainer.test_freq'?"),
        ("actor.optm.lr", 1e-5, "Did you mean 'actor_rollout_ref.actor.optim.lr'?"),
        ("trainr.val_only", True, "Did you mean 'trainer.val_only'?"),
        (f"{ROLLOUT}.engine_kwargs.vlm.x", 1, "has no setting"),  # the engines' names are not open, what they take is
        ("trainer.foo", 1, "Known keys of trainer: balance_batch, "),
        ("foo.bar", 1, "Known sections: actor_rollout_ref, algorithm, "),
        ("actor_rollout_ref.ref.optim.lr", 1e-5, "has no setting"),  # typed as an actor, and no lr is read
        ("trainer.v1.sync.x", 1, "has no setting"),
        (f"{ACTOR}.optim", 3, "is a section of verl's with the keys betas, clip_grad, "),
        (f"{ACTOR}.optim.lr", "1e-5", "verl takes a number here, got '1e-5'. Remove the quotes."),
        ("trainer.total_epochs", 2.0, "verl takes a whole number here, got 2.0. Write 2."),
        ("trainer.total_epochs", True, "verl takes a whole number here, got true."),
        ("trainer.balance_batch", "yes", "verl takes true or false here, got 'yes'. Write true."),
        ("trainer.balance_batch", 1, "verl takes true or false here, got 1."),
        (f"{ACTOR}.checkpoint.save_contents", "model", "verl takes a list here, got 'model'."),
        (f"{MODEL}.override_config", 3, "verl takes a mapping here, got 3."),
        ("data.shuffle", None, "verl takes true or false here, got null."),
    ],
)
def test_what_verl_would_ignore_or_choke_on_is_refused(key: str, value: Any, expected: str):
    assert expected in (verl_keys.problem(key, value) or "")


def test_a_plus_is_for_keys_that_verls_yaml_lacks():
    assert verl_keys.problem("data.cache_dir", "/x", plus=True) is None
    assert verl_keys.problem(f"{ROLLOUT}.engine_kwargs.vllm.x", 1, plus=True) is None
    assert "Leave out the +" in (verl_keys.problem("data.shuffle", True, plus=True) or "")


def test_reading_the_table_needs_no_verl_and_no_torch():
    code = "import sys; from klreg_verl.experiment import verl_keys; verl_keys.known(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"verl", "torch"} & set(done.stdout.split())


# ------------------------------------------------------------------------------------------------- the installed verl


@pytest.fixture
def installed() -> dict[str, str]:
    need_stack()
    import_verl()
    return key_table.table()


def test_the_committed_table_is_that_of_the_installed_verl(installed: dict[str, str]):
    table = verl_keys.known()
    plus = {f"+{key}" if key in table.unlisted else key: kinds for key, kinds in table.kinds.items()}
    assert plus == installed, "verl has moved: python -m klreg_verl.verl_hooks.key_table writes the table anew"


def test_what_code_alone_reads_is_still_read_there(installed: dict[str, str]):
    import verl

    root = Path(verl.__file__).parent
    gone = [
        key
        for key, (_, file) in key_table.READ_BY_CODE.items()
        if f'"{key.rpartition(".")[2]}"' not in (root / file).read_text()
    ]
    assert gone == []
    assert not [key for key in key_table.READ_BY_CODE if key in installed], "verl's YAML lists it now"


def test_every_default_of_verls_is_of_its_own_kind():
    from omegaconf import OmegaConf

    need_stack()
    import_verl()
    wrong = {key: told for key, value in _leaves(compose()) if (told := verl_keys.problem(key, value))}
    assert wrong == {}
    assert OmegaConf.select(compose(), "data.shuffle") is True


def _leaves(node: Any, path: str = "") -> list[tuple[str, Any]]:
    """Each setting with the value that verl starts from; what has none, and `_target_`, is left out."""
    from omegaconf import DictConfig, ListConfig

    if isinstance(node, DictConfig) and len(node):
        names = [name for name in node if name != "_target_" and not node._get_node(name)._is_missing()]
        return [leaf for name in names for leaf in _leaves(node[name], f"{path}.{name}" if path else str(name))]
    value = {} if isinstance(node, DictConfig) else list(node) if isinstance(node, ListConfig) else node
    return [] if value == {} and path in key_table.CLOSED else [(path, value)]
