"""Figures: what is drawn, where labels go, sizes, and that the same runs give the same bytes."""

import re
import struct

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from run_folders import write_run, write_study

from klreg_verl.analysis import figures, themes
from klreg_verl.analysis.runs import load
from klreg_verl.analysis.summary import group_runs


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("runs") / "synthetic", seeds=(1, 2))


@pytest.fixture(scope="module")
def groups(study):
    return group_runs(load(study))


def panel(name):
    return next(each for each in (*figures.TIME_COURSES, *figures.MISMATCH) if each.name == name)


def drawn(groups, name):
    axes = Figure(figsize=(5, 3)).add_subplot()
    return figures.time_course(groups, panel(name), axes)


def overview_texts(groups, path):
    """Every text of the row of four, as it is written to the file."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "_save", lambda figure, *_: found.extend(figure.findobj(Text)))
        figures.overview(groups, path)
    return [text.get_text() for text in found]


def pixels(path):
    """Width and height from a PNG's header."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def test_every_run_is_a_thin_line_of_its_recorded_values(groups):
    thin = [line for line in drawn(groups, "accuracy").lines if line.get_linewidth() == 0.7]
    wanted = [run.training["train/accuracy"].to_numpy() for group in groups for run in group.runs]
    assert len(thin) == len(wanted) == 6
    for line, values in zip(thin, wanted, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), values)


def test_the_thick_line_is_the_mean_of_the_runs_smoothed(groups):
    thick = next(line for line in drawn(groups, "accuracy").lines if line.get_linewidth() == 1.9)
    values = np.mean([run.training["train/accuracy"] for run in groups[0].runs], axis=0)
    # 40 steps: a window of five, so the first full one is at step 3
    assert list(thick.get_xdata())[0] == 3 and list(thick.get_xdata())[-1] == 38
    assert thick.get_ydata()[0] == pytest.approx(values[:5].mean())


def test_three_runs_have_a_band_of_their_standard_error_instead_of_lines_of_their_own(tmp_path):
    # accuracies 0.1, 0.2, 0.6 at every step: mean 0.3, variance (0.04 + 0.01 + 0.09) / 2 = 0.07, error sqrt(0.07 / 3)
    for seed, accuracy in ((1, 0.1), (2, 0.2), (3, 0.6)):
        write_run(tmp_path, "none", [{"step": s, "train/accuracy": accuracy} for s in (1, 2, 3)], seed=seed)
    write_run(tmp_path, "none", [{"step": 1, "train/accuracy": 0.9}], seed=4, status="failed")
    axes = drawn(group_runs(load(tmp_path)), "accuracy")
    (band,) = axes.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((0.3 - (0.07 / 3) ** 0.5, 0.3 + (0.07 / 3) ** 0.5))
    assert [list(line.get_ydata()) for line in axes.lines if line.get_linewidth() == 0.7] == [[0.9]]  # the failed one


def test_long_names_stand_below_an_overview_once_and_leave_its_panels_their_room(tmp_path):
    shown = {}
    for name, arms in (("short", ("none", "reverse")), ("long", ("none", "reverse_with_a_long_name"))):
        write_study(tmp_path / name, arms=["none"])
        for arm in arms[1:]:
            write_run(tmp_path / name, arm, [{"step": 1, "train/accuracy": 0.5}])
        shown[name] = overview_texts(group_runs(load(tmp_path / name)), tmp_path / f"{name}.png")
    assert shown["short"].count("none") == 4 and shown["long"].count("none") == 1
    assert shown["long"].count("reverse_with_a_long_name") == 1


def test_every_setting_is_named_once_and_axes_carry_units(groups):
    axes = drawn(groups, "entropy")
    texts = [text.get_text() for text in axes.texts]
    assert sorted(texts) == ["Entropy", "forward", "nats per token", "none", "reverse"]
    assert axes.get_xlabel() == "step"


def test_a_failed_run_ends_in_a_cross(tmp_path):
    write_run(
        tmp_path, "none", [{"step": 1, "train/accuracy": 0.5}, {"step": 2, "train/accuracy": 0.6}], status="failed"
    )
    crosses = [line for line in drawn(group_runs(load(tmp_path)), "accuracy").lines if line.get_marker() == "x"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in crosses] == [(2, 0.6)]


