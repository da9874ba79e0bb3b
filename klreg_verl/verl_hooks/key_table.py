"""Writes the table of verl's settings that recipes are checked against: `python -m klreg_verl.verl_hooks.key_table`.

Key and kind of every setting, from verl's composed PPO settings and the dataclasses that their `_target_` names. What
neither of the two says stands below, each with the file of verl that reads it. Needs verl; the table is committed, so
that a recipe can be checked without (klreg_verl/experiment/verl_keys.py says what a line means).
"""

from __future__ import annotations

import importlib.metadata
import json
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from klreg_verl.experiment.verl_keys import TABLE

READ_BY_CODE = {
    "actor_rollout_ref.model.lora.fully_sharded_loras": ("bool", "workers/rollout/vllm_rollout/vllm_async_server.py"),
    "data.cache_dir": ("str", "utils/dataset/rl_dataset.py"),
    "data.chat_template_func": ("any", "utils/dataset/rl_dataset.py"),
    "data.filter_prompts": ("bool", "utils/dataset/rl_dataset.py"),
    "data.need_tools_kwargs": ("bool", "utils/dataset/rl_dataset.py"),
    "reward.custom_reward_function.reward_kwargs": ("dict", "trainer/ppo/reward.py"),
    "reward.estimated_tokens_per_request": ("int", "experimental/reward_loop/reward_manager/limited.py"),
    "reward.max_concurrent": ("int", "experimental/reward_loop/reward_manager/limited.py"),
    "reward.max_rpm": ("int|null", "experimental/reward_loop/reward_manager/limited.py"),
    "reward.max_tpm": ("int|null", "experimental/reward_loop/reward_manager/limited.py"),
    "reward.reward_kwargs": ("dict", "experimental/reward_loop/reward_manager/dapo.py"),
    "reward.timeout": ("float", "experimental/reward_loop/reward_manager/limited.py"),
    "trainer.remove_previous_ckpt_in_save": ("bool", "trainer/ppo/v1/trainer_base.py"),
    "trainer.rl_insight": ("dict", "utils/tracking.py"),
    "trainer.wandb_proxy": ("str|null", "utils/tracking.py"),
}
"""Settings that verl reads with a default and lists nowhere: kind, and the file that reads them."""

OPEN = (
    "distillation.teacher_models",
    "global_profiler.global_tool_config.nsys.controller_nsight_options",
    "global_profiler.global_tool_config.nsys.worker_nsight_options",
    "ray_kwargs.ray_init",
)
"""Mappings that verl hands on as they are, or whose keys the user names. An empty one is open, too."""
CLOSED = ("trainer.v1.sync",)
"""Empty, and nothing reads below it."""
LISTED_ONLY = ("actor_rollout_ref.ref",)
"""verl types the reference as an actor, but reads of it only what its YAML lists."""

KINDS = {
    "actor_rollout_ref.model.exclude_modules": "str|list|null",
    "actor_rollout_ref.model.target_modules": "str|list|null",
    "data.gen_batch_size": "int|null",
    "data.seed": "int|null",
    "data.tokenizer": "str|null",
    "data.train_files": "str|list",
    "data.val_batch_size": "int|null",
    "data.val_files": "str|list",
    "global_profiler.steps": "list|null",
    "reward.custom_reward_function.path": "str|null",
    "trainer.checkpoint_callback_class": "str|null",
    "trainer.default_hdfs_dir": "str|null",
    "trainer.esi_redundant_time": "float",
    "trainer.logger": "str|list",
    "trainer.max_actor_ckpt_to_keep": "int|null",
    "trainer.max_critic_ckpt_to_keep": "int|null",
    "trainer.resume_from_path": "str|null",
    "trainer.rollout_data_dir": "str|null",
    "trainer.total_training_steps": "int|null",
    "trainer.validation_data_dir": "str|null",
}
"""Where the default tells less than verl takes (peft's module names, lists of files) or nothing (null)."""

SET_BY_VERL = {
    *("architectures", "engine", "generation_config", "global_batch_info", "global_tool_config", "hf_config"),
    *("local_hf_config_path", "local_path", "local_tokenizer_path", "loss_settings", "model_config", "processor"),
    "tokenizer",
}
"""Fields that no YAML lists and that verl fills while it runs."""


