"""FedRolex: clients train narrower models, whose window on the global one moves on with each round.

Alam, Liu, Yan, Zhang, "FedRolex: Model-Heterogeneous Federated Learning with Rolling Sub-Model Extraction",
NeurIPS 2022. With random windows: Caldas et al., "Expanding the Reach of Federated Learning by Reducing Client Resource
Requirements", 2018 (Federated Dropout).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scalefl.methods.width_scaling import WidthScaling
from scalefl.rng import derive
from scalefl.types import ServerState
from scalefl.widths import Units, drawn, rolled


@dataclass(frozen=True, kw_only=True)
class FedRolex(WidthScaling):
    """FedRolex.

    Paper: section 3. Deviation: as in HeteroFL.

    Args:
        window: "rolling": in round r each layer's window starts at channel r, for all clients; "random": each client's
            channels are drawn anew in each round.
    """

    window: Literal["rolling", "random"] = "rolling"

    def units(self, state: ServerState, client_id: int) -> Units:
        """The round's window, or the client's draw."""
        if self.window == "rolling":
            return rolled(state.round)
        return drawn(derive(state.seed, "units", state.round, client_id))
