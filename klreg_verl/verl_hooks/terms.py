"""One KL block -> the calls of klreg_verl.core that it stands for; nothing is computed here."""

from __future__ import annotations

from torch import Tensor

from klreg_verl.core import controllers, exact, penalties, shaping
from klreg_verl.core.aggregation import response_sum
from klreg_verl.core.controllers import Controller
from klreg_verl.core.exact import Divergence
from klreg_verl.core.shaping import Shaping
from klreg_verl.experiment.recipe import KLSpec


def shaping_of(kl: KLSpec) -> Shaping:
    """What is done to the estimate before it acts."""
    return shaping.shaping(kl.shaping.kind, **kl.shaping.parameters)


def controller_of(kl: KLSpec) -> Controller:
    """What moves beta."""
    return controllers.controller(kl.controller.kind, **kl.controller.parameters)


def divergence_of(kl: KLSpec) -> Divergence:
    """The function over both models' logits that an exact estimator names."""
    return exact.divergence(str(kl.estimator), k=kl.top_k)


def token_charge(kl: KLSpec, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """What each token costs in the reward, (B, T) in nats, after shaping and before beta."""
    return penalties.token_charge(kl.estimator, logprobs, ref_logprobs, mask, shaping=shaping_of(kl), cap=kl.cap)


def response_charge(kl: KLSpec, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """The same of whole responses, (B,) in nats."""
    return response_sum(token_charge(kl, logprobs, ref_logprobs, mask), mask)


def reward_penalty(kl: KLSpec, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, group_ids: Tensor) -> Tensor:
    """What is taken off the advantages times beta, (B, T) in nats."""
    return penalties.reward_penalty(
        kl.estimator,
        logprobs,
        ref_logprobs,
        mask,
        group_ids,
        credit=kl.credit or "sequence",
        baseline=kl.baseline or "siblings",
        shaping=shaping_of(kl),
        cap=kl.cap,
    )


def loss_per_token(kl: KLSpec, logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """The KL loss at each token, (B, T) in nats, before beta and before aggregation."""
    return penalties.kl_loss_per_token(
        kl.estimator,
        logprobs,
        ref_logprobs,
        mask,
        old_logprobs=old_logprobs,
        correction=kl.correction or "none",
        shaping=shaping_of(kl),
        cap=kl.cap,
    )
