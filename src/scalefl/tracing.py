"""Watch a model run once: which modules ran when, the graph from the input to the logits, and writes in place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from scalefl.caches import remembered
from scalefl.errors import ConfigError, ModelDoesNotRun, ScaleFLError
from scalefl.fakes import RememberingFakes
from scalefl.fingerprints import Operations, code, structure
from scalefl.models.skeleton import check_kinds, lay_fakes
from scalefl.models.spec import ModelSpec
from scalefl.models.stand_ins import NoTemplate, Template, floating, template_of
from scalefl.problem import Batch, Problem
from scalefl.rng import drawn_by_python, generator, seeded
from scalefl.torch_private import inside_checkpoint, quiet_fakes

T = TypeVar("T")

PROBE_EXAMPLES = 5
"""Of the batch that is watched: a number that few other dimensions have."""

NUM_RUNS = 8
"""Of a model whose structure may depend on data or on random numbers, so many runs are compared."""

Node = Any  # a node of the autograd graph; torch has no public type for it


class Carried(NamedTuple):
    """An output of a module that carries the graph.

    Attributes:
        position: among the module's floating-point outputs.
        node: of the graph, and which of its results the output is.
        shape: of the output.
    """

    position: int
    node: Node
    result: int
    shape: tuple[int, ...]


@dataclass
class Call:
    """What the probe saw of one module: when it ran, the graph nodes of its output, and what stands in for it.

    `is_checkpointed` modules run again while gradients are taken, as the user's model recomputes them itself.
    """

    enter: int
    exit: int = -1
    times: int = 0
    outputs: list[Carried] = field(default_factory=list)
    template: Template = None
    has_template: bool = False
    is_checkpointed: bool = False


@dataclass
class Trace:
    """One watched run: the graph is read from `sink`, the node of the logits.

    Attributes:
        module: what ran.
        trainable: names of the parameters that the user lets train.
        train_mode: paths of the modules that train in train mode: those that `train()` leaves in it.
        calls: what was seen of each module.
        inputs: the leaves that the floating-point inputs were made of.
        sink: the node of the logits.
        output_shape: of the logits of one example.
        why_uncuttable: why no part of the model can be told from the others; None where it can.
        fingerprint: of what the model does, the same in every process; None where it does not run on fake tensors.
    """

    module: nn.Module
    trainable: frozenset[str]
    train_mode: frozenset[str]
    calls: dict[str, Call]
    inputs: list[Tensor]
    sink: Node
    output_shape: tuple[int, ...]
    why_uncuttable: str | None = None
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        self._names = {id(p): name for name, p in self.module.named_parameters()}

    def parameter(self, node: Node) -> str | None:
        """The parameter whose gradient `node` accumulates, if it does that."""
        return self._names.get(id(getattr(node, "variable", None)))


@remembered(64)
def output_shape(model: ModelSpec, problem: Problem) -> tuple[int, ...]:
    """The shape of the logits for one example: (K,) where each example has one label."""
    return traced(model, problem).output_shape


@remembered(64)
def fingerprint(model: ModelSpec, problem: Problem) -> str | None:
    """What tells a model from others in every process, whatever it is called; see `Trace`."""
    try:
        return traced(model, problem).fingerprint
    except ScaleFLError:
        return None


def traced(model: ModelSpec, problem: Problem) -> Trace:
    """Run a model on a tiny batch, on fake tensors where it can be, and note what happens.

    The graph is that of a run in eval mode; a run in train mode has to call the same modules.

    Raises:
        ModelDoesNotRun: it does not run, or its output does not depend on its input and parameters.
        ConfigError: it does not return what the problem can read, or trains nothing.
    """
    found = _traced_on_fakes(model, problem)
    return _for_real(model, lambda module: _probe(module, problem, None)) if found is None else found


@remembered(1)  # several ask for the same in turn; one for real is not kept, as it holds the model
def _traced_on_fakes(model: ModelSpec, problem: Problem) -> Trace | None:
    return _on_fakes(model, lambda module, fakes: _probe(module, problem, fakes))


@remembered(64)
def rewritten(model: ModelSpec, problem: Problem) -> frozenset[str]:
    """The modules into whose output a later one writes in place while the model trains.

    What is computed from such an output on the side needs a copy: autograd won't go back through what has changed.

    Raises:
        ModelDoesNotRun: the model does not run.
    """
    found = _on_fakes(model, lambda module, _: _rewritten(module, problem))
    return _for_real(model, lambda module: _rewritten(module, problem)) if found is None else found


def random_batch(problem: Problem, num_examples: int, seed: int = 0) -> Batch:
    """Random values in the shapes of real data; token ids, masks and labels are 0 or 1, and start with 1."""
    draw = generator(seed, "random batch")
    return {name: _random_like(column, draw) for name, column in problem.example(num_examples).items()}


def _random_like(column: Tensor, draw: torch.Generator) -> Tensor:
    if column.is_floating_point():
        return torch.randn(column.shape, generator=draw).to(column.dtype)
    if column.dtype == torch.uint8:
        return torch.randint(0, 256, column.shape, dtype=torch.uint8, generator=draw)
    values = torch.randint(0, 2, column.shape, generator=draw).to(column.dtype)
    if values.ndim > 1:
        values[:, 0] = 1
    return values


def _on_fakes(model: ModelSpec, watch: Callable[[nn.Module, RememberingFakes], T]) -> T | None:
    """What `watch` sees of a model on fake tensors, whose mode it is given; None where it does not run on them."""
    try:
        module = model.skeleton()
        check_kinds(module)
        with quiet_fakes(), RememberingFakes() as fakes:
            lay_fakes(module)
            return watch(module, fakes)
    except ScaleFLError:
        raise
    except Exception:  # control flow that depends on data, or an operator without a fake
        return None


def _for_real(model: ModelSpec, watch: Callable[[nn.Module], T]) -> T:
    """What `watch` sees of a model with its initial weights.

    Raises:
        ModelDoesNotRun: it fails.
    """
    module = model.build(0)
    check_kinds(module)
    try:
        return watch(module)
    except ScaleFLError:
        raise
    except Exception as error:
        raise ModelDoesNotRun(
            f"model {model.name} does not run on an example batch of the data: {type(error).__name__}: {error}"
        ) from error


class _DependsOnChance(Exception):  # control flow, not an error
    """Python's or NumPy's random numbers are drawn, which may decide what runs: fake tensors show one case only."""


def _probe(module: nn.Module, problem: Problem, fakes: RememberingFakes | None) -> Trace:
    trainable = frozenset(name for name, p in module.named_parameters() if p.requires_grad)
    if not trainable and next(module.parameters(), None) is not None:
        raise ConfigError("every parameter of the model is frozen (requires_grad = False): there is nothing to train")
    for p in module.parameters():
        if p.is_floating_point() or p.is_complex():
            p.requires_grad_()
    train_mode = frozenset(path for path, child in module.train().named_modules() if child.training)
    batches = [problem.example(PROBE_EXAMPLES)]
    if fakes is None:  # what runs may depend on the data: then it has to be the same for all
        batches += [random_batch(problem, PROBE_EXAMPLES, seed) for seed in range(NUM_RUNS)]
    operations = None if fakes is None else Operations(fakes)
    with operations or contextlib.nullcontext():
        trained = [_watched_run(module, batch, problem, seed) for seed, batch in enumerate(batches)]
        if operations and trained[0].draws:
            raise _DependsOnChance
        module.eval()
        run = _watched_run(module, batches[0], problem)
    why = _why_uncuttable(module, run, trained)
    found = Trace(module, trainable, train_mode, run.calls, run.inputs, run.sink, run.output_shape, why)
    if operations:
        calls = [(path, call.enter, call.exit, call.times) for path, call in run.calls.items()]
        written = code(_classes(module, run.sink))
        operations.note(structure(module), sorted(trainable), sorted(train_mode), calls, written)
        found.fingerprint = operations.digest.hexdigest()
    return found


def _classes(module: nn.Module, sink: Node) -> list[type]:
    """Those of a model's modules, and of its own differentiable functions."""
    modules = [type(child) for child in module.modules()]
    functions = [getattr(type(node), "_forward_cls", None) for node in _topological(sink)]
    return [*modules, *(kind for kind in functions if kind is not None)]


