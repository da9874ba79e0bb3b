"""One platform for the test process (whichever test imports verl first decides it for all), and a budget of time."""

import importlib.util
import os
import time
from pathlib import Path

import pytest

if importlib.util.find_spec("verl") is not None and not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("VERL_PLATFORM", "cpu")
    os.environ.setdefault("VERL_USE_EXTERNAL_MODULES", "klreg_verl.verl_hooks.plugin")

BEGUN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    told = "begin no test that takes longer than what is left of so many seconds; it is skipped"
    parser.addoption("--budget", type=float, metavar="SECONDS", help=told)
    parser.addoption("--first", default="", metavar="NAMES", help="files (or parts of names) whose tests come first")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    names = config.getoption("first").split()
    items.sort(key=lambda item: next((n for n, name in enumerate(names) if name in item.nodeid), len(names)))


@pytest.hookimpl(tryfirst=True)  # before its fixtures are made
def pytest_runtest_setup(item: pytest.Item) -> None:
    budget, mark = item.config.getoption("budget"), item.get_closest_marker("full")
    minutes = mark.kwargs.get("minutes", 3) if mark else 0
    if budget is not None and (left := budget - (time.monotonic() - BEGUN)) < 60 * minutes:
        pytest.skip(f"takes {minutes} minutes, and {left:.0f} of {budget:.0f} s are left")
