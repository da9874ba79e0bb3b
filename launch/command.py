"""The subcommands of `klreg` that concern jobs and run folders: submit, retry, cancel, logs, gc, status, smoke."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from klreg_verl.arguments import Arms, AsJson, Overrides, RecipeOrRun, RecipePath, RunsDir, Seeds, Tasks

if TYPE_CHECKING:
    from klreg_verl.experiment.plan import RunSpec
    from launch.job_folder import Job, Submitted
    from launch.profile import Profile
    from launch.slurm import Partition

ProfileName = Annotated[
    str, typer.Option("--profile", help="generic, single_gpu, single_node, multi_node, cpu_test, or a file.")
]


def submit_command(
    recipe: RecipePath,
    profile: ProfileName,
    overrides: Overrides = None,
    arms: Arms = None,
    tasks: Tasks = None,
    seeds: Seeds = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print the script, submit nothing.")] = False,
    runs_dir: RunsDir = None,
) -> None:
    """Submit what is missing of a recipe to Slurm, as one array."""
    from klreg_verl.experiment.store import runs_root
    from launch import missing
    from launch import profile as profiles

    root, cluster = runs_root(runs_dir), profiles.load(profile)
    _, specs = missing.selected(recipe, overrides, arms, tasks, seeds, runs_dir=root, platform=lambda: cluster.platform)
    _submit(specs, cluster, root, dry_run)


def retry_command(
    recipe: RecipeOrRun,
    overrides: Overrides = None,
    profile: Annotated[str | None, typer.Option(help="Default: that of the last submission.")] = None,
    arms: Arms = None,
    tasks: Tasks = None,
    seeds: Seeds = None,
    runs_dir: RunsDir = None,
) -> None:
    """Try failed runs again, with a new budget of attempts, where they stopped."""
    from klreg_verl.experiment.store import run_folder
    from launch import budget, preflight
    from launch import profile as profiles

    specs, root = located(recipe, overrides, arms, tasks, seeds, runs_dir)
    failed = [spec for spec in specs if run_folder(spec, root).state().status == "failed"]
    if not failed:
        typer.echo("No run has failed.")
        return
    chosen = profiles.load(profile) if profile else _last_job(root / specs[0].recipe).profile
    preflight.check_folders(failed, root)
    for spec in failed:
        folder = run_folder(spec, root)
        with folder.lock():
            budget.forgive(folder)
    _submit(failed, chosen, root, dry_run=False)


def cancel_command(
    recipe: RecipeOrRun,
    overrides: Overrides = None,
    arms: Arms = None,
    tasks: Tasks = None,
    seeds: Seeds = None,
    runs_dir: RunsDir = None,
) -> None:
    """Cancel the jobs of a recipe, or of some of its runs. What was saved stays, and `klreg submit` goes on from it."""
    from launch import slurm

    specs, root = located(recipe, overrides, arms, tasks, seeds, runs_dir)
    live = slurm.in_queue(root / specs[0].recipe)
    asked = {spec.run_id for spec in specs}
    names = sorted({element.name for run, element in live.items() if run in asked})
    if not names:
        typer.echo("No job of these runs is in the queue.")
        return
    also = sorted(run for run, element in live.items() if element.name in names and run not in asked)
    slurm.ask("scancel", *names)
    typer.echo(f"cancelled: {', '.join(names)}" + (f" (with it, in the same jobs: {', '.join(also)})" if also else ""))


def logs_command(
    recipe: RecipeOrRun,
    overrides: Overrides = None,
    arms: Arms = None,
    tasks: Tasks = None,
    seeds: Seeds = None,
    attempt: Annotated[int | None, typer.Option(help="Default: the newest.")] = None,
    lines: Annotated[int, typer.Option(help="From the end; 0: all.")] = 40,
    job: Annotated[bool, typer.Option("--job", help="The Slurm job's log instead of the run's.")] = False,
    runs_dir: RunsDir = None,
) -> None:
    """The end of a run's log, without colours and prefixes, or of the job it ran in."""
    from klreg_verl.experiment.store import run_folder
    from launch import failure

    specs, root = located(recipe, overrides, arms, tasks, seeds, runs_dir)
    if len(specs) != 1:
        names = ", ".join(spec.run_id for spec in specs)
        raise ValueError(f"{len(specs)} runs fit: {names}. Name one with --arm, --task and --seed, or by its folder.")
    folder = run_folder(specs[0], root)
    path = folder.attempts_dir / str(attempt) / "log" if attempt else folder.latest / "log"
    path = _job_log(specs[0], root) if job else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such log; the run has {folder.state().attempt} attempts.")
    typer.echo("\n".join([str(path.resolve()), *(line.text for line in failure.clean(path)[-lines:])]))


