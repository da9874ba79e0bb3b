"""Log-probabilities, entropy and both exact KLs straight from hidden states, in one pass over the vocabulary.

The logits hidden @ weight.T, (T, V), are the largest tensor of a training step: 2.5 GB for 4096 tokens of a vocabulary
of 151936 in float32, and the KL to a reference needs two of them and several more to differentiate it. Here they exist
for `chunk` tokens of the vocabulary at a time, (T, chunk). Write z, z' for the logits of policy and reference divided
by the temperature, p, q for their probabilities, L, L' for their log-normalizations. All is made of seven numbers per
token that add up over chunks (`_summary`), the means taken within the chunk and weighted by its share of the mass:

    log mass of p and of q        L = log sum exp z, L'
    mean of z under p             entropy          = L - E_p[z]
    mean of z - z' under p        KL(pi || pi_ref) = E_p[z - z'] - L + L'
    mean of z - z' under q        KL(pi_ref || pi) = L - L' - E_q[z - z']
    z and z' of the given token   log pi = z - L, log pi_ref = z' - L'

The backward computes each chunk's logits again and, with upstream gradients g of the outputs l (log pi), H (entropy),
R (reverse) and F (forward), which it learns only then, pulls on the policy's logits by

    p [g_R (log p - log q - R) - g_H (log p + H) + g_F - g_l] - g_F q + g_l [v = token].

That is six matrix products for forward and backward where autograd on whole logits has four. Where neither R nor F has
an upstream gradient the reference's logits are not computed again.

Sources: Milakov and Gimelshein (2018), arXiv:1805.02867 (normalization piece by piece); Wijmans et al. (2024),
arXiv:2411.09009 (log-probabilities without logits in memory); the gradients are those of klreg_verl.core.exact.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

Grad = Tensor | None


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of each token, (T,), in nats and float32 or wider; all but `ref_logprobs` are differentiable."""

    logprobs: Tensor
    """log pi of the given token."""
    ref_logprobs: Tensor
    """log pi_ref of the given token."""
    entropy: Tensor
    """Of the policy's distribution, not negative."""
    reverse: Tensor
    """KL(pi || pi_ref) over the whole vocabulary, not negative."""
    forward: Tensor
    """KL(pi_ref || pi) over the whole vocabulary, not negative."""


def logprob_statistics(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    chunk: int = 512,
    compiled: bool = False,
) -> Statistics:
    """Statistics of T tokens from the last hidden states and the output weights of policy and reference.

    hidden (T, H), weight (V, H), ref_hidden (T, H'), ref_weight (V, H'), tokens (T,) int64. Gradients flow to `hidden`
    and `weight`. Logits and sums are float32 (float64 if an input is); half precision goes into the products only.
    Memory beyond inputs and gradients is about ten float32 matrices of (T, chunk) and 56 bytes per token and chunk; a
    GPU with room wants a larger chunk. `compiled` hands the elementwise part of each chunk to torch.compile: for a GPU;
    the first call takes seconds. ValueError for what does not fit.
    """
    _check(hidden, weight, ref_hidden, ref_weight, tokens)
    settings = _Settings(temperature=temperature, chunk=chunk, compiled=compiled)
    with torch.autocast(hidden.device.type, enabled=False):  # it would round the logits to half precision
        logprobs, ref_logprobs, entropy, reverse, forward = _LogprobStatistics.apply(
            hidden, weight, ref_hidden.detach(), ref_weight.detach(), tokens, settings
        )
    return Statistics(logprobs=logprobs, ref_logprobs=ref_logprobs, entropy=entropy, reverse=reverse, forward=forward)


@dataclass(frozen=True, kw_only=True)
class _Settings:
    temperature: float
    chunk: int
    compiled: bool

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"A temperature of {self.temperature} divides no logits. Give a positive, finite one.")
        if self.chunk < 1:
            raise ValueError(f"Chunks of {self.chunk} tokens never end. Give a chunk of at least 1.")


