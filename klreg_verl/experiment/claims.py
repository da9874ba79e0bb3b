"""A recipe's claims: which comparisons of two arms are decided, on which metric and with which margin, before any run.

    claims:
      reverse_keeps_coverage:
        metric: diversity/coverage
        contrast: [reverse, none]     # first minus second
        margin: 0.02                  # differences below this do not matter, in the unit of the metric
        compare: end                  # end | beta (with `at`) | kl (with `between`)
        task: palindrome              # may be left out where the recipe has one task
        looks: [5, 10]                # decided at 5 seeds and, if it is open then, again at 10; left out: once

A run's card holds the claims as they were when it started, with their hash. The analysis takes them from the cards, not
from the recipe: a claim written or changed after a run has started is exploratory, and one that was taken out of the
recipe still counts in the family that Holm corrects for.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal

from klreg_verl.experiment.strict import FieldError

NAMESPACES = (
    *("actor", "critic", "diversity", "entropy", "eval", "kl", "kl_old", "kl_ref", "kl_ref_t1"),
    *("response", "retention", "reward", "train", "val-core", "val-aux"),
)
"""First parts of the keys of metrics.jsonl that say something about an arm."""
MIN_LOOK = 3
"""Seeds of the first look at least: two have no spread to speak of."""
CURVE = 3
"""Betas inside an interval of KL that make a curve."""
ACHIEVED_KL = "kl_ref/k1_response"
"""The KL at which arms are compared `at equal KL` [nats per response]."""


@dataclass(frozen=True, kw_only=True)
class ClaimSpec:
    """One comparison of two arms that will end as differs, equivalent or undecided."""

    metric: str
    """A key of metrics.jsonl, whose final value is the mean of the last three evaluations, or of the last ten steps;
    or of what `klreg eval` leaves: eval/<data source>/pass@<k>, eval/<task>/diversity/<field of Solutions, which is in
    core.diversity>."""
    contrast: tuple[str, ...]
    """Two arms: the first minus the second."""
    margin: float
    """Differences smaller than this do not matter, in the unit of the metric: the margin of equivalence."""
    compare: Literal["end", "beta", "kl"] = "end"
    """end: the arms as they are; beta: both at the beta `at`; kl: over the KLs `between`, along their betas' runs."""
    at: float | None = None
    """The beta at which they are compared. Cards of earlier versions have here one KL."""
    task: str | None = None
    """Needed where the recipe has several tasks."""
    between: tuple[float, ...] = ()
    """The lowest and the highest KL to the reference [nats per response] of `compare: kl`: the claim is about the mean
    difference over this interval."""
    looks: tuple[int, ...] = ()
    """Numbers of seeds at which the claim is decided, ascending, with O'Brien and Fleming's bounds; empty: once."""

    def __post_init__(self) -> None:
        namespace, slash, rest = self.metric.partition("/")
        if not slash or not rest or namespace not in NAMESPACES:
            raise FieldError(
                "metric", f"{self.metric!r} is no key of metrics.jsonl. They begin with {', '.join(NAMESPACES)}, and /."
            )
        if len(self.contrast) != 2 or self.contrast[0] == self.contrast[1]:
            given = ", ".join(self.contrast)
            raise FieldError("contrast", f"[{given}] is not two different arms, the first minus the second.")
        if not self.margin > 0:
            raise FieldError("margin", f"{self.margin} is not positive. Say which difference would begin to matter.")
        self._check_at()
        self._check_between()
        if list(self.looks) != sorted(set(self.looks)) or min(self.looks, default=MIN_LOOK) < MIN_LOOK:
            raise FieldError("looks", f"{list(self.looks)}: give ascending numbers of seeds from {MIN_LOOK} on.")

    def _check_between(self) -> None:
        if self.compare != "kl" and self.between:
            raise FieldError("between", f"{list(self.between)} has no effect with `compare: {self.compare}`.")
        if self.between and not (len(self.between) == 2 and 0 <= self.between[0] < self.between[1]):
            raise FieldError("between", f"{list(self.between)}: give the lowest and the highest KL, as in [0.3, 0.6].")
        if self.between and self.at is not None:
            raise FieldError("at", f"{self.at} and `between` contradict each other. Keep `between`.")

    def _check_at(self) -> None:
        if self.compare == "end" and self.at is not None:
            raise FieldError("at", f"{self.at} has no effect with `compare: end`. Say `compare: beta`.")
        if self.compare == "beta" and self.at is None:
            raise FieldError("at", "missing. `compare: beta` needs the beta to compare at.")
        if self.compare == "kl" and self.at is None and not self.between:
            raise FieldError("between", "missing. `compare: kl` needs the interval of KL to compare over: [0.3, 0.6].")
        if self.at is not None and not self.at > 0:
            there = {"beta": "there is no KL term; name an arm without one", "kl": "there only the starting model is"}
            raise FieldError("at", f"{self.at} is not positive: {there[self.compare]}.")


