"""KLRegTrainer: verl's synchronous PPO trainer, with KL placed and measured as the KL block says.

One step, in verl's order, and what is ours in it:

    rollout (vLLM)            every request seeded                                       sampling.py
    old, reference log-probs  rows ordered by (prompt, sample) first                     _balance_batch
    advantages                core.advantages; KL in the reward is charged here          _compute_advantage
    actor update              verl's ppo_loss plus the KL term                           loss.py
    metrics                   measured on the batch as sampled, before the update        _compute_metrics
    checkpoint                counts only with its metrics line written                  recorder.py

The class stands under verl's name "sync" (plugin.py), so `python -m verl.trainer.main_ppo` starts it, too.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
import transfer_queue as tq
from omegaconf import DictConfig, open_dict
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.tracking import Tracking
from verl.workers.utils.padding import response_to_nested

from klreg_verl.core import penalties
from klreg_verl.experiment.recipe import KLSpec, check_kl, load_kl
from klreg_verl.verl_hooks import measure, names, rows, sampling
from klreg_verl.verl_hooks.advantages import group_ids
from klreg_verl.verl_hooks.loss import actor_loss
from klreg_verl.verl_hooks.plugin import KL_VARIABLE
from klreg_verl.verl_hooks.recorder import Recorder

POLL_SECONDS = 0.05
"""verl's replay buffer looks every 2 s whether the responses are there; a tiny model's are there in less."""


class KLRegTrainer(PPOTrainerSync):
    """verl's "sync" trainer under one KL block (KLREG_KL), writing to one run folder (KLREG_RUN, optional)."""

    def __init__(self, config: DictConfig) -> None:
        self.kl = load_kl(os.environ[KL_VARIABLE])
        check_kl(self.kl, os.environ[KL_VARIABLE])
        self.beta = self.kl.beta_or_zero
        self.recorder = Recorder.from_environment()
        prepare(config, self.kl)
        super().__init__(config)
        self.replay_buffer.poll_interval = POLL_SECONDS
        print(active_line(config, self.kl), flush=True)

    # verl's fit() makes the tracker and logs to it once a step; the run folder is one more destination.
    @property
    def logger(self) -> Tracking:
        return self._tracking

    @logger.setter
    def logger(self, tracking: Tracking) -> None:
        if self.recorder is not None:
            tracking.logger["klreg"] = self.recorder
        self._tracking = tracking

    def on_init_end(self) -> None:
        """The workers get our loss once they exist."""
        super().on_init_end()
        self.send_loss()

    def send_loss(self) -> None:
        """Ship the actor's loss to every worker (milliseconds)."""
        actor = omega_conf_to_dataclass(self.config.actor_rollout_ref.actor)
        object.__setattr__(actor, "use_kl_loss", False)  # ours is the only KL term, and NaN * 0 is not 0
        self.actor_rollout_wg.set_loss_fn(partial(actor_loss, config=actor, kl=self.kl, beta=self.beta))

    def _balance_batch(self, batch: KVBatchMeta, *args: Any, **kwargs: Any) -> KVBatchMeta:
        """Order rows by (prompt, sample), so that the same samples give the same batch whoever finished first."""
        places = [self._place(key) for key in batch.keys]
        if any(output for *_, output in places):
            raise ValueError(
                "An agent loop returned several outputs for one response: the group advantages and the KL charge would "
                "take them for siblings. Use an agent loop with one output, e.g. verl's single_turn_agent."
            )
        batch.reorder(sorted(range(len(places)), key=places.__getitem__))
        return super()._balance_batch(batch, *args, **kwargs)

    def _place(self, key: str) -> tuple[int, str, int, int]:
        uid, sample, output = key.rsplit("_", 2)
        return self._row_of().get(uid, -1), uid, int(sample), int(output)

    def _row_of(self) -> dict[str, int]:
        return getattr(self.agent_loop_manager, "row_of", {})

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        """Task advantages through verl; then the reward placement's KL, outside any division by a group's std."""
        batch = super()._compute_advantage(batch, metrics)
        return charge_kl(batch, self.kl, self.beta) if self.kl.placement == "reward" else batch

    def _compute_metrics(self, batch: KVBatchMeta, metrics: dict[str, Any], timing_raw: dict, *args, **kwargs) -> None:
        super()._compute_metrics(batch, metrics, timing_raw, *args, **kwargs)
        sampled = rows.fetch(batch)
        tokens = sum(map(len, sampled.prompts)) + sum(map(len, sampled.responses))
        metrics.update(measure.measure(sampled, self.kl, self.beta, self.config.data.max_response_length))
        metrics.update(measure.timing_metrics(timing_raw, tokens))
        if "actor/perf/max_memory_allocated_gb" in metrics:  # not while a critic warms up
            metrics["memory/peak_gb"] = metrics["actor/perf/max_memory_allocated_gb"]
        if "actor/kl_loss" in metrics:
            metrics["kl/penalty"] = self.beta * metrics["actor/kl_loss"]
        if self.recorder is not None:
            columns = measure.samples_columns(sampled, self.global_steps, self._row_of(), self.tokenizer.decode)
            self.recorder.write_samples(self.global_steps, columns)

    def _val_metrics_update(self, data_sources, sample_uids, reward_extra_infos_dict, sample_turns, **expected) -> dict:
        counts = expected["expected_acc_counts"]
        return measure.evaluation_metrics(data_sources, sample_uids, reward_extra_infos_dict, counts)

    def _save_checkpoint(self) -> None:
        if self.recorder is not None and not self.recorder.wants_checkpoint(self.global_steps):
            return
        super()._save_checkpoint()
        if self.recorder is not None:
            self.recorder.checkpoint_saved(self.global_steps)

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.global_steps:
            self.config.trainer.val_before_train = False  # that line was written by the attempt that started at 0
        if self.recorder is not None:
            self.recorder.resume_at(self.global_steps)


