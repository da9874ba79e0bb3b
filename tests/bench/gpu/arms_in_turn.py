"""A trainer that takes one KL block after the other, some steps each, in one run; loaded into verl by name.

KLREG_BENCH names a folder with a YAML file per block, in the order of their names; each is followed for TURN steps. One
start of Ray, vLLM and the model serves all of them.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

from klreg_verl.experiment.recipe import load_kl
from klreg_verl.verl_hooks.post_import import after_import

TURN = 3
"""Steps of a block. The first of them warms up what is new in it."""


def _install(module: ModuleType) -> None:
    from klreg_verl.verl_hooks.beta import Beta
    from klreg_verl.verl_hooks.trainer import KLRegTrainer

    blocks = [load_kl(path).kl for path in sorted(Path(os.environ["KLREG_BENCH"]).glob("*.yaml"))]

    class InTurn(KLRegTrainer):
        """KLRegTrainer, whose block is the step's."""

        def on_step_begin(self) -> None:
            self.kl = blocks[min((self.global_steps - 1) // TURN, len(blocks) - 1)]
            self.beta = Beta(self.kl)
            self.send_loss()
            super().on_step_begin()

    InTurn.__name__ = "KLRegTrainer"  # the driver makes sure of the name
    module.TRAINER_REGISTRY["sync"] = InTurn


after_import("verl.trainer.ppo.v1", lambda package: _install(package.trainer_base))
