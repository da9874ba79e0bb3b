"""What happens in every process that imports verl: the entry point `klreg` of the group `verl.plugins`.

Nothing happens unless asked for: VERL_PLATFORM=cpu makes verl run without an accelerator, and KLREG_KL (a YAML file
with one KL block) puts KLRegTrainer in the place of verl's "sync" trainer. Whatever else would train under KLREG_KL is
refused: a command of verl's in the driver, any other trainer where it is made. verl swallows a plugin's exceptions, so
`require_active` is what a launcher calls to be sure.
"""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from klreg_verl.experiment import own_code
from klreg_verl.verl_hooks import loopback, progress, transfer
from klreg_verl.verl_hooks.names import KL_VARIABLE
from klreg_verl.verl_hooks.post_import import after_import

RUN_VARIABLE = "KLREG_RUN"
SESSION_VARIABLE = "KLREG_SESSION_DIR"
FORWARDED = (
    *(KL_VARIABLE, RUN_VARIABLE, own_code.VARIABLE, "VERL_PLATFORM", "VERL_ENGINE_DEVICE"),
    *("VERL_USE_EXTERNAL_MODULES", "VERL_USE_EXTERNAL_PLUGINS"),
    *("TENSORBOARD_DIR", "WANDB_MODE", "WANDB_DIR", "WANDB_RUN_ID", "WANDB_RESUME"),
)
"""Variables that Ray workers need and verl does not forward by itself."""


def activate() -> None:
    """Install what the environment asks for."""
    own_code.add_from_environment()
    if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
        from klreg_verl.verl_hooks import cpu

        cpu.activate()
    if os.environ.get(SESSION_VARIABLE):
        after_import("verl.workers.rollout.vllm_rollout.bucketed_weight_transfer", _own_sockets)
    if KL_VARIABLE in os.environ:
        after_import("verl.trainer.constants_ppo", _forward_environment)
        after_import("verl.trainer.main_ppo", _check_commands)
        after_import("verl.trainer.ppo.ray_trainer", lambda module: _refuse_others(module.RayPPOTrainer))
        after_import("verl.trainer.ppo.v1.trainer_base", lambda module: _refuse_others(module.PPOTrainer))
        after_import("verl.trainer.ppo.core_algos", _register_advantages)
        after_import("verl.trainer.ppo.v1.trainer_sync", _replace_sync_trainer)
        after_import("verl.utils.torch_functional", _logprobs_in_blocks)
        after_import("verl.workers.rollout.llm_server", progress.count_responses)
        after_import("verl.experimental.agent_loop.agent_loop", progress.count_rewards)
        after_import("verl.workers.rollout.vllm_rollout.vllm_rollout", transfer.notice_failures)
        after_import("verl.workers.rollout.vllm_rollout.bucketed_weight_transfer", transfer.keep_the_first_error)
        after_import("verl.trainer.ppo.metric_utils", _bootstrap_once)


def _forward_environment(module: ModuleType) -> None:
    """Hand our variables to every Ray worker of the job; verl leaves out what the launching shell has set.

    `python -m verl.trainer.main_ppo` calls it right before Ray starts, from a module that no import hook sees: the
    place to refuse what cannot run.
    """
    original = module.get_ppo_ray_runtime_env

    def with_ours(config: Any = None) -> dict[str, Any]:
        from klreg_verl.verl_hooks import commands

        if config is not None:
            commands.or_exit(commands.check_command, config)
        runtime_env = original(config)
        variables = {name: os.environ[name] for name in FORWARDED if name in os.environ}
        runtime_env["env_vars"].update(variables | {KL_VARIABLE: os.path.abspath(os.environ[KL_VARIABLE])})
        if loopback.wanted():
            runtime_env.setdefault("worker_process_setup_hook", loopback.HOOK)
        return runtime_env

    module.get_ppo_ray_runtime_env = with_ours


