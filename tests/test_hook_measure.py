"""Measuring, seeding, charging and preparing: the hooks around verl's step, on hand-made batches without Ray."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import math
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from verl_stack import FILES, FORWARD, REVERSE, compose, import_verl, need_stack, spec

from klreg_verl.core import advantages as core_advantages
from klreg_verl.core.metrics import METRICS
from klreg_verl.experiment.kl_settings import AlarmsSpec, ProbesSpec
from klreg_verl.experiment.settings import KLSpec, TrainSpec
from klreg_verl.experiment.store import RunFolder
from klreg_verl.verl_hooks import advantages, names, overrides

GOLDEN_A, GOLDEN_B = 589171983, 1526204073
"""Seeds of two requests, from `printf 1/train/1/0/0 | sha256sum` and the like."""


@pytest.fixture(scope="module", autouse=True)
def stack() -> None:
    need_stack()
    import_verl()


def hook(name: str) -> Any:
    return importlib.import_module(f"klreg_verl.verl_hooks.{name}")


def rows(**changes: Any) -> Any:
    """Two prompts with two responses each, of 2, 1, 3 and 3 tokens; the last token of the third is a tool's."""
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    zeros = torch.zeros(4, 3)
    given = {
        "response_mask": mask,
        "old_logprobs": torch.tensor([[-1.0, -2.0, 9.0], [-1.0, 9.0, 9.0], [-3.0, -1.0, 9.0], [-1.0, -1.0, -1.0]]),
        "ref_logprobs": torch.tensor([[-1.5, -2.5, 0.0], [-3.0, 0.0, 0.0], [-3.0, -1.0, 0.0], [-1.0, -1.0, -2.0]]),
        "rollout_logprobs": torch.tensor([[-1.0, -2.0, 0.0], [-1.0, 0.0, 0.0], [-3.0, -1.0, 0.0], [-1.0, -1.0, -1.0]]),
        "entropy": zeros + 0.5,
        "token_rewards": torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]),
        "advantages": zeros,
        "keys": ["b_0_0", "b_1_0", "a_0_0", "a_1_0"],
        "prompts": [torch.tensor([1, 2])] * 4,
        "responses": [torch.arange(length) for length in (2, 1, 3, 3)],
        "groups": ["b", "b", "a", "a"],
        "samples": [0, 1, 0, 1],
        "data_sources": ["palindrome"] * 4,
        "extra_info": [{"num_valid": "2"}, {"num_valid": "2"}, {}, {"num_valid": None}],
        "reward_extras": [{"acc": float(pred != "y"), "pred": pred} for pred in "xyzz"],
    }
    return hook("rows").Rows(**(given | changes))


# ------------------------------------------------------------------------------------------------------- measuring


def test_a_batch_in_numbers():
    logged = hook("measure").measure(rows(), REVERSE, 0.1, 3)
    # S = (0.5 + 0.5, 2, 0, 1): mean 1. Valid responses are 0, 2, 3: (1 + 0 + 1) / 3; invalid: 2. Tokens: 8, sum of d 4.
    expected = {
        "train/accuracy": 0.75,
        "train/score": 0.75,
        "response/length": 2.0,  # (2 + 1 + 2 + 3) / 4: a tool's token is not the policy's
        "response/truncated": 0.5,  # two responses fill the 3 tokens
        "kl/beta": 0.1,
        "kl/penalty": 0.1,  # 0.1 * mean S
        "reward/penalized": 0.65,
        "kl_ref/k1_token": 0.5,
        "kl_ref/k1_response": 1.0,
        "kl_ref/max": 2.0,
        "kl_ref/valid": 2 / 3,
        "kl_ref/invalid": 2.0,
        "kl_rollout/k1_token": 0.0,
        "kl_rollout/max": 0.0,
        "entropy/token": 0.5,
        "diversity/unique_valid": 1.0,  # {x} and {z}
        "diversity/coverage": 0.5,  # {x} of 2; the other prompt's number is not known
    }
    assert {key: logged[key] for key in expected} == pytest.approx(expected)


