"""What every arm logs about a batch: the same quantities whatever its KL setting is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from klreg_verl.core import diversity, kl, metrics
from klreg_verl.core.aggregation import masked_mean, response_sum
from klreg_verl.experiment.recipe import KLSpec
from klreg_verl.verl_hooks import terms
from klreg_verl.verl_hooks.names import TIMINGS
from klreg_verl.verl_hooks.rows import Rows


def measure(rows: Rows, spec: KLSpec, beta: float, max_response_tokens: int) -> dict[str, float]:
    """All of our metrics of one batch, sampled before the update (keys: core.metrics.METRICS)."""
    mask, valid = rows.response_mask, is_valid(rows)
    return {
        **reward_metrics(rows, valid, max_response_tokens),
        **kl_placement_metrics(rows, spec, beta),
        **estimate_metrics(rows, spec, beta),
        **metrics.kl_metrics(rows.old_logprobs, rows.ref_logprobs, mask, valid),
        **metrics.group_metrics(rows.scores, rows.group_ids),
        **metrics.entropy_metrics(rows.entropy, mask),
        **metrics.mismatch_metrics(rows.old_logprobs, rows.rollout_logprobs, mask),
        **diversity.unique_valid(answers(rows), valid, rows.group_ids, num_valid(rows)),
    }


def is_valid(rows: Rows) -> Tensor:
    """(B,) bool: the reward's `acc`, or a positive score where a user's reward has no `acc`."""
    pairs = zip(rows.reward_extras, rows.scores.tolist(), strict=True)
    return torch.tensor([float(extras.get("acc", score)) > 0 for extras, score in pairs], dtype=torch.bool)


def answers(rows: Rows) -> list[str]:
    """The answer each response was graded on (`pred`), or its tokens where a user's reward has no `pred`."""
    pairs = zip(rows.reward_extras, rows.responses, strict=True)
    return [str(extras["pred"]) if "pred" in extras else str(tokens.tolist()) for extras, tokens in pairs]


def num_valid(rows: Rows) -> list[int | None]:
    """How many valid answers each prompt has, where the data say so."""
    texts = [info.get("num_valid") for info in rows.extra_info]
    return [int(text) if text not in (None, "") else None for text in texts]


def reward_metrics(rows: Rows, valid: Tensor, max_response_tokens: int) -> dict[str, float]:
    """Accuracy, score and length; truncated is what fills the token limit, whatever the reward says."""
    lengths = rows.response_mask.sum(-1).double()
    truncated = [float(len(tokens) >= max_response_tokens) for tokens in rows.responses]
    ungraded = [float(extras["timeout"]) for extras in rows.reward_extras if "timeout" in extras]
    return {
        **({"train/ungraded": sum(ungraded) / len(ungraded)} if ungraded else {}),
        "train/accuracy": valid.double().mean().item(),
        "train/score": rows.scores.double().mean().item(),
        "response/length": lengths.mean().item(),
        "response/truncated": sum(truncated) / len(truncated),
    }


def kl_placement_metrics(rows: Rows, spec: KLSpec, beta: float) -> dict[str, float]:
    """What the arm's KL term charges; the loss's own charge comes from the workers."""
    logged = {"kl/beta": beta, "reward/penalized": rows.scores.double().mean().item()}
    if spec.in_reward:
        charge = terms.token_charge(spec, rows.old_logprobs, rows.ref_logprobs, rows.response_mask)
        logged["kl/penalty"] = beta * response_sum(charge, rows.response_mask).double().mean().item()
        logged["reward/penalized"] -= logged["kl/penalty"]
    if spec.placement == "none":
        logged["kl/penalty"] = 0.0
    return logged


def estimate_metrics(rows: Rows, spec: KLSpec, beta: float) -> dict[str, float]:
    """The arm's own estimate before and after shaping, per token; nothing where it needs logits, or there is none."""
    if spec.estimator is None or spec.is_exact or spec.is_drawn:
        return {}
    mask = rows.response_mask
    raw = kl.value(spec.estimator, rows.old_logprobs, rows.ref_logprobs, cap=spec.cap)
    logged = {
        "adaptive_kl/raw_kl": masked_mean(raw, mask).item(),
        "adaptive_kl/adapted_kl": masked_mean(terms.shaping_of(spec).shape(raw, mask), mask).item(),
        "adaptive_kl/current_beta": beta,
    }
    if spec.cap is not None:
        hits = kl.cap_hits(rows.old_logprobs, rows.ref_logprobs, spec.cap)
        logged["kl/cap_fraction"] = masked_mean(hits.double(), mask).item()
    return logged


