"""The command line. What needs torch is imported by the commands that need it, so that help comes at once."""

from __future__ import annotations

import logging
import math
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from click import ClickException, Context
from rich.console import Console
from typer.core import TyperGroup

from scalefl.deploy_cli import deploy
from scalefl.errors import ConfigError, ScaleFLError
from scalefl.lookup import look_in
from scalefl.run_folder import RunFolder, to_json
from scalefl.terminal import (
    Interrupted,
    apart,
    conclude,
    conclude_comparison,
    console_of,
    follow,
    follow_jobs,
    print_files,
    talking,
    telling,
)
from scalefl.units import privacy

if TYPE_CHECKING:
    from scalefl.config import Config
    from scalefl.experiment import Experiment
    from scalefl.report.tables import Table

INTERRUPTED = 130

DEFAULT_RUNS = Path("runs")


Tell = Callable[[str], None]
"""Shows what is under way."""


class _Commands(TyperGroup):
    """Turns what goes wrong in a command into one message and an exit status."""

    def invoke(self, ctx: Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ClickException, typer.Exit, typer.Abort, BrokenPipeError):
            raise  # usage errors and ends: click's own
        except (Exception, KeyboardInterrupt) as error:
            if ctx.params["debug"]:
                traceback.print_exc()
            typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
            typer.echo(_message(error), err=True)
            raise typer.Exit(INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1) from None


