"""How far a run is, written while it runs, for the launcher that ends a run which stands still (launch/stall.py).

Each process of the run that has something to say rewrites one small file in the attempt's folder `progress/`: the
trainer where it is in a step, workers how many responses, rewards and micro-batches they have finished and still owe.
The launcher may be on another machine, with another clock: it looks at what the files say, never at when.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from klreg_verl.experiment.store import RunFolder

TRAINER = "trainer"
WRITE_SECONDS = 1.0
"""A worker writes no more often: a shared file system is slow."""


class Progress:
    """This process's part."""

    def __init__(self, folder: Path | None, name: str) -> None:
        self.file = folder and folder / f"{name}.json"
        self.said: Counter[str] = Counter()
        self.next_write = 0.0
        self.later: asyncio.TimerHandle | None = None

    def is_at(self, phase: str, doing: str, step: int) -> None:
        """The trainer begins another part of its work: `phase` is start, rollout or update."""
        self._write({"phase": phase, "doing": doing, "step": step})

    def count(self, **changes: int) -> None:
        """Add to what this process has finished ("responses", "rewards", "batches") or owes ("owed_...")."""
        self.said.update(changes)
        wait = self.next_write - time.monotonic()
        if wait <= 0:
            self._write_counts()
        elif self.later is None:
            with contextlib.suppress(RuntimeError):  # no loop: the next count comes soon, or the work is over
                self.later = asyncio.get_running_loop().call_later(wait, self._write_counts)

    def _write_counts(self) -> None:
        self.later, self.next_write = None, time.monotonic() + WRITE_SECONDS
        self._write(dict(self.said))

    def _write(self, values: dict[str, Any]) -> None:
        if self.file is not None:
            self.file.parent.mkdir(exist_ok=True)
            new = self.file.with_suffix(".new")
            new.write_text(json.dumps(values))
            new.replace(self.file)


def of_run(run: str | None, name: str) -> Progress:
    """`name`.json in the newest attempt of the run folder `run`; without one nothing is written."""
    return Progress(RunFolder(Path(run)).latest.resolve() / "progress" if run else None, name)


@functools.cache
def here() -> Progress:
    """Of a worker: one file a process."""
    return of_run(os.environ.get("KLREG_RUN"), f"{socket.gethostname()}-{os.getpid()}")


def count_responses(module: ModuleType) -> None:
    """Every request for a response passes through verl's client, whatever the agent loop.

    Args:
        module: verl.workers.rollout.llm_server.
    """
    module.LLMServerClient.generate = _counted(module.LLMServerClient.generate, "responses")


def count_rewards(module: ModuleType) -> None:
    """Every reward that is asked for while other responses are sampled passes here.

    Args:
        module: verl.experimental.agent_loop.agent_loop.
    """
    module.AgentLoopWorker._compute_score = _counted(module.AgentLoopWorker._compute_score, "rewards")


def count_batches(engine: Any) -> None:
    """Every micro-batch of a training engine, with a gradient or without."""
    original = engine.forward_step

    def counted(*args: Any, **kwargs: Any) -> Any:
        here().count(batches=1)
        return original(*args, **kwargs)

    engine.forward_step = counted


def _counted(original: Callable[..., Any], what: str) -> Callable[..., Any]:
    @functools.wraps(original)
    async def counted(*args: Any, **kwargs: Any) -> Any:
        here().count(**{f"owed_{what}": 1})
        try:
            return await original(*args, **kwargs)
        finally:
            here().count(**{f"owed_{what}": -1, what: 1})

    return counted
