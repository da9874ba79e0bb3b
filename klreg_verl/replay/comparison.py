"""Inner products of gradients as what a reader asks for: directions, sizes, and how much of each is noise."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any

import torch
from torch import Tensor

from klreg_verl.replay.gradients import Products
from klreg_verl.replay.settings import FORWARD, REVERSE, RUN, TASK

_SAME = 1e-5
"""Two gradients whose difference is at most this share of their length are called the same."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One setting's gradient beside the others. None: it, or what it is compared with, is zero or not finite."""

    name: str
    norm: float | None
    """Its length, in reward units per unit of the parameters, at the setting's beta (1 if not given)."""
    norm_to_task: float | None
    """Its length over that of the task's policy gradient."""
    cosine_task: float | None
    """Below 0: the task pulls away from what the KL asks for."""
    cosine_reverse: float | None
    """With KL(pi || pi_ref) over the vocabulary, per token on these prefixes."""
    cosine_forward: float | None
    """With KL(pi_ref || pi) likewise."""
    halves: float | None
    """Cosine between its gradients on the two halves of the prompts: near 1 it is signal, near 0 noise."""
    same_as: str | None
    """The first setting above with the same gradient."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """All settings against each other."""

    names: tuple[str, ...]
    cosines: Tensor
    """(K, K) float64; NaN where a gradient is zero or not finite."""
    norms: Tensor
    """(K,)."""
    halves: Tensor
    """(K,)."""
    products: Products

    @property
    def rows(self) -> list[Row]:
        """In the order of the settings."""
        return [self._row(place) for place in range(len(self.names))]

    def _row(self, place: int) -> Row:
        task = self.norms[self.names.index(TASK)]
        cosines = {name: _number(self.cosines[place, self.names.index(name)]) for name in (TASK, REVERSE, FORWARD)}
        return Row(
            name=self.names[place],
            norm=_number(self.norms[place]),
            norm_to_task=_number(self.norms[place] / task),
            cosine_task=cosines[TASK],
            cosine_reverse=cosines[REVERSE],
            cosine_forward=cosines[FORWARD],
            halves=_number(self.halves[place]),
            same_as=self._same_as(place),
        )

    def _same_as(self, place: int) -> str | None:
        """|g - h|^2 = |g|^2 + |h|^2 - 2 |g| |h| cos, against the longer of the two."""
        norms, here = self.norms[:place], self.norms[place]
        apart = norms.square() + here.square() - 2 * norms * here * self.cosines[place, :place]
        near = apart <= _SAME**2 * torch.maximum(norms, here).square()
        return next((name for name, same in zip(self.names, near.tolist(), strict=False) if same), None)

    @property
    def own_norm(self) -> float | None:
        """Length of the gradient of the run's own loss: the task's, and its KL term if it has one."""
        places = [place for place, name in enumerate(self.names) if name in (TASK, RUN)]
        return _number(self.products.whole[places][:, places].sum().clamp(min=0).sqrt())

    @property
    def cosine_errors(self) -> Tensor | None:
        """(K, K), at most this standard deviation from the sketch; None where the cosines are exact."""
        sketch = self.products.sketch
        return None if sketch is None else sketch.cosine_error(self.cosines)

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is not finite is None."""
        sketch = self.products.sketch
        errors = self.cosine_errors
        return {
            "settings": [vars(row) for row in self.rows],
            "cosines": [[_number(value) for value in row] for row in self.cosines],
            "parameters": self.products.parameters,
            "gradients": self.products.parts,
            "sketch": None if sketch is None or errors is None else {
                "width": sketch.width,
                "seed": sketch.seed,
                "cosine_error": 1 / sqrt(sketch.width),
                "norm_error": sketch.length_error,
                "cosine_errors": [[_number(value) for value in row] for row in errors],
            },
        }  # fmt: skip


def compare(products: Products) -> Comparison:
    """Cosines and lengths from inner products."""
    whole, apart = products.whole, products.values
    norms = whole.diagonal().clamp(min=0).sqrt()
    each = apart[0, 0].diagonal() * apart[1, 1].diagonal()
    return Comparison(
        names=products.settings,
        cosines=_cosines(whole, norms),
        norms=norms,
        halves=(apart[0, 1].diagonal() / each.clamp(min=0).sqrt()).clamp(-1, 1),
        products=products,
    )


def _cosines(whole: Tensor, norms: Tensor) -> Tensor:
    found = (whole / torch.outer(norms, norms)).clamp(-1, 1)
    return torch.where(found.isfinite(), found, torch.nan)


def _number(value: Tensor) -> float | None:
    number = float(value)
    return number if isfinite(number) else None
