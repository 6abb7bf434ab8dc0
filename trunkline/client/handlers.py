"""What a site does with each kind of request. Free of Flower; the vault is the only memory between two requests."""

import hashlib
from dataclasses import asdict

import numpy as np

import trunkline
from trunkline.client.data.statistics import lent_statistics, names_of
from trunkline.client.model_selection.evaluation import Decision, curve, decide_site, score_site
from trunkline.client.policy.consent import ask_consent, check_consent, lets_go
from trunkline.client.round_models import (
    BestModels,
    curve_loss,
    federated_model,
    finished_models,
    local_model,
    local_request,
    models_by_role,
    personal_model,
)
from trunkline.client.site import Site
from trunkline.client.state.vault import Entry, Question, Vault
from trunkline.client.training.loop import train_site
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

    A question that was answered before (same request, same arrays) is answered from the vault, byte for byte.

    Raises:
        ContractError: the request is not what the plant agreed to, or the trunk is another than the site builds.
        StorageError: the vault cannot be read or written; nothing was sent.
        Away: nothing of it is in the vault yet, and the plant is outside its hours or paused.
    """
    _check(site, request)
    vault = _vault(site, request)
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
        ContractError: the request is not what the plant agreed to, or the trunk is another than the site builds.
        StorageError: the vault cannot be read.
        Away: the plant is outside its hours, or paused.
    """
    _check(site, request)
    site.admit()
    before = _before(site, request, _vault(site, request))
    metrics = {FIT_METRIC: curve_loss(federated_model(site, request, arrays, before), site)}
    FIT_CONTRACT.check(Arrays(), metrics)
    return Reply(site=site.name, run=request.run, round=request.round, contract=request.contract, weight=1.0), metrics


def _check(site: Site, request: AgreedRequest) -> None:
    """Raise where the plant did not agree to this; from now on the site's rows are those under the request's conditions."""
    site.apply_conditions(request)
    check_consent(site.name, site.config.policy, site.contracts, request)


def _vault(site: Site, request: AgreedRequest) -> Vault:
    return Vault(site.state, request.run, site.tell, site.seal, site.name)


def _digest(request: AgreedRequest, arrays: Arrays) -> str:
    """Digest of a request with its lent arrays."""
    return hashlib.sha256(f"{request.model_dump_json()}|{arrays.digest()}".encode()).hexdigest()


def _before(site: Site, request: AgreedRequest, vault: Vault) -> Entry | None:
    """`Vault.before`; a version that is damaged is trained again, to the same bytes, from the one before it."""

    def again(asked: Question, before: Entry | None) -> Entry:
        return _train(site, open_stored_training(asked.request), asked.arrays, vault, before)

    return vault.before(request.round, request.passed, again)