def _check_commands(module: ModuleType) -> None:
    """Mains that import run_ppo hand it a runner of their own under an ordinary configuration."""
    original = module.run_ppo

    def checked(config: Any, task_runner_class: Any) -> None:
        from klreg_verl.verl_hooks import commands

        commands.or_exit(commands.check_runner, task_runner_class, module.TaskRunnerV1)
        commands.or_exit(commands.check_command, config)
        original(config, task_runner_class)

    module.run_ppo = checked


def _refuse_others(base: Any) -> None:
    """No trainer of verl's or of a user's own is made but ours; some never call their base's __init__."""

    def new(cls: type, *_: Any, **__: Any) -> Any:
        from klreg_verl.verl_hooks import commands
        from klreg_verl.verl_hooks.trainer import KLRegTrainer

        if not issubclass(cls, KLRegTrainer):
            raise RuntimeError(
                f"{cls.__module__}.{cls.__qualname__} {commands.OUTCOME}: only verl's sync trainer is replaced by "
                "ours. Start `python -m verl.trainer.main_ppo` with trainer.v1.trainer_mode=sync, or unset "
                f"{KL_VARIABLE}."
            )
        return object.__new__(cls)

    base.__new__ = staticmethod(new)


def _logprobs_in_blocks(module: ModuleType) -> None:
    """Without flash-attn verl takes each token's log-probability by itself, in a loop in Python, and keeps a float32
    row of the vocabulary for each until the backward pass. The same numbers, some hundred rows at a time."""
    from klreg_verl.core import logprobs

    module.logprobs_from_logits_v2 = logprobs.in_blocks


def _bootstrap_once(module: ModuleType) -> None:
    """verl's validation metrics take seconds, and reseed the process."""
    from klreg_verl.verl_hooks.measure import bootstrap_metric

    module.bootstrap_metric = bootstrap_metric


def _own_sockets(module: ModuleType) -> None:
    """Weights travel over /tmp/rl-colocate-zmq-<Ray job id>-...: two Ray clusters on a machine share those names."""
    for endpoint in (module.BucketedWeightSender, module.BucketedWeightReceiver):
        endpoint.__init__ = _in_session_folder(endpoint.__init__)


def _in_session_folder(original: Any) -> Any:
    def init(self: Any, zmq_handle: str, *args: Any, **kwargs: Any) -> None:
        folder = os.environ[SESSION_VARIABLE]
        original(self, zmq_handle.replace("ipc:///tmp/", f"ipc://{folder}/"), *args, **kwargs)

    return init


def _replace_sync_trainer(module: ModuleType) -> None:
    """Swap the class under the name "sync": any other name selects verl's asynchronous code paths in six places."""
    from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY

    from klreg_verl.verl_hooks.trainer import KLRegTrainer

    TRAINER_REGISTRY["sync"] = KLRegTrainer


def _register_advantages(module: ModuleType) -> None:
    """Our vectorised advantages, under names of their own beside verl's."""
    from klreg_verl.verl_hooks.advantages import register

    register(module.register_adv_est)


def require_active() -> None:
    """Raise RuntimeError unless verl would start our trainer in this environment.

    Imports verl's trainer; call it in the process that starts the run. That process has imported this module itself, so
    it also asks whether verl would: the trainer lives in a Ray worker, which has verl's word for it only.
    """
    from verl.trainer.ppo.v1 import get_trainer_cls

    name = get_trainer_cls("sync").__name__ if _verl_loads_us() else "PPOTrainerSync"
    if name != "KLRegTrainer":
        raise RuntimeError(
            f"verl would start {name}, not KLRegTrainer: its plugin entry point did not load. "
            f"Check that klreg-verl is installed in this environment (`pip show klreg-verl`), that {KL_VARIABLE} names "
            "a file, and that VERL_USE_EXTERNAL_PLUGINS is not 'none'."
        )


def _verl_loads_us() -> bool:
    """Whether `import verl` imports this module in any process with this environment; verl's own rules."""
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto").strip().lower()
    installed = {point.name for point in entry_points(group="verl.plugins") if point.value == __name__}
    allowed = installed if policy == "auto" else installed & {name.strip() for name in policy.split(",")}
    return bool(allowed) or __name__ in os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(",")


activate()
