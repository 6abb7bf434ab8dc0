"""What a site does with each order: offer, train, evaluate. Pure of Flower; the vault is the only memory between calls."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TypeVar

import numpy as np

import trunkline
from trunkline.client.data.statistics import lent_statistics, names_of
from trunkline.client.model_selection.candidates import finish
from trunkline.client.model_selection.evaluation import Decision, curve, decide_site, score_site
from trunkline.client.policy.consent import ask_consent, check_consent, lets_go
from trunkline.client.site import Site
from trunkline.client.state.vault import Entry, Question, State, Vault
from trunkline.client.training.loop import train_site
from trunkline.models.trunk import TrunkModel
from trunkline.privacy.guards import at_site, guards_of
from trunkline.protocol.arrays import Arrays, seed_of, specs_of
from trunkline.protocol.contract import FIT_CONTRACT, FIT_METRIC, Contract, metric_names
from trunkline.protocol.messages import (
    AgreedRequest,
    DecideRequest,
    FitQuery,
    Offer,
    OfferRequest,
    Reply,
    Scorecard,
    ScoreRequest,
    TrainRequest,
    open_stored_training,
)
from trunkline.protocol.plan import LocalPlan, Phase

Agreed = TypeVar("Agreed", bound=AgreedRequest)


def answer_offer(site: Site, request: OfferRequest) -> tuple[Offer, Arrays]:
    """Who this site is and what it would lend; with it the first values of lent parts that only sites can build.

    Raises:
        Declined, Pending: the plant takes no part in this run, or has not decided yet.
    """
    model = site.model(request)
    lent = model.share(request.lend)
    trunk = model.share(("trunk",)) if "trunk" in request.lend else Arrays()
    once = lent_statistics(site.data) if "scaler" in request.lend and "scaler" in site.config.policy.lend else Arrays()
    offer = Offer(
        site=site.name,
        run=request.run,
        version=trunkline.__version__,
        arrays=specs_of(lent),
        metrics=contract_of(site, lent).metrics,
        tasks=tuple(task.card for task in site.data.tasks.values()),
        once=specs_of(once),
        inputs=names_of(site.data) if once or "stem" in request.lend else None,
        hours=site.config.hours if site.plant else None,  # a simulated one lives on its world's clock
    )
    ask_consent(site.config.policy, site.contracts, request, offer)
    first = {name: array for name, array in lent.items() if name not in trunk}
    return offer, Arrays({**first, **once})


def contract_of(site: Site, lent: Arrays) -> Contract:
    """What this site may send in this run; the server makes the same from the site's Offer."""
    named = metric_names(tuple(task.card for task in site.data.tasks.values()))
    return Contract(arrays=specs_of(lent), metrics=lets_go(site.config.policy, named))


def answer_train(site: Site, request: TrainRequest, arrays: Arrays) -> tuple[Reply, Entry]:
    """One round: adopt what came, train, put everything private on disk, and only then answer.

    A question that was answered before (same order, same arrays) is answered from the vault, byte for byte.

    Raises:
        ContractError: the order is not what the plant agreed to, or the trunk is another than the site builds.
        StorageError: the vault cannot be read or written; nothing was sent.
        Away: nothing of it is in the vault yet, and the plant is outside its hours or paused.
    """
    site.meet(request)
    check_consent(site.name, site.config.policy, site.contracts, request)
    vault = Vault(site.state, request.run, site.tell, site.seal, site.name)
    question = _digest(request, arrays)
    entry = vault.answered(request.round, question)
    if entry is None:  # what is in the vault may be had at any hour
        site.admit()
        before = _before(site, request, vault)
        if site.plant:  # others are made again with their whole simulation
            vault.keep_question(request.round, request.model_dump_json(), arrays, before is None)
        entry = _train(site, request, arrays, vault, before)
        vault.put(request.round, entry)
    reply = Reply(site=site.name, run=request.run, round=request.round, contract=request.contract, weight=entry.weight)
    return reply, entry


