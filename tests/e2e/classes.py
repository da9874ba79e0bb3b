"""A trainer with other settings of verl's at every step, on one live stack; loaded into verl by name.

KLREG_CLASSES names a JSON file: a list of {dotted key: value}, those of step 1 first; the other keys are as they were.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import ModuleType

from klreg_verl.verl_hooks.post_import import after_import


def _install(module: ModuleType) -> None:
    from omegaconf import OmegaConf

    from klreg_verl.verl_hooks.trainer import KLRegTrainer

    settings = json.loads(Path(os.environ["KLREG_CLASSES"]).read_text())

    class ClassesTrainer(KLRegTrainer):
        """KLRegTrainer under settings[step - 1]."""

        changed: dict = {}

        def on_step_begin(self) -> None:
            for key, value in self.changed.items():
                OmegaConf.update(self.config, key, value)
            given = settings[self.global_steps - 1]
            self.changed = {key: OmegaConf.select(self.config, key) for key in given}
            for key, value in given.items():
                OmegaConf.update(self.config, key, value)
            self.send_loss()
            super().on_step_begin()

    ClassesTrainer.__name__ = "KLRegTrainer"  # the driver makes sure of the name
    module.TRAINER_REGISTRY["sync"] = ClassesTrainer


after_import("verl.trainer.ppo.v1", lambda package: _install(package.trainer_base))
