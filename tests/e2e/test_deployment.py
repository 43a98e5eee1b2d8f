"""A server and two nodes, as an administrator starts them: real programs, TLS, registered keys, hard budgets."""

from __future__ import annotations

import datetime
import re
import shutil
import ssl
import stat
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from click.testing import Result
from typer.testing import CliRunner

from deployed import Field, deployed, eventually, is_alive, none_elsewhere, scalefl
from scalefl.cli import app
from scalefl.deployment import certificates
from scalefl.deployment.layout import Deployment, NodeFolder
from scalefl.deployment.programs import free_port
from scalefl.deployment.server import connected
from scalefl.deployment.submit import run_status
from scalefl.run_folder import RunFolder, read_json
from scalefl.units import MIB

BUDGETS = {"node-0": 9, "node-1": 32}
"""MiB: the first holds no training of the whole model, the second does."""
ROUNDS = 3
CONFIG = f"""
model = "cnn"
model_arguments = {{ width = 0.5, norm = "group" }}
rounds = {ROUNDS}
clients_per_round = 2
data = {{ source = {{ name = "mnist5k" }} }}
work = {{ batch_size = 16, lr = 0.02 }}
engine = {{ name = "flower", patience = {{ min_clients = 2 }} }}
method = {{ name = "scalefl" }}
"""

pytestmark = pytest.mark.timeout(280)


def here(*arguments: object) -> Result:
    """A command to its end, in this process."""
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def area(tmp_path_factory) -> Iterator[Field]:
    with deployed(tmp_path_factory.mktemp("deployment") / "here", nodes=2) as found:
        yield found


@pytest.fixture(scope="module")
def finished(area) -> RunFolder:
    """A run on both nodes."""
    for i, (name, budget) in enumerate(BUDGETS.items()):
        area.start_node(name, f"{budget}MiB", f"{i}/4")
    area.submit(area.write_config("digits", CONFIG))
    area.finish("digits")
    return RunFolder(area.deployment.runs / "digits")


def test_nodes_of_different_budgets_learn_together_each_under_its_cap(area, finished):
    summary = read_json(finished.summary)
    assert summary["test"]["accuracy"] > 0.6
    assert summary["num_clients"] == summary["num_clients_seen"] == 2
    rounds = area.journal("digits")
    assert [line["round"] for line in rounds] == list(range(1, ROUNDS + 1))
    assert all(line["lost"] == [] for line in rounds)
    for line in rounds:
        for peak in line["peaks"]:
            budget = BUDGETS[f"node-{peak['client']}"] * MIB
            assert 0 < peak["measured_bytes"] <= budget and 0 < peak["predicted_bytes"] < budget
        assert len(line["rungs"]) == 2, "planned for each: the weak one has other means, or other parts"
    offered = read_json(finished.clients)["clients"]
    assert [(c["client"], c["name"], c["num_examples"]) for c in offered] == [(0, "node-0", 1000), (1, "node-1", 1000)]


def test_the_journal_counts_the_bytes_that_flower_counts(area, finished):
    """Flower's own counter adds what it wraps around our messages, the questions to nodes, and the app."""
    traffic = run_status(area.deployment, area.run_number("digits"))["network-traffic"]
    for ours, theirs in (("bytes_down", "outbound-bytes"), ("bytes_up", "inbound-bytes")):
        counted = sum(line[ours] for line in area.journal("digits"))
        assert counted <= traffic[theirs] <= 1.05 * counted, (ours, counted, traffic)


def test_status_shows_nodes_and_runs(area, finished):
    done = scalefl("deploy", "status", "--dir", area.deployment.path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"node-0 +online", done.stdout) and re.search(r"node-1 +online", done.stdout)
    assert "finished:completed" in done.stdout and area.run_number("digits") in done.stdout


def test_a_finished_run_is_not_written_over(area, finished):
    done = here("deploy", "submit", area.deployment.path / "digits.toml", "--dir", area.deployment.path)
    assert done.exit_code == 1 and "holds a run: go on with it (--resume)" in done.stderr


def test_a_private_run_on_nodes_tells_what_it_costs_and_nothing_of_their_data(area, finished):
    """And in half precision, both ways."""
    private = CONFIG.replace('name = "flower",', 'name = "flower", precision = "float16",')
    private += "privacy = { clip_norm = 1.0, noise_multiplier = 0.5, delta = 1e-4 }\n"
    area.submit(area.write_config("private", private))
    area.finish("private")
    summary, lines = read_json(RunFolder(area.deployment.runs / "private").summary), area.journal("private")
    spent = [line["privacy"]["epsilon"] for line in lines]
    assert [line["privacy"]["releases"] for line in lines] == list(range(1, ROUNDS + 1))
    assert 0 < spent[0] < spent[1] < spent[2] == summary["privacy"]["epsilon"]
    told = {"round", "stage", "predicted_peak_bytes", "privacy", "validation", "plane"}
    assert all(line.keys() <= told for line in lines)
    offered = read_json(RunFolder(area.deployment.runs / "private").clients)["clients"]
    assert [(c["num_examples"], c.get("label_counts")) for c in offered] == [(None, None)] * 2
    crossed, open_crossed = (
        run_status(area.deployment, area.run_number(name))["network-traffic"] for name in ("private", "digits")
    )
    for way in ("outbound-bytes", "inbound-bytes"):
        assert 0.4 < crossed[way] / open_crossed[way] < 0.65, "the same tensors, halved"


