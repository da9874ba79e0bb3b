"""The commands `klreg kl` and `klreg replay`: arguments, one call each, printing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from klreg_verl.arguments import AsJson

if TYPE_CHECKING:
    from klreg_verl.replay.comparison import Comparison
    from klreg_verl.replay.run import Moment

Device = Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda where there is one.")]


def kl_command(
    policy: Annotated[Path, typer.Argument(help="A model folder, or a checkpoint of a run.", metavar="POLICY")],
    reference: Annotated[Path, typer.Argument(help="Another, of the same vocabulary.", metavar="REF")],
    prompts: Annotated[Path, typer.Option(help="Parquet in verl's schema, or text with one prompt per line.")],
    responses: Annotated[int, typer.Option(min=1, help="Sampled from the policy, per prompt.")] = 8,
    max_prompts: Annotated[int | None, typer.Option(min=1, help="Only so many prompts of the file.")] = None,
    temperature: Annotated[float, typer.Option(help="Of sampling and of both models' probabilities.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of a response.")] = 256,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 1,
    estimator: Annotated[
        list[str] | None, typer.Option(help="One of your own beside the table's: pkg.mod:name.")
    ] = None,
    device: Device = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Whether code in the folders may run.")] = False,
    as_json: AsJson = False,
) -> None:
    """The KL between two models on prompts: exact over the vocabulary, and by each estimator with its error."""
    from klreg_verl.core import kl
    from klreg_verl.replay import divergence, models, printing
    from klreg_verl.replay import prompts as prompt_files

    names = (*kl.names(), *(estimator or ()))
    for name in names:
        kl.estimator(name)
    options: dict[str, Any] = {"device": device or models.best_device(), "trust_remote_code": trust_remote_code}
    ours, theirs = models.load(policy, **options), models.load(reference, **options)
    models.check_same_vocabulary(ours, theirs)
    given = prompt_files.read(prompts, ours.tokenizer, max_prompts)
    note = _note()
    asked: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    sampled = divergence.sample(ours, given, responses=responses, note=note, **asked)
    found = divergence.measure(ours, theirs, sampled, temperature=temperature, estimators=names, note=note)
    note("")
    if as_json:
        what = {"policy": str(policy), "reference": str(reference), "prompts_file": str(prompts)}
        typer.echo(json.dumps({**what, **asked, **divergence.to_json(found)}, indent=2))
        return
    typer.echo(f"policy {policy}\nref    {reference}\ntemperature {temperature:g}, seed {seed}")
    typer.echo("\n".join(printing.divergence_lines(found)))


def replay_command(
    run: Annotated[Path, typer.Argument(help="A run folder, or its path below the runs folder.", metavar="RUN")],
    step: Annotated[int | None, typer.Option(help="Updates done; default: the newest that can be replayed.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option(help="One of your own: NAME=key:value,... as in a recipe's kl block.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Settings by name or pattern, e.g. 'loss/*'.")] = None,
    both: Annotated[bool, typer.Option(help="Every setting of placement both, not only the sound ones.")] = False,
    memory_gb: Annotated[float, typer.Option(min=0.0, help="For gradients; above it they are sketched.")] = 4.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the sketch.")] = 1,
    reference: Annotated[Path | None, typer.Option(help="Where the run's reference lies, if it was moved.")] = None,
    device: Device = None,
    figure: Annotated[Path | None, typer.Option(help="Write the cosines as a picture (PNG).")] = None,
    as_json: AsJson = False,
) -> None:
    """The gradient that every KL setting would have produced at a saved step of a run: cosines and sizes."""
    from klreg_verl.replay import comparison, gradients, models, printing, settings
    from klreg_verl.replay import run as runs

    own = [settings.parse(text) for text in setting or ()]
    moment, note = runs.find(run, step), _note()
    wanted = settings.chosen([*settings.table(both=both), *moment.own_setting()], own, only or ())
    place = device or models.best_device()
    samples = moment.samples().to(place)
    said: list[str] = []
    policy, ref = runs.load_models(moment, reference=reference, device=place, note=said.append)
    scored = gradients.score(policy.network, ref.network, samples)
    products = gradients.products(
        policy.network, ref.network, scored, wanted, memory_bytes=memory_gb * 1e9, seed=seed, note=note
    )
    note("")
    found = comparison.compare(products)
    norms = {"gradient_norm": found.own_norm, "gradient_norm_logged": moment.logged_gradient_norm()}
    facts = _facts(moment, scored) | norms | {"reference": str(ref.path), "notes": said}
    if figure is not None:
        _draw(found, figure, moment, facts)
    if as_json:
        typer.echo(json.dumps({**facts, **found.to_json()}, indent=2))
        return
    typer.echo("\n".join([*_head(facts), "", *printing.comparison_lines(found)]))
    if figure is not None:
        typer.echo(f"figure: {figure}")


def _facts(moment: Moment, scored: Any) -> dict[str, Any]:
    """What was replayed, and the KL as it is here beside what the run logged of the same samples."""
    from klreg_verl.core import kl
    from klreg_verl.core.aggregation import masked_mean

    mask, samples = scored.samples.batch.response_mask, scored.samples
    return {
        "run": str(moment.folder.path),
        "step": moment.step,
        "prompts": len(samples.group_ids.unique()),
        "responses": len(mask),
        "tokens": int(mask.sum()),
        "advantage": samples.advantage,
        "aggregation": samples.aggregation,
        "temperature": samples.temperature,
        "updates_per_batch": moment.spec.train.updates_per_batch,
        "k1_token": masked_mean(kl.value("k1", scored.logprobs, scored.ref_logprobs), mask).item(),
        "k1_token_logged": moment.logged("kl_ref/k1_token"),
    }


def _head(facts: dict[str, Any]) -> list[str]:
    checks = [
        ("k1 to the reference", facts["k1_token"], facts["k1_token_logged"], "nats per token"),
        ("gradient of the run's own loss", facts["gradient_norm"], facts["gradient_norm_logged"], "long"),
    ]
    lines = [
        f"{facts['run']} after update {facts['step']}, on the samples of step {facts['step'] + 1}: {facts['prompts']} "
        f"prompts, {facts['responses']} responses, {facts['tokens']:,} tokens",
        f"task: {facts['advantage']}, {facts['aggregation']}; reference {facts['reference']}",
        *(
            f"{what}: {here:.6f} {unit} here" + ("" if logged is None else f", {logged:.6f} in the run's metrics")
            for what, here, logged, unit in checks
            if here is not None
        ),
    ]
    if facts["updates_per_batch"] > 1:
        lines.append(f"The run makes {facts['updates_per_batch']} updates per batch; this is all of it at the first.")
    return [*lines, *facts["notes"]]


def _draw(found: Comparison, path: Path, moment: Moment, facts: dict[str, Any]) -> None:
    from klreg_verl.replay import figure as figures

    where = f"{moment.spec.recipe}/{moment.spec.run_id}"
    sketch = found.products.sketch
    how = "" if sketch is None else f" · sketched, ±{1 / sketch.width**0.5:.2g}"
    figures.save(
        found,
        path,
        "Which way would each KL setting have pulled?",
        f"{where} after update {facts['step']} · {facts['responses']} responses, {facts['tokens']:,} tokens{how}\n"
        "(+n): n more settings have the same gradient",
    )


def _note() -> Callable[[str], None]:
    """Progress on one line of a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        return lambda text: None
    return lambda text: typer.echo(f"\r\x1b[2K{text}", nl=False, err=True)
