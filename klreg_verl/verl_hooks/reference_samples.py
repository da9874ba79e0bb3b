"""Responses of the reference for the arm whose loss is the forward KL's own: drawn, stored, and put into every update.

    before update 1   draw.prompts x draw.per_prompt responses of the starting policy, in vLLM, every request seeded
    run folder        reference_samples.parquet, and reference_samples.json with its sha256: the same after a resume
    every update      the next draw.share of them, by a seeded order that begins anew after its end

-E_ref[sum_t log pi(y_t)] is KL(ref || pi) plus the reference's entropy, which no update changes. The rows stand outside
the batch: in no group, no metric of the batch and no controller. What the workers do with them is reference_loss.py's.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import transfer_queue as tq
from tensordict import TensorDict
from verl.utils.dataset.rl_dataset import collate_fn
from verl.utils.tensordict_utils import assign_non_tensor_data, get_tensordict

from klreg_verl.experiment.kl_settings import DrawSpec, check_drawn
from klreg_verl.experiment.store import atomic_write, write_json
from klreg_verl.verl_hooks import names
from klreg_verl.verl_hooks.reference_loss import Order, Samples, shuffled

FILE = "reference_samples.parquet"
RECORD = "reference_samples.json"
STEP = 0
"""The step that the draw's seeds are hashed from; training starts at 1."""
PARTITION = "train"
"""verl's name for requests at the training temperature."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What decides the draw. Stored samples are used by a run that asks for the same."""

    prompts: int
    per_prompt: int
    seed: int
    temperature: float
    max_response_tokens: int
    reference: str | None
    """Hash of the reference's weights; None where it is not known."""


# ------------------------------------------------------------------------------------------------------ the trainer's


def prepare(trainer: Any) -> None:
    """Before the first update: draw the samples, or read those of this run, and hand them to the workers.

    Args:
        trainer: KLRegTrainer, with vLLM awake and `global_steps` at the step to come.

    Raises:
        ValueError: the arm cannot be trained with these settings, or the stored samples are not this run's.
        RuntimeError: sampling failed.
    """
    if not trainer.kl.is_drawn:
        return
    check(trainer)
    folder, asked = folder_of(trainer), asked_by(trainer)
    samples = read(folder, asked)
    if samples is None:
        if trainer.global_steps > 1:
            raise ValueError(
                f"{folder / RECORD} is missing, and this run goes on at step {trainer.global_steps}: its policy is not "
                "the reference any more. Restore the file, or start anew."
            )
        samples = draw(trainer, trainer.kl.draw)
        write(folder, samples, asked)
    print(f"[klreg] {len(samples)} responses of the reference, {tokens(samples)} tokens: {folder / FILE}", flush=True)
    trainer.actor_rollout_wg.hold_reference_samples(samples)


def begin_update(trainer: Any) -> None:
    """Before a step's updates: which rows come next, and beta. In other arms nothing happens."""
    if not trainer.kl.is_drawn:
        return
    number = updates(trainer.config)
    order = Order(
        seed=int(trainer.config.data.seed or 0),
        rows=rows_per_update(trainer),
        first=(trainer.global_steps - 1) * number,
        updates=number,
    )
    trainer.actor_rollout_wg.follow_reference_samples(order, trainer.beta.now)


def logged(metrics: Mapping[str, float], beta: float) -> dict[str, float]:
    """The workers' numbers under our keys: the forward KL on the update's rows, and beta times it."""
    forward = metrics.get("actor/reference_forward")
    return {} if forward is None else {"kl_ref/forward_sampled": forward, "kl/penalty": beta * forward}


def check(trainer: Any) -> None:
    """ValueError where responses drawn once would not be the reference's, or cannot be shared by the workers."""
    check_drawn(
        trainer.kl,
        trainer.block.reference,
        starting_model=trainer.config.actor_rollout_ref.model.path,
        lora=trainer.ref_in_actor,
    )
    if trainer.processor is not None:
        raise ValueError("kl.estimator=reference_samples stores token ids, and this model also reads images.")
    rows_per_update(trainer)


