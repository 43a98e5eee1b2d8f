"""Messages between processes: what arrives is what was sent, and neither side holds more than that."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest
import torch

from scalefl.engines import wire
from scalefl.engines.wire import Channel, Head, InMemory, Read
from scalefl.errors import ConfigError
from support import identical


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    ours, theirs = (Channel(end) for end in socket.socketpair())
    yield ours, theirs
    ours.close()
    theirs.close()


def sending(channel: Channel, *content) -> threading.Thread:
    thread = threading.Thread(target=channel.send, args=content)
    thread.start()
    return thread


COLUMN = torch.arange(12.0).view(4, 3)
TENSORS = {
    # As in language modelling, where the tokens are inputs and labels at once.
    "a": COLUMN,
    "the same": COLUMN,
    "row": COLUMN[1:],
    "column": COLUMN[:, 1],
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "nothing": torch.ones(0, 3),
    "number": torch.tensor(3),
    "bits": torch.tensor([True, False]),
    "half": torch.randn(5).bfloat16(),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "long": torch.randn(300_000),
}


def test_what_arrives_is_what_was_sent(ends):
    thread = sending(ends[0], {"a": "header"}, TENSORS, {}, {"a": COLUMN})
    incoming = ends[1].receive()
    groups = [InMemory() for _ in range(3)]
    for group in groups:
        incoming.receive(group)
    thread.join()
    assert incoming.header == {"a": "header"}
    assert identical(groups[0], TENSORS) and groups[1] == {} and identical(groups[2], {"a": COLUMN})
    received = [t for group in groups for t in group.values()]
    assert not any(t.is_shared() or t.requires_grad for t in received)
    storages = {t.untyped_storage().data_ptr() for t in received if t.numel()}
    assert len(storages) == len(received) - 1, "each has memory of its own: it may be trained"


class Full(InMemory):
    """Has room for two tensors, and runs out of it in the middle of the third."""

    def accept(self, head: Head, read: Read) -> None:
        if len(self) == 2:
            read(memoryview(bytearray(7)))
            raise MemoryError
        super().accept(head, read)


def test_what_a_receiver_has_no_room_for_does_not_spoil_the_next_message(ends):
    def send() -> None:
        ends[0].send("first", TENSORS, TENSORS)
        ends[0].send("second", TENSORS)

    thread = threading.Thread(target=send)
    thread.start()
    incoming = ends[1].receive()
    with pytest.raises(MemoryError):
        incoming.receive(Full())
    incoming.discard()
    following, params = ends[1].receive(), InMemory()
    following.receive(params)
    thread.join()
    assert following.header == "second" and identical(params, TENSORS)


def test_a_header_that_cannot_be_pickled_is_refused_before_anything_is_sent(ends):
    with pytest.raises(ConfigError, match="workers = 0"):
        ends[0].send(lambda: None, TENSORS)
    thread = sending(ends[0], "next")
    assert ends[1].receive().header == "next"
    thread.join()


def test_the_end_of_a_connection(ends):
    ends[0].close()
    with pytest.raises(EOFError):
        ends[1].receive()


class Known:
    """A value that channels know again."""

    def __init__(self, content) -> None:
        self.content = content


def key_of(value):
    return id(value) if isinstance(value, Known) else None


@pytest.fixture
def knowing() -> Iterator[tuple[Channel, Channel]]:
    ours, theirs = (Channel(end, key_of) for end in socket.socketpair())
    yield ours, theirs
    ours.close()
    theirs.close()


def test_what_comes_again_is_sent_once(knowing, monkeypatch):
    sizes = []
    dumped = wire._pickled
    monkeypatch.setattr(wire, "_pickled", lambda *a: (found := dumped(*a), sizes.append(len(found[0])))[0])
    inner = Known("i" * 10_000)
    outer = Known((inner, "o" * 10_000))
    received = []
    for content in ([outer], [inner, outer], [outer]):
        knowing[0].send(content)
        received.append(knowing[1].receive().header)
    assert sizes[0] > 20_000 and max(sizes[1:]) < 100
    first, second, third = received
    assert first[0].content[0].content == "i" * 10_000
    assert second == [first[0].content[0], first[0]] and third == first, "the same objects"


def test_a_header_that_cannot_be_pickled_teaches_nothing(knowing):
    value = Known("v" * 1000)
    with pytest.raises(ConfigError):
        knowing[0].send((value, lambda: None))
    knowing[0].send(value)
    assert knowing[1].receive().header.content == "v" * 1000


def test_both_ends_forget_before_they_know_too_much(knowing, monkeypatch):
    monkeypatch.setattr(wire, "_MOST_KNOWN", 5)
    values = [Known(i) for i in range(4)]
    for round in range(20):
        content = [*values, Known(f"only in round {round}")]
        knowing[0].send(content)
        assert [known.content for known in knowing[1].receive().header] == [known.content for known in content]
        assert len(knowing[0]._sent) <= 10 and len(knowing[1]._received) <= 10


def test_what_the_program_itself_defines_is_refused_as_no_other_process_could_find_it(ends):
    mine = type("Mine", (), {"__module__": "__main__"})
    with pytest.raises(ConfigError, match="Mine is defined in the program that was started"):
        ends[0].send(mine())
