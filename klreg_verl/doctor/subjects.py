"""Whose functions are judged: those of klreg_verl.core that train, or (klreg_verl.doctor.stock) those of verl.

A subject is handed the log-probabilities and logits of listed responses, and does with them what its trainer does.
Shapes: logits (N, T, V), everything else (N, T), with rows for responses or members of groups.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from klreg_verl.core import advantages, exact, kl, penalties
from klreg_verl.core.aggregation import token_weights
from klreg_verl.doctor.rules import REFERENCE_SAMPLES, Charge, Pull

TOP_K = 1
"""Tokens that topk keeps apart here: more are nearer to the full divergence, and all but one are exact."""
BETA = 0.01
"""Where scores are normalized the gradient is not linear in beta, and is judged at this one."""


class Subject(Protocol):
    """What the doctor asks of a trainer's functions."""

    def __hash__(self) -> int:
        """Judgements are cached for each subject."""

    @property
    def title(self) -> str:
        """Whose functions they are."""

    @property
    def tolerance(self) -> float:
        """Relative error up to which two gradients count as equal."""

    @property
    def largest(self) -> int:
        """Groups of three are listed up to this number of them, groups of two beyond."""

    @property
    def estimators(self) -> tuple[str, ...]:
        """The names of estimators that both placements know."""

    @property
    def in_loss_only(self) -> tuple[str, ...]:
        """The names of those that only the loss knows."""

    def check(self, estimator: str) -> None:
        """ValueError where it has no estimator of that name."""

    def row(self, estimator: str) -> str:
        """What the estimator is called in klreg_verl.core.kl, for reasons."""

    def options(self, placement: str, estimator: str) -> list[dict[str, Any]]:
        """The settings of one estimator in one placement beside the aggregation, in fields of Rule; the usual first."""

    def value(self, estimator: str, logits: Tensor, ref_logits: Tensor, tokens: Tensor, cap: float | None) -> Tensor:
        """What is logged at each token, (N, T)."""

    def loss(
        self, pull: Pull, logits: Tensor, ref_logits: Tensor, tokens: Tensor, mask: Tensor, old_logprobs: Tensor
    ) -> Tensor:
        """What each token back-propagates into its logits, (N, T); what is under the mask is not read."""

    def penalty(
        self, charge: Charge, old_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, groups: Tensor, scores: Tensor
    ) -> Tensor:
        """What the KL takes off each token's advantage, (N, T), divided by beta; `scores`, (N,), are the task's."""

    def token_weights(self, aggregation: str, mask: Tensor, mean_tokens: float) -> Tensor:
        """The factor on each token's loss, (N, T), in a large batch of responses of `mean_tokens` tokens on average."""


class Ours:
    """The functions that klreg_verl trains with."""

    title = "klreg_verl"
    tolerance = 1e-9
    largest = 5000

    @property
    def estimators(self) -> tuple[str, ...]:
        """All of the table in klreg_verl.core.kl."""
        return kl.names()

    @property
    def in_loss_only(self) -> tuple[str, ...]:
        """The exact ones, which need the logits, and the one on the reference's own responses."""
        return (*exact.NAMES, REFERENCE_SAMPLES)

    def check(self, estimator: str) -> None:
        """Built-in, exact, or pkg.module:name."""
        if estimator not in self.in_loss_only:
            kl.estimator(estimator)

    def row(self, estimator: str) -> str:
        """The same."""
        return estimator

    def options(self, placement: str, estimator: str) -> list[dict[str, Any]]:
        """Every credit in the reward (and whole responses inside the normalization), every correction in the loss."""
        if estimator in self.in_loss_only:
            return [{}] if placement == "loss" else []
        corrected: list[dict[str, Any]] = [
            {"correction": correction}
            for correction in penalties.CORRECTIONS
            if correction != "importance" or _is_differentiable(estimator)
        ]
        credited: list[dict[str, Any]] = [{"credit": credit} for credit in penalties.CREDITS]
        credited.insert(1, {"credit": "sequence", "normalization": "std"})
        if placement == "both":
            return [credit | correction for credit in credited for correction in corrected]
        return credited if placement == "reward" else corrected

    def value(self, estimator: str, logits: Tensor, ref_logits: Tensor, tokens: Tensor, cap: float | None) -> Tensor:
        """kl.value, or the exact divergence."""
        if estimator in exact.NAMES:
            return exact.divergence(estimator, k=TOP_K)(logits, ref_logits)
        if estimator == REFERENCE_SAMPLES:
            return exact.of_tokens(ref_logits, tokens) - exact.of_tokens(logits, tokens)
        return kl.value(estimator, exact.of_tokens(logits, tokens), exact.of_tokens(ref_logits, tokens), cap=cap)

    def loss(
        self, pull: Pull, logits: Tensor, ref_logits: Tensor, tokens: Tensor, mask: Tensor, old_logprobs: Tensor
    ) -> Tensor:
        """penalties.kl_loss_per_token, or the exact divergence."""
        if pull.estimator in exact.NAMES:
            return exact.divergence(pull.estimator, k=TOP_K)(logits, ref_logits)
        return penalties.kl_loss_per_token(
            pull.estimator,
            exact.of_tokens(logits, tokens),
            exact.of_tokens(ref_logits, tokens),
            mask,
            old_logprobs=old_logprobs,
            correction=pull.correction,
            shaping=pull.shaping,
            cap=pull.cap,
        )

    def penalty(
        self, charge: Charge, old_logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, groups: Tensor, scores: Tensor
    ) -> Tensor:
        """penalties.reward_penalty; normalized: what charging the score changes in the GRPO advantage."""
        given = (charge.estimator, old_logprobs, ref_logprobs, mask)
        options: dict[str, Any] = {"shaping": charge.shaping, "cap": charge.cap}
        if charge.normalization == "none":
            return penalties.reward_penalty(*given, groups, credit=charge.credit, baseline=charge.baseline, **options)
        charges = penalties.response_charge(*given, **options)
        charged = penalties.normalized_advantages(scores, charges, groups, beta=BETA)
        taken_off = advantages.grpo(scores, groups) - charged
        return (taken_off / BETA).unsqueeze(-1) * mask

    def token_weights(self, aggregation: str, mask: Tensor, mean_tokens: float) -> Tensor:
        """core.aggregation.token_weights, since verl's agg_loss aggregates in training and the doctor is without it."""
        return token_weights(aggregation, mask, tokens=mean_tokens)


OURS = Ours()


def _is_differentiable(estimator: str) -> bool:
    """Whether the ratio times its value can be differentiated: a user's own value may not pass a gradient."""
    return kl.estimator(estimator).value(torch.zeros(1, 1, requires_grad=True)).requires_grad
