"""A run that stands still is ended with its phase and the process that is waited for; one that is only slow is not."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from klreg_verl.experiment.settings import StallSpec
from klreg_verl.experiment.strict import FieldError
from klreg_verl.verl_hooks import progress
from launch import failure, stall
from launch.stall import Stall

PHASES = ("start", "generation", "reward", "update")


def test_the_limit_is_ten_minutes_on_a_cpu_and_thirty_on_cuda_unless_the_recipe_says_it():
    said = StallSpec(reward=90, update=0)
    assert said.minutes("cpu") == {"start": 10, "generation": 10, "reward": 90, "update": 0}
    assert said.minutes("cuda") == {"start": 30, "generation": 30, "reward": 90, "update": 0}
    with pytest.raises(FieldError, match="0 switches the limit off"):
        StallSpec(generation=-1)


@pytest.fixture
def attempt(tmp_path: Path) -> Path:
    (tmp_path / "log").write_text("(WorkerDict pid=7) loaded\nwaiting\n")
    return tmp_path


@pytest.fixture
def trainer(attempt: Path) -> progress.Progress:
    return progress.Progress(attempt / "progress", progress.TRAINER)


def watch(attempt: Path, seconds: float, limit: float = 1.0, **minutes: float) -> str | None:
    """What a launcher that looks often finds within `seconds`, with a limit of `limit` seconds in every phase."""
    found = Stall(attempt, dict.fromkeys(PHASES, limit / 60) | minutes)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found.next_look = 0.0
        if reason := found.reason():
            return reason
        time.sleep(0.05)
    return None


def test_a_run_of_which_nothing_is_heard_stands_still_at_the_start(attempt: Path):
    reason = watch(attempt, 20)
    assert reason is not None and "in the phase start (step 0, starting Ray's actors)" in reason
    assert "stall.start in the recipe is the limit, 0 switches it off" in reason


def test_an_update_stands_still_unless_its_limit_is_off(attempt: Path, trainer: progress.Progress):
    trainer.is_at("update", "sending the weights to vLLM", 3)
    assert watch(attempt, 3, update=0.0) is None
    reason = watch(attempt, 20)
    assert reason is not None and "the phase update (step 3, sending the weights to vLLM)" in reason


def test_micro_batches_are_progress(attempt: Path, trainer: progress.Progress):
    trainer.is_at("update", "updating the actor", 3)
    worker = progress.Progress(attempt / "progress", "worker")
    found = Stall(attempt, dict.fromkeys(PHASES, 1.5 / 60))
    for _ in range(30):  # 3 s in all, twice the limit
        worker.count(batches=1)
        found.next_look = worker.next_write = 0.0
        assert found.reason() is None
        time.sleep(0.1)


def test_the_log_ends_with_the_last_lines_of_every_process(attempt: Path):
    assert watch(attempt, 20) is not None
    shown = [failure.STOOD_STILL, "WorkerDict pid=7:", "  loaded", "driver:", "  waiting"]
    assert failure.excerpt(attempt / "log") == shown
    assert failure.STOOD_STILL in (attempt / "log").read_text()


# ------------------------------------------------------------------------------------------------- rewards


def run_judge(attempt: Path, monkeypatch: pytest.MonkeyPatch, judge: Callable[[int], Awaitable[None]]) -> str | None:
    """Eight rewards, asked for as verl's agent loop asks, while a launcher watches with a limit of two seconds."""
    ours = progress.Progress(attempt / "progress", "agent-loop")
    monkeypatch.setattr(progress, "here", lambda: ours)

    class AgentLoopWorker:
        async def _compute_score(self, number: int) -> None:
            await judge(number)

    progress.count_rewards(SimpleNamespace(AgentLoopWorker=AgentLoopWorker))

    async def ask_all() -> str | None:
        asked = [asyncio.create_task(AgentLoopWorker()._compute_score(number)) for number in range(8)]
        watching = asyncio.create_task(asyncio.to_thread(watch, attempt, 7.0, 2.0))
        found = await watching
        for one in asked:
            one.cancel()
        return found

    return asyncio.run(ask_all())


def test_a_reward_that_never_returns_ends_the_run_in_the_phase_reward(
    attempt: Path, trainer: progress.Progress, monkeypatch: pytest.MonkeyPatch
):
    async def all_but_the_last(number: int) -> None:
        await asyncio.sleep(1000 if number == 7 else 0.1)

    trainer.is_at("rollout", "sampling", 1)
    reason = run_judge(attempt, monkeypatch, all_but_the_last)
    assert reason is not None
    assert "in the phase reward (step 1, sampling, 0 responses and 1 rewards are owed); the reward worker" in reason


def test_a_slow_judge_that_still_answers_is_left_alone(
    attempt: Path, trainer: progress.Progress, monkeypatch: pytest.MonkeyPatch
):
    async def one_a_second(number: int) -> None:
        await asyncio.sleep(number + 1.0)  # the last after 8 s, four times the limit

    trainer.is_at("rollout", "sampling", 1)
    assert run_judge(attempt, monkeypatch, one_a_second) is None


def test_with_responses_owed_the_engine_is_waited_for(attempt: Path, trainer: progress.Progress):
    trainer.is_at("rollout", "sampling", 1)
    progress.Progress(attempt / "progress", "agent-loop").count(owed_responses=3, owed_rewards=1)
    reason = watch(attempt, 20)
    assert reason is not None and "in the phase generation" in reason
    assert "3 responses and 1 rewards are owed); vLLM's engine is not among the processes" in reason


# ------------------------------------------------------------------------------------------------- processes


@pytest.fixture
def engine() -> Iterator[subprocess.Popen[bytes]]:
    """A process under the title that vLLM gives its engine."""
    with subprocess.Popen(["VLLM::EngineCore", "1000"], executable="/bin/sleep") as process:
        yield process
        process.kill()


def test_a_stopped_engine_is_named_with_its_state(engine: subprocess.Popen[bytes]):
    assert stall.waited_for("generation") == f"vLLM's engine (pid {engine.pid}) does nothing"
    engine.send_signal(signal.SIGSTOP)
    time.sleep(0.2)
    assert stall.waited_for("generation") == f"vLLM's engine (pid {engine.pid}) is stopped by a signal"


def test_what_verl_counts_is_written_where_the_launcher_looks(tmp_path: Path):
    (tmp_path / "attempts/3").mkdir(parents=True)
    (tmp_path / "latest").symlink_to("attempts/3")
    progress.of_run(str(tmp_path), "worker").count(batches=2)
    assert json.loads((tmp_path / "attempts/3/progress/worker.json").read_text()) == {"batches": 2}
    nothing: Any = progress.of_run(None, "worker")
    nothing.count(batches=1)  # a user's own command without a run folder
