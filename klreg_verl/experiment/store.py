"""Run folders: what a run leaves on disk, safe under kill -9 at any instant.

    spec.json        the RunSpec and its hash               atomic (temporary file, fsync, rename, fsync of the folder)
    provenance.json  versions, hashes, host                 atomic
    headline.json    whether the reward grades: then the score is what the run is about, else accuracy     atomic
    state.json       pending | running | interrupted | failed | done                       atomic
    metrics.jsonl    one line a step, each step once        appended and fsynced; a torn last line is cut by repair()
    samples/         step_000012.parquet                    atomic
    evals/           step<N>-<task>-<hash>.parquet
    checkpoints/     verl's and ours
    attempts/<n>/    logs; end.json, how it ended; stop, where it was asked to; discarded.jsonl and what was sampled
                     after the step that the next attempt resumed from
    latest           link to the newest attempt
    .lock            held with flock while a process works here; freed by the kernel when that process dies

Only the holder of the lock writes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import math
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from klreg_verl.experiment.plan import RunSpec

if TYPE_CHECKING:
    import pyarrow

Status = Literal["pending", "running", "interrupted", "failed", "done"]

_LOCK_PATIENCE = 1.0
"""Seconds to wait for a lock: a reader that asks whether a run lives holds it for microseconds."""


class RunLocked(RuntimeError):
    """Another process works in the run folder."""


def runs_root(cli_value: Path | None = None) -> Path:
    """Where runs lie: the command's --runs-dir, else KLREG_RUNS, else ./runs; absolute."""
    return Path(cli_value or os.environ.get("KLREG_RUNS") or "runs").expanduser().resolve()


def cache_root(runs_dir: Path) -> Path:
    """Where built data and models live: KLREG_CACHE, or .cache beside the runs."""
    return Path(os.environ.get("KLREG_CACHE") or runs_dir / ".cache").expanduser().resolve()


def run_folder(spec: RunSpec, runs_dir: Path) -> RunFolder:
    """A run's folder: `<runs_dir>/<recipe>/<arm>/<task>/[<grid>/]seed<k>`."""
    return RunFolder(runs_dir / spec.recipe / spec.run_id)


def atomic_write(path: Path, data: bytes | str, *, mode: int | None = None) -> None:
    """Replaces a file so that a reader, and a kill at any instant, sees the old or the new content and nothing else.

    `mode`: its permissions, e.g. 0o600; None: as the umask has them.
    """
    with replacing(path) as temporary, open(temporary, "xb") as file:
        if mode is not None:
            os.fchmod(file.fileno(), mode)
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(path.parent)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside a file, that no other process has, to write to; the file is replaced by it where all went well."""
    name = f".{path.name}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}.tmp"
    temporary = path.with_name(name)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, obj: Any, *, mode: int | None = None) -> None:
    """Indented JSON, atomically. NaN and infinity are refused: they are not JSON."""
    atomic_write(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n", mode=mode)


def spreadsheet_text(value: Any) -> Any:
    """A cell of a CSV file; text that a spreadsheet would run as a formula gets an apostrophe in front."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable. Some file systems refuse it for folders, where the rename is all there is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@dataclass(frozen=True, kw_only=True)
class State:
    """How a run stands."""

    status: Status = "pending"
    reason: str = ""
    """Why it failed or was interrupted; empty otherwise."""
    step: int = 0
    """Last finished step."""
    steps: int = 0
    """Steps asked for."""
    attempt: int = 0
    pid: int | None = None
    host: str | None = None
    time: float = 0.0
    """When it was written [s since 1970]."""

    def __post_init__(self) -> None:
        if self.status not in get_args(Status):
            raise ValueError(f"status {self.status!r} is not one of {', '.join(get_args(Status))}.")
        for name in ("step", "steps", "attempt"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name} {getattr(self, name)!r} is no whole number.")


