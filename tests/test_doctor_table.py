"""The doctor's whole table: its rows, its text, its picture, and the same for the functions of the installed verl."""

import json

import pytest
import torch
from typer.testing import CliRunner
from verl_stack import import_verl, need_stack

from klreg_verl import doctor
from klreg_verl.cli import app
from klreg_verl.core import exact, kl, penalties
from klreg_verl.core.aggregation import AGGREGATIONS
from klreg_verl.doctor import figure, printing, stock
from klreg_verl.doctor.subjects import OURS

KEYS = {
    *("estimator", "placement", "credit", "correction", "normalization", "aggregation", "value", "follows"),
    *("follows_off_policy", "cosine_reverse", "cosine_forward", "noise", "verdict", "reason"),
}


@pytest.fixture(scope="module")
def table() -> list[dict]:
    return doctor.table()


def one(table: list[dict], **wanted: str | None) -> dict:
    usual = {"normalization": "none", "aggregation": "token-mean", "correction": "none"}
    found = [row for row in table if all(row[key] == value for key, value in (usual | wanted).items())]
    assert len(found) == 1
    return found[0]


def test_every_setting_is_there_once_and_all_is_json(table):
    assert all(row.keys() == KEYS for row in table)
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    settings = ("estimator", "placement", "credit", "correction", "normalization", "aggregation")
    assert len({tuple(row[key] for key in settings) for row in table}) == len(table)
    # in the reward 3 credits and whole responses inside the std, in the loss 3 corrections, both together 4 * 3;
    # 4 aggregations each; 4 exact divergences in the loss; reference_samples in its one way; no KL
    assert len(table) == len(kl.names()) * (4 + 3 + 12) * 4 + len(exact.NAMES) * 4 + 1 + 1
    assert {row["aggregation"] for row in table} == {None, *AGGREGATIONS}


def test_the_usual_setting_of_each_placement_comes_first(table):
    first = {}
    for row in table:
        first.setdefault((row["placement"], row["estimator"]), row)
    usual = {"correction": "none", "normalization": "none"}
    assert all(row.items() >= usual.items() and row["credit"] in (None, "sequence") for row in first.values())
    assert first["reward", "k1"]["aggregation"] == "token-mean"


def test_numbers_of_some_rows(table):
    charged = one(table, placement="reward", estimator="k1", credit="sequence")
    assert (charged["cosine_reverse"], charged["follows"], charged["verdict"]) == (1.0, "reverse", "ok")
    assert charged["cosine_forward"] < 1.0 and len(charged["noise"]) == 4
    void = one(table, placement="loss", estimator="k1")
    assert (void["cosine_reverse"], void["cosine_forward"], void["verdict"]) == (None, None, "void")
    assert min(void["noise"]) > 0.0
    inside = one(table, placement="reward", estimator="k1", normalization="std")
    assert inside["verdict"] == "biased" and min(inside["noise"]) > 10 * max(charged["noise"])


def test_averaging_within_responses_and_dividing_by_the_std_leave_nothing_right(table):
    spoiled = [row for row in table if row["aggregation"] == "seq-mean-token-mean" or row["normalization"] == "std"]
    assert spoiled and all(row["verdict"] != "ok" and row["follows"] == "none" for row in spoiled)


def test_reasons_are_sentences_and_name_a_change_where_there_is_one(table):
    assert all(row["reason"].endswith(".") and row["reason"][0].isupper() for row in table)
    tv = one(table, placement="reward", estimator="tv", credit="sequence")
    assert tv["reason"].endswith("With kl.credit='token' it follows the total variation distance of pi and pi_ref.")
    k2 = one(table, placement="loss", estimator="k2", correction="importance", aggregation="seq-mean-token-mean")
    assert "With kl.aggregation='token-mean' and kl.correction='importance_detached' it follows" in k2["reason"]
    longer = one(table, placement="loss", estimator="k1", aggregation="seq-mean-token-mean")
    assert longer["reason"].endswith("it makes responses longer.")


def test_the_text_has_a_line_for_each_usual_setting(table):
    lines = printing.overview(doctor.table(only_usual=True))
    assert lines[0].split()[:3] == ["placement", "estimator", "setting"]
    body = lines[1 : lines.index("")]
    # no KL, 3 credits, 3 corrections and both placements for each estimator, 4 exact ones, reference_samples
    assert len(body) == 1 + len(kl.names()) * (3 + 3 + 1) + len(exact.NAMES) + 1
    k1 = next(line for line in body if line.split()[:3] == ["loss", "k1", "-"])
    assert k1.split()[3:8] == ["void", "none", "none", "-", "-"]


def test_the_text_of_one_estimator_has_reasons_and_merges_aggregations(table):
    text = "\n".join(printing.in_full([row for row in table if row["estimator"] == "k2"]))
    assert "sequence, any aggregation" not in text and "not seq-mean-token-mean" in text
    assert "the gradient of no divergence." in text
    whole = "\n".join(printing.in_full([row for row in table if row["estimator"] == "k1"]))
    assert "sequence, inside the std, any aggregation" in whole


