"""The files of all tasks as verl itself reads them: one list, one dataset, whatever the order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import disable_progress_bars
from omegaconf import OmegaConf

from data_prep import deepscaler, palindrome, skills
from data_prep.lengths import named_tokenizer
from data_prep.schema import differences

verl = pytest.importorskip("verl.utils.dataset.rl_dataset", reason="not installed: verl (make setup)")


def quiet(done: int, total: int, text: str) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    """Palindromes, mathematics with one and with several answers, and a skill."""
    root = tmp_path_factory.mktemp("files")
    problems = [{"problem": f"{n}?", "answer": n if n % 2 else [f"{n}", "x"]} for n in range(6)]
    (root / "x.json").write_text(json.dumps(problems))
    for name in "pds":
        (root / name).mkdir()
    palindrome.build(palindrome.PalindromeOptions(train_size=4, test_size=2), root / "p", quiet)
    options = deepscaler.DeepScaleROptions(source=str(root / "x.json"), test_size=2, style="question")
    deepscaler.build(options, root / "d", quiet)
    skills.build(skills.SkillOptions(skill="number_sorting", size=3), root / "s", quiet)
    return [root / name / "test.parquet" for name in "pds"]


def read(files: list[Path], cache: Path) -> list[dict]:
    disable_progress_bars()
    config = OmegaConf.create({"cache_dir": str(cache), "max_prompt_length": 64, "filter_overlong_prompts": False})
    dataset = verl.RLHFDataset([str(path) for path in files], named_tokenizer("tiny"), config)
    return [dataset[place] for place in range(len(dataset))]


def test_verl_reads_all_tasks_as_one_list_in_any_order(files, tmp_path):
    rows = read(files, tmp_path / "a")
    assert [row["data_source"] for row in rows] == ["palindrome"] * 2 + ["deepscaler"] * 2 + [
        "skill/number_sorting"
    ] * 3
    assert all(isinstance(row["reward_model"]["ground_truth"], str) for row in rows)
    assert [row["index"] for row in rows] == [0, 1, 0, 1, 0, 1, 2]
    assert all(row["raw_prompt"][0]["role"] == "user" for row in rows)
    assert len(read(files[::-1], tmp_path / "b")) == 7


def test_what_differences_warns_of_is_what_verl_refuses(files, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(files[0])
    place = table.schema.get_field_index("data_source")
    large = table.set_column(place, "data_source", table["data_source"].cast(pa.large_string()))
    pq.write_table(large, tmp_path / "large.parquet")
    (told,) = differences({files[0]: table, tmp_path / "large.parquet": pq.read_table(tmp_path / "large.parquet")})
    assert told.startswith("data_source is string in test.parquet and large_string in large.parquet")
    with pytest.raises(ValueError, match="features can't be aligned|cannot be aligned"):
        read([files[0], tmp_path / "large.parquet"], tmp_path / "c")