def gc_command(
    recipe: RecipeOrRun,
    overrides: Overrides = None,
    arms: Arms = None,
    tasks: Tasks = None,
    seeds: Seeds = None,
    optimizer: Annotated[
        bool, typer.Option("--optimizer", help="Also the optimizer's state of done runs, which then end for good.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without this it is only listed.")] = False,
    runs_dir: RunsDir = None,
) -> None:
    """List, or remove, checkpoints that nobody needs any more."""
    from klreg_verl.experiment.estimate import size
    from launch import gc

    specs, root = located(recipe, overrides, arms, tasks, seeds, runs_dir)
    found = gc.find(specs, root, optimizer)
    for waste in found:
        typer.echo(f"{size(waste.bytes):>10}  {waste.path}  ({waste.why})")
    if yes:
        gc.remove(found)
    total = size(sum(waste.bytes for waste in found))
    typer.echo(f"{total} {'removed' if yes else 'could be removed: --yes does it' if found else 'to remove'}")


def status_command(
    recipe: RecipePath,
    overrides: Overrides = None,
    as_json: AsJson = False,
    live: Annotated[bool, typer.Option("--live", help="A table that follows the runs until all are over.")] = False,
    runs_dir: RunsDir = None,
) -> None:
    """How each run stands: state, step, attempt, Slurm's state and time left, accuracy, KL, reason of the last end."""
    from launch import status

    specs, root = located(recipe, overrides, None, None, None, runs_dir)
    if live:
        _follow(specs, root)
        return
    found = status.rows(specs, root)
    typer.echo(json.dumps(found, indent=2) if as_json else "\n".join(map(status.line, found)))


def smoke_command(
    profile: ProfileName,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Of the little run, e.g. model.path=/shared/model.", metavar="K=V")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print the script, submit nothing.")] = False,
    runs_dir: RunsDir = None,
) -> None:
    """Try a cluster out with a job of some minutes: nodes, files, collectives, vLLM, reference, steps, save, resume."""
    import time

    from klreg_verl.experiment.store import runs_root
    from launch import profile as profiles
    from launch import slurm, smoke

    root = runs_root(runs_dir) / time.strftime("smoke-%Y%m%d-%H%M%S")
    job = smoke.make_job(profiles.load(profile), root, overrides or ())
    known = _partitions(dry_run)
    slurm.require(slurm.check(job.specs, job.profile, root, {}))
    if known is not None:
        slurm.require(slurm.check_cluster(job.specs, job.profile, known))
    if dry_run:
        _show(job, root / "smoke")
        return
    slurm.prepare(job.specs, job.profile, root, typer.echo)
    submitted = slurm.submit(job, root / "smoke")
    _tell(submitted, job)
    smoke.wait(submitted, typer.echo)
    found = smoke.verdicts(job, submitted)
    typer.echo("\n".join(map(str, found)))
    if not all(verdict.fine for verdict in found):
        raise typer.Exit(1)


def located(
    path: Path,
    overrides: list[str] | None,
    arms: list[str] | None,
    tasks: list[str] | None,
    seeds: list[int] | None,
    runs_dir: Path | None,
) -> tuple[list[RunSpec], Path]:
    """The runs that a recipe and its choices, or a run's folder, stand for; and where run folders live."""
    from klreg_verl.experiment.selection import run_path, selected
    from klreg_verl.experiment.store import RunFolder, runs_root

    root = runs_root(runs_dir)
    found = run_path(path, root)
    if found is None and path.is_dir():
        raise ValueError(f"{path} is no run's folder: it has no spec.json. Give one, or a recipe's YAML file.")
    if found is None:
        return selected(path, overrides, arms, tasks, seeds)[1], root
    spec = RunFolder(found.resolve()).spec()
    assert spec is not None  # run_path has seen its file
    depth = len(Path(spec.recipe, spec.run_id).parts)
    return [spec], found.resolve().parents[depth - 1]


