"""Make the folder of a deployment, and the folders that its nodes are given."""

from __future__ import annotations

import ipaddress
import json
import shutil
import string
import sys
from importlib.resources import files
from pathlib import Path

from scalefl.deployment.certificates import make_authority, make_certificate, make_node_key
from scalefl.deployment.layout import Deployment, NodeFolder, ServerSettings, write_new
from scalefl.errors import ConfigError

_LOCAL = ("localhost", "127.0.0.1")


def set_up(folder: Path, *, host: str, port: int, public_port: int | None, nodes: int) -> list[Path]:
    """Make what is not there yet, and return it: nothing is overwritten, so nodes can be added later.

    Args:
        folder: of the deployment.
        host: a name or an address by which nodes reach the server; its certificate is for this and for localhost.
        port: where the server listens, on the loopback interface.
        public_port: where a proxy listens for nodes; None: nodes use the server's own port, from this machine.
        nodes: how many nodes there are to be, old ones included.

    Raises:
        ConfigError: the folder cannot be written, or is something else; or a host is none.
    """
    deployment = Deployment(folder.absolute())
    _check_host(host)
    if deployment.path.exists() and not deployment.settings_file.exists() and any(deployment.path.iterdir()):
        raise ConfigError(f"{folder} holds something else than a deployment: name a new folder")
    made = []
    if not deployment.settings_file.exists():
        made = _server(deployment, ServerSettings(address=f"{host}:{public_port or port}", port=port), public_port)
    settings = deployment.settings()
    numbers = range(len(deployment.nodes), nodes)
    return made + [_node(deployment.node(f"node-{i}"), deployment, settings, i) for i in numbers]


def _server(deployment: Deployment, settings: ServerSettings, public_port: int | None) -> list[Path]:
    try:
        for path in (deployment.path, deployment.flower, deployment.runs, deployment.keys, deployment.path / "nodes"):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make {deployment.path}: {error.strerror}") from error
    host = settings.address.rpartition(":")[0].strip("[]")
    key, authority = make_authority()
    server_key, certificate = make_certificate(key, authority, list(dict.fromkeys((host, *_LOCAL))))
    write_new(deployment.authority_key, key, 0o600)
    write_new(deployment.authority, authority)
    write_new(deployment.certificate_key, server_key, 0o600)
    write_new(deployment.certificate, certificate)
    unit, proxy = deployment.path / "scalefl-server.service", deployment.path / "nginx.conf"
    program = Path(sys.executable).parent / "scalefl"
    write_new(unit, _filled("server.service", folder=str(deployment.path), program=str(program)))
    made = [deployment.authority, deployment.certificate, unit]
    if public_port is not None:
        values = {"folder": str(deployment.path), "host": settings.host, "port": str(settings.port)}
        write_new(proxy, _filled("nginx.conf", public_port=str(public_port), **values))
        made.append(proxy)
    # Last: a folder with settings in it is whole.
    write_new(
        deployment.settings_file,
        "# Where nodes find the server; and where it listens: whoever reaches this can run code on this machine.\n"
        f"address = {json.dumps(settings.address)}\nhost = {json.dumps(settings.host)}\nport = {settings.port}\n",
    )
    return [*made, deployment.settings_file]


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


def _check_host(host: str) -> None:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        labels = host.split(".")
        if not all(label and label.replace("-", "").isalnum() and label.isascii() for label in labels):
            raise ConfigError(f"host = {host!r}: expected a name or an address, without a port") from None


def _filled(template: str, **values: str) -> str:
    text = (files("scalefl.deployment") / "templates" / template).read_text()
    return string.Template(text).safe_substitute(values)
