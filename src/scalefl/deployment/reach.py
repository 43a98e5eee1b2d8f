"""Whether a node's server can be reached, and why not: Flower's program tries again for ever, and tells its log alone.

Asked beside it and by the same way, with the library that Flower's node uses: so names, proxies of the environment and
certificates are taken as they are there.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from cryptography import x509

from scalefl.deployment.address import Address, read_address
from scalefl.deployment.programs import Say
from scalefl.deployment.settings_file import NODE_AUTHORITY, NODE_FILE, NODE_MAKER, read_toml
from scalefl.deployment.validity import ends_soon, is_vouched_for, names_of, out_of_date, read_certificates
from scalefl.errors import ConfigError

_PATH = "/v1/fleet/"
"""What a proxy of `scalefl deploy init` lets through."""
_TIMEOUT_SECONDS, _PATIENCE_SECONDS = 4.0, 5.0
"""For each step of an answer, and for all of them before it is said that there is none."""
_AGAIN_SECONDS, _WELL_SECONDS = 3.0, 30.0
_REPEAT_SECONDS, _LONGEST_REPEAT_SECONDS = 60.0, 3600.0
_DAY_SECONDS = 86400.0
_PROXIES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
"""The first that is set is used for a server with TLS."""
_OUT_OF_DATE, _WRONG_NAME = (9, 10), (62, 64)
"""OpenSSL's numbers, of certificates whose authority is known: not yet, not any more; another name, another address."""


@dataclass(frozen=True)
class Finding:
    """What became of a question: why the server cannot be reached (empty: it can), and the certificate that it has."""

    cause: str
    proxy: str = ""
    certificate: x509.Certificate | None = None


class Probe:
    """Asks a server whether it is there.

    Args:
        server: where a node is told to find it.
        authority: the file of the certificate that vouches for it.

    Raises:
        ConfigError: the file holds no certificate, or one that has expired; or proxies are set that Flower cannot use.
    """

    def __init__(self, server: Address, authority: Path) -> None:
        self.server = server
        self._authority_file, self._authorities = authority, read_certificates(authority)
        self._check_authority()
        # As Flower makes it.
        self._trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._trusting.load_verify_locations(cadata=authority.read_text())
        self._any = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._any.check_hostname, self._any.verify_mode = False, ssl.CERT_NONE
        self._way = _Way(server)
        try:
            httpx.Client(verify=self._trusting).close()
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            found = [name for name in os.environ if name.lower().endswith("_proxy")]
            raise ConfigError(
                f"Flower cannot use the proxies of this environment ({', '.join(found)}): {error}"
            ) from error

    def warnings(self) -> list[str]:
        """What will soon be wrong with the authority's certificate."""
        found = map(ends_soon, self._authorities)
        return [f"{self._authority_file} {words}: get a new one from the server" for words in found if words]

    def ask(self) -> Finding:
        """Ask once; this may take some times the timeout, and as long as the system looks for a name."""
        self._way = way = _Way(self.server)
        try:
            status, certificate = self._asked(self._trusting, way)
        except Exception as error:  # whatever it is, it is told, and asked again
            cause, certificate = self._why(error, way)
            return Finding(cause, way.proxy, certificate)
        if status in (httpx.codes.BAD_GATEWAY, httpx.codes.SERVICE_UNAVAILABLE, httpx.codes.GATEWAY_TIMEOUT):
            return Finding(f"a proxy in front of it answers, it does not (HTTP {status})", way.proxy, certificate)
        return Finding("", way.proxy, certificate)

    def waiting(self) -> Finding:
        """What the question that is being asked waits for."""
        return Finding(self._way.silence(), self._way.proxy)

    def _check_authority(self) -> None:
        for certificate in self._authorities:
            words = out_of_date(certificate)
            if words.startswith("expired"):
                raise ConfigError(
                    f"{self._authority_file} {words}: no server can be known by it; get the server's new one"
                )

    def _asked(self, context: ssl.SSLContext, way: _Way) -> tuple[int, x509.Certificate | None]:
        """The status of an answer, and the certificate of who gave it."""
        extensions = {"trace": way.step}
        with (
            httpx.Client(verify=context, timeout=_TIMEOUT_SECONDS) as client,
            client.stream("GET", f"https://{self.server}{_PATH}", extensions=extensions) as response,
        ):
            tls = response.extensions["network_stream"].get_extra_info("ssl_object")
            der = tls.getpeercert(True) if tls else None
            return response.status_code, x509.load_der_x509_certificate(der) if der else None

    def _why(self, error: Exception, way: _Way) -> tuple[str, x509.Certificate | None]:
        for cause in _chain(error):
            if isinstance(cause, ssl.SSLCertVerificationError):
                if way.tls_with != self.server.host:
                    return f"the proxy's own certificate is not accepted ({cause.verify_message})", None
                return self._mistrust(cause)
            words = _words(cause, way)
            if words:
                return words + way.round_proxy(), None
        return f"{type(error).__name__}: {error}", None

    def _mistrust(self, error: ssl.SSLCertVerificationError) -> tuple[str, x509.Certificate | None]:
        """All that is wrong with the certificate, which is asked for once more: what is refused is not told."""
        certificate = None
        with contextlib.suppress(Exception):
            certificate = self._asked(self._any, _Way(self.server))[1]
        if certificate is None:
            return f"the server's certificate is not accepted: {error.verify_message}", None
        words = [f"the server's certificate {out_of_date(certificate)}"] if out_of_date(certificate) else []
        words += [f"{self._authority_file} {found}" for found in map(out_of_date, self._authorities) if found]
        if error.verify_code in _WRONG_NAME:
            names = ", ".join(names_of(certificate)) or "nobody"
            words.append(f"the server's certificate is not for {self.server.host}; it is for {names}")
        is_known = error.verify_code in {*_OUT_OF_DATE, *_WRONG_NAME}
        if not is_known and not is_vouched_for(certificate, self._authorities):
            issuer = certificate.issuer.rfc4514_string()
            is_namesake = any(certificate.issuer == authority.subject for authority in self._authorities)
            whose = "another one of the same name" if is_namesake else issuer
            words.append(f"the server's certificate is not vouched for by this node's ca.pem, but by {whose}")
        return "; ".join(words) or f"the server's certificate is not accepted: {error.verify_message}", certificate


