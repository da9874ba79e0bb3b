"""core.advantages under the signature of verl's advantage estimators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from klreg_verl.core import advantages
from klreg_verl.verl_hooks.names import ADVANTAGE_PREFIX


def group_ids(groups: Sequence[Any]) -> Tensor:
    """(B,) integers from 0 in order of appearance, equal where `groups` (any hashable, e.g. verl's uids) are equal."""
    numbers: dict[Any, int] = {}
    return torch.tensor([numbers.setdefault(group, len(numbers)) for group in groups], dtype=torch.int64)


def register(register_adv_est: Callable[[str], Callable[[Any], Any]]) -> None:
    """Register every estimator of core.advantages with verl as `klreg_<name>`."""
    for name in advantages.names():
        register_adv_est(ADVANTAGE_PREFIX + name)(_estimator(name))


def _estimator(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def estimate(token_level_rewards: Tensor, response_mask: Tensor, index: Any, **_: Any) -> tuple[Tensor, Tensor]:
        scores = token_level_rewards.sum(dim=-1)  # unmasked, as verl's own: the rewarded last token may be a tool's
        per_response = advantages.compute(name, scores, group_ids(index))
        per_token = per_response.unsqueeze(-1) * response_mask
        return per_token, per_token

    return estimate