class _LogprobStatistics(torch.autograd.Function):
    """The whole pass and its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        ref_hidden: Tensor,
        ref_weight: Tensor,
        tokens: Tensor,
        settings: _Settings,
    ) -> tuple[Tensor, ...]:
        """Five tensors of (T,): log pi, log pi_ref, entropy, reverse, forward."""
        summary, _ = _elementwise(settings.compiled)
        chunks = _chunks(len(weight), settings.chunk)
        parts = torch.empty(len(chunks), 7, len(tokens), dtype=torch.float64, device=tokens.device)
        for part, rows in zip(parts, chunks, strict=True):
            logits = _logits(hidden, weight[rows], settings.temperature)
            ref_logits = _logits(ref_hidden, ref_weight[rows], settings.temperature)
            part.copy_(summary(logits, ref_logits, tokens - rows.start))
        outputs, normalizations = _merged(parts, _wide(hidden, weight, ref_hidden, ref_weight))
        logprobs, ref_logprobs, entropy, reverse, forward = outputs
        ctx.save_for_backward(hidden, weight, ref_hidden, ref_weight, tokens, normalizations, entropy, reverse)
        ctx.settings = settings
        ctx.mark_non_differentiable(ref_logprobs)
        ctx.set_materialize_grads(False)
        return logprobs, ref_logprobs, entropy, reverse, forward

    @staticmethod
    def backward(ctx: Any, *upstream: Grad) -> tuple[Grad, ...]:
        """Gradients of `hidden` and `weight`; None for all else."""
        hidden, weight, ref_hidden, ref_weight, tokens, normalizations, entropy, reverse = ctx.saved_tensors
        settings = ctx.settings
        scales = _scales(upstream, entropy, reverse) / settings.temperature
        _, pull = _elementwise(settings.compiled)
        of_hidden = torch.zeros_like(hidden, dtype=entropy.dtype) if ctx.needs_input_grad[0] else None
        of_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        with_reference = upstream[3] is not None or upstream[4] is not None
        for rows in _chunks(len(weight), settings.chunk):
            logits = _logits(hidden, weight[rows], settings.temperature)
            ref_logits = _logits(ref_hidden, ref_weight[rows], settings.temperature) if with_reference else None
            of_logits = pull(logits, ref_logits, tokens - rows.start, normalizations, scales)
            if of_hidden is not None:
                _add_product(of_hidden, of_logits, weight[rows])
            if of_weight is not None:
                _write_product(of_weight[rows], of_logits.t(), hidden)
        return None if of_hidden is None else of_hidden.to(hidden.dtype), of_weight, None, None, None, None


def _summary(logits: Tensor, ref_logits: Tensor, tokens: Tensor) -> Tensor:
    """The seven numbers of one chunk, (T, C), (T, C) -> (7, T) float64; `tokens` count from the start of the chunk.

    Exponents are taken of differences to the chunk's largest logit, and so are the means, so that the float32 sums hold
    small numbers; the large parts are added in float64. Both logits are overwritten.
    """
    peak, ref_peak = logits.amax(dim=-1, keepdim=True), ref_logits.amax(dim=-1, keepdim=True)
    chosen, ref_chosen = _of_tokens(logits, tokens), _of_tokens(ref_logits, tokens)
    below, ref_below = logits.sub_(peak), ref_logits.sub_(ref_peak)
    mass, ref_mass = below.exp(), ref_below.exp()
    total, ref_total = mass.sum(dim=-1), ref_mass.sum(dim=-1)
    mean = (mass * below).sum(dim=-1) / total
    gap = below.sub_(ref_below)
    mean_gap, ref_mean_gap = (mass * gap).sum(dim=-1) / total, (ref_mass * gap).sum(dim=-1) / ref_total
    peak, ref_peak = peak.squeeze(-1).double(), ref_peak.squeeze(-1).double()
    between = peak - ref_peak
    return torch.stack(
        [
            peak + total.double().log(),
            ref_peak + ref_total.double().log(),
            peak + mean,
            between + mean_gap,
            between + ref_mean_gap,
            chosen,
            ref_chosen,
        ]
    )


def _merged(parts: Tensor, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Tensor]:
    """Summaries of all chunks, (N, 7, T) -> the five outputs, and the normalizations L and L' as (2, T, 1).

    What cannot be negative is not made so by rounding.
    """
    log_mass, ref_log_mass, mean, mean_gap, ref_mean_gap, chosen, ref_chosen = parts.unbind(dim=1)
    total, ref_total = log_mass.logsumexp(dim=0), ref_log_mass.logsumexp(dim=0)
    share, ref_share = (log_mass - total).exp(), (ref_log_mass - ref_total).exp()
    entropy = total - (share * mean).sum(dim=0)
    reverse = (share * mean_gap).sum(dim=0) - total + ref_total
    forward = total - ref_total - (ref_share * ref_mean_gap).sum(dim=0)
    signed = (chosen.sum(dim=0) - total, ref_chosen.sum(dim=0) - ref_total)
    outputs = (*signed, entropy.clamp(min=0), reverse.clamp(min=0), forward.clamp(min=0))
    return tuple(one.to(dtype) for one in outputs), torch.stack([total, ref_total]).to(dtype).unsqueeze(-1)


def _scales(upstream: tuple[Grad, ...], entropy: Tensor, reverse: Tensor) -> Tensor:
    """(g_l, g_H, g_R, g_F, g_F - g_l - g_R R - g_H H), the factors of the backward's formula, as (5, T, 1)."""
    of_logprobs, of_entropy, of_reverse, of_forward = (
        torch.zeros_like(entropy) if one is None else one for one in (upstream[0], *upstream[2:])
    )
    constant = of_forward - of_logprobs - of_reverse * reverse - of_entropy * entropy
    return torch.stack([of_logprobs, of_entropy, of_reverse, of_forward, constant]).unsqueeze(-1)