@pytest.mark.parametrize("kl", [KLSpec(), REVERSE, FORWARD], ids=lambda kl: kl.placement)
def test_every_logged_key_is_in_the_table_of_metrics(kl: KLSpec):
    assert set(hook("measure").measure(rows(), kl, kl.beta_or_zero, 3)) <= set(METRICS)


def test_a_measurement_does_not_depend_on_where_kl_is_placed():
    def without_placement(kl: KLSpec) -> dict[str, float]:
        logged = hook("measure").measure(rows(), kl, kl.beta_or_zero, 3)
        return {key: value for key, value in logged.items() if key.split("/")[0] not in ("kl", "reward", "adaptive_kl")}

    assert without_placement(KLSpec()) == without_placement(REVERSE) == without_placement(FORWARD)


def test_the_penalty_is_zero_without_kl_and_left_to_the_workers_in_the_loss():
    measure = hook("measure").measure
    none, loss = measure(rows(), KLSpec(), 0.0, 3), measure(rows(), FORWARD, 0.1, 3)
    assert (none["kl/penalty"], none["reward/penalized"], none["kl/beta"]) == (0.0, 0.75, 0.0)
    assert "kl/penalty" not in loss
    assert loss["reward/penalized"] == 0.75


def test_a_reward_on_a_masked_last_token_counts():
    assert rows().scores.tolist() == [1.0, 0.0, 1.0, 1.0]


def test_nan_under_the_mask_reaches_no_metric():
    clean, dirty = rows(), rows()
    for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs", "entropy"):
        values = torch.where(clean.response_mask, getattr(clean, name), float("nan"))
        dirty = dataclasses.replace(dirty, **{name: values})
    assert hook("measure").measure(dirty, REVERSE, 0.1, 3) == hook("measure").measure(clean, REVERSE, 0.1, 3)


def test_a_users_reward_without_acc_and_pred_is_right_where_it_is_one():
    plain = rows(reward_extras=[{}, {}, {}, {"acc": False}])
    measure = hook("measure")
    assert measure.is_valid(plain).tolist() == [True, False, True, False]
    assert measure.is_valid(plain).dtype == torch.bool
    assert measure.answers(plain) == ["[0, 1]", "[0]", "[0, 1, 2]", "[0, 1, 2]"]
    logged = measure.measure(plain, KLSpec(), 0.0, 8)
    assert (logged["train/accuracy"], logged["train/score"], logged["response/truncated"]) == (0.5, 0.75, 0.0)


def test_the_number_of_valid_answers_may_be_text_a_number_or_missing():
    infos = [{"num_valid": "12"}, {"num_valid": 3}, {"num_valid": ""}, {}]
    assert hook("measure").num_valid(rows(extra_info=infos)) == [12, 3, None, None]


def test_without_any_number_of_valid_answers_there_is_no_coverage():
    assert "diversity/coverage" not in hook("measure").measure(rows(extra_info=[{}] * 4), KLSpec(), 0.0, 3)


def test_when_no_response_is_valid_that_key_is_absent():
    logged = hook("measure").measure(rows(reward_extras=[{"acc": 0.0}] * 4), KLSpec(), 0.0, 3)
    assert "kl_ref/valid" not in logged
    assert logged["kl_ref/invalid"] == pytest.approx(1.0)


def test_samples_hold_one_entry_per_response_in_every_column():
    def decode(ids: Tensor, skip_special_tokens: bool) -> str:
        return "".join("abc"[int(i)] for i in ids)

    columns = hook("measure").samples_columns(rows(prompts=[torch.tensor([0, 1])] * 4), 5, {"a": 1, "b": 0}, decode)
    assert {len(column) for column in columns.values()} == {4}
    assert columns["group"] == ["0", "0", "1", "1"]
    assert columns["step"] == [5] * 4
    assert columns["response"] == ["ab", "a", "abc", "abc"]
    assert columns["mask"] == [[True, True], [True], [True, True, False], [True, True, True]]
    assert columns["score"] == [1.0, 0.0, 1.0, 1.0]
    assert columns["num_valid"] == ["2", "2", None, None]


def test_times_are_translated_and_tokens_are_per_second_of_the_step():
    logged = hook("measure").timing_metrics({"step": 4.0, "gen": 1.5, "unknown": 9.0}, tokens=100)
    assert logged == {"time/step_s": 4.0, "time/generate_s": 1.5, "perf/tokens_per_s": 25.0}


