"""One worker of tests/test_worker.py, in a process of its own: `python reference_process.py FOLDER RANK WORKERS`.

The worker is verl's actor and reference as KLRegWorker builds them, FSDP2 over gloo, without Ray and without vLLM. What
it saw goes to FOLDER/result_RANK.pt; the assertions are the tests'.
"""

from __future__ import annotations

import importlib
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from verl_stack import FILES, compose, spec

from klreg_verl.experiment.kl_settings import KLSpec, ReferenceSpec
from klreg_verl.experiment.plan import RunSpec
from klreg_verl.experiment.settings import ResourcesSpec, TrainSpec

TEMPERATURE, EMA, TOP_K = 0.7, 0.9, 5
PROMPTS, RESPONSES = (3, 2, 4, 2), (4, 5, 2, 3)
"""Lengths of four sequences; with two workers each gets two of them."""
ESTIMATORS = ("full_reverse", "full_forward", "topk_reverse", "topk_forward")


def main(folder: Path, rank: int, workers: int) -> None:
    result: dict[str, Any] = {}
    worker = build(folder / "policy", workers, ReferenceSpec(ema=EMA))
    data = micro_batch(rank, workers)
    follow(worker, data, folder, result)
    for remove_padding in (False, True):
        for estimator in ESTIMATORS:
            result[estimator, remove_padding] = exact(worker, data, estimator, remove_padding)
    half_precision(folder, result)
    if workers == 1:
        other_model(folder, data, result)
    torch.save(result, folder / f"result_{rank}.pt")


def build(model: Path, workers: int, reference: ReferenceSpec, **changes: Any) -> Any:
    """verl's worker with an actor and a reference. The role is set late: an assertion of verl's knows no such pair."""
    run: RunSpec = spec(
        train=TrainSpec(max_prompt_tokens=4, max_response_tokens=8, prompts_per_step=2, responses_per_prompt=2),
        resources=ResourcesSpec(gpus_per_node=workers),
    )
    overrides = importlib.import_module("klreg_verl.verl_hooks.overrides")
    files = overrides.Files(train=FILES.train, val=FILES.val, model=model, checkpoints=FILES.checkpoints)
    config = compose({**overrides.settings(run, files, "cpu"), **changes}).actor_rollout_ref
    module = importlib.import_module("klreg_verl.verl_hooks.worker")
    omegaconf = importlib.import_module("omegaconf")
    with omegaconf.open_dict(config):
        config.klreg = {"path": reference.path, "moves": reference.moves}
    worker = module.KLRegWorker(config=config, role="actor_rollout_ref")
    worker.role = "actor_ref"
    worker.init_model()
    return worker


