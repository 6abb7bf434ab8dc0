"""A site's yes or no to a run: the policy's word, a person's where the policy asks for one, and what was agreed on disk.

At round 0 the order says what the run is and the site's offer what it would take from here. Both together are the
`Consent`, kept in STATE/contracts. Every later order, and every reply (`egress`), is held to it. A simulated site has a
policy but nobody to ask: nothing is written there, and "ask" is a yes.
"""

from pathlib import Path

from trunkline.client.policy.contracts import Consent, Verdict, bytes_round, in_bytes, known, read, write
from trunkline.client.site import Site
from trunkline.config.site import PolicyConfig
from trunkline.errors import ContractError, Declined, Pending
from trunkline.protocol.contract import FIT_METRIC, changed_terms
from trunkline.protocol.messages import AgreedRequest, FitQuery, Offer, OfferRequest, RoundRequest
from trunkline.protocol.plan import Conditions
from trunkline.runtime.programs import account_name
from trunkline.security.keys import now

BY_POLICY = "policy"


def objection(policy: PolicyConfig, request: RoundRequest, size: int | None = None) -> str:
    """What a policy has against a run, in words; empty where nothing.

    Args:
        size: bytes that would leave in a round, where that is known.
    """
    about = request.about
    for part in request.lend:
        # "scaler" is not asked for here: a site that does not lend its statistics takes part without them
        if part not in ("scaler", *policy.lend) and not (part.startswith("head.") and "heads" in policy.lend):
            return f"its policy lends {', '.join(policy.lend) or 'nothing'}; this run wants {part!r}"
    if policy.max_rounds is not None and request.total_rounds > policy.max_rounds:
        return f"its policy caps a run at {policy.max_rounds} rounds; this run has {request.total_rounds}"
    if size is not None and policy.max_bytes_round is not None and size > policy.max_bytes_round:
        return f"its policy caps a round at {in_bytes(policy.max_bytes_round)}; this run takes {in_bytes(size)}"
    bound = about.guards.clip_norm
    if "clip" in policy.guards and bound is None:
        return "its policy demands the guard `clip`; this run has none. Set [guards] clip_norm in the run"
    if policy.max_clip_norm is not None and bound is not None and bound > policy.max_clip_norm:
        return f"its policy demands the guard clip({policy.max_clip_norm:g}) or tighter; this run has clip({bound:g})"
    if policy.strategies and about.strategy not in policy.strategies:
        return f"its policy allows the strategies {', '.join(policy.strategies)}; this run uses {about.strategy or 'one it does not name'}"
    if policy.operators and about.operator not in policy.operators:
        return f"its policy takes part in runs of {', '.join(policy.operators)}; this one is of {about.operator or 'nobody it names'}"
    if policy.decide == "refuse" and about.name not in policy.runs:
        return "its policy takes part in no run" + (f" but {', '.join(policy.runs)}" if policy.runs else "")
    return ""


def lets_go(policy: PolicyConfig, metrics: tuple[str, ...]) -> tuple[str, ...]:
    """Those of a run's metrics that a policy lets leave, in their order."""
    allowed = policy.metrics
    return tuple(name for name in metrics if allowed is True or (allowed is not False and name in allowed))


def at_offer(site: Site, request: OfferRequest, offer: Offer) -> None:
    """Decide on a run before the offer to take part in it leaves.

    Raises:
        Declined: the policy, or a person, says no.
        Pending: a person has to say it first: `trunkline client accept`.
        StorageError: what was agreed cannot be kept, so nothing is agreed.
    """
    policy = site.config.policy
    why = objection(policy, request, bytes_round(offer.arrays, offer.metrics))
    if not site.plant:
        if why:
            raise Declined(f"{site.name}: {why}.")
        return
    at = now().isoformat(timespec="seconds")
    asked = Consent(
        site=site.name, run=request.run, terms=request.terms(), arrays=offer.arrays, once=offer.once, metrics=offer.metrics,
        tasks=offer.tasks, inputs=offer.inputs, report=policy.report, verdict="pending", asked=at,
    )  # fmt: skip
    found = read(site.state, request.run)
    before = found if found is not None and found.same_question(asked) else None
    by_person = before if before is not None and before.by not in ("", BY_POLICY) else None
    if why:
        decided = asked.model_copy(update={"verdict": "refused", "by": BY_POLICY, "why": why, "decided": at})
    elif by_person is not None:
        decided = by_person
    elif policy.decide == "accept" or request.about.name in policy.runs:
        decided = asked.model_copy(update={"verdict": "accepted", "by": BY_POLICY, "decided": at})
    else:
        decided = asked
    if before is None or (before.verdict, before.by, before.why) != (decided.verdict, decided.by, decided.why):
        write(site.state, decided)
    _answered(site, decided)


