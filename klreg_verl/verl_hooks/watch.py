"""Alarms of a run: each line of metrics is checked, an alarm is said in the log, and by policy ends the run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from klreg_verl.core import alarms
from klreg_verl.experiment.recipe import AlarmsSpec
from klreg_verl.verl_hooks.recorder import numbers


class AlarmRaised(RuntimeError):
    """The recipe's alarms say `stop: true`, and one fired."""


class Watch:
    """Checks the lines of one run, in order."""

    def __init__(self, spec: AlarmsSpec) -> None:
        self.stop = spec.stop
        self.alarms = alarms.Alarms(**spec.thresholds)
        self.history: list[Mapping[str, Any]] = []
        self.fired: tuple[alarms.Alarm, ...] = ()

    def resume(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Start from the lines that earlier attempts left; an alarm on the last of them still stands."""
        self.history = list(lines)
        self.fired = alarms.check(self.alarms, self.history)

    def begin(self, metrics: Mapping[str, Any]) -> None:
        """What the starting model could do: retention_drop is measured against it."""
        self.history.append({"step": 0, **numbers(metrics)})

    def check(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float]:
        """alarm/<name> = 1 for each alarm that this step's metrics raise; each is printed, too."""
        self.history.append({"step": step, **numbers(metrics)})
        self.fired = alarms.check(self.alarms, self.history)
        for alarm in self.fired:
            print(f"[klreg] alarm {alarm.name} at step {step}: {alarm.message}", flush=True)
        return {f"alarm/{alarm.name}": 1.0 for alarm in self.fired}

    def end_if_asked(self) -> None:
        """Called when the step's line is on the disk.

        Raises:
            AlarmRaised: an alarm fired at the last step, and the recipe says `alarms: {stop: true}`.
        """
        if self.stop and self.fired:
            said = " ".join(f"{alarm.name}: {alarm.message}" for alarm in self.fired)
            raise AlarmRaised(
                f"alarms.stop is true, and an alarm was raised. {said} To go on anyway, relax the recipe's alarms."
            )
