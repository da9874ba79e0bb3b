"""experiment.claims: what a recipe may claim, and what run cards keep of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from klreg_verl.experiment import claims, plan, recipe
from klreg_verl.experiment.claims import ClaimSpec
from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.strict import ConfigError

TEXT = """\
question: Does it?
model: {path: tiny}
tasks: {palindrome: {builtin: palindrome}}
seeds: [1, 2]
arms:
  none: {kl: {placement: none}}
  reverse: {kl: {placement: reward, estimator: k1, follows: reverse}}
  forward: {kl: {placement: loss, estimator: k3, follows: forward}}
kl: {beta: 0.1}
"""
CLAIM = "claims: {coverage: {metric: diversity/coverage, contrast: [reverse, none], margin: 0.02}}\n"
GRID = TEXT.replace("kl: {beta: 0.1}", "grid: {kl.beta: [0.1, 0.3]}")


def load(folder: Path, text: str, *overrides: str) -> recipe.Recipe:
    (folder / "study.yaml").write_text(text)
    return recipe.load(folder / "study.yaml", overrides)


def refusal(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, text, *overrides)
    return str(caught.value)


def claim(**changes: str) -> str:
    values = {"metric": "diversity/coverage", "contrast": "[reverse, none]", "margin": "0.02"} | changes
    return f"claims: {{c: {{{', '.join(f'{key}: {value}' for key, value in values.items())}}}}}\n"


def test_a_claim_is_read_with_its_task(tmp_path: Path) -> None:
    found = load(tmp_path, TEXT + CLAIM).claims
    assert found == {
        "coverage": ClaimSpec(metric="diversity/coverage", contrast=("reverse", "none"), margin=0.02, task="palindrome")
    }


def test_a_recipe_without_claims_has_none(tmp_path: Path) -> None:
    assert load(tmp_path, TEXT).claims == {}


def test_claims_change_no_hash_and_go_with_the_run(tmp_path: Path) -> None:
    without, with_them = (plan.expand(load(tmp_path, text)) for text in (TEXT, TEXT + CLAIM))
    assert [spec.hash for spec in without] == [spec.hash for spec in with_them]
    assert with_them[0].claims["coverage"].margin == 0.02
    stored = json.loads(json.dumps(with_them[0].to_json()))
    assert RunSpec.from_json(stored) == with_them[0]
    del stored["claims"]
    assert RunSpec.from_json(stored) == without[0]


def test_what_later_versions_added_changes_no_hash_of_a_claim_without_it(tmp_path: Path) -> None:
    listed = claims.canonical(load(tmp_path, TEXT + CLAIM).claims)
    assert set(listed["coverage"]) == {"metric", "contrast", "margin", "compare", "at", "task"}
    looked = claims.canonical(load(tmp_path, TEXT + claim(looks="[5, 10]")).claims)
    assert looked["c"]["looks"] == [5, 10]


def test_a_base_has_claims_too_and_overrides_reach_them(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(TEXT + CLAIM)
    (tmp_path / "child.yaml").write_text("base: base.yaml\nclaims: {coverage: {margin: 0.05}}\n")
    assert recipe.load(tmp_path / "child.yaml").claims["coverage"].margin == 0.05
    assert load(tmp_path, TEXT + CLAIM, "claims.coverage.margin=0.1").claims["coverage"].margin == 0.1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (claim(metric="coverage"), "claims.c.metric: 'coverage' is no key of metrics.jsonl. They begin with actor"),
        (claim(metric="speed/x"), "'speed/x' is no key of metrics.jsonl"),
        (claim(metric="explore/x"), "'explore/x' is no key of metrics.jsonl"),
        (claim(contrast="[reverse]"), "claims.c.contrast: [reverse] is not two different arms"),
        (claim(contrast="[reverse, reverse]"), "[reverse, reverse] is not two different arms"),
        (claim(contrast="[reverse, backward]"), "there is no arm 'backward'. Known: none, reverse, forward."),
        (claim(margin="0"), "claims.c.margin: 0.0 is not positive. Say which difference would begin to matter."),
        (claim(task="maths"), "claims.c.task: there is no task 'maths'. Known: palindrome."),
        (claim(at="0.1"), "claims.c.at: 0.1 has no effect with `compare: end`."),
        (claim(compare="beta"), "claims.c.at: missing. `compare: beta` needs the beta to compare at."),
        (claim(looks="[10, 5]"), "claims.c.looks: [10, 5]: give ascending numbers of seeds from 3 on."),
        (claim(looks="[2, 5]"), "claims.c.looks: [2, 5]: give ascending numbers of seeds from 3 on."),
        (claim(compare="kl", at="-1"), "claims.c.at: -1.0 is not positive: there only the starting model is."),
        (claim(compare="beta", at="0"), "0.0 is not positive: there is no KL term; name an arm without one."),
        (claim(compare="middle"), "'middle' is not one of end, beta, kl"),
        (claim(compare="beta", at="0.1"), "claims.c.at: the arm none has no run at beta 0.1 (it is run at no beta)."),
        (
            claim(compare="kl", between="[0.5, 1]", contrast="[reverse, forward]"),
            "claims.c.compare: kl: the arm reverse is run at beta 0.1; its curve over an interval of KL takes 3 betas",
        ),
        (
            GRID + claim(compare="kl", at="1", contrast="[reverse, forward]"),
            "claims.c.at: 1: at one KL straight lines between betas are biased and miss the truth too often.",
        ),
        (claim(compare="kl"), "claims.c.between: missing. `compare: kl` needs the interval of KL to compare over"),
        (claim(between="[0.5, 1]"), "claims.c.between: [0.5, 1.0] has no effect with `compare: end`."),
        (claim(compare="kl", between="[1, 0.5]"), "claims.c.between: [1.0, 0.5]: give the lowest and the highest KL"),
        (
            claim(compare="kl", between="[0.5, 1]", at="1"),
            "claims.c.at: 1.0 and `between` contradict each other. Keep `between`.",
        ),
        (
            GRID + claim(contrast="[reverse, forward]"),
            "claims.c.compare: end: the arm reverse has 2 grid points (beta 0.1, 0.3). Say `compare: beta` or `kl`",
        ),
        (
            GRID + claim(contrast="[reverse, forward]", compare="beta", at="0.2"),
            "claims.c.at: the arm reverse has no run at beta 0.2 (it is run at beta 0.1, 0.3).",
        ),
        ("claims: {c: {metric: train/accuracy, contrast: [reverse, none]}}\n", "claims.c.margin: missing."),
        ("claims: {c: {metrics: train/accuracy}}\n", "unknown key 'metrics'. Did you mean 'metric'?"),
        ("claims: {'a b': {metric: train/accuracy, contrast: [none, reverse], margin: 1}}\n", "the claim's name 'a b'"),
    ],
)  # fmt: skip
def test_a_claim_that_no_run_can_decide_is_refused_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    told = refusal(tmp_path, text if text.startswith("question") else TEXT + text)
    assert message in told and told.startswith(str(tmp_path / "study.yaml:"))


def test_a_grid_over_more_than_beta_is_no_line_over_kl(tmp_path: Path) -> None:
    text = TEXT.replace("kl: {beta: 0.1}", "grid: {kl.beta: [0.1, 0.3], train.learning_rate: [1.0e-5, 1.0e-4]}")
    told = refusal(tmp_path, text + claim(compare="kl", between="[0.5, 1]", contrast="[reverse, forward]"))
    assert "claims.c.compare: kl: the arm reverse has several grid points at one beta" in told


def test_all_wrong_claims_are_told_at_once(tmp_path: Path) -> None:
    first = "a: {metric: x, contrast: [none, reverse], margin: 1}"
    second = "b: {metric: train/x, contrast: [a, b], margin: 1}"
    assert len(refusal(tmp_path, f"{TEXT}claims: {{{first}, {second}}}").splitlines()) == 2


def test_with_several_tasks_a_claim_names_one(tmp_path: Path) -> None:
    text = TEXT.replace(
        "{palindrome: {builtin", "{long: {builtin: palindrome, options: {max_length: 9}}, short: {builtin"
    )
    assert "claims.c.task: missing: the recipe has the tasks long, short." in refusal(tmp_path, text + claim())
    assert load(tmp_path, text + claim(task="short")).claims["c"].task == "short"


def test_arms_at_the_betas_of_a_grid_are_compared_at_a_beta_or_a_kl(tmp_path: Path) -> None:
    several = GRID.replace("[0.1, 0.3]", "[0.1, 0.3, 1.0]")
    for how in ({"compare": "beta", "at": "0.3"}, {"compare": "kl", "between": "[0.5, 1.5]"}):
        found = load(tmp_path, several + claim(contrast="[reverse, forward]", **how)).claims["c"]
        assert found.compare == how["compare"]
    assert found.between == (0.5, 1.5)


# ---------------------------------------------------------------------------------------------------- run cards

ONE = {"a": ClaimSpec(metric="train/accuracy", contrast=("x", "y"), margin=0.1, task="t")}
TWO = ONE | {"b": ClaimSpec(metric="entropy/token", contrast=("x", "y"), margin=0.1, task="t")}


def test_a_fingerprint_follows_the_claims_and_not_their_order() -> None:
    turned = dict(reversed(claims.canonical(TWO).items()))
    assert claims.fingerprint(claims.canonical(TWO)) == claims.fingerprint(turned)
    assert claims.fingerprint(claims.canonical(ONE)) != claims.fingerprint(claims.canonical(TWO))


def test_a_new_run_has_the_claims_of_now() -> None:
    card = claims.card(ONE, None, "then")
    assert card["since"] == "then" and card["sha256"] == claims.fingerprint(card["list"])
    assert claims.registered({"claims": json.loads(json.dumps(card))}) == claims.canonical(ONE)


def test_a_resumed_run_keeps_the_claims_that_it_started_under() -> None:
    first = claims.card(ONE, None, "monday")
    assert claims.card(ONE, {"claims": first}, "tuesday") == first
    changed = claims.card(TWO, {"claims": first}, "tuesday")
    again = claims.card({}, {"claims": json.loads(json.dumps(changed))}, "friday")
    assert changed["since"] == "tuesday" and [each["since"] for each in again["earlier"]] == ["monday", "tuesday"]
    assert claims.registered({"claims": again}) == claims.canonical(ONE)


def test_a_claim_of_a_version_with_fewer_fields_is_the_same_claim() -> None:
    first = claims.card(ONE, None, "monday")
    older = {"a": {key: value for key, value in first["list"]["a"].items() if key not in ("compare", "at")}}
    card = {"sha256": "by an older rule", "since": "monday", "list": older}
    assert claims.card(ONE, {"claims": card}, "tuesday") == card
    assert [each["since"] for each in claims.card(TWO, {"claims": card}, "tuesday")["earlier"]] == ["monday"]
    assert claims.fingerprint(older) == first["sha256"]
    at_kl = {"a": older["a"] | {"compare": "kl", "at": 1.0}}
    assert claims.fingerprint(at_kl) != first["sha256"]


def test_a_run_from_before_there_were_claims_has_registered_none() -> None:
    card = claims.card(ONE, {"time": "monday"}, "tuesday")
    assert claims.registered({"claims": card}) == {} and card["earlier"][0]["since"] == "monday"
    assert claims.registered({}) == {} and claims.registered({"claims": "broken"}) == {}


# ---------------------------------------------------------------------------------------------------- what is logged


def unlogged(folder: Path, metric: str, *overrides: str, text: str = TEXT) -> str:
    """The refusal of a claim on this metric; empty where the recipe logs it."""
    pytest.importorskip("torch")
    loaded = load(folder, text + claim(metric=metric), *overrides)
    try:
        recipe.check_claims(loaded)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("metric", "overrides", "expected"),
    [
        (
            "kl_ref/exact_token",
            [],
            "claims.c.metric: kl_ref/exact_token is not logged. Set probes.exact_every, e.g. to",
        ),
        ("kl_ref/exact_token", ["probes.exact_every=5"], ""),
        ("kl_ref_t1/k1_token", [], "Set probes.temperature_one_every"),
        ("kl_ref_t1/k1_token", ["probes.temperature_one_every=5", "train.temperature=0.9"], ""),
        (
            "kl/cap_fraction",
            ["arms.reverse.kl.cap=1.0"],
            "kl/cap_fraction is not logged. Set kl.cap. (Concerns: none.)",
        ),
        ("kl/advantage_share", [], "Only an arm with its KL in the reward logs it. (Concerns: none.)"),
        ("retention/spell_backward", [], "no skill 'spell_backward' is validated. Name it in retention.skills."),
        ("retention/spell_backward", ["retention.skills.spell_backward={}"], ""),
        ("train/accuracyy", [], "train/accuracyy is not logged. Did you mean 'train/accuracy'?"),
        ("kl_ref/k1_respons", [], "Did you mean 'kl_ref/k1_response'?"),
        ("kl_ref/k1_response", [], ""),
        ("actor/entropy", [], ""),  # verl's own
        ("eval/palindrome/accuracy", [], ""),  # the last step is always validated
        ("eval/palindrome/pass@4", [], ""),
        ("eval/palindromes/accuracy", [], "the held-out prompts are of palindrome. Did you mean 'palindrome'?"),
        ("eval/palindrome/acuracy", [], "Held-out metrics are eval/<data_source>/accuracy, /score and /pass@<k>."),
    ],
)
def test_a_claim_on_what_no_run_logs_is_refused_with_what_to_set(
    tmp_path: Path, metric: str, overrides: list[str], expected: str
) -> None:
    told = unlogged(tmp_path, metric, *overrides)
    assert expected in told and bool(expected) == bool(told)
    assert not told or told.startswith(f"{tmp_path}/study.yaml:10: claims.c.metric: ")


def test_the_data_sources_of_ones_own_prompts_are_read(tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    pq.write_table(pyarrow.table({"data_source": ["openai/gsm8k"] * 2}), tmp_path / "val.parquet")
    text = TEXT.replace("{builtin: palindrome}", "{train: t.parquet, val: val.parquet, reward: 'a:b'}")
    assert "prompts are of openai/gsm8k." in unlogged(tmp_path, "eval/gsm8k/accuracy", text=text)
    assert unlogged(tmp_path, "eval/openai/gsm8k/accuracy", text=text) == ""
