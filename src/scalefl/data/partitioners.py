"""How training rows are shared among clients.

`Iid`, `Dirichlet`, `Shards` and `Pathological` are Flower's partitioners, run on a table that has only row
numbers and labels. `Natural` groups rows by id, in a hundredth of the time that a table takes for each client.
`Capability` is our own: data that depends on how strong a device is.

Shapes: N rows, C clients, K labels.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scalefl.errors import ConfigError, DataError
from scalefl.rng import derive, seeded

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class _Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind", tag=str.lower):
    """Base of the partitioners; `kind` in a file names the class."""


class Iid(_Config, frozen=True):
    """Rows at random; client sizes differ by one at most."""


class Dirichlet(_Config, frozen=True):
    """Each label is divided among the clients by a draw from Dirichlet(alpha) (arXiv 1905.12022).

    Args:
        alpha: small values give clients few labels and unequal sizes.
        min_size: draw again, up to 10 times, until each client has this many rows.
    """

    alpha: float
    min_size: int = 0

    def __post_init__(self) -> None:
        _check_positive("alpha", self.alpha)
        if self.min_size < 0:
            raise ConfigError(f"min_size = {self.min_size}: expected 0 or more rows")


class Shards(_Config, frozen=True):
    """Rows sorted by label are cut into equal shards, dealt at random (arXiv 1602.05629).

    The last N mod (C × shards_per_client) rows in order of label are left out.
    """

    shards_per_client: int = 2

    def __post_init__(self) -> None:
        _check_positive("shards_per_client", self.shards_per_client)


class Pathological(_Config, frozen=True):
    """Each client gets rows of exactly this many labels; the first of them goes round in turn.

    With fewer clients than labels, labels that no client drew are left out.
    """

    classes_per_client: int = 2

    def __post_init__(self) -> None:
        _check_positive("classes_per_client", self.classes_per_client)


class Natural(_Config, frozen=True):
    """One client for each value of a column (a writer, a user).

    With fewer clients than values, a random choice of values; the rows of the others are left out.
    """

    column: str


class Capability(_Config, frozen=True):
    """Data that follows the device: weak devices hold labels that strong ones lack.

    The labels, in random order, are shared out among the device classes in proportion to their clients.
    A client aims at N/C rows with labels from
    `correlation × Dirichlet(alpha) over its class's labels + (1 - correlation) × Dirichlet(alpha) over all`;
    the aims are then fitted to the rows that exist, so that each row goes to exactly one client. Where
    both cannot be had, labels stay in their class and client sizes give way.

    Args:
        correlation: 0: device and data are independent; 1: no label is held by two device classes (if
            there are at least as many labels as classes).
        alpha: as for `Dirichlet`.
    """

    correlation: float
    alpha: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("alpha", self.alpha)
        if not 0 <= self.correlation <= 1:
            raise ConfigError(f"correlation = {self.correlation}: expected 0 to 1")


Partitioner = Iid | Dirichlet | Shards | Pathological | Natural | Capability


def partition(
    config: Partitioner,
    labels: Tensor,
    num_clients: int,
    *,
    groups: Sequence[int],
    natural_ids: Tensor | None = None,
    seed: int,
) -> list[Tensor]:
    """For each client the sorted indices of its rows, int64; may be empty.

    No row goes to two clients, and each goes to one, but for what `Shards`, `Pathological` and `Natural`
    say that they leave out.

    Args:
        config: how to share.
        labels: [N], int64.
        num_clients: C.
        groups: device class of each client, 0 = weakest; read by `Capability` only.
        natural_ids: [N], int64; read by `Natural` only.
        seed: equal seeds give equal partitions.

    Raises:
        ConfigError: the settings ask for what these rows cannot give.
        DataError: there are no rows, or no ids to partition by.
    """
    check_partition(config, len(labels), num_clients, natural_ids)
    if isinstance(config, Capability):
        return _by_capability(config, labels.numpy(), num_clients, groups, derive(seed, "partition"))
    if natural_ids is not None and isinstance(config, Natural):
        return _by_ids(natural_ids.numpy(), num_clients, derive(seed, "partition"))
    return _by_flower(config, labels.numpy(), num_clients, derive(seed, "partition"))


def check_partition(config: Partitioner, num_rows: int, num_clients: int, natural_ids: Tensor | None = None) -> None:
    """Refuse, before anything is shared out, what the numbers of rows and clients rule out; see `partition`."""
    _check_sizes(num_rows, num_clients)
    if isinstance(config, Natural):
        _check_ids(config, natural_ids, num_clients)
    if isinstance(config, Shards):
        _check_shards(config, num_rows, num_clients)


def largest_remainder(weights: npt.NDArray[Any], total: int) -> Ints:
    """Whole numbers that sum to `total`, in proportion to `weights` (≥ 0, not all 0) within one."""
    quotas: Floats = weights / weights.sum() * total
    shares: Ints = np.floor(quotas).astype(np.int64)
    by_remainder = np.argsort(shares - quotas, kind="stable")
    shares[by_remainder[: total - shares.sum()]] += 1
    return shares


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ConfigError(f"{name} = {value}: expected more than 0")


def _check_sizes(num_rows: int, num_clients: int) -> None:
    if not num_rows:
        raise DataError("there are no rows to share among clients")
    if num_clients < 1:
        raise ConfigError(f"num_clients = {num_clients}: expected 1 or more")
    if num_clients > num_rows:
        raise ConfigError(f"{num_clients} clients cannot share {num_rows} rows: use {num_rows} clients or fewer")


def _check_shards(config: Shards, num_rows: int, num_clients: int) -> None:
    num_shards = num_clients * config.shards_per_client
    if num_shards > num_rows:
        raise ConfigError(
            f"{num_clients} clients × {config.shards_per_client} shards > {num_rows} rows: use fewer clients or shards"
        )


def _check_ids(config: Natural, natural_ids: Tensor | None, num_clients: int) -> None:
    if natural_ids is None:
        raise DataError(f"the data set came without the column {config.column!r} to partition by")
    if natural_ids.ndim != 1 or natural_ids.is_floating_point():
        raise DataError(
            f"column {config.column!r} holds {natural_ids.dtype} {list(natural_ids.shape[1:])}: expected ids"
        )
    num_ids = len(np.unique(natural_ids.numpy()))
    if num_clients > num_ids:
        raise ConfigError(f"column {config.column!r} has {num_ids} values, too few for {num_clients} clients")


def _by_ids(ids: Ints, num_clients: int, seed: int) -> list[Tensor]:
    code_N, rows_C = np.unique(ids, return_inverse=True, return_counts=True)[1:]
    groups = np.split(np.argsort(code_N, kind="stable"), rows_C.cumsum()[:-1])
    chosen = np.random.default_rng(seed).permutation(len(groups))[:num_clients]
    return [torch.from_numpy(groups[group]) for group in chosen]


def _by_flower(config: Partitioner, by: Ints, num_clients: int, seed: int) -> list[Tensor]:
    # Flower's IID partitioner takes no seed: the order of rows is ours.
    rows = np.random.default_rng(seed).permutation(len(by)) if isinstance(config, Iid) else np.arange(len(by))
    # seeded: importing `datasets` and Flower draws from Python's global generator.
    with seeded(seed), _quiet():
        try:
            flower = _flower_partitioner(config, num_clients, seed)
            flower.dataset = _table(rows, by[rows])
            parts = [flower.load_partition(part)["row"][:] for part in range(num_clients)]
        except ValueError as error:
            raise ConfigError(f"{config} on {len(by)} rows and {num_clients} clients: {error}") from error
    return [torch.tensor(part, dtype=torch.int64).sort().values for part in parts]


def _table(rows: Ints, by: Ints) -> Any:
    import datasets  # here: with Flower, two seconds that only partitioning should cost

    return datasets.Dataset.from_dict({"row": rows, "by": by})


def _flower_partitioner(config: Partitioner, num_clients: int, seed: int) -> Any:
    from flwr_datasets import partitioner as flower

    match config:
        case Iid():
            return flower.IidPartitioner(num_clients)
        case Dirichlet(alpha=alpha, min_size=min_size):
            return flower.DirichletPartitioner(num_clients, "by", alpha, min_size, shuffle=False, seed=seed)
        case Shards(shards_per_client=count):
            return flower.ShardPartitioner(num_clients, "by", count, shuffle=False, seed=seed)
        case Pathological(classes_per_client=count):
            mode = "first-deterministic"
            return flower.PathologicalPartitioner(num_clients, "by", count, mode, shuffle=False, seed=seed)
    raise ConfigError(f"unknown partitioner {config!r}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Flower's progress bar, its advice on each failed draw, and pyarrow's deprecations under it."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _by_capability(
    config: Capability, labels: Ints, num_clients: int, groups: Sequence[int], seed: int
) -> list[Tensor]:
    if len(groups) != num_clients:
        raise ConfigError(f"{len(groups)} device classes were given for {num_clients} clients")
    generator = np.random.default_rng(seed)
    _, label_N, rows_K = np.unique(labels, return_inverse=True, return_counts=True)
    group_C = np.unique(np.asarray(groups), return_inverse=True)[1]
    own_GK = _labels_of_groups(np.bincount(group_C), generator.permutation(len(rows_K)))
    wanted_CK = _wanted_shares(config, own_GK[group_C], generator)
    counts_CK = _whole_rows(_fitted(wanted_CK, rows_K), rows_K)
    return _dealt(label_N, counts_CK, generator)


def _labels_of_groups(clients_G: Ints, labels_K: Ints) -> npt.NDArray[np.bool_]:
    """Which labels belong to which device class, [G, K]: contiguous runs of `labels_K`.

    With fewer labels than classes, neighbouring classes share one.
    """
    num_groups, num_labels = len(clients_G), len(labels_K)
    owns_GK = np.zeros((num_groups, num_labels), dtype=bool)
    if num_labels < num_groups:
        owns_GK[np.arange(num_groups), labels_K[np.arange(num_groups) * num_labels // num_groups]] = True
        return owns_GK
    # One label for each class first, as a class without any would have nothing of its own.
    sizes_G = 1 + largest_remainder(
        np.maximum(clients_G / clients_G.sum() * num_labels - 1, 1e-9), num_labels - num_groups
    )
    owns_GK[np.repeat(np.arange(num_groups), sizes_G), labels_K] = True
    return owns_GK


def _wanted_shares(config: Capability, own_CK: npt.NDArray[np.bool_], generator: np.random.Generator) -> Floats:
    """Each client's distribution of labels, [C, K]; rows sum to 1."""
    everything_CK = np.ones_like(own_CK)
    q_own, q_all = (_dirichlet(config.alpha, support, generator) for support in (own_CK, everything_CK))
    return config.correlation * q_own + (1 - config.correlation) * q_all


