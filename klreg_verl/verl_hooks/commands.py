"""Whether a command of verl's can run under a KL block, asked before Ray starts; and its settings, completed.

The trainer asks once more where it starts, since a main of a user's own may never have asked.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from klreg_verl.core import objective
from klreg_verl.core.objective import Objective
from klreg_verl.experiment.recipe import KLBlock, KLSpec, check_kl, load_kl
from klreg_verl.verl_hooks import names
from klreg_verl.verl_hooks.names import KL_VARIABLE

OUTCOME = f"would train without the block of {KL_VARIABLE}"


def read_block() -> KLBlock:
    """The block that KLREG_KL names; ConfigError or ValueError where that is no file with a KL block."""
    path = os.environ[KL_VARIABLE]
    if not path.strip():
        raise ValueError(f"{KL_VARIABLE} is set and empty. Let it name a file with a KL block, or unset it.")
    return load_kl(path)


def or_exit(ask: Callable[..., None], *given: Any) -> None:
    """Call `ask`; what it refuses becomes the last line of the command's output, and exit code 2."""
    try:
        ask(*given)
    except (ValueError, OSError) as error:
        print(f"{names.REFUSED}{error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def check_runner(runner: Any, ours: Any) -> None:
    """ValueError unless verl's own runner of its new trainers was handed to run_ppo."""
    if runner is not ours:
        data = getattr(runner, "__ray_metadata__", None)
        name = getattr(data, "class_name", getattr(runner, "__name__", repr(runner)))
        raise ValueError(
            f"{name} is not verl's TaskRunnerV1: its trainer {OUTCOME}. Start `python -m verl.trainer.main_ppo` with "
            f"trainer.v1.trainer_mode=sync, or unset {KL_VARIABLE}."
        )


def check_command(config: DictConfig) -> None:
    """ValueError, with the reason and the way out, where this command cannot follow the block of KLREG_KL."""
    block = read_block()
    check_mode(config.trainer)
    check(config, block)
    prepare(copy.deepcopy(config), block.kl)


def check_mode(trainer: DictConfig) -> None:
    """Only verl's "sync" trainer is replaced by ours."""
    if not trainer.get("use_v1", False):
        raise ValueError(
            f"trainer.use_v1={trainer.get('use_v1')}: verl's older trainer {OUTCOME}. Set trainer.use_v1=True, or "
            f"unset {KL_VARIABLE}."
        )
    if trainer.v1.trainer_mode != "sync":
        raise ValueError(
            f"trainer.v1.trainer_mode={trainer.v1.trainer_mode}: this trainer of verl's {OUTCOME}. Set "
            f"trainer.v1.trainer_mode=sync, or unset {KL_VARIABLE}."
        )


def check(config: DictConfig, block: KLBlock) -> None:
    """ValueError where the block does not follow what it claims, or a setting of verl's would replace what it asks."""
    _check_replaced(config)
    check_kl(block.kl, os.environ[KL_VARIABLE], objective_of(config))
    _check_estimator(str(config.algorithm.adv_estimator))
    _check_engine(config.actor_rollout_ref, block)


def objective_of(config: DictConfig) -> Objective:
    """What the policy follows beside its KL term, by all of a command's settings."""
    actor, algorithm = config.actor_rollout_ref.actor, config.algorithm
    settings = {key: OmegaConf.select(config, key) for key in objective.DEFAULTS}
    for side in ("low", "high"):  # as verl's policy losses do
        key = f"{objective.ACTOR}.clip_ratio_{side}"
        settings[key] = actor.clip_ratio if settings[key] is None else settings[key]
    return objective.objective(
        settings,
        advantage=names.advantage(str(algorithm.adv_estimator), algorithm.norm_adv_by_std_in_grpo),
        updates_per_batch=config.data.train_batch_size // actor.ppo_mini_batch_size * actor.ppo_epochs,
        loss_aggregation=actor.loss_agg_mode,
    )


def prepare(config: DictConfig, kl: KLSpec) -> None:
    """Complete verl's settings with what every arm needs, and refuse what would work against the KL block.

    Raises:
        ValueError: verl's own KL is on, the advantage estimator cannot carry KL in the reward, the samples would not be
            the policy's own, or beta would mean something else in every micro-batch.
    """
    actor, ref, rollout = (config.actor_rollout_ref[part] for part in ("actor", "ref", "rollout"))
    _check_sampling(rollout)
    _check_aggregation(actor, kl, config.data.max_response_length)
    if config.algorithm.use_kl_in_reward or (actor.use_kl_loss and actor.kl_loss_coef != 0):
        raise ValueError(
            "verl's own KL is on (algorithm.use_kl_in_reward, or actor.use_kl_loss with a coefficient) beside a "
            f"{KL_VARIABLE} block: two KL terms would be followed. Switch verl's off, or unset {KL_VARIABLE}. "
            "`klreg adopt -- python -m verl.trainer.main_ppo ...` prints the command without it, and the block that "
            "says what it followed."
        )
    _check_advantage(str(config.algorithm.adv_estimator), kl)
    with open_dict(config):
        actor.use_kl_loss, actor.kl_loss_coef = True, 0.0  # verl loads the reference only so; our loss skips its term
        rollout.calculate_log_probs = True  # the mismatch between sampler and trainer is measured in every arm
        if ref.log_prob_micro_batch_size_per_gpu is None:  # a script without KL says nothing about the reference
            ref.log_prob_micro_batch_size_per_gpu = rollout.log_prob_micro_batch_size_per_gpu
        if _is_verls_own_loop(rollout):
            rollout.agent.agent_loop_manager_class = names.MANAGER
            rollout.agent.agent_loop_config_path = str(names.AGENT_CONFIG)
            rollout.agent.default_agent_loop = names.AGENT_NAME


def _check_advantage(estimator: str, kl: KLSpec) -> None:
    """KL in the reward needs a group, and to be normalized with the reward a group whose std divides."""
    carriers = (
        {name for name in names.REWARD_CARRIERS if "grpo" in name}
        if kl.normalize_with_reward
        else names.REWARD_CARRIERS
    )
    if kl.in_reward and estimator not in carriers:
        within = " and normalize_with_reward" * kl.normalize_with_reward
        raise ValueError(
            f"kl.placement={kl.placement}{within} with algorithm.adv_estimator={estimator}: KL is charged against a "
            f"group's other responses. Use one of {sorted(carriers)}, or kl.placement=loss."
        )


def _check_sampling(rollout: DictConfig) -> None:
    """Every estimate of a KL is over the policy's own samples, and these are cut off."""
    if rollout.top_p != 1 or rollout.top_k not in (-1, 0):
        raise ValueError(
            f"actor_rollout_ref.rollout.top_p={rollout.top_p} and top_k={rollout.top_k}: the samples are not the "
            "policy's own, and every KL estimate is biased by that. Use top_p=1 and top_k=-1."
        )


def _check_aggregation(actor: DictConfig, kl: KLSpec, longest: int) -> None:
    """Without its constant verl divides by the padded width of each micro-batch."""
    of_policy = {"actor.loss_agg_mode": actor.loss_agg_mode}
    of_kl = {"kl.aggregation": kl.aggregation} if kl.aggregation else of_policy
    used = (of_policy if kl.in_reward else {}) | (of_kl if kl.in_loss else {})
    for name, aggregation in used.items():
        if aggregation == "seq-mean-token-sum-norm" and actor.loss_scale_factor is None:
            raise ValueError(
                f"{name}={aggregation} without actor_rollout_ref.actor.loss_scale_factor: beta would mean something "
                f"else in every micro-batch. Set it, e.g. to data.max_response_length={longest}."
            )


def _is_verls_own_loop(rollout: DictConfig) -> bool:
    """Whether sampling is verl's single-turn loop on vLLM: the one that can be seeded without knowing a user's code."""
    agent = rollout.agent
    own = agent.get("agent_loop_manager_class") or agent.agent_loop_config_path
    return rollout.name == "vllm" and not own and agent.default_agent_loop == VERLS_LOOP


VERLS_LOOP = "single_turn_agent"


def _check_replaced(config: DictConfig) -> None:
    """What verl would put in the place of the policy loss, or of the log-probs that every arm measures."""
    if config.get("distillation", {}).get("enabled", False):
        raise ValueError(
            f"distillation.enabled=True: our loss would take the place of the distillation's, which then trains by "
            f"reinforcement alone. Set distillation.enabled=False, or unset {KL_VARIABLE}."
        )
    correction = config.algorithm.get("rollout_correction") or {}
    loss_mode = config.actor_rollout_ref.actor.policy_loss.loss_mode
    if correction.get("bypass_mode", False) or loss_mode == "bypass_mode":
        raise ValueError(
            "algorithm.rollout_correction.bypass_mode=True: verl then leaves out the trainer's own log-probs and "
            "entropy, which the KL is taken from. Set algorithm.rollout_correction.bypass_mode=False, which corrects "
            f"with the same weights, or unset {KL_VARIABLE}."
        )


def _check_estimator(name: str) -> None:
    if name in names.WITHOUT_INPUT:
        raise ValueError(
            f"algorithm.adv_estimator={name}: verl {names.TESTED['verl']}'s sync trainer does not hand it "
            f"{names.WITHOUT_INPUT[name]}, so that the first step would fail. Use another one, e.g. rloo or grpo."
        )


def _check_engine(model: DictConfig, block: KLBlock) -> None:
    """What the workers would refuse after minutes: logits and weights are read from FSDP's engines only."""
    strategy, lora = str(model.actor.strategy), _has_lora(model.model)
    wants_logits = block.kl.is_exact or block.probes.exact_every > 0
    asked = f"kl.estimator={block.kl.estimator}" if block.kl.is_exact else "probes.exact_every"
    if wants_logits and strategy not in ("fsdp", "fsdp2"):
        raise ValueError(f"{asked} with actor.strategy={strategy}: only fsdp and fsdp2 give the logits it needs.")
    if wants_logits and (lora or model.actor.use_fused_kernels):
        what, way = ("LoRA", "lora_rank=0") if lora else ("use_fused_kernels=True", "use_fused_kernels=False")
        raise ValueError(f"{asked} with {what}: the logits of both models are needed. Set {MODEL}.{way}.")
    if block.kl.is_drawn and strategy not in ("fsdp", "fsdp2"):
        raise ValueError(f"kl.estimator={block.kl.estimator} with actor.strategy={strategy}: use fsdp or fsdp2.")
    if block.reference.moves and strategy != "fsdp2":
        raise ValueError(
            f"A reference that moves, with actor.strategy={strategy}: its weights are read shard by shard from fsdp2. "
            "Set actor_rollout_ref.actor.strategy=fsdp2."
        )
    if lora and (block.reference.moves or block.reference.path is not None or block.kl.is_drawn):
        raise ValueError(
            "reference, or estimator reference_samples, with LoRA: verl's reference is the base model under the "
            f"adapter. Leave the block's reference out, or set {MODEL}.lora_rank=0."
        )


MODEL = "actor_rollout_ref.model"


def _has_lora(model: DictConfig) -> bool:
    rank = (model.get("lora") or {}).get("rank", 0) or model.get("lora_rank", 0)
    return rank > 0 or model.get("lora_adapter_path") is not None


def unseeded(config: DictConfig) -> list[str]:
    """Why requests have no seed of their own, as a line of the log; none where all have. Ask before `prepare`."""
    rollout = config.actor_rollout_ref.rollout
    what = "every request"
    if rollout.name != "vllm":
        why = f"rollout.name={rollout.name}"
    elif not _is_verls_own_loop(rollout):
        why = "the command has an agent loop of its own"
    elif rollout.multi_turn.enable:
        why, what = "rollout.multi_turn.enable=True", "a request of another loop than single_turn_agent"
    else:
        return []
    return [
        f"sampling: {what} is without a seed ({why}), so that a resumed run draws other tokens, and runs that share a "
        "seed do not share their first samples"
    ]
