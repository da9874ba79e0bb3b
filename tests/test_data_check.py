"""The checks before a run: what is wrong with a task's files or a model folder is said with the way out."""

import json
import math
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import real_data

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
    keys = "acc, echoed, format_ok, pred, score, timeout, truncated"
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


GSM8K = 'Let\'s think step by step and output the final answer after "####".'
DAPO = 'The last line should be of the form Answer: $Answer. Put your answer on its own line after "Answer:".'


def write_asked(path: Path, asked: str, truth: object = "72", index: object = 0) -> Path:
    rows = [
        {
            "data_source": "someones/own",
            "prompt": [{"role": "user", "content": asked}],
            "reward_model": {"style": "rule", "ground_truth": truth},
            "extra_info": {"index": index},
        }
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize(
    ("asked", "form"), [(GSM8K, "hashes"), (DAPO, "line"), (r"In \boxed{}.", "boxed"), ("<answer></answer>", "answer")]
)
def test_the_trial_answers_as_the_prompt_asks_and_our_reward_reads_it(tmp_path, asked, form):
    told = describe([write_asked(tmp_path / "x.parquet", asked)])[-1]
    assert f"in the form that the prompts ask for ({form}), 1 of 1 ground truths score" in told


def boxed_only(data_source, solution_str, ground_truth, extra_info=None):
    return float(rf"\boxed{{{ground_truth}}}" in solution_str)


def test_a_reward_that_does_not_read_the_form_that_is_asked_for_is_seen(tmp_path):
    """The control: the same rows with a reward that reads boxes alone score nothing."""
    told = describe([write_asked(tmp_path / "x.parquet", GSM8K)], reward="test_data_check:boxed_only")[-1]
    assert "0 of 1 ground truths score" in told


def test_an_index_may_be_of_any_type_that_verl_takes(tmp_path):
    assert "1 of 1" in describe([write_asked(tmp_path / "x.parquet", DAPO, index="9a6f-uuid")])[-1]


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ("", "row 0 has an empty reward_model.ground_truth"),
        ("She has 7.\n#### 7", "row 0: the ground truth .* is a solution with its answer after ####"),
        ("\frac{1}{2}", "row 0: the ground truth .* has the control character"),
        ({"value": "7"}, "ground_truth is struct<value: string>, but must be string"),
    ],
)
def test_ground_truths_that_no_response_can_equal_are_refused_with_their_row(tmp_path, truth, message):
    with pytest.raises(ValueError, match=message):
        describe([write_asked(tmp_path / "x.parquet", "Q", truth)])


def test_all_missing_columns_are_named_at_once(tmp_path):
    pq.write_table(pa.table({"question": ["q"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="has no column 'data_source', 'prompt', 'reward_model'; found: question"):
        describe([tmp_path / "x.parquet"])


def test_a_tokenizer_without_a_chat_template_gets_two_lines_to_paste_that_help(tmp_path, model):
    from data_prep.lengths import load_tokenizer

    (model / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template") as told:
        describe([write_asked(tmp_path / "x.parquet", "Q")], tokenizer=str(model))
    lines = [line.strip() for line in str(told.value).splitlines() if line.startswith("    ")]
    exec("from transformers import AutoTokenizer\n" + "\n".join(lines))
    assert describe([write_asked(tmp_path / "x.parquet", "Q")], tokenizer=str(model))
    assert load_tokenizer(model).chat_template


CASES = {
    "dapo": "4 of 4",
    "dapo_intindex": "4 of 4",
    "gsm8k": "4 of 4",
    "gsm8k_val": "4 of 4",
    "skywork": "4 of 4",
    "gt_empty": "row 0 has an empty",
    "gt_gsm_raw": "after ####",
    "orz_dict": "must be string",
    "prompt_json": "column prompt is string",
}


@pytest.mark.parametrize("name", CASES)
def test_the_parquet_files_of_public_reports(name):
    path = real_data.cases(Path("data") / f"{name}.parquet")
    try:
        told = describe([path])[-1]
    except ValueError as error:
        told = str(error)
    assert CASES[name] in told
