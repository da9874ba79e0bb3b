"""The worker processes of this process: started when first needed, killed at the time limit, replaced at once.

Safe from many threads: each call has a child of its own, forked from one program that has math-verify imported, so a
call that hangs holds up no other. After os.fork the child process forgets its parent's workers and starts its own.
"""

import atexit
import json
import logging
import math
import os
import select
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from data_prep.grading import worker

logger = logging.getLogger(__name__)

LIMIT_SECONDS = 2.0
MAX_WORKERS = max(4, min(16, os.cpu_count() or 1))
"""Children at most; more calls at a time than that wait for one. With many more than cores, none would get its two
seconds' worth."""
START_SECONDS = 60.0
"""For importing math-verify, which a cold network file system makes slow. It is no part of any answer's limit."""
FORK_SECONDS = 5.0
"""For a fork, once the program has loaded everything; until then it may be busy with that for START_SECONDS."""
LEAST_SECONDS = 0.2
"""What a call gets at least when its first child died and another one takes over."""
WAIT_SECONDS = 30.0
"""What a call waits for a child at most, first come, first served."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Before a program that did not start is tried again; each failure in a row doubles it."""


class Ungraded(Exception):
    """There is no verdict: the time limit was reached, or the worker died twice. Its text says which."""


class _Gone(Exception):
    """A process of ours is no more."""


class _Failed(Exception):
    """The program did not start: it was killed, or took too long. It may start the next time."""


class _Missing(_Failed):
    """The program reported that what it imports is not there, so it will never start."""


@dataclass(frozen=True)
class _Child:
    """One forked grader."""

    pid: int
    link: socket.socket
    program: "_Program"
    is_warm: bool
    """Forked after the program had loaded everything that grading loads on the way."""

    def is_idle(self) -> bool:
        """Alive with nothing to read: a closed link reads as ready."""
        poll = select.poll()
        poll.register(self.link, select.POLLIN)
        return not poll.poll(0)

    def ask(self, request: bytes, seconds: float) -> dict[str, Any]:
        """Its reply. Raises TimeoutError after `seconds`, _Gone if it died."""
        self.link.settimeout(seconds)
        try:
            self.link.send(request)
            reply = self.link.recv(worker.MAX_MESSAGE)
        except TimeoutError:
            raise
        except OSError as error:
            raise _Gone from error
        if not reply:
            raise _Gone
        return json.loads(reply)


