"""Checkpoints to Hugging Face folders, and what a model can do: `klreg export` and `klreg eval`.

    command.py   the two commands
    subjects.py  what is named on the command line: a run at a step, a checkpoint, a model folder
    export.py    verl's FSDP shards -> a Hugging Face folder
    tasks.py     a task's prompts (parquet in verl's schema) and its reward
    store.py     samples on disk: parts while they come in, one parquet file with the grades at the end
    worker.py    a process of its own that holds vLLM and writes the parts
    engine.py    starts that process, follows it, ends it
    summary.py   the numbers: accuracy, pass@k, maj@k, newly solved and lost, uniqueness, length
    printing.py  the table

Importing the package imports nothing heavy.
"""
