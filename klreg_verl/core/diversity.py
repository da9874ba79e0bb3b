"""How varied the responses to one prompt are; everything is computed per prompt and then averaged over prompts.

    unique_valid     distinct right answers of a batch: the two numbers that every training step logs
    Answers          what was drawn for one prompt, as counts of its distinct right answers
    Solutions        distinct answers, coverage and entropy over right answers, all rarefied to equal numbers of draws
    mean_cosine      mean pairwise cosine of response embeddings, in closed form
    distinct_n, self_bleu, vendi     of the texts or embeddings themselves

Accuracy and diversity are kept apart. With more right draws there are more distinct right answers, whatever the policy
prefers among them; so what is *conditional* asks how different m right draws are, with the same m for all, and what is
*unconditional* how many distinct right answers n draws give, right or wrong. Pairs of different prompts measure topics,
not diversity, and never enter but as a baseline.

Sources: rarefaction: Hurlbert (1971), Ecology 52, eq. 11; distinct-n: Li et al. (2016), arXiv 1510.03055; self-BLEU:
Zhu et al. (2018), arXiv 1802.01886; Vendi score: Friedman and Dieng (2022), arXiv 2210.02410.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # tensors are taken as they come, and nothing here needs torch
    from torch import Tensor

    Ids = Sequence[Any] | Tensor
    Flags = Sequence[bool] | Tensor

Array = np.ndarray
CHUNK = 512
"""Embeddings widened to float64 at a time: at 384 dimensions 1.5 MB, which stays in a core's cache."""


# ---------------------------------------------------------------------------------------------------- each step


def unique_valid(
    answers: Sequence[str], valid: Flags, group_ids: Ids, num_possible: Sequence[int | None]
) -> dict[str, float]:
    """Distinct valid answers per prompt, and their share of all that exist.

    All four have one entry per response; `num_possible` is the number of valid answers of its prompt, None if unknown.
    diversity/unique_valid is the mean over prompts, prompts without a valid answer included; diversity/coverage the
    mean of distinct / possible over the prompts where that is known. A key is absent when there is nothing to average.
    A coverage above 1 is not hidden: `num_possible` is wrong then, or one answer is spelled in several ways.
    """
    prompts = by_prompt(answers, valid, group_ids, num_possible).values()
    known = [prompt for prompt in prompts if prompt.num_possible is not None]
    metrics = {
        "diversity/unique_valid": [float(len(prompt.counts)) for prompt in prompts],
        "diversity/coverage": [len(prompt.counts) / int(prompt.num_possible or 1) for prompt in known],
    }
    return {key: sum(values) / len(values) for key, values in metrics.items() if values}


