"""A seed for every sampling request, hashed from (run seed, step, prompt index, sample index).

verl's own full_determinism gives every sample of a prompt the same seed, so that groups collapse; without it a request
has none, and a resumed run draws other tokens. The trainer puts both classes here in verl's settings.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from tensordict import NonTensorData, NonTensorStack, TensorDict
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ

SEED_KEY = "klreg_seed_key"
AGENT_NAME = "klreg_single_turn"
AGENT_CONFIG = Path(__file__).with_name("agent_loop.yaml")
MANAGER = f"{__name__}.SeededAgentLoopManager"


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

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        from vllm.sampling_params import RequestOutputKind  # seconds to import, and the trainer does without

        run_seed = int(self.data_config.seed or 0)
        seed = request_seed(run_seed, kwargs[SEED_KEY], kwargs["session_id"])
        seeded = sampling_params | {"seed": seed, "output_kind": RequestOutputKind.FINAL_ONLY}
        return await super().run(seeded, **kwargs)
