"""Strict YAML: what is accepted, and the text and place of every refusal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from klreg_verl.experiment import strict
from klreg_verl.experiment.strict import ConfigError, FieldError


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    color: Literal["red", "green"] = "red"

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise FieldError("rate", f"{self.rate} is negative.")


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    count: int = 1
    flag: bool = False
    maybe: int | None = None
    numbers: tuple[float, ...] = ()
    inner: Inner = Inner()
    by_name: Mapping[str, Inner] = field(default_factory=dict)
    free: Mapping[str, Any] = field(default_factory=dict)


def parse(text: str) -> strict.Node:
    return strict.parse_text(text, file="f.yaml", folder=Path("/"))


def build(text: str) -> Outer:
    return strict.build(Outer, parse(text))


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        build(text)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),  # PyYAML reads this as text
        ("1.0E+3", 1000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("-3", -3),
        ("+3", 3),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("off", "off"),  # PyYAML reads this as false
        ("no", "no"),
        ("none", "none"),
        ("1:30", "1:30"),  # PyYAML reads this as 90
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        (".nan", ".nan"),
        ("2024-01-01", "2024-01-01"),  # PyYAML reads this as a date
        ("'1e-6'", "1e-6"),
        ('"true"', "true"),
        ("!!str 5", "5"),
    ],
)
def test_plain_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    parsed = strict.plain(parse(f"x: {text}"))["x"]
    assert parsed == value and type(parsed) is type(value)


def test_a_full_document_becomes_the_dataclass() -> None:
    text = """
