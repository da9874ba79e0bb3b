"""vLLM in a process of its own: started, followed, ended. Whatever happens here, none is left behind.

A process of its own, because vLLM wants its environment set before the first import, keeps its memory until it ends,
and may be killed for it. It is killed by the kernel when this one dies, and with its whole process group when we leave.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from select import select
from typing import Any

from klreg_verl.evaluation.worker import Order

SILENCE_SECONDS = 1800.0
"""Longest time without a message: a large model takes its time to load, a part of samples is written every 20 s."""
END_SECONDS = 20.0
LOG_LINES = 15

Message = dict[str, Any]


def run(order: Order, log: Path, tell: Callable[[Message], None], silence: float = SILENCE_SECONDS) -> None:
    """Sample all that the order asks for.

    Args:
        order: what.
        log: file for what vLLM prints.
        tell: given every message of the process (worker.py).
        silence: longest time without a message [s].

    Raises:
        RuntimeError: vLLM failed, was killed, or said nothing for too long; with the last lines of its log. What was
            sampled by then is on the disk, and the same call goes on from there.
    """
    with process(order, log) as (child, messages):
        for message in messages(silence):
            if message["event"] == "failed":
                raise RuntimeError(f"vLLM: {message['reason']}\n{_excerpt(log)}")
            tell(message)
            if message["event"] == "done":
                return
        raise RuntimeError(f"{_end(child)}\n{_excerpt(log)}")


@contextlib.contextmanager
def process(order: Order, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[float], Iterator[Message]]]]:
    """The process at work, and an iterator over its messages; on leaving it is ended with all that it started."""
    command = [sys.executable, "-m", "klreg_verl.evaluation.worker"]
    with open(log, "ab") as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            env=environment(order.platform),
            start_new_session=True,
        )
    try:
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(json.dumps(asdict(order)).encode() + b"\n")
            child.stdin.close()
        yield child, lambda silence: _messages(child, silence)
    finally:
        end(child)


def environment(platform: str) -> dict[str, str]:
    """Of the process: the user's own, completed by what vLLM needs here."""
    from klreg_verl.verl_hooks import cpu

    ours = cpu.ENVIRONMENT if platform == "cpu" else {}
    # one process less, whose end would have to be watched, too
    return {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", **ours, **os.environ}


def end(child: subprocess.Popen[bytes]) -> None:
    """Waits a moment for a process that is done anyway, then kills its group."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(END_SECONDS if child.poll() is None and _is_closing(child) else 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _is_closing(child: subprocess.Popen[bytes]) -> bool:
    """Whether its side of the pipe is closed, or a last message waits in it."""
    assert child.stdout is not None
    return bool(select([child.stdout], [], [], 0)[0])


def _messages(child: subprocess.Popen[bytes], silence: float) -> Iterator[Message]:
    """Messages until the process closes its side."""
    assert child.stdout is not None
    unread = b""
    while True:
        while b"\n" in unread:
            line, _, unread = unread.partition(b"\n")
            yield json.loads(line)
        if not select([child.stdout], [], [], silence)[0]:
            raise RuntimeError(f"vLLM said nothing for {silence:.0f} s and was ended. Run the same command again.")
        chunk = os.read(child.stdout.fileno(), 65536)
        if not chunk:
            return
        unread += chunk


def _end(child: subprocess.Popen[bytes]) -> str:
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(END_SECONDS)
    code = child.poll()
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        why = " (out of memory, most likely)" if name == "SIGKILL" else ""
        return f"The process of vLLM was killed by {name}{why}. Run the same command again: it goes on from there."
    return f"The process of vLLM ended with code {code} before it was done."


def _excerpt(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join([*lines[-LOG_LINES:], f"whole log: {log}"])
