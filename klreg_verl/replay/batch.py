"""Prompts and responses as padded tensors, and a model's logits at the responses' tokens.

Laid out as in training: prompts padded on the left, responses on the right, positions counted from a prompt's first
token. B responses, P tokens of the longest prompt, T of the longest response, V of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOST_LOGITS = 1 << 26
"""Logits of one forward pass: 256 MiB in float32, of which a few copies are needed."""
MOST_TOKENS = 1 << 13
"""Tokens of one forward pass."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Responses to prompts."""

    input_ids: Tensor
    """(B, P + T) int64."""
    attention_mask: Tensor
    """(B, P + T) bool, False on padding."""
    response_mask: Tensor
    """(B, T) bool, True on the tokens that count: written by the model, neither padding nor a tool's output."""

    @property
    def tokens(self) -> Tensor:
        """(B, T), the responses' own tokens."""
        return self.input_ids[:, -self.response_mask.shape[1] :]

    def rows(self, index: Tensor) -> Batch:
        """Some of the responses; `index` is (N,) int64."""
        return Batch(
            input_ids=self.input_ids[index],
            attention_mask=self.attention_mask[index],
            response_mask=self.response_mask[index],
        )

    def to(self, device: str) -> Batch:
        """The same on another device."""
        return Batch(**{name: getattr(self, name).to(device) for name in self.__dataclass_fields__})


def pad(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    masks: Sequence[Sequence[bool]] | None = None,
) -> Batch:
    """Token ids as a batch; `masks` are False on the tokens of a response that do not count (default: all do)."""
    masks = [[True] * len(response) for response in responses] if masks is None else masks
    width, length = max(map(len, prompts)), max(map(len, responses))
    input_ids = torch.zeros(len(prompts), width + length, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids, dtype=torch.bool)
    response_mask = torch.zeros(len(prompts), length, dtype=torch.bool)
    for row, (prompt, response, mask) in enumerate(zip(prompts, responses, masks, strict=True)):
        start, end = width - len(prompt), width + len(response)
        input_ids[row, start:end] = torch.tensor([*prompt, *response])
        attention_mask[row, start:end] = True
        response_mask[row, : len(response)] = torch.tensor(mask, dtype=torch.bool)
    return Batch(input_ids=input_ids, attention_mask=attention_mask, response_mask=response_mask)


def response_logits(network: Any, batch: Batch, temperature: float) -> Tensor:
    """Logits that each response token was drawn with, (B, T, V) in float32, over the temperature."""
    length = batch.response_mask.shape[1]
    output = network(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask.long(),
        position_ids=positions(batch.attention_mask),
        use_cache=False,
        logits_to_keep=length + 1,
    )
    return output.logits[:, -length - 1 : -1].float() / temperature


def positions(attention_mask: Tensor) -> Tensor:
    """0, 1, ... from the first token that is no padding."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def pieces(index: Tensor, batch: Batch, vocab_size: int) -> Iterator[Tensor]:
    """`index` in pieces that one forward pass can take: at least one row each."""
    logits, tokens = batch.response_mask.shape[1] * vocab_size, batch.input_ids.shape[1]
    yield from index.split(max(1, min(MOST_LOGITS // logits, MOST_TOKENS // tokens)))
