"""Weights on their way from the trainer to the sampler: which are sent, in what bucket, and what if the sampler fails.

verl copies tensors into a buffer, the bucket, and waits until the sampler has taken it; then it fills it anew. Where
there is no CUDA IPC a tensor that is larger than the bucket cannot be sent at all.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from concurrent.futures import Future
from types import ModuleType
from typing import Any

MEGABYTE = 2**20
SMALLEST = 64
"""Megabytes of a bucket that we choose: a tiny model's updates are one bucket."""
CHOSEN_HERE = 0
"""As `update_weights_bucket_megabytes`: the bucket follows from the model."""
BUCKET_KEY = "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes"


def prepare(engine: Any, rollout: Any) -> None:
    """What a worker does once its model is loaded.

    Args:
        engine: verl's training engine of the policy, whose `get_per_tensor_param` yields what is sent.
        rollout: verl's adapter to the sampler, whose settings say how large a bucket is.

    Raises:
        ValueError: the user's bucket is smaller than the largest tensor and verl cannot send that by itself.
    """
    leave_out_tied(engine)
    settings = rollout.config.checkpoint_engine
    asked = settings.update_weights_bucket_megabytes
    size = bucket_megabytes(largest_bytes(engine.module), asked, whole=getattr(rollout, "use_shm", False))
    object.__setattr__(settings, "update_weights_bucket_megabytes", size)  # verl's dataclass is frozen


def leave_out_tied(engine: Any) -> None:
    """Send each matrix once. vLLM skips a tied lm_head, and refuses a bucket that holds it without the embedding."""
    tied, original = tied_names(engine.module), engine.get_per_tensor_param

    def without_tied(*args: Any, **kwargs: Any) -> tuple[Iterator[tuple[str, Any]], Any]:
        weights, adapter = original(*args, **kwargs)
        return (pair for pair in weights if pair[0].removeprefix(_ADAPTED) not in tied), adapter

    engine.get_per_tensor_param = without_tied


_ADAPTED = "base_model.model."
"""How peft's names begin."""


def tied_names(module: Any) -> set[str]:
    """Names, as verl sends them, of tensors that are another tensor once more: mostly none, or lm_head.weight."""
    from verl.utils.model import convert_weight_keys

    model = getattr(module, "_fsdp_wrapped_module", module)
    model = model.get_base_model() if hasattr(model, "peft_config") else model
    return set(convert_weight_keys(dict(getattr(model, "all_tied_weights_keys", None) or {}), model))


def largest_bytes(module: Any) -> int:
    """Size of the largest tensor of a model that FSDP2 shards; with FSDP1's flat shards that of a worker's share."""
    return max(tensor.numel() * tensor.element_size() for tensor in module.parameters())


def bucket_megabytes(largest: int, asked: int, *, whole: bool) -> int:
    """Megabytes of the bucket.

    Args:
        largest: bytes of the largest tensor.
        asked: what the settings say; CHOSEN_HERE leaves it to us.
        whole: whether a tensor must fit in the bucket, as it must without CUDA IPC.

    Raises:
        ValueError: `asked` is too small for that.
    """
    needed = -(-largest // MEGABYTE)
    if asked == CHOSEN_HERE:
        return max(SMALLEST, needed)
    if whole and asked < needed:
        raise ValueError(
            f"{BUCKET_KEY}={asked}: the model's largest tensor has {needed} MB and must fit in one bucket. Write "
            f"{needed} there, or leave the key out."
        )
    return asked


def notice_failures(module: ModuleType) -> None:
    """verl's sender waits for the sampler's answer for ever; with the sampler's failure it shall fail, too.

    Args:
        module: verl.workers.rollout.vllm_rollout.vllm_rollout.
    """
    execute, verls_sender = module.ServerAdapter._execute_method, module.BucketedWeightSender

    async def remembered(self: Any, *args: Any, **kwargs: Any) -> Any:
        answer = await execute(self, *args, **kwargs)
        Sender.receiver = answer.future() if kwargs.get("non_block") and answer is not None else None
        return answer

    class Sender(verls_sender):
        """verl's, which also looks at the call that makes the sampler receive."""

        receiver: Future[Any] | None = None

        def _init_socket(self) -> None:
            super()._init_socket()
            self.socket = Heard(self.socket, self.receiver)

    module.ServerAdapter._execute_method, module.BucketedWeightSender = remembered, Sender


def keep_the_first_error(module: ModuleType) -> None:
    """A receiver that fails still holds views of the shared memory, and closing that would hide why it failed.

    Args:
        module: verl.workers.rollout.vllm_rollout.bucketed_weight_transfer.
    """
    rebuild = module.rebuild_shared_memory

    @functools.wraps(rebuild)
    def rebuilt(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        tensor, memory = rebuild(*args, **kwargs)
        close = memory.close

        def close_if_unused() -> None:
            with contextlib.suppress(BufferError):  # the sender unlinks it, and this process ends
                close()

        memory.close = close_if_unused
        return tensor, memory

    module.rebuild_shared_memory = rebuilt


class Heard:
    """A ZMQ socket whose `recv` raises the error with which the other side ended."""

    POLL_MS, LAST_MS = 200, 2000

    def __init__(self, socket: Any, receiver: Future[Any] | None) -> None:
        self._socket, self._receiver = socket, receiver

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)

    def recv(self) -> bytes:
        """The next message.

        Raises:
            RuntimeError: the other side ended without an answer; its own error if it failed.
        """
        while not self._socket.poll(self.POLL_MS):
            if self._receiver is not None and self._receiver.done():
                self._receiver.result()
                if not self._socket.poll(self.LAST_MS):  # the last answer may still be on its way
                    raise RuntimeError("vLLM ended the update of its weights without having taken all of them.")
        return self._socket.recv()
