"""`make bench`: mean pairwise cosine of 100,000 responses, closed form against the matrix of all pairs of each prompt.

Prints seconds with their spread and the memory of one call, the embeddings included; asserts no time.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import pytest

from klreg_verl.core.diversity import mean_cosine

RESPONSES, DIMENSIONS, TURNS = 100_000, 384, 7
MEMORY = r"""
import re, numpy as np
from klreg_verl.core.diversity import mean_cosine
def peak(): return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) / 1024
before = peak()
vectors = np.random.default_rng(0).standard_normal(({rows}, {dimensions}), dtype=np.float32)
with_vectors = peak()
mean_cosine(vectors, np.arange({rows}) // {siblings})
print(before, with_vectors, peak())
"""


def gram(vectors: np.ndarray, siblings: int) -> float:
    """The cosine matrix of every prompt, as a plain implementation does it; responses in prompt order."""
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    groups = units.reshape(-1, siblings, vectors.shape[1])
    totals = np.einsum("gnd,gmd->gnm", groups, groups, optimize=True).sum(axis=(1, 2)) - siblings
    return float((totals / (siblings * (siblings - 1))).mean())


@pytest.mark.parametrize("siblings", [8, 64])
def test_cosine_of_100000_responses(siblings: int):
    vectors = np.random.default_rng(0).standard_normal((RESPONSES, DIMENSIONS), dtype=np.float32)
    rows = RESPONSES // siblings * siblings
    vectors, ids = vectors[:rows], np.arange(rows) // siblings
    assert mean_cosine(vectors, ids).mean == pytest.approx(gram(vectors, siblings), abs=1e-6)
    seconds = [(timed(lambda: mean_cosine(vectors, ids)), timed(lambda: gram(vectors, siblings))) for _ in range(TURNS)]
    print(
        f"\nmean pairwise cosine of {rows} responses, {DIMENSIONS} dimensions, {siblings} a prompt; equal within 1e-6"
    )
    for name, column in zip(("closed form", "all pairs"), zip(*seconds, strict=True), strict=True):
        print(f"  {name:<12} {spread(column)} s")
    print(f"  all pairs / closed form  {spread([theirs / mine for mine, theirs in seconds])}  (target: 2 s at most)")
    code = MEMORY.format(rows=rows, dimensions=DIMENSIONS, siblings=siblings)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    before, with_vectors, after = map(float, done.stdout.split())
    print(
        f"  peak memory over the bare process: {after - before:.0f} MiB, of it {with_vectors - before:.0f} the "
        "embeddings (target: 500 MB at most)"
    )


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def spread(values: list[float] | tuple[float, ...]) -> str:
    """Median, and the quartiles around it."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3g} [{low:.3g}, {high:.3g}] n={len(values)}"
