"""A session: messages over the pipes, what happens when the other end is gone, and two real Ray heads."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from klreg_verl.experiment.store import RunFolder
from launch import session as sessions
from launch.guardian import Place, below
from launch.session import End, Session, attached_session, ray_session

STORE = 80 * 2**20
"""Ray's smallest object store is 75 MB."""


def stand_in(code: str) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, start_new_session=True)


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that a test started, ended after it."""
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        for one in below(psutil.Process(process.pid)) if process.poll() is None else []:
            one.kill()
        process.kill()
        process.wait()


# ---------------------------------------------------------------------------------------------------- messages


def test_messages_that_arrive_together_or_in_pieces_are_read_one_by_one(started):
    code = """
import os, time
os.write(1, b'{"exit": 1, "lost": null}\\n{"exit": 2, "lost": null}\\n{"exit"')
time.sleep(0.3)
os.write(1, b': 3, "lost": "killed"}\\n')
time.sleep(60)
"""
    started.append(stand_in(code))
    session = Session(started[0], "")
    assert [session.wait(120) for _ in range(3)] == [End(1), End(2), End(3, "killed")]
    assert session.wait(0.05) is None


def test_a_guardian_that_is_gone_is_said_in_words_when_reading_and_when_writing(started, tmp_path):
    started.append(stand_in("pass"))
    session = Session(started[0], "")
    started[0].wait()
    with pytest.raises(RuntimeError, match="was killed. Run the same command again"):
        session.wait(5)
    with pytest.raises(RuntimeError, match="was killed. Run the same command again"):
        session.start(["true"], {"X": "y" * 100_000}, tmp_path / "log")
    sessions._close(started[0])  # what could not be written is no error now


def test_a_failure_that_the_guardian_tells_is_raised(started):
    started.append(stand_in("""print('{"failed": "no room"}')"""))
    with pytest.raises(RuntimeError, match="^no room$"):
        Session(started[0], "").wait(120)


def test_closing_a_guardian_that_hangs_ends_it_and_what_is_below_it_only(started, monkeypatch):
    monkeypatch.setattr(sessions, "CLOSE_SECONDS", 0.5)
    control = subprocess.Popen(["sleep", "1000"])
    hanging = stand_in("import subprocess; print(1, flush=True); subprocess.run(['sleep', '1000'])")
    started += [control, hanging]
    assert hanging.stdout.readline() == b"1\n"
    tree = []
    while not tree:
        tree = below(psutil.Process(hanging.pid))
    sessions._close(hanging)
    assert hanging.poll() is not None
    assert not any(process.is_running() for process in tree)
    assert control.poll() is None


def test_a_driver_on_somebody_elses_ray_gets_its_address_and_ends_with_the_session(tmp_path):
    code = "import os, sys, time; print(os.environ['RAY_ADDRESS'], os.environ['A']); sys.exit(3)"
    with attached_session("10.0.0.1:6379", {**os.environ, "A": "1"}) as session:
        session.start([sys.executable, "-c", code], {}, tmp_path / "log")
        assert session.wait(120) == End(3)
        assert (tmp_path / "log").read_text() == "10.0.0.1:6379 1\n"
        session.start([sys.executable, "-c", "import time; time.sleep(100)"], {}, tmp_path / "log")
        assert session.wait(0.1) is None
        driver = psutil.Process(session._driver.pid)
    assert not driver.is_running()


ATTACHED = """
import os, sys
from pathlib import Path
from klreg_verl.experiment.store import RunFolder
from launch.session import attached_session
folder = RunFolder(sys.argv[1])
with folder.lock(), attached_session("10.0.0.1:6379", os.environ) as session:
    session.start([sys.executable, "-c", sys.argv[2]], {}, folder.path / "log")
    session.wait(100)
"""
DRIVER = "import os, signal, sys, time; HEAD; print(os.getpid(), flush=True); time.sleep(100)"


@pytest.mark.parametrize("head", ["pass", "signal.signal(signal.SIGTERM, signal.SIG_IGN)"])
def test_after_kill_9_of_klreg_run_no_second_one_starts_beside_its_driver(tmp_path, started, head):
    folder = RunFolder(tmp_path / "run")
    owner = subprocess.Popen([sys.executable, "-c", ATTACHED, str(folder.path), DRIVER.replace("HEAD", head)])
    started.append(owner)
    log = folder.path / "log"
    while not (log.exists() and log.read_text().endswith("\n")):
        assert owner.poll() is None
        time.sleep(0.05)
    driver = psutil.Process(int(log.read_text()))
    owner.kill()
    owner.wait()
    if head != "pass":  # it does not listen: the lock is then its own
        assert driver.is_running() and folder.is_locked()
        driver.kill()
    psutil.wait_procs([driver], timeout=60)
    assert not driver.is_running()
    with folder.lock():
        pass


# ---------------------------------------------------------------------------------------------------- Ray

PROGRAM = """
import os, ray
ray.init()
@ray.remote
def where():
    return os.environ["KLREG_SESSION_DIR"]
