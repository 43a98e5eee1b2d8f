"""Hold a part of a model and run it: the frozen prefix, the span that trains, and the output module after it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from scalefl.models.output import OutputModule, OutputSpec, empty_output
from scalefl.models.skeleton import Skeleton, tensors
from scalefl.models.spec import ModelSpec
from scalefl.params import Params, is_attachment
from scalefl.partition import Cut
from scalefl.problem import Batch, Problem
from scalefl.tracing import floating


@dataclass(frozen=True)
class Part:
    """As much of a model as a step runs; it says all that a client needs to know.

    Args:
        model: the model that it is a part of.
        stop: the cut where the run ends; None runs the whole model.
        output: the output module after the cut; None where the model's own head runs.
        feature: the cut whose tensor is z: `stop`, or the last feature before the model's head.
        source: the module whose output stands for the input (token models).
        active: paths of the modules that run in train mode; all others are in eval mode.
        start: the cut where the frozen prefix ends; None where there is none.
        straddling: modules that run on both sides of `start` (a shared dropout, the model itself): in eval mode
            before it and in train mode after it.
        held: names of the model's own tensors that the run needs.
    """

    model: ModelSpec
    stop: Cut | None
    output: OutputSpec | None
    feature: Cut | None
    source: str | None
    active: tuple[str, ...]
    held: tuple[str, ...]
    start: Cut | None = None
    straddling: tuple[str, ...] = ()

    def names(self) -> list[str]:
        """Every tensor that the run needs, the output module's included."""
        return [*self.held, *(() if self.output is None else self.output.names())]


@dataclass(frozen=True)
class Taps:
    """What a run shows to an objective; B examples.

    Args:
        logits: [B, K].
        x: the input features [B, ...], without a gradient.
        z: the feature at the part's cut [B, ...].
        late: the features after the output module's light layers [B, ...]; z where there is none.
        projected: the projection head's output [B, d]; z where there is none.
    """

    logits: Tensor
    x: Tensor
    z: Tensor
    late: Tensor
    projected: Tensor


class _Reached(Exception):  # control flow, not an error
    """The end of the span: the modules after it never run."""


class Resident:
    """The one copy of a model that a worker keeps: a skeleton on which parts are laid in turn."""

    def __init__(self, model: ModelSpec) -> None:
        self._module = model.skeleton()
        self._skeleton = Skeleton(self._module)
        self._outputs: dict[OutputSpec, tuple[OutputModule, Skeleton]] = {}

    def empty(self, part: Part) -> dict[str, Tensor]:
        """The tensors that `part` needs, on the meta device: their shapes and dtypes."""
        own = tensors(self._module)
        params = {name: own[name] for name in part.held}
        if part.output is not None:
            module, _ = self._output(part.output)
            params |= {part.output.prefix + name: t for name, t in tensors(module).items()}
        return params

    @contextlib.contextmanager
    def holding(
        self,
        part: Part,
        params: Params,
        trainable: frozenset[str] = frozenset(),
        moving: frozenset[str] = frozenset(),
    ) -> Iterator[tuple[PartRunner, dict[str, nn.Parameter]]]:
        """Lay `params` on the skeleton for the block's length; yield what runs them and what trains.

        Parameters and `moving` buffers are laid on without a copy, so those that training changes must be the
        caller's own.
        """
        with contextlib.ExitStack() as undo:
            undo.callback(self._skeleton.clear)
            own = {name: t for name, t in params.items() if not is_attachment(name)}
            trained = self._skeleton.lay(own, trainable, moving)
            output = None
            if part.output is not None:
                output, skeleton = self._output(part.output)
                undo.callback(skeleton.clear)
                prefix = part.output.prefix
                inner = {n.removeprefix(prefix): t for n, t in params.items() if n.startswith(prefix)}
                laid = skeleton.lay(inner, frozenset(n.removeprefix(prefix) for n in trainable))
                trained |= {prefix + name: p for name, p in laid.items()}
            _set_modes(self._module, part.active)
            runner = PartRunner(self._module, part, output)
            undo.enter_context(runner.watching())
            yield runner, trained

    def _output(self, spec: OutputSpec) -> tuple[OutputModule, Skeleton]:
        if spec not in self._outputs:
            module = empty_output(spec)
            self._outputs[spec] = (module, Skeleton(module))
        return self._outputs[spec]


class PartRunner:
    """Runs a part that is laid out; made by `Resident.holding`."""

    def __init__(self, module: nn.Module, part: Part, output: OutputModule | None) -> None:
        self._module, self._part, self._output = module, part, output
        self._seen: dict[str, Tensor] = {}

    def __call__(self, batch: Batch, problem: Problem) -> Taps:
        """Run the part on a batch."""
        args, kwargs = problem.inputs(batch)
        self._seen.clear()
        self._set_straddling(training=False)
        raw: Any = None
        with contextlib.suppress(_Reached):
            raw = self._module(*args, **kwargs)
        if self._output is not None:
            z = self._seen["z"]
            output = self._output(z, problem.mask(batch))
            return Taps(output.logits, self._x(args, kwargs), z, output.features, output.projected)
        logits = problem.output(raw)
        z = self._seen.get("z", logits)
        return Taps(logits, self._x(args, kwargs), z, z, z)

    def features(self, batch: Batch, problem: Problem, cuts: tuple[Cut, ...]) -> tuple[Tensor, list[Tensor]]:
        """The input features and the tensor at each of `cuts`, in one run without a gradient."""
        found: dict[Cut, Tensor] = {}
        with contextlib.ExitStack() as hooks:
            for cut in cuts:
                hooks.callback(self._watch(cut.module, _keep(found, cut)).remove)
            taps = self(batch, problem)
        return taps.x, [found[cut] for cut in cuts]

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Keep the hooks that note taps and end the run in place."""
        handles = []
        if self._part.source is not None:
            handles.append(self._watch(self._part.source, self._note_source))
        if self._part.start is not None and self._part.straddling:
            handles.append(self._watch(self._part.start.module, self._note_start))
        if self._part.feature is not None:
            handles.append(self._watch(self._part.feature.module, self._note_feature))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, path: str, hook: Any) -> Any:
        return self._module.get_submodule(path).register_forward_hook(hook)

    def _note_source(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._seen["x"] = floating(output)[0].detach()

    def _note_start(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self._set_straddling(training=True)

    def _set_straddling(self, *, training: bool) -> None:
        for path in self._part.straddling:
            self._module.get_submodule(path).training = training

    def _note_feature(self, _module: nn.Module, _args: Any, output: Any) -> None:
        assert self._part.feature is not None
        self._seen["z"] = floating(output)[self._part.feature.position]
        if self._part.stop is not None:
            raise _Reached

    def _x(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if "x" in self._seen:
            return self._seen["x"]
        return floating([*args, *kwargs.values()])[0]


def _keep(found: dict[Cut, Tensor], cut: Cut) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        found[cut] = floating(output)[cut.position].detach().clone()  # a later module may write in place

    return hook


def _set_modes(module: nn.Module, active: tuple[str, ...]) -> None:
    module.eval()
    for path in active:
        module.get_submodule(path).training = True
