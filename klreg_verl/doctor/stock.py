"""The installed verl's own KL functions as a subject: what they do, not what their names promise.

Judged are verl.trainer.ppo.core_algos: kl_penalty and agg_loss for the KL in the loss (as in workers/utils/losses.py:
ppo_loss), kl_penalty and the RLOO or GRPO advantage for the KL in the reward (as in ray_trainer.py: apply_kl_penalty,
which takes beta * kld off the token rewards before the advantage is made). verl has no credit other than the whole
response, and no correction.
"""

import os
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from klreg_verl.core import exact
from klreg_verl.doctor.rules import Charge, Pull
from klreg_verl.doctor.subjects import BETA

NAMES = ("k1", "k2", "k3", "abs", "low_var_kl", "k1+", "k3+", "abs+")
"""verl has other names for the same lines: kl for k1, mse for k2, and k2+, mse+ for k2."""


class Stock:
    """verl's functions; `core_algos` is the module they are in."""

    tolerance = 1e-6
    """Its divisions add 1e-6 or 1e-8."""
    largest = 100
    """Its advantages loop over rows in Python."""
    estimators = NAMES
    in_loss_only = ()

    def __init__(self, core_algos: Any) -> None:
        self.algos = core_algos
        self.title = f"verl {version('verl')}"

    def check(self, estimator: str) -> None:
        """One of NAMES."""
        if estimator not in NAMES:
            raise ValueError(f"verl has no KL estimator {estimator!r} of its own. Judged: {', '.join(NAMES)}.")

    def row(self, estimator: str) -> str:
        """verl's k3 is clamped; a + changes the loss only."""
        plain = estimator.removesuffix("+")
        return "k3_verl" if plain in ("k3", "low_var_kl") else plain

    def options(self, placement: str, estimator: str) -> list[dict[str, Any]]:
        """RLOO, and in the reward GRPO with its division by std."""
        return [{}] if placement == "loss" else [{}, {"normalization": "std"}]

    def value(self, estimator: str, logits: Tensor, ref_logits: Tensor, tokens: Tensor, cap: float | None) -> Tensor:
        """kl_penalty, which is what verl logs."""
        return self._kl_penalty(estimator, exact.of_tokens(logits, tokens), exact.of_tokens(ref_logits, tokens))

    def loss(
        self, pull: Pull, logits: Tensor, ref_logits: Tensor, tokens: Tensor, mask: Tensor, old_logprobs: Tensor
    ) -> Tensor:
        """kl_penalty, back-propagated."""
        return self._kl_penalty(pull.estimator, exact.of_tokens(logits, tokens), exact.of_tokens(ref_logits, tokens))

    def penalty(
        self, charge: Charge, old_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, groups: Tensor, scores: Tensor
    ) -> Tensor:
        """What the KL changes in verl's RLOO advantage, or in its GRPO advantage divided by std."""
        charged = self._kl_penalty(charge.estimator, old_logprobs, ref_logprobs) * mask
        last = mask & (mask.cumsum(dim=-1) == mask.sum(dim=-1, keepdim=True))
        task, index = scores.unsqueeze(-1) * last, groups.numpy().astype(object)
        if charge.normalization == "none":
            return -self.algos.compute_rloo_outcome_advantage(-charged, mask, index)[0]
        normalized = self.algos.compute_grpo_outcome_advantage
        without, with_kl = (normalized(rewards, mask, index)[0] for rewards in (task, task - BETA * charged))
        return (without - with_kl) / BETA

    def token_weights(self, aggregation: str, mask: Tensor, mean_tokens: float) -> Tensor:
        """The derivative of agg_loss by each token's loss, for one response of a large global batch."""
        losses = torch.zeros(mask.shape, dtype=torch.float64, requires_grad=True)
        total = self.algos.agg_loss(
            loss_mat=losses,
            loss_mask=mask,
            loss_agg_mode=aggregation,
            batch_num_tokens=mean_tokens,
            global_batch_size=1,
            loss_scale_factor=mask.shape[-1],
        )
        return torch.autograd.grad(total, losses)[0]

    def _kl_penalty(self, name: str, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return self.algos.kl_penalty(logprobs, ref_logprobs, name)


def installed() -> Stock:
    """The installed verl. ImportError without one.

    Its plugins, ours among them, are left out: they might put other functions in the place of these.
    """
    before = os.environ.get("VERL_USE_EXTERNAL_PLUGINS")
    os.environ["VERL_USE_EXTERNAL_PLUGINS"] = "none"
    try:
        from verl.trainer.ppo import core_algos
    finally:
        if before is None:
            del os.environ["VERL_USE_EXTERNAL_PLUGINS"]
        else:
            os.environ["VERL_USE_EXTERNAL_PLUGINS"] = before
    return Stock(core_algos)
