"""The actor's loss on small batches as verl's workers get them, against closed forms and verl's own ppo_loss.

Four responses of 2, 3, 1 and 4 tokens after prompts of 2, 1, 3 and 2. verl's model output is packed: the log-prob of a
response's token j stands at prompt length + j - 1 of its sequence, one place before the token itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from verl_stack import FILES, FORWARD, REVERSE, compose, import_verl, need_stack, spec

from klreg_verl.core import kl as kl_table
from klreg_verl.core.penalties import CORRECTIONS
from klreg_verl.experiment.settings import KLSpec, TrainSpec
from klreg_verl.verl_hooks import overrides

PROMPTS, RESPONSES = (2, 1, 3, 2), (2, 3, 1, 4)
TOKENS = sum(RESPONSES)
AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
SCALE = 7
"""max_response_tokens, the constant of seq-mean-token-sum-norm."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One value per response token, by response."""

    old: list[Tensor]
    ref: list[Tensor]
    advantages: list[Tensor]
    mask: list[Tensor]
    policy: list[Tensor]
    """Packed log-probs by sequence, prompt included."""

    def masked(self, row: int, token: int, ref: float) -> Batch:
        """The same with one token masked, whose reference log-prob is `ref`."""
        mask, reference = ([tensor.clone() for tensor in tensors] for tensors in (self.mask, self.ref))
        mask[row][token], reference[row][token] = 0, ref
        return Batch(old=self.old, ref=reference, advantages=self.advantages, mask=mask, policy=self.policy)

    @property
    def num_tokens(self) -> int:
        return int(sum(mask.sum() for mask in self.mask))


@pytest.fixture
def batch() -> Batch:
    draw = torch.Generator().manual_seed(0)

    def some(length: int, shift: float = 0.0) -> Tensor:
        return -2.0 * torch.rand(length, generator=draw, dtype=torch.float64) + shift

    return Batch(
        old=[some(length) for length in RESPONSES],
        ref=[some(length) for length in RESPONSES],
        advantages=[torch.full((length,), float(some(1, 1.0)), dtype=torch.float64) for length in RESPONSES],
        mask=[torch.ones(length, dtype=torch.int64) for length in RESPONSES],
        policy=[some(prompt + response) for prompt, response in zip(PROMPTS, RESPONSES, strict=True)],
    )


@pytest.fixture(scope="module")
def loss() -> Any:
    need_stack()
    import_verl()
    return importlib.import_module("klreg_verl.verl_hooks.loss")


@pytest.fixture(scope="module")
def base_config(loss: Any) -> Any:
    return compose(overrides.settings(spec(train=TrainSpec(max_response_tokens=SCALE)), FILES, "cpu"))


def actor_config(base_config: Any, aggregation: str = "token-mean") -> Any:
    """A real ActorConfig with verl's own KL off, as the trainer makes it."""
    actor = importlib.import_module("verl.utils.config").omega_conf_to_dataclass(base_config.actor_rollout_ref.actor)
    changes = {"use_kl_loss": False, "loss_agg_mode": aggregation, "loss_scale_factor": SCALE}
    for name, value in changes.items():
        object.__setattr__(actor, name, value)
    return actor


