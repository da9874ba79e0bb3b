"""DeepScaleR's 40,000 rows on one core, beside what verl's own example scripts do: datasets' map, then to_parquet.

The issue's limit is 10 s. Rows are the real files' own, each written anew with other numbers until there are 40,000
(synthetic ones where the real files are absent), and the real evaluation sets. Ours reads, cleans, compares with the
evaluation sets, limits tokens, writes and hashes; map only builds the rows. Both on one core, in turns.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from real_data import agentica
from test_group_advantages import spread

from data_prep import deepscaler, palindrome

ROWS = 40_000
TURNS = 5


def quiet(done: int, total: int, text: str) -> None:
    """Progress that nobody watches."""


@contextmanager
def one_core() -> Iterator[None]:
    """Holds this process to one of its cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def renumbered(row: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The same problem with other numbers, so that it is another one."""
    text = re.sub(r"\d+", lambda found: str(int(found[0]) % 1000 + rng.randrange(1000)), row["problem"])
    return {**row, "problem": f"{text} (variant {rng.randrange(10**9)})"}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A folder with train/ and test/ as the authors have it, of 40,000 training rows."""
    folder, rng = tmp_path_factory.mktemp("source"), random.Random(0)
    try:
        real = agentica()
    except pytest.skip.Exception:
        words = [f"word{number}" for number in range(3000)]
        rows = [{"problem": " ".join(rng.choices(words, k=rng.randint(10, 120))), "answer": "1"} for _ in range(8000)]
        write(folder / "test" / "own.json", rows[:1500])
    else:
        rows = [row for path in sorted((real / "train").iterdir()) for row in json.loads(path.read_text())]
        shutil.copytree(real / "test", folder / "test")
    rows += [renumbered(rng.choice(rows), rng) for _ in range(ROWS - len(rows))]
    write(folder / "train" / "deepscaler.json", rows)
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))


def ours(source: Path, folder: Path) -> None:
    options = deepscaler.DeepScaleROptions(source=str(source), tokenizer="tiny", max_prompt_tokens=1024)
    deepscaler.build(options, folder, quiet)


def maps(source: Path, folder: Path) -> None:
    """The shape of verl's examples/data_preprocess scripts; nothing is cleaned or compared."""
    import datasets

    rows = json.loads((source / "train" / "deepscaler.json").read_text())
    plain = [{"problem": row["problem"], "answer": str(row["answer"])} for row in rows]

    def as_row(row: dict[str, Any], index: int) -> dict[str, Any]:
        return {
            "data_source": "deepscaler",
            "prompt": [{"role": "user", "content": f"{row['problem']} {deepscaler.SUFFIXES['deepscaler']}"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": row["answer"]},
            "extra_info": {"split": "train", "index": index},
        }

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(plain).map(as_row, with_indices=True).to_parquet(folder / "train.parquet")


def palindromes(source: Path, folder: Path) -> None:
    options = palindrome.PalindromeOptions(train_size=ROWS - 64, test_size=64, min_length=6, max_length=12)
    palindrome.build(options, folder, quiet)


def timed(build: Callable[[Path, Path], None], source: Path, folder: Path) -> tuple[float, float]:
    """Seconds on the clock and of the processor."""
    folder.mkdir()
    clock, processor = time.perf_counter(), time.process_time()
    build(source, folder)
    return time.perf_counter() - clock, time.process_time() - processor


def test_forty_thousand_rows_on_one_core(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="not installed: datasets (make setup)")
    builders = {"DeepScaleR, ours": ours, "datasets' map": maps, "Palindrome, ours": palindromes}
    with one_core():
        for build in builders.values():
            build(source, (tmp_path / build.__name__).mkdir() or tmp_path / build.__name__)  # imports and caches
        turns = [
            {name: timed(build, source, tmp_path / f"{turn} {name}") for name, build in builders.items()}
            for turn in range(TURNS)
        ]
    print(f"\n{ROWS} rows on one core [s]: the limit is 10")
    for name in builders:
        for place, clock in enumerate(("clock", "processor")):
            print(f"  {name:<18} {clock:<10} {spread([turn[name][place] for turn in turns])}")
    ratios = [turn["DeepScaleR, ours"][1] / turn["datasets' map"][1] for turn in turns]
    print(f"  DeepScaleR / datasets' map, processor   {spread(ratios)}")
