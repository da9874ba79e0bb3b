"""verl's names <-> ours. verl's field names that more than one module reads are here.

TESTED names the versions that the hooks were run with; tests/test_verl_contract.py checks every symbol we touch.
"""

from __future__ import annotations

from pathlib import Path

TESTED = {"verl": "0.9.1"}

KL_VARIABLE = "KLREG_KL"
"""Names a YAML file with one KL block."""

LOGPROBS = "log_probs"
OLD_LOGPROBS = "old_log_probs"
REF_LOGPROBS = "ref_log_prob"
ROLLOUT_LOGPROBS = "rollout_log_probs"
RESPONSE_MASK = "response_mask"
TOKEN_REWARDS = "rm_scores"
ADVANTAGES = "advantages"
RETURNS = "returns"
ENTROPY = "entropy"
PROMPTS = "prompts"
RESPONSES = "responses"
GROUP = "uid"
EXTRA_FIELDS = "extra_fields"
EXTRA_INFO = "extra_info"
DATA_SOURCE = "data_source"
REWARD_EXTRAS = "reward_extra_info"

TIMINGS = {
    "step": "time/step_s",
    "gen": "time/generate_s",
    "old_log_prob": "time/old_logprobs_s",
    "ref": "time/ref_logprobs_s",
    "adv": "time/advantages_s",
    "update_actor": "time/update_s",
    "update_weights": "time/sync_weights_s",
    "save_checkpoint": "time/save_s",
    "testing": "time/evaluate_s",
}
"""verl's phases of a step -> our metric keys."""

ADVANTAGE_PREFIX = "klreg_"
"""Our estimators are registered with verl as klreg_rloo, klreg_grpo and klreg_dr_grpo."""

WORKER_SETTINGS = "klreg"
"""Under verl's `actor_rollout_ref`: what KLRegWorker is told about the reference."""

EXACT = "klreg_exact"
"""In the model output: the exact divergence of the loss at each token [nats], with its gradient."""
EXACT_REVERSE = "klreg_exact_reverse"
"""In the model output: the exact KL(pi || pi_ref) at each token [nats], measured only."""

AGENT_NAME = "klreg_single_turn"
AGENT_CONFIG = Path(__file__).with_name("agent_loop.yaml")
MANAGER = "klreg_verl.verl_hooks.sampling.SeededAgentLoopManager"
"""The seeded agent loop, as verl's settings name it; these stand here since sampling.py imports half of verl."""

REFUSED = "[klreg] refused: "
"""How the line starts that says why a command was not started."""

REWARD_CARRIERS = {"rloo", "rloo_vectorized", "grpo", "grpo_vectorized", "klreg_rloo", "klreg_grpo", "klreg_dr_grpo"}
"""Group-relative estimators whose advantage is one number per response."""
WITHOUT_INPUT = {
    "remax": "reward_baselines",
    "optimal_token_baseline": "sum_pi_squared",
    "tir_optimal_token_baseline": "sum_pi_squared",
    "gdpo": "the rewards by component",
}
"""Advantage estimators of verl's, and what its sync trainer does not hand to them; tests/test_commands.py calls all."""


def advantage(name: str, divides: bool) -> str:
    """verl's estimators that are one of ours by another name; without its std GRPO is Dr. GRPO's advantage."""
    short = name.removeprefix(ADVANTAGE_PREFIX).removesuffix("_vectorized")
    return "dr_grpo" if name in ("grpo", "grpo_vectorized") and not divides else short
