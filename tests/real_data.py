"""The published component files of DeepScaleR, which the project does not ship; tests without them are skipped."""

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
