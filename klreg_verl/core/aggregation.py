"""Reductions over tokens, responses and groups, written once.

Values have the shape (B, T) and the mask is bool: True on the tokens that count. A masked reduction never reads what is
under the mask (torch.where, not multiplication), so NaN and inf there are inert.
"""

import torch
from torch import Tensor


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """`values` with exact zeros where `mask` is False; both of one shape.

    Raises ValueError when the mask is not bool or its shape differs: broadcasting would count tokens twice.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"The mask has dtype {mask.dtype}, which does not say what is masked. Pass mask.bool().")
    if values.shape != mask.shape:
        raise ValueError(f"Values of shape {tuple(values.shape)} and a mask of shape {tuple(mask.shape)} do not match.")
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of the unmasked values, (B, T) -> ()."""
    return masked(values, mask).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the unmasked values, (B, T) -> (). Of nothing it is NaN: a zero would look like a measurement."""
    return masked_sum(values, mask) / mask.sum()


def response_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over the tokens of each response, (B, T) -> (B,); 0 for a fully masked row."""
    return masked(values, mask).sum(dim=-1)


def group_sum(values: Tensor, group_ids: Tensor) -> Tensor:
    """Sum of `values` over each row's group, given back to every row: (B,), (B,) -> (B,).

    Group ids are any integers, in any order; one sort, no loop over groups.
    """
    check_groups(values, group_ids)
    _, group = torch.unique(group_ids, return_inverse=True)
    totals = values.new_zeros(values.shape).index_add(0, group, values)
    return totals[group]


AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
"""verl's names."""


def token_weights(
    aggregation: str, mask: Tensor, *, tokens: float, responses: float = 1.0, scale: float | None = None
) -> Tensor:
    """The factor on each token's loss, (B, T) float64: verl's agg_loss in formulas.

    token-mean divides by `tokens`; the others by `responses`, and then by nothing, the response's own length, or
    `scale` (norm; None: the width T, as verl does without loss_scale_factor).

    Args:
        aggregation: one of AGGREGATIONS.
        mask: (B, T) bool.
        tokens: unmasked tokens of the whole batch that the loss is a mean over; or per response, with `responses` 1.
        responses: of the same batch, those with an unmasked token.
    """
    length = mask.sum(dim=-1, keepdim=True).clamp(min=1).double()
    divisor = {
        "token-mean": torch.full_like(length, tokens),
        "seq-mean-token-sum": torch.full_like(length, responses),
        "seq-mean-token-mean": responses * length,
        "seq-mean-token-sum-norm": torch.full_like(length, responses * (scale or mask.shape[-1])),
    }[aggregation]
    return mask / divisor


def leave_one_out_mean(values: Tensor, group_ids: Tensor, counts: Tensor | None = None) -> Tensor:
    """Mean of `values` over the other rows of the same group, (B,) -> (B,); 0 where there are none.

    `counts`, (B,) bool, leaves rows (padding) out of every mean. Float64 inside, so that the rows of a group of equal
    values get exactly that value to the last bit of float32.
    """
    counts = torch.ones_like(values, dtype=torch.bool) if counts is None else counts
    own = masked(values, counts).double()
    siblings = group_sum(counts.double(), group_ids) - counts.double()
    mean = (group_sum(own, group_ids) - own) / siblings.clamp(min=1.0)
    return torch.where(siblings > 0, mean, 0.0).to(values.dtype)


def leave_one_out_mean_per_position(values: Tensor, mask: Tensor, group_ids: Tensor) -> Tensor:
    """`leave_one_out_mean` at each position over the rows unmasked there, (B, T), (B, T), (B,) -> (B, T); 0 for none.

    What is under the mask is in nobody's mean; a masked position gets the mean of the others all the same.
    """
    check_groups(mask.any(dim=-1), group_ids)
    own, counts = masked(values, mask).double(), mask.double()
    rows, group = torch.unique(group_ids, return_inverse=True)
    totals, alive = (own.new_zeros(len(rows), own.shape[-1]).index_add(0, group, part) for part in (own, counts))
    siblings = alive[group] - counts
    mean = (totals[group] - own) / siblings.clamp(min=1.0)
    return torch.where(siblings > 0, mean, 0.0).to(values.dtype)


def check_groups(values: Tensor, group_ids: Tensor) -> None:
    """Raise ValueError unless both are (B,) and the ids are integers."""
    if values.dim() != 1 or values.shape != group_ids.shape:
        raise ValueError(
            f"One value and one group id per response are needed, shape (B,) both; got {tuple(values.shape)} and "
            f"{tuple(group_ids.shape)}. Sum token values over each response first."
        )
    if group_ids.is_floating_point() or group_ids.is_complex() or group_ids.dtype == torch.bool:
        raise ValueError(f"Group ids have dtype {group_ids.dtype}. Number the prompts with integers (int64).")
