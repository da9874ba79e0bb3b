"""Strict YAML: a tree whose every value knows its file, line and dotted path, and typed dataclasses built from it.

Plain (unquoted) scalars follow the core schema of YAML 1.2, not PyYAML's YAML 1.1:

    null ~ (empty)          -> None
    true false              -> bool       (yes, no, on, off stay text: `wandb: off` means what it says)
    12 -3                   -> int
    0.1 1. .5 1e-6 1.0E+3   -> float      (PyYAML reads 1e-6 as text)
    anything else, quoted   -> str

A bool never passes as a number, a number never as text, a quoted number never as a number; a whole number passes as a
float. Unknown, missing and repeated keys are refused. Every problem of a file is reported at once, one line each:

    recipes/x.yaml:12: arms.reverse.kl.estimator: 'k9' is not one of k1, k2, k3.
"""

from __future__ import annotations

import difflib
import math
import re
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")


class ConfigError(ValueError):
    """What is wrong with a configuration: `problems` holds one line each, with its place and dotted path."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(dict.fromkeys(problems))
        super().__init__("\n".join(self.problems))


class FieldError(ValueError):
    """Raised in `__post_init__` about one field (dotted below the dataclass), so that `build` can name its line."""

    def __init__(self, field: str, message: str) -> None:
        self.field, self.message = field, message
        super().__init__(f"{field}: {message}")


def at_least(field: str, value: float | None, minimum: float, why: str = "") -> None:
    """Raises FieldError for a value that is too small; None is no value."""
    if value is not None and value < minimum:
        raise FieldError(field, f"{value} is too small: at least {minimum}.{' ' + why if why else ''}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Node:
    """One value of a YAML tree; compared by identity, so that a merged tree can be asked whose values reached it."""

    value: Any
    """None, bool, int, float or str; `dict[str, Node]`; `list[Node]`."""
    path: str
    """Dotted path as written, e.g. `arms.reverse.kl.beta`; empty for the whole file."""
    file: str
    """As shown in messages."""
    line: int | None = None
    """Counted from 1; that of the key, for a value in a mapping."""
    folder: Path = Path()
    """What relative paths written here are relative to."""
    implied: bool = False
    """A mapping that nobody wrote, around a dotted key; merged over a written one it leaves that one's place."""

    @property
    def place(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"

    def problem(self, message: str, below: str = "") -> str:
        """One line: place, dotted path (of a key `below` this node, if given), message."""
        path = ".".join(part for part in (self.path, below) if part)
        return f"{self.place}: {path}: {message}" if path else f"{self.place}: {message}"

    def error(self, message: str, below: str = "") -> ConfigError:
        return ConfigError([self.problem(message, below)])

    def mapping(self) -> dict[str, Node]:
        """The keys and values; null and an empty mapping are the same. Raises ConfigError for anything else."""
        if self.value is None:
            return {}
        if not isinstance(self.value, dict):
            raise self.error(f"expected a mapping (key: value), got {show(self.value)}.")
        return self.value

    def with_value(self, value: Any) -> Node:
        return replace(self, value=value)


def show(value: Any) -> str:
    """A value in the words of YAML, for messages."""
    if isinstance(value, dict):
        return f"a mapping with the keys {', '.join(value) or '(none)'}"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    constants = {None: "null", True: "true", False: "false"}
    return constants[value] if value is None or isinstance(value, bool) else repr(value)


def suggestion(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the nearest known word (or dotted path ending in it); empty when none is near."""
    choices = list(known)
    by_leaf = [choice for choice in choices if choice.rpartition(".")[2] == word]
    near = by_leaf or difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(choice) for choice in near[:3])}?" if near else ""


def unknown_key(key: str, known: Iterable[str], elsewhere: Iterable[str] = ()) -> str:
    """The message for a key that nobody reads; `elsewhere` are dotted keys that exist in other places."""
    known = list(known)
    return f"unknown key {key!r}.{suggestion(key, [*known, *elsewhere])} Known keys: {', '.join(known)}."


# ---------------------------------------------------------------------------------------------------- reading


MAX_BYTES = 128 * 1024
MAX_DEPTH = 50
MAX_VALUES = 10_000
"""What a settings file may have: more is a mistake or an attack (aliases of aliases), and takes minutes to read."""


_OPENINGS = re.compile(rf"(?:[\[{{]\s*+){{{MAX_DEPTH + 1}}}")


class _Loader(yaml.SafeLoader):
    """SafeLoader with the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema), decimal only."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_TAG = "tag:yaml.org,2002:"
_Loader.yaml_implicit_resolvers = {}
for _name, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(_pattern), _first)

