"""Where a server is: a name or an address, and a port. IPv6 addresses stand in brackets, and are taken without."""

from __future__ import annotations

import ipaddress
from typing import NamedTuple

from scalefl.errors import ConfigError


class Address(NamedTuple):
    """A host, without brackets, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{bracketed(self.host)}:{self.port}"


def bracketed(host: str) -> str:
    """A host as it stands before a colon and a port."""
    return f"[{host}]" if ":" in host else host


def read_address(name: str, text: str) -> Address:
    """An address as settings have it: "host:port", "[::1]:9092", and "::1:9092", whose last number is the port.

    Raises:
        ConfigError: it is none; `name` is that of the setting.
    """
    host, _, port = text.rpartition(":")
    if "/" in text or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f'{name} = {text!r}: expected "host:port", as "fl.example.org:9443" or "[2001:db8::1]:9443"')
    return Address(check_host(name, host), int(port))


def check_host(name: str, text: str) -> str:
    """A host without brackets, an address in its usual form.

    Raises:
        ConfigError: it is none, or none that another machine could use; `name` is that of the setting.
    """
    host = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        labels = host.split(".")
        if not all(label and label.replace("-", "").replace("_", "").isalnum() and label.isascii() for label in labels):
            raise ConfigError(f"{name} = {text!r}: expected a name or an address, without a port") from None
        return host
    if address.is_unspecified:
        raise ConfigError(f"{name} = {text!r}: no machine has this address: name one by which nodes reach the server")
    if "%" in host:
        raise ConfigError(f"{name} = {text!r}: an address with a scope means nothing elsewhere: name one without")
    return str(address)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine for everybody."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def loopback_of(host: str) -> str:
    """The host by which this machine finds what listens on one: every interface has the loopback one among them."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
