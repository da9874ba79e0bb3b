"""Decoder models by their numbers: how many parameters, how much key-value cache, how many operations a token costs.

The numbers come from the model's config.json where that is here, else from a small table of released models. Only dense
decoders are counted (Llama's layout: gated MLP, grouped-query attention, RMS norms); anything else is refused rather
than guessed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DENSE = ("qwen2", "qwen3", "llama", "mistral")
"""`model_type`s that are counted here."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The sizes of a dense decoder."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    """Of the gated MLP: three matrices of hidden x intermediate."""
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    """Whether the output head is the embedding."""
    qkv_bias: bool
    """Qwen2 has a bias on q, k and v; the others have none."""
    qk_norm: bool
    """Qwen3 normalises q and k per head."""
    source: str
    """Where the sizes come from."""

    @property
    def kv_width(self) -> int:
        """Of keys, and of values [numbers per token and layer]."""
        return self.kv_heads * self.head_dim

    @property
    def layer_parameters(self) -> int:
        """Attention, MLP and two norms of one layer."""
        query = self.heads * self.head_dim
        attention = self.hidden * (2 * query + 2 * self.kv_width)
        bias = query + 2 * self.kv_width if self.qkv_bias else 0
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        return attention + bias + norms + 3 * self.hidden * self.intermediate

    @property
    def outer_parameters(self) -> int:
        """Embedding, output head where it is a matrix of its own, last norm."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.outer_parameters + self.layers * self.layer_parameters

    @property
    def kv_bytes(self) -> int:
        """Key-value cache of one token in bfloat16, over all layers."""
        return 2 * 2 * self.layers * self.kv_width

    def forward_flops(self, context: float) -> float:
        """Of one token that looks back at `context` tokens: two per weight of a product, embedding look-up free."""
        products = self.layers * self.layer_parameters + self.vocabulary * self.hidden
        attention = 2 * self.layers * self.heads * self.head_dim * context
        return 2 * (products + attention)


def from_config(values: Mapping[str, Any], name: str, source: str) -> Architecture:
    """From config.json as transformers writes it.

    Raises:
        ValueError: the model is of a kind that is not counted here, or a size is missing.
    """
    kind = values.get("model_type")
    if kind not in DENSE:
        raise ValueError(
            f"{name}: models of type {kind!r} are not counted, only dense ones ({', '.join(DENSE)}). Whether it fits "
            "is not known before it runs."
        )
    try:
        return _dense(values, name, source)
    except KeyError as error:
        raise ValueError(f"{source}: has no {error.args[0]!r}, so the model's size is not known.") from None


def _dense(values: Mapping[str, Any], name: str, source: str) -> Architecture:
    heads = int(values["num_attention_heads"])
    kind = values["model_type"]
    return Architecture(
        name=name,
        layers=int(values["num_hidden_layers"]),
        hidden=int(values["hidden_size"]),
        intermediate=int(values["intermediate_size"]),
        heads=heads,
        kv_heads=int(values.get("num_key_value_heads") or heads),
        head_dim=int(values.get("head_dim") or values["hidden_size"] // heads),
        vocabulary=int(values["vocab_size"]),
        tied=bool(values.get("tie_word_embeddings", False)),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        source=source,
    )


def read(folder: Path, name: str | None = None) -> Architecture:
    """Of a model's folder. Raises ValueError where it has no readable config.json, or `from_config` refuses it."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}), so the model's size is not known.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: is no JSON object, so the model's size is not known.")
    return from_config(values, name or folder.name, "config.json")


def of(path: str, folder: Path | None = None) -> Architecture:
    """The architecture of a recipe's model.path.

    Args:
        path: a folder or a Hugging Face id, as the recipe says.
        folder: where the model's files are, if they are here.

    Raises:
        ValueError: neither the files nor the table know it.
    """
    if folder is not None and (folder / "config.json").is_file():
        return read(folder, path)
    if path in NAMED:
        return NAMED[path]
    raise ValueError(
        f"{path}: its config.json is not here and it is not in the table ({', '.join(NAMED)}), so its size is not "
        f"known. Fetch it first (`hf download {path} config.json`)."
    )


def _qwen2(name: str, *sizes: int, tied: bool) -> Architecture:
    """`sizes`: layers, hidden, intermediate, heads, key-value heads, vocabulary."""
    layers, hidden, intermediate, heads, kv, vocabulary = sizes
    return Architecture(
        name=name,
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv,
        head_dim=hidden // heads,
        vocabulary=vocabulary,
        tied=tied,
        qkv_bias=True,
        qk_norm=False,
        source="table, from the model's config.json on the Hub",
    )


SMOLLM2_135M = Architecture(
    name="SmolLM2-135M-Instruct",
    layers=30,
    hidden=576,
    intermediate=1536,
    heads=9,
    kv_heads=3,
    head_dim=64,
    vocabulary=49152,
    tied=True,
    qkv_bias=False,
    qk_norm=False,
    source="table, from the model's config.json",
)

NAMED: Mapping[str, Architecture] = {
    each.name: each
    for each in (
        _qwen2("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 28, 1536, 8960, 12, 2, 151936, tied=False),
        _qwen2("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", 28, 3584, 18944, 28, 4, 152064, tied=False),
        _qwen2("Qwen/Qwen2.5-0.5B-Instruct", 24, 896, 4864, 14, 2, 151936, tied=True),
        _qwen2("Qwen/Qwen2.5-1.5B-Instruct", 28, 1536, 8960, 12, 2, 151936, tied=True),
        _qwen2("Qwen/Qwen2.5-3B-Instruct", 36, 2048, 11008, 16, 2, 151936, tied=True),
        _qwen2("Qwen/Qwen2.5-7B-Instruct", 28, 3584, 18944, 28, 4, 152064, tied=False),
    )
}
"""Released models by Hugging Face id; tests build them without weights and compare the counts."""