class RunFolder:
    """One run's folder. Making the object touches nothing on disk."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def spec_path(self) -> Path:
        return self.path / "spec.json"

    @property
    def provenance_path(self) -> Path:
        return self.path / "provenance.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def state_path(self) -> Path:
        return self.path / "state.json"

    @property
    def headline_path(self) -> Path:
        return self.path / "headline.json"

    @property
    def samples_dir(self) -> Path:
        return self.path / "samples"

    @property
    def evals_dir(self) -> Path:
        return self.path / "evals"

    @property
    def checkpoints_dir(self) -> Path:
        return self.path / "checkpoints"

    @property
    def attempts_dir(self) -> Path:
        return self.path / "attempts"

    @property
    def latest(self) -> Path:
        """Link to the newest attempt."""
        return self.path / "latest"

    # ------------------------------------------------------------------------------------------------ spec

    def spec(self) -> RunSpec | None:
        """What the folder was made for; None before `create`. Raises ValueError where spec.json cannot be read."""
        if not self.spec_path.exists():
            return None
        return RunSpec.from_json(_read_object(self.spec_path), file=str(self.spec_path))

    def create(self, spec: RunSpec) -> None:
        """Makes the folder and writes spec.json; a folder of the same run is taken over, with more steps if asked for.

        So is that of another run that failed before its first step, whose last attempt keeps its spec.json.

        Raises ValueError if it holds another run, has done more steps than asked for, or cannot be written.
        """
        self.check(spec)
        present = self.spec()
        if present == spec:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self.latest.is_dir() and present is not None and present.hash != spec.hash:
                os.replace(self.spec_path, self.latest / "spec.json")
            write_json(self.spec_path, spec.to_json())
        except OSError as error:
            raise ValueError(
                f"{self.path}: the run folder cannot be written ({error.strerror}). Free or choose another place "
                "with --runs-dir or KLREG_RUNS."
            ) from error

    def check(self, spec: RunSpec) -> None:
        """Raises ValueError if the folder holds another run, or has done more steps than asked for."""
        present = self.spec()
        if present is None:
            return
        if present.hash != spec.hash and not self.failed_before_a_step():
            changes = "\n".join(f"  {line}" for line in present.differs(spec))
            raise ValueError(
                f"{self.path} holds another run: its hash is {present.hash[:12]}, the recipe's is {spec.hash[:12]}.\n"
                f"What differs (there != asked for):\n{changes}\n"
                "Undo the change, or give the changed setting an arm or recipe of its own, or another --runs-dir, or "
                "move the folder away."
            )
        last = self.last_step() or 0
        if spec.train.steps < last:
            raise ValueError(
                f"{self.path} has done {last} steps and train.steps={spec.train.steps} is asked for: a run can be "
                "extended, not shortened. Ask for more steps, or use another --runs-dir."
            )

    def failed_before_a_step(self) -> bool:
        """Whether a changed recipe may take its place: nothing was trained here that another run could be taken for."""
        trained = (self.last_step() or 0) > 0 or any(self.checkpoints_dir.glob("*"))
        return self.state().status == "failed" and not trained

    def is_done(self, spec: RunSpec) -> bool:
        """Whether nothing is left to do: this very run finished, with at least the steps that `spec` asks for, and its
        metrics do not end before them."""
        state, present, last = self.state(), self.spec(), self.last_step()
        return (
            present is not None
            and present.hash == spec.hash
            and state.status == "done"
            and state.step >= spec.train.steps
            and (last is None or last >= spec.train.steps)
        )

    # ------------------------------------------------------------------------------------------------ lock

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Held while a process works here. Raises RunLocked, naming the other process, if there is one.

        A child that inherits the file (session.AttachedSession) holds the lock, too, until it ends.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "a+") as file:
            self._acquire(file)
            os.set_inheritable(file.fileno(), True)
            _write_in_place(file, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "time": time.time()}))
            try:
                yield
            finally:
                _write_in_place(file, "")

    def _acquire(self, file: io.TextIOWrapper) -> None:
        deadline = time.monotonic() + _LOCK_PATIENCE
        while not _try_lock(file, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise RunLocked(
                    f"{self.path} is in use by {self.holder()}. Wait for it or stop it; two processes cannot "
                    "write one run. For a second study side by side use another --runs-dir."
                )
            time.sleep(0.02)

    def is_locked(self) -> bool:
        """Whether a living process holds the lock."""
        try:
            with open(self.path / ".lock") as file:
                return not _try_lock(file, fcntl.LOCK_SH)
        except FileNotFoundError:
            return False

    def owner(self) -> str | None:
        """What the process that holds the lock has written into it, to be given to `still_owned`; None: nobody."""
        try:
            return (self.path / ".lock").read_text() or None
        except FileNotFoundError:
            return None

    def still_owned(self, owner: str) -> bool:
        """Whether the process that wrote `owner` still holds the lock. Of another host's only what it wrote is seen."""
        here = json.loads(owner)["host"] == socket.gethostname()
        return self.owner() == owner and (self.is_locked() or not here)

    def holder(self) -> str:
        """The process that holds the lock, in words."""
        try:
            values = json.loads((self.path / ".lock").read_text())
            return f"process {values['pid']} on {values['host']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process (which has not yet written its name)"

    # ------------------------------------------------------------------------------------------------ attempts, state

    def new_attempt(self) -> Path:
        """Makes attempts/<n> with the next n, from 1, and points `latest` to it."""
        self.attempts_dir.mkdir(parents=True, exist_ok=True)
        numbers = [int(entry.name) for entry in self.attempts_dir.iterdir() if entry.name.isdecimal()]
        attempt = self.attempts_dir / str(max(numbers, default=0) + 1)
        attempt.mkdir()
        with replacing(self.latest) as temporary:
            temporary.symlink_to(attempt.relative_to(self.path))
        _sync_folder(self.path)
        return attempt

    def state(self) -> State:
        """As written; pending where nothing is; a `running` whose process is gone reads as interrupted."""
        if not self.state_path.exists():
            return State()
        values = _read_object(self.state_path)
        known = {key: values[key] for key in State.__dataclass_fields__ if key in values}
        try:
            state = State(**known)
        except ValueError as error:
            raise ValueError(f"{self.state_path}: {error} Restore it, or move the run folder away.") from error
        if state.status != "running" or self.is_locked():
            return state
        return replace(state, status="interrupted", reason=f"process {state.pid} on {state.host} is gone")

    def set_state(
        self,
        status: Status,
        *,
        step: int | None = None,
        steps: int | None = None,
        attempt: int | None = None,
        reason: str = "",
    ) -> State:
        """Writes state.json atomically, with this process and the time; returns what was written. None: as before."""
        before = self.state()
        state = State(
            status=status,
            reason=reason,
            step=before.step if step is None else step,
            steps=before.steps if steps is None else steps,
            attempt=before.attempt if attempt is None else attempt,
            pid=os.getpid(),
            host=socket.gethostname(),
            time=time.time(),
        )
        write_json(self.state_path, asdict(state))
        return state

    # ------------------------------------------------------------------------------------------------ stop

    def ask_to_stop(self) -> None:
        """Asks the newest attempt to save after the step in hand and to end there; the trainer looks once a step."""
        self._stop_path.touch()

    def stop_asked(self) -> bool:
        """Whether the newest attempt was asked to stop; a later attempt starts unasked."""
        return self._stop_path.exists()

    @property
    def _stop_path(self) -> Path:
        return self.latest / "stop"

    # ------------------------------------------------------------------------------------------------ headline

    def is_graded(self) -> bool | None:
        """Whether the reward gives other scores than 0 and 1; None before the first response, and in older folders."""
        return _read_object(self.headline_path)["headline"] == "score" if self.headline_path.exists() else None

    def set_graded(self, graded: bool) -> None:
        """Keeps it, for the run's next attempt and for readers."""
        write_json(self.headline_path, {"headline": "score" if graded else "accuracy"})

    # ------------------------------------------------------------------------------------------------ metrics

    def append_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends the line of one step and makes it durable. NaN and infinity become null.

        Raises ValueError for a step that is not after the last one, or for a value that is no number.
        """
        self.repair()
        last = self.last_step()
        if last is not None and step <= last:
            raise ValueError(
                f"{self.metrics_path}: step {step} comes after step {last}. Each step is written once, in order; "
                "after a resume call discard_after first."
            )
        values = {key: _number(key, value) for key, value in metrics.items() if key != "step"}
        _append(self.metrics_path, json.dumps({"step": int(step), **values}, allow_nan=False) + "\n")

    def last_step(self) -> int | None:
        """The step of the last whole line; None without one."""
        line = _last_line(self.metrics_path)
        return None if line is None else int(_parse_line(line, f"{self.metrics_path} (last line)")["step"])

    def read_metrics(self) -> list[dict[str, Any]]:
        """All whole lines. A torn last line is left out; a broken one before it raises ValueError with its number."""
        lines = _whole_lines(self.metrics_path)
        return [_parse_line(line, f"{self.metrics_path}:{i}") for i, line in enumerate(lines, start=1)]

    def repair(self) -> int:
        """Cuts a torn last line of metrics.jsonl; returns the bytes cut. For the holder of the lock."""
        return _cut_torn_line(self.metrics_path)

    def sweep(self) -> None:
        """Removes temporary files that a kill left behind. For the holder of the lock."""
        for folder in (self.path, self.samples_dir, self.evals_dir):
            for leftover in folder.glob(".*.tmp") if folder.is_dir() else ():
                leftover.unlink(missing_ok=True)

    def discard_after(self, step: int, attempt_dir: Path) -> int:
        """Moves what came after `step` to the attempt: metrics lines to discarded.jsonl, samples and evals beside it.

        Called before resuming from a checkpoint of `step` (-1: from scratch, which repeats the validation of step 0
        too). Lines are copied before they are cut: a kill in between loses none, and a repeat copies none twice.
        Returns the number of lines moved.
        """
        self.repair()
        lines = _whole_lines(self.metrics_path)
        late = [line for line in lines if _parse_line(line, str(self.metrics_path))["step"] > step]
        if late:
            discarded = attempt_dir / "discarded.jsonl"
            _cut_torn_line(discarded)
            copied = set(_whole_lines(discarded))
            _append(discarded, b"".join(line for line in late if line not in copied))
            dropped = set(late)
            atomic_write(self.metrics_path, b"".join(line for line in lines if line not in dropped))
        self._move_late_files(step, attempt_dir)
        return len(late)

    def _move_late_files(self, step: int, attempt_dir: Path) -> None:
        for folder in (self.samples_dir, self.evals_dir):
            for file in sorted(folder.glob("*.parquet")) if folder.is_dir() else ():
                number = re.match(r"step_?(\d+)", file.name)
                if number and int(number[1]) > step:
                    target = attempt_dir / "discarded" / folder.name
                    target.mkdir(parents=True, exist_ok=True)
                    os.replace(file, target / file.name)

    # ------------------------------------------------------------------------------------------------ samples

    def write_samples(self, step: int, table: pyarrow.Table) -> Path:
        """Writes samples/step_<6 digits>.parquet (zstd) atomically, replacing one of an earlier attempt."""
        import pyarrow.parquet

        buffer = io.BytesIO()
        pyarrow.parquet.write_table(table, buffer, compression="zstd")
        self.samples_dir.mkdir(parents=True, exist_ok=True)
        path = self.samples_dir / f"step_{step:06d}.parquet"
        atomic_write(path, buffer.getvalue())
        return path


# ---------------------------------------------------------------------------------------------------- files


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Restore it, or move the run folder away.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} does not hold a JSON object. Restore it, or move the run folder away.")
    return values


def _try_lock(file: io.TextIOWrapper, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot lock ({error.strerror}): runs need a file system with flock, see --runs-dir",
            file.name,
        ) from error
    return True


def _write_in_place(file: io.TextIOWrapper, text: str) -> None:
    """For the lock file only: replacing it would give a second process another file to lock."""
    file.seek(0)
    file.truncate()
    file.write(text)
    file.flush()


def _append(path: Path, data: bytes | str) -> None:
    """Appends and fsyncs; what a full disk leaves of a failed append is cut off again."""
    data = data.encode() if isinstance(data, str) else data
    is_new = not path.exists()
    with open(path, "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            written = 0
            while written < len(data):
                written += file.write(data[written:])
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise
    if is_new:
        _sync_folder(path.parent)


def _cut_torn_line(path: Path) -> int:
    """Truncates a file after its last newline; returns the bytes cut."""
    if not path.exists():
        return 0
    with open(path, "rb+") as file:
        size = file.seek(0, os.SEEK_END)
        end = _end_of_last_line(file, size)
        if end < size:
            file.truncate(end)
            os.fsync(file.fileno())
    return size - end


def _whole_lines(path: Path) -> list[bytes]:
    """Lines with their newline; without the torn last one."""
    if not path.exists():
        return []
    if not path.is_file():
        raise ValueError(f"{path} is a folder, not a file. Move the run folder away.")
    return [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def _end_of_last_line(file: Any, size: int) -> int:
    """Offset after the last newline, 0 without one; reads backwards in blocks."""
    position, block = size, 1 << 16
    while position > 0:
        start = max(0, position - block)
        file.seek(start)
        found = file.read(position - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        position = start
    return 0


def _last_line(path: Path) -> bytes | None:
    if not path.exists():
        return None
    with open(path, "rb") as file:
        end = _end_of_last_line(file, file.seek(0, os.SEEK_END))
        if end == 0:
            return None
        start = _end_of_last_line(file, end - 1)
        file.seek(start)
        return file.read(end - start)


def _parse_line(line: bytes, place: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
        int(values["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{place}: not a metrics line ({error}). Repair the file by hand.") from error
    return values


def _number(key: str, value: Any) -> float | int | None:
    """A JSON number; null for None, NaN and infinity. Takes what has `.item()` (numpy, torch)."""
    if not isinstance(value, (int, float)) and hasattr(value, "item"):
        value = value.item()
    if value is None:
        return None
    if not isinstance(value, (int, float)):
        raise ValueError(f"metric {key!r} is {value!r} ({type(value).__name__}). Metrics are numbers.")
    if isinstance(value, bool):
        return float(value)
    return value if math.isfinite(value) else None
