"""The names that this package takes from torch's private modules: all of them, and here only."""

import contextlib
import logging
from collections.abc import Iterator

from torch import Tensor
from torch._C import _are_functorch_transforms_active, _dispatch_key_parse, _dispatch_keys, _functorch
from torch._C import _DisableTorchDispatch as without_modes
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "TorchDispatchMode",
    "inside_checkpoint",
    "is_transformed",
    "quiet_fakes",
    "without_modes",
    "without_vmap_loops",
]


_BATCHED = _dispatch_key_parse("Batched")
"""Of the vmap before torch.func's, by which autograd still takes several gradients at once."""


def is_transformed(tensor: Tensor) -> bool:
    """Whether a tensor may be more than its numbers: one for many, as under vmap, or in forward-mode autograd."""
    runs = bool(_are_functorch_transforms_active()) or forward_ad._current_level >= 0
    return runs or _dispatch_keys(tensor).has(_BATCHED)


def inside_checkpoint() -> bool:
    """Whether what autograd saves goes through somebody's hooks, as inside of `torch.utils.checkpoint`."""
    return _top_saved_tensors_default_hooks(True) is not None


@contextlib.contextmanager
def quiet_fakes() -> Iterator[None]:
    """Keep fake tensors from logging a traceback for an error that the caller handles."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextlib.contextmanager
def without_vmap_loops() -> Iterator[None]:
    """Have vmap raise a RuntimeError where it would call an operation for each row in turn."""
    before = _functorch._is_vmap_fallback_enabled()  # type: ignore[attr-defined]
    _functorch._set_vmap_fallback_enabled(False)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        _functorch._set_vmap_fallback_enabled(before)  # type: ignore[attr-defined]
