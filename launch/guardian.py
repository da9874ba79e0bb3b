"""The process that owns everything a study starts: Ray, the runs' drivers, and whatever those start.

`klreg run` talks to it over pipes (session.py). It is a child subreaper, so a process whose parent dies becomes its
child instead of init's; when its standard input closes, for whatever reason, it ends all of its descendants, removes
their shared memory and its folder, and exits. It is two processes, a keeper and its child that does the work, and each
cleans up when the other is gone. So nothing outlives a study, not even after kill -9 of `klreg run` or of either.

On a node that joins another node's Ray the same two processes hold `ray start` (node.py).

Messages are one JSON object a line. In: {"run": argv, "environment": {...}, "log": path}, and {"end": reason}.
Out: {"ready": address} or {"failed": reason}, then {"exit": code, "lost": reason or null} after each run.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import getpass
import json
import os
import re
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
GRACE_SECONDS = 3.0
START_SECONDS = 90.0
POLL_SECONDS = 0.1
ENGINE_SECONDS = 20.0
"""How long a driver may go on without a process of AWAITED that it had; at a run's normal end it is a few."""
LOOK_SECONDS = 2.0
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one node's part of Ray listens, and what it may use."""

    gpus: int | None = None
    """Logical on a CPU; None: Ray counts them."""
    object_store_bytes: int | None = None
    """None: Ray's choice."""
    slots: int = 16
    """Ray's CPUs; launch/host.py says how many verl needs."""
    ip: str = LOOPBACK
    """This node's address, as the other nodes reach it. Ray turns the loopback address into the machine's own."""
    head: str | None = None
    """Address of the Ray to join; None: this node is the head."""
    ports: tuple[int, int] | None = None
    """First and last port for Ray; None: any that is free."""
    scratch: str = "/tmp"
    """Node-local and short: sockets may have 107 characters."""
    token: str | None = None
    """File with the token that all nodes share; None: one of this session's own."""


def become_subreaper() -> None:
    """Orphans below this process become its children (Linux)."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent() -> None:
    """In a driver before it starts: were both guardian processes killed at once, nobody else would end it (Linux)."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def descendants() -> list[psutil.Process]:
    """Every process below this one."""
    return psutil.Process().children(recursive=True)


def end(processes: Iterable[psutil.Process], grace: float = GRACE_SECONDS) -> None:
    """Terminate, wait, kill; removes the shared memory that they had mapped and nobody else has."""
    processes = list(processes)
    segments = shared_memory(processes)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=grace)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=grace)
    remove_unused(segments)


def shared_memory(processes: Iterable[psutil.Process]) -> set[str]:
    """Files under /dev/shm that the processes have mapped."""
    return {path for process in processes for path in _mapped(process.pid)}


def remove_unused(segments: set[str]) -> None:
    """Unlink the given /dev/shm files unless another process still maps them."""
    if segments:
        used = {path for pid in psutil.pids() for path in _mapped(pid)}
        for path in segments - used:
            with contextlib.suppress(OSError):
                os.unlink(path)


def _mapped(pid: int) -> set[str]:
    try:
        maps = Path(f"/proc/{pid}/maps").read_bytes()
    except OSError:  # gone, or another user's
        return set()
    return {match.decode() for match in _SEGMENT.findall(maps)}


_SEGMENT = re.compile(rb"(/dev/shm/\S+)$", re.MULTILINE)  # an unlinked one is followed by " (deleted)"


AWAITED = {
    "VLLM::EngineCore": "vLLM's engine",
    "ray::AgentLoopWorker": "the agent loop's worker",
    "ray::OneLoopWorker": "the agent loop's worker",
    "ray::TransferQueueController": "TransferQueue's controller",
    "ray::SimpleStorageUnit": "TransferQueue's storage",
}
"""Processes whose answers verl awaits for ever, by how their titles begin. Ray tells verl of the others' death."""