def nested(*values: list[float]) -> Tensor:
    return torch.nested.as_nested_tensor([torch.tensor(v) for v in values], layout=torch.jagged)


def test_verls_padding_rows_are_not_fetched(monkeypatch: pytest.MonkeyPatch):
    module = hook("rows")
    tu = importlib.import_module("verl.utils.tensordict_utils")
    asked: dict[str, Any] = {}

    def get(keys: list[str], partition_id: str, select_fields: list[str]) -> Any:
        asked.update(keys=keys, partition=partition_id)
        tensors = {name: nested([1.0, 1.0], [1.0]) for name in (*module._PADDED, *module._LISTS)}
        objects = {"uid": ["u", "u"], "extra_fields": [{"reward_extra_info": {"acc": 1.0}}, {}]}
        return tu.get_tensordict(tensors | objects)

    monkeypatch.setattr(module.tq, "kv_batch_get", get)
    tags = [{"is_padding": False}, {}, {"is_padding": True}]
    batch = module.KVBatchMeta(partition_id="train", keys=["u_0_0", "u_11_0", "padx_0_0"], tags=tags)
    fetched = module.fetch(batch)
    assert asked == {"keys": ["u_0_0", "u_11_0"], "partition": "train"}
    assert fetched.samples == [0, 11]
    assert fetched.response_mask.tolist() == [[True, True], [True, False]]
    assert fetched.reward_extras == [{"acc": 1.0}, {}]
    assert (fetched.data_sources, fetched.extra_info) == (["None", "None"], [{}, {}])  # the user's parquet has neither


# ------------------------------------------------------------------------------------------------------ advantages


@pytest.mark.parametrize("groups", [["u2", "u10", "u2"], [7, 3, 7], [1, "1", 1], [("a", 1), ("b", 2), ("a", 1)]])
def test_groups_are_numbered_whatever_names_them(groups: list[Any]):
    ids = advantages.group_ids(groups)
    assert (ids.tolist(), ids.dtype) == ([0, 1, 0], torch.int64)


def test_no_groups_are_no_ids():
    assert advantages.group_ids([]).tolist() == []


@pytest.mark.parametrize("name", core_advantages.names())
def test_a_registered_estimator_is_the_cores_on_summed_rewards(name: str):
    registered: dict[str, Any] = {}
    advantages.register(lambda key: lambda function: registered.setdefault(key, function))
    batch = rows()
    estimate = registered[names.ADVANTAGE_PREFIX + name]
    per_token, returns = estimate(
        token_level_rewards=batch.token_rewards, response_mask=batch.response_mask.long(), index=batch.groups, config={}
    )
    expected = core_advantages.compute(name, torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([1, 1, 0, 0]))
    torch.testing.assert_close(per_token, expected[:, None] * batch.response_mask)
    assert returns is per_token


def test_a_tools_last_token_carries_the_reward_as_in_verls_own_estimator():
    algos = importlib.import_module("verl.trainer.ppo.core_algos")
    registered: dict[str, Any] = {}
    advantages.register(lambda key: lambda function: registered.setdefault(key, function))
    batch = rows(token_rewards=torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.25]]))
    given = {"token_level_rewards": batch.token_rewards, "response_mask": batch.response_mask.float()}
    ours, _ = registered["klreg_rloo"](**given, index=batch.groups)
    verls, _ = algos.get_adv_estimator_fn("rloo")(**given, index=batch.groups)
    torch.testing.assert_close(ours, verls)


# -------------------------------------------------------------------------------------------------------- sampling


def test_a_seed_is_the_same_for_ever():
    # the first 31 bits of sha256("1/train/1/0/0") and of sha256("7/val/0/3/2")
    seed = hook("sampling").request_seed
    assert (seed(1, "train/1/0", 0), seed(7, "val/0/3", 2)) == (GOLDEN_A, GOLDEN_B)


