"""A run's value of a metric: its primary endpoint, the same rule for every run.

    an evaluation metric   the mean of the last three evaluations: those of training (metrics.jsonl), or where the run
                           did not log it so, those that `klreg eval` left in evals/ (pass@k, diversity)
    a training metric      the mean of the last ten steps

Step 0, the starting model, never enters. Where values of single prompts are stored, they are here, too: they tell what
part of a difference's error the choice of prompts makes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from klreg_verl.analysis import retention, stats
from klreg_verl.analysis.diversity import read_answers
from klreg_verl.analysis.runs import Run, mapping
from klreg_verl.analysis.samples import stored_steps
from klreg_verl.core import diversity
from klreg_verl.experiment.claims import ACHIEVED_KL

LAST_EVALUATIONS = 3
"""Evaluations whose mean is a run's value: the last one alone is noisier, and the best one biased."""
EVALUATIONS = ("eval", "retention", "val-core", "val-aux")
"""Namespaces that are measured on held-out prompts, now and then."""
SETTINGS = ("prompts", "samples", "temperature", "top_p", "max_tokens", "seed", "reward")
"""What must be the same for two evaluations to be compared, beside the data."""
PER_PROMPT = ("train/accuracy", "diversity/unique_valid", "diversity/coverage")
"""Training metrics whose value for each prompt can be had from the stored samples."""
Place = tuple[Any, ...]
"""A prompt: (step, group) of a training batch, or (row,) of a held-out file."""


def endpoint(run: Run, metric: str) -> float:
    """The run's value; NaN where it recorded none after step 0."""
    if not is_evaluation(metric):
        return stats.last_steps(run.training[metric].tolist()).mean if metric in run.training else math.nan
    return stats.last_steps(evaluations(run, metric).tolist(), LAST_EVALUATIONS).mean


def kl_beside(run: Run, metric: str) -> float:
    """The KL to the reference over the window of steps that the metric's `endpoint` is of [nats per response].

    Evaluations after steps a < ... < b: the steps a + 1 to b, whose batches were sampled after a to b - 1 updates; a
    single evaluation and a training metric: the last ten steps.
    """
    if ACHIEVED_KL not in run.training:
        return math.nan
    steps = evaluations(run, metric).index[-LAST_EVALUATIONS:] if is_evaluation(metric) else []
    if len(steps) < 2:
        return endpoint(run, ACHIEVED_KL)
    inside = run.training[ACHIEVED_KL]
    return stats.mean_and_error(inside[(inside.index > steps[0]) & (inside.index <= steps[-1])]).mean


def start(run: Run, metric: str) -> float:
    """The starting model's value: an evaluation's at step 0, a training metric's at step 1; NaN where it has none."""
    if not is_evaluation(metric):
        known = run.training[metric].dropna() if metric in run.training else pd.Series(dtype="float64")
        return float(known.iloc[0]) if len(known) and known.index[0] == 1 else math.nan
    if metric in run.metrics and 0 in run.metrics.index and math.isfinite(run.metrics.loc[0, metric]):
        return float(run.metrics.loc[0, metric])
    known = [each for each in retention.records(run) if each["step"] == 0 and metric in _numbers(each)]
    best = max(known, key=lambda each: each["prompts"] * each["samples"], default=None)
    return math.nan if best is None else _numbers(best)[metric]


def is_evaluation(metric: str) -> bool:
    """Whether it is measured on held-out prompts."""
    return metric.split("/")[0] in EVALUATIONS


def evaluations(run: Run, metric: str) -> pd.Series:
    """The values of an evaluation metric by step, after step 0."""
    if _is_logged(run, metric):
        return run.training[metric].dropna()
    found = {int(record["step"]): _numbers(record)[metric] for record in _records(run, metric)}
    return pd.Series(found, dtype="float64").sort_index()


