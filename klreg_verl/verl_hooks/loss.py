"""The actor's loss: verl's ppo_loss plus, where KL is placed in the loss, beta times our KL term.

verl has no seam for a KL term of one's own (a registered policy loss never sees the reference), so this function is
shipped to the workers by `set_loss_fn`. The KL formula is core/penalties.py's, the reduction is verl's agg_loss.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss
from verl.utils.metric import AggregationType, Metric
from verl.workers.config import ActorConfig
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import no_padding_2_padding

from klreg_verl.core.aggregation import masked
from klreg_verl.experiment.recipe import KLSpec
from klreg_verl.verl_hooks import names, terms


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
    metrics.update(exact_metrics(model_output, data))
    if not kl.in_loss:
        return loss, metrics
    term = kl_loss(model_output, data, config=config, kl=kl)
    metrics["kl_loss"] = Metric(value=term.detach(), aggregation=AggregationType.SUM)
    if kl.is_exact:  # its gradient goes through the logits, not the log-probs
        return loss + beta * term, metrics
    logprobs = model_output[names.LOGPROBS]
    for name, part in (("policy", loss), ("kl", beta * term)):
        metrics[f"{name}_gradient"] = Metric(value=squared_gradient(part, logprobs), aggregation=AggregationType.SUM)
    return loss + beta * term, metrics


def squared_gradient(part: Tensor, logprobs: Tensor) -> Tensor:
    """() squared norm of a part's gradient by the tokens' log-probs: it stops there and costs no pass of the model."""
    if not (part.requires_grad and logprobs.requires_grad):
        return part.new_zeros(())
    (gradient,) = torch.autograd.grad(part, logprobs, retain_graph=True, allow_unused=True)
    values = torch.zeros(()) if gradient is None else gradient.values() if gradient.is_nested else gradient
    return values.double().square().sum()


def kl_loss(model_output: dict[str, Tensor], data: TensorDict, *, config: ActorConfig, kl: KLSpec) -> Tensor:
    """The aggregated KL term (), in nats as its aggregation counts them; nothing under the mask reaches it."""
    fields = data.select(names.RESPONSE_MASK, names.REF_LOGPROBS, names.OLD_LOGPROBS).to_padded_tensor()
    mask = fields[names.RESPONSE_MASK].bool()
    return agg_loss(
        loss_mat=_per_token(model_output, data, kl, fields, mask),
        loss_mask=mask,
        loss_agg_mode=kl.aggregation or config.loss_agg_mode,
        **config.global_batch_info,
    )


def _per_token(
    model_output: dict[str, Tensor], data: TensorDict, kl: KLSpec, fields: TensorDict, mask: Tensor
) -> Tensor:
    if kl.is_exact:
        return masked(no_padding_2_padding(model_output[names.EXACT], data), mask)
    logprobs = no_padding_2_padding(model_output[names.LOGPROBS], data)
    return terms.loss_per_token(kl, logprobs, fields[names.REF_LOGPROBS], fields[names.OLD_LOGPROBS], mask)


def exact_metrics(model_output: dict[str, Tensor], data: TensorDict) -> dict[str, Any]:
    """Sum over the response's tokens of the exact reverse KL, and their number, where the logits were looked at."""
    if names.EXACT_REVERSE not in model_output:
        return {}
    mask = data.select(names.RESPONSE_MASK).to_padded_tensor()[names.RESPONSE_MASK].bool()
    exact = no_padding_2_padding(model_output[names.EXACT_REVERSE], data).detach()
    sums = {"exact_reverse": masked(exact, mask).double().sum(), "exact_tokens": mask.double().sum()}
    return {name: Metric(value=value, aggregation=AggregationType.SUM) for name, value in sums.items()}
