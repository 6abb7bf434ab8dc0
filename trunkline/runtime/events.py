"""What a run reports while it goes on: one frozen dataclass for each event, and its form as a line of JSON.

A run writes its events to `events.jsonl`, one JSON object a line; docs/events.md lists them. The key `event` names the
kind. A reader passes over the keys that it does not know, because a newer server may write more of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

STAMPS = {
    "at": "seconds since 1970 by the server's clock; written by a deployed server",
    "virtual_seconds": "seconds of virtual time since the run began; written by a simulated world",
}  # keys that any event may have, with their meaning


def _key(meaning: str, key: str = "", *, default: Any = MISSING) -> Any:
    """A field of an event.

    Args:
        meaning: for docs/events.md.
        key: its name in JSON, where the field cannot have that name in Python.
        default: of a line that lacks the key. A field whose default is None is left out of JSON while it is None.
    """
    return field(default=default, metadata={"meaning": meaning, "key": key})


@dataclass(frozen=True)
class Event:
    """Something that happened in a run."""

    name: ClassVar[str] = ""

    def to_json(self) -> dict[str, Any]:
        """The event as plain values, under the keys of docs/events.md."""
        line: dict[str, Any] = {"event": self.name}
        for column in fields(self):
            value = getattr(self, column.name)
            if value is None and column.default is None:
                continue
            line[json_key(column)] = list(value) if isinstance(value, tuple) else value
        return line


OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class SitesGathering(Event):
    """The run waits for sites before its first round. Written at every change, and about once a minute."""

    name: ClassVar[str] = "gather"
    sites: tuple[str, ...] = _key("sites that have joined the run")
    wanted: int = _key("sites that the run needs before it starts")
    missing: tuple[str, ...] = _key("sites that are enrolled, or named in run.toml, and have not joined", default=())


@dataclass(frozen=True)
class RunStarted(Event):
    """All sites that the run needs have joined."""

    name: ClassVar[str] = "start"
    run: str = _key("the run's name")
    strategy: str = _key("the strategy's name")
    rounds: int = _key("rounds of the whole run")
    sites: tuple[str, ...] = _key("the cohort's sites")
    trunk_parameters: int = _key("numbers in the arrays that the run lends")
    resumed_at: int | None = _key(
        "the last finished round, where the run goes on from a checkpoint; null for a new run"
    )


@dataclass(frozen=True)
class RoundStarted(Event):
    """A round begins: its requests go out."""

    name: ClassVar[str] = "round"
    round: int = _key("from 1")
    rounds: int = _key("rounds of the whole run")


@dataclass(frozen=True)
class ReplyReceived(Event):
    """A reply to a training request was admitted or refused."""

    name: ClassVar[str] = "reply"
    round: int = _key("the round that is under way")
    site: str = _key("the site; empty for a sum over many sites of a simulation")
    refused: str | None = _key("why the reply was set aside; null where it was admitted")
    admitted: int = _key("updates admitted so far in this round", "in")
    expected: int = _key("sites that were asked; in a buffered run the updates that a step needs", "of")


@dataclass(frozen=True)
class RoundEnded(Event):
    """A round is finished. A run with `strategy = "central"` writes no more keys than these."""

    name: ClassVar[str] = "round_end"
    round: int = _key("from 1")
    rounds: int = _key("rounds of the whole run")
    sites: int = _key("sites whose updates count in the new trunk")
    seconds: float = _key("wall time of the round, in seconds")
    train_loss: float | None = _key("weighted mean of the sites' training losses; null where no site reports one")


@dataclass(frozen=True)
class FederatedRoundEnded(RoundEnded):
    """A round of a federation is finished."""

    validation_loss: float | None = _key("weighted mean of the sites' validation losses; null as above")
    local_validation_loss: float | None = _key("the same of the models that each site trains alone; null as above")
    bytes_up: int = _key("bytes of all admitted updates")
    bytes_down: int = _key("bytes of all arrays that went to sites")
    refused: int = _key("replies that were set aside")


@dataclass(frozen=True)
class BufferedRoundEnded(FederatedRoundEnded):
    """A step of a buffered run is finished."""

    updates: int = _key("updates in the step; a site may have sent several")
    staleness_mean: float = _key("mean age of the updates, in steps")
    staleness_max: int = _key("the largest age of an update, in steps")
    repeated: int = _key("replies so far to questions that had been answered before")


@dataclass(frozen=True)
class Waiting(Event):
    """Too few sites answer. The run asks again until enough of them are back."""

    name: ClassVar[str] = "waiting"
    text: str = _key("how many sites are in, how many are needed, and what happens next")
    round: int | None = _key("the round; left out before the first round", default=None)


@dataclass(frozen=True)
class SiteRecovered(Event):
    """A site answered after it had been asked more than once."""

    name: ClassVar[str] = "recovered"
    site: str = _key("the site")
    round: int = _key("the round")
    text: str = _key("how often it was asked, and why")


@dataclass(frozen=True)
class LateReply(Event):
    """A second reply came to a question that was asked again. It was not counted."""

    name: ClassVar[str] = "late"
    site: str = _key("the site")
    round: int = _key("the round")
    text: str = _key("the same in words")


@dataclass(frozen=True)
class Note(Event):
    """A sentence for the operator."""

    name: ClassVar[str] = "note"
    text: str = _key("the sentence")


@dataclass(frozen=True)
class Evaluating(Event):
    """A site's scorecard came, or will never come."""

    name: ClassVar[str] = "evaluate"
    received: int = _key("sites that have answered so far", "in")
    expected: int = _key("sites of the cohort", "of")


