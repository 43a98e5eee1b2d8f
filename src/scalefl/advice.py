"""Names that people bring from elsewhere, and what they are called here: for the end of messages."""

from __future__ import annotations

from collections.abc import Mapping

SGD = (
    "clients train by SGD with momentum (work.lr, work.momentum, work.weight_decay); others there are on the server "
    'alone: method.server.kind = "average", "fedavgm" or "fedadam"'
)
_NO_CORRECTION = "clients keep no control variates here, nor does a method correct their drift but by work.prox"

KEYS: Mapping[str, str] = {
    "optimizer": SGD,
    "optim": SGD,
    "server_optimizer": 'it is method.server, as server = { kind = "fedadam" }',
    "learning_rate": "it is work.lr",
    "client_lr": "it is work.lr",
    "server_lr": "it is method.server.lr, of another server.kind than average",
    "local_epochs": "it is work.epochs",
    "local_steps": "clients count epochs: work.epochs",
    "mu": "it is work.prox",
    "prox_mu": "it is work.prox",
    "proximal_mu": "it is work.prox",
    "scheduler": "it is work.lr_schedule",
    "num_rounds": "it is rounds",
    "num_clients": "it is data.clients",
    "clients": "it is data.clients; clients_per_round are those of a cohort",
    "fraction": "it is clients_per_round, a number of clients",
    "fraction_fit": "it is clients_per_round, a number of clients",
    "participation": "it is clients_per_round, a number of clients",
    "dataset": 'it is data.source, as source = { name = "cifar10" }',
    "alpha": 'it is data.partition, as partition = { kind = "dirichlet", alpha = 0.3 }',
    "gpu": 'it is engine.device = "cuda"',
    "use_cuda": 'it is engine.device = "cuda"',
    "num_workers": "it is engine.workers",
    "save_dir": "it is --runs on the command line, and name in the config",
    "output_dir": "it is --runs on the command line, and name in the config",
}
"""Keys of settings, whatever table they stand in."""

TABLES: Mapping[str, tuple[str, ...]] = {
    "work": ("epochs", "batch_size", "lr", "momentum", "weight_decay", "lr_schedule", "clip_norm", "prox"),
    "engine": ("workers", "threads", "cap", "device", "clients_at_once", "patience", "precision"),
    "evaluation": ("every", "plane_every", "plane_cuts", "plane_samples"),
    "data": ("source", "partition", "validation"),
    "devices": ("classes",),
    "method": ("means", "server", "blocks"),
}
"""Keys that are looked for in other tables than their own."""

_SERVER = 'it is a setting of most methods: method = {{ name = "fedavg", server = {{ kind = "{kind}" }} }}'
_NO_SERVER = 'server optimizers here are method.server.kind = "average", "fedavgm" and "fedadam"'

METHODS: Mapping[str, str] = {
    "fedprox": 'it is a setting of all methods, work.prox = μ, for instance with method.name = "fedavg"',
    "fedadam": _SERVER.format(kind="fedadam"),
    "fedavgm": _SERVER.format(kind="fedavgm"),
    "fedopt": _SERVER.format(kind="fedadam"),
    "fedyogi": f"it is not there; {_NO_SERVER}",
    "fedadagrad": f"it is not there; {_NO_SERVER}",
    "fedsgd": 'it is method.name = "fedavg" with work.epochs = 1 and a work.batch_size above what any client holds',
    "scaffold": f"it is not there; {_NO_CORRECTION}",
    "feddyn": 'it is not there but as a setting of "depthfl"',
    "fednova": f"it is not there; {_NO_CORRECTION}",
    "mime": f"it is not there; {_NO_CORRECTION}",
    "moon": "it is not there",
    "ditto": "it is not there: all clients get one model",
    "pfedme": "it is not there: all clients get one model",
    "fedrep": "it is not there: all clients get one model",
    "fedper": "it is not there: all clients get one model",
    "fedbn": "it is not there: all clients get one model",
    "splitfed": "it is not there: no client sends activations",
    "federateddropout": 'it is method = { name = "fedrolex", window = "random" }',
    "feddropout": 'it is method = { name = "fedrolex", window = "random" }',
    "dpfedavg": 'it is method.name = "fedavg" with a table [privacy] (docs/privacy.md)',
    "dpsgd": "it is not there; [privacy] protects clients, not single examples (docs/privacy.md)",
    "progfed": 'it is not there; "slt" and "profl" train block after block',
}
"""Methods, by their names in small letters without signs."""


def of_key(key: str) -> str:
    """What a key is called here, or in which table it stands, for the end of a message; "" for others."""
    if key in KEYS:
        return f": {KEYS[key]}"
    found = [f"{table}.{key}" for table, keys in TABLES.items() if key in keys]
    return f": did you mean {found[0]!r}?" if found else ""


def of_method(name: str) -> str:
    """What a well-known method is here, for the end of a message; "" for other names."""
    found = METHODS.get("".join(filter(str.isalnum, name.lower())))
    return f": {found}" if found else ""