def table() -> dict[str, str]:
    """Dotted key -> kinds, for each setting of the installed verl, sorted; `+` before those that its YAML lacks."""
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.trainer.config", version_base=None):
        composed = compose("ppo_trainer")
    found = dict(_section(composed, None, ""))
    found |= {f"+{key}": kind for key, (kind, _) in READ_BY_CODE.items()}
    return dict(sorted((found | KINDS).items(), key=lambda item: item[0].removeprefix("+")))


def _section(node: Any, cls: Any, path: str) -> Iterator[tuple[str, str]]:
    """The settings of one mapping of verl's YAML, and those of its dataclass that the YAML lacks."""
    from hydra.utils import get_class

    cls = get_class(node._get_node("_target_")._value()) if "_target_" in node else cls
    hints = _hints(cls)
    for name in (name for name in node if name != "_target_"):
        yield from _setting(node, name, hints.get(name), f"{path}{name}")
    if path.removesuffix(".") not in LISTED_ONLY:
        for name in hints.keys() - set(node) - SET_BY_VERL:
            yield from _unlisted(hints[name], f"+{path.removeprefix('+')}{name}")


def _hints(cls: Any) -> dict[str, Any]:
    """Field name -> annotation, where verl has typed the section."""
    if cls is None:
        return {}
    kinds = get_type_hints(cls)
    return {field.name: kinds[field.name] for field in fields(cls) if not field.name.startswith("_")}


def _setting(node: Any, name: str, hint: Any, path: str) -> Iterator[tuple[str, str]]:
    from omegaconf import DictConfig

    value = None if node._get_node(name)._is_missing() else node[name]
    if isinstance(value, DictConfig) and path not in OPEN and (len(value) or path in CLOSED):
        yield from _section(value, _dataclass(hint), f"{path}.")
    else:
        yield path, "|".join(dict.fromkeys([*_kinds_of_hint(hint), *_kinds_of_value(value, hint)]))


def _unlisted(hint: Any, path: str) -> Iterator[tuple[str, str]]:
    cls = _dataclass(hint)
    if cls is None:
        yield path, "|".join(_kinds_of_hint(hint))
        return
    for name, inner in _hints(cls).items():
        yield from _unlisted(inner, f"{path}.{name}")


def _dataclass(hint: Any) -> Any:
    """The dataclass in an annotation, `Optional[...]` or not."""
    return next((each for each in (hint, *get_args(hint)) if isinstance(each, type) and is_dataclass(each)), None)


_NAMES = {bool: "bool", int: "int", float: "float", str: "str", type(None): "null"}


def _kinds_of_hint(hint: Any) -> list[str]:
    origin = get_origin(hint) or hint
    if hint is None:
        return []
    if origin in (Union, types.UnionType):
        return [kind for each in get_args(hint) for kind in _kinds_of_hint(each)]
    if origin is Literal:
        return [repr(each) for each in get_args(hint)]
    if isinstance(origin, type) and origin in _NAMES:
        return [_NAMES[origin]]
    if isinstance(origin, type) and issubclass(origin, (list, tuple)):
        return ["list"]
    return ["dict"] if isinstance(origin, type) and issubclass(origin, Mapping) or _dataclass(hint) else ["any"]


def _kinds_of_value(value: Any, hint: Any) -> list[str]:
    """What the default itself is; a null says something only beside an annotation."""
    from omegaconf import DictConfig, ListConfig

    if isinstance(value, DictConfig | ListConfig):
        return ["dict" if isinstance(value, DictConfig) else "list"]
    if value is None:
        return ["any"] if hint is None else ["null"]
    taken = {"float": (int, float), "any": object}
    known = _kinds_of_hint(hint)
    fits: Callable[[str], bool] = lambda kind: isinstance(value, taken.get(kind, ()))  # noqa: E731
    return [] if any(map(fits, known)) or repr(value) in known else [_NAMES[type(value)]]


def main() -> None:
    """Write the table anew."""
    lines = {"verl": importlib.metadata.version("verl"), "keys": table()}
    TABLE.write_text(json.dumps(lines, indent=0) + "\n")
    print(f"{TABLE}: {len(lines['keys'])} settings of verl {lines['verl']}")


if __name__ == "__main__":
    main()
