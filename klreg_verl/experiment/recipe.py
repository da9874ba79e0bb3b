"""Recipes: one YAML file per research question -> frozen dataclasses, checked before anything starts.

    load(path, overrides) -> Recipe     arms x tasks x grid points, each a checked `Settings` (a `Cell`)
    load_kl(path) -> KLBlock            one KL block alone, as the environment variable KLREG_KL names it
    check_claims(recipe)                asks the doctor whether each arm follows the divergence it claims

What is merged, later over earlier: `base:` file, recipe, command-line overrides; then for one cell the recipe's
sections, the task's `settings:`, the arm, the grid point. Mappings merge key by key, all else is replaced, with three
exceptions where one key decides what the others mean: `kl: {placement: none}` drops the KL settings inherited from
below, `model: {path: ...}` the inherited options of another model, and a `kind:` the parameters of another kind.

A value that reaches no run is refused: a setting without effect is a mistake that a study finds too late.
Relative paths are relative to the file that says them; those of command-line overrides to the current folder.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klreg_verl.experiment import claims as claiming
from klreg_verl.experiment import logged, strict, verdicts, verl_keys
from klreg_verl.experiment.claims import ClaimSpec
from klreg_verl.experiment.kl_settings import LOSS_ONLY, REWARD_ONLY, AlarmsSpec, KLSpec, ProbesSpec, ReferenceSpec
from klreg_verl.experiment.own_code import own_modules
from klreg_verl.experiment.settings import (
    BUILT,
    DOTTED,
    SECTIONS,
    EvalSpec,
    LoggingSpec,
    ModelSpec,
    ResourcesSpec,
    RetentionSpec,
    SamplesSpec,
    SaveSpec,
    Settings,
    SkillSpec,
    StallSpec,
    TaskSpec,
    TrainSpec,
)
from klreg_verl.experiment.strict import ConfigError, FieldError, Node

if TYPE_CHECKING:
    from klreg_verl.core.objective import Objective

__all__ = [
    "AlarmsSpec",
    "Cell",
    "ClaimSpec",
    "EvalSpec",
    "KLBlock",
    "KLSpec",
    "LoggingSpec",
    "ModelSpec",
    "ProbesSpec",
    "Recipe",
    "ReferenceSpec",
    "ResourcesSpec",
    "RetentionSpec",
    "SamplesSpec",
    "SaveSpec",
    "Settings",
    "SkillSpec",
    "StallSpec",
    "TaskSpec",
    "TrainSpec",
    "check_claims",
    "check_kl",
    "load",
    "load_kl",
]

LARGEST_SEED = 2**32 - 1
"""Of numpy's legacy generator, which verl and transformers seed."""
_TOP = ("question", "base", "tasks", "seeds", "arms", "grid", "claims", *SECTIONS)

# ---------------------------------------------------------------------------------------------------- the recipe


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One arm on one task at one grid point: everything of a run but its seed."""

    arm: str
    task_name: str
    grid: tuple[tuple[str, Any], ...]
    """Dotted keys and values, of those grid keys that this arm reads."""
    task: TaskSpec
    settings: Settings
    kl_place: str
    """file:line and dotted path of the arm's KL block, for messages."""
    places: Mapping[str, str] = field(default_factory=dict)
    """Dotted key (those of the task below `task.`) -> file:line and dotted path as written, of all that was written."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One research question, fully resolved."""

    name: str
    """File stem; the folder of its runs."""
    path: Path
    question: str
    tasks: Mapping[str, TaskSpec]
    arms: Mapping[str, Mapping[str, Any]]
    """What each arm changes: dotted key -> value, as written."""
    seeds: tuple[int, ...]
    grid: Mapping[str, tuple[Any, ...]]
    cells: tuple[Cell, ...]
    """Arms x tasks x grid points, in the order written."""
    claims: Mapping[str, ClaimSpec] = field(default_factory=dict)
    """What the runs are to decide, by name; each with its task."""
    claim_places: Mapping[str, str] = field(default_factory=dict)
    """file:line and dotted path of each claim's metric, for messages."""
    overrides: tuple[str, ...] = ()

    @property
    def root(self) -> Path:
        """The recipe's folder."""
        return self.path.parent

    def describe(self) -> str:
        """What is asked, and what each arm changes; one line each."""
        width = max(map(len, self.arms))
        changes = {arm: "  ".join(f"{k}={_text(v)}" for k, v in keys.items()) for arm, keys in self.arms.items()}
        grid = [f"grid  {key} over {', '.join(map(_text, values))}" for key, values in self.grid.items()]
        counts = f"{len(self.cells)} settings x {len(self.seeds)} seeds = {len(self.cells) * len(self.seeds)} runs"
        arms = [f"arm   {arm:<{width}}  {text or '(changes nothing)'}" for arm, text in changes.items()]
        return "\n".join([f"{self.name}: {self.question.strip()}", *arms, *grid, counts])


