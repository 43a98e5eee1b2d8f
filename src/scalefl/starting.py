"""Start a run in the middle of a model, from the tensor at a cut; and prove that this gives the same numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scalefl.caches import remembered
from scalefl.disk_cache import kept
from scalefl.models.skeleton import Skeleton, tensors
from scalefl.models.spec import ModelSpec
from scalefl.models.stand_ins import StandIns, Template, floating
from scalefl.partition import Entry
from scalefl.problem import Batch, Problem
from scalefl.rng import seeded
from scalefl.tracing import PROBE_EXAMPLES, fingerprint, random_batch

NUM_EXAMPLES = PROBE_EXAMPLES + 1
"""Of the proof: another number than the probe's, so that a stand-in of a fixed size shows."""


@contextlib.contextmanager
def skipping(
    module: nn.Module,
    entry: Entry,
    given: list[Tensor],
    *,
    after: Sequence[nn.Module] | None = None,
    stand_ins: StandIns | None = None,
) -> Iterator[None]:
    """Inside the block, modules before `entry` return stand-ins, and the one at the cut the tensor in `given`.

    The tensor is taken out of the list: nothing here keeps it longer than the model itself does. Modules that run on
    both sides of the cut are in eval mode until it is reached: what they make of stand-ins draws no dropout and enters
    no statistics.

    Args:
        module: the model.
        entry: where its run starts.
        given: the tensor at the cut.
        after: what `running_after` gives, where the caller has it.
        stand_ins: makes what modules before the entry return, for as many examples as `given` has.
    """
    stand_in_for = StandIns(len(given[0]), given[0].device) if stand_ins is None else stand_ins
    around = [child for child in (running_after(module, entry) if after is None else after) if child.training]

    def before_cut(template: Template) -> Any:
        return lambda *_args, **_kwargs: stand_in_for(template)

    def at_cut(template: Template) -> Any:
        def forward(*_args: Any, **_kwargs: Any) -> Any:
            _set_training(around, training=True)
            return stand_in_for(template, entry.cut.position, given.pop())

        return forward

    _set_training(around, training=False)
    with contextlib.ExitStack() as undo:
        undo.callback(_set_training, around, training=True)
        for path, template in entry.skipped:
            stand_in = (at_cut if path == entry.cut.module else before_cut)(template)
            undo.enter_context(_doing(module.get_submodule(path), stand_in))
        yield


def running_after(module: nn.Module, entry: Entry) -> list[nn.Module]:
    """The modules that run where a run starts at `entry`."""
    return [child for path, child in module.named_modules() if not entry.covers(path)]