_SCALARS: dict[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": int,
    "float": float,
    "str": str,
}


def parse_text(text: str, *, file: str, folder: Path, path: str = "") -> Node:
    """Text of one YAML document to a tree. Raises ConfigError with the line of a syntax error or repeated key."""
    if len(text) > MAX_BYTES:
        line = text.count("\n", 0, MAX_BYTES) + 1
        raise ConfigError([f"{file}:{line}: longer than {MAX_BYTES // 1024} KiB from here on. Settings are shorter."])
    if found := _OPENINGS.search(text):  # PyYAML would look a thousand characters ahead for each of them
        line = text.count("\n", 0, found.start()) + 1
        raise ConfigError([f"{file}:{line}: not valid YAML: nested deeper than {MAX_DEPTH} levels."])
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = file if mark is None else f"{file}:{mark.line + 1}"
        raise ConfigError([f"{place}: not valid YAML: {error.problem or error.context}."]) from None
    except yaml.YAMLError as error:
        raise ConfigError([f"{file}: not valid YAML: {error}."]) from None
    where = Node(value=None, path=path, file=file, line=None, folder=folder)
    return where if root is None else _Converter(where).convert(root, path, root.start_mark.line + 1)


def parse_file(path: Path) -> Node:
    """The tree of a YAML file. Raises ConfigError where it is missing, unreadable, empty, or not a mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such file.{_similar_file(path)}"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: cannot be read: {error}."]) from None
    root = parse_text(text, file=str(path), folder=path.resolve().parent)
    if root.value is None:
        raise ConfigError([f"{path}: the file is empty."])
    root.mapping()
    return root


def _similar_file(path: Path) -> str:
    names = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f" Did you mean {str(path.parent / near[0])!r}?" if near else ""


class _Converter:
    """PyYAML's composed nodes to ours; keeps the anchors being open, to refuse one that contains itself."""

    def __init__(self, where: Node) -> None:
        self.where = where
        self.open: set[int] = set()
        self.values = 0

    def convert(self, node: yaml.Node, path: str, line: int) -> Node:
        here = Node(value=None, path=path, file=self.where.file, line=line, folder=self.where.folder)
        self.values += 1
        if self.values > MAX_VALUES:
            raise here.error(f"more than {MAX_VALUES:,} values, aliases written out. Write fewer.")
        if id(node) in self.open:
            raise here.error("this alias contains itself.")
        self.open.add(id(node))
        value = self.value(node, here)
        self.open.discard(id(node))
        return here.with_value(value)

    def value(self, node: yaml.Node, here: Node) -> Any:
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self.mapping(node, here)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            items = enumerate(node.value)
            return [self.convert(item, f"{here.path}[{i}]", item.start_mark.line + 1) for i, item in items]
        if isinstance(node, yaml.ScalarNode) and kind in _SCALARS:
            try:
                return _SCALARS[kind](node.value)
            except ValueError as error:  # a whole number of thousands of digits
                raise here.error(f"{error}. Write a smaller number.") from None
        raise here.error(f"the tag {node.tag!r} is not read here. Write plain YAML.")

    def mapping(self, node: yaml.MappingNode, here: Node) -> dict[str, Node]:
        result: dict[str, Node] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = self.key(key_node, here, line)
            child = ".".join(part for part in (here.path, key) if part)
            value = self.convert(value_node, child, line)
            if key in result:
                raise value.error(f"written twice (first in line {result[key].line}). Keep one of them.")
            result[key] = value
        return result

    def key(self, node: yaml.Node, here: Node, line: int) -> str:
        here = Node(value=None, path=here.path, file=here.file, line=line, folder=here.folder)
        if isinstance(node, yaml.ScalarNode) and node.tag == _TAG + "str":
            if node.value == "<<":
                raise here.error("the merge key '<<' is not read. Use `base:` for shared settings.")
            return node.value
        raise here.error(f"a key must be text, got {node.value!r}. Put it in quotes.")


def from_plain(value: Any, *, file: str, path: str = "", folder: Path = Path()) -> Node:
    """A tree from plain Python values (JSON), for `build`."""
    if isinstance(value, Mapping):
        prefix = path + "." if path else ""
        value = {k: from_plain(v, file=file, path=f"{prefix}{k}", folder=folder) for k, v in value.items()}
    elif isinstance(value, (list, tuple)):
        value = [from_plain(v, file=file, path=f"{path}[{i}]", folder=folder) for i, v in enumerate(value)]
    return Node(value=value, path=path, file=file, folder=folder)


