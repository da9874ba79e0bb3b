"""Models by their numbers: closed forms by hand, and against transformers' own models without weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from klreg_verl.experiment import architecture
from klreg_verl.experiment.architecture import NAMED, Architecture

R1 = NAMED["deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"]


def config_of(model: Architecture, kind: str = "qwen2") -> dict[str, object]:
    return {
        "model_type": kind,
        "num_hidden_layers": model.layers,
        "hidden_size": model.hidden,
        "intermediate_size": model.intermediate,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "vocab_size": model.vocabulary,
        "tie_word_embeddings": model.tied,
    }


def test_the_parameters_of_qwen2_1_5b_by_hand():
    query, keys = 1536 * 1536 + 1536, 2 * (1536 * 256 + 256)  # 12 heads of 128, two of them for keys and values
    layer = query + keys + 1536 * 1536 + 3 * 1536 * 8960 + 2 * 1536
    assert R1.layer_parameters == layer == 46_797_824
    embedding = 151_936 * 1536
    assert replace(R1, tied=True).parameters == embedding + 28 * layer + 1536 == 1_543_714_304  # Qwen2.5-1.5B's card
    assert R1.parameters == 1_543_714_304 + embedding == 1_777_088_000  # its head is a matrix of its own


def test_the_cache_and_the_operations_of_a_token_by_hand():
    assert R1.kv_bytes == 2 * 28 * 2 * 128 * 2 == 28_672  # keys and values, layers, heads, width, bfloat16
    weights = 28 * R1.layer_parameters + 151_936 * 1536
    assert R1.forward_flops(0) == 2 * weights
    assert R1.forward_flops(1000) - R1.forward_flops(0) == 2 * 2 * 28 * 12 * 128 * 1000  # q k^T, and its product with v


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_named_models_count_as_transformers_own(name: str):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(**{k: v for k, v in config_of(NAMED[name]).items() if k != "model_type"})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(each.numel() for each in model.parameters()) == NAMED[name].parameters


@pytest.mark.parametrize("kind", ["qwen3", "llama", "mistral"])
def test_other_dense_kinds_count_as_transformers_own(kind: str):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    small = replace(R1, layers=2, hidden=64, intermediate=96, heads=4, kv_heads=2, head_dim=16, vocabulary=100)
    values = config_of(small, kind) | {"head_dim": 16}
    config = transformers.AutoConfig.for_model(**values)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    found = architecture.from_config(values, "x", "config.json")
    assert sum(each.numel() for each in model.parameters()) == found.parameters


def test_a_folder_is_read_before_the_table(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(config_of(replace(R1, layers=2))))
    found = architecture.of(R1.name, tmp_path)
    assert (found.layers, found.source, found.head_dim) == (2, "config.json", 128)
    assert architecture.of(R1.name, tmp_path / "nowhere") is R1


def test_what_cannot_be_counted_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="type 'mamba' are not counted, only dense ones"):
        architecture.from_config({"model_type": "mamba"}, "x", "config.json")
    with pytest.raises(ValueError, match="has no 'num_attention_heads', so the model's size is not known"):
        architecture.from_config({"model_type": "qwen2"}, "x", "config.json")
    with pytest.raises(ValueError, match="me/mine: its config.json is not here and it is not in the table"):
        architecture.of("me/mine")
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ValueError, match="config.json: cannot be read"):
        architecture.read(tmp_path)
