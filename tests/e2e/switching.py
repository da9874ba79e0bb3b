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

        def on_step_begin(self) -> None:
            kl = strict.build(KLSpec, strict.from_plain(blocks[self.global_steps - 1], file="KLREG_SWITCH"))
            if kl != self.kl:  # a controller goes on while its block stays, also in a run that resumes in it
                self.kl, self.beta = kl, Beta(kl)
                self.send_loss()
            super().on_step_begin()

    SwitchingTrainer.__name__ = "KLRegTrainer"  # the driver makes sure of the name
    module.TRAINER_REGISTRY["sync"] = SwitchingTrainer


after_import("verl.trainer.ppo.v1", lambda package: _install(package.trainer_base))
