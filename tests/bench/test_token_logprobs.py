"""`make bench`: log-probabilities of tokens from logits, ours in blocks against verl's row by row where flash-attn is
missing, turn by turn, forward and backward. Prints; asserts no time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from klreg_verl.core import logprobs

TURNS = 9
SHAPES = {"the quick study's step": (1024, 261), "a vocabulary of Qwen2.5's": (256, 151936)}

functional = pytest.importorskip("verl.utils.torch_functional", reason="the stack is not installed (make setup)")


@pytest.mark.parametrize("what", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward(what: str, dtype: torch.dtype):
    tokens, vocabulary = SHAPES[what]
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(tokens, vocabulary, generator=generator).to(dtype).requires_grad_()
    chosen = torch.randint(0, vocabulary, (tokens,), generator=generator)
    functions = {"ours": logprobs.in_blocks, "verl": functional.logprobs_from_logits_v2}
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(TURNS + 1):
        for name in functions if turn % 2 else reversed(functions):
            seconds[name].append(timed(functions[name], logits, chosen))
    ratios = [theirs / mine for mine, theirs in zip(*seconds.values(), strict=True)][1:]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"\nlog-probs of {tokens} tokens, {vocabulary} words, {dtype}, forward and backward ({what})")
    print(f"  verl / ours   {middle:.2f} [{low:.2f}, {high:.2f}] n={len(ratios)}")


def timed(function: Callable[[Tensor, Tensor], Tensor], logits: Tensor, tokens: Tensor) -> float:
    """Seconds of one call and its gradient."""
    begun = time.perf_counter()
    torch.autograd.grad(function(logits, tokens).float().sum(), logits)
    return time.perf_counter() - begun
