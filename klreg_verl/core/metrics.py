"""From tensors to numbers: every metric key with its unit and meaning, and the functions that measure.

Inputs are (B, T) with a bool response_mask, padding rows already removed. Log-probs are those of the policy that the
batch was sampled from (before the update), at the rollout's temperature. A mean over nothing is NaN.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from klreg_verl.core import kl
from klreg_verl.core.aggregation import masked_mean, response_sum


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One key of metrics.jsonl, TensorBoard, W&B and the report; <...> in a key stands for a name."""

    key: str
    unit: str
    meaning: str


_ROWS = (
    ("step", "updates", "the update whose batch this line measures; 0 is the validation before training"),
    ("time/step_s", "s", "wall time of the whole step"),
    ("time/<phase>_s", "s", "wall time of one phase of the step"),
    ("perf/tokens_per_s", "tokens/s", "prompt and response tokens of the batch over the wall time of the step"),
    ("memory/peak_gb", "GB", "peak memory of the largest training worker"),
    ("train/accuracy", "fraction", "responses of the batch that are right; absent where the reward grades"),
    ("train/score", "reward", "mean score of the task, before any KL"),
    (
        "train/ungraded",
        "fraction",
        "responses whose grading ended without a verdict (refused as a bomb, time, memory) and count as wrong",
    ),
    ("train/echoed", "fraction", "responses whose answer repeats a formula of the question and counts as wrong"),
    ("reward/penalized", "reward", "mean of score - beta * S, S the response-summed charge; the score outside reward"),
    ("response/length", "tokens", "mean number of response tokens"),
    ("response/truncated", "fraction", "responses cut at the token limit"),
    ("kl_ref/k1_token", "nats/token", "reverse KL to the reference by k1, mean over all tokens"),
    ("kl_ref/k1_response", "nats/response", "the same, summed over each response, mean over responses"),
    ("kl_ref/k1_response_se", "nats/response", "standard error of kl_ref/k1_response over the batch's responses"),
    ("kl_ref/k3_token", "nats/token", "reverse KL to the reference by k3, unclamped, mean over all tokens"),
    ("kl_ref/k3_response", "nats/response", "the same, summed over each response, mean over responses"),
    (
        "kl_ref/forward_token",
        "nats/token",
        "forward KL token by token on the policy's own prefixes, by r log r - r + 1",
    ),
    (
        "kl_ref/forward_sampled",
        "nats/response",
        "forward KL of whole responses: mean of log pi_ref - log pi over the update's reference_samples",
    ),
    (
        "kl_ref/exact_token",
        "nats/token",
        "reverse KL over the whole vocabulary, mean over tokens and the update's mini-batches (when asked for)",
    ),
    ("kl_ref/p99", "nats", "99th percentile over tokens of the signed log-ratio d = log pi - log pi_ref"),
    ("kl_ref/max", "nats", "largest d of any token"),
    ("kl_ref/top1pct_share", "fraction", "share of the summed k3 in the 1 % of tokens where it is largest"),
    ("kl_ref/valid", "nats/response", "kl_ref/k1_response of the right responses; absent when there are none"),
    ("kl_ref/invalid", "nats/response", "kl_ref/k1_response of the wrong responses; absent when there are none"),
    ("kl_ref_t1/<name>", "as kl_ref", "kl_ref/<name> at temperature 1, in a run at another (when asked for)"),
    ("kl_old/k1_token", "nats/token", "KL of the old to the new policy by k1, mean over the update's mini-batches"),
    ("kl_rollout/k1_token", "nats/token", "KL of the sampler to the trainer by k1: mean of rollout minus old log-prob"),
    ("kl_rollout/max", "nats", "largest absolute difference of rollout and old log-prob of any token"),
    ("kl/beta", "reward/nat", "coefficient of the KL term in this update"),
    (
        "kl/beta_effective",
        "reward/nat",
        "beta in units of the task's score: times the mean group std under GRPO",
    ),
    ("kl/penalty", "reward", "beta times the KL term: mean of beta * S in the reward, beta * KL loss in the loss"),
    ("kl/penalty_loss", "reward", "with both placements: the loss's part, while kl/penalty is the reward's"),
    (
        "kl/advantage_share",
        "fraction",
        "variance of the advantages' KL part over the sum of its and the task part's",
    ),
    ("kl/grad_share", "ratio", "norm of the KL loss's gradient by the tokens' log-probs over that of the policy loss"),
    ("kl/cap_fraction", "fraction", "tokens whose log-ratio is beyond kl.cap"),
    ("kl/zero_variance_groups", "fraction", "prompts whose responses all have the same score"),
    ("kl/saturated", "0 or 1", "the controller asked for a beta outside its bounds"),
    ("adaptive_kl/raw_kl", "nats/token", "mean over tokens of the arm's own estimate, before shaping"),
    ("adaptive_kl/adapted_kl", "nats/token", "the same after shaping"),
    ("adaptive_kl/current_beta", "reward/nat", "kl/beta under the name of the adaptive-KL document"),
    ("reference/moved_at", "updates", "the update after which the reference last moved"),
    ("reference/moved_rms", "-", "root mean square over all weights of the reference's last change"),
    ("alarm/<name>", "0 or 1", "an alarm of the recipe fired on this line"),
    ("entropy/token", "nats/token", "mean entropy of the policy's next-token distribution"),
    ("entropy/p10", "nats", "10th percentile over tokens of that entropy"),
    ("entropy/p50", "nats", "median over tokens of that entropy"),
    ("entropy/p90", "nats", "90th percentile over tokens of that entropy"),
    ("diversity/unique_valid", "answers", "distinct right answers per prompt"),
    ("diversity/coverage", "fraction", "distinct right answers over possible ones, per prompt where that is known"),
    (
        "eval/<data_source>/accuracy",
        "fraction",
        "right responses on held-out prompts of one data_source; absent where the reward grades",
    ),
    ("eval/<data_source>/score", "reward", "mean score on held-out prompts of one data_source"),
    (
        "eval/<data_source>/pass@<k>",
        "fraction",
        "prompts with a right one among k samples, exact over all subsets (`klreg eval`)",
    ),
    ("retention/<skill>", "fraction", "right responses on held-out prompts of a skill that the run does not train"),
)
METRICS: dict[str, Metric] = {key: Metric(key=key, unit=unit, meaning=meaning) for key, unit, meaning in _ROWS}


