"""Sums of two numbers below 20: a task of one's own, as a user would bring it. It knows nothing of this project.

python recipes/sums/task.py        writes train.parquet and val.parquet beside itself
"""

import random
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    """1 if the last whole number of the answer is the sum, else 0."""
    numbers = re.findall(r"\d+", solution_str)
    return float(bool(numbers) and int(numbers[-1]) == int(ground_truth))


def row(first, second, index):
    return {
        "data_source": "sums",
        "prompt": [{"role": "user", "content": f"What is {first} + {second}?"}],
        "reward_model": {"style": "rule", "ground_truth": str(first + second)},
        "extra_info": {"index": index},
    }


def main():
    pairs = [(first, second) for first in range(20) for second in range(20)]
    random.Random(0).shuffle(pairs)
    rows = [row(*pair, index) for index, pair in enumerate(pairs)]
    for name, part in (("train", rows[:368]), ("val", rows[368:])):
        pq.write_table(pa.Table.from_pylist(part), Path(__file__).with_name(f"{name}.parquet"))


if __name__ == "__main__":
    main()
