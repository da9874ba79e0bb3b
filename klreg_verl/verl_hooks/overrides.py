"""RunSpec -> verl's settings, as dotted keys. Imports no verl, so that a plan can be shown anywhere.

`settings(spec, ...)` is all that we set; a recipe's `verl:` block adds keys of verl's own and may not contradict it.
"""

from __future__ import annotations

import difflib
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klreg_verl.experiment.fit import packed_tokens
from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.strict import FieldError
from klreg_verl.verl_hooks import transfer

Settings = dict[str, Any]

ACTOR, ROLLOUT, REF, MODEL = (f"actor_rollout_ref.{part}" for part in ("actor", "rollout", "ref", "model"))

REWARD_MODULE = "pkg://data_prep.rewards"
RETENTION_MODULE = "pkg://data_prep.retention"


@dataclass(frozen=True, kw_only=True)
class Files:
    """Where a run's inputs and outputs are, absolute."""

    train: Path
    val: Path
    model: Path
    checkpoints: Path
    retention: tuple[Path, ...] = ()
    """Prompts of skills that the run does not train, validated with the task's."""


def settings(spec: RunSpec, files: Files, platform: str) -> Settings:
    """Every verl key of one run.

    Args:
        spec: the run.
        files: data, model and checkpoint folder.
        platform: "cpu" or "cuda".

    Raises:
        ValueError: the recipe's `verl:` block sets a key that klreg sets from the recipe itself.
    """
    ours = {
        **_data(spec, files),
        **_model(spec, files),
        **_actor(spec),
        **_batches(spec, platform),
        **_rollout(spec),
        **_trainer(spec, files),
        **(_cpu(spec) if platform == "cpu" else {}),
    }
    return ours | _passthrough(spec.verl, ours)


def hydra_arguments(values: Mapping[str, Any]) -> list[str]:
    """`key=value` arguments for verl's command line; `++` also adds keys that verl's YAML does not list."""
    return [f"++{key}={_hydra_value(value)}" for key, value in values.items()]


def verl_command(values: Mapping[str, Any], environment: Mapping[str, str]) -> str:
    """The stock command that starts the same run without our launcher."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    arguments = [shlex.quote(argument) for argument in hydra_arguments(values)]
    return " \\\n    ".join([*variables, "python -m verl.trainer.main_ppo", *arguments])


def _data(spec: RunSpec, files: Files) -> Settings:
    return {
        "data.train_files": str(files.train),
        "data.val_files": [str(files.val), *map(str, files.retention)] if files.retention else str(files.val),
        "data.train_batch_size": spec.train.prompts_per_step,
        "data.max_prompt_length": spec.train.max_prompt_tokens,
        "data.max_response_length": spec.train.max_response_tokens,
        "data.seed": spec.seed,
        "data.shuffle": True,
        "data.validation_shuffle": False,
        "data.dataloader_num_workers": 0,
        **_reward(spec),
    }


def _reward(spec: RunSpec) -> Settings:
    """The function that grades; beside a user's own, skills are still graded by this project."""
    function, own = "reward.custom_reward_function", spec.task.reward
    options = {f"{function}.reward_kwargs.{name}": value for name, value in spec.task.reward_options.items()}
    if own is None:
        return {f"{function}.path": REWARD_MODULE, f"{function}.name": "compute_score"} | options
    if not spec.retention.skills:
        module, _, name = own.partition(":")
        return {f"{function}.path": f"pkg://{module}", f"{function}.name": name} | options
    both = {f"{function}.path": RETENTION_MODULE, f"{function}.name": "compute_score"}
    return both | {f"{function}.reward_kwargs.own": own} | options


def _model(spec: RunSpec, files: Files) -> Settings:
    return {
        f"{MODEL}.path": str(files.model),
        f"{MODEL}.trust_remote_code": spec.model.trust_remote_code,
    }


def _actor(spec: RunSpec) -> Settings:
    train = spec.train
    return {
        "algorithm.adv_estimator": f"klreg_{train.advantage}",
        "algorithm.use_kl_in_reward": False,
        f"{ACTOR}.strategy": "fsdp2",
        f"{ACTOR}.use_kl_loss": True,  # verl loads the reference only so; the coefficient of verl's own term is 0
        f"{ACTOR}.kl_loss_coef": 0.0,
        f"{ACTOR}.loss_agg_mode": train.policy_aggregation,
        f"{ACTOR}.loss_scale_factor": _loss_scale_factor(spec),
        f"{ACTOR}.clip_ratio": train.clip_ratio,
        f"{ACTOR}.clip_ratio_low": train.clip_ratio,
        f"{ACTOR}.clip_ratio_high": train.clip_ratio,
        f"{ACTOR}.grad_clip": train.max_grad_norm,
        f"{ACTOR}.optim.lr": train.learning_rate,
        f"{ACTOR}.optim.lr_warmup_steps": train.warmup_steps,
        f"{ACTOR}.optim.weight_decay": train.weight_decay,
        f"{ACTOR}.data_loader_seed": spec.seed,
    }


