"""KLRegWorker: verl's worker of actor, rollout and reference, whose reference can be another model, move, and give
logits to the loss.

verl names its worker class in the trainer's `_init_resource_pool_mgr`; `install` puts ours in its place right after.
The driver calls the registered methods through the worker group: each runs on every worker, and returns a list.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from omegaconf import open_dict
from tensordict import TensorDict
from verl.single_controller.base.decorator import Dispatch, register
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.tensordict_utils import assign_non_tensor
from verl.workers.config import HFModelConfig, TrainingWorkerConfig
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker

from klreg_verl.experiment.recipe import ReferenceSpec
from klreg_verl.verl_hooks import names, progress, transfer
from klreg_verl.verl_hooks.exact import ExactLoss
from klreg_verl.verl_hooks.reference import RECORD, Record, Reference, check_vocabulary
from klreg_verl.verl_hooks.reference_loss import Order, ReferenceLoss, Samples

STRATEGY = "fsdp2"
"""The only way of sharding whose shards we read and write."""


class ActorWorker(TrainingWorker):
    """verl's training worker, which hands the logits to an ExactLoss first, and may add rows of the reference's."""

    reference_loss: ReferenceLoss | None = None

    def train_batch(self, data: TensorDict) -> TensorDict:
        if isinstance(self.loss_fn, ExactLoss):
            assign_non_tensor(data, distillation_use_topk=True)
        with self.reference_loss.added() if self.reference_loss else nullcontext():
            return super().train_batch(data)


class ReferenceWorker(TrainingWorker):
    """verl's worker of the reference, from a model of its own if `path` is given."""

    def __init__(self, config: TrainingWorkerConfig, path: str | None = None) -> None:
        if path is not None:
            config = replace(config, model_config=model_at(path, config.model_config))
        super().__init__(config=config)
        self._weights: Reference | None = None

    @property
    def weights(self) -> Reference:
        """What moves, hashes and saves the weights; ValueError where they are not sharded by FSDP2."""
        if self.engine_config.strategy != STRATEGY:
            raise ValueError(
                f"The reference's weights are handled shard by shard, which needs the strategy {STRATEGY}, not "
                f"{self.engine_config.strategy}. Set actor_rollout_ref.actor.strategy={STRATEGY}."
            )
        if self._weights is None:
            self._weights = Reference(self.engine.module)
        return self._weights


class KLRegWorker(ActorRolloutRefWorker):
    """verl's worker with our reference. Its settings stand in its config under names.WORKER_SETTINGS."""

    actor_worker_cls = ActorWorker
    ref: ReferenceWorker | None

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def init_model(self) -> None:
        settings = self.config[names.WORKER_SETTINGS]
        self.ref_worker_cls = partial(ReferenceWorker, path=settings.path)
        super().init_model()
        if settings.moves:
            self.reference.check_can_follow(self.actor.engine.module)
        if self.actor is not None and self.rollout is not None:
            transfer.prepare(self.actor.engine, self.rollout)
        for part in filter(None, (self.actor, self.ref)):
            progress.count_batches(part.engine)
        progress.here().count(models=1)

    @property
    def reference(self) -> Reference:
        """The reference's weights on this worker."""
        if self.ref is None:
            raise ValueError("This worker has no reference of its own: verl keeps it elsewhere, or there is LoRA.")
        return self.ref.weights

    @property
    def _holds_reference(self) -> bool:
        return self.ref is not None and self.ref.engine_config.strategy == STRATEGY

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def set_loss_fn(self, loss_fn: Any) -> None:
        if isinstance(loss_fn, ExactLoss):
            if self.ref is None:
                raise ValueError("A KL over the vocabulary needs the reference beside the actor, and no LoRA.")
            loss_fn = loss_fn.bound_to(self.ref.engine, self.actor.engine)
        self.actor.set_loss_fn(loss_fn=loss_fn)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def hold_reference_samples(self, samples: Samples) -> None:
        """Before the first update of the arm of reference_samples.py: all that was drawn."""
        self.actor.reference_loss = ReferenceLoss(samples, self.actor.engine)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def follow_reference_samples(self, order: Order, beta: float) -> None:
        """Before a step's updates: which of the samples they take."""
        self.actor.reference_loss.follow(order, beta)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def move_reference(self, step: int, reset: bool, ema: float | None) -> dict[str, float]:
        """After update `step`: reference <- policy if `reset`, else ema * reference + (1 - ema) * policy."""
        if reset == (ema is not None):
            raise ValueError(f"move_reference(reset={reset}, ema={ema}): exactly one of the two rules moves it.")
        return self.reference.move(self.actor.engine.module, step, ema=ema)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def reference_hash(self) -> str | None:
        """`reference.weights_hash`, the same for any number of workers; None where FSDP2 does not hold the weights."""
        return self.reference.hash() if self._holds_reference else None

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save_reference(self, folder: str) -> Record | None:
        """Write the reference's record, and its weights if it moved, into `folder`; nothing where there is no hash."""
        return self.reference.save(Path(folder)) if self._holds_reference else None

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def load_reference(self, folder: str) -> Record:
        """Restore what `save_reference` wrote; ValueError if that is not the reference that results."""
        return self.reference.load(Path(folder))


