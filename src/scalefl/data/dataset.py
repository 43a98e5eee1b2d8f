"""A data set, and the same data as clients hold it.

Shapes: N rows, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from scalefl.data.partitioners import Natural, Partitioner, largest_remainder, partition
from scalefl.errors import ConfigError, DataError
from scalefl.problem import Batch, Problem, num_rows, take
from scalefl.rng import generator


@dataclass(frozen=True)
class Dataset:
    """Rows to train on and rows to test on; images are uint8 [N, C, H, W], labels int64 [N].

    Raises:
        DataError: no training rows, columns of unequal length, or labels outside 0..K-1.
    """

    problem: Problem
    train: Batch
    test: Batch

    def __post_init__(self) -> None:
        for split, batch in (("training", self.train), ("test", self.test)):
            lengths = {name: len(column) for name, column in batch.items()}
            if len(set(lengths.values())) > 1:
                raise DataError(f"the {split} columns differ in length: {lengths}")
            if num_rows(batch):
                _check_labels(self.problem.labels(batch), self.problem.num_classes, split)
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
        clients: for each client the indices of its training rows.
        validation: indices of the training rows that the server keeps for validation.
    """

    def __init__(self, dataset: Dataset, clients: Sequence[Tensor], validation: Tensor) -> None:
        self.problem = dataset.problem
        self.test = dataset.test
        self.validation: Batch = take(dataset.train, validation)
        self._train = dataset.train
        self._labels = dataset.problem.labels(dataset.train)
        # One tensor for all clients: a million small ones would cost more than the indices in them.
        self._rows = torch.cat(list(clients))
        self._ends = torch.tensor([0, *map(len, clients)]).cumsum(0)

    @classmethod
    def from_dataset(
        cls,
        dataset: Dataset,
        partitioner: Partitioner,
        num_clients: int,
        *,
        groups: Sequence[int],
        validation_fraction: float = 0.0,
        seed: int,
    ) -> PartitionedData:
        """Hold out validation rows, stratified by label, then share the other training rows out.

        Args:
            dataset: its test rows are left alone.
            partitioner: how rows are shared.
            num_clients: size of the population.
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
            dataset, natural_ids = _ids_taken_out(dataset, partitioner.column)
        labels = dataset.problem.labels(dataset.train)
        kept, held_out = stratified_split(labels, validation_fraction, generator(seed, "validation"))
        parts = partition(
            partitioner,
            labels[kept],
            num_clients,
            groups=groups,
            natural_ids=None if natural_ids is None else natural_ids[kept],
            seed=seed,
        )
        return cls(dataset, [kept[part] for part in parts], held_out)

    @property
    def num_clients(self) -> int:
        """Size of the population."""
        return len(self._ends) - 1

    def indices(self, client: int) -> Tensor:
        """Where a client's rows are among the training rows: int64, not copied."""
        if not 0 <= client < self.num_clients:
            raise IndexError(f"client {client} of {self.num_clients}")
        return self._rows[self._ends[client] : self._ends[client + 1]]

    def num_examples(self, client: int) -> int:
        """Training rows of a client; may be 0."""
        return len(self.indices(client))

    def label_counts(self, client: int) -> Tensor:
        """Training rows of a client for each class: [K], int64."""
        return torch.bincount(self._labels[self.indices(client)], minlength=self.problem.num_classes)

    def examples(self, client: int) -> Batch:
        """All training rows of a client."""
        return take(self._train, self.indices(client))


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


def _check_labels(labels: Tensor, num_classes: int, split: str) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise DataError(f"{split} labels run from {low} to {high}: expected 0 to {num_classes - 1}")


def _ids_taken_out(dataset: Dataset, name: str) -> tuple[Dataset, Tensor]:
    """The column `name`, and the data set without it unless the problem reads it: clients need no ids."""
    if name not in dataset.train:
        raise DataError(f"no training column {name!r} to partition by; columns: {', '.join(dataset.train)}")
    read = {*dataset.problem.example(1)}
    train = {key: column for key, column in dataset.train.items() if key != name or key in read}
    return Dataset(dataset.problem, train, dataset.test), dataset.train[name]
