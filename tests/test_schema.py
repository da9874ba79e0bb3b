"""The parquet schema: what is written reads back, and each way in which a file can be wrong has its own text."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.schema import SCHEMA, TAKEN, check_file, differences, make_row, write_parquet


def row(index: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "data_source": "palindrome",
        "prompt": [{"role": "user", "content": "abab"}],
        "ability": "palindrome",
        "reward_model": {"style": "rule", "ground_truth": "abba"},
        "extra_info": {"split": "train", "index": index, "num_valid": "2", "meta": "{}"},
    } | changes


def write_table(path: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


def test_written_rows_read_back_in_the_schema(tmp_path):
    rows = [row(0), row(1)]
    write_parquet(rows, tmp_path / "x.parquet")
    table = check_file(tmp_path / "x.parquet")
    assert table.schema.equals(SCHEMA)
    assert table.to_pylist() == rows


def test_the_same_rows_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_parquet([row(0), row(1)], tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_count_beyond_int64_survives_as_text(tmp_path):
    count = str(2**64)
    info = {"split": "train", "index": 0, "num_valid": count, "meta": "{}"}
    write_parquet([row(extra_info=info)], tmp_path / "x.parquet")
    assert check_file(tmp_path / "x.parquet")["extra_info"][0].as_py()["num_valid"] == count


def test_a_number_as_ground_truth_is_refused_when_written(tmp_path):
    with pytest.raises(ValueError, match="does not fit the schema"):
        write_parquet([row(reward_model={"style": "rule", "ground_truth": 142.0})], tmp_path / "x.parquet")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.parquet is not there\. Name an existing parquet file"):
        check_file(tmp_path / "gone.parquet")


def test_a_file_that_is_no_parquet_is_refused(tmp_path):
    (tmp_path / "x.parquet").write_text("question,answer\n")
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        check_file(tmp_path / "x.parquet")


def test_an_empty_file_is_refused(tmp_path):
    write_parquet([], tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="has no rows"):
        check_file(tmp_path / "x.parquet")


@pytest.mark.parametrize("name", ["data_source", "prompt", "reward_model"])
def test_a_missing_column_is_named_with_what_was_found(tmp_path, name):
    columns = row()
    del columns[name]
    path = write_table(tmp_path / "x.parquet", [columns])
    with pytest.raises(ValueError, match=f"has no column '{name}'; found: .*ability.*Expected: {name}:"):
        check_file(path)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"prompt": "abab"}, r"column prompt is string, but must be list"),
        ({"prompt": ["abab"]}, r"column prompt\[\.\.\.\] is string, but must be struct<role: string, content: string>"),
        ({"prompt": [{"role": "user"}]}, r"must be a struct with a field 'content'"),
        ({"data_source": 3}, r"column data_source is int64, but must be string"),
        ({"reward_model": {"ground_truth": 1.5}}, r"column reward_model\.ground_truth is double, but must be string"),
        ({"reward_model": {"style": "rule"}}, r"column reward_model .* must be a struct with a field 'ground_truth'"),
        ({"extra_info": "{}"}, r"column extra_info is string, but must be struct"),
    ],
)
def test_a_column_of_another_type_is_named_with_both_types(tmp_path, changes, text):
    path = write_table(tmp_path / "x.parquet", [row(**changes)])
    with pytest.raises(ValueError, match=text):
        check_file(path)


@pytest.mark.parametrize("prompt", [[], [{"role": "user", "content": "  "}], [{"role": "user", "content": None}], None])
def test_an_empty_prompt_is_named_by_its_row(tmp_path, prompt):
    path = write_table(tmp_path / "x.parquet", [row(), row(prompt=prompt)], SCHEMA)
    with pytest.raises(ValueError, match="row 1 has an empty prompt"):
        check_file(path)


def test_a_missing_ground_truth_is_named_by_its_row(tmp_path):
    path = write_table(tmp_path / "x.parquet", [row(), row(reward_model=None)], SCHEMA)
    with pytest.raises(ValueError, match="row 1 has no reward_model.ground_truth"):
        check_file(path)


def test_a_row_without_data_source_is_refused(tmp_path):
    path = write_table(tmp_path / "x.parquet", [row(), row(data_source=None)], SCHEMA)
    with pytest.raises(ValueError, match="1 rows have no data_source"):
        check_file(path)


def test_make_row_fits_the_schema_and_keeps_text_as_it_is():
    made = make_row(
        data_source="d", prompt="p", ability="a", ground_truth="g", split="test", index=3, meta={"b": "\u00e9", "a": 1}
    )
    assert pa.Table.from_pylist([made], schema=SCHEMA).to_pylist() == [made]
    assert made["extra_info"] == {"split": "test", "index": 3, "num_valid": None, "meta": '{"a": 1, "b": "\u00e9"}'}


@pytest.mark.parametrize("name", sorted(TAKEN))
def test_a_column_that_verl_uses_itself_is_refused(tmp_path, name):
    path = write_table(tmp_path / "x.parquet", [row(**{name: "x"})])
    with pytest.raises(ValueError, match=f"has a column '{name}': verl hands every column to its agent loop by name"):
        check_file(path)


def test_files_that_cannot_be_read_as_one_list_are_told(tmp_path):
    write_parquet([row()], tmp_path / "ours.parquet")
    other = {**row(), "extra_info": {"index": 0, "own": 1.5}}
    large = pa.Table.from_pylist([other])
    place = large.schema.get_field_index("data_source")
    large = large.set_column(place, "data_source", large["data_source"].cast(pa.large_string()))
    tables = {Path("ours.parquet"): check_file(tmp_path / "ours.parquet"), Path("theirs.parquet"): large}
    (found,) = differences(tables)  # fields that only one has do not matter
    assert found.startswith(
        "data_source is string in ours.parquet and large_string in theirs.parquet: verl cannot read"
    )
    assert differences({path: tables[Path("ours.parquet")] for path in tables}) == []


def test_a_users_file_may_have_other_columns_and_no_extra_info(tmp_path):
    columns = row(level="hard")
    del columns["extra_info"]
    assert check_file(write_table(tmp_path / "x.parquet", [columns])).num_rows == 1