# ---------------------------------------------------------------------------------------------------- answers


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What was drawn for one prompt."""

    num_samples: int
    counts: tuple[int, ...]
    """How often each distinct right answer was drawn, most frequent first."""
    num_possible: int | None = None
    """How many right answers exist; None if unknown."""

    @property
    def num_valid(self) -> int:
        """Right draws."""
        return sum(self.counts)


def by_prompt(
    answers: Sequence[str], valid: Flags, group_ids: Ids, num_possible: Sequence[int | None]
) -> dict[Hashable, Answers]:
    """The draws of each prompt, prompts in order of appearance; arguments as for `unique_valid`.

    Raises:
        ValueError: responses of a prompt state different `num_possible`, or one below 1.
    """
    right: dict[Hashable, Counter[str]] = defaultdict(Counter)
    drawn: Counter[Hashable] = Counter()
    stated: dict[Hashable, set[int | None]] = defaultdict(set)
    for answer, good, prompt, number in zip(answers, _list(valid), _list(group_ids), num_possible, strict=True):
        stated[prompt].add(number)
        drawn[prompt] += 1
        right[prompt].update([answer] if good else [])
    for prompt, numbers in stated.items():
        _check(prompt, numbers)
    return {
        prompt: Answers(
            num_samples=drawn[prompt],
            counts=tuple(sorted(right[prompt].values(), reverse=True)),
            num_possible=next(iter(stated[prompt])),
        )
        for prompt in stated
    }


def _check(prompt: Hashable, numbers: set[int | None]) -> None:
    given = ", ".join(sorted(map(str, numbers)))
    if len(numbers) > 1:
        raise ValueError(f"The responses of prompt {prompt} state different numbers of valid answers: {given}.")
    if any(number is not None and number < 1 for number in numbers):
        raise ValueError(f"Prompt {prompt} is said to have {given} valid answers. Give at least 1, or None if unknown.")


def _list(values: Any) -> list[Any]:
    """Plain Python values of a sequence or a tensor."""
    return values.tolist() if hasattr(values, "tolist") else list(values)


def rarefied_distinct(counts: Sequence[int], drawn: int, at: int) -> float:
    """Expected distinct answers among `at` of the `drawn` draws: sum_i 1 - C(drawn - c_i, at) / C(drawn, at).

    Unbiased for what `at` fresh draws would give (Hurlbert 1971, eq. 11). `counts` may be of some of the draws only,
    the right ones: then wrong ones take up draws.

    Raises:
        ValueError: more draws are asked for than there were.
    """
    _check_at(at, drawn)
    return sum(1 - math.comb(drawn - count, at) / math.comb(drawn, at) for count in counts)


def rarefied_entropy(counts: Sequence[int], at: int) -> float:
    """Expected plug-in entropy [nats] of the answers of `at` of the draws.

    The plug-in entropy grows with the number of draws; at equal `at` two policies can be compared. Exact: the count of
    an answer among the drawn is hypergeometric.
    """
    total = sum(counts)
    _check_at(at, total)
    ways = math.comb(total, at)
    return sum(
        -(part / at) * math.log(part / at) * (math.comb(count, part) * math.comb(total - count, at - part) / ways)
        for count in counts
        for part in range(max(1, at - total + count), min(count, at) + 1)
    )


def _check_at(at: int, drawn: int) -> None:
    if not 1 <= at <= drawn:
        raise ValueError(f"{at} of {drawn} draws: rarefaction needs at least 1 and at most as many as there were.")


def uniform_distinct(num_possible: int, draws: int) -> float:
    """Distinct answers expected of uniform draws from N: N (1 - (1 - 1/N)^draws); N may outgrow every float.

    min(N, draws) is no denominator for coverage: a uniform policy itself would reach 0.74 of it at N = 24, draws = 16.
    """
    if num_possible > 10**15 * draws:
        return float(draws)
    return 1.0 if num_possible == 1 else -num_possible * math.expm1(draws * math.log1p(-1 / num_possible))


@dataclass(frozen=True, kw_only=True)
class Solutions:
    """Means over prompts; NaN where no prompt could be used. n and m are the draws that all were rarefied to."""

    accuracy: float
    """Right draws of all draws."""
    distinct: float
    """Unconditional: distinct right answers in n draws, right or wrong."""
    share_of_possible: float
    """The same over N, prompts with N of 2 or more."""
    share_of_uniform: float
    """The same over what n draws of a policy that is always right, and uniform over right answers, would give."""
    valid_distinct: float
    """Conditional: distinct answers in m right draws, prompts with as many."""
    valid_share_of_possible: float
    """The same over N."""
    valid_share_of_uniform: float
    """The same over what m uniform right draws would give: 1 is uniform, whatever the accuracy."""
    valid_entropy: float
    """Entropy [nats] of the answers of m right draws (expected plug-in entropy, at most log min(N, m))."""
    prompts: int
    """Prompts in the unconditional means."""
    valid_prompts: int
    """Prompts with m right draws and N not 1: those of the conditional means. It moves with accuracy; compare arms on
    the prompts that both have (`with_enough`)."""
    samples: int
    """n."""
    valid_samples: int
    """m."""


def solutions(prompts: Iterable[Answers], *, samples: int, valid_samples: int) -> Solutions:
    """Diversity of the right answers, rarefied to `samples` draws, and to `valid_samples` right draws.

    Raises:
        ValueError: a prompt has fewer than `samples` draws.
    """
    given = list(prompts)
    several = [each for each in given if each.num_possible != 1]
    enough = [each for each in several if each.num_valid >= valid_samples]
    distinct = [rarefied_distinct(each.counts, each.num_samples, samples) for each in given]
    several_distinct = [rarefied_distinct(each.counts, each.num_samples, samples) for each in several]
    right = [rarefied_distinct(each.counts, each.num_valid, valid_samples) for each in enough]
    return Solutions(
        accuracy=_mean(each.num_valid / each.num_samples for each in given),
        distinct=_mean(distinct),
        share_of_possible=_mean(_shares(several_distinct, several, None)),
        share_of_uniform=_mean(_shares(several_distinct, several, samples)),
        valid_distinct=_mean(right),
        valid_share_of_possible=_mean(_shares(right, enough, None)),
        valid_share_of_uniform=_mean(_shares(right, enough, valid_samples)),
        valid_entropy=_mean(rarefied_entropy(each.counts, valid_samples) for each in enough),
        prompts=len(given),
        valid_prompts=len(enough),
        samples=samples,
        valid_samples=valid_samples,
    )


def with_enough(prompts: dict[Hashable, Answers], valid_samples: int) -> set[Hashable]:
    """The prompts that the conditional means of `solutions` can use."""
    return {name for name, each in prompts.items() if each.num_possible != 1 and each.num_valid >= valid_samples}


def _shares(values: Sequence[float], prompts: Sequence[Answers], draws: int | None) -> Iterator[float]:
    """Each value over N, or over what `draws` uniform draws give, where N is known."""
    for value, prompt in zip(values, prompts, strict=True):
        if prompt.num_possible is not None:
            whole = prompt.num_possible if draws is None else uniform_distinct(prompt.num_possible, draws)
            yield float(Fraction(value) / Fraction(whole))  # N may outgrow every float


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return sum(known) / len(known) if known else math.nan


# ---------------------------------------------------------------------------------------------------- embeddings


@dataclass(frozen=True, kw_only=True)
class Cosines:
    """Mean pairwise cosines of unit embeddings."""

    prompts: tuple[Any, ...]
    """Prompts with two responses or more, sorted."""
    within: Array
    """(prompts,) mean over the pairs of one prompt."""
    across: float
    """Mean over pairs of different prompts: how alike unrelated responses look; NaN with one prompt."""

    @property
    def mean(self) -> float:
        """Mean of `within` over prompts; 1 minus it is the diversity."""
        return float(self.within.mean()) if len(self.within) else math.nan


def mean_cosine(embeddings: Array, group_ids: Ids) -> Cosines:
    """Mean pairwise cosine of the responses to each prompt: (|sum u|^2 - n) / (n (n - 1)) over unit vectors u.

    The closed form reads each embedding once: no n x n matrix. Sums are in float64.

    Args:
        embeddings: (responses, dimensions), of any length but zero.
        group_ids: (responses,) prompt of each, in any order.

    Raises:
        ValueError: an embedding is zero or not finite (it has no direction), or the lengths do not fit.
    """
    names, inverse, sizes = np.unique(np.asarray(_list(group_ids)), return_inverse=True, return_counts=True)
    if embeddings.ndim != 2 or len(embeddings) != len(inverse):
        raise ValueError(f"{embeddings.shape} embeddings for {len(inverse)} responses: give one row a response.")
    sums = _unit_sums(embeddings, inverse, len(names))
    squares = np.einsum("pd,pd->p", sums, sums)
    several = sizes > 1
    within = (squares[several] - sizes[several]) / (sizes[several] * (sizes[several] - 1.0))
    total = sums.sum(axis=0)
    pairs = len(inverse) ** 2 - float((sizes.astype(np.float64) ** 2).sum())
    across = float((total @ total - squares.sum()) / pairs) if pairs else math.nan
    return Cosines(prompts=tuple(names[several].tolist()), within=within, across=across)


def _unit_sums(embeddings: Array, groups: Array, num_groups: int) -> Array:
    """(groups, dimensions) float64 sums of the unit vectors of each group; rows are read in group order."""
    order = np.argsort(groups, kind="stable")
    sums = np.zeros((num_groups, embeddings.shape[1]))
    for start in range(0, len(order), CHUNK):
        rows = order[start : start + CHUNK]
        units = embeddings[rows].astype(np.float64)
        norms = np.sqrt(np.einsum("nd,nd->n", units, units))
        if not (np.isfinite(norms) & (norms > 0)).all():
            raise ValueError("An embedding is zero or not finite, so its cosine with another is not defined.")
        units /= norms[:, None]
        present, first = np.unique(groups[rows], return_index=True)
        sums[present] += np.add.reduceat(units, first, axis=0)
    return sums


def vendi(embeddings: Array) -> float:
    """Vendi score of one prompt's responses: exp of the entropy of the eigenvalues of the cosine matrix over n.

    Between 1 (all alike) and min(n, dimensions); it grows with n, so compare at equal n. The smaller of the n x n and
    the d x d matrix is decomposed: their eigenvalues but for zeros are the same.
    """
    units = np.asarray(embeddings, dtype=np.float64)
    units = units / np.linalg.norm(units, axis=1, keepdims=True)
    matrix = units @ units.T if len(units) <= units.shape[1] else units.T @ units
    eigenvalues = np.linalg.eigvalsh(matrix / len(units))
    positive = eigenvalues[eigenvalues > 1e-12]
    return float(np.exp(-(positive * np.log(positive)).sum()))


# ---------------------------------------------------------------------------------------------------- tokens


def distinct_n(responses: Sequence[Sequence[Hashable]], n: int) -> float:
    """Distinct n-grams over all n-grams of one prompt's responses (lists of tokens); NaN if none is so long.

    It falls with the number and the length of responses: compare at equal both.
    """
    grams = [gram for response in responses for gram in _grams(response, n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def self_bleu(responses: Sequence[Sequence[Hashable]], max_n: int = 4) -> float:
    """Mean over one prompt's responses of their BLEU against all the others; 1 is all alike. NaN below two responses.

    BLEU with n-grams up to `max_n` but no longer than the response; a precision of 0 counts as 0.1 of one match
    (Chen and Cherry 2014, smoothing 1); closest length in the brevity penalty. An empty response scores 1 where all
    others are empty, too, else 0.
    """
    if len(responses) < 2:
        return math.nan
    precisions = [_precisions(responses, n) for n in range(1, max_n + 1)]
    lengths = [len(response) for response in responses]
    return _mean(_bleu([each[i] for each in precisions], i, lengths) for i in range(len(responses)))


def _grams(response: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    return [tuple(response[start : start + n]) for start in range(len(response) - n + 1)]


def _precisions(responses: Sequence[Sequence[Hashable]], n: int) -> list[float | None]:
    """Clipped n-gram precision of each response against all others; None where it is shorter than n.

    An n-gram is clipped at the largest count in another response: of the two largest counts, the one that is not its
    own.
    """
    counts = [Counter(_grams(response, n)) for response in responses]
    largest: dict[Any, list[int]] = defaultdict(lambda: [0, 0])
    for each in counts:
        for gram, count in each.items():
            largest[gram] = sorted([*largest[gram], count], reverse=True)[:2]
    found: list[float | None] = []
    for each in counts:
        total = each.total()
        matched = sum(min(count, largest[gram][count == largest[gram][0]]) for gram, count in each.items())
        found.append((matched or 0.1) / total if total else None)
    return found


def _bleu(precisions: Sequence[float | None], index: int, lengths: Sequence[int]) -> float:
    known = [precision for precision in precisions if precision is not None]
    others = [length for i, length in enumerate(lengths) if i != index]
    if not known:
        return float(not any(others))
    own = lengths[index]
    closest = min(others, key=lambda length: (abs(length - own), length))
    brevity = 1.0 if own >= closest else math.exp(1 - closest / own)
    return brevity * math.exp(sum(map(math.log, known)) / len(known))