@contextlib.contextmanager
def _doing(child: nn.Module, forward: Any) -> Iterator[None]:
    """Inside the block, a module runs `forward` in place of its own."""
    # Not by a hook: there are modules that go another way where they see one.
    before = vars(child).get("forward")
    vars(child)["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del vars(child)["forward"]
        else:
            vars(child)["forward"] = before


def _set_training(modules: Sequence[nn.Module], *, training: bool) -> None:
    for module in modules:
        vars(module)["training"] = training  # past torch's own __setattr__, as this is done for each stretch of a step


class Proof(NamedTuple):
    """What was found out about entries.

    Attributes:
        entries: those from which a run ends in the same logits, bit for bit, as one from the input; None for others.
        same_in_training: for each, whether what comes before it gives the same in train mode as in eval mode.
    """

    entries: tuple[Entry | None, ...]
    same_in_training: tuple[bool, ...]


@remembered(64)
def proven(model: ModelSpec, problem: Problem, entries: tuple[Entry | None, ...]) -> Proof:
    """Which entries give the numbers of a run from the input.

    Tried for real, on random examples and initial weights, in eval and in train mode: something besides the one
    tensor may pass a cut without a gradient (a mask that a skipped module computes), the modules after it may write
    into the tensor, or read a tensor that a skipped module holds. Nor may the modules before it couple examples.
    Last to first: a run that comes to the same tensor at a proven entry ends in the same logits.
    """
    cuts = tuple(None if entry is None else entry.cut for entry in entries)
    holds, same = kept(fingerprint(model, problem), ("proof", problem, cuts), lambda: _proven(model, problem, entries))
    return Proof(tuple(e if held else None for e, held in zip(entries, holds, strict=True)), tuple(same))


def _proven(model: ModelSpec, problem: Problem, entries: tuple[Entry | None, ...]) -> tuple[list[bool], list[bool]]:
    """For each entry whether it holds, and whether what comes before it gives the same in train mode."""
    found = list(entries)
    try:
        module = model.build(0)
        batch = random_batch(problem, NUM_EXAMPLES)
        fewer = _whole_run(module.eval(), {n: column[:-1] for n, column in batch.items()}, problem, entries)
        in_modes = []
        for training in (False, True):
            module.train(training)
            whole = _whole_run(module, batch, problem, entries)
            in_modes.append(whole)
            following: int | None = None
            for i, entry in reversed(list(enumerate(found))):
                reached = entry is not None and i in whole.kept
                alone = training or (reached and i in fewer.kept and _alone(fewer.kept[i], whole.kept[i]))
                if reached and alone and _alike(module, batch, problem, entries, i, following, whole):
                    following = i
                else:
                    found[i] = None
    except Exception:  # a model that only runs on real data: it then runs from the input
        return [False] * len(entries), [False] * len(entries)
    evaluated, trained = (whole.kept for whole in in_modes)
    same = [i in evaluated and _same(evaluated[i], trained[i]) for i in range(len(entries))]
    return [entry is not None for entry in found], same


class _Kept(NamedTuple):
    """The tensor at a cut, and torch's generator when it was there."""

    given: Tensor
    rng_state: Tensor


class _Whole(NamedTuple):
    """A run from the input: its logits, and what was kept at each entry."""

    end: _Kept
    kept: dict[int, _Kept]


def _whole_run(module: nn.Module, batch: Batch, problem: Problem, entries: tuple[Entry | None, ...]) -> _Whole:
    kept: dict[int, _Kept] = {}

    def keep(number: int, position: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            kept[number] = _Kept(floating(output)[position].contiguous().clone(), torch.get_rng_state())

        return hook

    with contextlib.ExitStack() as hooks, seeded(0), torch.no_grad():
        for number, entry in enumerate(entries):
            if entry is not None:
                child = module.get_submodule(entry.cut.module)
                hooks.callback(child.register_forward_hook(keep(number, entry.cut.position)).remove)
        return _Whole(_run_to(module, batch, problem, None), kept)


def _alone(fewer: _Kept, more: _Kept) -> bool:
    """Whether the features of an example are its own: a prefix may then run on few at a time, up to rounding."""
    same = more.given[: len(fewer.given)]
    return bool((fewer.given - same).nan_to_num().norm() <= 0.01 * same.nan_to_num().norm())


class _Came(Exception):  # control flow, not an error
    """The run is at the tensor that it is judged by."""

    def __init__(self, kept: _Kept) -> None:
        super().__init__()
        self.kept = kept


def _alike(
    module: nn.Module,
    batch: Batch,
    problem: Problem,
    entries: tuple[Entry | None, ...],
    number: int,
    following: int | None,
    whole: _Whole,
) -> bool:
    """Whether a run from an entry comes to the same tensor at the following one; None: to the same logits."""
    entry = entries[number]
    assert entry is not None
    given, rng_state = whole.kept[number]
    if not entry.blank.batched or given.shape != (NUM_EXAMPLES, *entry.blank.shape):
        return False  # features are kept and cut into pieces by example
    expected = whole.end if following is None else whole.kept[following]
    version = given._version
    skeleton = Skeleton(module)
    skipped = {n: t.to("meta") for n, t in tensors(module).items() if entry.covers(n.rpartition(".")[0])}
    try:
        for wrong in (False, True):
            stand_ins = StandIns(NUM_EXAMPLES, given.device, wrong=wrong)
            with seeded(0), torch.no_grad(), skipping(module, entry, [given], stand_ins=stand_ins):
                torch.set_rng_state(rng_state)
                skeleton.lay(skipped if wrong else {})
                came = _run_to(module, batch, problem, None if following is None else entries[following])
            if given._version != version or not _same(came, expected):
                return False
    except Exception:  # whatever a user's forward makes of stand-ins
        return False
    finally:
        skeleton.clear()
    return True


def _run_to(module: nn.Module, batch: Batch, problem: Problem, end: Entry | None) -> _Kept:
    """What a run comes to at an entry, or at the logits."""
    if end is None:
        return _Kept(_logits(module, batch, problem), torch.get_rng_state())
    child, position = module.get_submodule(end.cut.module), end.cut.position
    forward = child.forward

    def stopping(*args: Any, **kwargs: Any) -> None:
        raise _Came(_Kept(floating(forward(*args, **kwargs))[position], torch.get_rng_state()))

    try:
        with _doing(child, stopping):
            _logits(module, batch, problem)
    except _Came as came:
        return came.kept
    raise AssertionError("the run went past its end")


def _same(one: _Kept, other: _Kept) -> bool:
    """Whether two runs have come to the same: dropout that follows is then drawn alike, too."""
    alike = torch.equal(one.given.nan_to_num(), other.given.nan_to_num())
    return alike and torch.equal(one.rng_state, other.rng_state)


def _logits(module: nn.Module, batch: Batch, problem: Problem) -> Tensor:
    args, kwargs = problem.inputs(batch)
    return problem.output(module(*args, **kwargs))
