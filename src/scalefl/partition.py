"""Where a model can be cut into blocks, and what belongs to each side.

A cut is a place where one tensor carries everything forward: in the autograd graph, a node on every path
from the input to the logits (a dominator), with nothing else shared across it. The model is run once on a
tiny batch, on fake tensors where it can be; nothing in it is rewritten, and no model-specific code is
needed. The pieces between neighbouring cuts are units; blocks are runs of units.

Source: the block-wise set-up of ScaleFL (arXiv 2408.10826, section 3) needs a cut of the model and leaves
open how to find it; the search for dominators is ours.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from scalefl.caches import remembered
from scalefl.errors import UncuttableModel, nearest
from scalefl.models.skeleton import tensors
from scalefl.models.spec import ModelSpec
from scalefl.models.stand_ins import Blank, Template, blanks
from scalefl.problem import Problem
from scalefl.tracing import PROBE_EXAMPLES, Call, Graph, Node, Trace, parents, traced


@dataclass(frozen=True)
class Cut:
    """A module after which the model can be cut.

    Args:
        module: its dotted path.
        position: which of the floating-point tensors in its output carries the graph.
        shape: that tensor's shape for one example.
    """

    module: str
    position: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """Where a run can start in the middle.

    Args:
        cut: the place whose tensor is given.
        skipped: the modules that end before it or there, the outermost of each nest, and what stands in for their
            outputs.
    """

    cut: Cut
    skipped: tuple[tuple[str, Template], ...]

    @property
    def blank(self) -> Blank:
        """What the given tensor looks like."""
        template = dict(self.skipped)[self.cut.module]
        return [blank for blank in blanks(template) if blank.is_floating_point][self.cut.position]

    def covers(self, path: str) -> bool:
        """Whether a module does not run after this entry."""
        return any(path == skipped or path.startswith(skipped + ".") for skipped, _ in self.skipped)


@dataclass(frozen=True, eq=False)
class Partition:
    """A model between its cuts: `len(cuts) + 1` units, numbered in order of execution.

    Args:
        cuts: the places between units.
        path: every shape that the one tensor takes on its way, as (unit, shape), in order.
        unit_of: the first unit that needs each tensor.
        module_units: the first and last unit in which each module runs.
        layers: modules that own parameters, in order of execution, with the parameters' names.
        parameters: names of the trainable parameters; the user's own frozen ones are not among them.
        train_mode: paths of the modules that train in train mode: those that the model's own `train()` leaves in it.
        norms: those of `layers` that own vectors only (norms, scales): they go with the layer before them.
        statistics: names of the tensors that each module writes while it runs in train mode: running statistics of
            norms, and what `with_written` adds.
        static_norms: batch norms without running statistics.
        source: the module whose output is the input features (token models); None where the input is.
        source_blank: what that output looks like.
        feature: the last feature before the model's own head.
        recomputes: whether the model recomputes activations itself, in its backward pass.
        entries: for each cut, how a run could start there; None where a module's output cannot be stood in for, or
            both sides use what training changes. Whether the run then gives the same numbers, `starting` says.
    """

    cuts: tuple[Cut, ...]
    path: tuple[tuple[int, tuple[int, ...]], ...]
    unit_of: Mapping[str, int]
    module_units: Mapping[str, tuple[int, int]]
    layers: tuple[tuple[str, tuple[str, ...]], ...]
    parameters: frozenset[str]
    train_mode: frozenset[str]
    norms: frozenset[str]
    statistics: Mapping[str, tuple[str, ...]]
    static_norms: frozenset[str]
    source: str | None
    source_blank: Blank | None
    feature: Cut | None
    recomputes: bool
    entries: tuple[Entry | None, ...]

    @property
    def num_units(self) -> int:
        """Number of units."""
        return len(self.cuts) + 1

    @property
    def block_ends(self) -> tuple[int, ...]:
        """The units with which a block may end, so that there is something to train in each: frozen ones lead on to
        the next that trains, and those after the last belong to it.
        """
        trained = sorted({self.unit_of[name] for name in self.parameters})
        return (*trained[:-1], self.num_units - 1)

    def with_written(self, names: Collection[str]) -> Partition:
        """The same, where forward passes were seen to write further tensors in train mode.

        A run cannot start at a cut that a module which writes runs on both sides of. What a module owns that never runs
        itself, the one around it writes.
        """
        owned = {path: set(own) for path, own in self.statistics.items()}
        for name in sorted(set(names) - self.parameters):
            owner = name.rpartition(".")[0]
            while owner not in self.module_units:
                owner = owner.rpartition(".")[0]
            owned.setdefault(owner, set()).add(name)
        around = [range(*self.module_units[path]) for path in owned]
        entries = tuple(None if any(c in cuts for cuts in around) else e for c, e in enumerate(self.entries))
        return replace(self, statistics={path: tuple(sorted(own)) for path, own in owned.items()}, entries=entries)

    def writes(self, unit: int) -> bool:
        """Whether anything that runs in a unit writes into the model's tensors while it trains."""
        writing = (self.module_units[path] for path in self.statistics if path in self.train_mode)
        return any(first <= unit <= last for first, last in writing)

    def shapes_after(self, unit: int) -> list[tuple[int, ...]]:
        """The shapes that the one tensor takes in the units after `unit`."""
        return [shape for where, shape in self.path if where > unit]


