"""Evaluations as a table of text: a row a model, the numbers side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from klreg_verl.replay.printing import number, table


def lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The evaluations of one task, the starting model first where there is one."""
    if found[0].get("headline") == "score":
        head = ["model", "score", "95 %", "tokens", "cut", "gain"]
        return [_about(found[0]), "", *table(head, [_scored_row(one) for one in found]), *_warnings(found)]
    ks = list(found[0]["pass"])
    head = ["model", "accuracy", "95 %", *(f"pass@{k}" for k in ks if k != "1"), f"maj@{ks[-1]}", "distinct right"]
    head += ["coverage"] * _any(found, "coverage") + ["tokens", "cut", "gain", "new", "lost", "chance"]
    rows = [_row(one, ks, found) for one in found]
    return [_about(found[0]), "", *table(head, rows), *_warnings(found)]


def _about(one: Mapping[str, Any]) -> str:
    return (
        f"{one['task']}: {one['prompts']} prompts x {one['samples']} samples, temperature {one['temperature']:g}, "
        f"top_p {one['top_p']:g}, at most {one['max_tokens']} tokens, seed {one['seed']}"
    )


def _scored_row(one: Mapping[str, Any]) -> list[str]:
    """Of a reward that grades: nothing is right or wrong."""
    score = one["score_interval"]
    cells = [one["subject"], number(score["mean"]), f"{number(score['low'])} {number(score['high'])}"]
    cells += [number(one["length"]["mean"], 1), f"{100 * one['truncated']:.0f} %"]
    return [*cells, _gain(one["against"]["score_gain"]) if one.get("against") else "-"]


def folders(evals: Iterable[Path], most: int = 4) -> list[str]:
    """Where the evaluations lie, each folder once; the first few of many and a count."""
    told = [f"files: {folder}" for folder in dict.fromkeys(evals)]
    return told if len(told) <= most else [*told[:most], f"       and {len(told) - most} more"]


def _row(one: Mapping[str, Any], ks: Sequence[str], found: Sequence[Mapping[str, Any]]) -> list[str]:
    accuracy = one["accuracy"]
    cells = [one["subject"], number(accuracy["mean"]), f"{number(accuracy['low'])} {number(accuracy['high'])}"]
    cells += [number(one["pass"][k]["mean"]) for k in ks if k != "1"]
    cells += [number(one["maj"][ks[-1]]["mean"]), number(one["distinct_right"], 2)]
    cells += [number(one["coverage"])] * _any(found, "coverage")
    cells += [number(one["length"]["mean"], 1), f"{100 * one['truncated']:.0f} %"]
    return cells + _change(one.get("against"))


def _change(change: Mapping[str, Any] | None) -> list[str]:
    if change is None:
        return ["-", "-", "-", "-"]
    text = _gain(change["accuracy_gain"])
    return [text, str(len(change["solved_new"])), str(len(change["solved_lost"])), number(change["by_chance"], 1)]


def _gain(gain: Mapping[str, Any]) -> str:
    half = None if gain["high"] is None else gain["high"] - gain["mean"]
    return f"{gain['mean']:+.3f}" + ("" if half is None else f" +- {half:.3f}")


def _any(found: Sequence[Mapping[str, Any]], name: str) -> bool:
    return any(one[name] is not None for one in found)


def legend(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the columns mean, once for all tasks."""
    lines = [
        "95 %      interval of the accuracy (of a reward that grades: of the mean score) over prompts; samples of one",
        "          prompt are not independent",
        "pass@k    at least one of k right, maj@k: the most frequent answer of k right; exact means over all subsets",
        "distinct  different right answers per prompt; cut: responses at the token limit",
    ]
    if names := {one["against"]["subject"] for one in found if one.get("against")}:
        start = names.pop() if len(names) == 1 else "the start of its own run"
        lines += [
            f"gain      of accuracy over {start}, prompt by prompt, with its 95 % interval",
            "new, lost prompts solved (any sample right) only now, or only before; chance: as many of each are",
            "          expected if nothing had changed",
        ]
    return lines


def _warnings(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """What makes a zero no wrong answer."""
    return [
        f"{one['subject']}: {one['timeouts']} gradings ended without a verdict, {one['errors']} failed (columns "
        f"`timeout`, `error` of {one['file']}); they count as wrong"
        for one in found
        if one["timeouts"] or one["errors"]
    ]
