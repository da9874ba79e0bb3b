"""Datasets to parquet, reward functions, and the tiny starting model.

    schema.py       the one parquet schema of all tasks, and its reading and writing
    palindrome.py   reasoning-gym's palindrome task as train.parquet, test.parquet and card.json
    tiny_model.py   a small Qwen2 model supervised on that task, made on the CPU
    rewards.py      compute_score, verl's reward function for all tasks
    cache.py        option dataclasses from mappings and arguments; folders cached by a hash of options and source
    check.py        what is wrong with a data file or a model folder, said before anything starts

Importing the package imports nothing heavy.
"""