class EngineWatch:
    """Notices that a process of the run is gone for whose answers verl waits for ever."""

    def __init__(self) -> None:
        self.engines: dict[psutil.Process, str] = {}
        self.missed: dict[psutil.Process, float] = {}
        self.next_look = 0.0

    def lost(self) -> str | None:
        """Why the run cannot go on, once one has been gone for ENGINE_SECONDS."""
        now = time.monotonic()
        if now < self.next_look:
            return None
        self.next_look = now + LOOK_SECONDS
        self.engines |= {process: name for process in descendants() if (name := awaited(process))}
        for engine in self.engines:
            if not _is_alive(engine):
                self.missed.setdefault(engine, now)
        overdue = [engine for engine, since in self.missed.items() if now - since > ENGINE_SECONDS]
        return LOST_PROCESS.format(name=self.engines[overdue[0]], pid=overdue[0].pid) if overdue else None


LOST_PROCESS = (
    "{name} (pid {pid}) was killed, perhaps by the system for want of memory; verl would wait for it for ever, so the "
    "run was stopped"
)


LOST_RAY = "Ray's {name} was killed, so the run was stopped"


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name()
    return ""


def awaited(process: psutil.Process) -> str | None:
    """What a process is, if verl would wait for it for ever."""
    with contextlib.suppress(psutil.NoSuchProcess):
        title = " ".join(process.cmdline())
        return next((name for begins, name in AWAITED.items() if title.startswith(begins)), None)
    return None


def _is_alive(process: psutil.Process) -> bool:
    """Running, and not only a zombie that its parent has not asked about."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


class Guardian:
    """One node's Ray, and on the head one run at a time on it."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.folder = Path(tempfile.mkdtemp(prefix="klreg-", dir=self.place.scratch))
        self.environment = os.environ | session_environment(self.folder, self.place)
        self.driver: subprocess.Popen[bytes] | None = None
        self.engines = EngineWatch()
        self.lost: str | None = None
        self.lasting: set[psutil.Process] = set()
        self.vital: tuple[str, ...] = ()
        self.keeper = os.getpid()
        self.segments = self.folder / "segments"
        self.listed: set[str] = set()

    def start_ray(self) -> str:
        """Start the head, or join it; returns the head's address.

        Raises:
            RuntimeError: with Ray's own last lines.
        """
        log = self.folder / "ray_start.log"
        with open(log, "wb") as out:
            command = ray_command(self.folder / "ray", self.place)
            code = subprocess.run(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=START_SECONDS
            ).returncode
        address = self.folder / "ray" / "ray_current_cluster"
        if code or not address.is_file():
            raise RuntimeError("Ray did not start:\n" + "\n".join(log.read_text().splitlines()[-15:]))
        self.lasting = set(psutil.Process().children())
        self.vital = ("gcs_server", "raylet") if self.place.head is None else ("raylet",)
        return address.read_text().strip()

    def lost_ray(self) -> str | None:
        """Which of Ray's own processes is not there: verl would ask it for minutes before it gave up, or for ever.

        By what is alive, and not by what was seen to end: a raylet may be killed before anybody has looked at it.
        """
        alive = {_name(process) for process in self.lasting if _is_alive(process)}
        gone = next((name for name in self.vital if name not in alive), None)
        return LOST_RAY.format(name=gone) if gone else None

    def start_run(self, argv: list[str], environment: dict[str, str], log: str) -> None:
        """Start a run's driver; its output goes to `log`."""
        self.engines, self.lost = EngineWatch(), None
        with open(log, "ab") as out:
            self.driver = subprocess.Popen(
                argv,
                env=self.environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent,
            )

    def finished_run(self) -> int | None:
        """The driver's exit code once it has ended and its workers are gone."""
        self.stop_run_without_engine()
        code = self.driver.poll() if self.driver else None
        if code is not None:
            self.driver = None
            self.sweep()
        return code

    def stop_run_without_engine(self) -> None:
        """End the driver when vLLM's engine, or Ray, was lost; `lost` says so."""
        if self.driver and not self.lost and (reason := self.engines.lost() or self.lost_ray()):
            self.end_run(reason)

    def end_run(self, reason: str) -> None:
        """Kill the driver: inside ray.get it would not hear anything gentler; `sweep` ends what is below it."""
        if self.driver:
            self.lost = reason
            self.driver.kill()

    def note_segments(self) -> None:
        """Write down which shared memory is ours: vLLM's engine leaves its own behind when its actor is killed."""
        listed = set(os.listdir("/dev/shm"))
        if listed - self.listed:
            with open(self.segments, "a") as file:
                file.writelines(f"{path}\n" for path in shared_memory(descendants()))
        self.listed = listed

    def remove_segments(self) -> None:
        """Remove what was written down, here or by the child that was killed, and nobody uses any more."""
        if self.segments.is_file():
            remove_unused({path for path in self.segments.read_text().splitlines() if os.path.exists(path)})

    def sweep(self) -> None:
        """End what the last run left behind: the raylet ends its job's actors, orphans become our children."""
        deadline = time.monotonic() + 2 * GRACE_SECONDS
        while time.monotonic() < deadline and _actors(descendants()):
            time.sleep(POLL_SECONDS)
        orphans = [process for process in psutil.Process().children() if process not in self.lasting]
        trees = [process for orphan in orphans for process in (orphan, *below(orphan))]
        end([*trees, *_actors(descendants())])
        self.remove_segments()

    def close(self) -> None:
        """End everything."""
        while remaining := descendants():
            end(remaining)
        self.remove_segments()
        shutil.rmtree(self.folder, ignore_errors=True)


