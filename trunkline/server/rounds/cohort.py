"""The sites that take part: their offers, the contract made of each offer, and the name behind each node."""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from flwr.app import RecordDict
from numpy.typing import NDArray

import trunkline
from trunkline.config.run import CohortConfig
from trunkline.errors import ContractError, QuorumError, Refused
from trunkline.flower.errors import DECLINED, PENDING
from trunkline.flower.records import open_records, to_records
from trunkline.protocol.arrays import Arrays, ArraySpec, specs_of
from trunkline.protocol.contract import Contract, metric_names
from trunkline.protocol.header import UPDATE
from trunkline.protocol.messages import Offer, OfferRequest
from trunkline.protocol.plan import SITE_NAME
from trunkline.runtime.events import Note, OnEvent, SitesGathering, Waiting
from trunkline.server.releases.release import check_statistics
from trunkline.server.rounds.admission import read_header
from trunkline.server.rounds.messaging import NodeReply, Transport, ask, now, pause

GREET_S = 0.5  # pause between looks for new nodes while the cohort gathers
GREET_MOST_S = 120.0  # longest one look waits for answers: a site reads its data before its first
GREET_AGAIN_S = 30.0  # longest one look waits for answers when a run is taken up again
CONSENT_S = 5.0  # pause between questions to a site whose plant has not decided yet
SILENT_S = 60.0  # pause before a node is greeted again that did not answer
REPORT_S = 60.0  # between two reports of the same while the cohort gathers


@dataclass(frozen=True)
class Member:
    """One site of the cohort."""

    site: str
    node: int
    offer: Offer
    contract: Contract
    first: Arrays  # what it starts its lent stem and heads from; empty when only the trunk is lent
    once: Arrays = field(default_factory=Arrays)  # its scaler's statistics, for the release; never part of a round

    @cached_property
    def lends(self) -> tuple[str, ...]:
        """Names of the arrays that go to it and come back."""
        return tuple(spec.name for spec in self.contract.arrays)

    @cached_property
    def digest(self) -> str:
        """Of its contract."""
        return self.contract.digest()


