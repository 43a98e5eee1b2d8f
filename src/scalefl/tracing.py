"""Watch a model run once: which modules ran when, the graph from the input to the logits, and writes in place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from scalefl.errors import ScaleFLError, UncuttableModel
from scalefl.models.skeleton import lay_fakes
from scalefl.models.spec import ModelSpec
from scalefl.models.stand_ins import NoTemplate, Template, floating, template_of
from scalefl.problem import Problem
from scalefl.rng import seeded
from scalefl.torch_private import FakeTensorMode, quiet_fakes

T = TypeVar("T")

PROBE_EXAMPLES = 2

Node = Any  # a node of the autograd graph; torch has no public type for it


@dataclass
class Call:
    """What the probe saw of one module: when it ran, the graph nodes of its output, and what stands in for it."""

    enter: int
    exit: int = -1
    times: int = 0
    outputs: list[tuple[Node | None, tuple[int, ...]]] = field(default_factory=list)
    template: Template = None
    has_template: bool = False

    def carried(self) -> tuple[int, Node, tuple[int, ...]] | None:
        """Position, node and shape of the one output that carries the graph, if there is just one."""
        grads = [(i, node, shape) for i, (node, shape) in enumerate(self.outputs) if node is not None]
        return grads[0] if self.times == 1 and len({id(node) for _, node, _ in grads}) == 1 else None


@dataclass
class Trace:
    """One watched run: the graph is read from `sink`, the node of the logits."""

    module: nn.Module
    trainable: frozenset[str]
    calls: dict[str, Call]
    inputs: list[Tensor]
    sink: Node
    num_outputs: int

    def __post_init__(self) -> None:
        self._names = {id(p): name for name, p in self.module.named_parameters()}

    def parameter(self, node: Node) -> str | None:
        """The parameter whose gradient `node` accumulates, if it does that."""
        return self._names.get(id(getattr(node, "variable", None)))


@lru_cache(maxsize=64)
def num_outputs(model: ModelSpec, problem: Problem) -> int:
    """The number of logits that the model gives for an example."""
    return traced(model, problem).num_outputs


def traced(model: ModelSpec, problem: Problem) -> Trace:
    """Run a model on a tiny batch, on fake tensors where it can be, and note what happens.

    Raises:
        UncuttableModel: it does not run, or its output does not depend on its input and parameters.
    """
    return _watching(model, lambda module: _probe(module, problem))


@lru_cache(maxsize=64)
def rewritten(model: ModelSpec, problem: Problem) -> frozenset[str]:
    """The modules into whose output a later one writes in place while the model trains.

    What is computed from such an output on the side needs a copy: autograd won't go back through what has changed.

    Raises:
        UncuttableModel: the model does not run.
    """
    return _watching(model, lambda module: _rewritten(module, problem))


def _watching(model: ModelSpec, watch: Callable[[nn.Module], T]) -> T:
    """What `watch` sees of a model: on fake tensors where it can be run on them."""
    try:
        module = model.skeleton()
        with quiet_fakes(), FakeTensorMode(allow_non_fake_inputs=True):
            lay_fakes(module)
            return watch(module)
    except ScaleFLError:
        raise
    except Exception as fake_error:  # control flow that depends on data, or an operator without a fake
        try:
            return watch(model.build(0))
        except ScaleFLError:
            raise
        except Exception as error:
            raise UncuttableModel(
                f"model {model.name} does not run on an example batch of the data: {error}"
            ) from fake_error


def _probe(module: nn.Module, problem: Problem) -> Trace:
    args, kwargs = problem.inputs(problem.example(PROBE_EXAMPLES))
    inputs = [t.requires_grad_() for t in floating([*args, *kwargs.values()])]
    trainable = frozenset(name for name, p in module.named_parameters() if p.requires_grad)
    for p in module.parameters():
        if p.is_floating_point():
            p.requires_grad_()
    calls: dict[str, Call] = {}
    module.eval()
    with _watched(module, calls), torch.enable_grad():
        logits = problem.output(module(*args, **kwargs))
    if logits.grad_fn is None:
        raise UncuttableModel("the model's output does not depend on its input or parameters")
    return Trace(module, trainable, calls, inputs, logits.grad_fn, logits.shape[-1])


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

        return hook

    def leave(path: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            call = calls[path]
            call.exit = next(clock)
            call.outputs = [(t.grad_fn, tuple(t.shape)) for t in floating(output)]
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
        source_module: the module whose output stands for the input (token models).
        dominators: places of the nodes on every path.
    """

    def __init__(self, trace: Trace) -> None:
        self.nodes = _topological(trace.sink)
        self.order = {id(node): i for i, node in enumerate(self.nodes)}
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
            carried = call.carried()
            if carried is not None and id(carried[1]) in self.order:
                self.source_module = path
                return {self.order[id(carried[1])]}
        return set()

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
