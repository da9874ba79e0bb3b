"""Run folders: their files, and that a kill -9 at any instant loses nothing. The kills are real."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from klreg_verl.experiment import plan, recipe, store
from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.store import RunFolder, RunLocked

TEXT = """\
question: q
model: {path: tiny}
tasks: {t: {builtin: palindrome}}
seeds: [1]
arms: {none: {kl: {placement: none}}}
train: {steps: 10}
"""


@pytest.fixture
def spec(tmp_path: Path) -> RunSpec:
    (tmp_path / "study.yaml").write_text(TEXT)
    return plan.expand(recipe.load(tmp_path / "study.yaml"))[0]


@pytest.fixture
def folder(tmp_path: Path, spec: RunSpec) -> RunFolder:
    result = RunFolder(tmp_path / "runs" / "study" / spec.run_id)
    result.create(spec)
    return result


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Another Python process running `code`, with the store imported."""
    head = "import os, signal, sys, time\nfrom pathlib import Path\nfrom klreg_verl.experiment import store\n"
    command = [sys.executable, "-c", head + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# ---------------------------------------------------------------------------------------------------- where, what


def test_the_runs_lie_where_the_command_then_the_environment_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KLREG_RUNS", raising=False)
    assert store.runs_root() == tmp_path / "runs"
    monkeypatch.setenv("KLREG_RUNS", "elsewhere")
    assert store.runs_root() == tmp_path / "elsewhere"
    assert store.runs_root(tmp_path / "here") == tmp_path / "here"


def test_creating_twice_is_the_same_as_once(folder: RunFolder, spec: RunSpec) -> None:
    before = folder.spec_path.stat().st_mtime_ns
    folder.create(spec)
    assert folder.spec_path.stat().st_mtime_ns == before
    assert folder.spec() == spec


def test_more_steps_extend_a_run(folder: RunFolder, spec: RunSpec) -> None:
    longer = replace(spec, train=replace(spec.train, steps=20))
    folder.set_state("done", step=10, steps=10)
    assert folder.is_done(spec) and not folder.is_done(longer)
    folder.create(longer)
    assert folder.spec() == longer


def test_another_run_in_the_same_folder_is_not_done(folder: RunFolder, spec: RunSpec) -> None:
    folder.set_state("done", step=10, steps=10)
    assert not folder.is_done(replace(spec, train=replace(spec.train, learning_rate=1e-3)))


def test_fewer_steps_than_done_are_refused(folder: RunFolder, spec: RunSpec) -> None:
    folder.append_metrics(10, {})
    with pytest.raises(ValueError, match="has done 10 steps and train.steps=4 is asked for: a run can be extended"):
        folder.create(replace(spec, train=replace(spec.train, steps=4)))


def test_a_folder_of_another_run_is_refused_with_both_hashes_and_what_differs(folder: RunFolder, spec: RunSpec) -> None:
    other = replace(spec, train=replace(spec.train, learning_rate=1e-3))
    with pytest.raises(ValueError) as caught:
        folder.create(other)
    for part in (spec.hash[:12], other.hash[:12], "train.learning_rate: 1e-06 != 0.001", "--runs-dir"):
        assert part in str(caught.value)
    assert folder.spec() == spec


def test_a_run_that_failed_before_its_first_step_gives_way_to_the_changed_recipe(
    folder: RunFolder, spec: RunSpec
) -> None:
    folder.create(spec)
    attempt = folder.new_attempt()
    changed = replace(spec, seed=spec.seed + 1)
    with pytest.raises(ValueError, match="holds another run"):  # it may be at its start
        folder.create(changed)
    folder.append_metrics(0, {"eval/x/accuracy": 0.5})  # the validation before training is no step
    folder.set_state("failed", reason="CUDA out of memory")
    folder.create(changed)
    assert folder.spec() == changed
    assert json.loads((attempt / "spec.json").read_text())["hash"] == spec.hash


@pytest.mark.parametrize("left", ["a step", "a checkpoint"])
def test_a_run_that_failed_later_does_not(folder: RunFolder, spec: RunSpec, left: str) -> None:
    folder.create(spec)
    folder.new_attempt()
    folder.set_state("failed", reason="CUDA out of memory")
    if left == "a step":
        folder.append_metrics(1, {"train/score": 0.5})
    else:
        (folder.checkpoints_dir / "global_step_1").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds another run"):
        folder.create(replace(spec, seed=spec.seed + 1))


def test_a_broken_spec_is_refused_and_not_overwritten(folder: RunFolder, spec: RunSpec) -> None:
    folder.spec_path.write_text("{")
    with pytest.raises(ValueError, match="spec.json cannot be read: .* Restore it, or move the run folder away."):
        folder.create(spec)
    assert folder.spec_path.read_text() == "{"


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, spec: RunSpec) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="the run folder cannot be written .*--runs-dir or KLREG_RUNS"):
        RunFolder(tmp_path / "file" / "run").create(spec)


