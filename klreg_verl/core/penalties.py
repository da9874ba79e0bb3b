"""The two places where the KL to the reference enters the objective.

In the reward   A_i = A_task_i - beta * (S_i - mean of S over the siblings of i),  S_i = sum_t charge_t in nats.
                The whole response is charged, so the policy gradient carries the full gradient of the sequence KL. The
                siblings' mean is a leave-one-out baseline: no bias, less noise. It is added to finished advantages,
                outside any division by the group's std; inside, groups of equal rewards would lose beta altogether.
In the loss     loss = policy loss + beta * aggregate(l_t),  d l_t = coefficient_t * d logprobs_t.
                Each token is pulled on its own; how it steers later tokens is left out.

Sources: Tang and Munos (2025), arXiv:2506.09477; Shah et al. (2025), arXiv:2512.21852. Estimators: klreg_verl.core.kl.
"""

import torch
from torch import Tensor

from klreg_verl.core import kl
from klreg_verl.core.aggregation import leave_one_out_mean, masked, response_sum


@torch.no_grad()
def response_charge(estimator: str, logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """S, the charge of each whole response in nats: (B, T) -> (B,), without gradient."""
    return response_sum(kl.reward_charge(estimator, logprobs, ref_logprobs), response_mask)


@torch.no_grad()
def reward_penalty(
    estimator: str, logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, group_ids: Tensor
) -> Tensor:
    """S minus the mean of S over the siblings (0 if none), (B,) in nats: what `penalized_advantages` takes times beta.

    A fully masked row (padding) gets 0 and is nobody's sibling. Log-probs are those the responses were sampled with.
    """
    charge = response_charge(estimator, logprobs, ref_logprobs, response_mask)
    written = response_mask.any(dim=-1)
    return masked(charge - leave_one_out_mean(charge, group_ids, written), written)


def penalized_advantages(task_advantages: Tensor, penalty: Tensor, *, beta: float) -> Tensor:
    """Task advantages, (B,) or (B, T), minus beta times each response's penalty, (B,); beta per nat."""
    if task_advantages.dim() == 0 or penalty.shape != task_advantages.shape[:1]:
        raise ValueError(
            f"Advantages of shape {tuple(task_advantages.shape)} and a penalty of shape {tuple(penalty.shape)} do not "
            "match: responses would be charged for each other. The penalty must hold one number per response."
        )
    return task_advantages - beta * penalty.reshape(-1, *(1,) * (task_advantages.dim() - 1))


def kl_loss_per_token(
    estimator: str, logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor | None = None
) -> Tensor:
    """The KL loss at each token, (B, T) in nats, before beta and before aggregation over tokens.

    Its value is `kl.value`; its gradient is `kl.coefficient` times the gradient of `logprobs` (straight-through), so
    that what is logged and what is followed are chosen apart. Where the coefficient overflows to inf, the value is NaN.
    With a bool `response_mask`, masked tokens give 0 and pass no gradient even where an input is NaN or inf; without
    one, 0 * NaN makes such a gradient NaN although the aggregation masks the value.
    """
    if response_mask is not None:
        logprobs, ref_logprobs = masked(logprobs, response_mask), masked(ref_logprobs, response_mask)
    fixed = logprobs.detach()
    value = kl.value(estimator, fixed, ref_logprobs.detach())
    coefficient = kl.coefficient(estimator, fixed, ref_logprobs.detach())
    return value + coefficient * (logprobs - fixed)
