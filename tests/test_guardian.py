"""The guardian ends what a study started, and nothing else. All processes are real; Ray's are in test_session.py."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch import guardian
from launch.session import End, Session

GUARDIAN = """
from launch import guardian

def work(held):
    guardian.say(ready=str(held.folder))
    guardian.serve(held)

guardian.end.__defaults__ = (0.5,)  # seconds of grace; the stubborn process takes all of them
guardian.LOOK_SECONDS, guardian.ENGINE_SECONDS = 0.1, 3.0
guardian.hold(guardian.Guardian(guardian.Place()), work)
"""
"""The guardian without Ray."""

ASKER = """
import subprocess, sys
from pathlib import Path
from launch.session import End, Session

code, tree, folder = sys.argv[1:]
pipe = subprocess.PIPE
process = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, start_new_session=True)
session = Session(process, "")
ready = session._receive(120)["ready"]
session.start([sys.executable, "-c", tree, folder], {}, Path(folder, "log"))
print(ready, flush=True)
sys.stdin.readline()
"""
"""Stands where `klreg run` stands."""

TREE = """
import json, os, signal, subprocess, sys, time
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path

folder = Path(sys.argv[1])

def child(name, act):
    if os.fork() == 0:
        act()
        (folder / f"{name}.pid").write_text(str(os.getpid()))
        time.sleep(1000)

def leave():                       # away from session, group and parent
    os.setsid()
    if os.fork():
        os._exit(0)

def hold(name="segment"):
    segment = shared_memory.SharedMemory(create=True, size=4096)
    resource_tracker.unregister(segment._name, "shared_memory")  # Python would remove it; native code has no such help
    (folder / name).write_text(segment.name)
    globals()[name] = segment

child("plain", lambda: None)
child("stubborn", lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN))
child("daemon", leave)
child("holder", hold)
child("victim", lambda: hold("lost"))
subprocess.Popen(["sh", "-c", 'sleep 1000 & echo $! > "$0"', str(folder / "orphan.pid")]).wait()
numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
(folder / "ignored").write_text(json.dumps([n.name for n in numbers if signal.getsignal(n) == signal.SIG_IGN]))
(folder / "driver.pid").write_text(str(os.getpid()))
while not (folder / "end").exists():
    time.sleep(0.05)
sys.exit(7)
"""
"""A run's driver, with descendants of every kind that is hard to find."""

NAMES = ("plain", "stubborn", "daemon", "holder", "victim", "orphan", "driver")


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.05)


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


