"""What is wrong with a task's files, its reward function or a model folder, said before anything starts.

Every function raises ValueError whose text says what was given, why it cannot work, and what to do. `klreg run
--dry-run` and `klreg data check` call them.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_prep import golden, rewards, trial
from data_prep.functions import OURS, load
from data_prep.lengths import Messages, RenderError, load_tokenizer, named_tokenizer, no_template, num_tokens
from data_prep.schema import check_file, differences

WEIGHT_PATTERNS = ("*.safetensors", "*.bin")
MAX_PADDING_NATS = 0.003
"""Largest log(model vocabulary / tokenizer vocabulary) let through [nats per token]; Qwen2.5 has 0.0018 to 0.0026."""


def check_task(
    train: Path,
    val: Path,
    tokenizer_folder: Path | None,
    max_prompt_tokens: int,
) -> dict[str, int]:
    """Checks both data files, and that every prompt, rendered by the tokenizer, has at most `max_prompt_tokens`
    tokens.

    Without a tokenizer folder lengths are not checked.

    Returns the counts train_rows and val_rows, and longest_prompt [tokens] if there is a tokenizer.
    """
    tables = {path: check_file(path) for path in (Path(train), Path(val))}
    counts = {"train_rows": tables[Path(train)].num_rows, "val_rows": tables[Path(val)].num_rows}
    if tokenizer_folder is None:
        return counts
    tokenizer = load_tokenizer(Path(tokenizer_folder))
    return counts | {"longest_prompt": check_lengths(tables, tokenizer, max_prompt_tokens)}


def check_lengths(tables: Mapping[Path, pa.Table], tokenizer: Any, max_prompt_tokens: int) -> int:
    """The longest prompt of all files [tokens], once none is over `max_prompt_tokens`."""
    return max(_check_lengths(path, table, tokenizer, max_prompt_tokens) for path, table in tables.items())


def repeated_prompts(tables: Mapping[Path, pa.Table]) -> list[str]:
    """A sentence for each file that asks something twice, and for each pair of files that ask the same."""
    prompts = {path: [json.dumps(row) for row in table["prompt"].to_pylist()] for path, table in tables.items()}
    within = [(path, len(rows) - len(set(rows))) for path, rows in prompts.items()]
    found = [f"{count} prompts of {path.name} are repeated in it" for path, count in within if count]
    for (one, left), (two, right) in itertools.combinations(prompts.items(), 2):
        if count := len(set(left) & set(right)):
            found.append(f"{count} prompts of {two.name} are in {one.name} too: what is tested was trained on")
    return found


def describe(
    files: Sequence[Path], reward: str | None = None, tokenizer: str | None = None, max_prompt_tokens: int = 1024
) -> list[str]:
    """What can be said of data files that a user brings, one sentence a line.

    Tries `reward` (pkg.module:function) on each file's rows, or this project's own if none is named, and counts tokens
    where a `tokenizer` is named. Raises ValueError for whatever would end a run or spoil it.
    """
    tables = {Path(path): check_file(Path(path)) for path in files}
    lines = [f"{path}: {table.num_rows} rows in verl's schema" for path, table in tables.items()]
    lines += [f"note: {text}." for text in (*differences(tables), *repeated_prompts(tables))]
    if tokenizer is not None:
        longest = check_lengths(tables, named_tokenizer(tokenizer), max_prompt_tokens)
        lines.append(f"longest prompt: {longest} tokens of at most {max_prompt_tokens}")
    if reward is None:
        for path, table in tables.items():
            _refuse_no_answers(path, table)
    function = load(reward or OURS, Path.cwd())
    return lines + [_tried(path, trial.try_reward(function, table), reward) for path, table in tables.items()]


def _refuse_no_answers(path: Path, table: pa.Table) -> None:
    """Ground truths of mathematics that no response can be equal to."""
    infos = table["extra_info"].to_pylist() if "extra_info" in table.column_names else [None] * table.num_rows
    rows = zip(table["data_source"].to_pylist(), table["reward_model"].to_pylist(), infos, strict=True)
    for number, (source, model, info) in enumerate(rows):
        if rewards.grader_of(rewards.graded_as(info) or source)[0] is not rewards.grade_mathematics:
            continue
        for answer in golden.alternatives(model["ground_truth"]):
            if wrong := golden.no_answer(answer):
                raise ValueError(f"{path}: row {number}: the ground truth {wrong}.")


def _tried(path: Path, tried: trial.Trial, reward: str | None) -> str:
    asked = f"in the form that the prompts ask for ({', '.join(tried.forms)})" if tried.forms else "given as responses"
    return (
        f"{path}: {reward or 'our own reward'} returns {', '.join(tried.keys)}; {asked}, {tried.right} of "
        f"{tried.rows} ground truths score above an empty one; slowest call {1000 * tried.slowest:.0f} ms; "
        f"runs will be told by their {'mean score: it grades' if tried.graded else 'accuracy: right or wrong'}"
    )


def check_model(folder: Path) -> dict[str, int]:
    """Checks that a model folder has config, weights and tokenizer, and that the vocabularies fit.

    Returns model_vocabulary and tokenizer_vocabulary [tokens].
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder. Name a model folder, or make one (`klreg data tiny-model --help`)."
        )
    config = _read_config(folder)
    check_weights(folder)
    tokenizer = load_tokenizer(folder)
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{folder}: the tokenizer has no chat template, so prompts cannot be rendered. {no_template(str(folder))}"
        )
    sizes = {"model_vocabulary": _vocabulary(config, folder), "tokenizer_vocabulary": len(tokenizer)}
    check_vocabulary(folder, *sizes.values())
    return sizes


