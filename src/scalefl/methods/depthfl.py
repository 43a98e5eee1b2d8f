"""DepthFL: clients train as many of the model's first blocks as they can hold, with a classifier after each.

Kim, Yu, Kim, Moon, "DepthFL: Depthwise Federated Learning for Heterogeneous Clients", ICLR 2023.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec
import torch
from torch import Tensor

from scalefl.blocks import Blocks, Span, blocks_as_asked
from scalefl.errors import ConfigError, check_range
from scalefl.methods.common import first_that_fits, initial_params, make_plan
from scalefl.models.exits import ensemble
from scalefl.models.output import OutputSpec
from scalefl.models.spec import ModelSpec
from scalefl.objectives import TaskLoss
from scalefl.params import Params, is_attachment
from scalefl.parts import Exit, Taps
from scalefl.planner import least_of, output_module
from scalefl.problem import Batch, Problem, Weighted, num_rows
from scalefl.server_optimizers import Average, ServerOptimizer, apply_mean
from scalefl.steps import span_step
from scalefl.tracing import rewritten
from scalefl.types import (
    OWN,
    Aux,
    Choice,
    ClientInfo,
    ClientTask,
    Ladder,
    LadderName,
    LocalWork,
    Objective,
    Offer,
    RoundPlan,
    ServerState,
    Step,
    Totals,
    ladder_of,
)

CONSISTENCY = "consistency"
CLIENT, SERVER = "client.", "server."
"""What the names of FedDyn's h start with, in the method's history."""


@dataclass(frozen=True)
class MutualDistillation(TaskLoss):
    """The losses of all classifiers, and what each could learn from the others.

    Paper: DepthFL, section 3: Σᵢ CEᵢ + w · Σᵢ mean over j ≠ i of KL(softmax(z_j) ‖ softmax(z_i)), z_j held fixed.

    Args:
        weight: w.
    """

    weight: float

    def sample_terms(self, taps: Taps, batch: Batch, problem: Problem) -> Weighted:
        """A sum over the examples; the weight is that of the last classifier's loss."""
        all_logits = [*taps.exits, taps.logits]
        losses = [problem.loss(logits, batch) for logits in all_logits]
        total = sum((loss for loss, _ in losses[1:]), losses[0][0])
        if self.weight and len(all_logits) > 1:
            # As a share of the loss's own weight, which may be more or less than the number of examples.
            shares = self.weight * losses[-1][1] / num_rows(batch)
            total = total + shares * _divergence([logits.log_softmax(-1) for logits in all_logits])
        return total, losses[-1][1]


def _divergence(said: Sequence[Tensor]) -> Tensor:
    """Σᵢ mean over j ≠ i of KL(j ‖ i), summed over the examples; j held fixed."""
    pairs = [
        (other.detach().exp() * (other.detach() - own)).sum()  # as F.kl_div, which vmap does not know
        for i, own in enumerate(said)
        for j, other in enumerate(said)
        if i != j
    ]
    return sum(pairs[1:], pairs[0]) / (len(said) - 1)


