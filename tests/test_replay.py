"""`klreg replay`: gradients of real small models against plain loops with autograd, sharded checkpoints, sketches."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import typer
from small_models import END, moved, need_transformers, network, seeded, write_model
from torch import Tensor
from typer.testing import CliRunner
from verl_stack import spec

from klreg_verl.core import advantages, exact
from klreg_verl.experiment import provenance
from klreg_verl.experiment.kl_settings import KLSpec, ReferenceSpec
from klreg_verl.experiment.settings import ModelSpec, SamplesSpec, TrainSpec
from klreg_verl.experiment.store import RunFolder, write_json
from klreg_verl.replay import comparison, divergence, figure, gradients, models, settings, shards
from klreg_verl.replay import run as runs
from klreg_verl.replay.batch import pad
from klreg_verl.replay.command import replay_command
from klreg_verl.replay.comparison import Comparison
from klreg_verl.replay.gradients import Samples, Scored
from klreg_verl.replay.models import Model
from klreg_verl.replay.settings import FORWARD, REVERSE, TASK, Setting
from klreg_verl.replay.sketch import CountSketch
from klreg_verl.verl_hooks import checkpoints

need_transformers()
TEMPERATURE, BETA = 1.3, 0.3
PROMPTS = ([7, 8, 9], [10, 11], [12], [13, 14, 15, 16])
BARE = settings.parse("bare=placement:reward,estimator:k1,credit:token,baseline:none")


@dataclass(frozen=True, kw_only=True)
class Study:
    """A policy near its reference, and three of its responses to each prompt."""

    policy: Model
    reference: Model
    prompts: list[list[int]]
    responses: list[list[int]]
    scores: list[float]
    groups: list[int]

    def samples(self, **changes: Any) -> Samples:
        given = {"temperature": TEMPERATURE, "advantage": "rloo", "aggregation": "token-mean"}
        batch = pad(self.prompts, self.responses)
        groups, scores = torch.tensor(self.groups), torch.tensor(self.scores)
        return Samples(batch=batch, group_ids=groups, scores=scores, **(given | changes))

    def scored(self, **changes: Any) -> Scored:
        return gradients.score(self.policy.network, self.reference.network, self.samples(**changes))

    def compare(self, *names: Setting, memory_bytes: float = 1e9, seed: int = 1, **changes: Any) -> Comparison:
        """Of the settings that are always there, and the given ones."""
        wanted = settings.chosen(settings.table(), names, [TASK])
        given = (self.policy.network, self.reference.network, self.scored(**changes), wanted)
        return comparison.compare(gradients.products(*given, memory_bytes=memory_bytes, seed=seed))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    reference = network(1)
    return write_model(root / "policy", moved(reference, 0.05)), write_model(root / "reference", reference)


@pytest.fixture(scope="module")
def study(folders: tuple[Path, Path]) -> Study:
    policy, reference = map(models.load, folders)
    drawn = divergence.sample(policy, PROMPTS, responses=3, temperature=TEMPERATURE, max_tokens=6, seed=8)
    return Study(
        policy=policy,
        reference=reference,
        prompts=drawn.prompts,
        responses=drawn.responses,
        scores=[float(len(tokens) % 2 + (tokens[0] > 15)) for tokens in drawn.responses],
        groups=drawn.prompt.tolist(),
    )


def named(name: str) -> Setting:
    return next(setting for setting in settings.table(both=True) if setting.name == name)


# ------------------------------------------------------------------------------- by hand, one response at a time


def logits_of(model: Model, prompt: list[int], response: list[int]) -> Tensor:
    """(T, V), from one sequence without padding."""
    found = model.network(torch.tensor([prompt + response])).logits[0] / TEMPERATURE
    return found[len(prompt) - 1 : -1]


def by_hand(study: Study, loss_of: Callable[[int, Tensor, Tensor, list[int]], Tensor]) -> Tensor:
    """The gradient, flat, of the sum over responses of loss_of(row, logits, ref_logits, tokens)."""
    total = torch.zeros(())
    for row, (prompt, response) in enumerate(zip(study.prompts, study.responses, strict=True)):
        with torch.no_grad():
            ref_logits = logits_of(study.reference, prompt, response)
        total = total + loss_of(row, logits_of(study.policy, prompt, response), ref_logits, response)
    found = torch.autograd.grad(total, list(study.policy.network.parameters()))
    return torch.cat([part.reshape(-1) for part in found]).double()


def taken(logits: Tensor, tokens: list[int]) -> Tensor:
    return logits.log_softmax(-1)[torch.arange(len(tokens)), tokens]


def hand_made(study: Study, name: str) -> Tensor:
    """Each formula written out: token-mean over all tokens of the batch."""
    tokens = sum(map(len, study.responses))
    siblings = [[other for other in range(12) if other != row and study.groups[other] == study.groups[row]]
                for row in range(12)]  # fmt: skip
    with torch.no_grad():
        distance = [
            float((taken(logits_of(study.policy, p, r), r) - taken(logits_of(study.reference, p, r), r)).sum())
            for p, r in zip(study.prompts, study.responses, strict=True)
        ]

    def loss(row: int, logits: Tensor, ref_logits: Tensor, response: list[int]) -> Tensor:
        logprobs, ref_logprobs = taken(logits, response), taken(ref_logits, response)
        d, w = logprobs - ref_logprobs, (logprobs - logprobs.detach()).exp()
        others = siblings[row]
        advantage = study.scores[row] - sum(study.scores[other] for other in others) / len(others)
        charge = distance[row] - sum(distance[other] for other in others) / len(others)
        return {
            TASK: lambda: -(w * advantage).sum(),
            REVERSE: lambda: exact.full_reverse(logits, ref_logits).sum(),
            FORWARD: lambda: exact.full_forward(logits, ref_logits).sum(),
            "reward/k1/sequence": lambda: (w * charge).sum(),
            "loss/k1": lambda: d.sum(),
            "loss/k2": lambda: (0.5 * d.square()).sum(),
            "loss/k3": lambda: (torch.exp(-d) - 1 + d).sum(),
            "loss/k1/importance": lambda: (w * d).sum(),
            "loss/k3/importance_detached": lambda: (torch.exp(-d) - 1 + d).sum(),
            "loss/abs/importance": lambda: (w * d.abs()).sum(),
        }[name]() / tokens

    return by_hand(study, loss)


HAND_MADE = (
    *(TASK, REVERSE, FORWARD, "reward/k1/sequence", "loss/k1", "loss/k2", "loss/k3", "loss/k1/importance"),
    *("loss/k3/importance_detached", "loss/abs/importance"),
)


def test_gradients_are_those_of_plain_loops_over_single_responses(study):
    given = [named(name) for name in HAND_MADE]
    scored = study.scored()
    products = gradients.products(
        study.policy.network, study.reference.network, scored, given, memory_bytes=1e9, seed=1
    )
    expected = torch.stack([hand_made(study, name) for name in HAND_MADE])
    gram = expected @ expected.T
    scale = torch.outer(expected.norm(dim=1), expected.norm(dim=1))
    assert products.parameters == expected.shape[1]
    assert ((products.whole - gram) / scale).abs().max() < 2e-5
    # loss/k3 and its detached correction are one gradient: it is computed once
    assert products.parts == len(HAND_MADE) - 1


def test_k1_in_the_reward_for_each_token_without_baseline_is_k2_in_the_loss(study):
    found = study.compare(BARE, Setting(name="k2", kl=named("loss/k2").kl))
    bare, k2 = (found.names.index(name) for name in ("bare", "k2"))
    assert found.cosines[bare, k2] == pytest.approx(1, abs=1e-6)
    assert found.norms[bare] == pytest.approx(found.norms[k2].item(), rel=1e-6)
    assert found.rows[k2].same_as == "bare"
    # with the siblings' mean taken off it is another gradient with the same expectation
    with_baseline = study.compare(BARE, Setting(name="with", kl=named("reward/k1/token").kl))
    assert with_baseline.cosines[-1, with_baseline.names.index("bare")] < 0.999


def test_settings_that_are_one_gradient_on_policy(study):
    wanted = settings.table(both=True)
    given = (study.policy.network, study.reference.network, study.scored(), wanted)
    found = comparison.compare(gradients.products(*given, memory_bytes=1e9, seed=1))
    same = {row.name: row.same_as for row in found.rows}
    for name in ("k1", "k2", "k3", "abs", "js", "chi2", "tv"):
        assert same[f"loss/{name}/importance_detached"] == f"loss/{name}"
    assert (same["loss/k3/importance"], same["loss/forward"]) == ("loss/k2", "loss/k3")
    assert same["reward/k1/sequence"] is None
    # half of |d|'s gradient is the total variation's: one direction, two lengths
    abs_, tv = found.names.index("loss/abs"), found.names.index("loss/tv")
    assert found.cosines[abs_, tv] == pytest.approx(1, abs=1e-6)
    assert found.norms[abs_] / found.norms[tv] == pytest.approx(2, rel=1e-5)
    assert same["loss/tv"] is None


def test_both_placements_are_the_sum_of_the_two(study):
    names = ("reward/k3/sequence", "loss/k3", "both/k3/sequence")
    given = [named(name) for name in names]
    found = gradients.products(
        study.policy.network, study.reference.network, study.scored(), given, memory_bytes=1e9, seed=1
    ).whole
    assert found[2, 2] == pytest.approx(float(found[0, 0] + 2 * found[0, 1] + found[1, 1]), rel=1e-9)


def test_beta_scales_the_length_and_grpo_normalization_is_taken_at_its_beta(study):
    small = settings.parse("small=placement:loss,estimator:k3,beta:0.25")
    found = study.compare(small, Setting(name="one", kl=named("loss/k3").kl), advantage="grpo")
    norms = dict(zip(found.names, found.norms.tolist(), strict=True))
    assert norms["small"] == pytest.approx(norms["one"] / 4, rel=1e-9)
    inside = settings.parse("inside=placement:reward,estimator:k1,normalize_with_reward:true,beta:0.25")
    scored = study.scored(advantage="grpo")
    ((factor, part),) = gradients.parts_of(inside, scored)
    distance = (scored.logprobs - scored.ref_logprobs).sum(dim=-1)
    ids, scores = scored.samples.group_ids, scored.samples.scores
    changed = advantages.grpo(scores, ids) - advantages.grpo(scores - 0.25 * distance, ids)
    expected = changed[:, None] * scored.samples.batch.response_mask / scored.samples.batch.response_mask.sum()
    assert factor == 1.0
    assert torch.allclose(part.weights, expected, atol=1e-7)


@pytest.mark.parametrize(
    ("aggregation", "first_row", "second_row"),
    [
        # lengths 3 and 1
        ("token-mean", [1 / 4, 1 / 4, 1 / 4], [1 / 4, 0, 0]),
        ("seq-mean-token-sum", [1 / 2, 1 / 2, 1 / 2], [1 / 2, 0, 0]),
        ("seq-mean-token-mean", [1 / 6, 1 / 6, 1 / 6], [1 / 2, 0, 0]),
        ("seq-mean-token-sum-norm", [1 / 20, 1 / 20, 1 / 20], [1 / 20, 0, 0]),
    ],
)
def test_weights_of_tokens_by_aggregation(aggregation, first_row, second_row):
    samples = Samples(
        batch=pad([[5], [6]], [[7, 8, 9], [10]]),
        group_ids=torch.tensor([0, 0]),
        scores=torch.tensor([0.0, 1.0]),
        temperature=1.0,
        advantage="rloo",
        aggregation=aggregation,
        scale_factor=10,
    )
    assert samples.weights(aggregation).tolist() == [pytest.approx(first_row), pytest.approx(second_row)]


def test_weights_are_those_of_verls_aggregation():
    pytest.importorskip("verl", reason="not installed: verl (make setup)")
    from verl.trainer.ppo.core_algos import agg_loss

    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 0], [1, 0, 0, 0]], dtype=torch.bool)
    batch = pad(
        [[5]] * 3, [[7] * 4, [7] * 4, [7]], [row[: 4 if place < 2 else 1] for place, row in enumerate(mask.tolist())]
    )
    values = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    for aggregation, factor in (("token-mean", None), ("seq-mean-token-sum", None), ("seq-mean-token-sum-norm", 12)):
        samples = Samples(batch=batch, group_ids=torch.zeros(3, dtype=torch.long), scores=torch.zeros(3),
                          temperature=1.0, advantage="rloo", aggregation=aggregation, scale_factor=factor)  # fmt: skip
        expected = agg_loss(values, mask.float(), aggregation, loss_scale_factor=factor)
        assert (samples.weights(aggregation) * values).sum() == pytest.approx(expected.item(), rel=1e-6)


def test_masked_tokens_are_read_by_the_model_and_pull_nothing(study):
    # the middle token of a response is a tool's: the later one still depends on it
    batch = pad([[7, 8]], [[9, 10, 11]], [[True, False, True]])
    samples = Samples(batch=batch, group_ids=torch.tensor([0]), scores=torch.tensor([1.0]), temperature=TEMPERATURE,
                      advantage="rloo", aggregation="token-mean")  # fmt: skip
    scored = gradients.score(study.policy.network, study.reference.network, samples)
    expected = taken(logits_of(study.policy, [7, 8], [9, 10, 11]), [9, 10, 11])
    assert scored.logprobs[0].tolist() == pytest.approx([expected[0].item(), 0.0, expected[2].item()], abs=1e-5)
    for name in ("loss/k2", "reward/k1/reward_to_go", TASK):
        assert all(part.weights[0, 1] == 0 for _, part in gradients.parts_of(named(name), scored))


def test_small_passes_give_the_same_products(study, monkeypatch):
    whole = study.compare(named_as("k3", "loss/k3"))
    monkeypatch.setattr("klreg_verl.replay.batch.MOST_TOKENS", 25)
    parts = study.compare(named_as("k3", "loss/k3"))
    assert torch.allclose(whole.products.values, parts.products.values, rtol=1e-4, atol=1e-7)


def named_as(name: str, setting: str) -> Setting:
    return Setting(name=name, kl=named(setting).kl)


def test_halves_are_every_other_prompt():
    # prompts 4, 5, 7, 9 in this order: 4 and 7 are one half, 5 and 9 the other
    found = gradients.halves(torch.tensor([4, 4, 9, 9, 5, 7]))
    assert [index.tolist() for index in found] == [[0, 1, 5], [2, 3, 4]]


def test_the_cosine_between_halves_is_that_of_two_batches(study):
    found = study.compare(named_as("k3", "loss/k3"))
    each = []
    for half in (0, 1):
        rows = [row for row, group in enumerate(study.groups) if group % 2 == half]
        columns = {name: [getattr(study, name)[row] for row in rows] for name in ("prompts", "responses", "scores")}
        part = Study(policy=study.policy, reference=study.reference, groups=[study.groups[r] for r in rows], **columns)
        gradient = by_hand(part, lambda _, logits, ref_logits, response: k3_sum(logits, ref_logits, response))
        each.append(gradient)
    expected = torch.nn.functional.cosine_similarity(*each, dim=0).item()
    assert found.rows[-1].halves == pytest.approx(expected, abs=1e-4)


def k3_sum(logits: Tensor, ref_logits: Tensor, response: list[int]) -> Tensor:
    d = taken(logits, response) - taken(ref_logits, response)
    return (torch.exp(-d) - 1 + d).sum()


def test_a_policy_at_its_reference_has_zero_kl_gradients_and_no_cosine(study):
    wanted = settings.chosen(settings.table(), [], ["loss/k2"])
    same = study.policy.network
    scored = gradients.score(same, same, study.samples())
    found = comparison.compare(gradients.products(same, same, scored, wanted, memory_bytes=1e9, seed=1))
    rows = {row.name: row for row in found.rows}
    assert rows["loss/k2"].norm == 0
    assert (rows["loss/k2"].cosine_task, rows["loss/k2"].halves) == (None, None)
    assert rows[TASK].cosine_task == pytest.approx(1)
    assert "NaN" not in json.dumps(found.to_json())


# ---------------------------------------------------------------------------------------------------- sketch


def test_a_sketchs_cosines_and_lengths_err_as_stated():
    # 400 sketches of two vectors: the spread of the cosine is at most (1 - c^2) / sqrt(m), and near it for vectors
    # without large coordinates; that of a length at most 1 / sqrt(2 m). A standard deviation from 400 draws is
    # itself known to 1 / sqrt(800) = 3.5 %.
    generator, width = torch.Generator().manual_seed(1), 400
    one, noise = (torch.randn(3000, generator=generator) for _ in range(2))
    for share in (0.0, 0.6, 0.95):
        other = share * one + math.sqrt(1 - share**2) * noise
        vectors = torch.stack([one, other])
        truth = torch.nn.functional.cosine_similarity(one, other, dim=0).item()
        cosines, lengths = [], []
        for seed in range(400):
            found = CountSketch(width=width, seed=seed)(vectors)
            lengths.append(float(found[0].norm() / one.norm()))
            cosines.append(float(found[0] @ found[1] / found[0].norm() / found[1].norm()))
        stated = CountSketch(width=width, seed=0)
        error = stated.cosine_error(torch.tensor(truth)).item()
        spread = torch.tensor(cosines).std().item()
        assert 0.8 * error < spread < 1.12 * error
        assert torch.tensor(cosines).mean().item() == pytest.approx(truth, abs=4 * error / 20 + 2 / width)
        assert 0.8 * stated.length_error < torch.tensor(lengths).std().item() < 1.12 * stated.length_error


def test_a_sketch_is_linear_and_its_seed_repeats_it():
    vectors = torch.randn(2, 500, generator=torch.Generator().manual_seed(2))
    sketch = CountSketch(width=64, seed=3)
    one, other = sketch(vectors)
    assert torch.allclose(sketch((vectors[0] + vectors[1])[None])[0], one + other, atol=1e-6)
    assert torch.equal(sketch(vectors)[0], one)
    assert not torch.equal(CountSketch(width=64, seed=4)(vectors)[0], one)


def test_above_the_memory_limit_gradients_are_sketched_within_the_stated_error(study):
    wanted = settings.table()
    given = (study.policy.network, study.reference.network, study.scored(), wanted)
    whole = comparison.compare(gradients.products(*given, memory_bytes=1e9, seed=1))
    size, parts = whole.products.parameters, whole.products.parts
    limit = 4 * size * parts * gradients.HALVES
    assert whole.products.sketch is None
    assert gradients.products(*given, memory_bytes=limit, seed=1).sketch is None
    sketched = comparison.compare(gradients.products(*given, memory_bytes=limit - 1, seed=1))
    sketch = sketched.products.sketch
    assert sketch is not None
    assert sketch.width * 8 * parts * gradients.HALVES <= limit / 2
    stated = sketch.cosine_error(whole.cosines) + 1e-6
    off = (sketched.cosines - whole.cosines).abs() / stated
    assert off.max() < 5
    assert off.square().mean().sqrt() < 1.3
    assert ((sketched.norms / whole.norms - 1).abs() < 5 * sketch.length_error).all()
    # what is the same gradient stays exactly the same
    assert [row.same_as for row in sketched.rows] == [row.same_as for row in whole.rows]
    assert sketched.to_json()["sketch"]["cosine_error"] == pytest.approx(1 / math.sqrt(sketch.width))


# ---------------------------------------------------------------------------------------------------- settings


def test_the_table_has_every_estimator_credit_and_correction_once():
    names = [setting.name for setting in settings.table()]
    assert len(names) == len(set(names)) == 1 + 2 + 9 * 3 + 9 * 3 + 2
    assert len(settings.table(both=True)) == 1 + 2 + 27 + 27 + 81
    assert {"reward/tv/reward_to_go", "loss/k3/importance_detached", "both/k3/sequence"} <= set(names)


def test_a_users_setting_is_a_recipes_kl_block():
    found = settings.parse("mine=placement:loss,estimator:k2,cap:3,shaping.kind:clip,shaping.threshold:0.5,beta:2").kl
    assert (found.cap, found.shaping.kind, found.shaping.threshold, found.beta) == (3.0, "clip", 0.5, 2.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("placement:loss", "not of the form NAME=key:value"),
        ("a=", "not of the form NAME=key:value"),
        ("a=placement", "'placement' is not of the form key:value"),
        ("a=placement:none", "has no gradient of its own"),
        ("a=placement:loss,estimator:k4", "'k4' is not one of k1"),
        ("a=placement:loss,estimator:k3,credit:token", "credit"),
        ("a=placement:loss,estimator:reference_samples", "learns responses of the reference|draw"),
    ],
)
def test_a_setting_that_is_none_says_why(text, message):
    with pytest.raises(ValueError, match=message):
        settings.parse(text)


def test_patterns_choose_and_the_compared_ones_always_stay():
    found = settings.chosen(settings.table(), [BARE], ["loss/k3*"])
    assert [setting.name for setting in found] == [
        *(TASK, REVERSE, FORWARD, "loss/k3", "loss/k3/importance", "loss/k3/importance_detached"),
        *("loss/k3_verl", "loss/k3_verl/importance", "loss/k3_verl/importance_detached", "bare"),
    ]
    with pytest.raises(ValueError, match="No setting is called 'loss/k33'. Did you mean 'loss/k3"):
        settings.chosen(settings.table(), [], ["loss/k33"])
    with pytest.raises(ValueError, match="Two settings are called 'loss/k3'"):
        settings.chosen(settings.table(), [settings.parse("loss/k3=placement:loss,estimator:k3")], [])


# ---------------------------------------------------------------------------------------------------- shards


@pytest.fixture
def fake_workers() -> Iterator[Callable[[int, int], None]]:
    """Makes this process one worker of several, without any communication."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def become(rank: int, workers: int) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=rank, world_size=workers, store=FakeStore())

    yield become
    if dist.is_initialized():
        dist.destroy_process_group()


