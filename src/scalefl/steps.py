"""Steps: what training the whole model, or a span of its blocks, means for a client."""

from __future__ import annotations

from scalefl.blocks import Blocks, Layer, Span, blocks_by_count, blocks_by_hand
from scalefl.errors import UncuttableModel
from scalefl.models.output import OutputSpec
from scalefl.models.spec import ModelSpec
from scalefl.problem import Problem
from scalefl.types import LocalWork, Step


def full_step(model: ModelSpec, problem: Problem, work: LocalWork) -> Step:
    """Training of the whole model."""
    try:
        blocks = blocks_by_count(model, problem, 1)  # one block, with all cuts inside it: units can be recomputed
    except UncuttableModel:
        blocks = blocks_by_hand(model, problem, ())
    return span_step(blocks, blocks.whole, None, work)


def span_step(
    blocks: Blocks,
    span: Span,
    output: OutputSpec | None,
    work: LocalWork,
    *,
    coefficients: tuple[tuple[str, float], ...] = (),
    coadapted_layers: int = 0,
    layers: tuple[Layer, ...] | None = None,
) -> Step:
    """A step that trains a span of blocks, with the output module after it unless it ends the model.

    Args:
        blocks, span: what runs.
        output: the output module; None where the span ends the model.
        work, coefficients: of the step.
        coadapted_layers: weight layers before the span that train with it.
        layers: those of the span that train; None: all.
    """
    if layers is None:
        part, trainable = blocks.part(span, output, coadapted_layers), blocks.trainable(span, coadapted_layers)
    else:
        part, trainable = blocks.part_of_layers(span, output, layers), blocks.trainable_of(layers)
    if output is not None:
        trainable |= frozenset(output.names())
    moving = trainable | blocks.statistics((*part.active, *part.straddling))
    return Step(part, trainable, moving, coefficients, work)