name: a
count: 3
flag: true
maybe: null
numbers: [1, 2e-1]
inner: {rate: 1e-6, color: green}
by_name: {x: {rate: 1}}
free: {a: {b: [1, yes]}}
"""
    assert build(text) == Outer(
        name="a",
        count=3,
        flag=True,
        numbers=(1.0, 0.2),
        inner=Inner(rate=1e-6, color="green"),
        by_name={"x": Inner(rate=1.0)},
        free={"a": {"b": [1, "yes"]}},
    )


def test_a_whole_number_becomes_a_float_where_a_float_is_asked_for() -> None:
    assert type(build("{name: a, inner: {rate: 2}}").inner.rate) is float


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\ncuont: 1", "f.yaml:2: cuont: unknown key 'cuont'. Did you mean 'count'? Known keys: name, count,"),
        ("name: a\ninner:\n  rats: 1", "f.yaml:3: inner.rats: unknown key 'rats'. Did you mean 'rate'?"),
        ("count: 1", "f.yaml:1: name: missing. It has no default and must be written."),
        ("name: a\ncount: true", "f.yaml:2: count: expected a whole number, got true."),
        ("name: a\ncount: 1e3", "f.yaml:2: count: expected a whole number, got 1000.0. Write 1000."),
        ("name: a\ncount: '3'", "f.yaml:2: count: expected a whole number, got '3'. Remove the quotes."),
        ("name: a\ninner: {rate: false}", "f.yaml:2: inner.rate: expected a number, got false."),
        ("name: a\ninner: {rate: 1e999}", "f.yaml:2: inner.rate: expected a number, got inf."),
        ("name: a\nflag: yes", "f.yaml:2: flag: expected true or false, got 'yes'. Write true."),
        ("name: a\nflag: 1", "f.yaml:2: flag: expected true or false, got 1."),
        ("name: 12", "f.yaml:1: name: expected text, got 12. Put what you wrote in quotes."),
        ("name: a\nnumbers: 3", "f.yaml:2: numbers: expected a list, got 3. Write [3]."),
        ("name: a\nnumbers: [1,\n  x]", "f.yaml:3: numbers[1]: expected a number, got 'x'."),
        ("name: a\ninner: 3", "f.yaml:2: inner: expected a mapping (key: value), got 3."),
        ("name: a\ninner: {color: gren}", "'gren' is not one of red, green. Did you mean 'green'?"),
        ("name: a\ninner: {color: true}", "f.yaml:2: inner.color: true is not one of red, green."),
        ("name: a\ninner:\n  rate: -1", "f.yaml:3: inner.rate: -1.0 is negative."),
        ("name: a\nname: b", "f.yaml:2: name: written twice (first in line 1). Keep one of them."),
        ("name: a\n1: b", "f.yaml:2: a key must be text, got '1'. Put it in quotes."),
        ("name: a\n<<: {count: 1}", "the merge key '<<' is not read. Use `base:` for shared settings."),
        ("name: !!python/name:os.system a", "is not read here. Write plain YAML."),
        ("name: a\nfree: &x {y: *x}", "this alias contains itself."),
        ("name: [a", "f.yaml:1: not valid YAML:"),
        ("name: a\n\tcount: 1", "f.yaml:2: not valid YAML:"),
        ("name: a\n---\nname: b", "f.yaml:2: not valid YAML:"),
        ("- a", "f.yaml:1: expected a mapping (key: value), got a list of 1."),
    ],
)
def test_a_refusal_names_file_line_and_path(text: str, message: str) -> None:
    assert message in refusal(text)


def test_all_problems_are_reported_at_once() -> None:
    text = refusal("count: x\nflga: true\ninner: {rate: a, color: b}")
    assert len(text.splitlines()) == 5  # count, flga, name missing, inner.rate, inner.color


def test_a_value_error_of_a_file_that_is_missing_names_a_similar_one(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match=r"quickstrat.yaml: no such file. Did you mean '.*quickstart.yaml'\?"):
        strict.parse_file(tmp_path / "quickstrat.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "the file is empty"), (b"\xff\xfe\x00", "cannot be read"), (b"a", "expected a mapping")],
)
def test_a_file_without_a_mapping_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        strict.parse_file(tmp_path / "x.yaml")


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        strict.parse_file(tmp_path)


def test_plain_values_build_the_same_as_text() -> None:
    node = strict.from_plain({"name": "a", "inner": {"rate": 0.25}, "numbers": [1, 2]}, file="spec.json")
    assert strict.build(Outer, node) == build("{name: a, inner: {rate: 0.25}, numbers: [1, 2]}")


def test_a_field_error_alone_names_its_field() -> None:
    with pytest.raises(ValueError, match=r"rate: -1.0 is negative\."):
        Inner(rate=-1.0)


ALIASES = 'a: &a ["x","x","x","x","x","x","x","x","x"]\n' + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
BOMBS = {
    "aliases": (ALIASES, r"f\.yaml:[1-9]: [b-i].*: more than 10,000 values"),
    "depth of lists": ("a: " + "[" * 100_000, r"f\.yaml:1: not valid YAML: nested deeper than 50 levels"),
    "depth of mappings": ("".join(f"{' ' * n}a:\n" for n in range(300)), r"f\.yaml:\d+: .*nested deeper than 50"),
    "size": ("a: 1\n" * 10**6, r"f\.yaml:26215: longer than 128 KiB from here on"),
    "a long number": (f"a: 1\nb: {'1' * 5000}", r"f\.yaml:2: b: Exceeds the limit"),
}


@pytest.mark.parametrize(("text", "message"), BOMBS.values(), ids=BOMBS)
@pytest.mark.timeout(60)
def test_bombs_are_refused_with_file_and_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(text)


def test_as_many_values_and_as_deep_as_a_recipe_ever_has_are_read() -> None:
    deep = "".join(f"{' ' * n}a:\n" for n in range(40))
    wide = "a: [" + ",".join(["1"] * 5_000) + "]"
    assert parse(deep).value and len(parse(wide).value["a"].value) == 5_000


def test_infinity_is_no_whole_number_and_gets_no_advice_that_leads_nowhere() -> None:
    with pytest.raises(ConfigError, match=r"expected a whole number, got inf\.$"):
        strict.build(Outer, parse("name: x\ncount: 1e999"))
