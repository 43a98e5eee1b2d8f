"""Tasks as bytes: what arrives is what was sent, and a receiver makes nothing that is not on its list."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import msgspec
import pytest

from scalefl.engines.codec import LARGEST_BYTES, Allowed, decode, encode
from scalefl.errors import ConfigError, NotAllowed
from scalefl.mentor import Mentor, MentorLoss
from scalefl.methods import METHODS, PRESETS
from scalefl.models.spec import ModelSpec
from scalefl.objectives import OwnClasses, TaskLoss
from scalefl.types import ClientInfo
from support import PROBLEM, WORK, full_bytes, make_method, spec

BUILT_IN = Allowed()
TESTS = Allowed(("support:*", "models:*"))


@dataclass(frozen=True)
class Mine:
    value: int


@pytest.mark.parametrize("name", [*METHODS, *PRESETS])
def test_every_methods_tasks_arrive_as_they_were(name):
    settings = {} if name in ("fedavg", "heterofl", "fedrolex") else {"blocks": ["0", "1"]}
    if name == "slt":
        settings |= {"rounds": 4}
    method = make_method(name, work=WORK, **settings)
    state = method.init(spec(), PROBLEM, seed=1, smallest_memory_bytes=full_bytes())
    client = ClientInfo(3, 20, 2 * full_bytes(), classes=(0, 1, 2))
    (task,) = method.plan(state, [client]).tasks
    objectives = tuple(method.objective(step) for step in task.steps)
    sent = (task, objectives, PROBLEM)
    arrived = decode(encode(sent), TESTS)
    assert arrived == sent and hash(arrived[0]) == hash(task)
    assert len(encode(sent)) < 4096


@pytest.mark.parametrize(
    "value",
    [
        None,
        (1, 2.5, True, "ä", b"\0", ()),
        frozenset({"b", "a"}),
        {"a": (1, {"b": None})},
        float("inf"),
        -0.0,
        2**63,
        MentorLoss(Mentor(form="cca"), 1.0, 0.1),
        OwnClasses((0, 2)),
        (tuple, list, dict),
        ModelSpec.of("scalefl.models.resnet:resnet18", width=0.5, num_classes=10),
        ModelSpec.of("scalefl.models.resnet:resnet18").around("scalefl.models.scaler:dividing", rate=0.5),
    ],
)
def test_values_arrive_as_they_were(value):
    arrived = decode(encode(value), BUILT_IN)
    assert arrived == value and type(arrived) is type(value)
    assert isinstance(value, frozenset) or repr(arrived) == repr(value)  # -0.0 is equal to 0.0, and so is False


def model(factory: str, /, **arguments) -> bytes:
    return encode(ModelSpec(factory, tuple(arguments.items())))


def tagged(name: str, /, **fields) -> bytes:
    return zlib.compress(msgspec.msgpack.encode({"": name, **fields}))


@pytest.mark.parametrize(
    "content",
    [
        model("os:system", command="true"),
        model("scalefl.models.spec:load_object", path="os:system"),
        model("scalefl.models.resnet:torch.hub.load"),
        model("scalefl.models.resnet:nn"),
        encode(ModelSpec.of("os:system").around("scalefl.models.scaler:dividing", rate=1.0)),
        encode(replace(ModelSpec.of("scalefl.models.cnn:cnn"), arguments=(("a", (("factory", "os:system"),)),))),
        tagged("subprocess:Popen", args=["true"]),
        tagged("scalefl.types:replace"),
        tagged("scalefl.types:Any"),
        tagged("scalefl.config:Config", model="cnn"),
        tagged("scalefl.engines.local:LocalEngine"),
        tagged("builtins:list"),
        tagged("class", name="subprocess:Popen"),
        tagged("class", name="pathlib:Path"),
        encode(Mine(1)),
    ],
)
def test_nothing_else_is_made(content):
    with pytest.raises((NotAllowed, ConfigError)):
        decode(content, BUILT_IN)


def test_refusals_load_nothing(tmp_path, monkeypatch):
    (tmp_path / "bait.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    for content in (model("bait:model"), tagged("bait:Value"), tagged("class", name="bait:Value")):
        with pytest.raises(NotAllowed, match="bait:"):
            decode(content, BUILT_IN)


def test_a_list_names_what_modules_define_or_one_thing():
    assert decode(encode(Mine(1)), Allowed((f"{__name__}:*",))) == Mine(1)
    assert decode(encode(Mine(1)), Allowed((f"{__name__}:Mine",))) == Mine(1)
    with pytest.raises(NotAllowed, match="TaskLoss is not defined in"):
        decode(tagged(f"{__name__}:TaskLoss"), Allowed((f"{__name__}:*",)))
    assert decode(tagged(f"{__name__}:TaskLoss"), Allowed((f"{__name__}:TaskLoss",))) == TaskLoss()
    assert decode(encode(Mine(1)), Allowed(("*",))) == Mine(1)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no zlib",
        encode((1, 2))[:-3],
        zlib.compress(b"\xc1"),
        zlib.compress(bytes(LARGEST_BYTES + 1)),
        tagged("scalefl.objectives:OwnClasses"),
        tagged("scalefl.objectives:OwnClasses", other=1),
    ],
)
def test_damaged_bytes_are_refused(content):
    with pytest.raises((ValueError, TypeError)):
        decode(content, BUILT_IN)


def test_what_has_no_name_is_not_sent():
    @dataclass(frozen=True)
    class Local:
        pass

    for value in (Local(), ModelSpec.of(lambda: None), object(), [1]):
        with pytest.raises(ConfigError, match="cannot be sent to nodes"):
            encode(value)