print(ray.get(where.remote()), ray.cluster_resources()["GPU"], ray.get_runtime_context().gcs_address)
"""


def run(session: Session, log: Path) -> list[str]:
    """The words of PROGRAM's last line, run on a session."""
    session.start([sys.executable, "-c", PROGRAM], {}, log)
    end = session.wait(280)
    assert end == End(0), log.read_text()
    return log.read_text().splitlines()[-1].split()


@pytest.mark.slow
def test_two_rays_side_by_side_with_rays_usual_ports_taken_by_somebody_else(tmp_path: Path, started):
    taken = [socket.socket() for _ in range(3)]
    for one, port in zip(taken, (6379, 8265, 10001), strict=True):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("", port))
            one.listen()
        except OSError:
            pass  # somebody else has it, which is as good
    with ExitStack() as stack:
        first = stack.enter_context(ray_session(Place(gpus=1, object_store_bytes=STORE), os.environ))
        held = below(psutil.Process(first._process.pid))
        words = run(first, tmp_path / "1")
        assert words[1:] == ["1.0", first.address]
        with ray_session(Place(gpus=2, object_store_bytes=STORE), os.environ) as second:
            second_held = below(psutil.Process(second._process.pid))
            other = run(second, tmp_path / "2")
            assert other[1:] == ["2.0", second.address]
            assert other[0] != words[0]  # folders for sockets of their own
        assert not any(process.is_running() for process in second_held)
        started.append(subprocess.Popen(["sleep", "1000"]))
        assert run(first, tmp_path / "3") == words  # Ray outlives its runs, and its neighbour
    assert not any(process.is_running() for process in held)
    assert not any(Path(folder).exists() for folder in (words[0], other[0]))
    assert started[-1].poll() is None  # another child of ours, started meanwhile
    for one in taken:
        one.close()


@pytest.mark.slow
def test_ray_that_does_not_start_is_told_in_its_own_words():
    with pytest.raises(RuntimeError, match="(?s)Ray did not start:.*object store"):
        with ray_session(Place(gpus=1, object_store_bytes=1), os.environ):
            pytest.fail("Ray started with an object store of one byte")


@pytest.mark.slow
@pytest.mark.parametrize("when", ["during the run", "before it, which nobody saw"])
@pytest.mark.parametrize("process", ["gcs_server", "raylet"])
def test_a_ray_whose_process_is_killed_ends_the_run_with_that_reason(tmp_path: Path, process: str, when: str):
    with ray_session(Place(gpus=1, object_store_bytes=STORE), os.environ) as session:
        victim = next(one for one in below(psutil.Process(session._process.pid)) if one.name() == process)
        if when != "during the run":
            victim.kill()
        session.start([sys.executable, "-c", "import time; time.sleep(100)"], {}, tmp_path / "log")
        if when == "during the run":
            assert session.wait(1.0) is None
            victim.kill()
        end = session.wait(120)
    assert end is not None and end.code == -9
    assert end.lost == f"Ray's {process} was killed, so the run was stopped"


@pytest.mark.slow
def test_a_run_can_be_ended_with_a_reason(tmp_path: Path):
    with ray_session(Place(gpus=1, object_store_bytes=STORE), os.environ) as session:
        session.start([sys.executable, "-c", "import time; time.sleep(100)"], {}, tmp_path / "log")
        session.end("it stood still")
        assert session.wait(120) == End(-9, "it stood still")
        assert run(session, tmp_path / "2")[1] == "1.0"  # Ray goes on


@pytest.mark.slow
def test_after_kill_9_of_the_guardian_ray_is_gone_and_the_next_call_says_so():
    with ray_session(Place(gpus=1, object_store_bytes=STORE), os.environ) as session:
        held = below(psutil.Process(session._process.pid))
        assert any("gcs_server" in process.name() for process in held)
        session._process.kill()
        with pytest.raises(RuntimeError, match="was killed"):
            session.wait(120)
    deadline = time.monotonic() + 120
    while any(process.is_running() for process in held):
        assert time.monotonic() < deadline, held
        time.sleep(0.1)
