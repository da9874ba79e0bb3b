"""What the GPU tests share: skipped with the reason where there is no CUDA device; `klreg` as tests/e2e runs it."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from launch import gpu

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "e2e"))  # stack.py


def missing() -> str:
    """Why nothing here can run; empty where it can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    absent = [name for name in ("verl", "vllm", "ray") if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)} (launch/env/setup_gpu.sh)" if absent else ""


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Mark everything here; tests of the stack need the stack, too."""
    why = missing()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if why:
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(autouse=True)
def given_back() -> Iterator[None]:
    """A test's tensors do not stay in this process: `klreg run` refuses a GPU that somebody else computes on."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and models, built once (or kept between runs in KLREG_TEST_CACHE)."""
    kept = os.environ.get("KLREG_TEST_CACHE")
    return Path(kept) if kept else tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def attention() -> list[str]:
    """Overrides that a run without flash-attn needs."""
    return [] if importlib.util.find_spec("flash_attn") else [f"verl.{k}={v}" for k, v in gpu.WITHOUT_FLASH.items()]