def model_at(path: str, policy: HFModelConfig) -> HFModelConfig:
    """The policy's model settings with another checkpoint.

    Raises:
        ValueError: LoRA (verl's reference is the base model under the adapter then), no tokenizer, another vocabulary.
    """
    if policy.lora_rank > 0 or policy.lora_adapter_path is not None or policy.lora.get("rank", 0) > 0:
        raise ValueError(
            f"reference.path={path} with LoRA: verl's reference is the base model under the adapter. Drop one of them."
        )
    try:
        model = replace(policy, path=path, hf_config_path=None, tokenizer_path=None)
    except (OSError, ValueError) as error:
        raise ValueError(f"reference.path={path}: no model with its tokenizer can be loaded there: {error}") from error
    check_vocabulary(policy, model, path)
    return model


def install(trainer: Any, reference: ReferenceSpec) -> None:
    """Put KLRegWorker in the place of verl's worker, once `_init_resource_pool_mgr` has named that.

    Args:
        trainer: verl's trainer, with `role_worker_mapping` and `config`.
        reference: where the reference comes from, and whether it moves.

    Raises:
        ValueError: `reference.path` has another vocabulary, or LoRA.
        RuntimeError: verl's worker is not there to be replaced.
    """
    config = trainer.config.actor_rollout_ref
    if reference.path is not None:
        model_at(reference.path, omega_conf_to_dataclass(config.model))  # a worker's error would come later
    with open_dict(config):
        config[names.WORKER_SETTINGS] = {"path": reference.path, "moves": reference.moves}
    mapping = trainer.role_worker_mapping
    ours = [role for role, cls in mapping.items() if cls.__ray_actor_class__ is ActorRolloutRefWorker]
    if not ours:
        raise RuntimeError(f"verl's ActorRolloutRefWorker is not among the workers {mapping}: nothing to replace.")
    mapping.update({role: ray.remote(KLRegWorker) for role in ours})


def move(workers: Any, reference: ReferenceSpec, step: int) -> dict[str, float]:
    """What the reference does after update `step`, on all workers: metrics, empty where it stays."""
    due = reference.reset_every is not None and step % reference.reset_every == 0
    if not due and reference.ema is None:
        return {}
    return workers.move_reference(step=step, reset=due, ema=reference.ema)[0]


def restore(workers: Any, reference: ReferenceSpec, folder: Path) -> None:
    """The reference of a checkpoint that the run resumes from; ValueError if it has none and the reference moves."""
    if (folder / RECORD).is_file():
        workers.load_reference(str(folder))
    elif reference.moves:
        raise ValueError(f"{folder} holds no {RECORD}: the checkpoint cannot say where the reference had moved to.")
