"""The reference that moves, is saved, and gives logits: on verl's own workers, FSDP2 over gloo, with 1 and 2 of them.

reference_process.py is what runs in each worker's process; it reports weights and numbers, which are compared here with
closed forms in float64 and with the plain transformers model.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import reference_process
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from reference_process import EMA, ESTIMATORS, PROMPTS, TEMPERATURE, TOP_K, sequences
from torch import Tensor
from verl_stack import import_verl, need_stack, run_workers

from klreg_verl.core import exact as core
from klreg_verl.core import logprobs
from klreg_verl.experiment.kl_settings import KLSpec, ReferenceSpec

pytestmark = pytest.mark.slow

HOOKS = "klreg_verl.verl_hooks"


def save_model(folder: Path, *, hidden: int, seed: int) -> Path:
    """A random Qwen2 with the tiny model's tokenizer."""
    transformers = importlib.import_module("transformers")
    tokenizer = importlib.import_module("data_prep.tiny_model").build_tokenizer()
    torch.manual_seed(seed)
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need_stack()
    import_verl()
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "policy", hidden=16, seed=0)
    save_model(folder / "other", hidden=24, seed=1)
    return folder


@pytest.fixture(scope="module")
def runs(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, list[dict[str, Any]]]]:
    folders = {workers: tmp_path_factory.mktemp(f"workers_{workers}") for workers in (1, 2)}
    for folder in folders.values():
        for model in ("policy", "other"):
            (folder / model).symlink_to(models / model)
    script = Path(reference_process.__file__)
    return {workers: (folder, run_workers(script, folder, workers)) for workers, folder in folders.items()}


@pytest.fixture(params=[1, 2], ids=["1 worker", "2 workers"])
def run(request: pytest.FixtureRequest, runs: dict[int, tuple[Path, list[dict[str, Any]]]]) -> tuple[Path, list[dict]]:
    return runs[request.param]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of this process only, for what is collective."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


Weights = dict[str, Tensor]


def assert_equal(one: Weights, other: Weights) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def rms(one: Weights, other: Weights) -> float:
    change = torch.cat([(one[name].double() - other[name].double()).flatten() for name in one])
    return float(change.square().mean().sqrt())


