"""Inner products of long vectors from short ones: a seeded count sketch.

Each coordinate gets a random sign and a random bucket, and a bucket holds the sum of its signed coordinates. For m
buckets the inner product of two sketches has the expectation of the true one. To first order in 1/m a cosine c from
sketches has a standard deviation of at most (1 - c^2) / sqrt(m), and a length one of at most 1 / sqrt(2 m) of itself;
a sum's sketch is the sum of the sketches, and equal vectors have a cosine of exactly 1.

Source: Charikar, Chen and Farach-Colton (2002), "Finding frequent items in data streams"; Weinberger et al. (2009),
arXiv:0902.2206, for inner products.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from torch import Tensor

_BLOCK = 1 << 20
"""Coordinates whose signs and buckets are drawn at a time."""


@dataclass(frozen=True, kw_only=True)
class CountSketch:
    """Maps vectors to `width` numbers each; the same seed gives the same map on every device."""

    width: int
    seed: int

    def __call__(self, vectors: Tensor) -> Tensor:
        """(N, P) float32 -> (N, width) float64."""
        found = torch.zeros(len(vectors), self.width, dtype=torch.float64, device=vectors.device)
        for number, block in enumerate(vectors.split(_BLOCK, dim=1)):
            buckets, signs = self._drawn(number, block.shape[1])
            found.index_add_(1, buckets.to(block.device), block.double() * signs.to(block.device))
        return found

    def _drawn(self, number: int, size: int) -> tuple[Tensor, Tensor]:
        # numpy's, because torch's generator on the CPU reads 32 bits of a seed
        generator = np.random.default_rng([self.seed, number])
        signs = 2.0 * generator.integers(2, size=size) - 1
        return torch.from_numpy(generator.integers(self.width, size=size)), torch.from_numpy(signs)

    def cosine_error(self, cosine: Tensor) -> Tensor:
        """At most this standard deviation (first order), for cosines as found."""
        return (1 - cosine.square()) / sqrt(self.width)

    @property
    def length_error(self) -> float:
        """At most this relative standard deviation of a vector's length (first order)."""
        return 1 / sqrt(2 * self.width)
