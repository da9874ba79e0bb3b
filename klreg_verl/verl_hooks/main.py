"""The driver of one run: verl's own main, once it is sure that verl would start our trainer.

`python -m klreg_verl.verl_hooks.main key=value ...` takes what `python -m verl.trainer.main_ppo` takes.
"""

from __future__ import annotations

from klreg_verl.verl_hooks import plugin


def main() -> None:
    """Say on what the run computes, check the plugin, then hand over to verl."""
    from verl.plugin.platform import get_platform

    print(f"[klreg] platform: {get_platform().device_name}", flush=True)
    from verl.trainer import main_ppo

    plugin.require_active()
    main_ppo.main()


if __name__ == "__main__":
    main()
