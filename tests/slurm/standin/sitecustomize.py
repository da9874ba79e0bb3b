"""torch as a build for CUDA shows itself, in every process that has this folder on its path: see verl/__init__.py."""

import os
from types import ModuleType

from klreg_verl.verl_hooks.post_import import after_import


def _as_for_cuda(torch: ModuleType) -> None:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    torch.version.cuda = "13.0"
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: len(visible.split(","))


after_import("torch", _as_for_cuda)
