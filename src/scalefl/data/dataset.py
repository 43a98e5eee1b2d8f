"""A data set, and the same data as clients hold it.

Shapes: N rows, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from scalefl.data.checks import check_values, conformed
from scalefl.data.partitioners import Natural, Partitioner, check_partition, largest_remainder, partition
from scalefl.errors import ConfigError, DataError
from scalefl.problem import Batch, Problem, num_rows, take
from scalefl.rng import generator


@dataclass(frozen=True)
class Dataset:
    """Rows to train on and rows to test on, by column; they are held against the problem.

    Columns are tensors or arrays [N, ...] of the shape and dtype that the problem says: images as uint8 [N, C, H, W],
    labels as int64 [N] and so on. `conformed` says what is converted. Columns that the problem does not name, such
    as clients' ids, may be there: no client is given them.

    Raises:
        DataError: no training rows, or rows that are not what the problem says; numbers that are not finite, and
            labels outside of 0 … K − 1.
    """

    problem: Problem
    train: Batch
    test: Batch

    def __post_init__(self) -> None:
        for split, what in (("train", "training"), ("test", "test")):
            rows = conformed(self.problem, getattr(self, split), what)
            check_values(self.problem, rows, what)
            object.__setattr__(self, split, rows)  # as tensors
        if not num_rows(self.train):
            raise DataError("the data set has no training rows")


@runtime_checkable
class FederatedData(Protocol):
    """Data as it lies on clients 0 … num_clients - 1.

    An implementation may make a client's rows only when they are asked for, so that a population can be
    larger than memory.
    """

    @property
    def problem(self) -> Problem:
        """What is learned."""
        ...

    @property
    def num_clients(self) -> int:
        """Size of the population."""
        ...

    @property
    def validation(self) -> Batch:
        """Rows on the server for choices during training; may be empty."""
        ...

    @property
    def test(self) -> Batch:
        """Rows on the server for the reported numbers only."""
        ...

    def num_examples(self, client: int) -> int:
        """Training rows of a client; may be 0."""
        ...

    def label_counts(self, client: int) -> Tensor:
        """Training rows of a client for each class: [K], int64."""
        ...

    def examples(self, client: int) -> Batch:
        """All training rows of a client."""
        ...


class PartitionedData:
    """`FederatedData` in memory: the training rows once, and for each client the indices of its own.

    Args:
        dataset: the rows.
        clients: for each client the indices of its training rows; or what gives them when they are asked for.
        num_clients: how many there are; None: as many as `clients` names.
        validation: indices of the training rows that the server keeps for validation.
    """

    def __init__(
        self,
        dataset: Dataset,
        clients: Sequence[Tensor] | Callable[[], Sequence[Tensor]],
        validation: Tensor,
        num_clients: int | None = None,
    ) -> None:
        self.problem = dataset.problem
        read = dataset.problem.example(1)
        self.test: Batch = {name: column for name, column in dataset.test.items() if name in read}
        self._train = {name: column for name, column in dataset.train.items() if name in read}
        self.validation: Batch = take(self._train, validation)
        self._labels = dataset.problem.labels(dataset.train)
        self._clients = clients
        self._num_clients = num_clients

    @classmethod
    def from_dataset(
        cls,
        dataset: Dataset,
        partitioner: Partitioner,
        num_clients: int | None,
        *,
        groups: Sequence[int],
        validation_fraction: float = 0.0,
        seed: int,
    ) -> PartitionedData:
        """Hold out validation rows, stratified by label, then share the other training rows out.

        Args:
            dataset: its test rows are left alone.
            partitioner: how rows are shared.
            num_clients: size of the population; None: as many as `Natural` finds.
            groups: device class of each client, 0 = weakest; read by `Capability` only.
            validation_fraction: part of the training rows, in [0, 1), that no client gets.
            seed: decides the validation rows and the partition.

        Raises:
            ConfigError, DataError: see `partition`.
        """
        if not 0 <= validation_fraction < 1:
            raise ConfigError(f"validation_fraction = {validation_fraction}: expected 0 <= fraction < 1")
        natural_ids = None
        if isinstance(partitioner, Natural):
            natural_ids = _ids(dataset, partitioner.column)
        labels = dataset.problem.labels(dataset.train)
        kept, held_out = stratified_split(labels, validation_fraction, generator(seed, "validation"))
        if natural_ids is not None:
            natural_ids = natural_ids[kept]
        if num_clients is None:
            if natural_ids is None:
                raise ConfigError(f"the partition {type(partitioner).__name__.lower()} needs a number of clients")
            num_clients = len(np.unique(natural_ids.numpy()))
        check_partition(partitioner, len(kept), num_clients, natural_ids)
        # Not yet: the library takes seconds to import, and a memory plan needs no rows of clients.
        share = partial(
            partition, partitioner, labels[kept], num_clients, groups=groups, natural_ids=natural_ids, seed=seed
        )
        return cls(dataset, partial(_picked, kept, share), held_out, num_clients)

    @cached_property
    def _shared(self) -> tuple[Tensor, Tensor]:
        """The rows of all clients, one after another, and where each client's begin; last, where they end."""
        clients = self._clients() if callable(self._clients) else self._clients
        # One tensor for all clients: a million small ones would cost more than the indices in them.
        self._clients = ()
        return torch.cat(list(clients)), torch.tensor([0, *map(len, clients)]).cumsum(0)

    @property
    def num_clients(self) -> int:
        """Size of the population."""
        return len(self._shared[1]) - 1 if self._num_clients is None else self._num_clients

    def indices(self, client: int) -> Tensor:
        """Where a client's rows are among the training rows: int64, not copied."""
        if not 0 <= client < self.num_clients:
            raise IndexError(f"client {client} of {self.num_clients}")
        rows, ends = self._shared
        return rows[ends[client] : ends[client + 1]]

    def num_examples(self, client: int) -> int:
        """Training rows of a client; may be 0."""
        return len(self.indices(client))

    def label_counts(self, client: int) -> Tensor:
        """Training rows of a client for each class: [K], int64."""
        return torch.bincount(self._labels[self.indices(client)], minlength=self.problem.num_classes)

    def examples(self, client: int) -> Batch:
        """All training rows of a client."""
        return take(self._train, self.indices(client))


