"""What the README says exists, is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from klreg_verl.cli import app
from klreg_verl.core.metrics import markdown_table
from klreg_verl.experiment import plan, recipe

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_every_path_that_is_named_exists():
    named = set(re.findall(r"`((?:klreg_verl|launch|data_prep|recipes|tests)/[\w./-]+)`", README))
    linked = {link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")}
    missing = [path for path in sorted(named | linked) if not (ROOT / path).exists()]
    assert missing == []


def test_the_tree_is_true():
    block = README.split("## Where things are")[1].split("\n\n")[1]
    folder, missing = "", []
    for line in block.splitlines():
        indent, name = re.match(r"( +)(\S+)", line).groups()
        folder = name if len(indent) == 4 else folder
        path = name if len(indent) == 4 else folder + name
        if not (ROOT / path).exists() and path != "runs/":
            missing.append(path)
    assert missing == []


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", README)) <= targets | {"sure"}


@pytest.mark.parametrize("command", re.findall(r"^    klreg (\w+)", README, re.MULTILINE))
def test_every_command_has_help(command: str):
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0


def test_the_recipe_it_shows_loads_and_has_the_arms_of_the_quick_study(tmp_path: Path):
    shown = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "quickstart.yaml").write_text(shown[1])
    read = recipe.load(tmp_path / "quickstart.yaml")
    recipe.check_claims(read)
    real = recipe.load(ROOT / "recipes" / "quickstart.yaml")
    assert [spec.arm for spec in plan.expand(read)] == [spec.arm for spec in plan.expand(real)]


def test_the_list_of_metrics_is_generated():
    listed = README.split("<!-- metrics -->\n")[1].split("<!-- /metrics -->")[0]
    assert listed == markdown_table() + "\n", "run: python -c 'from klreg_verl.core.metrics import markdown_table; ...'"
