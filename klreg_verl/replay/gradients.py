"""The gradients of KL settings on one batch of samples, and their inner products.

Every setting's gradient is a sum of parts, each with one backward pass: the task's policy gradient, a penalty in the
reward, a KL in the loss. The functions that train give them (core.advantages, core.penalties, core.exact): with respect
to the log-probabilities of the samples, (B, T), which costs no pass through the network; parts that are equal there are
computed once. Then each micro-batch is run once forward and once backward per part.

The policy is the one that sampled: pi / pi_old is 1 in value (not in gradient), so PPO's clip does nothing. What is
compared is the gradient of the loss of the whole batch, before clipping and before the optimizer.

Prompts are halved, so that the cosine between the halves' gradients tells how much of a gradient is noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from klreg_verl.core import advantages, exact, penalties
from klreg_verl.core.aggregation import masked, token_weights
from klreg_verl.core.exact import Divergence
from klreg_verl.experiment.kl_settings import KLSpec
from klreg_verl.replay.batch import Batch, pieces, response_logits
from klreg_verl.replay.settings import Setting
from klreg_verl.replay.sketch import CountSketch
from klreg_verl.verl_hooks import terms

SKETCH_WIDTH = 1 << 18
"""Numbers kept of a gradient that is sketched: cosines then have an error of 0.002."""
HALVES = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """The batch of one step, as sampled."""

    batch: Batch
    group_ids: Tensor
    """(B,) int64, the prompt that a response answers."""
    scores: Tensor
    """(B,) of the task."""
    temperature: float
    advantage: str
    """Of the task: a name of core.advantages."""
    aggregation: str
    """Of the policy loss, in verl's spelling; a KL in the loss has it, too, unless it says otherwise."""
    scale_factor: int | None = None
    """The constant of seq-mean-token-sum-norm, tokens."""

    def to(self, device: str) -> Samples:
        """The same on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("batch", "group_ids", "scores")}
        return replace(self, **moved)

    def weights(self, aggregation: str) -> Tensor:
        """The factor on each token's loss, (B, T) float32, as verl's agg_loss has it for a whole batch."""
        mask = self.batch.response_mask
        tokens, responses = int(mask.sum()), int(mask.any(dim=-1).sum())
        given = {"tokens": tokens, "responses": responses, "scale": self.scale_factor}
        return token_weights(aggregation, mask, **given).float()


@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """Samples with the log-probabilities of both models, (B, T) in nats at the sampling temperature."""

    samples: Samples
    logprobs: Tensor
    ref_logprobs: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """One gradient: that of the sum over tokens of `weights` times log pi, or times a divergence of logits."""

    weights: Tensor
    """(B, T)."""
    divergence: Divergence | None = None
    name: str = ""

    @property
    def key(self) -> tuple[str, bytes]:
        """Equal for parts with equal gradients."""
        return self.name, self.weights.cpu().numpy().tobytes()

    def loss(self, rows: Tensor, logprobs: Tensor, logits: Tensor, ref_logits: Tensor | None) -> Tensor:
        """(), over some rows of the batch, whose log-probabilities and logits are given."""
        given = self.weights[rows]
        if self.divergence is None:
            return (given * logprobs).sum()
        assert ref_logits is not None, "a divergence needs the reference's logits"
        return (given * masked(self.divergence(logits, ref_logits), given != 0)).sum()


@dataclass(frozen=True, kw_only=True, eq=False)
class Products:
    """Inner products of the gradients of K settings on each half of the prompts."""

    settings: tuple[str, ...]
    values: Tensor
    """(HALVES, HALVES, K, K) float64: of the first index's half with the second's."""
    parameters: int
    parts: int
    """Different gradients that were computed."""
    sketch: CountSketch | None
    """How they were shortened; None where they were held whole."""

    @property
    def whole(self) -> Tensor:
        """(K, K), of the gradients of the whole batch."""
        return self.values.sum(dim=(0, 1))


@torch.no_grad()
def score(policy: Any, reference: Any, samples: Samples) -> Scored:
    """One forward pass through both models."""
    return Scored(samples=samples, logprobs=_logprobs(policy, samples), ref_logprobs=_logprobs(reference, samples))


def _logprobs(network: Any, samples: Samples) -> Tensor:
    batch = samples.batch
    found = [
        exact.of_tokens(response_logits(network, part, samples.temperature), part.tokens)
        for part in map(batch.rows, pieces(_all(batch), batch, network.config.get_text_config().vocab_size))
    ]
    return masked(torch.cat(found), batch.response_mask)


def _all(batch: Batch) -> Tensor:
    return torch.arange(len(batch.input_ids), device=batch.input_ids.device)


# ---------------------------------------------------------------------------------------------------- parts


def parts_of(setting: Setting, scored: Scored) -> list[tuple[float, Part]]:
    """Factors and parts whose sum is the setting's gradient; that of a loss, which training goes down."""
    if setting.kl is None:
        return [(1.0, _policy_gradient(_task_advantages(scored.samples), scored.samples))]
    block, beta = setting.kl, setting.kl.beta_or_zero
    found = []
    if block.in_reward:
        found.append(_charged(block, scored))
    if block.in_loss:
        found.append((beta, _exact_part(block, scored) if block.is_exact else _pulled(block, scored)))
    return found