class _Run(NamedTuple):
    """What is seen of one run; see `Trace`. It `draws` if it takes random numbers from Python or NumPy."""

    calls: dict[str, Call]
    inputs: list[Tensor]
    sink: Node
    output_shape: tuple[int, ...]
    draws: bool


def _watched_run(module: nn.Module, batch: Batch, problem: Problem, seed: int = 0) -> _Run:
    """One run with a graph, in the mode in which the module is.

    Raises:
        ConfigError: the model does not return what the problem can read.
        ModelDoesNotRun: its output does not depend on its input and parameters.
    """
    args, kwargs = problem.inputs(batch)
    inputs: list[Tensor] = []
    when = "while training, " if module.training else ""

    def tracked(value: Any) -> Any:
        """A copy that carries the graph, and into which a model may write."""
        if not isinstance(value, Tensor):
            return value
        if not value.is_floating_point():
            return value.clone()
        inputs.append(value.detach().requires_grad_())
        return inputs[-1].clone()

    args, kwargs = tuple(map(tracked, args)), {name: tracked(value) for name, value in kwargs.items()}
    calls: dict[str, Call] = {}
    with _watched(module, calls), torch.enable_grad(), seeded(seed):
        before = drawn_by_python()
        try:
            logits = problem.output(module(*args, **kwargs))
        except ConfigError as error:
            raise ConfigError(f"{when}{error}") from error
        draws = drawn_by_python() != before
    if logits.grad_fn is None:
        raise ModelDoesNotRun(f"{when}the model's output does not depend on its input or parameters")
    return _Run(calls, inputs, logits.grad_fn, tuple(logits.shape[1:]), draws)


