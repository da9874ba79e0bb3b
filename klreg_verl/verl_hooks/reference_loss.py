"""What a worker adds to each update in the arm of reference_samples.py: -beta times the mean of sum_t log pi(y_t).

verl's engine works through the policy's mini-batch; then, before the optimizer's step, it works through this update's
rows once more with a loss of their own, whose gradients add to those that are there. So the policy loss, its
denominators and its metrics are what they are without the rows. Every worker takes an equal share of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.utils.metric import AggregationType, Metric
from verl.utils.tensordict_utils import get_tensordict
from verl.workers.utils.padding import no_padding_2_padding

from klreg_verl.core.aggregation import response_sum
from klreg_verl.verl_hooks import names

ENGINE_SETTINGS = (
    *("temperature", "use_remove_padding", "use_fused_kernels", "pad_mode", "pad_token_id"),
    *("use_dynamic_bsz", "max_token_len_per_gpu"),
)
"""What the rows take over from the policy's mini-batch, where it is there."""
MICRO_BATCH = "micro_batch_size_per_gpu"


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The reference's responses: lists with one entry for each, in the order (prompt, sample)."""

    prompt: list[int]
    """Row of the training data."""
    sample: list[int]
    prompt_ids: list[list[int]]
    token_ids: list[list[int]]
    mask: list[list[bool]]
    """False on tokens that the reference did not write (a tool's output)."""
    logprobs: list[list[float]]
    """The sampler's, of each token under the reference [nats]."""

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, kw_only=True)
class Order:
    """Which rows a step's updates take: each the next `rows` of one seeded order of all, which then begins anew."""

    seed: int
    rows: int
    """In each update, over all workers."""
    first: int
    """Updates made before this step."""
    updates: int
    """In this step; after them nothing is added until the next order comes."""

    def of_update(self, update: int, samples: int) -> list[int]:
        """The rows of the step's `update`-th update, from 0, of `samples` in all."""
        order = shuffled(samples, f"{self.seed}/reference rows")
        start = (self.first + update) * self.rows
        return [order[place % samples] for place in range(start, start + self.rows)]


@cache
def shuffled(count: int, key: str) -> tuple[int, ...]:
    """0..count-1 in an order hashed from the key; the same everywhere and for ever."""
    return tuple(sorted(range(count), key=lambda row: hashlib.sha256(f"{key}/{row}".encode()).digest()))


class ReferenceLoss:
    """One worker's part: the samples, and where in their order it is. ValueError for an engine that is not FSDP's."""

    def __init__(self, samples: Samples, engine: Any) -> None:
        from verl.workers.engine.fsdp import FSDPEngine  # a worker has it, the driver does without

        if not isinstance(engine, FSDPEngine):
            raise ValueError(f"kl.estimator=reference_samples needs FSDP, not {type(engine).__name__}.")
        self.samples, self.engine = samples, engine
        self.order: Order | None = None
        self.beta = 0.0
        self._made = 0

    def follow(self, order: Order, beta: float) -> None:
        """At the start of a step's updates."""
        self.order, self.beta, self._made = order, beta, 0

    @contextmanager
    def added(self) -> Iterator[None]:
        """While it lasts, a training batch of the engine also goes through this update's rows."""
        if self.order is None or self._made >= self.order.updates:
            yield
            return
        rows = self.order.of_update(self._made, len(self.samples))
        self._made += 1
        engine = self.engine
        engine.forward_backward_batch = partial(self._both, engine.forward_backward_batch, share(rows, engine))
        try:
            yield
        finally:
            del engine.forward_backward_batch  # the class's own again

    def _both(
        self,
        original: Callable[..., dict[str, Any]],
        rows: list[int],
        data: TensorDict,
        loss_function: Callable[..., Any],
        forward_only: bool = False,
    ) -> dict[str, Any]:
        """verl's forward_backward_batch on the policy's rows as asked, then on the reference's."""
        assert self.order is not None
        output = original(data, loss_function, forward_only=forward_only)
        own = partial(reference_loss, beta=self.beta, rows=self.order.rows)
        added = original(batch_of(self.samples, rows, data), own, forward_only=forward_only)
        output["metrics"].update(added["metrics"])
        return output


def share(rows: Sequence[int], engine: Any) -> list[int]:
    """This worker's of an update's rows. ValueError where the workers cannot share them equally."""
    workers, rank = engine.get_data_parallel_size(), engine.get_data_parallel_rank()
    if len(rows) % workers:
        raise ValueError(f"{len(rows)} responses of the reference cannot be shared equally by {workers} workers.")
    each = len(rows) // workers
    return list(rows[rank * each : (rank + 1) * each])


def reference_loss(
    model_output: dict[str, Tensor], data: TensorDict, dp_group: Any = None, *, beta: float, rows: int
) -> tuple[Tensor, dict[str, Any]]:
    """One micro-batch's share of -beta * mean over `rows` responses of sum_t log pi(y_t): (), and metrics.

    The metrics are the mean negative log-likelihood of a response and the mean of sum_t log pi_ref - log pi, both in
    nats; like verl's losses they are over all workers once verl has averaged them over workers.
    """
    columns = data.select(names.RESPONSE_MASK, names.REF_LOGPROBS).to_padded_tensor()
    mask = columns[names.RESPONSE_MASK].bool()
    logprobs = no_padding_2_padding(model_output[names.LOGPROBS], data).float()
    behind = columns[names.REF_LOGPROBS].double() - logprobs.detach().double()  # small, of large sums
    scale = data["dp_size"] / rows  # FSDP averages gradients over workers
    loss = -scale * response_sum(logprobs, mask).sum()
    values = {"reference_loss": loss.detach(), "reference_forward": scale * response_sum(behind, mask).sum()}
    metrics = {name: Metric(value=value, aggregation=AggregationType.SUM) for name, value in values.items()}
    return beta * loss, metrics


def batch_of(samples: Samples, rows: Sequence[int], policy: TensorDict) -> TensorDict:
    """Some rows as verl's workers get them, to be computed with the settings of the policy's mini-batch."""
    prompts, responses, masks, logprobs = (
        [torch.tensor(column[row], dtype=dtype) for row in rows]
        for column, dtype in (
            (samples.prompt_ids, torch.int64),
            (samples.token_ids, torch.int64),
            (samples.mask, torch.int64),
            (samples.logprobs, torch.float32),
        )
    )
    pairs = list(zip(prompts, responses, strict=True))
    columns = {
        "input_ids": [torch.cat(pair) for pair in pairs],
        "position_ids": [torch.arange(len(prompt) + len(response)) for prompt, response in pairs],
        "loss_mask": masks,
        names.PROMPTS: prompts,
        names.RESPONSES: responses,
        names.RESPONSE_MASK: masks,
        names.REF_LOGPROBS: logprobs,
    }
    nested = {name: torch.nested.as_nested_tensor(each, layout=torch.jagged) for name, each in columns.items()}
    settings = {name: policy[name] for name in ENGINE_SETTINGS if name in policy.keys()}
    if MICRO_BATCH in policy.keys():
        settings[MICRO_BATCH] = micro_batch(len(rows), policy[MICRO_BATCH])
    flags = {"calculate_entropy": False, "global_batch_size": len(rows)}
    return get_tensordict(nested, {**settings, **flags})


def micro_batch(rows: int, largest: int | None) -> int:
    """The largest equal micro-batch of `rows` that is no larger than the policy's."""
    return max(size for size in range(1, rows + 1) if rows % size == 0 and size <= (largest or rows))
