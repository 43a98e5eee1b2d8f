"""Who the clients are: worked out when asked in a simulation, or as they say themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from scalefl.data.dataset import FederatedData
from scalefl.data.devices import Devices, ResolvedClass
from scalefl.types import ClientInfo, Population


class SimulatedPopulation:
    """Clients 0 … N−1 of a data set on devices of given classes; nothing is stored for each client.

    Args:
        data: tells how many examples a client holds.
        devices: the device classes.
        full_training_bytes: the peak of full training, of which budgets may be fractions.
        seed: decides which client has which device.
    """

    def __init__(self, data: FederatedData, devices: Devices, full_training_bytes: int, seed: int) -> None:
        self._data, self._devices, self._seed = data, devices, seed
        self.classes = devices.resolve(full_training_bytes)

    @property
    def smallest_memory_bytes(self) -> int:
        """The least that any class has."""
        return min(member.memory_bytes for member in self.classes)

    @property
    def largest_memory_bytes(self) -> int:
        """The most that any class has."""
        return max(member.memory_bytes for member in self.classes)

    def __len__(self) -> int:
        return self._data.num_clients

    def __getitem__(self, index: int) -> ClientInfo:
        device = self.device(index)
        return ClientInfo(
            id=index,
            num_examples=self._data.num_examples(index),
            memory_bytes=device.memory_bytes,
            device=device.name,
            flops_per_second=device.flops_per_second,
            bandwidth_bytes_per_second=device.bandwidth_bytes_per_second,
            classes=tuple(self._data.label_counts(index).nonzero().flatten().tolist()),
        )

    def device(self, index: int) -> ResolvedClass:
        """A client's device class."""
        return self.classes[self._devices.class_of(index, self._seed)]


@dataclass(frozen=True)
class PopulationView:
    """A population whose clients are seen otherwise than they are.

    Args:
        clients: as they are.
        see: what is made of each.
        smallest_memory_bytes, largest_memory_bytes: then.
    """

    clients: Population
    see: Callable[[ClientInfo], ClientInfo]
    smallest_memory_bytes: int
    largest_memory_bytes: int

    def __len__(self) -> int:
        return len(self.clients)

    def __getitem__(self, index: int) -> ClientInfo:
        return self.see(self.clients[index])


@dataclass(frozen=True)
class DeclaredPopulation:
    """Clients that have said themselves what they hold and what they offer; one at least."""

    clients: tuple[ClientInfo, ...]

    @property
    def classes(self) -> tuple[ResolvedClass, ...]:
        """A class for each device name and budget."""
        kinds = sorted({(client.memory_bytes, client.device) for client in self.clients})
        sizes = sorted({memory_bytes for memory_bytes, _ in kinds})
        alike = [[c for c in self.clients if (c.memory_bytes, c.device) == kind] for kind in kinds]
        return tuple(
            ResolvedClass(
                device,
                len(members) / len(self.clients),
                memory_bytes,
                members[0].flops_per_second,
                members[0].bandwidth_bytes_per_second,
                sizes.index(memory_bytes),
            )
            for (memory_bytes, device), members in zip(kinds, alike, strict=True)
        )

    @property
    def smallest_memory_bytes(self) -> int:
        """The least that any client offers."""
        return min(client.memory_bytes for client in self.clients)

    @property
    def largest_memory_bytes(self) -> int:
        """The most that any client offers."""
        return max(client.memory_bytes for client in self.clients)

    def __len__(self) -> int:
        return len(self.clients)

    def __getitem__(self, index: int) -> ClientInfo:
        return self.clients[index]