def _why_uncuttable(module: nn.Module, run: _Run, trained: Sequence[_Run]) -> str | None:
    """Why a run in eval mode does not tell what runs in training; None where it does."""
    names = {id(p): name for name, p in module.named_parameters()}

    def structure(one: _Run) -> dict[str, int]:
        """How often each module and each parameter is used."""
        used = {name: 1 for node in _topological(one.sink) if (name := names.get(id(getattr(node, "variable", None))))}
        return used | {path: call.times for path, call in one.calls.items()}

    def differing(one: dict[str, int], other: dict[str, int]) -> str:
        return min((name for name in {*one, *other} if one.get(name) != other.get(name)), default="")

    first, *others = map(structure, trained)
    for other in others:
        if name := differing(first, other):
            return f"whether {name!r} is used depends on the data or on chance"
    if name := differing(first, structure(run)):
        return f"{name!r} is used otherwise in training than in evaluation"
    return None


def _rewritten(module: nn.Module, problem: Problem) -> frozenset[str]:
    args, kwargs = problem.inputs(problem.example(PROBE_EXAMPLES))
    outputs: dict[str, list[tuple[Tensor, int]]] = {}

    def note(path: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            outputs[path] = [(t, t._version) for t in floating(output)]

        return hook

    with contextlib.ExitStack() as hooks, seeded(0), torch.no_grad():
        for path, child in module.named_modules():
            hooks.callback(child.register_forward_hook(note(path)).remove)
        module.train()(*args, **kwargs)
    return frozenset(path for path, found in outputs.items() if any(t._version != before for t, before in found))


@contextlib.contextmanager
def _watched(module: nn.Module, calls: dict[str, Call]) -> Iterator[None]:
    clock = iter(range(10**9))
    handles = []

    def enter(path: str) -> Any:
        def hook(_module: nn.Module, _args: Any) -> None:
            call = calls.setdefault(path, Call(next(clock)))
            call.times += 1
            call.is_checkpointed |= inside_checkpoint()

        return hook

    def leave(path: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            call = calls[path]
            call.exit = next(clock)
            call.outputs = [
                Carried(i, t.grad_fn, t.output_nr, tuple(t.shape)) for i, t in enumerate(floating(output)) if t.grad_fn
            ]
            with contextlib.suppress(NoTemplate):
                call.template, call.has_template = template_of(output, PROBE_EXAMPLES), True

        return hook

    for path, child in module.named_modules():
        if path:
            handles += [child.register_forward_pre_hook(enter(path)), child.register_forward_hook(leave(path))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Graph:
    """The autograd graph of a run, and the nodes on every path from the input to the logits.

    Attributes:
        nodes: all of them, inputs first.
        order: the place of each in `nodes`, by its id.
        has_checkpoint: whether a part of it is hidden in a checkpoint of the reentrant kind.
        source_module: the module whose output stands for the input (token models).
        dominators: places of the nodes on every path.
    """

    def __init__(self, trace: Trace) -> None:
        self.nodes = _topological(trace.sink)
        self.order = {id(node): i for i, node in enumerate(self.nodes)}
        self._used = {(id(n), result) for node in self.nodes for n, result in node.next_functions if n is not None}
        self._used.add((id(trace.sink), 0))
        self.has_checkpoint = any(type(node).__name__ == "CheckpointFunctionBackward" for node in self.nodes)
        self.source_module: str | None = None
        self.dominators = self._dominators(self._sources(trace))

    def _sources(self, trace: Trace) -> set[int]:
        wanted = {id(t) for t in trace.inputs}
        found = {i for i, node in enumerate(self.nodes) if id(getattr(node, "variable", None)) in wanted}
        if found:
            return found
        # Token ids carry no gradient, nor does what runs under no_grad: the first module with a differentiable
        # output stands for the input.
        for path, call in sorted(trace.calls.items(), key=lambda item: item[1].exit):
            carried = self.carried(call)
            if carried is not None:
                self.source_module = path
                return {self.order[id(carried.node)]}
        return set()

    def carried(self, call: Call) -> Carried | None:
        """The one output of a module [B, ...] that leads to the logits; None where several do, or it runs again.

        What else it returns (the last state of a recurrent layer) may carry a graph of its own that leads nowhere.
        """
        if call.times != 1 or call.is_checkpointed:
            return None
        leading = {(id(each.node), each.result): each for each in call.outputs[::-1] if self._is_used(each)}
        found = next(iter(leading.values())) if len(leading) == 1 else None
        # What is kept of a batch, and cut into pieces, counts examples first: the state of a recurrent layer does not.
        return found if found and found.shape[:1] == (PROBE_EXAMPLES,) else None

    def _is_used(self, carried: Carried) -> bool:
        return (id(carried.node), carried.result) in self._used

    def _dominators(self, sources: set[int]) -> list[int]:
        # In topological order, a node is on every path exactly when no edge from an earlier node (that
        # the source reaches) passes over it; `reach` is how far those edges go.
        reached = set(sources)
        last_use: dict[int, int] = {}
        for i, node in enumerate(self.nodes):
            uses = [self.order[id(n)] for n in parents(node)]
            if any(j in reached for j in uses):
                reached.add(i)
            for j in uses:
                if j in reached and i in reached:
                    last_use[j] = i
        reach = max(sources, default=len(self.nodes))
        found = []
        for i in sorted(reached):
            if reach <= i:
                found.append(i)
            reach = max(reach, last_use.get(i, i))
        return [i for i in found if i not in sources]

    def units(self, cut_nodes: Sequence[Node]) -> list[int]:
        """For each node the first cut that it leads to; `len(cut_nodes)` for what comes after the last."""
        unit = [len(cut_nodes)] * len(self.nodes)
        seen: set[int] = set()
        for number, cut in enumerate(cut_nodes):
            stack = [cut]
            while stack:
                node = stack.pop()
                if id(node) not in seen:
                    seen.add(id(node))
                    unit[self.order[id(node)]] = number
                    stack += parents(node)
        return unit


def parents(node: Node) -> list[Node]:
    """The nodes whose results `node` uses."""
    return [parent for parent, _ in node.next_functions if parent is not None]


def _topological(sink: Node) -> list[Node]:
    """Every node that leads to `sink`, inputs first. The list keeps the nodes (and so their ids) alive."""
    ordered: list[Node] = []
    seen: set[int] = set()
    stack: list[tuple[Node, bool]] = [(sink, False)]
    keep = [sink]
    while stack:
        node, done = stack.pop()
        if done:
            ordered.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            before = parents(node)
            keep += before
            stack.append((node, True))
            stack += [(parent, False) for parent in before if id(parent) not in seen]
    return ordered
