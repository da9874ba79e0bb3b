"""The one parquet schema of all tasks, which verl reads as it is.

    data_source    string                        names the task; rewards and validation metrics go by it
    prompt         list<struct<role, content>>   chat messages
    ability        string
    reward_model   struct<style, ground_truth>   strings
    extra_info     struct<split, index,          string, int64,
                          num_valid, meta>       count as text (it outgrows int64) or null if unknown, JSON text

verl concatenates files and takes the schema of the first: a ground truth that is text in one file and a number in
another, or a large_string beside a string (what pandas writes), fails there. Hence one explicit schema, and no
pandas.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
REWARD_MODEL = pa.struct([("style", pa.string()), ("ground_truth", pa.string())])
EXTRA_INFO = pa.struct(
    [("split", pa.string()), ("index", pa.int64()), ("num_valid", pa.string()), ("meta", pa.string())]
)
SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", pa.list_(MESSAGE)),
        ("ability", pa.string()),
        ("reward_model", REWARD_MODEL),
        ("extra_info", EXTRA_INFO),
    ]
)
TAKEN = frozenset({"uid", "session_id", "sampling_params", "trajectory", "trace", "raw_prompt", "priority"})
"""Columns that a file must not have: arguments and fields of verl's own agent loop."""


def make_row(
    *,
    data_source: str,
    prompt: str,
    ability: str,
    ground_truth: str,
    split: str,
    index: int,
    num_valid: str | None = None,
    meta: Mapping[str, Any],
) -> dict[str, Any]:
    """One row in SCHEMA; `prompt` becomes one message of the user, `meta` becomes JSON text with sorted keys."""
    return {
        "data_source": data_source,
        "prompt": [{"role": "user", "content": prompt}],
        "ability": ability,
        "reward_model": {"style": "rule", "ground_truth": ground_truth},
        "extra_info": {
            "split": split,
            "index": index,
            "num_valid": num_valid,
            "meta": json.dumps(meta, sort_keys=True, ensure_ascii=False),
        },
    }


