"""How many different right answers a policy finds."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from torch import Tensor

Ids = Sequence[int] | Tensor
Flags = Sequence[bool] | Tensor


def unique_valid(
    answers: Sequence[str], valid: Flags, group_ids: Ids, num_possible: Sequence[int | None]
) -> dict[str, float]:
    """Distinct valid answers per prompt, and their share of all that exist.

    All four have one entry per response; `num_possible` is the number of valid answers of its prompt, None if unknown.
    diversity/unique_valid is the mean over prompts, prompts without a valid answer included; diversity/coverage the
    mean of distinct / possible over the prompts where that is known. A key is absent when there is nothing to average.
    A coverage above 1 is not hidden: `num_possible` is wrong then, or one answer is spelled in several ways.
    """
    found, possible = _by_prompt(answers, valid, group_ids, num_possible)
    shares = [len(found[prompt]) / number for prompt, number in possible.items()]
    metrics = {"diversity/unique_valid": [float(len(distinct)) for distinct in found.values()]}
    metrics["diversity/coverage"] = shares
    return {key: sum(values) / len(values) for key, values in metrics.items() if values}


def _by_prompt(
    answers: Sequence[str], valid: Flags, group_ids: Ids, num_possible: Sequence[int | None]
) -> tuple[dict[int, set[str]], dict[int, int]]:
    """(distinct valid answers, number possible where known) of each prompt."""
    found: dict[int, set[str]] = defaultdict(set)
    stated: dict[int, set[int | None]] = defaultdict(set)
    for answer, good, prompt, number in zip(answers, _list(valid), _list(group_ids), num_possible, strict=True):
        stated[prompt].add(number)
        found[prompt].update([answer] if good else [])
    for prompt, numbers in stated.items():
        _check(prompt, numbers)
    possible = {prompt: number for prompt, (number,) in stated.items() if number is not None}
    return found, possible


def _check(prompt: int, numbers: set[int | None]) -> None:
    given = ", ".join(sorted(map(str, numbers)))
    if len(numbers) > 1:
        raise ValueError(f"The responses of prompt {prompt} state different numbers of valid answers: {given}.")
    if any(number is not None and number < 1 for number in numbers):
        raise ValueError(f"Prompt {prompt} is said to have {given} valid answers. Give at least 1, or None if unknown.")


def _list(values: Iterable[int] | Tensor) -> list[int]:
    return [int(value) for value in values]
