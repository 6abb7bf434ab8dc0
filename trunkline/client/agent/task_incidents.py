"""The incidents of the executor: which tasks failed or were refused and why, each reported once while the cause lasts."""

from pathlib import Path

from flwr.app import Message

from trunkline.client.agent.activity import AgentTask
from trunkline.flower.errors import CRASHED, DECLINED, FULL, PENDING, REFUSED
from trunkline.runtime import disk
from trunkline.runtime.incidents import Incidents, Kind


class TaskIncidents:
    """What the executor adds to `incidents.jsonl` of the site's state folder.

    Args:
        site: its name, in every line.
    """

    def __init__(self, state: Path, site: str = "") -> None:
        self.state = state
        self._incidents = Incidents(state, site)

    def note(self, kind: Kind, text: str, remedy: str, about: str = "", round: int | None = None) -> None:
        self._incidents.note(kind, text, round=round, remedy=remedy, about=about)

    def recover(self, text: str, about: str, round: int | None = None) -> None:
        """End the failure `about` this subject; nothing is written if there was none."""
        self._incidents.note("recovery", text, round=round, about=about)

    def report_reply(self, task: AgentTask, round: int | None, reply: Message) -> None:
        """A reply with an error is an incident; one without ends the failures of its run."""
        run, subject = task.run or "an unnamed run", f"order {task.run}"
        if not reply.has_error():
            self.recover(f"requests of {run} are answered again", subject, round)
            self.recover("replies can be kept again", "room", round)
            return
        code, text = reply.error.code, f"{run}, {task.label}: {reply.error.reason}"
        if code == FULL:
            text = f"a reply could not be kept in {self.state}: {reply.error.reason}"
            room = disk.describe_free(self.state)
            remedy = f"Free space there ({room} now): the server asks again, and the round is not lost."
            self.note("failure", text, remedy, "room", round)
        elif code == DECLINED:
            remedy = "`trunkline client contracts` shows the decision and its cause."
            self.note("refusal", text, remedy, subject, round)
        elif code == PENDING:
            self.note("note", text, "`trunkline client accept` or `refuse` decides.", subject, round)
        elif (
            code in (CRASHED, REFUSED) and task.run
        ):  # without a run the app was refused, which is reported by its digest
            kind: Kind = "refusal" if code == REFUSED else "failure"
            self.note(kind, text, "logs/executor.log in the state folder has the details.", subject, round)


def round_of(message: Message) -> int | None:
    """The round in the message's group id, which the server sets."""
    group = message.metadata.group_id
    return int(group) if group.isascii() and group.isdigit() and len(group) < 10 else None
