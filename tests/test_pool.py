"""The processes that run math-verify: limited, killed, replaced, gone with their owner; from threads and forks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from verl_stack import environment

from data_prep.grading import worker
from data_prep.grading.pool import Pool, Ungraded, _Line, _Program

pytest.importorskip("math_verify", reason="math-verify is not installed (make setup)")

GOLD, RIGHT, WRONG = "(x+1)^2", "x^2+2x+1", "x^2+2x+2"
SLOW = ("(x+1)^{2008}(y+1)^{999}", "(y+1)^{999}(x^2+2x+1)^{1004}")
"""Equal, which math-verify does not see in two seconds."""


def warm_pool(**limits) -> Pool:
    """A pool whose program has loaded everything, with one idle worker."""
    pool = Pool(**limits)
    while len(pool.processes()) < 2:  # a worker forked before that is not kept
        assert pool.is_right([GOLD], RIGHT)
    return pool


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """Patient, so that no verdict depends on the machine."""
    pool = warm_pool(limit_seconds=120)
    yield pool
    pool.close()


@pytest.fixture
def hasty(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """What makes the pool patient again; until then it gives a call two seconds."""
    monkeypatch.setattr(pool, "limit_seconds", 2.0)
    return monkeypatch.undo


def gone(pids: list[int], seconds: float = 120) -> bool:
    """Whether all of them end in time; a zombie has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(running(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def running(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        (GOLD, RIGHT, True),
        (GOLD, WRONG, False),
        (r"\sqrt{8}", r"2\sqrt{2}", True),
        (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}", True),
        ("x=5", "5", True),
        ("x=5", "6", False),
        (r"N(n)=\lfloor\frac{2 n}{3}\rfloor+1", "996000", False),
        (r"x^2-y", "z = x^2-y", True),
        ("x=5", "y=5", False),
        (r"x \in [-2,7]", "[-2,7]", True),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ \sqrt{4} \end{pmatrix}", True),
        (r"4.6 \times 10^{-24}", r"3 \cdot 10^{-24} + 10^{-25}", False),  # math-verify: both are 0
        (r"\pi", r"\frac{355}{113}", False),
        (r"\text{Evelyn}", "5", False),
        ("", "", False),
    ],
)
def test_a_verdict(pool, gold, answer, equal):
    assert pool.is_right([gold], answer) is equal


def test_one_of_several_right_answers_is_enough(pool):
    assert pool.is_right([WRONG, GOLD], RIGHT)


def test_at_the_time_limit_there_is_no_verdict_and_the_next_one_is_right(pool, hasty):
    with pytest.raises(Ungraded, match="not finished after 2 s"):
        pool.is_right([SLOW[0]], SLOW[1])
    hasty()
    assert pool.is_right([GOLD], RIGHT)


def test_slow_answers_do_not_wait_for_one_another():
    pool = warm_pool(limit_seconds=600, max_workers=6)
    with ThreadPoolExecutor(6) as threads:
        verdicts = [threads.submit(outcome, pool, SLOW) for _ in range(6)]
        while len(pool.processes()) < 1 + 6:  # the program, and a worker for each at the same time
            time.sleep(0.05)
        kill_children_of(pool, 12)
        assert all("died twice" in str(verdict.result()) for verdict in verdicts)
    pool.close()


def test_killed_while_idle_nobody_notices(pool):
    assert pool.is_right([GOLD], RIGHT)
    for pid in pool.processes()[1:]:
        os.kill(pid, signal.SIGKILL)
    assert pool.is_right([GOLD], RIGHT)


def test_killed_while_grading_another_takes_over(pool, hasty):
    verdicts: list[object] = []
    program = pool.processes()[0]
    thread = threading.Thread(target=lambda: verdicts.append(outcome(pool, SLOW)))
    thread.start()
    time.sleep(0.5)
    for pid in pool.processes()[1:]:
        os.kill(pid, signal.SIGKILL)
    thread.join()
    assert verdicts == ["not finished after 2 s"]  # it went on in another worker, within the same two seconds
    hasty()
    assert pool.is_right([GOLD], RIGHT)
    assert pool.processes()[0] == program  # which has everything loaded


def outcome(pool: Pool, pair: tuple[str, str]) -> object:
    try:
        return pool.is_right([pair[0]], pair[1])
    except Ungraded as reason:
        return str(reason)


def test_killed_twice_there_is_no_verdict():
    pool = warm_pool(limit_seconds=20)
    killer = threading.Thread(target=kill_children_of, args=(pool, 2))
    killer.start()
    assert "died twice" in str(outcome(pool, SLOW))
    killer.join()
    assert pool.is_right([GOLD], RIGHT)
    pool.close()


def kill_children_of(pool: Pool, times: int) -> None:
    killed: set[int] = set()
    while len(killed) < times:
        time.sleep(0.3)
        for pid in set(pool.processes()[1:]) - killed:
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)


