"""Hold a part of a model and run it: the frozen prefix, the span that trains, and the output module after it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scalefl.errors import ConfigError, FrozenTensorWritten
from scalefl.models.output import OutputModule, OutputSpec, empty_output
from scalefl.models.pooling import speed_up
from scalefl.models.skeleton import Skeleton, tensors
from scalefl.models.spec import ModelSpec
from scalefl.models.stand_ins import Blank, StandIns, floating
from scalefl.norm_statistics import collecting
from scalefl.params import Params
from scalefl.partition import Cut, Entry
from scalefl.problem import Batch, Problem
from scalefl.rng import RngState, rng_state, set_rng_state
from scalefl.starting import running_after, skipping


@dataclass(frozen=True)
class Stretch:
    """A run from one cut to the next, on its own.

    Args:
        entry: where it starts; None at the model's input.
        stop: where it ends.
        held: names of the model's own tensors that it needs.
    """

    entry: Entry | None
    stop: Cut
    held: tuple[str, ...]


class Exit(NamedTuple):
    """A classifier on the way.

    Attributes:
        cut: where it reads.
        output: what it is made of.
        copies: whether it reads a copy, as a later module writes into the tensor.
    """

    cut: Cut
    output: OutputSpec
    copies: bool = False


@dataclass(frozen=True)
class Part:
    """As much of a model as a step runs; it says all that a client needs to know.

    Args:
        model: the model that it is a part of.
        stop: the cut where the run ends; None runs the whole model.
        output: the output module after the cut; None where the model's own head runs.
        feature: the cut whose tensor is z: `stop`, or the last feature before the model's head.
        source, source_blank: the module whose output stands for the input (token models), and what that looks like.
        active: paths of the modules that run in train mode; all others are in eval mode.
        start: the cut where the frozen prefix ends; None where there is none.
        straddling: modules that run on both sides of `start` (a shared dropout, the model itself): in eval mode
            before it and in train mode after it.
        couples: whether what trains couples the examples of a batch otherwise than by norms with statistics: norms
            without them see the batch in any mode.
        held: names of the model's own tensors that the run needs.
        written: names of the tensors that forward passes of the model write: they are copied where they don't move.
        copies_inputs: whether the model writes into what it is given, and so is given copies.
        prefix: the frozen prefix in stretches that can run one by one; none where it must run with the rest.
        entry: where what trains can start from the prefix's features: `start`, or before co-adapted layers.
        own: names of the model's own tensors that a run from `entry` needs.
        inner: cuts inside what trains at which a run can start.
        needed: names of the model's own tensors that each stretch between those cuts needs: one more than there are
            cuts.
        exits: classifiers before the end, in order of execution; a run that starts or stops on the way has none.
        channels_last: whether images lie so in memory, from the first convolutions on, where no later one has few
            channels.
    """

    model: ModelSpec
    stop: Cut | None
    output: OutputSpec | None
    feature: Cut | None
    source: str | None
    active: tuple[str, ...]
    held: tuple[str, ...]
    source_blank: Blank | None = None
    start: Cut | None = None
    straddling: tuple[str, ...] = ()
    couples: bool = False
    written: tuple[str, ...] = ()
    copies_inputs: bool = False
    prefix: tuple[Stretch, ...] = ()
    entry: Entry | None = None
    own: tuple[str, ...] = ()
    inner: tuple[Entry, ...] = ()
    needed: tuple[tuple[str, ...], ...] = ()
    exits: tuple[Exit, ...] = ()
    channels_last: bool = False

    @property
    def outputs(self) -> tuple[OutputSpec, ...]:
        """What is beside the model's own modules: the exits', and the output module."""
        return (*(e.output for e in self.exits), *(() if self.output is None else (self.output,)))

    def output_names(self) -> list[str]:
        """The tensors of those."""
        return [name for output in self.outputs for name in output.names()]

    def names(self) -> list[str]:
        """Every tensor that the run needs, output modules' included."""
        return [*self.held, *self.output_names()]


