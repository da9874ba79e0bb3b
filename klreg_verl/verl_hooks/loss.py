"""The actor's loss: verl's ppo_loss plus, for placement `loss`, beta times our KL term.

verl has no seam for a KL term of one's own (a registered policy loss never sees the reference), so this function is
shipped to the workers by `set_loss_fn`. The KL formula is core/penalties.py's, the reduction is verl's agg_loss.
"""

from __future__ import annotations

from typing import Any

from tensordict import TensorDict
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss
from verl.utils.metric import AggregationType, Metric
from verl.workers.config import ActorConfig
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import no_padding_2_padding

from klreg_verl.core.penalties import kl_loss_per_token
from klreg_verl.experiment.recipe import KLSpec
from klreg_verl.verl_hooks import names


def actor_loss(
    model_output: dict[str, Tensor],
    data: TensorDict,
    dp_group: Any = None,
    *,
    config: ActorConfig,
    kl: KLSpec,
    beta: float,
) -> tuple[Tensor, dict[str, Any]]:
    """One micro-batch's share of the mini-batch's loss.

    Args:
        model_output: verl's, with the log-probabilities of the tokens under the policy being updated.
        data: verl's micro-batch: masks, old and reference log-probabilities, advantages, and the global batch's size.
        config: verl's actor settings; its own KL loss must be off (`use_kl_loss=False`).
        kl: the arm's KL block.
        beta: coefficient, in reward units per nat.

    Returns:
        The loss () and metrics whose sum over micro-batches and workers is the mini-batch's value.
    """
    loss, metrics = ppo_loss(config=config, model_output=model_output, data=data, dp_group=dp_group)
    if kl.placement != "loss":
        return loss, metrics
    term = kl_loss(model_output, data, config=config, kl=kl)
    metrics["kl_loss"] = Metric(value=term.detach(), aggregation=AggregationType.SUM)
    return loss + beta * term, metrics


def kl_loss(model_output: dict[str, Tensor], data: TensorDict, *, config: ActorConfig, kl: KLSpec) -> Tensor:
    """The aggregated KL term (), in nats as its aggregation counts them; nothing under the mask reaches it."""
    logprobs = no_padding_2_padding(model_output[names.LOGPROBS], data)
    fields = data.select(names.RESPONSE_MASK, names.REF_LOGPROBS).to_padded_tensor()
    mask = fields[names.RESPONSE_MASK].bool()
    return agg_loss(
        loss_mat=kl_loss_per_token(kl.estimator, logprobs, fields[names.REF_LOGPROBS], mask),
        loss_mask=mask,
        loss_agg_mode=kl.aggregation or config.loss_agg_mode,
        **config.global_batch_info,
    )