def test_a_program_that_is_still_loading_is_waited_for(monkeypatch):
    """Its first fork comes after what it loads on the way, which takes longer than a fork may later."""
    monkeypatch.setattr("data_prep.grading.pool.FORK_SECONDS", 1e-4)
    pool = Pool(limit_seconds=20)
    assert pool.is_right([GOLD], RIGHT)
    pool.close()


def test_with_its_program_killed_the_pool_starts_a_new_one():
    pool = warm_pool()
    before = pool.processes()
    os.kill(before[0], signal.SIGKILL)
    assert gone(before)  # the kernel ends the children
    assert pool.is_right([GOLD], RIGHT)
    assert not set(before) & set(pool.processes())
    pool.close()


def test_killed_while_it_starts_it_is_started_again_at_once():
    pool = Pool(limit_seconds=20)
    pool.prepare()
    os.kill(pool.processes()[0], signal.SIGKILL)
    assert pool.is_right([GOLD], RIGHT)
    pool.close()


class Clock:
    """The pool's time, which moves when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("data_prep.grading.pool.time", SimpleNamespace(monotonic=lambda: self.now))


class Starts:
    """Programs that are killed, or hang, while they start, as long as `fails` says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, hang: bool = False) -> None:
        self.fails, self.count, begin = True, 0, _Program.__init__
        if hang:
            monkeypatch.setattr("data_prep.grading.pool.START_SECONDS", 0.01)

        def start(program: _Program) -> None:
            self.count += 1
            begin(program)
            if self.fails:
                program.process.send_signal(signal.SIGSTOP if hang else signal.SIGKILL)

        monkeypatch.setattr(_Program, "__init__", start)


@pytest.mark.parametrize(("hang", "why"), [(False, "it ended while starting"), (True, "TimeoutError: timed out")])
def test_a_program_that_does_not_start_is_tried_again_after_pauses_that_double_and_is_never_given_up(
    monkeypatch, caplog, hang, why
):
    clock, starts = Clock(monkeypatch), Starts(monkeypatch, hang=hang)
    pool = Pool(limit_seconds=20)
    for pause in (1, 2, 4, 8, 16, 32, 60, 60):
        before = starts.count
        assert why in str(outcome(pool, (GOLD, RIGHT))) and starts.count == before + 2  # twice at once
        clock.now += 0.9 * pause
        assert why in str(outcome(pool, (GOLD, RIGHT))) and starts.count == before + 2  # not before the pause is over
        clock.now += 0.2 * pause
    starts.fails = False  # whatever held it up is over
    monkeypatch.setattr("data_prep.grading.pool.START_SECONDS", 60.0)
    assert pool.is_right([GOLD], RIGHT)
    assert "for 60 s" in caplog.text and "Install math-verify" not in caplog.text
    pool.close()


def test_a_place_in_line_is_given_to_whoever_has_waited_longest():
    line, order = _Line(1), []

    def wait_for_a_place(number: int) -> None:
        assert line.enter(60)
        order.append(number)
        line.leave()

    assert line.enter(0)
    threads = [threading.Thread(target=wait_for_a_place, args=(number,)) for number in range(6)]
    for number, thread in enumerate(threads, 1):
        thread.start()
        while line.waiting < number:  # it is in line before the next one comes
            time.sleep(0.001)
    line.leave()
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3, 4, 5]


def test_one_that_waited_in_vain_leaves_the_line_and_takes_no_place():
    line = _Line(1)
    assert line.enter(0) and not line.enter(0.001)
    assert line.waiting == 0
    line.leave()
    assert line.enter(0)


def test_without_a_free_worker_in_time_there_is_no_verdict():
    pool = Pool(max_workers=1, wait_seconds=0.01)
    assert pool.line.enter(0)  # the only one is busy
    assert outcome(pool, (GOLD, RIGHT)) == "no worker was free for 0.01 s"
    pool.line.leave()
    assert pool.is_right([GOLD], RIGHT)
    pool.close()


def test_closed_it_leaves_no_process():
    pool = warm_pool()
    pids = pool.processes()
    pool.close()
    assert len(pids) == 2 and gone(pids)


def test_many_threads_get_their_own_verdicts():
    pool = warm_pool(limit_seconds=60, max_workers=12)
    golds = [f"(x+{n})^2" for n in range(60)]
    answers = [f"x^2+{2 * n}x+{n * n + n % 3}" for n in range(60)]  # right for every third
    with ThreadPoolExecutor(12) as threads:
        verdicts = list(threads.map(lambda pair: pool.is_right([pair[0]], pair[1]), zip(golds, answers, strict=True)))
    assert verdicts == [n % 3 == 0 for n in range(60)]
    pool.close()


def test_no_more_workers_than_allowed():
    pool = Pool(max_workers=2)
    with ThreadPoolExecutor(6) as threads:
        list(threads.map(lambda n: pool.is_right([f"x+{n}"], f"{n}+x"), range(30)))
    assert len(pool.processes()) <= 3
    pool.close()


