"""A deployment's server: Flower's SuperLink, and the nodes that it knows."""

from __future__ import annotations

import json
import os
import time
from typing import Any

from scalefl.checkpoint import write_whole
from scalefl.deployment.layout import CONNECTION, Deployment
from scalefl.deployment.programs import (
    Program,
    ProgramFailed,
    Say,
    adopt_orphans,
    ask_flower,
    check_free,
    descendants,
    end,
    wait_for,
)

_LOOK_SECONDS = 2.0
_KNOWN = "already"
"""What Flower says of a key that it has registered before."""


def serve(deployment: Deployment, say: Say) -> None:
    """Run the SuperLink until interrupted, and register the keys of the deployment's nodes; leave nothing running.

    Raises:
        ConfigError: the settings are wrong, or the port is taken.
        ProgramFailed: the SuperLink does not start, or has ended by itself.
    """
    settings = deployment.settings()
    check_free(settings.host, settings.port)
    adopt_orphans()
    write_connection(deployment)
    link = Program(
        say,
        "flower-superlink",
        *("--ssl-ca-certfile", str(deployment.authority)),
        *("--ssl-certfile", str(deployment.certificate)),
        *("--ssl-keyfile", str(deployment.certificate_key)),
        "--enable-supernode-auth",
        *("--host", settings.host, "--port", str(settings.port)),
        *("--database", str(deployment.database)),
        "--disable-runtime-dependency-installation",
        home=deployment.flower,
        log=deployment.flower / "superlink.log",
    )
    try:
        wait_for(settings.port, settings.host, link)
        say(f"listening on {settings.host}:{settings.port}; its log: {deployment.flower / 'superlink.log'}")
        while True:
            if link.ended is not None:
                raise ProgramFailed(f"the SuperLink ended with {link.obituary}")
            register(deployment, say)
            time.sleep(_LOOK_SECONDS)
    finally:
        link.stop()
        end(descendants(os.getpid()))


def register(deployment: Deployment, say: Say) -> None:
    """Tell the SuperLink the keys of nodes that it does not know yet."""
    known = _registered(deployment)
    for name in deployment.nodes:
        if name not in known:
            known[name] = _number_of(deployment, name, say)
            write_whole(deployment.registered, json.dumps(known, indent=2).encode())
            say(f"{name} is registered")


def write_connection(deployment: Deployment) -> None:
    """Tell Flower's command line where the server is."""
    settings = deployment.settings()
    host = "127.0.0.1" if settings.host == "0.0.0.0" else settings.host
    content = (
        f"[superlink]\ndefault = {json.dumps(CONNECTION)}\n\n[superlink.{CONNECTION}]\n"
        f'address = "{host}:{settings.port}"\nroot-certificates = {json.dumps(str(deployment.authority))}\n'
    )
    write_whole(deployment.flower / "config.toml", content.encode())


def connected(deployment: Deployment, say: Say) -> list[dict[str, Any]]:
    """The registered nodes, as Flower lists them, each with the name that it has here, or its number.

    Raises:
        ProgramFailed: the server does not answer.
    """
    names = {number: name for name, number in _registered(deployment).items()}
    nodes = ask_flower(say, "supernode", "list", CONNECTION, home=deployment.flower)["nodes"]
    return [{**node, "name": names.get(str(node["node-id"]), str(node["node-id"]))} for node in nodes]


def _registered(deployment: Deployment) -> dict[str, str]:
    """What is known of it here; nothing where that is lost or damaged, as Flower says what it knows itself."""
    if not (deployment.registered.exists() and deployment.database.exists()):
        return {}
    try:
        return dict(json.loads(deployment.registered.read_text()))
    except ValueError:
        return {}


def _number_of(deployment: Deployment, name: str, say: Say) -> str:
    """Flower's number for a node; empty where it has known the key before."""
    arguments = ("supernode", "register", str(deployment.public_key(name)), CONNECTION, "--name", name)
    try:
        return str(ask_flower(say, *arguments, home=deployment.flower)["node-id"])
    except ProgramFailed as error:
        if _KNOWN in str(error):
            return ""
        raise
