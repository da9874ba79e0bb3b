"""What the policy's objective is beside the KL term, as far as verl's settings say it: named in words, none left out.

The keys are verl's, and so are the defaults (tests/test_commands.py compares them with the installed verl's).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ACTOR = "actor_rollout_ref.actor"
LOSS = f"{ACTOR}.policy_loss"
CORRECTION = "algorithm.rollout_correction"
GROUPS = "algorithm.filter_groups"
DEFAULTS: Mapping[str, Any] = {
    f"{LOSS}.loss_mode": "vanilla",
    f"{LOSS}.clip_cov_ratio": 0.0002,
    f"{LOSS}.clip_cov_lb": 1.0,
    f"{LOSS}.clip_cov_ub": 5.0,
    f"{LOSS}.kl_cov_ratio": 0.0002,
    f"{LOSS}.ppo_kl_coef": 0.1,
    f"{LOSS}.dro_beta": None,
    f"{ACTOR}.clip_ratio_low": 0.2,
    f"{ACTOR}.clip_ratio_high": 0.2,
    f"{ACTOR}.clip_ratio_c": 3.0,
    f"{ACTOR}.tau_pos": 1.0,
    f"{ACTOR}.tau_neg": 1.05,
    f"{ACTOR}.entropy_coeff": 0,
    f"{CORRECTION}.rollout_is": None,
    f"{CORRECTION}.rollout_is_threshold": 2.0,
    f"{CORRECTION}.rollout_is_batch_normalize": False,
    f"{CORRECTION}.rollout_rs": None,
    f"{CORRECTION}.rollout_rs_threshold": None,
    f"{GROUPS}.enable": False,
    f"{GROUPS}.metric": "reward",
}
"""Every key that is read here."""

_CLIP = "clipped to [1 - {clip_ratio_low}, 1 + {clip_ratio_high}]"
_MODES = {
    "vanilla": "",
    "gspo": f"its ratio is the whole response's, (pi / mu)^(1 / |y|), {_CLIP}",
    "sapo": "it gates the ratio by a sigmoid (tau_pos={tau_pos}, tau_neg={tau_neg}) instead of PPO's clip",
    "geo_mean": f"its ratio is the geometric mean over a response's tokens, the log of each {_CLIP}, and verl takes "
    "the mean of each micro-batch by itself",
    "gpg": "it is the advantage times log pi, without ratio and clip",
    "cispo": f"it is the advantage times log pi times the ratio, {_CLIP} and without a gradient",
    "dppo_tv": "it leaves out tokens whose probability rose by {clip_ratio_high} or fell by {clip_ratio_low}, and caps "
    "the ratio at {clip_ratio_c}",
    "dppo_kl": "it leaves out tokens whose probability moved by more than a binary KL of {clip_ratio_high} (up) or "
    "{clip_ratio_low} (down), and caps the ratio at {clip_ratio_c}",
    "clip_cov": "it leaves out a share {clip_cov_ratio} of all tokens, with the charge in their advantage, drawn from "
    "those whose centred advantage and log-prob have a product between {clip_cov_lb} and {clip_cov_ub}; its ratio is "
    f"{_CLIP}",
    "kl_cov": "it adds {ppo_kl_coef} |log pi - log mu| at the share {kl_cov_ratio} of tokens whose centred advantage "
    "and log-prob have the largest product",
    "dro": "it is the advantage times log pi minus {dro_beta} / 2 (log pi - log mu)^2",
}
"""verl's policy losses in words; mu is the policy that sampled."""
_OVER_TOKENS = ("sapo", "geo_mean")
"""Policy losses that average over each response's tokens first, whatever verl's loss_agg_mode is."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The policy's objective without its KL term."""

    advantage: str = "rloo"
    """rloo, grpo, dr_grpo, or the name of verl's."""
    updates_per_batch: int = 1
    loss_aggregation: str = "token-mean"
    """verl's loss_agg_mode; also the KL loss's, where that has none of its own."""
    settings: tuple[tuple[str, Any], ...] = ()
    """Keys of DEFAULTS and their values, where they are not the default."""

    @property
    def loss_mode(self) -> str:
        """verl's name of the policy loss."""
        return str(self._value("loss_mode"))

    @property
    def is_known(self) -> bool:
        """Whether the policy loss is one of verl's."""
        return self.loss_mode in _MODES

    @property
    def forces_aggregation(self) -> bool:
        """Whether the policy loss has an aggregation of its own."""
        return self.loss_mode in _OVER_TOKENS

    @property
    def policy_aggregation(self) -> str:
        """What the policy loss, and with it a charge in the reward, is aggregated by."""
        return "seq-mean-token-mean" if self.forces_aggregation else self.loss_aggregation

    def beside(self, placement: str) -> list[str]:
        """A sentence for each thing that acts beside the KL term of this placement; none where nothing does."""
        sentences = (
            self._policy_loss(),
            self._clip(),
            self._entropy(),
            self._weights(placement),
            self._rejection(),
            self._groups(),
        )
        return [sentence for sentence in sentences if sentence]

    def _policy_loss(self) -> str:
        if self.loss_mode == "vanilla":
            return ""
        if not self.is_known:
            return f"The policy loss {self.loss_mode}, which is none of verl's and unknown here, acts beside it."
        words = _MODES[self.loss_mode].format_map({key.rpartition(".")[2]: self._value(key) for key in DEFAULTS})
        return f"verl's policy loss {self.loss_mode} acts beside it: {words}."

    def _clip(self) -> str:
        """PPO's clip is at work in the later updates of a batch, in vanilla alone."""
        names = ("clip_ratio_low", "clip_ratio_high", "clip_ratio_c")
        own = [f"{name}={self._value(name)}" for name in names if name in self._given]
        if self.loss_mode != "vanilla" or self.updates_per_batch == 1 or not own:
            return ""
        return f"In the later updates PPO clips with {', '.join(own)}."

    def _entropy(self) -> str:
        coefficient = self._value("entropy_coeff")
        reward = "a reward for" if coefficient > 0 else "a penalty on"
        return f"entropy_coeff={coefficient} acts beside it, {reward} the policy's entropy." if coefficient else ""

    def _weights(self, placement: str) -> str:
        level = self._value("rollout_is")
        if not level:
            return ""
        reach = {"none": "", "reward": ", the charge in it included", "loss": ", and not the KL's"}
        both = ", the charge in it included and the KL's own not"
        scaled = " and scaled to mean 1" if self._value("rollout_is_batch_normalize") else ""
        return (
            f"rollout_correction acts beside it: weights by {level}, truncated at {self._value('rollout_is_threshold')}"
            f"{scaled}, multiply the policy loss{reach.get(placement, both)}."
        )

    def _rejection(self) -> str:
        level = self._value("rollout_rs")
        if not level:
            return ""
        return (
            f"rollout_correction acts beside it: what rollout_rs={level} rejects, at the threshold "
            f"{self._value('rollout_rs_threshold')}, is in neither the policy loss nor the KL, so that all this holds "
            "for the rest."
        )

    def _groups(self) -> str:
        if not self._value("enable"):
            return ""
        return (
            f"filter_groups acts beside it: prompts with the same {self._value('metric')} in all responses are "
            "replaced, so that all this holds for the others."
        )

    @property
    def _given(self) -> dict[str, Any]:
        return {key.rpartition(".")[2]: value for key, value in self.settings}

    def _value(self, key: str) -> Any:
        name = key.rpartition(".")[2]
        return self._given.get(name, _BY_NAME[name])


_BY_NAME = {key.rpartition(".")[2]: value for key, value in DEFAULTS.items()}


def objective(
    settings: Mapping[str, Any], *, advantage: str, updates_per_batch: int, loss_aggregation: str
) -> Objective:
    """The objective under some of verl's settings (dotted keys; what is no key of DEFAULTS is not read)."""
    changed = tuple((key, settings[key]) for key in DEFAULTS if key in settings and settings[key] != DEFAULTS[key])
    return Objective(
        advantage=advantage,
        updates_per_batch=updates_per_batch,
        loss_aggregation=loss_aggregation,
        settings=changed,
    )
