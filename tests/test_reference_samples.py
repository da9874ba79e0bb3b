"""The forward KL's own loss: which rows an update takes, how they are kept, and the gradient that they add.

reference_samples_process.py is what runs in each worker's process, on verl's FSDP2 engine over gloo; its gradients are
compared here with the plain transformers model.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from reference_samples_process import BETA, FIRST, KL, ROWS, SAMPLES, SEED
from test_worker import TEMPERATURE, save_model
from torch import Tensor
from verl_stack import import_verl, need_stack, run_workers

from klreg_verl.core.aggregation import response_sum
from klreg_verl.core.objective import Objective
from klreg_verl.doctor import gradients
from klreg_verl.doctor.policies import panel
from klreg_verl.experiment.kl_settings import ControllerSpec, DrawSpec, KLSpec, ReferenceSpec, ShapingSpec, check_drawn
from klreg_verl.experiment.settings import ModelSpec, Settings, TrainSpec
from klreg_verl.experiment.strict import FieldError

HERE = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def verl() -> None:
    need_stack()
    import_verl()


@pytest.fixture(scope="module")
def driver() -> Any:
    return importlib.import_module("klreg_verl.verl_hooks.reference_samples")


@pytest.fixture(scope="module")
def loss_module() -> Any:
    return importlib.import_module("klreg_verl.verl_hooks.reference_loss")


@pytest.fixture(scope="module")
def samples() -> Any:
    return importlib.import_module("reference_samples_process").samples()


# ------------------------------------------------------------------------------------------------ the divergence


@pytest.mark.parametrize("listed", panel(), ids=lambda listed: listed.name)
def test_the_loss_over_all_responses_of_the_reference_has_the_gradient_of_the_forward_kl_of_whole_responses(
    listed: Any,
):
    logits = listed.logits.clone().requires_grad_()
    of_reference = response_sum(gradients.logprobs(listed, listed.ref_logits), listed.response_mask).exp()
    assert float(of_reference.sum()) == pytest.approx(1.0)
    loss = -(of_reference * response_sum(gradients.logprobs(listed, logits), listed.response_mask)).sum()
    (found,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(found.flatten(), gradients.divergence_gradient(listed, "forward", "sequence"))
    entropy = -(of_reference * of_reference.log()).sum()
    assert (loss - entropy).item() == pytest.approx(float(gradients.divergence(listed, "forward", "sequence")))


# ------------------------------------------------------------------------------------------------------ which rows


def order(loss_module: Any, **changes: Any) -> Any:
    return loss_module.Order(**({"seed": 5, "rows": 4, "first": 0, "updates": 1} | changes))


def test_updates_go_along_one_order_of_all_samples_and_then_begin_anew(loss_module: Any):
    taken = [row for update in range(5) for row in order(loss_module).of_update(update, 10)]
    assert sorted(taken[:10]) == list(range(10)) == sorted(taken[10:])
    assert taken[:10] == taken[10:]
    assert taken[:10] != list(range(10))


def test_a_resumed_run_takes_the_rows_that_it_would_have_taken(loss_module: Any):
    steps = [order(loss_module, first=2 * step).of_update(update, 10) for step in range(3) for update in range(2)]
    assert steps == [order(loss_module).of_update(update, 10) for update in range(6)]
    assert order(loss_module, seed=6).of_update(0, 10) != steps[0]


def test_the_order_is_the_same_on_every_machine(loss_module: Any):
    assert loss_module.shuffled(6, "7/reference rows") == (3, 1, 5, 4, 0, 2)


def test_workers_share_the_rows_without_overlap(loss_module: Any):
    def engine(rank: int, workers: int) -> Any:
        return SimpleNamespace(get_data_parallel_rank=lambda: rank, get_data_parallel_size=lambda: workers)

    rows = [9, 4, 7, 1]
    assert [loss_module.share(rows, engine(rank, 2)) for rank in range(2)] == [[9, 4], [7, 1]]
    assert loss_module.share(rows, engine(0, 1)) == rows
    with pytest.raises(ValueError, match="4 responses of the reference cannot be shared equally by 3 workers"):
        loss_module.share(rows, engine(0, 3))


@pytest.mark.parametrize(("rows", "largest", "size"), [(6, 4, 3), (4, 8, 4), (5, 4, 1), (6, None, 6)])
def test_a_micro_batch_is_no_larger_than_the_policys_and_divides_the_rows(
    rows: int, largest: int | None, size: int, loss_module: Any
):
    assert loss_module.micro_batch(rows, largest) == size


def test_the_draw_has_seeds_of_its_own_and_leaves_those_of_the_first_step():
    sampling = importlib.import_module("klreg_verl.verl_hooks.sampling")
    tu = importlib.import_module("verl.utils.tensordict_utils")

    def labels(manager: Any, step: int, uids: list[str]) -> list[str]:
        return manager._labels(tu.get_tensordict({"uid": uids}, {"global_steps": step}))

    drawn, plain = (object.__new__(sampling.SeededAgentLoopManager) for _ in range(2))
    assert labels(drawn, 0, ["a", "b"]) == ["train/0/0", "train/0/1"]
    assert labels(drawn, 1, ["c", "d"]) == labels(plain, 1, ["c", "d"]) == ["train/1/0", "train/1/1"]
    assert drawn.row_of == plain.row_of == {"c": 0, "d": 1}


# ------------------------------------------------------------------------------------------------------- the files


@pytest.fixture
def asked(driver: Any) -> Any:
    given = {"prompts": 5, "per_prompt": 2, "seed": 1, "temperature": 1.0, "max_response_tokens": 4}
    return driver.Asked(reference="abc", **given)


def test_samples_come_back_as_they_were_written(tmp_path: Path, driver: Any, samples: Any, asked: Any):
    assert driver.read(tmp_path, asked) is None
    driver.write(tmp_path / "run", samples, asked)
    assert driver.read(tmp_path / "run", asked) == samples
    assert {path.name for path in (tmp_path / "run").iterdir()} == {driver.FILE, driver.RECORD}
    record = json.loads((tmp_path / "run" / driver.RECORD).read_text())
    assert (record["responses"], record["tokens"], len(record["sha256"])) == (SAMPLES, driver.tokens(samples), 64)
    rounded = replace(samples, logprobs=[[round(one, 3) for one in row] for row in samples.logprobs])
    driver.write(tmp_path / "again", rounded, asked)
    again = json.loads((tmp_path / "again" / driver.RECORD).read_text())
    assert again["sha256"] != record["sha256"]
    assert again["ids_sha256"] == record["ids_sha256"]


def test_a_changed_or_lost_file_is_an_error_and_is_not_drawn_anew(
    tmp_path: Path, driver: Any, samples: Any, asked: Any
):
    driver.write(tmp_path, samples, asked)
    other = replace(samples, token_ids=[[ids[0] + 1, *ids[1:]] for ids in samples.token_ids])
    driver.write(tmp_path / "other", other, asked)
    (tmp_path / driver.FILE).write_bytes((tmp_path / "other" / driver.FILE).read_bytes())
    with pytest.raises(ValueError, match="is not the file whose sha256"):
        driver.read(tmp_path, asked)
    (tmp_path / driver.FILE).unlink()
    with pytest.raises(ValueError, match="it was changed or lost"):
        driver.read(tmp_path, asked)


def test_samples_of_another_draw_are_refused(tmp_path: Path, driver: Any, samples: Any, asked: Any):
    driver.write(tmp_path, samples, asked)
    with pytest.raises(ValueError, match=r"drawn otherwise \(seed 1 there, 2 here; reference 'abc' there, 'd' here\)"):
        driver.read(tmp_path, replace(asked, seed=2, reference="d"))


def test_a_draw_that_was_killed_before_its_record_does_not_count(tmp_path: Path, driver: Any, samples: Any, asked: Any):
    driver.write(tmp_path, samples, asked)
    (tmp_path / driver.RECORD).unlink()
    assert driver.read(tmp_path, asked) is None


def trainer(driver: Any, folder: Path, step: int, workers: Any) -> Any:
    """What prepare() and begin_update() read of KLRegTrainer."""
    omegaconf = importlib.import_module("omegaconf")
    actor = {"ppo_mini_batch_size": 4, "ppo_epochs": 1}
    model = {"actor": actor, "rollout": {"n": 4, "temperature": 1.0}, "model": {"path": "m"}}
    config = {
        "data": {"seed": 1, "max_response_length": 4, "train_batch_size": 8},
        "trainer": {"default_local_dir": str(folder)},
        "actor_rollout_ref": model,
    }
    return SimpleNamespace(
        kl=replace(KL, draw=DrawSpec(prompts=5, per_prompt=2, share=0.25)),
        block=SimpleNamespace(reference=ReferenceSpec()),
        beta=SimpleNamespace(now=BETA),
        config=omegaconf.OmegaConf.create(config),
        global_steps=step,
        reference_hash="abc",
        ref_in_actor=False,
        processor=None,
        recorder=None,
        actor_rollout_wg=workers,
    )


class Workers:
    """Keeps what it is told."""

    world_size = 2

    def __init__(self) -> None:
        self.told: list[Any] = []

    def hold_reference_samples(self, samples: Any) -> None:
        self.told.append(samples)

    def follow_reference_samples(self, order: Any, beta: float) -> None:
        self.told.append((order, beta))


def test_a_resumed_run_uses_its_own_samples_and_goes_on_in_their_order(
    tmp_path: Path, driver: Any, loss_module: Any, samples: Any, asked: Any
):
    driver.write(tmp_path, samples, asked)
    run = trainer(driver, tmp_path, 7, workers := Workers())
    driver.prepare(run)
    driver.begin_update(run)
    # 8 prompts a step in updates of 4, which are 16 responses: 4 rows each; 6 steps were made
    assert workers.told == [samples, (loss_module.Order(seed=1, rows=4, first=12, updates=2), BETA)]


def test_samples_that_are_lost_end_a_resumed_run(tmp_path: Path, driver: Any):
    with pytest.raises(ValueError, match="goes on at step 7: its policy is not the reference any more"):
        driver.prepare(trainer(driver, tmp_path, 7, Workers()))


def test_other_arms_are_left_alone(tmp_path: Path, driver: Any):
    run = trainer(driver, tmp_path, 1, workers := Workers())
    run.kl = KLSpec(placement="loss", estimator="k3", follows="forward", beta=0.1)
    driver.prepare(run)
    driver.begin_update(run)
    assert (workers.told, list(tmp_path.iterdir()), driver.logged({"actor/kl_loss": 1.0}, 0.1)) == ([], [], {})


def test_the_logged_penalty_is_beta_times_the_forward_kl(driver: Any):
    found = driver.logged({"actor/reference_forward": 0.5, "actor/reference_loss": 9.0}, 0.2)
    assert found == {"kl_ref/forward_sampled": 0.5, "kl/penalty": 0.1}


# ------------------------------------------------------------------------------------------------------- the settings


def refusal(make: Any) -> tuple[str, str]:
    with pytest.raises(FieldError) as caught:
        make()
    return caught.value.field, caught.value.message


BLOCK: dict[str, Any] = {"estimator": "reference_samples", "follows": "forward", "beta": 0.1}


@pytest.mark.parametrize(
    ("values", "field", "words"),
    [
        ({"placement": "reward"}, "estimator", "are in no group and have no reward"),
        ({"placement": "both"}, "estimator", "Only `placement: loss` takes them"),
        ({"correction": "importance"}, "correction", "no ratio, and a mean of its own"),
        ({"cap": 1.0}, "cap", "has no effect with estimator reference_samples"),
        ({"shaping": ShapingSpec(kind="clip")}, "shaping", "clip has no effect"),
        ({"aggregation": "token-mean"}, "aggregation", "a mean of its own"),
        ({"estimator": "k3", "draw": DrawSpec(prompts=1)}, "draw", "only reference_samples draws"),
    ],
)
def test_settings_that_the_loss_does_not_read_are_refused(values: dict[str, Any], field: str, words: str):
    found, message = refusal(lambda: KLSpec(**({"placement": "loss"} | BLOCK | values)))
    assert (found, words in message) == (field, True), message


def test_the_batchs_own_responses_have_no_term_and_beta_may_move():
    moving = KLSpec(placement="loss", controller=ControllerSpec(kind="dynamic"), **BLOCK)
    assert (moving.is_drawn, moving.in_loss, moving.in_reward, moving.is_exact) == (True, False, False, False)


@pytest.mark.parametrize(
    ("reference", "field"),
    [
        (ReferenceSpec(reset_every=5), "reference.reset_every"),
        (ReferenceSpec(ema=0.9), "reference.ema"),
        (ReferenceSpec(path="other"), "reference.path"),
    ],
)
def test_a_reference_that_is_not_the_starting_policy_is_refused(reference: ReferenceSpec, field: str):
    found, message = refusal(lambda: Settings(model=ModelSpec(path="m"), kl=KL, reference=reference))
    assert (found, "drawn once, from the starting policy" in message) == (field, True)
    check_drawn(replace(KL, estimator="k3"), reference, starting_model="m", lora=True)
    check_drawn(KL, ReferenceSpec(path="m"), starting_model="m")


def test_lora_is_refused():
    lora = {"actor_rollout_ref.model.lora_rank": 8}
    assert refusal(lambda: Settings(model=ModelSpec(path="m"), kl=KL, verl=lora))[0] == "kl.estimator"


@pytest.mark.parametrize(
    ("draw", "workers", "words"),
    [
        (DrawSpec(share=0.3), 1, "0.3 of an update's 64 responses is 19.2, which 1 workers cannot share equally"),
        (DrawSpec(share=0.25), 3, "which 3 workers cannot share equally. 0.234375 gives 15."),
        (DrawSpec(share=0.001), 1, "0.015625 gives 1."),
        (DrawSpec(share=0.25, prompts=1), 1, "is 16, and only 8 are drawn"),
    ],
)
def test_a_share_is_a_whole_number_of_rows_for_every_worker(draw: DrawSpec, workers: int, words: str):
    field, message = refusal(lambda: draw.per_update(64, workers))
    assert (field, words in message) == ("share", True), message


def test_a_recipe_says_where_the_share_does_not_fit():
    train = TrainSpec(prompts_per_step=16, responses_per_prompt=8, updates_per_batch=2)
    uneven = {"model": ModelSpec(path="m"), "train": train, "kl": replace(KL, draw=DrawSpec(share=0.3))}
    assert refusal(lambda: Settings(**uneven))[0] == "kl.draw.share"
    assert Settings(**(uneven | {"kl": KL})).kl.draw.per_update(64, 2) == 16


# -------------------------------------------------------------------------------------------- the loss, by hand


def nested(rows: list[Any], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.nested.as_nested_tensor([torch.tensor(row, dtype=dtype) for row in rows], layout=torch.jagged)


def test_the_loss_is_the_mean_over_responses_of_the_sum_over_tokens(loss_module: Any):
    rows = loss_module.Samples(
        prompt=[0, 1],
        sample=[0, 0],
        prompt_ids=[[7, 7], [7]],
        token_ids=[[8, 9], [8, 8, 9]],
        mask=[[True, True], [True, False, True]],
        logprobs=[[-1.0, -2.0], [-3.0, -50.0, -1.0]],
    )
    tu = importlib.import_module("verl.utils.tensordict_utils")
    data = loss_module.batch_of(rows, [0, 1], tu.get_tensordict({}, {"temperature": 0.7}))
    tu.assign_non_tensor(data, dp_size=1)
    # the log-prob of a token stands one place before it; what stands at a sequence's end is of no token
    packed = nested([[-9.0, -1.5, -2.5, 5.0], [-4.0, -70.0, -1.0, 5.0]], torch.float64).requires_grad_()
    loss, metrics = loss_module.reference_loss({"log_probs": packed}, data, beta=0.5, rows=4)
    # of 4 rows in all two are here: (1.5 + 2.5 + 4 + 1) / 4; the reference's own are (1 + 2 + 3 + 1) / 4
    assert float(loss) == pytest.approx(0.5 * 9.0 / 4)
    assert {name: float(metric.aggregate()) for name, metric in metrics.items()} == pytest.approx(
        {"reference_loss": 9.0 / 4, "reference_forward": (9.0 - 7.0) / 4}
    )
    (found,) = torch.autograd.grad(loss, packed)
    pull = -0.5 / 4
    assert found.values().tolist() == [0.0, pull, pull, 0.0, pull, 0.0, pull, 0.0]
    tu.assign_non_tensor(data, dp_size=2)  # FSDP will average over two workers
    assert float(loss_module.reference_loss({"log_probs": packed}, data, beta=0.5, rows=4)[0]) == 2 * float(loss)


def test_rows_are_computed_with_the_settings_of_the_policys_batch(loss_module: Any, samples: Any):
    settings = {"temperature": 0.7, "use_dynamic_bsz": False, "micro_batch_size_per_gpu": 3, "calculate_entropy": True}
    policy = importlib.import_module("verl.utils.tensordict_utils").get_tensordict({}, settings)
    data = loss_module.batch_of(samples, [4, 1], policy)
    assert (data["temperature"], data["micro_batch_size_per_gpu"], data["calculate_entropy"]) == (0.7, 2, False)
    assert [row.tolist() for row in data["input_ids"].unbind()] == [
        samples.prompt_ids[row] + samples.token_ids[row] for row in (4, 1)
    ]


# ------------------------------------------------------------------------------------------------ on verl's engine


@pytest.fixture(scope="module", params=[1, 2], ids=["1 worker", "2 workers"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each worker reported."""
    folder, workers = tmp_path_factory.mktemp(f"workers_{request.param}"), request.param
    save_model(folder / "policy", hidden=16, seed=0)
    found = run_workers(HERE / "reference_samples_process.py", folder, workers)
    return [{**each, "model": folder / "policy"} for each in found]


