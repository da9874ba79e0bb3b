"""verl's own settings, as a table of keys and kinds in verl_keys.json: a recipe's `verl:` is checked without verl.

A line of the table is `dotted.key: kinds`. Kinds are joined by |: bool, int, float, str, list, null, any, a quoted word
for one of a few words, and dict for a mapping whose keys verl does not fix. A `+` before the key means, as in Hydra,
that verl takes the key although its YAML does not list it. klreg_verl/verl_hooks/key_table.py writes the table anew.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klreg_verl.experiment import strict

TABLE = Path(__file__).with_suffix(".json")


@dataclass(frozen=True, kw_only=True)
class Known:
    """The settings of one version of verl."""

    version: str
    kinds: Mapping[str, str]
    """Dotted key, without +, -> kinds joined by |."""
    unlisted: frozenset[str]
    """Keys that verl's YAML lacks."""


@functools.cache
def known() -> Known:
    """The committed table."""
    read = json.loads(TABLE.read_text(encoding="utf-8"))
    return Known(
        version=read["verl"],
        kinds={key.removeprefix("+"): kinds for key, kinds in read["keys"].items()},
        unlisted=frozenset(key[1:] for key in read["keys"] if key.startswith("+")),
    )


def problem(key: str, value: Any, *, plus: bool = False) -> str | None:
    """Why verl would ignore or refuse this setting, in one line; None where it takes it.

    Args:
        key: dotted, without +.
        value: a scalar, a list, or an empty mapping.
        plus: whether it was written with Hydra's +.
    """
    table = known()
    if _is_inside_open(key, table):
        return None
    kinds = table.kinds.get(key)
    if kinds is None:
        return _unknown(key, table)
    if plus and key not in table.unlisted:
        return f"verl {table.version} lists this key already, so nothing is to be added. Leave out the +."
    return None if _fits(value, kinds.split("|")) else _wrong_kind(value, kinds.split("|"))


def _is_inside_open(key: str, table: Known) -> bool:
    parts = key.split(".")
    above = (table.kinds.get(".".join(parts[:depth]), "") for depth in range(1, len(parts)))
    return any("dict" in kinds.split("|") for kinds in above)


def _unknown(key: str, table: Known) -> str:
    if below := [other.removeprefix(f"{key}.") for other in table.kinds if other.startswith(f"{key}.")]:
        names = dict.fromkeys(name.partition(".")[0] for name in below)
        return f"is a section of verl's with the keys {', '.join(names)}. Set these one by one, or leave it out."
    near = _nearest(key, table)
    return f"verl {table.version} has no setting {key!r}, so it would do nothing, or end the run.{near}"


def _nearest(key: str, table: Known) -> str:
    """Did you mean the key of this section with a name like this one's, or one whose last parts look like this key?"""
    section, _, name = key.rpartition(".")
    siblings = {_last(other): other for other in table.kinds if other.rpartition(".")[0] == section}
    if near := difflib.get_close_matches(name, siblings, n=1):
        return f" Did you mean {siblings[near[0]]!r}?"
    named = difflib.get_close_matches(name, {_last(other) for other in table.kinds}, n=5, cutoff=0.8)
    tails = {_last(other, key.count(".") + 1): other for other in reversed(list(table.kinds)) if _last(other) in named}
    if near := difflib.get_close_matches(key, tails, n=1, cutoff=0.5):
        return f" Did you mean {tails[near[0]]!r}?"
    known_there = siblings or dict.fromkeys(other.partition(".")[0] for other in table.kinds)
    return f" Known {f'keys of {section}' if siblings else 'sections'}: {', '.join(known_there)}."


def _last(key: str, parts: int = 1) -> str:
    return ".".join(key.split(".")[-parts:])


_TYPES: Mapping[str, type] = {"bool": bool, "int": int, "float": float, "str": str}
_WORDS = {
    **{"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text"},
    **{"list": "a list", "dict": "a mapping", "null": "null"},
}


def _fits(value: Any, kinds: list[str]) -> bool:
    if "any" in kinds or (isinstance(value, str) and "${" in value):  # Hydra reads another key's value there
        return True
    of_yaml = {list: "list", tuple: "list", dict: "dict", type(None): "null"}
    kind = of_yaml.get(type(value)) or type(value).__name__
    return kind in kinds or (kind == "int" and "float" in kinds) or (kind == "str" and repr(value) in kinds)


def _wrong_kind(value: Any, kinds: list[str]) -> str:
    wanted = " or ".join(_WORDS.get(kind, kind) for kind in kinds)
    advice = next(filter(None, (strict.scalar_advice(value, _TYPES[kind]) for kind in kinds if kind in _TYPES)), "")
    return f"verl takes {wanted} here, got {strict.show(value)}.{advice}"
