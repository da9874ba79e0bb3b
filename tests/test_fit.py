"""Fit and cost: each number is computed here by hand from what verl does with memory."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from verl_stack import FILES, compose, spec

from klreg_verl.core import logprobs
from klreg_verl.experiment import fit, plan, recipe
from klreg_verl.experiment.architecture import NAMED
from klreg_verl.experiment.fit import GIB, GPUS, Measured
from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.settings import KLSpec, ModelSpec, ProbesSpec, ResourcesSpec, TrainSpec
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


@pytest.fixture(scope="module")
def verls() -> Any:
    """verl's settings where nobody sets any."""
    return compose()


def run(**sections: object) -> RunSpec:
    given = {"model": ModelSpec(path=R1.name), "train": TRAIN, "resources": EIGHT}
    return spec(**(given | sections))


def part(found: fit.Fit, role: str, what: str, phase: str = "") -> int:
    """Bytes of the one part whose name begins so."""
    named = [one for one in found.parts if one.role == role and one.what.startswith(what)]
    (only,) = (one.bytes for one in named if phase in ("", one.phase))
    return only


def said(**values: object) -> dict[str, object]:
    """A `verl:` block; `actor__x` is actor_rollout_ref.actor.x."""
    return {f"actor_rollout_ref.{key.replace('__', '.')}": value for key, value in values.items()}


PADDED = said(model__use_remove_padding=False)
EXACT = KLSpec(placement="loss", estimator="full_reverse", follows="reverse", beta=0.1)
PROBED = ProbesSpec(exact_every=25)
WORDS = 18_432 * 151_936
"""Tokens of a packed micro-batch (two sequences of 9,216) times words."""
BLOCK = 4 * 441 * 151_936
"""Bytes of a float32 buffer for the 441 rows of 151,936 that are worked on at a time."""


# ---------------------------------------------------------------------------------------------------- memory


def test_sixteen_bytes_a_parameter_are_shared_by_all_gpus():
    found = fit.fit(run(), R1, H100)
    share = 1_777_088_000 // 8
    assert part(found, "actor", "weights") == 4 * share
    assert part(found, "actor", "gradients (") == 4 * share
    assert part(found, "actor", "Adam") == 8 * share
    alone = fit.fit(run(resources=ResourcesSpec()), R1, H100)
    assert part(alone, "actor", "Adam") == 8 * 1_777_088_000


def test_a_model_in_bfloat16_takes_half():
    found = fit.fit(run(verl=said(actor__fsdp_config__model_dtype="bf16")), R1, H100)
    share = 1_777_088_000 // 8
    assert part(found, "actor", "weights (bfloat16)") == part(found, "actor", "gradients (") == 2 * share
    assert part(found, "actor", "Adam's moments (bfloat16)") == 4 * share


def test_a_smaller_group_shares_the_weights_among_fewer():
    two = fit.fit(run(verl=said(actor__fsdp_config__fsdp_size=2)), R1, H100)
    assert part(two, "actor", "Adam") == 8 * 1_777_088_000 // 2
    more_than_there_are = fit.fit(run(verl=said(actor__fsdp_config__fsdp_size=16)), R1, H100)
    assert part(more_than_there_are, "actor", "Adam") == 1_777_088_000


def test_gradients_that_are_not_shared_out_after_each_micro_batch_are_whole():
    late = said(actor__fsdp_config__use_no_sync_for_gradient_accumulation=True)
    assert part(fit.fit(run(verl=late), R1, H100), "actor", "gradients not yet") == 4 * 1_777_088_000


def test_an_offloaded_actor_is_on_the_host():
    found = fit.fit(run(verl=said(actor__fsdp_config__offload_policy=True)), R1, H100)
    assert [part(found, "actor", what) for what in ("weights", "gradients (", "Adam")] == [0, 0, 0]
    reference = fit.fit(run(), R1, H100).host_bytes
    # weights and gradients are pinned as the reference is, the moments are not
    assert found.host_bytes == 3 * reference + 8 * 1_777_088_000


