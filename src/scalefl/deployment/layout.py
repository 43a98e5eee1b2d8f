"""The folder of a deployment: what lies where, and what is in its two kinds of settings file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from scalefl.conversion import convert
from scalefl.data import Source, parse_bytes
from scalefl.deployment.address import Address, is_loopback, loopback_of, read_address
from scalefl.deployment.settings_file import NODE_AUTHORITY, NODE_FILE, NODE_MAKER, read_toml
from scalefl.errors import ConfigError, check_range

T = TypeVar("T")

CONNECTION = "scalefl"
"""What Flower's command line calls the server."""
AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """A server's settings, `server.toml`.

    Args:
        address: where nodes find the server, "host:port"; behind a proxy, the proxy's.
        port: where the server itself listens, on the loopback interface unless `host` says otherwise.
        host: the interface. Whoever reaches this port can run code on the server: see docs/deployment.md.
    """

    address: str
    port: int
    host: str = "127.0.0.1"

    def __post_init__(self) -> None:
        self.public()
        check_range("port", self.port, 1, 65535)

    def public(self) -> Address:
        """Where nodes find the server.

        Raises:
            ConfigError: it is no address.
        """
        return read_address("address", self.address)

    def is_out_of_reach(self) -> bool:
        """Whether it listens where only this machine finds it, while nodes are told another place."""
        return is_loopback(self.host) and not is_loopback(self.public().host)

    def own(self) -> Address:
        """Where this machine finds it."""
        return Address(loopback_of(self.host.strip("[]")), self.port)


@dataclass(frozen=True, kw_only=True)
class NodeSettings:
    """A node's settings, `node.toml`. What can be given to `scalefl deploy node` wins over them.

    Args:
        name: of the node, for people.
        client: its number, by which a server tells clients apart.
        server: where it finds its server, "host:port".
        budget: bytes that training may add to a worker ("256MiB"), or "auto": what the machine can spare.
        data: its examples; all rows of the training split.
        share: "i/n": of these, only every n-th, from the i-th on.
        allow: "package.module:name" of models, problems and objectives that it runs beside the built-in ones.
        cache: the most that it keeps of tensors that may come again.
        threads: torch's, for training.
        poll_seconds: between looks for messages: what a round may take beside training, and how often the server is
            asked. Many hundreds of nodes had better take more.
    """

    name: str
    client: int
    server: str
    budget: str = AUTO
    data: Source | None = None
    share: str = "0/1"
    allow: tuple[str, ...] = ()
    cache: str = "1GiB"
    threads: int = 1
    poll_seconds: float = 1.0

    def __post_init__(self) -> None:
        check_range("client", self.client, 0)
        check_range("threads", self.threads, 1)
        check_range("poll_seconds", self.poll_seconds, 0.01)
        parse_bytes(self.cache)
        if self.budget != AUTO:
            parse_bytes(self.budget)
        self.part()
        self.address()

    def address(self) -> Address:
        """Where its server is.

        Raises:
            ConfigError: it is no address.
        """
        return read_address("server", self.server)

    def part(self) -> tuple[int, int]:
        """The share as two numbers.

        Raises:
            ConfigError: it is no share.
        """
        first, slash, count = self.share.partition("/")
        if not (slash and first.isdigit() and count.isdigit() and int(first) < int(count)):
            raise ConfigError(f'share = {self.share!r}: write "0/2" for the first of two parts')
        return int(first), int(count)


@dataclass(frozen=True)
class Deployment:
    """The folder that `scalefl deploy init` makes, on the server's machine."""

    path: Path

    @property
    def settings_file(self) -> Path:
        """The server's settings."""
        return self.path / "server.toml"

    @property
    def authority(self) -> Path:
        """The certificate by which nodes know the server."""
        return self.path / "ca.pem"

    @property
    def authority_key(self) -> Path:
        """Signs server certificates; nobody else needs it."""
        return self.path / "ca.key"

    @property
    def certificate(self) -> Path:
        """The server's."""
        return self.path / "server.pem"

    @property
    def certificate_key(self) -> Path:
        """The server's."""
        return self.path / "server.key"

    @property
    def proxy(self) -> Path:
        """The configuration of the proxy that lets nodes in, if there is to be one."""
        return self.path / "nginx.conf"

    @property
    def flower(self) -> Path:
        """What Flower's programs keep: its connections, database and log."""
        return self.path / "flower"

    @property
    def database(self) -> Path:
        """The SuperLink's: who is registered, and which runs there were."""
        return self.flower / "state.db"

    @property
    def registered(self) -> Path:
        """The names of nodes whose keys the SuperLink knows, with its numbers for them."""
        return self.flower / "registered.json"

    @property
    def runs(self) -> Path:
        """The folder of all runs."""
        return self.path / "runs"

    @property
    def keys(self) -> Path:
        """The nodes' public keys, by which the server knows them wherever their folders have gone."""
        return self.path / "keys"

    @property
    def nodes(self) -> list[str]:
        """The names of all nodes, in the order of their numbers."""
        return sorted((path.stem for path in self.keys.glob("*.pub")), key=lambda name: (len(name), name))

    def public_key(self, name: str) -> Path:
        """A node's."""
        return self.keys / f"{name}.pub"

    def node(self, name: str) -> NodeFolder:
        """The folder that is made for a node, until it is taken there."""
        return NodeFolder(self.path / "nodes" / name)

    def settings(self) -> ServerSettings:
        """The server's settings.

        Raises:
            ConfigError: this is no deployment, or its settings are wrong.
        """
        return _read(self.settings_file, ServerSettings, "scalefl deploy init")


@dataclass(frozen=True)
class NodeFolder:
    """What a node has on its own machine."""

    path: Path

    @property
    def name(self) -> str:
        """The node's."""
        return self.path.name

    @property
    def settings_file(self) -> Path:
        """Its settings."""
        return self.path / NODE_FILE

    @property
    def authority(self) -> Path:
        """The certificate by which it knows its server."""
        return self.path / NODE_AUTHORITY

    @property
    def key(self) -> Path:
        """By which its server knows it."""
        return self.path / "node.key"

    @property
    def cache(self) -> Path:
        """Tensors that may come again."""
        return self.path / "cache"

    @property
    def flower(self) -> Path:
        """What Flower's programs keep."""
        return self.path / "flower"

    def settings(self, given: Mapping[str, Any]) -> NodeSettings:
        """The node's settings, with those `given` instead of the file's.

        Raises:
            ConfigError: this is no node's folder, or its settings are wrong.
        """
        return _read(self.settings_file, NodeSettings, NODE_MAKER, given)


def _read(path: Path, kind: type[T], maker: str, given: Mapping[str, Any] | None = None) -> T:
    raw = read_toml(path, maker)
    try:
        return convert({**raw, **(given or {})}, kind, "")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def write_new(path: Path, content: str | bytes, mode: int = 0o644) -> None:
    """Write a file that is not there yet; it has its mode before it has content.

    Raises:
        ConfigError: there is one already, or it cannot be written.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
    except FileExistsError as error:
        raise ConfigError(f"{path} is there already, and is not overwritten") from error
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