def test_a_write_that_fails_leaves_the_old_file_and_no_remains(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    store.write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        store.write_json(path, {"a": math.nan})
    with pytest.raises(TypeError):
        store.atomic_write(path, 3)  # type: ignore[arg-type]
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["x.json"]


# ---------------------------------------------------------------------------------------------------- attempts, state


def test_attempts_count_from_one_and_latest_points_to_the_newest(folder: RunFolder) -> None:
    assert [folder.new_attempt().name for _ in range(11)] == [str(n) for n in range(1, 12)]
    assert folder.latest.resolve() == (folder.attempts_dir / "11").resolve()
    assert os.readlink(folder.latest) == "attempts/11"


def test_the_state_is_pending_until_written(folder: RunFolder) -> None:
    assert folder.state().status == "pending"
    with folder.lock():
        folder.set_state("running", step=2, steps=10, attempt=1)
        assert folder.state().status == "running"
        folder.set_state("failed", reason="no disk")
    state = folder.state()
    assert (state.status, state.reason, state.step, state.steps, state.attempt) == ("failed", "no disk", 2, 10, 1)
    assert state.pid == os.getpid() and state.time > 0


def test_a_status_that_does_not_exist_is_refused(folder: RunFolder) -> None:
    with pytest.raises(ValueError, match="status 'finished' is not one of pending, running, interrupted, failed, done"):
        folder.set_state("finished")  # type: ignore[arg-type]


def test_a_second_process_cannot_work_in_the_same_folder(folder: RunFolder) -> None:
    with folder.lock():
        code = """
        try:
            with store.RunFolder(sys.argv[1]).lock():
                print("got it")
        except store.RunLocked as error:
            print(error)
        """
        output, _ = child(code, folder.path).communicate(timeout=120)
        assert f"is in use by process {os.getpid()} on {os.uname().nodename}" in output
        with pytest.raises(RunLocked), folder.lock():
            pass
    with folder.lock():
        pass


def test_a_running_process_that_was_killed_reads_as_interrupted_and_frees_the_lock(folder: RunFolder) -> None:
    code = """
    folder = store.RunFolder(sys.argv[1])
    with folder.lock():
        folder.set_state("running", step=3, steps=10)
        print("ready", flush=True)
        time.sleep(60)
    """
    process = child(code, folder.path)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    assert folder.is_locked() and folder.state().status == "running"
    process.kill()
    process.communicate()
    state = folder.state()
    assert (state.status, state.step) == ("interrupted", 3)
    assert state.reason == f"process {process.pid} on {os.uname().nodename} is gone"
    with folder.lock():
        pass


# ---------------------------------------------------------------------------------------------------- metrics


def test_a_metrics_line_holds_numbers_and_null(folder: RunFolder) -> None:
    import numpy

    folder.append_metrics(0, {"a": 1, "b": 0.5, "c": math.nan, "d": -math.inf, "e": None, "f": True})
    folder.append_metrics(1, {"step": 1, "a": numpy.float32(0.25), "b": numpy.array(3)})
    assert folder.read_metrics() == [
        {"step": 0, "a": 1, "b": 0.5, "c": None, "d": None, "e": None, "f": 1.0},
        {"step": 1, "a": 0.25, "b": 3},
    ]
    assert folder.last_step() == 1
    with pytest.raises(ValueError, match=r"metric 'a' is 'x' \(str\)\. Metrics are numbers\."):
        folder.append_metrics(2, {"a": "x"})


@pytest.mark.parametrize("step", [3, 2, 0])
def test_a_step_is_written_once_and_in_order(folder: RunFolder, step: int) -> None:
    folder.append_metrics(3, {})
    with pytest.raises(ValueError, match=f"step {step} comes after step 3. Each step is written once, in order"):
        folder.append_metrics(step, {})


def test_an_empty_or_absent_file_has_no_last_step(folder: RunFolder) -> None:
    assert folder.last_step() is None and folder.read_metrics() == [] and folder.repair() == 0
    folder.metrics_path.write_text('{"step": 1')
    assert folder.last_step() is None and folder.read_metrics() == []
    assert folder.repair() == len('{"step": 1') and folder.metrics_path.read_bytes() == b""


@pytest.mark.parametrize("length", [1, 100, 200_000])
def test_a_torn_last_line_is_ignored_then_cut(folder: RunFolder, length: int) -> None:
    folder.append_metrics(1, {"a": 1})
    folder.append_metrics(2, {f"key{i}": i for i in range(5000)})  # a line longer than one block of the reader
    whole = folder.metrics_path.read_bytes()
    with open(folder.metrics_path, "ab") as file:
        file.write(b"{" + b"x" * (length - 1))
    assert folder.last_step() == 2 and len(folder.read_metrics()) == 2
    assert folder.repair() == length and folder.metrics_path.read_bytes() == whole
    folder.append_metrics(3, {})
    assert [line["step"] for line in folder.read_metrics()] == [1, 2, 3]


def test_appending_to_a_torn_file_repairs_it_first(folder: RunFolder) -> None:
    folder.append_metrics(1, {})
    with open(folder.metrics_path, "ab") as file:
        file.write(b'{"step": 2, "a"')
    folder.append_metrics(2, {"a": 5})
    assert folder.read_metrics() == [{"step": 1}, {"step": 2, "a": 5}]


def test_a_broken_line_before_the_last_is_not_swallowed(folder: RunFolder) -> None:
    folder.metrics_path.write_text('{"step": 1}\nrubbish\n{"step": 3}\n')
    with pytest.raises(ValueError, match="metrics.jsonl:2: not a metrics line"):
        folder.read_metrics()


def test_a_full_disk_leaves_no_half_line(folder: RunFolder) -> None:
    """With a limit on file size, the kernel refuses the second half of the line."""
    folder.append_metrics(1, {"a": 1})
    size = folder.metrics_path.stat().st_size
    code = """
    import resource
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
    try:
        store.RunFolder(sys.argv[1]).append_metrics(2, {"a": 2, "b": 3})
    except OSError as error:
        print(error.strerror)
    """
    output, error = child(code, folder.path, size + 10).communicate(timeout=120)
    assert output.strip() == "File too large", error
    assert folder.metrics_path.stat().st_size == size


def test_later_lines_samples_and_evals_move_to_the_attempt(folder: RunFolder) -> None:
    import pyarrow

    for step in range(6):
        folder.append_metrics(step, {"a": step})
        folder.write_samples(step, pyarrow.table({"step": [step]}))
    folder.evals_dir.mkdir()
    (folder.evals_dir / "step5-t-abc.parquet").write_text("")
    attempt = folder.new_attempt()
    assert folder.discard_after(3, attempt) == 2
    assert [line["step"] for line in folder.read_metrics()] == [0, 1, 2, 3]
    moved = [json.loads(line) for line in (attempt / "discarded.jsonl").read_text().splitlines()]
    assert moved == [{"step": 4, "a": 4}, {"step": 5, "a": 5}]
    assert sorted(p.name for p in folder.samples_dir.iterdir()) == [f"step_{i:06d}.parquet" for i in range(4)]
    assert sorted(p.name for p in (attempt / "discarded").rglob("*.parquet")) == [
        "step5-t-abc.parquet",
        "step_000004.parquet",
        "step_000005.parquet",
    ]
    folder.append_metrics(4, {})
    assert folder.discard_after(4, attempt) == 0


def test_from_scratch_the_validation_before_training_goes_too(folder: RunFolder) -> None:
    folder.append_metrics(0, {})
    folder.append_metrics(1, {})
    assert folder.discard_after(0, folder.new_attempt()) == 1
    assert folder.discard_after(-1, folder.new_attempt()) == 1
    assert folder.read_metrics() == []


def test_samples_come_back_as_written(folder: RunFolder) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"step": [12, 12], "response": ["aba", ""], "token_ids": [[1, 2], []]})
    path = folder.write_samples(12, table)
    assert path == folder.samples_dir / "step_000012.parquet"
    assert pyarrow.parquet.read_table(path).equals(table)
    assert pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(0).compression == "ZSTD"


