"""A Ray session of our own on this machine: the guardian process seen from `klreg run`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from select import select
from typing import Any

from launch import guardian

CLOSE_SECONDS = 30.0


class Session:
    """One Ray head; runs follow each other on it."""

    def __init__(self, process: subprocess.Popen[str], address: str) -> None:
        self._process = process
        self.address = address

    def start(self, argv: list[str], environment: Mapping[str, str], log: Path) -> None:
        """Start a run's driver on this Ray."""
        variables = {"RAY_ADDRESS": self.address, **environment}
        self._send(run=argv, environment=variables, log=str(log))

    def wait(self, seconds: float) -> int | None:
        """The run's exit code if it ends within `seconds`, else None.

        Raises:
            RuntimeError: the guardian itself is gone.
        """
        message = self._receive(seconds)
        return None if message is None else message["exit"]

    def stop(self) -> None:
        """Interrupt the current run."""
        self._send(stop=signal.SIGTERM)

    def _send(self, **message: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _receive(self, seconds: float) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        if not select([self._process.stdout], [], [], seconds)[0]:
            return None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("The process that holds Ray and its workers was killed. Run the same command again.")
        message = json.loads(line)
        if "failed" in message:
            raise RuntimeError(message["failed"])
        return message


@contextmanager
def ray_session(gpus: int | None, object_store_bytes: int | None, environment: Mapping[str, str]) -> Iterator[Session]:
    """Start Ray with `gpus` (logical on a CPU; None: let Ray count them), and end all that was started on leaving.

    Raises:
        RuntimeError: Ray did not start; its own last lines are in the message.
    """
    guardian.become_subreaper()  # should the guardian be killed, what it held falls to us
    process = _spawn(gpus, object_store_bytes, environment)
    try:
        session = Session(process, "")
        ready = session._receive(guardian.START_SECONDS + 10)
        if ready is None:
            raise RuntimeError(f"Ray was not ready after {guardian.START_SECONDS:.0f} s.")
        session.address = ready["ready"]
        yield session
    finally:
        _close(process)


def _spawn(gpus: int | None, object_store_bytes: int | None, environment: Mapping[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launch.guardian"]
    command += [f"--gpus={gpus}"] if gpus is not None else []
    command += [f"--object-store-bytes={object_store_bytes}"] if object_store_bytes is not None else []
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=dict(environment),
        text=True,
        start_new_session=True,  # Ctrl-C reaches `klreg run` only, which then closes the pipe
    )


def _close(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(CLOSE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
    guardian.end(guardian.descendants())
