"""What enumeration finds of a rule on the panel: which divergence's gradient it is, on-policy and off-policy.

A rule follows a divergence only if its expected gradient equals that divergence's on every problem of the panel, size
included, within the subject's tolerance. Off-policy the truth is that of the policy being updated, per token on the
prefixes that mu visits.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import torch
from torch import Tensor

from klreg_verl.core import exact
from klreg_verl.doctor import enumeration, gradients
from klreg_verl.doctor.gradients import DIVERGENCES, Level, Sampler
from klreg_verl.doctor.policies import Problem, panel
from klreg_verl.doctor.rules import REFERENCE_SAMPLES, Pull, Rule
from klreg_verl.doctor.subjects import Subject

Verdict = Literal["ok", "biased", "void"]
Candidate = tuple[str, Level]
WHOLE_AND_TOKENS: tuple[Candidate, ...] = tuple(
    (name, level) for level in ("sequence", "token") for name in DIVERGENCES
)
COARSE: tuple[Candidate, ...] = (("reverse", "coarse"), ("forward", "coarse"))


@dataclass(frozen=True, kw_only=True)
class Match:
    """A gradient that is everywhere the same multiple of a divergence's."""

    name: str
    level: Level
    factor: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Facts:
    """One rule's findings; the gradients are rows of a matrix, a row for each problem, zero-padded."""

    found: Tensor
    on_policy: Match | None
    off_policy: Match | None
    vanishes: bool

    @property
    def followed(self) -> Match | None:
        """The divergence whose gradient is followed at its true size; None where there is none."""
        return self.on_policy if self.on_policy is not None and self.on_policy.factor == 1.0 else None

    @property
    def follows_off_policy(self) -> str:
        """Its name off-policy, or none."""
        return self.off_policy.name if self.off_policy is not None and self.off_policy.factor == 1.0 else "none"


@cache
@enumeration.one_thread()
def facts(subject: Subject, rule: Rule) -> Facts:
    """The findings on one rule, cached."""
    candidates = WHOLE_AND_TOKENS + (COARSE if rule.estimator in exact.NAMES else ())
    on, off = (_panel_gradient(subject, rule, sampler) for sampler in ("policy", "older"))
    smallest = subject.tolerance * truth("reverse", "sequence").norm(dim=1)
    return Facts(
        found=on,
        on_policy=_match(on, candidates, "policy", subject.tolerance),
        off_policy=_match(off, candidates, "older", subject.tolerance),
        vanishes=bool((on.norm(dim=1) < smallest).all()),
    )


@cache
def truth(name: str, level: Level, sampler: Sampler = "policy") -> Tensor:
    """A divergence's gradients on the panel, a row for each problem."""
    return _rows(gradients.divergence_gradient(listed, name, level, sampler) for listed in panel())


def cosines(found: Tensor, name: str, level: Level) -> list[float]:
    """To a divergence's gradient, of each problem on which both have a direction."""
    pairs = zip(found, truth(name, level), strict=True)
    return [number for pair in pairs if (number := gradients.cosine(*pair)) is not None]


def largest_error(found: Tensor, name: str, level: Level) -> float:
    """Relative error against a divergence's gradient on the worst problem."""
    return max(map(gradients.relative_error, found, truth(name, level)))


@cache
@enumeration.one_thread()
def value_means(subject: Subject, estimator: str, cap: float | None) -> tuple[float, ...]:
    """E[sum_t value_t] on each problem, on-policy."""
    means = []
    sampler: Sampler = "reference" if estimator == REFERENCE_SAMPLES else "policy"
    for listed in panel():
        at_tokens = (listed.logits[listed.prefixes], listed.ref_logits[listed.prefixes])
        values = subject.value(estimator, *at_tokens, listed.tokens, cap).double()
        weights = gradients.chances(listed, sampler).unsqueeze(-1) * listed.response_mask
        means.append(float(torch.where(listed.response_mask, weights * values, 0.0).sum()))
    return tuple(means)


def loss_half_vanishes(subject: Subject, pull: Pull) -> bool:
    """Whether the half in the loss pulls nowhere on its own."""
    alone = Rule(placement="loss", estimator=pull.estimator, correction=pull.correction)
    return facts(subject, alone.but(shaping=pull.shaping, cap=pull.cap)).vanishes


def _panel_gradient(subject: Subject, rule: Rule, sampler: Sampler) -> Tensor:
    return _rows(map(partial(_gradient_on, subject, rule, sampler), panel()))


def _gradient_on(subject: Subject, rule: Rule, sampler: Sampler, listed: Problem) -> Tensor:
    return enumeration.gradient(subject, rule, listed, sampler)


def _rows(each: Iterable[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(each), batch_first=True)


def _match(found: Tensor, candidates: tuple[Candidate, ...], sampler: Sampler, tolerance: float) -> Match | None:
    """The first that is equal, otherwise the first that is a multiple, whole responses before tokens."""
    truths = _stacked(candidates, sampler)
    factors = (truths * found).sum(dim=(1, 2)) / truths.square().sum(dim=(1, 2))
    scaled = factors.reshape(-1, 1, 1) * truths
    errors = ((found - scaled).norm(dim=2) / scaled.norm(dim=2)).amax(dim=1)
    fits = [i for i, error in enumerate(errors.tolist()) if error < tolerance]
    equal = [i for i in fits if abs(float(factors[i]) - 1.0) < tolerance]
    if not fits:
        return None
    best = (equal or fits)[0]
    return Match(name=candidates[best][0], level=candidates[best][1], factor=1.0 if equal else float(factors[best]))


@cache
def _stacked(candidates: tuple[Candidate, ...], sampler: Sampler) -> Tensor:
    return torch.stack([truth(name, level, sampler) for name, level in candidates])
