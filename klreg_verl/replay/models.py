"""Models on disk: a Hugging Face folder, or a checkpoint of verl's FSDP workers with config and tokenizer beside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from klreg_verl.replay import shards

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A causal language model in float32, in evaluation mode, and its tokenizer."""

    path: Path
    network: Any
    tokenizer: Any

    @property
    def vocab_size(self) -> int:
        """The number of logits of a token."""
        return int(self.network.config.get_text_config().vocab_size)

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """The tokens that end a response, as generation has them."""
        given = getattr(self.network.generation_config, "eos_token_id", None)
        given = self.tokenizer.eos_token_id if given is None else given
        return () if given is None else tuple(given) if isinstance(given, list | tuple) else (int(given),)


def best_device() -> str:
    """cuda where there is one, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load(path: Path, *, device: str = "cpu", trust_remote_code: bool = False) -> Model:
    """The model of a folder.

    Args:
        path: a Hugging Face folder; or verl's checkpoint of a step, or its `actor` folder.
        device: where its weights go.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        ValueError: no such folder; no configuration, weights or tokenizer in it; or they cannot be read.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"There is no folder {path}. Name a model folder in Hugging Face format, or a checkpoint.")
    actor = next((folder for folder in (path, path / "actor") if shards.has_shards(folder)), None)
    described = path if actor is None else actor / "huggingface"
    require_described(described)
    if actor is None:
        _require(path, _WEIGHTS, "no weights (*.safetensors)")
    with quiet():
        tokenizer = _opened(path, lambda: _auto("AutoTokenizer", described, trust_remote_code=trust_remote_code))
        network = _opened(path, lambda: _network(described, actor, trust_remote_code))
    return Model(path=path, network=network.to(device).eval(), tokenizer=tokenizer)


def require_described(folder: Path) -> None:
    """ValueError unless a folder holds a model's configuration and its tokenizer."""
    _require(folder, ("config.json",), "no configuration (config.json)")
    _require(folder, _TOKENIZER, "no tokenizer (tokenizer.json)")


def check_same_vocabulary(policy: Model, reference: Model) -> None:
    """ValueError unless a token id means the same in both, so that log-probabilities can be compared."""
    sizes = [f"{model.path}: {model.vocab_size}" for model in (policy, reference)]
    if policy.vocab_size != reference.vocab_size:
        raise ValueError(
            f"The models' vocabularies differ in size ({', '.join(sizes)}): their log-probabilities cannot be "
            "compared. Give two models of one vocabulary, e.g. a model and its fine-tuned version."
        )
    ours, theirs = (model.tokenizer.get_vocab() for model in (policy, reference))
    if different := {token for token, _ in set(ours.items()) ^ set(theirs.items())}:
        raise ValueError(
            f"The tokenizers of {policy.path} and {reference.path} differ in {len(different)} tokens, "
            f"{min(different)!r} among them: a token id does not mean the same in both. Give two models of one "
            "vocabulary."
        )


def _network(described: Path, actor: Path | None, trust_remote_code: bool) -> Any:
    if actor is None:
        return _auto("AutoModelForCausalLM", described, dtype=torch.float32, trust_remote_code=trust_remote_code)
    from transformers import AutoModelForCausalLM

    config = _auto("AutoConfig", described, trust_remote_code=trust_remote_code)
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    network.load_state_dict(shards.load_shards(actor))
    if (described / "generation_config.json").is_file():
        network.generation_config = type(network.generation_config).from_pretrained(described)
    return network


def _auto(name: str, folder: Path, **options: Any) -> Any:
    import transformers

    return getattr(transformers, name).from_pretrained(folder, local_files_only=True, **options)


def _require(folder: Path, patterns: tuple[str, ...], what: str) -> None:
    if not any(path.is_file() for pattern in patterns for path in folder.glob(pattern)):
        raise ValueError(f"{folder} holds {what}. Name a complete model folder in Hugging Face format.")


def _opened(path: Path, read: Any) -> Any:
    from safetensors import SafetensorError

    try:
        return read()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ValueError(f"{path}: the model cannot be loaded: {error}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """transformers' progress bars, and warnings about workers that saved a checkpoint and do not run here, stay off."""
    import logging

    from transformers.utils import logging as bars

    mesh = logging.getLogger("torch.distributed.device_mesh")
    shown, level, verbosity = bars.is_progress_bar_enabled(), mesh.level, bars.get_verbosity()
    bars.disable_progress_bar()
    bars.set_verbosity_error()
    mesh.setLevel(logging.ERROR)
    try:
        yield
    finally:
        mesh.setLevel(level)
        bars.set_verbosity(verbosity)
        if shown:
            bars.enable_progress_bar()
