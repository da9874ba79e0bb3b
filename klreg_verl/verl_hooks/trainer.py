"""KLRegTrainer: verl's synchronous PPO trainer, with KL placed and measured as the KL block says.

One step, in verl's order, and what is ours in it:

    rollout (vLLM)            every request seeded                                       sampling.py
    old, reference log-probs  rows ordered by (prompt, sample) first                     _balance_batch
    advantages                core.advantages; KL in the reward is charged here          _compute_advantage
    actor update              verl's ppo_loss plus the KL term; then beta moves          loss.py, beta.py
    checkpoint                with beta; counts only with its metrics line written       recorder.py
    metrics                   measured on the batch as sampled, before the update        _compute_metrics

The class stands under verl's name "sync" (plugin.py), so `python -m verl.trainer.main_ppo` starts it, too.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transfer_queue as tq
from omegaconf import DictConfig
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.tracking import Tracking

from klreg_verl import doctor
from klreg_verl.core import penalties
from klreg_verl.core.aggregation import masked
from klreg_verl.experiment.recipe import KLSpec
from klreg_verl.verl_hooks import (
    checkpoints,
    commands,
    exact,
    measure,
    names,
    progress,
    reference,
    reference_samples,
    rows,
    stopping,
    temperature_one,
    terms,
    worker,
)
from klreg_verl.verl_hooks.beta import Beta
from klreg_verl.verl_hooks.headline import Headline
from klreg_verl.verl_hooks.loss import actor_loss
from klreg_verl.verl_hooks.plugin import RUN_VARIABLE
from klreg_verl.verl_hooks.recorder import Recorder
from klreg_verl.verl_hooks.rows import Rows
from klreg_verl.verl_hooks.watch import Watch

POLL_SECONDS = 0.05
"""verl's replay buffer looks every 2 s whether the responses are there; a tiny model's are there in less."""


class KLRegTrainer(PPOTrainerSync):
    """verl's "sync" trainer under one KL block (KLREG_KL), writing to one run folder (KLREG_RUN, optional)."""

    probed = False
    """Whether the loss that the workers have measures the exact KL."""

    def __init__(self, config: DictConfig) -> None:
        self.block = commands.read_block()
        self.kl = self.block.kl
        commands.check(config, self.block)
        self.beta, self.watch = Beta(self.kl), Watch(self.block.alarms)
        self.recorder = Recorder.from_environment()
        self.headline = Headline(self.recorder and self.recorder.folder)
        self.progress = progress.of_run(os.environ.get(RUN_VARIABLE), progress.TRAINER)
        self._begin("start", "reading the settings")
        said = [doctor.explain(self.kl, commands.objective_of(config)), *commands.unseeded(config)]
        commands.prepare(config, self.kl)
        super().__init__(config)
        self.replay_buffer.poll_interval = POLL_SECONDS
        print(active_line(config, self.kl), *said, sep="\n[klreg] ", flush=True)

    def _begin(self, phase: str, doing: str) -> None:
        """Write down what comes next: a run that stands still there is ended with these words."""
        self.progress.is_at(phase, doing, getattr(self, "global_steps", 0))

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
        self._begin("start", "sending the first weights to vLLM")
        super().on_init_end()
        self.reference_hash = self.actor_rollout_wg.reference_hash()[0]
        print(f"[klreg] reference hash at the start of this attempt: {self.reference_hash}", flush=True)
        self.send_loss()

    def send_loss(self) -> None:
        """Ship the actor's loss to every worker (milliseconds)."""
        self.probed = self.probing
        actor = omega_conf_to_dataclass(self.config.actor_rollout_ref.actor)
        object.__setattr__(actor, "use_kl_loss", False)  # ours is the only KL term, and NaN * 0 is not 0
        loss = partial(actor_loss, config=actor, kl=self.kl, beta=self.beta.now)
        self.actor_rollout_wg.set_loss_fn(exact.with_logits(loss, self.kl, probe=self.probing))

    @property
    def probing(self) -> bool:
        """Whether the exact KL is measured at this step."""
        return self.block.probes.is_due("exact_every", self.global_steps)

    def _init_resource_pool_mgr(self) -> None:
        self._begin("start", "loading the models and starting vLLM")
        super()._init_resource_pool_mgr()
        worker.install(self, self.block.reference)

    def on_train_begin(self) -> None:
        """What is drawn from the reference is drawn while it still is the policy."""
        super().on_train_begin()
        self._begin("rollout", "sampling from the reference")
        reference_samples.prepare(self)

    def on_step_begin(self) -> None:
        """The beta that the controller chose after the last update; in the loss it is shipped again."""
        self.watch.end_if_asked()
        super().on_step_begin()
        moved = self.beta.begin_step()
        if (moved and self.kl.in_loss) or self.probed != self.probing:
            self.send_loss()
        self._begin("rollout", "sampling")

    def on_sample_end(self) -> None:
        """verl's; what follows is the update."""
        self._begin("update", "computing log-probabilities")
        super().on_sample_end()

    def on_validate_begin(self) -> None:
        """verl's; what follows is sampling, too."""
        self._begin("rollout", "validating")
        super().on_validate_begin()

    def _compute_reward_colocate(self, *args: Any, **kwargs: Any) -> KVBatchMeta:
        """verl's, where the reward model takes turns with the sampler."""
        self._begin("reward", "asking the reward model")
        return super()._compute_reward_colocate(*args, **kwargs)

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

    def _compute_ref_log_prob(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        """verl's, and where asked both models' at temperature 1."""
        self._begin("update", "computing the reference's log-probabilities")
        batch = super()._compute_ref_log_prob(batch, metrics)
        due = self.block.probes.is_due("temperature_one_every", self.global_steps)
        self.at_one = temperature_one.logprobs(self, batch) if due else None
        return batch

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        """Task advantages through verl; then the reward placement's KL, outside any division by a group's std."""
        batch = super()._compute_advantage(batch, metrics)
        self.sampled, longest = rows.fetch(batch), self.config.data.max_response_length
        graded = self.headline.saw(measure.is_valid(self.sampled))
        self.measured = measure.measure(self.sampled, self.kl, self.beta.now, longest, graded=graded)
        if self.at_one is not None:
            self.measured |= temperature_one.measured(self.sampled, *self.at_one, graded=graded)
        if self.kl.in_reward:
            metrics.update(charge_kl(self.sampled, batch.partition_id, self.kl, self.beta.now))
        return batch

    def _update_actor(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        """verl's update; the checkpoint that may follow holds the beta of the next one."""
        self._begin("update", "updating the actor")
        reference_samples.begin_update(self)
        batch = super()._update_actor(batch, metrics)
        self.beta.updated(self.measured, len(self.sampled.samples), self.global_steps)
        metrics.update(worker.move(self.actor_rollout_wg, self.block.reference, self.global_steps))
        return batch

    def on_step_end(self) -> None:
        """verl's; after the last step a reference that was to stay must be the one that the run started with."""
        stopping.save_if_asked(self)
        self._begin("update", "sending the weights to vLLM")
        super().on_step_end()
        if self.global_steps >= self.total_training_steps and not self.block.reference.moves:
            reference.require_same(self.reference_hash, self.actor_rollout_wg.reference_hash()[0])

    def _compute_metrics(self, batch: KVBatchMeta, metrics: dict[str, Any], timing_raw: dict, *args, **kwargs) -> None:
        super()._compute_metrics(batch, metrics, timing_raw, *args, **kwargs)
        sampled = self.sampled
        tokens = sum(map(len, sampled.prompts)) + sum(map(len, sampled.responses))
        metrics.update(self.measured)
        metrics["kl/beta_effective"] = measure.effective_beta(sampled, self.beta.now, self.divides_by_std)
        metrics["kl/saturated"] = float(self.beta.state.saturated)
        metrics.update(measure.timing_metrics(timing_raw, tokens))
        metrics.update(measure.of_verls(metrics, self.kl, self.beta.now))
        metrics.update(reference_samples.logged(metrics, self.beta.now))
        metrics.update(self.watch.check(self.global_steps, metrics))
        if self.recorder is not None and self.recorder.wants_samples(self.global_steps):
            graded, decode = bool(self.headline.is_graded), self.tokenizer.decode
            columns = measure.samples_columns(sampled, self.global_steps, self._row_of(), decode, graded=graded)
            self.recorder.write_samples(self.global_steps, columns)

    @property
    def divides_by_std(self) -> bool:
        """Whether the task's scores are divided by their group's std, and the KL term is not."""
        algorithm = self.config.algorithm
        own = algorithm.adv_estimator == f"{names.ADVANTAGE_PREFIX}grpo"
        verls = algorithm.adv_estimator in ("grpo", "grpo_vectorized") and algorithm.norm_adv_by_std_in_grpo
        return bool(own or verls) and not self.kl.normalize_with_reward

    def _val_metrics_update(self, data_sources, sample_uids, reward_extra_infos_dict, sample_turns, **expected) -> dict:
        verls = super()._val_metrics_update(
            data_sources, sample_uids, reward_extra_infos_dict, sample_turns, **expected
        )
        validated = measure.Validated(
            data_sources=data_sources,
            uids=sample_uids,
            rewards=reward_extra_infos_dict,
            expected=expected["expected_acc_counts"],
        )
        found = measure.evaluation_metrics(validated, graded=self.headline.saw(validated.right()))
        if self.global_steps == 0:
            self.watch.begin(found)
        return measure.verls_evaluation(verls) | found

    def _save_checkpoint(self) -> None:
        if self.recorder is not None and not self.recorder.wants_checkpoint(self.global_steps):
            return
        self._begin("update", "saving a checkpoint")
        super()._save_checkpoint()
        self.beta.save(self._checkpoint_folder())
        if self.reference_hash is not None:
            print(f"[klreg] {self.actor_rollout_wg.save_reference(str(self._checkpoint_folder()))[0]}", flush=True)
        if self.recorder is not None:
            self.recorder.checkpoint_saved(self.global_steps)

    def _load_checkpoint(self) -> None:
        self._begin("start", "looking for a checkpoint")
        super()._load_checkpoint()
        if self.global_steps:
            folder = self._loaded_folder()
            self.beta.load(folder)
            worker.restore(self.actor_rollout_wg, self.block.reference, folder)
            self.config.trainer.val_before_train = False  # that line was written by the attempt that started at 0
        if self.recorder is not None:
            self.recorder.resume_at(self.global_steps)
            self.watch.resume(self.recorder.folder.read_metrics())

    def _loaded_folder(self) -> Path:
        """Where verl has just read the weights from."""
        trainer = self.config.trainer
        return Path(trainer.resume_from_path) if trainer.resume_mode == "resume_path" else self._checkpoint_folder()

    def _checkpoint_folder(self) -> Path:
        return checkpoints.step_folder(Path(self.config.trainer.default_local_dir), self.global_steps)


def charge_kl(sampled: Rows, partition_id: str, kl: KLSpec, beta: float) -> dict[str, float]:
    """Subtract beta times each token's charge (against its siblings') from the stored advantages; metrics of it."""
    charged = masked((_normalized if kl.normalize_with_reward else _beside)(sampled, kl, beta), sampled.response_mask)
    pairs = zip(charged, sampled.responses, strict=True)
    nested = torch.nested.as_nested_tensor([row[: len(tokens)] for row, tokens in pairs], layout=torch.jagged)
    stored = TensorDict({names.ADVANTAGES: nested, names.RETURNS: nested}, batch_size=len(sampled.keys))
    tq.kv_batch_put(keys=sampled.keys, partition_id=partition_id, fields=stored)
    return {"kl/advantage_share": measure.variance_share(sampled.advantages, charged, sampled.response_mask)}


def _beside(rows: Rows, kl: KLSpec, beta: float) -> Tensor:
    """(B, T): the task's advantages, minus beta times the penalty."""
    penalty = terms.reward_penalty(kl, rows.old_logprobs, rows.ref_logprobs, rows.response_mask, rows.group_ids)
    return penalties.penalized_advantages(rows.advantages, penalty, beta=beta)


def _normalized(rows: Rows, kl: KLSpec, beta: float) -> Tensor:
    """(B, T): GRPO on the charged scores."""
    charges = terms.response_charge(kl, rows.old_logprobs, rows.ref_logprobs, rows.response_mask)
    advantage = penalties.normalized_advantages(rows.scores, charges, rows.group_ids, beta=beta)
    return advantage[:, None].expand_as(rows.response_mask)


def active_line(config: DictConfig, kl: KLSpec) -> str:
    """What is active in this run and whose code computes it, in one line of the log."""
    advantage = config.algorithm.adv_estimator
    computes = "klreg_verl.core.advantages" if str(advantage).startswith(names.ADVANTAGE_PREFIX) else "verl"
    code = {
        "none": "none (measured only)",
        "reward": "core.penalties.reward_penalty",
        "loss": _loss_code(kl),
        "both": "core.penalties.reward_penalty and kl_loss_per_token",
    }
    return (
        f"[klreg] KL placement={kl.placement} estimator={kl.estimator} follows={kl.follows} beta={kl.beta} "
        f"{_details(kl)}computed by {code[kl.placement]} | advantage={advantage} computed by {computes} "
        f"| policy loss {config.actor_rollout_ref.actor.policy_loss.loss_mode} and its aggregation "
        f"{config.actor_rollout_ref.actor.loss_agg_mode} by verl"
    )


def _loss_code(kl: KLSpec) -> str:
    if kl.is_drawn:
        return "verl_hooks.reference_loss"
    return "core.exact" if kl.is_exact else "core.penalties.kl_loss_per_token"


def _details(kl: KLSpec) -> str:
    """What of the block is not as by default."""
    said = {name: getattr(kl, name) for name in ("credit", "baseline", "correction", "aggregation", "cap", "top_k")}
    said |= {"shaping": kl.shaping.kind, "controller": kl.controller.kind}
    return "".join(f"{name}={value} " for name, value in said.items() if value not in (None, "none", "fixed"))