def test_dots_of_the_kl_figure_are_means_of_ten_steps(tmp_path):
    # KL 1 ... 20: means 5.5 and 15.5; accuracy 0.01 a step: 0.055 and 0.155
    rows = [{"step": s, "kl_ref/k1_response": float(s), "train/accuracy": s / 100} for s in range(1, 21)]
    write_run(tmp_path, "none", rows)
    axes = figures.kl_accuracy(group_runs(load(tmp_path)), Figure().add_subplot())
    (dots,) = [line for line in axes.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(dots.get_xydata(), [[5.5, 0.055], [15.5, 0.155]])


@pytest.mark.parametrize(
    ("wanted", "gap", "places"),
    [
        ([0.1, 0.9], 0.2, [0.1, 0.9]),
        ([0.5, 0.5], 0.2, [0.4, 0.6]),  # a block centred on what both want
        ([0.0, 0.0, 0.0], 0.2, [0.0, 0.2, 0.4]),  # at the lower limit
        ([1.0, 0.95], 0.2, [1.0, 0.8]),  # order is kept, at the upper limit
        ([0.5] * 3, 0.8, [0.0, 0.5, 1.0]),  # not all fit: the gap shrinks
        ([0.4, 0.5, 0.62], 0.1, [0.4, 0.5, 0.62]),
        ([], 0.1, []),
    ],
)
def test_labels_are_spread_as_little_as_needed(wanted, gap, places):
    assert figures.spread(wanted, gap) == pytest.approx(places)


def test_labels_do_not_overlap_for_any_ends():
    generator = np.random.default_rng(0)
    for _ in range(200):
        places = np.sort(figures.spread(list(generator.random(7)), 0.08))
        assert np.diff(places).min() > 0.08 - 1e-6
        assert places[0] >= 0 and places[-1] <= 1 + 1e-9


@pytest.mark.parametrize(
    ("ticks", "labels"),
    [
        ([0.0, 0.025, 0.05], ["0.000", "0.025", "0.050"]),
        ([-0.5, 0.0, 0.5], ["−0.5", "0.0", "0.5"]),
        ([0.0, 10.0, 20.0], ["0", "10", "20"]),
        ([-2e-6, 0.0, 2e-6], ["−2e-06", "0", "2e-06"]),
        ([0.1 + 0.2, 0.6], ["0.3", "0.6"]),
    ],
)
def test_tick_labels_have_equal_decimals_and_no_power_of_ten_of_their_own(ticks, labels):
    assert figures._Plain().format_ticks(ticks) == labels


def test_png_files_have_the_stated_size(groups, tmp_path):
    # 4.9 x 2.9 inches at 200 dots; 12 x 3.25 inches at 220
    path = figures.png(figures.drawings(groups)["accuracy"], tmp_path / "accuracy.png")
    assert pixels(path) == (980, 580)
    assert pixels(figures.overview(groups, tmp_path / "overview.png")) == (2640, 715)


def test_the_same_runs_give_the_same_bytes(study, tmp_path):
    first = figures.overview(group_runs(load(study)), tmp_path / "first.png").read_bytes()
    assert figures.overview(group_runs(load(study)), tmp_path / "second.png").read_bytes() == first
    dark = figures.overview(group_runs(load(study)), tmp_path / "dark.png", theme=themes.DARK).read_bytes()
    assert dark != first


def test_svg_takes_its_colours_from_the_page_and_refers_to_nothing(groups):
    text = figures.svg(figures.drawings(groups)["kl_k1"], "kl_k1")
    assert text.startswith("<svg viewBox=") and text.endswith("</svg>")
    assert {"var(--ink)", "var(--muted)", "var(--grid)", "var(--arm-0)", "var(--arm-2)"} <= set(
        re.findall(r"var\([^)]*\)", text)
    )
    assert "http" not in text and "#0" not in text.replace('"#', "")
    assert ">reverse</text>" in text
    assert text == figures.svg(figures.drawings(groups)["kl_k1"], "kl_k1")


def test_figures_without_data_are_not_offered_nor_is_a_beta_that_never_moves(tmp_path):
    steps = [{"step": step, "train/accuracy": 0.5, "kl/beta": 0.1} for step in (1, 2)]
    write_run(tmp_path, "none", steps)
    assert list(figures.drawings(group_runs(load(tmp_path)))) == ["accuracy"]
    write_run(tmp_path, "adaptive", [steps[0], steps[1] | {"kl/beta": 0.2}])
    assert list(figures.drawings(group_runs(load(tmp_path)))) == ["accuracy", "beta"]


def test_an_overview_of_partly_recorded_metrics_says_what_is_missing(tmp_path):
    write_run(tmp_path / "runs", "none", [{"step": 1, "train/accuracy": 0.5}])
    path = figures.overview(group_runs(load(tmp_path / "runs")), tmp_path / "overview.png")
    assert pixels(path) == (2640, 715)


SKILL = "retention/spell_backward"


@pytest.fixture
def sweep(tmp_path):
    """Three betas, two seeds each, and none: accuracy 0.6 - beta / 50, by seed 0.1 up or down; the skill likewise."""
    for seed, off in ((1, 0.1), (2, -0.1)):
        write_run(tmp_path, "none", [{"step": 1, "train/accuracy": 0.6 + off}], seed=seed)
        for beta in (0.1, 10.0, 1.0):
            rows = [
                {"step": 0, SKILL: 0.9},
                {"step": 1, "train/accuracy": 0.6 - beta / 50 + off, SKILL: 0.9 - beta / 50},
            ]
            write_run(tmp_path, "reverse", rows, seed=seed, grid=(f"beta={beta}",), kl={"beta": beta})
    return group_runs(load(tmp_path))


def test_grid_points_are_shades_of_their_arm_in_the_order_of_beta(sweep):
    none, *reverse = sweep
    assert [group.label for group in reverse] == ["reverse · beta=0.1", "reverse · beta=1.0", "reverse · beta=10.0"]
    assert {group.index for group in reverse} == {1} and [group.shade for group in reverse] == [0.35, 0.675, 1.0]
    blue = themes.LIGHT.arms[1]  # 00, 72, b2: 35 % of it on white are 166, 206, 228
    assert themes.color(reverse[0], themes.LIGHT) == "#a6cee4" and themes.color(reverse[2], themes.LIGHT) == blue
    assert themes.css(reverse[0]) == "color-mix(in srgb, var(--arm-1) 35%, var(--paper))"
    assert (themes.css(none), themes.css(reverse[2])) == ("var(--arm-0)", "var(--arm-1)")


def test_beside_its_dot_only_the_last_grid_point_of_an_arm_has_its_whole_name(sweep):
    assert [figures._short_name(group) for group in sweep] == ["none", "0.1", "1.0", "reverse · beta=10.0"]


def test_a_sweep_is_drawn_against_beta_and_the_arm_without_one_is_a_level(sweep):
    accuracy = figures.SWEEP[0]
    assert figures.has_sweep(sweep, accuracy)
    axes = figures.against_beta(sweep, accuracy, Figure().add_subplot())
    path = next(line for line in axes.lines if line.get_linewidth() == 1.9)
    np.testing.assert_allclose(path.get_xydata(), [[0.1, 0.598], [1.0, 0.58], [10.0, 0.4]])
    (level,) = [line for line in axes.lines if line.get_linewidth() == 1.3]
    assert list(level.get_ydata()) == pytest.approx([0.6, 0.6])
    # two seeds 0.2 apart: a standard deviation of 0.2 / sqrt(2), an error of 0.1
    errors = next(each for each in axes.collections if len(each.get_paths()) == 3).get_segments()
    assert errors[0][:, 1] == pytest.approx([0.498, 0.698])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0.1", "1", "10"]


def test_an_overview_of_a_sweep_is_against_beta_and_has_the_skill_that_was_not_trained(sweep, tmp_path):
    texts = overview_texts(sweep, tmp_path / "overview.png")
    assert texts.count("beta") == 2 and "step" not in texts  # accuracy and the skill: the rest was not recorded
    assert "A skill not trained" in texts and texts.count("none") == texts.count("reverse") == 1
    assert pixels(figures.overview(sweep, tmp_path / "overview.png")) == (2640, 715)
    skill = figures.drawings(sweep)["beta_retention"](Figure().add_subplot(), themes.LIGHT)
    path = next(line for line in skill.lines if line.get_linewidth() == 1.9)
    assert list(path.get_ydata()) == pytest.approx([-0.002, -0.02, -0.2])


def test_a_setting_without_a_finished_run_has_no_place_in_a_sweep(tmp_path):
    for beta in (0.1, 0.3, 1.0, 3.0):
        status = "running" if beta == 3.0 else "done"
        rows = [{"step": 1, "train/accuracy": beta / 10}]
        write_run(tmp_path, "reverse", rows, grid=(f"beta={beta}",), kl={"beta": beta}, status=status)
    (tmp_path / "reverse" / "palindrome" / "beta=9.0" / "seed1").mkdir(parents=True)  # its spec is not written yet
    axes = figures.against_beta(group_runs(load(tmp_path)), figures.SWEEP[0], Figure().add_subplot())
    path = next(line for line in axes.lines if line.get_linewidth() == 1.9)
    assert list(path.get_xdata()) == [0.1, 0.3, 1.0]


def test_settings_beside_a_sweep_are_a_level_each(sweep, tmp_path):
    for beta in (0.1, 0.2):
        row = {"step": 1, "train/accuracy": 0.5 + beta}
        write_run(tmp_path, "pair", [row], grid=(f"beta={beta}",), kl={"beta": beta})
    axes = figures.against_beta(group_runs(load(tmp_path)), figures.SWEEP[0], Figure().add_subplot())
    levels = [line.get_ydata()[0] for line in axes.lines if line.get_linewidth() == 1.3]
    assert levels == pytest.approx([0.6, 0.6, 0.7])  # none, and the two betas of an arm that is no sweep
    assert "pair · beta=0.2" in [text.get_text() for text in axes.texts]


def test_two_betas_or_a_beta_of_zero_are_no_sweep(tmp_path):
    for name, betas in (("two", (0.1, 1.0)), ("zero", (0.0, 0.1, 1.0))):
        for beta in betas:
            rows = [{"step": 1, "train/accuracy": 0.5}]
            write_run(tmp_path / name, "reverse", rows, grid=(f"beta={beta}",), kl={"beta": beta})
        assert not figures.has_sweep(group_runs(load(tmp_path / name)), figures.SWEEP[0])


def test_names_below_an_overview_take_the_rows_that_they_need(tmp_path):
    for number in range(12):
        write_run(tmp_path / "runs", f"an_arm_with_a_long_name_{number}", [{"step": 1, "train/accuracy": 0.5}])
    groups = group_runs(load(tmp_path / "runs"))
    names = [(group.label, group) for group in groups]
    rows = figures._in_rows(names, 8.0)  # 26 characters of 0.072 and 0.38 are 2.25 inches: three a row
    assert [len(row) for row in rows] == [3, 3, 3, 3] and [name for row in rows for name in row] == names
    width, height = pixels(figures.overview(groups, tmp_path / "overview.png"))
    assert width == 2640 and height > 715


def test_runs_at_one_beta_that_differ_in_something_else_are_joined_to_no_frontier(tmp_path):
    (panel, *_) = figures.FRONTIERS
    steps = [{"step": step, "train/accuracy": 0.5, "kl_ref/k1_response": 1.0} for step in (1, 2)]
    for beta in (0.1, 0.3):
        write_run(tmp_path / "betas", "reverse", steps, grid=(f"beta={beta}",), kl={"beta": beta})
        for rate in (1, 2):
            write_run(tmp_path / "both", "reverse", steps, grid=(f"beta={beta},rate={rate}",), kl={"beta": beta})
    assert figures.has_frontier(group_runs(load(tmp_path / "betas")), panel)
    assert not figures.has_frontier(group_runs(load(tmp_path / "both")), panel)
