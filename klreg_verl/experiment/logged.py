"""Which metrics a run of a recipe will log: a claim on another one could never be decided."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path

from klreg_verl.experiment import strict
from klreg_verl.experiment.settings import Settings, TaskSpec

_OURS = ("diversity", "entropy", "kl", "kl_old", "kl_ref", "response", "reward", "train")
"""Namespaces in which every key is this project's; in the others verl logs keys of its own."""
_HELD_OUT = re.compile(r"eval/(?P<source>.+?)/(?:accuracy|score|pass@[1-9]\d*|diversity/\w+)")
_NEEDS: tuple[tuple[str, Callable[[Settings], bool], str], ...] = (
    ("kl_ref/exact_token", lambda s: s.probes.exact_every > 0, "Set probes.exact_every, e.g. to 10."),
    (
        "kl_ref_t1/",
        lambda s: s.probes.temperature_one_every > 0,
        "Set probes.temperature_one_every, e.g. to 10; at train.temperature 1 it is kl_ref/* itself.",
    ),
    ("kl_ref/forward_sampled", lambda s: s.kl.is_drawn, "Only an arm with kl.estimator: reference_samples logs it."),
    ("kl/cap_fraction", lambda s: s.kl.cap is not None, "Set kl.cap."),
    ("kl/penalty_loss", lambda s: s.kl.placement == "both", "Only an arm with kl.placement: both logs it."),
    ("kl/advantage_share", lambda s: s.kl.in_reward, "Only an arm with its KL in the reward logs it."),
    ("kl/grad_share", lambda s: s.kl.in_loss, "Only an arm with its KL in the loss logs it."),
)
"""(metric or its beginning, whether a run logs it, what to do)."""


def why_not(metric: str, settings: Settings, task: TaskSpec, known: Collection[str]) -> str | None:
    """Why a run never logs this metric, and what to set; None where it does.

    Args:
        metric: a claim's, whose namespace is known.
        settings, task: the run's.
        known: the keys of core.metrics.METRICS.
    """
    namespace, _, rest = metric.partition("/")
    for key, logs, repair in _NEEDS:
        if (metric == key or (key.endswith("/") and metric.startswith(key))) and not logs(settings):
            return f"{metric} is not logged. {repair}"
    if namespace == "retention" and rest not in settings.retention.skills:
        return f"{metric} is not logged: no skill {rest!r} is validated. Name it in retention.skills."
    if namespace == "eval":
        return _held_out(metric, task)
    if namespace in _OURS and metric not in known:
        return f"{metric} is not logged.{strict.suggestion(metric, known)} README.md lists the metrics."
    return None


def _held_out(metric: str, task: TaskSpec) -> str | None:
    found = _HELD_OUT.fullmatch(metric)
    if found is None:
        return f"{metric} is not logged. Held-out metrics are eval/<data_source>/accuracy, /score and /pass@<k>."
    sources = [] if "/diversity/" in metric else data_sources(task)
    if sources and found["source"] not in sources:
        near = strict.suggestion(found["source"], sources)
        return f"{metric} is not logged: the held-out prompts are of {', '.join(sources)}.{near}"
    return None


def data_sources(task: TaskSpec) -> list[str]:
    """The data sources of a task's held-out prompts, where they are known before anything is built; else none."""
    if task.builtin == "palindrome":
        return ["palindrome"]
    if task.val is None or not Path(task.val).is_file():
        return []
    import pyarrow
    import pyarrow.parquet

    try:
        column = pyarrow.parquet.read_table(task.val, columns=["data_source"])["data_source"]
    except (pyarrow.ArrowException, OSError, KeyError):
        return []  # what is wrong with the file is said where files are checked
    return sorted({str(source) for source in column.unique().to_pylist()})