def markdown_table() -> str:
    """METRICS as the table that the README shows."""
    rows = (f"| `{metric.key}` | {metric.unit} | {metric.meaning} |" for metric in METRICS.values())
    return "\n".join(("| key | unit | meaning |", "|---|---|---|", *rows)) + "\n"


@torch.no_grad()
def kl_metrics(
    old_logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, valid: Tensor | None
) -> dict[str, float]:
    """All kl_ref/* of a batch; `valid` is (B,) bool, True on right responses; None where a reward grades."""
    log_ratio = kl.log_ratio(old_logprobs, ref_logprobs)
    k1 = kl.value("k1", old_logprobs, ref_logprobs)
    k3 = kl.value("k3", old_logprobs, ref_logprobs)
    per_response = response_sum(k1, response_mask)
    (p99,) = _quantiles(log_ratio[response_mask], 0.99)
    metrics = {
        "kl_ref/k1_token": masked_mean(k1, response_mask).item(),
        "kl_ref/k1_response": per_response.mean().item(),
        "kl_ref/k1_response_se": standard_error(per_response),
        "kl_ref/k3_token": masked_mean(k3, response_mask).item(),
        "kl_ref/k3_response": response_sum(k3, response_mask).mean().item(),
        "kl_ref/forward_token": masked_mean(kl.value("forward", old_logprobs, ref_logprobs), response_mask).item(),
        "kl_ref/p99": p99,
        "kl_ref/max": _maximum(log_ratio[response_mask]),
        "kl_ref/top1pct_share": _top_share(k3[response_mask], 0.01),
    }
    if valid is None:
        return metrics
    kinds = {"kl_ref/valid": per_response[valid], "kl_ref/invalid": per_response[~valid]}
    return metrics | {key: values.mean().item() for key, values in kinds.items() if len(values)}


@torch.no_grad()
def entropy_metrics(entropy: Tensor, response_mask: Tensor) -> dict[str, float]:
    """entropy/token and its 10th, 50th and 90th percentile over the tokens of the batch, in nats."""
    p10, p50, p90 = _quantiles(entropy[response_mask], 0.1, 0.5, 0.9)
    mean = masked_mean(entropy, response_mask).item()
    return {"entropy/token": mean, "entropy/p10": p10, "entropy/p50": p50, "entropy/p90": p90}


@torch.no_grad()
def mismatch_metrics(old_logprobs: Tensor, rollout_logprobs: Tensor, response_mask: Tensor) -> dict[str, float]:
    """How far the sampler's log-probs are from the trainer's of the same weights: kl_rollout/*."""
    difference = kl.log_ratio(rollout_logprobs, old_logprobs)
    return {
        "kl_rollout/k1_token": masked_mean(difference, response_mask).item(),
        "kl_rollout/max": _maximum(difference[response_mask].abs()),
    }


@torch.no_grad()
def group_metrics(scores: Tensor, group_ids: Tensor) -> dict[str, float]:
    """How many prompts have responses of one score only; `scores` and `group_ids` are (B,)."""
    groups, inverse = torch.unique(group_ids, return_inverse=True)
    empty = scores.new_zeros(len(groups))
    low, high = (empty.scatter_reduce(0, inverse, scores, kind, include_self=False) for kind in ("amin", "amax"))
    return {"kl/zero_variance_groups": (low == high).double().mean().item()}


@torch.no_grad()
def group_std(scores: Tensor, group_ids: Tensor) -> Tensor:
    """(G,) standard deviation of each group's scores, over n - 1; 0 for a group of one."""
    groups, inverse = torch.unique(group_ids, return_inverse=True)
    wide = scores.double()
    zero = wide.new_zeros(len(groups))
    count = zero.index_add(0, inverse, torch.ones_like(wide))
    mean = zero.index_add(0, inverse, wide) / count
    squares = zero.index_add(0, inverse, (wide - mean[inverse]).square())
    return (squares / (count - 1).clamp(min=1)).sqrt()


def standard_error(values: Tensor) -> float:
    """Of the mean of independent values, (B,); NaN for fewer than two."""
    return (values.double().std() / len(values) ** 0.5).item() if len(values) > 1 else float("nan")


def _quantiles(values: Tensor, *levels: float) -> tuple[float, ...]:
    """numpy's, because torch.quantile refuses more than 2^24 values, which a large batch of long responses has."""
    if not len(values):
        return tuple(float("nan") for _ in levels)
    return tuple(float(level) for level in np.quantile(values.double().cpu().numpy(), levels))


def _maximum(values: Tensor) -> float:
    return values.max().item() if len(values) else float("nan")


def _top_share(mass: Tensor, fraction: float) -> float:
    """Share of the total in the largest `fraction` of the values, at least one; NaN where there is no mass at all."""
    if not len(mass):
        return float("nan")
    largest = mass.double().topk(int(np.ceil(fraction * len(mass)))).values
    return (largest.sum() / mass.double().sum()).item()
