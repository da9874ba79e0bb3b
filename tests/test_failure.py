"""What a failed run tells. The Ray logs are real ones (Ray 2.60), cut to a few frames."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import failure
from launch.session import End

CYAN, OFF = "\x1b[36m", "\x1b[0m"

ACTOR_IN_ACTOR = f"""\
2026-01-31 20:34:52,696	INFO worker.py:2038 -- Started a local Ray instance.
{CYAN}(Outer pid=30328){OFF} hello from outer
Error executing job with overrides: ['++data.train_files="/data/train.parquet"']
Traceback (most recent call last):
  File "/home/u/f.py", line 16, in <module>
    print(ray.get(o.g.remote()))
          ^^^^^^^^^^^^^^^^^^^^^
  File "/venv/ray/_private/worker.py", line 1053, in get_objects
    raise value.as_instanceof_cause()
ray.exceptions.RayTaskError(KeyError): {CYAN}ray::Outer.g(){OFF} (pid=30328, ip=192.0.2.2, repr=<f.Outer>)
           ^^^^^^^^^^^^^^^^^^^
  File "/home/u/f.py", line 11, in g
    return ray.get(Inner.remote().f.remote())
                                  ^^^^^^^^^^^
ray.exceptions.RayTaskError(KeyError): {CYAN}ray::Inner.f(){OFF} (pid=30329, ip=192.0.2.2, repr=<f.Inner>)
           ^^^^^^^^^^^^^^^^^^^
  File "/home/u/f.py", line 6, in f
    def f(self): return {{}}["needle"]
                        ~~^^^^^^^^^^
KeyError: 'needle'
"""

ACTOR_THAT_CANNOT_BE_MADE = f"""\
Traceback (most recent call last):
  File "/venv/ray/_private/worker.py", line 1053, in get_objects
    raise value.as_instanceof_cause()
ray.exceptions.RayTaskError(ActorDiedError): {CYAN}ray::Outer.h(){OFF} (pid=30644, ip=192.0.2.2, repr=<f.Outer>)
  File "/home/u/f.py", line 12, in h
    def h(self): return ray.get(Inner.remote(True).f.remote())
ray.exceptions.ActorDiedError: The actor died because of an error raised in its creation task, \
{CYAN}ray::Inner.__init__(){OFF} (pid=30643, ip=192.0.2.2, repr=<f.Inner>)
  File "/home/u/f.py", line 5, in __init__
    if bad: raise RuntimeError("cannot build")
RuntimeError: cannot build
{CYAN}(Inner pid=30643){OFF} Exception raised in creation task: The actor died because of an error raised in its \
creation task, {CYAN}ray::Inner.__init__(){OFF} (pid=30643, ip=192.0.2.2, repr=<f.Inner>)
{CYAN}(Inner pid=30643){OFF}   File "/home/u/f.py", line 5, in __init__
{CYAN}(Inner pid=30643){OFF}     if bad: raise RuntimeError("cannot build")
{CYAN}(Inner pid=30643){OFF} RuntimeError: cannot build
"""

VLLM = f"""\
{CYAN}(vLLMHttpServer pid=7){OFF} (Engine pid=9) INFO 01-31 20:00:00 [core.py:71] Initializing a V1 LLM engine
{CYAN}(vLLMHttpServer pid=7){OFF} (Engine pid=9) ERROR 01-31 20:00:01 [core.py:843] EngineCore failed to start.
{CYAN}(vLLMHttpServer pid=7){OFF} (Engine pid=9) ERROR 01-31 20:00:01 [core.py:843] Traceback (most recent call last):
{CYAN}(WorkerDict pid=8){OFF} Using blocking ray.get inside async actor.
{CYAN}(vLLMHttpServer pid=7){OFF} (Engine pid=9) ERROR 01-31 20:00:01 [core.py:843]   File "core.py", line 8, in run
{CYAN}(WorkerDict pid=8){OFF} ValueError: of another process, later
{CYAN}(vLLMHttpServer pid=7){OFF} (Engine pid=9) ERROR 01-31 20:00:01 [core.py:843]     check_enough_memory()
{CYAN}(vLLMHttpServer pid=7){OFF} (Engine pid=9) ERROR 01-31 20:00:01 [core.py:843] ValueError: No memory for a cache.
{CYAN}(TaskRunner pid=6){OFF} Traceback (most recent call last):
{CYAN}(TaskRunner pid=6){OFF}   File "agent_loop.py", line 3, in generate
{CYAN}(TaskRunner pid=6){OFF} RuntimeError: no materializable trajectories
"""

CHAINED = """\
Traceback (most recent call last):
  File "a.py", line 1, in read
    values["beta"]