def plain(node: Node) -> Any:
    """Back to dicts, lists and scalars."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    return node.value


def leaves(node: Node) -> list[Node]:
    """The scalars and lists below a node, in the order written."""
    if isinstance(node.value, dict):
        return [leaf for child in node.value.values() for leaf in leaves(child)]
    return [node]


# ---------------------------------------------------------------------------------------------------- typing


def build(cls: type[T], node: Node) -> T:
    """The dataclass `cls` from a mapping. Raises ConfigError with every problem in it, each with its place."""
    children = node.mapping()
    known = {field.name: field for field in fields(cast(Any, cls))}
    problems = [child.problem(unknown_key(key, known)) for key, child in children.items() if key not in known]
    kinds = get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, field in known.items():
        if name not in children:
            if field.default is MISSING and field.default_factory is MISSING:
                problems.append(node.problem("missing. It has no default and must be written.", below=name))
            continue
        try:
            values[name] = convert(children[name], kinds[name])
        except ConfigError as error:
            problems.extend(error.problems)
    if problems:
        raise ConfigError(problems)
    return _construct(cls, values, node)


def _construct(cls: type[T], values: dict[str, Any], node: Node) -> T:
    try:
        return cls(**values)
    except FieldError as error:
        raise _locate(node, error) from None


def _locate(node: Node, error: FieldError) -> ConfigError:
    """The error at the line of the field it is about, or of the nearest mapping around it."""
    parts = error.field.split(".")
    while parts and isinstance(node.value, dict) and parts[0] in node.value:
        node = node.value[parts.pop(0)]
    return node.error(error.message, below=".".join(parts))


def default_of(field: Field[Any]) -> Any:
    """What a field is where nothing is written; MISSING where something must be."""
    return field.default if field.default_factory is MISSING else field.default_factory()


def away_from_default(spec: Any, content: Mapping[str, Any]) -> dict[str, Any]:
    """Of `content`, plain values of a dataclass, what its class would not have if nothing were written.

    A hash over this stays when a setting is added, if the setting's default is what the code did before.
    """
    return {
        field.name: away_from_default(value, content[field.name]) if is_dataclass(value) else content[field.name]
        for field in fields(spec)
        if field.name in content and (value := getattr(spec, field.name)) != default_of(field)
    }


def convert(node: Node, kind: Any) -> Any:
    """The value of a node as the annotated type. Raises ConfigError where it is of another type."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return plain(node)
    if origin in (Union, types.UnionType):
        return None if node.value is None else convert(node, next(a for a in args if a is not type(None)))
    if origin is Literal:
        return _choice(node, args)
    if origin is tuple:
        return tuple(convert(item, args[0]) for item in _items(node))
    if origin is not None and issubclass(origin, Mapping):
        return {key: convert(child, args[1]) for key, child in node.mapping().items()}
    if is_dataclass(kind):
        return build(cast(type, kind), node)
    return _scalar(node, kind)


def _items(node: Node) -> list[Node]:
    if not isinstance(node.value, list):
        raise node.error(f"expected a list, got {show(node.value)}. Write [{_unquoted(node.value)}].")
    return node.value


def _unquoted(value: Any) -> str:
    return "..." if isinstance(value, (dict, list)) else show(value).strip("'")


def _choice(node: Node, choices: tuple[Any, ...]) -> Any:
    if isinstance(node.value, str) and node.value in choices:
        return node.value
    near = suggestion(node.value, choices) if isinstance(node.value, str) else ""
    raise node.error(f"{show(node.value)} is not one of {', '.join(choices)}.{near}")


_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _scalar(node: Node, kind: type) -> Any:
    value = node.value
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind is not float and type(value) is kind:
        return value
    raise node.error(f"expected {_EXPECTED[kind]}, got {show(value)}.{scalar_advice(value, kind)}")


def scalar_advice(value: Any, kind: type) -> str:
    """What to write instead of a scalar of another type, after a space; empty where that is not plain."""
    if kind is str and isinstance(value, (bool, int, float)):
        return " Put what you wrote in quotes."  # 00123 has been read as 123
    if kind is int and isinstance(value, float) and value.is_integer():
        return f" Write {int(value)}."
    if kind in (int, float) and isinstance(value, str) and re.fullmatch(r"[-+.\deE]+", value):
        return " Remove the quotes."
    if kind is bool and isinstance(value, str) and value.lower() in ("yes", "no", "on", "off", "true", "false"):
        return f" Write {'true' if value.lower() in ('yes', 'on', 'true') else 'false'}."
    return ""
