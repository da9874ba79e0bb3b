"""klreg_verl.core.fused on a CUDA device: the same code, eager and under torch.compile, and what it costs there.

`python -m pytest tests/gpu -q -s` prints the benchmark; nothing timed is asserted.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from klreg_verl.core import exact
from klreg_verl.core.fused import logprob_statistics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
OUTPUTS = ("logprobs", "entropy", "reverse", "forward")


@pytest.fixture(autouse=True)
def full_float32():
    """TF32 products have ten bits: the float32 comparison is about our code, not about them."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def problem(tokens: int, width: int, vocabulary: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator("cuda").manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    hidden, weight = normal(tokens, width), 2 * normal(vocabulary, width) / width**0.5
    return {
        "hidden": hidden.to(dtype).requires_grad_(),
        "weight": weight.to(dtype).requires_grad_(),
        "ref_hidden": (hidden + 0.2 * normal(tokens, width)).to(dtype),
        "ref_weight": weight.to(dtype),
        "tokens": torch.randint(0, vocabulary, (tokens,), generator=generator, device="cuda"),
    }


def outputs(given: dict[str, Tensor], **settings: object) -> tuple[Tensor, ...]:
    found = logprob_statistics(**given, **settings)
    return tuple(getattr(found, name) for name in OUTPUTS)


def exactly(given: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """(inputs, outputs) by whole logits in float64."""
    wide = {name: one if name == "tokens" else one.detach().double() for name, one in given.items()}
    wide["hidden"].requires_grad_(), wide["weight"].requires_grad_()
    logits, ref_logits = wide["hidden"] @ wide["weight"].t(), wide["ref_hidden"] @ wide["ref_weight"].t()
    logprobs = logits.log_softmax(-1).gather(1, wide["tokens"].unsqueeze(-1)).squeeze(-1)
    divergences = exact.full_reverse(logits, ref_logits), exact.full_forward(logits, ref_logits)
    return wide, (logprobs, torch.distributions.Categorical(logits=logits).entropy(), *divergences)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("dtype", "of_gradient"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_values_and_gradients(compiled, dtype, of_gradient):
    # half precision enters the products only, which accumulate in float32: values stay within 1e-4, while gradients
    # are rounded to bfloat16 (2^-8) before they are multiplied. 1000 tokens in chunks of 300: the last is smaller.
    given = problem(64, 32, 1000, dtype)
    found = outputs(given, chunk=300, compiled=compiled)
    wide, expected = exactly(given)
    for name, one, other in zip(OUTPUTS, found, expected, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).abs().max() < (1e-5 if dtype == torch.float32 else 1e-4), name
    upstream = torch.randn(len(OUTPUTS), 64, generator=torch.Generator().manual_seed(6)).cuda()
    ours = torch.autograd.grad(found, [given["hidden"], given["weight"]], list(upstream))
    theirs = torch.autograd.grad(expected, [wide["hidden"], wide["weight"]], list(upstream.double()))
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() < of_gradient * other.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_time_against_the_matrix_products_it_needs(dtype):
    tokens, width, vocabulary = 4096, 1536, 151936
    given = problem(tokens, width, vocabulary, dtype)
    products = {"forward": products_alone(given, 2), "forward and backward": products_alone(given, 6)}
    print(f"\n{torch.cuda.get_device_name()}, {dtype}, T={tokens} H={width} V={vocabulary} (target 1.10)")
    for chunk in (2048, 8192, 32768):
        for compiled in (False, True):
            settings = {"chunk": chunk, "compiled": compiled}
            for what, alone in products.items():
                seconds = timed(lambda: run(given, what, settings))  # noqa: B023
                ratios = [one / other for one, other in zip(seconds, alone, strict=True)]
                kind = "compiled" if compiled else "eager"
                print(f"  chunk {chunk:>6} {kind:<9} {what:<21} / its products {spread(ratios)}")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(given, "forward and backward", {"chunk": 8192})
    gradients = given["hidden"].nbytes + given["weight"].nbytes
    print(f"  peak beyond inputs and gradients {(torch.cuda.max_memory_allocated() - before - gradients) / 1e6:.0f} MB")


def run(given: dict[str, Tensor], what: str, settings: dict[str, object]) -> None:
    with torch.set_grad_enabled(what != "forward"):
        found = outputs(given, **settings)
    if what != "forward":
        torch.autograd.grad(found, [given["hidden"], given["weight"]], [torch.ones_like(one) for one in found])


@torch.no_grad()
def products_alone(given: dict[str, Tensor], number: int) -> list[float]:
    """Seconds of `number` products of the size of hidden @ weight.T, in chunks of 8192 tokens of the vocabulary."""

    def multiply() -> None:
        for rows in given["weight"].split(8192):
            for _ in range(number):
                given["hidden"] @ rows.t()

    return timed(multiply)


def timed(work: Callable[[], None], turns: int = 10) -> list[float]:
    """Seconds of each turn on the device, after two that compile and warm up."""
    seconds = []
    for _ in range(turns + 2):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        work()
        ended.record()
        torch.cuda.synchronize()
        seconds.append(begun.elapsed_time(ended) / 1e3)
    return seconds[2:]


def spread(values: list[float]) -> str:
    """Median, and the quartiles around it."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}] n={len(values)}"