def test_every_run_step_prompt_and_sample_has_a_seed_of_its_own():
    seed = hook("sampling").request_seed
    places = [(run, f"{part}/{step}/{row}", sample) for run in (1, 2) for part in ("train", "val") for step in (1, 11)
              for row in (0, 1, 11) for sample in (0, 1, 11)]  # fmt: skip
    assert len({seed(*place) for place in places}) == len(places) == 72
    assert all(0 <= seed(*place) < 2**31 for place in places)


def prompts(uids: list[str], step: int, validate: bool = False) -> Any:
    tu = importlib.import_module("verl.utils.tensordict_utils")
    batch = tu.get_tensordict({"uid": uids, "index": torch.arange(len(uids))})
    tu.assign_non_tensor_data(batch, "global_steps", step)
    if validate:
        tu.assign_non_tensor_data(batch, "validate", True)
    return batch


def test_prompts_are_labelled_by_step_and_place_and_a_validation_forgets_nothing():
    sampling = hook("sampling")
    manager = object.__new__(sampling.SeededAgentLoopManager)
    assert manager._labels(prompts(["x", "y"], 1)) == ["train/1/0", "train/1/1"]
    assert manager._labels(prompts(["v", "w"], 1, validate=True)) == ["val/1/0", "val/1/1"]
    assert manager.row_of == {"x": 0, "y": 1}  # samples are written after the validation of the same step
    assert manager._labels(prompts(["z"], 1)) == ["train/1/2"]  # in the place of a failed prompt: no seed twice
    assert manager.row_of == {"x": 0, "y": 1, "z": 2}
    assert manager._labels(prompts(["n"], 2)) == ["train/2/0"]
    assert manager.row_of == {"n": 0}


def test_a_request_carries_its_seed_and_asks_for_the_final_output_only(monkeypatch: pytest.MonkeyPatch):
    sampling = hook("sampling")
    seen: dict[str, Any] = {}

    async def run(self: Any, sampling_params: dict[str, Any], **kwargs: Any) -> str:
        seen.update(sampling_params)
        return "output"

    monkeypatch.setattr(sampling.SingleTurnAgentLoop, "run", run)
    loop = object.__new__(sampling.SeededSingleTurn)
    loop.data_config = SimpleNamespace(seed=1)
    given = {"temperature": 1.0}
    assert asyncio.run(loop.run(given, session_id=0, **{sampling.SEED_KEY: "train/1/0"})) == "output"
    assert (seen["seed"], seen["temperature"], seen["output_kind"].name) == (GOLDEN_A, 1.0, "FINAL_ONLY")
    assert given == {"temperature": 1.0}  # shared by all requests of a batch


class Balancer:
    """What stands behind verl's handle of its balancer: `handle.method.remote(...)`, awaited or not."""

    def __init__(self, *servers: str) -> None:
        self.servers, self.calls = servers, []

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda **given: self._answer(method, given))

    def _answer(self, method: str, given: dict[str, Any]) -> Any:
        self.calls.append(method)
        answers = {"get_all_servers": list(self.servers), "acquire_server": (self.servers[0], "handle")}
        future = asyncio.get_running_loop().create_future()
        future.set_result(answers.get(method, []))
        return future


def acquired(*servers: str, times: int) -> tuple[list[Any], list[str]]:
    """What `times` requests at once were given, and the calls that the balancer got."""
    balancer = Balancer(*servers)

    async def ask() -> list[Any]:
        client = hook("sampling").OneServerClient(None, balancer)
        given = await asyncio.gather(*(client._acquire_server(str(number)) for number in range(times)))
        for number in range(times):
            client._release_server(given[number][0], str(number))
        return list(given)

    return asyncio.run(ask()), balancer.calls


def test_one_server_is_asked_for_once_and_several_are_balanced_as_verl_does():
    given, calls = acquired("a", times=3)
    assert given == [("a", "handle")] * 3
    assert (calls.count("acquire_server"), calls.count("release_server")) == (1, 0)
    _, calls = acquired("a", "b", times=3)
    assert (calls.count("acquire_server"), calls.count("release_server")) == (3, 3)


