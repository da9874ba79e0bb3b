"""verl's FSDP checkpoint as a Hugging Face folder: weights, configuration, tokenizer, and a card that says whence.

The shards are put together without verl and without a process group (replay/shards.py), and nothing is run.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from klreg_verl.replay import models, shards

CARD = "klreg_export.json"

DTypes = ("auto", "float32", "bfloat16", "float16")


def actor_folder(checkpoint: Path) -> Path | None:
    """Where a checkpoint's shards are: itself, or its `actor`; None for what is no checkpoint."""
    return next((folder for folder in (checkpoint, checkpoint / "actor") if shards.has_shards(folder)), None)


def export(checkpoint: Path, folder: Path, *, dtype: str = "auto", facts: dict[str, Any] | None = None) -> Path:
    """Writes the model of a checkpoint into a new folder, which appears when all is on the disk.

    Args:
        checkpoint: verl's folder of a step, or its `actor`.
        folder: to make; must not exist.
        dtype: of the weights; `auto` is the configuration's, in which verl's own rollouts load the model.
        facts: more entries for the card, e.g. run and step.

    Raises:
        ValueError: no checkpoint, shards missing, weights that do not fit the configuration, or the folder exists.
    """
    from data_prep.cache import make_folder

    if dtype not in DTypes:
        raise ValueError(f"--dtype {dtype} is not one of {', '.join(DTypes)}.")
    actor = actor_folder(checkpoint)
    if actor is None:
        raise ValueError(f"{checkpoint} holds no weights of verl's FSDP workers (model_world_size_*_rank_*.pt).")
    described = actor / "huggingface"
    models.require_described(described)
    card = {**(facts or {}), "source": source(actor), "asked": dtype}
    make_folder(folder, lambda out: _fill(out, actor, described, dtype, card))
    return folder


def source(actor: Path) -> dict[str, list[int]]:
    """Size and time of change of each shard [bytes, ns]: whether an export is still of these very weights."""
    files = sorted(actor.glob("model_world_size_*_rank_*.pt"))
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


def is_current(folder: Path, actor: Path) -> bool:
    """Whether a folder is the export of these shards in the configuration's own dtype."""
    there = card(folder)
    return (there.get("source"), there.get("asked")) == (source(actor), "auto")


def card(folder: Path) -> dict[str, Any]:
    """The card of an exported folder; empty for any other."""
    path = folder / CARD
    return json.loads(path.read_text()) if path.is_file() else {}


def _fill(folder: Path, actor: Path, described: Path, dtype: str, card: dict[str, Any]) -> None:
    for path in described.iterdir():
        if path.is_file() and path.suffix not in (".safetensors", ".bin"):
            shutil.copy(path, folder / path.name)
    with models.quiet():
        network = _assembled(actor, described, dtype)
        network.save_pretrained(folder)
    (folder / CARD).write_text(json.dumps({**card, "dtype": str(network.dtype).removeprefix("torch.")}, indent=2))


def _assembled(actor: Path, described: Path, dtype: str) -> Any:
    """The network with the shards as its weights; made without memory of its own."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(described, local_files_only=True)
    kind = (getattr(config, "dtype", None) or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    weights = shards.load_shards(actor)
    weights = {name: weight.to(kind) if weight.is_floating_point() else weight for name, weight in weights.items()}
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, dtype=kind)
    try:
        network.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"{actor}: the weights do not fit the configuration in {described}: {error}. A LoRA adapter, a critic or a "
            "model with code of its own cannot be exported here; verl's own `python -m verl.model_merger` may."
        ) from error
    network.tie_weights()
    if (described / "generation_config.json").is_file():
        network.generation_config = GenerationConfig.from_pretrained(described)
    return network
