"""The checks before a run: what is wrong with a task's files or a model folder is said with the way out."""

import json
import math
import shutil
from pathlib import Path

import pytest

from data_prep.check import check_model, check_task, check_vocabulary, describe
from data_prep.palindrome import PalindromeOptions
from data_prep.palindrome import build as build_palindrome
from data_prep.schema import write_parquet
from data_prep.tiny_model import TinyModelOptions
from data_prep.tiny_model import build as build_model


def quiet(done: int, total: int, text: str) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    build_palindrome(PalindromeOptions(train_size=30, test_size=10), folder, quiet)
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    options = TinyModelOptions(hidden_size=32, heads=1, layers=1, steps=1, batch_size=2, measured_prompts=3)
    build_model(options, folder, quiet)
    return folder


@pytest.fixture
def model(original, tmp_path):
    """A copy of the model folder that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "model"))


def write_prompt(path: Path, *messages: dict[str, str], data_source: str = "palindrome") -> Path:
    reward = {"style": "rule", "ground_truth": "abba"}
    info = {"split": "train", "index": 0, "num_valid": None, "meta": "{}"}
    row = {"data_source": data_source, "prompt": list(messages), "ability": "x", "reward_model": reward}
    write_parquet([row | {"extra_info": info}], path)
    return path


def change_config(model: Path, **changes: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_good_files_give_their_counts(data, original):
    counts = check_task(data / "train.parquet", data / "test.parquet", original, 16)
    # the longest prompt: 8 letters and 3 tokens of the template
    assert counts == {"train_rows": 30, "val_rows": 10, "longest_prompt": 11}


def test_without_a_tokenizer_lengths_are_not_checked(data):
    assert check_task(data / "train.parquet", data / "test.parquet", None, 1) == {"train_rows": 30, "val_rows": 10}


def test_a_missing_validation_file_is_named(data):
    with pytest.raises(ValueError, match="gone.parquet is not there"):
        check_task(data / "train.parquet", data / "gone.parquet", None, 16)


def test_prompts_over_the_limit_are_counted_and_the_way_out_named(data, original):
    with pytest.raises(ValueError, match=r"prompts are longer than max_prompt_tokens=10; .* to 11, or drop these rows"):
        check_task(data / "train.parquet", data / "test.parquet", original, 10)


def test_a_description_says_rows_lengths_rewards_and_what_is_there_twice(data, original, tmp_path):
    shutil.copy(data / "test.parquet", tmp_path / "again.parquet")
    files = [data / "train.parquet", data / "test.parquet", tmp_path / "again.parquet"]
    lines = describe(files, None, str(original), 16)
    assert lines[:3] == [
        f"{path}: {rows} rows in verl's schema" for path, rows in zip(files, (30, 10, 10), strict=True)
    ]
    assert lines[3:5] == [
        "note: 10 prompts of again.parquet are in test.parquet too: what is tested was trained on.",
        "longest prompt: 11 tokens of at most 16",
    ]
    keys = "acc, format_ok, pred, score, timeout, truncated"
    expected = (
        f"{files[0]}: our own reward returns {keys}; given as responses, 30 of 30 ground truths score above an empty"
    )
    assert lines[5].startswith(expected) and lines[5].endswith("; runs will be told by their accuracy: right or wrong")
    assert len(lines) == 8


def test_a_description_says_of_a_reward_that_grades_that_runs_are_told_by_their_score(data, tmp_path, monkeypatch):
    (tmp_path / "grades_by_length.py").write_text("def score(solution_str, **_): return 1.75 - len(solution_str) / 8\n")
    monkeypatch.chdir(tmp_path)
    assert describe([data / "train.parquet"], "grades_by_length:score")[-1].endswith("by their mean score: it grades")


def test_a_description_refuses_what_a_run_would_choke_on(data, original, tmp_path):
    with pytest.raises(ValueError, match="prompts are longer than max_prompt_tokens=10"):
        describe([data / "train.parquet"], None, str(original), 10)
    with pytest.raises(ValueError, match="'data_prep.rewards' has no function 'nothing'"):
        describe([data / "train.parquet"], "data_prep.rewards:nothing")


def test_a_users_own_reward_function_may_grade_any_source(data, tmp_path):
    other = write_prompt(tmp_path / "x.parquet", {"role": "user", "content": "ab"}, data_source="gsm9k")
    assert check_task(other, data / "test.parquet", None, 16)["train_rows"] == 1


def test_a_role_unknown_to_the_template_is_named_by_its_row(data, original, tmp_path):
    other = write_prompt(tmp_path / "x.parquet", {"role": "tool", "content": "ab"})
    with pytest.raises(ValueError, match=r"row 0 cannot be rendered by the chat template.*\['tool'\]"):
        check_task(other, data / "test.parquet", original, 16)


def test_a_good_model_gives_its_vocabularies(original):
    assert check_model(original) == {"model_vocabulary": 261, "tokenizer_vocabulary": 261}


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a folder. Name a model folder"):
        check_model(tmp_path / "gone")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", "has no tokenizer .* so no prompt can be encoded"),
        ("config.json", "has no config.json, so it is no model folder"),
        ("model.safetensors", "has no weights"),
        ("chat_template.jinja", "the tokenizer has no chat template"),
    ],
)
def test_a_missing_file_of_the_model_is_named(model, name, text):
    (model / name).unlink()
    with pytest.raises(ValueError, match=text):
        check_model(model)


def test_a_broken_tokenizer_is_refused(model):
    (model / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="the tokenizer cannot be loaded"):
        check_model(model)


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "holds list, not an object")])
def test_a_broken_config_is_refused(model, text, message):
    (model / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        check_model(model)


def test_a_missing_shard_of_the_weights_is_named(model):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="lacks weight files .*: model-00002-of-00002.safetensors"):
        check_model(model)


def test_a_vocabulary_larger_than_the_tokenizers_is_refused_with_the_error_it_makes(model):
    change_config(model, vocab_size=320)
    # log(320 / 261) = 0.2038
    with pytest.raises(ValueError, match=r"verl masks the surplus logits in vLLM, .* log\(320/261\) = 0\.204 nats"):
        check_model(model)


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(model):
    change_config(model, vocab_size=260)
    with pytest.raises(ValueError, match="the tokenizer has 261 tokens, the model only 260 rows"):
        check_model(model)


def test_a_config_without_vocabulary_is_refused(model):
    config = json.loads((model / "config.json").read_text())
    del config["vocab_size"]
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has no vocab_size"):
        check_model(model)


def test_the_padding_of_released_models_is_let_through():
    # Qwen2.5: 151936 or 152064 rows for 151665 tokens, at most log(152064/151665) = 0.0026 nats
    assert math.log(152064 / 151665) < 0.003
    check_vocabulary(Path("model"), 151936, 151665)
    check_vocabulary(Path("model"), 152064, 151665)
    with pytest.raises(ValueError, match="larger than the tokenizer's"):
        check_vocabulary(Path("model"), 262, 261)  # log(262/261) = 0.0038