class Cohort:
    """The sites of one run, by name.

    Args:
        greeting: the request of round 0.
        trunk: the lent trunk's arrays (empty when the trunk stays home); every member has to have exactly these.
        on_event: takes the events of the gathering.
        roster: gives Flower's node id -> site of all that are enrolled now; None where no site has to be (a simulation).
    """

    def __init__(
        self,
        transport: Transport,
        config: CohortConfig,
        greeting: OfferRequest,
        trunk: Arrays,
        on_event: OnEvent,
        roster: Callable[[], Mapping[int, str]] | None = None,
    ) -> None:
        self.roster = roster
        self.transport = transport
        self.config = config
        self.greeting = greeting
        self.on_event = on_event
        self.trunk = specs_of(trunk)
        self.members: dict[str, Member] = {}
        self.specs: dict[str, ArraySpec] = {spec.name: spec for spec in self.trunk}
        self._greeted: set[int] = set()
        self._pending: dict[int, float] = {}  # node whose plant has not decided -> when it is asked again
        self._left_out: dict[str, str] = {}
        self._gathering: SitesGathering | None = None  # the last report
        self._reported_at = 0.0

    def gather(self) -> None:
        """Wait until min_sites, and every site named in run.toml, have made their offer.

        Raises:
            QuorumError: they did not within `gather_s`; the text names the sites that came and those that are missing.
        """
        end = now(self.transport) + self.config.gather_s
        while True:
            self.greet(deadline_s=min(GREET_MOST_S, max(0.0, end - now(self.transport))))
            missing = [site for site in self.config.sites if site not in self.members]
            if len(self.members) >= self.config.min_sites and not missing:
                return
            if now(self.transport) >= end or (self.transport.complete and not self._pending):
                joined = ", ".join(sorted(self.members)) or "none"
                named = f"; missing by name: {', '.join(missing)}" if missing else ""
                causes = "".join(f"{cause} " for cause in self._left_out.values())
                raise QuorumError(
                    f"{len(self.members)} of {self.config.min_sites} sites have joined ({joined}{named}). {causes}"
                    "Start or mend the missing sites, or lower [cohort] min_sites, and run again."
                )
            self._report_gathering()
            pause(self.transport, GREET_S, end - now(self.transport))

    def _report_gathering(self) -> None:
        """Report who is here and who is missing: at every change, and where plants may still come, once a minute."""
        enrolled = self.roster().values() if self.roster is not None else ()
        missing = {*self.config.sites, *enrolled} - self.members.keys()
        event = SitesGathering(
            sites=tuple(sorted(self.members)), wanted=max(self.config.min_sites, len(self.config.sites)),
            missing=tuple(sorted(missing)),
        )  # fmt: skip
        moment = now(self.transport)
        if event != self._gathering or (self.transport.durable and moment >= self._reported_at + REPORT_S):
            self._gathering, self._reported_at = event, moment
            self.on_event(event)

    def keep(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """The members as plain values, and their arrays by `SITE/first/NAME` and `SITE/once/NAME`: for a checkpoint."""
        about = {
            site: {
                "node": member.node,
                "offer": member.offer.model_dump(mode="json"),
                "first": list(member.first),
                "once": list(member.once),
            }
            for site, member in sorted(self.members.items())
        }
        arrays = {
            f"{site}/{part}/{name}": array
            for site, member in self.members.items()
            for part, tensors in (("first", member.first), ("once", member.once))
            for name, array in tensors.items()
        }
        return about, arrays

    def restore(self, about: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Members as `keep` gave them: a site that is away when a run is taken up again is a member still."""
        for site, stored in about.items():
            offer = Offer.model_validate(stored["offer"])
            first, once = (
                Arrays({name: arrays[f"{site}/{part}/{name}"] for name in stored[part]}) for part in ("first", "once")
            )
            self.members[site] = Member(site, int(stored["node"]), offer, _contract(offer), first, once)
            for spec in offer.arrays:
                self.specs.setdefault(spec.name, spec)

    def gather_again(self) -> None:
        """Wait until enough of the restored members have answered; the others are waited for in their rounds.

        Raises:
            QuorumError: they have not within `outage_s`.
        """
        total = len(self.members)
        needed = max(1, math.ceil(total * self.config.quorum))
        end = now(self.transport) + self.config.outage_s
        reported = False
        while True:
            self.greet(deadline_s=min(GREET_AGAIN_S, max(0.0, end - now(self.transport))))
            back = [site for site, member in self.members.items() if member.node in self._greeted]
            if len(back) >= needed:
                return
            missing = ", ".join(sorted(set(self.members) - set(back)))
            if now(self.transport) >= end or self.transport.complete:
                raise QuorumError(
                    f"{len(back)} of {total} sites are back, {needed} are needed (quorum {self.config.quorum:g}); missing: {missing}. "
                    "Start or mend them and run again with --resume."
                )
            if not reported:
                reported = True
                text = f"Taken up again with {len(back)} of {total} sites, {needed} are needed; missing: {missing}. It goes on when they are back."
                self.on_event(Waiting(text))
            pause(self.transport, GREET_S, end - now(self.transport))

    def greet(self, deadline_s: float) -> None:
        """Ask every node not yet known who it is. A node that restarted comes back under a new id, and its site moves to it.

        A site whose plant leaves the decision to a person is asked again every few seconds, here and at later rounds.
        """
        roster = self.roster() if self.roster is not None else None
        moment = now(self.transport)
        new = [
            node
            for node in self.transport.get_node_ids()
            if node not in self._greeted
            and self._pending.get(node, moment) <= moment
            and (roster is None or node in roster)  # a site that has just enrolled is in it in a moment
        ]
        if not new:
            return
        content = self.greeting.model_dump_json()
        offers: dict[int, tuple[Offer, Arrays]] = {}
        requests: dict[int, Callable[[], RecordDict]] = {node: lambda: to_records({}, content) for node in new}
        for answer in ask(
            self.transport, "query", requests, round=0, deadline_s=deadline_s, resend_s=self.config.resend_s
        ):
            if answer.code == PENDING:
                self._wait_for(answer)
                continue
            if answer.silent and not self.transport.complete:  # hung, or cut off: it is asked again later
                self._pending[answer.node] = now(self.transport) + SILENT_S
                continue
            self._greeted.add(answer.node)
            self._pending.pop(answer.node, None)
            if answer.content is None:
                site, cause = (
                    _refusal_of(answer) if answer.code == DECLINED else (f"node {answer.node}", answer.failure)
                )
                if UPDATE.format("site") in cause:  # it cannot know to which version
                    cause += f" This server's Trunkline is {trunkline.__version__}."
                self._leave_out(site, cause)
                continue
            try:
                first, header, _ = open_records(answer.content)
                offer = read_header(Offer, header, f"node {answer.node}", 0)
                offers[answer.node] = (offer, Arrays(first))
            except ContractError as error:
                self._leave_out(f"node {answer.node}", str(error))
        self._agree_on_shapes(offers)
        for node, (offer, arrays) in sorted(offers.items(), key=lambda item: item[1][0].site):
            try:
                if roster is not None and offer.site != roster[node]:
                    raise Refused(
                        f"its node is enrolled as {roster[node]!r} and it calls itself {offer.site!r}. Give its site.toml the name it "
                        "was invited as."
                    )
                self._join(node, offer, arrays)
            except ContractError as error:
                self._leave_out(offer.site, str(error))

    def gone(self, node: int) -> str:
        """Why a node is not to be waited for any more; empty while it is enrolled, or where no site has to be."""
        if self.roster is None or node in self.roster():
            return ""
        return "Its certificate was revoked, or its site enrolled again with another."

    def _lends(self, name: str) -> bool:
        """Whether the run itself names the module an array belongs to: what a site offers never widens what may travel.

        The trunk's arrays are known exactly, because the server has built one; of stems and heads it knows the module.
        """
        if name in {spec.name for spec in self.trunk}:
            return True
        part, _, path = name.partition(".")
        if part == "head":
            return "heads" in self.greeting.lend or f"head.{path.partition('.')[0]}" in self.greeting.lend
        return part == "stem" and "stem" in self.greeting.lend

    def _agree_on_shapes(self, offers: dict[int, tuple[Offer, Arrays]]) -> None:
        """A lent stem or head has the shape that most sites offer; a site with another shape is left out, with the reason."""
        votes: dict[str, Counter[ArraySpec]] = {}
        for offer, _ in sorted(offers.values(), key=lambda offer_arrays: offer_arrays[0].site):
            for spec in filter(lambda spec: self._lends(spec.name), offer.arrays):
                votes.setdefault(spec.name, Counter())[spec] += 1
        for name, vote in votes.items():
            self.specs.setdefault(name, vote.most_common(1)[0][0])

    def _join(self, node: int, offer: Offer, arrays: Arrays) -> None:
        if offer.run != self.greeting.run:
            raise Refused(
                f"it offered itself for run {offer.run!r}; this is {self.greeting.run!r}. Restart its daemon."
            )
        member = self.members.get(offer.site)
        if member is not None and member.node != node and member.node in set(self.transport.get_node_ids()):
            raise Refused(
                f"another node that is online already calls itself {offer.site!r}. Give each site.toml its own `name`."
            )
        offered = {spec.name: spec for spec in offer.arrays}
        if foreign := [name for name in offered if not self._lends(name)]:
            raise Refused(
                f"it offers `{foreign[0]}`, which this run does not lend ({', '.join(self.greeting.lend) or 'nothing'}). "
                "Its Trunkline is another version, or not ours: update it."
            )
        for spec in self.trunk:
            if spec.name not in offered:
                raise Refused(
                    f"it has no `{spec.name}`; this run's trunk has. Its Trunkline builds another {self.greeting.trunk.backbone!r}: update it."
                )
        for spec in offer.arrays:
            wanted = self.specs[spec.name]
            if spec != wanted:
                remedy = (
                    "its Trunkline builds another trunk: update it"
                    if wanted in self.trunk
                    else "its sensors or classes differ: lend the trunk only"
                )
                raise Refused(f"`{spec.name}` has shape {spec.shape}; this run has {wanted.shape} ({remedy}).")
        contract = _contract(offer)
        beyond = {spec.name: spec for spec in (*offer.arrays, *offer.once) if spec not in self.trunk}
        Contract(arrays=tuple(beyond.values()), metrics=()).check(arrays, {})
        once = arrays.only({spec.name: spec for spec in offer.once})
        if "scaler" not in self.greeting.lend and once:
            raise Refused(f"it offers `{next(iter(once))}`, which this run does not lend. Update its Trunkline.")
        if foreign := [name for name in once if not name.startswith("scaler.")]:
            raise Refused(f"it offers `{foreign[0]}` beside the round's arrays; only statistics may travel so.")
        check_statistics(offer, once)
        if "scaler" in self.greeting.lend and not once:
            self.on_event(Note(f"{offer.site} lends no scaler statistics: its policy in site.toml does not name them."))
        self._left_out.pop(offer.site, None)
        first = arrays.only({name: None for name in arrays if name not in once})
        self.members[offer.site] = Member(offer.site, node, offer, contract, first, once)

    def _wait_for(self, answer: NodeReply) -> None:
        site, cause = _refusal_of(answer)
        if answer.node not in self._pending:
            self._left_out[site] = f"{site} waits for its plant's consent: {cause}"
            self.on_event(Note(self._left_out[site]))
        self._pending[answer.node] = now(self.transport) + CONSENT_S

    def _leave_out(self, site: str, cause: str) -> None:
        self._left_out[site] = f"{site} does not take part: {cause}"
        self.on_event(Note(self._left_out[site]))

    def first_arrays(self, trunk: Arrays) -> Arrays:
        """The arrays that round 1 starts from: the server's trunk, and lent stems and heads as the first site by name built them."""
        arrays = dict(trunk)
        for site in sorted(self.members):
            for name, array in self.members[site].first.items():
                arrays.setdefault(name, array)
        return Arrays(arrays)


def _contract(offer: Offer) -> Contract:
    """What a site with this offer may send in a round."""
    metrics = tuple(name for name in metric_names(offer.tasks) if name in offer.metrics)
    return Contract(arrays=offer.arrays, metrics=metrics)


def _refusal_of(answer: NodeReply) -> tuple[str, str]:
    """Site and reason of a refusal by a plant, whose text is `SITE: reason`; a name that no site may have is not taken over."""
    site, _, cause = answer.failure.partition(": ")
    return (site, cause) if cause and re.fullmatch(SITE_NAME, site) else (f"node {answer.node}", answer.failure)
