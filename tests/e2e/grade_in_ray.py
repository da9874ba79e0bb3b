"""Grades responses in verl's own reward worker, an actor on the Ray of RAY_ADDRESS, and prints one JSON list of grades.

python grade_in_ray.py MODEL_FOLDER MANAGER ROWS      rows as JSON: [[data_source, response, ground_truth], ...]
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import ray
import torch
from verl_stack import compose, import_verl

RESPONSE_TOKENS = 96


def config(folder: str, manager: str) -> Any:
    return compose(
        {
            "actor_rollout_ref.model.path": folder,
            "reward.custom_reward_function.path": "pkg://data_prep.rewards",
            "reward.custom_reward_function.name": "compute_score",
            "reward.reward_manager.name": manager,
            "reward.num_workers": 1,
        }
    )


def batch(rows: list[list[str]], tokenizer: Any) -> Any:
    from verl.protocol import DataProto

    ids = [tokenizer(response)["input_ids"] for _, response, _ in rows]
    responses = torch.tensor([entry + [0] * (RESPONSE_TOKENS - len(entry)) for entry in ids])
    return DataProto.from_dict(
        {"responses": responses, "attention_mask": (responses != 0).long()},
        {
            "data_source": np.array([source for source, _, _ in rows], dtype=object),
            "reward_model": np.array([{"style": "rule", "ground_truth": truth} for *_, truth in rows], dtype=object),
            "extra_info": np.array([{"index": place} for place in range(len(rows))], dtype=object),
        },
    )


def main(folder: str, manager: str, rows: str) -> None:
    import_verl()
    from transformers import AutoTokenizer
    from verl.experimental.reward_loop.reward_loop import RewardLoopWorker

    ray.init()
    worker = ray.remote(RewardLoopWorker).remote(config(folder, manager))
    data = batch(json.loads(rows), AutoTokenizer.from_pretrained(folder))
    results = ray.get(worker.compute_score_batch.remote(data), timeout=600)
    print(json.dumps([{"reward": one["reward_score"], **one["reward_extra_info"]} for one in results]))


if __name__ == "__main__":
    main(*sys.argv[1:])
