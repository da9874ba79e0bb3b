"""Prompt lengths in tokens, as the model will see them: rendered by the tokenizer's own chat template.

verl's default ends a run at the first prompt over data.max_prompt_length, so long ones are found before it starts.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Messages = Sequence[Mapping[str, str]]
TINY = "tiny"
"""The name that stands for the tiny model's tokenizer, which is made here."""
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
QUIETLY = {"return_dict": False, "tokenizer_kwargs": {"verbose": False}}
"""Without a warning for each prompt over the tokenizer's own limit: it is what is looked for."""
SPARE = 16
"""Tokens that a tokenizer may add to a text beyond one per character, for a start mark or a leading space."""


PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""A chat template for a model that never had one, as it is written in Python."""


class RenderError(ValueError):
    """The chat template refuses these messages."""


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder. Raises ValueError where there is none, or it cannot be loaded."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(
            f"{folder} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}), so no prompt can be encoded. Copy the "
            "tokenizer's files of the model it was made from into the folder (tokenizer.save_pretrained)."
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: the tokenizer cannot be loaded: {error}. Save it anew from its model.") from error


def named_tokenizer(name: str) -> Any:
    """The tokenizer of `tiny`, of a model folder, or of a Hugging Face id, which may end in @REVISION.

    Raises ValueError where it is not there, OSError where the Hub cannot be reached.
    """
    if name == TINY:
        from data_prep.tiny_model import build_tokenizer

        return build_tokenizer()
    if Path(name).expanduser().is_dir():
        return load_tokenizer(Path(name).expanduser())
    if name[:1] in "./~":
        raise ValueError(f"{name} is not a folder. Name a model folder, a Hugging Face id, or `{TINY}`.")
    from transformers import AutoTokenizer

    repository, _, revision = name.partition("@")
    return AutoTokenizer.from_pretrained(repository, revision=revision or None)


def no_template(folder: str) -> str:
    """What to do about a tokenizer without a chat template: two lines to paste."""
    return (
        "Give it one, the model's own where it has one, or this plain one; in Python:\n"
        f'    tokenizer = AutoTokenizer.from_pretrained({folder!r}); tokenizer.chat_template = "{PLAIN_TEMPLATE}"\n'
        f"    tokenizer.save_pretrained({folder!r})"
    )


def num_tokens(tokenizer: Any, messages: Messages) -> int:
    """Tokens of a rendered prompt with what the template puts before the answer.

    Raises RenderError if the template refuses the messages, for a role that it does not know, say.
    """
    from jinja2 import TemplateError

    try:
        return len(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, **QUIETLY))
    except TemplateError as error:
        raise RenderError(str(error)) from error
    except ValueError as error:  # transformers', where there is no template
        if getattr(tokenizer, "chat_template", None):
            raise
        place = str(tokenizer.name_or_path)
        raise ValueError(f"The tokenizer of {place} has no chat template. {no_template(place)}") from error


def too_long(tokenizer: Any, prompts: Sequence[Messages], limit: int) -> dict[int, int]:
    """The prompts over `limit` tokens, by their place, with their lengths [tokens].

    A token stands for at least one ASCII character. So an ASCII prompt whose characters and template together fit needs
    no encoding, which leaves few of a usual set; all others are rendered and counted.
    """
    if not prompts:
        return {}
    template = num_tokens(tokenizer, [{**message, "content": "x"} for message in prompts[0]]) + SPARE
    doubtful = [place for place, messages in enumerate(prompts) if _most(messages) + template > limit]
    lengths = {place: num_tokens(tokenizer, prompts[place]) for place in doubtful}
    return {place: length for place, length in lengths.items() if length > limit}


def _most(messages: Messages) -> float:
    """No more tokens than this in the messages' texts; infinite where characters bound nothing."""
    texts = [message["content"] for message in messages]
    return sum(map(len, texts)) if all(map(str.isascii, texts)) else float("inf")