class CheckedClients:
    """`FederatedData` of somebody else's making, each client's rows held against the problem when first asked for."""

    def __init__(self, data: FederatedData) -> None:
        self.problem = data.problem
        self.num_clients = data.num_clients
        if not isinstance(self.num_clients, int) or self.num_clients < 1:
            raise DataError(f"{type(data).__name__}.num_clients = {self.num_clients!r}: expected a number from 1 on")
        self.validation: Batch = self._checked(data.validation, "validation")
        self.test: Batch = self._checked(data.test, "test")
        self._data, self._seen = data, set[int]()

    def num_examples(self, client: int) -> int:
        """Training rows of a client; may be 0."""
        return self._data.num_examples(client)

    def label_counts(self, client: int) -> Tensor:
        """Training rows of a client for each class: [K], int64."""
        counts = self._data.label_counts(client)
        if tuple(counts.shape) != (self.problem.num_classes,):
            raise DataError(
                f"label_counts of client {client} has the shape {list(counts.shape)}: expected "
                f"[{self.problem.num_classes}], a number for each class"
            )
        return counts

    def examples(self, client: int) -> Batch:
        """All training rows of a client.

        Raises:
            DataError: they are not what the problem says, or not as many as `num_examples` says.
        """
        rows, what = self._data.examples(client), f"client {client}'s"
        if client in self._seen:
            return conformed(self.problem, rows, what)
        checked, said = self._checked(rows, what), self.num_examples(client)
        if num_rows(checked) != said:
            raise DataError(f"client {client} has {num_rows(checked)} rows, and num_examples says {said}")
        self._seen.add(client)
        return checked

    def _checked(self, rows: Batch, what: str) -> Batch:
        found = conformed(self.problem, rows, what)
        check_values(self.problem, found, what)
        return found


def with_checks(data: FederatedData) -> FederatedData:
    """The data as it is, where all its rows have been held against the problem, as a data set's; else checked."""
    own = isinstance(data, PartitionedData) and type(data).examples is PartitionedData.examples
    return data if own or isinstance(data, CheckedClients) else CheckedClients(data)


def stratified_split(labels: Tensor, fraction: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of the rows kept and of those held out, sorted.

    `round(fraction × N)` rows are held out, from each label in proportion to its rows.
    """
    if not len(labels):
        return torch.arange(0), torch.arange(0)
    counts = torch.bincount(labels)
    quotas = torch.from_numpy(largest_remainder(counts.numpy(), round(fraction * len(labels))))
    shuffled = torch.randperm(len(labels), generator=generator)
    rows = shuffled[labels[shuffled].argsort(stable=True)]
    first_of_label = counts.cumsum(0) - counts
    rank_in_label = torch.arange(len(rows)) - first_of_label[labels[rows]]
    held_out = rank_in_label < quotas[labels[rows]]
    return rows[~held_out].sort().values, rows[held_out].sort().values


def _picked(rows: Tensor, share: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
    return [rows[part] for part in share()]


def _ids(dataset: Dataset, name: str) -> Tensor:
    if name not in dataset.train:
        raise DataError(f"no training column {name!r} to partition by; columns: {', '.join(dataset.train)}")
    return dataset.train[name]
