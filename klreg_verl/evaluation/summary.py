"""The numbers of one evaluation, from its graded samples alone. The prompt is the unit: intervals are over prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from klreg_verl.core import diversity, passk
from klreg_verl.evaluation.store import Rows

Summary = dict[str, Any]


def summarize(rows: Rows) -> Summary:
    """Accuracy, pass@k, maj@k (k = 1, 2, 4, ... and the number of samples), uniqueness and length.

    `rows` are graded samples, equally many of each prompt. Raises ValueError where they are not, or there are none.
    Where the reward grades, the score is the headline, and what is of right answers is null.
    """
    groups = by_prompt(rows)
    return {
        "prompts": len(groups),
        "samples": len(groups[next(iter(groups))]),
        "headline": "score" if is_graded(rows) else "accuracy",
        "score": _mean(rows, "score"),
        "score_interval": _finite(asdict(passk.mean_interval(_scores(groups)))),
        **(_OF_NOTHING_RIGHT if is_graded(rows) else _of_right_answers(rows, groups)),
        "length": _lengths(rows),
        "truncated": _mean(rows, "truncated"),
        "format_ok": _mean(rows, "format_ok"),
        "timeouts": int(sum(row["timeout"] > 0 for row in rows)),
        "errors": int(sum(bool(row["error"]) for row in rows)),
    }


_UNKNOWN: dict[str, float | None] = {"mean": None, "low": None, "high": None}
_OF_NOTHING_RIGHT: Summary = {
    **{"accuracy": _UNKNOWN, "pass": {"1": _UNKNOWN}, "maj": {"1": _UNKNOWN}, "solved": None},
    **{"distinct": None, "distinct_right": None, "coverage": None, "diversity": {}},
}


def _of_right_answers(rows: Rows, groups: Mapping[int, Rows]) -> Summary:
    samples, right = _right(groups)
    return {
        "accuracy": _interval([count / samples for count in right]),
        **of_subsets(rows, passk.powers_up_to(samples)),
        "solved": sum(count > 0 for count in right),
        **uniqueness(list(groups.values())),
    }


def is_graded(rows: Rows) -> bool:
    """Whether the reward grades, so that no sample is right or wrong."""
    return any(row["valid"] is None for row in rows)


def _scores(groups: Mapping[int, Rows]) -> list[float]:
    """The mean score of each prompt."""
    return [sum(float(row["score"]) for row in group) / len(group) for group in groups.values()]


def of_subsets(rows: Rows, ks: Sequence[int]) -> Summary:
    """pass@k and maj@k, of right answers. Raises ValueError for a k above the number of samples of a prompt."""
    groups = by_prompt(rows)
    samples, right = _right(groups)
    votes = [[(row["answer"], float(row["valid"])) for row in group] for group in groups.values()]
    return {
        "pass": {str(k): _interval(passk.pass_at_k(right, samples, k)) for k in ks},
        "maj": {str(k): _interval(passk.maj_at_k(votes, k)) for k in ks},
    }


def _right(groups: Mapping[int, Rows]) -> tuple[int, list[int]]:
    """Samples of a prompt, and how many of each prompt's are right."""
    return len(next(iter(groups.values()))), [sum(row["valid"] for row in group) for group in groups.values()]


def by_prompt(rows: Rows) -> dict[int, Rows]:
    """The samples of each prompt, in order. Raises ValueError where their numbers differ, or there is none."""
    groups: dict[int, Rows] = {}
    for row in rows:
        groups.setdefault(row["prompt"], []).append(row)
    sizes = sorted({len(group) for group in groups.values()})
    if len(sizes) != 1:
        raise ValueError(f"The prompts have {sizes or 'no'} samples; equally many of each are needed.")
    return groups


