"""The only place that knows verl.

plugin.py       verl's entry point: what happens in every process that imports verl
trainer.py      KLRegTrainer(PPOTrainerSync): measures, places KL in the reward, sends the loss
loss.py         verl's ppo_loss plus our KL term
sampling.py     a seed for every sampling request
names.py        verl's names <-> ours, and the versions that were tested
overrides.py    RunSpec -> verl settings (imports no verl)
checkpoints.py  which of verl's checkpoints are whole (imports no verl)
cpu.py          all that running verl without an accelerator takes
"""