# ---------------------------------------------------------------------------------------------------- parts


def _submit(specs: list[RunSpec], profile: Profile, root: Path, dry_run: bool) -> None:
    from klreg_verl.experiment import estimate
    from launch import preflight, slurm

    preflight.check_same(specs, root)
    recipe_dir = root / specs[0].recipe
    known = _partitions(dry_run)
    queued = {} if known is None else slurm.in_queue(recipe_dir)
    choice = slurm.choose(specs, root, queued)
    typer.echo(choice.describe())
    if not choice.missing:
        return
    slurm.require(slurm.check(choice.missing, profile, root, estimate.step_times(specs, root)))
    if known is not None:
        slurm.require(slurm.check_cluster(choice.missing, profile, known))
    jobs = [slurm.make_job(runs, profile, root) for runs in _by_resources(choice.missing)]
    if dry_run:
        for job in jobs:
            _show(job, recipe_dir)
        return
    slurm.prepare(choice.missing, profile, root, typer.echo)
    for job in jobs:
        _tell(slurm.submit(job, recipe_dir), job)


def _partitions(dry_run: bool) -> list[Partition] | None:
    """The cluster's; None where a dry run, which shows what it can, finds none."""
    from launch import slurm

    try:
        return slurm.partitions()
    except (ValueError, slurm.SlurmError) as error:
        if not dry_run:
            raise
        typer.secho(f"not compared with a cluster: {error}", fg="yellow", err=True)
        return None


def _by_resources(specs: tuple[RunSpec, ...]) -> list[list[RunSpec]]:
    """One array asks for the same nodes in all its tasks."""
    kinds = dict.fromkeys(spec.resources for spec in specs)
    return [[spec for spec in specs if spec.resources == kind] for kind in kinds]


def _show(job: Job, recipe_dir: Path) -> None:
    from launch import slurm

    typer.echo(slurm.render(job, recipe_dir / "slurm" / "N"))
    for number, task in enumerate(job.tasks):
        typer.echo(f"task {number}: {', '.join(spec.run_id for spec in task)}")
    typer.echo("nothing was submitted")


def _tell(submitted: Submitted, job: Job) -> None:
    count = sum(map(len, job.tasks))
    typer.echo(f"job {submitted.job_id}: {len(job.tasks)} tasks, {count} runs; its logs: {submitted.folder / 'logs'}")


def _last_job(recipe_dir: Path) -> Job:
    from launch.job_folder import Job, submissions

    submitted = submissions(recipe_dir)
    if not submitted:
        raise ValueError(f"{recipe_dir} has no submission whose profile could be used again. Name one with --profile.")
    return Job.read(submitted[-1].folder)


def _job_log(spec: RunSpec, root: Path) -> Path:
    from launch.job_folder import submissions

    found = [
        one.log(task)
        for one in submissions(root / spec.recipe)
        for task, runs in enumerate(one.runs)
        if spec.run_id in runs
    ]
    if not found:
        raise ValueError(f"{spec.run_id} was never submitted, so no job has a log of it.")
    return found[-1]


def _follow(specs: list[RunSpec], root: Path) -> None:
    from rich.console import Console
    from rich.live import Live

    from launch import status

    with Live(console=Console(), refresh_per_second=2) as live:
        status.watch(lambda: status.rows(specs, root), lambda found: live.update(table(found)))


def table(found: list[dict[str, Any]]) -> Any:
    """The rows as a table for a terminal."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False)
    graded = any(each["score"] is not None for each in found)
    shown = ("score" if graded else "accuracy", "kl")
    for column in ("run", "state", "step", "attempt", shown[0], "KL [nats]", "job", "Slurm", "left", "reason"):
        made.add_column(column)
    for each in found:
        numbers = ["-" if each[key] is None else f"{each[key]:.3f}" for key in shown]
        cells = [each["run_id"], each["status"], f"{each['step']}/{each['steps']}", str(each["attempt"]), *numbers]
        style = {"done": "green", "failed": "red", "conflict": "red"}.get(each["status"], "")
        made.add_row(*cells, each["job"], each["slurm"], each["left"], each["reason"], style=style)
    return made