class FedDyn(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Acar et al., "Federated Learning Based on Dynamic Regularization", ICLR 2021, algorithm 1.

    Args:
        clients: N, how many there are in all.
        alpha: α.
    """

    clients: int
    alpha: float = 0.1

    def __post_init__(self) -> None:
        check_range("feddyn.clients", self.clients, 1)
        check_range("feddyn.alpha", self.alpha, 1e-12)


@dataclass(frozen=True, kw_only=True)
class DepthFL:
    """DepthFL.

    Paper: sections 3 and 4. Deviation: the classifiers on the way are ScaleFL's output modules, where the authors
    stack convolutions of their own; a client's depth is the greatest that its memory holds.

    Args:
        work: what each client does.
        blocks: the depths: how many, or the module paths after which the classifiers on the way stand.
        consistency: w, the weight of what classifiers learn from each other, once it has grown.
        ramp_rounds: rounds over which it grows; 0: it is there from the start.
        feddyn: dynamic regularization, which the authors train with. The server then keeps tensors as large as the
            model for each client that has taken part.
        means: what clients may do to fit their memory: a ladder, or the name of one ("none", "micro-batches", "auto").
        server: what the server does with the mean.
    """

    work: LocalWork = LocalWork()
    blocks: int | tuple[str, ...] = 4
    consistency: float = 1.0
    ramp_rounds: int = 300
    feddyn: FedDyn | None = None
    means: Ladder | LadderName = "none"
    server: ServerOptimizer = Average()

    def __post_init__(self) -> None:
        check_range("consistency", self.consistency, 0.0)
        check_range("ramp_rounds", self.ramp_rounds, 0)
        if self.feddyn and not isinstance(self.server, Average):
            raise ConfigError("feddyn is what the server does with the mean: it goes with server.kind = 'average' only")

    def init(self, model: ModelSpec, problem: Problem, *, seed: int, smallest_memory_bytes: int) -> ServerState:
        """The model's weights, and a classifier after each block but the last."""
        params = initial_params(model, seed)
        for each in self._exits(blocks_as_asked(model, problem, self.blocks)):
            params |= each.output.initial(seed)
        return ServerState(model, problem, params, round=0, seed=seed)

    def menu(self, state: ServerState) -> list[Offer]:
        """Each depth, greatest first."""
        blocks = blocks_as_asked(state.model, state.problem, self.blocks)
        return [self._offer(blocks, depth) for depth in range(len(blocks), 0, -1)]

    def floor_bytes(self, state: ServerState) -> int:
        """What the first block takes at the least."""
        return least_of(tuple(self.menu(state)), state.problem, self.objective).cost.peak_bytes

    def plan(self, state: ServerState, cohort: Sequence[ClientInfo]) -> RoundPlan:
        """The greatest depth that fits, for each client."""
        deepest = first_that_fits(self.menu(state), state, self.objective, cohort)
        chosen = {id: (self._now(state, choice),) for id, choice in deepest.items()}
        plan = make_plan(state, "depths", cohort, chosen, self.work)
        own = {task.client_id: self._own(state, task) for task in plan.tasks if self.feddyn}
        return replace(plan, is_uniform=True, own=own)

    def objective(self, step: Step) -> Objective:
        """The classifiers' losses and their mutual distillation."""
        return MutualDistillation(dict(step.coefficients)[CONSISTENCY])

    def aggregate(self, state: ServerState, plan: RoundPlan, total: Totals) -> ServerState:
        """The mean of each tensor over the clients that hold it, all alike."""
        params, history = apply_mean(self.server, state, plan, total)
        if self.feddyn:
            for client_id, own in total.own.items():
                history |= {f"{_of(client_id)}{name}": t for name, t in own.items()}
            params, history = self._corrected(state, params, history, total)
        return replace(state, params=params, round=state.round + 1, aux=Aux(history))

    def deploy(self, state: ServerState) -> tuple[ModelSpec, Params]:
        """The mean of what all classifiers say."""
        exits = self._exits(blocks_as_asked(state.model, state.problem, self.blocks))
        params = {f"model.{name}": t for name, t in state.params.items() if not is_attachment(name)}
        for number, each in enumerate(exits):
            names = each.output.names()
            params |= {f"exits.{number}.{n.removeprefix(each.output.prefix)}": state.params[n] for n in names}
        return ensemble(state.model, [(each.cut.position, each.output) for each in exits]), params

    def _own(self, state: ServerState, task: ClientTask) -> dict[str, Tensor]:
        """A client's h, as it left it; 0 where it has not trained a parameter yet."""
        kept, prefix = state.aux.tensors, _of(task.client_id)
        names = sorted(task.steps[0].trainable)
        return {OWN + n: kept.get(f"{prefix}{OWN}{n}", torch.zeros_like(state.params[n])) for n in names}

    def _corrected(
        self, state: ServerState, params: dict[str, Tensor], history: dict[str, Tensor], total: Totals
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What FedDyn makes of the mean: h ← h − α/N · Σ(θₖ − θ⁽ʳ⁾), θ ← mean − h/α."""
        assert self.feddyn is not None
        for name in sorted({own.removeprefix(OWN) for sent in total.own.values() for own in sent}):
            count = sum(OWN + name in sent for sent in total.own.values())
            h = history.get(SERVER + name, torch.zeros_like(params[name]))
            moved = params[name] - state.params[name]
            history[SERVER + name] = h - self.feddyn.alpha * count / self.feddyn.clients * moved
            params[name] = params[name] - history[SERVER + name] / self.feddyn.alpha
        return params, history

    def _now(self, state: ServerState, choice: Choice) -> Choice:
        """The choice with the weight of the round."""
        weight = self.consistency * _ramp(state.round, self.ramp_rounds)
        return choice._replace(step=replace(choice.step, coefficients=((CONSISTENCY, weight),)))

    def _offer(self, blocks: Blocks, depth: int) -> Offer:
        exits, span = self._exits(blocks), Span(0, depth - 1)
        output = exits[depth - 1].output if depth < len(blocks) else None
        # Its cost is predicted once, for the largest weight of the run.
        step = span_step(blocks, span, output, self.work.at_round(0), coefficients=((CONSISTENCY, self.consistency),))
        before = exits[: depth - 1]
        added = frozenset(name for each in before for name in each.output.names())
        # Units cannot be run again one by one: classifiers read on the way.
        part = replace(step.part, exits=before, inner=() if before else step.part.inner)
        step = replace(step, part=part, trainable=step.trainable | added, moving=step.moving | added)
        if self.feddyn:
            step = replace(step, feddyn=self.feddyn.alpha)
        return Offer(f"depth {depth}", (("", step),), ladder_of(self.means))

    def _exits(self, blocks: Blocks) -> tuple[Exit, ...]:
        found, overwritten = [], rewritten(blocks.model, blocks.problem)
        for block in range(len(blocks) - 1):
            cut, output = blocks.cut(block), self._output(blocks, block)
            assert cut is not None and output is not None
            found.append(Exit(cut, output, copies=cut.module in overwritten))
        return tuple(found)

    def _output(self, blocks: Blocks, block: int) -> OutputSpec | None:
        return output_module(blocks, block, blocks.problem, self.work.at_round(0), "none")


def _of(client_id: int) -> str:
    return f"{CLIENT}{client_id}."


def _ramp(round: int, length: int) -> float:
    """From exp(−5) to 1 over `length` rounds: Laine and Aila, "Temporal Ensembling", ICLR 2017, as the authors do."""
    return 1.0 if round >= length else math.exp(-5.0 * (1 - round / length) ** 2)