@dataclass(frozen=True)
class RunEnded(Event):
    """All rounds and the evaluation are finished. The report is written next."""

    name: ClassVar[str] = "end"
    seconds: float = _key("wall time of the run, over all its resumptions, in seconds")


@dataclass(frozen=True)
class ReportWritten(Event):
    """The report is on disk. This is the last event of a run that ended well."""

    name: ClassVar[str] = "done"
    out: str = _key("the run's folder")


@dataclass(frozen=True)
class RunFailed(Event):
    """The run stopped. This is the last event of a run that failed."""

    name: ClassVar[str] = "error"
    text: str = _key("what was expected, what was found, and what to do")


KINDS: tuple[type[Event], ...] = (
    SitesGathering, RunStarted, RoundStarted, ReplyReceived, RoundEnded, FederatedRoundEnded, BufferedRoundEnded, Waiting,
    SiteRecovered, LateReply, Note, Evaluating, RunEnded, ReportWritten, RunFailed,
)  # fmt: skip


def json_key(column: Field[Any]) -> str:
    """The name of an event's field in JSON."""
    return str(column.metadata["key"] or column.name)


def parse_event(line: Mapping[str, Any]) -> Event | None:
    """The event of a line of JSON; None where it is of no kind above, or a key is missing or of another type.

    Keys beyond those of the kind are passed over. Of several kinds with one name, the one with most keys is taken.
    """
    for kind in sorted(KINDS, key=lambda kind: -len(fields(kind))):
        if kind.name != line.get("event"):
            continue
        hints, values = get_type_hints(kind), dict[str, Any]()
        for column in fields(kind):
            value = line.get(json_key(column), column.default)
            if isinstance(value, list):
                value = tuple(value)
            if not _fits(value, hints[column.name]):
                break
            values[column.name] = value
        else:
            return kind(**values)
    return None


def _fits(value: object, hint: Any) -> bool:
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    kinds = get_args(hint) or (hint,)
    if isinstance(value, bool):
        return False
    return isinstance(value, kinds) or (float in kinds and isinstance(value, int))


def events_page() -> str:
    """The tables of docs/events.md, made from the classes above."""
    parts = []
    for kind in KINDS:
        parent = kind.__mro__[1]
        inherited = {column.name for column in fields(parent)}
        rows = [
            f"| `{json_key(column)}` | {_type_words(kind, column)} | {column.metadata['meaning']} |"
            for column in fields(kind)
            if column.name not in inherited
        ]
        more = f" It has the keys of `{parent.__name__}` and these:" if inherited else ""
        parts.append(
            "\n".join(
                [
                    f"## `{kind.name}`: {kind.__name__}",
                    "",
                    f"{kind.__doc__}{more}",
                    "",
                    "| key | type | meaning |",
                    "|---|---|---|",
                    *rows,
                ]
            )
        )
    return "\n\n".join(parts) + "\n"


def _type_words(kind: type[Event], column: Field[Any]) -> str:
    words = {str: "text", int: "whole number", float: "number", type(None): "null"}
    hint = get_type_hints(kind)[column.name]
    if get_origin(hint) is tuple:
        return "list of texts"
    kinds = [part for part in get_args(hint) or (hint,) if not (part is type(None) and column.default is None)]
    return " or ".join(words[part] for part in kinds)
