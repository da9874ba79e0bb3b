"""The real stack: Ray, vLLM, FSDP, a frozen reference, on a CPU."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from stack import Lab

MISSING = [name for name in ("verl", "vllm", "ray") if importlib.util.find_spec(name) is None]


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Mark everything here, and skip it with the reason where the stack is not installed."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)
            if MISSING:
                item.add_marker(pytest.mark.skip(reason=f"not installed: {', '.join(MISSING)} (make setup)"))


@pytest.fixture(scope="session")
def cache(request: pytest.FixtureRequest) -> Path:
    """Data and tiny models, built once and kept beside pytest's own cache (or in KLREG_TEST_CACHE)."""
    kept = os.environ.get("KLREG_TEST_CACHE")
    return Path(kept) if kept else request.config.cache.mkdir("klreg")


@pytest.fixture
def lab(tmp_path: Path, cache: Path) -> Lab:
    return Lab(tmp_path / "runs", cache)
