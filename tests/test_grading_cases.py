"""The grader on answers as people and models write them: tests/grading_cases.txt, and shared/cases where it is there.

Of each kind: no wrong answer is paid, no right one is lost. `python tests/test_grading_cases.py [FILE]` prints a table
of a file of cases (JSON lines with response, ground_truth, expected, note), with math-verify alone beside it.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from real_data import cases

from data_prep.grading.mathematics import POOL
from data_prep.rewards import compute_score

Case = tuple[str, str, bool]
"""A right answer, an answer, whether it is right."""
MOST_LOST = 0.03
"""Share of right answers that may score 0, of the cases from public reports."""


def _cases() -> Iterator[tuple[str, Case]]:
    kind = gold = ""
    for line in Path(__file__).with_name("grading_cases.txt").read_text(encoding="utf-8").split("\n"):
        sign, *answers = line.split("\t")
        if line.startswith("[") and line.endswith("]") and line[1:-1].replace(" ", "").isalpha():
            kind = line[1:-1]
        elif not answers and line and not line.startswith("#"):
            gold = line
        for answer in answers:
            yield kind, (gold, answer, sign == "+")


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is right does not depend on how busy the machine is."""
    monkeypatch.setattr(POOL, "limit_seconds", 60.0)


CASES: dict[str, list[Case]] = {}
for _kind, _case in _cases():
    CASES.setdefault(_kind, []).append(_case)


@pytest.mark.parametrize("kind", CASES)
def test_right_ways_to_write_an_answer_are_paid_and_wrong_answers_are_not(kind):
    pytest.importorskip("math_verify", reason="math-verify is not installed (make setup)")
    verdicts = {case: compute_score("math500", rf"So \boxed{{{case[1]}}}.", case[0]) for case in CASES[kind]}
    assert {case: found for case, found in verdicts.items() if (found["acc"] == 1.0) is not case[2]} == {}
    assert {case for case, found in verdicts.items() if found["timeout"] and case[2]} == set()


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def ours(row: dict[str, str]) -> bool:
    source = "palindrome" if row["id"].startswith("p") else "math500"
    return compute_score(source, row["response"], row["ground_truth"])["acc"] == 1.0


def math_verify_alone(row: dict[str, str]) -> bool:
    """What math-verify says of the whole response, as its documentation calls it."""
    from math_verify import parse, verify

    try:
        return bool(verify(parse(rf"\boxed{{{row['ground_truth']}}}"), parse(row["response"])))
    except Exception:  # its parsers raise many kinds
        return False


def test_no_wrong_answer_from_public_reports_is_paid_and_few_right_ones_are_lost():
    pytest.importorskip("math_verify", reason="math-verify is not installed (make setup)")
    rows = rows_of(cases("grading.jsonl"))
    verdicts = [(row, ours(row)) for row in rows]
    assert [row for row, right in verdicts if right and row["expected"] == "wrong"] == []
    lost = [row for row, right in verdicts if not right and row["expected"] == "right"]
    assert len(lost) <= MOST_LOST * sum(row["expected"] == "right" for row in rows), lost


def main(path: Path) -> None:
    """Prints, per kind, wrong answers paid, right ones lost and arguable ones paid: ours | math-verify alone."""
    counts: dict[str, Counter[str]] = {}
    for row in rows_of(path):
        kind, expected = (row["note"] or "other")[:48], row["expected"]
        found = counts.setdefault(kind, Counter())
        found[expected] += 1
        for name, judge in (("ours", ours), ("theirs", math_verify_alone)):
            found[f"{expected} {name}"] += judge(row) is not (expected == "right")
    head = ("kind", "wrong", "paid", "right", "lost", "arguable", "paid")
    print("{:<48} {:>6} {:>11} {:>6} {:>11} {:>8} {:>11}".format(*head))
    for kind, found in [*sorted(counts.items()), ("all", sum(counts.values(), Counter()))]:
        columns = (
            (found[name], f"{found[f'{name} ours']} | {found[f'{name} theirs']}")
            for name in ("wrong", "right", "arguable")
        )
        print(
            "{:<48} {:>6} {:>11} {:>6} {:>11} {:>8} {:>11}".format(kind, *(entry for pair in columns for entry in pair))
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else cases("grading.jsonl"))
