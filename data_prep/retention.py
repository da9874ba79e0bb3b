"""Prompts of a skill that a run does not train, as one more validation file of that run.

A user's file gets data_source `skill/<name>`, under which a run logs retention/<name>, and the columns of the task's
own validation file: verl joins the files, and columns that differ end the run. compute_score is the reward of a run
whose task has one of its own: skills are graded by this project, all else by the user's function.
"""

import asyncio
import hashlib
import importlib
import inspect
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep import rewards
from data_prep.cache import cached_folder, planned_folder
from data_prep.schema import SCHEMA, check_file

PREFIX = "skill/"
"""Of the data_source of every skill."""
FILE = "test.parquet"


@dataclass(frozen=True, kw_only=True)
class RetainedOptions:
    """What decides the bytes of the file."""

    name: str
    source: str
    """What identifies the skill's own file: a hash of its bytes, or the name of its folder in the cache."""
    prompts: int
    columns: str
    """The columns of the task's validation file, as pyarrow writes them."""


def columns_like(val: Path) -> pa.Schema:
    """The columns of a validation file; those of SCHEMA where it is not there yet."""
    found = pq.read_schema(val).remove_metadata() if val.is_file() else SCHEMA
    return SCHEMA if found.equals(SCHEMA) else found


def planned(name: str, source: str, prompts: int, columns: pa.Schema, data_root: Path) -> Path:
    """Where the file is or will be; makes nothing."""
    text = columns.to_string(show_field_metadata=False)
    options = RetainedOptions(name=name, source=source, prompts=prompts, columns=text)
    return planned_folder(f"retention-{name}", options, [Path(__file__)], data_root) / FILE


def cache(name: str, file: Path, source: str, prompts: int, columns: pa.Schema, data_root: Path) -> Path:
    """The first `prompts` rows of `file` as the skill `name` in `columns`, made if they are not there.

    Raises ValueError where the file is not in verl's schema, or a row does not fit the columns.
    """
    target = planned(name, source, prompts, columns, data_root)
    cached_folder(target.parent, lambda folder: _fill(folder / FILE, name, file, prompts, columns))
    return target


def identity(file: Path) -> str:
    """sha256 of a file's bytes; its name where it is not there."""
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else str(file)


def _fill(target: Path, name: str, file: Path, prompts: int, columns: pa.Schema) -> None:
    rows = check_file(file).slice(0, prompts).to_pylist()
    made = [{**row, "data_source": PREFIX + name} for row in rows]
    try:
        table = pa.Table.from_pylist(made, schema=columns)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(
            f"{file}: its rows do not fit the columns of the task's validation file: {error}. Write both in the schema "
            "of data_prep/schema.py."
        ) from error
    pq.write_table(table, target, compression="zstd")


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: dict[str, Any] | None = None,
    own: str = "",
    **kwargs: Any,
) -> Any:
    """verl's reward function for a task with the reward `own` (pkg.module:function), and skills beside it."""
    given = {"data_source": data_source, "solution_str": solution_str, "ground_truth": ground_truth}
    if str(data_source).startswith(PREFIX):
        return rewards.compute_score(**given, extra_info=extra_info)
    found = _function(own)(**given, extra_info=extra_info, **kwargs)
    return asyncio.run(_awaited(found)) if inspect.isawaitable(found) else found


@once
def _function(name: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


async def _awaited(found: Any) -> Any:
    return await found
