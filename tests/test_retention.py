"""Prompts of a skill as one more validation file: its name, its columns, and who grades it beside a user's reward."""

from __future__ import annotations

import asyncio
import sys
import types
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import retention
from data_prep.rewards import compute_score
from data_prep.schema import SCHEMA, write_parquet


def row(index: int, source: str = "gsm8k") -> dict[str, Any]:
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": f"{index} + 1"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(index + 1)},
        "extra_info": {"split": "test", "index": index, "num_valid": None, "meta": "{}"},
    }


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    path = tmp_path / "gsm8k.parquet"
    write_parquet([row(index) for index in range(5)], path)
    return path


def made(theirs: Path, tmp_path: Path, columns: pa.Schema, prompts: int = 3) -> Path:
    source = retention.identity(theirs)
    return retention.cache("gsm8k", theirs, source, prompts, columns, tmp_path / "cache")


def test_the_first_prompts_become_the_skill(theirs: Path, tmp_path: Path):
    path = made(theirs, tmp_path, SCHEMA)
    assert path == retention.planned("gsm8k", retention.identity(theirs), 3, SCHEMA, tmp_path / "cache")
    table = pq.read_table(path)
    assert table.schema.equals(SCHEMA)
    assert table.to_pylist() == [row(index, "skill/gsm8k") for index in range(3)]
    assert made(theirs, tmp_path, SCHEMA) == path and made(theirs, tmp_path, SCHEMA, prompts=2) != path


def test_a_file_gets_the_columns_of_the_tasks_own(theirs: Path, tmp_path: Path):
    """What pandas wrote: large strings, fewer fields, a column of the user's; verl joins the two files."""
    prompt = pa.list_(pa.struct([("content", pa.large_string()), ("role", pa.large_string())]))
    other = pa.schema(
        [
            ("data_source", pa.large_string()),
            ("prompt", prompt),
            ("reward_model", pa.struct([("ground_truth", pa.large_string())])),
            ("extra_info", pa.struct([("index", pa.int64()), ("mine", pa.int64())])),
            ("level", pa.int64()),
        ]
    )
    table = pq.read_table(made(theirs, tmp_path, other))
    assert table.schema.equals(other)
    assert table.to_pylist()[0] == {
        "data_source": "skill/gsm8k",
        "prompt": [{"content": "0 + 1", "role": "user"}],
        "reward_model": {"ground_truth": "1"},
        "extra_info": {"index": 0, "mine": None},
        "level": None,
    }
    datasets = pytest.importorskip("datasets")
    val = tmp_path / "val.parquet"
    pq.write_table(pa.Table.from_pylist([row(9)], schema=other), val)
    parts = [
        datasets.load_dataset("parquet", data_files=str(path))["train"] for path in (val, made(theirs, tmp_path, other))
    ]
    assert datasets.concatenate_datasets(parts)["data_source"][:] == ["gsm8k", *["skill/gsm8k"] * 3]


def test_columns_that_cannot_hold_the_rows_are_refused(theirs: Path, tmp_path: Path):
    index = SCHEMA.get_field_index("ability")
    numbers = SCHEMA.set(index, pa.field("ability", pa.int64()))
    with pytest.raises(ValueError, match="do not fit the columns of the task's validation file"):
        made(theirs, tmp_path, numbers)
    assert not [path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")]


def test_the_columns_of_what_is_not_built_are_the_schemas(theirs: Path, tmp_path: Path):
    assert retention.columns_like(tmp_path / "nix.parquet").equals(SCHEMA)
    assert retention.columns_like(theirs).equals(SCHEMA)


@pytest.mark.parametrize(
    ("source", "truth", "right"),
    [
        ("palindrome", "aab", "aba"),  # the letters; as mathematics aba would have to be equal to aab
        ("skill/spell_backward", "nus", "nus"),
    ],
)
def test_a_row_is_graded_as_under_its_own_name(tmp_path: Path, source: str, truth: str, right: str):
    path = tmp_path / "own.parquet"
    given = row(0, source) | {"reward_model": {"style": "rule", "ground_truth": truth}}
    write_parquet([given], path)
    (kept,) = pq.read_table(retention.cache("own", path, "id", 1, SCHEMA, tmp_path / "cache")).to_pylist()
    assert kept["data_source"] == "skill/own"
    for response in (right, "zzz", rf"\boxed{{{right}}}"):
        theirs = compute_score(source, response, truth, given["extra_info"])
        assert compute_score("skill/own", response, truth, kept["extra_info"]) == theirs
        assert theirs["acc"] == float(response == right)


def test_columns_that_cannot_say_how_a_row_is_graded_are_refused(tmp_path: Path):
    path = tmp_path / "own.parquet"
    write_parquet([row(0, "palindrome")], path)
    columns = pa.schema([field for field in SCHEMA if field.name != "extra_info"])
    with pytest.raises(ValueError, match="rows of skill own are graded as 'palindrome', .* no text extra_info.meta"):
        retention.cache("own", path, "id", 1, columns, tmp_path / "cache")


# ---------------------------------------------------------------------------------------------------- grading


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("rewards_of_test_retention")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def grade(module: types.ModuleType, source: str, response: str) -> Any:
    given = {"data_source": source, "solution_str": response, "ground_truth": "aba", "extra_info": {"index": 1}}
    return retention.compute_score(**given, own=f"{module.__name__}:score")


def test_a_skill_is_graded_here_and_the_task_by_its_own_reward(own: types.ModuleType):
    calls: list[dict[str, Any]] = []

    def score(**given: Any) -> float:
        calls.append(given)
        return 0.5

    own.score = score  # type: ignore[attr-defined]
    assert grade(own, "vowels", "xyz") == 0.5
    assert calls == [
        {"data_source": "vowels", "solution_str": "xyz", "ground_truth": "aba", "extra_info": {"index": 1}}
    ]
    assert grade(own, "skill/spell_backward", "aba")["acc"] == 1.0
    assert grade(own, "skill/spell_backward", "abc")["acc"] == 0.0
    assert len(calls) == 1


def test_an_asynchronous_reward_works_from_the_thread_that_verl_calls_it_in(own: types.ModuleType):
    async def score(**_: Any) -> float:
        await asyncio.sleep(0)
        return 0.25

    own.score = score  # type: ignore[attr-defined]

    async def call() -> Any:
        return await asyncio.get_running_loop().run_in_executor(None, grade, own, "vowels", "x")

    assert asyncio.run(call()) == 0.25
