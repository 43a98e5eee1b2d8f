"""A server and three nodes on hosts of their own: network namespaces, each with an address, joined by a bridge.

Run by `make test-hosts`, where the system lets one make namespaces. Nodes reach the server through nginx, which
forwards the path that is theirs and nothing else.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from deployed import Field, deployed, eventually
from scalefl.run_folder import RunFolder, read_json

NETWORK = "10.77.0"
SERVER, NODES = "sfl-server", [f"sfl-node-{i}" for i in range(3)]
ADDRESSES = {SERVER: f"{NETWORK}.1", **{name: f"{NETWORK}.{11 + i}" for i, name in enumerate(NODES)}}
SWITCH = "sfl-switch"
PUBLIC_PORT = 9443
CUT_SECONDS = 75


def ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=check)


def refusal() -> str:
    """Why there can be no hosts here; empty where there can."""
    for program in ("ip", "nginx", "curl"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    if os.geteuid() != 0:
        return "network namespaces need root"
    done = ip("netns", "add", SWITCH, check=False)
    if done.returncode == 0:
        ip("netns", "del", SWITCH)
    return done.stderr.strip()


pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@contextmanager
def hosts() -> Iterator[None]:
    """A namespace for each host, and one with the bridge to which they are plugged."""
    everything = [SWITCH, *ADDRESSES]
    try:
        for name in everything:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", SWITCH, "link", "add", "bridge0", "type", "bridge")
        ip("-n", SWITCH, "link", "set", "bridge0", "up")
        for i, (name, address) in enumerate(ADDRESSES.items()):
            ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", f"port{i}", "netns", SWITCH)
            ip("-n", SWITCH, "link", "set", f"port{i}", "master", "bridge0", "up")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
        yield
    finally:
        for name in everything:
            ip("netns", "del", name, check=False)


def host_of(name: str) -> list[str]:
    """Nodes on their hosts, all else on the server's."""
    host = f"sfl-{name}" if name.startswith("node-") else SERVER
    return ["ip", "netns", "exec", host]


@pytest.fixture
def area(tmp_path) -> Iterator[Field]:
    if why := refusal():
        pytest.skip(f"no hosts here: {why}")
    options = ("--host", ADDRESSES[SERVER], "--public-port", PUBLIC_PORT)
    with hosts(), deployed(tmp_path / "here", *options, nodes=3, host_of=host_of) as found:
        conf = found.deployment.path / "nginx.conf"
        found.start_program("proxy", "nginx", "-c", str(conf), "-g", "daemon off;")
        yield found


def status_of(area: Field, node: int, path: str, port: int) -> str:
    """What a node's host is answered there: an HTTP status, or 000."""
    words = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "--max-time", "5"]
    words += ["--cacert", str(area.deployment.authority), f"https://{ADDRESSES[SERVER]}:{port}{path}"]
    done = subprocess.run([*host_of(f"node-{node}"), *words], capture_output=True, text=True, check=False)
    return done.stdout


CONFIG = """
model = "cnn"
model_arguments = { width = 0.5, norm = "group" }
rounds = 6
clients_per_round = 3
data = { source = { name = "mnist5k" } }
work = { batch_size = 16, lr = 0.02, epochs = 3 }
method = { name = "scalefl" }
evaluation = { plane_samples = 64 }
engine = { name = "flower", patience = { min_clients = 2, absence_seconds = 240 } }
"""


def test_hosts_learn_together_and_one_that_is_cut_off_comes_back(area):
    for i, budget in enumerate(("9MiB", "12MiB", "32MiB")):
        area.start_node(f"node-{i}", budget, f"{i}/8")
    area.submit(area.write_config("hosts", CONFIG))
    eventually(lambda: len(area.journal("hosts")) >= 1, 300.0, why=area.everything)
    assert status_of(area, 0, "/v1/fleet/pull-messages", PUBLIC_PORT) != "404", "this path is forwarded"
    for path in ("/v1/control/list-runs", "/v1/runtime/acquire-task", "/health", "/"):
        assert status_of(area, 0, path, PUBLIC_PORT) == "404", path
    assert status_of(area, 0, "/health", area.deployment.settings().port) == "000", "only on the server's own loopback"
    ip("-n", NODES[2], "link", "set", "eth0", "down")
    time.sleep(CUT_SECONDS)
    ip("-n", NODES[2], "link", "set", "eth0", "up")
    area.finish("hosts", 500.0)
    rounds = area.journal("hosts")
    last = [i for ids in rounds[-1]["rungs"].values() for i in ids]
    assert len(rounds) == 6 and sorted(last) == [0, 1, 2], "it is back"
    assert all(line["lost"] == [] for line in rounds), "what it could not send is sent again"
    assert read_json(RunFolder(area.deployment.runs / "hosts").summary)["test"]["accuracy"] > 0.6
