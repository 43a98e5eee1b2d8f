"""What a forward pass does beside returning an output, found out by running it: what it writes, and what it couples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from scalefl.caches import remembered
from scalefl.disk_cache import kept
from scalefl.errors import ConfigError, ScaleFLError
from scalefl.models.skeleton import tensors
from scalefl.models.spec import ModelSpec
from scalefl.problem import Batch, Problem
from scalefl.rng import seeded
from scalefl.tracing import fingerprint, random_batch

NUM_EXAMPLES = 4
"""Of a batch with which a model is tried."""


@dataclass(frozen=True)
class Effects:
    """What forward passes of a model were seen to do.

    Args:
        written_in_training: names of the tensors of the model whose values changed in train mode: running statistics,
            vectors of a spectral norm, codebooks, counters.
        touched: names of all tensors that a forward pass writes, in either mode, be it what was there before.
        vocabularies: columns of the data that are looked up in embeddings, and the rows of the smallest for each.
        writes_inputs: whether it writes into the tensors that it is given.
        couples: whether the output for an example depends on the other examples of its batch, in train mode.
    """

    written_in_training: frozenset[str] = frozenset()
    touched: frozenset[str] = frozenset()
    vocabularies: tuple[tuple[str, int], ...] = ()
    writes_inputs: bool = False
    couples: bool = False


@remembered(64)
def effects(model: ModelSpec, problem: Problem) -> Effects:
    """Run a model for real, in both modes, on random examples and its initial weights, and compare before and after.

    Values are compared beside versions, since writes through `.data` leave no other trace.

    Raises:
        ConfigError: the model holds a sparse tensor, or changes its weights when it is set to train or eval mode.
    """

    def make() -> Any:
        found = _effects(model, problem)
        return None if found is None else msgspec.to_builtins(found, order="deterministic")

    found = kept(fingerprint(model, problem), ("effects", problem), make)
    return Effects() if found is None else msgspec.convert(found, Effects)


def _effects(model: ModelSpec, problem: Problem) -> Effects | None:
    try:
        module = model.build(0)
    except (ConfigError, MemoryError):  # too large for this machine, or it says so itself where it is to train
        return None
    _check_modes(module)
    try:
        return _seen(module, random_batch(problem, NUM_EXAMPLES), problem)
    except ScaleFLError:
        raise
    except Exception:  # a model that runs on real data only
        return Effects()


def _seen(module: nn.Module, batch: Batch, problem: Problem) -> Effects:
    module.train()
    before, versions = _copies(module), _versions(module)
    looked_up = _LookedUp()
    with looked_up:
        output, writes = _run(module, batch, problem, looked_up)
    _run(module, batch, problem)
    written = _changed(module, before)
    touched = written | _touched(module, versions)
    _put_back(module, before)
    other = {name: torch.cat([column[:-1], column[:1]]) for name, column in batch.items()}
    alone, _ = _run(module, other, problem)
    _put_back(module, before)
    first = slice(None, -1)
    couples = not _same(output[first], alone[first])
    module.eval()
    versions = _versions(module)
    _run(module, batch, problem)
    touched |= _changed(module, before) | _touched(module, versions)
    return Effects(written, touched, tuple(sorted(looked_up.found.items())), writes, couples)


def _run(module: nn.Module, batch: Batch, problem: Problem, looked_up: _LookedUp | None = None) -> tuple[Tensor, bool]:
    """The output, and whether the tensors that the model was given have changed."""
    copies = {name: column.clone() for name, column in batch.items()}
    args, kwargs = problem.inputs(copies)
    if looked_up is not None:
        looked_up.columns = copies
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    before = [t.clone() for t in given]
    with seeded(0), torch.no_grad():
        output = problem.output(module(*args, **kwargs)).clone()
    return output, not all(map(_same, given, before))


class _LookedUp(TorchFunctionMode):
    """Notes which columns of a batch are looked up in embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.columns: Batch = {}
        self.found: dict[str, int] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (F.embedding, F.embedding_bag, torch.embedding, torch.embedding_bag):
            first, second = [*args, *(kwargs or {}).values()][:2]
            indices, weight = (second, first) if first.is_floating_point() else (first, second)
            for name, column in self.columns.items():
                if column.untyped_storage().data_ptr() == indices.untyped_storage().data_ptr():
                    self.found[name] = min(len(weight), self.found.get(name, len(weight)))
        return func(*args, **(kwargs or {}))


def _copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in tensors(module).items()}


def _changed(module: nn.Module, before: Mapping[str, Tensor]) -> frozenset[str]:
    """Names of the tensors whose values have changed.

    Raises:
        ConfigError: one has changed its shape or its dtype.
    """
    now = tensors(module)
    for name, tensor in now.items():
        was = before[name]
        if (tensor.shape, tensor.dtype) != (was.shape, was.dtype):
            raise ConfigError(
                f"forward makes {name} from {was.dtype} {list(was.shape)} to {tensor.dtype} {list(tensor.shape)}: what "
                "clients average keeps its shape. Give it its final shape in the factory"
            )
    return frozenset(name for name, tensor in now.items() if not _same(tensor, before[name]))


def _versions(module: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: (id(t), t._version) for name, t in _every(module)}


def _touched(module: nn.Module, before: Mapping[str, tuple[int, int]]) -> frozenset[str]:
    return frozenset(name for name, version in _versions(module).items() if version != before[name])


def _every(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _put_back(module: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Give the model its first values again, so that what it does next does not depend on what it has done."""
    for name, tensor in tensors(module).items():
        tensor.copy_(before[name])


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) or (
        torch.equal(one.isnan(), other.isnan()) and torch.equal(_filled(one), _filled(other))
    )


def _filled(tensor: Tensor) -> Tensor:
    return torch.where(tensor.isnan(), 0, tensor)


def _check_modes(module: nn.Module) -> None:
    """Refuse a model whose `train()` or `eval()` changes what it holds: parts of it are put into modes one by one.

    Raises:
        ConfigError: names the tensor.
    """
    before = _copies(module)
    for mode in (False, True, False, True):
        module.train(mode)
        if changed := _changed(module, before) if before.keys() == tensors(module).keys() else _names(module, before):
            raise ConfigError(
                f"the model's {'train' if mode else 'eval'}() changes {min(changed)} (are adapters merged there?): "
                "clients hold parts of a model in different modes. Switch that off for training"
            )


def _names(module: nn.Module, before: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(before.keys() ^ tensors(module).keys())
