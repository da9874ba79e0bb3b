"""Log-probabilities of given tokens from logits, some rows at a time, keeping nothing for the gradient but the logits.

    forward   log p(t) = z_t - logsumexp(z)
    backward  d log p(t) / d z_v = 1[v = t] - softmax(z)_v

Autograd through `log_softmax` keeps a second matrix as large as the logits (in float32, whatever theirs are). Half
precision is computed in float32.
"""

from typing import Any

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 26
"""Logits worked on at a time: float32 temporaries of 256 MiB each, 441 tokens of a vocabulary of 152,000."""


def blocks(rows: int, width: int) -> list[slice]:
    """Slices over rows of so many logits each, in order."""
    size = max(1, BLOCK_ELEMENTS // width)
    return [slice(start, start + size) for start in range(0, rows, size)]


def in_blocks(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities of the tokens, (..., V), (...) -> (...) in nats, in float32 or wider.

    The logits may not be overwritten before the backward pass.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    return _InBlocks.apply(rows, tokens.reshape(-1)).reshape(tokens.shape)


class _InBlocks(torch.autograd.Function):
    """log p(t) of each row."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> Tensor:
        """(N, V), (N,) -> (N,)."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        norms = torch.empty(len(logits), dtype=wide, device=logits.device)
        for rows in blocks(*logits.shape):
            norms[rows] = logits[rows].to(wide).logsumexp(dim=-1)
        ctx.save_for_backward(logits, tokens, norms)
        return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).to(wide) - norms

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        """upstream (1[v = t] - softmax), in the logits' dtype."""
        logits, tokens, norms = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for rows in blocks(*logits.shape):
            part = upstream[rows].unsqueeze(-1)
            pull = (logits[rows].to(norms.dtype) - norms[rows].unsqueeze(-1)).exp_().mul_(-part)
            gradient[rows] = pull.scatter_add_(-1, tokens[rows].unsqueeze(-1), part)
        return gradient, None
