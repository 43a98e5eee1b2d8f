"""The memory plan: what training a model needs, whole and in blocks, and which budgets hold what."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from scalefl.costs import sizes_of, step_cost
from scalefl.data import parse_bytes
from scalefl.errors import check_range
from scalefl.memory import Cost
from scalefl.methods.scalefl import ScaleFL
from scalefl.models import resolve
from scalefl.models.spec import Factory, ModelSpec
from scalefl.objectives import TaskLoss
from scalefl.planner import budget_error, fit, least, least_of
from scalefl.problem import Classification, Column, Problem
from scalefl.steps import full_step
from scalefl.tracing import output_shape
from scalefl.types import (
    NO_MEANS,
    Choice,
    Ladder,
    LadderName,
    LocalWork,
    Method,
    Objective,
    Offer,
    ServerState,
    Step,
    described,
)
from scalefl.units import MIB

_log = logging.getLogger("scalefl")


@dataclass(frozen=True)
class Fit:
    """How a memory class does something: its peak, and the means in words, empty where it needs none."""

    peak_bytes: int
    means: str


@dataclass(frozen=True)
class PlanRow:
    """One thing that a client may train.

    Args:
        label: what it is.
        cost: of one step on a batch, by no means but the method's own.
        least: how it is done with least memory.
        fits: memory class -> how it does this; classes that cannot are not there.
        bytes_down, bytes_up: what a client downloads and uploads for it.
        cut: the module after which it ends; None for the model's end.
    """

    label: str
    cost: Cost
    least: Fit
    fits: Mapping[str, Fit]
    bytes_down: int
    bytes_up: int
    cut: str | None


@dataclass(frozen=True)
class MemoryPlan:
    """What training needs.

    Args:
        model: its name.
        batch_size: examples in a step.
        full: training of the whole model on the whole batch.
        rows: what a method may ask of clients.
        budgets: name -> bytes of each memory class.
    """

    model: str
    batch_size: int
    full: PlanRow
    rows: tuple[PlanRow, ...]
    budgets: Mapping[str, int]

    def fitting(self, row: PlanRow) -> list[str]:
        """The memory classes that can do a row."""
        return list(row.fits)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "model": self.model,
            "batch_size": self.batch_size,
            "budgets_bytes": dict(self.budgets),
            "full": _row_to_json(self.full),
            "rows": [_row_to_json(row) for row in self.rows],
        }

    def __str__(self) -> str:
        lines = [f"{self.model}, batches of {self.batch_size}: MiB as it is, and at the least"]
        for row in (self.full, *self.rows):
            sizes = f"{row.cost.peak_bytes / MIB:8.1f} {row.least.peak_bytes / MIB:8.1f}"
            fits = "; ".join(f"{name} ({fit.means or 'as it is'})" for name, fit in row.fits.items())
            lines.append(f"  {row.label:<24} {sizes}" + (f"   fits: {fits or 'none'}" if self.budgets else ""))
        return "\n".join(lines)


def memory_plan(method: Method, state: ServerState, budgets: Mapping[str, int]) -> MemoryPlan:
    """The plan of a method at its start: what each item of its menu needs, beside full training by no means."""
    model, problem, work = state.model, state.problem, method.work.at_round(0)
    whole = Offer("full training", (("", full_step(model, problem, work)),), NO_MEANS)
    full = _row(state, whole, lambda step: TaskLoss(), budgets)
    offers = method.menu(state)
    rows = [(offer, _row(state, offer, method.objective, budgets)) for offer in offers if not offer.fallback]
    for offer in offers:
        if offer.fallback and (lacking := _lacking(offer, rows, budgets)):
            row = _row(state, offer, method.objective, budgets)
            if row.fits.keys() & lacking:
                rows.append((offer, row))
    if unknown := sorted({name for row in (full, *(row for _, row in rows)) for name in row.cost.unknown}):
        _log.warning("FLOPs leave out %s, and memory may too: nothing says what they cost", ", ".join(unknown))
    return MemoryPlan(model.name, work.batch_size, full, tuple(row for _, row in rows), dict(budgets))


def _lacking(offer: Offer, rows: Sequence[tuple[Offer, PlanRow]], budgets: Mapping[str, int]) -> set[str]:
    """The memory classes that hold nothing so far that trains all that a fallback does."""
    more = [row for other, row in rows if offer.trained <= other.trained]
    return {name for name in budgets if not any(name in row.fits for row in more)}


def plan(
    model: str | Factory | nn.Module,
    example_input: Tensor | Mapping[str, Tensor],
    budget: str | int | None = None,
    *,
    batch_size: int = 32,
    blocks: int | tuple[str, ...] = 4,
    means: Ladder | LadderName = "auto",
    **model_arguments: Any,
) -> MemoryPlan:
    """What training a model block by block needs, and what fits a budget.

    Args:
        model: a built-in name, a factory, a "package.module:factory", or a module.
        example_input: a batch of inputs [B, ...], or named columns of them; only shapes and dtypes are read.
        budget: bytes, as a number or as "64MiB".
        batch_size: examples in a step.
        blocks: how many, or the module paths after which to cut.
        means: what a client may do to fit: a ladder, or the name of one ("none", "micro-batches", "auto").
        model_arguments: keyword arguments for the factory.

    Raises:
        ConfigError: the budget is no positive number of bytes.
        BudgetError: not even the cheapest block fits the budget.
        UncuttableModel: the model has no place to cut, or not the one asked for.
    """
    spec = ModelSpec.of(resolve(model) if isinstance(model, str) else model, **model_arguments)
    problem = _problem_for(spec, example_input)
    method = ScaleFL(work=LocalWork(batch_size=batch_size), blocks=blocks, means=means)
    state = method.init(spec, problem, seed=0, smallest_memory_bytes=0)
    budgets = {} if budget is None else {"budget": parse_bytes(budget) if isinstance(budget, str) else budget}
    for num_bytes in budgets.values():
        check_range("budget", num_bytes, 1)
    found = memory_plan(method, state, budgets)
    if budgets and not any(row.fits for row in found.rows):
        floor = least_of(tuple(method.menu(state)), problem, method.objective)
        what = f"{floor.rung}, the least of {spec.name},"
        raise budget_error(what, floor, problem, method.objective(floor.step), budgets["budget"])
    return found


def _problem_for(model: ModelSpec, example: Tensor | Mapping[str, Tensor]) -> Problem:
    columns = example if isinstance(example, Mapping) else {"x": example}
    described = tuple(
        Column(name, tuple(t.shape[1:]), str(t.dtype).removeprefix("torch.")) for name, t in columns.items()
    )
    return Classification(output_shape(model, Classification(2, described))[-1], described)


def _row(
    state: ServerState, offer: Offer, objective: Callable[[Step], Objective], budgets: Mapping[str, int]
) -> PlanRow:
    step, problem = offer.step, state.problem
    sizes = sizes_of(step.part)
    own = sum(sizes[name] for name in step.trainable) if step.own else 0
    found = {name: fit(offer, problem, objective, budget) for name, budget in budgets.items()}
    stop = step.part.stop
    return PlanRow(
        label=offer.label,
        cost=step_cost(step, problem, objective(step)),
        least=_fit_of(least(offer, problem, objective), offer),
        fits={name: _fit_of(choice, offer) for name, choice in found.items() if choice},
        bytes_down=sum(sizes[name] for name in step.part.names()) + own,
        bytes_up=sum(sizes[name] for name in step.moving) + own,
        cut=stop.module if stop else None,
    )


def _fit_of(choice: Choice, offer: Offer) -> Fit:
    words = [*choice.label.removeprefix(offer.label).split(", ")[1:], *described(choice.step)]
    return Fit(choice.cost.peak_bytes, ", ".join(words))


def _row_to_json(row: PlanRow) -> dict[str, Any]:
    return {
        "label": row.label,
        "cut": row.cut,
        "peak_bytes": row.cost.peak_bytes,
        **{f"{term}_bytes": size for term, size in row.cost.terms},
        "flops_per_example": row.cost.flops_per_example,
        "uncounted_operators": list(row.cost.unknown),
        "bytes_down": row.bytes_down,
        "bytes_up": row.bytes_up,
        "least": asdict(row.least),
        "fits": {name: asdict(fit) for name, fit in row.fits.items()},
    }
