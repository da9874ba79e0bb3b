"""Prompts as token ids: from parquet or JSON lines in verl's schema, or from a text file with one prompt per line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

Messages = list[dict[str, str]]
HEADS = {"prompt", "question", "problem", "instruction"}
"""Names of the column of prompts in a table."""


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
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as parquet: {error}") from error
    if "prompt" not in table.column_names:
        raise ValueError(f"{path} has no column 'prompt'; found: {', '.join(table.column_names) or 'none'}.")
    rows = table["prompt"].to_pylist()
    for number, row in enumerate(rows):
        if not _are_messages(row):
            raise ValueError(f"{path}: the prompt of row {number} is no list of messages with role and content.")
    return rows


def _lines(path: Path, has_template: bool) -> list[Messages | str]:
    """A line a prompt, cut at \\n alone. Files of another kind are refused, whose lines are no prompts."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is neither parquet nor UTF-8 text: {error}") from error
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if lines and (path.suffix in (".jsonl", ".json") or _is_object(lines[0][1])):
        return [_as_fed(_of_json(path, number, line), has_template) for number, line in lines]
    other = _other_kind(path, lines[0][1]) if lines else None
    if other:
        raise ValueError(
            f'{path} looks like {other}: its lines are no prompts. Give JSON lines ({{"prompt": "..."}}), parquet in '
            "verl's schema, or one prompt per line of text."
        )
    return [_as_fed(line, has_template) for _, line in lines]


def _other_kind(path: Path, first: str) -> str | None:
    """What a file is that is not text with a prompt per line, by its name and first line; None for such text."""
    cells = {cell.strip(' "').lower() for cell in re.split(r"[,;\t]", first)}
    if path.suffix in (".csv", ".tsv") or (len(cells) > 1 and cells & HEADS):
        return "a table with a header"
    return "a JSON list" if first.lstrip().startswith("[") else None


def _as_fed(prompt: Messages | str, has_template: bool) -> Messages | str:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) and has_template else prompt


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _of_json(path: Path, number: int, line: str) -> Messages | str:
    """The field "prompt": a text, or a list of messages."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}:{number}: not JSON: {error}. Give one object a line.") from error
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not (isinstance(prompt, str) and prompt.strip()) and not _are_messages(prompt):
        raise ValueError(f'{path}:{number} has no "prompt" that is a text or a list of messages with role and content.')
    return prompt


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and m.get("content") for m in value)


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
