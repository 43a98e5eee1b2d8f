"""A deployment's server: Flower's SuperLink, and the nodes that it knows."""

from __future__ import annotations

import json
import os
import shlex
import time
from pathlib import Path
from typing import Any

from scalefl.checkpoint import write_whole
from scalefl.deployment.address import Address
from scalefl.deployment.layout import CONNECTION, Deployment, ServerSettings
from scalefl.deployment.programs import (
    Program,
    ProgramFailed,
    Say,
    adopt_orphans,
    ask_flower,
    check_free,
    descendants,
    end,
    past_proxies,
    wait_for,
)
from scalefl.deployment.validity import (
    ends_soon,
    is_for,
    is_vouched_for,
    names_of,
    out_of_date,
    read_certificates,
)
from scalefl.errors import ConfigError

_LOOK_SECONDS, _REMIND_SECONDS = 2.0, 86400.0
_KNOWN = "already"
"""What Flower says of a key that it has registered before."""


def serve(deployment: Deployment, say: Say) -> None:
    """Run the SuperLink until interrupted, and register the keys of the deployment's nodes; leave nothing running.

    Raises:
        ConfigError: the settings are wrong, or the port is taken.
        ProgramFailed: the SuperLink does not start, or has ended by itself.
    """
    settings = deployment.settings()
    check_certificates(deployment, settings)
    check_free(settings.own())
    host = settings.host.strip("[]")
    adopt_orphans()
    write_connection(deployment)
    link = Program(
        say,
        "flower-superlink",
        *("--ssl-ca-certfile", str(deployment.authority)),
        *("--ssl-certfile", str(deployment.certificate)),
        *("--ssl-keyfile", str(deployment.certificate_key)),
        "--enable-supernode-auth",
        *("--host", host, "--port", str(settings.port)),
        *("--database", str(deployment.database)),
        "--disable-runtime-dependency-installation",
        home=deployment.flower,
        log=deployment.flower / "superlink.log",
        more=past_proxies(settings.own().host),
    )
    remind = time.monotonic()
    try:
        wait_for(settings.own(), link)
        say(f"listening on {Address(host, settings.port)}; its log: {deployment.flower / 'superlink.log'}")
        while True:
            if link.ended is not None:
                raise ProgramFailed(f"the SuperLink ended with {link.obituary}")
            if time.monotonic() >= remind:
                remind += _REMIND_SECONDS
                for line in certificate_warnings(deployment, settings):
                    say(f"warning: {line}")
            register(deployment, say)
            time.sleep(_LOOK_SECONDS)
    finally:
        link.stop()
        end(descendants(os.getpid()))


def check_certificates(deployment: Deployment, settings: ServerSettings) -> None:
    """Refuse certificates by which no node would know the server: it would run, and each node refuse it.

    Raises:
        ConfigError: one is unreadable, out of date, or signed by somebody else, or is not for this machine.
    """
    authorities, own = read_certificates(deployment.authority), read_certificates(deployment.certificate)
    for path, certificates in ((deployment.authority, authorities), (deployment.certificate, own)):
        for words in filter(None, map(out_of_date, certificates)):
            raise ConfigError(f"{path} {words}, so no node would know this server. {_renewal(deployment, path)}")
    if len(own) == 1 and not is_vouched_for(own[0], authorities):
        raise ConfigError(f"{deployment.certificate} is not signed by {deployment.authority}, by which nodes know it")
    if not is_for(own[0], settings.own().host):
        raise ConfigError(
            f"{deployment.certificate} is not for {settings.own().host}, where the server listens (host in "
            f"{deployment.settings_file}); it is for {', '.join(names_of(own[0]))}. "
            f"{_renewal(deployment, deployment.certificate)}"
        )


def certificate_warnings(deployment: Deployment, settings: ServerSettings) -> list[str]:
    """What is going to be wrong with the certificates, or is for some nodes."""
    found = []
    for path in (deployment.authority, deployment.certificate):
        for certificate in read_certificates(path):
            words = out_of_date(certificate) or ends_soon(certificate)
            if words:
                found.append(f"{path} {words}. {_renewal(deployment, path)}")
    certificate, host = read_certificates(deployment.certificate)[0], settings.public().host
    if not is_for(certificate, host):
        names = ", ".join(names_of(certificate))
        found.append(f"nodes are told to look for {host}, and {deployment.certificate} is for {names} only")
    return found


def _renewal(deployment: Deployment, path: Path) -> str:
    """How to come by another certificate."""
    is_authority = path == deployment.authority
    what = path.name if is_authority else f"{path.name} and {deployment.certificate_key.name}"
    after = ", then give it to each node" if is_authority else ""
    return f"For a new one move {what} away, and run scalefl deploy init {shlex.quote(str(deployment.path))}{after}"


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
    own = deployment.settings().own()
    content = (
        f"[superlink]\ndefault = {json.dumps(CONNECTION)}\n\n[superlink.{CONNECTION}]\n"
        f'address = "{own}"\nroot-certificates = {json.dumps(str(deployment.authority))}\n'
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
