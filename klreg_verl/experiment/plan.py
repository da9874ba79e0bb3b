"""A recipe to its runs: arms x tasks x grid points x seeds, in the order written, each named and hashed by content.

Two runs with the same hash compute the same thing. Not hashed are names (recipe, arm, task), so that renaming harms
nothing; the number of steps, so that a run can be extended; what only watches (probes, alarms, retention, save,
samples, logging, stall); and settings at their default, so that a version with one more setting still knows the runs
of the versions before. Paths are hashed relative to the recipe's folder, so that a study can move with its data.

A hash that was stored is never compared: whoever compares runs computes it anew from the stored spec, which has every
setting, by the rule and the defaults of today. So runs of older versions are known, and one that was made when a
default was another is not taken for a run with today's.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klreg_verl.experiment import strict
from klreg_verl.experiment.recipe import (
    OPTION_PATHS,
    AlarmsSpec,
    Cell,
    ClaimSpec,
    EvalSpec,
    KLSpec,
    LoggingSpec,
    ModelSpec,
    ProbesSpec,
    Recipe,
    ReferenceSpec,
    ResourcesSpec,
    RetentionSpec,
    SamplesSpec,
    SaveSpec,
    StallSpec,
    TaskSpec,
    TrainSpec,
)
from klreg_verl.experiment.settings import objective_of
from klreg_verl.experiment.strict import ConfigError

if TYPE_CHECKING:
    from klreg_verl.core.objective import Objective

_NOT_CONTENT = (
    "recipe",
    "question",
    "root",
    "arm",
    "arms",
    "task_name",
    "grid",
    "claims",
    "probes",
    "alarms",
    "retention",
    "save",
    "samples",
    "logging",
    "stall",
)


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """Everything that one run is told."""

    recipe: str
    """File stem of the recipe."""
    question: str
    root: str
    """The recipe's folder, absolute: relative paths are hashed against it, and a user's reward module lives near it."""
    arm: str
    task_name: str
    grid: tuple[tuple[str, Any], ...] = ()
    """Dotted keys and values of the grid point; they are already in the sections."""
    seed: int
    model: ModelSpec
    task: TaskSpec
    train: TrainSpec
    kl: KLSpec
    reference: ReferenceSpec = ReferenceSpec()
    probes: ProbesSpec = ProbesSpec()
    alarms: AlarmsSpec = AlarmsSpec()
    eval: EvalSpec
    retention: RetentionSpec = RetentionSpec()
    save: SaveSpec
    samples: SamplesSpec
    logging: LoggingSpec
    stall: StallSpec = StallSpec()
    resources: ResourcesSpec
    verl: Mapping[str, Any] = field(default_factory=dict)
    """Flat dotted keys of verl's own."""
    arms: tuple[str, ...] = ()
    """The recipe's arms in its order, which a report of the runs alone keeps."""
    claims: Mapping[str, ClaimSpec] = field(default_factory=dict)
    """What the recipe is to decide; not part of what is computed, but hashed into the run's card."""

    @property
    def objective(self) -> Objective:
        """What the policy follows beside its KL term."""
        return objective_of(self.train, self.verl)

    @property
    def hash(self) -> str:
        """sha256 in hexadecimal of the content that is not at its default, in canonical JSON."""
        content = strict.away_from_default(self, self._content())
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def run_id(self) -> str:
        """`<arm>/<task>/[<k=v,...>/]seed<k>`: the run's folder below that of its recipe."""
        point = [grid_name(self.grid)] if self.grid else []
        return "/".join([self.arm, self.task_name, *point, f"seed{self.seed}"])

    def to_json(self) -> dict[str, Any]:
        """Plain values for spec.json, with `hash` and `run_id` for readers."""
        return {**asdict(self), "grid": dict(self.grid), "run_id": self.run_id, "hash": self.hash}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], *, file: str = "spec.json") -> RunSpec:
        """The inverse of to_json, as strict as a recipe. `hash` and `run_id` are computed anew. Raises ConfigError."""
        given = {key: value for key, value in values.items() if key not in ("hash", "run_id", "grid")}
        spec = strict.build(cls, strict.from_plain(given, file=file))
        return replace(spec, grid=tuple(values.get("grid", {}).items()))

    def differs(self, other: RunSpec) -> list[str]:
        """`dotted.key: a != b` for all content that differs, mine first; empty exactly when the hashes are equal."""
        mine, theirs = (dict(_flat(spec._content())) for spec in (self, other))
        return [
            f"{key}: {_show(mine, key)} != {_show(theirs, key)}"
            for key in dict.fromkeys([*mine, *theirs])
            if _canonical(mine, key) != _canonical(theirs, key) and not _has_below(mine, theirs, key)
        ]

    def _content(self) -> dict[str, Any]:
        content = {key: value for key, value in asdict(self).items() if key not in _NOT_CONTENT}
        del content["train"]["steps"]
        del content["task"]["settings"]
        for section, key in (("task", "train"), ("task", "val"), ("model", "path"), ("reference", "path")):
            content[section][key] = _relative(content[section][key], self.root)
        options = content["task"]["options"]
        content["task"]["options"] = options | {
            key: _relative(value, self.root)
            for key, value in options.items()
            if key in OPTION_PATHS and isinstance(value, str)
        }
        return content