def model_with(models: Path, weights: Weights, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    auto = importlib.import_module("transformers").AutoModelForCausalLM
    model = auto.from_pretrained(models / "policy", dtype=dtype)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected  # tied to the embedding
    return model


def logits(model: torch.nn.Module, row: int) -> Tensor:
    """(length, V) of one sequence alone, over the temperature."""
    return model(sequences()[row].unsqueeze(0)).logits[0] / TEMPERATURE


def sampled(model: torch.nn.Module, row: int) -> Tensor:
    """(length - 1,) log-probabilities of the tokens after the first."""
    tokens = sequences()[row][1:, None]
    return logits(model, row)[:-1].log_softmax(dim=-1).gather(-1, tokens).squeeze(-1)


def by_row(packed: Tensor, rank: int, workers: int) -> Iterator[tuple[int, Tensor]]:
    rows = range(len(PROMPTS))[rank::workers]
    yield from zip(rows, packed.split([len(sequences()[row]) for row in rows]), strict=True)


# ----------------------------------------------------------------------------------------------------- moving


def test_at_the_start_the_reference_is_the_policy(run: tuple[Path, list[dict]]):
    for result in run[1]:
        assert_equal(*result["start"])
        assert torch.equal(*result["start logprobs"])


def test_a_reset_makes_the_next_forward_pass_the_policys(run: tuple[Path, list[dict]]):
    for result in run[1]:
        policy, reference = result["reset weights"]
        assert_equal(policy, reference)
        assert torch.equal(*result["reset logprobs"])
        assert not torch.equal(result["reset logprobs"][1], result["start logprobs"][1])
        assert result["reset"]["reference/moved_at"] == 3
        assert result["reset"]["reference/moved_rms"] == pytest.approx(rms(reference, result["start"][1]), rel=1e-6)


def test_an_average_is_that_of_float64(run: tuple[Path, list[dict]]):
    for result in run[1]:
        expected = {name: weight.double() for name, weight in result["reset weights"][1].items()}
        for policy, reference, moved in result["averages"]:
            before = expected
            expected = {name: EMA * before[name] + (1 - EMA) * policy[name].double() for name in before}
            for name, weight in reference.items():
                torch.testing.assert_close(weight.double(), expected[name], rtol=1e-6, atol=1e-8)
            assert moved["reference/moved_rms"] == pytest.approx(rms(expected, before), rel=1e-4)
        assert [moved["reference/moved_at"] for *_, moved in result["averages"]] == [4, 5, 6]


def test_the_averaged_reference_is_the_one_that_is_measured_against(run: tuple[Path, list[dict]], models: Path):
    for rank, result in enumerate(run[1]):
        policy, reference, _ = result["averages"][-1]
        for weights, packed in zip((policy, reference), result["average logprobs"], strict=True):
            model = model_with(models, weights)
            for row, found in by_row(packed, rank, len(run[1])):
                torch.testing.assert_close(found[:-1], sampled(model, row).detach(), rtol=1e-4, atol=1e-4)


def test_a_module_that_fsdp_leaves_whole_is_measured_with_its_new_weights(run: tuple[Path, list[dict]], models: Path):
    half = run[1][0]["half"]
    tokens = sequences()[0].unsqueeze(0)
    expected, before = (
        model_with(models, half[key], torch.bfloat16)(tokens).logits[0].detach() for key in ("moved", "start")
    )
    torch.testing.assert_close(half["logits"], expected)
    assert not torch.equal(expected, before)


def test_in_bfloat16_an_average_moves_by_its_float32_master(run: tuple[Path, list[dict]]):
    half = run[1][0]["half"]
    # 20 steps of 1 % towards a policy 5 % away leave 0.99^20 = 0.818 of the distance; bfloat16 resolves 0.4 to 0.8 %
    for name, start in half["start"].items():
        policy = half["policy"][name].double()
        expected = policy + 0.99**20 * (start.double() - policy)
        assert ((half["moved"][name].double() - expected).abs() <= 2**-8 * expected.abs()).all()
    without_master = {name: start.lerp(half["policy"][name].bfloat16(), 0.01) for name, start in half["start"].items()}
    assert rms(without_master, half["start"]) == 0 < rms(half["moved"], half["start"])


# ----------------------------------------------------------------------------------------------- saving, restoring


def test_a_frozen_reference_saves_its_hash_only(run: tuple[Path, list[dict]]):
    folder, results = run
    assert [path.name for path in (folder / "frozen").iterdir()] == ["reference.json"]
    for result in results:
        assert (result["frozen"].hash, result["frozen"].moved_at) == (result["start hash"], 0)


def test_a_moved_reference_is_restored_to_the_last_bit(run: tuple[Path, list[dict]]):
    folder, results = run
    workers = len(results)
    assert sorted(path.name for path in (folder / "reset").iterdir()) == [
        "reference.json",
        *(f"weights_{rank}_of_{workers}.pt" for rank in range(workers)),
    ]
    for result in results:
        weights, found, moved_at = result["restored"]
        assert_equal(weights, result["reset weights"][1])
        assert (found, moved_at) == (result["reset hash"], 3)
        weights, found, moved_at = result["restored average"]
        assert_equal(weights, result["averages"][-1][1])
        assert (found, moved_at) == (result["average hash"], 6)


def test_a_restored_average_goes_on_as_if_it_had_never_stopped(run: tuple[Path, list[dict]]):
    for result in run[1]:
        half = result["half"]
        assert_equal(half["restored"], half["moved"])
        assert_equal(half["resumed and went on"], half["went on"])


def test_another_reference_than_the_checkpoints_is_refused(run: tuple[Path, list[dict]]):
    for result in run[1]:
        assert f"hash {result['start hash']}" in result["refused"]
        assert "another reference" in result["refused"]
        assert "exactly one of the two rules" in result["both rules"]


def test_a_checkpoint_of_more_workers_is_refused(alone: None, tmp_path: Path):
    module = importlib.import_module(f"{HOOKS}.reference")
    (tmp_path / module.RECORD).write_text('{"hash": "x", "moved_at": 3, "workers": 2}')
    with pytest.raises(ValueError, match="saved by 2 workers, this run has 1"):
        module.Reference(torch.nn.Linear(2, 2)).load(tmp_path)


# ------------------------------------------------------------------------------------------------------- the hash


def test_the_hash_does_not_depend_on_the_number_of_workers(runs: dict[int, tuple[Path, list[dict[str, Any]]]]):
    (one,), (first, second) = runs[1][1], runs[2][1]
    for key in ("start hash", "reset hash"):
        assert one[key] == first[key] == second[key]
    assert {result["replicated hash"] for result in (one, first, second)} == {one["start hash"]}
    assert one["start hash"] != one["reset hash"]


def by_hand(weights: Weights) -> str:
    """The hash's definition in Python's integers."""
    lines = ""
    for name, weight in weights.items():
        total = 0
        for place, bits in enumerate(weight.float().flatten().view(torch.int32).tolist()):
            mixed = (bits + place * 0x9E3779B97F4A7C15) % 2**64
            mixed = ((mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9) % 2**64
            mixed = ((mixed ^ mixed >> 27) * 0x94D049BB133111EB) % 2**64
            total += mixed ^ mixed >> 31
        lines += f"{name} {tuple(weight.shape)} {total % 2**48:012x}\n"
    return hashlib.sha256(lines.encode()).hexdigest()


def test_the_hash_is_what_it_says(run: tuple[Path, list[dict]]):
    for result in run[1]:
        assert result["start hash"] == by_hand(result["start"][1])
        assert result["average hash"] == by_hand(result["averages"][-1][1])


def test_the_hash_sees_one_bit_a_swap_and_a_name_and_not_the_dtype(alone: None):
    weights_hash = importlib.import_module(f"{HOOKS}.reference").weights_hash

    def of(values: list[float], name: str = "weight", dtype: torch.dtype = torch.float32) -> str:
        module = torch.nn.Module()
        module.register_parameter(name, torch.nn.Parameter(torch.tensor(values, dtype=dtype)))
        return weights_hash(module)

    same = of([1.0, 2.0, 0.5])
    assert same == of([1.0, 2.0, 0.5], dtype=torch.bfloat16)
    one_bit = of([1.0, float(torch.nextafter(torch.tensor(2.0), torch.tensor(3.0))), 0.5])
    assert len({same, one_bit, of([2.0, 1.0, 0.5]), of([1.0, 2.0, 0.5], "bias"), of([1.0, 2.0])}) == 5


def test_many_chunks_hash_as_one(alone: None, monkeypatch: pytest.MonkeyPatch):
    module = importlib.import_module(f"{HOOKS}.reference")
    layer = torch.nn.Linear(7, 11)
    whole = module.weights_hash(layer)
    monkeypatch.setattr(module, "_CHUNK", 5)
    assert module.weights_hash(layer) == whole


def test_a_frozen_reference_that_moved_is_an_error():
    require_same = importlib.import_module(f"{HOOKS}.reference").require_same
    require_same("a", "a")
    require_same(None, None)
    with pytest.raises(RuntimeError, match="a at the start, b at the end"):
        require_same("a", "b")


# ------------------------------------------------------------------------------------------------------ exact KL


def divergence(estimator: str, policy: Tensor, reference: Tensor) -> Tensor:
    """In float64, from the definition; the top-k in two steps, by grouping probabilities."""
    p, q = policy.double().softmax(dim=-1), reference.detach().double().softmax(dim=-1)
    first, second = (p, q) if estimator.endswith("reverse") else (q, p)
    if estimator.startswith("topk"):
        chosen = first.detach().topk(TOP_K, dim=-1).indices
        first, second = (torch.cat([x.gather(-1, chosen), tail(x, chosen)], dim=-1) for x in (first, second))
    return (first * (first.log() - second.log())).sum(dim=-1)


def tail(probabilities: Tensor, chosen: Tensor) -> Tensor:
    return probabilities.scatter(-1, chosen, 0.0).sum(dim=-1, keepdim=True)


@pytest.mark.parametrize("remove_padding", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_loss_gets_the_divergence_of_both_models_logits(
    run: tuple[Path, list[dict]], models: Path, estimator: str, remove_padding: bool
):
    workers = len(run[1])
    policy, reference = (model_with(models, weights) for weights in run[1][0][estimator, remove_padding]["weights"])
    for rank, result in enumerate(run[1]):
        found = result[estimator, remove_padding]
        for row, values in by_row(found["values"], rank, workers):
            expected = divergence(estimator, logits(policy, row), logits(reference, row))
            torch.testing.assert_close(values.double(), expected.detach(), rtol=1e-4, atol=1e-6)
        for row, values in by_row(found["probe"], rank, workers):
            expected = divergence("full_reverse", logits(policy, row), logits(reference, row))
            torch.testing.assert_close(values.double(), expected.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("remove_padding", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_its_gradient_reaches_the_policys_weights(
    run: tuple[Path, list[dict]], models: Path, estimator: str, remove_padding: bool
):
    found = run[1][0][estimator, remove_padding]
    policy, reference = (model_with(models, weights) for weights in found["weights"])
    total = torch.zeros((), dtype=torch.float64)
    for row, prompt in enumerate(PROMPTS):
        places = slice(prompt - 1, len(sequences()[row]) - 1)  # where the response's tokens are predicted
        total = total + divergence(estimator, logits(policy, row), logits(reference, row))[places].sum()
    total.backward()
    expected = {name: weight.grad for name, weight in policy.named_parameters()}
    assert expected.keys() == found["gradients"].keys()
    for name, gradient in found["gradients"].items():
        largest = float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4 * largest)


def test_its_gradient_survives_logits_that_are_overwritten():
    # flash-attention's cross-entropy writes its gradient over the logits, in a backward pass that runs before ours
    need_stack()
    import_verl()
    per_token = importlib.import_module(f"{HOOKS}.exact").per_token
    draw = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(3, 7, generator=draw) for _ in range(2))
    leaf = policy.clone().requires_grad_()
    scaled = leaf * 1.0
    values = per_token(core.full_reverse, scaled, reference)
    scaled.detach().zero_()
    values.sum().backward()
    alone = policy.clone().requires_grad_()
    core.full_reverse(alone, reference).sum().backward()
    torch.testing.assert_close(leaf.grad, alone.grad)


def test_chunks_of_tokens_change_nothing(monkeypatch: pytest.MonkeyPatch):
    need_stack()
    import_verl()
    module = importlib.import_module(f"{HOOKS}.exact")
    draw = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(5, 7, generator=draw) for _ in range(2))
    weights = torch.randn(5, generator=draw)
    results = []
    for elements in (1 << 26, 14, 1):  # all 5 tokens at once, by 2, by 1
        monkeypatch.setattr(logprobs, "BLOCK_ELEMENTS", elements)
        leaf = policy.clone().requires_grad_()
        values = module.per_token(core.full_forward, leaf, reference)
        (values * weights).sum().backward()
        results.append((values.detach(), leaf.grad))
    p, q = policy.softmax(dim=-1), reference.softmax(dim=-1)
    for values, gradient in results:
        torch.testing.assert_close(values, (q * (q.log() - p.log())).sum(dim=-1))
        torch.testing.assert_close(gradient, weights[:, None] * (p - q))


def test_beta_is_not_rounded_to_the_logits_precision():
    need_stack()
    import_verl()
    module = importlib.import_module(f"{HOOKS}.exact")
    draw = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(5, 7, generator=draw).bfloat16() for _ in range(2))
    gradients = []
    for beta in (1.0, 0.001):  # the second is no bfloat16: the nearest is 0.2 % off
        leaf = policy.clone().requires_grad_()
        (module.per_token(core.full_forward, leaf, reference) * beta).sum().backward()
        gradients.append(leaf.grad)
    assert torch.tensor(0.001).bfloat16().item() != 0.001
    assert torch.equal(gradients[1], (gradients[0].float() * 0.001).bfloat16())


def test_weights_are_read_once_copies_to_the_host_have_arrived(alone: None, monkeypatch: pytest.MonkeyPatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
    importlib.import_module(f"{HOOKS}.reference").local_shards(torch.nn.Linear(2, 2))
    assert waited == [True]


def test_logits_of_other_vocabularies_are_refused():
    need_stack()
    import_verl()
    with pytest.raises(ValueError, match=r"\(3, 7\), the reference \(3, 8\)"):
        importlib.import_module(f"{HOOKS}.exact").per_token(core.full_reverse, torch.zeros(3, 7), torch.zeros(3, 8))


def test_only_what_needs_logits_is_wrapped():
    need_stack()
    import_verl()
    module = importlib.import_module(f"{HOOKS}.exact")
    sampled_kl = KLSpec(placement="loss", estimator="k3", follows="forward", beta=1.0)
    assert module.with_logits(print, sampled_kl) is print
    probe = module.with_logits(print, KLSpec(), probe=True)
    assert (probe.divergence, probe.probe) == (None, True)
    exact_kl = KLSpec(placement="loss", estimator="topk_forward", follows="forward", beta=1.0)
    wrapped = pickle.loads(pickle.dumps(module.with_logits(print, exact_kl)))  # it travels to the workers
    assert wrapped.divergence.keywords == {"k": core.TOP_K, "direction": "forward"}
    with pytest.raises(RuntimeError, match="set_loss_fn"):
        wrapped(student_logits=torch.zeros(1, 3, 7), data=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine_config": SimpleNamespace(use_fused_kernels=True)}, "fused kernels"),
        ({"pad_to_length": True}, "pad_to_length=False"),
        ({"ulysses_sequence_parallel_size": 2}, r"not \[2, 1\]"),
    ],
)
def test_engines_that_give_no_matching_logits_are_refused(changes: dict[str, Any], message: str):
    need_stack()
    import_verl()
    engine_class = importlib.import_module("verl.workers.engine.fsdp").FSDPEngine
    plain = {
        "engine_config": SimpleNamespace(use_fused_kernels=False),
        "pad_to_length": False,
        "ulysses_sequence_parallel_size": 1,
    }
    engines = [object.__new__(engine_class) for _ in range(2)]
    for engine, settings in zip(engines, ({**plain, **changes}, plain), strict=True):
        vars(engine).update(settings)
    check = importlib.import_module(f"{HOOKS}.exact").check_engines
    with pytest.raises(ValueError, match=message):
        check(*engines)
    check(engines[1], engines[1])


# ---------------------------------------------------------------------------------------------- another reference


def test_a_reference_of_its_own_is_measured_against(runs: dict[int, tuple[Path, list[dict]]], models: Path):
    (result,) = runs[1][1]
    policy, reference = result["other logprobs"]
    transformers = importlib.import_module("transformers")
    for name, packed in (("policy", policy), ("other", reference)):
        model = transformers.AutoModelForCausalLM.from_pretrained(models / name)
        for row, found in by_row(packed, 0, 1):
            torch.testing.assert_close(found[:-1], sampled(model, row).detach(), rtol=1e-4, atol=1e-4)


def test_a_reference_of_another_shape_cannot_follow(runs: dict[int, tuple[Path, list[dict]]]):
    (result,) = runs[1][1]
    for key in ("other cannot move", "other may not be told to move"):
        assert "same architecture" in result[key] and "(261, 16)" in result[key] and "(261, 24)" in result[key]


def model_config(models: Path, **settings: Any) -> Any:
    config = importlib.import_module("verl.workers.config").HFModelConfig
    return config(path=str(models / "policy"), override_config={"attn_implementation": "sdpa"}, **settings)


def test_another_checkpoint_keeps_the_policys_settings(models: Path):
    policy = model_config(models, use_remove_padding=False, enable_gradient_checkpointing=False)
    other = importlib.import_module(f"{HOOKS}.worker").model_at(str(models / "other"), policy)
    assert (other.local_path, other.hf_config.hidden_size) == (str(models / "other"), 24)
    assert (policy.local_path, policy.hf_config.hidden_size) == (str(models / "policy"), 16)
    assert (other.use_remove_padding, other.enable_gradient_checkpointing) == (False, False)
    assert other.hf_config._attn_implementation == "sdpa"


def test_another_vocabulary_is_refused(models: Path, tmp_path: Path):
    model_at = importlib.import_module(f"{HOOKS}.worker").model_at
    policy = model_config(models)
    for name, edit in (("size", larger), ("tokens", swapped)):
        folder = tmp_path / name
        save_model(folder, hidden=16, seed=0)
        edit(folder)
        with pytest.raises(ValueError, match="reference of the same vocabulary"):
            model_at(str(folder), policy)
    with pytest.raises(ValueError, match="no model with its tokenizer"):
        model_at(str(tmp_path / "nothing"), policy)


def larger(folder: Path) -> None:
    config = (folder / "config.json").read_text()
    assert '"vocab_size": 261' in config
    (folder / "config.json").write_text(config.replace('"vocab_size": 261', '"vocab_size": 264'))


def swapped(folder: Path) -> None:
    """Two letters change places: the same tokens, other ids."""
    text = (folder / "tokenizer.json").read_text()
    a, b = (importlib.import_module("json").loads(text)["model"]["vocab"][letter] for letter in "ab")
    text = text.replace(f'"a": {a},', f'"a": {b},').replace(f'"b": {b},', f'"b": {a},')
    (folder / "tokenizer.json").write_text(text)


@pytest.mark.parametrize("lora", [{"lora_rank": 8}, {"lora": {"rank": 8}}, {"lora_adapter_path": "adapter"}])
def test_a_reference_of_its_own_beside_lora_is_refused(models: Path, lora: dict[str, Any]):
    with pytest.raises(ValueError, match="with LoRA"):
        importlib.import_module(f"{HOOKS}.worker").model_at(str(models / "other"), model_config(models, **lora))


# ------------------------------------------------------------------------------------------------- in verl's trainer


def trainer_with(models: Path, *classes: Any) -> Any:
    ray = importlib.import_module("ray")
    model = {
        "_target_": "verl.workers.config.HFModelConfig",
        "path": str(models / "policy"),
        "override_config": {"attn_implementation": "sdpa"},
    }
    config = OmegaConf.create({"actor_rollout_ref": {"model": model}})
    OmegaConf.set_struct(config, True)
    mapping = {f"role {index}": ray.remote(cls) for index, cls in enumerate(classes)}
    return SimpleNamespace(config=config, role_worker_mapping=mapping)


def test_our_worker_takes_the_place_of_verls(models: Path):
    module = importlib.import_module(f"{HOOKS}.worker")
    verls = importlib.import_module("verl.workers.engine_workers")
    trainer = trainer_with(models, verls.ActorRolloutRefWorker, verls.TrainingWorker)
    module.install(trainer, ReferenceSpec(path=str(models / "other")))
    classes = [cls.__ray_actor_class__ for cls in trainer.role_worker_mapping.values()]
    assert classes == [module.KLRegWorker, verls.TrainingWorker]
    assert trainer.config.actor_rollout_ref.klreg == {"path": str(models / "other"), "moves": False}


def test_verls_missing_worker_and_a_foreign_vocabulary_are_errors_at_the_start(models: Path, tmp_path: Path):
    module = importlib.import_module(f"{HOOKS}.worker")
    verls = importlib.import_module("verl.workers.engine_workers")
    with pytest.raises(RuntimeError, match="nothing to replace"):
        module.install(trainer_with(models, verls.TrainingWorker), ReferenceSpec())
    save_model(tmp_path, hidden=16, seed=0)
    larger(tmp_path)
    with pytest.raises(ValueError, match="vocab_size is 264, the policy's 261"):
        module.install(trainer_with(models, verls.ActorRolloutRefWorker), ReferenceSpec(path=str(tmp_path)))


def test_what_the_driver_calls_runs_on_every_worker():
    need_stack()
    import_verl()
    decorator = importlib.import_module("verl.single_controller.base.decorator")
    worker = importlib.import_module(f"{HOOKS}.worker").KLRegWorker
    for name in ("init_model", "set_loss_fn", "move_reference", "reference_hash", "save_reference", "load_reference"):
        assert getattr(getattr(worker, name), decorator.MAGIC_ATTR) == {
            "dispatch_mode": decorator.Dispatch.ONE_TO_ALL,
            "execute_mode": decorator.Execute.ALL,
            "blocking": True,
        }


class Group:
    """Takes the calls of a worker group, and remembers them."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def move_reference(self, **arguments: Any) -> list[dict[str, float]]:
        self.calls.append(arguments)
        return [{"reference/moved_at": arguments["step"]}] * 2

    def load_reference(self, folder: str) -> None:
        self.calls.append(folder)


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        (ReferenceSpec(), []),
        (ReferenceSpec(reset_every=2), [(2, True, None), (4, True, None)]),
        (ReferenceSpec(ema=0.9), [(step, False, 0.9) for step in (1, 2, 3, 4)]),
    ],
)
def test_when_the_reference_moves(reference: ReferenceSpec, expected: list[tuple[int, bool, float | None]]):
    need_stack()
    import_verl()
    move, group = importlib.import_module(f"{HOOKS}.worker").move, Group()
    metrics = [move(group, reference, step) for step in (1, 2, 3, 4)]
    assert [tuple(call.values()) for call in group.calls] == expected
    assert [found["reference/moved_at"] for found in metrics if found] == [step for step, *_ in expected]


def test_a_checkpoint_without_a_reference_serves_a_frozen_one_only(tmp_path: Path):
    need_stack()
    import_verl()
    restore, group = importlib.import_module(f"{HOOKS}.worker").restore, Group()
    restore(group, ReferenceSpec(), tmp_path)
    with pytest.raises(ValueError, match="where the reference had moved to"):
        restore(group, ReferenceSpec(ema=0.9), tmp_path)
    (tmp_path / "reference.json").write_text("{}")
    restore(group, ReferenceSpec(ema=0.9), tmp_path)
    assert group.calls == [str(tmp_path)]


# --------------------------------------------------------------------------------------- what verl must keep doing


def test_verl_gives_the_logits_to_the_loss_before_anything_may_overwrite_them():
    need_stack()
    import_verl()
    engine = importlib.import_module("verl.workers.engine.fsdp.transformer_impl").FSDPEngineWithLMHead
    text = inspect.getsource(engine.prepare_model_outputs)
    for branch in text.split("else:  # not using rmpad")[:2]:
        assert branch.index("logits_processor_func(student_logits=") < branch.index("logprobs_from_logits(")