class _Way:
    """How far a question has come, as the library tells it: which machine it speaks to, and about what."""

    def __init__(self, server: Address) -> None:
        self._server = server
        self.peer, self.tls_with = server, ""
        self.has_connected = False

    @property
    def proxy(self) -> str:
        """The proxy that is used, with the variable that names it; empty if none is."""
        if self.peer == self._server:
            return ""
        variable = next((name for name in _PROXIES if os.environ.get(name)), "of this system")
        return f"{self.peer} ({variable})"

    def step(self, name: str, info: Mapping[str, Any]) -> None:
        """What the library calls."""
        if name.endswith("connect_tcp.started"):
            self.peer = Address(info["host"], info["port"])
        elif name.endswith("connect_tcp.complete"):
            self.has_connected = True
        elif name.endswith("start_tls.started"):
            self.tls_with = info["server_hostname"]

    def silence(self) -> str:
        """That nothing has come back."""
        if self.has_connected:
            return f"{self.peer} takes connections, and does not answer{self.round_proxy()}"
        return f"no answer from {self.peer}{self.round_proxy()}"

    def round_proxy(self) -> str:
        """How to do without the proxy, if it is that which fails; empty if there is none."""
        return f" (no_proxy={self._server.host} would go without the proxy)" if self.proxy else ""


