"""A trainer that takes another KL block at every step, on one live stack; loaded into verl by name.

KLREG_SWITCH names a JSON file: a list of KL blocks, the one of step 1 first. Blocks are not asked what they follow.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import ModuleType

from klreg_verl.verl_hooks.post_import import after_import


def _install(module: ModuleType) -> None:
    from klreg_verl.experiment import strict
    from klreg_verl.experiment.recipe import KLSpec
    from klreg_verl.verl_hooks.beta import Beta
    from klreg_verl.verl_hooks.trainer import KLRegTrainer

    blocks = json.loads(Path(os.environ["KLREG_SWITCH"]).read_text())

    class SwitchingTrainer(KLRegTrainer):
        """KLRegTrainer under blocks[step - 1]."""

        in_force = None

        def on_step_begin(self) -> None:
            block = blocks[self.global_steps - 1]
            if block != self.in_force:  # a controller goes on while its block stays
                self.in_force = block
                self.kl = strict.build(KLSpec, strict.from_plain(block, file="KLREG_SWITCH"))
                self.beta = Beta(self.kl)
                self.send_loss()
            super().on_step_begin()

    SwitchingTrainer.__name__ = "KLRegTrainer"  # the driver makes sure of the name
    module.TRAINER_REGISTRY["sync"] = SwitchingTrainer


after_import("verl.trainer.ppo.v1", lambda package: _install(package.trainer_base))
