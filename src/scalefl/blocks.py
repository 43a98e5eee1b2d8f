"""Blocks: runs of units between chosen cuts, and what training a span of them needs and moves."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

from scalefl.caches import remembered
from scalefl.effects import Effects, effects
from scalefl.errors import ConfigError, UncuttableModel
from scalefl.models.output import OutputSpec
from scalefl.models.spec import ModelSpec
from scalefl.partition import Cut, Entry, Partition, partition
from scalefl.parts import Part, Stretch
from scalefl.problem import Problem
from scalefl.starting import Proof, proven
from scalefl.tracing import output_shape

_log = logging.getLogger("scalefl")

Layer = tuple[str, tuple[str, ...]]
"""A module that owns parameters, and their names."""


@dataclass(frozen=True)
class Span:
    """Blocks `first` … `last`, counted from 0, both included."""

    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first + 1

    def __str__(self) -> str:
        return f"{self.first + 1}" if len(self) == 1 else f"{self.first + 1}-{self.last + 1}"


@dataclass(frozen=True, eq=False)
class Blocks:
    """A model in blocks.

    Args:
        model: the model.
        problem: what it is to learn.
        partition: the model between its cuts.
        ends: the last unit of each block.
    """

    model: ModelSpec
    problem: Problem
    partition: Partition
    ends: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def whole(self) -> Span:
        """The span of all blocks."""
        return Span(0, len(self) - 1)

    @property
    def gives_labels(self) -> bool:
        """Whether the model says one thing of each example, [B, K]: what an output module can do in its place."""
        return len(output_shape(self.model, self.problem)) == 1

    def check_outputs(self) -> None:
        """Refuse output modules where they have no meaning.

        Raises:
            ConfigError: the model gives more than one vector of logits for each example.
        """
        if len(self) > 1 and not self.gives_labels:
            shape = ", ".join(map(str, ("B", *output_shape(self.model, self.problem))))
            raise ConfigError(
                f"model {self.model.name} returns [{shape}], and an output module [B, K], one label for each example: "
                'none can stand in for the blocks that a client does not run. Train by method "scalefl" with tails, '
                'or by "fedavg"'
            )

    def spans(self) -> list[Span]:
        """All of them, shortest first."""
        return sorted((Span(a, b) for a in range(len(self)) for b in range(a, len(self))), key=len)

    def label(self, span: Span) -> str:
        """A span for people."""
        if span == self.whole:
            return "full"
        return f"block {span}" if len(span) == 1 else f"blocks {span}"

    @property
    def head(self) -> tuple[Layer, ...]:
        """The model's last weight layer, with the norms that follow it."""
        return self.layer_groups(Span(len(self) - 1, len(self) - 1))[-1]

    def cut(self, block: int) -> Cut | None:
        """The cut after a block; None after the last."""
        return self.partition.cuts[self.ends[block]] if block < len(self) - 1 else None

    def units(self, span: Span) -> range:
        """The units of a span."""
        start = self.ends[span.first - 1] + 1 if span.first else 0
        return range(start, self.ends[span.last] + 1)

    def training_units(self, span: Span) -> range:
        """The units of a span from the first on that runs as in training.

        Frozen units that lead to it belong to the prefix, in eval mode, like the blocks before. Where the whole model
        trains, its numbers are to be those of plain training: then only if train mode would change nothing in them.
        """
        return _training_units(self, span)

    @cached_property
    def proof(self) -> Proof:
        """Where a run can start; see `starting`."""
        return proven(self.model, self.problem, self.partition.entries)

    def held(self, span: Span) -> list[str]:
        """Tensors that training the span needs: those of its prefix and its own."""
        last = self.ends[span.last]
        return [name for name, unit in self.partition.unit_of.items() if unit <= last]

    def trainable(self, span: Span, coadapted_layers: int = 0) -> frozenset[str]:
        """Parameters that the span trains, with the last layers of the block before it."""
        units = self.units(span)
        own = {n for n in self.partition.parameters if self.partition.unit_of[n] in units}
        near = (name for _, names in self._coadapted(span, coadapted_layers) for name in names)
        return frozenset(own | (set(near) & self.partition.parameters))

    def active(self, span: Span, coadapted_layers: int = 0) -> tuple[str, ...]:
        """Modules that run in train mode: those of the span, and the co-adapted layers with their norms."""
        near = {path for path, _ in self._coadapted(span, coadapted_layers)}
        running = {path for path in self._running(span) if not self._straddles(path, span)}
        return self._in_train_mode(running | near)

    def straddling(self, span: Span) -> tuple[str, ...]:
        """Modules that run both in the span and before it."""
        return self._in_train_mode({path for path in self._running(span) if self._straddles(path, span)})

    def statistics(self, active: Sequence[str]) -> frozenset[str]:
        """Buffers that norms in train mode update."""
        return frozenset(name for path in active for name in self.partition.statistics.get(path, ()))

    def part(
        self,
        span: Span,
        output: OutputSpec | None,
        coadapted_layers: int = 0,
        *,
        tail: bool = False,
        along: Sequence[Layer] = (),
    ) -> Part:
        """What a step that trains the span runs; with its `tail`, also what follows, of which layers train `along`."""
        first = self.training_units(span)[0]
        near = [name for _, names in self._coadapted(span, coadapted_layers) for name in names]
        runs = self._with_tail(span) if tail else span
        part = self._part(runs, output, min((self.partition.unit_of[name] for name in near), default=first))
        active = self.active(span, coadapted_layers)
        return replace(
            part,
            active=self._in_train_mode({*active, *(path for path, _ in along)}),
            start=self.partition.cuts[first - 1] if first else None,
            straddling=self.straddling(span),
        )

    def part_of_layers(
        self, span: Span, output: OutputSpec | None, layers: Sequence[Layer], *, tail: bool = False
    ) -> Part:
        """What a step that trains only some layers, from a span on, runs: the others, around them, are frozen."""
        names = self.trainable_of(layers)
        runs = self._with_tail(span) if tail else span
        part = self._part(runs, output, min(self.partition.unit_of[name] for name in names))
        return replace(part, active=self._in_train_mode({path for path, _ in layers}))

    def trainable_of(self, layers: Sequence[Layer]) -> frozenset[str]:
        """The parameters of some layers."""
        return frozenset(name for _, names in layers for name in names) & self.partition.parameters

    def layer_groups(self, span: Span) -> list[tuple[Layer, ...]]:
        """The weight layers of a span that train, in order of execution, each with the norms that follow it."""
        units, groups = self.units(span), list[list[Layer]]()
        for path, names in self._trained_layers():
            own = tuple(name for name in names if self.partition.unit_of[name] in units)
            if not own:
                continue
            has_weight = groups and any(layer not in self.partition.norms for layer, _ in groups[-1])
            if groups and (path in self.partition.norms or not has_weight):
                groups[-1].append((path, own))
            else:
                groups.append([(path, own)])
        return [tuple(group) for group in groups]

    def _trained_layers(self) -> list[Layer]:
        """Modules that own trainable parameters, in order of execution, with their names."""
        trained = self.partition.parameters
        own = ((path, tuple(name for name in names if name in trained)) for path, names in self.partition.layers)
        return [layer for layer in own if layer[1]]

    def _in_train_mode(self, paths: Collection[str]) -> tuple[str, ...]:
        """Those modules among `paths` that the model itself trains in train mode."""
        return tuple(sorted(self.partition.train_mode.intersection(paths)))

    def _with_tail(self, span: Span) -> Span:
        return Span(span.first, len(self) - 1)

    def _part(self, span: Span, output: OutputSpec | None, first_trained_unit: int) -> Part:
        stop, last, before = self.cut(span.last), self.ends[span.last], first_trained_unit - 1
        feature = stop or self.partition.feature
        entries, does = self.proof.entries, effects(self.model, self.problem)
        entry = entries[before] if before >= 0 else None
        inner = self._inner(entries[before + 1 : last], span, feature)
        return Part(
            model=self.model,
            stop=stop,
            output=output,
            feature=feature,
            source=self.partition.source,
            source_blank=self.partition.source_blank,
            active=(),
            couples=self._couples(span, does),
            held=tuple(self.held(span)),
            written=tuple(sorted(does.touched)),
            copies_inputs=does.writes_inputs,
            prefix=self._stretches(entries, before) if entry else (),
            entry=entry,
            own=self._needed(entry, last),
            inner=inner,
            needed=self._needed_between(entry, inner, last),
        )

    def _couples(self, span: Span, does: Effects) -> bool:
        """Whether examples are seen to depend on each other in training, by more than norms with statistics."""
        found = self.partition
        if not found.static_norms.isdisjoint(self._running(span)):
            return True
        return does.couples and not found.static_norms and found.train_mode.isdisjoint(found.statistics)

    def _inner(self, entries: Sequence[Entry | None], span: Span, feature: Cut | None) -> tuple[Entry, ...]:
        """Those of the cuts inside a span at which a run can start, and that come by the feature."""
        if self.partition.recomputes:
            return ()  # it wants its tensors again when the gradient comes, and they are to come and go between cuts
        if self.statistics(self.straddling(span)):
            return ()  # a second run of the prefix would see the statistics that the first has left
        return tuple(e for e in entries if e and (e.cut == feature or not _passes(e, feature)))

    def _needed_between(self, entry: Entry | None, inner: Sequence[Entry], last: int) -> tuple[tuple[str, ...], ...]:
        ends = [*(self.partition.cuts.index(e.cut) for e in inner), last]
        return tuple(self._needed(start, end) for start, end in zip((entry, *inner), ends, strict=True))

    def _stretches(self, entries: Sequence[Entry | None], last: int) -> tuple[Stretch, ...]:
        """The frozen units up to `last`, each on its own where the model can be started between them."""
        ends = [unit for unit in range(last + 1) if entries[unit] is not None]
        starts = [0, *(end + 1 for end in ends[:-1])]
        return tuple(
            Stretch(
                entry=entries[start - 1] if start else None,
                stop=self.partition.cuts[end],
                held=self._needed(entries[start - 1] if start else None, end),
            )
            for start, end in zip(starts, ends, strict=True)
        )

    def _needed(self, entry: Entry | None, last: int) -> tuple[str, ...]:
        """Tensors that a run from an entry to the end of a unit needs.

        Modules around the entry run too, from their beginning: what they own themselves (a position embedding, a
        buffer) is needed though an earlier unit has it.
        """
        covered = self._covered(entry) if entry else frozenset()
        return tuple(name for name, unit in self.partition.unit_of.items() if unit <= last and name not in covered)

    def _covered(self, entry: Entry) -> frozenset[str]:
        """Tensors of modules that do not run after one of the partition's entries."""
        if entry.cut not in self._covered_by:
            names = self.partition.unit_of
            self._covered_by[entry.cut] = frozenset(n for n in names if entry.covers(n.rpartition(".")[0]))
        return self._covered_by[entry.cut]

    @cached_property
    def _covered_by(self) -> dict[Cut, frozenset[str]]:
        return {}

    def _running(self, span: Span) -> list[str]:
        units = self.training_units(span)
        runs = self.partition.module_units.items()
        return [path for path, (enter, leave) in runs if enter <= units[-1] and leave >= units[0]]

    def _straddles(self, path: str, span: Span) -> bool:
        return self.partition.module_units[path][0] < self.training_units(span)[0]

    def _coadapted(self, span: Span, count: int) -> list[tuple[str, tuple[str, ...]]]:
        """The last `count` weight layers before the span and the norms that follow them.

        Paper: ScaleFL, section 3 (parameter co-adaptation); the authors train the last convolution and its norm.
        """
        if span.first == 0 or count == 0:
            return []
        block = self.units(Span(span.first - 1, span.first - 1))
        found: list[tuple[str, tuple[str, ...]]] = []
        for path, names in reversed(self._trained_layers()):
            layer = (path, tuple(name for name in names if self.partition.unit_of[name] in block))
            if not layer[1]:
                continue
            found.append(layer)
            if layer[0] not in self.partition.norms:
                count -= 1
            if count == 0:
                break
        return found