def sequences(seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    lengths = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    return [torch.randint(0, 256, (length,), generator=draw) for length in lengths]


def micro_batch(rank: int, workers: int) -> Any:
    """This worker's rows as verl gets them from the TransferQueue."""
    tu = importlib.import_module("verl.utils.tensordict_utils")
    rows = range(len(PROMPTS))[rank::workers]
    tokens = [sequences()[row] for row in rows]
    cut = [PROMPTS[row] for row in rows]

    def nested(tensors: list[Tensor]) -> Tensor:
        return torch.nested.as_nested_tensor(tensors, layout=torch.jagged)

    fields = {
        "input_ids": nested(tokens),
        "position_ids": nested([torch.arange(len(row)) for row in tokens]),
        "loss_mask": nested([(torch.arange(len(row)) >= at).long() for row, at in zip(tokens, cut, strict=True)]),
        "prompts": nested([row[:at] for row, at in zip(tokens, cut, strict=True)]),
        "responses": nested([row[at:] for row, at in zip(tokens, cut, strict=True)]),
        "response_mask": nested([torch.ones(len(row) - at).long() for row, at in zip(tokens, cut, strict=True)]),
    }
    flags = {
        "temperature": TEMPERATURE,
        "compute_loss": False,
        "calculate_entropy": False,
        "global_token_num": [len(row) for row in tokens],
        "global_batch_size": len(PROMPTS),
    }
    return tu.get_tensordict(fields, flags)


def full_weights(module: torch.nn.Module) -> dict[str, Tensor]:
    """Every weight, gathered, as a copy."""
    local_shards = importlib.import_module("klreg_verl.verl_hooks.reference").local_shards
    local_shards(module)
    return {name: weight.detach().full_tensor().clone() for name, weight in module.named_parameters()}


def scale(module: torch.nn.Module, factor: float) -> None:
    """An "update" that does not depend on the number of workers."""
    for weight in importlib.import_module("klreg_verl.verl_hooks.reference").local_shards(module).values():
        weight.mul_(factor)


def follow(worker: Any, data: Any, folder: Path, result: dict[str, Any]) -> None:
    """Save the frozen reference, reset it, average it three times, and go back to a checkpoint."""
    policy, reference = worker.actor.engine.module, worker.ref.engine.module
    result["start"] = full_weights(policy), full_weights(reference)
    result["start hash"] = worker.reference_hash()
    result["frozen"] = worker.save_reference(str(folder / "frozen"))
    result["start logprobs"] = logprobs(worker, data)

    scale(policy, 1.05)
    result["reset"] = worker.move_reference(step=3, reset=True, ema=None)
    result["reset weights"] = full_weights(policy), full_weights(reference)
    result["reset logprobs"] = logprobs(worker, data)
    result["reset hash"] = worker.reference_hash()
    worker.save_reference(str(folder / "reset"))

    result["averages"] = []
    for step in (4, 5, 6):
        scale(policy, 1.01)
        moved = worker.move_reference(step=step, reset=False, ema=EMA)
        result["averages"].append((full_weights(policy), full_weights(reference), moved))
    result["average logprobs"] = logprobs(worker, data)
    result["average hash"] = worker.reference_hash()
    worker.save_reference(str(folder / "average"))

    worker.load_reference(str(folder / "reset"))
    result["restored"] = full_weights(reference), worker.reference_hash(), worker.reference.moved_at
    worker.load_reference(str(folder / "average"))
    result["restored average"] = full_weights(reference), worker.reference_hash(), worker.reference.moved_at
    result["refused"] = refused(lambda: worker.load_reference(str(folder / "frozen")))
    result["both rules"] = refused(lambda: worker.move_reference(step=1, reset=True, ema=EMA))


def refused(call: Any) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def logprobs(worker: Any, data: Any) -> tuple[Tensor, Tensor]:
    """(policy's, reference's) packed log-probs of this worker's rows, through verl's own calls."""
    policy, reference = worker.compute_log_prob(data.copy()), worker.compute_ref_log_prob(data.copy())
    return policy["log_probs"].values(), reference["log_probs"].values()


def exact(worker: Any, data: Any, estimator: str, remove_padding: bool) -> dict[str, Any]:
    """What the loss finds in the model output, and the gradient of its sum over response tokens."""
    names = importlib.import_module("klreg_verl.verl_hooks.names")
    with_logits = importlib.import_module("klreg_verl.verl_hooks.exact").with_logits
    tu = importlib.import_module("verl.utils.tensordict_utils")
    seen: dict[str, Any] = {}
    top_k = TOP_K if estimator.startswith("topk") else None
    kl = KLSpec(placement="loss", estimator=estimator, follows="none", beta=1.0, top_k=top_k)
    worker.set_loss_fn(loss_fn=with_logits(partial(summed, seen=seen), kl, probe=True))
    batch = data.copy()
    flags = {"use_remove_padding": remove_padding, "use_dynamic_bsz": False, "micro_batch_size_per_gpu": len(data) // 2}
    tu.assign_non_tensor(batch, **flags, distillation_use_topk=True)
    engine = worker.actor.engine
    with engine.train_mode():
        engine.optimizer_zero_grad()
        engine.forward_backward_batch(batch, loss_function=worker.actor.loss_fn)
        gradients = {name: weight.grad.full_tensor().clone() for name, weight in engine.module.named_parameters()}
    return {
        "values": torch.cat(seen[names.EXACT]),
        "probe": torch.cat(seen[names.EXACT_REVERSE]),
        "gradients": gradients,
        "weights": (full_weights(engine.module), full_weights(worker.ref.engine.module)),
    }


def summed(*, model_output: dict[str, Tensor], data: Any, dp_group: Any, seen: dict[str, Any]) -> tuple[Tensor, dict]:
    """A loss of the exact divergences alone; the token's own place is one before it."""
    padding = importlib.import_module("verl.workers.utils.padding")
    names = importlib.import_module("klreg_verl.verl_hooks.names")
    for name in (names.EXACT, names.EXACT_REVERSE):
        seen.setdefault(name, []).append(model_output[name].values().detach())
    # dp_size: FSDP averages the gradients over workers
    return padding.no_padding_2_padding(model_output[names.EXACT], data).sum() * data["dp_size"], {}


def half_precision(folder: Path, result: dict[str, Any]) -> None:
    """A reference in bfloat16 on FSDP2's CPU offload beside a float32 policy: without verl, which offers it as well."""
    transformers = importlib.import_module("transformers")
    fsdp = importlib.import_module("torch.distributed.fsdp")
    ours = importlib.import_module("klreg_verl.verl_hooks.reference")
    policy, reference = (
        transformers.AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    fsdp.fully_shard(policy)
    fsdp.fully_shard(reference, offload_policy=fsdp.CPUOffloadPolicy(pin_memory=False))
    weights = ours.Reference(reference)
    result["replicated hash"] = replicated_hash(folder)
    start = full_weights(reference)
    tokens = sequences()[0].unsqueeze(0)
    with torch.no_grad():
        reference(tokens)  # FSDP leaves this module whole, as it does verl's with reshard_after_forward=False
    scale(policy, 1.05)
    for step in range(1, 21):
        weights.move(policy, step, ema=0.99)
    weights.save(folder / "half")
    moved = full_weights(reference)
    with torch.no_grad():
        logits = reference(tokens).logits[0]
    again = ours.Reference(reference)
    scale(reference, 0.5)
    again.load(folder / "half")
    restored = full_weights(reference)
    weights.move(policy, 21, ema=0.99)  # the one that never stopped
    went_on = full_weights(reference)
    again.load(folder / "half")
    again.move(policy, 21, ema=0.99)
    result["half"] = {
        "policy": full_weights(policy),
        "start": start,
        "moved": moved,
        "logits": logits,
        "restored": restored,
        "went on": went_on,
        "resumed and went on": full_weights(reference),
    }


def replicated_hash(folder: Path) -> str:
    """Of the policy, held whole by each worker (FSDP2's hybrid sharding with shards of one)."""
    auto = importlib.import_module("transformers").AutoModelForCausalLM
    mesh = importlib.import_module("torch.distributed.device_mesh").init_device_mesh
    model = auto.from_pretrained(folder / "policy", dtype=torch.float32)
    names = ("ddp", "fsdp")
    importlib.import_module("torch.distributed.fsdp").fully_shard(
        model, mesh=mesh("cpu", (torch.distributed.get_world_size(), 1), mesh_dim_names=names)
    )
    return importlib.import_module("klreg_verl.verl_hooks.reference").weights_hash(model)


def other_model(folder: Path, data: Any, result: dict[str, Any]) -> None:
    """A reference of another shape, which can be measured against and cannot follow."""
    other = str(folder / "other")
    worker = build(folder / "policy", 1, ReferenceSpec(path=other))
    result["other logprobs"] = logprobs(worker, data)
    result["other cannot move"] = refused(lambda: worker.move_reference(step=1, reset=True, ema=None))
    build_moving = partial(build, folder / "policy", 1, ReferenceSpec(path=other, reset_every=1))
    result["other may not be told to move"] = refused(build_moving)


if __name__ == "__main__":
    os.environ |= {"RANK": sys.argv[2], "WORLD_SIZE": sys.argv[3], "MASTER_ADDR": "localhost"}
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
