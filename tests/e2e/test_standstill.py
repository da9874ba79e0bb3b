"""Nothing waits for ever: what hangs or fails on the real stack ends the run with its reason; what is slow does not."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import yaml
from stack import ROOT, Lab, finish, metrics

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]

REWARD = """
import time


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    time.sleep({seconds})
    return float(len(solution_str) % 2)
"""
BROKEN = """
from klreg_verl.verl_hooks.post_import import after_import

updates = []


def fail_at_the_second(module):
    original = module.vLLMColocateWorkerExtension.update_weights_from_ipc

    def update(self, *args, **kwargs):
        updates.append(None)
        if len(updates) == 2:
            raise RuntimeError("these weights cannot be loaded")
        return original(self, *args, **kwargs)

    module.vLLMColocateWorkerExtension.update_weights_from_ipc = update


after_import("verl.workers.rollout.vllm_rollout.utils", fail_at_the_second)
"""


def study(folder: Path, seconds: float = 0.0, **stall: float) -> Path:
    """Sixteen sums a step with the tiny model, and a judge that takes its time."""
    (folder / "judge.py").write_text(REWARD.format(seconds=seconds))
    (folder / "broken.py").write_text(BROKEN)
    files = {name: str(ROOT / f"recipes/sums/{name}.parquet") for name in ("train", "val")}
    recipe = {
        "question": "Does it end?",
        "model": {"path": "tiny"},
        "tasks": {"sums": files | {"reward": "judge:compute_score"}},
        "train": {"steps": 2, "prompts_per_step": 4, "responses_per_prompt": 4, "max_prompt_tokens": 64},
        "eval": {"before": False, "responses_per_prompt": 1},
        "save": {"every": 100, "at_end": False},
        "stall": stall,
        "arms": {"none": {"kl": {"placement": "none"}}},
        "seeds": [1],
    }
    recipe["train"]["max_response_tokens"] = 8
    (folder / "standstill.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "standstill.yaml"


def reason_of(process: subprocess.Popen[str], lab: Lab) -> str:
    """Why the run failed."""
    output, _ = process.communicate(timeout=1500)
    assert process.returncode == 1, output[-4000:]
    state = json.loads((lab.folder("standstill", "none", "sums") / "state.json").read_text())
    assert state["status"] == "failed"
    return state["reason"]


def test_a_stopped_engine_ends_the_run_in_the_phase_generation(lab: Lab, tmp_path: Path):
    recipe = study(tmp_path, generation=1)
    process = lab.start("run", recipe, "train.steps=1000")
    folder = lab.folder("standstill", "none", "sums")
    while not (folder / "metrics.jsonl").is_file():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.5)
    (engine,) = (p for p in psutil.Process(process.pid).children(recursive=True) if is_engine(p))
    engine.send_signal(signal.SIGSTOP)
    reason = reason_of(process, lab)
    assert "no progress for 1 minutes in the phase generation" in reason
    assert f"vLLM's engine (pid {engine.pid}) is stopped by a signal" in reason


def is_engine(process: psutil.Process) -> bool:
    return " ".join(process.cmdline()).startswith("VLLM::EngineCore")


def test_a_reward_that_never_returns_ends_the_run_in_the_phase_reward(lab: Lab, tmp_path: Path):
    reason = reason_of(lab.start("run", study(tmp_path, seconds=100_000, reward=1)), lab)
    assert "no progress for 1 minutes in the phase reward" in reason
    assert "0 responses and 16 rewards are owed); the reward worker (pid" in reason


def test_a_judge_that_takes_longer_than_the_limit_for_a_batch_but_answers_is_left_alone(lab: Lab, tmp_path: Path):
    finish(lab.start("run", study(tmp_path, seconds=15, reward=0.5), "train.steps=1"))
    (line,) = metrics(lab.folder("standstill", "none", "sums"))
    assert line["time/generate_s"] > 30  # half a minute is the limit


def test_a_weight_update_that_raises_ends_the_run_with_its_error(lab: Lab, tmp_path: Path):
    recipe = study(tmp_path, update=0)  # no limit: what ends it is the error
    process = lab.start("run", recipe, VERL_USE_EXTERNAL_MODULES="broken", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert "these weights cannot be loaded" in reason_of(process, lab)
