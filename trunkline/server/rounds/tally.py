"""The replies of one round: each is admitted or refused, counted, and reported."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from trunkline.errors import ContractError, Refused
from trunkline.flower.records import open_records
from trunkline.protocol.arrays import Arrays
from trunkline.protocol.messages import TrainRequest, Update
from trunkline.runtime.events import OnEvent, ReplyReceived
from trunkline.server.reporting.records import Refusal, RoundRecord
from trunkline.server.rounds.admission import admit
from trunkline.server.rounds.cohort import Member
from trunkline.server.rounds.messaging import NodeReply
from trunkline.server.rounds.update_journal import Content


@dataclass
class Tally:
    """The replies of one round, or of one step of a buffered run.

    Args:
        round: the round that is under way.
        expected: sites that are asked, or updates that a step needs.
        on_event: takes a ReplyReceived for every reply.
    """

    round: int
    expected: int
    on_event: OnEvent
    updates: int = 0
    sites: list[str] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0

    def admit(
        self, member: Member, request: TrainRequest, reply: NodeReply | Content,
        inspect: Callable[[Update, Content], Update] = lambda update, content: update,
    ) -> Update | None:  # fmt: skip
        """The update of a reply, counted; None where the reply is refused. Either is reported.

        Args:
            request: the question that the reply answers.
            inspect: the round's own look at an update before it counts; may raise ContractError.
        """
        cause, update = None, None
        try:
            content = content_of(member, request.round, reply, "update") if isinstance(reply, NodeReply) else reply
            arrays, header, metrics = content
            admitted = admit(member.site, member.contract, request, Arrays(arrays), header, metrics)
            nbytes, numbers = admitted.delta.nbytes, dict(admitted.metrics)
            update = inspect(admitted, content)
        except ContractError as error:
            cause = str(error)
            if not isinstance(error, Refused):
                cause = f"{member.site}, round {request.round}: reply set aside. {cause}."
            self.refuse(member.site, cause)
        else:
            self.count(member.site, numbers, nbytes)
        self.report(member.site, cause)
        return update

    def count(self, site: str, metrics: Mapping[str, float], nbytes: int) -> None:
        """Count one update of `site`, of `nbytes` bytes."""
        self.updates += 1
        self.sites.append(site)
        self.bytes_up += nbytes
        self.metrics[site] = dict(metrics)

    def refuse(self, site: str, cause: str) -> None:
        self.refused.append(Refusal(site=site, cause=cause))

    def report(self, site: str, cause: str | None = None) -> None:
        self.on_event(ReplyReceived(self.round, site, cause, self.updates, self.expected))

    def record(self, seconds: float, mean: Update) -> RoundRecord:
        """The round as the report has it.

        Args:
            mean: the weighted mean of its updates.
        """
        return RoundRecord(
            round=self.round, sites=sorted(set(self.sites)), refused=sorted(self.refused, key=lambda refusal: refusal.site),
            seconds=seconds, bytes_up=self.bytes_up, bytes_down=self.bytes_down, train_loss=mean.metrics.get("train_loss"),
            metrics={site: self.metrics[site] for site in sorted(self.metrics)},
        )  # fmt: skip

    def causes(self) -> str:
        """Every refusal in words; empty where there is none."""
        return " ".join(f"{refusal.site}: {refusal.cause}" for refusal in self.refused)


def content_of(member: Member, round: int, answer: NodeReply, wanted: str) -> Content:
    """Arrays, header and metrics of a reply.

    Args:
        wanted: what the reply should hold, for the error.

    Raises:
        Refused: the site answered with an error, or not at all.
        ContractError: the reply cannot be read.
    """
    if answer.content is None:
        cause = answer.failure.removeprefix(f"{member.site}: ")
        raise Refused(f"{member.site}, round {round}: no {wanted}. {cause}")
    return open_records(answer.content)
