"""A command of verl's with verl's own KL -> the same command without it, and the KL block that says what verl followed.

Reads the command's arguments alone: it runs nothing, parses no shell, and imports no verl.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from klreg_verl import doctor
from klreg_verl.core import objective as objectives
from klreg_verl.core.objective import Objective
from klreg_verl.experiment.kl_settings import ControllerSpec, KLSpec
from klreg_verl.verl_hooks import names

MODULE = "verl.trainer.main_ppo"
ACTOR, CONTROL = objectives.ACTOR, "algorithm.kl_ctrl"
KL_DEFAULTS: Mapping[str, Any] = {
    "algorithm.use_kl_in_reward": False,
    "algorithm.kl_penalty": "kl",
    f"{CONTROL}.type": "fixed",
    f"{CONTROL}.kl_coef": 0.001,
    f"{CONTROL}.horizon": 10000,
    f"{CONTROL}.target_kl": 0.1,
    f"{ACTOR}.use_kl_loss": False,
    f"{ACTOR}.kl_loss_coef": 0.001,
    f"{ACTOR}.kl_loss_type": "low_var_kl",
}
"""verl's KL keys with their defaults; the adopted command has none of them."""
OTHER_DEFAULTS: Mapping[str, Any] = {
    "algorithm.adv_estimator": "gae",
    "algorithm.norm_adv_by_std_in_grpo": True,
    "data.train_batch_size": 1024,
    f"{ACTOR}.ppo_mini_batch_size": 256,
    f"{ACTOR}.ppo_epochs": 1,
    f"{ACTOR}.loss_agg_mode": "token-mean",
}
"""What else the doctor's sentence depends on."""
ESTIMATORS = {
    **{"kl": "k1", "k1": "k1", "abs": "abs", "mse": "k2", "k2": "k2", "low_var_kl": "k3_verl", "k3": "k3_verl"},
}
"""verl's names of estimators; its k3 is clamped, which ours is not."""


@dataclass(frozen=True, kw_only=True)
class Adopted:
    """What `klreg adopt` prints."""

    command: tuple[str, ...]
    """The words of the command without verl's KL keys."""
    removed: tuple[str, ...]
    """The arguments that were left out."""
    kl: KLSpec
    sentence: str
    """The doctor's, on this block in this command."""
    notes: tuple[str, ...] = ()
    """What could not be read, or need not have been asked."""

    @property
    def block(self) -> dict[str, Any]:
        """The KL block as a file says it: what is as by default is left out."""
        said = {"placement": self.kl.placement}
        for entry in dataclasses.fields(KLSpec):
            value = getattr(self.kl, entry.name)
            if value != entry.default:
                said[entry.name] = {"kind": value.kind, **value.parameters} if entry.name == "controller" else value
        return said

    @property
    def script(self) -> str:
        """A shell script: the block as a file in the current folder, then the command."""
        block = yaml.safe_dump(self.block, sort_keys=False).strip()
        comments = [f"# {line}" for line in (self.sentence, *self.notes)]
        lines = [f"echo {shlex.quote(block)} > kl.yaml", f'export {names.KL_VARIABLE}="$PWD/kl.yaml"']
        return "\n".join([*comments, *lines, shlex.join(self.command)])


def adopt(words: Sequence[str]) -> Adopted:
    """The command in klreg's terms.

    Args:
        words: of the command, as the shell has split them.

    Raises:
        ValueError: it does not start verl's main_ppo, a value cannot be read, or no block can say what verl followed.
    """
    start = next((place for place, word in enumerate(words) if word == MODULE), None)
    if start is None:
        raise ValueError(
            f"{shlex.join(words[:4])} ... does not start `python -m {MODULE}`, and a KL block acts in nothing else."
        )
    given = {key: value for word in words[start + 1 :] for key, value in _setting(word)}
    kept = [word for place, word in enumerate(words) if place <= start or not _is_kl(word)]
    removed = tuple(word for word in words[start + 1 :] if _is_kl(word))
    settings = {**KL_DEFAULTS, **OTHER_DEFAULTS, **objectives.DEFAULTS, **given}
    beside = objective_of(settings)
    kl = _claimed(_block(settings), beside)
    return Adopted(
        command=tuple(kept),
        removed=removed,
        kl=kl,
        sentence=doctor.explain(kl, beside),
        notes=tuple(_notes(words, removed, kl)),
    )


