"""A Ray session of our own on this machine: the guardian process seen from `klreg run`."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from select import select
from typing import Any

import psutil

from launch import guardian

CLOSE_SECONDS = 30.0
GONE = "The process that holds Ray and its workers was killed. Run the same command again."


WITH_ITS_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""A program that becomes its arguments, and gets SIGTERM when its parent dies (PR_SET_PDEATHSIG, Linux)."""


@dataclass(frozen=True)
class End:
    """How a run's driver ended."""

    code: int
    lost: str | None = None
    """Why the guardian had to end it, if it had to."""


class Session:
    """One Ray head; runs follow each other on it."""

    def __init__(self, process: subprocess.Popen[bytes], address: str) -> None:
        self._process = process
        self._unread = b""
        self.address = address

    def start(self, argv: list[str], environment: Mapping[str, str], log: Path) -> None:
        """Start a run's driver on this Ray."""
        variables = {"RAY_ADDRESS": self.address, **environment}
        self._send(run=argv, environment=variables, log=str(log))

    def end(self, reason: str) -> None:
        """Kill the run's driver; `wait` then tells the reason."""
        self._send(end=reason)

    def wait(self, seconds: float) -> End | None:
        """How the run ended, if it ends within `seconds`, else None.

        Raises:
            RuntimeError: the guardian itself is gone.
        """
        message = self._receive(seconds)
        return None if message is None else End(message["exit"], message["lost"])

    def _send(self, **message: Any) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError(GONE) from None

    def _receive(self, seconds: float) -> dict[str, Any] | None:
        """The next message, None if none comes within `seconds`."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self._unread:
            if not select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            chunk = os.read(self._process.stdout.fileno(), 65536)
            if not chunk:
                raise RuntimeError(GONE)
            self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        message = json.loads(line)
        if "failed" in message:
            raise RuntimeError(message["failed"])
        return message


class AttachedSession:
    """A Ray that somebody else started, and ends; only the runs' drivers are ours."""

    def __init__(self, address: str, environment: Mapping[str, str]) -> None:
        self.address, self._environment = address, dict(environment)
        self._driver: subprocess.Popen[bytes] | None = None
        self._lost: str | None = None

    def start(self, argv: list[str], environment: Mapping[str, str], log: Path) -> None:
        """Start a run's driver on that Ray. No guardian holds it: it hears of our death, and has the run's lock until
        its own."""
        variables = {**self._environment, "RAY_ADDRESS": self.address, **environment}
        command = [sys.executable, "-I", "-c", WITH_ITS_PARENT, *argv]
        with open(log, "ab") as out:
            self._lost = None
            self._driver = subprocess.Popen(
                command,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                close_fds=False,  # store.RunFolder.lock's file is the only one that a child inherits
            )

    def wait(self, seconds: float) -> End | None:
        """How the run ended, if it ends within `seconds`, else None."""
        assert self._driver is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            return End(self._driver.wait(seconds), self._lost)
        return None

    def end(self, reason: str) -> None:
        """Kill the run's driver; `wait` then tells the reason."""
        assert self._driver is not None
        self._lost = reason
        self._driver.kill()

    def close(self) -> None:
        """End the driver, if it still runs; Ray then ends the run's workers on every node."""
        if self._driver is not None and self._driver.poll() is None:
            self._driver.terminate()
            if self.wait(CLOSE_SECONDS) is None:
                self._driver.kill()
                self._driver.wait()


@contextmanager
def attached_session(address: str, environment: Mapping[str, str]) -> Iterator[AttachedSession]:
    """Runs on an existing Ray; `address` as RAY_ADDRESS has it, e.g. 10.0.0.1:6379."""
    session = AttachedSession(address, environment)
    try:
        yield session
    finally:
        session.close()


@contextmanager
def ray_session(place: guardian.Place, environment: Mapping[str, str]) -> Iterator[Session]:
    """Start Ray as `place` says, and end all that was started on leaving.

    Raises:
        RuntimeError: Ray did not start; its own last lines are in the message.
    """
    process = _spawn(place, environment)
    try:
        session = Session(process, "")
        ready = session._receive(guardian.START_SECONDS + 10)
        if ready is None:
            raise RuntimeError(f"Ray was not ready after {guardian.START_SECONDS:.0f} s.")
        session.address = ready["ready"]
        yield session
    finally:
        _close(process)


def _spawn(place: guardian.Place, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", guardian.__file__]  # by its path: users have folders called "launch", too
    command.append(json.dumps(asdict(place)))
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=dict(environment),
        start_new_session=True,  # Ctrl-C reaches `klreg run` only, which then closes the pipe
    )


def _close(process: subprocess.Popen[bytes]) -> None:
    """Close the guardian's input and wait until it has ended everything; only what is below it is ever ended."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    if not _ends(process.stdout.fileno(), CLOSE_SECONDS) and process.poll() is None:
        guardian.end(guardian.below(psutil.Process(process.pid)))
        if not _ends(process.stdout.fileno(), CLOSE_SECONDS):
            process.kill()
    process.wait()
    process.stdout.close()


def _ends(descriptor: int, seconds: float) -> bool:
    """Whether all processes that can write to the pipe end within `seconds`."""
    deadline = time.monotonic() + seconds
    while select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
        if not os.read(descriptor, 65536):
            return True
    return False
