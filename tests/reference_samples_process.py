"""One worker of tests/test_reference_samples.py: `python reference_samples_process.py FOLDER RANK WORKERS`.

verl's actor as KLRegWorker builds it, FSDP2 over gloo, without Ray and vLLM. It works through a batch of four
responses of the policy with and without the reference's, and writes what it saw to FOLDER/result_RANK.pt.
"""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from reference_process import PROMPTS, RESPONSES, build, full_weights, micro_batch, sequences
from torch import Tensor

from klreg_verl.experiment.kl_settings import KLSpec, ReferenceSpec

BETA, SAMPLES, ROWS, FIRST, SEED = 0.3, 10, 4, 3, 5
"""Of ten stored responses every update takes four; three updates were made before."""
KL = KLSpec(placement="loss", estimator="reference_samples", follows="forward", beta=BETA)


def main(folder: Path, rank: int, workers: int) -> None:
    loss_module = importlib.import_module("klreg_verl.verl_hooks.reference_loss")
    worker = build(folder / "policy", workers, ReferenceSpec())
    worker.set_loss_fn(loss_fn=policy_loss(worker))
    worker.hold_reference_samples(samples())
    result: dict[str, Any] = {"weights": full_weights(worker.actor.engine.module)}
    order = partial(loss_module.Order, seed=SEED, rows=ROWS, first=FIRST)
    for size in (1, 2):
        worker.follow_reference_samples(order(updates=0), BETA)
        result["alone", size] = backward(worker, policy_batch(worker, rank, workers), size)
        worker.follow_reference_samples(order(updates=1), BETA)
        result["both", size] = backward(worker, policy_batch(worker, rank, workers), size)
        result["after", size] = backward(worker, policy_batch(worker, rank, workers), size)
    worker.follow_reference_samples(order(updates=2), BETA)
    result["step"] = update(worker, policy_batch(worker, rank, workers), mini_batch=2)
    torch.save(result, folder / f"result_{rank}.pt")


def samples() -> Any:
    """Ten made-up responses of the reference, of ragged lengths; the third has a token that a tool wrote."""
    draw = torch.Generator().manual_seed(1)
    lengths = [(2 + row % 3, 1 + row % 4) for row in range(SAMPLES)]
    masks = [[True] * response for _, response in lengths]
    masks[2][1] = False

    def ids(length: int) -> list[int]:
        return torch.randint(0, 256, (length,), generator=draw).tolist()

    return importlib.import_module("klreg_verl.verl_hooks.reference_loss").Samples(
        prompt=list(range(SAMPLES)),
        sample=[0] * SAMPLES,
        prompt_ids=[ids(prompt) for prompt, _ in lengths],
        token_ids=[ids(response) for _, response in lengths],
        mask=masks,
        logprobs=[(-0.5 * torch.rand(response, generator=draw)).tolist() for _, response in lengths],
    )


def policy_loss(worker: Any) -> Any:
    """The loss that the trainer sends: verl's, since this estimator is none of the batch's own."""
    omega = importlib.import_module("verl.utils.config").omega_conf_to_dataclass
    config = omega(worker.config.actor)
    object.__setattr__(config, "use_kl_loss", False)
    loss = importlib.import_module("klreg_verl.verl_hooks.loss").actor_loss
    return partial(loss, config=config, kl=KL, beta=BETA)


def policy_batch(worker: Any, rank: int, workers: int) -> Any:
    """This worker's of four responses, with the old policy's log-probs and an advantage for every response."""
    tu = importlib.import_module("verl.utils.tensordict_utils")
    data = micro_batch(rank, workers)
    rows = range(len(PROMPTS))[rank::workers]
    found = worker.compute_log_prob(data.copy())["log_probs"].unbind()

    def nested(tensors: list[Tensor]) -> Tensor:
        return torch.nested.as_nested_tensor(tensors, layout=torch.jagged)

    cut = [(PROMPTS[row], RESPONSES[row]) for row in rows]
    old = [each[at - 1 : at - 1 + length] for each, (at, length) in zip(found, cut, strict=True)]
    data["old_log_probs"] = nested(old)
    data["advantages"] = nested([torch.full((RESPONSES[row],), 1.0 - 0.7 * row) for row in rows])
    data["ref_log_prob"] = nested([each - 0.1 for each in old])
    tu.assign_non_tensor(data, use_remove_padding=False, use_dynamic_bsz=False)
    assert len(sequences()) == len(PROMPTS)
    return data


def backward(worker: Any, data: Any, size: int) -> dict[str, Any]:
    """Gradients and metrics of one batch, before any optimizer step."""
    engine, part = worker.actor.engine, worker.actor.reference_loss
    importlib.import_module("verl.utils.tensordict_utils").assign_non_tensor(data, micro_batch_size_per_gpu=size)
    with engine.train_mode():
        engine.optimizer_zero_grad()
        with part.added() if part else nullcontext():
            output = engine.forward_backward_batch(data, loss_function=worker.actor.loss_fn)
        gradients = {name: weight.grad.full_tensor().clone() for name, weight in engine.module.named_parameters()}
    metrics = {
        name: float(metric.aggregate()) for name, metric in output["metrics"].items() if hasattr(metric, "values")
    }
    return {"gradients": gradients, "metrics": metrics, "loss": sum(output["loss"])}


def update(worker: Any, data: Any, mini_batch: int) -> dict[str, Any]:
    """verl's whole step: two updates of two responses each."""
    tu = importlib.import_module("verl.utils.tensordict_utils")
    flags = {"global_batch_size": mini_batch, "mini_batch_size": mini_batch, "epochs": 1, "seed": 0}
    tu.assign_non_tensor(data, **flags, dataloader_kwargs={"shuffle": False}, micro_batch_size_per_gpu=1)
    del data["global_token_num"]
    return dict(worker.update_actor(data)["metrics"])


if __name__ == "__main__":
    os.environ |= {"RANK": sys.argv[2], "WORLD_SIZE": sys.argv[3], "MASTER_ADDR": "localhost"}
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
