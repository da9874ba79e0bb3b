"""The commands `klreg export` and `klreg eval`: arguments, one call each, printing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from klreg_verl.arguments import AsJson

if TYPE_CHECKING:
    from klreg_verl.evaluation.evaluate import Sampling
    from klreg_verl.evaluation.subjects import Subject


DEFAULT_TOKENS = 1024
"""Of a response, where no run says how long they were in training."""


def export_command(
    run: Annotated[
        str, typer.Argument(help="A run folder, its path below the runs folder, or a checkpoint.", metavar="RUN")
    ],
    step: Annotated[int | None, typer.Option(help="Updates done; default: the newest whole checkpoint.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to make; default: exports/step<N>, or exports/step<N>-<dtype>, in the run folder."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto (the configuration's), float32, bfloat16 or float16.")] = "auto",
) -> None:
    """The model of a checkpoint as a Hugging Face folder: weights, configuration, tokenizer."""
    from klreg_verl.evaluation import export, subjects

    (subject,) = subjects.find(run if step is None else f"{run}@{step}")
    if export.actor_folder(subject.path) is None:
        raise ValueError(f"{subject.path} is a model folder already: there is nothing to export.")
    facts = {"run": None if subject.run is None else str(subject.run.path), "step": subject.step}
    folder = subject.exported if dtype == "auto" else subject.exported.with_name(f"{subject.exported.name}-{dtype}")
    made = export.export(subject.path, out or folder, dtype=dtype, facts=facts)
    typer.echo(f"{subject.name}: {made}")


def eval_command(
    models: Annotated[
        list[str],
        typer.Argument(
            help="RUN (newest checkpoint), RUN@STEP, RUN@all, a checkpoint, or a model folder.", metavar="M"
        ),
    ],
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="A parquet file, a folder with test.parquet, palindrome, a skill, retention (the recipe's skills); "
            "default: the run's own."
        ),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", "-n", help="Per prompt.")] = 16,
    k: Annotated[list[int] | None, typer.Option(help="Of pass@k and maj@k; default: 1, 2, 4, ... n.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="1 is the whole distribution.")] = 1.0,
    max_tokens: Annotated[int | None, typer.Option(help="Of a response; default: as in the run, or 1024.")] = None,
    prompts: Annotated[int | None, typer.Option(help="Only the first so many of a task; a skill has 64.")] = None,
    seed: Annotated[int, typer.Option(help="Of sampling; every sample has its own from it.")] = 1,
    start: Annotated[str | None, typer.Option(help="The model that all are compared with.")] = None,
    no_start: Annotated[bool, typer.Option("--no-start", help="Leave the runs' starting models out.")] = False,
    reward: Annotated[str | None, typer.Option(help="Another reward: pkg.module:function.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where evaluations of models without a run go.")] = None,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="GPUs for one model.")] = 1,
    memory_share: Annotated[float, typer.Option(help="Of a GPU's memory, for vLLM.")] = 0.9,
    trust_remote_code: Annotated[bool, typer.Option(help="Whether code in the folders may run.")] = False,
    as_json: AsJson = False,
) -> None:
    """Accuracy, pass@k, maj@k, uniqueness and length of models side by side; prompts newly solved and newly lost.

    Runs are compared with the model they started from. A call that was stopped goes on when it is made again.
    """
    from klreg_verl.evaluation import evaluate, printing, subjects, tasks
    from klreg_verl.experiment.store import cache_root, runs_root
    from klreg_verl.replay.models import best_device

    asked = [subject for text in models for subject in subjects.find(text, out)]
    every = with_starts(asked, start, no_start, out)
    sampling = sampling_of(every, max_tokens, samples, temperature, top_p, seed, prompts)
    note, cache = progress(), cache_root(runs_root())
    wanted = [one for name in task or [tasks.OWN] for one in tasks.find(name, every, cache, prompts, reward, note)]
    machine = evaluate.Machine(
        platform=best_device(),
        tensor_parallel=tensor_parallel,
        memory_share=memory_share,
        trust_remote_code=trust_remote_code,
    )
    found = evaluate.evaluate(every, wanted, sampling, machine, ks=k, note=note)
    note("")
    if as_json:
        typer.echo(json.dumps([record for records in found for record in records], indent=2))
        return
    typer.echo("\n\n".join("\n".join(printing.lines(records)) for records in found))
    typer.echo("\n".join(["", *printing.legend(found[0])]))
    typer.echo("\n".join(["", *printing.folders(subject.evals for subject in every)]))


def with_starts(asked: Sequence[Subject], start: str | None, no_start: bool, out: Path | None) -> list[Subject]:
    """The models with those that they are compared with in front: `start`, or the start of each run."""
    from dataclasses import replace

    from klreg_verl.evaluation import subjects

    if start is not None and no_start:
        raise ValueError("--start and --no-start contradict each other. Keep one.")
    if start is not None:
        found = subjects.find(start, out)
        if len(found) != 1:
            raise ValueError(f"--start {start} names {len(found)} models. Name one.")
        return _each_once([replace(found[0], is_start=True), *asked])
    runs = {subject.run.path: subject.run for subject in asked if subject.run is not None}
    return _each_once([*(() if no_start else map(subjects.start_of, runs.values())), *asked])


def _each_once(found: Sequence[Subject]) -> list[Subject]:
    """A model that is named twice is evaluated once for each place of its results."""
    first: dict[tuple[Path, Path], Subject] = {}
    for subject in found:
        first.setdefault((subject.path, subject.evals), subject)
    return list(first.values())


def sampling_of(
    subjects: Sequence[Subject],
    max_tokens: int | None,
    samples: int,
    temperature: float,
    top_p: float,
    seed: int,
    prompts: int | None,
) -> Sampling:
    """The settings asked for; responses are by default as long as in the runs. Raises ValueError where these differ."""
    from klreg_verl.evaluation.evaluate import Sampling

    specs = [spec for subject in subjects if subject.run is not None and (spec := subject.run.spec()) is not None]
    known = sorted({spec.train.max_response_tokens for spec in specs})
    if max_tokens is None and len(known) > 1:
        raise ValueError(f"The runs' responses have at most {known} tokens. Say which limit to use: --max-tokens.")
    usual = known[0] if known else DEFAULT_TOKENS
    longest = usual if max_tokens is None else max_tokens
    return Sampling(
        samples=samples, temperature=temperature, top_p=top_p, max_tokens=longest, seed=seed, prompts=prompts
    )


def progress() -> Callable[[str], None]:
    """Notes on standard error: on one line of a terminal, else a line each."""
    if sys.stderr.isatty():
        return lambda text: typer.echo(f"\r\x1b[2K{text}", nl=False, err=True)
    return lambda text: typer.echo(text, err=True) if text else None
