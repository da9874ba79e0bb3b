"""klreg_verl.core.fused: values and gradients against whole log-softmaxes in float64, chunk edges, what it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from klreg_verl.core import exact, fused, kl
from klreg_verl.core.fused import Statistics, logprob_statistics

OUTPUTS = ("logprobs", "entropy", "reverse", "forward")
TOKENS, WIDTH, REF_WIDTH, VOCABULARY = 7, 5, 3, 29
DOUBLE = torch.float64


def problem(dtype: torch.dtype = DOUBLE, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """A policy of width 5, a reference of width 3, seven tokens; logits with a standard deviation near 2 * scale."""
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=DOUBLE)

    given = {
        "hidden": scale * normal(TOKENS, WIDTH),
        "weight": normal(VOCABULARY, WIDTH),
        "ref_hidden": scale * normal(TOKENS, REF_WIDTH),
        "ref_weight": normal(VOCABULARY, REF_WIDTH),
    }
    # the first and the last token of the vocabulary are at the edges of chunks
    tokens = torch.tensor([0, VOCABULARY - 1, 9, 10, 11, 20, 3])
    return {name: one.to(dtype) for name, one in given.items()} | {"tokens": tokens}


def upstream(dtype: torch.dtype = DOUBLE) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(12)
    return {name: torch.randn(TOKENS, generator=generator, dtype=DOUBLE).to(dtype) for name in OUTPUTS}


def whole(given: dict[str, torch.Tensor], temperature: float = 1.0) -> Statistics:
    """The same by whole logits in float64."""
    wide = {name: one if name == "tokens" else one.to(DOUBLE) for name, one in given.items()}
    logits = wide["hidden"] @ wide["weight"].t() / temperature
    ref_logits = wide["ref_hidden"] @ wide["ref_weight"].t() / temperature
    column = wide["tokens"].unsqueeze(-1)
    return Statistics(
        logprobs=logits.log_softmax(-1).gather(1, column).squeeze(-1),
        ref_logprobs=ref_logits.log_softmax(-1).gather(1, column).squeeze(-1),
        entropy=torch.distributions.Categorical(logits=logits).entropy(),
        reverse=exact.full_reverse(logits, ref_logits),
        forward=exact.full_forward(logits, ref_logits),
    )


def gradients(
    found: Statistics, given: dict[str, torch.Tensor], of: tuple[str, ...] = OUTPUTS
) -> tuple[torch.Tensor, ...]:
    factors = upstream(found.logprobs.dtype)
    objective = sum((factors[name] * getattr(found, name)).sum() for name in of)
    return torch.autograd.grad(objective, [given["hidden"], given["weight"]])


def differentiable(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    learned = ("hidden", "weight")
    return {name: one.clone().requires_grad_() if name in learned else one for name, one in given.items()}


def test_a_token_worked_by_hand():
    # hidden 1 and weights log p give log p as logits: p = (0.6, 0.3, 0.1), q = (0.2, 0.5, 0.3), chunks of 2 and 1
    p, q = torch.tensor([0.6, 0.3, 0.1], dtype=DOUBLE), torch.tensor([0.2, 0.5, 0.3], dtype=DOUBLE)
    one = torch.ones(1, 1, dtype=DOUBLE)
    found = logprob_statistics(one, p.log()[:, None], one, q.log()[:, None], torch.tensor([2]), chunk=2)
    expected = {
        "logprobs": p[2].log(),
        "ref_logprobs": q[2].log(),
        "entropy": -(p * p.log()).sum(),
        "reverse": (p * (p / q).log()).sum(),
        "forward": (q * (q / p).log()).sum(),
    }
    for name, number in expected.items():
        torch.testing.assert_close(getattr(found, name), number[None], msg=name)


@pytest.mark.parametrize("chunk", [1, 4, 10, 28, 29, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_do_not_depend_on_the_chunk(chunk, temperature):
    given = problem()
    found = logprob_statistics(**given, chunk=chunk, temperature=temperature)
    for name, expected in vars(whole(given, temperature)).items():
        torch.testing.assert_close(getattr(found, name), expected, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("chunk", [1, 10, 29])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradients_of_all_outputs_at_once(chunk, temperature):
    given, same = differentiable(problem()), differentiable(problem())
    found = gradients(logprob_statistics(**given, chunk=chunk, temperature=temperature), given)
    for one, other in zip(found, gradients(whole(same, temperature), same), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("of", [(name,) for name in OUTPUTS] + [("logprobs", "entropy"), ("logprobs", "reverse")])
def test_gradients_of_some_outputs_alone(of):
    given, same = differentiable(problem()), differentiable(problem())
    found = gradients(logprob_statistics(**given, chunk=10), given, of)
    for one, other in zip(found, gradients(whole(same), same, of), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_finite_differences_agree():
    given = problem()

    def outputs(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = logprob_statistics(**given | {"hidden": hidden, "weight": weight}, chunk=10)
        return tuple(getattr(found, name) for name in OUTPUTS)

    learned = differentiable(given)
    assert torch.autograd.gradcheck(outputs, (learned["hidden"], learned["weight"]))


def test_a_kl_loss_on_the_log_prob_has_the_gradient_of_its_coefficient():
    # the upstream gradient is a function of the output itself, so it cannot be known in the forward
    given = differentiable(problem())
    found = logprob_statistics(**given, chunk=10)
    kl.value("k2", found.logprobs, found.ref_logprobs).sum().backward()
    same = differentiable(problem())
    other = whole(same)
    coefficient = kl.coefficient("k2", other.logprobs.detach(), other.ref_logprobs)
    (expected,) = torch.autograd.grad((coefficient * other.logprobs).sum(), same["hidden"])
    torch.testing.assert_close(given["hidden"].grad, expected)


@pytest.mark.parametrize("learned", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient_and_the_other_the_same(learned):
    both, given = differentiable(problem()), problem()
    given[learned].requires_grad_()
    logprob_statistics(**both, chunk=10).reverse.sum().backward()
    logprob_statistics(**given, chunk=10).reverse.sum().backward()
    assert [name for name, one in given.items() if one.grad is not None] == [learned]
    torch.testing.assert_close(given[learned].grad, both[learned].grad, rtol=0, atol=0)


def test_the_reference_is_fixed():
    given = differentiable(problem())
    given["ref_hidden"].requires_grad_(), given["ref_weight"].requires_grad_()
    found = logprob_statistics(**given, chunk=10)
    assert not found.ref_logprobs.requires_grad
    (found.reverse + found.forward).sum().backward()
    assert given["ref_hidden"].grad is None and given["ref_weight"].grad is None


def test_equal_models_have_no_divergence_and_no_pull():
    given = differentiable(problem(torch.float32))
    same = {"ref_hidden": given["hidden"].detach(), "ref_weight": given["weight"].detach()}
    found = logprob_statistics(**given | same, chunk=10)
    torch.testing.assert_close(found.logprobs, found.ref_logprobs, rtol=0, atol=0)
    assert 0 <= found.reverse.min() and found.reverse.max() < 1e-6
    assert 0 <= found.forward.min() and found.forward.max() < 1e-6
    (gradient,) = torch.autograd.grad((found.reverse + found.forward).sum(), given["hidden"])
    assert gradient.abs().max() < 1e-5


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_float32_is_within_1e_5_of_float64(scale):
    given = differentiable(problem(torch.float32, scale))
    found = logprob_statistics(**given, chunk=10)
    expected = whole(given)
    for name, number in vars(expected).items():
        assert getattr(found, name).dtype == torch.float32
        allowed = 1e-5 * max(1.0, number.abs().max().item())
        assert (getattr(found, name) - number).abs().max() < allowed, name
    same = differentiable({name: one.detach() for name, one in given.items()})
    for one, other in zip(gradients(found, given), gradients(whole(same), same), strict=True):
        assert (one - other).abs().max() < 1e-5 * max(1.0, other.abs().max().item())


def test_extreme_logits_are_finite_forward_and_backward():
    # logits of several thousands: nearly every probability underflows
    given = differentiable(problem(torch.float32, scale=1000.0))
    found = logprob_statistics(**given, chunk=10)
    assert all(getattr(found, name).isfinite().all() for name in (*OUTPUTS, "ref_logprobs"))
    assert all(one.isfinite().all() for one in gradients(found, given))
    expected = whole(given)
    for name in ("logprobs", "reverse", "forward"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(expected, name), rtol=1e-5, atol=1e-3)


def test_bfloat16_inputs_are_computed_in_float32():
    given = differentiable(problem(torch.bfloat16))
    found = logprob_statistics(**given, chunk=10)
    for name, expected in vars(whole(given)).items():
        assert getattr(found, name).dtype == torch.float32
        torch.testing.assert_close(getattr(found, name).double(), expected, rtol=1e-5, atol=1e-5, msg=name)
    assert [one.dtype for one in gradients(found, given)] == [torch.bfloat16] * 2


def test_autocast_does_not_round_the_logits():
    given = problem(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = logprob_statistics(**given, chunk=10)
    assert torch.equal(found.logprobs, logprob_statistics(**given, chunk=10).logprobs)


def test_a_second_backward_gives_the_same():
    given = differentiable(problem())
    found = logprob_statistics(**given, chunk=10)
    first, second = (torch.autograd.grad(found.reverse.sum(), given["hidden"], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_no_tokens_are_no_numbers():
    given = problem()
    empty = given | {name: given[name][:0] for name in ("hidden", "ref_hidden", "tokens")}
    assert logprob_statistics(**empty, chunk=10).reverse.shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(7, 1, dtype=torch.int64)}, r"tokens \(T,\) are needed; got hidden \(7, 5\), weight"),
        ({"weight": torch.zeros(29, 4)}, r"same width H; got hidden \(7, 5\), weight \(29, 4\)"),
        ({"ref_weight": torch.zeros(30, 3)}, r"same vocabulary; got .*weight \(29, 5\).*ref_weight \(30, 3\)"),
        ({"ref_hidden": torch.zeros(6, 3)}, r"same T positions; got .*ref_hidden \(6, 3\)"),
        ({"tokens": torch.zeros(7)}, "dtype torch.float32. Pass int64"),
        ({"tokens": torch.tensor([0, 1, 2, 3, 4, 5, 29])}, "from 0 to 29 are not all in 0 to 28"),
        ({"tokens": torch.tensor([0, 1, 2, -1, 4, 5, 6])}, "from -1 to 6 are not all in 0 to 28"),
        ({"temperature": 0.0}, "A temperature of 0.0 divides no logits"),
        ({"temperature": float("nan")}, "A temperature of nan divides no logits"),
        ({"chunk": 0}, "Chunks of 0 tokens never end"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        logprob_statistics(**problem() | change)


def test_the_elementwise_parts_are_one_graph_each_for_torch_compile():
    # what compiled=True hands to torch.compile; without a GPU by the backend that needs no C++ compiler
    summary, pull = (torch.compile(part, backend="aot_eager", fullgraph=True) for part in fused._elementwise(False))
    given = problem()
    logits, ref_logits = given["hidden"] @ given["weight"].t(), given["ref_hidden"] @ given["ref_weight"].t()
    tokens, normalizations = given["tokens"] - 5, torch.zeros(2, TOKENS, 1, dtype=DOUBLE)
    scales = torch.randn(5, TOKENS, 1, generator=torch.Generator().manual_seed(13), dtype=DOUBLE)
    expected = fused._summary(logits.clone(), ref_logits.clone(), tokens)
    torch.testing.assert_close(summary(logits.clone(), ref_logits.clone(), tokens), expected)
    for reference in (ref_logits, None):
        copies = [logits.clone(), None if reference is None else reference.clone()]
        again = [logits.clone(), None if reference is None else reference.clone()]
        expected = fused._pull(*copies, tokens, normalizations, scales)
        torch.testing.assert_close(pull(*again, tokens, normalizations, scales), expected)


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation gave."""

    elements = 0

    def __torch_dispatch__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [one for one in torch.utils._pytree.tree_leaves(result) if isinstance(one, torch.Tensor)]
        self.elements = max(self.elements, *(one.numel() for one in tensors), 0)
        return result


def test_no_operation_gives_a_tensor_of_the_size_of_the_logits():
    # 64 tokens and a vocabulary of 8192: logits of 524288 elements, 128 chunks of 4096, summaries of 7 * 64 each, and
    # weights (a gradient of them is asked for) of 8 * 8192 = 65536
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(64, 8, generator=generator).requires_grad_()
    weight = torch.randn(8192, 8, generator=generator).requires_grad_()
    with Largest() as largest:
        found = logprob_statistics(hidden, weight, hidden + 1, weight, torch.arange(64), chunk=64)
        (found.reverse + found.entropy).sum().backward()
    assert largest.elements == 65536
    with Largest() as largest:
        whole(
            {"hidden": hidden, "weight": weight, "ref_hidden": hidden, "ref_weight": weight, "tokens": torch.arange(64)}
        )
    assert largest.elements == 524288
