"""What Flower's programs load by name when a run is submitted: a server's part, and a client's that refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from scalefl.engines.flower.grid import QUERY, TASK, GridLink


def server_app(main: Callable[[GridLink, Mapping[str, Any]], None]) -> ServerApp:
    """An app that runs `main` with a link to the nodes and the run's settings."""
    app = ServerApp()

    @app.main()
    def run(grid: Grid, context: Context) -> None:
        main(GridLink(grid), context.run_config)

    return app


def refusing_app() -> ClientApp:
    """What Flower's own executor finds on a node; ours never loads an app that a server sends."""
    app = ClientApp()

    @app.train(TASK.partition(".")[2])
    @app.query(QUERY.partition(".")[2])
    def refuse(message: Message, context: Context) -> Message:
        raise RuntimeError("start this node with `scalefl deploy node`, not with Flower's own executor")

    return app