def answer_fit(site: Site, request: FitQuery, arrays: Arrays) -> tuple[Reply, dict[str, float]]:
    """How well these arrays fit this site's stem and heads as they are: its validation loss, and nothing else.

    Trains nothing and writes nothing, so any number of queries changes no answer that follows.

    Raises:
        ContractError: the order is not what the plant agreed to, or the trunk is another than the site builds.
        StorageError: the vault cannot be read.
        Away: the plant is outside its hours, or paused.
    """
    site.meet(request)
    check_consent(site.name, site.config.policy, site.contracts, request)
    site.admit()
    before = _before(site, request, Vault(site.state, request.run, site.tell, site.seal, site.name))
    model, _ = _models(site, request.model_copy(update={"baseline": False}), arrays, before)
    metrics = {FIT_METRIC: curve(model, site.resident("curve"), site.data.tasks).loss}
    FIT_CONTRACT.check(Arrays(), metrics)
    return Reply(site=site.name, run=request.run, round=request.round, contract=request.contract, weight=1.0), metrics


def _digest(request: AgreedRequest, arrays: Arrays) -> str:
    """Of a question: the same order with the same arrays."""
    return hashlib.sha256(f"{request.model_dump_json()}|{arrays.digest()}".encode()).hexdigest()


def _before(site: Site, request: AgreedRequest, vault: Vault) -> Entry | None:
    """`Vault.before`; a version that is damaged is trained again, to the same bytes, from the one before it."""

    def again(asked: Question, before: Entry | None) -> Entry:
        return _train(site, open_stored_training(asked.request), asked.arrays, vault, before)

    return vault.before(request.round, request.passed, again)


def _train(site: Site, request: TrainRequest, arrays: Arrays, vault: Vault, before: Entry | None) -> Entry:
    model, twin = _models(site, request, arrays, before)
    tasks, plan = site.data.tasks, request.plan
    metrics: dict[str, float] = {}
    balance = dict(before.balance) if before is not None else {}
    best = _Best.of(before, _planned(vault, request))
    personal = _personal(site, request, before)
    for who, one in (("federated", model), ("personal", personal), ("local", twin)):
        if one is not None and request.passed:  # what trains on the validation rows cannot be judged by them
            best.arrive(who, one, request)
        elif one is not None and request.done > 0:  # before round 1 nothing has learnt anything
            point = curve(one, site.resident("curve"), tasks)
            best.see(who, one, point.loss, request)
            # the curves called federated are those of the model the site uses: the personal one where there is one
            name = "federated" if who == "personal" else who
            metrics["validation_loss" if name == "federated" else "local_validation_loss"] = point.loss
            metrics |= {f"{task}.{name}": value for task, value in point.metrics.items()}
    seed = seed_of(request.seed, site.name, request.round)
    data, done = site.resident(site.rows(request)), request.done
    arrived = [parameter.detach().clone() for parameter in model.parameters_of("trunk")] if personal else None
    if request.lend or best.hopeful("federated", request):
        trained = train_site(
            model, data, tasks, plan, seed=seed, done=done, rounds=request.rounds, balance=balance.get("federated")
        )
        metrics |= {"train_loss": trained.loss, **trained.conflicts}
        balance["federated"] = trained.balance
    if personal is not None and best.hopeful("personal", request):
        pulled = plan.model_copy(update={"proximal": plan.personal})
        balance["personal"] = train_site(
            personal, data, tasks, pulled, seed=seed, done=done, rounds=request.rounds,
            toward=arrived, balance=balance.get("personal"),
        ).balance  # fmt: skip
    if twin is not None and best.hopeful("local", request):
        balance["local"] = train_site(
            twin, data, tasks, apart(request).plan, seed=seed, done=done, rounds=request.rounds,
            balance=balance.get("local"),
        ).balance  # fmt: skip
    after = model.share(request.lend)
    delta = Arrays({name: np.subtract(array, arrays[name]) for name, array in after.items()})
    delta = at_site(guards_of(request.about.guards), delta)
    contract = contract_of(site, arrays)
    metrics = {name: number for name, number in metrics.items() if name in contract.metrics}
    contract.check(delta, metrics)
    return Entry(
        question=_digest(request, arrays),
        private=model.private(request.lend),
        local=twin.private(()) if twin is not None else {},
        best=best.state,
        best_loss=best.loss,
        best_round=best.round,
        personal=personal.private(()) if personal is not None else {},
        balance={who: state for who, state in balance.items() if state},
        delta=delta,
        metrics=metrics,
        weight=float(min(len(data), request.weight_cap)),
    )