def _text(value: Any) -> str:
    return strict.show(value).strip("'")


def load(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads, merges and checks a recipe.

    `overrides` are `dotted.key=value` with a YAML value, e.g. `train.steps=2`, `arms.reverse.kl.beta=0.3`,
    `grid.kl.beta=[0.1,0.2]`, `seeds=[1,2]`. Raises ConfigError (a ValueError) with every problem found.
    """
    path = Path(path)
    tree = _read(path, ())
    merged = functools.reduce(_override, overrides, tree)
    checked_files = [_override_name(text) for text in overrides] or [tree.file]
    return _Composer(path, merged, checked_files).recipe(tuple(overrides))


@dataclass(frozen=True, kw_only=True)
class KLBlock:
    """All that a run's hooks are told: what the file named by KLREG_KL holds."""

    kl: KLSpec = KLSpec()
    reference: ReferenceSpec = ReferenceSpec()
    probes: ProbesSpec = ProbesSpec()
    alarms: AlarmsSpec = AlarmsSpec()


def load_kl(path: Path | str) -> KLBlock:
    """A file with a recipe's sections `kl`, `reference`, `probes`, `alarms`, or a bare KL block. Raises ConfigError."""
    node = strict.parse_file(Path(path))
    children = node.mapping()
    if "arms" in children:
        raise node.error("this is a recipe. A KL file holds one KL block: placement, estimator, follows, beta.")
    if not (children.get("kl") or node).value:
        raise node.error("there is no KL block. Say `placement: none` for a run whose KL is measured only.")
    if set(children) & {field.name for field in fields(KLBlock)}:
        return strict.build(KLBlock, node)
    return KLBlock(kl=strict.build(KLSpec, node))


def check_kl(kl: KLSpec, place: str, objective: Objective) -> None:
    """Asks the doctor whether the KL follows what it claims; ConfigError with `place`, the reason and the way out.

    `objective` is the policy's beside it: a charge in the reward goes through the policy loss.

    The doctor, and so torch, is imported only where it has not judged this block before.
    """

    def judged() -> str | None:
        from klreg_verl import doctor

        try:
            doctor.check_claim(kl, objective)
        except ValueError as error:
            return str(error)
        return None

    refusal = verdicts.about(kl, {"asked": "check", "objective": asdict(objective)}, judged)
    if refusal is not None:
        raise ConfigError([f"{place}: {refusal}"])


def check_claims(recipe: Recipe) -> None:
    """`check_kl` for every cell, and that every claim's metric is logged; ConfigError with each refusal once."""
    problems = _never_logged(recipe)
    settings = {(cell.settings.kl, cell.kl_place, cell.settings.objective) for cell in recipe.cells}
    for setting in sorted(settings, key=lambda each: each[1]):
        try:
            with own_modules(recipe.root):
                check_kl(*setting)
        except ConfigError as error:
            problems.extend(error.problems)
    if problems:
        raise ConfigError(problems)


def _never_logged(recipe: Recipe) -> list[str]:
    """Claims on a metric that an arm of theirs never logs; core's table of metrics needs torch."""
    if not recipe.claims:
        return []
    from klreg_verl.core.metrics import METRICS

    problems: dict[str, list[str]] = {}
    for name, claim in recipe.claims.items():
        for cell in (cell for cell in recipe.cells if cell.task_name == claim.task and cell.arm in claim.contrast):
            if why := logged.why_not(claim.metric, cell.settings, cell.task, METRICS):
                problems.setdefault(f"{recipe.claim_places[name]}: {why}", []).append(cell.arm)
    told = {problem: list(dict.fromkeys(arms)) for problem, arms in problems.items()}
    return [problem if len(arms) > 1 else f"{problem} (Concerns: {arms[0]}.)" for problem, arms in told.items()]


# ---------------------------------------------------------------------------------------------------- reading files


def _read(path: Path, including: tuple[Path, ...]) -> Node:
    """The file merged over its `base:` chain, which must not come back to itself."""
    node = strict.parse_file(path)
    base = node.mapping().get("base")
    node = _normalise(node)
    if base is None:
        return node
    if not isinstance(base.value, str):
        raise base.error(f"expected the path of a YAML file, got {strict.show(base.value)}.")
    target = node.folder / base.value
    chain = (*including, path.resolve())
    if target.resolve() in chain:
        raise base.error(f"{base.value!r} includes this file again. A base must end somewhere.")
    if not target.is_file():
        raise base.error(f"{base.value!r} does not exist (looked for {target}).")
    return _merge_recipe(_read(target, chain), node)


def _normalise(tree: Node) -> Node:
    """Paths made absolute and `verl` flattened, wherever a recipe can say them."""
    children = {key: child for key, child in tree.mapping().items() if key != "base"}
    for key in ("arms", "tasks"):
        if key in children and isinstance(children[key].value, dict):
            fix = _normalise_sections if key == "arms" else _normalise_task
            children[key] = children[key].with_value({name: fix(n) for name, n in children[key].value.items()})
    return _normalise_sections(tree.with_value(children))


def _normalise_sections(node: Node) -> Node:
    if not isinstance(node.value, dict):
        return node
    children = dict(node.value)
    if "verl" in children:
        children["verl"] = _flattened(children["verl"])
    for section in ("model", "reference"):
        of = children.get(section)
        if of is not None and isinstance(of.value, dict) and "path" in of.value:
            path = of.value["path"]
            children[section] = of.with_value({**of.value, "path": path.with_value(_model_path(path))})
    if "retention" in children:
        children["retention"] = _normalise_retention(children["retention"])
    return node.with_value(children)


def _normalise_retention(node: Node) -> Node:
    """Files of skills, absolute."""
    skills = node.value.get("skills") if isinstance(node.value, dict) else None
    if skills is None or not isinstance(skills.value, dict):
        return node
    made = {name: _with_paths(skill, ("val",)) for name, skill in skills.value.items()}
    return node.with_value({**node.value, "skills": skills.with_value(made)})


def _with_paths(node: Node, keys: Sequence[str]) -> Node:
    """The mapping with the files that these keys name absolute."""
    if not isinstance(node.value, dict):
        return node
    children = dict(node.value)
    for key in keys:
        if key in children and isinstance(children[key].value, str) and children[key].value:
            target = node.folder / Path(children[key].value).expanduser()
            children[key] = children[key].with_value(str(target.resolve()))
    return node.with_value(children)


def _model_path(node: Node) -> Any:
    """A folder (one that starts with . / ~ or exists beside the file) absolute; BUILT and hub ids as they are."""
    text = node.value
    if not isinstance(text, str) or not text or text in BUILT:
        return text
    target = node.folder / Path(text).expanduser()
    return str(target.resolve()) if text[0] in "./~" or target.is_dir() else text


def _normalise_task(node: Node) -> Node:
    if not isinstance(node.value, dict):
        return node
    children = dict(_with_paths(node, ("train", "val")).value)
    if "options" in children:
        children["options"] = _normalise_options(children["options"])
    if "settings" in children:
        children["settings"] = _normalise_sections(children["settings"])
    return node.with_value(children)


_FILE_OPTIONS = ("source", "evaluation")
OPTION_PATHS = (*_FILE_OPTIONS, "tokenizer")
"""Options of builtin tasks that may name files or folders."""


def _normalise_options(node: Node) -> Node:
    """Files and folders that a builtin's data is made from, absolute."""
    if not isinstance(node.value, dict):
        return node
    children = dict(node.value)
    for key in _FILE_OPTIONS:
        if key in children and isinstance(children[key].value, str) and children[key].value not in ("", "hub"):
            target = node.folder / Path(children[key].value).expanduser()
            children[key] = children[key].with_value(str(target.resolve()))
    if "tokenizer" in children:
        children["tokenizer"] = children["tokenizer"].with_value(_model_path(children["tokenizer"]))
    return node.with_value(children)


def _flattened(node: Node) -> Node:
    """Nested and dotted verl keys to dotted ones, without Hydra's +; a key written in two ways is refused."""
    flat: dict[str, Node] = {}
    for written, leaf in _dotted(node.mapping()):
        key = _without_plus(written)
        if key in flat:
            raise leaf.error(f"written twice (first at {flat[key].place}). Keep one of them.")
        flat[key] = leaf
    return node.with_value(flat)


def _without_plus(key: str) -> str:
    """klreg adds what verl's YAML lacks without it; the node's path keeps it, for `_verl_problems`."""
    return ".".join(part.lstrip("+") for part in key.split("."))


def _verl_problems(verl: Node) -> list[str]:
    """What verl does not know, or takes another kind of value for, among merged and flattened `verl:` keys."""
    problems = []
    for key, leaf in verl.mapping().items():
        if problem := verl_keys.problem(key, strict.plain(leaf), plus="+" in leaf.path):
            problems.append(leaf.problem(problem))
    return problems


def _dotted(children: Mapping[str, Node], prefix: str = "") -> Iterator[tuple[str, Node]]:
    for key, child in children.items():
        if isinstance(child.value, dict) and child.value:
            yield from _dotted(child.value, f"{prefix}{key}.")
        else:
            yield prefix + key, child


# ---------------------------------------------------------------------------------------------------- merging


def _merge(under: Node | None, over: Node) -> Node:
    """Mappings key by key, anything else replaced. Leaves keep their identity."""
    if under is None or not isinstance(under.value, dict):
        return over
    if not isinstance(over.value, dict):
        return under if over.value is None else over
    if "kind" in over.value and not over.implied:
        return over
    merged = dict(under.value)
    for key, child in over.value.items():
        merged[key] = _merge(merged.get(key), child)
    return _result(under, over, merged)


def _result(under: Node, over: Node, merged: dict[str, Node]) -> Node:
    """The merged mapping, at the place of the later one that somebody wrote."""
    return (under if over.implied else over).with_value(merged)


def _decides(section: str, node: Node) -> bool:
    """Whether an overlay says the key that makes the inherited rest of its section meaningless."""
    if not isinstance(node.value, dict):
        return False
    if section == "model":
        return "path" in node.value
    placement = node.value.get("placement")
    return section == "kl" and placement is not None and placement.value == "none"


def _overlay(under: Node, over: Node) -> Node:
    """Sections over sections, with the exceptions of the module's head."""
    merged = dict(under.mapping())
    for section, node in over.mapping().items():
        merged[section] = node if _decides(section, node) else _merge(merged.get(section), node)
    return _result(under, over, merged)


def _merge_recipe(under: Node, over: Node) -> Node:
    """A recipe over its base: sections and arms as overlays, tasks and grid by name."""
    merged = dict(_overlay(under, over).mapping())
    old, new = (tree.mapping().get("arms") for tree in (under, over))
    if old is not None and new is not None:
        arms = dict(old.mapping())
        for name, node in new.mapping().items():
            arms[name] = _overlay(arms[name], node) if name in arms else node
        merged["arms"] = new.with_value(arms)
    return _result(under, over, merged)


# ---------------------------------------------------------------------------------------------------- overrides


def _override_name(text: str) -> str:
    return f"override {text!r}"


def _override(tree: Node, text: str) -> Node:
    """The tree with `dotted.key=value` written over it."""
    key, equals, value = text.partition("=")
    here = Node(value=None, path="", file=_override_name(text), folder=Path.cwd())
    if not equals or not key.strip():
        raise here.error("is not of the form key=value, e.g. train.steps=2.")
    if not value.strip():
        raise here.error("has no value. To say nothing write null.")
    key = key.strip()
    leaf = strict.parse_text(value, file=here.file, folder=here.folder, path=key)
    leaf = replace(leaf, path=key, line=None)
    addition = _nested(_path_of_key(tree, key, here), leaf)
    return _merge_recipe(tree, _normalise(addition))


def _path_of_key(tree: Node, key: str, here: Node) -> list[str]:
    """The parts of an override's key; names of arms and tasks must exist, a grid's key is one part."""
    top, *rest = key.split(".")
    if top not in _TOP or top == "base":
        raise here.error(strict.unknown_key(top, [name for name in _TOP if name != "base"], DOTTED))
    if top == "grid" and rest:
        return [top, ".".join(rest)]
    if top in ("arms", "tasks") and rest:
        names = tree.mapping()[top].mapping() if top in tree.mapping() else {}
        if rest[0] not in names:
            near = strict.suggestion(rest[0], names)
            raise here.error(f"there is no {rest[0]!r} in {top}.{near} Known: {', '.join(names)}.")
    return [top, *rest]


def _nested(parts: Sequence[str], leaf: Node) -> Node:
    """{a: {b: leaf}} for [a, b]; the nodes around the leaf have its place and their part of its path."""
    for depth in range(len(parts) - 1, -1, -1):
        path = ".".join(parts[:depth])
        leaf = replace(leaf, value={parts[depth]: leaf}, path=path, implied=True)
    return leaf


# ---------------------------------------------------------------------------------------------------- composing


@dataclass(frozen=True, kw_only=True)
class _Point:
    """One grid point: keys, values and the nodes they come from."""

    items: tuple[tuple[str, Node], ...]

    @property
    def values(self) -> tuple[tuple[str, Any], ...]:
        return tuple((key, strict.plain(node)) for key, node in self.items)


class _Composer:
    """Turns one merged tree into a Recipe, collecting the problems of all cells."""

    def __init__(self, path: Path, tree: Node, checked_files: Collection[str]) -> None:
        self.path = path
        self.tree = tree
        self.children = tree.mapping()
        self.sections = tree.with_value({key: node for key, node in self.children.items() if key in SECTIONS})
        self.checked_files = checked_files
        self.problems: dict[str, list[str]] = {}
        self.used: set[int] = set()

    def recipe(self, overrides: tuple[str, ...]) -> Recipe:
        self.check_top()
        question = strict.convert(self.children["question"], str)
        tasks = self.named("tasks")
        specs = {name: strict.build(TaskSpec, node) for name, node in tasks.items()}
        arms, grid = self.named("arms"), self.grid()
        cells = self.cells(arms, tasks, specs, grid)
        self.raise_problems(len(arms))
        self.refuse_unused(arms, tasks, grid)
        return Recipe(
            name=self.name(),
            path=self.path.resolve(),
            question=question,
            tasks=specs,
            arms={arm: _arm_changes(node) for arm, node in arms.items()},
            seeds=self.seeds(),
            grid={key: tuple(map(strict.plain, nodes)) for key, nodes in grid.items()},
            cells=tuple(cells),
            claims=self.claims(cells, list(arms), list(tasks)),
            claim_places=self.claim_places(),
            overrides=overrides,
        )

    def name(self) -> str:
        stem = self.path.stem
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", stem):
            raise ConfigError([f"{self.path}: the name {stem!r} becomes a folder. Use letters, digits, _ . and -."])
        return stem

    def check_top(self) -> None:
        known = [name for name in _TOP if name != "base"]
        problems = [
            child.problem(strict.unknown_key(key, [*known, "base"], DOTTED))
            for key, child in self.children.items()
            if key not in known
        ]
        for key in ("question", "tasks", "arms", "seeds"):
            if key not in self.children:
                problems.append(self.tree.problem("missing. It has no default and must be written.", below=key))
        if problems:
            raise ConfigError(problems)
        self.check_sections([self.sections])

    def named(self, key: str) -> dict[str, Node]:
        """Arms or tasks by name. The names become folders."""
        nodes = self.children[key].mapping()
        if not nodes:
            raise self.children[key].error(f"is empty. Name at least one of the {key}.")
        for name, node in nodes.items():
            if not re.fullmatch(r"[a-zA-Z0-9_-]+", name):
                raise node.error(f"the name {name!r} becomes a folder. Use letters, digits, _ and -.")
        if key == "arms":
            self.check_sections(nodes.values())
        return nodes

    def check_sections(self, nodes: Iterable[Node]) -> None:
        """Refuses unknown sections, and sections that are no mappings."""
        problems = []
        for section, child in [item for node in nodes for item in node.mapping().items()]:
            if section not in SECTIONS:
                problems.append(child.problem(strict.unknown_key(section, SECTIONS, DOTTED)))
            child.mapping()
        if problems:
            raise ConfigError(problems)

    def seeds(self) -> tuple[int, ...]:
        node = self.children["seeds"]
        if not isinstance(node.value, list):
            advice = _seeds_advice(node.value)
            raise node.error(f"expected a list of whole numbers, got {strict.show(node.value)}.{advice}")
        seeds: tuple[int, ...] = strict.convert(node, tuple[int, ...])
        if not seeds:
            raise node.error("is empty. Give at least one seed, e.g. [1].")
        if wrong := [seed for seed in seeds if not 0 <= seed <= LARGEST_SEED]:
            raise node.error(f"{wrong[0]} is no seed: numpy takes 0 to {LARGEST_SEED}. Small ones do as well as any.")
        if repeated := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
            raise node.error(f"{repeated[0]} is written twice: it would be the same run.")
        return seeds

    def grid(self) -> dict[str, list[Node]]:
        """Dotted keys to their values. The keys must lie in a section."""
        grid = self.children["grid"].mapping() if "grid" in self.children else {}
        for key, node in grid.items():
            section, dot, _ = key.partition(".")
            if section not in SECTIONS or not dot:
                near = strict.suggestion(key, DOTTED)
                raise node.error(f"unknown key {key!r}.{near} A grid goes over dotted keys such as kl.beta.")
            self.check_grid_values(key, node)
        return {key: node.value for key, node in grid.items()}

    @staticmethod
    def check_grid_values(key: str, node: Node) -> None:
        if not isinstance(node.value, list) or not node.value:
            raise node.error(f"must be a list of values, got {strict.show(node.value)}. Did you mean {key}: [...]?")
        texts = [repr(strict.plain(item)) for item in node.value]
        if repeated := [text for text in texts if texts.count(text) > 1]:
            raise node.error(f"{repeated[0]} is written twice: it would be the same run.")

    def cells(
        self,
        arms: Mapping[str, Node],
        tasks: Mapping[str, Node],
        specs: Mapping[str, TaskSpec],
        grid: Mapping[str, list[Node]],
    ) -> list[Cell]:
        cells = []
        for (arm, arm_node), (task, task_node) in itertools.product(arms.items(), tasks.items()):
            under = self.settings_of(task_node, arm_node)
            for point in _points(grid, under):
                cells.append(self.cell(arm, task, specs[task], under, point, task_node))
        return [cell for cell in cells if cell is not None]

    def settings_of(self, task: Node, arm: Node) -> Node:
        """The recipe's sections, under the task's settings, under the arm."""
        merged = self.sections
        settings = task.mapping().get("settings")
        if settings is not None:
            self.check_sections([settings])
            merged = _overlay(merged, settings)
        return self.tree.with_value(_overlay(merged, arm).value)

    def cell(self, arm: str, task: str, spec: TaskSpec, under: Node, point: _Point, task_node: Node) -> Cell | None:
        merged = under
        for key, node in point.items:
            verl, _, name = key.partition(".")
            parts = [verl, _without_plus(name)] if verl == "verl" else key.split(".")
            merged = _overlay(merged, _nested(parts, node))
        self.used.update(id(leaf) for leaf in strict.leaves(merged))
        try:
            if unknown := _verl_problems(merged.mapping().get("verl", merged.with_value(None))):
                raise ConfigError(unknown)
            settings = strict.build(Settings, merged)
        except ConfigError as error:
            for problem in error.problems:
                self.problems.setdefault(problem, []).append(arm)
            return None
        kl = merged.mapping().get("kl", merged)
        place = f"{kl.place}: {kl.path or f'arms.{arm}.kl'}"
        written = {**merged.mapping(), "task": task_node}
        return Cell(
            arm=arm,
            task_name=task,
            grid=point.values,
            task=spec,
            settings=settings,
            kl_place=place,
            places={key: f"{leaf.place}: {leaf.path}" for key, leaf in _dotted(written)},
        )

    def claims(self, cells: Sequence[Cell], arms: Sequence[str], tasks: Sequence[str]) -> dict[str, ClaimSpec]:
        """The claims by name, each with its task; ConfigError with all that cannot be decided by any run."""
        found: dict[str, ClaimSpec] = {}
        problems: list[str] = []
        for name, node in (self.children["claims"].mapping() if "claims" in self.children else {}).items():
            try:
                found[name] = self.claim(name, node, cells, arms, tasks)
            except ConfigError as error:
                problems.extend(error.problems)
        if problems:
            raise ConfigError(problems)
        return found

    def claim_places(self) -> dict[str, str]:
        nodes = self.children["claims"].mapping() if "claims" in self.children else {}
        metrics = {name: node.mapping()["metric"] for name, node in nodes.items()}
        return {name: f"{metric.place}: {metric.path}" for name, metric in metrics.items()}

    @staticmethod
    def claim(name: str, node: Node, cells: Sequence[Cell], arms: Sequence[str], tasks: Sequence[str]) -> ClaimSpec:
        claim = strict.build(ClaimSpec, node)
        task = claim.task or tasks[0]
        of_task = [cell for cell in cells if cell.task_name == task]
        betas = {arm: [cell.settings.kl.beta for cell in of_task if cell.arm == arm] for arm in arms}
        try:
            claiming.check(name, claim, arms=arms, tasks=tasks, betas=betas)
        except FieldError as error:
            child = node.mapping().get(error.field)
            raise (child or node).error(error.message, below="" if child else error.field) from None
        return replace(claim, task=task)

    def raise_problems(self, num_arms: int) -> None:
        """All problems of all cells; one that concerns only some arms says which."""
        lines = []
        for problem, arms in self.problems.items():
            names = list(dict.fromkeys(arms))
            known = len(names) == num_arms or ": arms." in problem
            lines.append(problem if known else f"{problem} (Concerns: {', '.join(names)}.)")
        if lines:
            raise ConfigError(lines)

    def refuse_unused(
        self, arms: Mapping[str, Node], tasks: Mapping[str, Node], grid: Mapping[str, list[Node]]
    ) -> None:
        """Refuses what reaches no run: of the recipe itself (a shared base may say more), or of the overrides."""
        settings = [task.mapping()["settings"] for task in tasks.values() if "settings" in task.mapping()]
        points = [node for nodes in grid.values() for node in nodes]
        problems = [
            leaf.problem(
                f"{strict.show(leaf.value)} has no effect on any run: whatever is merged over it (a task's settings, "
                "the arms, the grid) says it again, or no arm reads it. Remove it, or say it there."
            )
            for node in (self.sections, *settings, *(arm for arm in arms.values() if arm.value is not None), *points)
            for leaf in strict.leaves(node)
            if id(leaf) not in self.used and leaf.file in self.checked_files
        ]
        if problems:
            raise ConfigError(problems)


def _seeds_advice(value: Any) -> str:
    """The list that was meant, where a person would know: range(1, 9), 1-8, 1 2 3, or a count."""
    if type(value) is int and 1 < value <= 12:
        return f" Write [{value}] for that one seed, or {list(range(1, value + 1))} for {value} of them."
    text = "" if value is None or isinstance(value, (dict, bool)) else str(value)
    numbers: Sequence[int] = [int(digits) for digits in re.findall(r"\d+", text)]
    if re.fullmatch(r"\s*range\([\d,\s]+\)\s*", text) and len(numbers) <= 3 and 0 not in numbers[2:]:
        numbers = range(*numbers)
    elif re.fullmatch(r"\s*\d+\s*(-|:|to|\.\.+)\s*\d+\s*", text):
        numbers = range(numbers[0], numbers[1] + 1)
    shown = ", ".join([*map(str, numbers[:12]), *["..."] * bool(numbers[12:13])])
    return f" Write [{shown}]." if shown else " Write the seeds one by one, e.g. [1, 2, 3]."


def _arm_changes(node: Node) -> dict[str, Any]:
    """An arm's changes as dotted keys."""
    return {key: strict.plain(leaf) for key, leaf in _dotted(node.mapping())}


def _points(grid: Mapping[str, list[Node]], under: Node) -> list[_Point]:
    """The cartesian product, without the keys that the arm does not read; each remaining point once."""
    points: dict[tuple[tuple[str, int], ...], _Point] = {}
    for nodes in itertools.product(*grid.values()):
        chosen = dict(zip(grid, nodes, strict=True))
        placement = chosen.get("kl.placement", under.mapping().get("kl", under).mapping().get("placement"))
        items = tuple((key, node) for key, node in chosen.items() if _reads(placement, key))
        points.setdefault(tuple((key, id(node)) for key, node in items), _Point(items=items))
    return list(points.values())


def _reads(placement: Node | None, key: str) -> bool:
    """Whether an arm with this KL placement reads a dotted key."""
    where = "none" if placement is None else placement.value
    if where == "none":
        return not key.startswith("kl.") or key == "kl.placement"
    return key not in {f"kl.{name}" for name in {"reward": LOSS_ONLY, "loss": REWARD_ONLY}.get(where, ())}