def test_the_event_loop_turns_while_a_slow_answer_is_graded(pool, hasty):
    async def count_ticks() -> int:
        slow = asyncio.get_running_loop().run_in_executor(None, outcome, pool, SLOW)
        ticks = 0
        while not slow.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks

    assert asyncio.run(count_ticks()) > 2  # of 200


def test_a_forked_process_has_workers_of_its_own(pool):
    assert pool.is_right([GOLD], RIGHT)
    ours = pool.processes()
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        right = pool.processes() == [] and pool.is_right([GOLD], RIGHT) and not pool.is_right([GOLD], WRONG)
        os.write(writable, b"right" if right else b"wrong")
        os._exit(0)  # without closing the pool: the end of the process has to be enough
    os.close(writable)
    assert os.read(readable, 10) == b"right"
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert pool.processes() == ours and pool.is_right([GOLD], RIGHT)


@pytest.mark.parametrize("busy", [False, True])
def test_its_workers_end_when_their_owner_is_killed(busy):
    code = (
        "import sys, threading, time\n"
        "from data_prep.grading.pool import Pool\n"
        "pool = Pool(limit_seconds=600)\n"
        "while len(pool.processes()) < 2: assert pool.is_right(['x+1'], '1+x')\n"
        f"busy = {busy} and threading.Thread(target=pool.is_right, args=([{SLOW[0]!r}], {SLOW[1]!r}), daemon=True)\n"
        "busy and busy.start()\n"
        "time.sleep(0.3)\n"
        "print(*pool.processes(), flush=True)\n"
        "time.sleep(600)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment())
    pids = [int(pid) for pid in owner.stdout.readline().split()]
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert len(pids) == 2 and gone(pids)


def test_memory_is_limited(pool):
    assert pool.is_right([GOLD], RIGHT)
    for pid in pool.processes()[1:]:
        soft, hard = psutil.Process(pid).rlimit(psutil.RLIMIT_AS)
        assert soft == hard < 2 * worker.MEMORY_BYTES
        assert psutil.Process(pid).rlimit(psutil.RLIMIT_FSIZE) == (0, 0)


def in_worker(code: str) -> subprocess.CompletedProcess[str]:
    """A process that is prepared and limited as a worker is, and then runs `code`."""
    program = f"import sys\nfrom data_prep.grading import worker\nworker._prepare()\nworker.limit()\n{code}"
    return run(program)


def run(program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60)


@pytest.mark.parametrize(
    "code",
    [
        "open({path!r}, 'w')",
        "open({path!r}, 'ab')",
        "import os; os.open({path!r}, os.O_CREAT | os.O_WRONLY)",
        "import os; os.system('touch ' + {path!r})",
        "import subprocess; subprocess.run(['touch', {path!r}])",
        "import os; os.mkdir({path!r})",
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import ctypes; ctypes.CDLL(None)",
    ],
)
def test_a_worker_ends_at_what_grading_never_does(code, tmp_path):
    path = str(tmp_path / "made")
    done = in_worker(code.format(path=path) + "\nprint('went on')")
    assert (done.returncode, done.stdout) == (worker.REFUSED_EXIT, "")
    assert not Path(path).exists()


def test_a_worker_has_no_more_memory_than_its_limit():
    done = in_worker("try:\n    bytearray(2**30)\nexcept MemoryError:\n    print('refused')")
    assert done.stdout == "refused\n"


def test_a_worker_knows_that_its_memory_ran_short():
    code = "print(worker.nearly_ran_out()); bytearray(worker.MEMORY_BYTES * 7 // 8); print(worker.nearly_ran_out())"
    assert in_worker(code).stdout == "False\nTrue\n"


@pytest.mark.parametrize("text", ["1+1", "__import__('os').getcwd()", "open('x')", "(1)"])
def test_sympy_evaluates_no_text_in_a_worker(text):
    done = in_worker(f"import sympy\ntry:\n    sympy.sympify({text!r})\nexcept PermissionError:\n    print('refused')")
    assert done.stdout == "refused\n", done.stderr


def test_numerals_and_names_are_what_sympy_makes_of_them():
    names = ["7", "-7", "1.50", ".5", "2.", "1.5e3", "x", "pi", "I", "gamma"]
    code = f"import sympy; print([sympy.srepr(sympy.sympify(name)) for name in {names}])"
    assert in_worker(code).stdout == run(code).stdout != ""


def test_without_math_verify_the_reason_is_said_and_nothing_is_tried_again():
    code = (
        "import sys, time\n"
        "sys.path = [path for path in sys.path if 'site-packages' not in path]\n"
        "from data_prep.grading.pool import Pool, Ungraded\n"
        "pool = Pool()\n"
        "for _ in range(2):\n"
        "    try: pool.is_right(['x+1'], '1+x')\n"
        "    except Ungraded as reason: print(reason)\n"
        "print(pool.processes())\n"
    )
    done = run(code)
    reason = "the program that runs math-verify does not start (ModuleNotFoundError: No module named 'math_verify')"
    assert done.stdout.splitlines() == [reason, reason, "[]"], done.stderr
    assert "Install math-verify" in done.stderr