def objective_of(settings: Mapping[str, Any]) -> Objective:
    """What the policy follows beside its KL term, by verl's settings."""
    batch, mini, epochs = (_number(settings, key) for key in _BATCH)
    return objectives.objective(
        settings,
        advantage=names.advantage(
            str(settings["algorithm.adv_estimator"]), bool(settings["algorithm.norm_adv_by_std_in_grpo"])
        ),
        updates_per_batch=int(batch // mini * epochs),
        loss_aggregation=str(settings[f"{ACTOR}.loss_agg_mode"]),
    )


_BATCH = ("data.train_batch_size", f"{ACTOR}.ppo_mini_batch_size", f"{ACTOR}.ppo_epochs")


def _setting(word: str) -> list[tuple[str, Any]]:
    """[(key, value)] of a Hydra override; nothing of an option or a deletion."""
    key, equals, text = word.lstrip("+").partition("=")
    if not equals or word.startswith(("-", "~")):
        return []
    try:
        return [(key, yaml.safe_load(text))]
    except yaml.YAMLError:
        return [(key, text)]  # Hydra's grammar is wider than YAML's; none of the keys that are read here needs that


def _is_kl(word: str) -> bool:
    return word.lstrip("+~").partition("=")[0] in KL_DEFAULTS


def _number(settings: Mapping[str, Any], key: str) -> float:
    try:
        return float(settings[key])  # YAML 1.1 takes 1e-3 for text
    except (TypeError, ValueError):
        raise ValueError(f"{key}={settings[key]} is no number. Give the value itself, e.g. {key}=0.001.") from None


def _block(settings: Mapping[str, Any]) -> KLSpec:
    """What verl followed, without a claim."""
    in_reward = _switched(settings, "algorithm.use_kl_in_reward") and _number(settings, f"{CONTROL}.kl_coef") != 0
    in_loss = _switched(settings, f"{ACTOR}.use_kl_loss") and _number(settings, f"{ACTOR}.kl_loss_coef") != 0
    if in_reward and in_loss:
        raise ValueError(
            "verl follows two KL terms here, algorithm.use_kl_in_reward and actor.use_kl_loss, and a block holds one. "
            "Switch one of them off first."
        )
    if in_loss:
        return _in_loss(settings)
    return _in_reward(settings) if in_reward else KLSpec()


def _switched(settings: Mapping[str, Any], key: str) -> bool:
    if not isinstance(settings[key], bool):
        raise ValueError(f"{key}={settings[key]} is neither true nor false. Give the value itself.")
    return bool(settings[key])


def _estimator(settings: Mapping[str, Any], key: str) -> tuple[str, bool]:
    """Our name of verl's estimator, and whether a + asks for k2's gradient."""
    name = str(settings[key])
    if name.removesuffix("+") not in ESTIMATORS:
        known = ", ".join(ESTIMATORS)
        raise ValueError(f"{key}={name}: verl {names.TESTED['verl']} computes no such KL. Use one of {known}.")
    return ESTIMATORS[name.removesuffix("+")], name.endswith("+")


def _in_loss(settings: Mapping[str, Any]) -> KLSpec:
    """verl's KL loss is aggregated as the policy loss; with a + its gradient is k2's whatever its value is."""
    estimator, plus = _estimator(settings, f"{ACTOR}.kl_loss_type")
    beta = _number(settings, f"{ACTOR}.kl_loss_coef")
    return KLSpec(placement="loss", estimator="k2" if plus else estimator, follows="none", beta=beta)


def _in_reward(settings: Mapping[str, Any]) -> KLSpec:
    """verl takes beta times each token's KL off the token's reward; a group's advantage then sees their sum."""
    estimator, _ = _estimator(settings, "algorithm.kl_penalty")
    advantage = str(settings["algorithm.adv_estimator"])
    if advantage not in names.REWARD_CARRIERS:
        raise ValueError(
            f"algorithm.use_kl_in_reward with algorithm.adv_estimator={advantage}: a block charges a response against "
            f"its siblings, which this estimator does not compare. Use one of {sorted(names.REWARD_CARRIERS)}, or the "
            f"KL in the loss ({ACTOR}.use_kl_loss=True), or keep verl's KL and do not set {names.KL_VARIABLE}."
        )
    divides = "grpo" in advantage and settings["algorithm.norm_adv_by_std_in_grpo"]
    return KLSpec(
        placement="reward",
        estimator=estimator,
        follows="none",
        beta=_number(settings, f"{CONTROL}.kl_coef"),
        normalize_with_reward=bool(divides),
        controller=_controller(settings),
    )


def _controller(settings: Mapping[str, Any]) -> ControllerSpec:
    if settings[f"{CONTROL}.type"] == "fixed":
        return ControllerSpec()
    target, horizon = (_number(settings, f"{CONTROL}.{name}") for name in ("target_kl", "horizon"))
    return ControllerSpec(kind="verl_adaptive", signal="token", target=target, horizon=horizon)


def _claimed(kl: KLSpec, beside: Objective) -> KLSpec:
    """With what it follows as its claim, and marked where that is no divergence."""
    if kl.placement == "none":
        return kl
    judged = doctor.judge_setting(kl, beside)
    return dataclasses.replace(kl, follows=judged.follows, allow_biased=judged.verdict != "ok")  # type: ignore[arg-type]


def _notes(words: Sequence[str], removed: Sequence[str], kl: KLSpec) -> list[str]:
    found = []
    if not removed:
        found.append("The command has no KL key of verl's, so nothing was left out of it.")
    elif kl.placement == "none":
        found.append("verl's KL was off in this command: the block measures only.")
    if kl.estimator == "k3_verl":
        found.append("Without verl's clamp this is `estimator: k3`, which in the loss follows the forward KL.")
    if any(word.startswith(("--config", "-c")) for word in words):
        found.append("A configuration of its own was not read: KL keys in that file are still there.")
    return found
