"""A seed for every sampling request, hashed from (run seed, step, prompt index, sample index); and no work twice.

verl's own full_determinism gives every sample of a prompt the same seed, so that groups collapse; without it a request
has none, and a resumed run draws other tokens. verl also makes a loop, tokenizes the prompt and asks which server is
free anew for every sample: a third of a tiny model's time. The trainer puts what is here in verl's settings.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from typing import Any

import ray
from tensordict import NonTensorData, NonTensorStack, TensorDict
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ
from verl.workers.rollout.llm_server import LLMServerClient

from klreg_verl.verl_hooks import names

SEED_KEY = "klreg_seed_key"


def request_seed(run_seed: int, key: str, sample: int) -> int:
    """31 bits from (run seed, "train|val/step/prompt index", sample index); the same everywhere and for ever."""
    digest = hashlib.sha256(f"{run_seed}/{key}/{sample}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


class SeededAgentLoopManager(AgentLoopManagerTQ):
    """Labels each prompt with its place in the batch, and remembers it by verl's random uid.

    `row_of`: uid -> index in the batch of the training step at hand; a validation in between leaves it alone.
    """

    row_of: dict[str, int] = {}
    _step: int | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.agent_loop_workers_class = ray.remote(OneLoopWorker)

    def generate_sequences(self, prompts: TensorDict) -> None:
        """Dispatch as verl does, every prompt with the label that its seeds are hashed from."""
        prompts[SEED_KEY] = NonTensorStack(*map(NonTensorData, self._labels(prompts)))
        super().generate_sequences(prompts)

    def _labels(self, prompts: TensorDict) -> list[str]:
        """ "train|val/step/index" of each prompt; prompts that replace failed ones in a step count on."""
        uids, step = list(prompts["uid"]), prompts["global_steps"]
        if "validate" in prompts.keys():
            return [f"val/{step}/{row}" for row in range(len(uids))]
        before = self.row_of if step == self._step else {}
        rows = range(len(before), len(before) + len(uids))
        self.row_of, self._step = before | dict(zip(uids, rows, strict=True)), step
        return [f"train/{step}/{row}" for row in rows]


class SeededSingleTurn(SingleTurnAgentLoop):
    """verl's single-turn loop with a seed; asks vLLM for the final output only, not for one message per token."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        if self.processor is None:  # images are worth a thread, a prompt's text is not
            self.loop = _Inline()
            builder = self.continuous_token_builder
            builder.build_initial_tokens = remembered(builder.build_initial_tokens)

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        from vllm.sampling_params import RequestOutputKind  # seconds to import, and the trainer does without

        run_seed = int(self.data_config.seed or 0)
        seed = request_seed(run_seed, kwargs[SEED_KEY], kwargs["session_id"])
        seeded = sampling_params | {"seed": seed, "output_kind": RequestOutputKind.FINAL_ONLY}
        return await super().run(seeded, **kwargs)


_loops: dict[LLMServerClient, SeededSingleTurn] = {}


def single_turn(*, server_manager: LLMServerClient, **parts: Any) -> SeededSingleTurn:
    """What verl's worker makes a loop with: its one loop, which keeps nothing of a sample."""
    if server_manager not in _loops:
        _loops[server_manager] = SeededSingleTurn(server_manager=lean_client(server_manager), **parts)
    return _loops[server_manager]


class OneLoopWorker(AgentLoopWorkerTQ.__ray_metadata__.modified_class):
    """verl's worker, which asks Hydra for a loop at every sample (3 ms); here once."""

    async def _run_agent_loop(
        self,
        sampling_params: dict[str, Any],
        trajectory: dict[str, Any],
        *,
        agent_name: str,
        trace: bool,
        **kwargs: Any,
    ) -> None:
        loop = _loops.get(self.llm_client)
        if loop is None or trace or agent_name != names.AGENT_NAME:
            return await super()._run_agent_loop(
                sampling_params, trajectory, agent_name=agent_name, trace=trace, **kwargs
            )
        output = await loop.run(sampling_params, **kwargs)
        return await self._agent_loop_postprocess(output, trajectory["validate"], **kwargs)


def lean_client(client: LLMServerClient) -> LLMServerClient:
    """verl's own client spared the balancer; any other is left as it is."""
    return OneServerClient(client.config, client._load_balancer) if type(client) is LLMServerClient else client


class OneServerClient(LLMServerClient):
    """Where there is one vLLM server, nothing is to be balanced: two remote calls less for every sample."""

    _server: asyncio.Future[tuple[str, Any] | None] | None = None

    async def _acquire_server(self, request_id: str, **extra: Any) -> tuple[str, Any]:
        if self._server is None:
            self._server = asyncio.ensure_future(self._only_server(request_id, **extra))
        return await self._server or await super()._acquire_server(request_id, **extra)

    def _release_server(self, server_id: str, request_id: str | None = None) -> None:
        if self._server is None or self._server.result() is None:
            super()._release_server(server_id, request_id)

    async def _only_server(self, request_id: str, **extra: Any) -> tuple[str, Any] | None:
        """The server and its handle; None if there are several. Servers come and go in asynchronous training only."""
        servers = await self._load_balancer.get_all_servers.remote()
        return await super()._acquire_server(request_id, **extra) if len(servers) == 1 else None


class _Inline:
    """Stands where verl's loop hands work to a thread: what takes microseconds is done at once."""

    async def run_in_executor(self, executor: None, work: Callable[[], Any]) -> Any:
        return work()


def remembered(build: Callable[..., list[int]], kept: int = 1024) -> Callable[..., list[int]]:
    """`build(messages, ...)` with the last results kept, since a prompt is sampled several times."""
    known: dict[str, list[int]] = {}

    def tokens(messages: list[dict[str, Any]], **media: Any) -> list[int]:
        key = repr(messages)
        if key not in known:
            if len(known) >= kept:
                known.clear()
            known[key] = build(messages, **media)
        return list(known[key])

    return tokens
