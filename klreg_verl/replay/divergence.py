"""The KL between two models on prompts: responses sampled from the policy, scored under both.

At each sampled token, with p = pi(. | prefix) and q = pi_ref(. | prefix) over the whole vocabulary:

    reverse     sum_v p log(p / q); its sum over a response has the KL of whole responses as expectation
    forward     sum_v q log(q / p) on the policy's own prefixes: not the forward KL of whole responses, whose prefixes
                would be the reference's
    estimator   its value at the sampled token, and the mean of that over the token, sum_v p_v value(d_v)

So an estimator's error has two parts: its bias, mean minus exact value, which no number of samples removes, and the
noise of the sampled token. The exact value is the reverse KL for k1, k2, k3, abs, k3_verl and a user's own, the forward
KL for `forward`, and the estimator's own mean for js, chi2 and tv, which are divergences of their own.

Standard errors are over prompts (over responses if there is one prompt only): responses to one prompt are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any

import torch
from torch import Tensor

from klreg_verl.core import exact, kl
from klreg_verl.replay import batch as batches
from klreg_verl.replay.models import Model

Note = Callable[[str], None]
OWN_DIVERGENCE = ("js", "chi2", "tv")
"""Estimators whose mean is a divergence that is neither direction of the KL."""
_MOST_ROWS = 256
_MOST_NUMBERS = 1 << 23
"""Probabilities worked on at a time, 64 MiB each copy in float64."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean in nats and its standard error."""

    mean: float
    error: float | None
    """None where there is one response only."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One quantity."""

    token: Estimate
    """Per token."""
    response: Estimate
    """Summed over a response."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One estimator against the exact value."""

    name: str
    estimates: str
    """reverse, forward or itself."""
    sampled: Measured
    """The estimate from the sampled tokens."""
    error: Measured
    """The estimate minus the exact value on the same prefixes."""
    bias: Measured
    """What of that error would stay with any number of samples."""
    spread: float
    """Standard deviation of the estimate at one token, around its mean there [nats]."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The KL between two models on prompts."""

    prompts: int
    responses: int
    tokens: int
    truncated: float
    """Share of responses that were cut at the token limit."""
    reverse: Measured
    forward: Measured
    estimators: tuple[Judged, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Sampled:
    """Responses of the policy."""

    prompts: list[list[int]]
    """Of each response."""
    responses: list[list[int]]
    prompt: Tensor
    """(B,) int64, which prompt a response answers."""
    stopped: list[bool]
    """Whether the response ended by itself."""


# ---------------------------------------------------------------------------------------------------- sampling


@torch.no_grad()
def sample(
    policy: Model,
    prompts: Sequence[list[int]],
    *,
    responses: int,
    temperature: float,
    max_tokens: int,
    seed: int,
    note: Note = lambda text: None,
) -> Sampled:
    """Responses of the untruncated policy (no top-p, top-k or penalty, whatever its generation config says).

    Args:
        policy: the model.
        prompts: token ids.
        responses: per prompt.
        temperature: above 0.
        max_tokens: where a response is cut; the token that ends it counts.
        seed: the same seed gives the same responses on the same device.
        note: told how far it is.
    """
    if not (temperature > 0 and isfinite(temperature)):
        raise ValueError(
            f"temperature {temperature}: the estimators need samples of the policy. Give a number above 0."
        )
    rows = [(number, prompt) for number, prompt in enumerate(prompts) for _ in range(responses)]
    generator = torch.Generator(device=policy.network.device).manual_seed(seed)
    written: list[list[int]] = []
    while len(written) < len(rows):
        note(f"sampled {len(written)} of {len(rows)} responses")
        some = [prompt for _, prompt in rows[len(written) : len(written) + _MOST_ROWS]]
        written += _written(policy, some, temperature, max_tokens, generator)
    return Sampled(
        prompts=[prompt for _, prompt in rows],
        responses=written,
        prompt=torch.tensor([number for number, _ in rows]),
        stopped=[tokens[-1] in policy.stop_tokens for tokens in written],
    )


def _written(
    policy: Model, prompts: list[list[int]], temperature: float, max_tokens: int, generator: torch.Generator
) -> list[list[int]]:
    padded = batches.pad(prompts, [[0]] * len(prompts)).to(str(policy.network.device))
    tokens, mask = padded.input_ids[:, :-1], padded.attention_mask[:, :-1]
    stop = torch.tensor(policy.stop_tokens, device=tokens.device, dtype=torch.long)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=tokens.device)
    columns: list[Tensor] = []
    cache, fed = None, tokens
    while len(columns) < max_tokens and not bool(done.all()):
        output = policy.network(
            input_ids=fed,
            attention_mask=mask.long(),
            position_ids=batches.positions(mask)[:, -fed.shape[1] :],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        chances = (output.logits[:, -1].float() / temperature).softmax(dim=-1)
        fed = torch.multinomial(chances, 1, generator=generator)
        columns.append(torch.where(done[:, None], -1, fed))
        mask = torch.cat([mask, torch.ones_like(fed, dtype=torch.bool)], dim=1)
        done = done | torch.isin(fed[:, 0], stop)
    return [[token for token in row if token >= 0] for row in torch.cat(columns, dim=1).tolist()]


# ---------------------------------------------------------------------------------------------------- scoring


@torch.no_grad()
def measure(
    policy: Model,
    reference: Model,
    sampled: Sampled,
    *,
    temperature: float,
    estimators: Sequence[str] = kl.names(),
    note: Note = lambda text: None,
) -> Result:
    """Exact KLs and every estimator, both models at `temperature`, in float64 from the logits on."""
    batch = batches.pad(sampled.prompts, sampled.responses).to(str(policy.network.device))
    columns: list[dict[str, Tensor]] = []
    every = torch.arange(len(sampled.responses), device=batch.input_ids.device)
    for rows in batches.pieces(every, batch, policy.vocab_size):
        note(f"scored {int(rows[0])} of {len(every)} responses")
        part = batch.rows(rows)
        logits, ref_logits = (batches.response_logits(m.network, part, temperature) for m in (policy, reference))
        mask = part.response_mask
        columns += _columns(logits[mask], ref_logits[mask], part.tokens[mask], estimators)
    joined = {name: torch.cat([column[name] for column in columns]).cpu() for name in columns[0]}
    lengths = torch.tensor([len(response) for response in sampled.responses])
    return _result(joined, lengths, sampled, estimators)


def _columns(logits: Tensor, ref_logits: Tensor, tokens: Tensor, estimators: Sequence[str]) -> list[dict[str, Tensor]]:
    """Per token (N,), some tokens at a time: the exact KLs, estimates, their means and variances over the token."""
    size = max(1, _MOST_NUMBERS // logits.shape[-1])
    found = []
    for some in zip(logits.split(size), ref_logits.split(size), tokens.split(size), strict=True):
        policy, reference = some[0].double(), some[1].double()
        column = {"reverse": exact.full_reverse(policy, reference), "forward": exact.full_forward(policy, reference)}
        logprobs, ref_logprobs = policy.log_softmax(dim=-1), reference.log_softmax(dim=-1)
        for name in estimators:
            column |= _of_estimator(name, logprobs, ref_logprobs, some[2])
        found.append(column)
    return found


def _of_estimator(name: str, logprobs: Tensor, ref_logprobs: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    values, chances = kl.value(name, logprobs, ref_logprobs), logprobs.exp()
    possible = chances > 0  # 0 * inf is not 0
    weighted = torch.where(possible, chances * values, 0.0)
    mean = weighted.sum(dim=-1)
    apart = torch.where(possible, values - mean[:, None], 0.0)
    return {
        f"{name}/value": values.gather(-1, tokens[:, None])[:, 0],
        f"{name}/mean": mean,
        f"{name}/variance": (chances * apart.square()).sum(dim=-1),
    }


def _result(columns: dict[str, Tensor], lengths: Tensor, sampled: Sampled, estimators: Sequence[str]) -> Result:
    def measured(values: Tensor) -> Measured:
        return _measured(values, lengths, sampled.prompt)

    judged = []
    for name in estimators:
        value, mean = columns[f"{name}/value"], columns[f"{name}/mean"]
        target = {"forward": "forward"} | dict.fromkeys(OWN_DIVERGENCE, "itself")
        estimates = target.get(name, "reverse")
        truth = mean if estimates == "itself" else columns[estimates]
        judged.append(
            Judged(
                name=name,
                estimates=estimates,
                sampled=measured(value),
                error=measured(value - truth),
                bias=measured(mean - truth),
                spread=sqrt(columns[f"{name}/variance"].mean().item()),
            )
        )
    return Result(
        prompts=len(sampled.prompt.unique()),
        responses=len(lengths),
        tokens=int(lengths.sum()),
        truncated=1 - sum(sampled.stopped) / len(sampled.stopped),
        reverse=measured(columns["reverse"]),
        forward=measured(columns["forward"]),
        estimators=tuple(judged),
    )


def _measured(values: Tensor, lengths: Tensor, prompt: Tensor) -> Measured:
    response = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    sums = torch.zeros(len(lengths), dtype=torch.float64).index_add(0, response, values.double())
    return Measured(token=ratio(sums, lengths.double(), prompt), response=ratio(sums, torch.ones_like(sums), prompt))


def ratio(sums: Tensor, counts: Tensor, cluster: Tensor) -> Estimate:
    """Sum of `sums` over sum of `counts`, (B,) both, with a standard error by the delta method over clusters.

    Clusters are what `cluster`, (B,), numbers; the rows themselves if there is one only.

    Source: Cochran (1977), Sampling Techniques, section 6.4 (the ratio estimator).
    """
    mean = float(sums.sum() / counts.sum())
    if len(cluster.unique()) == 1:
        cluster = torch.arange(len(sums))
    _, number = torch.unique(cluster, return_inverse=True)
    size = int(number.max()) + 1
    if size == 1:
        return Estimate(mean=mean, error=None)
    rest = torch.zeros(size, dtype=torch.float64).index_add(0, number, (sums - mean * counts).double())
    return Estimate(mean=mean, error=float((size / (size - 1) * rest.square().sum()).sqrt() / counts.sum()))


def to_json(value: Any) -> Any:
    """Dataclasses as plain values; what is not finite (a divergence that overflows) is None."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: to_json(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value