def _pull(logits: Tensor, ref_logits: Tensor | None, tokens: Tensor, normalizations: Tensor, scales: Tensor) -> Tensor:
    """The gradient of one chunk's logits, (T, C); without `ref_logits` those of log-probability and entropy alone."""
    of_logprobs, of_entropy, of_reverse, of_forward, constant = scales.unbind()
    logprobs = logits.sub_(normalizations[0])
    factor = constant - of_entropy * logprobs
    if ref_logits is None:
        gradient = factor.mul_(logprobs.exp())
    else:
        ref_logprobs = ref_logits.sub_(normalizations[1])
        factor += of_reverse * (logprobs - ref_logprobs)
        gradient = factor.mul_(logprobs.exp_()).sub_(ref_logprobs.exp_().mul_(of_forward))
    inside = _inside(tokens, gradient)
    return gradient.scatter_add_(
        1, _column(tokens, gradient), torch.where(inside, of_logprobs.squeeze(-1), 0.0).unsqueeze(-1)
    )


@cache
def _elementwise(compiled: bool) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """`_summary` and `_pull`, as they are or fused by torch.compile."""
    return (torch.compile(_summary), torch.compile(_pull)) if compiled else (_summary, _pull)


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """hidden @ weight.T / temperature, (T, H), (C, H) -> (T, C), float32 or wider."""
    logits = _product(hidden, weight.t())
    return logits if temperature == 1 else logits.div_(temperature)


def _product(one: Tensor, other: Tensor) -> Tensor:
    """one @ other with a float32 (or wider) result; on a GPU, half-precision factors are multiplied as such."""
    if other.is_cuda and other.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(one.to(other.dtype), other, out_dtype=torch.float32)
    wide = _wide(one, other)
    return one.to(wide) @ other.to(wide)


def _add_product(total: Tensor, one: Tensor, other: Tensor) -> None:
    """total += one @ other, without a temporary where all are of one type."""
    if total.dtype == one.dtype == other.dtype:
        total.addmm_(one, other)
    else:
        total += _product(one, other)


def _write_product(result: Tensor, one: Tensor, other: Tensor) -> None:
    """result[:] = one @ other, without a temporary where all are of one type."""
    if result.dtype == one.dtype == other.dtype:
        torch.mm(one, other, out=result)
    else:
        result.copy_(_product(one, other))


def _of_tokens(logits: Tensor, tokens: Tensor) -> Tensor:
    """The logit of each row's token, 0 where it is not in this chunk: (T, C), (T,) -> (T,)."""
    chosen = logits.gather(1, _column(tokens, logits)).squeeze(-1)
    return torch.where(_inside(tokens, logits), chosen, 0.0)


def _inside(tokens: Tensor, logits: Tensor) -> Tensor:
    return (tokens >= 0) & (tokens < logits.shape[1])


def _column(tokens: Tensor, logits: Tensor) -> Tensor:
    """An index that exists for every row, (T, 1)."""
    return tokens.clamp(0, logits.shape[1] - 1).unsqueeze(-1)


def _chunks(vocabulary: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, vocabulary)) for start in range(0, vocabulary, chunk)]


def _wide(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 if any tensor is."""
    return torch.float64 if any(one.dtype == torch.float64 for one in tensors) else torch.float32


def _check(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, tokens: Tensor) -> None:
    """Raise ValueError for shapes, types and token ids that do not belong together."""
    shapes = {"hidden": hidden, "weight": weight, "ref_hidden": ref_hidden, "ref_weight": ref_weight}
    given = ", ".join(f"{name} {tuple(one.shape)}" for name, one in {**shapes, "tokens": tokens}.items())
    if any(one.dim() != 2 for one in shapes.values()) or tokens.dim() != 1:
        raise ValueError(f"Hidden states (T, H), weights (V, H) and tokens (T,) are needed; got {given}.")
    if hidden.shape[1] != weight.shape[1] or ref_hidden.shape[1] != ref_weight.shape[1]:
        raise ValueError(f"Hidden states and weights must have the same width H; got {given}.")
    if len(weight) != len(ref_weight):
        raise ValueError(f"Policy and reference must have the same vocabulary; got {given}.")
    if not len(hidden) == len(ref_hidden) == len(tokens):
        raise ValueError(f"Hidden states and tokens must be of the same T positions; got {given}.")
    if tokens.dtype != torch.int64:
        raise ValueError(f"Token ids have dtype {tokens.dtype}. Pass int64.")
    if len(tokens) and not (0 <= int(tokens.min()) and int(tokens.max()) < len(weight)):
        raise ValueError(
            f"Token ids from {int(tokens.min())} to {int(tokens.max())} are not all in 0 to {len(weight) - 1}."
        )
