"""beta over the updates of a run: its controller, what the controller sees, and its state in the checkpoint.

verl's own adaptive controller starts anew after a resume (verl issue 2653); this state goes with every checkpoint and
comes back to the last bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from klreg_verl.core.controllers import BetaState, Observation
from klreg_verl.experiment.recipe import KLSpec
from klreg_verl.experiment.store import atomic_write
from klreg_verl.verl_hooks import terms

FILE = "klreg.json"
"""In verl's folder of a checkpoint."""


class Beta:
    """The coefficient of the update at hand, and what it becomes."""

    def __init__(self, kl: KLSpec) -> None:
        self.rule = terms.controller_of(kl)
        self.state = self.rule.start(kl.beta_or_zero)
        self.now = self.state.beta

    @property
    def moves(self) -> bool:
        """Whether beta may change during the run."""
        return self.rule.kind != "fixed"

    def begin_step(self) -> bool:
        """Put the controller's beta in force; whether that changed it."""
        changed = self.now != self.state.beta
        self.now = self.state.beta
        return changed

    def updated(self, measured: Mapping[str, float], responses: int, step: int) -> None:
        """Tell the controller what was measured on the batch (of so many responses) that update `step` was made on."""
        observed = Observation(
            kl_token=measured["kl_ref/k1_token"],
            kl_response=measured["kl_ref/k1_response"],
            score=measured["train/score"],
            responses=responses,
            step=step,
        )
        self.state = self.rule.after(self.state, observed)

    def save(self, checkpoint: Path) -> None:
        """Write the state that the next update starts with into verl's folder of a checkpoint."""
        atomic_write(checkpoint / FILE, json.dumps({"beta": self.state.to_json(), "kind": self.rule.kind}, indent=1))

    def load(self, checkpoint: Path) -> None:
        """Take the state of a checkpoint.

        Raises:
            ValueError: there is none, or of another controller, so that the run would go on with another beta.
        """
        path = checkpoint / FILE
        if not path.is_file():
            if self.moves:
                raise ValueError(
                    f"{path} is missing: with controller {self.rule.kind} beta cannot be known. Start anew."
                )
            return
        saved = json.loads(path.read_text())
        if saved["kind"] != self.rule.kind:
            raise ValueError(f"{path} is of controller {saved['kind']}, this run has {self.rule.kind}. Start anew.")
        self.state = BetaState.from_json(saved["beta"])
        self.now = self.state.beta