def _is_logged(run: Run, metric: str) -> bool:
    """Whether training has a value of it after step 0; one before training alone says nothing about the run."""
    return metric in run.training and bool(run.training[metric].notna().any())


def settings(run: Run, metric: str) -> str | None:
    """How the evaluations that `klreg eval` left were made; None where the metric was logged in training, or nowhere.

    Runs whose settings differ are not alike: more samples are a smaller error, another temperature another policy.
    """
    records = [] if _is_logged(run, metric) else _records(run, metric)
    return _setting(records[0]) if records else None


def _records(run: Run, metric: str) -> list[Mapping[str, Any]]:
    """Those of one setting that have the metric: of several settings the one with the most samples."""
    known = [each for each in retention.records(run) if each["step"] >= 1 and metric in _numbers(each)]
    best = max(known, key=lambda each: (each["prompts"] * each["samples"], _setting(each)), default=None)
    return [each for each in known if best is not None and _setting(each) == _setting(best)]


def _setting(record: Mapping[str, Any]) -> str:
    """The settings as one text, the data by its hash."""
    told = {name: record.get(name) for name in SETTINGS} | {"data": mapping(record.get("data")).get("sha256")}
    return json.dumps(told, sort_keys=True)


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """Its metrics, and eval/<task>/diversity/<name> for what core.diversity.Solutions tells."""
    found = dict(mapping(record.get("metrics")))
    found |= {f"eval/{record['task']}/diversity/{name}": v for name, v in mapping(record.get("diversity")).items()}
    return {key: float(value) for key, value in found.items() if isinstance(value, int | float)}


# ---------------------------------------------------------------------------------------------------- prompts


def prompt_values(run: Run, metric: str) -> dict[Place, float]:
    """The metric on each prompt; empty where it is not stored.

    Training metrics: the prompts of the last ten steps, if the samples of all of them are stored. Accuracy of an
    evaluation: the held-out prompts, their mean over the evaluations of `klreg eval` that `endpoint` is the mean of;
    what training logged has no values of single prompts.
    """
    if metric in PER_PROMPT:
        return _of_training(run, metric)
    records = [] if _is_logged(run, metric) else _records(run, metric)
    by_step = {int(each["step"]): each for each in records if _accuracies(each) == [metric]}
    tables = [_of_evaluation(run, by_step[step]) for step in sorted(by_step)[-LAST_EVALUATIONS:]]
    shared = set.intersection(*map(set, tables)) if tables else set()
    return {place: sum(table[place] for table in tables) / len(tables) for place in sorted(shared)}


def _of_training(run: Run, metric: str) -> dict[Place, float]:
    files = stored_steps(run)
    steps = range(max(1, run.last_step - stats.WINDOW + 1), run.last_step + 1)
    if not all(step in files for step in steps):
        return {}
    found: dict[Place, float] = {}
    for step in steps:
        for group, prompt in read_answers(pd.read_parquet(files[step])).items():
            value = _of_prompt(prompt, metric)
            found |= {} if value is None else {(step, str(group)): value}
    return found


def _of_prompt(prompt: diversity.Answers, metric: str) -> float | None:
    if metric == "train/accuracy":
        return prompt.num_valid / prompt.num_samples
    if metric == "diversity/unique_valid":
        return float(len(prompt.counts))
    return len(prompt.counts) / prompt.num_possible if prompt.num_possible else None


def _accuracies(record: Mapping[str, Any]) -> list[str]:
    """A file of one data source has one, which is the mean over all its prompts."""
    return [key for key in mapping(record.get("metrics")) if key.endswith("/accuracy")]


def _of_evaluation(run: Run, record: Mapping[str, Any]) -> dict[Place, float]:
    """(row,) -> share of right samples."""
    path = run.path / "evals" / str(record.get("file"))
    if not path.is_file():
        return {}
    table = pd.read_parquet(path, columns=["prompt", "valid"])
    return {(int(row),): float(share) for row, share in table.groupby("prompt")["valid"].mean().items()}
