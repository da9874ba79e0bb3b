"""A trainer that takes turns, step by step in one run, between verl's own code and ours; loaded into verl by name.

Step k % 4: 0 ours, 1 verl's polling as fast as ours (so that the wait is left out of both), 2 ours, 3 verl's as it is.
Each step's whole duration, from its beginning to the next one's, goes to the file named by KLREG_BENCH.
"""

from __future__ import annotations

import json
import os
import time
from types import ModuleType
from typing import Any

from klreg_verl.verl_hooks.post_import import after_import

TURNS = ("ours", "verl, fast poll", "ours", "verl")


def _install(module: ModuleType) -> None:
    from functools import partial

    from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.utils.losses import ppo_loss

    from klreg_verl.verl_hooks import names
    from klreg_verl.verl_hooks.trainer import POLL_SECONDS, KLRegTrainer

    class AlternatingTrainer(KLRegTrainer):
        """KLRegTrainer on even steps, PPOTrainerSync on odd ones."""

        begun: tuple[int, float] | None = None

        @property
        def turn(self) -> str:
            return TURNS[self.global_steps % 4]

        @property
        def is_ours(self) -> bool:
            return self.turn == "ours"

        def on_step_begin(self) -> None:
            now = time.perf_counter()
            if self.begun is not None:
                step, start = self.begun
                with open(os.environ["KLREG_BENCH"], "a") as file:
                    file.write(json.dumps({"step": step, "turn": TURNS[step % 4], "seconds": now - start}) + "\n")
            self.begun = (self.global_steps, now)
            self.replay_buffer.poll_interval = 2.0 if self.turn == "verl" else POLL_SECONDS
            self.config.algorithm.adv_estimator = "klreg_rloo" if self.is_ours else "rloo"
            self.send_loss()
            super().on_step_begin()

        def send_loss(self) -> None:
            if self.is_ours:
                super().send_loss()
            else:
                stock = omega_conf_to_dataclass(self.config.actor_rollout_ref.actor)
                self.actor_rollout_wg.set_loss_fn(partial(ppo_loss, config=stock))

        def _submit_batch_to_rollout(self, batch: Any) -> int:
            from tensordict import NonTensorData

            name = names.AGENT_NAME if self.is_ours else "single_turn_agent"
            batch["agent_name"] = NonTensorData(name)
            return super()._submit_batch_to_rollout(batch)

        def _balance_batch(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
            cls = KLRegTrainer if self.is_ours else PPOTrainerSync
            return cls._balance_batch(self, batch, *args, **kwargs)

        def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
            cls = KLRegTrainer if self.is_ours else PPOTrainerSync
            return cls._compute_advantage(self, batch, metrics)

        def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any:
            cls = KLRegTrainer if self.is_ours else PPOTrainerSync
            return cls._update_actor(self, batch, metrics)

        def _compute_metrics(self, *args: Any, **kwargs: Any) -> None:
            cls = KLRegTrainer if self.is_ours else PPOTrainerSync
            cls._compute_metrics(self, *args, **kwargs)

    AlternatingTrainer.__name__ = "KLRegTrainer"  # the driver makes sure of the name
    module.TRAINER_REGISTRY["sync"] = AlternatingTrainer


after_import("verl.trainer.ppo.v1", lambda package: _install(package.trainer_base))
