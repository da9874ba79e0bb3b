"""A run that is asked to stop saves the step in hand and ends there: a job's time limit is near, or it is preempted.

The launcher asks by a file (RunFolder.ask_to_stop): the trainer is a Ray actor on any node, which no signal reaches,
and a checkpoint cannot be written inside a signal handler.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from klreg_verl.verl_hooks.trainer import KLRegTrainer


def save_if_asked(trainer: KLRegTrainer) -> None:
    """Call it after the update, before verl wakes the rollout and so takes the memory that a save needs.

    The loop then ends after this step, whose metrics line makes the checkpoint count. At the last step there is nothing
    to do: verl saves it, and ends.
    """
    recorder, step = trainer.recorder, trainer.global_steps
    if recorder is None or step >= trainer.total_training_steps or not recorder.folder.stop_asked():
        return
    if not recorder.has_saved(step):
        trainer._save_checkpoint()
    trainer.total_training_steps = step
    print(f"[klreg] asked to stop: step {step} is saved and is this attempt's last", flush=True)
