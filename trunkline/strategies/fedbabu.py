"""FedBABU (Oh et al. 2022, arXiv:2106.06042): the body learns against heads that never move; heads are fitted at the end."""

from pydantic import Field

from trunkline.protocol.plan import LocalPlan, Phase
from trunkline.strategies.strategy import Averaging


class FedBABU(Averaging):
    """Rounds train stem and trunk on the heads all sites started from; before a site is scored it trains its own heads.

    Heads that differ pull the trunks apart; a common start, kept, gives all sites one target to express their labels in.
    Heads of the same task and shape start equal at every site, so nothing needs to be sent for that.

    Args:
        finish_steps: steps of the heads alone at the end, before the site's test rows are scored.
    """

    finish_steps: int = Field(default=100, ge=1, le=1_000_000)

    @property
    def plan(self) -> LocalPlan:
        return self.training.model_copy(
            update={
                "phases": (Phase(parts=("stem", "trunk")),),
                "finish_steps": self.finish_steps,
                "finish_parts": ("heads",),
            }
        )