class Study:
    """An asker, its guardian, and the tree of processes that it was asked to start."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        command = [sys.executable, "-c", ASKER, GUARDIAN, TREE, str(folder)]
        self.asker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.asker.stdout is not None
        self.session_folder = Path(self.asker.stdout.readline().strip())
        files = [folder / f"{name}.pid" for name in NAMES]
        wait_for(lambda: all(f.exists() and f.read_text().strip() for f in files), "the tree")
        self.tree = {name: psutil.Process(int(f.read_text())) for name, f in zip(NAMES, files, strict=True)}
        self.segments = [Path("/dev/shm", (folder / name).read_text()) for name in ("segment", "lost")]
        self.worker = self.tree["driver"].parent()
        self.keeper = self.worker.parent()

    def everything(self) -> list[psutil.Process]:
        return [*self.tree.values(), self.worker, self.keeper]

    def segments_left(self) -> int:
        return sum(segment.exists() for segment in self.segments)

    def is_whole(self) -> bool:
        return all(map(is_alive, self.everything())) and self.segments_left() == 2 and self.session_folder.exists()

    def is_gone(self) -> bool:
        gone = not any(map(is_alive, self.everything()))
        return gone and not self.segments_left() and not self.session_folder.exists()

    def close(self) -> None:
        """Whatever a failing test left."""
        if self.asker.poll() is None:
            self.asker.kill()
        self.asker.wait()
        deadline = time.monotonic() + 15
        while not self.is_gone() and time.monotonic() < deadline:
            time.sleep(0.05)
        for process in self.everything():
            if is_alive(process):
                process.kill()
        for segment in self.segments:
            segment.unlink(missing_ok=True)


@pytest.fixture
def study(tmp_path: Path) -> Iterator[Study]:
    made = Study(tmp_path / "study")
    yield made
    made.close()


@pytest.fixture
def others() -> Iterator[Callable[[], bool]]:
    """A process and a segment that have nothing to do with any study; tells whether both are still there."""
    process = subprocess.Popen(["sleep", "1000"])
    segment = shared_memory.SharedMemory(create=True, size=4096)
    yield lambda: process.poll() is None and Path("/dev/shm", segment.name).exists()
    process.kill()
    process.wait()
    segment.close()
    segment.unlink()


def let_go(study: Study) -> None:
    assert study.asker.stdin is not None
    study.asker.stdin.close()  # the asker ends, and its end of the guardian's pipe closes


ENDINGS: dict[str, Callable[[Study], None]] = {
    "the pipe closes": let_go,
    "kill -9 of the asker": lambda study: study.asker.kill(),
    "kill -9 of the keeper": lambda study: study.keeper.kill(),
    "kill -9 of the keeper's child": lambda study: study.worker.kill(),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_descendant_its_shared_memory_and_the_folder_go_and_nothing_else(
    study: Study, others: Callable[[], bool], ending: str
):
    assert study.is_whole()
    ENDINGS[ending](study)
    wait_for(study.is_gone, f"after {ending}: the end of {[p for p in study.everything() if p.is_running()]}")
    assert others()


@pytest.mark.parametrize("ending", ENDINGS)
def test_shared_memory_goes_even_if_its_owner_was_killed_long_before(study: Study, ending: str):
    noted = study.session_folder / "segments"
    wait_for(lambda: noted.exists() and str(study.segments[1]) in noted.read_text(), "the guardian's look")
    study.tree["victim"].kill()
    wait_for(lambda: not is_alive(study.tree["victim"]), "the victim's end")
    assert study.segments_left() == 2  # nobody maps the victim's any more
    ENDINGS[ending](study)
    wait_for(study.is_gone, f"after {ending}: the end")


def test_a_driver_dies_when_both_guardian_processes_are_killed_at_once(study: Study):
    for process in (study.keeper, study.worker):
        process.suspend()  # neither sees the other go
    study.worker.kill()
    study.keeper.kill()
    wait_for(lambda: not is_alive(study.tree["driver"]), "the driver's end")


def test_two_studies_do_not_disturb_each_other(study: Study, tmp_path: Path):
    other = Study(tmp_path / "other")
    try:
        assert study.session_folder != other.session_folder
        let_go(other)
        wait_for(other.is_gone, "the end of the other study")
        assert study.is_whole()
    finally:
        other.close()


def test_signals_of_a_terminal_or_a_batch_system_do_not_end_the_guardian_but_can_end_a_driver(study: Study):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        study.keeper.send_signal(number)
        study.worker.send_signal(number)
    time.sleep(0.3)
    assert study.is_whole()
    assert json.loads((study.folder / "ignored").read_text()) == []  # SIG_IGN would have been inherited


# ---------------------------------------------------------------------------------------------------- runs


@pytest.fixture
def session() -> Iterator[Session]:
    """A session on a guardian without Ray."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", GUARDIAN], stdin=pipe, stdout=pipe, start_new_session=True)
    made = Session(process, "an address")
    assert made._receive(120) is not None
    yield made
    process.stdin.close()
    process.wait(120)
    process.stdout.close()


def test_what_a_run_leaves_behind_is_ended_before_its_exit_code_is_told(session: Session, tmp_path: Path):
    session.start([sys.executable, "-c", TREE, str(tmp_path)], {}, tmp_path / "log")
    files = [tmp_path / f"{name}.pid" for name in NAMES]
    wait_for(lambda: all(f.exists() and f.read_text().strip() for f in files), "the tree")
    tree = [psutil.Process(int(f.read_text())) for f in files]
    assert session.wait(0.2) is None  # still running
    (tmp_path / "end").touch()
    assert session.wait(120) == End(7)
    assert not any(map(is_alive, tree))
    assert not Path("/dev/shm", (tmp_path / "segment").read_text()).exists()


def test_runs_follow_each_other_with_their_own_log_and_environment(session: Session, tmp_path: Path):
    code = "import os, sys; print(os.environ['RAY_ADDRESS'], os.environ['NAME']); sys.exit(int(os.environ['NAME']))"
    for name in ("3", "4"):
        session.start([sys.executable, "-c", code], {"NAME": name}, tmp_path / name)
        assert session.wait(120) == End(int(name))
        assert (tmp_path / name).read_text() == f"an address {name}\n"


def test_a_driver_that_is_killed_reports_the_signal(session: Session, tmp_path: Path):
    session.start([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], {}, tmp_path / "log")
    assert session.wait(120) == End(-signal.SIGKILL)


ENGINE = """
import os, signal, sys, time
from pathlib import Path
from setproctitle import setproctitle

if os.fork() == 0:
    setproctitle(sys.argv[2])
    time.sleep(1000)
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a driver deep inside ray.get
folder = Path(sys.argv[1])
(folder / "started").touch()
while not (folder / "end").exists():
    time.sleep(0.05)
"""


def engine_of(session: Session, tmp_path: Path, title: str = "VLLM::EngineCore") -> psutil.Process:
    """A driver, until a file "end" is there, with a vLLM engine that it never reaps; the engine, which was seen."""
    pytest.importorskip("setproctitle")
    session.start([sys.executable, "-c", ENGINE, str(tmp_path), title], {}, tmp_path / "log")
    wait_for((tmp_path / "started").exists, "the driver")
    below = psutil.Process(session._process.pid).children(recursive=True)
    wait_for(lambda: any(map(guardian.awaited, below)), "the engine")
    (worker,) = psutil.Process(session._process.pid).children()
    before = worker.num_ctx_switches().voluntary
    wait_for(lambda: worker.num_ctx_switches().voluntary > before + 10, "several looks")  # each of them waits once
    return next(filter(guardian.awaited, below))


