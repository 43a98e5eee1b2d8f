"""What runs on the server when a config is submitted: the same experiment, with clients that exist elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scalefl.config import make_config
from scalefl.engines.flower.grid import GridLink
from scalefl.engines.flower.server import refusing_app, server_app
from scalefl.engines.remote import RemoteEngine
from scalefl.experiment import Experiment
from scalefl.problem import Problem
from scalefl.runner import run_rounds


def main(link: GridLink, settings: Mapping[str, Any]) -> None:
    """Run what was submitted, into the folder that came with it."""
    config = make_config(json.loads(settings["config"]))

    def reach(problem: Problem) -> RemoteEngine:
        return RemoteEngine(
            link,
            problem,
            config.engine.patience,
            precision=config.engine.precision,
            is_private=config.privacy is not None,
        )

    rounds = run_rounds(Experiment(config, reach), Path(settings["folder"]), resume=settings["resume"])
    for progress in rounds:
        line = progress.line
        lost = f", {len(line['lost'])} lost" if line.get("lost") else ""
        print(f"round {line['round']}/{progress.rounds}, {line['stage']}{lost}", flush=True)


app = server_app(main)
client = refusing_app()
