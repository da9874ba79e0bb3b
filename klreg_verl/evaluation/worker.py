"""The process that holds vLLM: samples what is missing of some evaluations and writes it down in parts.

It gets one JSON object on its standard input (`Order`), and tells its progress on what was its standard output; what
vLLM and torch print goes to its standard error, the log. It dies with the process that started it.

All evaluations of an order are of models that differ in their weights alone: vLLM starts once and loads the others'
weights in place.

    {"event": "ready", "seconds": 11.2}         vLLM is up
    {"event": "model", "job": 0}                its weights are loaded
    {"event": "sampled", "job": 0, "new": 64}   so many samples more are on the disk
    {"event": "done"}
    {"event": "failed", "reason": "..."}        and exit code 1
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klreg_verl.evaluation import store

PR_SET_PDEATHSIG = 1
PART_SAMPLES = 512
"""Samples in a part."""
PART_SECONDS = 20.0
"""A part is written at least so often while samples come in."""

Tell = Callable[..., None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One evaluation: a model on the prompts of a file."""

    model: str
    data: str
    parts: str
    prompts: int | None
    samples: int
    temperature: float
    top_p: float
    max_tokens: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Order:
    """All that the process is told."""

    jobs: tuple[Job, ...]
    platform: str
    tensor_parallel: int
    memory_share: float
    trust_remote_code: bool

    @classmethod
    def from_json(cls, text: str) -> Order:
        """The inverse of json.dumps(asdict(order))."""
        values = json.loads(text)
        return cls(**{**values, "jobs": tuple(Job(**job) for job in values["jobs"])})


def main() -> None:
    """Read the order, sample, tell."""
    die_with_parent()
    tell = speaker()
    order = Order.from_json(sys.stdin.readline())
    try:
        work(order, tell)
    except Exception as error:  # vLLM raises anything
        traceback.print_exc()  # before the message, at which this process is ended
        tell(event="failed", reason=f"{type(error).__name__}: {error}")
        raise SystemExit(1) from None
    tell(event="done")


def die_with_parent() -> None:
    """The kernel kills this process when the one that started it is gone (Linux)."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent or parent == 1:
        raise SystemExit("The process that started this one is gone.")


def speaker() -> Tell:
    """Messages go to what is standard output now; whatever prints there from now on goes to standard error."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(**message: Any) -> None:
        stream.write(json.dumps(message) + "\n")
        stream.flush()

    return tell


def work(order: Order, tell: Tell) -> None:
    """Sample job after job."""
    if order.platform == "cpu":
        from klreg_verl.verl_hooks import cpu

        cpu.activate_vllm()
    prompts = [_prompts(job, order.trust_remote_code) for job in order.jobs]
    begun = time.monotonic()
    engine = start(order, prompts)
    tell(event="ready", seconds=time.monotonic() - begun)
    loaded = order.jobs[0].model
    for number, (job, ids) in enumerate(zip(order.jobs, prompts, strict=True)):
        if job.model != loaded:
            load_weights(engine, job.model)
            loaded = job.model
        tell(event="model", job=number)
        for new in sample(engine, job, ids):
            tell(event="sampled", job=number, new=new)


def _prompts(job: Job, trust_remote_code: bool) -> list[list[int]]:
    """Token ids, as training feeds them."""
    from transformers import AutoTokenizer

    from klreg_verl.replay import prompts

    tokenizer = AutoTokenizer.from_pretrained(job.model, local_files_only=True, trust_remote_code=trust_remote_code)
    return prompts.read(Path(job.data), tokenizer, job.prompts)


def start(order: Order, prompts: list[list[list[int]]]) -> Any:
    """vLLM with the first job's model, as long as the longest prompt and response of all jobs."""
    from vllm import LLM

    lengths = [max(map(len, ids)) + job.max_tokens for job, ids in zip(order.jobs, prompts, strict=True)]
    on_cpu: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 256}
    return LLM(
        model=order.jobs[0].model,
        max_model_len=max(lengths),
        tensor_parallel_size=order.tensor_parallel,
        gpu_memory_utilization=order.memory_share,
        trust_remote_code=order.trust_remote_code,
        seed=0,  # every request has its own
        **(on_cpu if order.platform == "cpu" else {}),
    )


def load_weights(engine: Any, folder: str) -> None:
    """Another model's weights into the running engine; what it remembers of prompts belongs to the old ones."""
    engine.collective_rpc("reload_weights", kwargs={"weights_path": folder})
    if not engine.reset_prefix_cache():
        raise RuntimeError("vLLM did not forget its cache of prompts, which belongs to the weights before.")


def sample(engine: Any, job: Job, prompts: list[list[int]]) -> Iterator[int]:
    """Draw what is missing; yields the number of samples after each part that is on the disk."""
    folder = Path(job.parts)
    wanted = store.missing(store.read_parts(folder), len(prompts), job.samples)
    rows: store.Rows = []
    written = time.monotonic()
    for row in _drawn(engine, job, prompts, wanted):
        rows.append(row)
        if len(rows) >= PART_SAMPLES or time.monotonic() > written + PART_SECONDS:
            store.write_part(folder, rows)
            yield len(rows)
            rows, written = [], time.monotonic()
    if rows:
        store.write_part(folder, rows)
        yield len(rows)


def _drawn(engine: Any, job: Job, prompts: list[list[int]], wanted: list[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """The samples as they are finished: new requests enter while others are under way, and nothing waits for a part."""
    core, waiting = engine.llm_engine, iter(wanted)
    under_way = 0
    while True:
        for prompt, number in itertools.islice(waiting, MOST_UNDER_WAY - under_way):
            core.add_request(f"{prompt}-{number}", {"prompt_token_ids": prompts[prompt]}, _params(job, prompt, number))
            under_way += 1
        if not under_way:
            return
        for output in core.step():
            if output.finished:
                under_way -= 1
                yield _row(output, job)


MOST_UNDER_WAY = 4096
"""Requests that vLLM is given at a time; it runs as many as fit."""


def _params(job: Job, prompt: int, number: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=job.temperature,
        top_p=job.top_p,
        max_tokens=job.max_tokens,
        seed=store.request_seed(job.seed, prompt, number),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _row(output: Any, job: Job) -> dict[str, Any]:
    """One sample as a row of a part."""
    prompt, number = map(int, output.request_id.split("-")[:2])
    (response,) = output.outputs
    return {
        "prompt": prompt,
        "sample": number,
        "seed": store.request_seed(job.seed, prompt, number),
        "response": response.text,
        "tokens": len(response.token_ids),
        "truncated": response.finish_reason == "length",
    }


if __name__ == "__main__":
    main()