class _Program:
    """The process that has math-verify imported and forks children."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.process = self._start(theirs)
        theirs.close()  # or its end would go unnoticed
        self._is_ready = False

    def _start(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        # -I and -S: neither the environment nor .pth files change what it imports, and it starts sooner
        paths = [path for path in sys.path if os.path.isabs(path)]
        program = [sys.executable, "-I", "-S", worker.__file__, str(theirs.fileno()), json.dumps(paths)]
        none = subprocess.DEVNULL
        return subprocess.Popen(program, pass_fds=[theirs.fileno()], stdin=none, stdout=none, stderr=none, cwd="/")

    def _await_ready(self) -> None:
        self._control.settimeout(START_SECONDS)
        try:
            reply = json.loads(self._control.recv(worker.MAX_MESSAGE) or b'{"failed": "it ended while starting"}')
        except OSError as error:
            reply = {"failed": f"{type(error).__name__}: {error}"}
        if "failed" in reply:
            kind = _Missing if reply.get("missing") else _Failed
            raise kind(f"the program that runs math-verify does not start ({reply['failed']})")
        self._is_ready = True

    def fork(self) -> _Child:
        """A new child. Raises _Gone or TimeoutError if the program is dead or does not answer, _Failed if it cannot
        start."""
        if not self._is_ready:
            self._await_ready()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            socket.send_fds(self._control, [b'{"task": "fork"}'], [theirs.fileno()])
            reply = self._control.recv(worker.MAX_MESSAGE)
        except TimeoutError:
            raise
        except OSError as error:
            raise _Gone from error
        finally:
            theirs.close()
        if not reply:
            raise _Gone
        made = json.loads(reply)
        if made["warm"]:
            self._control.settimeout(FORK_SECONDS)
        return _Child(made["pid"], ours, self, made["warm"])

    def bury(self, child: _Child) -> None:
        """Has a child killed, without waiting for it. Raises _Gone if the program is dead."""
        try:
            self._control.send(json.dumps({"task": "bury", "pid": child.pid}).encode())
        except OSError as error:
            raise _Gone from error

    def end(self) -> None:
        """Ends the program; the kernel ends its children."""
        self.forget()
        self.process.kill()
        self.process.wait()

    def forget(self) -> None:
        """Closes our end of the socket, which is what the program lives by."""
        self._control.close()


class _Line:
    """A number of places, given in the order in which they were asked for."""

    def __init__(self, places: int) -> None:
        self._lock = threading.Lock()
        self._free = places
        self._waiting: deque[threading.Event] = deque()

    def enter(self, seconds: float) -> bool:
        """Takes a place; False if none came free in time."""
        mine = threading.Event()
        with self._lock:
            if self._free:
                self._free -= 1
                return True
            self._waiting.append(mine)
        try:
            came = mine.wait(seconds)
        except BaseException:
            self._give_up(mine)
            raise
        return came or not self._give_up(mine, keep=True)

    def _give_up(self, mine: threading.Event, *, keep: bool = False) -> bool:
        """Leaves the line; False where the place had just come, which is then kept or passed on."""
        with self._lock:
            if mine in self._waiting:
                self._waiting.remove(mine)
                return True
        if not keep:
            self.leave()
        return False

    def leave(self) -> None:
        """Hands the place to whoever has waited longest."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._free += 1

    @property
    def waiting(self) -> int:
        """How many are in line."""
        return len(self._waiting)


