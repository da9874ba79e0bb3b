"""Small random Qwen2 models with a tokenizer of 33 tokens, on disk, as `klreg kl` and `klreg replay` read them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

VOCABULARY = ("<pad>", "<end>", "?", " ", "\n", *"abcdefghijklmnopqrstuvwxyz", ".", ",")
"""33 of them: an odd number does not divide among workers."""
PAD, END = 0, 1


def need_transformers() -> None:
    pytest.importorskip("transformers", reason="not installed: transformers (make setup)")


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def write_tokenizer(folder: Path, vocabulary: tuple[str, ...] = VOCABULARY, template: str | None = None) -> None:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    rules = Tokenizer(models.WordLevel({token: place for place, token in enumerate(vocabulary)}, unk_token="?"))
    rules.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rules, pad_token="<pad>", eos_token="<end>", unk_token="?")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def network(seed: int, vocab_size: int = len(VOCABULARY)) -> torch.nn.Module:
    """One layer of width 16 whose next-token distributions are far from uniform."""
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.4,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
        dtype="float32",
    )
    with seeded(seed):
        model = Qwen2ForCausalLM(config).eval()
    # what a model's own generation config asks for must not shape the samples
    model.generation_config = GenerationConfig(eos_token_id=END, pad_token_id=PAD, top_k=2, repetition_penalty=3.0)
    model.generation_config.do_sample = True
    return model


def moved(model: torch.nn.Module, size: float, seed: int = 0) -> torch.nn.Module:
    """A copy whose weights got a little noise: a policy near its reference."""
    import copy

    found = copy.deepcopy(model)
    with seeded(seed), torch.no_grad():
        for weight in found.parameters():
            weight += size * torch.randn_like(weight)
    return found


def write_model(folder: Path, model: torch.nn.Module, template: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    write_tokenizer(folder, template=template)
    return folder