# ---------------------------------------------------------------------------------------------------- kills

KILL_AT = """
calls = 0
def dying(function):
    def call(*arguments, **keywords):
        global calls
        calls += 1
        if calls == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **keywords)
    return call
for name in ("fsync", "replace", "open"):
    setattr(os, name, dying(getattr(os, name)))
"""
"""Kills the process just before its n-th system call that makes something durable or visible; n is its argument."""


def kills(code: str, folder: RunFolder, limit: int = 40) -> Iterator[int]:
    """Runs `code`, killed at the first instant, at the second, ..., until it survives; yields after each run."""
    for n in range(1, limit):
        process = child(KILL_AT + textwrap.dedent(code), folder.path, n)
        _, error = process.communicate(timeout=120)
        assert process.returncode in (0, -signal.SIGKILL), error
        yield n
        if process.returncode == 0:
            return
    raise AssertionError("never survived")


def test_a_state_killed_at_any_instant_is_the_old_or_the_new_one(folder: RunFolder) -> None:
    folder.set_state("pending", step=1)
    seen = []
    for _ in kills("store.RunFolder(sys.argv[1]).set_state('failed', step=2)", folder):
        state = folder.state()
        assert (state.status, state.step) in (("pending", 1), ("failed", 2))
        seen.append(state.step)
        folder.set_state("pending", step=1)
    assert seen[0] == 1 and seen[-1] == 2 and len(seen) >= 4
    folder.sweep()
    assert not list(folder.path.glob(".*.tmp"))


