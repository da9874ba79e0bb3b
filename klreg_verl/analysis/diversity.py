"""How varied a run's stored responses are, at the start or at the end, one row a run, arms comparable.

Two things would make arms incomparable and are taken care of here. More draws give more distinct answers: everything
is rarefied to the smallest number of draws any prompt has. And an arm with higher accuracy has enough right draws on
more, harder prompts: the conditional measures are taken on the prompts where *all* runs of the same task and seed have
enough of them (runs of one seed see the same prompts at the same step).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import pandas as pd

from klreg_verl.analysis import stats
from klreg_verl.analysis.embeddings import Embedder
from klreg_verl.analysis.runs import Run
from klreg_verl.analysis.samples import stored_steps
from klreg_verl.core import diversity
from klreg_verl.core.diversity import Answers

When = Literal["start", "end"]
Place = tuple[int, str]
"""(step, prompt) of a run."""
EMBEDDED_PROMPTS = 32
"""Prompts of a run whose responses are embedded: the first by step as stored, so the same ones in all arms."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What a run has stored at some steps, as far as a report needs it."""

    run: Run
    answers: Mapping[Place, Answers]
    texts: Mapping[Place, Sequence[str]]
    """Responses of the first EMBEDDED_PROMPTS prompts."""
    wording: Mapping[str, float]
    """distinct_1, distinct_2 and where asked for self_bleu: means over the prompts, on token ids, or words where those
    are not stored."""


@lru_cache(maxsize=1024)
def read(run: Run, when: When = "end", window: int = stats.WINDOW, further: bool = False) -> Stored:
    """The stored samples of step 1 (the starting model's in every arm), or of the last `window` steps."""
    files = stored_steps(run)
    last = max(files, default=0)
    answers: dict[Place, Answers] = {}
    texts: dict[Place, Sequence[str]] = {}
    wording: dict[str, list[float]] = {}
    for step in [step for step in files if (step == 1 if when == "start" else step > last - window)]:
        table = pd.read_parquet(files[step])
        answers |= {(step, str(group)): each for group, each in read_answers(table).items()}
        for group, rows in table.groupby("group", sort=False):
            if len(texts) < EMBEDDED_PROMPTS:
                texts[step, str(group)] = rows["response"].astype(str).tolist()
            for name, value in _wording(_tokens(rows), further).items():
                wording.setdefault(name, []).append(value)
    means = {name: _mean(values) for name, values in wording.items()}
    return Stored(run=run, answers=answers, texts=texts, wording=means)


def starters(runs: Iterable[Run]) -> list[Run]:
    """One run of each task and seed that stored step 1: all arms have drawn the same there."""
    first: dict[tuple[str, int], Run] = {}
    for run in runs:
        if 1 in stored_steps(run):
            first.setdefault((run.task, run.seed), run)
    return list(first.values())


def read_answers(table: pd.DataFrame) -> dict[Any, Answers]:
    """The draws of each prompt ("group") of a samples table; none where it is not known which are right."""
    if table["valid"].isna().any():
        return {}
    numbers = table["num_valid"].tolist() if "num_valid" in table else [None] * len(table)
    possible = [None if value is None or value != value or value == "" else int(value) for value in numbers]
    columns = (table["answer"].tolist(), table["valid"].tolist(), table["group"].tolist(), possible)
    return diversity.by_prompt(*columns)


def _tokens(rows: pd.DataFrame) -> list[list[Hashable]]:
    if "token_ids" in rows:
        return [list(ids) for ids in rows["token_ids"]]
    return [text.split() for text in rows["response"].astype(str)]


def table(
    runs: Sequence[Run],
    embedder: Embedder | None = None,
    *,
    when: When = "end",
    valid_samples: int = 2,
    further: bool = False,
) -> pd.DataFrame:
    """One row a run that has samples; columns as `core.diversity.Solutions`, cosine, cosine_across, distinct_1 and _2.

    Args:
        runs: runs of one study; those without stored samples are left out, and at the end those that are not done.
        embedder: for the cosines; without one they are absent.
        when: step 1, or the last ten stored steps.
        valid_samples: right draws that the conditional measures are rarefied to; 2 asks how often two right answers
            to a prompt differ, and keeps the most prompts.
        further: also self-BLEU and the Vendi score, which take longer.
    """
    usable_runs = [run for run in runs if when == "start" or run.is_done]
    stored = [each for each in (read(run, when, further=further) for run in usable_runs) if each.answers]
    draws = min((each.num_samples for one in stored for each in one.answers.values()), default=0)
    shared = _shared(stored, valid_samples)
    rows = []
    for one in stored:
        usable = shared[one.run.task, one.run.seed]
        row = {"task": one.run.task, "arm": one.run.label, "seed": one.run.seed, "when": when}
        row |= _solutions(one, usable, draws, valid_samples) | dict(one.wording)
        rows.append(row | (_of_embeddings(one, embedder, further) if embedder is not None else {}))
    return pd.DataFrame(rows)


def _shared(stored: Iterable[Stored], valid_samples: int) -> dict[tuple[str, int], set[Hashable]]:
    """(task, seed) -> the prompts on which each of its runs has enough right draws."""
    shared: dict[tuple[str, int], set[Hashable]] = {}
    for one in stored:
        key = (one.run.task, one.run.seed)
        enough = diversity.with_enough(dict(one.answers), valid_samples)
        shared[key] = shared[key] & enough if key in shared else enough
    return shared


def _solutions(one: Stored, usable: set[Hashable], draws: int, valid_samples: int) -> dict[str, Any]:
    """All prompts for the unconditional measures, the shared ones for the conditional."""
    every = asdict(diversity.solutions(one.answers.values(), samples=draws, valid_samples=valid_samples))
    common = [each for place, each in one.answers.items() if place in usable]
    conditional = asdict(diversity.solutions(common, samples=draws, valid_samples=valid_samples))
    return {key: conditional[key] if key.startswith("valid_") else value for key, value in every.items()}


def _wording(tokens: Sequence[Sequence[Hashable]], further: bool) -> dict[str, float]:
    """Of one prompt's responses."""
    found = {f"distinct_{n}": diversity.distinct_n(tokens, n) for n in (1, 2)}
    return found | ({"self_bleu": diversity.self_bleu(tokens)} if further else {})


def _of_embeddings(one: Stored, embedder: Embedder, further: bool) -> dict[str, Any]:
    places = list(one.texts)
    vectors = embedder.embed([text for place in places for text in one.texts[place]])
    ids = [index for index, place in enumerate(places) for _ in one.texts[place]]
    cosines = diversity.mean_cosine(vectors, ids)
    found: dict[str, Any] = {
        "cosine": cosines.mean,
        "cosine_across": cosines.across,
        "embedder": embedder.name,
        "embedder_sha256": embedder.sha256,
    }
    if further:
        groups = [vectors[np.array(ids) == index] for index in range(len(places))]
        found["vendi"] = _mean(diversity.vendi(group) for group in groups)
    return found


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