def test_activations_and_the_larger_of_logits_and_one_layer_by_hand():
    found = fit.fit(run(), R1, H100)
    tokens = 2 * (1024 + 8192)  # packed: at least two sequences of full length
    assert found.micro_batch_tokens == tokens == 18_432 == WORDS // 151_936
    assert part(found, "actor", "activations kept") == tokens * 28 * 1536 * 2
    layer = 2 * (8 * 1536 + 2 * 256 + 4 * 8960)
    assert 2 * layer < 2 * 151_936  # so the logits of a token are larger than its layer, forward and backward
    assert part(found, "actor", "logits", "update") == 2 * WORDS
    small = replace(R1, vocabulary=32_000)
    assert part(fit.fit(run(), small, H100), "actor", "one layer and its gradient") == tokens * 2 * layer
    whole = fit.fit(run(verl=said(model__enable_gradient_checkpointing=False)), R1, H100)
    assert part(whole, "actor", "activations kept") == tokens * 28 * layer


@pytest.mark.parametrize(
    ("temperature", "verl", "log_probs", "update"),
    [
        (1.0, {}, 2, 2),  # raw; flash-attn writes the gradient over it
        (0.6, {}, 4, 4),  # raw, scaled; scaled and its gradient's scaling
        (1.0, PADDED, 14, 6),  # raw 2, softmax 4, cast 4, exponentials 4; padded, put together, gradient
        (0.6, PADDED, 16, 6),  # scaled 2 more; raw is gone when backward begins
        (0.6, said(actor__fsdp_config__use_torch_compile=False), 16, 4),
    ],
)
def test_bytes_of_logits_per_token_and_word(temperature: float, verl: dict, log_probs: int, update: int):
    one = run(train=replace(TRAIN, temperature=temperature), verl=verl)
    found = fit.fit(one, R1, H100)
    assert part(found, "actor", "logits and their entropy", "log-probs") == log_probs * WORDS
    assert part(found, "actor", "logits", "update") == update * WORDS + (2 * BLOCK if verl == PADDED else 0)


@pytest.mark.parametrize(
    ("temperature", "verl", "kl", "bytes_of_a_word", "blocks"),
    [
        (1.0, {}, KLSpec(), 4, 10),  # the policy's and the reference's
        (0.6, {}, KLSpec(), 8, 0),  # both models' raw and scaled, in the reference's forward pass
        (1.0, {}, EXACT, 6, 10),  # a gradient more
        (0.6, {}, EXACT, 8, 10),  # raw, scaled, the reference's scaled, the gradient
        (0.6, PADDED, EXACT, 12, 0),  # both models' raw, scaled and put together
        (1.0, PADDED, EXACT, 8, 10),
    ],
)
def test_a_kl_over_the_vocabulary_holds_both_models_logits(
    temperature: float, verl: dict, kl: KLSpec, bytes_of_a_word: int, blocks: int
):
    one = run(train=replace(TRAIN, temperature=temperature), verl=verl, kl=kl, probes=PROBED)
    found = fit.fit(one, R1, H100)
    assert part(found, "actor", "logits", "update") == bytes_of_a_word * WORDS + blocks * BLOCK
    # two of the reference's layers and its embedding and head, bfloat16
    assert part(found, "reference", "layers") == 2 * (2 * R1.layer_parameters + R1.outer_parameters)
    assert part(fit.fit(run(), R1, H100), "reference", "layers") == 0


def test_float32_logits_are_one_change(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fit, "LOGIT_BYTES", 4)
    cool = replace(TRAIN, temperature=0.6)
    padded = fit.fit(run(train=cool, verl=PADDED), R1, H100)
    assert part(padded, "actor", "logits and") == 16 * WORDS  # raw 4, scaled 4, softmax 4, exponentials 4: no cast
    assert part(padded, "actor", "logits", "update") == 12 * WORDS + 2 * BLOCK
    exact = fit.fit(run(train=cool, kl=EXACT), R1, H100)
    assert part(exact, "actor", "logits", "update") == 16 * WORDS + 8 * BLOCK