def test_nodes_make_no_model_that_is_not_on_their_list(area, finished):
    """Though the server has it, and though it is installed where they run."""
    text = CONFIG.replace("cnn", "models:digits").replace('{ width = 0.5, norm = "group" }', "{}")
    text = text.replace('name = "scalefl"', 'name = "fedavg", population = "all"')
    process = area.submit(area.write_config("foreign", text))
    assert process.wait(120) != 0
    said = " ".join(area.everything().split())
    assert "models:digits is not on this node's list" in said
    assert area.journal("foreign") == []


def stranger(area: Field, folder: Path, *, authority: Path | None = None, key: Path | None = None) -> NodeFolder:
    """A node's folder with another deployment's certificate or key."""
    shutil.copytree(area.deployment.node("node-0").path, folder, ignore=shutil.ignore_patterns("flower", "cache", ".*"))
    if authority:
        shutil.copy(authority, folder / "ca.pem")
    if key:
        shutil.copy(key, folder / "node.key")
    return NodeFolder(folder)


@pytest.mark.parametrize(
    ("what", "refusal"),
    [
        ("key", "the server does not know this node's key"),
        ("authority", "the server's certificate is not vouched for by this node's ca.pem"),
    ],
)
def test_strangers_are_refused(area, finished, tmp_path, what, refusal):
    """A node whose key nobody has registered, and a server that another authority vouches for."""
    other = Deployment(tmp_path / "other")
    assert here("deploy", "init", other.path, "--nodes", 1).exit_code == 0
    found = {"key": other.node("node-0").key, "authority": other.authority}[what]
    node = stranger(area, tmp_path / "stranger", **{what: found})
    area.start(f"stranger-{what}", "deploy", "node", "--dir", node.path, "--budget", "10MiB", "--data", "mnist5k")
    log = f"stranger-{what}"
    try:
        eventually(lambda: refusal in area.said(log), why=lambda: area.said(log))
        assert {node["name"]: node["status"] for node in connected(area.deployment, print)} == dict.fromkeys(
            ("node-0", "node-1"), "online"
        )
    finally:
        area.stop(log)


def test_init_adds_nodes_and_overwrites_nothing(area, tmp_path):
    folder = tmp_path / "new"
    assert (
        here("deploy", "init", folder, "--nodes", 1, "--host", "fl.example.org", "--public-port", 9443).exit_code == 0
    )
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done = here("deploy", "init", folder, "--nodes", 3, "--host", "elsewhere")
    assert done.exit_code == 0 and "nodes/node-2" in done.stdout
    assert all(path.read_bytes() == content for path, content in before.items())
    assert Deployment(folder).nodes == ["node-0", "node-1", "node-2"]
    secret = [folder / "ca.key", folder / "server.key", *folder.glob("nodes/*/node.key")]
    assert len(secret) == 5
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in secret)
    assert 'server = "fl.example.org:9443"' in (folder / "nodes/node-2/node.toml").read_text()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious").write_text("mine")
    done = here("deploy", "init", tmp_path / "other")
    assert done.exit_code == 1 and "holds something else than a deployment" in done.stderr


def test_a_node_runs_once(area, finished):
    done = here("deploy", "node", "--dir", area.deployment.node("node-0").path, "--data", "mnist5k")
    assert done.exit_code == 1 and "is in use by another process" in " ".join(done.stderr.split())


def test_a_port_that_is_taken_is_named(area):
    done = here("deploy", "server", "--dir", area.deployment.path)
    assert done.exit_code == 1 and "something listens on 127.0.0.1" in " ".join(done.stderr.split())


