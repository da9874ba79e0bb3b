"""Fit and cost: each number is computed here by hand from what verl does with memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from verl_stack import FILES, spec

from klreg_verl.experiment import fit, plan, recipe
from klreg_verl.experiment.architecture import NAMED
from klreg_verl.experiment.fit import GIB, GPUS, Measured
from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.settings import KLSpec, ModelSpec, ResourcesSpec, TrainSpec
from klreg_verl.verl_hooks import overrides

R1 = NAMED["deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"]
BIG = NAMED["deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"]
H100 = GPUS["H100"]
TRAIN = TrainSpec(
    steps=100, prompts_per_step=128, responses_per_prompt=8, max_prompt_tokens=1024, max_response_tokens=8192
)
EIGHT = ResourcesSpec(gpus_per_node=8)
RECIPES = Path(__file__).parents[1] / "recipes"
FULL_SCALE = [*sorted(RECIPES.glob("*_deepscaler.yaml")), RECIPES / "kl_direction_palindrome.yaml"]


def run(**sections: object) -> RunSpec:
    given = {"model": ModelSpec(path=R1.name), "train": TRAIN, "resources": EIGHT}
    return spec(**(given | sections))


def part(found: fit.Fit, role: str, what: str) -> int:
    (only,) = (one.bytes for one in found.parts if one.role == role and one.what.startswith(what))
    return only


# ---------------------------------------------------------------------------------------------------- memory


def test_sixteen_bytes_a_parameter_are_shared_by_all_gpus():
    found = fit.fit(run(), R1, H100)
    share = 1_777_088_000 // 8
    assert part(found, "actor", "weights") == 4 * share
    assert part(found, "actor", "gradients") == 4 * share
    assert part(found, "actor", "Adam") == 8 * share
    alone = fit.fit(run(resources=ResourcesSpec()), R1, H100)
    assert part(alone, "actor", "Adam") == 8 * 1_777_088_000


def test_activations_and_logits_of_a_micro_batch_by_hand():
    found = fit.fit(run(), R1, H100)
    tokens = 2 * (1024 + 8192)  # packed: at least two sequences of full length
    assert found.micro_batch_tokens == tokens == 18_432
    kept, layer = 28 * 1536 * 2, 2 * (8 * 1536 + 2 * 256 + 4 * 8960)
    assert part(found, "actor", "activations") == tokens * (kept + 2 * layer)
    assert part(found, "actor", "logits") == tokens * 151_936 * 6
    tempered = fit.fit(run(train=replace(TRAIN, temperature=0.6)), R1, H100)
    assert part(tempered, "actor", "logits") == tokens * 151_936 * 8


def test_a_kl_over_the_vocabulary_holds_the_references_logits_too():
    exact = KLSpec(placement="loss", estimator="full_reverse", follows="reverse", beta=0.1)
    more, less = fit.fit(run(kl=exact), R1, H100), fit.fit(run(), R1, H100)
    assert part(more, "actor", "logits") == 2 * part(less, "actor", "logits")
    assert (part(less, "reference", "layers"), part(more, "reference", "layers") > 0) == (0, True)


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("longest", [(1024, 8192), (64, 128)])
def test_the_micro_batch_is_the_one_that_verl_is_told(micro_batch: int | None, longest: tuple[int, int]):
    train = replace(TRAIN, micro_batch=micro_batch, max_prompt_tokens=longest[0], max_response_tokens=longest[1])
    told = overrides.settings(run(train=train), FILES, "cuda")
    found = fit.micro_batch_tokens(run(train=train))
    actor = "actor_rollout_ref.actor"
    if micro_batch is None:
        assert found == told[f"{actor}.ppo_max_token_len_per_gpu"]
    else:
        assert found == told[f"{actor}.ppo_micro_batch_size_per_gpu"] * sum(longest)


def test_a_small_batch_fills_no_micro_batch():
    train = replace(TRAIN, prompts_per_step=8, responses_per_prompt=2, max_prompt_tokens=100, max_response_tokens=100)
    assert fit.micro_batch_tokens(run(train=train)) == 2 * 200  # 16 responses of 200 tokens on 8 GPUs


def test_the_cache_is_what_vllms_share_leaves():
    found = fit.fit(run(), R1, H100)
    cache = 81_559 * 1024**2 * 0.5 - 2 * 1_777_088_000 - 2 * GIB
    assert part(found, "rollout", "key-value cache") == int(cache)
    assert found.kv_tokens == int(cache) // 28_672
    assert found.sequences == found.kv_tokens // 9216 == 140
    more = fit.fit(run(verl={"actor_rollout_ref.rollout.gpu_memory_utilization": 0.7}), R1, H100)
    assert more.sequences > 190


def test_the_peaks_are_the_sums_of_their_phases():
    found = fit.fit(run(), R1, H100)
    by_hand = {"training": 0, "rollout": 0}
    for one in found.parts:
        for phase in by_hand:
            by_hand[phase] += one.bytes if one.phase in (phase, "both") else 0
    assert (found.training_bytes, found.rollout_bytes) == (by_hand["training"], by_hand["rollout"])
    weights_and_moments = 12 * (1_777_088_000 // 8)
    assert found.rollout_bytes == pytest.approx(weights_and_moments + 5 * GIB + 0.5 * H100.memory_bytes, abs=1)


def test_offloaded_moments_are_not_there_during_rollout():
    offload = {"actor_rollout_ref.actor.fsdp_config.optimizer_offload": True}
    less, more = fit.fit(run(verl=offload), R1, H100), fit.fit(run(), R1, H100)
    assert more.rollout_bytes - less.rollout_bytes == 8 * (1_777_088_000 // 8)
    assert more.training_bytes == less.training_bytes


def test_the_reference_is_in_the_hosts_memory():
    assert fit.fit(run(), R1, H100).host_bytes == 4 * 1_777_088_000  # float32, over the node's 8 GPUs, all of it
    wide = ResourcesSpec(nodes=4, gpus_per_node=8)
    assert fit.fit(run(resources=wide), R1, H100).host_bytes == 1_777_088_000


# ---------------------------------------------------------------------------------------------------- refusals


def test_the_full_scale_run_fits_eight_h100_and_no_rtx_4090():
    assert fit.fit(run(), R1, H100).fits
    small = fit.fit(run(), R1, GPUS["RTX-4090"])
    assert not small.fits
    (problem,) = small.problems
    needed = small.training_bytes / GIB
    assert problem.startswith(f"training: {needed:.1f} GiB are needed on each GPU, 22.8 of 24.0 GiB can be used")
    assert "largest: logits 15.6" in problem  # 18432 * 151936 * 6 bytes


def test_a_refusal_has_numbers_and_a_layout_that_fits():
    seven = run(model=ModelSpec(path=BIG.name), resources=ResourcesSpec())
    found = fit.fit_all([seven], H100, lambda _: BIG)
    assert part(found.runs[seven.run_id], "actor", "Adam") / GIB == pytest.approx(56.7, abs=0.05)
    best = found.cheapest[seven.run_id]
    assert best is not None and best.fits and best.resources.world_size > 1
    with pytest.raises(
        ValueError, match=r"does not fit 1 GPU\. training: \d+\.\d GiB are needed on each GPU"
    ) as caught:
        fit.require(found)
    assert f"resources.gpus_per_node={best.resources.gpus_per_node}" in str(caught.value)


def test_where_nothing_fits_it_says_what_to_shorten():
    long = run(train=replace(TRAIN, max_response_tokens=131_072))
    found = fit.fit_all([long], GPUS["RTX-4090"], lambda _: R1)
    assert found.cheapest[long.run_id] is None
    with pytest.raises(ValueError, match="No layout of up to 8 nodes fits: shorten train.max_response_tokens"):
        fit.require(found)


def test_an_engine_that_cannot_hold_the_model_or_one_sequence_is_refused():
    tight = run(verl={"actor_rollout_ref.rollout.gpu_memory_utilization": 0.06})
    (problem,) = fit.fit(tight, R1, H100).problems  # 4.8 GiB of share, 3.3 weights and 2 workspace
    assert "vLLM's share of 4.8 GiB does not hold the model's weights (3.3 GiB)" in problem
    narrow = run(verl={"actor_rollout_ref.rollout.gpu_memory_utilization": 0.068})
    (problem,) = fit.fit(narrow, R1, H100).problems
    assert "tokens, one sequence may have 9,216" in problem


def test_heads_must_be_shared_by_an_engines_gpus():
    eight = run(resources=ResourcesSpec(gpus_per_node=8, tensor_parallel=8))
    assert fit.fit(eight, R1, H100).problems == ("rollout: 12 heads cannot be split over tensor_parallel=8.",)


# ---------------------------------------------------------------------------------------------------- time and cost


def test_time_by_arithmetic_says_so_and_adds_up_by_hand():
    found = fit.fit(run(), R1, H100).time
    tokens = 128 * 8 * 9216
    forward = tokens * R1.forward_flops(4608) / (8 * 989e12 * 0.30)
    assert found.stages["reference"] == found.stages["old log-probs"] == pytest.approx(forward)
    assert found.stages["update"] == pytest.approx(4 * forward)  # forward, recomputed, and backward, which is two
    # 128 responses an engine, all at once; each token reads the weights and the cache at half of its length
    read = 2 * 1_777_088_000 + 128 * (1024 + 4096) * 28_672
    assert found.stages["generation"] == pytest.approx(8192 * read / (3.35e12 * 0.5))
    assert found.source == "arithmetic" and found.said.startswith("arithmetic: every response at its longest")


def test_a_full_step_of_the_published_run_is_below_the_published_ceiling():
    # NeMo-RL's recipe for this model, batch and length does 40 steps on 8 GPUs within 240 minutes
    assert 60 < fit.fit(run(), R1, H100).time.seconds < 360


def test_measured_steps_win_and_say_so():
    one, other = run(seed=1), run(seed=2)
    found = fit.fit(other, R1, H100, [Measured(spec=one, seconds=50.0)])
    assert (found.time.source, found.time.seconds) == ("measured", 50.0)
    assert found.gpu_hours == pytest.approx(50.0 * 100 * 8 / 3600)


def test_a_runs_own_steps_win_and_another_models_say_nothing():
    own, other = run(seed=1), run(seed=2)
    found = fit.fit(own, R1, H100, [Measured(spec=other, seconds=50.0), Measured(spec=own, seconds=60.0)])
    assert (found.time.seconds, found.time.said) == (60.0, f"measured: {own.run_id}")
    foreign = run(model=ModelSpec(path=BIG.name))
    assert fit.fit(own, R1, H100, [Measured(spec=foreign, seconds=50.0)]).time.source == "arithmetic"


def test_another_layouts_steps_are_scaled_by_arithmetic():
    one, two = run(), run(resources=ResourcesSpec(nodes=2, gpus_per_node=8))
    found = fit.fit(two, R1, H100, [Measured(spec=one, seconds=50.0)])
    ratio = sum(fit.stage_seconds(two, R1, H100).values()) / sum(fit.stage_seconds(one, R1, H100).values())
    assert (found.time.source, found.time.seconds) == ("scaled", pytest.approx(50.0 * ratio))
    assert 0.4 < ratio < 0.9 and f"times {ratio:.2f} by arithmetic" in found.time.said


def test_the_cheapest_layout_fits_and_no_other_costs_less():
    best = fit.cheapest(run(), R1, H100)
    assert best is not None and best.fits
    tried = [fit.fit(run(resources=one), R1, H100) for sizes in fit.layouts(64, 8) for one in sizes[:1]]
    assert best.gpu_hours == min(one.gpu_hours for one in tried if one.fits)


def test_layouts_that_cannot_share_the_batch_are_not_tried():
    odd = run(train=replace(TRAIN, prompts_per_step=3, responses_per_prompt=4), resources=ResourcesSpec())
    best = fit.cheapest(odd, R1, H100)
    assert best is not None and 12 % best.resources.world_size == 0


# ---------------------------------------------------------------------------------------------------- GPUs and recipes


@pytest.mark.parametrize(
    ("told", "mib", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 81559, "H100"),
        ("NVIDIA H100 PCIe", 81559, "H100-PCIe"),
        ("NVIDIA H200", 143771, "H200"),
        ("NVIDIA A100-SXM4-80GB", 81920, "A100"),
        ("NVIDIA A100-SXM4-40GB", 40960, "A100-40GB"),
        ("NVIDIA GeForce RTX 4090", 24564, "RTX-4090"),
        ("NVIDIA L40S", 46068, "L40S"),
        ("NVIDIA H100 NVL", 95830, "H100-NVL"),
        ("NVIDIA A100 80GB PCIe", 81920, "A100"),
        ("a100-40gb", 40960, "A100-40GB"),
    ],
)
def test_gpus_are_known_by_what_nvidia_smi_calls_them(told: str, mib: int, name: str):
    found = fit.gpu_named(told, mib * 1024**2)
    assert found == replace(GPUS[name], memory_bytes=mib * 1024**2)  # its name, too: measured runs are found by it


@pytest.mark.parametrize("told", ["GTX 1080", "rtx", "NVIDIA GeForce RTX 2060", "NVIDIA H100 MIG 1g.10gb"])
def test_an_unknown_gpu_is_refused_with_the_known_ones(told: str):
    for memory in (None, 24564 * 1024**2):
        with pytest.raises(ValueError, match=f"'{told}' is no GPU that is known here: B200, H200"):
            fit.gpu_named(told, memory)


@pytest.mark.parametrize("path", FULL_SCALE, ids=lambda path: path.stem)
def test_the_full_scale_recipes_fit_the_gpus_that_they_ask_for(path: Path):
    specs = plan.expand(recipe.load(path))
    for name in ("H100", "H200", "A100"):
        found = fit.fit_all(specs, GPUS[name], lambda _: R1)
        assert not found.problems and set(found.runs) == {one.run_id for one in specs}


def test_a_recipe_in_words_says_each_fit_once_and_the_sum():
    specs = [run(seed=seed, arm=arm) for arm in ("none", "reverse") for seed in (1, 2)]
    found = fit.fit_all(specs, H100, lambda _: R1)
    told = fit.lines(found)
    assert sum(line.startswith("fit on H100, 8 GPUs (4 runs: none, reverse):") for line in told) == 1
    assert told[-1].startswith(f"whole recipe on H100: {4 * found.runs[specs[0].run_id].gpu_hours:,.0f} GPU-hours")
    assert "(arithmetic; without start-up and validation)" in told[-1]


def test_a_model_that_is_not_known_is_said_to_be():
    def unknown(_: RunSpec) -> fit.Architecture:
        raise ValueError("me/mine: its size is not known.")

    found = fit.fit_all([run()], H100, unknown)
    assert fit.lines(found) == ["not known: me/mine: its size is not known."]
    fit.require(found)  # nothing is known against it


def test_a_fit_is_plain_json():
    values = json.loads(json.dumps(fit.fit(run(), R1, H100).to_json()))
    assert values["fits"] is True and values["parameters"] == 1_777_088_000
    assert {one["role"] for one in values["parts"]} == {"actor", "reference", "rollout", "all"}
