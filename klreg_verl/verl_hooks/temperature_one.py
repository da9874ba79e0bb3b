"""Log-probs of policy and reference at temperature 1, where training has another: one more pass through each."""

from __future__ import annotations

from typing import Any

import torch
import transfer_queue as tq
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.workers.utils.padding import response_from_nested

from klreg_verl.core.metrics import kl_metrics
from klreg_verl.verl_hooks import names, rows
from klreg_verl.verl_hooks.measure import is_valid
from klreg_verl.verl_hooks.rows import Rows


def logprobs(trainer: Any, batch: KVBatchMeta) -> tuple[Tensor, Tensor]:
    """(B, T) of the policy, and of the reference, over the batch without verl's padding rows."""
    before = dict(batch.extra_info)
    batch.extra_info |= {"calculate_entropy": False, "compute_loss": False, "temperature": 1.0}
    try:
        policy = _fetched(trainer.actor_rollout_wg.compute_log_prob, batch)
        if not trainer.ref_in_actor:
            return policy, _fetched(trainer.ref_policy_wg.compute_ref_log_prob, batch)
        batch.extra_info["no_lora_adapter"] = True  # the base model under the adapter is the reference
        return policy, _fetched(trainer.actor_rollout_wg.compute_log_prob, batch)
    finally:
        batch.extra_info.clear()
        batch.extra_info.update(before)


def _fetched(compute: Any, batch: KVBatchMeta) -> Tensor:
    """verl's worker call leaves its log-probs in the TransferQueue, over all of prompt and response."""
    assert len(compute(batch)) == len(batch)
    data = tq.kv_batch_get(
        keys=rows.real_keys(batch),
        partition_id=batch.partition_id,
        select_fields=[names.LOGPROBS, names.RESPONSE_MASK],
    )
    return torch.nested.to_padded_tensor(response_from_nested(data[names.LOGPROBS], data[names.RESPONSE_MASK]), 0.0)


def measured(sampled: Rows, policy: Tensor, reference: Tensor, *, graded: bool) -> dict[str, float]:
    """kl_ref_t1/*: every kl_ref/* of the batch, from these log-probs."""
    found = kl_metrics(policy, reference, sampled.response_mask, None if graded else is_valid(sampled))
    return {key.replace("kl_ref/", "kl_ref_t1/"): value for key, value in found.items()}
