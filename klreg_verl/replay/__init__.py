"""What a policy's KL and its gradients are, measured afterwards on saved models and samples; nothing is trained.

command.py     the commands `klreg kl` and `klreg replay`
models.py      model folders and checkpoints: loaded, compared; shards.py merges what FSDP's workers saved
batch.py       prompts and responses as padded tensors, and a model's logits at the responses' tokens
prompts.py     prompts from parquet or text
divergence.py  `klreg kl`: responses sampled and scored under two models
run.py         `klreg replay`: what a run left behind of one step
settings.py    the KL settings that are compared
gradients.py   their gradients' inner products; sketch.py: in bounded memory
comparison.py  cosines and sizes; figure.py and printing.py show them

Needs transformers, neither verl nor Ray; of verl_hooks it uses only what imports neither (terms.py, checkpoints.py).
"""
