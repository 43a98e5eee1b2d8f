"""What can go wrong, as one tree.

    ScaleFLError
    ├── ConfigError        a setting is unknown, of the wrong type, or contradicts another
    ├── DataError          a data set lacks a column, a split or examples
    ├── ModelDoesNotRun    the model fails on an example batch of the data
    ├── UncuttableModel    no place, or not the place asked for, splits the model into blocks
    ├── UnsliceableModel   the model has no width to scale
    ├── BudgetError        no allowed means fits a memory budget
    ├── EmptyCohort        no client can take part in the round
    ├── RoundFailed        every client of a round was lost
    ├── BadUpdate          a client sent something that must not enter the mean
    ├── NotAllowed         a server asks a node for something that is not on the node's list
    ├── FrozenTensorWritten  a model has written into a tensor that others share
    └── CheckpointError    a saved run is truncated, foreign, newer, or cannot be written

A message gives the fact, the numbers, and what to do. A client that is lost is data in the round's
record, not an exception; only a round that loses all of its clients raises.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable


class ScaleFLError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(ScaleFLError):
    """A setting is unknown, of the wrong type, or contradicts another."""


def check_range(name: str, value: float, least: float, most: float = math.inf) -> None:
    """Refuse a setting that is not a finite number in a range.

    Raises:
        ConfigError: names the setting, the value and the range.
    """
    if not (math.isfinite(value) and least <= value <= most):
        finite = "" if math.isfinite(value) else "a finite number, "
        upper = "" if most == math.inf else f", at most {most:g}"
        raise ConfigError(f"{name} = {value}: expected {finite}at least {least:g}{upper}")


def nearest(word: str, known: Iterable[str], count: int = 1) -> str:
    """A hint for the end of a message, ": did you mean 'a' or 'b'?", at most `count` names; "" if none is near."""
    names = difflib.get_close_matches(word, list(known), count)
    return f": did you mean {' or '.join(map(repr, names))}?" if names else ""


class DataError(ScaleFLError):
    """A data set lacks a column, a split or examples."""


class ModelDoesNotRun(ScaleFLError):
    """The model fails on an example batch of the data."""


class UncuttableModel(ScaleFLError):
    """No place, or not the place asked for, splits the model into blocks."""


class UnsliceableModel(ScaleFLError):
    """The model has no width to scale."""


class BudgetError(ScaleFLError):
    """No allowed means fits a memory budget."""


class EmptyCohort(ScaleFLError):
    """No client can take part in the round."""


class RoundFailed(ScaleFLError):
    """Every client of a round was lost; the state from before the round is still good."""


class BadUpdate(ScaleFLError):
    """A client sent something that must not enter the mean."""

    def __init__(self, client_id: int, round: int, name: str, why: str) -> None:
        super().__init__(f"update of client {client_id} in round {round}: {name}: {why}")
        self.client_id, self.round, self.name, self.why = client_id, round, name, why


class NotAllowed(ScaleFLError):
    """A server asks a node for a class or a factory that is not on the node's list."""


class FrozenTensorWritten(ScaleFLError):
    """A model has written into a frozen tensor, which others share: what the run has is not to be trusted any more."""


class CheckpointError(ScaleFLError):
    """A saved run is truncated, foreign, newer than this version, or cannot be written."""
