"""What every arm logs about a batch: the same quantities whatever its KL setting is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from klreg_verl.core import diversity, kl, metrics
from klreg_verl.core.aggregation import masked_mean, response_sum
from klreg_verl.core.right import right_or_wrong
from klreg_verl.experiment.recipe import KLSpec
from klreg_verl.verl_hooks import terms
from klreg_verl.verl_hooks.names import TIMINGS
from klreg_verl.verl_hooks.rows import Rows


def measure(
    rows: Rows, spec: KLSpec, beta: float, max_response_tokens: int, *, graded: bool = False
) -> dict[str, float]:
    """All of our metrics of one batch, sampled before the update (keys: core.metrics.METRICS).

    In a `graded` run (headline.py) no response is right or wrong, whatever this batch's scores are.
    """
    mask, valid = rows.response_mask, None if graded else is_valid(rows)
    return {
        **reward_metrics(rows, valid, max_response_tokens),
        **kl_placement_metrics(rows, spec, beta),
        **estimate_metrics(rows, spec, beta),
        **metrics.kl_metrics(rows.old_logprobs, rows.ref_logprobs, mask, valid),
        **metrics.group_metrics(rows.scores, rows.group_ids),
        **metrics.entropy_metrics(rows.entropy, mask),
        **metrics.mismatch_metrics(rows.old_logprobs, rows.rollout_logprobs, mask),
        **_right_answers(rows, valid),
    }


def is_valid(rows: Rows) -> Tensor | None:
    """(B,) bool: by the reward's `acc`, or by its score; None where it grades (core/right.py)."""
    right = right_or_wrong([extras.get("acc") for extras in rows.reward_extras], rows.scores.tolist())
    return None if right is None else torch.tensor(right, dtype=torch.bool)


def _right_answers(rows: Rows, valid: Tensor | None) -> dict[str, float]:
    return {} if valid is None else diversity.unique_valid(answers(rows), valid, rows.group_ids, num_valid(rows))


def answers(rows: Rows) -> list[str]:
    """The answer each response was graded on (`pred`), or its tokens where a user's reward has no `pred`."""
    pairs = zip(rows.reward_extras, rows.responses, strict=True)
    return [str(extras["pred"]) if "pred" in extras else str(tokens.tolist()) for extras, tokens in pairs]


def num_valid(rows: Rows) -> list[int | None]:
    """How many valid answers each prompt has, where the data say so."""
    texts = [info.get("num_valid") for info in rows.extra_info]
    return [int(text) if text not in (None, "") else None for text in texts]


def reward_metrics(rows: Rows, valid: Tensor | None, max_response_tokens: int) -> dict[str, float]:
    """Accuracy, score and length; truncated is what fills the token limit, whatever the reward says."""
    accuracy = {} if valid is None else {"train/accuracy": valid.double().mean().item()}
    lengths = rows.response_mask.sum(-1).double()
    truncated = [float(len(tokens) >= max_response_tokens) for tokens in rows.responses]
    return {
        **_share("train/ungraded", "timeout", rows),
        **_share("train/echoed", "echoed", rows),
        **accuracy,
        "train/score": rows.scores.double().mean().item(),
        "response/length": lengths.mean().item(),
        "response/truncated": sum(truncated) / len(truncated),
    }


def _share(key: str, extra: str, rows: Rows) -> dict[str, float]:
    """The mean of what the reward returns as `extra`; nothing where it returns none."""
    found = [float(extras[extra]) for extras in rows.reward_extras if extra in extras]
    return {key: sum(found) / len(found)} if found else {}


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


