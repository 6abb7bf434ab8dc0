"""The models that a site holds in a round: the federated one, the personal one, the local baseline, and the best of each.

A role is "federated", "personal" or "local".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from trunkline.client.model_selection.candidates import finish
from trunkline.client.model_selection.evaluation import curve
from trunkline.client.site import Site
from trunkline.client.state.vault import Entry, State
from trunkline.models.trunk import TrunkModel
from trunkline.protocol.arrays import Arrays
from trunkline.protocol.messages import AgreedRequest
from trunkline.protocol.plan import LocalPlan, Phase

Agreed = TypeVar("Agreed", bound=AgreedRequest)


def local_plan(plan: LocalPlan) -> LocalPlan:
    """The local baseline's plan: the same steps and settings, everything trained together at full rate, without a pull."""
    return plan.model_copy(
        update={"phases": (Phase(parts=("stem", "trunk", "heads")),), "proximal": 0.0, "private_rate": 1.0}
    )


def local_request(request: Agreed) -> Agreed:
    """The request for the local baseline: it lends nothing, and has its own settings where a search chose some."""
    baseline = request.local_baseline
    settings = (
        {"plan": local_plan(baseline.plan), "trunk": baseline.trunk}
        if baseline is not None
        else {"plan": local_plan(request.plan)}
    )
    return request.model_copy(update={**settings, "lend": ()})


def federated_model(site: Site, request: AgreedRequest, arrays: Arrays, before: Entry | None) -> TrunkModel:
    """The federated model with the lent `arrays`, and its private parts as the round before left them."""
    model = site.model(request)
    model.adopt(arrays, request.lend)
    if before is not None:
        model.restore(before.private, request.lend)
    return model


def local_model(site: Site, request: AgreedRequest, before: Entry | None) -> TrunkModel | None:
    """The local baseline as the round before left it; None where the run wants none."""
    if not request.baseline:
        return None
    model = site.model(local_request(request))
    if before is not None:
        model.restore(before.local, ())
    return model


def personal_model(site: Site, request: AgreedRequest, before: Entry | None) -> TrunkModel | None:
    """The site's own model beside the shared one (Ditto), as the round before left it; None where the plan has none."""
    if not request.plan.personal:
        return None
    model = site.model(request)
    if before is not None and before.personal:
        model.restore(before.personal, ())
    return model


def models_by_role(site: Site, request: AgreedRequest, arrays: Arrays, before: Entry | None) -> dict[str, TrunkModel]:
    """The models of this site as the last round left them; the federated one with the lent `arrays`."""
    roles = {"federated": federated_model(site, request, arrays, before)}
    if before is not None and before.personal:
        roles["personal"] = site.model(request)
        roles["personal"].restore(before.personal, ())
    if (local := local_model(site, request, before)) is not None:
        roles["local"] = local
    return roles


@dataclass
class BestModels:
    """The best model of each role so far, by validation loss: early stopping, alike for every role.

    Args:
        planned: in a second pass, role -> the round of a pass that was best in the first; its model is kept again.
    """

    state: dict[str, State]
    loss: dict[str, float]
    round: dict[str, int]
    planned: Mapping[str, int]

    @classmethod
    def of(cls, before: Entry | None, planned: Mapping[str, int] | None = None) -> "BestModels":
        stored = (dict(before.best), dict(before.best_loss), dict(before.best_round)) if before else ({}, {}, {})
        return cls(*stored, planned or {})

    def keep_if_better(self, role: str, model: TrunkModel, loss: float, request: AgreedRequest) -> None:
        if request.plan.keep == "best" and np.isfinite(loss) and loss < self.loss.get(role, np.inf):
            self._keep(role, model, loss, request)

    def keep_if_planned(self, role: str, model: TrunkModel, request: AgreedRequest) -> None:
        """In a second pass: it trains on the validation rows, so no loss can choose."""
        if self.planned.get(role) == request.done:
            self._keep(role, model, 0.0, request)

    def _keep(self, role: str, model: TrunkModel, loss: float, request: AgreedRequest) -> None:
        self.state[role], self.loss[role], self.round[role] = model.private(()), loss, request.done

    def may_improve(self, role: str, request: AgreedRequest) -> bool:
        """Whether a model that trains alone should go on; one that lends trains on for the other sites."""
        if request.passed:
            return request.done < self.planned.get(role, request.rounds)
        patience = request.plan.patience_rounds
        return not patience or role not in self.round or request.done - self.round[role] < patience

    def restore_best(self, role: str, model: TrunkModel, site: Site, request: AgreedRequest) -> None:
        """Put the best state into `model`, where a round before the last was better."""
        if role in self.state and (request.passed or self.loss[role] < curve_loss(model, site)):
            model.restore(self.state[role], ())

    def best_round(self, role: str, model: TrunkModel, site: Site, request: AgreedRequest) -> int:
        """The round of a pass in which the best model of the role was reached."""
        better = role in self.state and self.loss[role] < curve_loss(model, site)
        return self.round[role] if better else request.done


def curve_loss(model: TrunkModel, site: Site) -> float:
    """The validation loss of a model on the rows that a round's curve is drawn from."""
    return curve(model, site.resident("curve"), site.data.tasks).loss


def finished_models(
    site: Site, request: AgreedRequest, roles: dict[str, TrunkModel], best: BestModels
) -> dict[str, TrunkModel]:
    """`roles` at their best round, after the last steps of the strategy; a personal model becomes the federated one."""
    for role, model in roles.items():
        best.restore_best(role, model, site, request)
    finish(site, roles["federated"], request)
    if "personal" not in roles:
        return roles
    unchanged = {role: model for role, model in roles.items() if role != "personal"}
    return {**unchanged, "shared": roles["federated"], "federated": roles["personal"]}