@dataclass(frozen=True)
class Taps:
    """What a run shows to an objective; B examples.

    Args:
        logits: [B, K]; of another shape where the problem's labels are.
        x: the input features [B, ...], without a gradient; None where nothing that comes in is a number, and no
            module's output stands for it.
        z: the feature at the part's cut [B, ...].
        late: the features after the output module's light layers [B, ...]; z where there is none.
        projected: the projection head's output [B, d]; z where there is none.
        exits: what the exits before the end say, each [B, K].
    """

    logits: Tensor
    x: Tensor | None
    z: Tensor
    late: Tensor
    projected: Tensor
    exits: tuple[Tensor, ...] = ()


class Features(NamedTuple):
    """What the frozen prefix leaves for a batch: its last tensor [B, ...], and x where that is a module's output."""

    z: Tensor
    x: Tensor | None


class _Reached(Exception):  # control flow, not an error
    """The end of the run: the modules after it never run."""


class Resident:
    """The one copy of a model that a worker keeps: a skeleton on which parts are laid in turn."""

    def __init__(self, model: ModelSpec) -> None:
        self._module = model.skeleton()
        speed_up(self._module)
        self._skeleton = Skeleton(self._module)
        self._outputs: dict[OutputSpec, tuple[OutputModule, Skeleton]] = {}

    def empty(self, part: Part) -> dict[str, Tensor]:
        """The tensors that `part` needs, on the meta device: their shapes and dtypes."""
        own = tensors(self._module)
        params = {name: own[name] for name in part.held}
        for spec in part.outputs:
            module, _ = self._output(spec)
            params |= {spec.prefix + name: t for name, t in tensors(module).items()}
        return params

    @contextlib.contextmanager
    def holding(
        self,
        part: Part,
        params: Params,
        trainable: frozenset[str] = frozenset(),
        moving: frozenset[str] = frozenset(),
        *,
        without_prefix: bool = False,
        passing: tuple[frozenset[str], ...] = (),
        frozen_statistics: bool = False,
    ) -> Iterator[tuple[PartRunner, dict[str, nn.Parameter]]]:
        """Lay `params` on the skeleton for the block's length; yield what runs them and what trains.

        Parameters and `moving` buffers are laid on without a copy, so those that training changes must be the
        caller's own. `without_prefix` lays what a run from `part.entry` needs, and no more. Tensors that are
        `passing`, by the stretches between `part.inner`, are laid while their stretch runs, and asked of `params` each
        time. With `frozen_statistics`, norms that train normalise by their running statistics and leave them.
        """
        names = frozenset(part.own if without_prefix else part.held).difference(*passing)
        with contextlib.ExitStack() as undo:
            undo.callback(self._skeleton.clear)
            trained = self._skeleton.lay({n: params[n] for n in sorted(names)}, trainable, moving, part.written)
            outputs = {}
            for spec in part.outputs:
                outputs[spec], skeleton = self._output(spec)
                undo.callback(skeleton.clear)
                inner = {name.removeprefix(spec.prefix): params[name] for name in spec.names()}
                laid = skeleton.lay(inner, frozenset(n.removeprefix(spec.prefix) for n in trainable))
                trained |= {spec.prefix + name: p for name, p in laid.items()}
            if frozen_statistics:
                part = _without_statistics(part, self._module)
            _set_modes(self._module, part.active)
            for first in first_convolutions(self._module) if part.channels_last else ():
                undo.callback(first.register_forward_hook(_turn).remove)
            runner = PartRunner(self._module, self._skeleton, part, outputs, params, moving - trainable, passing)
            unmoved = _Unmoved(self._skeleton, part, names - moving - trainable, params)
            yield runner, trained
            runner.take_in()
            unmoved.check()

    def changeable(self, part: Part) -> frozenset[str]:
        """The model's buffers that a run of `part` may write into: those of modules in train mode."""
        active = {*part.active, *part.straddling}
        buffers = {name for name, _ in self._module.named_buffers()}
        return frozenset(name for name in buffers.intersection(part.held) if name.rpartition(".")[0] in active)

    def exchange(self, part: Part, values: Params) -> None:
        """Put values in the place of tensors that are laid, as they are: those of many clients in a vectorised run."""
        outputs = set[str]()
        for spec in part.outputs:
            outputs.update(spec.names())
            _, skeleton = self._output(spec)
            skeleton.exchange({n.removeprefix(spec.prefix): values[n] for n in spec.names() if n in values})
        self._skeleton.exchange({name: t for name, t in values.items() if name not in outputs})

    @contextlib.contextmanager
    def marking(self, cuts: Sequence[Cut], mark: Callable[[tuple[str, int]], None]) -> Iterator[None]:
        """Inside the block, call `mark` where a run passes each cut, and where its gradient comes back to it."""

        def passing(number: int, cut: Cut) -> Any:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                mark(("forward", number))
                z = floating(output)[cut.position]
                if z.requires_grad:
                    z.register_hook(lambda _: mark(("backward", number)))  # type: ignore[no-untyped-call]

            return hook

        with contextlib.ExitStack() as hooks:
            for number, cut in enumerate(cuts):
                module = self._module.get_submodule(cut.module)
                hooks.callback(module.register_forward_hook(passing(number, cut)).remove)
            yield

    def _output(self, spec: OutputSpec) -> tuple[OutputModule, Skeleton]:
        if spec not in self._outputs:
            module = empty_output(spec)
            self._outputs[spec] = (module, Skeleton(module))
        return self._outputs[spec]