KeyError: 'beta'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "a.py", line 3, in <module>
    close()
OSError: cannot close
"""

IGNORED = """\
Exception ignored in: <function Pool.__del__ at 0x7f>
Traceback (most recent call last):
  File "pool.py", line 1, in __del__
ResourceWarning: unclosed
step:1 done
"""


@pytest.fixture
def log(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "log"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (ACTOR_IN_ACTOR, "KeyError: 'needle'"),  # not RayTaskError: two processes only handed it on
        (ACTOR_THAT_CANNOT_BE_MADE, "RuntimeError: cannot build"),
        (VLLM, "ValueError: No memory for a cache."),  # the first, of one process among interleaved ones
        (CHAINED, "KeyError: 'beta'"),
        (IGNORED + CHAINED, "KeyError: 'beta'"),
        (f"{failure.TRACEBACK}\n  File\nsubprocess.TimeoutExpired: 3 s\n", "subprocess.TimeoutExpired: 3 s"),
        (f"{failure.TRACEBACK}\n  File\nAssertionError\n", "AssertionError"),
    ],
)
def test_the_reason_is_the_first_error_that_matters(log, text: str, error: str):
    assert failure.reason(log(text), End(1)) == error


def test_the_end_of_the_actors_own_report_counts_where_the_driver_wrote_none(log):
    own = "".join(line + "\n" for line in ACTOR_THAT_CANNOT_BE_MADE.splitlines() if "(Inner pid" in line[:20])
    assert failure.reason(log(own), End(1)) == "RuntimeError: cannot build"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (1, "the driver ended with exit code 1 and left no traceback"),
        (0, "the driver ended before the last step, without an error"),
        (-9, "the driver was killed by SIGKILL"),
        (-11, "the driver was killed by SIGSEGV"),
        (-40, "the driver was killed by signal 40"),  # a real-time signal has no name
    ],
)
def test_without_a_traceback_the_way_it_ended_is_said(log, code: int, words: str):
    assert failure.reason(log("step:1\n"), End(code)) == words
    assert failure.reason(log("step:1\n").with_name("absent"), End(code)) == words
    assert failure.reason(log(IGNORED), End(code)) == words  # Python prints those at every shutdown


def test_a_killed_driver_says_so_first_whatever_the_log_has(log):
    assert failure.reason(log(CHAINED), End(-9)) == (
        "the driver was killed by SIGKILL; the first error in its log: KeyError: 'beta'"
    )


def test_a_lost_engine_is_the_reason_and_not_how_the_driver_was_then_ended(log):
    end = End(-15, "vLLM's engine (pid 7) was killed")
    assert failure.reason(log("step:1\n"), end) == "vLLM's engine (pid 7) was killed"
    assert failure.reason(log(CHAINED), end).endswith("was killed; the first error in its log: KeyError: 'beta'")


def test_the_excerpt_is_one_processs_traceback_without_prefixes_and_colours(log):
    assert failure.excerpt(log(VLLM)) == [
        "Traceback (most recent call last):",
        '  File "core.py", line 8, in run',
        "    check_enough_memory()",
        "ValueError: No memory for a cache.",
    ]


def test_a_long_traceback_keeps_its_end_and_a_log_without_one_its_last_lines(log):
    frames = "".join(f'  File "f{i}.py", line {i}\n' for i in range(500))
    shown = failure.excerpt(log(f"Traceback (most recent call last):\n{frames}ValueError: deep\n"))
    assert (len(shown), shown[0], shown[-1]) == (25, '  File "f476.py", line 476', "ValueError: deep")
    assert failure.excerpt(log("".join(f"line {i}\n" for i in range(50))), last=3) == ["line 47", "line 48", "line 49"]
    assert failure.excerpt(Path("/no/such/log")) == []


def test_a_traceback_cut_off_by_a_kill_and_bytes_that_are_no_text_are_survived(log):
    path = log("")
    path.write_bytes(b"\xff\xfe\nTraceback (most recent call last):\n  File x\n")
    assert failure.excerpt(path) == ["Traceback (most recent call last):", "  File x"]
    assert failure.reason(path, End(1)) == "the driver ended with exit code 1 and left no traceback"
