"""The diversity of every setting for a report: means over seeds of analysis.diversity's rows, and the starting model's.

Unconditional measures count all draws: an arm that is right more often has more right answers to be distinct. The
conditional ones look at right draws only, on the prompts where all runs of a seed have enough of them. Both stand side
by side, so that accuracy is not taken for diversity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import pandas as pd

from klreg_verl.analysis import diversity, stats
from klreg_verl.analysis.embeddings import Embedder
from klreg_verl.analysis.samples import stored_steps
from klreg_verl.analysis.stats import Estimate
from klreg_verl.analysis.summary import Group

Kind = Literal["unconditional", "conditional", "text"]
START = "starting model"


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One column."""

    key: str
    name: str
    unit: str
    kind: Kind


MEASURES = (
    Measure(key="accuracy", name="Accuracy", unit="share right", kind="unconditional"),
    Measure(key="distinct", name="Distinct right", unit="in {samples} draws", kind="unconditional"),
    Measure(key="share_of_possible", name="of the possible", unit="share of N", kind="unconditional"),
    Measure(key="share_of_uniform", name="of uniform", unit="share of its expectation", kind="unconditional"),
    Measure(key="valid_distinct", name="Distinct", unit="in {valid_samples} right draws", kind="conditional"),
    Measure(key="valid_share_of_uniform", name="of uniform", unit="share of its expectation", kind="conditional"),
    Measure(key="valid_entropy", name="Entropy", unit="nats, {valid_samples} right draws", kind="conditional"),
    Measure(key="distinct_1", name="distinct-1", unit="share of tokens", kind="text"),
    Measure(key="distinct_2", name="distinct-2", unit="share of pairs", kind="text"),
    Measure(key="self_bleu", name="self-BLEU", unit="1 is all alike", kind="text"),
    Measure(key="vendi", name="Vendi score", unit="responses that differ", kind="text"),
    Measure(key="cosine", name="Cosine", unit="same prompt", kind="text"),
    Measure(key="cosine_across", name="Cosine", unit="other prompts", kind="text"),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One setting, or the starting model (group None)."""

    task: str
    label: str
    group: Group | None
    values: dict[str, Estimate]
    """Measure key -> mean and error over seeds."""


@dataclass(frozen=True, kw_only=True)
class Variety:
    """What a report shows of diversity."""

    rows: tuple[Row, ...] = ()
    per_run: pd.DataFrame = field(default_factory=pd.DataFrame)
    embedder: Embedder | None = None
    samples: int = 0
    valid_samples: int = 0
    valid_prompts: int = 0
    """The fewest prompts that a conditional mean is over."""

    def measures(self) -> list[Measure]:
        """The columns that some row has a value for."""
        return [one for one in MEASURES if any(row.values[one.key].num for row in self.rows)]

    def unit(self, measure: Measure) -> str:
        """With the number of draws that it is rarefied to."""
        return measure.unit.format(samples=self.samples, valid_samples=self.valid_samples)

    def of(self, group: Group, key: str) -> Estimate:
        """The value of one setting; without a row for it an empty estimate."""
        found = [row for row in self.rows if row.group is not None and _same(row.group, group)]
        return found[0].values[key] if found else stats.mean_and_error([])

    def note(self) -> str:
        """How to read the table."""
        cosine = f" Cosines: {self.embedder.statement}." if self.embedder and "cosine" in self.per_run else ""
        return (
            "Samples of finished runs that were stored within ten steps of the last that has any, per prompt, then "
            f"averaged; mean ± standard error over seeds. All draws: rarefied to {self.samples} draws a prompt. Right "
            f"draws: {self.valid_samples} of them, on the prompts where every run of the seed has so many (at least "
            f"{self.valid_prompts}); they do not rise with accuracy. Uniform: what drawing the N possible answers "
            f"evenly would give. distinct-n falls with length and number of responses.{cosine}"
        )


def measure(groups: Sequence[Group], embedder: Embedder | None = None, *, further: bool = False) -> Variety:
    """The diversity at the end of every setting that has stored samples, and that of the model all started from.

    It is of right answers, which a reward that grades does not have.

    `further`: also self-BLEU, and with an embedder the Vendi score.
    """
    runs = [run for group in groups for run in group.runs if stored_steps(run) and not run.graded]
    end = diversity.table(runs, embedder, further=further)
    if end.empty:
        return Variety(embedder=embedder)
    start = diversity.table(diversity.starters(runs), embedder, when="start", further=further)
    comparable = not start.empty and start["samples"].max() == start["samples"].min() == end["samples"].max()
    rows = []
    for task in dict.fromkeys(end["task"]):
        before = start[start["task"] == task] if comparable else start.head(0)
        rows += [Row(task=task, label=START, group=None, values=_values(before))] if len(before) else []
        for group in (group for group in groups if group.task == task):
            mine = end[(end["task"] == task) & (end["arm"] == group.label)]
            rows += [Row(task=task, label=group.label, group=group, values=_values(mine))] if len(mine) else []
    return Variety(
        rows=tuple(rows),
        per_run=pd.concat([start, end], ignore_index=True),
        embedder=embedder,
        samples=int(end["samples"].max()),
        valid_samples=int(end["valid_samples"].max()),
        valid_prompts=int(end["valid_prompts"].min()),
    )


def _values(table: pd.DataFrame) -> dict[str, Estimate]:
    return {
        one.key: stats.mean_and_error(table[one.key].astype(float).tolist() if one.key in table else [])
        for one in MEASURES
    }


def _same(left: Group, right: Group) -> bool:
    return (left.task, left.label) == (right.task, right.label)