@dataclass
class _Best:
    """The best model so far of each kind, by validation loss: early stopping, alike for who federates and who does not.

    Args:
        planned: in a second pass, who -> the round of a pass that was best in the first; its model is kept again.
    """

    state: dict[str, State]
    loss: dict[str, float]
    round: dict[str, int]
    planned: Mapping[str, int]

    @classmethod
    def of(cls, before: Entry | None, planned: Mapping[str, int] | None = None) -> "_Best":
        kept = (dict(before.best), dict(before.best_loss), dict(before.best_round)) if before else ({}, {}, {})
        return cls(*kept, planned or {})

    def see(self, who: str, model: TrunkModel, loss: float, request: AgreedRequest) -> None:
        if request.plan.keep == "best" and np.isfinite(loss) and loss < self.loss.get(who, np.inf):
            self.state[who], self.loss[who], self.round[who] = model.private(()), loss, request.done

    def arrive(self, who: str, model: TrunkModel, request: AgreedRequest) -> None:
        if self.planned.get(who) == request.done:
            self.state[who], self.loss[who], self.round[who] = (
                model.private(()),
                0.0,
                request.done,
            )  # no loss tells here

    def hopeful(self, who: str, request: AgreedRequest) -> bool:
        """Whether one that trains alone should go on; who lends trains on for the others."""
        if request.passed:
            return request.done < self.planned.get(who, request.rounds)
        patience = request.plan.patience_rounds
        return not patience or who not in self.round or request.done - self.round[who] < patience

    def put_back(self, who: str, model: TrunkModel, site: Site, request: AgreedRequest) -> None:
        """The best state of `model`, where one before the last round was better."""
        if who in self.state and (request.passed or self.loss[who] < self._last(model, site)):
            model.restore(self.state[who], ())

    def plan(self, who: str, model: TrunkModel, site: Site, request: AgreedRequest) -> int:
        """At which round of a pass the best model of this one was reached."""
        return self.round[who] if who in self.state and self.loss[who] < self._last(model, site) else request.done

    @staticmethod
    def _last(model: TrunkModel, site: Site) -> float:
        return curve(model, site.resident("curve"), site.data.tasks).loss


def _planned(vault: Vault, request: AgreedRequest) -> dict[str, int]:
    if not request.passed:
        return {}
    return dict((vault.decisions() or {}).get("planned", {}))


def alone(plan: LocalPlan) -> LocalPlan:
    """The local twin's plan: the same steps and settings, everything trained together at full rate, no pull to anybody."""
    return plan.model_copy(
        update={"phases": (Phase(parts=("stem", "trunk", "heads")),), "proximal": 0.0, "private_rate": 1.0}
    )


def apart(request: Agreed) -> Agreed:
    """The order as the local twin takes it: lending nothing, and with its own settings where a search chose some for it."""
    own = request.local_baseline
    settings = {"plan": alone(own.plan), "trunk": own.trunk} if own else {"plan": alone(request.plan)}
    return request.model_copy(update={**settings, "lend": ()})