@dataclass(frozen=True, kw_only=True)
class Validated:
    """The responses of one validation, as verl gives them."""

    data_sources: Sequence[Any]
    uids: Sequence[Any]
    rewards: Mapping[str, Sequence[float | None]]
    """Numbers of each response: `reward`, and what else the reward function returned."""
    expected: Mapping[tuple[str, str], int]
    """(data source, uid) -> responses asked for."""

    @property
    def sources(self) -> list[str]:
        return list(dict.fromkeys(source for source, _ in self.expected))

    def numbers(self, source: str) -> tuple[list[str], list[float | None], list[float]]:
        """uid, `acc` (None where the reward returned none) and score of each of a source's responses."""
        given = self.rewards.get("acc", [None] * len(self.uids))
        rows = zip(self.data_sources, self.uids, given, self.rewards["reward"], strict=True)
        mine = [(str(uid), acc, float(reward or 0.0)) for name, uid, acc, reward in rows if str(name) == source]
        uids, acc, scores = ([row[place] for row in mine] for place in range(3))
        return uids, acc, scores

    def right(self) -> list[bool] | None:
        """Which of the task's own responses are right, as core.right has it: what the run's headline is decided on."""
        parts = [self.numbers(source) for source in self.sources if not source.startswith(SKILL)]
        return right_or_wrong([one for _, acc, _ in parts for one in acc], [one for *_, part in parts for one in part])

    def mean(self, source: str, uids: Sequence[str], values: Sequence[float]) -> float:
        """Over a source's prompts, of the mean over each prompt's responses; one that got lost counts 0."""
        totals = {uid: 0.0 for name, uid in self.expected if name == source}
        for uid, value in zip(uids, values, strict=True):
            totals[uid] += value
        return sum(total / self.expected[source, uid] for uid, total in totals.items()) / len(totals)


SKILL = "skill/"
"""Before the data_source of a skill beside the task: it is retained, not learned."""


def evaluation_metrics(found: Validated, *, graded: bool) -> dict[str, float]:
    """Score and, unless the run is graded (headline.py), accuracy of a validation by data source; of skills, retention.

    verl's own summary stands beside it (`verls_evaluation`).
    """
    logged: dict[str, float] = {}
    for source in found.sources:
        uids, acc, scores = found.numbers(source)
        right = right_or_wrong(acc, scores)
        share = found.mean(source, uids, scores if right is None else right)
        if source.startswith(SKILL):
            logged[f"retention/{source.removeprefix(SKILL)}"] = share
            continue
        if not graded:
            logged[f"eval/{source}/accuracy"] = share
        logged[f"eval/{source}/score"] = found.mean(source, uids, scores)
    return logged


def verls_evaluation(metrics: Mapping[str, float]) -> dict[str, float]:
    """verl's validation metrics but best@N: a bootstrap with replacement, which is not pass@N (one right answer of 16
    gives best@16 = 0.64)."""
    return {key: value for key, value in metrics.items() if "/best@" not in key}


def bootstrap_metric(
    data: Sequence[Any],
    subset_size: int,
    reduce_fns: Sequence[Callable[..., Any]],
    n_bootstrap: int = 1000,
    seed: int = 42,
) -> list[tuple[float, float]]:
    """verl's bootstrap: (mean, standard deviation) of each function over samples of `subset_size` with replacement.

    The same numbers in a fraction of the time, since equal draws are reduced once; numpy's global generator, which
    verl's reseeds, is left alone.
    """
    draws = np.random.RandomState(seed).choice(len(data), size=(n_bootstrap, subset_size), replace=True)
    distinct, which = np.unique(draws, axis=0, return_inverse=True)
    samples = np.array(data, dtype=object)[distinct]
    reduced = [np.array([float(reduce(sample)) for sample in samples])[which.reshape(-1)] for reduce in reduce_fns]
    return [(float(np.mean(values)), float(np.std(values))) for values in reduced]


def samples_columns(
    rows: Rows, step: int, row_of: dict[str, int], decode: Any, *, graded: bool = False
) -> dict[str, list[Any]]:
    """The columns of samples/step_<n>.parquet, one entry per response; in a graded run none is `valid` or not."""
    valid = None if graded else is_valid(rows)
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
        "valid": [None] * len(rows.samples) if valid is None else valid.tolist(),
        "answer": answers(rows),
        "num_valid": [None if n is None else str(n) for n in num_valid(rows)],
    }