class Pool:
    """Graders of this process. One is enough; tests make their own with other limits."""

    def __init__(
        self,
        *,
        limit_seconds: float = LIMIT_SECONDS,
        max_workers: int = MAX_WORKERS,
        wait_seconds: float = WAIT_SECONDS,
    ) -> None:
        self.limit_seconds = limit_seconds
        self.max_workers = max_workers
        self.wait_seconds = wait_seconds
        self._reset()
        _POOLS.add(self)

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self.line = _Line(self.max_workers)
        self._idle: list[_Child] = []
        self._busy: set[_Child] = set()
        self._program: _Program | None = None
        self._broken = ""
        self._pause, self._tried_again_at = 0.0, 0.0

    def is_right(self, golds: Sequence[str], answer: str) -> bool:
        """math-verify's verdict on whether an expression in LaTeX equals one of `golds`. Raises Ungraded."""
        return any(self.verdicts([(gold, answer) for gold in golds]))

    def verdicts(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """math-verify's verdict on each pair of a right answer and an answer, expressions in LaTeX.

        Raises:
            Ungraded: no verdicts within `limit_seconds` for all of them, no free child within
                `wait_seconds`, or the worker died (killed, out of memory) and so did the one that took over.
        """
        request = json.dumps({"pairs": list(pairs)}).encode()
        if len(request) > worker.MAX_MESSAGE:
            raise Ungraded(f"the expressions are longer than {worker.MAX_MESSAGE} bytes")
        if not self.line.enter(self.wait_seconds):
            raise Ungraded(f"no worker was free for {self.wait_seconds:g} s")
        try:
            return self._ask(request, retries=1, left=self.limit_seconds)
        finally:
            self.line.leave()

    def _ask(self, request: bytes, *, retries: int, left: float) -> list[bool]:
        child = self._take()
        begun = time.monotonic()
        try:
            reply = child.ask(request, left)
        except TimeoutError:
            self._bury(child)
            if not child.is_warm:  # it may have spent its time on loading; by now the program has
                return self._ask(request, retries=retries, left=self.limit_seconds)
            raise Ungraded(f"not finished after {self.limit_seconds:g} s") from None
        except _Gone:
            self._bury(child)
            if not retries:
                raise Ungraded("the worker died twice: killed, out of memory, or about to do what it may not") from None
            left = max(LEAST_SECONDS, left - (time.monotonic() - begun))
            return self._ask(request, retries=retries - 1, left=left)
        except BaseException:  # an interrupt of ours: the reply to come must not be taken for another's
            self._bury(child)
            raise
        self._return(child)
        if "error" in reply:
            raise Ungraded(reply["error"])
        return [bool(equal) for equal in reply["equal"]]

    def _take(self) -> _Child:
        with self._lock:
            while self._idle:
                child = self._idle.pop()
                if child.is_idle():
                    self._busy.add(child)
                    return child
                self._bury(child)
            child = self._fork()
            self._busy.add(child)
            return child

    def _return(self, child: _Child) -> None:
        if not child.is_warm:
            self._bury(child)
            return
        with self._lock:
            self._busy.discard(child)
            self._idle.append(child)

    def _fork(self) -> _Child:
        """A child of the program; of a new program if the one we had is dead."""
        if self._broken and time.monotonic() < self._tried_again_at:
            raise Ungraded(self._broken)
        why = ""
        for _ in range(2):
            self._program = self._program or _Program()
            try:
                child = self._program.fork()
            except (_Gone, TimeoutError) as error:
                what = "does not answer" if isinstance(error, TimeoutError) else "ends as soon as it is started"
                why = f"the program that runs math-verify {what}"
            except _Missing as error:
                self._give_up(str(error))
            except _Failed as error:
                why = str(error)
            else:
                self._broken, self._pause = "", 0.0
                return child
            self._end_program()
        self._try_later(why)

    def _give_up(self, why: str) -> NoReturn:
        self._end_program()
        self._broken, self._tried_again_at = why, math.inf
        logger.error("No answer can be verified: %s. Install math-verify (make setup).", why)
        raise Ungraded(why)

    def _try_later(self, why: str) -> NoReturn:
        """Leaves the program alone for a while: a machine that is short of memory or busy is not helped by starts."""
        self._pause = min(max(2 * self._pause, FIRST_PAUSE), LONGEST_PAUSE)
        self._broken, self._tried_again_at = why, time.monotonic() + self._pause
        logger.warning("No answer can be verified for %g s: %s. Then it is started again.", self._pause, why)
        raise Ungraded(why)

    def prepare(self) -> None:
        """Starts the program, without waiting for it, so that it is there when the first answer needs it."""
        with self._lock:
            if not self._broken:
                self._program = self._program or _Program()

    def _bury(self, child: _Child) -> None:
        """Ends a child; if its program is gone, that took its children along."""
        child.link.close()
        with self._lock:
            self._busy.discard(child)
            if child.program is self._program:
                try:
                    child.program.bury(child)
                except _Gone:
                    self._end_program()

    def _end_program(self) -> None:
        if self._program:
            self._program.end()
        self._program = None

    def processes(self) -> list[int]:
        """The pids of the program, if there is one, and of its children."""
        with self._lock:
            children = [child.pid for child in (*self._idle, *self._busy)]
            return [*([self._program.process.pid] if self._program else []), *children]

    def close(self) -> None:
        """Ends all processes of the pool. It starts new ones if it is used again."""
        with self._lock:
            for child in self._idle:
                child.link.close()
            self._idle.clear()
            self._end_program()

    def forget(self) -> None:
        """In a process forked from the owner: lets go of the owner's workers, which live on for the owner."""
        for child in (*self._idle, *self._busy):
            child.link.close()
        if self._program:
            self._program.forget()
            self._program.process.returncode = 0  # not ours to wait for
        self._reset()


_POOLS: weakref.WeakSet[Pool] = weakref.WeakSet()


def _forget_all() -> None:
    for pool in list(_POOLS):
        pool.forget()


@atexit.register
def _close_all() -> None:
    for pool in list(_POOLS):
        pool.close()


os.register_at_fork(after_in_child=_forget_all)