def _dirichlet(alpha: float, support_CK: npt.NDArray[np.bool_], generator: np.random.Generator) -> Floats:
    # In logarithms, as Gamma(alpha) = Gamma(alpha + 1) × U^(1/alpha) underflows for a small alpha; the floor
    # keeps every label placeable.
    shape = support_CK.shape
    gammas_CK = generator.standard_gamma(alpha + 1, shape)
    logs_CK = np.log(gammas_CK) - generator.standard_exponential(shape) / alpha
    logs_CK = np.where(support_CK, logs_CK, -np.inf)
    draws_CK = np.maximum(np.exp(logs_CK - logs_CK.max(1, keepdims=True)), 1e-12) * support_CK
    shares_CK: Floats = draws_CK / draws_CK.sum(1, keepdims=True)
    return shares_CK


def _fitted(wanted_CK: Floats, rows_K: Ints, iterations: int = 100) -> Floats:
    """Rows for each client and label, not yet whole, by iterative proportional fitting.

    Labels sum to `rows_K`, clients to N/C as nearly as the zeros of `wanted_CK` allow.
    """
    size = rows_K.sum() / len(wanted_CK)
    fitted_CK = wanted_CK
    for _ in range(iterations):
        fitted_CK = fitted_CK * (size / fitted_CK.sum(1, keepdims=True))
        fitted_CK = fitted_CK * (rows_K / fitted_CK.sum(0))
    return fitted_CK