def _task_advantages(samples: Samples) -> Tensor:
    """(B, T)."""
    advantage = advantages.compute(samples.advantage, samples.scores, samples.group_ids)
    return advantage[:, None] * samples.batch.response_mask


def _policy_gradient(advantage: Tensor, samples: Samples) -> Part:
    """The loss is -(pi / pi_old) * advantage at each token, its derivative by log pi at pi = pi_old -advantage."""
    return Part(weights=-samples.weights(samples.aggregation) * advantage.float())


def _charged(block: KLSpec, scored: Scored) -> tuple[float, Part]:
    samples, mask = scored.samples, scored.samples.batch.response_mask
    given = (block, scored.logprobs, scored.ref_logprobs, mask)
    if not block.normalize_with_reward:
        penalty = terms.reward_penalty(*given, samples.group_ids)
        charged = penalties.penalized_advantages(torch.zeros_like(penalty), penalty, beta=1.0)
        return block.beta_or_zero, _policy_gradient(charged, samples)
    # inside GRPO's division by the std beta is no factor: what it changes is taken at this very beta
    scores, groups = samples.scores, samples.group_ids
    charged = penalties.normalized_advantages(scores, terms.response_charge(*given), groups, beta=block.beta_or_zero)
    return 1.0, _policy_gradient((charged - advantages.grpo(scores, groups))[:, None] * mask, samples)


def _pulled(block: KLSpec, scored: Scored) -> Part:
    logprobs = scored.logprobs.detach().clone().requires_grad_()
    mask = scored.samples.batch.response_mask
    per_token = terms.loss_per_token(block, logprobs, scored.ref_logprobs, scored.logprobs, mask)
    loss = (scored.samples.weights(block.aggregation or scored.samples.aggregation) * per_token).sum()
    (weights,) = torch.autograd.grad(loss, logprobs)
    return Part(weights=weights)


def _exact_part(block: KLSpec, scored: Scored) -> Part:
    weights = scored.samples.weights(block.aggregation or scored.samples.aggregation)
    name = f"{block.estimator}({block.top_k or exact.TOP_K})"
    return Part(weights=weights, divergence=terms.divergence_of(block), name=name)


# ---------------------------------------------------------------------------------------------------- products


def products(
    policy: Any,
    reference: Any,
    scored: Scored,
    settings: Sequence[Setting],
    *,
    memory_bytes: float,
    seed: int,
    note: Callable[[str], None] = lambda text: None,
) -> Products:
    """Inner products of the settings' gradients: exact if all gradients fit into `memory_bytes`, sketched otherwise.

    Args:
        policy, reference: causal language models; the policy's parameters that need a gradient are meant.
        scored: the samples, scored by these two models.
        settings: what is compared.
        memory_bytes: for gradients, beside the models; at least one gradient is always held.
        seed: of the sketch.
        note: told how far it is.
    """
    parts, mix = _distinct([parts_of(setting, scored) for setting in settings])
    size = sum(parameter.numel() for parameter in _trained(policy))
    sketch = _sketch(size, len(parts), memory_bytes, seed)
    inner = _inner(_Passes(policy, reference, scored, sketch, note), parts, size, memory_bytes)
    count = len(parts)
    blocks = inner.reshape(HALVES, count, HALVES, count).transpose(1, 2)
    return Products(
        settings=tuple(setting.name for setting in settings),
        values=mix @ blocks @ mix.T,
        parameters=size,
        parts=count,
        sketch=sketch,
    )