@remembered(64)
def partition(model: ModelSpec, problem: Problem, cuts: tuple[str, ...] | None = None) -> Partition:
    """Cut a model at every place where one tensor carries everything, or at the modules named in `cuts`.

    A cut by hand may lie where the search would not cut: the block before it then holds what leads to that
    module's output, and the rest belongs to the block after.

    Raises:
        UncuttableModel: there is no such place, or a named module is missing, runs more than once, or has
            no single floating-point output, or a block would be left with nothing to train.
        ModelDoesNotRun, ConfigError: see `traced`.
    """
    trace = traced(model, problem)
    if trace.why_uncuttable and cuts != ():
        raise UncuttableModel(trace.why_uncuttable)
    graph = Graph(trace)
    chosen = _automatic(trace, graph) if cuts is None else _by_hand(trace, graph, cuts)
    return _partition(trace, graph, chosen)


@dataclass(frozen=True)
class _Place:
    path: str
    call: Call
    position: int
    node: Node
    shape: tuple[int, ...]

    def cut(self) -> Cut:
        return Cut(self.path, self.position, self.shape[1:])


def _automatic(trace: Trace, graph: Graph) -> list[_Place]:
    places = _dominating_places(trace, graph)
    if not places:
        if sum(p.ndim >= 2 for p in trace.module.parameters()) < 2:
            raise UncuttableModel("the model has a single weight layer: there is nothing to cut")
        raise UncuttableModel(
            "no module's output carries everything forward (skip connections or several outputs run past every "
            'one): name the cut points by hand, as module paths: blocks = ["layer1", ...]'
        )
    kept, culprit = _without_sharing(trace, graph, places)
    if not kept:
        raise UncuttableModel(
            f"{culprit} is used on both sides of every possible cut (tied weights?): untie it, or name the cut "
            'points by hand, as module paths: blocks = ["layer1", ...]'
        )
    return _before_weights(trace, graph, kept)


def _dominating_places(trace: Trace, graph: Graph) -> list[_Place]:
    """One place for each dominator that is some module's output: the outermost such module."""
    wanted = {id(graph.nodes[i]) for i in graph.dominators} - {id(trace.sink)}
    found = [
        _Place(path, call, carried.position, carried.node, carried.shape)
        for path, call in trace.calls.items()
        if (carried := graph.carried(call)) is not None and id(carried.node) in wanted
    ]
    best: dict[int, _Place] = {}
    for place in _on_time(trace, graph, found):
        rival = best.get(id(place.node))
        if rival is None or _outermost(place) < _outermost(rival):
            best[id(place.node)] = place
    return sorted(best.values(), key=lambda place: graph.order[id(place.node)])


def _on_time(trace: Trace, graph: Graph, places: list[_Place]) -> list[_Place]:
    """Places that are reached before any later weight is used.

    An identity in a skip connection returns the tensor of a cut, but may run after the other branch.
    """
    nodes = sorted({id(place.node): place.node for place in places}.values(), key=lambda n: graph.order[id(n)])
    number = {id(node): i for i, node in enumerate(nodes)}
    needed = _needed(trace, graph.units(nodes), graph)
    return [place for place in places if _too_early(trace, needed, place, number[id(place.node)]) is None]


def _needed(trace: Trace, unit: list[int], graph: Graph) -> dict[str, int]:
    """The first unit that leads from each parameter."""
    return {name: unit[i] for i, node in enumerate(graph.nodes) if (name := trace.parameter(node))}


