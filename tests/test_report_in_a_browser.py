"""The report in a real browser, headless, light and dark: it loads without a complaint, and its figures are there."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from matplotlib import image
from run_folders import RECIPE, write_study

from klreg_verl.analysis import report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=5000")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium and no google-chrome here (apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.write_report(write_study(tmp_path_factory.mktemp("runs") / "synthetic"), RECIPE).html


def browse(page: Path, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={folder / 'profile'}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


def test_the_page_loads_without_a_word_on_the_console_and_has_every_figure(page: Path, tmp_path: Path):
    done = browse(page, tmp_path, "--dump-dom")
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    written = page.read_text(encoding="utf-8")
    for tag in ("<svg", "<figure", "<table", "<h2"):
        assert done.stdout.count(tag) == written.count(tag) > 0


def test_a_complaint_would_be_seen(tmp_path: Path):
    page = tmp_path / "page.html"
    page.write_text("<script>console.error('here')</script>")
    assert "CONSOLE" in browse(page, tmp_path, "--dump-dom").stderr


def test_the_page_is_drawn_light_and_dark_and_can_be_printed(page: Path, tmp_path: Path):
    light, dark, printed = tmp_path / "light.png", tmp_path / "dark.png", tmp_path / "page.pdf"
    browse(page, tmp_path, f"--screenshot={light}", "--window-size=1200,1600")
    browse(page, tmp_path, f"--screenshot={dark}", "--window-size=1200,1600", "--blink-settings=preferredColorScheme=0")
    browse(page, tmp_path, f"--print-to-pdf={printed}")
    assert brightness(light) > 0.7 and brightness(dark) < 0.3
    assert len(re.findall(rb"/Type\s*/Page\b", printed.read_bytes())) >= 2


def brightness(picture: Path) -> float:
    """Mean over pixels and colours, 0 to 1."""
    return float(image.imread(picture)[..., :3].mean())
