"""On one machine nothing of a run listens to the network.

TransferQueue's sockets unpickle what they are sent, and vLLM's HTTP server answers anybody; both bind to the address
that Ray tells them, which is the machine's own even where Ray was started at 127.0.0.1. Ray calls `listen` in each of a
job's processes before anything else. It can go once TransferQueue authenticates its peers (0.1.11 does not).
"""

from __future__ import annotations

import os

VARIABLE = "KLREG_LOOPBACK"
"""Set where all processes of a run are on one machine."""
ADDRESS = "127.0.0.1"
HOOK = f"{__name__}.listen"
"""As Ray's runtime_env names a function."""


def wanted() -> bool:
    """Whether this run stays on one machine."""
    return bool(os.environ.get(VARIABLE))


def listen() -> None:
    """In this process everything that asks Ray where to listen gets the loopback address."""
    import ray.util

    ray.util.get_node_ip_address = lambda: ADDRESS
