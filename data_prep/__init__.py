"""Datasets to parquet, reward functions, and the tiny starting model.

    schema.py       the one parquet schema of all tasks, and its reading and writing
    palindrome.py   reasoning-gym's palindrome task as train.parquet, test.parquet and card.json
    deepscaler.py   DeepScaleR's mathematics likewise, with its evaluation sets
    sources.py      problems from files, folders and the Hub; golden.py makes their answers text
    overlap.py      duplicates and contamination; lengths.py counts the tokens of prompts
    skills.py       skills that a run does not train and may lose: test items, and demonstrations for the tiny model
    retention.py    prompts of a skill that a run does not train, as one more validation file
    styles.py       what prompts ask for: the bare item, the question, an answer in a box or in tags
    tiny_model.py   a small Qwen2 model supervised on palindromes and skills, made on the CPU
    rewards.py      compute_score, verl's reward function for all tasks; grading/ has what grades mathematics
    cache.py        option dataclasses from mappings and arguments; folders cached by a hash of options and sources
    check.py        what is wrong with a data file or a model folder, said before anything starts
    trial.py        a reward function tried on a file's own rows; functions.py finds and calls one by its name

Importing the package imports nothing heavy.
"""