def _models(
    site: Site, request: AgreedRequest, arrays: Arrays, before: Entry | None
) -> tuple[TrunkModel, TrunkModel | None]:
    """The federated model with what arrived, and the local twin, both as the round before left them."""
    model = site.model(request)
    model.adopt(arrays, request.lend)
    twin = site.model(apart(request)) if request.baseline else None
    if before is not None:
        model.restore(before.private, request.lend)
        if twin is not None:
            twin.restore(before.local, ())
    return model, twin


def _personal(site: Site, request: AgreedRequest, before: Entry | None) -> TrunkModel | None:
    """The site's own model beside the shared one (Ditto), as the round before left it; None where the plan has none."""
    if not request.plan.personal:
        return None
    model = site.model(request)
    if before is not None and before.personal:
        model.restore(before.personal, ())
    return model


def answer_decide(site: Site, request: DecideRequest, arrays: Arrays) -> Scorecard:
    """Settle by validation rows, before they are trained on, which model each task uses and where it decides.

    The answer says nothing but that it is done: no test row is looked at, and what was settled stays in the vault. Asked
    again the same, it is done already.
    """
    site.meet(request)
    check_consent(site.name, site.config.policy, site.contracts, request)
    vault = Vault(site.state, request.run, site.tell, site.seal, site.name)
    question = _digest(request, arrays)
    if vault.decisions(question) is None:
        site.admit()
        before = _before(site, request, vault)
        roles = _roles(site, request, arrays, before)
        best = _Best.of(before)
        planned = {who: best.plan(who, one, site, request) for who, one in roles.items()}
        settled = decide_site(site, _finished(site, request, roles, best), request)
        kept = {"planned": planned, "tasks": {name: asdict(one) for name, one in settled.items()}}
        vault.keep_decisions(question, kept)
    return Scorecard(site=site.name, run=request.run, rows=())


def answer_score(site: Site, request: ScoreRequest, arrays: Arrays) -> Scorecard:
    """Score the final trunk with this site's stem and heads, the twin, and what else the gate may choose from, on test rows.

    With a personal model beside the shared one (`plan.personal`) it is the personal one that federation gave this site.
    """
    site.meet(request)
    check_consent(site.name, site.config.policy, site.contracts, request)
    site.admit()
    vault = Vault(site.state, request.run, site.tell, site.seal, site.name)
    before = _before(site, request, vault)
    models = _finished(site, request, _roles(site, request, arrays, before), _Best.of(before))
    settled = None
    if request.passed:
        if (kept := vault.decisions()) is not None:
            settled = {name: Decision(**one) for name, one in kept["tasks"].items()}
        else:
            site.tell(
                "was not there when the sites chose by their validation rows, so it chooses by rows its models have seen: "
                "thresholds and the choice of the gate are too hopeful. Run it again with all sites there."
            )
    rows = score_site(site, models, request, settled=settled)  # its predictions stay here as evidence, report or not
    return Scorecard(site=site.name, run=request.run, rows=rows if site.config.policy.report else ())


def _roles(site: Site, request: AgreedRequest, arrays: Arrays, before: Entry | None) -> dict[str, TrunkModel]:
    """The models of this site as the last round left them: "federated" with what arrived, "personal", "local"."""
    model, twin = _models(site, request, arrays, before)
    roles = {"federated": model}
    if before is not None and before.personal:
        roles["personal"] = site.model(request)
        roles["personal"].restore(before.personal, ())
    if twin is not None:
        roles["local"] = twin
    return roles


def _finished(site: Site, request: AgreedRequest, roles: dict[str, TrunkModel], best: _Best) -> dict[str, TrunkModel]:
    """`roles` at their best round, with what a strategy leaves for the end; the personal model is what federation gave."""
    for who, one in roles.items():
        best.put_back(who, one, site, request)
    finish(site, roles["federated"], request)
    if "personal" not in roles:
        return roles
    others = {who: one for who, one in roles.items() if who != "personal"}
    return {**others, "shared": roles["federated"], "federated": roles["personal"]}
