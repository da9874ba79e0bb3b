"""Run folders for tests, without a run: literal ones, and a synthetic study whose curves have the shape of real ones.

``write_run`` writes exactly the rows it is given. ``write_study`` draws rows and samples from a random generator: it is
made up, says so in its question and run cards, and serves to look at figures and to test the report, never as a result.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

KL_BLOCKS: dict[str, dict[str, Any]] = {
    "none": {"placement": "none"},
    "reverse": {"placement": "reward", "estimator": "k1", "follows": "reverse", "beta": 0.1},
    "forward": {"placement": "loss", "estimator": "k3", "follows": "forward", "beta": 0.1},
}
GRADIENTS = {
    "none": "No KL term: the gradient is the policy gradient alone.",
    "reverse": "k1 in the reward: the gradient of KL(policy || reference) of whole responses.",
    "forward": "k3 in the loss: per token the gradient of KL(reference || policy), on the policy's own prefixes.",
}
SHAPES = {"none": (0.63, 1.9, 0.50), "reverse": (0.60, 0.55, 0.66), "forward": (0.61, 0.9, 0.60)}
"""Where accuracy, KL [nats per response] and entropy [nats per token] of the synthetic arms go."""
RECIPE = {"name": "synthetic", "question": "Synthetic runs: does the report show what is in its run folders?"}
SAMPLE_FIELDS = [
    ("step", pa.int64()),
    ("group", pa.string()),
    ("sample", pa.int64()),
    ("data_source", pa.string()),
    ("prompt", pa.string()),
    ("response", pa.string()),
    ("score", pa.float64()),
    ("valid", pa.bool_()),
    ("answer", pa.string()),
    ("num_valid", pa.string()),
]


def write_run(
    recipe_dir: Path,
    arm: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    task: str = "palindrome",
    grid: Sequence[str] = (),
    seed: int = 1,
    steps: int | None = None,
    kl: Mapping[str, Any] | None = None,
    status: str = "done",
    reason: str = "",
    provenance: Mapping[str, Any] | None = None,
    attempts: Sequence[Mapping[str, Any]] = (),
    samples: Mapping[int, pa.Table] | None = None,
    spec: Mapping[str, Any] | None = None,
) -> Path:
    """One run folder that holds exactly ``rows`` (each with its "step") and the cards of ``attempts``; its path."""
    folder = recipe_dir.joinpath(arm, task, *grid, f"seed{seed}")
    (folder / "attempts" / "1").mkdir(parents=True)
    last = max((row["step"] for row in rows), default=0)
    steps = last if steps is None else steps
    block = kl if kl is not None else KL_BLOCKS.get(arm, {"placement": "none"})
    resolved = {
        "recipe": recipe_dir.name,
        "arm": arm,
        "task_name": task,
        "seed": seed,
        "train": {"steps": steps},
        "kl": dict(block),
    }
    _write(folder / "spec.json", resolved | dict(spec or {}))
    _write(folder / "state.json", {"status": status, "reason": reason, "step": last, "steps": steps, "attempt": 1})
    _write(folder / "provenance.json", provenance if provenance is not None else card(arm, seed))
    for number, attempt in enumerate(attempts, start=1):
        (folder / "attempts" / str(number)).mkdir(exist_ok=True)
        _write(folder / "attempts" / str(number) / "provenance.json", attempt)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(_finite(row)) + "\n" for row in rows), encoding="utf-8")
    for step, table in (samples or {}).items():
        (folder / "samples").mkdir(exist_ok=True)
        pq.write_table(table, folder / "samples" / f"step_{step:06d}.parquet", compression="zstd")
    return folder


def write_study(
    recipe_dir: Path,
    *,
    arms: Sequence[str] = ("none", "reverse", "forward"),
    seeds: Sequence[int] = (1,),
    steps: int = 40,
) -> Path:
    """A synthetic study: every arm with every seed, done, samples at the first and last step. Same in, same out."""
    for arm in arms:
        for seed in seeds:
            stored = {step: synthetic_samples(arm, seed, step, steps) for step in sorted({1, steps})}
            write_run(recipe_dir, arm, synthetic_rows(arm, seed, steps), seed=seed, samples=stored)
    return recipe_dir


def evaluate(path: Path, step: int, right: list[list[bool]], *, name: str = "a", **changes: Any) -> None:
    """What `klreg eval` leaves: the samples of each prompt as a table, the numbers as JSON."""
    (path / "evals").mkdir(exist_ok=True)
    stem = path / "evals" / f"step{step}-palindrome-{name}"
    rows = [{"prompt": row, "sample": i, "valid": v} for row, draws in enumerate(right) for i, v in enumerate(draws)]
    pq.write_table(pa.Table.from_pylist(rows), stem.with_suffix(".parquet"))
    accuracy = sum(row["valid"] for row in rows) / len(rows)
    record = {
        "step": step,
        "task": "palindrome",
        "file": f"{stem.name}.parquet",
        "data": {"sha256": "d"},
        "reward": "r",
        "temperature": 1.0,
        "top_p": 1.0,
        "max_tokens": 12,
        "seed": 1,
        "prompts": len(right),
        "samples": len(right[0]),
        "accuracy": {"mean": accuracy},
        "pass": {},
        "maj": {},
        "distinct_right": 1.0,
        "diversity": {"valid_distinct": 1.5, "share_of_uniform": None},
        "metrics": {"eval/palindrome/accuracy": accuracy, "eval/palindrome/pass@2": accuracy / 2},
    }
    stem.with_suffix(".json").write_text(json.dumps(record | changes))


def card(arm: str, seed: int) -> dict[str, Any]:
    """A provenance.json in its real layout (experiment.provenance.collect, launch.local) with made-up values."""
    return {
        "run_id": f"{arm}/palindrome/seed{seed}",
        "spec_hash": f"{arm}{seed}",
        "time": f"2026-01-01T00:00:{seed:02d}Z",
        "python": "3.11.0",
        "versions": {"klreg_verl": "0.1.0", "verl": "0.9.1", "torch": "2.13.0", "vllm": "0.12.0"},
        "git": _git(),
        "host": {
            "name": "machine",
            "system": "Linux",
            "cpu": "synthetic",
            "cores": 2,
            "cores_usable": 2,
            "memory_gb": 16,
            "gpus": [],
        },
        "data": {name: {"path": f"/data/{name}.parquet", "sha256": "d" * 64} for name in ("train", "val")},
        "model": {"path": "/models/tiny", "revision": None, "sha256": "e" * 64},
        "reference": {"sha256": "e" * 64},
        "kl_source": {"klreg_verl.core.kl": "f" * 64},
        "gradient": GRADIENTS.get(arm, "Not stated."),
        "platform": "cpu",
        "claims": {"sha256": "c" * 64, "since": "2026-01-01T00:00:00Z", "list": {}},
    }


def _git() -> dict[str, Any]:
    return {
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "dirty": True,
        "diff_sha256": "a" * 64,
        "diff": "+" * 500,
        "diff_truncated": False,
        "untracked": [],
    }


def synthetic_rows(arm: str, seed: int, steps: int) -> list[dict[str, Any]]:
    """Step 0 with an evaluation, then one row a step; step 1 is the same in every arm of a seed."""
    shared, own = random.Random(f"start{seed}"), random.Random(f"{arm}{seed}")
    rows = [_evaluation(0, 0.52 + shared.gauss(0, 0.01))]
    rows += [_row(arm, step, steps, shared if step == 1 else own) for step in range(1, steps + 1)]
    rows[-1] |= {key: value for key, value in _evaluation(steps, rows[-1]["train/accuracy"]).items() if key != "step"}
    return rows


def synthetic_samples(
    arm: str, seed: int, step: int, steps: int, num_prompts: int = 4, num_samples: int = 8
) -> pa.Table:
    """Arrangements of letters that are palindromes about as often as the arm's accuracy says."""
    prompts, draws = (
        random.Random(f"prompts{seed}{step}"),
        random.Random(f"draws{'' if step == 1 else arm}{seed}{step}"),
    )
    rows = [
        _sample(step, index, sample, half, _level(SHAPES[arm][0], 0.52, step, steps), draws)
        for index, half in enumerate(
            "".join(sorted(prompts.sample("abcdefgh", 2 + index % 3))) for index in range(num_prompts)
        )
        for sample in range(num_samples)
    ]
    return pa.Table.from_pylist(rows, schema=pa.schema(SAMPLE_FIELDS))