def _whole_rows(fitted_CK: Floats, rows_K: Ints) -> Ints:
    """Whole numbers near `fitted_CK` with the same column sums.

    What rounding one label takes from a client is carried to its next label, so that clients keep their
    sizes even where each expects less than one row of a label.
    """
    counts_CK = np.zeros(fitted_CK.shape, dtype=np.int64)
    owed_C = np.zeros(len(fitted_CK))
    for k, available in enumerate(rows_K):
        due_C = np.where(fitted_CK[:, k] > 0, np.maximum(fitted_CK[:, k] + owed_C, 0), 0)
        counts_CK[:, k] = largest_remainder(due_C, int(available))
        owed_C += fitted_CK[:, k] - counts_CK[:, k]
    return counts_CK


def _dealt(label_N: Ints, counts_CK: Ints, generator: np.random.Generator) -> list[Tensor]:
    owner_N = np.empty(len(label_N), dtype=np.int64)
    for k in range(counts_CK.shape[1]):
        rows = generator.permutation(np.flatnonzero(label_N == k))
        owner_N[rows] = np.repeat(np.arange(len(counts_CK)), counts_CK[:, k])
    by_owner = torch.from_numpy(np.argsort(owner_N, kind="stable"))
    return list(torch.split(by_owner, counts_CK.sum(1).tolist()))
