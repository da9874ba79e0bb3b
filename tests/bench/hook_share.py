"""Times the KL hook where it runs: the charge in the trainer, the term of the loss in the workers; loaded by name.

Each call's wall time goes as one line to the file named by KLREG_BENCH. The metrics are not the hook and are not timed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from klreg_verl.verl_hooks.post_import import after_import


def timed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which writes down how long each call took."""

    def call(*arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        result = function(*arguments, **named)
        with open(os.environ["KLREG_BENCH"], "a") as file:
            file.write(json.dumps({"what": function.__name__, "seconds": time.perf_counter() - start}) + "\n")
        return result

    return call


def _wrap(*names: str) -> Callable[[ModuleType], None]:
    def install(module: ModuleType) -> None:
        for name in names:
            setattr(module, name, timed(getattr(module, name)))

    return install


after_import("klreg_verl.verl_hooks.trainer", _wrap("charge_kl"))
after_import("klreg_verl.verl_hooks.loss", _wrap("kl_loss", "squared_gradient"))
