"""klreg_verl.core.logprobs: closed form, autograd's own gradient, half precision, blocks."""

import math

import pytest
import torch

from klreg_verl.core import exact, logprobs

F64 = torch.float64


def problem(rows: int, width: int, dtype: torch.dtype = F64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, tokens, upstream gradients."""
    generator = torch.Generator().manual_seed(rows)
    logits = 3 * torch.randn(rows, width, generator=generator, dtype=F64)
    tokens = torch.randint(0, width, (rows,), generator=generator)
    return logits.to(dtype).requires_grad_(), tokens, torch.randn(rows, generator=generator, dtype=F64)


def test_two_tokens_by_hand():
    # logits (log 3, 0): p = (3/4, 1/4); of the first token, d/dz = (1 - 3/4, -1/4)
    logits = torch.tensor([[math.log(3.0), 0.0]], dtype=F64, requires_grad=True)
    found = logprobs.in_blocks(logits, torch.tensor([0]))
    assert found.item() == pytest.approx(math.log(0.75), abs=1e-15)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert gradient[0].tolist() == pytest.approx([0.25, -0.25], abs=1e-15)


@pytest.mark.parametrize("elements", [1, 70, 1 << 26])
def test_values_and_gradients_are_log_softmaxs_however_the_rows_are_cut(elements: int, monkeypatch):
    monkeypatch.setattr(logprobs, "BLOCK_ELEMENTS", elements)  # one row, two rows of 33 (the last alone), all
    logits, tokens, upstream = problem(5, 33)
    found, expected = logprobs.in_blocks(logits, tokens), exact.of_tokens(logits, tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    ours, theirs = (torch.autograd.grad(values, logits, upstream)[0] for values in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


def test_leading_dimensions_are_kept_and_the_gradient_is_checked_numerically():
    logits, tokens, _ = problem(6, 7)
    shaped = logits.detach().reshape(2, 3, 7).requires_grad_()
    found = logprobs.in_blocks(shaped, tokens.reshape(2, 3))
    assert found.shape == (2, 3)
    assert torch.autograd.gradcheck(lambda each: logprobs.in_blocks(each, tokens.reshape(2, 3)), shaped)


def test_half_precision_is_computed_in_float32_and_its_gradient_rounded_once():
    logits, tokens, upstream = problem(64, 500, torch.bfloat16)
    found = logprobs.in_blocks(logits, tokens)
    wide = logits.detach().double().requires_grad_()
    expected = exact.of_tokens(wide, tokens)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    (ours,) = torch.autograd.grad(found, logits, upstream.float())
    (theirs,) = torch.autograd.grad(expected, wide, upstream)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), theirs, rtol=2**-8, atol=1e-6)


def test_an_impossible_token_is_minus_infinity_and_gives_no_nan_to_the_others():
    logits = torch.tensor([[0.0, -math.inf, 0.0]], dtype=F64, requires_grad=True)
    assert logprobs.in_blocks(logits, torch.tensor([1])).item() == -math.inf
    (gradient,) = torch.autograd.grad(logprobs.in_blocks(logits, torch.tensor([0])).sum(), logits)
    assert gradient[0].tolist() == [0.5, 0.0, -0.5]


def test_an_overwritten_input_is_noticed():
    logits, tokens, _ = problem(3, 5)
    inner = logits * 1.0
    found = logprobs.in_blocks(inner, tokens)
    inner.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.sum().backward()
