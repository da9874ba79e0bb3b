"""The only place that knows verl.

plugin.py       verl's entry point: what happens in every process that imports verl
trainer.py      KLRegTrainer(PPOTrainerSync): measures, places KL in the reward, sends the loss
loss.py         verl's ppo_loss plus our KL term
terms.py        one KL block -> the calls of klreg_verl.core (imports no verl)
beta.py         the controller of beta, and its state in the checkpoint
worker.py       verl's worker with our reference: another model, reset, average (reference.py), logits for exact KL
exact.py        KL over the vocabulary in verl's loss
reference_*.py  responses drawn from the reference, and their loss: forward KL proper
watch.py        alarms
sampling.py     a seed for every sampling request
names.py        verl's names <-> ours, and the versions that were tested
overrides.py    RunSpec -> verl settings (imports no verl)
checkpoints.py  which of verl's checkpoints are whole (imports no verl)
cpu.py          all that running verl without an accelerator takes
"""
