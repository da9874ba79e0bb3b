"""The process that samples: whatever happens to it, its caller is told why, and nothing of it is left."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from klreg_verl.evaluation import engine
from klreg_verl.evaluation.worker import Job, Order

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="not installed: vllm (make setup)"),
]


@pytest.fixture
def order(tmp_path: Path) -> Order:
    """Of a model that is not there."""
    job = Job(
        model=str(tmp_path / "nix"),
        data="nix.parquet",
        parts=str(tmp_path),
        prompts=None,
        samples=1,
        temperature=1.0,
        top_p=1.0,
        max_tokens=4,
        seed=1,
    )
    return Order(jobs=(job,), platform="cpu", tensor_parallel=1, memory_share=0.9, trust_remote_code=False)


def test_an_order_reads_back_as_it_was_written(order: Order):
    several = replace(order, jobs=(order.jobs[0], replace(order.jobs[0], seed=2)))
    assert Order.from_json(json.dumps(asdict(several))) == several


def test_a_failure_is_told_with_the_end_of_the_log(order: Order, tmp_path: Path):
    with pytest.raises(RuntimeError, match=r"vLLM: \w+: [\s\S]*nix[\s\S]*whole log: .*log"):
        engine.run(order, tmp_path / "log", lambda message: None)
    assert "Traceback" in (tmp_path / "log").read_text()


def test_silence_ends_the_process(order: Order, tmp_path: Path):
    with pytest.raises(RuntimeError, match="said nothing for 0 s and was ended. Run the same command again"):
        engine.run(order, tmp_path / "log", lambda message: None, silence=0.05)
    assert not [one for one in psutil.Process().children() if "evaluation.worker" in " ".join(one.cmdline())]


def test_a_process_that_was_killed_is_told_as_such(order: Order, tmp_path: Path):
    with engine.process(order, tmp_path / "log") as (child, messages):
        child.send_signal(signal.SIGKILL)
        assert list(messages(60)) == []
        assert "was killed by SIGKILL (out of memory, most likely)" in engine._end(child)
    assert child.returncode == -signal.SIGKILL


PARENT = """
import os, sys, time
from pathlib import Path
from klreg_verl.evaluation import engine
from klreg_verl.evaluation.worker import Order

order = Order.from_json(sys.argv[1])
with engine.process(order, Path(sys.argv[2])) as (child, messages):
    place = f"/proc/{child.pid}/fd"
    while os.readlink(f"{place}/1") != os.readlink(f"{place}/2"):  # what it does right after asking the kernel
        time.sleep(0.01)
    child.send_signal(19)  # SIGSTOP: it will not end by itself
    print(child.pid, flush=True)
    time.sleep(100)
"""


def test_a_killed_parent_takes_the_process_with_it(order: Order, tmp_path: Path):
    """Also one that is stopped, which no closed pipe would wake; the kernel ends it once it has asked for that."""
    command = [sys.executable, "-c", PARENT, json.dumps(asdict(order)), str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        os.kill(parent.pid, signal.SIGKILL)
    try:
        _, left = psutil.wait_procs([child], timeout=120)
        assert not left
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def test_vllm_gets_its_environment_and_the_user_may_change_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = engine.environment("cpu")
    assert (found["VLLM_ENABLE_V1_MULTIPROCESSING"], found["OMP_NUM_THREADS"]) == ("0", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert engine.environment("cpu")["OMP_NUM_THREADS"] == "7"
    assert "VLLM_CPU_KVCACHE_SPACE" not in engine.environment("cuda")
