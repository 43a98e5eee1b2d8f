"""HeteroFL: clients train narrower models, nested in the global one.

Diao, Ding, Tarokh, "HeteroFL: Computation and Communication Efficient Federated Learning for Heterogeneous Clients",
ICLR 2021.
"""

from __future__ import annotations

from dataclasses import dataclass

from scalefl.methods.width_scaling import WidthScaling
from scalefl.types import ServerState
from scalefl.widths import Units, leading


@dataclass(frozen=True, kw_only=True)
class HeteroFL(WidthScaling):
    """HeteroFL: every width takes the leading channels.

    Paper: section 3, with scaler, static batch norm, masked cross-entropy and clipping. Deviation: a client's width is
    the widest that its memory holds, where the paper assigns widths; statistics are collected from a cohort, not from
    all clients, and as second moments.
    """

    def units(self, state: ServerState, client_id: int) -> Units:
        """The first ones."""
        return leading