def _loss_scale_factor(spec: RunSpec) -> int | None:
    """The constant of seq-mean-token-sum-norm, of the policy loss or of the KL alone; verl's other spellings ignore it.

    Without it verl divides by the padded width of each micro-batch, and beta would mean something else in each.
    """
    of_kl = spec.kl.aggregation == "seq-mean-token-sum-norm"
    return spec.train.max_response_tokens if of_kl else spec.train.loss_scale_factor


def _batches(spec: RunSpec, platform: str) -> Settings:
    """Mini-batches in prompts, micro-batches in responses of one worker; on a GPU verl packs by tokens by default."""
    train = spec.train
    values: Settings = {f"{ACTOR}.ppo_mini_batch_size": train.prompts_per_update}
    if train.micro_batch is None and platform == "cuda":
        return values | {f"{ACTOR}.use_dynamic_bsz": True, f"{ACTOR}.ppo_max_token_len_per_gpu": packed_tokens(spec)}
    share = train.prompts_per_update * train.responses_per_prompt // spec.resources.world_size
    micro_batch = train.micro_batch or share
    return values | {
        f"{ACTOR}.ppo_micro_batch_size_per_gpu": micro_batch,
        f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu": micro_batch,
        f"{REF}.log_prob_micro_batch_size_per_gpu": micro_batch,
    }


def _rollout(spec: RunSpec) -> Settings:
    train, evaluation = spec.train, spec.eval
    return {
        f"{ROLLOUT}.name": "vllm",
        f"{ROLLOUT}.n": train.responses_per_prompt,
        f"{ROLLOUT}.temperature": train.temperature,
        f"{ROLLOUT}.top_p": train.top_p,
        f"{ROLLOUT}.top_k": -1,
        f"{ROLLOUT}.tensor_model_parallel_size": spec.resources.tensor_parallel,
        f"{ROLLOUT}.max_model_len": train.max_prompt_tokens + train.max_response_tokens,
        f"{ROLLOUT}.seed": spec.seed,
        transfer.BUCKET_KEY: transfer.CHOSEN_HERE,
        f"{ROLLOUT}.val_kwargs.n": evaluation.responses_per_prompt,
        f"{ROLLOUT}.val_kwargs.temperature": evaluation.temperature,
        f"{ROLLOUT}.val_kwargs.do_sample": evaluation.temperature > 0,
    }


def _trainer(spec: RunSpec, files: Files) -> Settings:
    trackers = ["console"] + ["tensorboard"] * spec.logging.tensorboard + ["wandb"] * (spec.logging.wandb != "off")
    return {
        "trainer.use_v1": True,
        "trainer.v1.trainer_mode": "sync",  # any other trainer of verl's would run without our KL, and say nothing
        "trainer.project_name": spec.recipe,
        "trainer.experiment_name": spec.run_id.replace("/", "-"),
        "trainer.logger": trackers,
        "trainer.nnodes": spec.resources.nodes,
        "trainer.n_gpus_per_node": spec.resources.gpus_per_node,
        "trainer.total_training_steps": spec.train.steps,
        "trainer.total_epochs": spec.train.steps,
        "trainer.default_local_dir": str(files.checkpoints),
        "trainer.resume_mode": "auto",
        "trainer.save_freq": spec.save.every,
        "trainer.max_actor_ckpt_to_keep": None,  # recorder.py prunes: verl forgets what it saved after a restart
        "trainer.test_freq": spec.eval.every or spec.train.steps,  # verl validates the last step if it does any
        "trainer.val_before_train": spec.eval.before,
    }


_FLOAT32 = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
"""verl's default computes in bfloat16, whose rounding is larger than the KL of a first step."""


def _cpu(spec: RunSpec) -> Settings:
    """What differs without an accelerator; cpu.py holds what no setting can say."""
    responses = spec.train.prompts_per_step * spec.train.responses_per_prompt
    return {
        "trainer.device": "cpu",
        f"{MODEL}.override_config.attn_implementation": "sdpa",
        f"{MODEL}.use_remove_padding": False,
        f"{MODEL}.enable_gradient_checkpointing": False,
        f"{ACTOR}.use_torch_compile": False,
        f"{ACTOR}.fsdp_config.use_torch_compile": False,
        f"{ACTOR}.fsdp_config.mixed_precision": _FLOAT32,
        f"{REF}.use_torch_compile": False,
        f"{REF}.fsdp_config.use_torch_compile": False,
        f"{REF}.fsdp_config.mixed_precision": _FLOAT32,
        f"{ROLLOUT}.dtype": "float32",
        f"{ROLLOUT}.enforce_eager": True,
        f"{ROLLOUT}.free_cache_engine": False,
        f"{ROLLOUT}.enable_sleep_mode": False,
        f"{ROLLOUT}.max_num_seqs": min(256, responses),
        f"{ROLLOUT}.agent.num_workers": 1,
        "reward.num_workers": 1,
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
        **(_ONE_PROCESS if spec.resources.tensor_parallel == 1 else {}),
    }


