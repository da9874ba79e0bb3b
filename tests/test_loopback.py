"""verl_hooks.loopback: on one machine a run's sockets are at 127.0.0.1, and elsewhere nothing is changed."""

from __future__ import annotations

import importlib
import types
from pathlib import Path

import pytest

from klreg_verl.verl_hooks import loopback, plugin
from launch import guardian

CONSTANTS = types.SimpleNamespace


def runtime_env(own: dict[str, object] | None = None) -> dict[str, object]:
    """What verl's runtime environment becomes."""
    module = CONSTANTS(get_ppo_ray_runtime_env=lambda config=None: {"env_vars": {}} | (own or {}))
    plugin._forward_environment(module)
    return module.get_ppo_ray_runtime_env()


def test_rays_processes_run_the_hook_on_one_machine_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KLREG_KL", "kl.yaml")
    monkeypatch.delenv(loopback.VARIABLE, raising=False)
    assert "worker_process_setup_hook" not in runtime_env()
    monkeypatch.setenv(loopback.VARIABLE, "1")
    assert runtime_env()["worker_process_setup_hook"] == loopback.HOOK
    assert runtime_env({"worker_process_setup_hook": "my.own"})["worker_process_setup_hook"] == "my.own"


def test_the_hook_can_be_imported_by_its_name():
    module, _, function = loopback.HOOK.rpartition(".")
    assert getattr(importlib.import_module(module), function) is loopback.listen


def test_after_the_hook_everything_that_asks_ray_listens_at_the_loopback_address(monkeypatch: pytest.MonkeyPatch):
    ray_util = pytest.importorskip("ray.util")
    zmq_utils = pytest.importorskip("transfer_queue.utils.zmq_utils")
    monkeypatch.setattr(ray_util, "get_node_ip_address", lambda: "192.0.2.7")
    assert zmq_utils.get_node_ip_address() == "192.0.2.7"
    loopback.listen()
    assert zmq_utils.get_node_ip_address() == "127.0.0.1"


def test_a_session_says_so_unless_other_nodes_must_reach_it(tmp_path: Path):
    alone = guardian.session_environment(tmp_path, guardian.Place())
    assert alone[loopback.VARIABLE] == "1" and alone["VLLM_HOST_IP"] == "127.0.0.1"
    for place in (guardian.Place(ip="10.0.0.1"), guardian.Place(ip="10.0.0.2", head="10.0.0.1:6379")):
        assert loopback.VARIABLE not in guardian.session_environment(tmp_path, place)


def test_a_public_address_of_a_cluster_is_warned_of():
    from launch import probe

    node = {"NodeManagerAddress": "10.1.2.3"}
    assert probe._network([node]) == "every node's address is private"
    assert "WARNING: 8.8.8.8 is a public address" in probe._network([node, {"NodeManagerAddress": "8.8.8.8"}])