def _row(arm: str, step: int, steps: int, noise: random.Random) -> dict[str, Any]:
    accuracy, kl, entropy = SHAPES[arm]
    start = step == 1
    beta = KL_BLOCKS[arm].get("beta", 0.0)
    kl_now = 0.0 if start else max(0.0, _level(kl, 0.0, step, steps) * (1 + noise.gauss(0, 0.12)))
    correct = min(1.0, max(0.0, _level(accuracy, 0.52, step, steps) + noise.gauss(0, 0.032)))
    coverage = _level(0.46 if arm == "none" else 0.55, 0.50, step, steps) + noise.gauss(0, 0.02)
    return {
        "step": step,
        "time/step_s": 4.0 + abs(noise.gauss(0, 0.3)),
        "train/accuracy": correct,
        "response/length": 6.3 + noise.gauss(0, 0.12),
        "response/truncated": 0.0,
        "kl_ref/k1_token": kl_now / 6.3,
        "kl_ref/k1_response": kl_now + (0.0 if start else noise.gauss(0, 0.02)),
        "kl_ref/k3_response": kl_now * (1.0 if start else 0.95 + noise.gauss(0, 0.03)),
        "kl_ref/invalid": math.nan if step == 2 else kl_now,
        "kl/beta": beta,
        "kl/penalty": beta * kl_now,
        "entropy/token": _level(entropy, 0.74, step, steps) + noise.gauss(0, 0.012),
        "diversity/unique_valid": 2.4 + 4 * (coverage - 0.5) + noise.gauss(0, 0.05),
        "diversity/coverage": coverage,
        "kl_rollout/k1_token": abs(noise.gauss(0, 2e-6)),
        "kl_rollout/max": 4e-5 * (1 + abs(noise.gauss(0, 0.4))),
    }


