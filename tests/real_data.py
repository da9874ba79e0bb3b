"""Files of others, which the project does not ship: DeepScaleR's components, and inputs from public reports."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def agentica() -> Path:
    """The folder with train/{aime,math}.json and test/{aime,amc,math,minerva,olympiad_bench}.json."""
    data = Path(os.environ.get("KLREG_TEST_DATA") or ROOT.parent / "shared" / "data")
    folder = data / "deepscaler" / "agentica"
    if not (folder / "train" / "math.json").is_file():
        pytest.skip(f"{folder} is not there: it holds the real DeepScaleR files (KLREG_TEST_DATA says where)")
    return folder


def cases(kind: str | Path) -> Path:
    """A file or folder of inputs from public reports; the test is skipped where they are not there."""
    place = Path(os.environ.get("KLREG_TEST_CASES") or ROOT.parent / "shared" / "cases") / kind
    if not place.exists():
        pytest.skip(f"{place} is not there: it holds inputs from public reports (KLREG_TEST_CASES says where)")
    return place


def copied(kind: str | Path, folder: Path) -> Path:
    """The same as a copy in ``folder`` that a test may write into."""
    place = cases(kind)
    target = folder / place.name
    for path in [place, *place.rglob("*")]:
        made = target / path.relative_to(place)
        if path.is_dir():
            made.mkdir(parents=True)
        else:
            made.write_bytes(path.read_bytes())
    return target