app = typer.Typer(
    cls=_Commands,
    help="Federated learning for clients that are too small to train the model.",
    no_args_is_help=True,
    add_completion=False,
    suggest_commands=False,  # click does it
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, as work.lr=0.1; may be given several times."),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"scalefl {version('scalefl')}")
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    debug: Annotated[
        bool, typer.Option("--debug", help="Print the traceback of an error, and of those that cost clients.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command; `_Commands` reads `debug` too."""
    context.with_resource(talking(logging.DEBUG if debug else logging.WARNING))


@app.command()
def run(
    config: ConfigFile,
    settings: Settings = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last saved round.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove an earlier run of this name.")] = False,
    runs: Annotated[Path, typer.Option("--runs", help="The folder of all runs.")] = DEFAULT_RUNS,
) -> None:
    """Train as CONFIG says (a TOML file, or the config.json of a run), into a folder of the run's own."""
    if resume and overwrite:
        raise typer.BadParameter("--resume and --overwrite contradict each other")
    console = console_of()
    with telling(f"reading {config}"):
        loaded = _load(config, settings)
        folder = runs / loaded.name
        _check(loaded, folder, resume=resume, overwrite=overwrite)
    console.print(_headline(loaded), highlight=False)
    try:
        _train(console, loaded, folder, resume=resume, overwrite=overwrite)
    except KeyboardInterrupt:
        command = ["scalefl", "run", str(config), *(word for text in settings or () for word in ("--set", text))]
        command += [] if runs == DEFAULT_RUNS else ["--runs", str(runs)]
        saved = (folder / "state.safetensors").exists()
        what = f"finished rounds are saved in {folder}" if saved else "no round was finished yet"
        raise Interrupted(f"interrupted; {what}. Go on with\n  {shlex.join([*command, '--resume'])}") from None
    conclude(console, folder)


@app.command()
def compare(
    config: ConfigFile,
    settings: Settings = None,
    runs: Annotated[Path, typer.Option("--runs", help="The folder of all runs.")] = DEFAULT_RUNS,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Where tables and pictures go: by default beside the runs."),
    ] = None,
    parallel: Annotated[
        int | None, typer.Option("--parallel", min=1, help="Runs side by side: by default as many as there are cores.")
    ] = None,
) -> None:
    """Run all variants of CONFIG for all its seeds and scenarios, side by side, and put them in one table.

    What is finished is not run again: the same command goes on after an interruption.
    """
    console = console_of()
    with telling(f"reading {config}"):
        from scalefl.comparison import load_comparison

        comparison = load_comparison(config, tuple(settings or ()), runs=runs)
    comparison.describe()
    failed = follow_jobs(console, comparison, parallel)
    conclude_comparison(console, comparison.path, out)
    if failed:
        raise ScaleFLError(f"{len(failed)} of {len(comparison.jobs)} runs failed:\n" + "\n".join(failed))


@app.command()
def plan(
    config: ConfigFile,
    settings: Settings = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE", help="Draw it too, into a PNG, SVG or PDF file.")
    ] = None,
) -> None:
    """Print what training as CONFIG says needs, and which clients can do what; train nothing."""
    if picture is not None and not picture.suffix:
        raise ScaleFLError(f"cannot draw {picture}: name a file that ends in .png, .svg or .pdf")
    from scalefl.bookkeeping import base_bytes
    from scalefl.report.tables import class_table, memory_table, show

    with telling(f"reading {config}"), apart(as_json):
        experiment = _assembled(_load(config, settings))
        found = experiment.plan().to_json()
        base = base_bytes()
    if picture is not None:
        _draw_plan(found, experiment.config.name, picture)
    classes = [
        {
            "name": member.name,
            "budget_bytes": member.memory_bytes,
            "planned_bytes": found["budgets_bytes"][member.name],
            "share": member.share,
        }
        for member in experiment.population.classes
    ]
    spent = experiment.privacy.spent(experiment.config.rounds) if experiment.privacy else None
    if spent:
        found = {**found, "privacy": spent}
    if as_json:
        typer.echo(to_json({**found, "classes": classes, "base_bytes": base}, indent=2))
        return
    console = console_of()
    show(console, memory_table(found))
    show(console, class_table(classes, found["full"]["peak_bytes"], base))
    if spent:
        console.print(f"Privacy after {experiment.config.rounds} rounds: {privacy(spent)}", highlight=False)


def _draw_plan(found: Mapping[str, Any], name: str, target: Path) -> None:
    from scalefl.report.pictures import memory_picture, save

    try:
        save(memory_picture(found, name), target)
    except (OSError, ValueError) as error:  # no such folder, or no format of that name
        raise ScaleFLError(f"cannot draw {target}: {getattr(error, 'strerror', None) or error}") from error


@app.command()
def bench(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", show_default=False)] = None,
    settings: Settings = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    seconds: Annotated[
        float, typer.Option("--seconds", help="For how long rounds are timed, about; a few are in any case.")
    ] = 12.0,
) -> None:
    """Time a few rounds of CONFIG on this machine, and tell what the whole run will take; write nothing.

    Without CONFIG: how fast this machine trains standard workloads, and the overhead over a bare PyTorch loop.
    """
    if not 0 < seconds < math.inf:
        raise typer.BadParameter(f"{seconds:g} is not a time: expected more than 0", param_hint="--seconds")
    if config is None and settings:
        raise typer.BadParameter("there is no CONFIG in which to change a setting", param_hint="--set")
    from scalefl.report.tables import show

    with telling(f"reading {config}" if config else "preparing") as tell, apart(as_json):
        loaded = _load(config, settings) if config else None
        found, table = _bench_run(loaded, seconds, tell) if loaded else _bench_machine(seconds, tell)
    if as_json:
        typer.echo(to_json(found, indent=2))
    else:
        show(console_of(), table)


def _bench_machine(seconds: float, tell: Tell) -> tuple[dict[str, Any], Table]:
    from scalefl.bench import WORKLOADS, throughput
    from scalefl.bookkeeping import environment
    from scalefl.report.bench import machine_table

    done = []
    for workload in WORKLOADS:
        tell(f"timing {workload.name}")
        done.append(throughput(workload, seconds))
    found = {"environment": environment(), "workloads": [one.to_json() for one in done]}
    return found, machine_table(found)


def _bench_run(config: Config, seconds: float, tell: Tell) -> tuple[dict[str, Any], Table]:
    from scalefl.bench import preview
    from scalefl.bookkeeping import environment
    from scalefl.engines.trial import described
    from scalefl.report.bench import preview_table

    tell(f"timing rounds of {config.name}")
    done = preview(config, seconds)
    found = {"environment": environment(), "run": done.to_json()}
    return found, preview_table(found, described(done.crew))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...")],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Where to: by default the run's folder, or report/ beside several."),
    ] = None,
) -> None:
    """Remake tables, pictures and their page from the folder of one RUN, of several, or of a comparison.

    The page, report.html, holds all of it in one file.
    """
    from scalefl.report import draw, is_comparison, read_run, side_by_side
    from scalefl.report.tables import comparison, memory_table, show, summary_table

    console = console_of()
    if len(runs) == 1 and is_comparison(runs[0]):
        conclude_comparison(console, runs[0], out)
        return
    found = [read_run(folder) for folder in runs]
    if len(found) == 1:
        show(console, memory_table(found[0].plan))
        show(console, summary_table(found[0]))
        written = draw(found[0], out or runs[0])
    else:
        show(console, comparison(found))
        written = side_by_side(found, out or runs[0].parent / "report")
    print_files(console, written)