def _distinct(sums: Sequence[Sequence[tuple[float, Part]]]) -> tuple[list[Part], Tensor]:
    """The different parts of some sums, and the sums' factors on them, (sums, parts) float64."""
    found: dict[tuple[str, bytes], Part] = {}
    for sum_ in sums:
        for _, part in sum_:
            found.setdefault(part.key, part)
    number = {key: place for place, key in enumerate(found)}
    mix = torch.zeros(len(sums), len(found), dtype=torch.float64)
    for row, sum_ in enumerate(sums):
        for factor, part in sum_:
            mix[row, number[part.key]] += factor
    return list(found.values()), mix


def halves(group_ids: Tensor) -> list[Tensor]:
    """Row numbers of every other prompt, and of the rest."""
    _, number = torch.unique(group_ids, return_inverse=True)
    return [torch.nonzero(number % HALVES == half)[:, 0] for half in range(HALVES)]


def _trained(network: Any) -> list[Tensor]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def _sketch(size: int, count: int, memory_bytes: float, seed: int) -> CountSketch | None:
    """None where the gradients of all parts on both halves fit, in float32."""
    if 4 * size * count * HALVES <= memory_bytes:
        return None
    room = int(memory_bytes / 2 / (8 * count * HALVES))
    return CountSketch(width=max(64, min(SKETCH_WIDTH, room)), seed=seed)


@dataclass(frozen=True)
class _Passes:
    """What a pass through the networks needs."""

    policy: Any
    reference: Any
    scored: Scored
    sketch: CountSketch | None
    note: Callable[[str], None]


def _inner(passes: _Passes, parts: Sequence[Part], size: int, memory_bytes: float) -> Tensor:
    """(HALVES * parts, HALVES * parts) float64, the half being the slower index."""
    sketch, device, count = passes.sketch, passes.scored.logprobs.device, len(parts)
    at_once = count if sketch is None else max(1, min(count, int(memory_bytes / 2 / (4 * size))))
    width, dtype = (size, torch.float32) if sketch is None else (sketch.width, torch.float64)
    kept = torch.zeros(HALVES, count, width, dtype=dtype, device=device)
    for half, index in enumerate(halves(passes.scored.samples.group_ids)):
        for start in range(0, count, at_once):
            passes.note(f"gradients of half {half + 1} of the prompts, part {start + 1} of {count}")
            some = slice(start, start + at_once)
            if sketch is None:
                _add_gradients(passes, parts[some], index, kept[half, some])
            else:
                whole = torch.zeros(len(parts[some]), size, device=device)
                _add_gradients(passes, parts[some], index, whole)
                kept[half, some] = sketch(whole)
    return _gram(kept.flatten(0, 1))


def _add_gradients(passes: _Passes, parts: Sequence[Part], index: Tensor, into: Tensor) -> None:
    """Add each part's gradient, summed over the rows of `index`, to its row of `into`, (parts, P)."""
    trained = _trained(passes.policy)
    shares = [row.split([parameter.numel() for parameter in trained]) for row in into]
    for rows in pieces(index, passes.scored.samples.batch, passes.policy.config.get_text_config().vocab_size):
        losses = _losses(passes, parts, rows)
        for number, (loss, share) in enumerate(zip(losses, shares, strict=True)):
            more = number < len(parts) - 1
            found = torch.autograd.grad(loss, trained, retain_graph=more, materialize_grads=True)
            for place, gradient in zip(share, found, strict=True):
                place.add_(gradient.reshape(-1))


def _losses(passes: _Passes, parts: Sequence[Part], rows: Tensor) -> list[Tensor]:
    """One number per part, of one forward pass of the policy over some rows."""
    temperature = passes.scored.samples.temperature
    part = passes.scored.samples.batch.rows(rows)
    logits, ref_logits = response_logits(passes.policy, part, temperature), None
    if any(one.divergence is not None for one in parts):
        with torch.no_grad():
            ref_logits = response_logits(passes.reference, part, temperature)
    logprobs = exact.of_tokens(logits, part.tokens)
    return [one.loss(rows, logprobs, logits, ref_logits) for one in parts]


def _gram(vectors: Tensor) -> Tensor:
    """Inner products of all rows in float64, some columns at a time."""
    total = torch.zeros(len(vectors), len(vectors), dtype=torch.float64, device=vectors.device)
    for block in vectors.split(1 << 18, dim=1):
        wide = block.double()
        total += wide @ wide.T
    return total.cpu()