def prepare(config: DictConfig, kl: KLSpec) -> None:
    """Complete verl's settings with what every arm needs, and refuse what would work against the KL block.

    Raises:
        ValueError: verl's own KL is on, or the advantage estimator cannot carry KL in the reward.
    """
    actor, ref, rollout = (config.actor_rollout_ref[part] for part in ("actor", "ref", "rollout"))
    if config.algorithm.use_kl_in_reward or (actor.use_kl_loss and actor.kl_loss_coef != 0):
        raise ValueError(
            "verl's own KL is on (algorithm.use_kl_in_reward, or actor.use_kl_loss with a coefficient) beside a "
            f"{KL_VARIABLE} block: two KL terms would be followed. Switch verl's off, or unset {KL_VARIABLE}."
        )
    if kl.placement == "reward" and config.algorithm.adv_estimator not in REWARD_CARRIERS:
        raise ValueError(
            f"kl.placement=reward with algorithm.adv_estimator={config.algorithm.adv_estimator}: KL is charged against "
            f"a group's other responses. Use one of {sorted(REWARD_CARRIERS)}, or kl.placement=loss."
        )
    with open_dict(config):
        actor.use_kl_loss, actor.kl_loss_coef = True, 0.0  # verl loads the reference only so; our loss skips its term
        rollout.calculate_log_probs = True  # the mismatch between sampler and trainer is measured in every arm
        if ref.log_prob_micro_batch_size_per_gpu is None:  # a script without KL says nothing about the reference
            ref.log_prob_micro_batch_size_per_gpu = rollout.log_prob_micro_batch_size_per_gpu
        if _is_verls_own_loop(rollout):
            rollout.agent.agent_loop_manager_class = sampling.MANAGER
            rollout.agent.agent_loop_config_path = str(sampling.AGENT_CONFIG)
            rollout.agent.default_agent_loop = sampling.AGENT_NAME


def _is_verls_own_loop(rollout: DictConfig) -> bool:
    """Whether sampling is verl's single-turn loop on vLLM: the one that can be seeded without knowing a user's code."""
    agent = rollout.agent
    own = agent.get("agent_loop_manager_class") or agent.agent_loop_config_path
    return rollout.name == "vllm" and not own and agent.default_agent_loop == VERLS_LOOP


VERLS_LOOP = "single_turn_agent"
REWARD_CARRIERS = {"rloo", "rloo_vectorized", "grpo", "grpo_vectorized", "klreg_rloo", "klreg_grpo", "klreg_dr_grpo"}
"""Group-relative estimators whose advantage is one number per response."""


def charge_kl(batch: KVBatchMeta, kl: KLSpec, beta: float) -> KVBatchMeta:
    """Subtract beta times the response's KL charge (against its siblings') from the stored advantages."""
    fields = [names.GROUP, names.RESPONSE_MASK, names.OLD_LOGPROBS, names.REF_LOGPROBS, names.ADVANTAGES]
    data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
    nested_mask = data[names.RESPONSE_MASK]
    old, ref, task, mask = (
        torch.nested.to_padded_tensor(data[name], 0.0)
        for name in (names.OLD_LOGPROBS, names.REF_LOGPROBS, names.ADVANTAGES, names.RESPONSE_MASK)
    )
    groups = group_ids(rows.as_list(data[names.GROUP]))
    penalty = penalties.reward_penalty(kl.estimator, old, ref, mask.bool(), groups)
    advantages = response_to_nested(penalties.penalized_advantages(task, penalty, beta=beta) * mask, nested_mask)
    stored = TensorDict({names.ADVANTAGES: advantages, names.RETURNS: advantages}, batch_size=len(batch))
    return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=stored)


def active_line(config: DictConfig, kl: KLSpec) -> str:
    """What is active in this run and whose code computes it, in one line of the log."""
    advantage = config.algorithm.adv_estimator
    computes = "klreg_verl.core.advantages" if str(advantage).startswith(names.ADVANTAGE_PREFIX) else "verl"
    term = {"none": "none (measured only)", "reward": "core.penalties.reward_penalty", "loss": "verl_hooks.loss"}
    return (
        f"[klreg] KL placement={kl.placement} estimator={kl.estimator} follows={kl.follows} beta={kl.beta} "
        f"computed by {term[kl.placement]} | advantage={advantage} computed by {computes} "
        f"| policy loss {config.actor_rollout_ref.actor.policy_loss.loss_mode} and its aggregation "
        f"{config.actor_rollout_ref.actor.loss_agg_mode} by verl"
    )