@remembered(4096)
def _training_units(blocks: Blocks, span: Span) -> range:
    units, found = blocks.units(span), blocks.partition
    trained = {found.unit_of[name] for name in found.parameters}
    start = units[0]
    while start not in trained and start < units[-1] and not found.writes(start):
        if span == blocks.whole and not blocks.proof.same_in_training[start]:
            break
        start += 1
    return range(start, units[-1] + 1)


def _passes(entry: Entry, feature: Cut | None) -> bool:
    """Whether a run from `entry` would not come by the feature that objectives read."""
    return feature is not None and entry.covers(feature.module)


@remembered(64)
def blocks_by_count(model: ModelSpec, problem: Problem, count: int) -> Blocks:
    """Cut into `count` blocks that hold weight layers as evenly as may be; into fewer where there is less to train.

    Deviation: the authors cut ResNets between their stages, which a count finds for ResNet-18, but not for ResNet-34.

    Raises:
        UncuttableModel: the model has no place to cut.
    """
    found = _seen_partition(model, problem)
    ends = found.block_ends
    units = [found.unit_of[trained[0]] for path, trained in _weight_layers(found)]
    starts = [0, *(end + 1 for end in ends[:-1])]
    loads = tuple(sum(start <= unit <= end for unit in units) for start, end in zip(starts, ends, strict=True))
    return Blocks(model, problem, found, tuple(ends[i] for i in _even_ends(loads, min(count, len(ends)))))