def _too_early(trace: Trace, needed: Mapping[str, int], place: _Place, number: int) -> str | None:
    """A module that has run when cut `number` is reached, though only a later unit needs its weights."""
    done = (path for path, _ in _layers(trace) if trace.calls[path].exit < place.call.exit)
    return next((p for p in done if any(needed.get(n, 0) > number for n in _own_parameters(trace.module, p))), None)


def _outermost(place: _Place) -> tuple[bool, int]:
    return (len(place.call.outputs) > 1, place.path.count("."))


def _without_sharing(trace: Trace, graph: Graph, places: list[_Place]) -> tuple[list[_Place], str]:
    """Drop cuts that something besides the one tensor crosses: tied weights, a shared position bias."""
    nodes = [place.node for place in places]
    unit = graph.units(nodes)
    bad: set[int] = set()
    culprit = ""
    for i, node in enumerate(graph.nodes):
        for parent in parents(node):
            j = graph.order[id(parent)]
            crossed = [c for c in range(unit[j], unit[i]) if parent is not nodes[c]]
            if crossed:
                bad.update(crossed)
                name = trace.parameter(parent)
                culprit = f"parameter {name}" if name else culprit or "an intermediate tensor"
    return [place for c, place in enumerate(places) if c not in bad], culprit


def _before_weights(trace: Trace, graph: Graph, places: list[_Place]) -> list[_Place]:
    """Keep the cuts that a unit with weights of its own follows: norms and activations stay with what they follow.

    So do position embeddings and the like, which belong to a container that the cut lies in.
    """
    unit = graph.units([place.node for place in places])
    weights: dict[int, list[str]] = {}
    for i, node in enumerate(graph.nodes):
        name = trace.parameter(node)
        if name is not None and node.variable.ndim >= 2:
            weights.setdefault(unit[i], []).append(name)
    return [
        place
        for c, place in enumerate(places)
        if any(u <= c for u in weights) and any(_starts_after(trace, n, place) for n in weights.get(c + 1, ()))
    ]


def _starts_after(trace: Trace, name: str, place: _Place) -> bool:
    """Whether the owner of a parameter has not begun to run where a place is reached."""
    call = trace.calls.get(name.rpartition(".")[0])
    return call is not None and call.enter > place.call.exit


def _by_hand(trace: Trace, graph: Graph, paths: tuple[str, ...]) -> list[_Place]:
    if len(set(paths)) < len(paths):
        raise UncuttableModel(f"cut points {list(paths)} name a module twice")
    places = sorted((_named_place(trace, graph, path) for path in paths), key=lambda place: place.call.exit)
    needed = _needed(trace, graph.units([place.node for place in places]), graph)
    for number, place in enumerate(places):
        if early := _too_early(trace, needed, place, number):
            raise UncuttableModel(
                f"cut point {place.path!r} is reached only after {early!r} has run, which does not lead to it but "
                "to what comes later: cut before the two part, or after they meet"
            )
    trained = {needed[name] for name in trace.trainable & needed.keys()}
    ends = ["the input", *(repr(place.path) for place in places), "the output"]
    for number in range(len(ends) - 1):
        if places and number not in trained:
            raise UncuttableModel(
                f"cut points: between {ends[number]} and {ends[number + 1]} there is nothing to train"
            )
    return places


def _named_place(trace: Trace, graph: Graph, path: str) -> _Place:
    call = trace.calls.get(path)
    if call is None:
        raise UncuttableModel(f"cut point {path!r} names no module that runs{nearest(path, trace.calls, 3)}")
    carried = graph.carried(call)
    if carried is None:
        times = "once" if call.times == 1 else f"{call.times} times"
        inside = ", inside of the model's own activation checkpointing" if call.is_checkpointed else ""
        shapes = ", ".join(str(list(each.shape)) for each in call.outputs) or "nothing"
        raise UncuttableModel(
            f"cut point {path!r} runs {times}{inside} and returns {shapes} with a gradient for "
            f"{PROBE_EXAMPLES} examples: a cut needs a module that runs once and returns one tensor that counts "
            "examples first and is used later"
        )
    if carried.node is trace.sink:
        raise UncuttableModel(f"cut point {path!r} is the model's own output: nothing would follow it")
    return _Place(path, call, carried.position, carried.node, carried.shape)