def _train(site: Site, request: TrainRequest, arrays: Arrays, vault: Vault, before: Entry | None) -> Entry:
    model, local = federated_model(site, request, arrays, before), local_model(site, request, before)
    tasks, plan = site.data.tasks, request.plan
    metrics: dict[str, float] = {}
    balance = dict(before.balance) if before is not None else {}
    best = BestModels.of(before, _planned(vault, request))
    personal = personal_model(site, request, before)
    for role, trainee in (("federated", model), ("personal", personal), ("local", local)):
        if trainee is not None and request.passed:  # what trains on the validation rows cannot be judged by them
            best.keep_if_planned(role, trainee, request)
        elif trainee is not None and request.done > 0:  # before round 1 nothing has learnt anything
            point = curve(trainee, site.resident("curve"), tasks)
            best.keep_if_better(role, trainee, point.loss, request)
            # the curves called federated are those of the model the site uses: the personal one where there is one
            name = "federated" if role == "personal" else role
            metrics["validation_loss" if name == "federated" else "local_validation_loss"] = point.loss
            metrics |= {f"{task}.{name}": value for task, value in point.metrics.items()}
    seed = seed_of(request.seed, site.name, request.round)
    data, done = site.resident(site.rows(request)), request.done
    arrived = [parameter.detach().clone() for parameter in model.parameters_of("trunk")] if personal else None
    if request.lend or best.may_improve("federated", request):
        trained = train_site(
            model, data, tasks, plan, seed=seed, done=done, rounds=request.rounds, balance=balance.get("federated")
        )
        metrics |= {"train_loss": trained.loss, **trained.conflicts}
        balance["federated"] = trained.balance
    if personal is not None and best.may_improve("personal", request):
        pulled = plan.model_copy(update={"proximal": plan.personal})
        balance["personal"] = train_site(
            personal, data, tasks, pulled, seed=seed, done=done, rounds=request.rounds,
            toward=arrived, balance=balance.get("personal"),
        ).balance  # fmt: skip
    if local is not None and best.may_improve("local", request):
        balance["local"] = train_site(
            local, data, tasks, local_request(request).plan, seed=seed, done=done, rounds=request.rounds,
            balance=balance.get("local"),
        ).balance  # fmt: skip
    after = model.share(request.lend)
    delta = Arrays({name: np.subtract(array, arrays[name]) for name, array in after.items()})
    delta = at_site(guards_of(request.about.guards), delta)
    contract = contract_of(site, arrays)
    metrics = {name: metric for name, metric in metrics.items() if name in contract.metrics}
    contract.check(delta, metrics)
    return Entry(
        question=_digest(request, arrays),
        private=model.private(request.lend),
        local=local.private(()) if local is not None else {},
        best=best.state,
        best_loss=best.loss,
        best_round=best.round,
        personal=personal.private(()) if personal is not None else {},
        balance={role: state for role, state in balance.items() if state},
        delta=delta,
        metrics=metrics,
        weight=float(min(len(data), request.weight_cap)),
    )


def _planned(vault: Vault, request: AgreedRequest) -> dict[str, int]:
    if not request.passed:
        return {}
    return dict((vault.decisions() or {}).get("planned", {}))


def answer_decide(site: Site, request: DecideRequest, arrays: Arrays) -> Scorecard:
    """Choose by validation rows, before they are trained on, which model each task uses and where it decides.

    The reply has no rows: no test row is read, and the choice stays in the vault. A repeated request changes nothing.
    """
    _check(site, request)
    vault = _vault(site, request)
    question = _digest(request, arrays)
    if vault.decisions(question) is None:
        site.admit()
        before = _before(site, request, vault)
        roles = models_by_role(site, request, arrays, before)
        best = BestModels.of(before)
        planned = {role: best.best_round(role, model, site, request) for role, model in roles.items()}
        settled = decide_site(site, finished_models(site, request, roles, best), request)
        kept = {"planned": planned, "tasks": {name: asdict(decision) for name, decision in settled.items()}}
        vault.keep_decisions(question, kept)
    return Scorecard(site=site.name, run=request.run, rows=())


def answer_score(site: Site, request: ScoreRequest, arrays: Arrays) -> Scorecard:
    """Score on test rows the final trunk with this site's stem and heads, the local baseline and the gate's candidates.

    With a personal model beside the shared one (`plan.personal`), the personal model counts as the federated one.
    """
    _check(site, request)
    site.admit()
    vault = _vault(site, request)
    before = _before(site, request, vault)
    models = finished_models(site, request, models_by_role(site, request, arrays, before), BestModels.of(before))
    settled = None
    if request.passed:
        if (kept := vault.decisions()) is not None:
            settled = {name: Decision(**decision) for name, decision in kept["tasks"].items()}
        else:
            site.tell(
                "was absent when the sites chose by their validation rows, so it chooses by rows its models have seen: "
                "thresholds and the choice of the gate are too hopeful. Run it again with all sites there."
            )
    rows = score_site(site, models, request, settled=settled)  # its predictions stay here as evidence, report or not
    return Scorecard(site=site.name, run=request.run, rows=rows if site.config.policy.report else ())