def check(
    name: str,
    claim: ClaimSpec,
    *,
    arms: Sequence[str],
    tasks: Sequence[str],
    betas: Mapping[str, Sequence[float | None]],
) -> None:
    """Refuses a claim that no run of the recipe can decide.

    Args:
        name: as written, for the message about it.
        claim: the claim.
        arms, tasks: those of the recipe.
        betas: arm -> the beta of each of its grid points; None without KL.

    Raises:
        FieldError: about one of the claim's fields.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise FieldError("metric", f"the claim's name {name!r} is not of letters, digits, _ and -.")
    for arm in claim.contrast:
        if arm not in arms:
            raise FieldError("contrast", f"there is no arm {arm!r}. Known: {', '.join(arms)}.")
    if claim.task is None and len(tasks) > 1:
        raise FieldError("task", f"missing: the recipe has the tasks {', '.join(tasks)}. Name one.")
    if claim.task is not None and claim.task not in tasks:
        raise FieldError("task", f"there is no task {claim.task!r}. Known: {', '.join(tasks)}.")
    for arm in claim.contrast:
        _check_reachable(claim, arm, betas[arm])


def _check_reachable(claim: ClaimSpec, arm: str, betas: Sequence[float | None]) -> None:
    known = [beta for beta in betas if beta is not None]
    told = f"beta {', '.join(f'{beta:g}' for beta in known)}" if known else "no beta"
    if claim.compare == "end" and len(betas) > 1:
        why = f"the arm {arm} has {len(betas)} grid points ({told})."
        raise FieldError("compare", f"end: {why} Say `compare: beta` or `kl`, and `at`.")
    if claim.compare == "beta" and known.count(float(claim.at or 0)) != 1:
        many = "more than one run a seed" if claim.at in known else "no run"
        raise FieldError("at", f"the arm {arm} has {many} at beta {claim.at:g} (it is run at {told}).")
    if claim.compare == "kl" and len(set(known)) < len(known):
        raise FieldError(
            "compare",
            f"kl: the arm {arm} has several grid points at one beta ({told}). Only runs that differ in beta alone are "
            "joined to one line: take the other grid keys out, or give them arms of their own.",
        )
    if claim.compare == "kl" and claim.at is not None:
        raise FieldError(
            "at",
            f"{claim.at:g}: at one KL straight lines between betas are biased and miss the truth too often. Give the "
            "interval over which the arms' mean difference is the claim, `between: [0.3, 0.6]`.",
        )
    if claim.compare == "kl" and len(set(known)) < CURVE:
        raise FieldError(
            "compare",
            f"kl: the arm {arm} is run at {told}; its curve over an interval of KL takes {CURVE} betas inside it or "
            "more (grid: kl.beta). Arms held at one KL by the matched_kl controller are compared with `compare: end`.",
        )


def canonical(claims: Mapping[str, ClaimSpec]) -> dict[str, dict[str, Any]]:
    """The claims as plain values, in the order written; what later versions added is left out where it is not used."""
    return {name: _plain(claim) for name, claim in claims.items()}


def _plain(claim: ClaimSpec) -> dict[str, Any]:
    added = {name: list(value) for name in ("between", "looks") if (value := getattr(claim, name))}
    kept = {key: value for key, value in asdict(claim).items() if key not in ("between", "looks")}
    return {**kept, "contrast": list(claim.contrast), **added}


def said(claim: Any) -> Any:
    """What one of `canonical` claims says beyond the defaults: of two versions it is the same. Else what was given."""
    if not isinstance(claim, Mapping):
        return claim
    defaults = {field.name: field.default for field in fields(ClaimSpec) if field.default is not MISSING}
    return {key: value for key, value in claim.items() if key not in defaults or value != defaults[key]}


def fingerprint(claims: Mapping[str, Mapping[str, Any]]) -> str:
    """sha256 of what `canonical` claims say, whatever their order."""
    content = {name: said(claim) for name, claim in claims.items()}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def card(claims: Mapping[str, ClaimSpec], before: Mapping[str, Any] | None, time: str) -> dict[str, Any]:
    """The entry "claims" of a run card: sha256, the claims, since when; what `before` (an older card) said is kept.

    `earlier` holds what was registered before, oldest first, so that a run resumed or extended under other claims shows
    which were written first. A card from before there were claims counts as one without any.
    """
    listed = canonical(claims)
    now = {"sha256": fingerprint(listed), "since": time, "list": listed}
    if before is None:
        return now
    known = before.get("claims") or {"sha256": fingerprint({}), "since": before.get("time"), "list": {}}
    if fingerprint(known.get("list") or {}) == now["sha256"]:
        return dict(known)
    earlier = [*known.get("earlier", ()), {key: value for key, value in known.items() if key != "earlier"}]
    return {**now, "earlier": earlier}


def registered(provenance: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The claims that a run started under, by name; empty where its card has none."""
    entry = provenance.get("claims")
    if not isinstance(entry, Mapping):
        return {}
    first = next(iter(entry.get("earlier") or ()), entry)
    listed = first.get("list")
    return dict(listed) if isinstance(listed, Mapping) else {}