def write_parquet(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes rows in SCHEMA; the same rows give the same bytes.

    Raises ValueError if a row does not fit the schema.
    """
    try:
        table = pa.Table.from_pylist([dict(row) for row in rows], schema=SCHEMA)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"A row for {path} does not fit the schema of data_prep/schema.py: {error}") from error
    pq.write_table(table, path, compression="zstd")


def check_file(path: Path) -> pa.Table:
    """Reads a data file of ours or of a user and returns its table, once everything about it is as verl needs it.

    Of a user's file only what verl and the rewards read is asked for: data_source, prompt with role and content,
    reward_model with a ground_truth; extra_info may have other fields. Text may be string or large_string.

    Raises ValueError that says what is wrong: missing, unreadable or empty file, a missing column, a column of
    another type, an empty prompt, a missing ground truth.
    """
    table = _read(Path(path))
    _require_columns(table, ("data_source", "prompt", "reward_model"), path)
    _refuse_taken(table, path)
    _check_text(table.schema.field("data_source").type, "data_source", path)
    _check_prompt_type(table.schema.field("prompt").type, path)
    _check_struct(table.schema.field("reward_model").type, "reward_model", ("ground_truth",), path)
    _check_extra_info(table.schema, path)
    if table.num_rows == 0:
        raise ValueError(f"{path} has no rows: there is nothing to train or evaluate on. Write at least one row.")
    _check_values(table, path)
    return table


def differences(tables: Mapping[Path, pa.Table]) -> list[str]:
    """A sentence for each field that verl reads and that has different types in different files.

    verl concatenates the files of one list (several training files, or several validation files) and fails there.
    """
    places: dict[str, dict[pa.DataType, Path]] = {}
    for path, table in tables.items():
        for name in filter(table.column_names.__contains__, SCHEMA.names):
            for place, found in _leaves(name, table.schema.field(name).type):
                places.setdefault(place, {}).setdefault(found, path)
    return [
        f"{place} is {' and '.join(f'{found} in {path.name}' for found, path in types.items())}: verl cannot read "
        "these files as one list. Write all with one schema (data_prep/schema.py has it)"
        for place, types in places.items()
        if len(types) > 1
    ]


def _leaves(place: str, found: pa.DataType) -> Iterator[tuple[str, pa.DataType]]:
    """The fields below a type that hold values, by dotted path."""
    if pa.types.is_struct(found):
        for number in range(found.num_fields):
            yield from _leaves(f"{place}.{found.field(number).name}", found.field(number).type)
    elif pa.types.is_list(found) or pa.types.is_large_list(found):
        yield from _leaves(f"{place}[...]", found.value_type)
    elif not pa.types.is_null(found):
        yield place, found


def refuse_pointer(path: Path) -> None:
    """Raises ValueError for what Git LFS leaves in the place of a file that it has not fetched."""
    with path.open("rb") as file:
        if file.read(24).startswith(b"version https://git-lfs"):
            raise ValueError(f"{path} is a pointer of Git LFS, not the data. Fetch the data (`git lfs pull`).")


def _read(path: Path) -> pa.Table:
    if not path.is_file():
        raise ValueError(f"{path} is not there. Name an existing parquet file, or build it (`klreg data --help`).")
    refuse_pointer(path)
    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read as parquet: {error}. Write it anew, or name the right file."
        ) from error


def _require_columns(table: pa.Table, names: Sequence[str], path: Path) -> None:
    if missing := [name for name in names if name not in table.column_names]:
        found = ", ".join(table.column_names) or "no columns"
        expected = "; ".join(f"{name}: {SCHEMA.field(name).type}" for name in missing)
        raise ValueError(
            f"{path} has no column {', '.join(map(repr, missing))}; found: {found}. Expected: {expected}. "
            "verl reads these columns; write the file in the schema of data_prep/schema.py."
        )


def _refuse_taken(table: pa.Table, path: Path) -> None:
    if taken := sorted(TAKEN & set(table.column_names)):
        raise ValueError(
            f"{path} has a column {', '.join(map(repr, taken))}: verl hands every column to its agent loop by name, "
            "and uses this name itself. Rename the column, or drop it."
        )


def _check_text(found: pa.DataType, name: str, path: Path) -> None:
    if not (pa.types.is_string(found) or pa.types.is_large_string(found)):
        raise _wrong_type(name, found, "string", path)


def _check_prompt_type(found: pa.DataType, path: Path) -> None:
    if not (pa.types.is_list(found) or pa.types.is_large_list(found)):
        raise _wrong_type("prompt", found, SCHEMA.field("prompt").type, path)
    _check_struct(found.value_type, "prompt[...]", ("role", "content"), path)


def _check_struct(found: pa.DataType, name: str, text_fields: Sequence[str], path: Path) -> None:
    """Asks for a struct that has these fields, all of them text; it may have more."""
    if not pa.types.is_struct(found):
        raise _wrong_type(name, found, f"struct<{', '.join(f'{field}: string' for field in text_fields)}>", path)
    for field in text_fields:
        if found.get_field_index(field) < 0:
            raise _wrong_type(name, found, f"a struct with a field {field!r}", path)
        _check_text(found.field(field).type, f"{name}.{field}", path)


def _check_extra_info(schema: pa.Schema, path: Path) -> None:
    """extra_info may be absent; what it holds is the user's (verl takes an index of any type: DAPO's is a text)."""
    position = schema.get_field_index("extra_info")
    if position < 0:
        return
    found = schema.field(position).type
    if not pa.types.is_struct(found):
        raise _wrong_type("extra_info", found, EXTRA_INFO, path)


def _wrong_type(name: str, found: Any, expected: Any, path: Path) -> ValueError:
    return ValueError(
        f"{path}: column {name} is {found}, but must be {expected}. Convert it when the file is written "
        "(data_prep/schema.py has the schema)."
    )


def _check_values(table: pa.Table, path: Path) -> None:
    for row, (messages, reward) in enumerate(
        zip(table["prompt"].to_pylist(), table["reward_model"].to_pylist(), strict=True)
    ):
        if not messages or not any(message and (message["content"] or "").strip() for message in messages):
            raise ValueError(f"{path}: row {row} has an empty prompt. The model needs at least one message with text.")
        if reward is None or reward["ground_truth"] is None:
            raise ValueError(f"{path}: row {row} has no reward_model.ground_truth, so no answer to it can be graded.")
        if not reward["ground_truth"].strip():
            raise ValueError(
                f"{path}: row {row} has an empty reward_model.ground_truth: no response is right. Drop the row."
            )
    if table["data_source"].null_count:
        raise ValueError(f"{path}: {table['data_source'].null_count} rows have no data_source, which names their task.")
