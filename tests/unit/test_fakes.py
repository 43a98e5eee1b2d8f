"""Remembered results are those that torch gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models import built_in, case
from scalefl import memory
from scalefl.costs import _canonical, _traced
from scalefl.fakes import UNKNOWN, RememberingFakes
from scalefl.memory import WHOLE, Ledger, Profile
from scalefl.mentor import Mentor, MentorLoss
from scalefl.steps import full_step
from scalefl.torch_private import FakeTensorMode
from scalefl.types import LocalWork


class ForgetfulFakes(RememberingFakes):
    """Asks torch each time."""

    def recall(self, *_: Any) -> Any:
        return UNKNOWN


def profile_of(name: str, monkeypatch: pytest.MonkeyPatch, fakes: type[RememberingFakes]) -> Profile:
    c = built_in(name) if name in ("resnet10", "squeezenet", "vit") else case(name)
    step = _canonical(full_step(c.model, c.problem, LocalWork(batch_size=8)))
    monkeypatch.setattr(memory, "RememberingFakes", fakes)
    run = _traced(step, c.problem, MentorLoss(Mentor(), 1.0, 1.0))
    found = memory.profile(lambda ledger: run(ledger), WHOLE)
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["resnet10", "squeezenet", "vit", "hf_bert", "hf_gpt2"])
def test_a_profile_is_the_same_from_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = profile_of(name, monkeypatch, ForgetfulFakes)
    for _ in range(2):  # what is not known yet, then all
        remembered = profile_of(name, monkeypatch, RememberingFakes)
        for field in ("moments", "waiting", "flops"):
            assert np.array_equal(getattr(remembered, field), getattr(asked, field)), field


OPERATIONS: dict[str, Callable[[Tensor], Any]] = {
    "new": lambda x: x + 1,
    "new, permuted": lambda x: x.permute(1, 0, 2).clone(memory_format=torch.preserve_format),
    "several": lambda x: x.max(dim=1),
    "none": lambda x: torch._foreach_add_([x, x[0]], 1.0),
    "in place": lambda x: x.mul_(2),
    "view": lambda x: x[1:, 2].transpose(0, 1),
    "view of a view": lambda x: x.view(-1)[3:9].view(2, 3),
    "views": lambda x: torch.split(x, 1),
    "made": lambda _: torch.full((3, 4), 2.0),
    "of a type": lambda x: x.to(torch.bfloat16),
    "not a tensor": lambda x: x.numel(),
    "convolution": lambda x: F.conv1d(x, x, padding=1),
    "batch norm": lambda x: F.batch_norm(x, None, None, training=True),
    "into another": lambda x: torch.add(x, 1, out=torch.empty_like(x)),
    "resized": lambda x: x.clone().resize_(len(x) + 1, 2),
    "with a gradient": lambda x: torch.autograd.grad((x.requires_grad_() ** 2).sum(), x),
}


def seen(value: Any) -> Any:
    """All that can be seen of a value."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.storage_offset(), value.dtype, value.device, value.requires_grad
    return [seen(item) for item in value] if isinstance(value, tuple | list) else value


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_gives_what_it_gave(name: str) -> None:
    operation = OPERATIONS[name]
    with FakeTensorMode():
        expected = [seen(operation(torch.zeros(n, 5, 3))) for n in (5, 6, 5)]
    for _ in range(2):
        with (fakes := RememberingFakes()), Ledger(WHOLE, fakes):
            assert [seen(operation(torch.zeros(n, 5, 3))) for n in (5, 6, 5)] == expected


def test_storages_are_as_they_would_be() -> None:
    for _ in range(2):
        with (fakes := RememberingFakes()), Ledger(WHOLE, fakes):
            x = torch.zeros(4, 6)
            other, view, same = x + 1, x.view(6, 4), x.add_(1)
            assert same is x
            assert view.untyped_storage()._cdata == x.untyped_storage()._cdata
            assert other.untyped_storage()._cdata != x.untyped_storage()._cdata
            assert other.untyped_storage().nbytes() == x.untyped_storage().nbytes() == 96


def test_what_is_written_into_another_is_that_other() -> None:
    for _ in range(2):
        with (fakes := RememberingFakes()), Ledger(WHOLE, fakes):
            x, other = torch.zeros(4, 6), torch.zeros(4, 6)
            assert torch.add(x, 1, out=other) is other
            assert torch.broadcast_tensors(x, other)[1].untyped_storage()._cdata == other.untyped_storage()._cdata


def test_a_number_that_is_known_stays_known() -> None:
    """Constants keep their value under fake tensors; nothing is remembered of them."""
    for value in (1.0, 2.0):
        with (fakes := RememberingFakes()), Ledger(WHOLE, fakes):
            assert (torch.tensor(value) + 1).item() == value + 1


def test_the_default_type_counts() -> None:
    found = []
    for dtype in (torch.float32, torch.float64, torch.float32):
        torch.set_default_dtype(dtype)
        try:
            with (fakes := RememberingFakes()), Ledger(WHOLE, fakes):
                found.append((torch.zeros(2, dtype=torch.int64) / 2).dtype)
        finally:
            torch.set_default_dtype(torch.float32)
    assert found == [torch.float32, torch.float64, torch.float32]
