"""`make bench`: the report of 100 runs of 1,000 steps, made up by tests/run_folders.py. Asserts no time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from run_folders import write_study

CODE = r"""
import resource, sys, time
from pathlib import Path
start = time.perf_counter()
from klreg_verl.analysis import embeddings, report
paths = report.write_report(Path(sys.argv[1]), embedder=embeddings.ngrams())
used = resource.getrusage(resource.RUSAGE_SELF)
seconds, page = time.perf_counter() - start, paths.html.stat().st_size / 1e6
print(seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, page)
"""
TURNS = 3


def test_report_of_100_runs_of_1000_steps(tmp_path: Path) -> None:
    write_study(tmp_path, arms=("none",), seeds=range(1, 35), steps=1000)
    write_study(tmp_path, arms=("reverse", "forward"), seeds=range(1, 34), steps=1000)
    print("\nreport of 100 runs of 1,000 steps, a new process each time (target: 20 s at most)")
    for _ in range(TURNS):
        done = subprocess.run(
            [sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True, check=True, timeout=1800
        )
        seconds, processor, memory, page = map(float, done.stdout.split())
        print(f"  {seconds:.1f} s, of them {processor:.1f} s of processor; {memory:.0f} MiB; page {page:.1f} MB")
    assert "100 of 100 runs done" in (tmp_path / "report.html").read_text(encoding="utf-8")
