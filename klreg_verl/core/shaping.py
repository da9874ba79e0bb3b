"""What some recipes do to a KL term before it acts: clip it, weigh it by a sigmoid, divide it by the response's length.

v is the value at a token (in the reward: the charge), c the factor on grad log pi that belongs to it, |y| the number of
unmasked tokens of the response, sigma the logistic function of v - target. All values in nats, all tensors (B, T).

    kind               v becomes             c becomes                             parameters (default)
    none               v                     c
    clip               min(v, threshold)     c up to the threshold, 0 above        threshold (1.0)
    sigmoid            sigma * v             (sigma + v * sigma * (1 - sigma)) c   target (0.1)
    length_normalized  v / |y|               c / |y|

What each really does to the gradient, which is not what its name promises; none of them follows a divergence:

    clip               In the loss it lets go of exactly the tokens that drifted most: above the threshold there is no
                       pull back at all. In the reward such a token costs the threshold however far it goes, while a
                       negative charge of k1 is credited in full: the expected charge is below the KL.
    sigmoid            A soft threshold the other way round: it weakens small values (factor 0.475 at v = 0 with the
                       default target) and leaves large ones as they are (factor 1.11 at v = 2.4, towards 1 beyond), so
                       nothing is capped. A higher target weakens the term further. Strongly negative values (k1) are
                       forgotten: the product goes back to 0, with a slope of the other sign below v = -1.26.
    length_normalized  A token of a response twice as long is held half as firmly. Charged to the reward it makes the
                       same drift cheaper in a longer answer; under an aggregation that already averages over a
                       response's tokens it divides twice.

Any of them goes with any controller of beta, which may watch the raw value or the adapted one.
"""

from dataclasses import dataclass, fields
from math import isfinite
from typing import Protocol

import torch
from torch import Tensor


class Shaping(Protocol):
    """One row of the table above."""

    def shape(self, value: Tensor, response_mask: Tensor) -> Tensor:
        """What `value`, (B, T) in nats, becomes; response_mask is (B, T) bool."""

    def coefficient(self, value: Tensor, coefficient: Tensor, response_mask: Tensor) -> Tensor:
        """What `coefficient`, (B, T), becomes: times the derivative of `shape` at `value`."""


@dataclass(frozen=True)
class NoShaping:
    """Leaves value and gradient as they are."""

    def shape(self, value: Tensor, response_mask: Tensor) -> Tensor:
        """v."""
        return value

    def coefficient(self, value: Tensor, coefficient: Tensor, response_mask: Tensor) -> Tensor:
        """c."""
        return coefficient


@dataclass(frozen=True)
class Clip:
    """Caps the value of each token; a token above the cap passes no gradient."""

    threshold: float = 1.0
    """In nats, above 0."""

    def __post_init__(self) -> None:
        if not (isfinite(self.threshold) and self.threshold > 0):
            raise ValueError(f"clip: threshold={self.threshold}. Give a positive number of nats.")

    def shape(self, value: Tensor, response_mask: Tensor) -> Tensor:
        """min(v, threshold)."""
        return value.clamp(max=self.threshold)

    def coefficient(self, value: Tensor, coefficient: Tensor, response_mask: Tensor) -> Tensor:
        """c where v <= threshold, 0 above. A NaN is no number above: it stays to be seen."""
        return torch.where(value > self.threshold, torch.zeros_like(coefficient), coefficient)


@dataclass(frozen=True)
class Sigmoid:
    """Weighs the value of each token by sigmoid(v - target)."""

    target: float = 0.1
    """In nats, at least 0. A higher one weakens the term."""

    def __post_init__(self) -> None:
        if not (isfinite(self.target) and self.target >= 0):
            raise ValueError(f"sigmoid: target={self.target}. Give a number of nats, at least 0.")

    def shape(self, value: Tensor, response_mask: Tensor) -> Tensor:
        """sigmoid(v - target) * v."""
        return torch.sigmoid(value - self.target) * value

    def coefficient(self, value: Tensor, coefficient: Tensor, response_mask: Tensor) -> Tensor:
        """c * (sigma + v * sigma * (1 - sigma)), the product rule; 1 - sigma is written so that it keeps its digits."""
        sigma, rest = torch.sigmoid(value - self.target), torch.sigmoid(self.target - value)
        return (sigma + value * sigma * rest) * coefficient


@dataclass(frozen=True)
class LengthNormalized:
    """Divides by the number of unmasked tokens of the response."""

    def shape(self, value: Tensor, response_mask: Tensor) -> Tensor:
        """v / |y|."""
        return value / _lengths(response_mask)

    def coefficient(self, value: Tensor, coefficient: Tensor, response_mask: Tensor) -> Tensor:
        """c / |y|."""
        return coefficient / _lengths(response_mask)


_KINDS: dict[str, type[NoShaping | Clip | Sigmoid | LengthNormalized]] = {
    "none": NoShaping,
    "clip": Clip,
    "sigmoid": Sigmoid,
    "length_normalized": LengthNormalized,
}


def kinds() -> tuple[str, ...]:
    """The kinds that `shaping` knows, in the order of the table."""
    return tuple(_KINDS)


def shaping(kind: str, **parameters: float | None) -> Shaping:
    """The shaping called `kind` with its parameters; None stands for one that was not given.

    Raises ValueError for an unknown kind, for a parameter that the kind does not read, and for an impossible number.
    """
    if kind not in _KINDS:
        raise ValueError(f"There is no KL shaping {kind!r}. Known kinds: {', '.join(kinds())}.")
    given = {name: number for name, number in parameters.items() if number is not None}
    read = [field.name for field in fields(_KINDS[kind])]
    unread = [name for name in given if name not in read]
    if unread:
        raise ValueError(
            f"KL shaping {kind!r} does not read {', '.join(unread)}; it reads {', '.join(read) or 'no parameter'}. "
            "Take it out, or choose the kind that reads it."
        )
    return _KINDS[kind](**given)


def _lengths(response_mask: Tensor) -> Tensor:
    """(B, 1); 1 for a fully masked row, where there is nothing to divide."""
    return response_mask.sum(dim=-1, keepdim=True).clamp(min=1)
