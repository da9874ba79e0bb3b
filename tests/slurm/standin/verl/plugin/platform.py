"""On what the stand-in computes, as verl tells it."""

from types import SimpleNamespace


def get_platform() -> SimpleNamespace:
    return SimpleNamespace(device_name="cuda")
