"""Make the folder of a deployment, and the folders that its nodes are given."""

from __future__ import annotations

import json
import shutil
import socket
import string
import sys
from importlib.resources import files
from pathlib import Path

from scalefl.deployment.address import Address, bracketed, check_host, is_loopback
from scalefl.deployment.certificates import make_authority, make_certificate, make_node_key
from scalefl.deployment.layout import Deployment, NodeFolder, ServerSettings, write_new
from scalefl.errors import ConfigError

_LOOPBACK = "127.0.0.1"
_LOCAL = ("localhost", _LOOPBACK, "::1")


def set_up(folder: Path, *, host: str, port: int, public_port: int | None, nodes: int) -> list[Path]:
    """Make what is not there yet, and return it: nothing is overwritten, so nodes can be added later.

    Certificates that were moved away are made anew, by the authority's old key.

    Args:
        folder: of the deployment.
        host: a name or an address by which nodes reach the server; its certificate is for this and for localhost.
        port: where the server listens, on the loopback interface: at `host` itself if that is one of its addresses.
        public_port: where a proxy listens for nodes; None: nodes use the server's own port, from this machine.
        nodes: how many nodes there are to be, old ones included.

    Raises:
        ConfigError: the folder cannot be written, or is something else; or a host is none.
    """
    deployment = Deployment(folder.absolute())
    host = check_host("host", host)
    if deployment.path.exists() and not deployment.settings_file.exists() and any(deployment.path.iterdir()):
        raise ConfigError(f"{folder} holds something else than a deployment: name a new folder")
    made = []
    if not deployment.settings_file.exists():
        listens = host if public_port is None and host != "localhost" and is_loopback(host) else _LOOPBACK
        address = Address(host, public_port or port)
        made = _server(deployment, ServerSettings(address=str(address), port=port, host=listens), public_port)
    settings = deployment.settings()
    made += _certificates(deployment, settings)
    numbers = range(len(deployment.nodes), nodes)
    return made + [_node(deployment.node(f"node-{i}"), deployment, settings, i) for i in numbers]


def _server(deployment: Deployment, settings: ServerSettings, public_port: int | None) -> list[Path]:
    try:
        for path in (deployment.path, deployment.flower, deployment.runs, deployment.keys, deployment.path / "nodes"):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make {deployment.path}: {error.strerror}") from error
    key, authority = make_authority()
    write_new(deployment.authority_key, key, 0o600)
    write_new(deployment.authority, authority)
    made = [deployment.authority, *_certificates(deployment, settings)]
    unit = deployment.path / "scalefl-server.service"
    program = Path(sys.executable).parent / "scalefl"
    write_new(unit, _filled("server.service", folder=str(deployment.path), program=str(program)))
    made.append(unit)
    if public_port is not None:
        values = {"folder": str(deployment.path), "host": bracketed(settings.host), "port": str(settings.port)}
        listens = f"listen {public_port} ssl;"
        if _has_ipv6():
            listens += f"\n        listen [::]:{public_port} ssl;"
        write_new(deployment.proxy, _filled("nginx.conf", listens=listens, **values))
        made.append(deployment.proxy)
    # Last: a folder with settings in it is whole.
    write_new(
        deployment.settings_file,
        "# Where nodes find the server; and where it listens: whoever reaches this can run code on this machine.\n"
        f"address = {json.dumps(settings.address)}\nhost = {json.dumps(settings.host)}\nport = {settings.port}\n",
    )
    return [*made, deployment.settings_file]


def _certificates(deployment: Deployment, settings: ServerSettings) -> list[Path]:
    """Make those that are not there: the authority's by its old key, the server's with a new one."""
    if deployment.authority.exists() and deployment.certificate.exists():
        return []
    try:
        key = deployment.authority_key.read_bytes()
    except OSError as error:
        raise ConfigError(f"a new certificate needs {deployment.authority_key}: {error.strerror}") from error
    made = []
    if not deployment.authority.exists():
        write_new(deployment.authority, make_authority(key)[1])
        made.append(deployment.authority)
    if not deployment.certificate.exists():
        hosts = dict.fromkeys((settings.public().host, settings.own().host, *_LOCAL))
        server_key, certificate = make_certificate(key, deployment.authority.read_bytes(), list(hosts))
        write_new(deployment.certificate_key, server_key, 0o600)
        write_new(deployment.certificate, certificate)
        made.append(deployment.certificate)
    return made


def _has_ipv6() -> bool:
    """Whether this machine lets one listen by IPv6."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::", 0))
    except OSError:
        return False
    return True


def _node(node: NodeFolder, deployment: Deployment, settings: ServerSettings, number: int) -> Path:
    partial = node.path.with_name(f".{node.name}.partial")
    for left in (partial, node.path):  # by a run that was stopped before the server knew the node
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(mode=0o700, parents=True)
    made = NodeFolder(partial)
    private, public = make_node_key()
    write_new(made.key, private, 0o600)
    write_new(made.authority, deployment.authority.read_bytes())
    write_new(partial / "scalefl-node.service", _filled("node.service", name=node.name))
    write_new(
        made.settings_file,
        f'name = "{node.name}"\nclient = {number}\nserver = {json.dumps(settings.address)}\n\n'
        '# What training may take on top of a warm worker ("256MiB"), or "auto": what the machine can spare.\n'
        'budget = "auto"\n\n'
        "# What else than ScaleFL's own models and problems may run here.\nallow = []\n\n"
        "# The node's own examples: a folder, or any other source of docs/config.md.\n"
        '# [data]\n# name = "/srv/examples"\n',
    )
    partial.rename(node.path)
    write_new(deployment.public_key(node.name), public)
    return node.path


def _filled(template: str, **values: str) -> str:
    text = (files("scalefl.deployment") / "templates" / template).read_text()
    return string.Template(text).safe_substitute(values)
