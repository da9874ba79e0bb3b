"""One platform for the whole test process: whichever test imports verl first decides it for all."""

import importlib.util
import os
from pathlib import Path

if importlib.util.find_spec("verl") is not None and not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("VERL_PLATFORM", "cpu")
    os.environ.setdefault("VERL_USE_EXTERNAL_MODULES", "klreg_verl.verl_hooks.plugin")