def uniqueness(groups: Sequence[Rows]) -> Summary:
    """How many different answers a prompt's samples hold.

    distinct: different answers, right or wrong, over the number of samples. distinct_right: different right answers per
    prompt. coverage: these over all that exist, where that is known. `diversity`: core.diversity.solutions, which tells
    accuracy and diversity apart by rarefying to equal numbers of right answers.
    """
    rows = [row for group in groups for row in group]
    columns = ([row[name] for row in rows] for name in ("answer", "valid", "prompt"))
    answers = list(diversity.by_prompt(*columns, [_count(row["num_valid"]) for row in rows]).values())
    samples = len(groups[0])
    kinds = diversity.solutions(answers, samples=samples, valid_samples=min(samples, max(2, samples // 4)))
    return {
        "distinct": _average(len({row["answer"] for row in group}) / samples for group in groups),
        "distinct_right": _average(len(one.counts) for one in answers),
        "coverage": _average(len(one.counts) / one.num_possible for one in answers if one.num_possible),
        "diversity": _finite(asdict(kinds)),
    }


def against(rows: Rows, start: Rows) -> Summary:
    """What changed against another model on the same prompts with the same number of samples.

    The difference of the accuracies is taken prompt by prompt; see core.passk.turnover for newly solved and newly lost.

    Raises ValueError where prompts or numbers of samples differ.
    """
    ours, theirs = by_prompt(rows), by_prompt(start)
    samples = len(next(iter(ours.values())))
    if list(ours) != list(theirs) or samples != len(next(iter(theirs.values()))):
        raise ValueError("Two evaluations are compared that have not the same prompts and numbers of samples.")
    scored = passk.mean_interval([a - b for a, b in zip(_scores(ours), _scores(theirs), strict=True)])
    if is_graded(rows):
        return {"score_gain": _finite(asdict(scored))}
    after, before = ([sum(row["valid"] for row in group) for group in one.values()] for one in (ours, theirs))
    changed, places = passk.turnover(before, after, samples), list(ours)
    gained = passk.mean_interval([(a - b) / samples for a, b in zip(after, before, strict=True)])
    return {
        "accuracy_gain": _finite(asdict(gained)),
        "solved_new": [places[index] for index in changed.new],
        "solved_lost": [places[index] for index in changed.lost],
        "by_chance": changed.by_chance,
    }


def metrics(rows: Rows, task: str) -> dict[str, float]:
    """Accuracy, score and pass@k under the keys of metrics.jsonl: eval/<data_source>/... for each source of the file.

    A skill's accuracy is retention/<skill>; a task `skill/<name>` is one skill, whatever its file calls it.
    """
    if task.startswith("skill/"):
        return _metrics(rows, task)
    sources = dict.fromkeys(row["data_source"] for row in rows)
    parts = (_metrics([row for row in rows if row["data_source"] == source], source) for source in sources)
    return {key: value for part in parts for key, value in part.items()}


def _metrics(rows: Rows, source: str) -> dict[str, float]:
    groups, skill = by_prompt(rows), source.removeprefix("skill/")
    scores = _scores(groups)
    score = sum(scores) / len(scores)
    if is_graded(rows):
        return {f"eval/{source}/score" if skill == source else f"retention/{skill}": score}
    samples, right = _right(groups)
    accuracy = sum(right) / (samples * len(right))
    if skill != source:
        return {f"retention/{skill}": accuracy}
    ks = passk.powers_up_to(samples)
    shares = {f"eval/{source}/pass@{k}": float(passk.pass_at_k(right, samples, k).mean()) for k in ks}
    return {f"eval/{source}/accuracy": accuracy, f"eval/{source}/score": score, **shares}


def _interval(values: Any) -> dict[str, float | None]:
    return _finite(asdict(passk.share_interval(values)))


def _lengths(rows: Rows) -> dict[str, float | None]:
    """Mean response tokens: of all, of right ones, of wrong ones."""
    return {
        "mean": _average(row["tokens"] for row in rows),
        "right": _average(row["tokens"] for row in rows if row["valid"]),
        "wrong": _average(row["tokens"] for row in rows if not row["valid"]),
    }


def _mean(rows: Rows, name: str) -> float | None:
    return _average(float(row[name]) for row in rows)


def _average(values: Any) -> float | None:
    """None of nothing: JSON has no NaN."""
    given = list(values)
    return sum(given) / len(given) if given else None


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _count(text: str | None) -> int | None:
    return int(text) if text else None
