"""`scalefl deploy`: a server and nodes on real machines, in five commands."""

from __future__ import annotations

import contextlib
import shlex
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from scalefl.errors import ConfigError
from scalefl.terminal import Interrupted, conclude, console_of, follow

deploy = typer.Typer(
    help="A server and nodes on real machines, by Flower's own programs (docs/deployment.md).",
    no_args_is_help=True,
    suggest_commands=False,  # click does it
)

HERE = Path()
Folder = Annotated[Path, typer.Option("--dir", "-C", metavar="DIR", help="The deployment's folder.")]


@deploy.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR")],
    nodes: Annotated[int, typer.Option("--nodes", min=0, help="How many nodes there are to be.")] = 2,
    host: Annotated[
        str, typer.Option("--host", metavar="NAME", help="The name or address by which nodes reach the server.")
    ] = "localhost",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Where the server listens.")] = 9092,
    public_port: Annotated[
        int | None,
        typer.Option("--public-port", min=1, max=65535, help="Where a proxy listens for nodes on other machines."),
    ] = None,
) -> None:
    """Make keys, certificates and settings of a server and its nodes in DIR; again, with more nodes, to add some."""
    with _flower():
        from scalefl.deployment.layout import Deployment
        from scalefl.deployment.setup import set_up
    console = console_of()
    for path in set_up(folder, host=host, port=port, public_port=public_port, nodes=nodes):
        _say(console)(f"made {path}")
    deployment = Deployment(folder.absolute())
    _tell_next(console, deployment)


@deploy.command()
def server(folder: Folder = HERE) -> None:
    """Run the server of the deployment in DIR until interrupted."""
    with _until_interrupted():
        with _flower():
            from scalefl.deployment.layout import Deployment
            from scalefl.deployment.server import serve
        serve(Deployment(folder.absolute()), _say(console_of()))


@deploy.command()
def node(
    folder: Annotated[Path, typer.Option("--dir", "-C", metavar="DIR", help="The node's folder.")] = HERE,
    budget: Annotated[
        str | None,
        typer.Option("--budget", help='What training may take, as "256MiB", or "auto": what this machine can spare.'),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="SOURCE", help="Its examples: a folder, or as in docs/config.md.")
    ] = None,
    share: Annotated[
        str | None, typer.Option("--share", metavar="I/N", help="Only every N-th of them, from the I-th on.")
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option("--allow", metavar="MODULE:NAME", help="A model or problem that may run here; several times."),
    ] = None,
) -> None:
    """Run the node in DIR until interrupted. Options win over its node.toml."""
    given: dict[str, Any] = {"budget": budget, "share": share, "allow": allow}
    given["data"] = None if data is None else {"name": data}
    say = _say(console_of())
    with _until_interrupted():
        with _flower():
            from scalefl.deployment.reach import watching
        with watching(folder.absolute(), say) as watch:
            with _flower():
                from scalefl.deployment.layout import NodeFolder
                from scalefl.deployment.node import run_node
            found = NodeFolder(folder.absolute())
            settings = found.settings({key: value for key, value in given.items() if value is not None})
            run_node(found, settings, watch, say)


@deploy.command()
def submit(
    config: Annotated[Path, typer.Argument(metavar="CONFIG")],
    folder: Folder = HERE,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, as work.lr=0.1.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last saved round.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for the end.")] = False,
) -> None:
    """Run CONFIG on the nodes that are there, into the folder runs/ of the deployment."""
    with _flower():
        from scalefl.deployment import submit as jobs
        from scalefl.deployment.layout import Deployment
    deployment, console = Deployment(folder.absolute()), console_of()
    deployment.settings()
    wanted = jobs.load_submission(config, tuple(settings or ()))
    run = jobs.submit(deployment, wanted, _say(console), resume=resume)
    path = deployment.runs / wanted.name
    _say(console)(f"run {run}: {path}")
    if detach:
        return
    try:
        with closing(jobs.follow(deployment, wanted, run)) as rounds:
            follow(console, rounds, path)
    except KeyboardInterrupt:
        jobs.stop(deployment, run, _say(console))
        words = ["scalefl", "deploy", "submit", str(config), "--dir", str(folder), "--resume"]
        words += [word for text in settings or () for word in ("--set", text)]
        raise Interrupted(f"interrupted, and the run stopped. Go on with\n  {shlex.join(words)}") from None
    conclude(console, path)


@deploy.command()
def status(folder: Folder = HERE) -> None:
    """Print which nodes are there and how runs stand."""
    with _flower():
        from scalefl.deployment.layout import Deployment
        from scalefl.deployment.status import node_table, run_table
    from scalefl.report.tables import show

    deployment, console = Deployment(folder.absolute()), console_of()
    deployment.settings()
    show(console, node_table(deployment, _say(console)))
    show(console, run_table(deployment, _say(console)))


def _say(console: Console) -> Any:
    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    return say


def _tell_next(console: Console, deployment: Any) -> None:
    say, here = _say(console), shlex.quote(str(deployment.path))
    settings, has_proxy = deployment.settings(), deployment.proxy.exists()
    if not has_proxy and settings.is_out_of_reach():
        say(
            f"\nNodes are told {settings.address}, and the server listens on {settings.host}, where only this machine "
            "reaches it: begin anew with --public-port, or see docs/deployment.md about `host` in server.toml"
        )
    say("\nNext, on this machine:")
    say(f"  scalefl deploy server --dir {here}")
    if has_proxy:
        say(f"  nginx -c {here}/nginx.conf      # lets nodes in, and nothing else")
    say("On each node, in its folder (copy it there, and remove it here):")
    for name in deployment.nodes[:3]:
        made = shlex.quote(str(deployment.node(name).path))
        say(f"  scalefl deploy node --dir {made} --budget 256MiB --data FOLDER")
    if len(deployment.nodes) > 3:
        say(f"  … and so on: {len(deployment.nodes)} in all")
    say("Then, on this machine:")
    say(f"  scalefl deploy submit CONFIG.toml --dir {here}")
    say(f"  scalefl deploy status --dir {here}")


@contextlib.contextmanager
def _until_interrupted() -> Iterator[None]:
    """Ctrl-C, or what service managers send, ends the block, and that is how it is meant to end."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    # SIGINT too: a shell's background jobs ignore it otherwise.
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _flower() -> Iterator[None]:
    """Say which extra is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(f'`scalefl deploy` needs Flower ({error}): pip install "scalefl[flower]"') from error
