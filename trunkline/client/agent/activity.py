"""The executor's present and last task, in `<state>/activity.json`, for `client status`."""

import json
import os
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flwr.app import Message

from trunkline.client.agent.status import ACTIVITY
from trunkline.errors import ContractError
from trunkline.flower.records import open_records
from trunkline.runtime.incidents import clean_line, read_record, write_record

WORDS = {"train": "training", "query": "answering a query", "evaluate": "scoring"}


@dataclass(frozen=True)
class AgentTask:
    """One message of the server, as far as its content can be read.

    Args:
        kind: a message type of Flower, such as `train`.
        run: the name of the run; empty if unknown. round, rounds: 0 if unknown.
    """

    kind: str
    run: str = ""
    round: int = 0
    rounds: int = 0

    @classmethod
    def from_message(cls, message: Message) -> "AgentTask":
        """Read from a message that is not trusted: invalid fields are left out."""
        try:
            order = json.loads(open_records(message.content)[1])
            about = order.get("about") or {}
            run, counts = about.get("name") or order.get("run"), (order.get("round"), about.get("rounds"))
        except (ContractError, ValueError, AttributeError, RecursionError):
            run, counts = "", (0, 0)
        round, rounds = (count if type(count) is int and 0 <= count < 10**9 else 0 for count in counts)
        return cls(message.metadata.message_type, clean_line(run)[:80] if isinstance(run, str) else "", round, rounds)

    @property
    def label(self) -> str:
        """`training round 7 of 30`."""
        text = WORDS.get(self.kind, clean_line(self.kind)[:32])
        if self.kind != "train" or not self.round:
            return text
        return f"{text} round {self.round}" + (f" of {self.rounds}" if self.rounds else "")


class Activity:
    """The file; `begin` and `end` never raise and never wait for the disk."""

    def __init__(self, state: Path) -> None:
        self.path = state / ACTIVITY
        self.doing: AgentTask | None = None
        self._began = 0.0
        self._last: dict[str, Any] = read_record(self.path).get("last") or {}
        self._keep()

    def begin(self, task: AgentTask) -> None:
        self.doing, self._began = task, time.monotonic()
        self._keep()

    def end(self, outcome: str = "without a reply") -> None:
        """Record the end of the task; does nothing without a task."""
        if self.doing is None:
            return
        about = {**asdict(self.doing), "what": self.doing.label, "seconds": round(time.monotonic() - self._began, 2)}
        self._last = {**about, "outcome": clean_line(outcome), "at": _now()}
        self.doing = None
        self._keep()

    def _keep(self) -> None:
        doing = {**asdict(self.doing), "what": self.doing.label} if self.doing else None
        write_record(self.path, {"pid": os.getpid(), "doing": doing, "since": _now(), "last": self._last})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
