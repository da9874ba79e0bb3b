"""Stored responses of several settings to the same prompt, from samples/step_<n>.parquet.

Which prompts are shown is a rule, not a choice: at the first and at the last step that all settings have stored, the
prompts common to all of them with the most possible valid answers, ties in the order in which they were stored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from klreg_verl.analysis.runs import Run, fault_of, sample_files
from klreg_verl.analysis.summary import Group


@dataclass(frozen=True, kw_only=True)
class Response:
    """One distinct response to a prompt and how often it was drawn."""

    text: str
    valid: bool | None
    """None where nothing says so."""
    count: int


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    """The responses of every setting to one prompt at one step."""

    step: int
    prompt: str
    num_valid: str
    """How many valid answers exist, as the data says; "" if unknown."""
    responses: tuple[tuple[str, tuple[Response, ...]], ...]
    """(label of the setting, its distinct responses: most frequent first)."""


def stored_steps(run: Run) -> dict[int, Path]:
    """Step -> whole file of samples/; torn ones are named in ``run.problems``."""
    return {step: path for step, path in sample_files(run.path).items() if fault_of(path) is None}


def side_by_side(groups: Sequence[Group], num_prompts: int = 3) -> list[SideBySide]:
    """Prompts of one task at the first and the last common step, for the first seed that all settings have."""
    runs = _matched_runs(groups)
    files = [stored_steps(run) for run in runs]
    shared = sorted(set.intersection(*(set(each) for each in files))) if files else []
    steps = sorted({shared[0], shared[-1]}) if shared else []
    labels = [group.label for group in groups if group.runs and _has_samples(group)]
    return [
        shown
        for step in steps
        for shown in _at_step(step, labels, [pd.read_parquet(each[step]) for each in files], num_prompts)
    ]


def _has_samples(group: Group) -> bool:
    return any(stored_steps(run) for run in group.runs)


def _matched_runs(groups: Sequence[Group]) -> list[Run]:
    """One run with samples of every group, of the lowest seed that all have; else each group's first."""
    candidates = [{run.seed: run for run in group.runs if stored_steps(run)} for group in groups]
    candidates = [each for each in candidates if each]
    shared = set.intersection(*(set(each) for each in candidates)) if candidates else set()
    return [each[min(shared) if shared else min(each)] for each in candidates]


def _at_step(step: int, labels: list[str], tables: list[pd.DataFrame], num_prompts: int) -> list[SideBySide]:
    if any(not {"prompt", "response", "valid"} <= set(table.columns) for table in tables):
        return []
    shared = set.intersection(*(set(table["prompt"]) for table in tables))
    possible = _possible(tables[0])
    prompts = [prompt for prompt in dict.fromkeys(tables[0]["prompt"]) if prompt in shared]
    prompts.sort(key=lambda prompt: -_count(possible.get(prompt, "")))
    return [
        SideBySide(
            step=step,
            prompt=prompt,
            num_valid=possible.get(prompt, ""),
            responses=tuple((label, _distinct(table, prompt)) for label, table in zip(labels, tables, strict=True)),
        )
        for prompt in prompts[:num_prompts]
    ]


def _possible(table: pd.DataFrame) -> dict[str, str]:
    if "num_valid" not in table:
        return {}
    known = table[["prompt", "num_valid"]].dropna().drop_duplicates("prompt")
    return dict(zip(known["prompt"], known["num_valid"].astype(str), strict=True))


def _count(text: str) -> int:
    return int(text) if text.isdigit() else 0


def _distinct(table: pd.DataFrame, prompt: str) -> tuple[Response, ...]:
    rows = table[table["prompt"] == prompt]
    valid = [None if pd.isna(each) else bool(each) for each in rows["valid"]]
    counts = Counter(zip(rows["response"].astype(str), valid, strict=True))
    ordered = sorted(counts.items(), key=lambda item: (-item[1], not item[0][1], item[0][0]))
    return tuple(Response(text=text, valid=valid, count=count) for (text, valid), count in ordered)