def test_a_block_is_as_large_as_the_one_that_is_worked_on():
    assert fit.BLOCK_ELEMENTS == logprobs.BLOCK_ELEMENTS
    assert logprobs.blocks(18_432, 151_936)[0] == slice(0, BLOCK // 4 // 151_936)


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


@pytest.mark.parametrize(
    ("parallel", "dtype", "expected"),
    [
        (1, "auto", 4 * 28 * 128 * 2),  # 28 layers, heads of 128, two of keys and values: all here
        (2, "auto", 4 * 28 * 128 * 1),
        (4, "auto", 4 * 28 * 128 * 1),  # two heads for four GPUs: each has one
        (4, "fp8_e4m3", 2 * 28 * 128 * 1),
    ],
)
def test_the_cache_of_a_token_on_each_gpu_of_an_engine(parallel: int, dtype: str, expected: int):
    verl = said(rollout__engine_kwargs__vllm__kv_cache_dtype=dtype)
    one = run(resources=ResourcesSpec(gpus_per_node=8, tensor_parallel=parallel), verl=verl)
    assert fit.kv_bytes(one, R1) == expected
    found = fit.fit(one, R1, H100)
    assert found.kv_tokens == part(found, "rollout", "key-value cache") // expected


def test_an_engine_that_never_sleeps_is_there_in_training():
    awake = fit.fit(run(verl=said(rollout__free_cache_engine=False)), R1, H100)
    asleep = fit.fit(run(), R1, H100)
    assert awake.training_bytes - asleep.training_bytes == pytest.approx(0.5 * H100.memory_bytes, abs=1)
    assert awake.rollout_bytes == asleep.rollout_bytes


def test_the_peaks_are_the_sums_of_their_phases():
    found = fit.fit(run(), R1, H100)
    there = {"log-probs": ("training", "both"), "update": ("training", "both"), "rollout": ("both",)}
    by_hand = {
        phase: sum(one.bytes for one in found.parts if one.phase in (phase, *wider)) for phase, wider in there.items()
    }
    assert found.training_bytes == max(by_hand["log-probs"], by_hand["update"])
    assert found.rollout_bytes == by_hand["rollout"]
    weights_and_moments = 12 * (1_777_088_000 // 8)
    assert found.rollout_bytes == pytest.approx(weights_and_moments + 5 * GIB + 0.5 * H100.memory_bytes, abs=1)


def test_offloaded_moments_are_not_there_during_rollout():
    offload = {"actor_rollout_ref.actor.fsdp_config.optimizer_offload": True}
    less, more = fit.fit(run(verl=offload), R1, H100), fit.fit(run(), R1, H100)
    assert more.rollout_bytes - less.rollout_bytes == 8 * (1_777_088_000 // 8)
    assert more.training_bytes == less.training_bytes


@pytest.mark.parametrize("model", NAMED.values(), ids=NAMED)
def test_all_weights_are_among_those_that_are_pinned(model: fit.Architecture):
    # a group as large as a matrix has rows would cut them all to rows; one process has all, and 1 byte each here
    assert sum(rows * width * count for rows, width, count in fit._tensors(model)) == model.parameters


def test_pinned_blocks_are_powers_of_two():
    # of eight shards: embedding and head 111.3 MiB in 128; gate, up and down 6.6 MiB in 8; q and o 1.1 MiB in 2; ...
    mib, kib = 1024**2, 1024
    matrices = 2 * 128 * mib + 28 * (3 * 8 * mib + 2 * 2 * mib + 2 * 256 * kib)
    biases_and_norms = 28 * (1024 + 2 * 128) + 57 * 1024  # 768 B, 128 B and 768 B
    assert fit.fit(run(), R1, H100).host_bytes == 8 * (matrices + biases_and_norms)
    assert fit.fit(run(), R1, H100).host_bytes / GIB == pytest.approx(8.24, abs=0.01)  # 6.62 without the rounding
    large = fit.fit(run(model=ModelSpec(path=BIG.name)), BIG, H100)
    assert large.host_bytes / GIB == pytest.approx(53.9, abs=0.05)  # 28.4 without


def test_the_references_dtype_and_group_are_its_own():
    half = fit.fit(run(verl=said(ref__fsdp_config__model_dtype=None)), R1, H100)  # verl: bfloat16, it is not trained
    assert half.host_bytes == fit.fit(run(), R1, H100).host_bytes // 2
    wide = ResourcesSpec(nodes=4, gpus_per_node=8)
    assert fit.fit(run(resources=wide), R1, H100).host_bytes < half.host_bytes
    grouped = fit.fit(run(resources=wide, verl=said(ref__fsdp_config__fsdp_size=8)), R1, H100)
    assert grouped.host_bytes == fit.fit(run(), R1, H100).host_bytes


# ---------------------------------------------------------------------------------------------------- refusals


def test_the_full_scale_run_fits_eight_h100_and_no_rtx_4090():
    assert fit.fit(run(), R1, H100).fits
    small = fit.fit(run(kl=EXACT), R1, GPUS["RTX-4090"])
    assert not small.fits
    (problem,) = small.problems
    needed = small.training_bytes / GIB
    assert problem.startswith(f"training: {needed:.1f} GiB are needed on each GPU, 22.8 of 24.0 GiB can be used")
    assert "largest: logits 18.1" in problem  # 18432 * 151936 * 6 bytes and ten buffers of 256 MiB


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


@pytest.mark.parametrize("size", [0, None, "all"])
def test_a_group_of_no_gpus_is_refused_in_words(size: object):
    with pytest.raises(ValueError, match=f"fsdp_config.fsdp_size is {size!r}: give a number of GPUs, or -1"):
        fit.fit(run(verl=said(actor__fsdp_config__fsdp_size=size)), R1, H100)


def test_what_is_not_counted_is_said_and_makes_a_refusal_a_caution():
    lora = run(verl=said(model__lora_rank=32), resources=ResourcesSpec(), model=ModelSpec(path=BIG.name))
    found = fit.fit_all([lora], H100, lambda _: BIG)
    told = "\n".join(fit.lines(found))
    assert "not counted: actor_rollout_ref.model.lora_rank=32" in told and "DOES NOT FIT" in told
    assert re.match(r"; caution: .* does not fit 1 GPU\. ", fit.require(found))


def test_a_run_of_which_all_is_counted_is_refused_beside_one_of_which_it_is_not():
    seven = {"model": ModelSpec(path=BIG.name), "resources": ResourcesSpec()}
    specs = [run(**seven, verl=said(model__lora_rank=32), seed=1, arm="lora"), run(**seven, seed=1, arm="full")]
    with pytest.raises(ValueError, match=r"^full/"):
        fit.require(fit.fit_all(specs, H100, lambda _: BIG))


def test_keys_that_change_nothing_are_not_named():
    harmless = said(model__lora_rank=0, actor__strategy="fsdp2", rollout__gpu_memory_utilization=0.6)
    assert fit.uncounted(run(verl=harmless | {"trainer.balance_batch": False})) == ()
    mixed = said(actor__fsdp_config__mixed_precision__param_dtype="fp32")
    assert fit.uncounted(run(verl=mixed)) == ("actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype=fp32",)


OURS = ("actor_rollout_ref.actor.strategy", "actor_rollout_ref.actor.fsdp_config.mixed_precision")
"""overrides.py sets the one; the other is not in verl's YAML, only in its dataclass, where it is None."""


@pytest.mark.parametrize("key", [key for key in fit.NOT_COUNTED if key not in OURS])
def test_keys_that_are_not_counted_are_verls_and_harmless_as_verl_has_them(verls: Any, key: str):
    missing = object()
    value = OmegaConf.select(verls, key, default=missing)
    assert value is not missing
    assert value in fit.NOT_COUNTED[key] or not fit.NOT_COUNTED[key]


def test_verl_has_what_is_assumed_where_a_recipe_says_nothing(verls: Any):
    actor, rollout = verls.actor_rollout_ref.actor, verls.actor_rollout_ref.rollout
    assert (rollout.gpu_memory_utilization, rollout.max_num_seqs) == (fit.VERL_UTILIZATION, fit.VERL_SEQUENCES)
    assert rollout.free_cache_engine is True and rollout.get("enable_sleep_mode", True) is True
    model = verls.actor_rollout_ref.model
    assert (model.use_remove_padding, model.enable_gradient_checkpointing) == (True, True)
    for engine in (actor.fsdp_config, verls.actor_rollout_ref.ref.fsdp_config):
        assert (engine.model_dtype, engine.fsdp_size, engine.offload_policy) == ("fp32", -1, False)
    assert actor.fsdp_config.use_torch_compile and not actor.fsdp_config.use_no_sync_for_gradient_accumulation


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
    assert found.source == "arithmetic"
    assert found.said.startswith("arithmetic, within about a factor of two where a step takes minutes: every response")


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


def test_the_cheapest_layout_costs_no_more_than_the_one_that_is_written():
    written = run(resources=ResourcesSpec(gpus_per_node=8, tensor_parallel=2))
    own, best = fit.fit(written, R1, H100), fit.cheapest(written, R1, H100)
    smallest = fit.cheapest(run(), R1, H100)  # of engines as small as fit
    assert best is not None and smallest is not None
    assert own.gpu_hours < smallest.gpu_hours and best == own
    assert "  this is the cheapest layout that fits" in fit.lines(fit.fit_all([written], H100, lambda _: R1))


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