def hold(site: Site, request: AgreedRequest) -> None:
    """Hold an order of a later round to what was agreed at round 0.

    Raises:
        Declined: the policy says no, or a person does by now.
        Pending: a person has not said yes.
        ContractError: it is not what was agreed, or a real plant has agreed to nothing.
    """
    if isinstance(request, FitQuery) and FIT_METRIC not in lets_go(site.config.policy, (FIT_METRIC,)):
        raise Declined(f"{site.name}: its policy lets no `{FIT_METRIC}` leave, which is all that a fit query asks for.")
    if not site.plant:
        if why := objection(site.config.policy, request):
            raise Declined(f"{site.name}: {why}.")
        return
    found = read(site.state, request.run)
    check_order(site.name, request, found)
    assert found is not None  # check_order refuses where there is none
    if why := objection(site.config.policy, request, found.bytes_round):
        raise Declined(f"{site.name}: {why}.")
    _answered(site, found)


def check_order(site: str, request: RoundRequest, found: Consent | None) -> None:
    """Raises ContractError when `order` is none of the run that `found` is about."""
    if found is None:
        raise ContractError(f"{site} never agreed to run {request.run!r}: a run starts by asking whether it may")
    if changes := changed_terms(found.terms, request.terms()):
        raise ContractError(
            f"the terms of run {request.run!r} are not those {site} was asked about: {'; '.join(changes[:3])}. "
            "Start a run of its own with them"
        )
    if isinstance(request, AgreedRequest) and request.conditions != Conditions():
        raise ContractError(
            f"run {request.run!r} wants {site} to train as if its rows were others; that is for simulations only"
        )
    if request.round > request.total_rounds + 1:
        raise ContractError(
            f"run {request.run!r} has {request.total_rounds} rounds; this order is for round {request.round}"
        )


def _answered(site: Site, decided: Consent) -> None:
    if decided.verdict == "pending":
        raise Pending(
            f"{site.name}: its plant has not agreed yet (`trunkline client accept SITE_DIR {decided.run}` there)."
        )
    if decided.verdict == "refused":
        raise Declined(
            f"{site.name}: {decided.why if decided.by == BY_POLICY else f'refused at the plant by {decided.by}'}."
        )


def decide(state: Path, run: str, verdict: Verdict, by: str = "") -> Consent:
    """A person's word on a run, which holds while nothing about the run changes.

    Raises:
        ContractError: nobody asked, or the plant's own policy has already said no.
    """
    found = known(state, run)
    if verdict == "accepted" and found.verdict == "refused" and found.by == BY_POLICY:
        raise ContractError(
            f"run {run}: the plant's policy says no ({found.why}). Change the policy; at the next question the answer is new."
        )
    by = " ".join(by.split()) or account_name()
    if by == BY_POLICY:
        raise ContractError(
            f"--by {by}: that is what the policy's own decisions are marked with. Give a person's name."
        )
    decided = found.model_copy(
        update={"verdict": verdict, "by": by, "why": "", "decided": now().isoformat(timespec="seconds")}
    )
    write(state, decided)
    return decided


def check_size(policy: PolicyConfig, size: int) -> str:
    """What a policy has against a reply of `size` bytes."""
    cap = policy.max_bytes_round
    if cap is None or size <= cap:
        return ""
    return f"its policy caps a reply at {in_bytes(cap)}; this one has {in_bytes(size)}"
