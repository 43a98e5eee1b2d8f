"""Servers that a node cannot reach, or must not trust: what it says of each, by real connections on this machine."""

from __future__ import annotations

import datetime
import os
import re
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from scalefl.cli import app
from scalefl.deployment import certificates, reach
from scalefl.deployment.address import Address, read_address
from scalefl.deployment.certificates import make_authority, make_certificate
from scalefl.deployment.layout import Deployment
from scalefl.deployment.programs import free_port, past_proxies
from scalefl.deployment.reach import Finding, Probe, Watch
from scalefl.deployment.server import certificate_warnings, check_certificates
from scalefl.deployment.setup import set_up
from scalefl.engines.flower.executor import Executor
from scalefl.errors import ConfigError

DAYS = datetime.timedelta(days=1)


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@contextmanager
def dated(begin: int, end: int) -> Iterator[None]:
    """Certificates that are made meanwhile hold from so many days from now to so many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certificates, "_SLACK", -begin * DAYS)
        patch.setattr(certificates, "_VALID", end * DAYS)
        yield


@pytest.fixture
def authority(tmp_path) -> tuple[bytes, Path]:
    key, certificate = make_authority()
    (tmp_path / "ca.pem").write_bytes(certificate)
    return key, tmp_path / "ca.pem"


class _Says(BaseHTTPRequestHandler):
    status = 404

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def listening(
    tls: tuple[bytes, bytes] | None, folder: Path, status: int = 404, host: str = "127.0.0.1"
) -> Iterator[Address]:
    """A web server with a key and a certificate, or without."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    kind = type("Server", (HTTPServer,), {"address_family": family, "handle_error": lambda *_: None})
    server = kind((host, 0), type("Handler", (_Says,), {"status": status}))
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        (folder / "both.pem").write_bytes(b"".join(tls))
        context.load_cert_chain(folder / "both.pem")
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield Address(host, server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def proxy(answer: bytes = b"", to: Address | None = None) -> Iterator[Address]:
    """What answers `CONNECT` so, and then, if it is told where to, passes on what comes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with ExitStack() as stack:
                while True:
                    try:
                        near = stack.enter_context(listener.accept()[0])
                    except OSError:
                        return
                    near.recv(4096)
                    near.sendall(answer)
                    if to is None:
                        near.close()
                        continue
                    far = stack.enter_context(socket.create_connection(to))
                    for source, sink in ((near, far), (far, near)):
                        threading.Thread(target=pump, args=(source, sink), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield Address("127.0.0.1", listener.getsockname()[1])
        listener.shutdown(socket.SHUT_RDWR)


def pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while piece := source.recv(65536):
            sink.sendall(piece)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def asked(server: Address, authority: tuple[bytes, Path]) -> Finding:
    return Probe(server, authority[1]).ask()


def certificate(authority: tuple[bytes, Path], *hosts: str) -> tuple[bytes, bytes]:
    return make_certificate(authority[0], authority[1].read_bytes(), list(hosts or ("localhost", "127.0.0.1", "::1")))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_server_that_answers_is_there(authority, tmp_path, host):
    with listening(certificate(authority), tmp_path, host=host) as server:
        found = asked(server, authority)
    assert (found.cause, found.proxy) == ("", "") and found.certificate is not None


@pytest.mark.parametrize(
    ("begin", "end", "words"),
    [
        (-400, -2, r"the server's certificate expired on {end:%Y-%m-%d} \d\d:\d\d UTC \(now: {now:%Y-%m-%d} .*\)"),
        (3, 400, r"the server's certificate is not yet valid, not until {begin:%Y-%m-%d} .*clock: {now:%Y-%m-%d} .*"),
    ],
)
def test_a_certificate_that_is_out_of_date_is_not_taken_for_a_foreign_one(authority, tmp_path, begin, end, words):
    now = datetime.datetime.now(datetime.UTC)
    with dated(begin, end):
        tls = certificate(authority)
    with listening(tls, tmp_path) as server:
        cause = asked(server, authority).cause
    assert re.fullmatch(words.format(begin=now + begin * DAYS, end=now + end * DAYS, now=now), cause), cause


def test_a_certificate_for_another_name_says_for_which(authority, tmp_path):
    with listening(certificate(authority, "fl.example.org", "10.0.0.1"), tmp_path) as server:
        for host in ("127.0.0.1", "localhost"):
            cause = asked(server._replace(host=host), authority).cause
            assert cause == f"the server's certificate is not for {host}; it is for fl.example.org, 10.0.0.1"


def test_a_certificate_of_another_authority_is_not_vouched_for(authority, tmp_path):
    key, other = make_authority()
    (tmp_path / "other.pem").write_bytes(other)
    with listening(certificate((key, tmp_path / "other.pem")), tmp_path) as server:
        cause = asked(server, authority).cause
    assert cause == (
        "the server's certificate is not vouched for by this node's ca.pem, but by another one of the same name"
    )


def test_an_authority_that_has_expired_is_refused_and_one_that_is_early_is_named(tmp_path):
    with dated(-20, -2):
        (tmp_path / "ca.pem").write_bytes(make_authority()[1])
    with pytest.raises(ConfigError, match=r"ca\.pem expired on .*: no server can be known by it"):
        Probe(Address("localhost", 1), tmp_path / "ca.pem")
    with dated(2, 20):
        key, early = make_authority()
    (tmp_path / "ca.pem").write_bytes(early)
    with listening(certificate((key, tmp_path / "ca.pem")), tmp_path) as server:
        cause = asked(server, (key, tmp_path / "ca.pem")).cause
    assert re.search(r"^\S*ca\.pem is not yet valid, not until ", cause), cause


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_a_port_on_which_nothing_listens(authority, host):
    server = Address(host, free_port())
    assert asked(server, authority).cause == f"nothing listens on {server} (connection refused)"


def test_a_name_that_does_not_resolve(authority, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    cause = asked(Address("fl.example.org", 9443), authority).cause
    assert cause == "the name fl.example.org does not resolve (Name or service not known)"


def test_an_address_that_swallows_everything(authority, monkeypatch):
    monkeypatch.setattr(reach, "_TIMEOUT_SECONDS", 0.3)
    with socket.socket() as full, socket.socket() as waiting:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        server = Address(*full.getsockname())
        waiting.connect(server)
        # It keeps one connection that nobody accepts, and this one's TLS is never answered; where the queue is shorter,
        # the connection itself is not.
        cause = asked(server, authority).cause
        assert cause in (f"no answer from {server}", f"{server} takes connections, and does not answer")


def test_what_is_no_server(authority, tmp_path):
    with listening(None, tmp_path) as server:
        assert "does not speak TLS as a server does" in asked(server, authority).cause
    with proxy() as server:
        assert asked(server, authority).cause == f"{server} broke the connection off"


def test_a_proxy_in_front_of_a_server_that_is_away(authority, tmp_path):
    with listening(certificate(authority), tmp_path, status=502) as server:
        assert asked(server, authority).cause == "a proxy in front of it answers, it does not (HTTP 502)"


@pytest.mark.parametrize("variable", ["https_proxy", "HTTPS_PROXY", "all_proxy"])
def test_a_dead_proxy_is_named_without_its_password(authority, monkeypatch, variable):
    dead = free_port()
    monkeypatch.setenv(variable, f"http://me:secret@127.0.0.1:{dead}")
    found = asked(Address("fl.example.org", 9443), authority)
    assert found.proxy == f"127.0.0.1:{dead} ({variable})"
    assert found.cause == (
        f"nothing listens on 127.0.0.1:{dead} (connection refused) (no_proxy=fl.example.org would go without the proxy)"
    )


def test_proxies_that_refuse_break_off_or_let_through(authority, tmp_path, monkeypatch):
    server = Address("fl.example.org", 9443)
    for answer, words in (
        (b"HTTP/1.1 403 Forbidden\r\n\r\n", "the proxy does not let it through: 403 Forbidden"),
        (b"", "broke the connection off"),
    ):
        with proxy(answer) as through:
            monkeypatch.setenv("https_proxy", str(through))
            found = asked(server, authority)
            assert words in found.cause and found.proxy == f"{through} (https_proxy)"
    with (
        listening(certificate(authority, "fl.example.org"), tmp_path) as behind,
        proxy(b"HTTP/1.1 200 OK\r\n\r\n", to=behind) as through,
    ):
        monkeypatch.setenv("https_proxy", f"http://{through}")
        assert asked(server, authority).cause == ""
        cause = asked(Address("fl.example.net", 9443), authority).cause
        assert cause == "the server's certificate is not for fl.example.net; it is for fl.example.org"


def test_no_proxy_is_obeyed(authority, tmp_path, monkeypatch):
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with listening(certificate(authority), tmp_path) as server:
        assert asked(server, authority) == Finding("", "", asked(server, authority).certificate)


@pytest.mark.parametrize(("name", "value"), [("https_proxy", "gopher://x:1"), ("no_proxy", "a,[::1]")])
def test_proxies_that_cannot_be_used_are_refused(authority, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=rf"cannot use the proxies of this environment \({name}\)"):
        Probe(Address("localhost", 1), authority[1])


def test_the_executor_finds_its_supernode_past_a_proxy(tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with listening(None, tmp_path, status=503) as supernode:
        executor = Executor(str(supernode), b"secret", lambda parcel: parcel)
        with pytest.raises(Exception, match="503"):
            executor._look()
        executor.close()


def test_the_servers_programs_find_it_past_proxies(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "example.org,[fd00::1]")
    assert past_proxies("10.0.0.1") == dict.fromkeys(
        ("no_proxy", "NO_PROXY"), "example.org,fd00::1,localhost,127.0.0.1,::1,10.0.0.1"
    )


def watch(authority: tuple[bytes, Path]) -> tuple[Watch, list[str]]:
    said: list[str] = []
    return Watch(Probe(Address("localhost", 9092), authority[1]), said.append), said


def test_what_is_known_is_said_once_and_what_is_new_at_once(authority, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(reach.time, "monotonic", lambda: now)
    told, said = watch(authority)
    assert told.cause is None
    for _ in range(5):
        told.tell(Finding("it rains"))
    assert (
        said == ["the server at localhost:9092 cannot be reached: it rains; trying again"] and told.cause == "it rains"
    )
    now += 61
    told.tell(Finding("it rains"))
    told.tell(Finding("it rains"))
    assert len(said) == 2, "again after a while, which grows"
    now += 61
    told.tell(Finding("it rains"))
    assert len(said) == 2
    told.tell(Finding("it snows", "p:1 (https_proxy)"))
    told.tell(Finding(""))
    told.tell(Finding(""))
    assert said[2:] == [
        "the server at localhost:9092, through the proxy p:1 (https_proxy), cannot be reached: it snows; trying again",
        "the server at localhost:9092 answers now: going on",
    ]
    assert told.cause == ""
    told.tell(Finding("it rains"))
    assert len(said) == 4 and told.cause == "", "one miss is none"
    told.tell(Finding("it rains"))
    assert "cannot be reached: it rains" in said[4]


def test_a_question_that_takes_long_is_told_of(authority, monkeypatch):
    """A name server that does not answer holds the question up for as long as the system likes."""
    monkeypatch.setattr(reach, "_PATIENCE_SECONDS", 0.1)
    go_on = threading.Event()
    monkeypatch.setattr(Probe, "ask", lambda self: (go_on.wait(5), Finding(""))[1])
    told, said = watch(authority)
    with told.running():
        for _ in range(100):
            if said:
                break
            go_on.wait(0.05)
        assert said == ["the server at localhost:9092 cannot be reached: no answer from localhost:9092; trying again"]
        go_on.set()


def test_a_node_is_warned_of_certificates_that_end_soon(tmp_path):
    with dated(-100, 13):
        key, ends = make_authority()
        (tmp_path / "ca.pem").write_bytes(ends)
        tls = certificate((key, tmp_path / "ca.pem"))
    told, said = watch((key, tmp_path / "ca.pem"))
    with listening(tls, tmp_path) as server:
        for _ in range(2):
            told.tell(asked(server, (key, tmp_path / "ca.pem")))
    assert len(said) == 3 and said[0] == "the server at localhost:9092 answers"
    assert re.fullmatch(r"warning: \S*ca\.pem expires on .* UTC, in 12 days: get a new one from the server", said[1])
    assert re.fullmatch(r"warning: the server's certificate expires on .* UTC, in 12 days", said[2])


@pytest.fixture
def made(tmp_path) -> Deployment:
    set_up(tmp_path / "d", host="fl.example.org", port=9092, public_port=9443, nodes=1)
    return Deployment(tmp_path / "d")


@pytest.mark.parametrize(
    ("which", "begin", "end", "words"),
    [
        ("server.pem", -400, -1, r"server\.pem expired on .* move server\.pem and server\.key away, and run"),
        ("server.pem", 1, 10, r"server\.pem is not yet valid, not until "),
        ("ca.pem", -400, -1, r"ca\.pem expired on .* run scalefl deploy init \S+, then give it to each node"),
        ("ca.pem", 1, 400, r"ca\.pem is not yet valid"),
    ],
)
def test_a_server_does_not_start_with_certificates_that_are_out_of_date_until_they_are_made_anew(
    made, which, begin, end, words
):
    before = made.certificate.read_bytes()
    (made.path / which).unlink()
    if which == "server.pem":
        made.certificate_key.unlink()
    with dated(begin, end):
        set_up(made.path, host="localhost", port=1, public_port=None, nodes=1)
    with pytest.raises(ConfigError, match=words):
        check_certificates(made, made.settings())
    (made.path / which).unlink()
    if which == "server.pem":
        made.certificate_key.unlink()
    assert set_up(made.path, host="localhost", port=1, public_port=None, nodes=1) == [made.path / which]
    check_certificates(made, made.settings())
    assert certificate_warnings(made, made.settings()) == []
    assert (made.certificate.read_bytes() == before) == (which == "ca.pem"), "signed by the same key, it holds"


def test_a_server_warns_of_what_ends_soon_and_refuses_what_is_not_its_own(made, tmp_path):
    made.certificate.unlink()
    made.certificate_key.unlink()
    with dated(-100, 3):
        key, own = make_certificate(made.authority_key.read_bytes(), made.authority.read_bytes(), ["127.0.0.1"])
    made.certificate.write_bytes(own)
    made.certificate_key.write_bytes(key)
    settings = made.settings()
    check_certificates(made, settings)
    soon, name = certificate_warnings(made, settings)
    assert re.search(r"server\.pem expires on .* UTC, in 2 days\. For a new one", soon)
    assert re.search(r"nodes are told to look for fl\.example\.org, and \S+ is for 127\.0\.0\.1 only", name)
    made.settings_file.write_text('address = "fl.example.org:9443"\nhost = "10.0.0.1"\nport = 9092\n')
    with pytest.raises(
        ConfigError, match=r"is not for 10\.0\.0\.1, where the server listens.*it is for 127\.0\.0\.1\."
    ):
        check_certificates(made, made.settings())
    made.authority.write_bytes(make_authority()[1])
    with pytest.raises(ConfigError, match=r"server\.pem is not signed by \S+ca\.pem"):
        check_certificates(made, settings)
    made.authority.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"ca\.pem holds no certificate"):
        check_certificates(made, settings)


def test_a_new_certificate_needs_the_authoritys_key(made):
    for path in (made.certificate, made.certificate_key, made.authority_key):
        path.unlink()
    with pytest.raises(ConfigError, match=r"a new certificate needs \S+ca\.key: No such file"):
        set_up(made.path, host="localhost", port=1, public_port=None, nodes=1)


@pytest.mark.parametrize("host", ["::1", "[::1]", "0:0:0:0:0:0:0:1"])
def test_a_deployment_on_ipv6_writes_brackets_and_listens_there(tmp_path, host):
    set_up(tmp_path / "d", host=host, port=9092, public_port=None, nodes=1)
    deployment = Deployment(tmp_path / "d")
    settings, node = deployment.settings(), deployment.node("node-0").settings({})
    assert (settings.address, settings.host, node.server) == ("[::1]:9092", "::1", "[::1]:9092")
    check_certificates(deployment, settings)
    assert certificate_warnings(deployment, settings) == []
    tls = deployment.certificate_key.read_bytes(), deployment.certificate.read_bytes()
    with listening(tls, tmp_path, host="::1") as server:
        assert Probe(server, deployment.node("node-0").authority).ask().cause == ""


def test_a_proxy_of_a_deployment_on_ipv6_listens_there(tmp_path):
    set_up(tmp_path / "d", host="2001:db8::1", port=9092, public_port=9443, nodes=0)
    deployment = Deployment(tmp_path / "d")
    assert deployment.settings().address == "[2001:db8::1]:9443" and deployment.settings().host == "127.0.0.1"
    text = deployment.proxy.read_text()
    assert "listen 9443 ssl;\n        listen [::]:9443 ssl;" in text and "proxy_pass https://127.0.0.1:9092;" in text


def test_addresses_are_read_with_brackets_and_without():
    for text, address in {
        "fl.example.org:9443": Address("fl.example.org", 9443),
        "[2001:db8::1]:1": Address("2001:db8::1", 1),
        "::1:9092": Address("::1", 9092),
        "10.0.0.1:65535": Address("10.0.0.1", 65535),
    }.items():
        assert read_address("server", text) == address
    for text in ("localhost", "https://a:1", "a:0", "a:65536", "a:b", ":1", "a b:1", "0.0.0.0:1", "[fe80::1%eth0]:1"):
        with pytest.raises(ConfigError, match="server = "):
            read_address("server", text)


def test_a_node_asks_before_anything_that_takes_long_and_says_how_it_reads_an_address(tmp_path):
    set_up(tmp_path / "d", host="::1", port=9092, public_port=None, nodes=1)
    folder = Deployment(tmp_path / "d").node("node-0")
    port = free_port()
    folder.settings_file.write_text(folder.settings_file.read_text().replace("[::1]:9092", f"::1:{port}"))
    assert folder.settings({}).address() == Address("::1", port)
    program = (
        "import sys, time, pathlib; from scalefl.deployment.reach import watching\n"
        "with watching(pathlib.Path(sys.argv[1]), print) as watch:\n"
        "    while watch.cause is None: time.sleep(0.01)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program, folder.path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    read, away = done.stdout.splitlines()
    server = f"[::1]:{port}"
    assert read.startswith(f"server = '::1:{port}' in {folder.settings_file} is taken for {server}: write IPv6")
    assert away == (
        f"the server at {server} cannot be reached: nothing listens on {server} (connection refused); trying again"
    )


@pytest.mark.parametrize(
    ("options", "is_told"),
    [(["--host", "10.0.0.1"], True), (["--host", "10.0.0.1", "--public-port", "1"], False), (["--host", "::1"], False)],
)
def test_init_says_that_nodes_are_sent_where_nobody_listens(tmp_path, options, is_told):
    done = CliRunner().invoke(app, ["deploy", "init", str(tmp_path / "d"), *options])
    assert done.exit_code == 0
    assert ("Nodes are told 10.0.0.1:9092, and the server listens on 127.0.0.1" in done.stdout) == is_told