def test_a_prompt_is_tokenized_once_and_nobody_can_change_what_is_remembered():
    built: list[Any] = []

    def build(messages: list[dict[str, str]], **media: Any) -> list[int]:
        built.append(messages)
        return [len(built), len(messages)]

    tokens = hook("sampling").remembered(build, kept=2)
    first, second = [{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]
    tokens(first).append(99)
    assert (tokens(first), tokens(second), tokens(first)) == ([1, 1], [2, 1], [1, 1])
    assert tokens([{"role": "user", "content": "c"}]) == [3, 1]  # no room for a third: all are dropped
    assert tokens(first) == [4, 1]


# --------------------------------------------------------------------------------------------------------- trainer


def charged(monkeypatch: pytest.MonkeyPatch, kl: KLSpec, **changes: Any) -> tuple[list[list[float]], dict[str, float]]:
    """What is stored as advantages of rows (1, 2 of group b; 3, 4 of group a), and the metrics."""
    trainer = hook("trainer")
    put: dict[str, Any] = {}
    monkeypatch.setattr(trainer.tq, "kv_batch_put", lambda **given: put.update(given))
    task = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    metrics = trainer.charge_kl(rows(advantages=task, **changes), "train", kl, 0.5)
    assert (put["keys"], put["partition_id"]) == (["b_0_0", "b_1_0", "a_0_0", "a_1_0"], "train")
    first, second = (
        [row.tolist() for row in put["fields"][name].unbind()] for name in (names.ADVANTAGES, names.RETURNS)
    )
    assert first == second
    return first, metrics


def test_kl_in_the_reward_takes_beta_times_the_charge_against_the_siblings(monkeypatch: pytest.MonkeyPatch):
    # S = 1, 2 | 0, 1; minus the sibling's: -1, 1 | -1, 1; beta 0.5: A + 0.5, A - 0.5 | A + 0.5, A - 0.5
    written, metrics = charged(monkeypatch, REVERSE)
    assert written == [
        [1.5, 1.5],
        [-0.5],
        [2.5, 2.5, 0.0],
        [-0.5, -0.5, -0.5],
    ]  # the third row's last token is a tool's
    # task 1, 1, 0, 2, 2, 0, 0, 0: variance 0.6875; KL's part four times 0.5 and four times -0.5: 0.25
    assert metrics["kl/advantage_share"] == pytest.approx(0.25 / (0.25 + 0.6875))


def test_what_is_under_the_mask_is_not_charged(monkeypatch: pytest.MonkeyPatch):
    dirty = torch.tensor([[-1.5, -2.5, 7.0], [-3.0, 7.0, 7.0], [-3.0, -1.0, float("nan")], [-1.0, -1.0, -2.0]])
    assert charged(monkeypatch, REVERSE, ref_logprobs=dirty)[0] == charged(monkeypatch, REVERSE)[0]


def test_inside_the_std_division_beta_is_rescaled_and_cancels_where_scores_are_equal(monkeypatch: pytest.MonkeyPatch):
    # scores 1, 0 | 1, 1 minus 0.5 S: 0.5, -1 | 1, 0.5; two of a group are always +-1 / sqrt 2 after GRPO, whatever beta
    kl = dataclasses.replace(REVERSE, normalize_with_reward=True)
    written, _ = charged(monkeypatch, kl)
    unit = 0.5**0.5
    for row, sign in zip(written, (1, -1, 1, -1), strict=True):
        assert [abs(value) for value in row if value] == pytest.approx([unit] * len([v for v in row if v]), rel=1e-5)
        assert all(value * sign >= 0 for value in row)


def config(extra: tuple[str, ...] = (), **values: Any) -> Any:
    return compose({"actor_rollout_ref.rollout.name": "vllm", **values}, extra)


def test_any_command_gets_the_reference_the_samplers_log_probs_and_seeds():
    prepared = config(
        **{
            "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": 4,
            "actor_rollout_ref.rollout.calculate_log_probs": False,
            "algorithm.adv_estimator": "grpo",
        }
    )
    hook("commands").prepare(prepared, REVERSE)
    actor, ref, rollout = (prepared.actor_rollout_ref[part] for part in ("actor", "ref", "rollout"))
    assert (actor.use_kl_loss, actor.kl_loss_coef) == (True, 0.0)
    assert (ref.log_prob_micro_batch_size_per_gpu, rollout.calculate_log_probs) == (4, True)
    assert rollout.agent.agent_loop_manager_class == "klreg_verl.verl_hooks.sampling.SeededAgentLoopManager"
    assert rollout.agent.default_agent_loop == "klreg_single_turn"
    assert Path(rollout.agent.agent_loop_config_path).is_file()


AGENT = "actor_rollout_ref.rollout.agent"


@pytest.mark.parametrize(
    "own",
    [
        {f"{AGENT}.agent_loop_manager_class": "pkg.Manager"},
        {f"{AGENT}.agent_loop_config_path": "/loops.yaml"},
        {f"{AGENT}.default_agent_loop": "tool_agent"},
        {"actor_rollout_ref.rollout.name": "sglang"},
    ],
    ids=str,
)
def test_a_users_own_sampling_is_left_as_it_is(own: dict[str, str]):
    prepared = config(**own)
    before = dict(prepared.actor_rollout_ref.rollout.agent)
    hook("commands").prepare(prepared, FORWARD)
    assert dict(prepared.actor_rollout_ref.rollout.agent) == before


@pytest.mark.parametrize(
    "own",
    [
        {"algorithm.use_kl_in_reward": True},
        {"actor_rollout_ref.actor.use_kl_loss": True, "actor_rollout_ref.actor.kl_loss_coef": 0.001},
    ],
    ids=str,
)
def test_two_kl_terms_are_refused(own: dict[str, Any]):
    text = "two KL terms would be followed. Switch verl's off, or unset KLREG_KL."
    with pytest.raises(ValueError, match=re.escape(text)):
        hook("commands").prepare(config(**own), KLSpec())


def test_kl_in_the_reward_needs_an_advantage_that_compares_siblings():
    text = "kl.placement=reward with algorithm.adv_estimator=gae: KL is charged against a group's other responses."
    with pytest.raises(ValueError, match=re.escape(text) + ".*or kl.placement=loss"):
        hook("commands").prepare(config(**{"algorithm.adv_estimator": "gae"}), REVERSE)
    hook("commands").prepare(config(**{"algorithm.adv_estimator": "gae"}), FORWARD)


def test_kl_normalized_with_the_reward_needs_an_advantage_that_divides_by_the_std():
    biased = dataclasses.replace(REVERSE, normalize_with_reward=True, allow_biased=True)
    text = "kl.placement=reward and normalize_with_reward with algorithm.adv_estimator=rloo: KL is charged"
    with pytest.raises(ValueError, match=re.escape(text)):
        hook("commands").prepare(config(**{"algorithm.adv_estimator": "rloo"}), biased)
    hook("commands").prepare(config(**{"algorithm.adv_estimator": "grpo"}), biased)


@pytest.mark.parametrize("own", [{"top_p": 0.9}, {"top_k": 20}], ids=str)
def test_samples_that_are_cut_off_are_refused_in_a_plain_command(own: dict[str, Any]):
    given = {f"actor_rollout_ref.rollout.{name}": value for name, value in own.items()}
    with pytest.raises(ValueError, match="every KL estimate is biased by that. Use top_p=1 and top_k=-1."):
        hook("commands").prepare(config(**given), FORWARD)


def test_a_sum_over_a_constant_without_its_constant_is_refused_in_a_plain_command():
    kl = dataclasses.replace(FORWARD, aggregation="seq-mean-token-sum-norm")
    with pytest.raises(ValueError, match="beta would mean something else in every micro-batch. Set it, e.g. to"):
        hook("commands").prepare(config(), kl)
    hook("commands").prepare(config(**{"actor_rollout_ref.actor.loss_scale_factor": 12}), kl)


MICRO = {"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 4}


def test_the_exact_kl_is_measured_at_the_steps_asked_for_and_at_no_other(monkeypatch: pytest.MonkeyPatch):
    trainer = hook("trainer")
    made, sent = object.__new__(trainer.KLRegTrainer), []
    made.block, made.kl = SimpleNamespace(probes=ProbesSpec(exact_every=3)), FORWARD
    made.beta, made.watch, made.config = hook("beta").Beta(FORWARD), hook("watch").Watch(AlarmsSpec()), config(**MICRO)
    made.actor_rollout_wg = SimpleNamespace(set_loss_fn=lambda loss: sent.append(loss.keywords["probe"]))
    made.progress = hook("progress").of_run(None, "trainer")
    monkeypatch.setattr(trainer.exact, "with_logits", lambda loss, kl, probe: partial(loss, probe=probe))
    monkeypatch.setattr(trainer.PPOTrainerSync, "on_step_begin", lambda self: None)
    made.global_steps = 3  # resumed after a step that measured
    made.send_loss()
    measured = {}
    for made.global_steps in range(4, 9):
        made.on_step_begin()
        measured[made.global_steps] = sent[-1]
    assert measured == {4: False, 5: False, 6: True, 7: False, 8: False}


def test_a_kl_block_that_follows_nothing_is_refused_in_a_plain_command_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    block = tmp_path / "kl.yaml"
    block.write_text("{placement: loss, estimator: k1, follows: reverse, beta: 0.1}")
    monkeypatch.setenv("KLREG_KL", str(block))
    with pytest.raises(ValueError, match="kl.yaml: kl.estimator='k1' with kl.placement='loss' is void"):
        hook("trainer").KLRegTrainer(config())


def test_one_line_says_what_is_active_and_whose_code_computes_it():
    prepared = compose(overrides.settings(spec(train=TrainSpec(advantage="dr_grpo")), FILES, "cpu"))
    assert hook("trainer").active_line(prepared, REVERSE) == (
        "[klreg] KL placement=reward estimator=k1 follows=reverse beta=0.1 computed by core.penalties.reward_penalty "
        "| advantage=klreg_dr_grpo computed by klreg_verl.core.advantages "
        "| policy loss vanilla and its aggregation seq-mean-token-sum-norm by verl"
    )


def test_the_run_folder_is_one_more_tracker():
    trainer = hook("trainer")
    made = object.__new__(trainer.KLRegTrainer)
    made.recorder = SimpleNamespace(log=lambda data, step: None)
    made.logger = trainer.Tracking(project_name="p", experiment_name="e", default_backend=[])
    assert made.logger.logger == {"klreg": made.recorder}


def test_rows_are_ordered_by_prompt_and_sample_whoever_finished_first():
    trainer = hook("trainer")
    made = object.__new__(trainer.KLRegTrainer)
    made.agent_loop_manager = SimpleNamespace(row_of={"p": 1, "q": 0})
    keys = ["p_10_0", "q_1_0", "p_9_0", "q_0_1", "q_0_0"]
    assert sorted(keys, key=made._place) == ["q_0_0", "q_0_1", "q_1_0", "p_9_0", "p_10_0"]
    made.agent_loop_manager = SimpleNamespace()  # a manager of the user's own
    assert sorted(["b_0_0", "a_1_0", "a_0_0"], key=made._place) == ["a_0_0", "a_1_0", "b_0_0"]


def test_a_mean_over_nothing_is_nan_and_no_crash():
    empty = rows(response_mask=torch.zeros(4, 3, dtype=torch.bool))
    assert math.isnan(hook("measure").measure(empty, KLSpec(), 0.0, 3)["kl_ref/k1_token"])


def test_an_evaluation_is_the_mean_over_prompts_and_counts_lost_responses_as_wrong():
    sources = ["openai/gsm8k", "openai/gsm8k", "palindrome", "palindrome", "palindrome"]
    rewards = {"reward": [0.9, 0.1, 1.0, 1.0, 0.0], "acc": [None, None, 1.0, 1.0, 0.0]}
    expected = {("openai/gsm8k", "a"): 2, ("palindrome", "b"): 2, ("palindrome", "c"): 2}
    found = validated(sources, ["a", "a", "b", "b", "c"], rewards, expected)
    # gsm8k has no acc, and grades: (0.9 + 0.1) / 2; palindrome: b (1 + 1) / 2, c (0 + lost) / 2
    scores = {"eval/openai/gsm8k/score": pytest.approx(0.5), "eval/palindrome/score": pytest.approx(0.5)}
    assert found.right() is None
    assert hook("measure").evaluation_metrics(found, graded=True) == scores


def validated(sources: Any, uids: Any, rewards: Any, expected: Any) -> Any:
    return hook("measure").Validated(data_sources=sources, uids=uids, rewards=rewards, expected=expected)


def test_acc_decides_what_is_right_and_the_score_is_logged_beside_it():
    rewards = {"reward": [1.5, 0.5, 0.25], "acc": [1.0, 0.0, 0.0]}
    expected = {("t", "a"): 1, ("t", "b"): 1, ("skill/spell", "c"): 1}
    found = validated(["t", "t", "skill/spell"], ["a", "b", "c"], rewards, expected)
    assert found.right() == [True, False]
    logged = hook("measure").evaluation_metrics(found, graded=False)
    assert logged == {"eval/t/accuracy": 0.5, "eval/t/score": 1.0, "retention/spell": 0.0}


def test_verl_writes_the_score_as_acc_and_that_is_no_accuracy():
    given = [1.75, -1.0, 0.0, 1.0]
    graded = rows(reward_extras=[{"acc": score} for score in given], token_rewards=last_token(given))
    measure = hook("measure")
    assert measure.is_valid(graded) is None
    logged = measure.measure(graded, KLSpec(), 0.0, 3, graded=True)
    assert logged["train/score"] == 0.4375  # (1.75 - 1 + 0 + 1) / 4
    assert not {"train/accuracy", "kl_ref/valid", "diversity/unique_valid"} & set(logged)
    columns = measure.samples_columns(graded, 1, {}, lambda ids, **_: "x", graded=True)
    assert columns["valid"] == [None] * 4 and columns["score"] == given


def last_token(scores: Sequence[float]) -> Tensor:
    """(B, T) with each response's score on its last place."""
    return torch.tensor([[0.0, 0.0, score] for score in scores])


def test_the_headline_is_accuracy_until_a_score_is_neither_0_nor_1_and_then_the_score_for_good(tmp_path: Path):
    folder = RunFolder(tmp_path)
    headline = hook("headline").Headline(folder)
    assert folder.is_graded() is None and headline.saw([]) is False and folder.is_graded() is None
    assert headline.saw([False, False]) is False and folder.is_graded() is False  # zeros alone
    assert headline.saw(None) is True and folder.is_graded() is True
    assert headline.saw([True]) is True  # a batch of ones changes nothing
    assert hook("headline").Headline(folder).is_graded is True  # the next attempt reads it


def verls_summary(monkeypatch: pytest.MonkeyPatch, bootstrap: Any = None) -> dict[str, float]:
    """verl's own summary of two prompts with four responses each, by a trainer of verl's."""
    from verl.trainer.ppo import metric_utils
    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync

    if bootstrap is not None:
        monkeypatch.setattr(metric_utils, "bootstrap_metric", bootstrap)
    infos = {"reward": [1.0, 0.0, 0.5, 0.0, 1.0, 1.0, 0.0, 0.25], "acc": [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]}
    infos["pred"] = list("abcbaabc")
    trainer, uids = object.__new__(PPOTrainerSync), list("ppppqqqq")
    return trainer._val_metrics_update(["s"] * 8, uids, infos, [2] * 8, {("s", "p"): 4, ("s", "q"): 4})


def test_verls_validation_metrics_are_kept_to_the_last_bit_but_for_its_best_of_n(monkeypatch: pytest.MonkeyPatch):
    import numpy as np

    measure = hook("measure")
    verls = verls_summary(monkeypatch)
    np.random.seed(1)
    before = np.random.get_state()[1].tolist()
    ours = verls_summary(monkeypatch, measure.bootstrap_metric)
    assert ours == verls
    assert np.random.get_state()[1].tolist() == before  # verl's reseeds the whole process
    kept = measure.verls_evaluation(ours)
    dropped = set(ours) - set(kept)
    assert {key.split("/")[-2] for key in dropped} == {"best@2", "best@4"}
    assert kept["val-core/s/acc/mean@4"] == 0.375  # (1/4 + 2/4) / 2
    assert {"val-core/s/acc/maj@4/mean", "val-aux/s/reward/std@4", "val-aux/s/acc/worst@4/mean"} <= set(kept)
    assert kept["val-aux/num_turns/mean"] == 2
