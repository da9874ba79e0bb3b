"""What run cards say that no recipe declared, and cards without names.

Two arms are compared to see what their settings do. If one of them ran on other code, other data or another model, the
comparison shows that, too. So every comparison of such runs says it. What a recipe declares (the spec) may differ
between arms; between the seeds of one arm it may not.

An anonymous report leaves out hosts, paths and remotes; the hardware stays, because numbers depend on it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from klreg_verl.analysis.runs import Run, mapping
from klreg_verl.experiment.claims import fingerprint

COMPARED = re.compile(
    r"(versions|kl_source|data|model|reference)\.|git\.(commit|diff_sha256)$|python$|platform$|host\.(cpu|gpus)$"
)
"""Facts of a card that must be alike for a comparison to be of the settings alone."""
ALIKE_ANYWHERE = re.compile(r"\.path$")
"""Where a file lies says nothing: its hash stands beside it."""
PER_RUN = {"seed", "run_id", "hash", "question", "root", "arms", "claims"}
"""What a spec may have of its own in every seed of an arm."""
NAMING = {"hostname", "node", "nodes", "user", "remote", "remotes", "origin", "url", "cwd", "root", "untracked", "diff"}
"""Keys of a card that tell where and by whom a run was made."""
HOST_FACTS = {"cpu", "cores", "cores_usable", "memory_gb", "gpus"}
"""What an anonymous card keeps of the host."""
ADDRESS = re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)*(?::\S+)?|\b\w[\w+.-]*://[^\s\"'<>]+")
_REST = r"[^\s\"'<>|,;:()]*"
PATH = re.compile(
    rf"(?<![\w/.])(?:~[A-Za-z_][\w.-]*(?:[/\\]{_REST})?|~[/\\]{_REST}"
    rf"|(?:[A-Za-z]:)?[/\\](?:[^\s/\\\"'<>|,;:()]+[/\\])+{_REST})"
)
WHOLE_PATH = re.compile(r"(?:~|[A-Za-z]:[/\\]|/)\S.*")
"""A value of a card or spec that is nothing but a path; spaces may be in it."""
USER = re.compile(r"(?:/home/|/Users/|/u/|^~)([A-Za-z_][\w.-]{2,})")
"""Whose folder a path is in."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One field that nobody declared to differ, among the runs of one task."""

    task: str
    field: str
    values: tuple[tuple[str, tuple[str, ...]], ...]
    """(value, the runs that have it), the most frequent value first."""
    within_seed: bool
    """Whether arms of one seed differ: then pairing by seed does not take it out."""
    within_run: bool = False
    """Whether attempts of one run differ."""