def check_vocabulary(folder: Path, model_size: int, tokenizer_size: int) -> None:
    """Refuses a model that lacks rows for the tokenizer's ids, or that has noticeably more rows than ids.

    Surplus rows matter by at most log(model_size / tokenizer_size) nats where the model has not learned to avoid them,
    and by nearly nothing where it has; below MAX_PADDING_NATS, as in large released models, they are let through.
    """
    if model_size < tokenizer_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer_size} tokens, the model only {model_size} rows for them, so some "
            "prompts cannot be embedded. Use the tokenizer that belongs to the model."
        )
    padding = math.log(model_size / tokenizer_size)
    if padding > MAX_PADDING_NATS:
        raise ValueError(
            f"{folder}: the model's vocabulary ({model_size}) is larger than the tokenizer's ({tokenizer_size}). verl "
            "masks the surplus logits in vLLM, but the trainer does not, so their log-probabilities, and every KL "
            f"between them, are off by up to log({model_size}/{tokenizer_size}) = {padding:.3f} nats per token from "
            "step 1. Cut the surplus rows (model.resize_token_embeddings(len(tokenizer))) and save the model anew."
        )


def _check_lengths(path: Path, table: pa.Table, tokenizer: Any, max_prompt_tokens: int) -> int:
    """The longest prompt of the file [tokens]."""
    lengths = [_num_tokens(tokenizer, messages, path, row) for row, messages in enumerate(table["prompt"].to_pylist())]
    too_long = [row for row, length in enumerate(lengths) if length > max_prompt_tokens]
    if too_long:
        raise ValueError(
            f"{path}: {len(too_long)} of {len(lengths)} prompts are longer than max_prompt_tokens={max_prompt_tokens}; "
            f"the first is row {too_long[0]} with {lengths[too_long[0]]} tokens, the longest has {max(lengths)}. Raise "
            f"train.max_prompt_tokens to {max(lengths)}, or drop these rows."
        )
    return max(lengths)


def _num_tokens(tokenizer: Any, messages: Messages, path: Path, row: int) -> int:
    try:
        return num_tokens(tokenizer, messages)
    except RenderError as error:
        raise ValueError(
            f"{path}: row {row} cannot be rendered by the chat template: {error}. Its roles are "
            f"{[message['role'] for message in messages]}; use those that the model's template knows."
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json, so it is no model folder. Save the model with save_pretrained.")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}. Save the model anew with save_pretrained.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds {type(config).__name__}, not an object of settings. Save the model anew.")
    return config


def check_weights(folder: Path) -> None:
    """There are weights, and all that an index names. Raises ValueError."""
    found = {path.name for pattern in WEIGHT_PATTERNS for path in folder.glob(pattern)}
    if not found:
        raise ValueError(
            f"{folder} has no weights ({' or '.join(WEIGHT_PATTERNS)}). A checkpoint of a run has to be exported to a "
            "Hugging Face folder first; a download has to be complete."
        )
    for index in folder.glob("*.index.json"):
        missing = sorted(set(json.loads(index.read_text())["weight_map"].values()) - found)
        if missing:
            raise ValueError(
                f"{folder} lacks weight files that {index.name} names: {', '.join(missing)}. Fetch them too."
            )


def _vocabulary(config: dict[str, Any], folder: Path) -> int:
    size = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    if not isinstance(size, int):
        raise ValueError(f"{folder}/config.json has no vocab_size, so it cannot be compared with the tokenizer's.")
    return size
