"""What is sent from the trainer to the sampler, in what bucket, and that nobody waits for a sampler that has failed."""

from __future__ import annotations

import asyncio
import functools
import importlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import need_transformers
from verl_stack import FILES, import_verl, need_stack, spec

from klreg_verl.verl_hooks import overrides, transfer

FAMILIES = ("Llama", "Qwen2", "Qwen3", "Gemma3Text")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def random_model(family: str, *, tied: bool) -> torch.nn.Module:
    """Two layers of width 32; the embedding is the largest matrix with 1,000 x 32 numbers."""
    need_transformers()
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=1000,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=tied,
    )
    return getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")(config)


def engine_of(model: torch.nn.Module) -> Any:
    """As verl's engine hands out the weights of a whole model."""
    return SimpleNamespace(module=model, get_per_tensor_param=lambda **_: (iter(model.state_dict().items()), None))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_head_is_not_sent_and_all_else_is(family: str):
    need_stack()
    import_verl()
    for tied in (True, False):
        model = random_model(family, tied=tied)
        engine = engine_of(model)
        transfer.leave_out_tied(engine)
        sent = [name for name, _ in engine.get_per_tensor_param(base_sync_done=True)[0]]
        assert (EMBEDDING in sent, HEAD in sent) == (True, not tied)
        assert set(model.state_dict()) - set(sent) == ({HEAD} if tied else set())


def test_the_largest_tensor_counts_with_the_type_that_is_sent():
    model = random_model("Llama", tied=True)
    assert transfer.largest_bytes(model) == 1000 * 32 * 4
    assert transfer.largest_bytes(model.bfloat16()) == 1000 * 32 * 2


MB = 2**20


@pytest.mark.parametrize(
    ("largest", "asked", "whole", "size"),
    [
        (MB, 0, True, 64),
        (64 * MB, 0, True, 64),
        (64 * MB + 1, 0, True, 65),  # rounded up, or the last byte would not fit
        (49152 * 576 * 4, 0, True, 108),  # SmolLM2's embedding: 113,246,208 bytes are exactly 108 MB
        (100 * MB, 100, True, 100),
        (100 * MB, 2048, True, 2048),  # the user's, though less would do
        (100 * MB, 64, False, 64),  # over CUDA IPC verl sends a larger tensor by itself
    ],
)
def test_the_bucket_holds_the_largest_tensor_unless_the_user_says_how_large_it_is(
    largest: int, asked: int, whole: bool, size: int
):
    assert transfer.bucket_megabytes(largest, asked, whole=whole) == size


def test_a_bucket_of_the_users_that_is_too_small_is_refused_with_the_number_to_write():
    with pytest.raises(ValueError, match=r"update_weights_bucket_megabytes=64: .* has 108 MB .* Write 108 there"):
        transfer.bucket_megabytes(49152 * 576 * 4, 64, whole=True)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_a_recipe_leaves_the_bucket_to_the_worker_and_may_say_it(platform: str):
    assert overrides.settings(spec(), FILES, platform)[transfer.BUCKET_KEY] == transfer.CHOSEN_HERE
    assert overrides.settings(spec(verl={transfer.BUCKET_KEY: 256}), FILES, platform)[transfer.BUCKET_KEY] == 256


def test_a_workers_settings_get_the_size():
    need_stack()
    from verl.workers.config import CheckpointEngineConfig

    settings = CheckpointEngineConfig(update_weights_bucket_megabytes=transfer.CHOSEN_HERE)
    rollout = SimpleNamespace(config=SimpleNamespace(checkpoint_engine=settings), use_shm=True)
    transfer.prepare(engine_of(random_model("Llama", tied=True)), rollout)
    assert settings.update_weights_bucket_megabytes == 64


# ----------------------------------------------------------------------------------------------- a failing sampler

Receive = Callable[[list[tuple[str, torch.Tensor]], bool], None]


class Call:
    """As Ray answers a call that is not waited for."""

    def __init__(self, future: Future[Any]) -> None:
        self.future = lambda: future


@functools.cache
def bucketed_weight_transfer() -> Any:
    """verl's module as our plugin leaves it in vLLM's worker."""
    need_stack()
    import_verl()
    module = importlib.import_module("verl.workers.rollout.vllm_rollout.bucketed_weight_transfer")
    transfer.keep_the_first_error(module)
    return module


def send(folder: Path, weights: dict[str, torch.Tensor], receive: Receive) -> None:
    """verl's sender with ours around it, and verl's receiver in a thread, over a real socket and shared memory."""
    verls = bucketed_weight_transfer()
    handle = f"ipc://{folder}/socket"
    receiver = verls.BucketedWeightReceiver(handle, device=torch.device("cpu"), use_shm=True)

    class ServerAdapter:
        async def _execute_method(self, method: str, non_block: bool) -> Call:
            return Call(pool.submit(receiver.receive_weights, receive))

    module: Any = SimpleNamespace(ServerAdapter=ServerAdapter, BucketedWeightSender=verls.BucketedWeightSender)
    transfer.notice_failures(module)

    async def update() -> None:
        call = await module.ServerAdapter()._execute_method("update_weights_from_ipc", non_block=True)
        await module.BucketedWeightSender(handle, bucket_size_mb=1, use_shm=True).async_send_weights(weights.items())
        call.future().result()

    with ThreadPoolExecutor(1) as pool:
        asyncio.run(update())


def test_weights_of_three_buckets_arrive(tmp_path: Path):
    weights = {f"layer{n}": torch.full((200_000,), float(n)) for n in range(3)}  # 0.8 MB each: one in a bucket
    taken: dict[str, torch.Tensor] = {}
    send(tmp_path, weights, lambda pairs, last: taken.update({name: tensor.clone() for name, tensor in pairs}))
    assert taken.keys() == weights.keys()
    assert all(torch.equal(taken[name], weights[name]) for name in weights)


def test_a_sampler_that_fails_at_the_second_bucket_ends_the_transfer_with_its_own_error(tmp_path: Path):
    weights = {f"layer{n}": torch.zeros(200_000) for n in range(3)}
    seen = []

    def fail_at_the_second(pairs: list[tuple[str, torch.Tensor]], last: bool) -> None:
        seen.extend(name for name, _ in pairs)
        if len(seen) == 2:
            raise ValueError("'lm_head.weight' was skipped because it is tied")

    ended: list[BaseException] = []

    def attempt() -> None:
        try:
            send(tmp_path, weights, fail_at_the_second)
        except ValueError as error:
            ended.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(60)
    assert [str(error) for error in ended] == ["'lm_head.weight' was skipped because it is tied"]
    assert seen == ["layer0", "layer1"]
