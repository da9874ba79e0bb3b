"""The KL settings whose gradients are compared: those of the table in core/kl.py, and the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from klreg_verl.core import kl, penalties
from klreg_verl.experiment import strict
from klreg_verl.experiment.kl_settings import KLSpec

TASK = "task"
"""The policy gradient of the task's rewards, without any KL."""
RUN = "run"
"""The run's own KL term, at the beta of that step."""
REVERSE, FORWARD = "loss/full_reverse", "loss/full_forward"
"""The KLs over the whole vocabulary, per token on the policy's own prefixes."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One gradient to compare."""

    name: str
    kl: KLSpec | None
    """Its KL block; None for the task's own gradient."""


def table(*, both: bool = False) -> list[Setting]:
    """The task, the exact KLs, and every estimator with every credit in the reward and every correction in the loss.

    Sound or not. Of the placement `both` those that are sound, and with `both` every other one, too.
    """
    exact = [_setting("loss", name) for name in ("full_reverse", "full_forward")]
    charged = [_setting("reward", name, credit=credit) for name in kl.names() for credit in penalties.CREDITS]
    pulled = [_setting("loss", name, correction=given) for name in kl.names() for given in penalties.CORRECTIONS]
    return [Setting(name=TASK, kl=None), *exact, *charged, *pulled, *_in_both(every=both)]


def _in_both(*, every: bool) -> list[Setting]:
    if not every:
        return [_setting("both", "k3", credit=credit) for credit in ("sequence", "reward_to_go")]
    return [
        _setting("both", name, credit=credit, correction=correction)
        for name in kl.names()
        for credit in penalties.CREDITS
        for correction in penalties.CORRECTIONS
    ]


def _setting(placement: Any, estimator: str, **options: Any) -> Setting:
    words = [placement, estimator, *(word for word in options.values() if word != "none")]
    block = KLSpec(placement=placement, estimator=estimator, follows="none", beta=1.0, **options)
    return Setting(name="/".join(words), kl=block)


def parse(text: str) -> Setting:
    """A user's own setting, `NAME=key:value,key:value`, with the keys of a recipe's `kl` block; beta is 1 if not given.

    >>> parse("bare=placement:reward,estimator:k1,credit:token,baseline:none").kl.baseline
    'none'

    Raises ValueError where it is not of that form or the block is refused.
    """
    name, equals, block = text.partition("=")
    place = f"--setting {text!r}"
    if not equals or not name.strip() or not block.strip():
        raise ValueError(f"{place} is not of the form NAME=key:value,..., e.g. mine=placement:loss,estimator:k3.")
    values: dict[str, Any] = {"beta": 1.0, "follows": "none"}
    for part in block.split(","):
        key, colon, value = part.partition(":")
        if not colon:
            raise ValueError(f"{place}: {part!r} is not of the form key:value.")
        _put(values, key.strip().split("."), strict.plain(strict.parse_text(value, file=place, folder=Path())))
    if values.get("placement", "none") == "none":
        raise ValueError(f"{place}: a setting without a KL has no gradient of its own. Give placement and estimator.")
    spec = strict.build(KLSpec, strict.from_plain(values, file=place))
    if spec.is_drawn:
        raise ValueError(f"{place}: {spec.estimator} learns responses of the reference, and these are the policy's.")
    return Setting(name=name.strip(), kl=spec)


def _put(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    *sections, last = path
    for section in sections:
        values = values.setdefault(section, {})
    values[last] = value


def chosen(settings: Sequence[Setting], own: Sequence[Setting], patterns: Sequence[str]) -> list[Setting]:
    """Those whose name a pattern fits (none given: all), the user's own, and always what the others are compared with.

    Raises ValueError for a name that is given twice and for a pattern that fits nothing.
    """
    names = [setting.name for setting in (*settings, *own)]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Two settings are called {repeated[0]!r}. Give yours another name.")
    if unmatched := [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]:
        near = strict.suggestion(unmatched[0], names)
        raise ValueError(
            f"No setting is called {unmatched[0]!r}.{near} Names are like reward/k1/sequence, loss/k3, "
            "loss/k3/importance and both/k3/sequence; patterns like 'loss/*'."
        )
    kept = (TASK, RUN, REVERSE, FORWARD, *(setting.name for setting in own))
    return [
        setting
        for setting in (*settings, *own)
        if not patterns or setting.name in kept or any(fnmatchcase(setting.name, pattern) for pattern in patterns)
    ]