def test_discarding_killed_at_any_instant_loses_no_line(folder: RunFolder) -> None:
    for step in range(1, 6):
        folder.append_metrics(step, {"a": step})
    before = folder.metrics_path.read_bytes()
    attempt = folder.new_attempt()
    for n in kills("store.RunFolder(sys.argv[1]).discard_after(2, Path(sys.argv[1]) / 'attempts' / '1')", folder):
        steps = [line["step"] for line in folder.read_metrics()]
        assert steps in ([1, 2, 3, 4, 5], [1, 2]), f"kill {n}"
        if steps == [1, 2]:
            assert (attempt / "discarded.jsonl").read_bytes() == b"".join(before.splitlines(True)[2:])
    folder.discard_after(2, attempt)
    assert [line["step"] for line in folder.read_metrics()] == [1, 2]
    assert (attempt / "discarded.jsonl").read_bytes() == b"".join(before.splitlines(True)[2:])


def test_a_writer_killed_at_random_instants_goes_on_where_it_was(folder: RunFolder) -> None:
    code = """
    folder = store.RunFolder(sys.argv[1])
    with folder.lock():
        folder.repair()
        folder.set_state("running", step=folder.last_step() or 0)
        print("ready", flush=True)
        for step in range((folder.last_step() or 0) + 1, 10**9):
            folder.append_metrics(step, {f"key{i}": i for i in range(300)})
            folder.set_state("running", step=step)
    """
    chance = random.Random(0)
    last = 0
    for _ in range(6):
        process = child(code, folder.path)
        assert process.stdout is not None and process.stdout.readline() == "ready\n", process.communicate()[1]
        while (folder.last_step() or 0) <= last:
            time.sleep(0.01)
        time.sleep(0.08 * chance.random())
        process.kill()
        process.communicate()
        steps = [line["step"] for line in folder.read_metrics()]
        assert steps == list(range(1, len(steps) + 1)) and len(steps) > last
        state = folder.state()
        assert state.status == "interrupted" and state.step in (len(steps), len(steps) - 1)
        last = len(steps)


def test_a_done_run_whose_metrics_are_short_is_not_done(folder: RunFolder, spec: RunSpec) -> None:
    made = replace(spec, train=replace(spec.train, steps=3))
    for step in (1, 2):
        folder.append_metrics(step, {"x": 1.0})
    folder.set_state("done", step=3, steps=3)
    assert not folder.is_done(made)
    folder.append_metrics(3, {"x": 1.0})
    assert folder.is_done(made)


def test_two_processes_that_write_one_file_never_share_a_name(tmp_path: Path) -> None:
    with store.replacing(tmp_path / "x") as one, store.replacing(tmp_path / "x") as other:
        assert one != other and str(os.getpid()) in one.name
        one.write_text("one")
        other.write_text("other")
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == "one"