@remembered(64)
def _seen_partition(model: ModelSpec, problem: Problem, cuts: tuple[str, ...] | None = None) -> Partition:
    """The partition, with all that forward passes were seen to write."""
    return partition(model, problem, cuts).with_written(effects(model, problem).written_in_training)


def _weight_layers(found: Partition) -> list[Layer]:
    """Layers that train, but for norms."""
    own = ((path, tuple(n for n in names if n in found.parameters)) for path, names in found.layers)
    return [(path, names) for path, names in own if names and path not in found.norms]


@remembered(64)
def blocks_by_hand(model: ModelSpec, problem: Problem, cuts: tuple[str, ...]) -> Blocks:
    """Cut after the modules named in `cuts`; without any, the whole model is one block."""
    found = _seen_partition(model, problem, cuts)
    return Blocks(model, problem, found, tuple(range(found.num_units)))


@remembered(64)
def blocks_as_asked(model: ModelSpec, problem: Problem, blocks: int | tuple[str, ...]) -> Blocks:
    """So many blocks, or those between the modules that are named; see `blocks_by_count` and `blocks_by_hand`.

    Where the model can't be cut so often it is in fewer blocks, or in one, and a warning says why.

    Raises:
        UncuttableModel: the modules that are named are no places to cut.
    """
    if isinstance(blocks, tuple):
        return blocks_by_hand(model, problem, blocks)
    try:
        found = blocks_by_count(model, problem, blocks)
    except UncuttableModel as error:
        if blocks > 1:
            _log.warning("model %s can't be cut, and trains as one block: %s", model.name, error)
        return blocks_by_hand(model, problem, ())
    if (count := len(found)) < blocks:
        trains = " that train" if count < found.partition.num_units else ""
        where = "trains as one block" if count == 1 else f"is cut into {count} blocks"
        _log.warning(
            "model %s has %d unit%s%s: it %s, not %d",
            model.name,
            count,
            "" if count == 1 else "s",
            trains,
            where,
            blocks,
        )
    return found


@remembered(1024)
def blocks_from_ends(model: ModelSpec, problem: Problem, ends: tuple[int, ...]) -> Blocks:
    """Blocks that end with the given units of the automatic partition; the whole model where there is one."""
    found = blocks_as_asked(model, problem, 1).partition if len(ends) == 1 else _seen_partition(model, problem)
    return Blocks(model, problem, found, ends)


def _even_ends(loads: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Ends of `count` non-empty runs whose loads have the least sum of squares (dynamic programming)."""

    @cache
    def best(start: int, runs: int) -> tuple[int, tuple[int, ...]]:
        if runs == 1:
            return sum(loads[start:]) ** 2, (len(loads) - 1,)
        options = []
        for end in range(start, len(loads) - runs + 1):
            cost, ends = best(end + 1, runs - 1)
            options.append((sum(loads[start : end + 1]) ** 2 + cost, (end, *ends)))
        return min(options)

    return best(0, count)[1]
