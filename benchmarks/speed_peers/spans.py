"""A method for ScaleFL in which clients train different spans of the model, as the peers do it here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from scalefl.blocks import Span, blocks_by_count
from scalefl.methods.common import make_plan
from scalefl.methods.fedavg import FedAvg
from scalefl.planner import least
from scalefl.steps import span_step
from scalefl.types import NO_MEANS, ClientInfo, Offer, RoundPlan, ServerState, Totals


@dataclass(frozen=True, kw_only=True)
class Spans(FedAvg):
    """FedAvg of which each client trains the blocks from one on; what it leaves as it is enters the mean as it was.

    Args:
        firsts: each client's first block.
    """

    firsts: tuple[int, ...]

    def plan(self, state: ServerState, cohort: Sequence[ClientInfo]) -> RoundPlan:
        """The same for all clients that start alike."""
        blocks = blocks_by_count(state.model, state.problem, 4)
        choices = []
        for first in range(len(blocks)):
            step = span_step(blocks, Span(first, len(blocks) - 1), None, self.work)
            offer = Offer(f"from block {first + 1}", (("", step),), NO_MEANS)
            choices.append(least(offer, state.problem, self.objective))
        chosen = {client.id: (choices[self.firsts[client.id]],) for client in cohort}
        return make_plan(state, "spans", cohort, chosen, self.work)

    def aggregate(self, state: ServerState, plan: RoundPlan, total: Totals) -> ServerState:
        """The mean over the whole cohort."""
        weights = {task: plan.clients[task.client_id].num_examples for task in plan.tasks}
        params = dict(state.params)
        for name, mean in total.mean(state.params).items():
            share = sum(weight for task, weight in weights.items() if name in task.moving) / sum(weights.values())
            params[name] = torch.lerp(state.params[name], mean, share)
        return replace(state, params=params, round=state.round + 1)
