"""Deployments without processes: settings, what a node makes of a server's wishes, and what is submitted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scalefl.data import Source
from scalefl.deployment.layout import Deployment, NodeFolder, NodeSettings, write_new
from scalefl.deployment.node import Own, _rows
from scalefl.deployment.setup import set_up
from scalefl.deployment.submit import load_submission
from scalefl.errors import ConfigError, DataError
from scalefl.measure import spare_bytes, usable_bytes
from scalefl.units import MIB
from support import PROBLEM, examples_of

SETTINGS = NodeSettings(name="here", client=3, server="localhost:1", budget="20MiB")


def test_a_node_offers_its_budget_less_the_margin_and_caps_at_all_of_it():
    own = Own(SETTINGS, PROBLEM, examples_of(1, 10))
    offer = own.describe()
    assert (offer.id, offer.num_examples, offer.device) == (3, 10, "here")
    assert offer.memory_bytes == usable_bytes(20 * MIB) and own[3].memory_bytes == 20 * MIB
    assert offer.classes == tuple(own.label_counts(3).nonzero().flatten().tolist())


def test_an_automatic_budget_is_what_the_machine_can_spare_and_holds_until_the_next_offer(monkeypatch):
    own = Own(replace(SETTINGS, budget="auto"), PROBLEM, examples_of(1, 10))
    monkeypatch.setattr("scalefl.deployment.node.spare_bytes", lambda: 101 * MIB)
    assert own.describe().memory_bytes == usable_bytes(96 * MIB), "a multiple of 8 MiB"
    monkeypatch.setattr("scalefl.deployment.node.spare_bytes", lambda: 50 * MIB)
    assert own[3].memory_bytes == 96 * MIB, "what was promised"
    assert own.describe().memory_bytes == usable_bytes(48 * MIB) and own[3].memory_bytes == 48 * MIB


def test_what_a_machine_can_spare_is_less_than_it_has():
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    assert 0 < spare_bytes() < 1.1 * available


def test_a_node_takes_the_servers_word_for_means_and_no_other_problem():
    own = Own(SETTINGS, PROBLEM, examples_of(1, 10))
    theirs = replace(PROBLEM, mean=(0.1,), std=(0.2,), num_classes=5)
    own.take_over(theirs)
    assert own.problem == theirs
    with pytest.raises(ValueError, match=r"the run is about image \[1, 8, 8\] float32.*, this node's data about x"):
        own.take_over(replace(PROBLEM, columns=(replace(PROBLEM.columns[0], name="image"),)))
    with pytest.raises(ValueError, match="this node has labels up to 2"):
        own.take_over(replace(PROBLEM, num_classes=2))


def test_shares_part_the_rows_and_leave_nothing_on_disk(tmp_path):
    source, folder = Source(name="mnist5k"), NodeFolder(tmp_path)
    parts = [_rows(source, replace(SETTINGS, share=f"{i}/3"), folder)[1] for i in range(3)]
    _, whole = _rows(source, SETTINGS, folder)
    assert [len(part["label"]) for part in parts] == [1334, 1333, 1333]
    assert torch.equal(parts[1]["image"], whole["image"][1::3])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="4000 rows: nothing is left for the share 4000/4001"):
        _rows(source, replace(SETTINGS, share="4000/4001"), folder)


def test_a_submission_needs_no_devices(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text('name = "job"\nmodel = "cnn"\nrounds = 2\ndata = { source = { name = "mnist5k" } }\n')
    assert load_submission(path, ("rounds=3",)).rounds == 3
    path.write_text("model = 3")
    with pytest.raises(ConfigError, match=r"job\.toml: .*"):
        load_submission(path)


def test_a_node_that_was_half_made_is_made_again(tmp_path):
    options = {"host": "localhost", "port": 1, "public_port": None}
    set_up(tmp_path / "d", nodes=1, **options)
    deployment = Deployment(tmp_path / "d")
    for left in (".node-1.partial", "node-1"):
        (deployment.path / "nodes" / left).mkdir()
    made = set_up(tmp_path / "d", nodes=2, **options)
    assert made == [deployment.node("node-1").path] and deployment.node("node-1").settings({}).client == 1
    assert deployment.nodes == ["node-0", "node-1"]


@pytest.mark.parametrize("host", ["two words", "a:1", "", "ünicode.de"])
def test_hosts_that_are_none_are_refused(tmp_path, host):
    with pytest.raises(ConfigError, match="expected a name or an address"):
        set_up(tmp_path / "d", host=host, port=1, public_port=None, nodes=1)
    assert not (tmp_path / "d").exists()


def test_files_are_never_written_over(tmp_path):
    write_new(tmp_path / "key", "mine", 0o600)
    with pytest.raises(ConfigError, match="is there already"):
        write_new(tmp_path / "key", "theirs")
    assert (tmp_path / "key").read_text() == "mine"


@pytest.mark.parametrize(
    "changes",
    [{"client": -1}, {"budget": "many"}, {"cache": "1"}, {"share": "1/1"}, {"share": "x"}, {"poll_seconds": 0}],
)
def test_settings_of_a_node_that_make_no_sense_are_refused(changes):
    with pytest.raises(ConfigError):
        replace(SETTINGS, **changes)
