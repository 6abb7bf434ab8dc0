"""What a round leaves behind: the records that reports, releases and checkpoints are made from."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Refusal:
    """One reply that the server set aside, and the cause as a sentence."""

    site: str
    cause: str


@dataclass(frozen=True)
class RoundRecord:
    """The cost and the outcome of one round.

    Args:
        round: from 1.
        sites: the sites whose updates were averaged.
        refused: the replies that were set aside.
        seconds: wall time from the first message to the new trunk.
        bytes_up: of all replies together; bytes_down: of all messages to sites together.
        train_loss: weighted mean over `sites`; None when no site reported one.
        metrics: site -> metric name -> this round's value (`exchange.metric_names`): the learning curves.
        admitted: site -> digest of the update that was counted; only at the server of a deployment, never in a report.
        buffer: updates that one step of a buffered run waits for; 0 in any other run.
        staleness: in a buffered run: site -> age of each of its updates, in steps since the trunk it was trained from.
    """

    round: int
    sites: list[str]
    refused: list[Refusal]
    seconds: float
    bytes_up: int
    bytes_down: int
    train_loss: float | None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    admitted: dict[str, str] = field(default_factory=dict)
    buffer: int = 0
    staleness: dict[str, list[int]] = field(default_factory=dict)
