"""`make bench`: what the quick study costs, side by side in one run. Prints tables; asserts nothing that is timed."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
QUICK = ROOT / "recipes" / "quickstart.yaml"
PAIRED_STEPS = 49
"""Step 1 starts from a cold engine and is left out; 48 steps are 24 of ours and 12 of each of verl's."""

pytest.importorskip("verl", reason="the stack is not installed (make setup)")


def start(runs: Path, *arguments: str, **variables: str) -> subprocess.Popen[bytes]:
    """`klreg run` on the quick study, as a process."""
    command = [sys.executable, "-m", "klreg_verl.cli", "run", str(QUICK), "--runs-dir", str(runs), *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | variables, stdout=subprocess.DEVNULL)


def start_with(module: str, runs: Path, results: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """The same with a module of this folder loaded into verl, which writes to `results`; nothing is evaluated."""
    here, path = str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")
    variables = {"VERL_USE_EXTERNAL_MODULES": module, "PYTHONPATH": os.pathsep.join(filter(None, [here, path]))}
    return start(runs, *arguments, "eval.before=false", "eval.every=0", KLREG_BENCH=str(results), **variables)


def test_peak_memory_and_where_the_start_up_goes(tmp_path: Path):
    begun = time.time()
    process = start(tmp_path, "train.steps=4", "--arm", "forward")
    peaks = watch_memory(process)
    assert process.wait(timeout=900) == 0
    folder = tmp_path / "quickstart" / "forward" / "palindrome" / "seed1"
    print(f"\npeak memory, all processes: {max(peaks, default=0) / 1e9:.1f} GB (proportional set size; target 10)")
    print("seconds from `klreg run` to ...")
    for what, seconds in start_up(folder, begun):
        print(f"  {seconds:6.1f}  {what}")


def test_step_time_of_ours_against_stock_verl(tmp_path: Path):
    results = tmp_path / "turns.jsonl"
    process = start_with("alternating", tmp_path, results, f"train.steps={PAIRED_STEPS + 1}", "--arm", "forward")
    assert process.wait(timeout=1800) == 0
    turns = [json.loads(line) for line in results.read_text().splitlines()][1:]
    print(f"\nseconds per step, {len(turns)} steps in one run, turn by turn")
    for turn in dict.fromkeys(line["turn"] for line in turns):
        print(f"  {turn:<16} {spread([line['seconds'] for line in turns if line['turn'] == turn])}")
    print(f"  ours / verl, wait left out of both   {spread(ratios(turns, 'verl, fast poll'))}  (target 1.02)")
    print(f"  ours / verl, as they are             {spread(ratios(turns, 'verl'))}  (target 0.85)")


@pytest.mark.parametrize("arm", ["reverse", "forward"])
def test_the_kl_hooks_share_of_a_step(tmp_path: Path, arm: str):
    results = tmp_path / "calls.jsonl"
    process = start_with("hook_share", tmp_path, results, "train.steps=13", "--arm", arm)
    assert process.wait(timeout=900) == 0
    lines = (tmp_path / "quickstart" / arm / "palindrome" / "seed1" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["time/step_s"] for line in lines]
    calls = [json.loads(line)["seconds"] for line in results.read_text().splitlines()]
    per_step = len(calls) // len(steps)
    shares = [sum(calls[i * per_step : (i + 1) * per_step]) / seconds for i, seconds in enumerate(steps)][1:]
    print(f"\n{arm}: the KL hook's share of a step  {spread(shares)}  (target 0.01)")


def ratios(turns: list[dict], other: str) -> list[float]:
    """Each of our steps over the other's step beside it."""
    pairs = zip(turns, turns[1:], strict=False)
    return [a["seconds"] / b["seconds"] for a, b in pairs if a["turn"] == "ours" and b["turn"] == other]


def spread(values: list[float]) -> str:
    """Median, and the quartiles around it."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}] n={len(values)}"


def watch_memory(process: subprocess.Popen[bytes]) -> list[int]:
    """Total proportional set size of the process and all below it, twice a second; shared pages count once."""
    peaks: list[int] = []

    def look() -> None:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                family = [root, *root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            peaks.append(sum(proportional(member.pid) for member in family))
            time.sleep(0.5)

    threading.Thread(target=look, daemon=True).start()
    return peaks


def proportional(pid: int) -> int:
    """Bytes of one process, each shared page divided by its number of users."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


MARKS = {
    "driver started (checks, data and model, Ray)": None,
    "trainer started (imports of verl)": "Platform override from VERL_PLATFORM",
    "workers imported verl": "create worker group",
    "actor and reference loaded": "actor and ref model engine initialized",
    "vLLM ready": "checkpoint engine manager initialized",
    "agent loop ready, first validation done": "step:0",
}


def start_up(folder: Path, begun: float) -> list[tuple[str, float]]:
    """When each part of the start was reached [s since `klreg run`], from the attempt's log and its metrics."""
    log = (folder / "latest" / "log").read_text(errors="replace").splitlines()
    reached = [
        ("driver started (checks, data and model, Ray)", (folder / "latest" / "kl.yaml").stat().st_mtime - begun)
    ]
    for what, mark in MARKS.items():
        times = [stamp(line) for line in log if mark and mark in line and stamp(line)]
        if times:
            reached.append((what, times[0] - begun))
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[1])
    updates = [stamp(line) for line in log if "update_weights done" in line and stamp(line)]
    return [*reached, (f"first step done (it took {first['time/step_s']:.1f})", updates[1] - begun)]


def stamp(line: str) -> float | None:
    """The time that verl's log lines carry."""
    found = re.search(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3})", line)
    return datetime.fromisoformat(f"{found[1]}.{found[2]}").timestamp() if found else None