class Watch:
    """Tells, from a thread of its own, when a server cannot be reached, and when it can again.

    Args:
        probe: asks.
        say: is told.
    """

    def __init__(self, probe: Probe, say: Say) -> None:
        self._probe, self._say = probe, say
        self._closed = threading.Event()
        self._cause: str | None = None
        self._told, self._was_there, self._misses = "", False, 0
        self._repeat, self._repeat_after = 0.0, _REPEAT_SECONDS
        self._warned: dict[str, float] = {}

    @property
    def cause(self) -> str | None:
        """Why the server cannot be reached, empty if it can; None until that is known, some seconds at most."""
        return self._cause

    @contextlib.contextmanager
    def running(self) -> Iterator[Watch]:
        """Watch while the block runs."""
        threading.Thread(target=self._run, name="scalefl-watch", daemon=True).start()
        try:
            yield self
        finally:
            self._closed.set()

    def tell(self, finding: Finding) -> None:
        """Say what is new about a finding; a cause that goes on is said again, less and less often."""
        now = time.monotonic()
        if finding.cause:
            self._misses += 1
            if self._was_there and self._misses < 2:
                return
            self._cause = finding.cause
            if finding.cause != self._told:
                self._repeat_after = _REPEAT_SECONDS
            elif now < self._repeat:
                return
            self._told, self._repeat = finding.cause, now + self._repeat_after
            self._repeat_after = min(2 * self._repeat_after, _LONGEST_REPEAT_SECONDS)
            through = f", through the proxy {finding.proxy}," if finding.proxy else ""
            self._say(f"the server at {self._probe.server}{through} cannot be reached: {finding.cause}; trying again")
            return
        if self._told or not self._was_there:
            again = " now: going on" if self._told else ""
            self._say(f"the server at {self._probe.server} answers{again}")
        self._cause, self._told, self._was_there, self._misses = "", "", True, 0
        self._warn(finding, now)

    def _warn(self, finding: Finding, now: float) -> None:
        """Once a day."""
        words = ends_soon(finding.certificate) if finding.certificate else ""
        lines = [*self._probe.warnings(), *([f"the server's certificate {words}"] if words else [])]
        for line in lines:
            key = line.partition(",")[0]  # the number of days changes
            if now >= self._warned.get(key, -1.0):
                self._warned[key] = now + _DAY_SECONDS
                self._say(f"warning: {line}")

    def _run(self) -> None:
        while not self._closed.is_set():
            found: list[Finding] = []
            # The system's search for a name has no time limit, so it is not waited for here.
            asking = threading.Thread(target=lambda found=found: found.append(self._probe.ask()), daemon=True)
            asking.start()
            asking.join(_PATIENCE_SECONDS)
            while asking.is_alive() and not self._closed.is_set():
                self.tell(self._probe.waiting())
                asking.join(_PATIENCE_SECONDS)
            if self._closed.is_set():
                return
            self.tell(found[0])
            self._closed.wait(_AGAIN_SECONDS if found[0].cause else _WELL_SECONDS)


@contextlib.contextmanager
def watching(folder: Path, say: Say) -> Iterator[Watch]:
    """Watch the server of the node in a folder while the block runs.

    To be entered before anything that takes long, torch's import being one: a person waits for a sign.

    Raises:
        ConfigError: the folder is no node's, or see `Probe`.
    """
    path = folder / NODE_FILE
    server = str(read_toml(path, NODE_MAKER).get("server", ""))
    try:
        address = read_address("server", server)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if ":" in address.host and str(address) != server:
        say(f"server = {server!r} in {path} is taken for {address}: write IPv6 addresses in brackets there")
    with Watch(Probe(address, folder / NODE_AUTHORITY), say).running() as watch:
        yield watch


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error's causes, the first one first."""
    found: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in found:
        found.append(link)
        link = link.__cause__ or link.__context__
    return reversed(found)


def _words(error: BaseException, way: _Way) -> str:
    """What an error means; empty where one that it has caused says more."""
    if isinstance(error, socket.gaierror):
        return f"the name {way.peer.host} does not resolve ({error.strerror})"
    if isinstance(error, ConnectionRefusedError):
        return f"nothing listens on {way.peer} (connection refused)"
    if isinstance(error, TimeoutError | httpx.TimeoutException):
        return way.silence()
    if isinstance(error, httpx.ProxyError):
        return f"the proxy does not let it through: {error}"
    if isinstance(error, ssl.SSLEOFError | ConnectionResetError | BrokenPipeError | httpx.RemoteProtocolError):
        return f"{way.peer} broke the connection off"
    if isinstance(error, ssl.SSLError):
        return f"what listens there does not speak TLS as a server does ({error.reason})"
    if isinstance(error, OSError):
        return f"{way.peer}: {error.strerror or error}"
    return ""