def facts(provenance: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """provenance.json flattened to dotted keys, without "gradient"; `short` makes its long texts fit for showing."""
    flat: dict[str, str] = {}
    for key, value in provenance.items():
        name = f"{prefix}{key}"
        if name == "claims":  # the report has a section of its own for them
            flat["claims.sha256"] = fingerprint(mapping(mapping(value).get("list")))
        elif isinstance(value, Mapping):
            flat |= facts(value, f"{name}.")
        elif name != "gradient":
            flat[name] = str(value)
    return flat


def short(value: str) -> str:
    """A long text as its length and hash, so that two different ones look different."""
    if len(value) <= 200:
        return value
    return f"({len(value):,} characters, sha256 {_digest(value)}, in provenance.json)"


def _digest(value: str) -> str:
    return hashlib.sha256(value.encode(errors="surrogatepass")).hexdigest()[:8]


def differing_facts(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Facts of the run cards that are not the same in every run, with the value of each run ("–" where absent)."""
    cards = [facts(run.provenance) for run in runs]
    keys = sorted({key for card in cards for key in card})
    values = {key: [card.get(key, "–") for card in cards] for key in keys}
    return {key: each for key, each in values.items() if len(set(each)) > 1}


# ---------------------------------------------------------------------------------------------------- undeclared


def undeclared(runs: Sequence[Run]) -> list[Difference]:
    """Every field of the cards, and of the specs of one setting's seeds, that differs without being declared."""
    found = []
    for task in dict.fromkeys(run.task for run in runs):
        mine = [run for run in runs if run.task == task]
        found += _of_cards(task, [run for run in mine if run.provenance])
        found += [each for run in mine for each in _of_attempts(run)]
        for label in dict.fromkeys(run.label for run in mine):
            found += _of_specs(task, [run for run in mine if run.label == label and run.spec])
    return found


def _of_cards(task: str, runs: Sequence[Run]) -> list[Difference]:
    fields = differing_facts(runs)
    chosen = [key for key in fields if _is_compared(key) and not _is_declared(key, runs)]
    return [_difference(task, key, runs, fields[key]) for key in chosen]


def _is_compared(field: str) -> bool:
    return bool(COMPARED.match(field)) and not ALIKE_ANYWHERE.search(field)


def changed(run: Run) -> dict[str, list[tuple[int, str]]]:
    """Compared facts that are not the same in all attempts that the run's steps came from: (attempt, value) of each."""
    attempts = {number: facts(card) for number, card in run.attempts.items()}
    keys = sorted({key for card in attempts.values() for key in card if _is_compared(key)})
    values = {key: [(number, card.get(key, "–")) for number, card in attempts.items()] for key in keys}
    return {key: each for key, each in values.items() if len({value for _, value in each}) > 1}


def _of_attempts(run: Run) -> list[Difference]:
    """What changed while the run was made: its first steps are of one thing and its last of another."""
    found = []
    for field, values in changed(run).items():
        having = {value: tuple(_attempt(run, n) for n, each in values if each == value) for _, value in values}
        found.append(
            Difference(task=run.task, field=field, values=tuple(having.items()), within_seed=True, within_run=True)
        )
    return found


def _attempt(run: Run, number: int) -> str:
    return f"attempt {number} of {run.run_id}"


def _is_declared(field: str, runs: Sequence[Run]) -> bool:
    """A recipe may name other models and references by arm: then their hashes differ as declared."""
    block = field.partition(".")[0]
    if block not in ("model", "reference"):
        return False
    return len({(str(run.spec.get("model")), str(run.spec.get("reference"))) for run in runs}) > 1


def _of_specs(task: str, runs: Sequence[Run]) -> list[Difference]:
    """Seeds of one setting that were asked for different things: the recipe was changed between them."""
    specs = [{key: value for key, value in facts(run.spec).items() if key not in PER_RUN} for run in runs]
    keys = sorted({key for spec in specs for key in spec if key.partition(".")[0] not in PER_RUN})
    columns = {key: [spec.get(key, "–") for spec in specs] for key in keys}
    return [_difference(task, f"spec.{key}", runs, each) for key, each in columns.items() if len(set(each)) > 1]


def _difference(task: str, field: str, runs: Sequence[Run], values: Sequence[str]) -> Difference:
    having: dict[str, list[str]] = {}
    of_seed: dict[int, set[str]] = {}
    for run, value in zip(runs, values, strict=True):
        having.setdefault(value, []).append(run.run_id)
        of_seed.setdefault(run.seed, set()).add(value)
    ordered = sorted(having.items(), key=lambda item: -len(item[1]))
    return Difference(
        task=task,
        field=field,
        values=tuple((value, tuple(names)) for value, names in ordered),
        within_seed=any(len(each) > 1 for each in of_seed.values()),
    )


def caution(runs: Sequence[Run]) -> str:
    """What is to be said beside a comparison of these runs; "" where their cards are alike."""
    fields = list(dict.fromkeys(each.field for each in undeclared(runs)))
    more = f" and {len(fields) - 4} more" if len(fields) > 4 else ""
    told = f"Not like for like: the run cards differ in {', '.join(fields[:4])}{more}, which no recipe declared."
    return " ".join(filter(None, [told if fields else "", lengths(runs)]))


def lengths(runs: Sequence[Run]) -> str:
    """Said where runs were asked for different numbers of steps; "" where the grid does so, as it names them apart."""
    asked: dict[int, list[str]] = {}
    for run in runs:
        if run.steps is not None and "train.steps" not in mapping(run.spec.get("grid")):
            asked.setdefault(run.steps, []).append(run.run_id)
    told = [f"{steps} steps in {_runs_text(names)}" for steps, names in sorted(asked.items())]
    return f"Not of one length: {', '.join(told)}." if len(told) > 1 else ""


def sentences(differences: Sequence[Difference]) -> list[str]:
    """One a field: its values, which runs have them, and whether pairing by seed takes it out."""
    several = len({each.task for each in differences}) > 1
    return [f"{each.task + ': ' if several else ''}{_sentence(each)}" for each in differences]


def _sentence(found: Difference) -> str:
    told = [f"{_cut(value)} in {_runs_text(names)}" for value, names in found.values[:4]]
    more = [f"{len(found.values) - 4} more values"] if len(found.values) > 4 else []
    return f"{found.field}: {'; '.join([*told, *more])}; {_pairing(found)}."


def _pairing(found: Difference) -> str:
    if found.within_run:
        return "it changed within the run, so the run is of both"
    if found.within_seed:
        return "arms of one seed differ, so their comparison is of this, too"
    return "arms of one seed agree, so differences paired by seed are free of it"


def _runs_text(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 2 else f"{len(names)} runs ({names[0]}, ...)"


def _cut(value: str) -> str:
    if re.fullmatch(r"[0-9a-f]{40,64}", value):
        return value[:12]
    return value if len(value) <= 60 else f"{value[:60]}... (sha256 {_digest(value)})"


# ---------------------------------------------------------------------------------------------------- anonymous


@dataclass(frozen=True, kw_only=True)
class Named:
    """Texts that tell where and by whom runs were made, as their cards and specs have them."""

    hosts: frozenset[str] = frozenset()
    users: frozenset[str] = frozenset()
    paths: frozenset[str] = frozenset()

    @staticmethod
    def by(*runs: Run) -> Named:
        """What these runs name."""
        paths = {text for run in runs for text in _texts([run.provenance, run.spec, *run.attempts.values()])}
        paths = {text for text in paths if WHOLE_PATH.fullmatch(text)}
        folders = {str(folder) for text in paths for folder in Path(text).parents if len(folder.parts) > 2}
        return Named(
            hosts=frozenset(name for run in runs for name in _host_names(run)),
            users=frozenset(name for text in paths for name in USER.findall(text)),
            paths=frozenset(paths | folders),
        )

    def cleaned(self, text: str) -> str:
        """The text with addresses, paths, host and user names replaced by (address), (path), (host), (user)."""
        for path in sorted(self.paths, key=len, reverse=True):  # those with spaces, which no pattern knows the end of
            text = re.sub(rf"(?<![\w/.]){re.escape(path)}{_REST}", "(path)", text)
        text = PATH.sub("(path)", ADDRESS.sub("(address)", text.replace(str(Path.home()), "~")))
        for names, shown in ((self.hosts, "(host)"), (self.users, "(user)")):
            for name in sorted(names, key=len, reverse=True):
                text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", shown, text)
        return text


def anonymous(run: Run) -> Run:
    """The run without host, user, paths, remotes and addresses in anything that a report shows of it."""
    named = Named.by(run)
    return replace(
        run,
        spec=_cleaned(run.spec, named, keep_keys=True),
        provenance=_cleaned(run.provenance, named),
        attempts={number: _cleaned(card, named) for number, card in run.attempts.items()},
        reason=named.cleaned(run.reason),
        problems=tuple(map(named.cleaned, run.problems)),
    )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)


def _host_names(run: Run) -> tuple[str, ...]:
    host = run.provenance.get("host")
    named = mapping(host).get("name") if isinstance(host, Mapping) else host
    return tuple(name for name in (str(named or ""), str(named or "").partition(".")[0]) if name)


def _cleaned(value: Any, named: Named, key: str = "", *, keep_keys: bool = False) -> Any:
    """Of a card, without the keys that name somebody; of a spec, whose `nodes` is a number, with all of them."""
    if key == "host" and not keep_keys:
        return {name: each for name, each in mapping(value).items() if name in HOST_FACTS}
    if isinstance(value, Mapping):
        kept = {name: each for name, each in value.items() if keep_keys or name not in NAMING}
        return {name: _cleaned(each, named, str(name), keep_keys=keep_keys) for name, each in kept.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(each, named, keep_keys=keep_keys) for each in value]
    return named.cleaned(value) if isinstance(value, str) else value