def test_the_picture_has_a_tile_for_each_setting(table, tmp_path):
    matplotlib = pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    picture = figure.figure(table, "klreg_verl")
    (axes,) = picture.axes
    tiles = [patch for patch in axes.patches if isinstance(patch, matplotlib.patches.FancyBboxPatch)]
    # 8 columns of settings, 4 exact ones, 5 entries of the legend
    assert len(tiles) == len(kl.names()) * 8 + len(exact.NAMES) + 5
    texts = [text.get_text() for text in axes.texts]
    assert texts.count("reverse") == 8 and texts.count("void") == 3 and "k3_verl" in texts
    figure.draw(table, tmp_path / "new" / "doctor.png", "klreg_verl")
    assert (tmp_path / "new" / "doctor.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="cannot be written to .*doctor.xyz. Use a name that ends in .png"):
        figure.draw(table, tmp_path / "doctor.xyz", "klreg_verl")


def test_nothing_of_the_picture_is_cut_off_or_overlaps(table):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    picture = figure.figure(table, "klreg_verl")
    picture.canvas.draw()
    boxes = [(text.get_text(), text.get_window_extent()) for text in picture.axes[0].texts]
    width, height = picture.canvas.get_width_height()
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for _, box in boxes)
    for number, (text, box) in enumerate(boxes):
        overlapping = [other for other, each in boxes[number + 1 :] if box.overlaps(each)]
        assert not overlapping, (text, overlapping)


# ---------------------------------------------------------------------------------------------------------- the command


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["doctor", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_prints_the_table_and_one_estimator():
    assert run().startswith("placement  estimator")
    rows = json.loads(run("--json", "--estimator", "k3"))
    assert {row["estimator"] for row in rows} == {"k3"} and len(rows) == 19 * 4
    assert "the two cancel near the reference" in run("--estimator", "k3")


def test_the_command_judges_an_estimator_of_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "folders_own.py").write_text(
        "from klreg_verl.core import kl\nlike_k2 = kl.estimator('k2')\n", encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    rows = json.loads(run("--json", "--estimator", "folders_own:like_k2"))
    assert [row["verdict"] for row in rows if row["placement"] == "loss"][0] == "ok"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--estimator", "k9"], "no KL estimator 'k9'. Did you mean"),
        (["--spec", "x.yaml#a", "--verl"], "it goes with --json only"),
    ],
)
def test_the_command_refuses(arguments, told):
    result = CliRunner().invoke(app, ["doctor", *arguments])
    assert result.exit_code == 2 and told in result.output


# --------------------------------------------------------------------------------------------------------------- verl's


@pytest.fixture(scope="module")
def verls() -> stock.Stock:
    need_stack()
    import_verl()
    return stock.installed()


def test_our_token_weights_are_those_of_verls_agg_loss(verls):
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    for aggregation in AGGREGATIONS:
        ours, theirs = (subject.token_weights(aggregation, mask, 2.0) for subject in (OURS, verls))
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize(
    ("placement", "estimator", "follows", "verdict"),
    [
        ("reward", "k1", "reverse", "ok"),
        ("reward", "k3", "none", "biased"),
        ("loss", "k1", "none", "void"),
        ("loss", "k2", "reverse", "ok"),
        ("loss", "low_var_kl", "none", "biased"),
        ("loss", "k3+", "reverse", "ok"),
        ("loss", "abs+", "reverse", "ok"),
        ("both", "k3", "none", "biased"),
    ],
)
def test_what_verls_functions_follow(verls, placement, estimator, follows, verdict):
    found = doctor.judge(placement, estimator, subject=verls)
    assert (found.follows, found.verdict) == (follows, verdict)
    # no setting of verl corrects for an older policy's samples
    assert found.follows_off_policy == "none"


def test_verls_grpo_with_the_kl_in_the_reward_is_as_ours_inside_the_std(verls):
    theirs, ours = (
        doctor.judge("reward", "k1", subject=subject, normalization="std", aggregation="token-mean")
        for subject in (verls, OURS)
    )
    assert theirs.verdict == "biased" and "beta cancels" in theirs.reason
    assert theirs.noise == pytest.approx(ours.noise, rel=1e-3)


def test_our_parity_estimator_fares_as_verls_own(verls):
    ours, theirs = doctor.judge("loss", "k3_verl"), doctor.judge("loss", "k3", subject=verls)
    assert ours.value == theirs.value and ours.reason == theirs.reason
    assert ours.cosine_reverse == pytest.approx(theirs.cosine_reverse, abs=1e-6)
    assert ours.noise == pytest.approx(theirs.noise, rel=1e-5)


def test_a_name_that_verl_lacks_is_refused(verls):
    with pytest.raises(ValueError, match="verl has no KL estimator 'js' of its own. Judged: k1, k2"):
        doctor.table(verls, ("js",))


def test_credits_and_corrections_of_the_table_are_those_of_the_core(table):
    assert {row["credit"] for row in table} == {None, *penalties.CREDITS}
    assert {row["correction"] for row in table} == set(penalties.CORRECTIONS)