@pytest.mark.parametrize(
    ("title", "name"),
    [("VLLM::EngineCore", "vLLM's engine"), ("ray::OneLoopWorker.generate_sequences", "the agent loop's worker")],
)
def test_a_run_that_lost_a_process_verl_waits_for_is_stopped_and_told_why(
    session: Session, tmp_path: Path, title: str, name: str
):
    engine = engine_of(session, tmp_path, title)
    engine.kill()
    end = session.wait(120)
    assert end is not None
    assert end.code == -signal.SIGKILL
    assert end.lost is not None
    assert f"{name} (pid {engine.pid}) was killed" in end.lost


def test_an_engine_that_ends_shortly_before_its_driver_is_a_normal_end(session: Session, tmp_path: Path):
    engine = engine_of(session, tmp_path)
    engine.kill()
    (tmp_path / "end").touch()
    assert session.wait(120) == End(0)


def test_a_run_that_cannot_start_is_told_and_ends_the_session(session: Session, tmp_path: Path):
    session.start(["/no/such/program"], {}, tmp_path / "log")
    with pytest.raises(RuntimeError, match="FileNotFoundError.*no/such/program"):
        session.wait(120)


# ---------------------------------------------------------------------------------------------------- parts


def test_a_segment_that_another_process_still_maps_is_kept():
    segment = shared_memory.SharedMemory(create=True, size=4096)
    path = f"/dev/shm/{segment.name}"
    assert path in guardian.shared_memory([psutil.Process()])
    guardian.remove_unused({path})  # this process maps it
    assert os.path.exists(path)
    segment.close()
    guardian.remove_unused({path})
    assert not os.path.exists(path)
    resource_tracker.unregister(f"/{segment.name}", "shared_memory")  # Python's own clean-up would warn that it is gone


def test_rays_own_agents_and_idle_workers_are_no_runs_actors():
    # killing an agent ends the raylet with it, and so every later run
    titles = ["ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::WorkerDict.update", "raylet"]
    made = [subprocess.Popen(["bash", "-c", f"exec -a {title} sleep 1000"]) for title in titles]
    try:
        processes = [psutil.Process(one.pid) for one in made]
        wait_for(lambda: all(process.name() == "sleep" for process in processes), "exec")
        assert guardian._actors(processes) == [processes[3]]
    finally:
        for one in made:
            one.kill()
            one.wait()


def test_a_session_has_a_token_of_its_own_that_others_cannot_read(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = (guardian.session_environment(tmp_path / name, guardian.Place()) for name in "ab")
    tokens = [Path(one["RAY_AUTH_TOKEN_PATH"]) for one in (first, second)]
    assert first["RAY_AUTH_MODE"] == "token"
    assert [token.stat().st_mode & 0o777 for token in tokens] == [0o600, 0o600]
    assert len(tokens[0].read_text()) == 64
    assert tokens[0].read_text() != tokens[1].read_text()


def test_ray_gets_free_ports_and_only_what_was_asked_for(tmp_path: Path):
    command = guardian.ray_command(tmp_path, guardian.Place())
    assert not [part for part in command if part.startswith(("--num-gpus", "--object-store-memory"))]
    command = guardian.ray_command(tmp_path, guardian.Place(gpus=0, object_store_bytes=2**20))
    assert {"--port=0", "--num-gpus=0", "--object-store-memory=1048576", f"--temp-dir={tmp_path}"} <= set(command)


def test_a_node_that_joins_is_no_head_and_says_where_the_others_reach_it(tmp_path: Path):
    command = guardian.ray_command(tmp_path, guardian.Place(ip="10.0.0.2", head="10.0.0.1:6379", slots=64))
    assert {"--address=10.0.0.1:6379", "--node-ip-address=10.0.0.2", "--num-cpus=64"} <= set(command)
    assert not [part for part in command if part.startswith(("--head", "--port", "--include-dashboard"))]


def test_ports_of_a_range_are_those_that_are_free(tmp_path: Path):
    with socket.create_server(("", 0)) as taken:
        used = taken.getsockname()[1]
        command = guardian.ray_command(tmp_path, guardian.Place(ports=(used, used + 100)))
    options = dict(part.split("=", 1) for part in command if "port" in part.partition("=")[0])
    workers = [int(port) for port in options.pop("--worker-port-list").split(",")]
    fixed = [int(port) for port in options.values()]
    assert len(fixed) == 7 and "--port" in options
    assert len({*fixed, *workers}) == len(fixed) + len(workers) and used not in (*fixed, *workers)
    assert all(used < port <= used + 100 for port in (*fixed, *workers))
    with pytest.raises(RuntimeError, match="of the ports .* are free; Ray needs 7 and more"):
        guardian.ray_command(tmp_path, guardian.Place(ports=(used, used + 10)))