class PartRunner:
    """Runs a part that is laid out; made by `Resident.holding`."""

    def __init__(
        self,
        module: nn.Module,
        skeleton: Skeleton,
        part: Part,
        outputs: Mapping[OutputSpec, OutputModule],
        params: Params,
        statistics: frozenset[str],
        passing: tuple[frozenset[str], ...],
    ) -> None:
        self._module, self._skeleton, self._part, self._outputs = module, skeleton, part, outputs
        self._params, self._passing = params, passing
        self._statistics = {name: skeleton.laid(name) for name in sorted(statistics)}
        self._seen: dict[str, Tensor] = {}
        self._exits: list[Tensor] = []
        self._again: list[_Rerun] = []
        self._after: dict[int, list[nn.Module]] = {}
        self._stand_ins: dict[tuple[int, torch.device], StandIns] = {}

    def __call__(
        self,
        batch: Batch,
        problem: Problem,
        features: Callable[[], Features] | None = None,
        *,
        recompute: bool = False,
    ) -> Taps:
        """Run the part on a batch.

        Args:
            batch: the examples.
            problem: gives the model's arguments.
            features: gives what the frozen prefix leaves for them; the run then starts at `part.entry`. Called here,
                so that no caller holds the tensor for longer than the model does.
            recompute: keep no activations of the units before the last: once a loss has gone backward,
                `complete_backward` runs them again, one by one.
        """
        came = problem.inputs(batch)
        args, kwargs = self._copied(*came)
        self._seen.clear()
        self._exits.clear()
        self._again.clear()
        mask = problem.mask(batch)
        entry, given, x = None, list[Tensor](), None
        if features is not None:
            entry = self._part.entry
            z, x = features()
            given.append(_turned(z) if self._part.channels_last else z)
            del z
        if self._passing or (recompute and torch.is_grad_enabled()):
            entry, given = self._run_bare(args, kwargs, entry, given)
        with self._leaving(mask), self._laid(len(self._part.inner)):
            raw = self._run(args, kwargs, entry, given, self._part.stop)
        self._stand_ins.clear()
        x = self._x(*came) if x is None else x
        exits = tuple(self._exits)
        self._exits.clear()
        if self._part.output is not None:
            z = self._seen.pop("z")
            output = self._outputs[self._part.output](z, mask)
            return Taps(output.logits, x, z, output.features, output.projected, exits)
        logits = problem.output(raw)
        z = self._seen.pop("z", logits)
        return Taps(logits, x, z, z, z, exits)

    @property
    def outputs(self) -> list[OutputModule]:
        """The output module and those of exits."""
        return list(self._outputs.values())

    def complete_backward(self) -> None:
        """Take the gradient through the units that kept nothing, last to first. Norms do not count them twice."""
        if not self._again:
            return
        after = rng_state()
        with self.keep_statistics():
            while self._again:
                again = self._again.pop()
                with self._laid(again.stretch):
                    again.backward(self._run)
        self._stand_ins.clear()
        set_rng_state(after)

    @contextlib.contextmanager
    def keep_statistics(self) -> Iterator[None]:
        """Inside the block, runs leave what norms and other modules note as it was."""
        self.take_in()
        held = list(self._statistics.values())
        before = [t.clone() for t in held]
        yield
        self.take_in()
        if held:  # data: autograd need not know, what saw the statistics has done with them
            torch._foreach_copy_([t.data for t in held], before)

    def exchange(self, values: Params) -> None:
        """Take values in the place of tensors that move without being trained for those tensors: see `Resident`."""
        self._statistics = {name: values[name] for name in self._statistics if name in values}

    def take_in(self) -> None:
        """Take what a forward pass has put in the place of a tensor that moves into that tensor."""
        for name, tensor in self._statistics.items():
            found = self._skeleton.laid(name)
            if found is not tensor:
                if found.shape != tensor.shape:
                    raise ConfigError(
                        f"the model puts a tensor of shape {list(found.shape)} in the place of {name}, which has "
                        f"{list(tensor.shape)}: what clients average keeps its shape"
                    )
                with torch.no_grad():
                    tensor.copy_(found.detach())
                self._skeleton.exchange({name: tensor})

    def collecting(self) -> contextlib.AbstractContextManager[None]:
        """Inside the block, norms in train mode collect their statistics anew; see `norm_statistics`."""
        return collecting(self._module)

    def prefix_features(self, batch: Batch, problem: Problem) -> Features:
        """What the frozen prefix, laid out with the rest, gives for a batch."""
        assert self._part.entry is not None
        args, kwargs = self._copied(*problem.inputs(batch))
        return self._frozen(args, kwargs, None, [], self._part.entry.cut)

    def streamed_features(self, batch: Batch, problem: Problem) -> Features:
        """The same, with the tensors of one stretch of the prefix held at a time."""
        args, kwargs = self._copied(*problem.inputs(batch))
        given: list[Tensor] = []
        x = None
        for stretch in self._part.prefix:
            with self._laying(name for name in stretch.held if name not in self._part.own):
                found = self._frozen(args, kwargs, stretch.entry, given, stretch.stop)
            given, x = [found.z], found.x if x is None else x
            del found
        self._stand_ins.clear()
        return Features(given.pop(), x)

    def features(self, batch: Batch, problem: Problem, cuts: tuple[Cut, ...]) -> tuple[Tensor | None, list[Tensor]]:
        """The input features (see `Taps.x`) and the tensor at each of `cuts`, in one run without a gradient."""
        found: dict[Cut, Tensor] = {}
        with contextlib.ExitStack() as hooks:
            for cut in cuts:
                hooks.callback(self._watch(cut.module, _keep(found, cut)).remove)
            taps = self(batch, problem)
        return taps.x, [found[cut] for cut in cuts]

    def _frozen(self, args: Any, kwargs: Any, entry: Entry | None, given: list[Tensor], stop: Cut) -> Features:
        self._seen.clear()
        with torch.no_grad():
            self._run(args, kwargs, entry, given, stop)
        return Features(self._seen.pop("z"), self._seen.pop("x", None))

    def _run_bare(
        self, args: Any, kwargs: Any, entry: Entry | None, given: list[Tensor]
    ) -> tuple[Entry | None, list[Tensor]]:
        """Run all stretches but the last without a graph; if there is to be one, note how to run each again."""
        for stretch, inner in enumerate(self._part.inner):
            state = rng_state()
            with torch.no_grad(), self._laid(stretch):
                self._run(args, kwargs, entry, list(given), inner.cut)
            following = self._seen.pop("z")
            if torch.is_grad_enabled():
                following.requires_grad_()
                again = _Rerun(stretch, args, kwargs, entry, given, inner.cut, following, state, self._seen)
                self._again.append(again)
            entry, given = inner, [following]
        return entry, given

    def _laid(self, stretch: int) -> contextlib.AbstractContextManager[None]:
        """Inside the block, the tensors are there that come and go with a stretch of what trains."""
        return self._laying(sorted(self._passing[stretch]) if self._passing else ())

    @contextlib.contextmanager
    def _laying(self, names: Iterable[str]) -> Iterator[None]:
        names = tuple(names)
        self._skeleton.lay({name: self._params[name] for name in names})
        try:
            yield
        finally:
            self._skeleton.clear(names)

    def _run(self, args: Any, kwargs: Any, entry: Entry | None, given: list[Tensor], stop: Cut | None) -> Any:
        """Run the model from an entry to a cut, noting taps; return what the model returns if it comes to its end.

        The tensor at the entry is taken out of `given`.
        """
        part = self._part
        with contextlib.ExitStack() as undo:
            if part.source is not None and not (entry and entry.covers(part.source)):
                undo.callback(self._watch(part.source, self._note_source).remove)
            if part.straddling and part.start is not None:
                # What runs around a stand-in before the entry belongs to the prefix.
                self._set_straddling(training=False)
                turn = entry.cut if entry is not None and entry.covers(part.start.module) else part.start
                undo.callback(self._watch(turn.module, self._note_start).remove)
            if entry is not None:
                undo.enter_context(self._skipping(entry, given))
            end = stop or part.feature
            if end is not None:
                undo.callback(self._watch(end.module, self._noting(end, ends=stop is not None)).remove)
            with contextlib.suppress(_Reached):
                return self._module(*args, **kwargs)
        return None

    def _skipping(self, entry: Entry, given: list[Tensor]) -> contextlib.AbstractContextManager[None]:
        if id(entry) not in self._after:  # of this part, which is held here
            self._after[id(entry)] = running_after(self._module, entry)
        count, device = len(given[0]), given[0].device
        stand_ins = self._stand_ins.setdefault((count, device), StandIns(count, device))
        return skipping(self._module, entry, given, after=self._after[id(entry)], stand_ins=stand_ins)

    @contextlib.contextmanager
    def _leaving(self, mask: Tensor | None) -> Iterator[None]:
        """Inside the block, each exit has its say as a run comes by."""

        def leave(each: Exit) -> Any:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                z = floating(output)[each.cut.position]
                self._exits.append(self._outputs[each.output](z.clone() if each.copies else z, mask).logits)

            return hook

        with contextlib.ExitStack() as hooks:
            for each in self._part.exits:
                hooks.callback(self._watch(each.cut.module, leave(each)).remove)
            yield

    def _watch(self, path: str, hook: Any) -> Any:
        return self._module.get_submodule(path).register_forward_hook(hook)

    def _note_source(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._seen["x"] = floating(output)[0].detach()

    def _note_start(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self._set_straddling(training=True)

    def _set_straddling(self, *, training: bool) -> None:
        for path in self._part.straddling:
            self._module.get_submodule(path).training = training

    def _noting(self, cut: Cut, *, ends: bool) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            self._seen["z"] = floating(output)[cut.position]
            if ends:
                raise _Reached

        return hook

    def _copied(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model is given: copies, where it writes into that."""
        if not self._part.copies_inputs:
            return args, kwargs
        return tuple(map(_copied, args)), {name: _copied(value) for name, value in kwargs.items()}

    def _x(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        if "x" in self._seen:
            return self._seen["x"]
        return next(iter(floating([*args, *kwargs.values()])), None)


class _Rerun(NamedTuple):
    """A stretch that ran without a graph: what it started from, and the leaf that holds its end's gradient."""

    stretch: int
    args: Any
    kwargs: Any
    entry: Entry | None
    given: list[Tensor]
    stop: Cut
    end: Tensor
    rng_state: RngState
    seen: dict[str, Tensor]

    def backward(self, run: Any) -> None:
        """Run it again with a graph, from the random state that it had, and take the gradient through it."""
        set_rng_state(self.rng_state)
        run(self.args, self.kwargs, self.entry, self.given, self.stop)
        gradient, self.end.grad = self.end.grad, None
        end = self.seen.pop("z")
        if gradient is not None and end.requires_grad:
            # The gradient of this product is `gradient`. Handing that to backward() would load torch's compiler.
            end.flatten().dot(gradient.flatten()).backward()  # type: ignore[no-untyped-call]


class _Unmoved:
    """Holds against a model that it left alone what does not move, as far as its trial run has shown that it does.

    Frozen parameters share their memory with others, and what is written into buffers is dropped.
    """

    def __init__(self, skeleton: Skeleton, part: Part, names: frozenset[str], params: Params) -> None:
        self._skeleton, self._params = skeleton, params
        self._active = {*part.active, *part.straddling}
        self._laid = {name: skeleton.laid(name) for name in sorted(names.difference(part.written))}
        self._versions = {name: t._version for name, t in self._laid.items()}

    def check(self) -> None:
        """Raise if one was written.

        Raises:
            FrozenTensorWritten: a parameter, of which others may have a part.
            ConfigError: a buffer of a module in train mode, whose new value nobody gets.
        """
        for name, tensor in self._laid.items():
            now = self._skeleton.laid(name)
            if now is tensor and tensor._version == self._versions[name]:
                continue
            if isinstance(tensor, nn.Parameter):
                raise FrozenTensorWritten(
                    f"forward writes into {name}, which is frozen; it did not on random examples before the run, so "
                    "that nobody was given a copy. Write into a buffer, and in each forward pass"
                )
            if name.rpartition(".")[0] in self._active and not torch.equal(now, self._params[name]):
                raise ConfigError(
                    f"forward writes into {name} while it trains; it did not on random examples before the run, so "
                    "that the server does not ask for it. Write into it in each forward pass"
                )


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _keep(found: dict[Cut, Tensor], cut: Cut) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        found[cut] = floating(output)[cut.position].detach().clone()  # a later module may write in place

    return hook


FEW_CHANNELS = 8
"""Convolutions of fewer channels do not train on channels_last inputs.

With 2 or 3, torch 2.13 on CPUs (oneDNN, AVX2) corrupts memory in their backward pass: "double free or corruption".
"""


def first_convolutions(module: nn.Module) -> list[nn.Conv2d]:
    """The convolutions of images, behind which channels may come last; none where others have few channels too."""
    convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    narrow = [m for m in convolutions if m.in_channels < FEW_CHANNELS]
    return narrow if all(m.out_channels >= FEW_CHANNELS for m in convolutions) else []


def _turn(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return _turned(output)


def _turned(x: Tensor) -> Tensor:
    """Images [B, C, H, W] with the channels last in memory; other tensors as they are."""
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _set_modes(module: nn.Module, active: tuple[str, ...]) -> None:
    module.eval()
    for path in active:
        module.get_submodule(path).training = True


def _without_statistics(part: Part, module: nn.Module) -> Part:
    """The part with its norms in eval mode, where they have running statistics."""

    def others(paths: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(p for p in paths if not getattr(module.get_submodule(p), "track_running_stats", False))

    return replace(part, active=others(part.active), straddling=others(part.straddling))