def expand(recipe: Recipe) -> list[RunSpec]:
    """The runs in the order arms, tasks, grid points, seeds. Raises ConfigError where two of them are the same run."""
    specs = [_spec(recipe, cell, seed) for cell in recipe.cells for seed in recipe.seeds]
    _refuse_same(recipe, specs)
    return specs


def grid_name(grid: Sequence[tuple[str, Any]]) -> str:
    """`beta=0.1,steps=2`: last parts of the keys (whole keys where these are not unique), values safe as folder names.

    >>> grid_name([("kl.beta", 0.1), ("train.steps", 2)])
    'beta=0.1,steps=2'
    """
    short = [key.rpartition(".")[2] for key, _ in grid]
    names = [name if short.count(name) == 1 else key for name, (key, _) in zip(short, grid, strict=True)]
    return ",".join(f"{_safe(name)}={_safe(_plain_text(v))}" for name, (_, v) in zip(names, grid, strict=True))


def _spec(recipe: Recipe, cell: Cell, seed: int) -> RunSpec:
    sections = {name: getattr(cell.settings, name) for name in cell.settings.__dataclass_fields__}
    return RunSpec(
        recipe=recipe.name,
        question=recipe.question,
        root=str(recipe.root),
        arm=cell.arm,
        arms=tuple(recipe.arms),
        task_name=cell.task_name,
        grid=cell.grid,
        seed=seed,
        task=replace(cell.task, settings={}),
        claims=recipe.claims,
        **sections,
    )


def _refuse_same(recipe: Recipe, specs: Sequence[RunSpec]) -> None:
    seen: dict[str, RunSpec] = {}
    for spec in specs:
        other = seen.setdefault(spec.hash, spec)
        if other is not spec:
            raise ConfigError(
                [
                    f"{recipe.path}: {other.run_id} and {spec.run_id} are the same run (equal in everything but their "
                    "names, steps, and what is saved or logged). Change one of them or remove it."
                ]
            )


def _relative(path: str | None, root: str) -> str | None:
    return path if path is None or not Path(path).is_absolute() else os.path.relpath(path, root)


def _plain_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _safe(text: str) -> str:
    """Text as part of a folder name; where characters are lost, six digits of its hash keep it unique."""
    cleaned = re.sub(r"[^A-Za-z0-9_.+-]+", "-", text)
    return cleaned if cleaned == text else f"{cleaned[:40]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        nested = isinstance(value, Mapping) and value
        pairs += _flat(value, f"{prefix}{key}.") if nested else [(prefix + key, value)]
    return pairs


def _canonical(values: Mapping[str, Any], key: str) -> str:
    return json.dumps(values[key], sort_keys=True) if key in values else "absent"


def _has_below(mine: Mapping[str, Any], theirs: Mapping[str, Any], key: str) -> bool:
    """Whether the key is an empty mapping on one side, and its keys on the other side tell the difference better."""
    return any(other.startswith(f"{key}.") for other in (*mine, *theirs))


def _show(values: Mapping[str, Any], key: str) -> str:
    return strict.show(values[key]) if key in values else "(absent)"
