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
from vllm.sampling_params import RequestOutputKind

SEED_KEY = "klreg_seed_key"
AGENT_NAME = "klreg_single_turn"
AGENT_CONFIG = Path(__file__).with_name("agent_loop.yaml")
MANAGER = f"{__name__}.SeededAgentLoopManager"


def request_seed(run_seed: int, key: str, sample: int) -> int:
    """31 bits from (run seed, "train|val/step/prompt index", sample index); the same everywhere and for ever."""
    digest = hashlib.sha256(f"{run_seed}/{key}/{sample}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


class SeededAgentLoopManager(AgentLoopManagerTQ):
    """Labels each prompt with its place in the batch, and remembers it by verl's random uid."""

    def generate_sequences(self, prompts: TensorDict) -> None:
        """Dispatch as verl does; `row_of` then maps each prompt's uid to its index in the batch."""
        uids = list(prompts["uid"])
        self.row_of = {uid: row for row, uid in enumerate(uids)}
        part = "val" if "validate" in prompts.keys() else "train"
        step = prompts["global_steps"]
        labels = [NonTensorData(f"{part}/{step}/{row}") for row in range(len(uids))]
        prompts[SEED_KEY] = NonTensorStack(*labels)
        super().generate_sequences(prompts)


class SeededSingleTurn(SingleTurnAgentLoop):
    """verl's single-turn loop with a seed; asks vLLM for the final output only, not for one message per token."""

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        run_seed = int(self.data_config.seed or 0)
        seed = request_seed(run_seed, kwargs[SEED_KEY], kwargs["session_id"])
        seeded = sampling_params | {"seed": seed, "output_kind": RequestOutputKind.FINAL_ONLY}
        return await super().run(seeded, **kwargs)
