"""Step time and peak memory at 1.5B, with the KL off and on, per estimator and response length; on a GPU.

    python -m pytest tests/bench/gpu -q -s --timeout=7200

prints the table, and keeps it in the folder KLREG_BENCH_OUT if that is set.

Random weights of DeepSeek-R1-Distill-Qwen-1.5B's architecture; every response has its full length. Beside what is
measured stands what `klreg plan` would have said, so that the arithmetic's assumptions can be corrected.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml

from klreg_verl.experiment import architecture, fit, plan, recipe
from klreg_verl.experiment.store import RunFolder
from launch import gpu

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(Path(__file__).parent))

import models  # noqa: E402

R1 = architecture.NAMED["deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"]
LENGTHS = (1024, 4096, 8192)
ARMS = {
    "none": {"placement": "none"},
    "k1 in reward": {"placement": "reward", "estimator": "k1", "follows": "reverse", "beta": 0.001},
    "k3 in loss": {"placement": "loss", "estimator": "k3", "follows": "forward", "beta": 0.001},
    "exact": {"placement": "loss", "estimator": "full_reverse", "follows": "reverse", "beta": 0.001},
}
STEPS = 5
ROLLOUT = "actor_rollout_ref.rollout"

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("vllm") is None,
    reason="no CUDA device, or no vLLM (launch/env/setup_gpu.sh)",
)


def study(folder: Path, model: Path, length: int) -> Path:
    """A recipe with the four arms at one length; small batches, for a machine with one GPU."""
    verl = {f"{ROLLOUT}.ignore_eos": True, f"{ROLLOUT}.gpu_memory_utilization": 0.4}
    if importlib.util.find_spec("flash_attn") is None:
        verl |= gpu.WITHOUT_FLASH
    values = {
        "question": "What does a step cost?",
        "model": {"path": str(model)},
        "tasks": {"palindrome": {"builtin": "palindrome", "options": {"train_size": 64, "test_size": 8}}},
        "train": {
            "steps": STEPS,
            "prompts_per_step": 8,
            "responses_per_prompt": 4,
            "learning_rate": 1e-7,
            "max_prompt_tokens": 64,
            "max_response_tokens": length,
            "micro_batch": max(1, 8192 // length),
        },
        "arms": {name.replace(" ", "_"): {"kl": kl} for name, kl in ARMS.items()},
        "eval": {"every": 0, "before": False},
        "save": {"every": 1000, "keep": 2, "at_end": False},
        "samples": {"every": 0},
        "verl": verl,
        "seeds": [1],
    }
    path = folder / f"step_time_{length}.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@needs_gpu
@pytest.mark.gpu
@pytest.mark.timeout(7200)
def test_step_time_and_peak_memory_per_arm_and_length(tmp_path: Path):
    kept = os.environ.get("KLREG_TEST_CACHE")
    folder = Path(kept) / "r1-random" if kept else tmp_path / "model"
    model = folder if (folder / "config.json").is_file() else models.write(R1, folder, device="cuda")
    found = []
    for length in LENGTHS:
        path = study(tmp_path, model, length)
        command = [sys.executable, "-m", "klreg_verl.cli", "run", str(path), "--runs-dir", str(tmp_path / "runs")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3000)
        print(done.stdout[-2000:] if done.returncode else "")  # an arm that does not fit is a row without numbers
        found += [row(spec, tmp_path / "runs", length) for spec in plan.expand(recipe.load(path))]
    show(found)


def row(spec: plan.RunSpec, runs: Path, length: int) -> dict[str, object]:
    """Medians after the first step, and what the arithmetic says."""
    lines = RunFolder(runs / spec.recipe / spec.run_id).read_metrics()[1:]
    total, bytes_ = torch.cuda.get_device_properties(0).total_memory, 1e9
    kind = replace(fit.gpu_named(torch.cuda.get_device_name()), memory_bytes=total)
    planned = fit.fit(spec, R1, kind)

    def of(key: str) -> float | None:
        values = [line[key] for line in lines if line.get(key) is not None]
        return statistics.median(values) if values else None

    return {
        "arm": spec.arm,
        "response_tokens": length,
        "step_s": of("time/step_s"),
        "peak_gb": of("memory/peak_gb"),
        "planned_step_s": planned.time.seconds,
        "planned_peak_gb": planned.training_bytes / bytes_,
    }


def show(rows: list[dict[str, object]]) -> None:
    """Each arm beside `none` at the same length."""
    bare = {one["response_tokens"]: one["step_s"] for one in rows if one["arm"] == "none"}
    names = {name: version(name) for name in ("verl", "vllm", "torch", "transformers")}
    print(f"\n{torch.cuda.get_device_name()}, {names}")
    print("arm            tokens   step [s]   over none   peak [GB]   planned [s]   planned [GB]")
    for one in rows:
        of_none = bare[one["response_tokens"]]
        ratio = one["step_s"] / of_none if one["step_s"] and of_none else None
        numbers = (one["step_s"], ratio, one["peak_gb"], one["planned_step_s"], one["planned_peak_gb"])
        cells = "".join(f"{'-' if value is None else f'{value:.2f}':>12}" for value in numbers)
        print(f"{one['arm']:<14} {one['response_tokens']:>6}{cells}")
    if out := os.environ.get("KLREG_BENCH_OUT"):
        kept = {"device": torch.cuda.get_device_name(), "versions": names, "rows": rows}
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / "step_time.json").write_text(json.dumps(kept, indent=2) + "\n")


def test_the_random_model_is_what_verl_accepts(tmp_path: Path):
    """At a small size, where there is no GPU: folder complete, vocabularies equal, counted as it is."""
    pytest.importorskip("transformers")
    from data_prep.check import check_model

    small = replace(R1, layers=1, hidden=32, intermediate=64, heads=2, kv_heads=1, head_dim=16, vocabulary=1024)
    sizes = check_model(models.write(small, tmp_path / "model", dtype="float32"))
    assert sizes == {"model_vocabulary": 1024, "tokenizer_vocabulary": 1024}
    assert architecture.read(tmp_path / "model").parameters == small.parameters


@pytest.mark.parametrize("length", LENGTHS)
def test_the_study_is_a_recipe_that_holds(tmp_path: Path, length: int):
    loaded = recipe.load(study(tmp_path, tmp_path, length))
    recipe.check_claims(loaded)
    assert len(plan.expand(loaded)) == len(ARMS)
