"""Prompts of a skill that a run does not train, as one more validation file of that run.

A user's file gets data_source `skill/<name>`, under which a run logs retention/<name>, and the columns of the task's
own validation file: verl joins the files, and columns that differ end the run. A row that compute_score would grade in
another way under the new name (a palindrome) keeps its old one in its meta, as `graded_as`. compute_score is the reward
of a run whose task has one of its own: skills are graded by this project, all else by the user's function.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep import functions, rewards, schema
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
    made_by = [Path(__file__), Path(schema.__file__), Path(rewards.__file__)]
    return planned_folder(f"retention-{name}", options, made_by, data_root) / FILE


def cache(name: str, file: Path, source: str, prompts: int, columns: pa.Schema, data_root: Path) -> Path:
    """The first `prompts` rows of `file` as the skill `name` in `columns`, made if they are not there.

    Raises ValueError where the file is not in verl's schema, a row does not fit the columns, or these have no meta to
    say how a row is graded.
    """
    target = planned(name, source, prompts, columns, data_root)
    cached_folder(target.parent, lambda folder: _fill(folder / FILE, name, file, prompts, columns))
    return target


def identity(file: Path) -> str:
    """sha256 of a file's bytes; its name where it is not there."""
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else str(file)


def _fill(target: Path, name: str, file: Path, prompts: int, columns: pa.Schema) -> None:
    rows = check_file(file).slice(0, prompts).to_pylist()
    made = [_renamed(row, PREFIX + name) for row in rows]
    if any(rewards.graded_as(one.get("extra_info")) for one in made) and not _has_meta(columns):
        raise ValueError(
            f"{file}: rows of skill {name} are graded as {rows[0]['data_source']!r}, and the task's validation file "
            "has no text extra_info.meta to say so in. Write it in the schema of data_prep/schema.py."
        )
    try:
        table = pa.Table.from_pylist(made, schema=columns)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(
            f"{file}: its rows do not fit the columns of the task's validation file: {error}. Write both in the schema "
            "of data_prep/schema.py."
        ) from error
    pq.write_table(table, target, compression="zstd")


def _renamed(row: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The row under another data_source, still graded as under its own."""
    if rewards.grader_of(source) == rewards.grader_of(row["data_source"]):
        return {**row, "data_source": source}
    info = row.get("extra_info") or {}
    meta = {**rewards.read_meta(info), rewards.GRADED_AS: row["data_source"]}
    return {**row, "data_source": source, "extra_info": {**info, "meta": json.dumps(meta, sort_keys=True)}}


def _has_meta(columns: pa.Schema) -> bool:
    """Whether rows of these columns have extra_info.meta, a text."""
    info = columns.field("extra_info").type if "extra_info" in columns.names else pa.null()
    found = info.field("meta").type if pa.types.is_struct(info) and info.get_field_index("meta") >= 0 else pa.null()
    return pa.types.is_string(found) or pa.types.is_large_string(found)


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
    return functions.call(functions.load(own), **given, extra_info=extra_info, **kwargs)
