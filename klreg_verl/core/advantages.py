"""Advantages of whole responses from the scores of their group (the responses to one prompt).

Everything is (B,) -> (B,) with integer group ids in any order, without a loop over groups. R is a score, n the
number of responses in its group:

    name      advantage                       group of one
    rloo      R - mean of the other scores    R
    grpo      (R - mean) / (std + eps)        R / (1 + eps)      std divides by n - 1
    dr_grpo   R - mean                        R

Equal to the functions of verl 0.9.1 within 1e-6, group of one included, save for one case: verl averages in float32, so
that a GRPO group of equal scores may divide a rounding error by eps; ours sums in float64 and gives 0.

Sources: Ahmadian et al. (2024), arXiv:2402.14740 (RLOO); Shao et al. (2024), arXiv:2402.03300 (GRPO);
Liu et al. (2025), arXiv:2503.20783 (Dr. GRPO).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from klreg_verl.core.aggregation import check_groups, group_sum, leave_one_out_mean


def rloo(scores: Tensor, group_ids: Tensor) -> Tensor:
    """Score minus the mean score of the siblings: an unbiased baseline, since it does not see the response itself."""
    check_groups(scores, group_ids)
    return _real(scores) - leave_one_out_mean(_real(scores), group_ids)


def grpo(scores: Tensor, group_ids: Tensor, eps: float = 1e-6) -> Tensor:
    """Score centred and divided by the group's standard deviation; in units of that deviation, not of reward."""
    centred, size = _centred(scores, group_ids)
    variance = group_sum(centred.square(), group_ids) / (size - 1).clamp(min=1.0)
    std = torch.where(size > 1, variance.sqrt(), 1.0)
    return (centred / (std + eps)).to(_real(scores).dtype)


def dr_grpo(scores: Tensor, group_ids: Tensor) -> Tensor:
    """Score minus the mean of the whole group, not divided: (n - 1) / n of the RLOO advantage."""
    return _centred(scores, group_ids)[0].to(_real(scores).dtype)


_ADVANTAGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"rloo": rloo, "grpo": grpo, "dr_grpo": dr_grpo}


def names() -> tuple[str, ...]:
    """The names that `compute` knows."""
    return tuple(_ADVANTAGES)


def compute(name: str, scores: Tensor, group_ids: Tensor) -> Tensor:
    """The advantages called `name`, (B,); ValueError for a name that does not exist."""
    if name not in _ADVANTAGES:
        raise ValueError(f"There is no advantage estimator {name!r}. Known: {', '.join(names())}.")
    return _ADVANTAGES[name](scores, group_ids)


def _real(scores: Tensor) -> Tensor:
    """Scores may be counted in integers or booleans; advantages are real."""
    return scores if scores.is_floating_point() else scores.float()


def _centred(scores: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(scores minus their group's mean, group sizes), float64; a group of one is not centred, as in verl."""
    check_groups(scores, group_ids)
    wide = scores.double()
    size = group_sum(torch.ones_like(wide), group_ids)
    mean = group_sum(wide, group_ids) / size
    return torch.where(size > 1, wide - mean, wide), size