def nested(tensors: Sequence[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(list(tensors), layout=torch.jagged)


def micro_batch(batch: Batch, rows: Sequence[int]) -> tuple[dict[str, Tensor], Any, Tensor]:
    """(model output, data, the leaf that is differentiated) of some rows of the mini-batch."""
    tu = importlib.import_module("verl.utils.tensordict_utils")
    leaf = torch.cat([batch.policy[row] for row in rows]).requires_grad_()
    ends = torch.tensor([0, *(PROMPTS[row] + RESPONSES[row] for row in rows)]).cumsum(0)
    data = {
        "prompts": nested([torch.zeros(PROMPTS[row], dtype=torch.int64) for row in rows]),
        "responses": nested([torch.zeros(RESPONSES[row], dtype=torch.int64) for row in rows]),
        "response_mask": nested([batch.mask[row] for row in rows]),
        "old_log_probs": nested([batch.old[row] for row in rows]),
        "ref_log_prob": nested([batch.ref[row] for row in rows]),
        "advantages": nested([batch.advantages[row] for row in rows]),
    }
    counts = {"dp_size": 1, "batch_num_tokens": batch.num_tokens, "global_batch_size": len(RESPONSES)}
    packed = torch.nested.nested_tensor_from_jagged(leaf, offsets=ends)
    return {"log_probs": packed}, tu.get_tensordict(data, counts), leaf


ALL = range(len(RESPONSES))


def run(function: Any, batch: Batch, rows: Sequence[int] = ALL, **arguments: Any) -> tuple[Tensor, Tensor, dict]:
    """(loss, its gradient by packed position, metrics)."""
    output, data, leaf = micro_batch(batch, rows)
    value, metrics = function(model_output=output, data=data, **arguments)
    value.backward()
    return value.detach(), leaf.grad, metrics


def weights(aggregation: str, batch: Batch) -> list[Tensor]:
    """What each token's term is multiplied with in the mini-batch's loss."""
    of = {
        "token-mean": lambda mask: mask / batch.num_tokens,
        "seq-mean-token-sum": lambda mask: mask / len(RESPONSES),
        "seq-mean-token-mean": lambda mask: mask / (mask.sum() + 1e-8) / len(RESPONSES),
        "seq-mean-token-sum-norm": lambda mask: mask / len(RESPONSES) / SCALE,
    }[aggregation]
    return [of(mask.double()) for mask in batch.mask]


def by_hand(batch: Batch, kl: KLSpec, aggregation: str) -> tuple[Tensor, Tensor]:
    """The KL term's value and its gradient by packed position: sum of weight * value, weight * coefficient."""
    total, gradient = torch.zeros((), dtype=torch.float64), []
    for row, weight in enumerate(weights(aggregation, batch)):
        prompt, response = PROMPTS[row], RESPONSES[row]
        logprobs = batch.policy[row][prompt - 1 : prompt + response - 1]
        ref = torch.where(batch.mask[row] > 0, batch.ref[row], logprobs)
        total += (weight * kl_table.value(kl.estimator, logprobs, ref)).sum()
        gradient.append(torch.zeros(prompt + response, dtype=torch.float64))
        gradient[-1][prompt - 1 : -1] = weight * kl_table.coefficient(kl.estimator, logprobs, ref)
    return total, torch.cat(gradient)


@pytest.mark.parametrize("kl", [KLSpec(), REVERSE], ids=["none", "reward"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_outside_the_loss_placement_the_loss_is_verls_to_the_last_bit(
    loss: Any, base_config: Any, batch: Batch, kl: KLSpec, aggregation: str
):
    config = actor_config(base_config, aggregation)
    ours, our_gradient, our_metrics = run(loss.actor_loss, batch, config=config, kl=kl, beta=kl.beta_or_zero)
    verls, verls_gradient, verls_metrics = run(loss.ppo_loss, batch, config=config)
    assert torch.equal(ours, verls)
    assert torch.equal(our_gradient, verls_gradient)
    assert our_metrics.keys() == verls_metrics.keys()
    assert "kl_loss" not in our_metrics


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_loss_placement_adds_beta_times_the_aggregated_kl(
    loss: Any, base_config: Any, batch: Batch, estimator: str, aggregation: str
):
    kl = KLSpec(placement="loss", estimator=estimator, follows="forward", beta=0.3)
    config = actor_config(base_config, aggregation)
    ours, our_gradient, metrics = run(loss.actor_loss, batch, config=config, kl=kl, beta=0.3)
    verls, verls_gradient, _ = run(loss.ppo_loss, batch, config=config)
    value, gradient = by_hand(batch, kl, aggregation)
    torch.testing.assert_close(ours - verls, 0.3 * value)
    torch.testing.assert_close(our_gradient - verls_gradient, 0.3 * gradient)
    assert metrics["kl_loss"].aggregate() == pytest.approx(float(value))


def test_one_tokens_share_in_numbers(loss: Any, base_config: Any, batch: Batch):
    # token-mean over 10 tokens, k3 forward, beta 0.5: d loss / d logprob = 0.5 * (1 - exp(ref - logprob)) / 10
    _, with_kl, _ = run(loss.actor_loss, batch, config=actor_config(base_config), kl=FORWARD, beta=0.5)
    _, without, _ = run(loss.ppo_loss, batch, config=actor_config(base_config))
    logprob, ref = batch.policy[0][1], batch.ref[0][0]  # first response token of the first sequence, after 2 of prompt
    assert TOKENS == 10
    torch.testing.assert_close((with_kl - without)[1], 0.5 * (1 - torch.exp(ref - logprob)) / 10)


def test_the_kl_may_be_aggregated_in_its_own_way(loss: Any, base_config: Any, batch: Batch):
    kl = KLSpec(placement="loss", estimator="k2", follows="reverse", beta=1.0, aggregation="seq-mean-token-sum-norm")
    config = actor_config(base_config, "token-mean")
    ours, our_gradient, _ = run(loss.actor_loss, batch, config=config, kl=kl, beta=1.0)
    verls, verls_gradient, _ = run(loss.ppo_loss, batch, config=config)
    value, gradient = by_hand(batch, kl, "seq-mean-token-sum-norm")
    torch.testing.assert_close(ours - verls, value)
    torch.testing.assert_close(our_gradient - verls_gradient, gradient)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("parts", [([0, 1], [2], [3]), ([2], [0, 1, 3]), ([0], [1], [2], [3])])
def test_micro_batches_sum_to_the_mini_batch(
    loss: Any, base_config: Any, batch: Batch, aggregation: str, parts: tuple[list[int], ...]
):
    config = actor_config(base_config, aggregation)
    whole, whole_gradient, whole_metrics = run(loss.actor_loss, batch, config=config, kl=FORWARD, beta=0.3)
    losses, gradients, metrics = zip(
        *(run(loss.actor_loss, batch, rows, config=config, kl=FORWARD, beta=0.3) for rows in parts), strict=True
    )
    torch.testing.assert_close(sum(losses), whole, rtol=1e-5, atol=0)
    by_row = {row: piece for rows, g in zip(parts, gradients, strict=True) for row, piece in split(rows, g)}
    torch.testing.assert_close(torch.cat([by_row[row] for row in ALL]), whole_gradient, rtol=1e-5, atol=1e-12)
    total = sum(part["kl_loss"].aggregate() for part in metrics)
    assert total == pytest.approx(whole_metrics["kl_loss"].aggregate(), rel=1e-5)


def split(rows: Sequence[int], packed: Tensor) -> list[tuple[int, Tensor]]:
    return list(zip(rows, packed.split([PROMPTS[row] + RESPONSES[row] for row in rows]), strict=True))


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("estimator", kl_table.names())
def test_micro_batches_agree_for_every_estimator_and_correction(
    loss: Any, base_config: Any, batch: Batch, estimator: str, correction: str
):
    single = Batch(**{name: [tensor.float() for tensor in getattr(batch, name)] for name in vars(batch)})
    kl = KLSpec(placement="loss", estimator=estimator, follows="none", beta=0.3, correction=correction)
    config = actor_config(base_config)
    _, whole, metrics = run(loss.actor_loss, single, config=config, kl=kl, beta=0.3)
    parts = [run(loss.actor_loss, single, rows, config=config, kl=kl, beta=0.3) for rows in ([0, 1], [2], [3])]
    torch.testing.assert_close(torch.cat([gradient for _, gradient, _ in parts]), whole, rtol=1e-5, atol=1e-9)
    total = sum(part["kl_loss"].aggregate() for *_, part in parts)
    assert total == pytest.approx(metrics["kl_loss"].aggregate(), rel=1e-5, abs=1e-8)


def test_a_correction_weighs_each_token_by_the_ratio_to_the_policy_that_sampled(
    loss: Any, base_config: Any, batch: Batch
):
    # w * k3, differentiated through w, is w * d per token; token-mean over 10 tokens
    kl = KLSpec(placement="loss", estimator="k3", follows="reverse", beta=1.0, correction="importance")
    config = actor_config(base_config)
    _, ours, _ = run(loss.actor_loss, batch, config=config, kl=kl, beta=1.0)
    _, verls, _ = run(loss.ppo_loss, batch, config=config)
    logprob, old, ref = batch.policy[0][1], batch.old[0][0], batch.ref[0][0]
    torch.testing.assert_close((ours - verls)[1], torch.exp(logprob - old) * (logprob - ref) / TOKENS)


def test_the_kl_parts_share_of_the_gradient_by_the_log_probs(loss: Any, base_config: Any, batch: Batch):
    config = actor_config(base_config)
    _, policy, _ = run(loss.ppo_loss, batch, config=config)
    _, both, metrics = run(loss.actor_loss, batch, config=config, kl=FORWARD, beta=0.3)
    found = {name: metrics[f"{name}_gradient"].aggregate() for name in ("policy", "kl")}
    assert found["policy"] == pytest.approx(policy.square().sum().item())
    assert found["kl"] == pytest.approx((both - policy).square().sum().item())
    share = importlib.import_module("klreg_verl.verl_hooks.measure").of_verls(
        {f"actor/{name}_gradient": value for name, value in found.items()}, FORWARD, 0.3
    )
    assert share["kl/grad_share"] == pytest.approx(((both - policy).norm() / policy.norm()).item())


@pytest.mark.parametrize("ref", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_what_is_under_the_mask_reaches_neither_value_nor_gradient(
    loss: Any, base_config: Any, batch: Batch, aggregation: str, ref: float
):
    masked = batch.masked(3, 2, ref)
    config = actor_config(base_config, aggregation)
    ours, our_gradient, _ = run(loss.actor_loss, masked, config=config, kl=FORWARD, beta=0.3)
    verls, verls_gradient, _ = run(loss.ppo_loss, masked, config=config)
    value, gradient = by_hand(masked, FORWARD, aggregation)
    assert ours.isfinite() and our_gradient.isfinite().all()
    torch.testing.assert_close(ours - verls, 0.3 * value)
    torch.testing.assert_close(our_gradient - verls_gradient, 0.3 * gradient)


def test_a_fully_masked_padding_row_adds_nothing(loss: Any, base_config: Any, batch: Batch):
    padded = batch.masked(2, 0, float("nan"))  # response 2 has one token
    config = actor_config(base_config)
    everything, gradient, _ = run(loss.actor_loss, padded, config=config, kl=FORWARD, beta=0.3)
    without, _, _ = run(loss.actor_loss, padded, [0, 1, 3], config=config, kl=FORWARD, beta=0.3)
    torch.testing.assert_close(everything, without)
    assert torch.equal(dict(split(ALL, gradient))[2], torch.zeros(4, dtype=torch.float64))


def test_half_precision_log_probs_are_compared_in_single(loss: Any, base_config: Any, batch: Batch):
    # d = 2^-7, exact in bfloat16; there exp(-d) - 1 + d = 3e-5 would be lost
    policy = [torch.full_like(tensor, -1.0).bfloat16() for tensor in batch.policy]
    ref = [torch.full_like(tensor, -1.0 - 2**-7).bfloat16() for tensor in batch.ref]
    half = Batch(old=batch.old, ref=ref, advantages=batch.advantages, mask=batch.mask, policy=policy)
    output, data, _ = micro_batch(half, ALL)
    config = actor_config(base_config)
    loss.ppo_loss(config=config, model_output=output, data=data)  # fills in the batch's counts, as in actor_loss
    term = loss.kl_loss(output, data, config=config, kl=FORWARD)
    d = torch.tensor(2**-7, dtype=torch.float64)
    torch.testing.assert_close(term.double(), torch.expm1(-d) + d, rtol=1e-3, atol=0)


def test_dp_size_scales_the_term_as_verls_own(loss: Any, base_config: Any, batch: Batch):
    # FSDP averages gradients over workers, so that each worker's term is multiplied by their number
    output, data, _ = micro_batch(batch, ALL)
    config = actor_config(base_config)
    config.global_batch_info.update(dp_size=2, batch_num_tokens=TOKENS, global_batch_size=4, loss_scale_factor=SCALE)
    doubled = loss.kl_loss(output, data, config=config, kl=FORWARD)
    torch.testing.assert_close(doubled.detach(), 2 * by_hand(batch, FORWARD, "token-mean")[0])
