"""Samples of an evaluation on disk, safe under kill -9: nothing that was sampled is sampled again.

    step<N>-<task>-<hash>.parquet   one row a sample, with its grade; settings in the schema's metadata
    step<N>-<task>-<hash>.json      the numbers; only as good as the parquet file beside it
    .step<N>-<task>-<hash>/         until then: part_<n>.parquet, ungraded samples in the order in which they came
    .step<N>-<task>-<hash>/log      what vLLM said; stays if it failed

The hash is over everything that decides the samples and the grades: the model's and the data's bytes, the sampling
settings, the reward. A part appears by one rename, so that a kill loses at most the samples since the last one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klreg_verl.experiment.store import atomic_write

SAMPLE_COLUMNS = ("prompt", "sample", "seed", "response", "tokens", "truncated")
"""Of a part: place of the prompt in the file, number of the sample, its seed, its text without special tokens, its
length [tokens], whether it was cut at the token limit."""
METADATA = b"klreg"

Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Store:
    """Where one evaluation lies."""

    folder: Path
    stem: str

    @property
    def table(self) -> Path:
        """The finished evaluation."""
        return self.folder / f"{self.stem}.parquet"

    @property
    def numbers(self) -> Path:
        return self.folder / f"{self.stem}.json"

    @property
    def parts(self) -> Path:
        return self.folder / f".{self.stem}"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Held while samples are added. Raises ValueError while another process does."""
        self.parts.mkdir(parents=True, exist_ok=True)
        with open(self.parts / ".lock", "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"{self.table} is being made by another process. Wait for it, or give other settings or --out."
                ) from None
            yield

    def finish(self, rows: Rows, settings: Mapping[str, Any]) -> None:
        """Writes the graded samples, then removes the parts."""
        atomic_write(self.table, _parquet(rows, settings))
        shutil.rmtree(self.parts, ignore_errors=True)

    def read(self) -> tuple[Rows, dict[str, Any]]:
        """The graded samples in the order (prompt, sample), and the settings. Raises ValueError where it cannot."""
        table = _read(self.table)
        return table.to_pylist(), json.loads((table.schema.metadata or {}).get(METADATA, b"{}"))


def content_hash(settings: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits of what decides the samples and the grades."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def stem(step: int, task: str, settings: Mapping[str, Any]) -> str:
    """`step<N>-<task>-<hash>`, the task's name safe in a file name."""
    return f"step{step}-{re.sub(r'[^A-Za-z0-9_.]+', '-', task)}-{content_hash(settings)}"


def request_seed(seed: int, prompt: int, sample: int) -> int:
    """31 bits for one sample; the same everywhere and for ever, so that a sample is the same whenever it is drawn."""
    digest = hashlib.sha256(f"{seed}/eval/{prompt}/{sample}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def read_parts(folder: Path) -> Rows:
    """All samples of the parts, in the order (prompt, sample), each once."""
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    for path in sorted(folder.glob("part_*.parquet")):
        rows |= {(row["prompt"], row["sample"]): row for row in _read(path).to_pylist()}
    return [rows[place] for place in sorted(rows)]


def write_part(folder: Path, rows: Rows) -> None:
    """One more part, atomically."""
    numbers = [int(path.stem.removeprefix("part_")) for path in folder.glob("part_*.parquet")]
    atomic_write(folder / f"part_{max(numbers, default=0) + 1:06d}.parquet", _parquet(rows, {}))


def missing(present: Rows, prompts: int, samples: int) -> list[tuple[int, int]]:
    """(prompt, sample) of those that are not there yet, in order."""
    known = {(row["prompt"], row["sample"]) for row in present}
    return [place for p in range(prompts) for s in range(samples) if (place := (p, s)) not in known]


def _parquet(rows: Rows, settings: Mapping[str, Any]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({name: [row[name] for row in rows] for name in rows[0]})
    if settings:
        table = table.replace_schema_metadata({METADATA: json.dumps(settings, sort_keys=True)})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _read(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Remove it, and it is sampled again.") from error
