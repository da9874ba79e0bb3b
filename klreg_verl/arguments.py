"""Arguments and options that several subcommands of `klreg` have, each said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipePath = Annotated[Path, typer.Argument(help="A recipe's name or YAML file.", metavar="RECIPE")]
RecipeOrRun = Annotated[
    Path, typer.Argument(help="A recipe's name or YAML file, or one run's folder.", metavar="RECIPE|RUN")
]
Overrides = Annotated[list[str] | None, typer.Argument(help="Dotted overrides, e.g. train.steps=10.", metavar="K=V")]
RunsDir = Annotated[Path | None, typer.Option(help="Where run folders live (or KLREG_RUNS; default ./runs).")]
AsJson = Annotated[bool, typer.Option("--json", help="For machines.")]
Arms = Annotated[list[str] | None, typer.Option("--arm", help="Only this arm; again for more.")]
Tasks = Annotated[list[str] | None, typer.Option("--task", help="Only this task; again for more.")]
Seeds = Annotated[list[int] | None, typer.Option("--seed", help="Only this seed; again for more.")]
