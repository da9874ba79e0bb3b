"""How often the rule that decides errs in simulated studies: differences, equivalences, intervals, looks, power.

`python tests/test_calibration.py` prints the table that stands in recipes/results/calibration.md. The quick tests take
a part of the studies; the whole ones are marked `full`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from klreg_verl.analysis import power
from klreg_verl.analysis.frontier import matched
from klreg_verl.core.statistics import Paired, at_look, decide, look_level

FULL, QUICK = 10_000, 1_000
NOISES: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "normal": lambda generator, shape: generator.normal(size=shape),
    "t3": lambda generator, shape: generator.standard_t(3, size=shape) / math.sqrt(3),
    "skewed": lambda generator, shape: (generator.gamma(2, size=shape) - 2) / math.sqrt(2),
}
"""Noise of one arm with mean 0 and variance 1; gamma(2) has skewness 1.4."""
SEEDS = (3, 5, 8)
LOOKS = ((), (5, 10))


def pairs(noise: str, num: int, studies: int, effect: float = 0.0) -> Iterator[Paired]:
    """Two arms whose seeds share a part; the difference has standard deviation 1."""
    generator = np.random.default_rng([num, len(noise)])
    shared = generator.normal(size=(studies, num))
    left, right = (NOISES[noise](generator, (studies, num)) / math.sqrt(2) for _ in range(2))
    for common, first, second in zip(shared, left + effect, right, strict=True):
        yield Paired(seeds=tuple(range(num)), left=tuple(common + first), right=tuple(common + second))


def rate(found: Iterator[bool]) -> float:
    return float(np.mean(list(found)))


def rejected(noise: str, num: int, studies: int, looks: tuple[int, ...] = (), effect: float = 0.0) -> float:
    """Share of studies that end as "differs"; the margin is too small for any equivalence."""
    return rate(
        decide([each], [1e-9], looks=[looks])[0].outcome == "differs" for each in pairs(noise, num, studies, effect)
    )


def equal(noise: str, num: int, studies: int, margin: float, effect: float, looks: tuple[int, ...] = ()) -> float:
    """Share of studies that end as "equivalent"."""
    return rate(
        decide([each], [margin], looks=[looks])[0].outcome == "equivalent"
        for each in pairs(noise, num, studies, effect)
    )


def covered(noise: str, num: int, studies: int, looks: tuple[int, ...] = ()) -> float:
    """Share of studies whose interval has the truth in it; with looks the study stops where it is decided."""

    def holds(each: Paired) -> bool:
        if not looks:
            low, high = each.interval()
            return low <= 0 <= high
        for taken, look in enumerate(looks, 1):
            seen = each.first(look)
            stops = decide([seen], [1e-9], looks=[looks])[0].outcome != "undecided" or look == looks[-1]
            if stops:
                low, high = at_look(seen, looks).interval(look_level(looks, taken))
                return low <= 0 <= high
        raise AssertionError("the last look stops")

    return rate(holds(each) for each in pairs(noise, num, studies))


def error(share: float, studies: int) -> float:
    """Three standard errors of a simulated rate."""
    return 3 * math.sqrt(share * (1 - share) / studies)


def check_rates(noise: str, num: int, studies: int, slack: float) -> None:
    assert 0.04 - slack <= rejected(noise, num, studies) <= 0.06 + slack
    assert 0.93 - slack <= covered(noise, num, studies) <= 0.97 + slack


@pytest.mark.parametrize("num", SEEDS)
@pytest.mark.parametrize("noise", NOISES)
def test_of_nulls_a_twentieth_is_rejected_and_intervals_cover(noise: str, num: int) -> None:
    check_rates(noise, num, QUICK, error(0.05, QUICK))


@pytest.mark.full
@pytest.mark.parametrize("num", SEEDS)
@pytest.mark.parametrize("noise", NOISES)
def test_of_ten_thousand_nulls_a_twentieth_is_rejected_and_intervals_cover(noise: str, num: int) -> None:
    check_rates(noise, num, FULL, 0.001)


@pytest.mark.parametrize("studies", [QUICK, pytest.param(FULL, marks=pytest.mark.full)])
@pytest.mark.parametrize("noise", NOISES)
def test_two_looks_err_as_often_as_one(noise: str, studies: int) -> None:
    assert 0.04 - error(0.05, studies) <= rejected(noise, 10, studies, LOOKS[1]) <= 0.06
    assert covered(noise, 10, studies, LOOKS[1]) >= 0.94 - error(0.05, studies)
    assert equal(noise, 10, studies, 1.0, 1.0, LOOKS[1]) <= 0.05 + error(0.05, studies) + 0.01


def test_looking_twice_without_bounds_errs_more_often() -> None:
    """The control: the same two looks at the level of one."""
    false = rate(
        each.first(5).p_difference() <= 0.05 or each.p_difference() <= 0.05 for each in pairs("normal", 10, FULL)
    )
    assert false > 0.07


@pytest.mark.parametrize("studies", [QUICK, pytest.param(FULL, marks=pytest.mark.full)])
@pytest.mark.parametrize("num", SEEDS)
@pytest.mark.parametrize("claims", [1, 5])
def test_the_stated_power_is_that_of_the_rule(num: int, claims: int, studies: int) -> None:
    """One claim of the list has the effect that `klreg power` and `plan` state, and of the others nothing is known."""
    (row,) = power.seeds_table(power.Question(claims=claims), seeds=[num])
    slack = 0.03 + error(0.8, studies) * (studies == QUICK)
    for outcome, margin, effect in (("differs", 1e-9, row["difference"]), ("equivalent", row["margin"], 0.0)):
        found = rate(
            decide([each], [margin], family=claims)[0].outcome == outcome
            for each in pairs("normal", num, studies, effect)
        )
        assert abs(found - 0.8) <= slack, (outcome, found)


# ---------------------------------------------------------------------------------------------------- equal KL

ENDS = {"left": (0.29, 0.46, 0.58, 0.79, 1.00), "right": (0.19, 0.33, 0.45, 0.67, 0.98)}
"""KL that five betas end at, as in recipes/results/beta_sweep_cpu with one beta more."""
BETWEEN = (0.35, 0.75)


def curves(noise: str, seeds: int, studies: int, shift: float) -> Iterator[Paired]:
    """Both arms on 0.44 + 0.3 sqrt(KL), the right one `shift` lower; noise in KL, in the metric and of the seed."""
    generator = np.random.default_rng([seeds, len(noise), 7])

    def draw(*shape: int) -> np.ndarray:
        return NOISES[noise](generator, shape)

    for _ in range(studies):
        common, paths = 0.02 * draw(seeds), []
        for name, ends in ENDS.items():
            kls = np.array(ends) * (1 + 0.05 * draw(seeds, 5))
            values = 0.44 + 0.3 * np.sqrt(np.maximum(kls, 0.01)) + 0.02 * draw(seeds, 5) + common[:, None]
            values -= shift * (name == "right")
            paths.append({seed: list(zip(kls[seed], values[seed], strict=True)) for seed in range(seeds)})
        yield matched(paths[0], paths[1], BETWEEN)


def at_equal_kl(noise: str, seeds: int, studies: int) -> tuple[float, float]:
    """(share of intervals with the truth in them, share of "equivalent" where the difference is the margin)."""
    inside = [low <= 0 <= high for low, high in (each.interval() for each in curves(noise, seeds, studies, 0.0))]
    false = [decide([each], [0.02])[0].outcome == "equivalent" for each in curves(noise, seeds, studies, 0.02)]
    return float(np.mean(inside)), float(np.mean(false))


@pytest.mark.parametrize("studies", [QUICK // 2, pytest.param(FULL, marks=pytest.mark.full)])
@pytest.mark.parametrize("seeds", [5, 8])
def test_at_equal_kl_intervals_cover_and_the_margin_is_kept(seeds: int, studies: int) -> None:
    inside, false = at_equal_kl("normal", seeds, studies)
    assert 0.93 - error(0.05, studies) * (studies < FULL) <= inside and false <= 0.06 + error(0.05, studies)


def table(studies: int = FULL) -> str:
    """The rates of all rules as Markdown."""
    head = ("arm noise", "seeds", "looks", "nulls rejected", "interval covers", "on the margin, equivalent")
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for noise in NOISES:
        for num, looks in [*((num, ()) for num in SEEDS), (10, LOOKS[1])]:
            rates = (
                rejected(noise, num, studies, looks),
                covered(noise, num, studies, looks),
                equal(noise, num, studies, 1.0, 1.0, looks),
            )
            told = " | ".join(f"{value:.3f}" for value in rates)
            rows.append(f"| {noise} | {num} | {', '.join(map(str, looks)) or 'one'} | {told} |")
    head = ("compared at equal KL, arm noise", "seeds", "interval covers", "on the margin, equivalent")
    rows += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for noise in NOISES:
        for seeds in (5, 8):
            inside, false = at_equal_kl(noise, seeds, studies)
            rows.append(f"| {noise} | {seeds} | {inside:.3f} | {false:.3f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