@app.command()
def export(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The file to write: .safetensors, or .pt or .pth for torch.load.")
    ] = Path("model.safetensors"),
) -> None:
    """Write the model in the folder RUN under the parameter names of the user's own nn.Module."""
    with telling(f"reading {run_folder}"):
        from scalefl.export import export as export_model

        model, num_tensors = export_model(run_folder, output)
    arguments = ", ".join(f"{name}={value!r}" for name, value in model.arguments)
    typer.echo(f"{output}: {num_tensors} tensors of {model.factory}({arguments})")


app.add_typer(deploy, name="deploy")


def main() -> None:
    """Run the command line; the working directory's modules can be named in configs."""
    look_in(Path.cwd())
    arguments = sys.argv[1:]
    del sys.argv[1:]  # a user's module may look for arguments of its own there
    app(arguments)


def _load(path: Path, settings: list[str] | None) -> Config:
    from scalefl.config import load_config

    return load_config(path, settings or ())


def _headline(config: Config) -> str:
    arguments = ", ".join(f"{name}={value}" for name, value in config.model_arguments.items())
    method = config.method.get("name", "scalefl")
    return f"[bold]{config.name}[/bold]: {config.model}({arguments}) by {method}, {config.rounds} rounds"


def _assembled(config: Config) -> Experiment:
    from scalefl.experiment import Experiment

    return Experiment(config)


def _check(config: Config, folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse at once a folder in which the run can't begin or go on."""
    from scalefl.runner import check_folder

    if overwrite:
        _check_removable(folder)
    else:
        check_folder(config, folder, resume=resume)


def _train(console: Console, config: Config, folder: Path, *, resume: bool, overwrite: bool) -> None:
    from scalefl.engines.trial import described
    from scalefl.runner import run_rounds

    with telling("loading the data"):
        experiment = _assembled(config)
        experiment.check_clients()
        if overwrite:
            _remove(folder)
        crew = None if resume and RunFolder(folder).config.exists() else experiment.settle_engine()
    if crew:
        console.print(f"Engine: {described(crew)}", highlight=False, soft_wrap=True)
    rounds = run_rounds(experiment, folder, resume=resume)
    with closing(rounds):  # Ctrl-C stops the workers at once
        follow(console, rounds, folder)


def _check_removable(folder: Path) -> None:
    """Refuse to remove what is not a run."""
    files = RunFolder(folder)
    if folder.exists() and not (folder.is_dir() and files.only_begun()):
        try:
            files.read_settings()
        except ScaleFLError as error:
            raise ConfigError(f"{folder} is not removed, as it holds more than a run: {error}") from error


def _remove(folder: Path) -> None:
    """Remove a run, and nothing that is not one."""
    files = RunFolder(folder)
    _check_removable(folder)
    if not folder.exists():
        return
    with files.locked():
        files.remove()


def _message(error: BaseException) -> str:
    if isinstance(error, ScaleFLError | Interrupted):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first} (`scalefl --debug …` prints the traceback)"


if __name__ == "__main__":
    main()