def rows_taken(loss_module: Any, update: int = 0) -> list[int]:
    return loss_module.Order(seed=SEED, rows=ROWS, first=FIRST, updates=2).of_update(update, SAMPLES)


def negative_log_likelihood(folder: Path, samples: Any, rows: list[int]) -> tuple[torch.nn.Module, Tensor, Tensor]:
    """The plain model, the mean over rows of -sum_t log pi, and of sum_t log pi_ref - log pi; a row at a time."""
    model = importlib.import_module("transformers").AutoModelForCausalLM.from_pretrained(folder)
    losses, forward = [], []
    for row in rows:
        tokens, start = samples.prompt_ids[row] + samples.token_ids[row], len(samples.prompt_ids[row])
        logits = model(torch.tensor([tokens])).logits[0] / TEMPERATURE
        chosen = logits[:-1].log_softmax(dim=-1).gather(-1, torch.tensor(tokens[1:])[:, None])[start - 1 :, 0]
        mask = torch.tensor(samples.mask[row])
        losses.append(-chosen[mask].sum())
        forward.append(torch.tensor(samples.logprobs[row])[mask].sum() - chosen[mask].sum())
    return model, torch.stack(losses).mean(), torch.stack(forward).mean()


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_rows_add_their_own_gradient_and_leave_the_policys_as_it_is(
    micro_batch: int, results: list[dict[Any, Any]], samples: Any, loss_module: Any
):
    model, loss, _ = negative_log_likelihood(results[0]["model"], samples, rows_taken(loss_module))
    (BETA * loss).backward()
    for result in results:
        alone, both = (result[kind, micro_batch]["gradients"] for kind in ("alone", "both"))
        assert any(gradient.abs().max() > 1e-3 for gradient in alone.values())
        for name, weight in model.named_parameters():
            torch.testing.assert_close(both[name] - alone[name], weight.grad, rtol=1e-4, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_the_batchs_metrics_are_what_they_are_without_the_rows(micro_batch: int, results: list[dict[Any, Any]]):
    for result in results:
        alone, both = (result[kind, micro_batch] for kind in ("alone", "both"))
        assert alone["loss"] == both["loss"]
        assert alone["metrics"] == {name: both["metrics"][name] for name in alone["metrics"]}
        assert set(both["metrics"]) - set(alone["metrics"]) == {"reference_loss", "reference_forward"}
        assert set(result["after", micro_batch]["metrics"]) == set(alone["metrics"])  # an order is for its updates


@pytest.mark.slow
def test_verls_whole_step_reports_the_rows_of_each_update(
    results: list[dict[Any, Any]], samples: Any, loss_module: Any
):
    for update in range(2):  # the second update's weights differ from the first's by a learning rate of 1e-6
        rows = rows_taken(loss_module, update)
        with torch.no_grad():
            _, loss, forward = negative_log_likelihood(results[0]["model"], samples, rows)
        for result in results:
            assert result["step"]["reference_loss"][update] == pytest.approx(float(loss), rel=1e-4)
            assert result["step"]["reference_forward"][update] == pytest.approx(float(forward), rel=1e-4)


# --------------------------------------------------------------------------------------------------------- the doctor


def test_the_doctor_finds_the_gradient_of_the_forward_kl_on_policy_and_off_policy():
    from klreg_verl import doctor
    from klreg_verl.doctor import verdict

    judged = verdict.judge("loss", "reference_samples")
    assert (judged.verdict, judged.follows, judged.level) == ("ok", "forward", "sequence")
    assert judged.follows_off_policy == "forward"
    assert judged.cosine_forward == pytest.approx(1.0)
    assert (judged.value, judged.aggregation) == ("KL(ref||pi), unbiased", "seq-mean-token-sum")
    for aggregation in ("token-mean", "seq-mean-token-mean"):  # the policy loss's, which is not this one's
        doctor.check_claim(KL, Objective(loss_aggregation=aggregation))
    with pytest.raises(ValueError, match="follows 'forward'"):
        doctor.check_claim(replace(KL, follows="reverse"))
    with pytest.raises(ValueError, match="is for the loss only"):
        verdict.judge("reward", "reference_samples")
