"""One training batch in our names: verl's TransferQueue fields as padded tensors, synthetic padding rows left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transfer_queue as tq
from torch import Tensor
from transfer_queue import KVBatchMeta

from klreg_verl.verl_hooks import names
from klreg_verl.verl_hooks.advantages import group_ids

_PADDED = (
    names.RESPONSE_MASK,
    names.OLD_LOGPROBS,
    names.REF_LOGPROBS,
    names.ROLLOUT_LOGPROBS,
    names.ENTROPY,
    names.TOKEN_REWARDS,
    names.ADVANTAGES,
)
_LISTS = (names.PROMPTS, names.RESPONSES)
_OBJECTS = (names.GROUP, names.DATA_SOURCE, names.EXTRA_INFO, names.EXTRA_FIELDS)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The sampled responses of one step, before its update. Tensors (B, T) right-padded; lists have B entries."""

    response_mask: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    rollout_logprobs: Tensor
    entropy: Tensor
    token_rewards: Tensor
    advantages: Tensor
    """The task's, before any KL."""
    prompts: list[Tensor]
    responses: list[Tensor]
    keys: list[str]
    """verl's, to write something back."""
    groups: list[str]
    samples: list[int]
    data_sources: list[str]
    extra_info: list[dict[str, Any]]
    reward_extras: list[dict[str, Any]]

    @property
    def group_ids(self) -> Tensor:
        """(B,) int64."""
        return group_ids(self.groups)

    @property
    def scores(self) -> Tensor:
        """(B,) task reward of each response. verl puts it on the last token, which a tool's output may mask."""
        return self.token_rewards.sum(dim=-1)


def is_padding(batch: KVBatchMeta) -> list[bool]:
    """Which rows verl made up to fill the batch."""
    return [bool(tag.get("is_padding", False)) for tag in batch.tags]


def real_keys(batch: KVBatchMeta) -> list[str]:
    """verl's keys of the other rows."""
    return [key for key, padding in zip(batch.keys, is_padding(batch), strict=True) if not padding]


def fetch(batch: KVBatchMeta) -> Rows:
    """Read one batch back from the TransferQueue."""
    keys = real_keys(batch)
    data = tq.kv_batch_get(keys=keys, partition_id=batch.partition_id, select_fields=[*_PADDED, *_LISTS, *_OBJECTS])
    padded = {name: torch.nested.to_padded_tensor(data[name], 0.0) for name in _PADDED}
    extra_fields = _objects(data, names.EXTRA_FIELDS, len(keys))
    return Rows(
        response_mask=padded[names.RESPONSE_MASK].bool(),
        old_logprobs=padded[names.OLD_LOGPROBS],
        ref_logprobs=padded[names.REF_LOGPROBS],
        rollout_logprobs=padded[names.ROLLOUT_LOGPROBS],
        entropy=padded[names.ENTROPY],
        token_rewards=padded[names.TOKEN_REWARDS],
        advantages=padded[names.ADVANTAGES],
        prompts=list(data[names.PROMPTS].unbind()),
        responses=list(data[names.RESPONSES].unbind()),
        keys=keys,
        groups=[str(group) for group in _objects(data, names.GROUP, len(keys))],
        samples=[int(key.rsplit("_", 2)[1]) for key in keys],
        data_sources=[str(source) for source in _objects(data, names.DATA_SOURCE, len(keys))],
        extra_info=[dict(info or {}) for info in _objects(data, names.EXTRA_INFO, len(keys))],
        reward_extras=[dict((fields or {}).get(names.REWARD_EXTRAS) or {}) for fields in extra_fields],
    )


def _objects(data: Any, name: str, count: int) -> list[Any]:
    """A non-tensor column as a list; None where verl stored none (a user's parquet may lack it)."""
    column = data.get(name, None)
    return [None] * count if column is None else as_list(column)


def as_list(column: Any) -> list[Any]:
    """A non-tensor column; TransferQueue hands out arrays, NonTensorStacks or lists of its own."""
    return list(column.tolist() if hasattr(column, "tolist") else column)
