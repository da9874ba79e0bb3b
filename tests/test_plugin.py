"""What the plugin does to a process that imports verl, each time in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from verl_stack import environment, need_stack, run_python

KL = "placement: reward\nestimator: k1\nfollows: reverse\nbeta: 0.1\n"

LOOK = """
import json, os, sys
import verl
waited = [finder for finder in sys.meta_path if type(finder).__module__.startswith("klreg_verl")]
found = {"finders": [type(finder).__name__ for finder in waited]}
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.trainer.ppo import core_algos
from verl.trainer.constants_ppo import get_ppo_ray_runtime_env
from verl.plugin.platform import PlatformRegistry, get_platform
trainer = get_trainer_cls("sync")
found["trainer"] = trainer.__name__
found["is_verls"] = issubclass(trainer, PPOTrainerSync)
found["advantages"] = sorted(name for name in core_algos.ADV_ESTIMATOR_REGISTRY if name.startswith("klreg_"))
found["variables"] = {k: v for k, v in get_ppo_ray_runtime_env(None)["env_vars"].items()}
from verl.utils import torch_functional
found["logprobs"] = torch_functional.logprobs_from_logits_v2.__module__
found["platforms"] = list(PlatformRegistry.registered_names())
found["platform"] = type(get_platform()).__name__
if "KLREG_SESSION_DIR" in os.environ:
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver, BucketedWeightSender
    handle = "ipc:///tmp/rl-colocate-zmq-1.sock"
    found["sockets"] = [
        BucketedWeightSender(zmq_handle=handle, use_shm=True).zmq_handle,
        BucketedWeightReceiver(handle, device=None, use_shm=True).zmq_handle,
    ]
print("FOUND", json.dumps(found))
"""


@pytest.fixture(scope="module", autouse=True)
def stack() -> None:
    need_stack()


def look(**variables: str) -> dict[str, Any]:
    (line,) = [line for line in run_python(LOOK, **variables).splitlines() if line.startswith("FOUND ")]
    return json.loads(line.removeprefix("FOUND "))


@pytest.fixture(scope="module")
def kl_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kl") / "kl.yaml"
    path.write_text(KL)
    return path


@pytest.fixture(scope="module")
def active(kl_file: Path) -> dict[str, Any]:
    """A process with all of ours switched on, and a variable that the launching shell has set, too."""
    return look(
        KLREG_KL=str(kl_file),
        VERL_PLATFORM="cpu",
        VERL_ENGINE_DEVICE="cuda",
        TENSORBOARD_DIR="/tb",
        WANDB_MODE="offline",
        KLREG_SESSION_DIR="/tmp/klreg-s",
    )


def test_with_a_kl_block_our_trainer_stands_under_verls_name(active: dict[str, Any]):
    assert (active["trainer"], active["is_verls"]) == ("KLRegTrainer", True)


def test_our_advantages_are_registered_beside_verls(active: dict[str, Any]):
    assert active["advantages"] == ["klreg_dr_grpo", "klreg_grpo", "klreg_rloo"]


def test_variables_reach_the_workers_although_the_shell_has_set_them(active: dict[str, Any], kl_file: Path):
    expected = {
        "KLREG_KL": str(kl_file),
        "VERL_PLATFORM": "cpu",
        "VERL_ENGINE_DEVICE": "cuda",
        "TENSORBOARD_DIR": "/tb",
        "WANDB_MODE": "offline",
    }
    assert expected.items() <= active["variables"].items()
    assert "KLREG_RUN" not in active["variables"]  # not set, so not invented


def test_the_cpu_platform_is_chosen(active: dict[str, Any]):
    assert (active["platform"], "cpu" in active["platforms"]) == ("PlatformCPU", True)


def test_weights_travel_in_the_sessions_own_folder(active: dict[str, Any]):
    assert active["sockets"] == ["ipc:///tmp/klreg-s/rl-colocate-zmq-1.sock"] * 2


def test_log_probabilities_are_taken_in_blocks_where_flash_attn_is_missing(active: dict[str, Any]):
    assert active["logprobs"] == "klreg_verl.core.logprobs"


def test_without_our_variables_nothing_of_verl_is_touched():
    plain = look()
    assert plain["logprobs"] == "verl.utils.torch_functional"
    assert (plain["trainer"], plain["advantages"], plain["finders"]) == ("PPOTrainerSync", [], [])
    assert "cpu" not in plain["platforms"]
    assert not any(name.startswith(("KLREG", "WANDB", "TENSORBOARD")) for name in plain["variables"])


def test_our_driver_refuses_to_start_where_verls_workers_would_not_load_the_plugin(kl_file: Path):
    variables = environment(
        KLREG_KL=str(kl_file), VERL_PLATFORM="cpu", VERL_USE_EXTERNAL_PLUGINS="none", VERL_USE_EXTERNAL_MODULES=""
    )
    command = [sys.executable, "-m", "klreg_verl.verl_hooks.main", "trainer.total_training_steps=1"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=900)
    assert done.returncode != 0
    assert done.stderr.rstrip().endswith(
        "RuntimeError: verl would start PPOTrainerSync, not KLRegTrainer: its plugin entry point did not load. Check "
        "that klreg-verl is installed in this environment (`pip show klreg-verl`), that KLREG_KL names a file, and "
        "that VERL_USE_EXTERNAL_PLUGINS is not 'none'."
    )