def rows_per_update(trainer: Any) -> int:
    """Rows added to each update, over all workers."""
    config = trainer.config.actor_rollout_ref
    responses = config.actor.ppo_mini_batch_size * config.rollout.n
    return trainer.kl.draw.per_update(responses, trainer.actor_rollout_wg.world_size)


def updates(config: Any) -> int:
    """Optimizer updates in a step."""
    actor = config.actor_rollout_ref.actor
    return config.data.train_batch_size // actor.ppo_mini_batch_size * actor.ppo_epochs


def folder_of(trainer: Any) -> Path:
    """The run folder; verl's folder of checkpoints where there is none."""
    if trainer.recorder is not None:
        return trainer.recorder.folder.path
    return Path(trainer.config.trainer.default_local_dir)


def asked_by(trainer: Any) -> Asked:
    """What this run's samples must have been drawn with."""
    config = trainer.config
    return Asked(
        prompts=trainer.kl.draw.prompts,
        per_prompt=trainer.kl.draw.per_prompt,
        seed=int(config.data.seed or 0),
        temperature=float(config.actor_rollout_ref.rollout.temperature),
        max_response_tokens=int(config.data.max_response_length),
        reference=trainer.reference_hash,
    )


# -------------------------------------------------------------------------------------------------------- the files


def write(folder: Path, samples: Samples, asked: Asked) -> None:
    """Both files, each atomically; the record is last, and without it the samples do not count."""
    table = pa.table({entry.name: getattr(samples, entry.name) for entry in fields(samples)}, schema=_SCHEMA)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / FILE, buffer.getvalue())
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    counted = {"responses": len(samples), "tokens": tokens(samples), "ids_sha256": hash_of_ids(samples)}
    write_json(folder / RECORD, {"sha256": digest, **counted, **asdict(asked)})


def hash_of_ids(samples: Samples) -> str:
    """Of prompts and responses alone: the same in two runs that drew the same, whose log-probs differ in last bits."""
    return hashlib.sha256(json.dumps([samples.prompt_ids, samples.token_ids]).encode()).hexdigest()


def read(folder: Path, asked: Asked) -> Samples | None:
    """The samples of a folder; None where there is no record.

    Raises:
        ValueError: the file is not the one that was recorded, or was drawn otherwise than `asked`.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    record = json.loads(path.read_text())
    wrong = {name: (record.get(name), value) for name, value in asdict(asked).items() if record.get(name) != value}
    if wrong:
        found = "; ".join(f"{name} {there!r} there, {here!r} here" for name, (there, here) in wrong.items())
        raise ValueError(f"{path}: the samples were drawn otherwise ({found}). Move both files away, and start anew.")
    content = (folder / FILE).read_bytes() if (folder / FILE).is_file() else b""
    if hashlib.sha256(content).hexdigest() != record["sha256"]:
        raise ValueError(
            f"{folder / FILE} is not the file whose sha256 {path} holds: it was changed or lost. Restore it, or move "
            "both files away and start anew."
        )
    return Samples(**pq.read_table(io.BytesIO(content), schema=_SCHEMA).to_pydict())


_IDS = pa.list_(pa.int64())
_SCHEMA = pa.schema(
    {
        **{"prompt": pa.int64(), "sample": pa.int64(), "prompt_ids": _IDS, "token_ids": _IDS},
        **{"mask": pa.list_(pa.bool_()), "logprobs": pa.list_(pa.float64())},
    }
)


def tokens(samples: Samples) -> int:
    """How many tokens the reference wrote."""
    return sum(map(sum, samples.mask))


# ---------------------------------------------------------------------------------------------------------- the draw


def draw(trainer: Any, spec: DrawSpec) -> Samples:
    """Sample from the policy that vLLM holds, as a training step would, and leave no trace in the queue or in vLLM.

    The training data's own order, its iterator and the seeds of later steps are not touched.

    Raises:
        ValueError: there are fewer training prompts than asked for, or a response has several outputs.
        RuntimeError: a request failed.
    """
    data, seed = trainer.train_dataset, int(trainer.config.data.seed or 0)
    if spec.prompts > len(data):
        raise ValueError(f"kl.draw.prompts={spec.prompts}: there are {len(data)} training prompts.")
    chosen = shuffled(len(data), f"{seed}/reference prompts")[: spec.prompts]
    uids = [str(uuid.uuid4()) for _ in chosen]
    try:
        submit(trainer.agent_loop_manager, [data[row] for row in chosen], uids, spec.per_prompt)
        keys = wait(uids, spec.per_prompt, trainer.replay_buffer.poll_interval)
        samples = fetch(keys, dict(zip(uids, chosen, strict=True)))
    finally:
        clear(uids)
    trainer.checkpoint_manager.sleep_replicas()  # vLLM forgets the prompts that it has seen
    trainer.checkpoint_manager.update_weights(STEP)
    return samples


def submit(manager: Any, prompts: Sequence[dict[str, Any]], uids: Sequence[str], per_prompt: int) -> None:
    """Register the prompts as verl's `_submit_batch_to_rollout` does, and dispatch them."""
    batch: TensorDict = get_tensordict({**collate_fn(list(prompts)), "uid": _objects(uids)})
    assign_non_tensor_data(batch, "global_steps", STEP)
    assign_non_tensor_data(batch, "__rollout_n__", per_prompt)
    tags = [{"is_prompt": True, "status": "pending", "global_steps": STEP} for _ in uids]
    tq.kv_batch_put(keys=list(uids), partition_id=PARTITION, tags=tags)
    manager.generate_sequences(batch)


