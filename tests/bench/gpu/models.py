"""A model of a released architecture with random weights and a tokenizer made here: enough for times and memory.

No weights can be had everywhere. What a step costs does not depend on them, if every response has its full length
(rollout.ignore_eos).
"""

from __future__ import annotations

import sys
from pathlib import Path

from klreg_verl.experiment.architecture import NAMED, Architecture


def write(architecture: Architecture, folder: Path, dtype: str = "bfloat16", device: str = "cpu") -> Path:
    """Config, weights and tokenizer; the tokenizer is the tiny model's, filled up to the architecture's vocabulary."""
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    from data_prep.tiny_model import build_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.add_tokens([f"<|filler_{place}|>" for place in range(architecture.vocabulary - len(tokenizer))])
    tokenizer.model_max_length = 131_072
    config = Qwen2Config(
        vocab_size=architecture.vocabulary,
        hidden_size=architecture.hidden,
        intermediate_size=architecture.intermediate,
        num_hidden_layers=architecture.layers,
        num_attention_heads=architecture.heads,
        num_key_value_heads=architecture.kv_heads,
        max_position_embeddings=131_072,
        tie_word_embeddings=architecture.tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=dtype,
    )
    torch.manual_seed(1)
    with torch.device(device):
        model = Qwen2ForCausalLM(config).to(getattr(torch, dtype))
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    write(NAMED["deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"], Path(sys.argv[1]), device="cuda")
