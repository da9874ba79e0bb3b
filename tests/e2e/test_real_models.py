"""Models other than the tiny one: what a family, a vocabulary of 49,152 and a tied embedding do to the real stack."""

from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path

import pytest
import yaml
from stack import ROOT, Lab, metrics

pytestmark = [pytest.mark.full, pytest.mark.timeout(3600)]

FAMILIES = ("Llama", "Qwen2", "Qwen3", "Gemma3Text")
ARMS = [f"{family.lower()}_{head}" for family in FAMILIES for head in ("tied", "untied")]
WIDTH = 384
"""49,152 tokens x 384 numbers of 4 bytes are 72 MB: more than the smallest bucket, so each has one of its own."""


@pytest.fixture(scope="module")
def smollm2(cache: Path) -> Path:
    """The released model, downloaded and converted once."""
    module = importlib.import_module("data_prep.smollm2")
    return module.cache(cache, lambda *progress: None)


def write_random_model(folder: Path, tokenizer: Path, family: str, *, tied: bool) -> None:
    """Two layers of random weights behind SmolLM2's tokenizer."""
    import torch
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=49152,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        dtype="float32",
    )
    torch.manual_seed(0)
    getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config).save_pretrained(folder)
    for path in tokenizer.iterdir():
        if path.name.startswith(("tokenizer", "chat_template")):
            shutil.copy(path, folder)


@pytest.fixture(scope="module")
def families(cache: Path, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """An arm for each family, tied and untied; three steps, so the third samples after two updates."""
    folder = tmp_path_factory.mktemp("families")
    for arm in ARMS:
        family = next(family for family in FAMILIES if arm.startswith(family.lower()))
        write_random_model(folder / arm, smollm2, family, tied=arm.endswith("_tied"))
    sums = ROOT / "recipes/sums"
    recipe = {
        "question": "Does the sampler have the trainer's weights?",
        "tasks": {"sums": {"train": str(sums / "train.parquet"), "val": str(sums / "val.parquet")}},
        "train": {"steps": 3, "prompts_per_step": 4, "responses_per_prompt": 4, "learning_rate": 1e-3},
        "eval": {"before": False},
        "save": {"every": 100, "at_end": False},
        "kl": {"placement": "reward", "estimator": "k1", "follows": "reverse", "beta": 0.01},
        "arms": {arm: {"model": {"path": f"./{arm}"}} for arm in ARMS},
        "seeds": [1],
    }
    recipe["tasks"]["sums"]["reward"] = "sums:compute_score"
    recipe["train"] |= {"max_prompt_tokens": 64, "max_response_tokens": 16}
    shutil.copy(sums / "task.py", folder / "sums.py")
    (folder / "families.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    lab = Lab(folder / "runs", cache)
    only = os.environ.get("KLREG_FAMILIES", "").split()
    lab.klreg("run", folder / "families.yaml", *(part for arm in only for part in ("--arm", arm)), timeout=3000)
    return lab


@pytest.mark.parametrize("arm", ARMS)
def test_after_two_updates_the_sampler_has_the_trainers_weights(arm: str, families: Lab):
    lines = metrics(families.folder("families", arm, "sums"))
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["kl_rollout/max"] < 1e-3
    assert lines[2]["kl_ref/k3_response"] > 1e-4  # the control: the weights have moved by far more than that


def test_a_released_model_trains_on_a_task_of_ones_own(lab: Lab, smollm2: Path):
    """Step 2 is sampled after an update; SmolLM2's embedding is 108 MB, and tied."""
    short = ["train.steps=2", "train.prompts_per_step=2", "train.warmup_steps=0", "eval.before=false", "eval.every=0"]
    lab.klreg("run", "recipes/real_model_cpu.yaml", *short, "save.at_end=false", timeout=3000)
    for arm in ("none", "reverse", "forward"):
        lines = metrics(lab.folder("real_model_cpu", arm, "sums"))
        assert [line["step"] for line in lines] == [1, 2]
        for line in lines:
            assert line["kl_rollout/max"] < 1e-3
            assert 0 <= line["train/accuracy"] <= 1
            assert line["response/length"] > 1
