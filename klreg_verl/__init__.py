"""The laboratory for KL regularization in RL fine-tuning of language models, on stock verl."""

__version__ = "0.1.0"
