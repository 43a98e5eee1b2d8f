"""What torch does not tell of operators: their FLOPs, memory that fake tensors lack, and whose cost is unknown."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_RNN = torch.ops.aten.mkldnn_rnn_layer.default
_RNN_BACKWARD = torch.ops.aten.mkldnn_rnn_layer_backward.default
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_COUNTED_HERE = (_RNN, _RNN_BACKWARD, _ATTENTION, _ATTENTION_BACKWARD)
_GATES = 4  # of an LSTM, the only kind that goes this way

_DEAR = re.compile(
    r"fft|linalg_(?!vector_norm)|cdist|ctc_loss|grid_sampl|rnn|lstm|\bgru|conv(?!ert)|attention|cholesky|svd|\b_?eig|(?<!re)solve|sparse"
)
"""Operators of torch that multiply matrices or more, so that one without a known cost is missed in a sum of FLOPs."""


def workspace(func: Any, args: tuple[Any, ...], outputs: Any) -> int | None:
    """Bytes of the workspace that an operator hands on to its backward pass, of which fake tensors know nothing.

    oneDNN's LSTM layer on [L, B, I] with H units keeps, for each step, its gates twice and seven states, in rows of
    padded length. Found by trying: within 2 % from 1 MiB on, and a few pages off below.
    """
    if func is not _RNN or outputs[3].numel() != 0 or not args[-1]:
        return None
    (length, batch, _), hidden = args[0].shape, args[10]
    rows = 2 * length * _padded(_GATES * hidden) + 7 * (length + 1) * _padded(hidden)
    return int(4 * batch * rows)


def _padded(numbers: int) -> int:
    """The length of a row of floats: a whole number of cache lines, but no multiple of 1 KiB."""
    padded = -(-numbers // 16) * 16
    return padded + 16 if padded % 256 == 0 else padded


def flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int | None:
    """Floating-point operations; None where they are not counted: of cheap operators, and of `unknown` ones."""
    if func in (_RNN, _RNN_BACKWARD):
        (length, batch, inputs), hidden = args[0].shape, args[2].shape[1]
        forward = 2 * length * batch * _GATES * hidden * (inputs + hidden)
        return int(forward if func is _RNN else 2 * forward)
    if func in (_ATTENTION, _ATTENTION_BACKWARD):  # torch counts the same on a GPU, and not this one
        shapes = [t.shape for t in args[: 3 if func is _ATTENTION else 4]]
        count: Any = sdpa_flop_count if func is _ATTENTION else sdpa_backward_flop_count
        return int(count(*shapes))
    formula = flop_registry.get(getattr(func, "_overloadpacket", None))
    return None if formula is None else int(formula(*args, **kwargs, out_val=result))


@cache
def is_unknown(func: Any) -> bool:
    """Whether an operator may cost much, and nothing says how much."""
    if func in _COUNTED_HERE or getattr(func, "_overloadpacket", None) in flop_registry:
        return False
    namespace, _, name = func.name().partition("::")
    return namespace not in ("aten", "prim", "prims") or _DEAR.search(name) is not None
