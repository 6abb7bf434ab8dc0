"""Whether a site takes part in a run: its policy decides, or a person where the policy asks for one.

The request of round 0 carries the terms of the run, and the site's offer lists what would leave. Both together are the
`Consent`, kept in STATE/contracts. Every later request, and every reply (`egress`), is compared with it. A simulated site
has a policy but nobody to ask: nothing is written there, and `decide = "ask"` accepts.
"""

from pathlib import Path

from trunkline.client.policy.contracts import Consent, Verdict, bytes_round, in_bytes, known, read, write
from trunkline.config.site import PolicyConfig
from trunkline.errors import ContractError, Declined, Pending
from trunkline.privacy import guards
from trunkline.protocol.contract import FIT_METRIC, changed_terms
from trunkline.protocol.messages import AgreedRequest, FitQuery, Offer, OfferRequest, RoundRequest
from trunkline.protocol.plan import Conditions
from trunkline.runtime.programs import account_name
from trunkline.security.keys import now

BY_POLICY = "policy"


def objection(policy: PolicyConfig, request: RoundRequest, size: int | None = None) -> str:
    """Why a policy refuses a run; empty where it does not.

    Args:
        size: bytes that would leave in a round; None where that is unknown.
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
    if of_guards := guards.objection(about.guards, policy):
        return of_guards
    if policy.strategies and about.strategy not in policy.strategies:
        return f"its policy allows the strategies {', '.join(policy.strategies)}; this run uses {about.strategy or 'one it does not name'}"
    if policy.operators and about.operator not in policy.operators:
        return f"its policy takes part in runs of {', '.join(policy.operators)}; this one is of {about.operator or 'nobody it names'}"
    if policy.decide == "refuse" and about.name not in policy.runs:
        return "its policy takes part in no run" + (f" but {', '.join(policy.runs)}" if policy.runs else "")
    return ""


def lets_go(policy: PolicyConfig, metrics: tuple[str, ...]) -> tuple[str, ...]:
    """The metrics of a run that a policy lets leave, in their order."""
    allowed = policy.metrics
    return tuple(name for name in metrics if allowed is True or (allowed is not False and name in allowed))


def ask_consent(policy: PolicyConfig, state: Path | None, request: OfferRequest, offer: Offer) -> None:
    """Decide on a run before the offer to take part in it leaves.

    Args:
        state: the plant's state folder, which keeps what was agreed. None: a simulated site, which asks nobody.

    Raises:
        Declined: the policy or a person refuses.
        Pending: a person has to agree first: `trunkline client accept`.
        StorageError: what was agreed cannot be kept, so nothing is agreed.
    """
    objections = objection(policy, request, bytes_round(offer.arrays, offer.metrics))
    if state is None:
        if objections:
            raise Declined(f"{offer.site}: {objections}.")
        return
    time = now().isoformat(timespec="seconds")
    asked = Consent(
        site=offer.site, run=request.run, terms=request.terms(), arrays=offer.arrays, once=offer.once,
        metrics=offer.metrics, tasks=offer.tasks, inputs=offer.inputs, report=policy.report, verdict="pending", asked=time,
    )  # fmt: skip
    stored = read(state, request.run)
    before = stored if stored is not None and stored.same_question(asked) else None
    by_person = before if before is not None and before.by not in ("", BY_POLICY) else None
    if objections:
        decided = asked.model_copy(update={"verdict": "refused", "by": BY_POLICY, "why": objections, "decided": time})
    elif by_person is not None:
        decided = by_person
    elif policy.decide == "accept" or request.about.name in policy.runs:
        decided = asked.model_copy(update={"verdict": "accepted", "by": BY_POLICY, "decided": time})
    else:
        decided = asked
    if before is None or (before.verdict, before.by, before.why) != (decided.verdict, decided.by, decided.why):
        write(state, decided)
    _raise_unless_accepted(decided)


def check_consent(site: str, policy: PolicyConfig, state: Path | None, request: AgreedRequest) -> None:
    """Compare a request of a later round with what was agreed at round 0.

    Args:
        state: as in `ask_consent`.

    Raises:
        Declined: the policy refuses, or a person does by now.
        Pending: no person has agreed yet.
        ContractError: it is not what was agreed, or a real plant has agreed to nothing.
    """
    if isinstance(request, FitQuery) and FIT_METRIC not in lets_go(policy, (FIT_METRIC,)):
        raise Declined(f"{site}: its policy lets no `{FIT_METRIC}` leave, which is all that a fit query asks for.")
    if state is None:
        if objections := objection(policy, request):
            raise Declined(f"{site}: {objections}.")
        return
    consent = check_terms(site, request, read(state, request.run))
    if objections := objection(policy, request, consent.bytes_round):
        raise Declined(f"{site}: {objections}.")
    _raise_unless_accepted(consent)


def check_terms(site: str, request: RoundRequest, consent: Consent | None) -> Consent:
    """The consent, where the request belongs to the run that it is about; raises ContractError otherwise."""
    if consent is None:
        raise ContractError(f"{site} never agreed to run {request.run!r}: a run starts by asking whether it may")
    if changes := changed_terms(consent.terms, request.terms()):
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
            f"run {request.run!r} has {request.total_rounds} rounds; this request is for round {request.round}"
        )
    return consent


def _raise_unless_accepted(consent: Consent) -> None:
    if consent.verdict == "pending":
        raise Pending(
            f"{consent.site}: its plant has not agreed yet (`trunkline client accept SITE_DIR {consent.run}` there)."
        )
    if consent.verdict == "refused":
        cause = consent.why if consent.by == BY_POLICY else f"refused at the plant by {consent.by}"
        raise Declined(f"{consent.site}: {cause}.")


def decide(state: Path, run: str, verdict: Verdict, by: str = "") -> Consent:
    """Store a person's decision on a run, which holds while nothing about the run changes.

    Raises:
        ContractError: the run never asked, or the plant's own policy refuses it.
    """
    asked = known(state, run)
    if verdict == "accepted" and asked.verdict == "refused" and asked.by == BY_POLICY:
        raise ContractError(
            f"run {run}: the plant's policy refuses ({asked.why}). Change the policy; at the next question the answer is new."
        )
    by = " ".join(by.split()) or account_name()
    if by == BY_POLICY:
        raise ContractError(
            f"--by {by}: that is what the policy's own decisions are marked with. Give a person's name."
        )
    decided = asked.model_copy(
        update={"verdict": verdict, "by": by, "why": "", "decided": now().isoformat(timespec="seconds")}
    )
    write(state, decided)
    return decided


def check_size(policy: PolicyConfig, size: int) -> str:
    """Why a policy refuses a reply of `size` bytes; empty where it does not."""
    cap = policy.max_bytes_round
    if cap is None or size <= cap:
        return ""
    return f"its policy caps a reply at {in_bytes(cap)}; this one has {in_bytes(size)}"