def _level(end: float, start: float, step: int, steps: int) -> float:
    """From start towards end, fast first: (1 - exp(-2 x)) of the way at the share x of the steps."""
    return start + (end - start) * (1 - math.exp(-2 * (step - 1) / max(1, steps - 1))) / (1 - math.exp(-2))


def _evaluation(step: int, accuracy: float) -> dict[str, Any]:
    return {"step": step, "eval/palindrome/accuracy": accuracy, "val-core/palindrome/acc/mean@4": accuracy}


def _sample(step: int, index: int, sample: int, half: str, accuracy: float, draws: random.Random) -> dict[str, Any]:
    valid = draws.random() < accuracy
    arranged = "".join(draws.sample(half, len(half)))
    response = arranged + arranged[::-1] if valid else "".join(draws.sample(half * 2, 2 * len(half)))
    valid = response == response[::-1]
    return {
        "step": step,
        "group": f"{step}-{index}",
        "sample": sample,
        "data_source": "palindrome",
        "prompt": " ".join(sorted(half * 2)),
        "response": response,
        "score": float(valid),
        "valid": valid,
        "answer": response if valid else "",
        "num_valid": str(math.factorial(len(half))),
    }


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """The store's rule: a number that is not finite is written as null."""
    return {key: None if isinstance(value, float) and not np.isfinite(value) else value for key, value in row.items()}


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


HOLDER = """
import sys, time
from klreg_verl.experiment.store import RunFolder
folder = RunFolder(sys.argv[1])
with folder.lock():
    folder.set_state("running")
    print("held", flush=True)
    time.sleep(100)
"""
"""A program that works in the run folder it is given, until it is killed; it says "held" once it does."""