def below(process: psutil.Process) -> list[psutil.Process]:
    """A process's descendants; none if it is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []


_RAYS_OWN = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Titles of the raylet's children that are no run's; without its agents the raylet exits."""


def _actors(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Ray workers at work for a run."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            title = " ".join(process.cmdline())
            if title.startswith("ray::") and not title.startswith(_RAYS_OWN):
                found.append(process)
    return found


def session_environment(folder: Path, place: Place) -> dict[str, str]:
    """Variables that keep this session's Ray and sockets apart from everybody else's on the machine."""
    alone = place.ip == LOOPBACK and place.head is None
    return {
        **({"KLREG_LOOPBACK": "1", "VLLM_HOST_IP": LOOPBACK} if alone else {}),
        **temporary_files(folder),
        "KLREG_SESSION_DIR": str(folder),
        "RAY_AUTH_MODE": "token",  # with ~/.ray/auth_token present, Ray >= 2.59 mixes modes and never forms a cluster
        "RAY_AUTH_TOKEN_PATH": place.token or str(new_token(folder)),
        "RAY_TMPDIR": str(folder / "ray"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_gcs_server_request_timeout_seconds": "30",
        "RAY_DEDUP_LOGS": "0",
        "PYTHONUNBUFFERED": "1",
    }


def new_token(folder: Path) -> Path:
    """A file that lets its readers, who are only this user's processes, into Ray."""
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    return token


def temporary_files(folder: Path) -> dict[str, str]:
    """Sockets and lock files that vLLM and verl leave behind go with the folder; compiled kernels stay."""
    kept = {name: os.environ[name] for name in ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR") if name in os.environ}
    compiled = Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
    ours = {"TMPDIR": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(compiled), "VLLM_RPC_BASE_PATH": str(folder)}
    return ours | kept


def ray_command(folder: Path, place: Place) -> list[str]:
    """`ray start` on free ports, as the head or to join it.

    The token keeps others out of Ray itself. It does not protect what a run opens beside Ray: TransferQueue,
    torch.distributed and vLLM's HTTP server (on one machine verl_hooks/loopback.py keeps them off the network).
    """
    ray = Path(sys.executable).with_name("ray")
    command = [str(ray), "start", f"--node-ip-address={place.ip}", f"--temp-dir={folder}", "--disable-usage-stats"]
    command += [f"--num-cpus={place.slots}", *_ports(place)]
    if place.head is None:
        command += ["--head", "--include-dashboard=false"]
    else:
        command += [f"--address={place.head}"]
    command += [f"--num-gpus={place.gpus}"] if place.gpus is not None else []
    command += [f"--object-store-memory={place.object_store_bytes}"] if place.object_store_bytes is not None else []
    return command


def _ports(place: Place) -> list[str]:
    """Any free ports, or of the range those that are free now and the rest for Ray's workers."""
    if place.ports is None:
        wanted = {"min-worker-port": 0, "max-worker-port": 0, "dashboard-agent-listen-port": 0}
        return [f"--{name}={port}" for name, port in (({"port": 0} if place.head is None else {}) | wanted).items()]
    names = [*(["port"] if place.head is None else []), *_FIXED_PORTS]
    first, last = place.ports
    free = [port for port in range(first, last + 1) if is_free(port)]
    if len(free) < len(names) + place.slots:
        raise RuntimeError(f"Only {len(free)} of the ports {first}-{last} are free; Ray needs {len(names)} and more.")
    fixed = [f"--{name}={port}" for name, port in zip(names, free, strict=False)]
    return [*fixed, f"--worker-port-list={','.join(map(str, free[len(names) :]))}"]


_FIXED_PORTS = (
    *("node-manager-port", "object-manager-port", "runtime-env-agent-port"),
    *("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port"),
)


def is_free(port: int) -> bool:
    """Whether nobody on this machine listens there."""
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.bind(("", port))
        return True
    return False


def say(**message: Any) -> None:
    """One message to `klreg run`; nobody may be there any more."""
    with contextlib.suppress(BrokenPipeError):
        os.write(1, json.dumps(message).encode() + b"\n")


def serve(guardian: Guardian) -> None:
    """Carry out messages until standard input closes, or the keeper is gone."""
    buffer = b""
    while os.getppid() == guardian.keeper:
        readable, _, _ = select.select([0], [], [], POLL_SECONDS)
        if readable:
            chunk = os.read(0, 65536)
            if not chunk:
                return
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                obey(guardian, json.loads(line))
        guardian.note_segments()
        code = guardian.finished_run()
        if code is not None:
            say(exit=code, lost=guardian.lost)


def obey(guardian: Guardian, message: dict[str, Any]) -> None:
    """One message from `klreg run`."""
    if "end" in message:
        guardian.end_run(message["end"])
    else:
        guardian.start_run(message["run"], message["environment"], message["log"])


def hold(guardian: Guardian, work: Callable[[Guardian], None]) -> None:
    """Do `work` in a child process; when it ends, or when the child or this process is killed, everything is ended."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _go_on)
    become_subreaper()
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        guardian.close()
        return
    become_subreaper()
    try:
        work(guardian)
    except Exception as error:  # whatever it is, `klreg run` has to be told, and everything has to end
        say(failed=f"{type(error).__name__}: {error}")
    finally:
        guardian.close()
        os._exit(0)


def _go_on(number: int, frame: FrameType | None) -> None:
    """The pipe is what ends us. Not SIG_IGN, which every process that we start would inherit."""


def _serve_ray(guardian: Guardian) -> None:
    say(ready=guardian.start_ray())
    serve(guardian)


def main() -> None:
    """Entry point of the guardian process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("place", type=json.loads, help="the fields of Place, as JSON")
    place = parser.parse_args().place
    ports = place.get("ports")
    try:
        guardian = Guardian(Place(**place | {"ports": ports and tuple(ports)}))
    except OSError as error:
        say(failed=f"no folder can be made in {place['scratch']}: {error.strerror}")
        return
    hold(guardian, _serve_ray)


if __name__ == "__main__":
    main()