def save_shards(
    folder: Path, state: dict[str, Tensor], become: Callable[[int, int], None], shape: tuple[int, ...]
) -> None:
    """What FSDP2 leaves: rows shared over the mesh's last dimension, copies over the one before."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    workers, names = math.prod(shape), ("ddp", "fsdp")[-len(shape) :]
    placements = [*[Replicate()] * (len(shape) - 1), Shard(0)]
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(workers):
        become(rank, workers)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        parts = {}
        for name, weight in state.items():
            chunks = weight.chunk(shape[-1])
            place = rank % shape[-1]
            own = chunks[place] if place < len(chunks) else weight[:0]
            parts[name] = DTensor.from_local(
                own.clone(), mesh, placements, run_check=False, shape=weight.shape, stride=weight.stride()
            )
        torch.save(parts, folder / f"model_world_size_{workers}_rank_{rank}.pt")


@pytest.mark.parametrize("shape", [(1,), (2,), (3,), (2, 2)])
def test_shards_of_workers_make_the_whole_weights(tmp_path, fake_workers, shape):
    # 33 rows among 2 and 3 workers, and a bias of 2: with 3 workers the last one has no part of it
    with seeded(1):
        state = {"a": torch.randn(33, 4), "b": torch.randn(2), "c": torch.randn(8, 3, 2)}
    save_shards(tmp_path, state, fake_workers, shape)
    found = shards.load_shards(tmp_path)
    assert list(found) == list(state)
    assert all(torch.equal(found[name], state[name]) for name in state)


WORKER = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
torch.manual_seed(1)
model = torch.nn.Sequential(torch.nn.Linear(4, 33), torch.nn.LayerNorm(33), torch.nn.Linear(33, 3, bias=False))
if rank == 0:
    torch.save(model.state_dict(), f"{folder}/whole.pt")
fully_shard(model, mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",)))
torch.save(model.state_dict(), f"{folder}/model_world_size_2_rank_{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_shards_that_two_fsdp_processes_wrote(tmp_path):
    processes = [subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), str(rank)]) for rank in range(2)]
    assert [process.wait(timeout=200) for process in processes] == [0, 0]
    whole, found = torch.load(tmp_path / "whole.pt"), shards.load_shards(tmp_path)
    assert whole.keys() == found.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_missing_and_broken_shards_are_named(tmp_path, fake_workers):
    save_shards(tmp_path, {"a": torch.randn(4, 2)}, fake_workers, (2,))
    second = tmp_path / "model_world_size_2_rank_1.pt"
    second.write_bytes(second.read_bytes()[:100])
    with pytest.raises(ValueError, match="rank_1.pt cannot be read"):
        shards.load_shards(tmp_path)
    second.unlink()
    with pytest.raises(ValueError, match="lacks model_world_size_2_rank_1.pt"):
        shards.load_shards(tmp_path)
    (tmp_path / "model_world_size_4_rank_0.pt").touch()
    with pytest.raises(ValueError, match=r"holds shards of \[2, 4\] workers"):
        shards.load_shards(tmp_path)


# ---------------------------------------------------------------------------------------------------- a run


def write_run(root: Path, study: Study, folders: tuple[Path, Path], become: Any, **sections: Any) -> RunFolder:
    """A run of 5 steps as klreg and verl leave it: a checkpoint of two workers after 4, samples of every step."""
    train = TrainSpec(prompts_per_step=4, responses_per_prompt=3, temperature=TEMPERATURE, max_response_tokens=6)
    own = KLSpec(placement="loss", estimator="k3", follows="forward", beta=BETA)
    given = {"model": ModelSpec(path=str(folders[1])), "train": train, "kl": own}
    run = spec(root=str(root), **(given | sections))
    folder = RunFolder(root / run.recipe / run.run_id)
    folder.create(run)
    write_json(folder.provenance_path, {"model": {"path": str(folders[1]), "sha256": provenance.hash_path(folders[1])},
                                        "reference": {"sha256": provenance.hash_path(folders[1])}})  # fmt: skip
    actor = checkpoints.step_folder(folder.checkpoints_dir, 4) / "actor"
    save_shards(actor, study.policy.network.state_dict(), become, (2,))
    study.policy.network.config.save_pretrained(actor / "huggingface")
    study.policy.tokenizer.save_pretrained(actor / "huggingface")
    checkpoints.mark_complete(actor.parent)
    for step in (1, 5):
        folder.write_samples(step, samples_table(study, step))
    for step in range(1, 6):
        folder.append_metrics(step, {"kl/beta": BETA, "kl_ref/k1_token": 0.25, "actor/grad_norm": 0.5})
    return folder


def samples_table(study: Study, step: int) -> pa.Table:
    return pa.table(
        {
            "step": [step] * len(study.groups),
            "group": [f"prompt {group}" for group in study.groups],
            "prompt_ids": study.prompts,
            "token_ids": study.responses,
            "mask": [[True] * len(response) for response in study.responses],
            "score": study.scores,
        }
    )


@pytest.fixture
def run(tmp_path, study, folders, fake_workers) -> RunFolder:
    return write_run(tmp_path, study, folders, fake_workers)


def replay(*options: str) -> Any:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(replay_command)
    return CliRunner().invoke(app, list(options), catch_exceptions=False)


def test_a_run_is_replayed_from_its_checkpoint_and_samples(run, study):
    found = json.loads(replay(str(run.path), "--json").stdout)
    expected = study.compare(Setting(name="k3", kl=named("loss/k3").kl))
    assert (found["step"], found["responses"], found["temperature"]) == (4, 12, TEMPERATURE)
    names = [row["name"] for row in found["settings"]]
    norms = dict(zip(names, (row["norm"] for row in found["settings"]), strict=True))
    assert norms[TASK] == pytest.approx(expected.norms[0].item(), rel=1e-5)
    assert norms["run"] == pytest.approx(BETA * expected.norms[-1].item(), rel=1e-5)
    assert found["cosines"][names.index(REVERSE)][names.index("loss/k3")] == pytest.approx(
        expected.cosines[1, -1].item(), abs=1e-5
    )
    # the whole loss of the run: task + beta * k3, whose length the run logged before clipping
    whole = (hand_made(study, TASK) + BETA * hand_made(study, "loss/k3")).norm()
    assert found["gradient_norm"] == pytest.approx(whole.item(), rel=1e-5)
    assert (found["gradient_norm_logged"], found["k1_token_logged"], found["notes"]) == (0.5, 0.25, [])


def test_the_terminal_shows_one_line_a_setting_and_what_agrees_with_the_run(run):
    text = replay(str(run.path), "--only", "loss/*").stdout
    assert "after update 4, on the samples of step 5: 4 prompts, 12 responses" in text
    assert "0.250000 in the run's metrics" in text
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert lines["loss/forward"].endswith("= loss/k3")
    assert "reward/k1/token" not in lines
    assert "exact products" in text


def test_sketched_the_terminal_states_the_error(run):
    text = replay(str(run.path), "--only", "loss/k*", "--memory-gb", "0.0002", "--seed", "7").stdout
    assert "(seed 7): cosines c +- (1 - c^2) *" in text


def test_the_figure_is_a_picture_with_a_row_for_each_different_gradient(run, tmp_path):
    import matplotlib.image

    path = tmp_path / "figures" / "replay.png"
    assert f"figure: {path}" in replay(str(run.path), "--figure", str(path)).stdout
    picture = matplotlib.image.imread(path)
    rows = sum(row["same_as"] is None for row in json.loads(replay(str(run.path), "--json").stdout)["settings"])
    height = figure.TOP + figure.BOTTOM + figure.CELL * rows
    assert picture.shape[0] == pytest.approx(height * figure.DOTS_PER_INCH, abs=2)
    # blue along the diagonal: the middle of the first cell
    x, y = (figure.LEFT + figure.CELL / 2, figure.TOP + figure.CELL / 2)
    cell = picture[round(y * figure.DOTS_PER_INCH), round(x * figure.DOTS_PER_INCH)]
    assert cell[:3].tolist() == pytest.approx([0.0, 0x3D / 255, 0x66 / 255], abs=0.02)


def test_step_zero_is_the_starting_model(run):
    found = json.loads(replay(str(run.path), "--step", "0", "--json", "--only", "loss/k3").stdout)
    assert found["k1_token"] == 0
    assert {row["name"]: row["norm"] for row in found["settings"]}["loss/k3"] == 0


def test_what_cannot_be_replayed_says_what_can(run, tmp_path):
    with pytest.raises(ValueError, match="no run folder"):
        runs.find(tmp_path)
    with pytest.raises(ValueError, match="of step 3 with samples .* Steps that have both: 0, 4"):
        runs.find(run.path, 3)
    shard = run.checkpoints_dir / "global_step_4" / "actor" / "model_world_size_2_rank_1.pt"
    shard.write_bytes(shard.read_bytes()[:-1])  # a save that a kill cut short
    assert runs.find(run.path).step == 0
    run.write_samples(1, pa.table({"group": ["a"]}))
    with pytest.raises(ValueError, match="no column 'prompt_ids': its run was made by a version"):
        runs.find(run.path).samples()


def test_a_run_is_found_below_the_runs_folder(run, tmp_path, monkeypatch):
    monkeypatch.setenv("KLREG_RUNS", str(tmp_path))
    assert runs.find(run.path.relative_to(tmp_path)).step == 4


def test_a_reference_that_was_moved_away_or_changed_is_told(run, folders, tmp_path):
    moment, said = runs.find(run.path), []
    record = json.loads(run.provenance_path.read_text())
    write_json(run.provenance_path, {**record, "model": {**record["model"], "path": "/gone"}})
    with pytest.raises(ValueError, match="reference, /gone, is not there any more. Say where it is: --reference"):
        runs.load_models(moment, reference=None, device="cpu", note=said.append)
    runs.load_models(moment, reference=folders[1], device="cpu", note=said.append)
    assert said == []
    runs.load_models(moment, reference=folders[0], device="cpu", note=said.append)
    assert "is not the reference that the run saw" in said[0]


def test_a_reference_that_moved_is_the_one_saved_with_the_checkpoint(tmp_path, study, folders, fake_workers):
    run = write_run(tmp_path, study, folders, fake_workers, reference=ReferenceSpec(ema=0.9))
    moment = runs.find(run.path)
    with pytest.raises(ValueError, match="holds no reference.json, and the reference moves"):
        runs.load_models(moment, reference=None, device="cpu", note=print)
    averaged = moved(study.reference.network, 0.1, seed=5)
    parts = {name: weight.detach().chunk(2) for name, weight in averaged.named_parameters()}
    for rank in range(2):
        torch.save(
            {name: part[rank].clone() for name, part in parts.items()}, moment.checkpoint / f"weights_{rank}_of_2.pt"
        )
    write_json(moment.checkpoint / "reference.json", {"hash": "", "moved_at": 4, "workers": 2})
    _, found = runs.load_models(moment, reference=None, device="cpu", note=print)
    expected = dict(averaged.named_parameters())
    assert all(torch.equal(weight, expected[name]) for name, weight in found.network.named_parameters())


def test_samples_of_some_prompts_are_not_held_against_the_metrics_of_all(tmp_path, study, folders, fake_workers):
    run = write_run(tmp_path, study, folders, fake_workers, samples=SamplesSpec(prompts=2))
    found = json.loads(replay(str(run.path), "--json", "--only", "loss/k3").stdout)
    assert (found["gradient_norm_logged"], found["k1_token_logged"]) == (None, None)


def test_the_checkpoints_stop_token_is_the_models(run):
    assert models.load(runs.find(run.path).checkpoint).stop_tokens == (END,)
