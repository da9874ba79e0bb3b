"""Prompts as token ids: from a parquet file in verl's schema, or from a text file with one prompt per line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Messages = list[dict[str, str]]


def read(path: Path, tokenizer: Any, limit: int | None = None) -> list[list[int]]:
    """Token ids of the prompts of a file, the first `limit` of them, as training would feed them.

    Messages go through the tokenizer's chat template, and so does a line of text, as the user's message; without a
    template a line is fed as it is.

    Raises:
        ValueError: no such file, it cannot be read, it has no prompt; messages without a chat template.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {path}. Give prompts as parquet in verl's schema, or one per line of text.")
    found = _messages(path) if _is_parquet(path) else _lines(path, has_template=bool(tokenizer.chat_template))
    if not found:
        raise ValueError(f"{path} has no prompt. Write at least one line, or one row.")
    return [_token_ids(prompt, tokenizer, path) for prompt in found[:limit]]


def _is_parquet(path: Path) -> bool:
    with open(path, "rb") as file:
        return path.suffix == ".parquet" or file.read(4) == b"PAR1"


def _messages(path: Path) -> list[Messages]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}") from error
    if "prompt" not in table.column_names:
        raise ValueError(f"{path} has no column 'prompt'; found: {', '.join(table.column_names) or 'none'}.")
    rows = table["prompt"].to_pylist()
    for number, row in enumerate(rows):
        if not isinstance(row, list) or not row or not all(isinstance(m, dict) and m.get("content") for m in row):
            raise ValueError(f"{path}: the prompt of row {number} is no list of messages with role and content.")
    return rows


def _lines(path: Path, has_template: bool) -> list[Messages | str]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is neither parquet nor UTF-8 text: {error}") from error
    return [[{"role": "user", "content": line}] if has_template else line for line in lines]


def _token_ids(prompt: Messages | str, tokenizer: Any, path: Path) -> list[int]:
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
    elif tokenizer.chat_template:
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        ids = tokenizer.encode(text, add_special_tokens=False)
    else:
        raise ValueError(f"{path} holds messages, and the policy's tokenizer has no chat template. Give plain text.")
    if not ids:
        raise ValueError(f"{path}: the prompt {prompt!r} has no token.")
    return list(ids)