_UNI = "vllm.v1.executor.uniproc_executor.UniProcExecutor"  # by its path: on a CPU vLLM takes "uni" for "mp"
_ONE_PROCESS = {f"{ROLLOUT}.engine_kwargs.vllm.distributed_executor_backend": _UNI}
"""vLLM's scheduler and its only worker in one process: seconds less of imports, and no messages between the two."""


def _passthrough(block: Mapping[str, Any], ours: Settings) -> Settings:
    """The recipe's `verl:` block (dotted keys); what the recipe says elsewhere may not be said otherwise there."""
    for key, value in block.items():
        if key in _REFUSED:
            raise FieldError(f"verl.{key}", f"{_REFUSED[key]} Leave it out.")
        same = next((ours_key for ours_key in ours if _overlap(key, ours_key)), None)
        if same is not None and key not in _CHANGEABLE and not _is_said(same, ours[same], key, value):
            raise FieldError(
                f"verl.{key}",
                f"klreg sets {'this key' if same == key else same} from the recipe (to {ours[same]!r}). "
                f"Change the recipe's own key instead{_own_key(key)}.",
            )
    return dict(block)


def _is_said(ours_key: str, ours: Any, key: str, value: Any) -> bool:
    """Whether `key` has this value by our setting already: a GPU's sdpa is the CPU's, too."""
    if not f"{key}.".startswith(f"{ours_key}."):
        return False
    for name in filter(None, key.removeprefix(ours_key).split(".")):
        ours = ours.get(name) if isinstance(ours, Mapping) else None
    return bool(ours == value)


def _overlap(one: str, other: str) -> bool:
    """Equal, or one inside the other."""
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


_REFUSED = {
    "algorithm.rollout_correction.bypass_mode": "every arm measures the trainer's own log-probs and entropy.",
    "distillation.enabled": "the arm's loss would take the place of the distillation's.",
    f"{ACTOR}.ppo_epochs": "more updates per batch are train.updates_per_batch, which the doctor reads.",
    f"{ACTOR}.checkpoint.async_save": "verl 0.9.1 then writes no tracker, and the run could not be resumed.",
    "trainer.del_local_ckpt_after_load": "a run that is killed after a resume would have nothing left to resume from.",
    "trainer.remove_previous_ckpt_in_save": "a crash during a save would lose both checkpoints.",
}
"""Settings of verl's under which a run could not be measured or resumed."""


_CHANGEABLE = {
    *(f"{ROLLOUT}.max_num_seqs", f"{ROLLOUT}.agent.num_workers", transfer.BUCKET_KEY),
    *("reward.num_workers", f"{ACTOR}.strategy"),
}

_OWN_KEYS = {
    "data.train_batch_size": "train.prompts_per_step",
    "data.max_prompt_length": "train.max_prompt_tokens",
    "data.max_response_length": "train.max_response_tokens",
    f"{ACTOR}.optim.lr": "train.learning_rate",
    f"{ACTOR}.optim.lr_warmup_steps": "train.warmup_steps",
    f"{ACTOR}.ppo_mini_batch_size": "train.updates_per_batch",
    f"{ACTOR}.kl_loss_coef": "kl.beta",
    f"{ACTOR}.use_kl_loss": "kl.placement",
    "algorithm.use_kl_in_reward": "kl.placement",
    "algorithm.adv_estimator": "train.advantage",
    f"{ROLLOUT}.n": "train.responses_per_prompt",
    "trainer.total_training_steps": "train.steps",
    "trainer.save_freq": "save.every",
    "trainer.test_freq": "eval.every",
}


def _own_key(key: str) -> str:
    own = _OWN_KEYS.get(key) or next(iter(difflib.get_close_matches(key.rsplit(".", 1)[-1], _OWN_KEYS.values(), 1)), "")
    return f": {own}" if own else ""


def _hydra_value(value: Any) -> str:
    """Hydra's override grammar: JSON scalars, lists, mappings and quoted strings; null for None."""
    if isinstance(value, list | tuple):
        return "[" + ",".join(_hydra_value(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_hydra_value(item)}" for key, item in value.items()) + "}"
    return _quoted(str(value)) if isinstance(value, str | Path) else json.dumps(value)


def _quoted(text: str) -> str:
    """Text in Hydra's double quotes: a backslash is itself there, unless a quote follows; no other escape exists."""
    return '"' + re.sub(r'(\\+)(?="|$)', r"\1\1", text).replace('"', r"\"") + '"'
