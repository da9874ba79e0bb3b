"""Colours of figures and of the page: an arm keeps its colour on every task, its grid points are shades of it.

Okabe and Ito (2008), "Color Universal Design", safe for the common colour-vision deficiencies.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from matplotlib.colors import to_hex, to_rgb

from klreg_verl.analysis.summary import Group


def blended(color: str, background: str, share: float) -> str:
    """``share`` of the colour on the background, both as hex, mixed in sRGB as CSS's color-mix does."""
    return to_hex(tuple(share * np.array(to_rgb(color)) + (1 - share) * np.array(to_rgb(background))))


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours as matplotlib takes them."""

    ink: str
    muted: str
    grid: str
    background: str
    arms: tuple[str, ...]
    mix: Callable[[str, str, float], str] = blended


LIGHT = Theme(
    ink="#1b1f24",
    muted="#667079",
    grid="#e4e7ea",
    background="#ffffff",
    arms=("#3c434a", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
)
DARK = Theme(
    ink="#e6e8ea",
    muted="#98a1a9",
    grid="#2b3137",
    background="#14171a",
    arms=("#c3cad1", "#56b4e9", "#ff8a4c", "#2fc496", "#e6a3c8", "#f0b93a", "#9db8ff"),
)
PAGE = Theme(
    ink="#010000",
    muted="#020000",
    grid="#030000",
    background="#040000",
    arms=tuple(f"#0001{index:02x}" for index in range(len(LIGHT.arms))),
    mix=lambda color, _, share: f"#{round(100 * share):02x}{color[3:]}",
)
"""Placeholders that ``in_page`` replaces by the CSS variables of the page; a shade's has its percentage in front."""


def of_arm(group: Group, theme: Theme) -> str:
    """The colour of the group's arm, whatever its grid point: names are written in it."""
    return theme.arms[group.index % len(theme.arms)]


def color(group: Group, theme: Theme) -> str:
    """The colour of the group's lines and dots."""
    return of_arm(group, theme) if group.shade == 1 else theme.mix(of_arm(group, theme), theme.background, group.shade)


def css(group: Group) -> str:
    """``color`` in the CSS of a page that has ``variables``."""
    return in_page(color(group, PAGE))


def variables(theme: Theme) -> str:
    """The CSS custom properties that ``in_page`` refers to."""
    named = {"ink": theme.ink, "muted": theme.muted, "grid": theme.grid, "paper": theme.background}
    named |= {f"arm-{index}": each for index, each in enumerate(theme.arms)}
    return " ".join(f"--{name}: {value};" for name, value in named.items())


def in_page(text: str) -> str:
    """The text with the placeholders of PAGE replaced by the page's variables."""
    fixed = {PAGE.ink: "--ink", PAGE.muted: "--muted", PAGE.grid: "--grid", PAGE.background: "--paper"}
    for placeholder, variable in fixed.items():
        text = text.replace(placeholder, f"var({variable})")
    return re.sub(r"#([0-9a-f]{2})01([0-9a-f]{2})\b", _arm_variable, text)


def _arm_variable(placeholder: re.Match[str]) -> str:
    percent, index = (int(digits, 16) for digits in placeholder.groups())
    variable = f"var(--arm-{index})"
    return f"color-mix(in srgb, {variable} {percent}%, var(--paper))" if percent else variable
