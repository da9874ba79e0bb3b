"""A driver that trains nothing: it uses every node of its Ray and keeps the run folder as KLRegTrainer does, with the
same Recorder, checkpoints and `stopping`. A step's "accuracy" is a chain over all steps, kept in checkpoints only, so a
step that was lost, doubled or begun from the wrong state changes every later line.

STANDIN_FAIL=ARM:STEP in the environment lets that arm raise at that step, each time; STANDIN_SECONDS is a step's time.
"""

from __future__ import annotations

import json
import os
import sys
import time
from types import SimpleNamespace

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from klreg_verl.verl_hooks import checkpoints, stopping
from klreg_verl.verl_hooks.recorder import Recorder


def chain(value: float, step: int) -> float:
    """In [0, 1), different for every history."""
    return (value * 7919.0 + step * 0.618034) % 1.0


class Trainer(SimpleNamespace):
    """What `stopping` needs of KLRegTrainer."""

    def _save_checkpoint(self) -> None:
        if not self.recorder.wants_checkpoint(self.global_steps):
            return
        folder = checkpoints.step_folder(self.recorder.folder.checkpoints_dir, self.global_steps)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "half").write_text("x")
        time.sleep(0.3)  # a kill finds half a checkpoint
        (folder / "value.json").write_text(json.dumps(self.value))
        self.recorder.checkpoint_saved(self.global_steps)


@ray.remote(num_gpus=1)
def where() -> tuple[str, str]:
    import socket

    assert "ROCR_VISIBLE_DEVICES" not in os.environ, "verl would refuse to start"
    return socket.gethostname(), os.environ["KLREG_SESSION_DIR"]


def everywhere(nodes: int) -> list[tuple[str, str]]:
    """What `where` says on as many nodes, which are reserved first, as verl's resource pool is."""
    group = placement_group([{"CPU": 1, "GPU": 1}] * nodes, strategy="STRICT_SPREAD")
    ray.get(group.ready(), timeout=120)
    places = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=place) for place in range(nodes)]
    return ray.get([where.options(scheduling_strategy=place).remote() for place in places])


def main() -> None:
    settings = dict(argument.lstrip("+").split("=", 1) for argument in sys.argv[1:])
    nodes, steps = int(settings["trainer.nnodes"]), int(settings["trainer.total_training_steps"])
    every = int(settings["trainer.save_freq"])
    arm, _, fail = os.environ.get("STANDIN_FAIL", ":").partition(":")
    ray.init()
    used = everywhere(nodes)
    print("used", sorted(used), flush=True)
    assert len({host for host, _ in used}) == nodes, used
    recorder = Recorder.from_environment()
    root = recorder.folder.checkpoints_dir
    root.mkdir(exist_ok=True)
    tracker = root / checkpoints.TRACKER
    start = int(tracker.read_text()) if tracker.exists() else 0
    value = json.loads((checkpoints.step_folder(root, start) / "value.json").read_text()) if start else 0.5
    recorder.resume_at(start)
    trainer = Trainer(recorder=recorder, global_steps=start, total_training_steps=steps, value=value)
    if not start:
        recorder.log({"eval/palindrome/accuracy": value}, 0)
    while trainer.global_steps < trainer.total_training_steps:
        trainer.global_steps += 1
        step = trainer.global_steps
        time.sleep(float(os.environ.get("STANDIN_SECONDS", "0.3")))
        if fail and f"/{arm}/" in os.environ["KLREG_RUN"] and step == int(fail):
            raise RuntimeError(f"the stand-in fails at step {step}")
        trainer.value = chain(trainer.value, step)
        if step % every == 0 or step == steps:
            trainer._save_checkpoint()
        stopping.save_if_asked(trainer)
        recorder.log({"train/accuracy": trainer.value, "time/step_s": 0.3, "kl_ref/k1_response": 0.1}, step)


if __name__ == "__main__":
    main()
