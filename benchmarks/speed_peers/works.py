"""What every program has to do: models, users, cohorts and local work. Without torch, as the parent imports it."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

COHORTS = 200
"""So many rounds have a cohort of their own; then they come again."""


@dataclass(frozen=True)
class Work:
    """The same work for every program.

    Args:
        name, title: in files, and for people.
        model: of `plain.py`.
        factory, arguments: how ScaleFL makes the same model.
        sizes: each user's number of training examples.
        cohort: users a round.
        batch_size, epochs, lr, momentum: of local SGD, without weight decay.
        turn: rounds that a program does at a time.
        programs: that do it.
        firsts: for each user the first of the model's four parts that it trains; none: the first of all.
        test_examples: on which accuracy is measured.
    """

    name: str
    title: str
    model: str
    factory: str
    arguments: tuple[tuple[str, object], ...]
    sizes: tuple[int, ...]
    cohort: int
    batch_size: int
    lr: float
    momentum: float
    turn: int
    programs: tuple[str, ...]
    epochs: int = 1
    firsts: tuple[int, ...] = ()
    test_examples: int = 10_000

    def cohorts(self) -> list[list[int]]:
        """The users of each round, without replacement within one."""
        draw = random.Random(0)
        return [draw.sample(range(len(self.sizes)), self.cohort) for _ in range(COHORTS)]

    def starts(self) -> list[int]:
        """Where each user's rows start, and where the last one's end."""
        found = [0]
        for size in self.sizes:
            found.append(found[-1] + size)
        return found


def uneven(users: int, smallest: int, ratio: int, batch_size: int) -> tuple[int, ...]:
    """Numbers of examples, log-uniform over a range.

    None leaves a batch of one example over: ScaleFL skips such a batch, the others do not.
    """
    sizes = [round(smallest * ratio ** ((i + 0.5) / users)) for i in range(users)]
    random.Random(0).shuffle(sizes)
    return tuple(size + (size % batch_size == 1) for size in sizes)


def mixed(users: int) -> tuple[int, ...]:
    """A third of the users train everything, a third leave the first part as it is, a third the first two."""
    firsts = [user % 3 for user in range(users)]
    random.Random(1).shuffle(firsts)
    return tuple(firsts)


CNN = ("cnn", "scalefl.models.cnn:cnn", ())
SMALL_CNN: dict[str, Any] = {"model": "small-cnn", "arguments": (("width", 0.125),)}
RESNET = ("resnet10", "scalefl.models.resnet:resnet10", (("width", 0.25), ("norm", "group")))
PLAIN = ("bare", "bare-tuned", "pfl", "scalefl")
RESIDENT = (*PLAIN, "bare-last", "scalefl-last")

EVEN = Work(
    "A",
    "two-convolution CNN, 1,000 users of 50 examples, 50 a round, batches of 10",
    *CNN,
    sizes=(50,) * 1000,
    cohort=50,
    batch_size=10,
    lr=0.1,
    momentum=0.0,
    turn=2,
    programs=RESIDENT,
)
LARGER = Work(
    "B",
    "ResNet-10 (16 channels, group norm), 100 users of 500 examples, 10 a round, batches of 32, momentum 0.9",
    *RESNET,
    sizes=(500,) * 100,
    cohort=10,
    batch_size=32,
    lr=0.05,
    momentum=0.9,
    turn=1,
    programs=PLAIN,
)
UNEVEN = replace(
    EVEN,
    name="C",
    title="uneven: the model of A, 200 users of 10 to 1,000 examples (log-uniform), 40 a round, batches of 10",
    sizes=uneven(200, 10, 100, 10),
    cohort=40,
    turn=1,
    programs=PLAIN,
)
SPANS = replace(
    UNEVEN,
    name="F",
    title="uneven, mixed spans: as C, but a third of the users leave the first convolution as it is, a third both",
    firsts=mixed(200),
)
WORKS = (EVEN, LARGER, UNEVEN, SPANS)

SMALL = (
    replace(
        EVEN,
        name="D",
        title="small: the CNN of A with 4 and 8 channels, 1,000 users of 50 examples, 50 a round, batches of 10",
        **SMALL_CNN,
        turn=4,
        programs=(*PLAIN, "scalefl-at-once"),
    ),
    replace(
        UNEVEN,
        name="E",
        title="small and uneven: the model of D, 200 users of 10 to 1,000 examples (log-uniform), 40 a round, "
        "batches of 10",
        **SMALL_CNN,
        turn=2,
        programs=(*PLAIN, "scalefl-at-once"),
    ),
)
"""Models whose operations take longer to start than to do."""

CHECK = Work(
    "check",
    "three steps on all of a user's examples, whose order so does not matter: every program must find the same weights",
    *CNN,
    sizes=uneven(12, 8, 10, 1000),
    cohort=5,
    batch_size=1000,
    lr=0.05,
    momentum=0.9,
    turn=3,
    programs=(*RESIDENT, "scalefl-at-once", "flower"),
    epochs=3,
    firsts=mixed(12),
    test_examples=1000,
)