def _partition(trace: Trace, graph: Graph, places: list[_Place]) -> Partition:
    unit = graph.units([place.node for place in places])
    exits = [place.call.exit for place in places]
    module = trace.module
    module_units = {
        path: (bisect.bisect_left(exits, call.enter), bisect.bisect_left(exits, call.exit))
        for path, call in trace.calls.items()
    }
    module_units[""] = (0, len(places))
    # What the graph does not show (buffers, what runs without a gradient) is needed where its owner first runs.
    # A container that is never called may lend its buffers to anyone inside the module around it.
    unit_of = {name: module_units.get(name.rpartition(".")[0], (len(places), 0))[0] for name in tensors(module)}
    for name, _ in module.named_buffers():
        owner = name.rpartition(".")[0]
        while owner not in module_units:
            owner = owner.rpartition(".")[0]
        unit_of[name] = module_units[owner][0]
    unit_of |= _needed(trace, unit, graph)
    statistics = {path: names for path, names in _statistics(module).items() if path in module_units}
    shared = _shared(trace, graph, unit, [module_units[path] for path in statistics])
    everywhere = _dominating_places(trace, graph)
    features = _before_weights(trace, graph, everywhere)
    return Partition(
        cuts=tuple(place.cut() for place in places),
        path=tuple((bisect.bisect_left(exits, p.call.exit), p.shape[1:]) for p in everywhere),
        unit_of=unit_of,
        module_units=module_units,
        layers=_layers(trace),
        parameters=trace.trainable,
        train_mode=trace.train_mode,
        norms=_norms(trace),
        statistics=statistics,
        static_norms=_static_norms(module),
        source=graph.source_module,
        source_blank=_source_blank(trace, graph.source_module),
        feature=features[-1].cut() if features else None,
        recomputes=any(call.is_checkpointed for call in trace.calls.values()) or graph.has_checkpoint,
        entries=tuple(None if c in shared else _entry(trace, place) for c, place in enumerate(places)),
    )


def _shared(trace: Trace, graph: Graph, unit: list[int], writing: Sequence[tuple[int, int]]) -> set[int]:
    """Cuts with tensors on both sides that training changes: parameters (of cuts by hand), and what `writing` modules
    write, whose first and last units these are.
    """
    uses = ((i, graph.order[id(p)]) for i, node in enumerate(graph.nodes) for p in parents(node) if trace.parameter(p))
    spans = [*((unit[j], unit[i]) for i, j in uses), *writing]
    return {cut for first, last in spans for cut in range(first, last)}


def _entry(trace: Trace, place: _Place) -> Entry | None:
    """What need not run where a run starts at `place`: modules that run once and end by then."""
    ended = {p for p, call in trace.calls.items() if call.exit <= place.call.exit and call.times == 1}
    outermost = sorted(path for path in ended if ended.isdisjoint(_ancestors(path)))
    if not all(trace.calls[path].has_template for path in outermost):
        return None
    return Entry(place.cut(), tuple((path, trace.calls[path].template) for path in outermost))


def _source_blank(trace: Trace, path: str | None) -> Blank | None:
    found = [blank for blank in blanks(trace.calls[path].template) if blank.is_floating_point] if path else []
    return found[0] if found else None


def _ancestors(path: str) -> list[str]:
    words = path.split(".")
    return [".".join(words[:i]) for i in range(1, len(words))]


def _layers(trace: Trace) -> tuple[tuple[str, tuple[str, ...]], ...]:
    ran = sorted(trace.calls, key=lambda path: trace.calls[path].enter)
    first = {name for name, _ in trace.module.named_parameters()}  # a tied parameter belongs to its first name's layer
    owned = {path: tuple(n for n in _own_parameters(trace.module, path) if n in first) for path in ran}
    return tuple((path, names) for path, names in owned.items() if names)


def _norms(trace: Trace) -> frozenset[str]:
    owned = {path: trace.module.get_submodule(path).parameters(recurse=False) for path, _ in _layers(trace)}
    return frozenset(path for path, params in owned.items() if all(p.ndim < 2 for p in params))


def _own_parameters(module: nn.Module, path: str) -> tuple[str, ...]:
    return tuple(f"{path}.{name}" for name, _ in module.get_submodule(path).named_parameters(recurse=False))


def _statistics(module: nn.Module) -> dict[str, tuple[str, ...]]:
    return {
        path: tuple(f"{path}.{name}" for name, _ in child.named_buffers(recurse=False))
        for path, child in module.named_modules()
        if getattr(child, "track_running_stats", False)
    }


def _static_norms(module: nn.Module) -> frozenset[str]:
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    found = {path: child for path, child in module.named_modules() if isinstance(child, kinds)}
    return frozenset(path for path, child in found.items() if not child.track_running_stats)
