"""A run of verl without this package's hooks, made into a run folder, so that it gets the same report.

What is read, wherever it lies below the given folder:

    <name>.jsonl               verl's file logger: {"step": 3, "data": {"actor/entropy": 0.4, ...}} a line
    events.out.tfevents.*      verl's TensorBoard log, where there is no such file
    <step>.jsonl               verl's dumps (trainer.rollout_data_dir, trainer.validation_data_dir): input, output,
                               score and what the reward function returned, a line a response

verl does not measure the KL of every arm. What it logs of a KL term keeps a name of its own and is not compared with
kl_ref/*, which is a mean over whole responses.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from klreg_verl.analysis.runs import run_folders

FOLDER = "klreg-report"
"""Where the run folder and its report go, below the given folder."""
ARM = "stock"
NAMES = {
    "critic/score/mean": "train/score",
    "critic/rewards/mean": "reward/penalized",
    "actor/entropy": "entropy/token",
    "response_length/mean": "response/length",
    "response_length/clip_ratio": "response/truncated",
    "timing_s/step": "time/step_s",
    "actor/kl_loss": "stock/kl_loss",
    "actor/reward_kl_penalty": "stock/kl_reward",
}
"""verl's key -> ours, where both measure the same thing; the rest of verl's keys are kept as they are."""
VALIDATION = re.compile(r"val-core/(.+)/(?:acc|reward)/mean@\d+$")
FIELDS = pa.schema(
    [
        ("step", pa.int64()),
        ("group", pa.string()),
        ("sample", pa.int64()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("score", pa.float64()),
        ("valid", pa.bool_()),
        ("answer", pa.string()),
    ]
)
STATEMENT = (
    "A stock verl run: its folder does not say which gradient its KL term followed. `klreg doctor --verl` judges the "
    "functions that verl has for it."
)


def is_stock(folder: Path) -> bool:
    """Whether the folder has verl's own output and no run folders."""
    if not folder.is_dir() or any(True for child in _children(folder) for _ in run_folders(child, 1)):
        return False
    return bool(_logs(folder) or _dumps(folder) or _events(folder))


def import_run(folder: Path) -> Path:
    """Writes FOLDER with one run folder in it, anew each time; returns FOLDER's path."""
    target = folder / FOLDER
    rows, dumps = _rows(folder), _dumps(folder)
    rollouts = {step: path for (step, kind), path in dumps.items() if kind == "rollout"}
    responses = {step: _samples(step, path) for step, path in rollouts.items()}
    for step, table in responses.items():
        rows[step]["train/accuracy"] = _share(table)
    task = _task(rows)
    for (step, kind), path in dumps.items():
        if kind == "validation":
            rows[step].setdefault(f"eval/{task}/accuracy", _share(_samples(step, path)))
    shutil.rmtree(target / ARM, ignore_errors=True)
    run = target / ARM / task / "seed0"
    (run / "samples").mkdir(parents=True)
    _write(run, rows)
    for step, table in responses.items():
        pq.write_table(table, run / "samples" / f"step_{step:06d}.parquet")
    return target


def _write(run: Path, rows: Mapping[int, Mapping[str, float]]) -> None:
    """The files of a run folder; a run that says nowhere how it ended is taken as done."""
    last = max(rows, default=0)
    files = {
        "spec.json": {"arm": ARM, "seed": 0, "train": {}, "kl": {}},
        "state.json": {"status": "done", "reason": "", "step": last},
        "provenance.json": {"gradient": STATEMENT},
    }
    for name, value in files.items():
        (run / name).write_text(json.dumps(value) + "\n", encoding="utf-8")
    lines = [json.dumps({"step": step, **rows[step]}) for step in sorted(rows)]
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _children(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir() and path.name != FOLDER and path.name[0] != "."]


def _files(folder: Path, pattern: str) -> list[Path]:
    return [path for path in sorted(folder.rglob(pattern)) if FOLDER not in path.relative_to(folder).parts]


def _logs(folder: Path) -> list[Path]:
    """Files of verl's file logger."""
    known = [path for path in _files(folder, "*.jsonl") if not path.stem.isdigit()]
    return [path for path in known if isinstance(_first(path).get("data"), dict) and "step" in _first(path)]


def _events(folder: Path) -> list[Path]:
    return _files(folder, "events.out.tfevents.*")


def _dumps(folder: Path) -> dict[tuple[int, str], Path]:
    """(step, rollout | validation) -> file. A folder named val... holds validations, and step 0 is one."""
    found = {}
    for path in _files(folder, "*.jsonl"):
        if path.stem.isdigit() and {"input", "output"} <= _first(path).keys():
            step = int(path.stem)
            kind = "validation" if "val" in path.parent.name.lower() or step == 0 else "rollout"
            found[step, kind] = path
    return found


def _first(path: Path) -> Mapping[str, Any]:
    return next(_lines(path), {})


def _lines(path: Path) -> Iterator[Mapping[str, Any]]:
    """The lines that are JSON objects: verl's logger is cut anywhere when its process is killed."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                yield value


def _rows(folder: Path) -> defaultdict[int, dict[str, float]]:
    """step -> metrics under our names where there is one, besides verl's own."""
    rows: defaultdict[int, dict[str, float]] = defaultdict(dict)
    for step, key, value in _logged(folder):
        rows[step][key] = value
        rows[step] |= {name: value for name in _named(key)}
    return rows


def _logged(folder: Path) -> Iterator[tuple[int, str, float]]:
    logs = _logs(folder)
    for path in logs:
        for line in _lines(path):
            for key, value in line["data"].items():
                if isinstance(value, int | float) and math.isfinite(value):
                    yield int(line["step"]), key, float(value)
    for path in [] if logs else _events(folder):
        yield from _of_tensorboard(path)


def _of_tensorboard(path: Path) -> Iterator[tuple[int, str, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    for key in read.Tags()["scalars"]:
        for event in read.Scalars(key):
            if math.isfinite(event.value):
                yield event.step, key, event.value


def _named(key: str) -> Iterator[str]:
    if key in NAMES:
        yield NAMES[key]
    if found := VALIDATION.match(key):
        yield f"eval/{_plain(found[1])}/accuracy"


def _task(rows: Mapping[int, Mapping[str, float]]) -> str:
    """The first task that was validated on."""
    known = sorted({key for row in rows.values() for key in row if key.startswith("eval/")})
    return known[0].split("/")[1] if known else "verl"


def _plain(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)


def _samples(step: int, path: Path) -> pa.Table:
    """Responses by prompt. Right is what the reward calls "acc", else a score above 0."""
    groups: dict[str, int] = {}
    drawn: defaultdict[str, int] = defaultdict(int)
    rows = []
    for line in _lines(path):
        prompt, response, score = str(line["input"]), str(line["output"]), float(line.get("score") or 0.0)
        group = groups.setdefault(prompt, len(groups))
        valid = bool(line["acc"]) if line.get("acc") is not None else score > 0
        rows.append(
            {
                "step": step,
                "group": str(group),
                "sample": drawn[prompt],
                "prompt": prompt,
                "response": response,
                "score": score,
                "valid": valid,
                "answer": str(line.get("pred") or response) if valid else "",
            }
        )
        drawn[prompt] += 1
    return pa.Table.from_pylist(rows, schema=FIELDS)


def _share(samples: pa.Table) -> float:
    valid = samples["valid"].to_pylist()
    return sum(valid) / len(valid) if valid else 0.0
