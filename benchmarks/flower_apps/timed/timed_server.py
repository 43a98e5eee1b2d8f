"""What `scalefl deploy submit` has the server run, under a link that notes when tasks go out and answers come in."""

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from scalefl.deployment.app import main
from scalefl.engines.flower.grid import GridLink
from scalefl.engines.flower.server import server_app
from scalefl.engines.messages import Offer, Parcel, Reply, Update, unpack
from scalefl.engines.remote import Answer


class TimedLink:
    def __init__(self, link: GridLink, path: Path) -> None:
        self._link, self._path = link, path

    def nodes(self) -> list[int]:
        return self._link.nodes()

    def push(self, node: int, parcel: Parcel, *, round: int | None) -> str:
        name = self._link.push(node, parcel, round=round)
        if round is not None:
            self._note(what="sent", round=round + 1)
        return name

    def pull(self, messages: Iterable[str]) -> list[Answer]:
        answers = self._link.pull(messages)
        for parcel in filter(None, (answer.parcel for answer in answers)):
            said = unpack(parcel, Reply)
            if isinstance(said, Update):
                self._note(what="came", round=said.round + 1, seconds=said.seconds)
            elif not isinstance(said, Offer):
                raise SystemExit(f"a node failed: {said}")
        return answers

    def _note(self, **line: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({**line, "at": time.time()}) + "\n")


def timed(link: GridLink, settings: Mapping[str, Any]) -> None:
    main(TimedLink(link, Path(settings["folder"]).with_suffix(".messages")), settings)  # type: ignore[arg-type]


app = server_app(timed)
