"""Divergences of next-token distributions over the whole vocabulary, from logits: exact, without sampling the token.

Logits of policy and reference, (..., V), at the same temperature, give one number per position, (...), in nats. Write
z for the policy's logits, p = softmax(z), q for the reference's probabilities, D for the result.

    full_reverse   KL(pi || pi_ref) = sum_v p log(p / q)    d D / d z_v = p_v (log(p_v / q_v) - D)
    full_forward   KL(pi_ref || pi) = sum_v q log(q / p)    d D / d z_v = p_v - q_v
    topk           either of them, after all tokens but k are merged into one: a lower bound, never negative

Gradients flow to the policy's logits only; the reference is fixed. Half precision is computed in float32. Tokens that
neither model can produce (logits of -inf) are inert. Memory is a few times that of the logits.

Sources: Cover and Thomas, Elements of Information Theory, section 2.3 (KL) and theorem 2.7.1, the log-sum inequality
(merging tokens cannot raise a KL, so `topk` is a lower bound).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

Direction = Literal["reverse", "forward"]
Divergence = Callable[[Tensor, Tensor], Tensor]

NAMES = ("full_reverse", "full_forward", "topk_reverse", "topk_forward")
TOP_K = 64
"""Tokens that topk keeps apart where nothing is said."""


def of_tokens(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities of the tokens, (..., V), (...) -> (...)."""
    return logits.log_softmax(dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def divergence(name: str, *, k: int | None = None) -> Divergence:
    """The function of one of NAMES, logits and reference logits -> nats; `k` is for topk. ValueError for another."""
    if name not in NAMES:
        raise ValueError(f"There is no exact KL {name!r}. Known: {', '.join(NAMES)}.")
    kind, _, direction = name.partition("_")
    if kind == "full":
        return _FULL[direction]
    return partial(topk, k=TOP_K if k is None else k, direction=direction)  # type: ignore[arg-type]


def full_reverse(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(pi || pi_ref) at each position, (..., V) -> (...) in nats; inf where the reference excludes a token of pi."""
    return _Reverse.apply(*_wide(logits, ref_logits))


def full_forward(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(pi_ref || pi) at each position, (..., V) -> (...) in nats; inf where pi excludes a token of the reference."""
    return _Forward.apply(*_wide(logits, ref_logits))


def topk(logits: Tensor, ref_logits: Tensor, k: int, direction: Direction) -> Tensor:
    """The KL between k tokens and one bucket for all others, (..., V) -> (...) in nats: at most the full one.

    The k most likely tokens of the first argument of the KL: of pi for "reverse", of pi_ref for "forward". Without the
    bucket the sum could be negative, and renormalizing the k would make it 0 for k = 1. From k = V on it is exact.
    """
    if direction not in _FULL:
        raise ValueError(f"There is no KL direction {direction!r}. Known directions: {', '.join(_FULL)}.")
    if k < 1:
        raise ValueError(f"The {k} most likely tokens say nothing. Give k >= 1.")
    policy, reference = _wide(logits, ref_logits)
    if k < policy.shape[-1]:
        chosen = (policy if direction == "reverse" else reference).detach().topk(k, dim=-1).indices
        policy, reference = _with_tail(policy, chosen), _with_tail(reference, chosen)
    return _FULL[direction](policy, reference)


class _Reverse(torch.autograd.Function):
    """KL(softmax(logits) || softmax(ref_logits)); autograd would keep more tensors and make NaN of 0 * log 0."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ref_logits: Tensor) -> Tensor:
        """(..., V), (..., V) -> (...)."""
        logprobs, ref_logprobs = logits.log_softmax(dim=-1), ref_logits.log_softmax(dim=-1)
        divergence = _kl(logprobs, ref_logprobs)
        ctx.save_for_backward(logprobs, ref_logprobs, divergence)
        return divergence

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        """p (log(p / q) - D) for the policy, nothing for the reference."""
        logprobs, ref_logprobs, divergence = ctx.saved_tensors
        pull = logprobs.exp() * (_log_ratio(logprobs, ref_logprobs) - divergence.unsqueeze(-1))
        return upstream.unsqueeze(-1) * pull, None


class _Forward(torch.autograd.Function):
    """KL(softmax(ref_logits) || softmax(logits))."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ref_logits: Tensor) -> Tensor:
        """(..., V), (..., V) -> (...)."""
        logprobs, ref_logprobs = logits.log_softmax(dim=-1), ref_logits.log_softmax(dim=-1)
        ctx.save_for_backward(logprobs, ref_logprobs)
        return _kl(ref_logprobs, logprobs)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        """p - q for the policy, nothing for the reference."""
        logprobs, ref_logprobs = ctx.saved_tensors
        return upstream.unsqueeze(-1) * (logprobs.exp() - ref_logprobs.exp()), None


_FULL = {"reverse": full_reverse, "forward": full_forward}


def _wide(logits: Tensor, ref_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32 or wider, the reference without a gradient."""
    if logits.shape != ref_logits.shape:
        raise ValueError(
            f"Policy logits have shape {tuple(logits.shape)}, reference logits {tuple(ref_logits.shape)}. Both must be "
            "over the same positions and the same vocabulary."
        )
    wide = torch.promote_types(torch.promote_types(logits.dtype, ref_logits.dtype), torch.float32)
    return logits.to(wide), ref_logits.detach().to(wide)


def _with_tail(logits: Tensor, chosen: Tensor) -> Tensor:
    """Logits of the chosen tokens and, last, of the event that it is none of them: (..., V) -> (..., k + 1).

    The tail is summed up and not taken as 1 - the rest, which has no digits left where the k tokens are nearly all.
    """
    others = logits.scatter(-1, chosen, -torch.inf)
    # logsumexp of nothing is -inf and its gradient NaN
    nothing = (others == -torch.inf).all(dim=-1, keepdim=True)
    tail = others.masked_fill(nothing, 0.0).logsumexp(dim=-1, keepdim=True).masked_fill(nothing, -torch.inf)
    return torch.cat([logits.gather(-1, chosen), tail], dim=-1)


def _log_ratio(one: Tensor, other: Tensor) -> Tensor:
    """log(p / q); where p is 0 any finite number does, because it is multiplied by p."""
    return torch.where(one == -torch.inf, -1.0, one - other)


def _kl(one: Tensor, other: Tensor) -> Tensor:
    """sum of p log(p / q) over the last dimension, from log-probabilities, as sum of p log(p / q) - p + q >= 0.

    No term is negative, so that nearly equal distributions keep their digits: an error of the normalizations, which
    would enter p log(p / q) at first order, enters at second. `near` computes p (exp(-d) - 1 + d) where d is small,
    `far` does not overflow where it is large.
    """
    p, d = one.exp(), _log_ratio(one, other)
    near = p * (torch.expm1(-d) + d)
    far = other.exp() - p + p * d
    return torch.where(d.abs() < 1, near, far).sum(dim=-1).clamp(min=0)