def effective_beta(rows: Rows, beta: float, divides_by_std: bool) -> float:
    """beta in units of the task's score [score per nat]; GRPO's division by the std makes the score's part larger."""
    std = metrics.group_std(rows.scores, rows.group_ids).mean().item() if divides_by_std else 1.0
    return beta * std


def variance_share(task: Tensor, charged: Tensor, mask: Tensor) -> float:
    """The KL part's share of the variance of the advantages over tokens, as if the two parts were independent."""
    parts = [part[mask].double().var(unbiased=False).item() for part in (charged - task, task)]
    return parts[0] / sum(parts) if sum(parts) > 0 else float("nan")


def of_verls(logged: Mapping[str, float], spec: KLSpec, beta: float) -> dict[str, float]:
    """verl's metrics under our keys; none of the actor's is there while a critic warms up."""
    ours = {"actor/perf/max_memory_allocated_gb": "memory/peak_gb", "actor/ppo_kl": "kl_old/k1_token"}
    found = {key: logged[verls] for verls, key in ours.items() if verls in logged}
    if "actor/kl_loss" in logged:
        name = "kl/penalty" if spec.placement == "loss" else "kl/penalty_loss"
        found[name] = beta * logged["actor/kl_loss"]
    if logged.get("actor/exact_tokens"):
        found["kl_ref/exact_token"] = logged["actor/exact_reverse"] / logged["actor/exact_tokens"]
    if logged.get("actor/policy_gradient"):
        found["kl/grad_share"] = (logged["actor/kl_gradient"] / logged["actor/policy_gradient"]) ** 0.5
    return found


def timing_metrics(timing: dict[str, float], tokens: int) -> dict[str, float]:
    """Seconds by phase, and tokens (prompt and response) per second of the step."""
    logged = {ours: timing[verls] for verls, ours in TIMINGS.items() if verls in timing}
    return logged | {"perf/tokens_per_s": tokens / timing["step"]}


def evaluation_metrics(
    data_sources: Sequence[Any],
    uids: Sequence[Any],
    rewards: Mapping[str, Sequence[float | None]],
    expected: Mapping[tuple[str, str], int],
) -> dict[str, float]:
    """Accuracy of a validation by data source: the mean over prompts of the share of right responses.

    Args:
        data_sources, uids: of each response.
        rewards: verl's per-response numbers; `acc` decides, `reward` where there is no `acc`.
        expected: (data source, uid) -> responses asked for; one that got lost counts as wrong.

    verl's own summary is left out: its best@N is a bootstrap with replacement, which is not pass@N (one right answer
    of 16 gives best@16 = 0.64), takes seconds, and reseeds numpy's global generator.
    """
    right = rewards.get("acc", [None] * len(uids))
    totals = dict.fromkeys(expected, 0.0)
    for source, uid, acc, reward in zip(data_sources, uids, right, rewards["reward"], strict=True):
        totals[str(source), str(uid)] += float(reward or 0.0) if acc is None else float(acc)
    shares: dict[str, list[float]] = {}
    for (source, uid), count in expected.items():
        shares.setdefault(source, []).append(totals[source, uid] / count)
    return {_accuracy_key(source): sum(values) / len(values) for source, values in shares.items()}


def _accuracy_key(source: str) -> str:
    """A skill beside the task is retained, not learned."""
    skill = source.removeprefix("skill/")
    return f"eval/{source}/accuracy" if skill == source else f"retention/{skill}"


def samples_columns(rows: Rows, step: int, row_of: dict[str, int], decode: Any) -> dict[str, list[Any]]:
    """The columns of samples/step_<n>.parquet, one entry per response."""
    prompts, responses = (
        [decode(ids, skip_special_tokens=True) for ids in column] for column in (rows.prompts, rows.responses)
    )
    return {
        "step": [step] * len(rows.samples),
        "group": [str(row_of.get(group, group)) for group in rows.groups],
        "sample": rows.samples,
        "data_source": rows.data_sources,
        "prompt": prompts,
        "response": responses,
        "prompt_ids": [ids.tolist() for ids in rows.prompts],
        "token_ids": [ids.tolist() for ids in rows.responses],
        "mask": [row[: len(ids)].tolist() for row, ids in zip(rows.response_mask, rows.responses, strict=True)],
        "score": rows.scores.double().tolist(),
        "valid": is_valid(rows).tolist(),
        "answer": answers(rows),
        "num_valid": [None if n is None else str(n) for n in num_valid(rows)],
    }
