"""Every KL block that the recipe accepts gives the numbers that it gave before: charge, penalty, loss and gradient.

The closed forms of these numbers are tests of their own (test_penalties, test_kl, test_shaping). This table only
notices a change: three random batches in float64 with padding and tokens that the policy or the reference cannot
produce, and of each tensor two projections on fixed random weights. A change that is wanted is written by

    python tests/test_kl_term_golden.py
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from klreg_verl.core import advantages, controllers, exact, penalties
from klreg_verl.core.controllers import Observation
from klreg_verl.experiment.kl_settings import EXACT, SAMPLED, KLSpec, ShapingSpec
from klreg_verl.verl_hooks import terms

GOLDEN = Path(__file__).parent / "goldens" / "kl_term.json"
RELATIVE = 1e-11
"""Vectorized exp and log differ between processors in the last bits of a float64."""
SHAPINGS = (
    ShapingSpec(),
    ShapingSpec(kind="clip", threshold=0.5),
    ShapingSpec(kind="sigmoid", target=0.2),
    ShapingSpec(kind="length_normalized"),
)
CONTROLLERS: tuple[dict[str, Any], ...] = (
    {"kind": "fixed"},
    {"kind": "verl_adaptive", "target": 0.1, "horizon": 1000, "signal": "token"},
    {"kind": "multiplicative", "target": 0.5, "signal": "response"},
    {"kind": "dynamic", "reward_threshold": 0.4},
    {"kind": "linear", "beta_end": 0.5, "steps": 7},
    {"kind": "exponential", "beta_end": 0.5, "steps": 7},
    {"kind": "cosine", "beta_end": 0.5, "steps": 7},
    {"kind": "matched_kl", "signal": "response", "target": 0.5, "beta_min": 1e-3, "beta_max": 1.0},
)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Eight responses of two prompts, (8, 6); the last row is padding."""

    logprobs: Tensor
    ref_logprobs: Tensor
    old_logprobs: Tensor
    mask: Tensor
    groups: Tensor
    scores: Tensor
    logits: Tensor
    ref_logits: Tensor

    @staticmethod
    def draw(seed: int) -> Batch:
        """The last batch has tokens that one of the two models cannot produce, one of them under the mask."""
        source = torch.Generator().manual_seed(seed)
        old, ref = (-2.5 * torch.rand(8, 6, generator=source, dtype=torch.float64) - 0.01 for _ in range(2))
        new = old + 0.2 * torch.randn(8, 6, generator=source, dtype=torch.float64)
        mask = torch.arange(6) < torch.tensor([6, 4, 1, 5, 6, 2, 3, 0])[:, None]
        if seed == 3:
            ref[0, 2] = ref[1, 5] = -math.inf
            new[3, 1] = -math.inf
        logits, ref_logits = (torch.randn(8, 6, 11, generator=source, dtype=torch.float64) for _ in range(2))
        scores = torch.rand(8, generator=source, dtype=torch.float64).round()
        groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
        return Batch(
            logprobs=new,
            ref_logprobs=ref,
            old_logprobs=old,
            mask=mask,
            groups=groups,
            scores=scores,
            logits=logits,
            ref_logits=ref_logits,
        )


BATCHES = {seed: Batch.draw(seed) for seed in (1, 2, 3)}


def projections(values: Tensor) -> list[float]:
    """Two sums of the finite values under fixed random weights, and how many values are infinite and NaN."""
    weights = torch.rand(2, values.numel(), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flat = values.detach().double().flatten()
    sums = weights @ torch.where(flat.isfinite(), flat, 0.0)
    return [*sums.tolist(), float(flat.isinf().sum()), float(flat.isnan().sum())]


def blocks() -> Iterator[tuple[str, KLSpec]]:
    """Every combination of the fields, by name."""
    for place, name, shape, cap in itertools.product(("reward", "loss", "both"), SAMPLED, SHAPINGS, (None, 0.3)):
        credits = itertools.product(penalties.CREDITS, penalties.BASELINES) if place == "reward" else [(None, None)]
        corrections = penalties.CORRECTIONS if place != "reward" else (None,)
        for (credit, baseline), correction in itertools.product(credits, corrections):
            fields = {"credit": credit, "baseline": baseline, "correction": correction, "cap": cap}
            key = " ".join(map(str, (place, name, shape.kind, *fields.values())))
            yield key, KLSpec(placement=place, estimator=name, follows="none", beta=0.1, shaping=shape, **fields)


def numbers_of(kl: KLSpec, batch: Batch) -> Iterator[list[float]]:
    """Charge and penalty where the block charges; loss and gradient where it has one."""
    if kl.in_reward:
        yield projections(terms.token_charge(kl, batch.logprobs, batch.ref_logprobs, batch.mask))
        yield projections(terms.reward_penalty(kl, batch.logprobs, batch.ref_logprobs, batch.mask, batch.groups))
    if kl.in_loss:
        policy = batch.logprobs.clone().requires_grad_()
        loss = terms.loss_per_token(kl, policy, batch.ref_logprobs, batch.old_logprobs, batch.mask)
        loss.sum().backward()
        yield projections(loss)
        yield projections(policy.grad)


def exact_numbers(name: str, batch: Batch) -> Iterator[list[float]]:
    logits = batch.logits.clone().requires_grad_()
    value = exact.divergence(name, k=4 if name.startswith("topk") else None)(logits, batch.ref_logits)
    value.sum().backward()
    yield projections(value)
    yield projections(logits.grad)


def betas(given: dict[str, Any]) -> list[float]:
    """What ten observations make of beta 0.1."""
    rule = controllers.controller(**given)
    state, course = rule.start(0.1), []
    for step, kl in enumerate((0.0, 0.2, 0.5, 0.9, 1.4, 0.7, 0.4, 0.3, 0.1, math.nan), start=1):
        seen = Observation(kl_token=kl / 5, kl_response=kl, score=kl / 2, responses=64, step=step)
        state = rule.after(state, seen)
        course.append(state.beta)
    return course


def table() -> dict[str, Any]:
    """All of it, by the setting's name."""
    found: dict[str, Any] = {}
    for key, kl in blocks():
        found[key] = [list(numbers_of(kl, each)) for each in BATCHES.values()]
    for name in EXACT:
        found[name] = [list(exact_numbers(name, each)) for each in BATCHES.values()]
    for name in advantages.names():
        found[name] = [[projections(advantages.compute(name, b.scores, b.groups))] for b in BATCHES.values()]
    for given in CONTROLLERS:
        found[str(given["kind"])] = [[betas(given)]]
    return found


def flat(entry: Any) -> list[float]:
    return [number for batch in entry for numbers in batch for number in numbers]


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text())


@pytest.fixture(scope="module")
def today() -> dict[str, Any]:
    return table()


def test_every_block_gives_the_numbers_that_it_gave(golden: dict[str, Any], today: dict[str, Any]):
    assert set(golden) == set(today)
    expected = {key: pytest.approx(flat(entry), rel=RELATIVE, abs=1e-12) for key, entry in golden.items()}
    assert not {key for key, numbers in expected.items() if flat(today[key]) != numbers}


def test_a_beta_that_is_off_by_a_millionth_is_noticed(golden: dict[str, Any]):
    entry = flat(golden["reward k1 none sequence siblings None None"])
    assert [number * (1 + 1e-6) for number in entry] != pytest.approx(entry, rel=RELATIVE, abs=1e-12)


if __name__ == "__main__":
    rows = (f"{json.dumps(key)}: {json.dumps(entry)}" for key, entry in table().items())
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text("{\n" + ",\n".join(rows) + "\n}\n")