@pytest.mark.parametrize(("name", "message"), [("node.key", "private key"), ("ca.pem", "holds no certificate")])
def test_a_file_that_is_empty_is_complained_of_by_its_program_and_by_us(area, tmp_path, name, message):
    node = stranger(area, tmp_path / "stranger")
    (node.path / name).write_bytes(b"")
    area.start(f"empty-{name}", "deploy", "node", "--dir", node.path, "--budget", "10MiB", "--data", "mnist5k")
    eventually(lambda: message in area.said(f"empty-{name}"), why=lambda: area.said(f"empty-{name}"))
    area.stop(f"empty-{name}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "lots", "--data", "mnist5k"], "'lots' is not a number of bytes"),
        (["--budget", "3MiB", "--data", "mnist5k"], "a budget of 3.00 MiB leaves nothing to plan with"),
        (["--budget", "10MiB"], "node-0 has no data: give --data"),
        (["--budget", "10MiB", "--data", "/nowhere"], "no folder /nowhere"),
        (["--data", "mnist5k", "--share", "2/2"], 'write "0/2" for the first of two parts'),
    ],
)
def test_bad_settings_of_a_node_are_named(area, tmp_path, options, message):
    done = here("deploy", "node", "--dir", stranger(area, tmp_path / "stranger").path, *options)
    assert done.exit_code == 1 and message in " ".join(done.stderr.split())


def test_folders_that_are_none_are_named(tmp_path):
    for words in (["server"], ["status"], ["node"], ["submit", tmp_path / "x.toml"]):
        done = here("deploy", *words, "--dir", tmp_path)
        assert done.exit_code == 1 and "it is made by scalefl deploy init" in " ".join(done.stderr.split()), words


def test_a_node_says_at_once_that_its_server_is_away_and_goes_on_when_it_comes(tmp_path):
    """By IPv6, and past a proxy for what is not encrypted: that is spoken on this machine only."""
    done = here("deploy", "init", tmp_path / "d", "--nodes", 1, "--host", "::1", "--port", free_port())
    assert done.exit_code == 0, done.stderr
    area = Field(Deployment(tmp_path / "d"), lambda name: ["env", f"http_proxy=http://127.0.0.1:{free_port()}"])
    where = area.deployment.settings().address
    try:
        area.start_node("node-0", "9MiB", "0/4")
        eventually(lambda: "trying again" in area.said("node-0"), why=lambda: area.said("node-0"))
        assert "examples" not in area.said("node-0"), "said while its data is read"
        area.start_server()
        area.wait_until_there("node-0")
        eventually(lambda: "answers now" in area.said("node-0"), why=lambda: area.said("node-0"))
        told = [line for line in area.said("node-0").splitlines() if line.startswith("the server at")]
        assert told == [
            f"the server at {where} cannot be reached: nothing listens on {where} (connection refused); trying again",
            f"the server at {where} answers now: going on",
        ]
        area.submit(area.write_config("late", CONFIG.replace("min_clients = 2", "min_clients = 1")))
        area.finish("late")
    finally:
        for name in ("node-0", "server"):
            if name in area.processes:
                area.stop(name)


def expired(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a deployment's server a certificate of last year."""
    day = datetime.timedelta(days=1)
    monkeypatch.setattr(certificates, "_SLACK", 400 * day)
    monkeypatch.setattr(certificates, "_VALID", -35 * day)
    for path in (deployment.certificate, deployment.certificate_key):
        path.unlink()
    assert here("deploy", "init", deployment.path).exit_code == 0


def test_a_certificate_that_has_expired_is_told_on_both_sides(tmp_path, monkeypatch):
    port = free_port()
    assert here("deploy", "init", tmp_path / "d", "--nodes", 1, "--port", port).exit_code == 0
    deployment = Deployment(tmp_path / "d")
    expired(deployment, monkeypatch)
    done = here("deploy", "server", "--dir", deployment.path)
    day = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=35)
    assert done.exit_code == 1 and f"server.pem expired on {day:%Y-%m-%d}" in " ".join(done.stderr.split())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(deployment.certificate, deployment.certificate_key)
    area = Field(deployment, none_elsewhere)
    with HTTPServer(("127.0.0.1", port), BaseHTTPRequestHandler) as server:
        server.handle_error = lambda *_: None
        server.socket = context.wrap_socket(server.socket, server_side=True)
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            area.start_node("node-0", "9MiB", "0/4")
            eventually(lambda: "trying again" in area.said("node-0"), why=lambda: area.said("node-0"))
        finally:
            area.stop("node-0")
            server.shutdown()
    assert f"the server's certificate expired on {day:%Y-%m-%d}" in area.said("node-0")
    assert "vouched" not in area.said("node-0")


def test_what_is_stopped_leaves_nothing_running(area, finished):
    """Last: it stops the server and the nodes."""
    for name in ("node-0", "server"):
        family = area.family(name)
        assert len(family) > 2
        assert area.stop(name) == 0
        eventually(lambda family=family: not any(map(is_alive, family)), 15.0)
    # What it knew of registered keys is damaged, and Flower's database is not.
    area.deployment.registered.write_text("{")
    area.log("server").unlink()
    area.start_server()
    eventually(lambda: "node-1 is registered" in area.said("server"), why=lambda: area.said("server"))
    assert area.processes["server"].poll() is None
