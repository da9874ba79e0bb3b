"""What a study compares, in words: each arm's KL and what the doctor says of it; what of verl's settings differs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from klreg_verl.experiment import verdicts
from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.recipe import Cell, KLSpec, Recipe

Values = Mapping[str, Any]
_ALWAYS = ("placement", "estimator", "follows", "beta", "controller.kind")


def arms(read: Recipe) -> list[str]:
    """Two lines an arm: its KL block, what it shares with others included, and the doctor's sentence on it."""
    width = max(map(len, read.arms))
    lines = []
    for name, cell in _first_cells(read).items():
        lines += [f"kl    {name:<{width}}  {_block(cell.settings.kl, read)}", f"      {'':<{width}}  {_sentence(cell)}"]
    return lines


def _first_cells(read: Recipe) -> dict[str, Cell]:
    """One cell an arm, and one more for each task whose settings give it another KL."""
    cells: dict[str, Cell] = {}
    for cell in read.cells:
        first = cells.setdefault(cell.arm, cell)
        if cell.task_name != first.task_name and cell.grid == first.grid and cell.settings.kl != first.settings.kl:
            cells[f"{cell.arm} on {cell.task_name}"] = cell
    return cells


def _block(kl: KLSpec, read: Recipe) -> str:
    """What is always asked, and whatever is not as by default; a grid's key with all its values."""
    if kl.placement == "none":
        return "placement=none"
    default, given = dict(_flat(asdict(KLSpec()))), dict(_flat(asdict(kl)))
    shown = {key: value for key, value in given.items() if key in _ALWAYS or value != default.get(key)}
    shown |= {key.removeprefix("kl."): values for key, values in read.grid.items() if key.removeprefix("kl.") in given}
    ordered = sorted(shown, key=lambda key: _ALWAYS.index(key) if key in _ALWAYS else len(_ALWAYS))
    return "  ".join(f"{key}={_text(shown[key])}" for key in ordered)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _text(value: Any) -> str:
    return ",".join(map(_text, value)) if isinstance(value, tuple) else f"{value}"


def _sentence(cell: Cell) -> str:
    kl, objective = cell.settings.kl, cell.settings.objective

    def told() -> str:
        from klreg_verl import doctor

        return doctor.explain(kl, objective)

    return verdicts.about(kl, {"asked": "explain", "objective": asdict(objective), "json": False}, told) or ""


def differences(runs: Sequence[tuple[RunSpec, Values]]) -> list[str]:
    """verl's settings of some runs: those of all once, then what an arm has of its own, then what goes by the seed."""
    shared = _common([values for _, values in runs])
    lines = ["all runs" if len(runs) > 1 else runs[0][0].run_id, *_settings(shared)]
    groups: dict[str, list[tuple[RunSpec, Values]]] = {}
    for spec, values in runs:
        groups.setdefault(spec.run_id.rpartition("/")[0], []).append((spec, values))
    for name, members in groups.items() if len(runs) > 1 else ():
        own = _common([values for _, values in members])
        seeds = ", ".join(f"seed{spec.seed} {spec.hash[:12]}" for spec, _ in members)
        lines += ["", f"{name}  ({seeds})", *_settings({key: own[key] for key in own if key not in shared})]
        by_seed = [key for key in members[0][1] if key not in own]
        lines += [
            f"  {key} by seed: {', '.join(json.dumps(values.get(key)) for _, values in members)}" for key in by_seed
        ]
    return lines


def _common(every: Sequence[Values]) -> dict[str, Any]:
    """The settings that all have, with the same value."""
    first, *others = every
    return {key: value for key, value in first.items() if all(key in one and one[key] == value for one in others)}


def _settings(values: Values) -> list[str]:
    return [f"  {key}={json.dumps(value)}" for key, value in values.items()]
