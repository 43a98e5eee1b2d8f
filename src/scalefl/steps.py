"""Steps: what training the whole model, or a span of its blocks, means for a client."""

from __future__ import annotations

from dataclasses import replace

from scalefl.blocks import Blocks, Layer, Span, blocks_as_asked
from scalefl.models.output import OutputSpec
from scalefl.models.spec import ModelSpec
from scalefl.norm_statistics import collectable
from scalefl.problem import Problem
from scalefl.types import LocalWork, Step


def full_step(model: ModelSpec, problem: Problem, work: LocalWork) -> Step:
    """Training of the whole model."""
    blocks = blocks_as_asked(model, problem, 1)  # with all cuts inside it: units can be recomputed
    return span_step(blocks, blocks.whole, None, work)


def collecting_step(model: ModelSpec, problem: Problem, work: LocalWork) -> Step | None:
    """One run of the whole model over a client's data, in which norms collect statistics and nothing trains.

    None where no norm has statistics that can be collected.
    """
    step = full_step(model, problem, replace(work, epochs=1))
    names = collectable(model.skeleton()) & step.statistics
    if not names:
        return None
    norms = sorted({name.rpartition(".")[0] for name in names})
    part = replace(step.part, active=tuple(norms), inner=())
    return replace(step, part=part, trainable=frozenset(), moving=names)


def span_step(
    blocks: Blocks,
    span: Span,
    output: OutputSpec | None,
    work: LocalWork,
    *,
    coefficients: tuple[tuple[str, float], ...] = (),
    coadapted_layers: int = 0,
    layers: tuple[Layer, ...] | None = None,
    tail: bool = False,
    along: tuple[Layer, ...] = (),
) -> Step:
    """A step that trains a span of blocks, with the output module after it unless it ends the model.

    With its tail, the blocks after the span run too, frozen: the span then learns by the model's own loss.

    Args:
        blocks, span: what runs.
        output: the output module; None where the span ends the model or has its tail.
        work, coefficients: of the step.
        coadapted_layers: weight layers before the span that train with it.
        layers: those of the span that train; None: all.
        tail: whether what comes after the span runs.
        along: layers of the tail that train too.
    """
    if layers is None:
        part = blocks.part(span, output, coadapted_layers, tail=tail, along=along)
        trainable = blocks.trainable(span, coadapted_layers) | blocks.trainable_of(along)
    else:
        part = blocks.part_of_layers(span, output, (*layers, *along), tail=tail)
        trainable = blocks.trainable_of((*layers, *along))
    if work.memory_format == "channels_last":
        part = replace(part, channels_last=True)
    if output is not None:
        trainable |= frozenset(output.names())
    moving = trainable | blocks.statistics((*part.active, *part.straddling))
    return Step(part, trainable, moving, coefficients, work)
