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
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and tiny models, built once and kept in KLREG_TEST_CACHE or beside pytest's own cache, where it has one."""
    if kept := os.environ.get("KLREG_TEST_CACHE"):
        return Path(kept)
    pytests = getattr(request.config, "cache", None)
    return pytests.mkdir("klreg") if pytests else tmp_path_factory.mktemp("cache")


@pytest.fixture
def lab(tmp_path: Path, cache: Path) -> Lab:
    return Lab(tmp_path / "runs", cache)
