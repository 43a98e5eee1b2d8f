"""The memory plan: what training a model needs, whole and in blocks, and which budgets hold what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from scalefl.data import parse_bytes
from scalefl.memory import Cost
from scalefl.methods.scalefl import ScaleFL
from scalefl.models import resolve
from scalefl.models.spec import Factory, ModelSpec
from scalefl.objectives import TaskLoss
from scalefl.planner import budget_error, full_step, step_cost
from scalefl.problem import Classification, Column, Problem
from scalefl.tracing import num_outputs
from scalefl.types import Ladder, LadderName, LocalWork, Method, ServerState, Step
from scalefl.units import mib


@dataclass(frozen=True)
class PlanRow:
    """One thing that a client may train.

    Args:
        label: what it is.
        cost: of one step on a batch.
        bytes_down, bytes_up: what a client downloads and uploads for it.
        cut: the module after which it ends; None for the model's end.
    """

    label: str
    cost: Cost
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
        """The memory classes whose budget holds a row."""
        return [name for name, budget in self.budgets.items() if row.cost.peak_bytes <= budget]

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
        lines = [f"{self.model}, batches of {self.batch_size}"]
        for row in (self.full, *self.rows):
            fits = f"   fits: {', '.join(self.fitting(row)) or 'none'}" if self.budgets else ""
            lines.append(f"  {row.label:<28} {mib(row.cost.peak_bytes):>8} MiB{fits}")
        return "\n".join(lines)


def memory_plan(method: Method, state: ServerState, budgets: Mapping[str, int]) -> MemoryPlan:
    """The plan of a method at its start: what each item of its menu needs, beside full training."""
    model, problem, work = state.model, state.problem, method.work.at_round(0)
    whole = full_step(model, problem, work)
    full = _row(state, "full training", whole, step_cost(whole, problem, TaskLoss()))
    rows = tuple(_row(state, choice.rung, choice.step, choice.cost) for choice in method.menu(state))
    return MemoryPlan(model.name, work.batch_size, full, rows, dict(budgets))


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
        BudgetError: not even the cheapest block fits the budget.
        UncuttableModel: the model has no place to cut, or not the one asked for.
    """
    spec = ModelSpec.of(resolve(model) if isinstance(model, str) else model, **model_arguments)
    problem = _problem_for(spec, example_input)
    method = ScaleFL(work=LocalWork(batch_size=batch_size), blocks=blocks, means=means)
    state = method.init(spec, problem, seed=0, smallest_memory_bytes=0)
    budgets = {} if budget is None else {"budget": parse_bytes(budget) if isinstance(budget, str) else budget}
    found = memory_plan(method, state, budgets)
    least = min(found.rows, key=lambda row: row.cost.peak_bytes)
    if budgets and not found.fitting(least):
        raise budget_error(f"{least.label}, the cheapest part of {spec.name},", least.cost, budgets["budget"])
    return found


def _problem_for(model: ModelSpec, example: Tensor | Mapping[str, Tensor]) -> Problem:
    columns = example if isinstance(example, Mapping) else {"x": example}
    described = tuple(
        Column(name, tuple(t.shape[1:]), str(t.dtype).removeprefix("torch.")) for name, t in columns.items()
    )
    return Classification(num_outputs(model, Classification(2, described)), described)


def _row(state: ServerState, label: str, step: Step, cost: Cost) -> PlanRow:
    def size(names: Iterable[str]) -> int:
        return sum(state.params[name].numel() * state.params[name].element_size() for name in names)

    stop = step.part.stop
    return PlanRow(label, cost, size(step.part.names()), size(step.moving), stop.module if stop else None)


def _row_to_json(row: PlanRow) -> dict[str, Any]:
    return {
        "label": row.label,
        "cut": row.cut,
        "peak_bytes": row.cost.peak_bytes,
        **{f"{term}_bytes": size for term, size in row.cost.terms},
        "flops_per_example": row.cost.flops_per_example,
        "bytes_down": row.bytes_down,
        "bytes_up": row.bytes_up,
    }
