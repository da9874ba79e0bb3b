"""`make bench`: grading DeepScaleR's real answers, ours against math-verify's own parse and verify. Prints times.

Both grade the same responses: reasoning, then a box with the right answer as it is, the right answer written
differently, or another row's answer. math-verify reads the whole response, as its documentation shows and as others
call it; ours goes through compute_score. The verdicts are the same (tests/test_grading.py has where ours are better).
"""

from __future__ import annotations

import json
import random
import re
import statistics
import time
from collections.abc import Callable, Sequence

import pytest
from real_data import agentica

from data_prep.grading.mathematics import POOL, _verified
from data_prep.rewards import compute_score

ROWS, BATCH = 1200, 240
Response = tuple[str, str]
"""A right answer, and a response to grade against it."""

math_verify = pytest.importorskip("math_verify", reason="math-verify is not installed (make setup)")


def rows() -> list[tuple[str, str]]:
    """Question and right answer of the training files, in an order that the seed fixes."""
    folder = agentica() / "train"
    files = [json.loads((folder / name).read_text()) for name in ("aime.json", "math.json")]
    found = [(row["problem"], str(row["answer"]).strip()) for file in files for row in file if row["answer"]]
    return random.Random(7).sample(found, ROWS)


def responses() -> list[Response]:
    chosen = rows()
    made = []
    for place, (question, gold) in enumerate(chosen):
        other = chosen[place - 1][1]
        answer = (gold, rewritten(gold), other)[place % 3]
        reasoning = f"We are asked: {question}\nLet us think. " * 3
        made.append((gold, f"{reasoning}</think>\nPutting this together:\n\n\\[\\boxed{{{answer}}}\\]"))
    return made


def rewritten(answer: str) -> str:
    """The same answer as another writer would put it."""
    text = answer.replace(r"\frac", r"\dfrac")
    text = re.sub(r"^(-?\d+)$", r"\1.0", text)
    return re.sub(r"([a-z0-9}]) ?\+ ?([a-z0-9\\{}^]+)$", r"\2 + \1", text)


def ours(batch: Sequence[Response]) -> list[bool]:
    return [compute_score("deepscaler", response, gold)["score"] == 1.0 for gold, response in batch]


def theirs(batch: Sequence[Response]) -> list[bool]:
    parse, verify = math_verify.parse, math_verify.verify
    return [verify(parse(rf"\boxed{{{gold}}}"), parse(response)) for gold, response in batch]


def timed(grade: Callable[[Sequence[Response]], list[bool]], batch: Sequence[Response]) -> tuple[float, list[bool]]:
    begun = time.perf_counter()
    verdicts = grade(batch)
    return time.perf_counter() - begun, verdicts


def spread(values: Sequence[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3g} [{low:.3g}, {high:.3g}] n={len(values)}"


def test_grading_real_answers():
    while len(POOL.processes()) < 2:  # the program starts once in a process
        POOL.is_right(["x+1"], "1+x")
    made = responses()
    batches = [made[start : start + BATCH] for start in range(0, len(made), BATCH)]
    seconds = []
    differing = []
    for batch in batches:
        _verified.cache_clear()
        (mine, ours_say), (other, theirs_say) = timed(ours, batch), timed(theirs, batch)
        seconds.append((mine, other))
        differing += [
            (gold, response.rpartition(r"\boxed")[2], we, they)
            for (gold, response), we, they in zip(batch, ours_say, theirs_say, strict=True)
            if we != they
        ]
    print(f"\n{len(made)} responses of {statistics.mean(len(text) for _, text in made):.0f} characters")
    for name, column in zip(("ours", "math-verify"), zip(*seconds, strict=True), strict=True):
        print(f"  {name:<12} {spread([1e3 * entry / BATCH for entry in column])} ms a response")
    print(f"  ratio        {spread([other / mine for mine, other in seconds])}  (target 5)")
    assert differing == []