def _objects(texts: Sequence[str]) -> np.ndarray:
    return np.array(texts, dtype=object)


def wait(uids: Sequence[str], per_prompt: int, poll_seconds: float) -> list[str]:
    """The keys of all responses, ordered by (prompt, sample), once all are there."""
    place = {uid: row for row, uid in enumerate(uids)}
    while True:
        tags = tq.kv_list(PARTITION)[PARTITION]
        status = {tags[uid]["status"] for uid in uids}
        if status <= {"finished", "failure"}:
            break
        time.sleep(poll_seconds)
    split = [key.rsplit("_", 2) for key in tags if key not in place]
    found = sorted((place[uid], int(sample), int(output)) for uid, sample, output in split if uid in place)
    if any(output for *_, output in found):
        raise ValueError("An agent loop returned several outputs for one response. Use one with one output.")
    if "failure" in status or len(found) != len(uids) * per_prompt:
        raise RuntimeError(
            f"Of {len(uids) * per_prompt} responses of the reference only {len(found)} came back. The log says why."
        )
    return [f"{uids[row]}_{sample}_{output}" for row, sample, output in found]


def fetch(keys: Sequence[str], row_of: Mapping[str, int]) -> Samples:
    """Read the responses from the TransferQueue."""
    wanted = [names.PROMPTS, names.RESPONSES, names.RESPONSE_MASK, names.ROLLOUT_LOGPROBS]
    data = tq.kv_batch_get(keys=list(keys), partition_id=PARTITION, select_fields=wanted)
    prompt_ids, token_ids, masks, logprobs = ([row.tolist() for row in data[name].unbind()] for name in wanted)
    places = [key.rsplit("_", 2) for key in keys]
    return Samples(
        prompt=[row_of[uid] for uid, *_ in places],
        sample=[int(sample) for _, sample, _ in places],
        prompt_ids=prompt_ids,
        token_ids=token_ids,
        mask=[[bool(one) for one in mask] for mask in masks],
        logprobs=[[float(one) for one in row] for row in logprobs],
    )


def clear(uids: Sequence[str]) -> None:
    """Take the prompts and their responses out of the queue."""
    mine = set(uids)
    keys = [key for key in tq.kv_list(PARTITION).get(PARTITION, {}) if key in mine or key.rsplit("_", 2)[0] in mine]
    if keys:
        tq.kv_clear(keys=keys, partition_id=PARTITION)
