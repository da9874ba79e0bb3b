"""Recipes: merging, refusals with their places, overrides, the KL block alone, and every recipe that is shipped."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from klreg_verl.experiment import kl_settings, recipe
from klreg_verl.experiment.recipe import ConfigError, KLSpec, ResourcesSpec, TrainSpec

RECIPES = sorted(Path(__file__).parents[1].joinpath("recipes").glob("*.yaml"))

BASIC = """\
question: Does it?
model: {path: tiny}
tasks: {palindrome: {builtin: palindrome}}
seeds: [1, 2]
kl: {beta: 0.1}
arms:
  none:
    kl: {placement: none}
  reverse:
    kl:
      placement: reward
      estimator: k1
      follows: reverse
"""

Load = Callable[..., recipe.Recipe]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def write_and_load(text: str, *overrides: str, name: str = "study.yaml") -> recipe.Recipe:
        (tmp_path / name).write_text(text)
        return recipe.load(tmp_path / name, overrides)

    return write_and_load


def refusal(load: Load, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    return str(caught.value)


def settings(loaded: recipe.Recipe, arm: str) -> Any:
    return next(cell.settings for cell in loaded.cells if cell.arm == arm)


# ---------------------------------------------------------------------------------------------------- shipped recipes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_its_claims_hold(path: Path) -> None:
    pytest.importorskip("torch", reason="the doctor computes with torch")
    loaded = recipe.load(path)
    recipe.check_claims(loaded)
    assert loaded.name in loaded.describe()
    assert path.read_text().startswith("# ") and f"klreg run recipes/{path.name}" in path.read_text()


def test_the_quick_study_is_what_it_says() -> None:
    loaded = recipe.load(next(path for path in RECIPES if path.stem == "quickstart"))
    kls = {arm: settings(loaded, arm).kl for arm in loaded.arms}
    assert kls["none"] == KLSpec(placement="none")
    assert (kls["reverse"].placement, kls["reverse"].estimator, kls["reverse"].follows) == ("reward", "k1", "reverse")
    assert (kls["forward"].placement, kls["forward"].estimator, kls["forward"].follows) == ("loss", "k3", "forward")
    assert kls["reverse"].beta == kls["forward"].beta == 0.2


def test_dr_grpo_sets_the_aggregation_and_its_constant() -> None:
    loaded = recipe.load(next(path for path in RECIPES if path.stem == "rloo_vs_grpo"))
    dr_grpo, grpo = settings(loaded, "dr_grpo").train, settings(loaded, "grpo").train
    assert (dr_grpo.policy_aggregation, dr_grpo.loss_scale_factor) == (
        "seq-mean-token-sum-norm",
        dr_grpo.max_response_tokens,
    )
    assert (grpo.policy_aggregation, grpo.loss_scale_factor) == ("token-mean", None)


def test_the_estimators_are_those_of_the_table_in_core() -> None:
    kl = pytest.importorskip("klreg_verl.core.kl", reason="core needs torch")
    assert kl_settings.SAMPLED == kl.names()


def test_the_advantages_are_those_of_core() -> None:
    advantages = pytest.importorskip("klreg_verl.core.advantages", reason="core needs torch")
    assert set(get_args(get_type_hints(TrainSpec)["advantage"])) == set(advantages.names())


def test_loading_a_recipe_imports_nothing_heavy() -> None:
    code = (
        "import sys; from klreg_verl.experiment import recipe, plan, store, provenance;"
        f"plan.expand(recipe.load({str(RECIPES[0])!r}));"
        "print([m for m in ('torch', 'numpy', 'pyarrow', 'verl', 'ray') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900, check=True)
    assert result.stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------------------- merging


def test_an_arm_changes_what_it_says_and_inherits_the_rest(load: Load) -> None:
    loaded = load(BASIC)
    expected = KLSpec(placement="reward", estimator="k1", follows="reverse", beta=0.1)
    assert settings(loaded, "reverse").kl == expected
    assert loaded.arms["reverse"] == {"kl.placement": "reward", "kl.estimator": "k1", "kl.follows": "reverse"}


def test_placement_none_drops_the_inherited_kl_settings(load: Load) -> None:
    assert settings(load(BASIC), "none").kl == KLSpec()


def test_a_task_brings_settings_and_the_arm_wins_over_them(load: Load) -> None:
    text = BASIC.replace(
        "{builtin: palindrome}", "{builtin: palindrome, settings: {train: {steps: 7, warmup_steps: 3}}}"
    ).replace("    kl: {placement: none}", "    kl: {placement: none}\n    train: {steps: 9}")
    loaded = load(text)
    assert [settings(loaded, arm).train.steps for arm in ("none", "reverse")] == [9, 7]
    assert settings(loaded, "none").train.warmup_steps == 3


def test_a_base_lies_under_the_recipe_and_its_arms_merge_by_name(load: Load, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "base.yaml").write_text(BASIC)
    loaded = load("base: shared/base.yaml\nseeds: [3]\ntrain: {steps: 5}\narms: {reverse: {kl: {beta: 0.3}}}")
    assert list(loaded.arms) == ["none", "reverse"]
    assert loaded.seeds == (3,)
    assert settings(loaded, "reverse").kl.beta == 0.3
    assert settings(loaded, "none").train.steps == 5


def test_a_base_may_say_what_this_recipe_does_not_use(load: Load, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("train: {steps: 99}")
    loaded = load(BASIC + "base: base.yaml\ntrain: {steps: 5}")
    assert settings(loaded, "none").train.steps == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: study.yaml\n", "includes this file again"),
        ("base: absent.yaml\n", "study.yaml:1: base: 'absent.yaml' does not exist"),
        ("base: 3\n", "expected the path of a YAML file, got 3"),
    ],
)
def test_a_base_that_cannot_be_read_is_refused(load: Load, text: str, message: str) -> None:
    assert message in refusal(load, text + BASIC)


def test_paths_are_relative_to_the_file_that_says_them(load: Load, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "models").mkdir()
    (tmp_path / "shared" / "base.yaml").write_text(
        "model: {path: models}\ntasks: {mine: {train: a.parquet, val: ../b.parquet, reward: my.rewards:score}}"
    )
    loaded = load("base: shared/base.yaml\nquestion: q\nseeds: [1]\narms: {plain: }")
    assert loaded.tasks["mine"].train == str(tmp_path / "shared" / "a.parquet")
    assert loaded.tasks["mine"].val == str(tmp_path / "b.parquet")
    assert settings(loaded, "plain").model.path == str(tmp_path / "shared" / "models")


def test_a_hub_id_stays_as_it_is(load: Load) -> None:
    loaded = load(BASIC.replace("path: tiny", "path: Qwen/Qwen2.5-0.5B, revision: abc"))
    assert settings(loaded, "none").model.path == "Qwen/Qwen2.5-0.5B"


def test_another_model_does_not_inherit_the_options_of_the_first(load: Load) -> None:
    text = BASIC.replace("path: tiny", "path: tiny, options: {seed: 3}") + "  big: {model: {path: org/big}}\n"
    loaded = load(text, "arms.big.kl.placement=none")
    assert settings(loaded, "big").model.options == {}
    assert settings(loaded, "none").model.options == {"seed": 3}


def test_nested_and_dotted_verl_keys_are_the_same(load: Load) -> None:
    loaded = load(BASIC + "verl: {trainer: {log_val_generations: 3}, actor_rollout_ref.actor.ppo_epochs: 1}")
    assert settings(loaded, "none").verl == {
        "trainer.log_val_generations": 3,
        "actor_rollout_ref.actor.ppo_epochs": 1,
    }
    loaded = load(BASIC + "verl: {trainer: {log_val_generations: 3}}", "verl.trainer.log_val_generations=4")
    assert settings(loaded, "none").verl == {"trainer.log_val_generations": 4}


def test_a_plus_before_a_key_that_verl_takes_is_hydras_and_is_left_out(load: Load) -> None:
    loaded = load(BASIC + "verl: {data.cache_dir: /a, +trainer.wandb_proxy: x}", "verl.+data.cache_dir=/b")
    assert settings(loaded, "none").verl == {"data.cache_dir": "/b", "trainer.wandb_proxy": "x"}


# ---------------------------------------------------------------------------------------------------- the grid


def test_a_grid_multiplies_only_the_arms_that_read_its_key(load: Load) -> None:
    loaded = load(BASIC.replace("kl: {beta: 0.1}\n", "grid: {kl.beta: [1e-2, 0.1], train.steps: [2, 3]}\n"))
    assert [(cell.arm, cell.grid) for cell in loaded.cells] == [
        ("none", (("train.steps", 2),)),
        ("none", (("train.steps", 3),)),
        ("reverse", (("kl.beta", 0.01), ("train.steps", 2))),
        ("reverse", (("kl.beta", 0.01), ("train.steps", 3))),
        ("reverse", (("kl.beta", 0.1), ("train.steps", 2))),
        ("reverse", (("kl.beta", 0.1), ("train.steps", 3))),
    ]
    assert [cell.settings.kl.beta for cell in loaded.cells] == [None, None, 0.01, 0.01, 0.1, 0.1]


def test_a_grid_over_the_placement_frees_none_of_beta(load: Load) -> None:
    text = BASIC.replace("kl: {beta: 0.1}", "grid: {kl.beta: [0.1, 0.2], kl.placement: [none, reward]}")
    text = text.replace("  none:\n    kl: {placement: none}\n", "").replace("      placement: reward\n", "")
    assert [cell.grid for cell in load(text).cells] == [
        (("kl.placement", "none"),),
        (("kl.beta", 0.1), ("kl.placement", "reward")),
        (("kl.beta", 0.2), ("kl.placement", "reward")),
    ]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("{kl.betta: [1, 2]}", "grid.kl.betta[0]: unknown key 'betta'. Did you mean 'beta'?"),
        ("{lr: [1, 2]}", "study.yaml:15: grid.lr: unknown key 'lr'."),
        ("{train.steps: 3}", "must be a list of values, got 3. Did you mean train.steps: [...]?"),
        ("{train.steps: []}", "must be a list of values"),
        ("{train.steps: [3, 3]}", "3 is written twice"),
        ("{train.steps: [3, x]}", "study.yaml:15: grid.train.steps[1]: expected a whole number, got 'x'."),
        ("{kl.aggregation: [token-mean]}", "grid.kl.aggregation[0]: 'token-mean' has no effect on any run"),
        ("{kl.beta: [0.2, 0.3]}", "study.yaml:5: kl.beta: 0.1 has no effect on any run"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(load: Load, grid: str, message: str) -> None:
    assert message in refusal(load, BASIC + "      allow_biased: false\ngrid: " + grid)


def test_a_grid_given_on_the_command_line_replaces_the_default_value(load: Load) -> None:
    loaded = load(BASIC, "grid.kl.beta=[0.2,0.3]")
    assert [cell.settings.kl.beta for cell in loaded.cells] == [None, 0.2, 0.3]


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "estimator: k1",
            "estimater: k1",
            "study.yaml:12: arms.reverse.kl.estimater: unknown key 'estimater'. Did you",
        ),
        ("estimator: k1", "estimator: k4", "study.yaml:12: arms.reverse.kl.estimator: 'k4' is not one of k1, k2, k3,"),
        ("beta: 0.1", "beta: -0.1", "study.yaml:5: kl.beta: -0.1 is negative: it would reward leaving the reference."),
        ("beta: 0.1", "beta: true", "study.yaml:5: kl.beta: expected a number, got true. (Concerns: reverse.)"),
        (
            "kl: {beta: 0.1}\n",
            "",
            "arms.reverse.kl.beta: missing. `placement: reward` needs estimator, follows and beta.",
        ),
        ("placement: none}", "placement: none, beta: 0.1}", "study.yaml:8: arms.none.kl.beta: 0.1 has no effect with"),
        (
            "      placement: reward\n",
            "",
            "study.yaml:11: arms.reverse.kl.estimator: 'k1' has no effect with placement",
        ),
        ("follows: reverse", "follows: backward", "'backward' is not one of reverse, forward, js, chi2, tv,"),
        ("  none:\n", "  reverse:\n", "study.yaml:9: arms.reverse: written twice (first in line 7). Keep one of them."),
        ("  none:\n", "  no/ne:\n", "the name 'no/ne' becomes a folder. Use letters, digits, _ and -."),
        ("  none:\n    kl:", "  none:\n    kll:", "study.yaml:8: arms.none.kll: unknown key 'kll'. Did you mean 'kl'?"),
        ("model: {path: tiny}\n", "", "study.yaml:1: model: missing. It has no default and must be written."),
        ("path: tiny", "path: org/x, options: {a: 1}", "has no effect: only `path: tiny` is trained here, 'org/x' is"),
        ("path: tiny", "path: tiny, revision: abc", "only Hugging Face ids have revisions, not 'tiny'."),
        ("path: tiny", "path: ''", "model.path: is empty. Give `tiny`, `smollm2`, a folder, or a Hugging Face id."),
        ("seeds: [1, 2]", "seeds: 1", "study.yaml:4: seeds: expected a list of whole numbers, got 1. Write [1]."),
        ("seeds: [1, 2]", "seeds: 3", "got 3. Write [3] for that one seed, or [1, 2, 3] for 3 of them."),
        ("seeds: [1, 2]", "seeds: range(1, 9)", "got 'range(1, 9)'. Write [1, 2, 3, 4, 5, 6, 7, 8]."),
        ("seeds: [1, 2]", "seeds: range(0, 9, 3)", "Write [0, 3, 6]."),
        ("seeds: [1, 2]", "seeds: 2-4", "Write [2, 3, 4]."),
        ("seeds: [1, 2]", "seeds: 1..100", "Write [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, ...]."),
        ("seeds: [1, 2]", "seeds: '3, 5'", "Write [3, 5]."),
        ("seeds: [1, 2]", "seeds: range(5, 1)", "Write the seeds one by one, e.g. [1, 2, 3]."),
        ("seeds: [1, 2]", "seeds:", "study.yaml:4: seeds: expected a list of whole numbers, got null. Write the seeds"),
        ("seeds: [1, 2]", "seeds: {a: 1}", "got a mapping with the keys a. Write the seeds one by one"),
        ("seeds: [1, 2]", "seeds: [1.0]", "seeds[0]: expected a whole number, got 1.0. Write 1."),
        ("seeds: [1, 2]", "seeds: [4294967296]", "4294967296 is no seed: numpy takes 0 to 4294967295."),
        ("seeds: [1, 2]", "seeds: [1, 1]", "1 is written twice: it would be the same run."),
        ("seeds: [1, 2]", "seeds: [-1]", "-1 is no seed: numpy takes 0 to 4294967295."),
        ("seeds: [1, 2]", "seeds: []", "is empty. Give at least one seed, e.g. [1]."),
        ("seeds: [1, 2]", "sedes: [1, 2]", "study.yaml:4: sedes: unknown key 'sedes'. Did you mean 'seeds'?"),
        ("seeds: [1, 2]", "seeds: [1]\nbeta: 3", "unknown key 'beta'. Did you mean 'kl.beta'?"),
        ("question: Does it?", "question: 3", "question: expected text, got 3. Put what you wrote in quotes."),
        (
            "builtin: palindrome",
            "builtin: palindrom",
            "'palindrom' is not one of palindrome, deepscaler. Did you mean 'palindrome'?",
        ),
        ("builtin: palindrome", "builtin: palindrome, train: x", "has no effect beside `builtin: palindrome`."),
        (
            "builtin: palindrome",
            "train: x, val: y",
            "tasks.palindrome.reward: missing. A task has a `builtin`, or all of train",
        ),
        ("builtin: palindrome", "train: x, val: y, reward: r", "'r' is not of the form pkg.module:function."),
        (
            "builtin: palindrome",
            "train: x, val: y, reward: 'r:f', options: {a: 1}",
            "has no effect on files that exist. Options belong to a builtin task.",
        ),
        ("{builtin: palindrome}", "{settings: {trian: {}}, builtin: palindrome}", "Did you mean 'train'?"),
    ],
)
def test_a_mistake_is_refused_with_its_place(load: Load, old: str, new: str, message: str) -> None:
    assert old in BASIC
    assert message in refusal(load, BASIC.replace(old, new, 1))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("train: {prompts_per_step: 16, updates_per_batch: 3}", "3 does not divide prompts_per_step=16"),
        ("resources: {gpus_per_node: 3}", "16 prompts x 8 responses cannot be shared equally by 3 workers."),
        (
            # 2 x 2 = 4 responses in 2 updates = 2 per update, for 4 workers
            "train: {prompts_per_step: 2, responses_per_prompt: 2, updates_per_batch: 2}\n"
            "resources: {gpus_per_node: 4}",
            "train.updates_per_batch: 2 prompts x 2 responses in 2 updates are 2 responses per update, which 4 workers",
        ),
        # 16 x 8 = 128 responses, 2 updates, 2 workers: 32 each
        (
            "train: {updates_per_batch: 2, micro_batch: 24}\nresources: {nodes: 2}",
            "train.micro_batch: 24 does not divide the 32 responses of a worker (64 per update / 2 workers).",
        ),
        ("train: {responses_per_prompt: 1}", "1: rloo compares a response with its siblings. At least 2."),
        ("train: {top_p: 0.9}", "0.9: the KL estimators assume samples of the untruncated policy. Only 1.0 works."),
        (
            "probes: {temperature_one_every: 5}",
            "probes.temperature_one_every: 5 has no effect with train.temperature=1",
        ),
        ("train: {temperature: 0}", "train.temperature: 0.0 is not positive. Give a number above 0."),
        ("train: {steps: 0}", "train.steps: 0 is too small: at least 1."),
        ("train: {learning_rate: -1e-6}", "train.learning_rate: -1e-06 is too small: at least 0."),
        ("train: {loss_aggregation: token_mean}", "'token_mean' is not one of token-mean,"),
        ("train: {advantage: gae}", "train.advantage: 'gae' is not one of rloo, grpo, dr_grpo."),
        ("resources: {gpus_per_node: 2, tensor_parallel: 4}", "4 does not fit 1 x 2 GPUs"),
        ("save: {every: 0}", "A run that saves nothing cannot be resumed."),
        ("save: {keep: 1}", "A crash during a save with one checkpoint kept loses both."),
        ("eval: {temperature: 0}", "4 greedy responses (temperature 0) are all the same. Give 1."),
        ("samples: {every: 0, prompts: 3}", "3 has no effect with every 0: no samples are kept."),
        ("samples: {prompts: 0}", "To keep no samples say `every: 0`."),
        ("logging: {wandb: ofline}", "'ofline' is not one of off, offline, online. Did you mean 'offline'?"),
        ("logging: {wandb: false}", "false is not one of off, offline, online."),
        (
            "verl: {ray_kwargs.ray_init.a: 1, ray_kwargs.ray_init.a.b: 2}",
            "'ray_kwargs.ray_init.a' and 'ray_kwargs.ray_init.a.b' contradict: one is inside the other.",
        ),
        ("verl: {a: {b: 1}, a.b: 2}", "verl.a.b: written twice"),
        ("verl: {trainer: {test_freqq: 5}}", "verl.trainer.test_freqq: verl 0.9.1 has no setting 'trainer.test_freqq'"),
        ("verl: {data.shufle: no}", "Did you mean 'data.shuffle'?"),
        ("verl: {+trainer.foo: 1}", "verl.+trainer.foo: verl 0.9.1 has no setting 'trainer.foo'"),
        ("verl: {trainer.log_val_generations: '5'}", "verl takes a whole number here, got '5'. Remove the quotes."),
        ("grid: {verl.trainer.balance: [1, 2]}", "grid.verl.trainer.balance[0]: verl 0.9.1 has no setting"),
        ("verl: 3", "verl: expected a mapping (key: value), got 3."),
        ("arms2: {}", "unknown key 'arms2'. Did you mean 'arms'?"),
    ],
)
def test_an_impossible_setting_is_refused(load: Load, section: str, message: str) -> None:
    assert message in refusal(load, BASIC + section)


def test_the_settings_that_work_at_the_edge_are_accepted(load: Load) -> None:
    load(BASIC + "train: {updates_per_batch: 2, micro_batch: 16}\nresources: {nodes: 2, gpus_per_node: 2}")
    load(BASIC + "logging: {wandb: off}\neval: {temperature: 0, responses_per_prompt: 1}")
    load(BASIC, "kl.beta=0")
    assert ResourcesSpec(nodes=2, gpus_per_node=4, tensor_parallel=8).world_size == 8


def test_a_value_that_every_arm_hides_is_refused(load: Load) -> None:
    text = BASIC.replace("follows: reverse", "follows: reverse\n      beta: 0.2")
    assert "study.yaml:5: kl.beta: 0.1 has no effect on any run" in refusal(load, text)


def test_a_kl_aggregation_in_the_reward_is_refused(load: Load) -> None:
    text = BASIC.replace("follows: reverse", "follows: reverse\n      aggregation: token-mean")
    expected = "study.yaml:14: arms.reverse.kl.aggregation: 'token-mean' has no effect with placement reward"
    assert expected in refusal(load, text)


def test_a_recipe_whose_name_is_no_folder_is_refused(load: Load) -> None:
    with pytest.raises(ConfigError, match="the name 'my study' becomes a folder"):
        load(BASIC, name="my study.yaml")


# ---------------------------------------------------------------------------------------------------- overrides


def test_overrides_are_part_of_what_is_loaded(load: Load) -> None:
    loaded = load(BASIC, "train.steps=2", "arms.reverse.kl.beta=3e-1", "seeds=[7]", "model.options.seed=4")
    assert settings(loaded, "none").train.steps == 2
    assert settings(loaded, "reverse").kl.beta == 0.3
    assert settings(loaded, "none").model.options == {"seed": 4}
    assert loaded.seeds == (7,)
    assert loaded.overrides == ("train.steps=2", "arms.reverse.kl.beta=3e-1", "seeds=[7]", "model.options.seed=4")


def test_an_override_can_turn_an_arm_off(load: Load) -> None:
    assert settings(load(BASIC, "arms.reverse.kl.placement=none"), "reverse").kl == KLSpec()


def test_an_override_of_a_task_changes_the_task(load: Load) -> None:
    loaded = load(BASIC, "tasks.palindrome.options.train_size=10", "tasks.palindrome.settings.train.steps=4")
    assert loaded.tasks["palindrome"].options == {"train_size": 10}
    assert settings(loaded, "none").train.steps == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", "override 'train.stepz=3': train.stepz: unknown key 'stepz'. Did you mean 'steps'?"),
        ("steps=3", "override 'steps=3': unknown key 'steps'. Did you mean 'train.steps'?"),
        ("arms.revers.kl.beta=1", "there is no 'revers' in arms. Did you mean 'reverse'? Known: none, reverse."),
        ("tasks.palin.options.x=1", "there is no 'palin' in tasks."),
        ("arms.reverse.kl.bta=1", "arms.reverse.kl.bta: unknown key 'bta'. Did you mean 'beta'?"),
        ("arms.none.kl.beta=1", "arms.none.kl.beta: 1.0 has no effect with placement none."),
        ("train.steps", "is not of the form key=value, e.g. train.steps=2."),
        ("train.steps=", "has no value. To say nothing write null."),
        ("train.steps=[1", "not valid YAML"),
        ("train.steps=two", "train.steps: expected a whole number, got 'two'."),
        ("base=x.yaml", "unknown key 'base'"),
        ("kl=3", "kl: expected a mapping (key: value), got 3."),
    ],
)
def test_a_wrong_override_is_refused(load: Load, override: str, message: str) -> None:
    assert message in refusal(load, BASIC, override)


def test_an_override_that_every_arm_hides_is_refused(load: Load) -> None:
    text = BASIC.replace("kl: {beta: 0.1}\n", "").replace("follows: reverse", "follows: reverse\n      beta: 0.2")
    assert "override 'kl.beta=0.3': kl.beta: 0.3 has no effect on any run" in refusal(load, text, "kl.beta=0.3")


# ---------------------------------------------------------------------------------------------------- claims, KL alone


def test_the_doctor_refuses_a_false_claim_with_the_place(load: Load) -> None:
    pytest.importorskip("torch", reason="the doctor computes with torch")
    loaded = load(BASIC.replace("follows: reverse", "follows: forward"))
    with pytest.raises(ConfigError, match=r"study.yaml:10: arms.reverse.kl: .*kl.follows='forward' is claimed"):
        recipe.check_claims(loaded)


def test_a_biased_arm_runs_only_when_it_says_so(load: Load) -> None:
    pytest.importorskip("torch", reason="the doctor computes with torch")
    biased = BASIC.replace("estimator: k1", "estimator: k3").replace("follows: reverse", "follows: none")
    with pytest.raises(ConfigError, match="arms.reverse.kl: .*biased"):
        recipe.check_claims(load(biased))
    recipe.check_claims(load(biased + "      allow_biased: true\n"))


@pytest.mark.parametrize("head", ["", "kl:\n"])
def test_a_kl_block_is_read_alone_or_under_its_key(tmp_path: Path, head: str) -> None:
    path = tmp_path / "kl.yaml"
    path.write_text(head + "  placement: loss\n  estimator: k2\n  follows: reverse\n  beta: 1e-3\n")
    expected = KLSpec(placement="loss", estimator="k2", follows="reverse", beta=1e-3)
    assert recipe.load_kl(path) == recipe.KLBlock(kl=expected)


def test_a_kl_file_may_say_what_the_reference_does_and_when_to_raise_an_alarm(tmp_path: Path) -> None:
    path = tmp_path / "kl.yaml"
    path.write_text("reference: {ema: 0.99}\nalarms: {kl_above: 0.2, stop: true}\n")
    block = recipe.load_kl(path)
    assert (block.kl, block.reference.ema, block.alarms.kl_above) == (KLSpec(), 0.99, 0.2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("placement: los", "kl.yaml:1: placement: 'los' is not one of none, reward, loss, both. Did you mean 'loss'?"),
        ("kl: {placement: loss}\nbeta: 1", "kl.yaml:2: beta: unknown key 'beta'."),
        ("placement: loss\nbetta: 1", "kl.yaml:2: betta: unknown key 'betta'. Did you mean 'beta'?"),
        (BASIC, "this is a recipe. A KL file holds one KL block"),
        ("", "the file is empty"),
    ],
)
def test_a_wrong_kl_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "kl.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        recipe.load_kl(tmp_path / "kl.yaml")
    assert message in str(caught.value)


def test_the_description_says_what_each_arm_changes(load: Load) -> None:
    assert load(BASIC, "grid.kl.beta=[0.2,0.3]").describe().splitlines() == [
        "study: Does it?",
        "arm   none     kl.placement=none",
        "arm   reverse  kl.placement=reward  kl.estimator=k1  kl.follows=reverse",
        "grid  kl.beta over 0.2, 0.3",
        "3 settings x 2 seeds = 6 runs",
    ]
